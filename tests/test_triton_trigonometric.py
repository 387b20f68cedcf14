"""Fused trigonometric attention without a GPU: in Triton's interpreter against float64, and compiled for one."""

import json
import math
import sys
from importlib.util import find_spec

import pytest
import torch

from offline_kernels import SHARED_MEMORY, assemble, differences, new_buffers, poisoned, run_program

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
# name: b, h, g, n, s, d, e, m, and what else is special
CASES = {
    "plain": (1, 2, 1, 70, 150, 16, 16, 32, {}),
    "odd sizes": (1, 2, 1, 37, 45, 20, 24, 50, {}),
    "one token": (1, 2, 1, 1, 1, 16, 16, 16, {}),
    "grouped queries, transposed": (2, 2, 3, 40, 50, 16, 16, 16, {"transposed": True, "shared": False}),
    "no bias": (1, 1, 1, 40, 70, 16, 16, 16, {"bias": False, "factor": 0.0}),
    "negative weights": (1, 1, 1, 40, 70, 16, 16, 16, {"signed": True}),
    "some keys removed": (1, 2, 1, 40, 90, 16, 16, 16, {"removed": slice(30, None)}),
    "a head without keys": (1, 2, 1, 40, 50, 16, 16, 16, {"removed": slice(None)}),
    "phases of many turns": (1, 1, 1, 40, 40, 16, 16, 32, {"rows": 10.0, "near": True, "bias": False}),
    "guarded denominators": (1, 1, 1, 20, 40, 16, 16, 16, {"guarded": True, "bias": False, "factor": 0.0}),
}
NAMES = ("query", "key", "value", "rows", "rule_weight", "key_bias")


@pytest.fixture(scope="module")
def interpreted():
    return run_program(__file__, "interpret", interpret=True)


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_float64(interpreted, case):
    found = interpreted["cases"][case]
    assert found["contiguous"]
    assert found["unsafe"] == ([20, 0] if case == "guarded denominators" else [0, 0])
    # A phase in float32 is as good as its size allows.
    limit = 3e-4 if case == "phases of many turns" else 1e-5
    assert {name: e for name, e in found["relative"].items() if not e < limit} == {}


@needs_triton
def test_a_head_without_keys_gives_zero_and_takes_no_gradient(interpreted):
    assert interpreted["cases"]["a head without keys"]["zero"] == [True] * 4


@needs_triton
def test_what_denominators_are_measured_by_is_the_sum_of_absolute_terms(interpreted):
    assert interpreted["magnitude"] < 1e-6


@needs_triton
def test_sums_of_16_bit_tokens_keep_their_digits_where_terms_cancel(interpreted):
    """The denominators are a hundredth of their terms: features in 16 bits would be wrong by several per cent."""
    assert interpreted["half"]["terms over denominator"] > 100
    assert interpreted["half"]["relative"] < 2e-3


@needs_triton
def test_cosines_and_sines_are_good_to_their_last_bits(interpreted):
    assert interpreted["waves"]["error"] < 1.5e-7
    assert interpreted["waves"]["largest"] <= 1.0000002 and interpreted["waves"]["nan"]


@needs_triton
def test_fakes_have_the_shapes_and_strides_of_results(interpreted):
    assert interpreted["fakes"] == []


@needs_triton
def test_frozen_rows_get_no_gradient(interpreted):
    assert interpreted["frozen"] == 3  # of query, key and value


@needs_triton
@pytest.mark.parametrize("case", ["plain", "gaussian", "masked and grouped", "learned", "centred"])
def test_the_library_attends_through_the_kernels(interpreted, case):
    found = interpreted["library"][case]
    assert found["calls"] == 1
    assert {name: e for name, e in found["relative"].items() if not e < 3e-5} == {}


@needs_triton
def test_the_fused_path_compiles_into_one_graph(interpreted):
    assert interpreted["compiled"] == [True] * 4


@needs_triton
def test_what_the_kernels_do_not_take_stays_with_torch(interpreted):
    assert interpreted["others"] == {"float64": 0, "causal": 0, "torch": 0, "other features": 0}


def test_an_unknown_precision_is_refused_by_name():
    from spectraformer.ops.triton.trigonometric import trigonometric_attention

    x = torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match=r"tf32'.*tf32x3"):
        trigonometric_attention(x, x, x, x, x[..., 0], precision="tf32")


@pytest.fixture(scope="module")
def compiled():
    return run_program(__file__, "compile", interpret=False)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("wants_rows", [False, True], ids=["frozen rows", "learned rows"])
def test_kernels_compile_for_hopper_onto_tensor_cores_and_into_registers(compiled, wants_rows):
    found = compiled[str(wants_rows)]
    assert len(found) == (3 if wants_rows else 6)
    for x in found:
        assert x["shared"] <= SHARED_MEMORY, x
        assert x["spills"] == 0, x
        if "merge" not in x["kernel"] and "state" not in x["kernel"]:
            assert x["matrix"] > 0, x
            # Queries have several programs on a multiprocessor in place of a pipeline.
            assert x["copies"] > 0 or x["kernel"] == "trigonometric_query_kernel", x


def operands_of(b, h, g, n, s, d, e, m, special):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def tokens(heads, length, dim):
        x = 0.5 * normal(b, length, heads, dim)
        return x.transpose(1, 2) if special.get("transposed") else x.transpose(1, 2).contiguous()

    query, key, value = tokens(h * g, n, d), tokens(h, s, d), 2 * tokens(h, s, e)
    lead = (1, h) if special.get("shared", True) else (b, h)
    rows = normal(*lead, m, d) * d**-0.25 * special.get("rows", 1.0)
    weight = torch.rand(*lead, m, generator=generator) + 0.5
    if special.get("signed"):
        weight[..., : m // 4] *= -0.5
    if special.get("near"):
        key = query + 1e-3 * key
    if special.get("guarded"):
        # One phase, a right angle but for 3e-7 for keys, both ways: cosines all but vanish, sines cancel.
        query, key, rows, weight = (torch.zeros_like(x) for x in (query, key, rows, weight))
        query[..., 0] = torch.linspace(0.3, 0.9, n)
        key[..., ::2, 0], key[..., 1::2, 0] = 1 - 2e-7, -1 + 2e-7
        rows[..., 0, 0], weight[..., 0] = math.pi / 2, 1.0
    bias = None
    if special.get("bias", True):
        bias = normal(b, h, s)
        bias[0, 0, special.get("removed", slice(0))] = float("-inf")
    return [query, key, value, rows, weight, bias]


def reference(query, key, value, rows, weight, bias, factor):
    """The same in plain torch: output, flags, and how many times larger than the denominator its terms are."""
    from spectraformer.ops import streaming

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
    size = waves(folded).abs() @ state.magnitude.unsqueeze(-1)
    terms = size / (waves(folded) @ state.sums)[..., -1:].abs()
    return out.reshape(*query.shape[:3], -1), unsafe.reshape(query.shape[:3]), terms


def relative(got, want, largest=0.0):
    return (got - want).abs().max().item() / max(want.abs().max().item(), 0.1 * largest)


def interpret():
    from spectraformer.ops.triton import trigonometric as fused
    from spectraformer.ops.triton import trigonometric_plan

    # So few programs that some take several tiles and some heads several programs.
    configuration = trigonometric_plan.configuration
    trigonometric_plan.configuration = lambda *a: configuration(*a)._replace(programs=6)
    with new_buffers(poisoned):
        results = {}
        for name, (b, h, g, n, s, d, e, m, special) in CASES.items():
            factor = special.get("factor", 0.3)
            operands = [None if x is None else x.requires_grad_() for x in operands_of(b, h, g, n, s, d, e, m, special)]
            present = [i for i, x in enumerate(operands) if x is not None]
            out, unsafe = fused.trigonometric_attention(*operands, factor, precision="ieee")
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            got = torch.autograd.grad(out, [operands[i] for i in present], weight)
            exact = [None if x is None else x.detach().double().requires_grad_() for x in operands]
            want, flags, _ = reference(*exact, factor)
            expected = torch.autograd.grad(want, [exact[i] for i in present], weight.double())
            # A gradient that is 0 in truth, as of a single key, is measured on the scale of the others.
            largest = max(x.abs().max().item() for x in expected)
            errors = {"out": relative(out, want)}
            for i, x, y in zip(present, got, expected, strict=True):
                errors[NAMES[i]] = relative(x, y, largest)
            results[name] = {
                "contiguous": out.is_contiguous() and out.shape == (b, h * g, n, e) and out.dtype == torch.float32,
                "relative": errors,
                "unsafe": [int(unsafe.sum()), int((unsafe != flags).sum())],
                "zero": [not x[0, 0].any() for x in (out, *got[:3])],
            }
    everything = {
        "cases": results,
        "fakes": check_fakes(fused),
        "half": half_precision(fused),
        "magnitude": magnitude(),
        "waves": waves(),
    }
    operands = operands_of(*CASES["plain"])
    results = torch.ops.spectraformer.trigonometric_attention(*operands, 0.3, True, "ieee")
    wanted = (False, False, False)
    arguments = (results[0], *operands, *results, 0.3, *wanted, "ieee")
    backward = torch.ops.spectraformer.trigonometric_attention_backward(*arguments)
    everything["frozen"] = len(backward)
    everything["compiled"] = compiled_equal()
    everything["library"], everything["others"] = in_the_library(fused)
    sys.stdout.write(json.dumps(everything))


def check_fakes(fused):
    operands = operands_of(1, 1, 2, 17, 20, 16, 24, 40, {"transposed": True})
    problems = []
    for needs_backward in (True, False):
        arguments = (*operands, 0.3, needs_backward, "ieee")
        real = torch.ops.spectraformer.trigonometric_attention(*arguments)
        problems += differences(real, fused._forward_shapes(*arguments))
        if needs_backward:
            for wanted in ([True] * 3, [False] * 3):
                arguments = (torch.randn_like(real[0]), *operands, *real, 0.3, *wanted, "ieee")
                backward = torch.ops.spectraformer.trigonometric_attention_backward(*arguments)
                problems += differences(backward, fused._backward_shapes(*arguments))
                if len({x.data_ptr() for x in backward}) < len(backward):
                    problems.append("results share memory")
    return problems


def magnitude():
    """Of the state in the kernels, over several tiles a program, next to that of plain torch."""
    from spectraformer.ops import streaming

    operands = operands_of(1, 2, 1, 2, 250, 16, 16, 16, {"signed": True})
    _, key, value, rows, weight, bias = operands
    state = torch.ops.spectraformer.trigonometric_attention(*operands, 0.3, False, "ieee")[3]
    log = 0.3 * key.square().sum(-1, keepdim=True) + bias.unsqueeze(-1)
    phase = key @ rows.mT
    features = torch.cat((phase.cos(), phase.sin()), -1) * weight.repeat(1, 1, 2).unsqueeze(-2)
    want = streaming.absorb(log, features, value)
    total = (log - want.log_scale.unsqueeze(-2)).exp().sum(-2)
    return relative(state[:, 2].reshape(1, 2, -1, state.shape[-1])[..., :16].flatten(-2), want.magnitude / total)


def half_precision(fused):
    """Products in two parts, as on a GPU, over several blocks of rows."""
    query, key, value, rows, weight, bias = operands_of(1, 1, 1, 40, 60, 16, 16, 80, {})
    query, key = 1.6 * query, 1.6 * key
    tokens = [x.half() for x in (query, key, value)]
    out, _ = fused.trigonometric_attention(*tokens, rows, weight, bias, 0.3)
    exact = [x.double() for x in (*tokens, rows, weight, bias)]
    want, _, terms = reference(*exact, 0.3)
    return {"relative": relative(out, want), "terms over denominator": terms.max().item()}


def waves():
    import triton
    import triton.language as tl

    from spectraformer.ops.triton.trigonometric_forward import cos_sin

    globals().update(tl=tl, cos_sin=cos_sin)  # where a kernel looks names up

    @triton.jit
    def kernel(x, cosine, sine, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        c, s = cos_sin(tl.load(x + i))
        tl.store(cosine + i, c)
        tl.store(sine + i, s)

    def of(x):
        cosine, sine = torch.empty_like(x), torch.empty_like(x)
        kernel[(1,)](x, cosine, sine, SIZE=len(x))
        return cosine, sine

    x = torch.cat((torch.linspace(-3, 3, 2**13), torch.linspace(-1000, 1000, 2**13)))
    cosine, sine = of(x)
    angle = 2 * math.pi * x.double()
    far = torch.cat(of(torch.tensor([1e9, -3e12, 1e30, 4e6])))
    none = torch.cat(of(torch.tensor([float("nan"), float("inf")])))
    return {
        "error": max((cosine - angle.cos()).abs().max().item(), (sine - angle.sin()).abs().max().item()),
        "largest": far.abs().max().item(),
        "nan": bool(none.isnan().all()),
    }


def compiled_equal():
    import spectraformer as sf

    feature_map = sf.FeatureMap(16, 16, "trigrf", "orf")
    leaves = [0.5 * torch.randn(1, 1, 20, 16, generator=torch.Generator().manual_seed(0)) for _ in range(3)]
    leaves = [x.requires_grad_() for x in leaves]

    def attend(query, key, value):
        return feature_map(query, key).attend(value).out

    outs = [f(*leaves) for f in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager"))]
    results = [(out, *torch.autograd.grad(out.square().sum(), leaves)) for out in outs]
    return [x.equal(y) for x, y in zip(*results, strict=True)]


def in_the_library(fused):
    import spectraformer as sf

    calls = []
    run = fused.trigonometric_attention

    def counted(*arguments):
        calls.append(arguments)
        return run(*arguments)

    fused.trigonometric_attention = counted
    generator = torch.Generator().manual_seed(0)
    q, k, v = (0.6 * torch.randn(2, heads, n, 16, generator=generator) for heads, n in ((4, 20), (2, 30), (2, 30)))
    mask = torch.arange(30) < torch.tensor([[30], [17]])
    plain = {"weight": "orf"}
    settings = {
        "plain": (plain, {}),
        "gaussian": (plain | {"kernel": "gaussian"}, {}),
        "masked and grouped": (plain, {"key_padding_mask": mask}),
        "learned": ({"weight": "gmm"}, {}),
        "centred": (plain | {"center": True}, {}),
    }
    results = {}
    for name, (options, more) in settings.items():
        feature_map = sf.FeatureMap(16, 16, **{"component": "trigrf", "num_heads": 2} | options)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)] + list(feature_map.parameters())
        outs = {}
        calls.clear()
        for backend in ("auto", "torch"):
            out = feature_map(*leaves[:2], enable_gqa=True, **more).attend(leaves[2], backend=backend).out
            outs[backend] = (out, *torch.autograd.grad(out.square().sum(), leaves))
        largest = max(x.abs().max().item() for x in outs["torch"][1:])
        errors = {
            str(i): relative(x, y, largest if i else 0.0)
            for i, (x, y) in enumerate(zip(outs["auto"], outs["torch"], strict=True))
        }
        results[name] = {"calls": len(calls), "relative": errors}
    others = {}
    calls.clear()
    feature_map = sf.FeatureMap(16, 16, "trigrf", "orf")
    feature_map(q.double(), k.double(), enable_gqa=True).attend(v.double())
    others["float64"] = len(calls)
    feature_map(q, k, enable_gqa=True).attend(v, backend="torch")
    others["torch"] = len(calls)
    sf.random_feature_attention(*(x[:, :, :9] for x in (q, k, v)), feature_map, enable_gqa=True, is_causal=True)
    others["causal"] = len(calls)
    sf.FeatureMap(16, 16, "cderf", "orf")(q, k, enable_gqa=True).attend(v)
    return results, others | {"other features": len(calls)}


def compile_all():
    from spectraformer.ops.triton.tiles import SIZES
    from spectraformer.ops.triton.trigonometric_plan import plan_backward, plan_forward

    def meta(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    results = {}
    d, m, dtype = 64, 128, torch.bfloat16
    tokens = [meta(8, 8, 8192, d, dtype=dtype) for _ in range(3)]
    operands = (*tokens, meta(1, 8, m, d), meta(1, 8, m), None)
    launches, saved = plan_forward(*operands, key_factor=0.06, needs_backward=True, precision="tf32x3")
    for wants_rows in (False, True):
        after, _ = plan_backward(
            tokens[0], *operands, *saved,
            key_factor=0.06, wants_rows=wants_rows, wants_key_bias=False, precision="tf32x3",
        )  # fmt: skip
        chosen = [*launches, *after] if not wants_rows else after
        results[str(wants_rows)] = [assemble(x, SIZES) for x in chosen]
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]]()
