"""The runs of a sweep and what has become of them: their directories are the ledger, and there is no other."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from spectraformer import records
from spectraformer.config import Run, from_json, to_json
from spectraformer.evaluation import resolve_precision
from spectraformer.files import DamagedError, read_json, require_sealed, seal, write_json
from spectraformer.nonfinite import NonFiniteError
from spectraformer.tasks.dataset import Dataset

FAILURE = "failure.json"
FORMAT = 1


class SweepError(OSError):
    """What mars or ends a sweep, and is no mistake in what it was asked."""


@dataclass(frozen=True)
class Entry:
    """One run of a sweep.

    Attributes:
        run: Its configuration; the precision is resolved.
        path: Its directory.
        data: Where its task is prepared.
        sha256: Fingerprint of the data.
        work: Tokens that training sees, steps · batch · tokens of an example: what its time is about proportional to.
    """

    run: Run
    path: Path
    data: Path
    sha256: str
    work: float

    @property
    def name(self) -> str:
        """Of its directory."""
        return self.path.name

    @property
    def done(self) -> bool:
        """Its result is written."""
        return (self.path / records.RESULT).exists()

    @property
    def failed(self) -> bool:
        """Its last try failed, and none began since."""
        return (self.path / FAILURE).exists() and not self.done

    @property
    def step(self) -> int:
        """Of its newest checkpoint; 0 without one."""
        found = (self.path / records.CHECKPOINTS).glob("step-*")
        return max((int(path.name[5:]) for path in found if path.name[5:].isdigit()), default=0)

    def as_json(self) -> dict[str, Any]:
        """As JSON values, for another process."""
        return {
            "run": to_json(self.run),
            "path": str(self.path),
            "data": str(self.data),
            "sha256": self.sha256,
            "work": self.work,
        }

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> Entry:
        """The inverse of :meth:`as_json`."""
        run = from_json(Run, found["run"])
        return cls(run, Path(found["path"]), Path(found["data"]), found["sha256"], found["work"])


def make_entry(run: Run, dataset: Dataset, data: Path, runs: Path, device: torch.device) -> Entry:
    """A run's place in the ledger.

    Args:
        run: Its configuration.
        dataset: What it is trained on.
        data: Where that is prepared.
        runs: Where runs are.
        device: A device of the kind it will be trained on, which decides the precision.
    """
    run = resolve_precision(run, device)
    path = records.run_path(runs.absolute(), run, dataset.fingerprint)
    work = run.train.steps * run.train.batch_size * dataset.documents * dataset.length
    return Entry(run, path, data.absolute(), dataset.fingerprint, float(work))


@dataclass(frozen=True)
class Failure:
    """Why the last try of a run failed.

    Attributes:
        reason: One line for people.
        trace: The traceback; empty if a process died without one.
        host: Where it was.
        device: On what.
        step: Of the newest checkpoint then.
        when: UTC.
    """

    reason: str
    trace: str
    host: str
    device: str
    step: int
    when: str


def write_failure(entry: Entry, error: BaseException | str, host: str, device: str) -> Failure:
    """Keeps a failure beside the run, for people to read and for ``--retry``.

    Args:
        entry: The run.
        error: What was raised, or the reason in words.
        host: Where it was.
        device: On what.
    """
    trace = "" if isinstance(error, str) else "".join(traceback.format_exception(error))
    found = Failure(
        error if isinstance(error, str) else reason(error),
        trace,
        host,
        device,
        entry.step,
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    write_json(entry.path / FAILURE, seal({"format": FORMAT, "run": to_json(entry.run), **vars(found)}))
    return found


def read_failure(entry: Entry) -> Failure:
    """Why a run failed.

    Raises:
        DamagedError: If the file is not there, not whole, or was changed.
    """
    path = entry.path / FAILURE
    content = read_json(path)
    if not isinstance(content, dict) or not Failure.__annotations__.keys() <= content.keys():
        raise DamagedError(f"{path} does not describe a failure")
    require_sealed(content, path)
    return Failure(**{name: content[name] for name in Failure.__annotations__})


def reason(error: BaseException) -> str:
    """One line on why a run failed."""
    text = str(error).strip().splitlines() or [""]
    if is_out_of_memory(error):
        said = f": {text[0]}" if text[0] else ""
        return (
            f"out of memory{said}; a smaller train.batch_size or a larger train.accumulate needs less, "
            "and so do fewer runs on one device"
        )
    if isinstance(error, (ValueError, NonFiniteError)):
        return text[0]
    return f"{type(error).__name__}: {text[0]}".removesuffix(": ")


def is_out_of_memory(error: BaseException) -> bool:
    """Memory of the device or of the machine was used up; torch has no class of its own for the latter."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error)) is not None


def retry(entries: Sequence[Entry]) -> int:
    """Forgets the failures of runs, so that they are tried again; returns how many there were."""
    failed = [entry for entry in entries if entry.failed]
    for entry in failed:
        (entry.path / FAILURE).unlink(missing_ok=True)
    return len(failed)
