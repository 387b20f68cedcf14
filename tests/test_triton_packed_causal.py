"""Packed sequences in the causal kernels, in Triton's interpreter: each sequence alone, in float64, is the definition.

As in the tests of attention kernels, this file is both the tests and the program they run.
"""

import json
import sys
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch

from offline_kernels import differences, new_buffers, poisoned, run_program
from test_triton_causal import NAMES, exact_attention, operands_of, small_tiles
from test_triton_packed import Guards, boundaries_of, next_to_float64

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

# Chunks are of 32 tokens. Lengths, then h, g, d, e, m and what else is special.
CASES = {
    "empty, one token, one chunk and many": ((0, 1, 5, 64, 130), 2, 1, 16, 16, 64, {}),
    "sequences that end where chunks do": ((32, 64, 0, 0, 96), 1, 1, 16, 24, 40, {}),
    "grouped queries, two blocks of landmarks": ((40, 3, 70), 1, 3, 16, 16, 70, {"transposed": True}),
    "no bias, 64-bit boundaries": ((33, 31, 2), 2, 1, 16, 16, 16, {"bias": False, "dtype": torch.int64}),
    "a sequence and the first keys of another removed": ((50, 40, 80), 2, 1, 16, 16, 16, {"removed": slice(30, 130)}),
    "each after a state": ((20, 0, 70), 2, 2, 16, 16, 32, {"state": True}),
    "norms that grow": ((0, 80, 70), 1, 2, 16, 16, 24, {"growth": 11.0, "curvature": 0.2, "state": True}),
    "many short": ((3, 1, 2, 0) * 12, 1, 1, 16, 16, 16, {}),
    "head dim above the joint kernel's": ((20, 30), 1, 1, 70, 16, 24, {}),
    "one sequence": ((77,), 1, 1, 16, 16, 16, {}),
}
# Options of the feature map; whether tokens stay packed.
VARIANTS = {
    "posrf-orf": ({}, True),
    "gerf-mm": ({"num_heads": 2}, True),
    "oprf-orf": ({}, True),
    "saderf-orf": ({}, True),
    "posrf-orf, centred": ({"center": True}, False),
    "trigrf-orf": ({}, False),
}


@pytest.fixture(scope="module")
def interpreted():
    return run_program(__file__, "interpret", interpret=True)


@pytest.mark.parametrize("case", CASES)
def test_every_sequence_is_attended_to_on_its_own_in_every_gradient(interpreted, case):
    errors = interpreted["kernels"][case]
    assert {name: e for name, e in errors.items() if not e < 2e-5} == {}
    assert {"out", "sums_after", "query", "key", "value", "query_landmarks", "key_landmarks"} <= set(errors)
    assert ("sums" in errors) == CASES[case][-1].get("state", False)


def test_the_case_of_norms_that_grow_is_of_steep_chunks_in_one_sequence_alone(interpreted):
    steepest = interpreted["steepest"]
    assert max(steepest) > 90 and min(steepest) < 90


def test_tiles_change_results_by_rounding_alone(interpreted):
    assert {name: e for name, e in interpreted["tiles"].items() if not e < 2e-5} == {}


def test_tokens_in_no_sequence_change_no_gradient_of_landmarks(interpreted):
    assert interpreted["outside"] == [True] * 5


def test_attention_and_its_gradients_compile_without_a_break(interpreted):
    assert interpreted["compiled"] == {"packed": True, "batch": True}


def test_a_second_derivative_is_refused_and_not_taken_for_zero(interpreted):
    assert interpreted["twice"] == ["trying to differentiate twice"] * 3


def test_wrong_boundaries_lead_nowhere_outside(interpreted):
    """Tokens and results lie between guards: what is read there is NaN, what is written there is seen."""
    found = interpreted["wrong"]
    assert found["guards"] > 10 and found["touched"] == 0
    assert found["right"]["error"] < 2e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_library_takes_packed_tokens_as_they_are_where_it_says_so(interpreted, variant):
    found = interpreted["library"][variant]
    assert found["padded"] != VARIANTS[variant][1]
    # Denominators of signed features may all but vanish.
    bound = 1e-3 if variant.startswith("trigrf") else 1e-4
    assert {name: e for name, e in found["errors"].items() if not e < bound} == {}
    assert found["running"] < 1e-6


def test_boundaries_of_keys_of_their_own_take_padding_and_give_the_same(interpreted):
    assert interpreted["own boundaries"] < 1e-5


def test_operators_are_what_their_fakes_say(interpreted):
    assert interpreted["fakes"] == []


def test_more_than_one_batch_item_is_refused_by_shape(interpreted):
    assert "(3, 1, 16, 16)" in interpreted["refused"][0] and "one batch item" in interpreted["refused"][0]
    assert "(3, 1, 16)" in interpreted["refused"][1]


def packed_operands(lengths, h, g, d, e, m, special):
    """Operands of one batch item, and states of every sequence or None."""
    from spectraformer.ops.streaming import AttentionState

    operands, _ = operands_of(1, h, g, sum(lengths), d, e, m, {x: y for x, y in special.items() if x != "state"})
    if not special.get("state"):
        return operands, None
    generator = torch.Generator().manual_seed(2)
    scale = torch.randn(len(lengths), h, m, generator=generator)
    return operands, AttentionState(scale, torch.rand(len(lengths), h, m, e + 1, generator=generator))


def one_by_one(operands, state, ends):
    """Every sequence alone, in plain torch."""
    from spectraformer.ops.streaming import AttentionState, empty_state

    outs, sums, scales = [], [], []
    for i, (first, last) in enumerate(pairwise(ends)):
        q, k, v, u, w, a, t, c = operands
        tokens = [x[:, :, first:last] for x in (q, k, v)]
        own = None if state is None else AttentionState(*(x[i : i + 1] for x in state[:2]))
        if first == last:
            before = own or empty_state(1, k.shape[1], u.shape[-2], v.shape[-1], device="cpu", dtype=k.dtype)
            outs, sums, scales = (
                [*outs, q.new_zeros(1, q.shape[1], 0, v.shape[-1])],
                [*sums, before.sums],
                [*scales, before.log_scale],
            )
            continue
        bias = None if t is None else t[..., first:last]
        out, after = exact_attention([*tokens, u, w, a, bias, c], own)
        outs.append(out)
        sums.append(after.sums)
        scales.append(after.log_scale)
    return torch.cat(outs, 2), torch.cat(sums), torch.cat(scales)


def errors_of(lengths, *sizes):
    """Relative errors of output, states at ends and gradients."""
    from spectraformer.ops.streaming import AttentionState
    from spectraformer.ops.triton.causal import causal_landmark_attention

    special = sizes[-1]
    operands, state = packed_operands(lengths, *sizes)
    boundaries = boundaries_of(lengths, dtype=special.get("dtype", torch.int32), strided="dtype" in special)
    doubles = [None if x is None else x.double().requires_grad_() for x in operands]
    exact_state = None if state is None else AttentionState(*(x.double() for x in state[:2]))
    shown = list(operands)
    if "removed" in special:  # what a removed key and its value hold must not matter
        gone = (operands[6] == float("-inf")).unsqueeze(-1)
        shown[1:3] = (x.masked_fill(gone, float("nan")) for x in shown[1:3])
    inputs = [x.requires_grad_() for x in shown if x is not None]
    names = [name for name, x in zip(NAMES, operands, strict=True) if x is not None]
    exact = [x for x in doubles if x is not None]
    if state is not None:
        inputs, names, exact = [*inputs, state.sums.requires_grad_()], [*names, "sums"], [*exact, exact_state.sums]
        exact_state.sums.requires_grad_()
    out, after = causal_landmark_attention(*shown, state=state, precision="ieee", boundaries=boundaries)
    want, sums, scales = one_by_one(doubles, exact_state, boundaries.tolist())
    # Sums relative to whatever maximum the kernels keep.
    sums = sums * torch.where(scales.isinf(), 0.0, scales - after.log_scale).exp().unsqueeze(-1)
    weights = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate((out, after.sums))
    ]
    weights[1] *= state is not None
    got = torch.autograd.grad((out, after.sums), inputs, weights)
    expected = torch.autograd.grad((want, sums), exact, [x.double() for x in weights], materialize_grads=True)
    largest = max(x.abs().max().item() for x in expected)
    errors = {"out": ((out - want).abs().max() / want.abs().max()).item()}
    errors["sums_after"] = ((after.sums - sums).abs().max() / sums.abs().max()).item()
    for name, x, y in zip(names, got, expected, strict=True):
        errors[name] = (x - y).abs().max().item() / max(y.abs().max().item(), 0.05 * largest)
    return errors


def steepest(case):
    """The steepest rise of each sequence."""
    from spectraformer.ops.triton.causal_plan import plan_forward

    lengths, *sizes = CASES[case]
    operands, state = packed_operands(lengths, *sizes)
    launches, saved = plan_forward(
        *operands, *state[:2], boundaries_of(lengths), needs_backward=True, precision="ieee"
    )  # fmt: skip
    for launch in launches:
        launch.run()
    first, rises = 0, []
    for i, (begin, end) in enumerate(pairwise(boundaries_of(lengths).tolist())):
        first = begin // 32 + 2 * i  # a row more than chunks for every sequence before
        rises.append(saved.steepest[:, first : first + -(-(end - begin) // 32) + 1].max().item())
    return [x for x in rises if x > -1e30]


def tiles():
    with small_tiles():
        return errors_of(*CASES["norms that grow"])


def outside():
    """Whether gradients of what all tokens share are the same without tokens that no sequence holds."""
    from spectraformer.ops.triton.causal import causal_landmark_attention

    operands, _ = packed_operands((20, 40, 30, 25), 1, 1, 16, 16, 24, {})
    gradients = []
    for first, last, ends in ((0, 115, [20, 60, 90]), (20, 90, [0, 40, 70])):
        tokens = [x[:, :, first:last] for x in operands[:3]]
        shared = [x.clone().requires_grad_() for x in (*operands[3:6], operands[7])]
        given = [*tokens, *shared[:3], operands[6][..., first:last], shared[3]]
        out, _ = causal_landmark_attention(*given, precision="ieee", boundaries=torch.tensor(ends))
        seen = out[:, :, ends[0] : ends[-1]]
        gradients.append([seen.detach(), *torch.autograd.grad(seen.sum(), shared)])
    first, second = gradients
    return [torch.equal(first[0], second[0])] + [
        bool((x - y).abs().max() <= 1e-5 * y.abs().max()) for x, y in zip(first[1:], second[1:], strict=True)
    ]


def compiled():
    import spectraformer as sf

    feature_map = sf.FeatureMap(16, 24, "posrf")
    ends = boundaries_of((10, 0, 40))

    def packed(*tokens):
        return sf.packed_random_feature_attention(*tokens, feature_map, ends, 40, is_causal=True)

    def batch(*tokens):
        return sf.random_feature_attention(*tokens, feature_map, is_causal=True)

    agree = {}
    for name, run, shape in (("packed", packed, (50, 2, 16)), ("batch", batch, (1, 2, 50, 16))):
        tokens = [torch.randn(shape, requires_grad=True) for _ in range(3)]
        outs = [f(*tokens) for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager"))]
        results = [(out, *torch.autograd.grad(out.square().sum(), tokens)) for out in outs]
        agree[name] = all(bool((x - y).abs().max() < 1e-5 * y.abs().max()) for x, y in zip(*results, strict=True))
    return agree


def twice():
    """What is said of a penalty on the gradient of a sum."""
    import spectraformer as sf

    said = []
    for component, is_causal in (("posrf", False), ("posrf", True), ("trigrf", False)):
        q, k, v = (torch.randn(1, 1, 20, 16, requires_grad=True) for _ in range(3))
        out = sf.random_feature_attention(q, k, v, sf.FeatureMap(16, 16, component), is_causal=is_causal)
        (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        try:
            (out.sum() + gradient.square().sum()).backward()
        except RuntimeError as error:
            said.append(str(error)[:29])
    return said


def wrong_boundaries():
    from spectraformer.ops.triton.causal import causal_landmark_attention

    guards = Guards()
    operands, _ = packed_operands((60,), 2, 1, 16, 16, 16, {})
    operands[:3] = (guards.guarded(x) for x in operands[:3])
    right = torch.tensor([0, 2, 50, 50, 60])
    results = []
    with new_buffers(guards.new):
        for wrong in ([-7, 2, 50, 50, 1 << 40], [50, 3, 90, -4, 20], [1 << 33, 0, 0, 0, 0]):
            inputs = [x.detach().requires_grad_() for x in operands]
            out, _ = causal_landmark_attention(*inputs, precision="ieee", boundaries=torch.tensor(wrong))
            torch.autograd.grad(out, inputs, torch.ones_like(out))
            results.append(out.detach())
    want, _ = causal_landmark_attention(*operands, precision="ieee", boundaries=right)
    error = ((results[0] - want).abs().max() / want.abs().max()).item()
    return {"guards": len(guards.kept), "touched": guards.touched(), "right": {"error": error}}


def in_the_library(name):
    lengths = (0, 1, 40, 33)
    ends = {"cu_seqlens": boundaries_of(lengths), "max_seqlen": 40}
    return next_to_float64(name, VARIANTS[name][0], [(sum(lengths), 2, 16)] * 3, **ends, is_causal=True)


def own_boundaries():
    import spectraformer as sf

    feature_map = sf.FeatureMap(16, 24, "posrf")
    ends = boundaries_of((10, 40))
    q, k, v = (torch.randn(50, 2, 16) for _ in range(3))
    run = sf.packed_random_feature_attention
    one = run(q, k, v, feature_map, ends, 40, is_causal=True)
    two = run(
        q, k, v, feature_map, ends, 40, cu_seqlens_key=ends.clone(), max_seqlen_key=40, is_causal=True
    )  # fmt: skip
    return ((one - two).abs().max() / two.abs().max()).item()


def fakes():
    from spectraformer.ops.triton import causal

    problems, ops = [], torch.ops.spectraformer
    for lengths, *sizes in (
        ((20, 3), 1, 3, 16, 16, 20, {"transposed": True}),
        ((5, 0, 9), 2, 2, 16, 16, 16, {"state": True}),
    ):
        operands, state = packed_operands(lengths, *sizes)
        arguments = (*operands, *((None, None) if state is None else state[:2]), boundaries_of(lengths))
        for needs_backward in (False, True):
            real = ops.causal_landmark_attention(*arguments, needs_backward, "ieee")
            problems += differences(real, causal._forward_shapes(*arguments, needs_backward, "ieee"))
        torch.library.opcheck(
            ops.causal_landmark_attention.default,
            (*arguments, True, "ieee"),
            test_utils=("test_schema", "test_faketensor"),
        )
        out, log_scale, _, *kept = real
        for wanted in ([True] * 5 + [state is not None], [False] * 6):
            given = (torch.randn_like(out), None, *arguments, out, log_scale, *kept, wanted, "ieee")
            backward = ops.causal_landmark_attention_backward(*given)
            problems += differences(backward, causal._backward_shapes(*given))
    return problems


def refusals():
    from spectraformer.ops.triton.causal import causal_landmark_attention

    operands, state = packed_operands((4, 5), 1, 1, 16, 16, 16, {"state": True})
    many = list(operands)
    many[3] = many[3].repeat(3, 1, 1, 1)
    said = []
    for given, boundaries, before in ((many, (4, 5), None), (operands, (4, 3, 2), state)):
        try:
            causal_landmark_attention(*given, state=before, boundaries=boundaries_of(boundaries))
        except ValueError as error:
            said.append(str(error))
    return said


def interpret():
    with new_buffers(poisoned):
        results = {"kernels": {name: errors_of(*case) for name, case in CASES.items()}, "tiles": tiles()}
        results["steepest"] = steepest("norms that grow")
        results["outside"] = outside()
    results |= {"wrong": wrong_boundaries(), "fakes": fakes(), "refused": refusals()}
    results |= {"compiled": compiled(), "twice": twice()}
    results["library"] = {name: in_the_library(name) for name in VARIANTS}
    results["own boundaries"] = own_boundaries()
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    {"interpret": interpret}[sys.argv[1]]()
