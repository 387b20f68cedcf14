"""Which runs a sweep has: a preset, or what a Python file says.

A preset is in order of value, so that whatever interrupts it leaves comparisons: all attentions on a task come before
the next task, and all tasks before the next seed.
"""

from __future__ import annotations

import runpy
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spectraformer.baselines import ATTENTIONS
from spectraformer.checks import require_integer
from spectraformer.config import AttentionConfig, Run
from spectraformer.registry import meaningful_variants, nearest
from spectraformer.tasks import TASKS, default_run

LRA = ("listops", "text", "retrieval", "image", "pathfinder")
# The published table has softmax, f x W of three functions and six matrices, and six efficient attentions. The five
# that answer most stand first: exact, the two usual random features, the best published variant, the best baseline.
PAPER = (
    *("softmax", "posrf-orf", "oprf-orf", "oprf-fastfoodl", "nystrom"),
    *("bigbird", "reformer", "skyformer", "linformer", "informer"),
    *("saderf-orf", "saderf-fastfoodl", "posrf-fastfoodl"),
    *("oprf-sgq", "oprf-qmc", "oprf-mm", "oprf-sorf"),
    *("posrf-mm", "posrf-qmc", "posrf-sgq", "posrf-sorf"),
    *("saderf-qmc", "saderf-mm", "saderf-sgq", "saderf-sorf"),
)
DEMO = ("softmax", "posrf-orf", "oprf-orf", "oprf-fastfoodl")


def every_attention() -> tuple[str, ...]:
    """Every attention to compare with, and every f x W that has meaning."""
    return (*ATTENTIONS, *meaningful_variants())


@dataclass(frozen=True)
class Preset:
    """A sweep with a name.

    Attributes:
        attentions: In order of value.
        tasks: Likewise.
        seeds: Likewise.
        size: "full" or "tiny".
    """

    attentions: Callable[[], tuple[str, ...]]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    size: str


PRESETS = {
    "paper": Preset(lambda: PAPER, LRA, (0, 1, 2, 3, 4), "full"),
    "demo": Preset(lambda: DEMO, ("listops",), (0, 1), "tiny"),
    "all": Preset(every_attention, LRA, (0,), "full"),
}


def preset_runs(
    name: str,
    *,
    attentions: Sequence[str] = (),
    tasks: Sequence[str] = (),
    seeds: Sequence[int] = (),
    size: str | None = None,
    protocol: str = "strict",
    steps: int | None = None,
) -> list[Run]:
    """The runs of a preset, all seeds of the first task and so on; what is given replaces what the preset has.

    Args:
        name: "paper", "demo" or "all".
        attentions: Names.
        tasks: Names.
        seeds: Of weights, batch order and dropout.
        size: "full" or "tiny".
        protocol: "strict" or "published".
        steps: Optimiser steps of every run; None for the paper's.

    Raises:
        ValueError: For unknown names.
    """
    if name not in PRESETS:
        raise ValueError(
            f"sweep {name!r} is neither a preset nor a Python file; "
            f"expected one of {', '.join(PRESETS)}, or FILE.py{nearest(name, PRESETS)}"
        )
    preset = PRESETS[name]
    for task in tasks:
        TASKS.lookup(task)
    for seed in seeds:
        require_integer("seed", seed, least=0)
    found = []
    for seed in seeds or preset.seeds:
        for task in tasks or preset.tasks:
            base = default_run(task, size=size or preset.size, protocol=protocol, steps=steps)
            base = replace(base, train=replace(base.train, seed=seed))
            found += [
                replace(base, attention=AttentionConfig(name=attention))
                for attention in attentions or preset.attentions()
            ]
    return found


def file_runs(path: Path) -> list[Run]:
    """What the function ``runs`` of a Python file returns.

    Raises:
        ValueError: If the file cannot be run, has no such function, or returns something else than runs.
    """
    if not path.is_file():
        raise ValueError(f"sweep {str(path)!r} is no file; expected one, or a preset: {', '.join(PRESETS)}")
    try:
        function = runpy.run_path(str(path)).get("runs")
        found = function() if callable(function) else None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else 1)
        raise ValueError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"{path} has no function `runs`; expected `def runs() -> list[Run]`")
    wrong = [item for item in found if not isinstance(item, Run)] if isinstance(found, (list, tuple)) else [found]
    if wrong:
        raise ValueError(f"runs() of {path} returned {wrong[0]!r}; expected a list of spectraformer.config.Run")
    return list(found or ())
