"""Times of the Triton kernels: python benchmarks/landmark_kernels_gpu.py [table|candidates|passes|short] [seconds].

ps = picoseconds per (token, head), medians of CUDA events, inputs rotated beyond the L2 cache.
table: forward and forward + backward with the shipped configurations, next to SDPA (cuDNN) and the goals.
candidates: every candidate configuration of every pass on its own, at N = 8k.
short: the forward of short sequences in one launch and in two, as CUDA graphs of 20 calls.
"""

import itertools
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from spectraformer.ops import triton as kernels
from spectraformer.ops.triton import backward as B
from spectraformer.ops.triton import forward as F
from spectraformer.ops.triton.configurations import Configuration, choose
from spectraformer.ops.triton.launch import PLANS

SHAPES = ((64, 128), (64, 256), (128, 256), (32, 128))
GOALS = {(64, 128): (165, 640), (64, 256): (330, 1270), (128, 256): (610, 2360), (32, 128): (131, 500)}
HEADS = 64
DTYPE = torch.bfloat16


def median_ps(run, sets, tokens, repeats=20):
    for _ in range(3):
        run(sets[0])
    torch.cuda.synchronize()
    times = []
    for i in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(sets[i % len(sets)])
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    ms = sorted(a.elapsed_time(b) for a, b in times)
    return ms[len(ms) // 2] * 1e9 / tokens


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


def both(run):
    def step(x):
        out = run(*x)
        torch.autograd.grad(out, [y for y in x if y is not None and y.requires_grad], out.detach())

    return step


def sdpa(q, k, v, *_):
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        return scaled_dot_product_attention(q, k, v)


def table():
    print(
        f"{'d,m':>8} {'N':>6} | {'fwd':>6} {'goal':>5} {'cuDNN':>7} | "
        f"{'f+b':>6} {'f+b dW':>6} {'goal':>5} {'cuDNN':>7}",
        flush=True,
    )
    for d, m in SHAPES:
        for n in (2048, 8192, 65536):
            tokens, cells = HEADS * n, []
            with torch.no_grad():
                sets = inputs(n, d, m)
                cells.append(median_ps(lambda x: kernels.landmark_attention(*x), sets, tokens))
                cells.append(median_ps(lambda x: sdpa(*x), sets, tokens, 5) if n <= 8192 else float("nan"))
            sets = inputs(n, d, m, grad=True)
            cells.append(median_ps(both(kernels.landmark_attention), sets, tokens))
            cells.append(median_ps(both(sdpa), sets, tokens, 5) if n <= 8192 else float("nan"))
            for x in sets:
                x[3].requires_grad_()
                x[4].requires_grad_()
            cells.append(median_ps(both(kernels.landmark_attention), sets, tokens))
            f, fs, fb, fbs, fbw = cells
            goal = GOALS[d, m]
            print(
                f"{d:>4},{m:<3} {n:>6} | {f:6.0f} {goal[0]:5} {fs:7.0f} | {fb:6.0f} {fbw:6.0f} {goal[1]:5} {fbs:7.0f}",
                flush=True,
            )
            del sets


def passes(d, m, n, chosen, wanted, sets=None, only=None):
    """Times of each kernel on its own, with chosen configurations; kernels of one name are added."""
    made = []
    for x in sets or inputs(n, d, m):
        launches, results = F.plan_forward(
            *x, needs_backward=True, precision="tf32x3", keys=chosen.get("keys"), queries=chosen.get("queries")
        )
        launches = (
            launches
            + B.plan_backward(results[0], *x, *results, wanted=wanted, precision="tf32x3", configurations=chosen)[0]
        )
        for launch in launches:
            launch.run()
        made.append(launches)
    found = {}
    for i, launch in enumerate(made[0]):
        name = launch.kernel.__name__
        if only is None or name in only:
            found[name] = found.get(name, 0) + median_ps(lambda x, i=i: x[i].run(), made, HEADS * n, 10)
    return found


def candidates(seconds):
    n, started = 8192, time.time()
    kernel_of = {
        "keys": "_key_kernel",
        "queries": "_query_kernel",
        "queries_backward": "query_backward_kernel",
        "keys_backward": "key_backward_kernel",
    }
    for d, m in SHAPES:
        sets = inputs(n, d, m)
        for name, dw in (
            ("keys", 0),
            ("queries", 0),
            ("queries_backward", 0),
            ("queries_backward", 1),
            ("keys_backward", 0),
            ("keys_backward", 1),
        ):
            results = []
            blocks = [x for x in (64, 128, 256) if x <= m]
            for landmarks, tokens, warps, stages, programs in itertools.product(
                blocks, (32, 64, 128), (4, 8), (1, 2, 3), (264, 528)
            ):
                if (
                    (tokens == 32 and name in ("keys", "queries"))
                    or landmarks * tokens / warps > 128 * 128 / 8
                    or landmarks * tokens / warps < 64 * 32 / 8
                ):
                    continue
                if time.time() - started > seconds:
                    print("out of time")
                    return
                c = Configuration(landmarks, tokens, warps, stages, programs, d * m <= 128 * 256)
                try:
                    found = passes(
                        d,
                        m,
                        n,
                        {name: c},
                        B.Wanted(bool(dw), bool(dw), False, False, False),
                        sets[:2],
                        (kernel_of[name], "query_gradient_kernel"),
                    )
                except Exception as error:
                    print("   ", name, tuple(c), type(error).__name__, str(error)[:60])
                    continue
                # a split into blocks costs a second kernel
                total = found[kernel_of[name]] + (
                    found.get("query_gradient_kernel", 0) if name == "queries_backward" else 0
                )
                results.append((total, c))
            results.sort()
            print(
                f"d {d} m {m} {name}{' dW' if dw else ''}: shipped {tuple(choose(name, DTYPE, d, m))}; best "
                + "; ".join(f"{ps:.0f} {tuple(c)}" for ps, c in results[:4]),
                flush=True,
            )


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
        for d, m in SHAPES:
            for dw in (False, True):
                found = passes(d, m, 8192, {}, B.Wanted(dw, dw, False, False, False))
                print(d, m, "dW" if dw else "  ", {k: round(v) for k, v in found.items()}, flush=True)
    if what == "short":
        short()
    if what == "candidates":
        candidates(float(sys.argv[2]) if len(sys.argv) > 2 else 400)
