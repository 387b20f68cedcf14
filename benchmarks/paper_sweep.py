"""The paper's attentions on listops and text, 10 000 steps, in order of value: whatever interrupts leaves the most.

Run: spectraformer sweep benchmarks/paper_sweep.py

First every attention that is fast, then further seeds of those a verdict is asked of, then what takes long.
"""

from collections.abc import Iterable
from dataclasses import replace

from spectraformer.config import Run
from spectraformer.sweep.presets import PAPER, preset_runs

TASKS = ("text", "listops")
STEPS = 10_000
FURTHER_SEEDS = (1, 2)
# The longest first: beside it, another GPU gets through all others.
FAST = ("softmax", "posrf-orf", "oprf-orf", "oprf-fastfoodl", "linformer")
JUDGED = ("posrf-orf", "oprf-orf", "oprf-fastfoodl")
SLOWER = ("nystrom", "informer", "bigbird", "skyformer")
SLOWEST = ("reformer",)
COSTLY_MATRIX = "-sgq"


def runs() -> list[Run]:
    """All 25 attentions with one seed, and five of them with two more."""
    costly = [name for name in PAPER if name.endswith(COSTLY_MATRIX)]
    others = [name for name in PAPER if name not in {*FAST, *SLOWER, *SLOWEST, *costly}]
    return [
        *_trained([*FAST, *others]),
        *_trained(JUDGED, FURTHER_SEEDS),
        *_trained(FAST[:1], FURTHER_SEEDS),
        *_trained(SLOWER),
        *_trained(SLOWER[:1], FURTHER_SEEDS),
        *_trained(costly),
        *_trained(SLOWEST),
    ]


def _trained(attentions: Iterable[str], seeds: Iterable[int] = (0,)) -> list[Run]:
    """Both tasks of an attention, then the next attention; all of a seed before the next."""
    one_seed = preset_runs("paper", attentions=tuple(attentions), tasks=TASKS, seeds=(0,), steps=STEPS)
    half = len(one_seed) // len(TASKS)
    in_turn = [
        run for pair in zip(*(one_seed[k * half :][:half] for k in range(len(TASKS))), strict=True) for run in pair
    ]
    return [replace(run, train=replace(run.train, seed=seed)) for seed in seeds for run in in_turn]
