"""Packed sequences by the fused kernels as they are, against padding: python benchmarks/packed_gpu.py [heads].

ps = picoseconds per (real token, head), medians of CUDA events; memory is the most held during a call beyond q, k, v.
"""

import sys
from functools import partial

import torch

import spectraformer as sf
from cuda_events import median_ms
from spectraformer import packed

LENGTHS = {  # name: lengths of sequences
    "32 uniform in 1..8192": lambda: torch.randint(1, 8193, (32,)).tolist(),
    "32 of 4096": lambda: [4096] * 32,
    "256 uniform in 1..512": lambda: torch.randint(1, 513, (256,)).tolist(),
    "1 of 65536, 63 of 64": lambda: [65536] + [64] * 63,
}


def time_and_memory(run):
    """Milliseconds of a call, and the most MiB it holds beyond its inputs."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ms = median_ms(lambda _: run())
    return ms, (torch.cuda.max_memory_allocated() - before) / 2**20


def both_ways(attend, inputs, mode):
    """Times and memory as tokens are, and padded."""

    def run():
        if mode == "f":
            with torch.no_grad():
                attend(*inputs)
        else:
            out = attend(*inputs)
            torch.autograd.grad(out, inputs, out.detach())

    unpadded, found = packed._unpadded, []
    for choose in (unpadded, lambda *_: False):
        packed._unpadded = choose
        found.append(time_and_memory(run))
    packed._unpadded = unpadded
    return found


def main(heads):
    print(torch.cuda.get_device_name(), torch.__version__)
    print(
        f"{'lengths':>24} {'map':>16} {'mode':>4} | {'native ps':>9} {'MiB':>6} | {'padded ps':>9} {'MiB':>6} | ratio"
    )
    for name, draw in LENGTHS.items():
        torch.manual_seed(0)
        lengths = draw()
        ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
        shape = (sum(lengths), heads, 64)
        for variant, is_causal in (("posrf-orf", False), ("oprf-orf", False), ("posrf-orf", True)):
            feature_map = sf.FeatureMap(64, 128, *variant.split("-"), num_heads=heads, device="cuda")
            inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
            attend = partial(
                sf.packed_random_feature_attention,
                feature_map=feature_map,
                cu_seqlens=ends,
                max_seqlen=max(lengths),
                is_causal=is_causal,
            )
            for mode in ("f", "f+b"):
                (native, held), (padded, padded_held) = both_ways(attend, inputs, mode)
                each = 1e9 / (shape[0] * heads)
                print(
                    f"{name:>24} {variant + ' causal' * is_causal:>16} {mode:>4} | {native * each:9.0f} {held:6.0f} | "
                    f"{padded * each:9.0f} {padded_held:6.0f} | {padded / native:5.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
