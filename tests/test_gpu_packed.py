"""Packed sequences on a GPU: each alone in float64 is the definition; a graph takes other boundaries on replay."""

from itertools import pairwise

import pytest
import torch

import spectraformer as sf
from spectraformer import packed
from spectraformer.ops import Sequences, reference
from spectraformer.ops import triton as kernels
from spectraformer.ops.triton.causal import causal_landmark_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here"),
]

LENGTHS = (0, 1, 5, 64, 130, 1500, 700)
OTHERS = (7, 0, 90, 633, 1, 300, 2000)
NAMES = ("query", "key", "value", "query_landmarks", "key_landmarks", "landmark_bias", "key_bias", "key_quadratic")
CASES = {
    "self-attention": {},
    "cross-attention": {"key": OTHERS},
    "grouped queries, landmarks of every sequence": {"key": OTHERS, "g": 3, "shared": False},
    "keys removed inside sequences": {"removed": True, "shared": False},
    "no bias, no quadratic": {"bias": False},
    "64-bit boundaries": {"dtype": torch.int64, "key": OTHERS},
    "d 128, m 256": {"d": 128, "m": 256},
    "d 32, m 100": {"d": 32, "m": 100},
    "many short": {"query": (3, 17, 40, 0) * 100},
}
# Of the output and of gradients, as of sequences of one length.
BOUNDS = {torch.bfloat16: (3e-3, 1e-2), torch.float32: (1e-5, 2e-5)}


def ends_of(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).to(dtype)


def one_by_one(q, k, v, u, w, a, t, c, query_ends, key_ends):
    """Every sequence alone, in plain torch."""
    h, groups, parts = k.shape[1], q.shape[1] // k.shape[1], []
    for i, ((a0, a1), (b0, b1)) in enumerate(zip(pairwise(query_ends), pairwise(key_ends), strict=True)):
        if a0 == a1 or b0 == b1:
            parts.append(q.new_zeros(1, q.shape[1], a1 - a0, v.shape[-1]))
            continue
        own = [(x[i : i + 1] if x.shape[0] > 1 else x).expand(1, h, *x.shape[2:]) for x in (u, w, a)]
        keys, bias = k[:, :, b0:b1], k.new_zeros(1, h, b1 - b0)
        if t is not None:
            squares = keys**2 * (c[i : i + 1] if c.shape[0] > 1 else c).unsqueeze(-2)
            bias = t[:, :, b0:b1] + squares.sum(-1)
        none = (bias == float("-inf")).all(-1, keepdim=True)
        queries = q[:, :, a0:a1].reshape(1, h, groups * (a1 - a0), q.shape[-1])
        bias = bias.masked_fill(none, 0.0)
        out = reference.landmark_attention(queries, keys, v[:, :, b0:b1], *own, bias, none.unsqueeze(-1))
        parts.append(out.reshape(1, h * groups, a1 - a0, v.shape[-1]))
    return torch.cat(parts, 2)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_sequence_is_attended_to_on_its_own_in_every_gradient(case, dtype, monkeypatch):
    options = {"query": LENGTHS, "h": 2, "g": 1, "d": 64, "m": 128, "shared": True, "bias": True} | CASES[case]
    query, key = options["query"], options.get("key", options["query"])
    h, d, m = options["h"], options["d"], options["m"]
    torch.manual_seed(0)

    def tokens(lengths, heads):
        return torch.randn(1, sum(lengths), heads, d, device="cuda").to(dtype).transpose(1, 2)

    lead = (1, h) if options["shared"] else (len(query), h)
    u, w = ((torch.randn(*lead, m, d, device="cuda") * d**-0.25).to(dtype).float() for _ in range(2))
    t = c = None
    if options["bias"]:
        t = torch.randn(1, h, sum(key), device="cuda")
        c = -0.5 * d**-0.5 * torch.rand(*lead, d, device="cuda")
        if options.get("removed"):
            t[0, 0, ::3], t[0, 1, -700:] = float("-inf"), float("-inf")
    operands = [
        *(tokens(query, h * options["g"]), tokens(key, h), tokens(key, h)),
        *(u, w, torch.randn(*lead, m, device="cuda"), t, c),
    ]
    operands = [None if x is None else x.detach().requires_grad_() for x in operands]
    given = [x for x in operands if x is not None]
    query_ends, key_ends = (ends_of(x, options.get("dtype", torch.int32)) for x in (query, key))
    sequences = Sequences(query_ends, key_ends, max(query), max(key) + 100)
    # Every buffer a kernel is to fill starts as NaN: what is left unwritten shows.
    empty = torch.Tensor.new_empty

    def poisoned(*arguments, **how):
        x = empty(*arguments, **how)
        return x.fill_(float("nan")) if x.is_floating_point() and x.is_cuda else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    out = kernels.landmark_attention(*operands, sequences=sequences)
    weight = torch.randn(out.shape, device="cuda").to(dtype)
    got = torch.autograd.grad(out, given, weight)
    again = torch.autograd.grad(kernels.landmark_attention(*operands, sequences=sequences), given, weight)
    monkeypatch.undo()
    assert all(map(torch.equal, got, again))
    exact = [None if x is None else x.detach().double().requires_grad_() for x in operands]
    want = one_by_one(*exact, query_ends.tolist(), key_ends.tolist())
    expected = torch.autograd.grad(want, [x for x in exact if x is not None], weight.double())
    assert ((out - want).norm() / want.norm()).item() <= BOUNDS[dtype][0]
    names = [name for name, x in zip(NAMES, operands, strict=True) if x is not None]
    errors = {name: ((x - y).norm() / y.norm()).item() for name, x, y in zip(names, got, expected, strict=True)}
    assert {name: e for name, e in errors.items() if not e <= BOUNDS[dtype][1]} == {}


CAUSAL_CASES = {  # lengths, h, g, d, m, growth of norms along all tokens
    "plain": (LENGTHS, 2, 1, 64, 128, 0.0),
    "grouped queries, two blocks of landmarks": (LENGTHS, 1, 3, 64, 256, 0.0),
    "d 128, m 256": (LENGTHS, 2, 1, 128, 256, 0.0),
    "d 32, m 100": (OTHERS, 2, 1, 32, 100, 0.0),
    "norms that grow": (LENGTHS, 2, 1, 64, 128, 8.0),
    "many short": ((3, 17, 40, 0) * 100, 2, 1, 64, 128, 0.0),
}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("case", CAUSAL_CASES)
def test_causal_sequences_give_the_bits_they_give_alone(case, dtype, monkeypatch):
    """Chunks begin where sequences do, so all that is of one sequence is the same bits; sums over all of them agree."""
    lengths, h, g, d, m, growth = CAUSAL_CASES[case]
    torch.manual_seed(0)
    n = sum(lengths)

    def tokens(heads):
        x = (
            torch.randn(1, n, heads, d, device="cuda")
            * (1 + growth * torch.arange(n, device="cuda") / n)[:, None, None]
        )
        return x.to(dtype).transpose(1, 2).requires_grad_()

    operands = [tokens(h * g), tokens(h), tokens(h)]
    operands += [(torch.randn(1, h, m, d, device="cuda") * d**-0.25).requires_grad_() for _ in range(2)]
    operands += [x.requires_grad_() for x in (torch.randn(1, h, m, device="cuda"), torch.randn(1, h, n, device="cuda"))]
    operands += [(-0.2 * d**-0.5 * torch.rand(1, h, d, device="cuda")).requires_grad_()]
    weight = torch.randn(1, h * g, n, d, device="cuda").to(dtype)
    empty = torch.Tensor.new_empty

    def poisoned(*arguments, **how):
        x = empty(*arguments, **how)
        return x.fill_(float("nan") if x.is_floating_point() else 123) if x.is_cuda else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    out, after = causal_landmark_attention(*operands, boundaries=ends_of(lengths))
    got = torch.autograd.grad(out, operands, weight)
    again, _ = causal_landmark_attention(*operands, boundaries=ends_of(lengths))
    assert all(map(torch.equal, (out, *got), (again, *torch.autograd.grad(again, operands, weight))))
    monkeypatch.undo()
    total = [torch.zeros_like(x, dtype=torch.float64) for x in (*operands[3:6], operands[7])]
    for i, (first, last) in enumerate(pairwise(ends_of(lengths).tolist())):
        if first == last:
            continue
        part = [x[:, :, first:last] for x in operands[:3]] + operands[3:6] + [operands[6][..., first:last], operands[7]]
        part = [x.detach().requires_grad_() for x in part]
        alone, state = causal_landmark_attention(*part)
        own = torch.autograd.grad(alone, part, weight[:, :, first:last])
        assert torch.equal(out[:, :, first:last], alone), (first, last)
        assert torch.equal(after.sums[i : i + 1], state.sums) and torch.equal(
            after.log_scale[i : i + 1], state.log_scale
        )
        assert all(torch.equal(x[:, :, first:last], y) for x, y in zip(got[:3], own[:3], strict=True)), (first, last)
        assert torch.equal(got[6][..., first:last], own[6])
        for x, y in zip(total, (*own[3:6], own[7]), strict=True):
            x += y
    for x, y in zip((*got[3:6], got[7]), total, strict=True):
        assert ((x - y).norm() / y.norm()).item() < 1e-4


@pytest.mark.parametrize(
    ("variant", "is_causal"),
    [("posrf-orf", False), ("oprf-orf", False), ("saderf-qmc", False), ("oprf-fastfoodl", False), ("posrf-orf", True)],
)
def test_packed_attention_takes_no_padding_and_a_graph_other_boundaries(variant, is_causal, monkeypatch):
    def refuse(*_):
        raise AssertionError("padded")

    monkeypatch.setattr(packed, "_Places", refuse)
    torch.manual_seed(0)
    feature_map = sf.FeatureMap(64, 128, *variant.split("-"), num_heads=4, device="cuda")
    lengths = [(900, 0, 100, 1000), (1, 999, 500, 500)]
    learned = [x for x in feature_map.parameters() if x.requires_grad]

    def alone(which):
        parts = []
        for a, b in pairwise(ends_of(lengths[which]).tolist()):
            sequence = [x[a:b].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
            parts.append(sf.random_feature_attention(*sequence, feature_map, is_causal=is_causal)[0].transpose(0, 1))
        out = torch.cat(parts)
        return out, *torch.autograd.grad(out, (q, k, v, *learned), torch.ones_like(out))

    def step():
        out = sf.packed_random_feature_attention(q, k, v, feature_map, ends, 1000, is_causal=is_causal)
        return out, *torch.autograd.grad(out, (q, k, v, *learned), torch.ones_like(out))

    # All on one stream: autograd runs a step backward where it ran forward, and a graph must not wait for another.
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        q, k, v = (torch.randn(2000, 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        ends = ends_of(lengths[0])
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = step()
        for which in (0, 1):
            ends.copy_(ends_of(lengths[which]))
            graph.replay()
            for i, (x, y) in enumerate(zip(found, alone(which), strict=True)):
                # Gradients of W are sums over all tokens of terms that cancel.
                assert ((x - y).norm() / y.norm()).item() < (1e-2 if i < 4 else 5e-2), i
    torch.cuda.synchronize()


def test_wrong_boundaries_lead_nowhere_outside():
    """With what lies before and behind the tokens NaN, nothing that should be a number is NaN."""
    room = torch.full((3, 3000, 4, 64), float("nan"), device="cuda", dtype=torch.bfloat16)
    room[:, 1000:2000].normal_()
    q, k, v = room[:, 1000:2000].unbind(0)
    feature_map = sf.FeatureMap(64, 128, "posrf", device="cuda")
    wrong = torch.tensor([-700, 600, 600, 1 << 40], device="cuda")
    right = torch.tensor([0, 600, 600, 1000], device="cuda")
    found, want = (sf.packed_random_feature_attention(q, k, v, feature_map, x, 1000) for x in (wrong, right))
    assert torch.equal(found, want) and found.isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_compiles_without_a_break(is_causal):
    feature_map = sf.FeatureMap(64, 128, "posrf" if is_causal else "oprf", device="cuda")
    q, k, v = (torch.randn(700, 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    ends = ends_of((200, 0, 500))
    run = torch.compile(sf.packed_random_feature_attention, fullgraph=True)
    found = [f(q, k, v, feature_map, ends, 500, is_causal=is_causal) for f in (run, sf.packed_random_feature_attention)]
    gradients = [torch.autograd.grad(x.float().sum(), (q, k, v)) for x in found]
    for x, y in zip(*((a, *b) for a, b in zip(found, gradients, strict=True)), strict=True):
        assert ((x - y).norm() / y.norm()).item() < 2e-2
