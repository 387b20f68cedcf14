"""``spectraformer sweep``: many runs from one line, on whatever there is to run them on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import Positional, arg

from spectraformer import config, inspection
from spectraformer.checks import require_choice, require_integer
from spectraformer.config import Run
from spectraformer.evaluation import resolve_device
from spectraformer.files import MANIFEST, DamagedError, require_folder
from spectraformer.plan import parse_setting
from spectraformer.records import read_record
from spectraformer.sweep import ray_engine
from spectraformer.sweep.claims import Claims
from spectraformer.sweep.ledger import FAILURE, Entry, SweepError, make_entry
from spectraformer.sweep.ledger import retry as forget_failures
from spectraformer.sweep.local import run_workers
from spectraformer.sweep.presets import PRESETS, file_runs, preset_runs
from spectraformer.sweep.progress import Progress
from spectraformer.sweep.worker import Worker
from spectraformer.tasks import prepared_path
from spectraformer.terminal import OUT, Data, Device, Runs, number, prepare_with_progress, prepared_task, say

ENGINES = ("local", "ray")


def _preset(metavar: str, help: str) -> Any:
    """An option that replaces what a preset has."""
    return arg(metavar=metavar, help=help, help_behavior_hint="(the preset's)")


def _option(metavar: str, help: str, default: str = "") -> Any:
    return arg(metavar=metavar, help=help, help_behavior_hint=default and f"({default})")


def sweep(
    what: Annotated[
        Positional[str], arg(metavar="SWEEP", help="paper, demo, all, or a Python file with `def runs() -> list[Run]`")
    ],
    /,
    attentions: Annotated[tuple[str, ...], _preset("NAME ...", "of a preset")] = (),
    tasks: Annotated[tuple[str, ...], _preset("NAME ...", "of a preset")] = (),
    seeds: Annotated[tuple[int, ...], _preset("N ...", "of a preset; all runs of a seed come before the next")] = (),
    size: Annotated[str | None, _preset("NAME", "full or tiny")] = None,
    protocol: Annotated[str | None, _option("NAME", "strict or published", "strict")] = None,
    steps: Annotated[int | None, number("optimiser steps; warm-up scales with them")] = None,
    set: Annotated[tuple[str, ...], _option("NAME=VALUE", "any other setting, of every run: train.batch_size=16")] = (),
    engine: Annotated[str, _option("NAME", "local, or ray on the cluster of RAY_ADDRESS or here", "local")] = "local",
    device: Device = "auto",
    workers: Annotated[int | None, _option("N", "runs at once", "one a GPU, or 1; ray: what fits")] = None,
    gpus_per_run: Annotated[float | None, _option("X", "of ray; below 1 they share, untimed", "1 if any")] = None,
    threads: Annotated[int | None, _option("N", "CPU threads of each run", "torch's choice")] = None,
    retry: Annotated[bool, arg(help="try failed runs again")] = False,
    dry_run: Annotated[bool, arg(help="list the runs and what has become of them, and stop")] = False,
    data: Data = Path("data"),
    runs: Runs = Path("runs"),
) -> None:
    """Train many runs. Started again, here or on any machine that sees the folder of runs, it goes on.

    Data that is missing is prepared first. Finished runs are not repeated, and one that fails stops no other.
    """
    given: dict[str, Any] = {"attentions": attentions, "tasks": tasks, "seeds": seeds, "size": size}
    given |= {"protocol": protocol, "steps": steps}
    chosen = {name: value for name, value in given.items() if value not in ((), None)}
    plan = planned_runs(what, chosen, dict(parse_setting(setting) for setting in set))
    require_choice("engine", engine, ENGINES)
    for name, count in (("workers", workers), ("threads", threads)):
        if count is not None:
            require_integer(name, count)
    require_folder("runs", runs)
    if engine == "local" and gpus_per_run is not None:
        raise ValueError("gpus-per-run is for --engine ray; local workers share a GPU if there are more --workers")
    share = None if engine == "local" else _gpus_per_run(gpus_per_run, device)
    place = resolve_device(device) if share is None else torch.device("cuda" if share else "cpu")
    entries = ledger(plan, data, runs, place, prepare=not dry_run)
    if dry_run:
        _list(plan, entries, runs)
        return
    if retry:
        say(f"{forget_failures(entries)} failed runs are tried again")
    elif failed := sum(entry.failed for entry in entries):
        say(f"{failed} runs failed before and are left alone; --retry tries them again")
    claims = Claims(runs)
    with Progress(OUT, entries, claims) as progress:
        if share is not None:
            ray_engine.run_ray(entries, runs, gpus_per_run=share, workers=workers, threads=threads, note=progress.note)
        elif len(devices := _devices(place, workers)) == 1:
            if threads is not None:
                torch.set_num_threads(threads)
            Worker(claims, place, shared=False).work(entries)
        else:
            if threads is None and place.type == "cpu":
                threads = max(1, torch.get_num_threads() // len(devices))
            run_workers(entries, runs, devices, threads=threads, note=progress.note)
    _conclude(entries, claims, runs)


def planned_runs(what: str, given: Mapping[str, Any], changes: Mapping[str, Any]) -> list[Run]:
    """The runs a command line asks for, in order of value, none twice, all checked before the first starts.

    Args:
        what: A preset, or a Python file.
        given: Arguments of :func:`spectraformer.sweep.presets.preset_runs`.
        changes: From paths of settings to values, for every run.

    Raises:
        ValueError: For anything that does not fit.
    """
    if what in PRESETS or not (what.endswith(".py") or Path(what).exists()):
        found = preset_runs(what, **given)
    elif given:
        options = ", ".join("--" + name for name in given)
        raise ValueError(f"{options}: for presets only; {what} says what it runs, and --set changes all of its runs")
    else:
        found = file_runs(Path(what))
    found = list(dict.fromkeys(config.replace(run, changes) if changes else run for run in found))
    if not found:
        raise ValueError(f"sweep {what!r} has no runs")
    for run in {(run.attention, run.model): run for run in found}.values():
        inspection.require_attention(run)
    return found


def ledger(plan: Sequence[Run], data: Path, runs: Path, device: torch.device, *, prepare: bool) -> list[Entry]:
    """The place of each run in the ledger; runs whose data is missing are left out unless it is to be prepared.

    Args:
        plan: The runs.
        data: The folder of all data.
        runs: Where runs are.
        device: A device of the kind they are trained on.
        prepare: Make what data is missing.

    Raises:
        ValueError: For data that cannot be made or is not what it should be.
    """
    needed = dict.fromkeys((run.task, run.size) for run in plan)
    missing = [pair for pair in needed if not (prepared_path(data, *pair) / MANIFEST).exists()]
    for task, size in missing if prepare else ():
        prepare_with_progress(task, data, size)
    datasets = {pair: prepared_task(data, *pair) for pair in needed if prepare or pair not in missing}
    entries: dict[Path, Entry] = {}
    for run in plan:
        pair = run.task, run.size
        if pair in datasets:
            entry = make_entry(run, datasets[pair], prepared_path(data, *pair), runs, device)
            entries.setdefault(entry.path, entry)  # "auto" may be the precision that another run names
    return list(entries.values())


def _gpus_per_run(given: float | None, device: str) -> float:
    """GPUs that Ray gives to a run: one if the cluster has any and nothing else was asked for."""
    if given is not None and not 0 <= given <= 1:
        raise ValueError(f"gpus-per-run is {given!r}; expected 0, a fraction below 1, or 1: a run is on one GPU")
    if device not in ("auto", "cpu") or (device == "cpu" and given):
        raise ValueError(f"device is {device!r}; expected auto with --engine ray, which places runs, or cpu")
    ray_engine.connect()
    have = ray_engine.resources().get("GPU", 0.0)
    if given and not have:
        raise ValueError(f"gpus-per-run is {given!r}, but the cluster has no GPU; expected 0")
    return given if given is not None else float(have >= 1 and device == "auto")


def _devices(place: torch.device, workers: int | None) -> list[str]:
    """The device of each worker: all GPUs in turn, unless one device is named; by default one worker each."""
    every = [str(place)]
    if place.type == "cuda" and place.index is None:
        every = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [every[worker % len(every)] for worker in range(workers or len(every))]


def _list(plan: Sequence[Run], entries: Sequence[Entry], runs: Path) -> None:
    """What would be run, and what has become of it."""
    living = Claims(runs).living()
    states = {"done": 0, "failed": 0, "running": 0, "to do": 0}
    for entry in entries:
        state = "done" if entry.done else "failed" if entry.failed else "running" if entry.name in living else "to do"
        states[state] += 1
        say(f"{state:8}{entry.name}")
    found = {(entry.run.task, entry.run.size) for entry in entries}
    for run in plan:
        if (run.task, run.size) not in found:
            say(f"{'to do':8}{run.task}, {run.attention.name}, seed {run.train.seed}: its data is prepared first")
            states["to do"] += 1
    say(f"{sum(states.values())} runs: " + ", ".join(f"{count} {state}" for state, count in states.items()))


def _conclude(entries: Sequence[Entry], claims: Claims, runs: Path) -> None:
    """Says what to do next.

    Raises:
        SweepError: If runs failed or are damaged.
    """
    damaged = []
    for entry in entries:
        if entry.done:
            claims.forget(entry.name)
            try:
                read_record(entry.path)
            except DamagedError as error:
                damaged.append(str(error))
    failed = [entry for entry in entries if entry.failed]
    said = [f"{len(damaged)} results are damaged; remove them, and they are tested again:", *damaged] if damaged else []
    if failed:
        said.append(
            f"{len(failed)} of {len(entries)} runs failed; --retry tries them again. Tracebacks: "
            f"{failed[0].path / FAILURE}" + (" and others" if len(failed) > 1 else "")
        )
    if said:
        raise SweepError("\n".join(said))
    say(f"tables, curves and one page: spectraformer report {runs}")
