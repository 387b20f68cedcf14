"""Training steps per second of all attentions of the published table in the shapes of the Long Range Arena, on one GPU.

::

    python benchmarks/training_steps_gpu.py --out results/training_steps_h200.json

The steps are those of `spectraformer train`: a batch gathered on the device, forward, backward, clipping, AdamW, in
bfloat16, replayed as one CUDA graph; documents have full length. Times are medians over steps, by CUDA events. Each
row carries what the published code (github.com/cruiseresearchgroup/spectraformer, ff37d34) takes on the same kind of
GPU, measured there with its own settings, where it was measured. Besides: whether runs that are stopped and go on end
bitwise as runs that are not, and, with ``--profiles``, which kernels the time of a step goes to. Rows that the file
has already are replaced, others kept, so that the whole can be measured in parts.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import statistics
import tempfile
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from spectraformer import records
from spectraformer.checkpoint import load_tensors
from spectraformer.config import AttentionConfig, Run, TrainConfig
from spectraformer.evaluation import deterministic
from spectraformer.interruption import Interrupted
from spectraformer.tasks.base import Split
from spectraformer.tasks.dataset import Dataset
from spectraformer.train import Trainer, train
from spectraformer.watch import Silent

# Examples a step, tokens, tokens' values, classes. 131k tokens a step are also those of pathfinder.
SHAPES = {"listops": (32, 2048, 16, 10), "text": (32, 4096, 256, 2), "image": (256, 1024, 256, 10)}
OTHERS = ("softmax", "nystrom", "linformer", "informer", "reformer", "bigbird", "skyformer")
WEIGHTS = ("orf", "sorf", "qmc", "mm", "sgq", "fastfoodl")
ATTENTIONS = (*OTHERS, *(f"{component}-{weight}" for component in ("posrf", "oprf", "saderf") for weight in WEIGHTS))
# Milliseconds and gigabytes of one step of the published code on an H200.
PUBLISHED = {
    "softmax": {"listops": (31.9, 4.42), "text": (110.1, 16.8), "image": (62.0, 9.5)},
    "oprf-orf": {"listops": (16.7, 1.38), "text": (22.5, 2.69), "image": (40.0, 5.3)},
    "oprf-fastfoodl": {"listops": (33.9, 0.89), "text": (39.2, 1.72), "image": (65.7, 3.4)},
    "posrf-mm": {"listops": (18.2, 1.19), "text": (19.3, 2.30), "image": (32.8, 4.5)},
    "saderf-qmc": {"listops": (22.2, 1.45), "text": (24.8, 2.84), "image": (41.3, 5.6)},
    "nystrom": {"listops": (19.1, 1.14), "text": (19.7, 1.92), "image": (36.4, 5.6)},
    "skyformer": {"listops": (25.0, 1.72), "text": (33.2, 3.06), "image": (54.3, 8.0)},
    "linformer": {"listops": (14.4, 0.91), "text": (23.2, 1.75), "image": (20.6, 3.4)},
}
EXAMPLES = 2048
# Steps timed, or as many as take so long.
STEPS, MILLISECONDS = 40, 200.0
RESUMED = ("posrf-orf", "skyformer", "softmax")
PROFILED = "posrf-orf"
KERNELS, WIDTH = 25, 100


def made_up(task: str, examples: int = EXAMPLES) -> Dataset:
    """Random tokens in documents of full length."""
    _, length, values, classes = SHAPES[task]
    generator = np.random.default_rng(0)
    rows, labels = np.arange(examples)[:, None], generator.integers(classes, size=examples).astype(np.uint8)
    manifest = {"size": "full", "label": task, "vocab_size": values, "num_classes": classes, "source": "made up"}
    return Dataset(
        manifest=manifest,
        tokens=generator.integers(1, values, (examples, length)).astype(np.uint8),
        lengths=np.full(examples, length, np.int32),
        splits=dict.fromkeys(("train", "dev", "test"), Split(rows, labels)),
        fingerprint=task,
    )


class Notes(Silent):
    """Keeps what is said, and sends SIGTERM after a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.notes: list[str] = []
        self.stop_at = stop_at

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stepped(self, step: int, loss: float) -> None:
        if step == self.stop_at:
            signal.raise_signal(signal.SIGTERM)


def run_of(name: str, task: str, steps: int) -> Run:
    settings = TrainConfig(
        steps=steps,
        warmup=steps // 10,
        batch_size=SHAPES[task][0],
        precision="bfloat16",
        eval_every=steps,
        select_after=0.0,
    )
    return Run(task=task, attention=AttentionConfig(name=name), train=settings)


def recorded_trainer(name: str, task: str, dataset: Dataset) -> tuple[Trainer, Notes]:
    """A trainer that is ready to replay steps."""
    notes = Notes()
    trainer = Trainer(run_of(name, task, 1000), dataset, torch.device("cuda"), Path("nowhere"), "key", notes)
    trainer.resume()
    trainer.capture()
    return trainer, notes


def run_steps(trainer: Trainer, steps: int) -> list[float]:
    """Milliseconds of each of some steps."""
    trainer.stepper.plan(trainer.order(0, steps), [1e-4] * steps)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        trainer.stepper.advance()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def measure(name: str, task: str, dataset: Dataset) -> dict[str, Any]:
    """Step time, and peak memory."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    trainer, notes = recorded_trainer(name, task, dataset)
    torch.cuda.synchronize()
    seconds = time.monotonic() - started
    slow = run_steps(trainer, 3)[-1]
    milliseconds = statistics.median(run_steps(trainer, max(5, min(STEPS, int(MILLISECONDS / slow)))))
    row: dict[str, Any] = {
        "attention": name,
        "task": task,
        "milliseconds": round(milliseconds, 3),
        "steps_per_second": round(1e3 / milliseconds, 1),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "seconds_to_record": round(seconds, 2),
        "notes": notes.notes,
        "finite": bool(trainer.stepper.outcomes[0, :3].isfinite().all()),
    }
    if task in PUBLISHED.get(name, {}):
        row["published_milliseconds"], row["published_gigabytes"] = PUBLISHED[name][task]
    return row


def profile_of(name: str, task: str, dataset: Dataset, steps: int = 5) -> str:
    """Which kernels the time of a step goes to, in text."""
    trainer, _ = recorded_trainer(name, task, dataset)
    run_steps(trainer, steps)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run_steps(trainer, steps)
    rows = sorted(profiler.key_averages(), key=lambda row: -row.device_time_total)
    total = sum(row.device_time_total for row in rows) / steps
    kernels = sum(row.count for row in rows) / steps
    lines = [f"{name}, {task}: {total:.0f} us a step in {kernels:.0f} kernels, {len(rows)} different"]
    for row in rows[:KERNELS]:
        share, count = row.device_time_total / steps, row.count / steps
        lines.append(f"{share:8.1f} us {100 * share / total:5.1f} % {count:5.1f} x  {row.key[:WIDTH]}")
    return "\n".join(lines) + "\n"


def resumed_bitwise(name: str, task: str, dataset: Dataset, steps: int = 300) -> dict[str, Any]:
    """Trains a run whole, and again with an interruption; compares the weights."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        run = run_of(name, task, steps)
        whole = train(run, dataset, root / "whole", device="cuda")
        with suppress(Interrupted):
            train(run, dataset, root / "stopped", device="cuda", watcher=Notes(stop_at=steps // 3))
        resumed = train(run, dataset, root / "stopped", device="cuda")
        expected, found = (load_tensors(record.path / records.MODEL) for record in (whole, resumed))
    return {
        "attention": name,
        "task": task,
        "steps": steps,
        "bitwise_equal_after_interruption": all(torch.equal(expected[key], found[key]) for key in expected),
        "sessions": resumed.content["sessions"],
        "steps_per_second": round(whole.content["steps_per_second"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--profiles", type=Path, help="text file for the kernels of a step")
    parser.add_argument("--attentions", nargs="+", default=ATTENTIONS)
    parser.add_argument("--tasks", nargs="+", default=SHAPES)
    parser.add_argument("--resume", nargs="*", default=RESUMED, help="attentions whose runs are stopped and resumed")
    arguments = parser.parse_args()
    device, versions = records.device_name(torch.device("cuda")), records.versions()
    found: dict[str, Any] = {"device": device, "versions": versions, "resumed": [], "steps": []}
    if arguments.out.exists():
        found = json.loads(arguments.out.read_text(encoding="utf-8"))
        if (found["device"], found["versions"]) != (device, versions):
            raise ValueError(f"{arguments.out} was measured on {found['device']} with {found['versions']}; remove it")

    def add(part: str, row: dict[str, Any]) -> None:
        """In place of what was found before."""
        others = [x for x in found[part] if (x["attention"], x["task"]) != (row["attention"], row["task"])]
        found[part] = [*others, row]
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(row), flush=True)

    profiles = ""
    for task in arguments.tasks:
        dataset = made_up(task)
        for name in arguments.resume if task == "listops" else ():
            add("resumed", resumed_bitwise(name, task, dataset))
        with deterministic():
            for name in arguments.attentions:
                try:
                    add("steps", measure(name, task, dataset))
                except torch.OutOfMemoryError as error:
                    add("steps", {"attention": name, "task": task, "error": str(error)})
            if arguments.profiles is not None:
                profiles += profile_of(PROFILED, task, dataset) + "\n"
                arguments.profiles.write_text(profiles, encoding="utf-8")


if __name__ == "__main__":
    main()
