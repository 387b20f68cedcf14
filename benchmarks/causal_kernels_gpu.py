"""The causal Triton kernels on a GPU: python benchmarks/causal_kernels_gpu.py [all|check|times|forward|tiles [d,m]].

check: outputs, states and gradients against plain torch in float64, relative in norm.
times: ps = picoseconds per (token, head), medians of CUDA events at b h = 64, bfloat16; then steps of decoding.
forward: times of the forward alone. tiles: every kernel with other tiles, at N = 8k.
Kernels compile in processes side by side first, into Triton's cache on disk: that is most of the minute.
"""

import contextlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from cuda_events import median_ms
from spectraformer.ops import reference
from spectraformer.ops.streaming import AttentionState, empty_state
from spectraformer.ops.triton import causal
from spectraformer.ops.triton.causal_configurations import PASSES
from spectraformer.ops.triton.causal_plan import plan_forward
from spectraformer.ops.triton.configurations import Configuration

SHAPES = ((64, 128), (64, 256), (128, 256), (32, 128))
GOALS = {(64, 128): 310, (64, 256): 600, (128, 256): 1030, (32, 128): 280}
BFLOAT, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
# b, h, g, n, d, e, m, dtype, and what else is special
CHECKS = {
    "d 64 m 128": (8, 8, 1, 2048, 64, 64, 128, BFLOAT, {}),
    "d 64 m 256": (8, 8, 1, 2048, 64, 64, 256, BFLOAT, {}),
    "d 128 m 256": (8, 8, 1, 1024, 128, 128, 256, BFLOAT, {}),
    "d 32 m 128": (8, 8, 1, 2048, 32, 32, 128, BFLOAT, {}),
    "std 3": (8, 8, 1, 2048, 64, 64, 128, BFLOAT, {"std": 3.0}),
    "std 6": (2, 8, 1, 2048, 64, 64, 128, BFLOAT, {"std": 6.0}),
    "norms that grow": (1, 4, 1, 1500, 64, 64, 128, BFLOAT, {"growth": 8.0, "curvature": 0.2}),
    "odd sizes, g 3, state, removed": (2, 1, 3, 1333, 40, 72, 100, BFLOAT, {"state": True, "bias": True}),
    "float16": (2, 2, 1, 2048, 64, 64, 128, HALF, {}),
    "float32": (2, 2, 1, 2048, 64, 64, 128, FLOAT, {}),
    "float32, norms that grow": (1, 2, 1, 1500, 32, 32, 64, FLOAT, {"growth": 8.0, "curvature": 0.2}),
}
NAMES = ("q", "k", "v", "u", "w", "a", "t", "C", "S")
# Of outputs and states, of gradients.
BOUNDS = {BFLOAT: (4e-3, 1.5e-2), HALF: (4e-3, 1.5e-2), FLOAT: (1e-5, 1e-4)}


def operands_of(b, h, g, n, d, e, m, dtype, special, grad=False):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    def tokens(heads, dim):
        growth = 1.0 + special.get("growth", 0.0) * torch.arange(n, device="cuda") / n
        return (normal(b, heads, n, dim) * special.get("std", 1.0) * growth[:, None]).to(dtype).requires_grad_(grad)

    query, key, value = tokens(h * g, d), tokens(h, d), tokens(h, e)
    u, w = ((normal(1, h, m, d) * d**-0.25).to(dtype).float() for _ in range(2))
    bias = None
    if special.get("bias"):
        bias = normal(b, h, n)
        bias[0, 0, : n // 3] = float("-inf")
    state = None
    if special.get("state"):
        state = AttentionState(normal(b, h, m), normal(b, h, m, e + 1).abs())
    quadratic = torch.full((1, 1, d), special.get("curvature", -0.5) * d**-0.5, device="cuda")
    return [query, key, value, u, w, normal(1, h, m), bias, quadratic], state


def exact_attention(operands, state):
    q, k, v, u, w, a, t, c = operands
    (b, h, n, d), m = k.shape, u.shape[-2]
    bias = (k**2 * c.unsqueeze(-2)).sum(-1)
    bias = bias if t is None else bias + t
    state = state or empty_state(b, h, m, v.shape[-1], dtype=k.dtype, device=k.device)
    u, w, a = (x.expand(b, h, *x.shape[2:]) for x in (u, w, a))
    out, after = reference.causal_landmark_attention(q.reshape(b, h, -1, n, d), k, v, u, w, a, bias, state)
    return out.flatten(1, 2), after


def check(title, case):
    operands, state = operands_of(*case)
    inputs = [x for x in operands if x is not None] + ([] if state is None else [state.sums])
    names = [x for x, y in zip(NAMES, [*operands, state], strict=True) if y is not None]
    # Gradients of all else make other kernels.
    if case[7] != FLOAT and not state:
        inputs, names = inputs[:3], names[:3]
    for x in inputs:
        x.requires_grad_()
    doubles = {id(x): x.detach().double() for x in [*operands, *(state or ())[:2]] if x is not None}
    for x in inputs:
        doubles[id(x)].requires_grad_()
    exact = [None if x is None else doubles[id(x)] for x in operands]
    exact_state = None if state is None else AttentionState(*(doubles[id(x)] for x in state[:2]))
    results = []
    for _ in range(2):
        out, after = causal.causal_landmark_attention(*operands, state=state)
        weight = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(out.dtype)
        results.append([out, *after[:2], *torch.autograd.grad(out, inputs, weight)])
    same = all(map(torch.equal, *results))
    want, wanted = exact_attention(exact, exact_state)
    expected = torch.autograd.grad(want, [doubles[id(x)] for x in inputs], weight.double())

    def size(x):
        return (x.double().norm() / x.numel() ** 0.5).item()

    largest = max(map(size, expected))
    # Sums are relative to whatever was kept.
    sums = after.sums * (after.log_scale - wanted.log_scale).nan_to_num().exp().unsqueeze(-1)
    errors = {"o": size(out - want) / size(want), "S'": size(sums - wanted.sums) / size(wanted.sums)}
    for name, x, y in zip(names, results[0][3:], expected, strict=True):
        errors[name] = size(x - y) / max(size(y), 1e-2 * largest)
    bounds = BOUNDS[case[7]]
    good = same and all(e <= bounds[name not in ("o", "S'")] for name, e in errors.items())
    shown = " ".join(f"{name} {e:.1e}" for name, e in errors.items())
    note = "" if same else " NOT THE SAME BITS AGAIN"
    print(f"{'ok  ' if good else 'FAIL'} {title:32} {shown}{note}", flush=True)
    return good


def median_ps(run, tokens, repeats=10):
    return median_ms(lambda _: run(), repeats) * 1e9 / tokens


def times(forward_only=False):
    print(f"{'d,m':>8} {'N':>6} | {'fwd':>5} {'goal':>5} | {'f+b':>5} {'goal':>5} | {'f+b dW':>6} | ps of each kernel")
    for d, m in SHAPES:
        for n in (8192, 65536):
            tokens = 64 * n
            with torch.no_grad():
                operands, _ = operands_of(8, 8, 1, n, d, d, m, BFLOAT, {})
                forward = median_ps(lambda x=operands: causal.causal_landmark_attention(*x), tokens)
            grad = torch.randn_like(operands[2])
            both = learned = float("nan")
            if not forward_only:
                operands, _ = operands_of(8, 8, 1, n, d, d, m, BFLOAT, {}, grad=True)

                def step(x, grad=grad):
                    out, _ = causal.causal_landmark_attention(*x)
                    torch.autograd.grad(out, [y for y in x if y is not None and y.requires_grad], grad)

                both = median_ps(lambda x=operands, f=step: f(x), tokens)
                for x in operands[3:5]:
                    x.requires_grad_()
                learned = median_ps(lambda x=operands, f=step: f(x), tokens)
            each = {}
            operands = [None if x is None else x.detach() for x in operands]
            for launch in launches_of(operands, None if forward_only else grad):
                name = launch.kernel.__name__.removesuffix("_kernel")
                each[name] = each.get(name, 0) + round(median_ps(launch.run, tokens))
            goal = GOALS[d, m]
            print(
                f"{d:>4},{m:<3} {n:>6} | {forward:5.0f} {goal:5} | {both:5.0f} {3.5 * goal:5.0f} | {learned:6.0f} | "
                + " ".join(f"{name} {ps}" for name, ps in each.items()),
                flush=True,
            )


def launches_of(operands, grad, configurations=None, run=True):
    options = {"precision": "tf32x3", "configurations": configurations}
    launches, (out, log_scale, _, *kept) = plan_forward(
        *operands, None, None, needs_backward=grad is not None, **options
    )
    if grad is not None:
        from spectraformer.ops.triton.causal_backward import Wanted, plan_backward

        wanted = Wanted(*[False] * 6)
        backward, _ = plan_backward(
            grad, None, *operands, None, None, None, out, log_scale, *kept, wanted=wanted, **options
        )
        launches = launches + backward
    for launch in launches if run else []:
        launch.run()
    return launches


def decode():
    for d, m in SHAPES:
        for heads in (64, 2048):
            operands, _ = operands_of(heads // 8, 8, 1, 1, d, d, m, BFLOAT, {})
            _, state = causal.decode_step(*operands)
            causal.decode_step(*operands, state=state)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(20):
                    _, state = causal.decode_step(*operands, state=state)
            us = median_ps(graph.replay, 20) * 1e-6
            gigabytes = heads * m * (d + 2) * 8 / us * 1e-3
            eager = median_ps(lambda x=operands, s=state: causal.decode_step(*x, state=s), 1) * 1e-6
            print(
                f"step d {d} m {m} b h {heads:>4}: {us:6.1f} us, state at {gigabytes:5.0f} GB/s; eager {eager:.0f} us"
            )


# Chunk, and the tile of all passes but that of states, whose tokens are the chunk.
TILES = [
    (chunk, Configuration(block, tokens, warps, 1, registers=registers))
    for chunk in (64, 128, 256)
    for tokens in (64, 128)
    for block, warps in ((64, 4), (128, 4), (64, 8), (128, 8))
    for registers in (None, 128, 168)
    if not (registers == 168 and warps == 8)
    and block * tokens <= 4096 * warps / 2 * (2 if warps == 4 else 1)
    and (tokens == 64 or (chunk >= 128 and warps == 8))
    and (chunk < 256 or registers is None)
]


def configurations_of(chunk, tile):
    return dict.fromkeys(PASSES, tile) | {"chunk_states": tile._replace(tokens=chunk)}


def tiles(d, m):
    """Picoseconds of every kernel with one tile for all of them, at N = 8k."""
    operands, _ = operands_of(8, 8, 1, 8192, d, d, m, BFLOAT, {})
    grad = torch.randn_like(operands[2])
    for chunk, tile in TILES:
        shown = f"{d},{m} chunk {chunk} tile {tile.landmarks}x{tile.tokens} warps {tile.warps} regs {tile.registers}"
        found = {}
        try:
            for x in launches_of(operands, grad, configurations_of(chunk, tile), run=False):
                name = x.kernel.__name__.removesuffix("_kernel").removeprefix("chunk_")
                if name != "round" and "steep" not in name:
                    try:
                        found[name] = found.get(name, 0) + round(median_ps(x.run, 64 * 8192, 5))
                    except Exception as error:
                        found[name] = type(error).__name__
        except Exception as error:
            found = f"{type(error).__name__} {error}"[:80]
        print(shown, found, flush=True)


def warm(name):
    """Compile what one shape, check or tile takes."""
    if name in CHECKS:
        check(name, CHECKS[name])
        return
    d, m, what, *tile = name.split(",")
    operands, _ = operands_of(8, 8, 1, 8192, int(d), int(d), int(m), BFLOAT, {}, grad=what in "01")
    if what == "tile":
        for launch in launches_of(operands, operands[2], configurations_of(*TILES[int(tile[0])]), run=False):
            with contextlib.suppress(Exception):
                launch.run()
        return
    with torch.no_grad():
        causal.causal_landmark_attention(*operands)
    if what == "forward":
        launches_of(operands, None)
        return
    for x in operands[3:5] if what == "1" else []:
        x.requires_grad_()
    out, _ = causal.causal_landmark_attention(*operands)
    torch.autograd.grad(out, [x for x in operands if x is not None and x.requires_grad], torch.randn_like(out))


def warm_apart(name):
    nowhere = subprocess.DEVNULL
    subprocess.run([sys.executable, __file__, "warm", name], stdout=nowhere, stderr=nowhere, check=False)


def main(what, *shapes):
    started = time.time()
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    shapes = [tuple(map(int, x.split(","))) for x in shapes] or SHAPES[:1]
    names = {
        "all": [f"{d},{m},{dw}" for d, m in SHAPES for dw in (0, 1)] + list(CHECKS),
        "check": list(CHECKS),
        "times": [f"{d},{m},{dw}" for d, m in SHAPES for dw in (0, 1)],
        "forward": [f"{d},{m},forward" for d, m in SHAPES],
        "tiles": [f"{d},{m},tile,{i}" for d, m in shapes for i in range(len(TILES))],
    }[what]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(warm_apart, names))
    print(f"compiled in {time.time() - started:.0f} s", flush=True)
    good = True
    if what in ("all", "check"):
        for name, case in CHECKS.items():
            try:
                good &= check(name, case)
            except Exception as error:
                good = False
                print(f"FAIL {name:32} {type(error).__name__}: {str(error)[:200]}", flush=True)
    if what in ("all", "times", "forward"):
        times(what == "forward")
    if what == "all":
        decode()
    if what == "tiles":
        for shape in shapes:
            tiles(*shape)
    print(f"{'all good' if good else 'FAILURES'}, {time.time() - started:.0f} s")
    sys.exit(not good)


if __name__ == "__main__":
    if sys.argv[1:2] == ["warm"]:
        warm(sys.argv[2])
    else:
        main(*sys.argv[1:] or ["all"])
