"""What there is, and whether it is whole: attentions, tasks, runs, prepared data, this installation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as Grid

from spectraformer import records, registry
from spectraformer.attention import kernel_attention, random_feature_attention
from spectraformer.baselines import ATTENTIONS
from spectraformer.catalogue import claim
from spectraformer.checkpoint import load_saved_model, read_checkpoint
from spectraformer.config import Run
from spectraformer.evaluation import enough_memory
from spectraformer.features import FeatureMap
from spectraformer.files import MANIFEST, DamagedError
from spectraformer.model import build_attention
from spectraformer.registry import COMPONENTS, WEIGHTS, nearest, parse_variant
from spectraformer.tasks import TASKS, open_dataset
from spectraformer.testing import check_component, check_weight

# Draws of a contract's statistics: a look in seconds, where tests take more.
DRAWS = 400


def require_attention(run: Run) -> None:
    """Raises ``ValueError`` unless the run's attention exists, has meaning, takes its options and fits in memory."""
    with enough_memory(run):
        build_attention(run.attention, run.model.width // run.model.num_heads, run.model.num_heads, 16, 0)


def list_attentions(console: Console) -> None:
    """All names an attention can have."""
    for title, table in (
        ("attentions to compare with", ATTENTIONS),
        ("component functions f", COMPONENTS),
        ("weight matrices W", WEIGHTS),
    ):
        grid = Grid("name", "what it is", title=title, title_justify="left")
        factories, broken = table.loadable()
        for name, factory in factories.items():
            grid.add_row(name, claim(factory).replace("**", ""))
        console.print(grid, markup=False)
        _say_left_out(console, broken)
    pairs = len(registry.meaningful_variants())
    console.print(f"An attention's name is f-W, such as oprf-orf: {pairs} pairs have meaning, others are refused.")


def list_tasks(console: Console) -> None:
    """All tasks, what they ask, and what they are made from."""
    grid = Grid("task", "what it asks", "--source")
    tasks, broken = TASKS.loadable()
    for name, task in tasks.items():
        grid.add_row(name, task.claim, task.sources)
    console.print(grid)
    _say_left_out(console, broken)


def _say_left_out(console: Console, broken: Mapping[str, str]) -> None:
    for reason in broken.values():
        console.print(f"left out: {reason}", soft_wrap=True, markup=False, highlight=False)


def list_runs(console: Console, runs: Path) -> None:
    """All runs of a folder: finished ones with their accuracy, others with how far they are.

    Raises:
        ValueError: If there is no such folder.
    """
    if not runs.is_dir():
        raise ValueError(f"{runs} is not a folder of runs; `spectraformer train --task listops` makes one")
    grid = Grid("run", "task", "steps", "test %", "dev %")
    for path in sorted(file.parent for file in runs.rglob(records.DESCRIPTION)):
        try:
            if (path / records.RESULT).exists():
                content = records.read_record(path).content
                test, dev = (f"{100 * content['accuracy'][split]:.2f}" for split in ("test", "dev"))
                grid.add_row(path.name, content["task"], f"{content['steps']}", test, dev)
            else:
                description = records.read_description(path)
                saved = sorted((path / records.CHECKPOINTS).glob("step-*"))
                done = int(saved[-1].name[5:]) if saved else 0
                steps = f"{done} of {description['run']['train']['steps']}"
                grid.add_row(path.name, description["data"]["label"], steps, "unfinished", "")
        except (DamagedError, KeyError, TypeError, ValueError) as error:
            grid.add_row(path.name, "damaged", "", str(error), "")
    console.print(grid)


def check(console: Console, names: tuple[str, ...]) -> int:
    """Checks variants, folders of data and of runs; the installation if none is named. Returns how many failed."""
    if not names:
        return int(not _report(console, "installation", lambda: _check_installation(console)))
    return sum(not _report(console, name, partial(_check_named, console, name)) for name in names)


def _report(console: Console, name: str, run: Callable[[], str]) -> bool:
    try:
        console.print(f"ok      {name}: {run()}", soft_wrap=True, markup=False, highlight=False)
    except (ValueError, AssertionError) as error:
        console.print(f"FAILED  {name}: {error}", soft_wrap=True, markup=False, highlight=False)
        return False
    return True


def _check_named(console: Console, name: str) -> str:
    path = Path(name)
    if path.is_dir():
        return _check_folder(console, path)
    if name in ATTENTIONS:
        return f"{claim(ATTENTIONS[name])}; baselines have no contract to check"
    if "-" not in name:
        known = [*ATTENTIONS, *COMPONENTS]
        raise ValueError(f"neither a folder nor a variant such as 'oprf-orf'{nearest(name, known)}")
    component, weight = parse_variant(name)
    FeatureMap(16, 32, component, weight)
    found = (check_weight(WEIGHTS[weight], draws=DRAWS), check_component(COMPONENTS[component], draws=DRAWS))
    return "; ".join(str(report) for report in found)


def _check_folder(console: Console, path: Path) -> str:
    """A folder of data, a run, or a folder that holds some."""
    if (path / MANIFEST).exists():
        dataset = open_dataset(path)
        return f"{dataset.label}, {dataset.manifest['documents']:,} documents, every file as it was written"
    if (path / records.DESCRIPTION).exists():
        return _check_run(path)
    inside = sorted({file.parent for name in (MANIFEST, records.DESCRIPTION) for file in path.glob(f"*/{name}")})
    if not inside:
        raise ValueError("neither prepared data, nor a run, nor a folder of them")
    failed = sum(not _report(console, str(folder), partial(_check_folder, console, folder)) for folder in inside)
    if failed:
        raise ValueError(f"{failed} of {len(inside)} folders are damaged")
    return f"{len(inside)} folders"


def _check_run(path: Path) -> str:
    key = records.read_description(path)["key"]
    record = records.read_record(path) if (path / records.RESULT).exists() else None
    saved = sorted((path / records.CHECKPOINTS).glob("step-*"))
    for checkpoint in saved:
        read_checkpoint(checkpoint, key)
    if record is None:
        return f"unfinished, {len(saved)} checkpoints as they were written"
    load_saved_model(path / records.MODEL, record.content["model"])
    return f"finished, test accuracy {100 * record.content['accuracy']['test']:.2f} %, model as it was tested"


def _check_installation(console: Console) -> str:
    """Versions, the device, and how close a few variants come to exact attention here."""
    for name, found in records.versions().items():
        console.print(f"        {name} {found}", highlight=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.print(f"        {records.device_name(device)}", highlight=False)
    generator = torch.Generator().manual_seed(0)
    q, k = (0.5 * torch.randn(2, 1, 4, 64, 16, generator=generator)).to(device)
    v = torch.randn(1, 4, 64, 16, generator=generator).to(device)
    exact = kernel_attention(q, k, v)
    errors = {}
    for name in ("posrf-orf", "oprf-orf", "saderf-simrf", "trigrf-orf"):
        few, many = (
            (random_feature_attention(q, k, v, FeatureMap(16, m, *parse_variant(name), device=device)) - exact)
            .square()
            .mean()
            .sqrt()
            .item()
            for m in (64, 4096)
        )
        # Sixty-four times the features: an eighth of the error, with a margin for chance.
        if not many < few / 3:
            raise ValueError(
                f"{name} errs by {few:.2g} with 64 features and {many:.2g} with 4096: it does not converge"
            )
        errors[name] = many
    listed = ", ".join(f"{name} {error:.1g}" for name, error in errors.items())
    return f"error with 4096 features, which falls as it must: {listed}"
