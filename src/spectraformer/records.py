"""One run is one directory; its result is written last, atomically.

::

    RUNS/listops-tiny.oprf-orf.seed0.3f9a1c0d52e7/
        run.json            the configuration and the data it is trained on; their hash is the key in the name
        checkpoints/        see spectraformer.checkpoint
        tensorboard/        curves, for those who watch
        model.safetensors   the weights that were tested
        shared              there if the run ever shared its device: its result carries no time and no memory
        result.json         written last: the run is done if and only if it is there
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from spectraformer.config import Run, digest, from_json, to_json
from spectraformer.files import DamagedError, read_json, require_sealed, seal, write_json

FORMAT = 1
RESULT = "result.json"
DESCRIPTION = "run.json"
MODEL = "model.safetensors"
CHECKPOINTS = "checkpoints"
SHARED = "shared"
KEY_DIGITS = 12

# What every result holds; the README of the format is docs/records.md.
FIELDS = frozenset(
    (
        "accuracy",
        "attention",
        "best_step",
        "data",
        "device",
        "finished",
        "format",
        "git_commit",
        "history",
        "key",
        "loss",
        "memory_kind",
        "model",
        "parameters",
        "peak_memory_bytes",
        "protocol",
        "run",
        "seconds",
        "sessions",
        "started",
        "steps",
        "steps_per_second",
        "task",
        "versions",
    )
)


# What depends on what else the device was doing; None for a run that shared it.
MEASURED = ("peak_memory_bytes", "seconds", "steps_per_second")


@dataclass(frozen=True)
class Record:
    """The result of one finished run.

    Attributes:
        path: Its directory.
        run: Its configuration.
        content: All of ``result.json``, as docs/records.md describes it.
    """

    path: Path
    run: Run
    content: Mapping[str, Any]


def run_key(run: Run, fingerprint: str) -> str:
    """What names a run: the hash of its configuration and of its data."""
    return digest({"run": to_json(run), "data": fingerprint})[:KEY_DIGITS]


def run_path(runs: Path, run: Run, fingerprint: str) -> Path:
    """The directory of a run, whether it is there or not."""
    size = "" if run.size == "full" else f"-{run.size}"
    return runs / f"{run.task}{size}.{run.attention.name}.seed{run.train.seed}.{run_key(run, fingerprint)}"


def open_run(runs: Path, run: Run, data: Mapping[str, str]) -> tuple[Path, str]:
    """The directory of a run, made and described if it is new; and its key.

    Args:
        runs: Where runs are.
        run: Its configuration.
        data: ``sha256`` (the fingerprint), ``label`` and ``source`` of its data.

    Raises:
        DamagedError: If the directory exists and describes another run.
    """
    key = run_key(run, data["sha256"])
    path = run_path(runs, run, data["sha256"])
    if (path / DESCRIPTION).exists():
        try:
            found = read_description(path)
        except DamagedError as error:
            raise DamagedError(f"{error}; remove it, and it is written anew") from None
        if found["key"] != key or found["run"] != to_json(run):
            raise DamagedError(f"{path / DESCRIPTION} describes another run than its directory's name; remove {path}")
    else:
        write_json(path / DESCRIPTION, seal({"format": FORMAT, "key": key, "run": to_json(run), "data": dict(data)}))
    return path, key


def read_description(path: Path) -> dict[str, Any]:
    """What a run's directory says it is: its ``key``, ``run`` and ``data``.

    Raises:
        DamagedError: If it is not there, not whole, or was changed.
    """
    file = path / DESCRIPTION
    found = read_json(file)
    if not isinstance(found, dict) or not {"key", "run", "data"} <= found.keys():
        raise DamagedError(f"{file} does not describe a run")
    require_sealed(found, file)
    return found


def write_result(path: Path, content: Mapping[str, Any]) -> Record:
    """Writes a run's result: from now on it is done. Of a run that shared its device it keeps no time or memory."""
    assert content.keys() == FIELDS, content.keys() ^ FIELDS
    if (path / SHARED).exists():
        history = [{**row, "seconds": None} for row in content["history"]]
        content = {**content, **dict.fromkeys(MEASURED), "history": history}
    write_json(path / RESULT, seal(content))
    return read_record(path)


def read_record(path: Path) -> Record:
    """The result of a finished run.

    Raises:
        DamagedError: If it is not there, not whole, was changed, or is of another run than the directory.
    """
    content = read_json(path / RESULT)
    if not isinstance(content, dict) or "run" not in content:
        raise DamagedError(f"{path / RESULT} is not the result of a run")
    require_sealed(content, path / RESULT)
    del content["sha256"]
    if not isinstance(content.get("format"), int) or content["format"] > FORMAT:
        raise DamagedError(f"{path / RESULT} has format {content.get('format')}; this version reads up to {FORMAT}")
    if (path / DESCRIPTION).exists() and (described := read_description(path)["key"]) != content["key"]:
        raise DamagedError(f"{path / RESULT} is of run {content['key']}, but {DESCRIPTION} beside it of {described}")
    try:
        run = from_json(Run, content["run"])
    except ValueError as error:
        raise DamagedError(f"{path / RESULT} is of another version: {error}") from None
    return Record(path=path, run=run, content=content)


def find_records(paths: Iterable[Path]) -> tuple[list[Record], list[str]]:
    """All finished runs at or below some paths, in order of their names; and one message for each that is damaged.

    Raises:
        ValueError: For a path that does not exist.
    """
    records: dict[str, Record] = {}
    refused = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist; expected a directory of runs, such as the one `train` writes to")
        found = [path] if (path / RESULT).exists() else sorted(file.parent for file in path.rglob(RESULT))
        for directory in found:
            try:
                record = read_record(directory)
            except ValueError as error:
                refused.append(str(error))
            else:
                records[record.content["key"]] = record
    return sorted(records.values(), key=lambda record: record.path.name), refused


def versions() -> dict[str, str]:
    """Versions of what computes a result."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("spectraformer", "numpy", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the sources this package runs from, with "+changes" if they differ from it; None if unknown."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if git("ls-files", Path(__file__).name) == "":
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: torch.device) -> str:
    """A device in words, such as "NVIDIA H200" or "CPU, AMD EPYC 9554, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found[1].strip() if found else name
    count = torch.get_num_threads()
    return f"CPU, {name}, {count} thread{'s' * (count != 1)}"


def start_counting_memory(device: torch.device) -> None:
    """Resets the counter of :func:`peak_memory`, where the system lets one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> tuple[int | None, str]:
    """Most bytes held since the counter was reset, and of what: torch's allocator on a GPU, or this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "cuda"
    # ru_maxrss would be inherited from the parent process.
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE) if os.path.exists(status) else None
    return (int(found[1]) * 1024 if found else None), "process"
