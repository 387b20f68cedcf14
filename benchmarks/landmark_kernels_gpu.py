"""Times of the Triton kernels: python benchmarks/landmark_kernels_gpu.py [table|passes|short].

ps = picoseconds per (token, head), medians of CUDA events, inputs rotated beyond the L2 cache.
table: forward and forward + backward with the shipped configurations, next to SDPA (cuDNN) and the goals.
passes: each kernel on its own, at 64k tokens (after the table too).
short: the forward of short sequences in one launch and in two, as CUDA graphs of 20 calls.
"""

import itertools
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cuda_events import median_ms
from spectraformer.ops import triton as kernels
from spectraformer.ops.triton import backward as B
from spectraformer.ops.triton import forward as F
from spectraformer.ops.triton.configurations import Configuration
from spectraformer.ops.triton.launch import PLANS

SHAPES = ((64, 128), (64, 256), (128, 256), (32, 128))
GOALS = {(64, 128): (165, 640), (64, 256): (330, 1270), (128, 256): (610, 2360), (32, 128): (131, 500)}
HEADS = 64
DTYPE = torch.bfloat16


def median_ps(run, sets, tokens, repeats=20):
    return median_ms(lambda i: run(sets[i % len(sets)]), repeats) * 1e9 / tokens


def inputs(n, d, m, grad=False):
    size = HEADS * n * d * 2 * 3
    count = max(1, min(8, -(-200_000_000 // size)))
    made = []
    for _ in range(count):
        q, k, v = (torch.randn(8, 8, n, d, device="cuda", dtype=DTYPE, requires_grad=grad) for _ in range(3))
        u = torch.randn(1, 8, m, d, device="cuda") * d**-0.25
        made.append(
            (
                q,
                k,
                v,
                u,
                u.clone(),
                torch.zeros(1, 8, m, device="cuda"),
                None,
                torch.full((1, 1, d), -0.5 * d**-0.5, device="cuda"),
            )
        )
    return made


def sdpa(q, k, v, *_):
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        return scaled_dot_product_attention(q, k, v)


def backward_too(run):
    def step(x):
        out = run(*x)
        torch.autograd.grad(out, [y for y in x if y is not None and y.requires_grad], out.detach())

    return step


def device_ps(run, sets, tokens):
    """Of one call, as a CUDA graph of one call on every set of inputs: short ones would be bound by the host."""
    for x in sets[:2]:
        run(x)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        for x in sets:
            run(x)
    return median_ps(lambda _: graph.replay(), [None], tokens * len(sets), 10)


def table():
    columns = f"{'forward':>7} {'goal':>5} {'cuDNN':>7} | {'f + b':>6} {'goal':>5} {'with dW':>7} {'cuDNN':>7}"
    print(f"{'d,m':>8} {'N':>6} | {columns}", flush=True)
    for (d, m), n in itertools.product(SHAPES, (2048, 8192, 65536)):
        tokens, long = HEADS * n, n > 8192
        forward_goal, goal = GOALS[d, m]
        with torch.no_grad():
            sets = inputs(n, d, m)
            forward = device_ps(lambda x: kernels.landmark_attention(*x), sets, tokens)
            softmax = float("nan") if long else device_ps(lambda x: sdpa(*x), sets[:2], tokens)
        sets = inputs(n, d, m, grad=True)
        both = device_ps(backward_too(kernels.landmark_attention), sets, tokens)
        softmax_both = float("nan") if long else device_ps(backward_too(sdpa), sets[:2], tokens)
        for x in sets:
            x[3].requires_grad_()
            x[4].requires_grad_()
        learned = device_ps(backward_too(kernels.landmark_attention), sets, tokens)
        cells = (
            f"{forward:7.0f} {forward_goal:5} {softmax:7.0f} | {both:6.0f} {goal:5} {learned:7.0f} {softmax_both:7.0f}"
        )
        print(f"{d:>4},{m:<3} {n:>6} | {cells}", flush=True)
        del sets


def passes(d, m, n, learned):
    """Times of each kernel on its own; kernels of one name are added."""
    x = inputs(n, d, m)[0]
    launches, results = F.plan_forward(*x, needs_backward=True, precision="tf32x3")
    wanted = B.Wanted(learned, learned, False, False, False)
    launches = launches + B.plan_backward(results[0], *x, *results, wanted=wanted, precision="tf32x3")[0]
    found = {}
    for launch in launches:
        name = launch.kernel.__name__
        found[name] = found.get(name, 0) + median_ps(lambda _, launch=launch: launch.run(), [None], HEADS * n, 10)
    return found


def short():
    """One program a head (of 4 or 8 warps) against keys and queries in launches of their own."""
    shipped = F.choose_short
    forms = {"two": None, "one, 4 warps": Configuration(128, 64, 4, 2), "one, 8 warps": Configuration(128, 64, 8, 2)}
    print(f"{'N':>6} {'b h':>5} | " + " | ".join(f"{x:>14}" for x in forms) + " | microseconds a call")
    for n, b in itertools.product((64, 128, 256, 512, 1024, 2048), (17, 33, 66)):
        q, k, v = (torch.randn(b, 8, n, 64, device="cuda", dtype=DTYPE) for _ in range(3))
        u, a = torch.randn(1, 8, 128, 64, device="cuda") * 0.35, torch.zeros(1, 8, 128, device="cuda")
        operands, cells = (q, k, v, u, u.clone(), a, None, torch.full((1, 1, 64), -0.06, device="cuda")), []
        for form in forms.values():
            F.choose_short = lambda *_, form=form: form
            PLANS.clear()
            for _ in range(2):
                kernels.landmark_attention(*operands)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(20):
                    kernels.landmark_attention(*operands)
            cells.append(median_ps(lambda _, graph=graph: graph.replay(), [None], 1) / 1e6 / 20)
        print(f"{n:>6} {8 * b:>5} | " + " | ".join(f"{x:14.1f}" for x in cells), flush=True)
    F.choose_short = shipped


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else "table"
    print(torch.cuda.get_device_name(), torch.__version__)
    if what == "table":
        table()
        what = "passes"
    if what == "passes":
        for (d, m), learned in itertools.product(SHAPES, (False, True)):
            found = passes(d, m, 65536, learned)
            print(d, m, "dW" if learned else "  ", {k: round(v) for k, v in found.items()}, flush=True)
    if what == "short":
        short()
