"""From what a person types to the runs it means, all checked before the first starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectraformer import config
from spectraformer.checks import require_choice
from spectraformer.config import Run
from spectraformer.files import read_json
from spectraformer.tasks import SIZES, TASKS, default_run


def plan_runs(
    task: str | None,
    attentions: tuple[str, ...],
    size: str,
    protocol: str,
    steps: int | None,
    path: Path | None,
    changes: dict[str, Any],
) -> list[Run]:
    """The runs a command line asks for, all checked before the first starts.

    Raises:
        ValueError: For anything that does not fit.
    """
    if (task is None) == (path is None):
        raise ValueError("expected either --task, such as --task listops, or --config with a run.json")
    if path is not None:
        found = read_json(path)
        if (size, protocol, steps) != ("full", "strict", None):
            raise ValueError(
                "--config has a size, a protocol and steps of its own; change them by --set, such as "
                "--set train.steps=1000 train.warmup=20"
            )
        try:
            base = config.from_json(Run, found.get("run", found) if isinstance(found, dict) else found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    else:
        assert task is not None
        base = default_run(task, size=size, protocol=protocol, steps=steps)
    base = config.replace(base, changes)
    TASKS.lookup(base.task)
    require_choice("size", base.size, SIZES)
    names = attentions or (base.attention.name,)
    return [replace(base, attention=replace(base.attention, name=name)) for name in names]


def parse_setting(setting: str) -> tuple[str, Any]:
    """``path=value`` as a path and a value: JSON where it is JSON, else text.

    Raises:
        ValueError: Without an equals sign.
    """
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise ValueError(f"setting {setting!r}; expected NAME=VALUE, such as model.depth=4")
    try:
        return path, json.loads(text)
    except ValueError:
        return path, text
