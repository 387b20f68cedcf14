"""Who works on which run: exclusive files with a heartbeat, in a folder that any number of machines may share.

::

    RUNS/.claims/listops.oprf-orf.seed0.3f9a1c0d52e7.000002

The holder of a run is the file with its highest number. A number is taken by creating its file, which only one process
can (``O_EXCL``, on network file systems too). A run is taken over by taking the next number: a takeover has exactly one
winner as well, and a winner that dies at once leaves nothing but the next number to take.

A holder is dead if its process is gone, which the same machine can see at once, or if its file did not change for
``STALE_SECONDS`` by the observer's clock: clocks of different machines are never compared.
"""

from __future__ import annotations

import json
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = ".claims"
BEAT_SECONDS = 10.0
# Well above what network file systems cache attributes for, 60 s by default.
STALE_SECONDS = 180.0
# A beat overwrites the whole file by one write, so that readers see all of it or none.
SIZE = 512


class ClaimLostError(Exception):
    """Another process took the run over: this one was silent for too long."""


class Vacancy(NamedTuple):
    """That a run can be claimed.

    Attributes:
        number: Of the claim that may be made.
        deaths: Processes that died at the run, one after the other, without getting any further.
    """

    number: int
    deaths: int


@dataclass(frozen=True)
class Holder:
    """What a claim's file says.

    Attributes:
        run: Name of the run's directory.
        number: Of the claim.
        machine: Host, boot and process namespace: processes on equal ones can see each other.
        process: Process number and when it started.
        device: What it computes on, see :func:`device_identity`.
        first: Step the holder began at.
        step: Steps done.
        deaths: As in :class:`Vacancy`.
        released: The holder let go of it.
    """

    run: str
    number: int
    machine: str = ""
    process: str = ""
    device: str = ""
    first: int = 0
    step: int = 0
    deaths: int = 0
    released: bool = False

    @property
    def host(self) -> str:
        """Name of its machine."""
        return self.machine.partition(" ")[0]


def this_machine() -> str:
    """Host name, boot and process namespace, where the system tells them."""
    found = [platform.node().replace(" ", "-")]
    with suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)


def process_identity(pid: int) -> str | None:
    """A process' number and when it started; None if it is dead, or the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # The state; X and Z are dead, though their parents have not noticed yet.
    return None if fields[0] in "XZ" else f"{pid} {fields[19]}"


class Claim:
    """A run held by this process; a thread keeps it alive.

    Args:
        path: Its file.
        holder: What it says.
    """

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path = path
        self.holder = holder
        self.step = holder.first
        self.lost = False
        self._lock = threading.Lock()
        self._beaten = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)
        self._thread.start()

    def _keep_beating(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self.beat()

    def beat(self, released: bool = False) -> None:
        """Writes that the holder lives, and how far it is."""
        with self._lock:
            if self.lost:
                return
            try:
                _overwrite(self.path, _content(self.holder, self.step, released))
            except FileNotFoundError:
                self.lost = True
            except OSError:  # a network file system may be away for a while
                return
            self._beaten = time.monotonic()

    def check(self) -> None:
        """Raises :class:`ClaimLostError` if another process took the run over."""
        # After a process was stopped for long, its claim may be another's before its thread can tell.
        if time.monotonic() - self._beaten > STALE_SECONDS / 2:
            self.beat()
        if self.lost:
            raise ClaimLostError(f"another process took over {self.holder.run}")

    def release(self) -> None:
        """Lets go of the run, for any process to claim."""
        self._ended.set()
        self._thread.join()
        self.beat(released=True)


class Claims:
    """All claims below a folder of runs, as one observer sees them.

    Args:
        runs: Where runs are.
    """

    def __init__(self, runs: Path) -> None:
        self.folder = runs / FOLDER
        self.machine = this_machine()
        self._sees_processes = process_identity(os.getpid()) is not None
        self._seen: dict[tuple[str, int], tuple[object, float]] = {}

    def _numbers(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        with suppress(FileNotFoundError):
            for name in os.listdir(self.folder):
                if match := re.fullmatch(r"(.+)\.(\d{6,})", name):
                    found.setdefault(match[1], []).append(int(match[2]))
        return found

    def _path(self, run: str, number: int) -> Path:
        return self.folder / f"{run}.{number:06d}"

    def _read(self, run: str, number: int) -> tuple[Holder, object] | None:
        """What a claim says, and what changes with every beat; None if there is no such claim."""
        try:
            with self._path(run, number).open("rb") as file:  # opening makes network file systems look again
                text, changed = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None
        try:
            return Holder(run, number, **json.loads(text)), (text, changed)
        except (ValueError, TypeError):  # just made, or half seen
            return Holder(run, number), (text, changed)

    def _is_dead(self, holder: Holder, signature: object) -> bool:
        if holder.machine == self.machine and self._sees_processes:
            return holder.process != process_identity(int(holder.process.split()[0]))
        now = time.monotonic()
        last, since = self._seen.get((holder.run, holder.number), (None, now))
        if last != signature:
            since = now
        self._seen[holder.run, holder.number] = signature, since
        # An empty file is of a process that died between making and filling it, or will see that it was overtaken.
        return now - since > (STALE_SECONDS if holder.machine else BEAT_SECONDS)

    def _holder(self, run: str, number: int) -> tuple[Holder, bool] | None:
        """A claim, and whether its holder lives."""
        found = self._read(run, number)
        if found is None:
            return None
        return found[0], not found[0].released and not self._is_dead(*found)

    def living(self) -> dict[str, Holder]:
        """Who works on what, by run."""
        found = {run: self._holder(run, max(numbers)) for run, numbers in self._numbers().items()}
        return {run: holder[0] for run, holder in found.items() if holder is not None and holder[1]}

    def vacancy(self, run: str, step: int) -> Vacancy | None:
        """Whether a run can be claimed; None if a living process holds it.

        Args:
            run: Name of its directory.
            step: Of its newest checkpoint: deaths count only while it stays the same.
        """
        numbers = self._numbers().get(run)
        if not numbers:
            return Vacancy(0, 0)
        found = self._holder(run, max(numbers))
        if found is None or found[1]:
            return None
        holder = found[0]
        return Vacancy(holder.number + 1, 0 if holder.released or step > holder.first else holder.deaths + 1)

    def take(self, run: str, vacancy: Vacancy, step: int, device: str) -> Claim | None:
        """Claims a run; None if another process was first.

        Args:
            run: Name of its directory.
            vacancy: What :meth:`vacancy` found, here or in another process.
            step: Of its newest checkpoint.
            device: What it will be computed on.
        """
        process = process_identity(os.getpid()) or str(os.getpid())
        holder = Holder(run, vacancy.number, self.machine, process, device, step, step, vacancy.deaths)
        path = self._path(run, vacancy.number)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return None
        with open(descriptor, "wb", buffering=0) as file:
            file.write(_content(holder, step, released=False))
        others = self._numbers().get(run, [])
        if max(others, default=-1) > vacancy.number:  # what was seen as the last claim was an old one
            path.unlink(missing_ok=True)
            return None
        for number in others:
            if number < vacancy.number:
                self._path(run, number).unlink(missing_ok=True)
        return Claim(path, holder)

    def forget(self, run: str) -> None:
        """Removes all claims of a run that is done: whoever claims it again sees that."""
        for number in self._numbers().get(run, []):
            self._path(run, number).unlink(missing_ok=True)

    @contextmanager
    def hold(self, run: str, vacancy: Vacancy, step: int, device: str) -> Iterator[Claim | None]:
        """As :meth:`take`, and released at the end of the block, however it ends."""
        claim = self.take(run, vacancy, step, device)
        try:
            yield claim
        finally:
            if claim is not None:
                claim.release()


def _content(holder: Holder, step: int, released: bool) -> bytes:
    said: dict[str, Any] = {
        "machine": holder.machine,
        "process": holder.process,
        "device": holder.device,
        "first": holder.first,
        "step": step,
        "deaths": holder.deaths,
        "released": released,
    }
    return json.dumps(said).encode().ljust(SIZE - 1) + b"\n"


def _overwrite(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, content)
        os.utime(descriptor if os.utime in os.supports_fd else path)
    finally:
        os.close(descriptor)
