"""What every command shares: the screen, options, prepared data, and finished runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import arg

import spectraformer
from spectraformer import records
from spectraformer.tasks import Dataset, open_dataset, prepare_task, prepared_path
from spectraformer.watch import progress_bar

OUT = Console(width=None if sys.stdout.isatty() else 120)
ERRORS = Console(stderr=True, width=None if sys.stderr.isatty() else 120)


def choice(help: str, default: str) -> Any:
    """An option of a few names."""
    return arg(metavar="NAME", help=help, help_behavior_hint=f"({default})")


def number(help: str) -> Any:
    """An option whose default is the task's."""
    return arg(metavar="N", help=help, help_behavior_hint="(the paper's)")


Data = Annotated[Path, arg(metavar="FOLDER", help="prepared data", help_behavior_hint="(data)")]
Runs = Annotated[Path, arg(metavar="FOLDER", help="runs", help_behavior_hint="(runs)")]
Device = Annotated[str, choice("auto, cpu, cuda or cuda:N", "auto")]
Size = Annotated[str, choice("full, or tiny for a first look", "full")]


def say(text: str) -> None:
    """A line for people, never wrapped."""
    OUT.print(text, soft_wrap=True, markup=False, highlight=False)


def prepare_with_progress(task: str, data: Path, size: str, **options: Any) -> None:
    """Prepares a task while a bar, or plain lines, say how far it is."""
    title = f"preparing {task}" + ("" if size == "full" else f" ({size})")
    if OUT.is_terminal:
        with progress_bar(OUT) as bar:
            shown = bar.add_task(title, total=None)
            prepare_task(
                task,
                data,
                spectraformer.__version__,
                size=size,
                progress=lambda what, done, total: bar.update(shown, completed=done, total=total),
                **options,
            )
        return
    said = -1

    def line(what: str, done: int, total: int) -> None:
        nonlocal said
        if (tenth := 10 * done // max(total, 1)) > said:
            said = tenth
            say(f"{title}: {done} of {total} {what}")

    prepare_task(task, data, spectraformer.__version__, size=size, progress=line, **options)


def prepared_task(data: Path, task: str, size: str) -> Dataset:
    """The prepared data of a task.

    Raises:
        ValueError: If there is none, or it is of another task or size.
    """
    path = prepared_path(data, task, size)
    if not path.exists():
        raise ValueError(f"{path} does not exist; `spectraformer data prepare {task} --size {size}` makes it")
    dataset = open_dataset(path)
    found = {name: dataset.manifest.get(name) for name in ("task", "size")}
    if found != {"task": task, "size": size}:
        raise ValueError(f"{path} holds task {found['task']!r}, size {found['size']!r}; expected {task!r}, {size!r}")
    return dataset


def found_records(paths: tuple[Path, ...]) -> list[records.Record]:
    """Finished runs below some paths; damaged ones are named and left out.

    Raises:
        ValueError: If there are none.
    """
    if not paths:
        raise ValueError("no folder of runs is given; expected at least one, such as runs")
    found, refused = records.find_records(paths)
    for reason in refused:
        ERRORS.print(f"left out: {reason}", soft_wrap=True, markup=False, highlight=False)
    if not found:
        where = ", ".join(map(str, paths))
        raise ValueError(f"no finished run in {where}; `spectraformer train --task listops` makes one")
    return found
