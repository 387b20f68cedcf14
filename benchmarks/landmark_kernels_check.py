"""Triton kernels on a GPU against plain torch in float64: python benchmarks/landmark_kernels_check.py."""

import sys

import torch

from spectraformer.ops import reference
from spectraformer.ops import triton as kernels

NAMES = ("q", "k", "v", "u", "w", "a", "t", "C")
# Relative bounds: of the forward's maximum, of gradients' maxima, of gradients' norms. Operands of bfloat16 alone, all
# else in float64, give gradients of k 3e-3 .. 4e-3 in norm and up to 1.1e-2 in maximum over 24 draws (heavy tail);
# plain torch with bfloat16 operands 1.2e-2 and up to 3.6e-2.
BOUND = {torch.bfloat16: (1e-2, 4e-2, 1e-2), torch.float16: (2e-3, 4e-2, 1e-2), torch.float32: (1e-5, 5e-5, 5e-5)}
worst = {}
REAL_EMPTY = torch.Tensor.new_empty
failures = 0


def poisoned(self, *a, **k):
    x = REAL_EMPTY(self, *a, **k)
    return x.fill_(float("nan")) if x.is_floating_point() and x.device.type == "cuda" else x


def case(
    title,
    dtype,
    b=2,
    absolute=0.0,
    h=2,
    g=1,
    n=500,
    s=700,
    d=64,
    e=64,
    m=128,
    bias=True,
    quad=True,
    std=1.0,
    layout="bhnd",
    masked=None,
    shared=True,
    precision="tf32x3",
):
    global failures
    torch.manual_seed(0)

    def tokens(heads, length, dim):
        x = (
            torch.randn(b, length, heads, dim).transpose(1, 2)
            if layout == "bnhd"
            else torch.randn(b, heads, length, dim)
        )
        return (std * x).to("cuda", dtype)

    q, k, v = tokens(h * g, n, d), tokens(h, s, d), tokens(h, s, e)
    if layout == "packed" and d == e and n == s and g == 1:
        q, k, v = (std * torch.randn(b, n, 3, h, d)).to("cuda", dtype).permute(2, 0, 3, 1, 4).unbind(0)
    lead = (1, h) if shared else (b, h)
    u, w = (torch.randn(*lead, m, d, device="cuda") * d**-0.25 for _ in range(2))
    u, w = u.to(dtype).float(), w.to(dtype).float()
    a = torch.randn(*lead, m, device="cuda")
    t = torch.randn(b, h, s, device="cuda") if bias else None
    if masked == "all":
        t[0, 0] = float("-inf")
    if masked == "half":
        t[..., s // 2 :] = float("-inf")
    C = -0.5 * d**-0.5 * torch.rand(1, h, d, device="cuda") if quad else None
    operands = [None if x is None else x.detach().requires_grad_() for x in (q, k, v, u, w, a, t, C)]
    given = [x for x in operands if x is not None]
    torch.Tensor.new_empty = poisoned
    out = kernels.landmark_attention(*operands, precision=precision)
    weight = torch.randn(out.shape, device="cuda").to(out.dtype)
    got = torch.autograd.grad(out, given, weight)
    again = torch.autograd.grad(kernels.landmark_attention(*operands, precision=precision), given, weight)
    torch.Tensor.new_empty = REAL_EMPTY
    same = all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
    double = [None if x is None else x.detach().double().requires_grad_() for x in operands]
    Q, K, V, U, W, A, T, Q2 = double
    add = torch.zeros(b, h, s, device="cuda", dtype=torch.float64)
    add = add if T is None else add + T
    add = add if Q2 is None else add + (K**2 * Q2.unsqueeze(-2)).sum(-1)
    none = (add == float("-inf")).all(-1, keepdim=True)
    want = reference.landmark_attention(
        Q.reshape(b, h, g * n, d), K, V, U.expand(b, h, m, d), W.expand(b, h, m, d), A.expand(b, h, m),
        add.masked_fill(none, 0.0), none.unsqueeze(-1),
    ).reshape(b, h * g, n, e)  # fmt: skip
    expected = torch.autograd.grad(want, [x for x in double if x is not None], weight.double())
    largest = max(x.abs().max().item() for x in expected)
    errors = [(out - want).abs().max().item() / want.abs().max().item()]
    # A gradient that is 0 in truth (of logits of a single key) is measured on the scale of the others: absolute > 0.
    pairs = list(zip(got, expected, strict=True))
    errors += [(x - y).abs().max().item() / max(y.abs().max().item(), max(absolute, 1e-3) * largest) for x, y in pairs]
    norms = [
        ((x - y).norm() / max(y.norm().item(), max(absolute, 1e-3) * largest * y.numel() ** 0.5)).item()
        for x, y in pairs
    ]
    for name, error, norm in zip(
        [n for n, x in zip(NAMES, operands, strict=True) if x is not None], errors[1:], norms, strict=True
    ):
        old = worst.get((dtype, name), (0.0, 0.0))
        worst[dtype, name] = (max(old[0], error), max(old[1], norm))
    bounds = [BOUND[dtype][0]] + [BOUND[dtype][1]] * len(got)
    good = (
        same
        and all(error <= bound for error, bound in zip(errors, bounds, strict=True))
        and max(norms) <= BOUND[dtype][2]
    )
    failures += not good
    names = [name for name, x in zip(NAMES, operands, strict=True) if x is not None]
    shown = f"o {errors[0]:.1e} " + " ".join(
        f"{name} {x:.1e}/{y:.1e}" for name, x, y in zip(names, errors[1:], norms, strict=True)
    )
    print(
        f"{'ok  ' if good else 'FAIL'} {title:28} {str(dtype)[6:]:9} {shown}{'' if same else ' NOT DETERMINISTIC'}",
        flush=True,
    )


def guarded(*a, **k):
    global failures
    try:
        case(*a, **k)
    except Exception as error:
        failures += 1
        torch.Tensor.new_empty = REAL_EMPTY
        print(f"FAIL {a[0]:28} {str(a[1])[6:]:9} {type(error).__name__}: {str(error)[:300]}", flush=True)


for dtype in (torch.bfloat16, torch.float16, torch.float32):
    guarded("plain", dtype)
    guarded("d 64 m 256", dtype, m=256)
    guarded("d 128 m 256", dtype, d=128, e=128, m=256)
    guarded("d 32 m 128", dtype, d=32, e=32)
    guarded("d 256 m 128", dtype, d=256, e=256)
    guarded("d 16 m 64", dtype, d=16, e=16, m=64)
    guarded("odd: d 40 e 72 m 100", dtype, n=129, s=333, d=40, e=72, m=100)
    guarded("m 1000", dtype, m=1000)
    guarded("one token", dtype, n=1, s=1, absolute=1.0)
    guarded("no bias, no quadratic", dtype, bias=False, quad=False)
    guarded("GQA 3, landmarks per item", dtype, g=3, shared=False)
    guarded("(b, n, h, d) views", dtype, layout="bnhd", n=700)
    guarded("packed qkv views", dtype, layout="packed", n=700)
    guarded("half masked", dtype, masked="half")
    guarded("a head all masked", dtype, masked="all")
    guarded("std 6", dtype, std=6.0)
    guarded("long", dtype, b=1, n=20000, s=30001)
guarded("plain ieee", torch.float32, precision="ieee", d=32, e=32, m=64)

# CUDA graph
q, k, v = (torch.randn(2, 4, 1000, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
u, w, a = (
    torch.randn(1, 4, 128, 64, device="cuda"),
    torch.randn(1, 4, 128, 64, device="cuda"),
    torch.zeros(1, 4, 128, device="cuda"),
)
want = kernels.landmark_attention(q, k, v, u, w, a)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = kernels.landmark_attention(q, k, v, u, w, a)
out.zero_()
graph.replay()
torch.cuda.synchronize()
print("CUDA graph equal:", torch.equal(out, want))
failures += not torch.equal(out, want)
for x in (u, q):
    x.requires_grad_()
try:
    torch.library.opcheck(
        torch.ops.spectraformer.landmark_attention.default,
        (q, k.transpose(1, 2).contiguous().transpose(1, 2), v, u.detach(), w, a, None, None, True, "tf32x3"),
        test_utils=("test_schema", "test_faketensor"),
    )
    print("opcheck ok")
    compiled = torch.compile(kernels.landmark_attention, fullgraph=True)(q, k, v, u, w, a)
    compiled.sum().backward()
    print("torch.compile fullgraph:", (compiled - want).abs().max().item())
except Exception as error:
    failures += 1
    print("FAIL opcheck or compile", type(error).__name__, str(error)[:800])
for (dtype, name), (maximum, norm) in worst.items():
    print(
        f"worst {str(dtype)[6:]:9} {name}: maximum {maximum:.1e} (bound {BOUND[dtype][1]:.0e}), "
        f"norm {norm:.1e} (bound {BOUND[dtype][2]:.0e})"
    )
print("failures:", failures)
sys.exit(failures > 0)
