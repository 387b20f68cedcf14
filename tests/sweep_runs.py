"""Shared by the tests of sweeps: tiny runs, their place in a ledger, and what came of them."""

from pathlib import Path

import torch

from small_runs import small_run
from spectraformer.records import find_records
from spectraformer.sweep.ledger import make_entry

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
# How it went, not what came of it.
TIMES = ("finished", "peak_memory_bytes", "seconds", "sessions", "started", "steps_per_second")


def tiny(attention="posrf-orf", seed=0, **train):
    return small_run(attention, **({"steps": 6, "warmup": 2, "eval_every": 3, "seed": seed} | train))


def entries_of(plan, dataset, data, runs):
    return [make_entry(run, dataset, data / "counting-tiny", runs, CPU) for run in plan]


def table(runs):
    """All that came of the runs, by name: weights, accuracies, losses, histories, but no times."""
    found, refused = find_records([runs])
    assert found and not refused
    rows = {}
    for record in found:
        kept = {name: item for name, item in record.content.items() if name not in TIMES}
        kept["history"] = [{name: row[name] for name in row if name != "seconds"} for row in kept["history"]]
        rows[record.path.name] = kept
    return rows


def written(runs):
    """Results by name, and when they were written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}
