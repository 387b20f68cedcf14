"""One process that takes runs in order of value, trains them, and keeps what fails."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from spectraformer.evaluation import resolve_device
from spectraformer.files import DamagedError, only_process
from spectraformer.interruption import Interrupted
from spectraformer.records import SHARED
from spectraformer.sweep.claims import Claim, ClaimLostError, Claims, Vacancy, this_machine
from spectraformer.sweep.ledger import Entry, SweepError, write_failure
from spectraformer.tasks.dataset import Dataset, open_dataset
from spectraformer.train import train
from spectraformer.watch import Curves, Silent, Together

Outcome = Literal["done", "failed", "held"]

POLL_SECONDS = 2.0
# Processes that may die at a run, one after the other without a new checkpoint, before it counts as failed.
DEATHS = 8
# The device can no longer be used by this process, but by another.
BROKEN_STATUS = 75


class BrokenDeviceError(SweepError):
    """After an error that a GPU does not recover from within a process."""


@dataclass
class Worker:
    """Where runs are trained.

    Attributes:
        claims: Of the folder of runs.
        device: Where.
        shared: Other runs are on the device meanwhile: times and memory mean nothing.
    """

    claims: Claims
    device: torch.device
    shared: bool
    _datasets: dict[Path, Dataset] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.identity = device_identity(self.device)

    def work(self, entries: Sequence[Entry]) -> None:
        """Trains what is neither done nor failed nor held by another process, until all of it is done or failed.

        Raises:
            Interrupted: If the user asked to stop; everything is saved.
            BrokenDeviceError: If another process must go on.
        """
        left = list(entries)
        while left:
            for entry in list(left):
                if entry.done or entry.failed:
                    left.remove(entry)
                    continue
                vacancy = self.claims.vacancy(entry.name, entry.step)
                # From the first again: what comes before may have become vacant.
                if vacancy is not None and self.perform(entry, vacancy) != "held":
                    break
            else:
                if left:
                    time.sleep(POLL_SECONDS)

    def perform(self, entry: Entry, vacancy: Vacancy) -> Outcome:
        """Trains one run, or finds that another process has it.

        Raises:
            Interrupted: If the user asked to stop; everything is saved.
            BrokenDeviceError: If the run failed, and no other can be trained by this process.
        """
        with self.claims.hold(entry.name, vacancy, entry.step, self.identity) as claim:
            if claim is None:
                return "held"
            # Before it was claimed, another process may have finished it.
            if entry.done or entry.failed:
                return "done" if entry.done else "failed"
            if vacancy.deaths >= DEATHS:
                return self._fail(
                    entry,
                    f"{vacancy.deaths} processes died at it, one after the other, without a word and without getting "
                    "any further: the machine's memory may be too small, or something crashes",
                )
            try:
                self._mark(entry)
                dataset = self._dataset(entry)
                train(
                    entry.run,
                    dataset,
                    entry.path.parent,
                    device=str(self.device),
                    watcher=Together(_Attentive(claim), Curves()),
                )
            except Interrupted:
                raise
            except ClaimLostError:
                return "held"
            except Exception as error:
                if _is_busy(entry.path):
                    return "held"
                self._fail(entry, error)
        if entry.done:
            self.claims.forget(entry.name)
        else:
            self._recover()
        gc.collect()  # what a run leaves is not to be counted as the next one's memory
        return "done" if entry.done else "failed"

    def _fail(self, entry: Entry, error: BaseException | str) -> Outcome:
        entry.path.mkdir(parents=True, exist_ok=True)
        write_failure(entry, error, this_machine().partition(" ")[0], str(self.device))
        return "failed"

    def _dataset(self, entry: Entry) -> Dataset:
        if entry.data not in self._datasets:
            self._datasets[entry.data] = open_dataset(entry.data)
        found = self._datasets[entry.data]
        if found.fingerprint != entry.sha256:
            raise DamagedError(f"{entry.data} changed since the sweep began; start it again")
        return found

    def _mark(self, entry: Entry) -> None:
        """Marks runs that share a device: this one, and those of other sweeps on it, whose claims tell."""
        entry.path.mkdir(parents=True, exist_ok=True)
        if not self.shared and entry.step == 0:
            (entry.path / SHARED).unlink(missing_ok=True)  # it begins anew, now alone
        others = [
            holder.run
            for holder in self.claims.living().values()
            if holder.device == self.identity and holder.run != entry.name
        ]
        for name in [*others, entry.name] if others or self.shared else ():
            path = entry.path.with_name(name)
            path.mkdir(exist_ok=True)
            (path / SHARED).touch()

    def _recover(self) -> None:
        gc.collect()
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise BrokenDeviceError(f"{self.device} cannot be used by this process any more: {error}") from None


class _Attentive(Silent):
    """Tells the claim how far the run is, and stops training if it was lost."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim

    def begin(self, run: Any, step: int, directory: Path) -> None:
        """Notes the step."""
        self.stepped(step, 0.0)

    def stepped(self, step: int, loss: float) -> None:
        """Notes the step."""
        self.claim.step = step
        self.claim.check()

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """Looks after the claim."""
        self.claim.check()


def _is_busy(path: Path) -> bool:
    """Whether a process outside this sweep, such as `spectraformer train`, holds a run's directory."""
    try:
        with only_process(path):
            return False
    except ValueError:
        return True
    except OSError:
        return False


def device_identity(device: torch.device) -> str:
    """What two processes on one device agree on, whatever number each gives it."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"GPU {getattr(found, 'uuid', None) or f'{this_machine()} {device.index or 0}'}"
    return f"CPU {' '.join(this_machine().split()[:2])}"


def job(entries: Sequence[Entry], runs: Path, device: str, shared: bool, threads: int | None) -> str:
    """What a worker process needs to know, as JSON."""
    return json.dumps(
        {
            "entries": [entry.as_json() for entry in entries],
            "runs": str(runs.absolute()),
            "device": device,
            "shared": shared,
            "threads": threads,
        }
    )


def hired(text: str) -> tuple[Worker, list[Entry]]:
    """The worker, in this process, that :func:`job` describes; and its runs."""
    told = json.loads(text)
    if told["threads"] is not None:
        torch.set_num_threads(told["threads"])
    worker = Worker(Claims(Path(told["runs"])), resolve_device(told["device"]), told["shared"])
    return worker, [Entry.of_json(entry) for entry in told["entries"]]


def _terminate(number: int, frame: object) -> None:
    raise Interrupted(number)


def _stop_with_parent() -> None:
    """Asks this process to save and stop once its driver is gone: a sweep that is started again starts its own."""
    driver, parent = multiprocessing.parent_process(), os.getppid()
    while driver is not None and driver.is_alive() and os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def serve(text: str, log: str) -> None:
    """A worker process.

    Args:
        text: Its job, from :func:`job`.
        log: A file for what it says: the screen is its driver's.
    """
    with open(log, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C reaches the driver alone, which then asks each worker once
    signal.signal(signal.SIGTERM, _terminate)
    try:
        threading.Thread(target=_stop_with_parent, daemon=True).start()
        worker, entries = hired(text)
        worker.work(entries)
    except Interrupted as stop:
        sys.exit(stop.exit_status)
    except BrokenDeviceError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(BROKEN_STATUS)
