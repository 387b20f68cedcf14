"""CPU attention against torch's fused softmax attention and performer-pytorch, in one process.

Run: python benchmarks/cpu_attention.py --out results/cpu_attention.json

Each round times every competitor once, in turn, so that a slow moment of the machine hits all of them; a figure is
the median over rounds. Memory is the peak resident size of a process of its own.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from performer_pytorch import FastAttention
from torch.nn.functional import scaled_dot_product_attention

import spectraformer as sf

HEADS, HEAD_DIM = 8, 64
# Crossovers are read off a grid; quadratic attention is timed up to LONGEST_SOFTMAX only.
LENGTHS = (256, 320, 384, 448, 512, 576, 640, 704, 768, 896, 1024, 1152, 1280, 1536, 2048, 4096, 8192, 16384)
LONGEST_SOFTMAX = 8192
VARIANTS = ("posrf-orf", "oprf-orf")


def competitors(num_features, q, k, v):
    """Name to a function of no arguments: one forward pass."""
    maps = {variant: sf.FeatureMap(HEAD_DIM, num_features, *sf.parse_variant(variant)).eval() for variant in VARIANTS}
    performer = FastAttention(HEAD_DIM, num_features).eval()
    found = {"performer-pytorch": lambda: performer(q, k, v)}
    for name, feature_map in maps.items():
        found[name] = lambda f=feature_map: sf.random_feature_attention(q, k, v, f)
        found[f"{name} causal"] = lambda f=feature_map: sf.random_feature_attention(q, k, v, f, is_causal=True)
    if q.shape[2] <= LONGEST_SOFTMAX:
        found["softmax"] = lambda: scaled_dot_product_attention(q, k, v)
        found["softmax causal"] = lambda: scaled_dot_product_attention(q, k, v, is_causal=True)
    return found


def time_all(functions, budget):
    """Median milliseconds of each function over interleaved rounds within a budget of seconds."""
    rounds = {name: [] for name in functions}
    for function in functions.values():
        function()
    start = time.perf_counter()
    while len(rounds["performer-pytorch"]) < 5 or time.perf_counter() - start < budget:
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            rounds[name].append(1e3 * (time.perf_counter() - begin))
        if len(rounds["performer-pytorch"]) >= 200:
            break
    return {name: statistics.median(times) for name, times in rounds.items()}


def crossover(rows, ours, theirs):
    """The least length from which on we are faster at every longer one measured; None if there is none."""
    lengths = [row["tokens"] for row in rows if theirs in row["milliseconds"]]
    slower = [row["tokens"] for row in rows if row["milliseconds"].get(theirs, 1e30) < row["milliseconds"][ours]]
    faster = [n for n in lengths if n > max(slower, default=0)]
    return min(faster, default=None)


def summary(rows):
    ratios = {
        variant: min(
            row["milliseconds"]["performer-pytorch"] / row["milliseconds"][variant]
            for row in rows
            if row["tokens"] >= 1024
        )
        for variant in VARIANTS
    }
    return {
        "faster_than_softmax_from": {v: crossover(rows, v, "softmax") for v in VARIANTS},
        "causal_faster_than_causal_softmax_from": {
            v: crossover(rows, f"{v} causal", "softmax causal") for v in VARIANTS
        },
        "least_speedup_over_performer_pytorch_from_1k": {v: round(r, 2) for v, r in ratios.items()},
    }


def peak_memory(variant, is_causal, tokens=65536, heads=4):
    """Bytes of peak resident memory of a process that runs one forward pass of 64k tokens.

    Not ru_maxrss: a child inherits its parent's.
    """
    program = f"""
import torch, spectraformer as sf
feature_map = sf.FeatureMap({HEAD_DIM}, 128, *sf.parse_variant({variant!r})).eval()
q, k, v = (0.1 * torch.randn(1, {heads}, {tokens}, {HEAD_DIM}) for _ in range(3))
with torch.no_grad():
    sf.random_feature_attention(q, k, v, feature_map, is_causal={is_causal})
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {"variant": variant, "causal": is_causal, "tokens": tokens, "heads": heads, "bytes": int(run.stdout)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1], help="thread counts")
    parser.add_argument("--seconds", type=float, default=2.0, help="budget for each length")
    options = parser.parse_args()
    torch.manual_seed(0)
    tables = []
    for threads in sorted(set(options.threads)):
        torch.set_num_threads(threads)
        for num_features in (128, 256):
            rows = []
            for tokens in LENGTHS:
                q, k, v = (torch.randn(1, HEADS, tokens, HEAD_DIM) for _ in range(3))
                with torch.no_grad():
                    times = time_all(competitors(num_features, q, k, v), options.seconds)
                rows.append({"tokens": tokens, "milliseconds": {name: round(x, 3) for name, x in times.items()}})
                print(threads, num_features, tokens, rows[-1]["milliseconds"], flush=True)
            tables.append({"threads": threads, "num_features": num_features, "summary": summary(rows), "rows": rows})
            print(json.dumps(tables[-1]["summary"], indent=1), flush=True)
    record = {
        "command": "python benchmarks/cpu_attention.py " + " ".join(sys.argv[1:]),
        "what": f"forward, float32, batch 1, {HEADS} heads of {HEAD_DIM}, milliseconds, median of interleaved rounds",
        "torch": torch.__version__,
        "cpu": {"capability": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "tables": tables,
        "peak_memory": [peak_memory(v, c) for v in (*VARIANTS, "trigrf-orf") for c in (False, True)],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_suffix(".partial")
    with partial.open("w") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(options.out)


if __name__ == "__main__":
    main()
