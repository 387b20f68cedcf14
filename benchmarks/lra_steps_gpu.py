"""One training step of each attention in the shapes of the Long Range Arena, alone on a GPU: time and peak memory.

::

    python benchmarks/lra_steps_gpu.py --out results/lra_steps_h200.json

A step is forward, backward, clipping and AdamW on random tokens of full length, in bfloat16 autocast, by the model
and the optimiser that `spectraformer train` uses. Times are medians over steps, by CUDA events. Each row carries what
the published code (github.com/cruiseresearchgroup/spectraformer, ff37d34) takes on the same kind of GPU, measured
there with its own settings, where it was measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from spectraformer import records
from spectraformer.baselines import ATTENTIONS
from spectraformer.config import AttentionConfig, ModelConfig
from spectraformer.evaluation import autocast
from spectraformer.model import Classifier

SHAPES = {"listops": (32, 2048, 32, 10), "text": (32, 4096, 512, 2), "image": (256, 1024, 256, 10)}
RANDOM_FEATURES = ("posrf-orf", "oprf-orf", "oprf-fastfoodl", "saderf-qmc", "trigrf-orf")
# Milliseconds and gigabytes of one step of the published code on an H200.
PUBLISHED = {
    "softmax": {"listops": (31.9, 4.42), "text": (110.1, 16.8), "image": (62.0, 9.5)},
    "oprf-orf": {"listops": (16.7, 1.38), "text": (22.5, 2.69), "image": (40.0, 5.3)},
    "oprf-fastfoodl": {"listops": (33.9, 0.89), "text": (39.2, 1.72), "image": (65.7, 3.4)},
    "saderf-qmc": {"listops": (22.2, 1.45), "text": (24.8, 2.84), "image": (41.3, 5.6)},
    "nystrom": {"listops": (19.1, 1.14), "text": (19.7, 1.92), "image": (36.4, 5.6)},
    "skyformer": {"listops": (25.0, 1.72), "text": (33.2, 3.06), "image": (54.3, 8.0)},
    "linformer": {"listops": (14.4, 0.91), "text": (23.2, 1.75), "image": (20.6, 3.4)},
}


def measure(name: str, task: str, warm: int, steps: int) -> dict[str, object]:
    """Median step time and peak memory."""
    batch, length, vocab, classes = SHAPES[task]
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = Classifier(
        ModelConfig(), AttentionConfig(name=name), vocab_size=vocab, max_length=length, num_classes=classes
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-6, weight_decay=0.0)
    tokens = torch.randint(0, vocab, (8, batch, 1, length), dtype=torch.uint8 if vocab <= 256 else torch.int16).to(
        device
    )
    lengths = torch.full((batch, 1), length, device=device)
    labels = torch.randint(0, classes, (8, batch), device=device)
    torch.cuda.reset_peak_memory_stats()
    times = []
    for step in range(warm + steps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        with autocast(device, "bfloat16"):
            logits = model(tokens[step % 8], lengths)
        loss = functional.cross_entropy(logits.float(), labels[step % 8])
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end.record()
        end.synchronize()
        if step >= warm:
            times.append(start.elapsed_time(end))
    row: dict[str, object] = {
        "attention": name,
        "task": task,
        "milliseconds": round(statistics.median(times), 2),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "finite": bool(torch.isfinite(loss)),
    }
    if task in PUBLISHED.get(name, {}):
        row["published_milliseconds"], row["published_gigabytes"] = PUBLISHED[name][task]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for task in SHAPES:
        for name in (*ATTENTIONS, *RANDOM_FEATURES):
            try:
                rows.append(measure(name, task, arguments.warm, arguments.steps))
            except torch.OutOfMemoryError as error:
                rows.append({"attention": name, "task": task, "error": str(error)})
            torch.cuda.empty_cache()
            print(json.dumps(rows[-1]), flush=True)
    device = records.device_name(torch.device("cuda"))
    found = {"device": device, "versions": records.versions(), "steps": rows}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
