"""Fused moments and trigonometric attention on a GPU: python benchmarks/signed_kernels_gpu.py [seconds] [candidates].

First against float64 on the same inputs, then times in picoseconds per (token, head): medians of CUDA events, inputs
rotated beyond the L2 cache, next to plain torch. What does not fit in the seconds (45) is left out, and says so.
candidates: tile shapes of every pass of trigonometric attention instead, at N = 8k.
"""

import itertools
import sys
import time

import torch

import spectraformer as sf
from cuda_events import median_ms
from spectraformer.components.statistics import moments
from spectraformer.ops import streaming
from spectraformer.ops.triton import trigonometric_plan
from spectraformer.ops.triton.configurations import Configuration
from spectraformer.ops.triton.moments import sequence_moments
from spectraformer.ops.triton.trigonometric import trigonometric_attention

HEADS = 64
STARTED = time.time()
SECONDS = float(next((x for x in sys.argv[1:] if x.replace(".", "").isdigit()), 45))
# Reading queries and keys once, bfloat16, d = 64, at 4.3 TB/s.
FLOOR_PS = 2 * 64 * 2 / 4.3


def late():
    return time.time() - STARTED > SECONDS


def relative(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()


def median_ps(run, sets, tokens, repeats=20):
    return median_ms(lambda i: run(sets[i % len(sets)]), repeats) * 1e9 / tokens


def tokens(b, h, n, d, dtype, scale=1.0, **options):
    return (scale * torch.randn(b, n, h, d, device="cuda")).to(dtype).transpose(1, 2).requires_grad_(**options)


def count(n, d):
    return max(1, min(8, -(-200_000_000 // (HEADS * n * d * 2 * 3))))


# -- moments ---------------------------------------------------------------------------------------------------------


def check_moments():
    for dtype, order, d, masked in (
        (torch.bfloat16, "trace", 64, False),
        (torch.bfloat16, "diagonal", 64, True),
        (torch.bfloat16, "full", 64, False),
        (torch.float16, "full", 128, True),
        (torch.float32, "diagonal", 40, False),
    ):
        if late():
            print("moments: out of time")
            return
        q = (tokens(2, 6, 3001, d, dtype, requires_grad=False) + 1).to(dtype)
        k = tokens(2, 3, 5000, d, dtype, requires_grad=False)
        mask = torch.rand(2, 5000, device="cuda") < 0.7 if masked else None
        mean, second = sequence_moments(q, k, None, mask, 0.3, order)
        again = sequence_moments(q, k, None, mask, 0.3, order)
        folded = q.reshape(2, 3, -1, d)
        want = [moments(x.double(), y, 0.3, order, False) for x, y in ((folded, None), (k, mask))]
        worst = 0.0
        for i, x in enumerate(want):
            worst = max(
                worst,
                *(((a[i] - b).abs().max() / b.abs().max()).item() for a, b in zip((mean, second), x, strict=False)),
            )
        same = mean.equal(again[0]) and second.equal(again[1])
        name = f"{str(dtype)[6:]} d {d} {order}{' masked' if masked else ''}"
        print(f"moments {name:32} worst error of the largest entry {worst:.1e}  same bits {same}", flush=True)


def time_moments():
    print(f"\nmoments, d 64, bfloat16, queries and keys, ps; one read is {FLOOR_PS:.0f}")
    print(f"{'order':>9} {'N':>6} | {'fused':>6} {'torch':>7}")
    for order, n in itertools.product(("trace", "diagonal", "full"), (8192, 65536)):
        if late():
            print("out of time")
            return
        sets = [
            [tokens(8, 8, n, 64, torch.bfloat16, requires_grad=False) for _ in range(2)] for _ in range(count(n, 64))
        ]
        with torch.no_grad():
            ours = median_ps(lambda x: sequence_moments(*x, None, None, 0.3, order), sets, HEADS * n)  # noqa: B023
            plain = median_ps(lambda x: [moments(y, None, 0.3, order, False) for y in x], sets, HEADS * n, 5)  # noqa: B023
        print(f"{order:>9} {n:>6} | {ours:6.0f} {plain:7.0f}", flush=True)


# -- trigonometric attention -----------------------------------------------------------------------------------------


def reference(query, key, value, rows, weight, bias, factor):
    b, h = key.shape[:2]
    folded = query.reshape(b, h, -1, query.shape[-1])

    def waves(x):
        phase = x @ rows.mT
        return torch.cat((phase.cos(), phase.sin()), -1)

    log = factor * key.square().sum(-1, keepdim=True)
    log = log if bias is None else log + bias.unsqueeze(-1)
    state = streaming.absorb(log, waves(key) * weight.repeat(1, 1, 2).unsqueeze(-2), streaming.with_ones(value))
    zero = query.new_zeros(b, h, folded.shape[2], 1)
    out, unsafe = streaming.readout(zero, waves(folded), state)
    terms = waves(folded).abs() @ state.magnitude.unsqueeze(-1) / (waves(folded) @ state.sums)[..., -1:].abs()
    return out.reshape(*query.shape[:3], -1), unsafe.reshape(query.shape[:3]), terms


def check_attention(name, dtype, d, e, m, scale, *, groups=1, masked=False):
    torch.manual_seed(0)
    b, h, n, s = 2, 3, 1001, 1300
    query, key = (tokens(b, x, y, d, dtype, scale) for x, y in ((h * groups, n), (h, s)))
    value = tokens(b, h, s, e, dtype)
    rows = (torch.randn(1, h, m, d, device="cuda") * d**-0.25).requires_grad_()
    weight = (torch.rand(1, h, m, device="cuda") + 0.5).requires_grad_()
    bias = None
    if masked:
        bias = torch.zeros(b, 1, s, device="cuda")
        bias[1, :, 700:] = float("-inf")
    factor = 0.5 * d**-0.5
    leaves = (query, key, value, rows, weight)
    out, unsafe = trigonometric_attention(*leaves, bias, factor)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, grad)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want, flags, terms = reference(*exact, None if bias is None else bias.double(), factor)
    expected = torch.autograd.grad(want, exact, grad.double())
    safe = (terms < 100).reshape(b, h * groups, n, 1).expand_as(want)
    again = torch.autograd.grad(trigonometric_attention(*leaves, bias, factor)[0], leaves, grad)
    same = all(x.equal(y) for x, y in zip(found, again, strict=True))
    errors = " ".join(
        f"{x} {relative(y, z):.1e}" for x, y, z in zip(("q", "k", "v", "W", "a"), found, expected, strict=True)
    )
    print(
        f"{name:34} terms/denominator <= {terms.max().item():7.0f}  out {relative(out[safe], want[safe]):.1e} (all "
        f"{relative(out, want):.1e})  {errors}  flags {int(unsafe.sum())}/{int(flags.sum())}  same bits {same}",
        flush=True,
    )


CHECKS = {
    "bfloat16 d 64 m 128 small": (torch.bfloat16, 64, 64, 128, 0.35, {}),
    "bfloat16 d 64 m 128": (torch.bfloat16, 64, 64, 128, 0.5, {}),
    "bfloat16 d 64 m 128 large": (torch.bfloat16, 64, 64, 128, 0.7, {}),
    "bfloat16 d 64 m 128 masked": (torch.bfloat16, 64, 64, 128, 0.5, {"masked": True}),
    "bfloat16 d 64 m 128 grouped": (torch.bfloat16, 64, 64, 128, 0.5, {"groups": 2}),
    "float32 d 64 m 128": (torch.float32, 64, 64, 128, 0.5, {}),
    "float16 d 40 e 72 m 100": (torch.float16, 40, 72, 100, 0.5, {}),
    "bfloat16 d 128 m 256": (torch.bfloat16, 128, 128, 256, 0.4, {}),
    "bfloat16 d 32 m 64": (torch.bfloat16, 32, 32, 64, 0.5, {}),
}


def check_attentions(names):
    for name in names:
        if late():
            print(f"{name}: out of time")
            continue
        *arguments, options = CHECKS[name]
        check_attention(name, *arguments, **options)


def captured():
    """A graph gives the same bits, and the library's own function goes through the kernels."""
    feature_map = sf.FeatureMap(64, 128, "trigrf", "orf").cuda()
    q, k, v = (tokens(2, 4, 1024, 64, torch.bfloat16, 0.5, requires_grad=False) for _ in range(3))
    with torch.no_grad():

        def run():
            return feature_map(q, k).attend(v)

        want = run()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run()
        graph.replay()
        plain = feature_map(q, k).attend(v, backend="torch").out
    compiled = torch.compile(lambda: feature_map(q, k).attend(v).out, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        same = compiled().equal(want.out)
    print(
        f"graph equal {got.out.equal(want.out)}, compiled equal {same}, next to plain torch "
        f"{relative(want.out, plain.double()):.1e}",
        flush=True,
    )


def inputs(n, *, grad=False, learned=False):
    made = []
    for _ in range(count(n, 64)):
        q, k, v = (tokens(8, 8, n, 64, torch.bfloat16, 0.5, requires_grad=grad) for _ in range(3))
        rows = (torch.randn(1, 8, 128, 64, device="cuda") * 64**-0.25).requires_grad_(learned)
        made.append((q, k, v, rows, torch.ones(1, 8, 128, device="cuda"), None, 0.0625))
    return made


def both(run):
    def step(x):
        out = run(x)
        torch.autograd.grad(out, [y for y in x if isinstance(y, torch.Tensor) and y.requires_grad], out.detach())

    return step


def time_attention():
    print("\ntrigonometric attention, d 64, m 128, bfloat16, ps")
    print(f"{'N':>6} | {'fwd':>6} {'torch':>7} | {'f+b':>6} {'f+b dW':>6} {'torch':>7}")
    feature_map = sf.FeatureMap(64, 128, "trigrf", "orf").cuda()

    def ours(x):
        return trigonometric_attention(*x)[0]

    def plain(x):
        return feature_map(*x[:2]).attend(x[2], backend="torch").out

    for n in (8192, 65536):
        if late():
            print("out of time")
            return
        cells = []
        with torch.no_grad():
            sets = inputs(n)
            cells += [median_ps(ours, sets, HEADS * n), median_ps(plain, sets, HEADS * n, 3)]
        sets = inputs(n, grad=True)
        cells.append(median_ps(both(ours), sets, HEADS * n))
        cells.append(median_ps(both(ours), inputs(n, grad=True, learned=True), HEADS * n))
        # Plain torch keeps all features for backward: 60 GiB at 64k.
        cells.append(median_ps(both(plain), sets, HEADS * n, 3) if n <= 8192 else float("nan"))
        print(f"{n:>6} | {cells[0]:6.0f} {cells[1]:7.0f} | {cells[2]:6.0f} {cells[3]:6.0f} {cells[4]:7.0f}", flush=True)


def passes(sets, n, learned, chosen=None):
    """Times of each kernel on its own, one pass with a chosen configuration."""
    table = trigonometric_plan.configuration
    trigonometric_plan.configuration = lambda name, *a: (chosen or {}).get(name) or table(name, *a)
    try:
        made = []
        for *operands, factor in sets:
            options = {"key_factor": factor, "precision": "tf32x3"}
            launches, state = trigonometric_plan.plan_forward(*operands, needs_backward=True, **options)
            options |= {"wants_rows": learned, "wants_key_bias": False}
            launches = launches + trigonometric_plan.plan_backward(state.out, *operands, *state, **options)[0]
            for launch in launches:
                launch.run()
            made.append(launches)
    finally:
        trigonometric_plan.configuration = table
    found = {}
    for i, launch in enumerate(made[0]):
        name = launch.kernel.__name__.removesuffix("_kernel").removeprefix("trigonometric_")
        found[name] = found.get(name, 0) + median_ps(lambda x, i=i: x[i].run(), made, HEADS * n, 10)
    return found


def time_passes():
    for learned in (False, True):
        if not late():
            found = passes(inputs(8192), 8192, learned)
            print("passes", "dW" if learned else "  ", {k: round(v) for k, v in found.items()}, flush=True)


def candidates():
    sets = inputs(8192)[:2]
    tried = {
        "keys": ("key", ((128, 32, 8, 2), (64, 32, 4, 2), (128, 32, 8, 3), (64, 32, 4, 3), (128, 64, 8, 2))),
        "queries": ("query", ((32, 64, 4, 1), (32, 128, 8, 1), (64, 128, 8, 1), (16, 64, 4, 1), (64, 64, 4, 1))),
        "queries_backward": ("query_backward", ((128, 32, 8, 2), (128, 32, 8, 1), (128, 64, 8, 1), (64, 32, 4, 2))),
        "keys_backward": ("key_backward", ((128, 32, 8, 2), (128, 32, 8, 1), (128, 64, 8, 1), (64, 32, 4, 1))),
    }
    for name, (kernel, shapes) in tried.items():
        for shape, programs in itertools.product(shapes, (264, 528)):
            if late():
                print("out of time")
                return
            try:
                found = passes(sets, 8192, False, {name: Configuration(*shape, programs)})
            except Exception as error:
                print("   ", name, shape, type(error).__name__, str(error)[:80], flush=True)
                continue
            print(f"{name:>16} {shape!s:>16} {programs}: {found[kernel]:.0f}", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    if "candidates" in sys.argv:
        candidates()
    else:
        names = list(CHECKS)
        check_attentions(names[:3])
        time_attention()
        time_moments()
        time_passes()
        captured()
        check_moments()
        check_attentions(names[3:])
        print(f"{time.time() - STARTED:.0f} s")
