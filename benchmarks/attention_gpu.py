"""Everything the README says of attention on a GPU, measured by one call that needs no command-line packages.

Run: PYTHONPATH=src python3 benchmarks/attention_gpu.py attention_h200.json [main long causal fla compiled flex]

Parts are measured in the order given, all of them by default; the file is written anew after each length.
"""

import argparse
import sys
from pathlib import Path

import torch

from spectraformer.bench.attention import Suite, failures_of_ours, run_attention_bench
from spectraformer.bench.table import markdown

SHAPES = ((64, 128), (64, 256), (128, 256), (32, 128))
BOTH = ("forward", "forward+backward")
PARTS = {
    "main": [
        Suite(
            shapes=SHAPES,
            lengths=(512, 1024, 2048, 8192, 65536),
            competitors=("posrf-orf", "oprf-orf", "performer-pytorch", "sdpa-cudnn"),
        ),
        Suite(lengths=(512, 1024, 2048, 8192), competitors=("posrf-orf", "torch", "sdpa-flash")),
    ],
    "long": [Suite(lengths=(1 << 20,), modes=("forward",), competitors=("posrf-orf", "oprf-orf"), batch=1, heads=16)],
    "causal": [
        Suite(
            shapes=SHAPES,
            lengths=(1024, 2048, 8192, 65536),
            modes=("forward",),
            causal=(True,),
            competitors=("posrf-orf", "oprf-orf", "sdpa-cudnn"),
        ),
        Suite(lengths=(2048, 8192, 65536), modes=BOTH[1:], causal=(True,), competitors=("posrf-orf", "sdpa-cudnn")),
    ],
    # It searches for tile shapes at every new shape.
    "fla": [
        Suite(lengths=(8192,), modes=BOTH[:1], causal=(True,), competitors=("posrf-orf", "fla")),
        Suite(lengths=(8192,), modes=BOTH[1:], causal=(True,), competitors=("posrf-orf", "fla")),
        Suite(shapes=((128, 256),), lengths=(8192,), modes=BOTH[:1], causal=(True,), competitors=("posrf-orf", "fla")),
    ],
    # Compilers take most of the time here.
    "compiled": [
        Suite(shapes=SHAPES, lengths=(8192,), modes=BOTH[:1], competitors=("posrf-orf", "torch-compile")),
        Suite(lengths=(8192,), modes=BOTH[1:], competitors=("posrf-orf", "torch-compile")),
    ],
    "flex": [
        Suite(
            shapes=((64, 128), (128, 256)),
            lengths=(8192,),
            modes=BOTH[:1],
            competitors=("posrf-orf", "flex-attention"),
        ),
        Suite(lengths=(8192,), modes=BOTH[1:], competitors=("posrf-orf", "flex-attention")),
    ],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds after which nothing new begins")
    parser.add_argument("--commit", help="of the sources, where git does not know")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"unknown part {', '.join(sorted(unknown))}; expected of {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU here; `spectraformer bench attention` measures on a CPU too")
    suites = [suite for part in options.parts or PARTS for suite in PARTS[part]]
    record = run_attention_bench(
        suites,
        torch.device("cuda"),
        seconds=0.4,
        longest=1.0,
        budget=options.budget,
        out=options.out,
        say=lambda text: print(text, flush=True),
        command="PYTHONPATH=src python3 benchmarks/attention_gpu.py " + " ".join(sys.argv[1:]),
        commit=options.commit,
    )
    print()
    print(markdown(record))
    sys.exit("; ".join(failures_of_ours(record)) or 0)


if __name__ == "__main__":
    main()
