"""Packed sequences in the fused kernels, in Triton's interpreter: each sequence alone, in float64, is the definition.

As in the tests of attention kernels, this file is both the tests and the two programs they run.
"""

import json
import sys
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch

from offline_kernels import SHARED_MEMORY, assemble, differences, new_buffers, poisoned, run_program

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

LENGTHS = (0, 1, 5, 64, 130)
OTHERS = (7, 0, 90, 33, 1)
BASE = {"query": LENGTHS, "key": LENGTHS, "h": 2, "g": 1, "m": 64, "e": 24, "shared": True, "longest": 0}
CASES = {
    "self-attention": {},
    "cross-attention": {"key": OTHERS},
    "grouped queries, landmarks of every sequence": {"g": 3, "shared": False, "h": 1},
    "keys removed inside sequences": {"removed": True, "shared": False},
    "no bias, no quadratic": {"bias": False},
    "64-bit boundaries, not side by side; heads before tokens": {
        "dtype": torch.int64,
        "strided": True,
        "layout": "heads first",
        "query": OTHERS,
    },
    "blocks of landmarks, read again": {"m": 200, "key": OTHERS, "h": 1},
    "a longest sequence that is not there": {"longest": 500, "key": OTHERS},
    "one sequence": {"query": (33,), "key": (40,)},
    "queries without keys, keys without queries": {"query": (3, 0, 2), "key": (0, 4, 6), "shared": False},
}
MAX_SPILLS = 512  # bytes, as of sequences of one length
NAMES = ("query", "key", "value", "query_landmarks", "key_landmarks", "landmark_bias", "key_bias", "key_quadratic")
# options of the feature map; whether tokens stay packed
VARIANTS = {
    "posrf-orf": ({}, True),
    "posrf-orf, gaussian kernel": ({"kernel": "gaussian"}, True),
    "hyprf-orf": ({}, True),
    "gerf-mm": ({"num_heads": 2}, True),
    "oprf-orf": ({}, True),
    "oprf-fastfoodl": ({"num_heads": 2}, True),
    "saderf-orf": ({}, True),
    "saderf-orf, running": ({"statistics": "running"}, True),
    "aderf-orf": ({}, False),
    "posrf-orf, centred": ({"center": True}, False),
}


@pytest.fixture(scope="module")
def interpreted():
    return run_program(__file__, "interpret", interpret=True)


@pytest.mark.parametrize("case", CASES)
def test_every_sequence_is_attended_to_on_its_own_in_every_gradient(interpreted, case):
    errors = interpreted["kernels"][case]
    assert {name: e for name, e in errors.items() if not e < 2e-5} == {}
    assert {"out", "query", "key", "value", "query_landmarks", "key_landmarks", "landmark_bias"} <= set(errors)
    assert ("key_bias" in errors) == ("key_quadratic" in errors) == CASES[case].get("bias", True)


def test_wrong_boundaries_lead_nowhere_outside(interpreted):
    """Tokens and results lie between guards: what is read there is NaN, what is written there is seen."""
    found = interpreted["wrong"]
    assert found["guards"] > 10 and found["touched"] == 0
    assert found["error"] < 2e-5


@pytest.mark.parametrize("order", ["none", "trace", "diagonal", "full"])
def test_moments_are_of_every_sequence(interpreted, order):
    assert interpreted["moments"][order] < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_library_takes_packed_tokens_as_they_are_where_it_says_so(interpreted, variant):
    found = interpreted["library"][variant]
    assert found["padded"] != VARIANTS[variant][1]
    assert {name: e for name, e in found["errors"].items() if not e < 1e-4} == {}
    assert len(found["errors"]) > 4 or not any(name in variant for name in ("fastfoodl", "gerf"))
    assert found["running"] < 1e-6


def test_operators_are_what_their_fakes_say_and_compile_without_a_break(interpreted):
    assert interpreted["fakes"] == []
    assert interpreted["compiled"] == {"out": True, "query": True}


@pytest.mark.slow
def test_kernels_compile_for_hopper_onto_tensor_cores_and_into_registers():
    found = run_program(__file__, "compile", interpret=False)
    assert {x["kernel"] for x in found} >= {
        "key_kernel",
        "query_kernel",
        "landmark_sums_kernel",
        "query_gradient_kernel",
        "key_gradient_kernel",
    }
    for x in found:
        assert x["spills"] <= MAX_SPILLS and x["shared"] <= SHARED_MEMORY, x
        assert x["stages"] is None or (x["matrix"] > 0 and (x["copies"] > 0 or x["stages"] == 1)), x


def test_pieces_follow_the_tokens_that_there_are_and_their_memory_is_bounded():
    from spectraformer.ops.triton.configurations import MOST_IDLE, choose, split

    chosen = choose("keys", torch.bfloat16, 64, 128)
    assert split(8192, 256, chosen) == (1, 8192)
    assert split(8192, 256, chosen, 0.5) == (2, 4096)
    for share in (1e-3, 1e-6):
        assert split(1 << 20, 100, chosen, share)[0] == MOST_IDLE * chosen.programs // 100
    # States have at most as many rows as there are tokens: of 1e4 sequences, 1e7 of 1e10 tokens.
    assert split(1 << 20, 10_000, chosen, 1e-3)[0] == int(1e-3 * (1 << 20) / 128) == 8
    assert split(1 << 20, 10_000, chosen, 1e-6)[0] == 1


def boundaries_of(lengths, *, dtype=torch.int32, strided=False):
    found = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    return torch.stack((found, -found), 1)[:, 0] if strided else found


def operands_of(query, key, h, g, m, e, shared, *, bias=True, removed=False, layout="tokens first", d=16, **_):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def tokens(count, heads, dim):
        x = normal(1, count, heads, dim).transpose(1, 2)
        return x.contiguous() if layout == "heads first" else x

    t, s = sum(query), sum(key)
    q, k, v = tokens(t, h * g, d), tokens(s, h, d), tokens(s, h, e)
    lead = (1, h) if shared else (len(query), h)
    landmarks = [normal(*lead, m, d) * d**-0.25 for _ in range(2)]
    key_bias = quadratic = None
    if bias:
        key_bias, quadratic = normal(1, h, s), -0.1 * torch.rand(*lead[:1], h, d, generator=generator)
        if removed:
            key_bias[0, 0, ::3] = float("-inf")
            key_bias[0, 1, -130:] = float("-inf")  # all of the last sequence
    return [q, k, v, *landmarks, normal(1, 1, m) if shared else normal(*lead, m), key_bias, quadratic]


def one_by_one(operands, query_ends, key_ends):
    """Every sequence alone, in plain torch."""
    from spectraformer.ops import reference

    q, k, v, u, w, a, t, c = operands
    h, groups, parts = k.shape[1], q.shape[1] // k.shape[1], []
    for i, ((a0, a1), (b0, b1)) in enumerate(zip(pairwise(query_ends), pairwise(key_ends), strict=True)):
        if a0 == a1 or b0 == b1:
            parts.append(q.new_zeros(1, q.shape[1], a1 - a0, v.shape[-1]))
            continue
        item = [x[i : i + 1] if x.shape[0] > 1 else x for x in (u, w, a)]
        keys, bias = k[:, :, b0:b1], k.new_zeros(1, h, b1 - b0)
        if t is not None:
            squares = keys**2 * (c[i : i + 1] if c.shape[0] > 1 else c).unsqueeze(-2)
            bias = t[:, :, b0:b1] + squares.sum(-1)
        none = (bias == float("-inf")).all(-1, keepdim=True)
        item = [x.expand(1, h, *x.shape[2:]) for x in item]
        queries = q[:, :, a0:a1].reshape(1, h, groups * (a1 - a0), q.shape[-1])
        out = reference.landmark_attention(
            queries, keys, v[:, :, b0:b1], *item, bias.masked_fill(none, 0.0), none.unsqueeze(-1)
        )
        parts.append(out.reshape(1, h * groups, a1 - a0, v.shape[-1]))
    return torch.cat(parts, 2)


def errors_of(operands, sequences, query_ends, key_ends):
    """Relative errors of the kernels' output and gradients."""
    from spectraformer.ops import triton as kernels

    operands = [None if x is None else x.detach().requires_grad_() for x in operands]
    given = [x for x in operands if x is not None]
    shown = list(operands)
    if operands[6] is not None:  # what a removed key and its value hold must not matter
        gone = (operands[6].detach() == float("-inf")).unsqueeze(-1)
        shown[1:3] = (x.masked_fill(gone, float("nan")) for x in shown[1:3])
    out = kernels.landmark_attention(*shown, precision="ieee", sequences=sequences)
    assert out.transpose(1, 2).is_contiguous()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(out, given, weight)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in operands]
    want = one_by_one(exact, query_ends, key_ends)
    expected = torch.autograd.grad(
        want, [x for x in exact if x is not None], weight.double(), materialize_grads=True, allow_unused=True
    )
    largest = max(x.abs().max().item() for x in expected)
    errors = {"out": ((out - want).abs().max() / want.abs().max()).item()}
    names = [name for name, x in zip(NAMES, operands, strict=True) if x is not None]
    for name, x, y in zip(names, got, expected, strict=True):
        errors[name] = (x - y).abs().max().item() / max(y.abs().max().item(), 0.1 * largest)
    return errors


def sequences_of(case):
    from spectraformer.ops import Sequences

    query, key = case["query"], case["key"]
    how = {"dtype": case.get("dtype", torch.int32), "strided": case.get("strided", False)}
    first = boundaries_of(query, **how)
    ends = first, first if key == query else boundaries_of(key, **how)
    longest = (max(case["longest"], *x) for x in (query, key))
    return Sequences(*ends, *longest), *(x.tolist() for x in ends)


class Guards:
    """Buffers between guards of NaN."""

    SIZE = 4096

    def __init__(self):
        self.kept = []

    def new(self, x):
        if x.device.type != "cpu" or not x.is_floating_point():
            return x
        buffer = torch.full((x.numel() + 2 * self.SIZE,), float("nan"), dtype=x.dtype)
        self.kept.append(buffer)
        return buffer[self.SIZE : self.SIZE + x.numel()].view(x.shape)

    def guarded(self, x):
        """The same numbers, tokens before heads."""
        packed = x.transpose(1, 2)
        return self.new(torch.empty_like(packed)).copy_(packed).transpose(1, 2)

    def touched(self):
        return sum(int((~x[: self.SIZE].isnan()).sum() + (~x[len(x) - self.SIZE :].isnan()).sum()) for x in self.kept)


def wrong_boundaries():
    from spectraformer.ops import Sequences

    guards = Guards()
    case = BASE | {"query": (60,), "key": (50,)}
    operands = operands_of(**case)
    operands[:3] = (guards.guarded(x) for x in operands[:3])
    query = torch.tensor([-7, 2, 50, 50, 1 << 40])
    key = torch.tensor([1 << 33, -4, 30, 35, 1 << 40])
    with new_buffers(guards.new):
        errors = errors_of(operands, Sequences(query, key, 1000, 1000), [0, 2, 50, 50, 60], [0, 0, 30, 35, 50])
    return {"guards": len(guards.kept), "touched": guards.touched(), "error": max(errors.values())}


def moments_of_sequences():
    from spectraformer.components.statistics import moments
    from spectraformer.ops import Sequences
    from spectraformer.ops.triton import moments_kernel
    from spectraformer.ops.triton.moments import sequence_moments

    moments_kernel.PROGRAMS = dict.fromkeys(moments_kernel.PROGRAMS, 40)  # some heads are cut in pieces
    query, key, *_ = operands_of(**BASE | {"key": OTHERS, "g": 2})
    masks = [torch.rand(1, x.shape[2], generator=torch.Generator().manual_seed(0)) < 0.7 for x in (query, key)]
    ends = boundaries_of(LENGTHS), boundaries_of(OTHERS)
    results = {}
    for order in ("none", "trace", "diagonal", "full"):
        errors = []
        for query_mask, key_mask in ((None, None), masks):
            found = sequence_moments(
                query, key, query_mask, key_mask, 0.6, order, "ieee", sequences=Sequences(*ends, 130, 200)
            )
            for side, (x, mask) in enumerate(((query, query_mask), (key, key_mask))):
                for i, (first, last) in enumerate(pairwise(ends[side].tolist())):
                    part = x[:, :, first:last].double().reshape(1, 2, -1, 16)
                    real = (
                        None if mask is None else mask[:, first:last].repeat(1, part.shape[2] // max(last - first, 1))
                    )
                    want = moments(part, real, 0.6, order, False)
                    errors += [(f[side, i] - y[0]).abs().max().item() for f, y in zip(found, want[:2], strict=True)]
        results[order] = max(errors)
    return results


def in_the_library(name):
    made, _ = VARIANTS[name]
    grouped = 2 if name == "posrf-orf" else 1
    # A matrix fitted to no queries at all is too large for the gradients of keys in float32.
    lengths = (3, *LENGTHS[1:]) if "aderf" in name else LENGTHS
    query, key = (boundaries_of(x) for x in (lengths, OTHERS))
    shapes = ((sum(lengths), 2 * grouped, 16), (sum(OTHERS), 2, 16), (sum(OTHERS), 2, 24))
    ends = {"cu_seqlens": query, "max_seqlen": 130, "cu_seqlens_key": key, "max_seqlen_key": 90}
    return next_to_float64(name, made, shapes, **ends, enable_gqa=grouped > 1)


def next_to_float64(name, made, shapes, **options):
    """Errors of the library's function for packed tokens in float32, and whether it took padding."""
    import spectraformer as sf
    from spectraformer import packed

    tokens = [torch.randn(*x, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(shapes)]
    found, padded, places = {}, [], packed._Places
    packed._Places = lambda *x: padded.append(x) or places(*x)
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        feature_map = sf.FeatureMap(16, 24, *name.partition(",")[0].split("-"), **made).to(dtype).train()
        inputs = [x.to(dtype).requires_grad_() for x in tokens]
        out = sf.packed_random_feature_attention(*inputs, feature_map, **options)
        given = dict(zip(NAMES, inputs, strict=False)) | dict(feature_map.named_parameters())
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype)
        gradients = torch.autograd.grad(out, list(given.values()), weight)
        running = [] if feature_map.running is None else [x.double() for x in feature_map.running.buffers()]
        found[dtype] = {"out": out} | dict(zip(given, gradients, strict=True)), running
        if dtype == torch.float32:
            was_padded = bool(padded)
            assert out.is_contiguous()
    packed._Places = places
    (got, running), (want, expected) = found.values()
    errors = {key: ((got[key] - x).abs().max() / x.abs().max()).item() for key, x in want.items()}
    moved = max([0.0, *((x - y).abs().max().item() for x, y in zip(running, expected, strict=True))])
    return {"padded": was_padded, "errors": errors, "running": moved}


def fakes():
    from spectraformer.ops import triton as kernels
    from spectraformer.ops.triton import moments

    problems = []
    case = BASE | {"g": 2, "key": OTHERS, "shared": False}
    operands, packing = operands_of(**case), kernels.packing_of(sequences_of(case)[0])
    for needs_backward in (True, False):
        arguments = (*operands, needs_backward, "ieee", *packing)
        real = torch.ops.spectraformer.landmark_attention(*arguments)
        problems += differences(real, kernels._forward_shapes(*arguments))
        torch.library.opcheck(
            torch.ops.spectraformer.landmark_attention.default,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )
        if needs_backward:
            for wanted in ([True] * 5, [False] * 5):
                arguments = (torch.randn_like(real[0]), *operands, *real, wanted, "ieee", *packing)
                backward = torch.ops.spectraformer.landmark_attention_backward(*arguments)
                problems += differences(backward, kernels._backward_shapes(*arguments))
    for order in ("trace", "full"):
        arguments = (*operands[:2], None, None, 0.5, order, "ieee", *packing)
        real = torch.ops.spectraformer.sequence_moments(*arguments)
        problems += differences(real, moments._shapes(*arguments))
    return problems


def compiled():
    import spectraformer as sf

    torch.manual_seed(0)
    feature_map = sf.FeatureMap(16, 24, "oprf", "orf")
    q, k, v = (torch.randn(sum(LENGTHS), 2, 16, requires_grad=True) for _ in range(3))
    ends = boundaries_of(LENGTHS)
    run = torch.compile(sf.packed_random_feature_attention, fullgraph=True, backend="aot_eager")
    found = [f(q, k, v, feature_map, ends, 130) for f in (run, sf.packed_random_feature_attention)]
    gradients = [torch.autograd.grad(x.square().sum(), q)[0] for x in found]
    return {
        name: ((x - y).abs().max() < 1e-5 * y.abs().max()).item()
        for name, (x, y) in {"out": found, "query": gradients}.items()
    }


def interpret():
    from spectraformer.ops.triton.configurations import THIRTY_TWO_BIT

    # Enough to cut sequences in pieces; the interpreter runs programs one after another.
    for row in THIRTY_TWO_BIT.values():
        row.update({name: chosen._replace(programs=24) for name, chosen in row.items()})
    with new_buffers(poisoned):
        results = {"kernels": {}}
        for name, changes in CASES.items():
            case = BASE | changes
            results["kernels"][name] = errors_of(operands_of(**case), *sequences_of(case))
        results["moments"] = moments_of_sequences()
    results["wrong"] = wrong_boundaries()
    results["library"] = {name: in_the_library(name) for name in VARIANTS}
    results["fakes"] = fakes()
    results["compiled"] = compiled()
    sys.stdout.write(json.dumps(results))


def compile_all():
    from spectraformer.ops import Sequences
    from spectraformer.ops.triton.backward import Wanted, plan_backward
    from spectraformer.ops.triton.forward import plan_forward
    from spectraformer.ops.triton.tiles import SIZES

    def meta(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    ends = meta(33, dtype=torch.int32)
    q, k, v = (meta(131_072, 8, 64, dtype=torch.bfloat16).transpose(0, 1).unsqueeze(0) for _ in range(3))
    operands = (q, k, v, meta(1, 8, 128, 64), meta(1, 8, 128, 64), meta(1, 8, 128), None, meta(1, 8, 64))
    how = {"precision": "tf32x3", "sequences": Sequences(ends, ends, 8192, 8192)}
    launches, saved = plan_forward(*operands, needs_backward=True, **how)
    launches += plan_backward(q, *operands, *saved, wanted=Wanted(*[False] * 5), **how)[0]
    sys.stdout.write(json.dumps([assemble(x, SIZES) for x in launches]))


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]]()
