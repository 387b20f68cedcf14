"""Worker processes on this machine; what dies is replaced, and what stops us stops them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
VISIBLE = "CUDA_VISIBLE_DEVICES"
# What takes seconds to import, once for all workers where they can be forked from a process that has it.
PRELOAD = ["__main__", "spectraformer.sweep.worker", "torch._dynamo", "torch.utils.tensorboard"]


@dataclass
class _Child:
    process: BaseProcess
    device: str
    log: Path

    def said(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines() if self.log.exists() else []


def run_workers(
    entries: Sequence[Entry],
    runs: Path,
    devices: Sequence[str],
    *,
    threads: int | None,
    note: Callable[[str], None],
) -> None:
    """Works on runs by one process a device named.

    A GPU is the only one that its process sees. Runs on a device that is named more than once share it, untimed.

    Args:
        entries: The runs, in order of value.
        runs: Where runs are.
        devices: Of the processes.
        threads: CPU threads of each; None for torch's choice.
        note: Told what a person should know.

    Raises:
        SweepError: If every worker broke.
        Interrupted: If the user asked to stop; everything is saved.
    """
    with tempfile.TemporaryDirectory() as logs:
        context, started = _context(devices), 0

        def start(device: str) -> _Child:
            nonlocal started
            started += 1
            log = Path(logs) / f"{started}"
            shared = devices.count(device) > 1
            with _seen_alone(device) as seen:
                text = job(entries, runs, seen, shared, threads)
                for _ in range(STARTS):
                    process = context.Process(target=serve, args=(text, str(log)), daemon=True)
                    # The process that workers are forked from may have died; it is started anew at the next try.
                    with suppress(EOFError, ConnectionError):
                        process.start()
                        return _Child(process, device, log)
                    time.sleep(RESTART_SECONDS)
            raise SweepError(f"no worker could be started in {STARTS} tries")

        children: list[_Child] = []
        try:
            for device in devices:
                children.append(start(device))
            while children:
                time.sleep(LOOK_SECONDS)
                for child in list(children):
                    status = child.process.exitcode
                    if status is None:
                        continue
                    children.remove(child)
                    if status < 0 or status == BROKEN_STATUS or status > 128:
                        note(f"a worker died ({_cause(status, child)}); another takes its place")
                        children.append(start(child.device))
                    elif status > 0:
                        note("\n".join(["a worker broke, and is not replaced:", *child.said()[-TAIL_LINES:]]))
                        if not children:
                            raise SweepError("every worker broke; what they said stands above")
        finally:
            _stop(children)


@contextmanager
def _seen_alone(device: str) -> Iterator[str]:
    """Processes that are started in the block see one GPU, under the name given here; nothing changes on a CPU.

    A process then has no context on another's GPU, and finds kernels that were compiled for another.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda":
        yield device
        return
    before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = before.split(",")[int(number or 0)].strip() if before else number or "0"
    try:
        yield "cuda:0"
    finally:
        if before is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = before


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
