"""Runs as tasks of Ray, on the cluster there is or on this machine; Ray packs them, the folder of runs decides.

A run is a task. Ray is told to repeat nothing: what dies is seen in the ledger and given out again.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from spectraformer.interruption import Interrupted
from spectraformer.sweep.claims import Claims, Vacancy
from spectraformer.sweep.ledger import Entry
from spectraformer.sweep.worker import hired, job

WAIT_SECONDS = 1.0
# For checkpoints on a slow disk, after the tasks were asked to stop.
GRACE_SECONDS = 120.0


def connect() -> None:
    """Joins the cluster that RAY_ADDRESS names or that runs on this machine, or starts one here.

    Raises:
        ValueError: If Ray is not installed, or there is no cluster where RAY_ADDRESS says.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise ValueError("the engine ray needs Ray; pip install 'spectraformer[sweep]', or --engine local") from None
    if ray.is_initialized():
        return
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        address = os.environ.get("RAY_ADDRESS")
        raise ValueError(f"RAY_ADDRESS is {address!r}, where no cluster answers: {_first_line(error)}") from None


def resources() -> dict[str, float]:
    """What the cluster has, such as "CPU" and "GPU"."""
    import ray

    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]


def run_ray(
    entries: Sequence[Entry],
    runs: Path,
    *,
    gpus_per_run: float,
    workers: int | None,
    threads: int | None,
    note: Callable[[str], None],
) -> None:
    """Works on runs by Ray tasks until all are done or failed.

    Args:
        entries: The runs, in order of value.
        runs: Where runs are, the same folder on every machine.
        gpus_per_run: Whole GPUs, or a fraction: such runs share one, and carry no time and no memory. 0 is the CPU,
            which runs share too.
        workers: Most tasks at once; None for what the cluster holds.
        threads: CPU threads, and CPUs, of each.
        note: Told what a person should know.

    Raises:
        Interrupted: If the user asked to stop; everything is saved.
    """
    import ray

    claims = Claims(runs)
    shared = gpus_per_run < 1
    device = "cuda" if gpus_per_run else "cpu"
    cpus = threads or 1
    task = ray.remote(perform).options(num_gpus=gpus_per_run, num_cpus=cpus, max_retries=0)
    left = list(entries)
    tasks: dict[Any, Entry] = {}
    try:
        while left:
            given = {entry.name for entry in tasks.values()}
            places = workers or _capacity(gpus_per_run, cpus)
            for entry in list(left):
                if len(tasks) >= places:
                    break
                if entry.name in given:
                    continue
                if entry.done or entry.failed:
                    left.remove(entry)
                    continue
                vacancy = claims.vacancy(entry.name, entry.step)
                if vacancy is not None:
                    text = job([entry], runs, device, shared, threads or (1 if device == "cpu" else None))
                    tasks[task.remote(text, json.dumps(vacancy))] = entry
            if not tasks:
                time.sleep(WAIT_SECONDS if left else 0.0)
                continue
            ready, _ = ray.wait(list(tasks), timeout=WAIT_SECONDS)
            for reference in ready:
                entry = tasks.pop(reference)
                try:
                    if ray.get(reference) == "held":
                        time.sleep(WAIT_SECONDS)  # by a process that is in no claim: it is asked again, not at once
                except ray.exceptions.RayError as error:
                    note(f"a task died at {entry.name}, which is given out again: {_first_line(error)}")
                    time.sleep(WAIT_SECONDS)
    except BaseException:
        with suppress(KeyboardInterrupt, Interrupted):  # a second Ctrl-C: no more waiting
            for reference in tasks:
                ray.cancel(reference)
            ray.wait(list(tasks), num_returns=len(tasks), timeout=GRACE_SECONDS) if tasks else None
        raise
    finally:
        ray.shutdown()


def perform(text: str, vacancy: str) -> str:
    """A task: one run.

    Args:
        text: What the worker is told, from :func:`spectraformer.sweep.worker.job`.
        vacancy: What the driver found, which has watched the claims for longer.
    """
    worker, (entry,) = hired(text)
    try:
        return worker.perform(entry, Vacancy(*json.loads(vacancy)))
    except Interrupted:
        return "interrupted"


def _capacity(gpus_per_run: float, cpus: int) -> int:
    """Tasks that the cluster holds at once."""
    have = resources()
    fits = int(have.get("CPU", 1.0) // cpus)
    if gpus_per_run:
        fits = min(fits, int(have.get("GPU", 0.0) / gpus_per_run + 1e-6))
    return max(1, fits)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
