"""The tasks of the benchmark, one a file: arrays and how they are trained on by default.

Another package adds its own by the entry-point group ``spectraformer.tasks``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from spectraformer.checks import require_choice, require_integer
from spectraformer.config import AttentionConfig, ModelConfig, Run
from spectraformer.files import MANIFEST, read_manifest
from spectraformer.registry import Table
from spectraformer.tasks import image, listops, pathfinder, prepare, retrieval, text
from spectraformer.tasks.base import SIZES, SPLITS, Recipe, Split, Task
from spectraformer.tasks.dataset import BatchOrder, Dataset, Loader, open_dataset

TASKS: Table[Task] = Table(
    "task",
    {
        "listops": listops.TASK,
        "text": text.TASK,
        "retrieval": retrieval.TASK,
        "image": image.TASK,
        **pathfinder.TASKS,
    },
    "spectraformer.tasks",
)

__all__ = [
    "SIZES",
    "SPLITS",
    "TASKS",
    "BatchOrder",
    "Dataset",
    "Loader",
    "Recipe",
    "Split",
    "Task",
    "default_run",
    "open_dataset",
    "prepare_task",
    "prepared_path",
]


def prepared_path(data: Path, task: str, size: str) -> Path:
    """Where a task of a size is prepared below the folder of all data."""
    return data / (task if size == "full" else f"{task}-{size}")


def prepare_task(
    name: str,
    data: Path,
    version: str,
    *,
    size: str = "full",
    source: str | None = None,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: prepare.Progress | None = None,
) -> dict[str, Any]:
    """Prepares a task, or finds it prepared already from the same source; returns its manifest.

    Args:
        name: Of the task.
        data: The folder of all data.
        version: Of this package.
        size: "full" or "tiny".
        source: What to make it from; None for the task's default.
        seed: Of the generator, and of what is chosen for a split.
        workers: Processes; None for one a core.
        overwrite: Replace what is prepared from something else.
        progress: Told how many blocks are done.

    Raises:
        ValueError: For unknown names, sources that cannot be used, and data prepared from something else.
    """
    task = TASKS.lookup(name)
    require_choice("size", size, SIZES)
    require_integer("seed", seed, least=0)
    if workers is not None:
        require_integer("workers", workers)
    recipe = task.recipe(size, source, seed)
    path = prepared_path(data, name, size)
    if (path / MANIFEST).exists() and not overwrite:
        manifest = read_manifest(path, prepare.KIND, prepare.FORMAT)
        if prepare.same_recipe(manifest, recipe):
            return manifest
        raise ValueError(
            f"{path} is prepared already, from another source or seed ({manifest['source']}); "
            "add --overwrite to replace it, or name another folder with --data"
        )
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(
            f"{path} holds files, but no {MANIFEST}: it is not data that was prepared here; "
            "remove it, add --overwrite to replace it, or name another folder with --data"
        )
    return prepare.prepare(recipe, path, task=name, size=size, version=version, workers=workers, progress=progress)


def default_run(
    task: str,
    *,
    size: str = "full",
    protocol: str = "strict",
    attention: AttentionConfig | None = None,
    steps: int | None = None,
) -> Run:
    """A task's run as the paper trains it.

    Args:
        task: Its name.
        size: "full" or "tiny".
        protocol: "strict" or "published".
        attention: Which attention; None for the default.
        steps: Another number of steps; warm-up and evaluations are scaled with it.

    Raises:
        ValueError: For unknown names.
    """
    found = TASKS.lookup(task)
    require_choice("size", size, SIZES)
    train = found.train[size]
    if steps is not None:
        require_integer("steps", steps)
        train = replace(
            train,
            steps=steps,
            warmup=train.warmup * steps // train.steps,
            eval_every=max(1, min(train.eval_every, steps // 5)),
        )
    model = found.model.get(size, ModelConfig())
    return Run(
        task=task, size=size, protocol=protocol, attention=attention or AttentionConfig(), model=model, train=train
    )
