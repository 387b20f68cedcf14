"""Worker processes on this machine; what dies is replaced, and what stops us stops them."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from spectraformer.interruption import Interrupted
from spectraformer.sweep.ledger import Entry, SweepError
from spectraformer.sweep.worker import BROKEN_STATUS, job, serve

LOOK_SECONDS = 0.1
# For a checkpoint on a slow disk, after we asked a worker to stop.
GRACE_SECONDS = 120.0
TAIL_LINES = 15
STARTS = 10
RESTART_SECONDS = 0.5
# What takes seconds to import, once for all workers where they can be forked from a process that has it.
PRELOAD = ["__main__", "spectraformer.sweep.worker", "torch._dynamo", "torch.utils.tensorboard"]


@dataclass
class _Child:
    process: BaseProcess
    job: str
    log: Path

    def said(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines() if self.log.exists() else []


def run_workers(
    entries: Sequence[Entry],
    runs: Path,
    devices: Sequence[str],
    *,
    shared: bool,
    threads: int | None,
    note: Callable[[str], None],
) -> None:
    """Works on runs by one process a device named; a device may be named more than once.

    Args:
        entries: The runs, in order of value.
        runs: Where runs are.
        devices: Of the processes.
        shared: More than one process is on a device.
        threads: CPU threads of each; None for torch's choice.
        note: Told what a person should know.

    Raises:
        SweepError: If every worker broke.
        Interrupted: If the user asked to stop; everything is saved.
    """
    with tempfile.TemporaryDirectory() as logs:
        context, started = _context(devices), 0

        def start(job: str) -> _Child:
            nonlocal started
            started += 1
            log = Path(logs) / f"{started}"
            for _ in range(STARTS):
                process = context.Process(target=serve, args=(job, str(log)), daemon=True)
                # The process that workers are forked from may have died; it is started anew at the next try.
                with suppress(EOFError, ConnectionError):
                    process.start()
                    return _Child(process, job, log)
                time.sleep(RESTART_SECONDS)
            raise SweepError(f"no worker could be started in {STARTS} tries")

        children: list[_Child] = []
        try:
            for device in devices:
                children.append(start(job(entries, runs, device, shared, threads)))
            while children:
                time.sleep(LOOK_SECONDS)
                for child in list(children):
                    status = child.process.exitcode
                    if status is None:
                        continue
                    children.remove(child)
                    if status < 0 or status == BROKEN_STATUS or status > 128:
                        note(f"a worker died ({_cause(status, child)}); another takes its place")
                        children.append(start(child.job))
                    elif status > 0:
                        note("\n".join(["a worker broke, and is not replaced:", *child.said()[-TAIL_LINES:]]))
                        if not children:
                            raise SweepError("every worker broke; what they said stands above")
        finally:
            _stop(children)


def _context(devices: Sequence[str]) -> ForkServerContext | SpawnContext:
    # What was imported for all may have looked for GPUs, and CUDA survives no fork.
    if "forkserver" not in multiprocessing.get_all_start_methods() or any(
        device.startswith("cuda") for device in devices
    ):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _cause(status: int, child: _Child) -> str:
    if status == BROKEN_STATUS:
        return (child.said() or ["its device broke"])[-1]
    try:
        return signal.Signals(abs(status) % 128).name
    except ValueError:
        return f"status {status}"


def _stop(children: Sequence[_Child]) -> None:
    """Asks all to save and stop, and waits; a second Ctrl-C kills them, which loses at most the last minutes."""
    try:
        for child in children:
            child.process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for child in children:
            child.process.join(max(0.0, deadline - time.monotonic()))
    except (KeyboardInterrupt, Interrupted):
        pass
    finally:
        for child in children:
            child.process.kill()
            child.process.join()
