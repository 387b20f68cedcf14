"""Training ListOps on a GPU: steps per second, and whether an interrupted run ends bitwise as an undisturbed one.

::

    python benchmarks/training_gpu.py --out results/training_h200.json
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

import spectraformer
from spectraformer import records
from spectraformer.checkpoint import load_tensors
from spectraformer.config import AttentionConfig, Run
from spectraformer.interruption import Interrupted
from spectraformer.tasks import Dataset, default_run, open_dataset, prepare_task, prepared_path
from spectraformer.train import train
from spectraformer.watch import Silent

ATTENTIONS = {
    "softmax": {},
    "posrf-orf": {},
    "oprf-orf": {},
    "oprf-fastfoodl": {},
    "gerf-mc": {"redraw_every": 7},
    "trigrf-orf": {},
}


class Stop(Silent):
    """Sends SIGTERM after a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def stepped(self, step: int, loss: float) -> None:
        if step == self.at:
            signal.raise_signal(signal.SIGTERM)


def measure(run: Run, data: Dataset, root: Path) -> dict[str, object]:
    """Trains a run whole, and again with an interruption; compares the weights."""
    whole = train(run, data, root / "whole", device="cuda")
    with suppress(Interrupted):
        train(run, data, root / "stopped", device="cuda", watcher=Stop(run.train.steps // 3))
    resumed = train(run, data, root / "stopped", device="cuda")
    expected, found = (load_tensors(record.path / records.MODEL) for record in (whole, resumed))
    return {
        "attention": run.attention.name,
        "options": dict(run.attention.options),
        "bitwise_equal_after_interruption": all(torch.equal(expected[name], found[name]) for name in expected),
        "sessions": resumed.content["sessions"],
        "steps_per_second": round(whole.content["steps_per_second"], 1),
        "peak_memory_bytes": whole.content["peak_memory_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare_task("listops", root, spectraformer.__version__)
        data = open_dataset(prepared_path(root, "listops", "full"))
        for name, options in ATTENTIONS.items():
            run = default_run("listops", steps=arguments.steps, attention=AttentionConfig(name=name, options=options))
            run = replace(run, train=replace(run.train, eval_every=arguments.steps, select_after=0.0))
            rows.append(measure(run, data, root))
            print(json.dumps(rows[-1]), flush=True)
    device = records.device_name(torch.device("cuda"))
    found = {"device": device, "steps": arguments.steps, "versions": records.versions(), "runs": rows}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
