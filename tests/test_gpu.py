"""The fused kernels on a GPU against float64: forward, every gradient, dtypes, sizes, norms, graphs, compilers."""

import itertools

import pytest
import torch

import spectraformer as sf
from spectraformer.ops import reference
from spectraformer.ops import triton as kernels
from spectraformer.ops.triton.configurations import SIXTEEN_BIT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here"),
]

NAMES = ("query", "key", "value", "query_landmarks", "key_landmarks", "landmark_bias", "key_bias", "key_quadratic")
# Bounds of |x - exact| / |exact|: of the output, and of gradients. Rounding operands of products to bfloat16 and
# all else in float64 gives gradients of keys 3e-3 to 4e-3. Outputs in bfloat16 are off by 1.8e-3 to 2.8e-3, and by
# 3.1e-3 over 30,000 keys.
BOUNDS = {torch.bfloat16: (3.2e-3, 1e-2), torch.float16: (1e-3, 1e-2), torch.float32: (1e-5, 2e-5)}
SIZES = {"b": 2, "h": 2, "g": 1, "n": 500, "s": 700, "d": 64, "e": 64, "m": 128}
CASES = {
    "plain": {},
    "d 64, m 256": {"m": 256},
    "d 128, m 256": {"d": 128, "e": 128, "m": 256},
    "d 32": {"d": 32, "e": 32},
    "d 256": {"d": 256, "e": 256},
    "d 16, m 64": {"d": 16, "e": 16, "m": 64},
    "odd sizes": {"n": 129, "s": 333, "d": 40, "e": 72, "m": 100},
    "odd sizes, m 300": {"n": 129, "s": 333, "d": 40, "e": 72, "m": 300},
    "m 1000": {"m": 1000},
    "d 16, m 1000": {"d": 16, "e": 16, "m": 1000},
    "value dim 16 beside head dim 96": {"d": 96, "e": 16, "m": 16},
    "value dim 32 beside head dim 128": {"d": 128, "e": 32, "m": 64},
    "value dim 16 beside head dim 64": {"e": 16},
    "value dim 16 beside head dim 256": {"d": 256, "e": 16, "m": 64},
    "one token": {"n": 1, "s": 1},
    "no bias, no quadratic": {"bias": False},
    "grouped queries, landmarks of every item": {"g": 3, "shared": False},
    "tokens before heads": {"layout": "bnhd"},
    "query, key and value in one tensor": {"layout": "packed", "n": 700},
    "half of the keys removed": {"removed": slice(350, None)},
    "a head without keys": {"removed": slice(None)},
    "norms of 48": {"std": 6.0},
    "long": {"b": 1, "n": 20000, "s": 30001},
}


def operands_of(dtype, *, std=1.0, layout="bhnd", removed=None, shared=True, bias=True, **changes):
    b, h, g, n, s, d, e, m = (SIZES | changes).values()

    def tokens(heads, length, dim):
        x = torch.randn(b, length, heads, dim) if layout == "bnhd" else torch.randn(b, heads, length, dim)
        return (std * (x.transpose(1, 2) if layout == "bnhd" else x)).to("cuda", dtype)

    q, k, v = tokens(h * g, n, d), tokens(h, s, d), tokens(h, s, e)
    if layout == "packed":
        q, k, v = (std * torch.randn(b, n, 3, h, d)).to("cuda", dtype).permute(2, 0, 3, 1, 4).unbind(0)
    lead = (1, h) if shared else (b, h)
    u, w = ((torch.randn(*lead, m, d, device="cuda") * d**-0.25).to(dtype).float() for _ in range(2))
    t = c = None
    if bias:
        t, c = torch.randn(b, h, s, device="cuda"), -0.5 * d**-0.5 * torch.rand(1, h, d, device="cuda")
        if removed is not None:
            t[0, 0, removed] = float("-inf")
    return [q, k, v, u, w, torch.randn(*lead, m, device="cuda"), t, c]


def exact_attention(q, k, v, u, w, a, t, c):
    (b, h, s, d), (heads, n) = k.shape, q.shape[1:3]
    bias = torch.zeros(b, h, s, device="cuda", dtype=torch.float64)
    if t is not None:
        bias = bias + t + (k**2 * c.unsqueeze(-2)).sum(-1)
    none = (bias == float("-inf")).all(-1, keepdim=True)
    u, w, a = (x.expand(b, h, *x.shape[2:]) for x in (u, w, a))
    bias = bias.masked_fill(none, 0.0)
    out = reference.landmark_attention(q.reshape(b, h, heads // h * n, d), k, v, u, w, a, bias, none.unsqueeze(-1))
    return out.reshape(b, heads, n, v.shape[-1])


@pytest.fixture
def _poisoned(monkeypatch):
    """Every buffer a kernel is to fill starts as NaN: what is left unwritten shows."""
    empty = torch.Tensor.new_empty

    def poisoned(self, *arguments, **options):
        x = empty(self, *arguments, **options)
        return x.fill_(float("nan")) if x.is_floating_point() and x.is_cuda else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(("dtype", "case"), list(itertools.product(BOUNDS, CASES)), ids=str)
def test_output_and_every_gradient_agree_with_float64_and_are_the_same_bits_again(dtype, case):
    operands = [None if x is None else x.detach().requires_grad_() for x in operands_of(dtype, **CASES[case])]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in operands]
    shown = list(operands)
    if "removed" in CASES[case]:
        gone = (operands[6] == float("-inf")).unsqueeze(-1)
        shown[1:3] = (x.detach().masked_fill(gone, float("nan")).requires_grad_() for x in shown[1:3])
    given = [x for x in shown if x is not None]
    out = kernels.landmark_attention(*shown)
    weight = torch.randn(out.shape, device="cuda").to(out.dtype)
    got = torch.autograd.grad(out, given, weight)
    again = torch.autograd.grad(kernels.landmark_attention(*shown), given, weight)
    assert all(map(torch.equal, got, again))
    want = exact_attention(*exact)
    expected = torch.autograd.grad(want, [x for x in exact if x is not None], weight.double())
    # A gradient that is 0 in truth, as of a single key, is measured on the scale of the largest.
    floor = max((x.norm() / x.numel() ** 0.5).item() for x in expected) * (1.0 if case == "one token" else 0.0)
    assert ((out - want).norm() / want.norm()).item() <= BOUNDS[dtype][0]
    names = [name for name, x in zip(NAMES, operands, strict=True) if x is not None]
    errors = {
        name: ((x - y).norm() / max(y.norm().item(), floor * y.numel() ** 0.5)).item()
        for name, x, y in zip(names, got, expected, strict=True)
    }
    # There every gradient but that of values is a difference of equal sums over landmarks: only rounding is left.
    bound = BOUNDS[dtype][1] * (10 if case == "one token" else 1)
    if case == "norms of 48" and dtype != torch.float32:
        # Weights near 1: gradients of logits are differences of nearly equal terms, and what rounding leaves of them
        # adds up in that of key_quadratic, 1.06e-2 to 1.14e-2.
        bound = 1.5e-2
    assert {name: e for name, e in errors.items() if not e <= bound} == {}


@pytest.mark.parametrize(("d", "m"), sorted(SIXTEEN_BIT), ids=str)
def test_every_configuration_of_the_table_gives_what_plain_torch_gives(d, m):
    """Each is a kernel of its own, and what compilers make of one says nothing of the others."""
    operands = [x.requires_grad_() for x in operands_of(torch.bfloat16, d=d, e=d, m=m)]
    out = kernels.landmark_attention(*operands)
    exact = [x.detach().double().requires_grad_() for x in operands]
    want = exact_attention(*exact)
    weight = torch.randn(out.shape, device="cuda").to(out.dtype)
    errors = [((out - want).norm() / want.norm()).item()]
    got, expected = torch.autograd.grad(out, operands, weight), torch.autograd.grad(want, exact, weight.double())
    errors += [((x - y).norm() / y.norm()).item() for x, y in zip(got, expected, strict=True)]
    assert errors[0] <= BOUNDS[torch.bfloat16][0] and max(errors) <= BOUNDS[torch.bfloat16][1], errors


@pytest.mark.parametrize("precision", kernels.PRECISIONS)
def test_float32_is_never_computed_in_tf32(precision):
    operands = operands_of(torch.float32, d=32, e=32, m=64)
    out = kernels.landmark_attention(*operands, precision=precision)
    want = exact_attention(*(x.double() for x in operands))
    assert ((out - want).norm() / want.norm()).item() < 1e-5


@pytest.mark.parametrize("variant", ["posrf-orf", "oprf-orf", "saderf-qmc", "gerf-mm", "oprf-fastfoodl"])
def test_attention_of_a_feature_map_takes_the_kernels(variant):
    feature_map = sf.FeatureMap(64, 128, *variant.split("-"), num_heads=4, device="cuda")
    q, k, v = (torch.randn(2, 4, 600, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    mask = torch.rand(2, 600, device="cuda") < 0.8
    inputs = [q, k, v, *(x for x in feature_map.parameters() if x.requires_grad)]

    def attend(q, k, v, **options):
        return sf.random_feature_attention(q, k, v, feature_map, key_padding_mask=mask, **options)

    out = attend(q, k, v, backend="triton")
    assert torch.equal(out, attend(q, k, v)) and out.dtype == torch.bfloat16
    want = attend(q.float(), k.float(), v.float(), backend="torch")
    assert ((out - want).norm() / want.norm()).item() < 1e-2  # W is rounded here, and not there
    weight = torch.randn_like(want)
    got = torch.autograd.grad(out, inputs, weight.to(out.dtype))
    expected = torch.autograd.grad(want, inputs, weight)
    errors = [((x - y).norm() / y.norm()).item() for x, y in zip(got, expected, strict=True)]
    # Gradients of parameters of W are sums over all tokens of terms that cancel.
    assert all(e < (3e-2 if i < 3 else 1e-1) for i, e in enumerate(errors)), errors


def test_autocast_gives_its_dtype_to_float32_tokens():
    feature_map = sf.FeatureMap(64, 128, "posrf", device="cuda")
    q = torch.randn(1, 2, 100, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = sf.random_feature_attention(q, q, q, feature_map)
    assert torch.equal(out, sf.random_feature_attention(*[q.bfloat16()] * 3, feature_map).to(out.dtype))


def test_a_graph_replays_forward_and_backward():
    feature_map = sf.FeatureMap(64, 128, "oprf", device="cuda")

    def step():
        out = sf.random_feature_attention(q, k, v, feature_map, key_padding_mask=mask)
        return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    # All on one stream: autograd runs a step backward where it ran forward, and a graph must not wait for another.
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        q, k, v = (torch.randn(2, 4, 1000, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        mask = torch.rand(2, 1000, device="cuda") < 0.8
        want = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = step()
        for x in found:
            x.detach().zero_()
        graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, want))


def test_operators_are_what_their_fakes_say_and_compile_without_a_break():
    operands = operands_of(torch.bfloat16, layout="bnhd")
    torch.library.opcheck(
        torch.ops.spectraformer.landmark_attention.default,
        (*operands, True, "tf32x3"),
        test_utils=("test_schema", "test_faketensor"),
    )
    feature_map = sf.FeatureMap(64, 128, "posrf", device="cuda")
    q, k, v = (torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    out = torch.compile(sf.random_feature_attention, fullgraph=True)(q, k, v, feature_map)
    want = sf.random_feature_attention(q, k, v, feature_map)
    # Inductor multiplies W by the scale in another order.
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    compiled = torch.autograd.grad(out.float().sum(), (q, k, v))
    for x, y in zip(compiled, torch.autograd.grad(want.float().sum(), (q, k, v)), strict=True):
        assert ((x - y).norm() / y.norm()).item() < 2e-2


def test_compilers_take_the_kernels():
    q, k, v = (torch.randn(1, 4, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    ends = torch.tensor([0, 100, 300], device="cuda", dtype=torch.int32)
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]

    def operators_of(run, *tensors):
        graphs = []

        def keep(graph, _):
            graphs.append(graph)
            return graph.forward

        torch.compile(run, fullgraph=True, backend=keep)(*tensors)
        names = {str(node.target) for graph in graphs for node in graph.graph.nodes}
        return {name.removeprefix("spectraformer.") for name in names if "spectraformer." in name}

    for component, expected in (("posrf", "landmark_attention"), ("trigrf", "trigonometric_attention")):
        feature_map = sf.FeatureMap(64, 128, component, device="cuda")
        assert operators_of(lambda *x, f=feature_map: sf.random_feature_attention(*x, f), q, k, v) == {expected}
    feature_map = sf.FeatureMap(64, 128, "posrf", device="cuda")
    for is_causal, expected in ((False, "landmark_attention"), (True, "causal_landmark_attention")):
        found = [
            operators_of(lambda *x, c=is_causal: sf.random_feature_attention(*x, feature_map, is_causal=c), q, k, v),
            operators_of(
                lambda *x, c=is_causal: sf.packed_random_feature_attention(*x, feature_map, ends, 200, is_causal=c),
                *packed,
            ),
        ]
        assert found == [{expected}] * 2


def test_sizes_beyond_32_bits():
    """2.2e9 elements a tensor: an index of 32 bits would wrap."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    n = 1 << 20
    feature_map = sf.FeatureMap(64, 128, "posrf", device="cuda")
    q, k, v = (torch.randn(1, 34, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    out = sf.random_feature_attention(q, k, v, feature_map)
    assert torch.cuda.max_memory_allocated() <= 1.1 * 4 * out.numel() * out.element_size()
    last = sf.random_feature_attention(q[:, -1:], k[:, -1:], v[:, -1:], feature_map)
    torch.testing.assert_close(out[:, -1:, -1000:], last[:, :, -1000:], rtol=2e-2, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_second_device_gives_the_same_bits():
    found = []
    torch.manual_seed(0)
    tokens = torch.randn(2, 4, 500, 64).bfloat16()
    for device in ("cuda:0", "cuda:1"):
        feature_map = sf.FeatureMap(64, 128, "oprf", device=device)
        q = tokens.to(device).requires_grad_()
        out = sf.random_feature_attention(q, q, q, feature_map)
        found.append([x.cpu() for x in (out, *torch.autograd.grad(out, q, torch.ones_like(out)))])
    assert all(map(torch.equal, *found))
