"""The causal forward by stretches, in Triton's interpreter against float64, and compiled for a GPU without one.

As in the tests of attention kernels, this file is both the tests and the programs they run.
"""

import itertools
import json
import sys
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

from offline_kernels import SHARED_MEMORY, assemble, new_buffers, poisoned, run_program
from test_triton_causal import compare, compare_operands, fakes, operands_of

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

# b, h, g, n, d, e, m, and what else is special; tiles are of 16 tokens, stretches of 16, 32 and
# then 48, blocks of 32 landmarks, or of 16 where there are 24
CASES = {
    "four stretches": (1, 2, 1, 144, 16, 16, 64, {}),
    "a third short stretch": (1, 1, 1, 400, 16, 16, 16, {"span": 320}),
    "odd sizes, transposed": (1, 1, 2, 77, 20, 40, 70, {"transposed": True}),
    "without a bias, even": (1, 2, 1, 96, 16, 16, 32, {"bias": False}),
    "without a bias, uneven": (1, 1, 1, 75, 16, 32, 24, {"bias": False}),
    "after a state, landmarks of every item": (2, 1, 3, 100, 16, 16, 32, {"state": True, "shared": False}),
    "the first keys removed": (1, 2, 1, 140, 16, 16, 16, {"removed": slice(0, 70)}),
    "a head without keys": (1, 2, 1, 40, 16, 16, 16, {"removed": slice(None)}),
    "one stretch": (1, 1, 1, 12, 16, 16, 24, {"std": 3.0}),
    "norms that grow": (1, 1, 2, 144, 16, 16, 24, {"growth": 30.0, "curvature": 0.2}),
    "norms that grow after a state": (1, 1, 1, 75, 16, 24, 24, {"growth": 11.0, "curvature": 0.2, "state": True}),
}
# Of these also with tiles of 32 tokens in the backward.
WIDER = ("odd sizes, transposed", "the first keys removed", "norms that grow", "after a state, landmarks of every item")
# Logits of landmarks of the first block that keys and queries see, bias of the others, values, first keys removed
FAR_APART = {
    "the first block is next to nothing": (0.0, -94.0, 0.0, 1.0, 0),
    "the first block overflows": (0.0, 84.0, 30.0, 8.0, 0),
    "keys and queries far below": (-53.0, -43.0, 0.0, 1.0, 36),
}
# Of the output, the state and gradients; logits in the hundreds, in float32, make sums as good as their exponentials.
BOUND, STEEP_BOUND = 2e-5, 5e-4
MAX_SPILLS_BACKWARD = {True: 320, False: 1100}
MAX_SPILLS = {(64, 128): 260, (32, 128): 40, (64, 64): 8}  # bytes


@pytest.fixture(scope="module")
def interpreted():
    return run_program(__file__, "interpret", interpret=True)


@pytest.mark.parametrize("case", CASES)
def test_outputs_states_and_gradients_agree_with_float64(interpreted, case):
    found = interpreted["cases"][case]
    bound = STEEP_BOUND if "grow" in case or "std" in CASES[case][-1] else BOUND
    assert {name: e for name, e in found["errors"].items() if not e < bound} == {}
    assert set(found["kernels"]) >= {"stretch_kernel", "careful_stretch_kernel", "stretch_key_backward_kernel"}
    assert "chunk_output_kernel" not in found["kernels"]


@pytest.mark.parametrize("case", WIDER)
def test_tiles_of_the_backward_may_be_wider(interpreted, case):
    found = interpreted["wider"][case]
    bound = STEEP_BOUND if "grow" in case else BOUND
    assert {name: e for name, e in found["errors"].items() if not e < bound} == {}


def test_stretches_that_leave_the_range_are_noticed(interpreted):
    """In these cases the sums of some tile are out of range; in the others none but those without any key."""
    careful = {name for name, found in interpreted["cases"].items() if found["beyond"]}
    assert careful == {
        "norms that grow",
        "norms that grow after a state",
        "the first keys removed",
        "a head without keys",
    }


@pytest.mark.parametrize("case", [*FAR_APART, "the first key is late"])
def test_landmarks_whose_references_are_far_apart_agree_with_float64(interpreted, case):
    """Sums over one block of landmarks leave the range, those over all do not; or nothing is yet to be relative to."""
    assert interpreted["far apart"][case] < BOUND


@pytest.mark.parametrize("case", ("among the first keys", "before the first key", "a block of landmarks removed"))
def test_no_gradient_is_lost_to_what_overflows_on_the_way(interpreted, case):
    """A weight of infinity times a sum of 0; and references of a block in which no landmark is left."""
    assert {name: e for name, e in interpreted["overflow"][case].items() if not e < STEEP_BOUND} == {}


def test_blocks_of_landmarks_of_the_backward_may_be_fewer_at_once(interpreted):
    assert {name: e for name, e in interpreted["narrower"]["errors"].items() if not e < STEEP_BOUND} == {}
    assert interpreted["narrower"]["beyond"]


def test_a_nan_in_a_bias_of_landmarks_shows(interpreted):
    assert interpreted["not finite"] == 1.0


def test_tiles_without_any_key_are_not_computed_again(interpreted):
    """Three stretches of padding, then one tile where keys begin: only queries of that tile are done again."""
    assert interpreted["computed again"] == [4]


def test_no_bit_of_an_output_depends_on_later_tokens(interpreted):
    """Nor where tiles are computed again, if what changes begins with a tile."""
    for name, found in interpreted["causality"].items():
        assert found["earlier equal"] == [True] * 5 and found["later equal"] == [False] * 5, name
    assert [found["beyond"] for found in interpreted["causality"].values()] == [False, True, True]


def test_fakes_have_the_shapes_and_strides_of_results_which_share_no_memory(interpreted):
    assert interpreted["fakes"] == [] and interpreted["distinct"]


def test_stretches_cover_the_sequence_and_fill_the_gpu():
    from spectraformer.ops.triton.causal_configurations import (
        LEAST_PROGRAMS,
        MOST_STRETCHES,
        choose_stretches,
        cut_stretches,
    )

    chosen = choose_stretches(torch.bfloat16, 64, 128)
    assert cut_stretches(65536, 64, chosen) == (6, 16384, 1024, 64)
    assert cut_stretches(2048, 64, chosen, 128) == (5, 512, 512, 128)
    assert cut_stretches(65536, 1, chosen) is None
    for n, heads in itertools.product((1, 63, 64, 65, 256, 1000, 4097, 1 << 20), (1, 16, 64, 100, 5000)):
        early = 128 if heads % 2 else None
        found = cut_stretches(n, heads, chosen, early)
        if found is None:
            assert heads * min(MOST_STRETCHES, -(-n // 512)) < LEAST_PROGRAMS
            continue
        bounds = [_bounds(i, found, n, early or chosen.tokens) for i in range(found.number)]
        assert bounds[0][0] == 0 and bounds[-1][1] == n and all(first < last for first, last in bounds)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds)) and found.span % 512 == 0
    for dtype, d, m in ((torch.float32, 64, 128), (torch.bfloat16, 256, 128), (torch.bfloat16, 64, 512)):
        assert choose_stretches(dtype, d, m) is None


def _bounds(piece, found, n, tile):
    """As tiles.piece_bounds says it in words."""
    ends = [0, tile, found.middle, *([found.span] if found.middle < found.span else [])]
    while len(ends) < found.number + 1:
        ends.append(ends[-1] + found.span)
    return ends[piece], min(ends[piece + 1], n)


def test_little_is_kept_for_a_backward():
    """A log-sum-exp a query and a state a stretch: less than a tenth of the queries."""
    from spectraformer.ops.triton.causal_plan import plan_forward

    query, key, value = (torch.empty(8, 8, 65536, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
    landmarks, bias = torch.empty(1, 8, 128, 64, device="meta"), torch.empty(1, 8, 128, device="meta")
    operands = (query, key, value, landmarks, landmarks, bias, None, None, None, None)
    _, found = plan_forward(*operands, needs_backward=True, precision="tf32x3")
    assert sum(x.numel() * x.element_size() for x in found[3:]) < query.numel() * 2 / 10


@pytest.mark.slow
def test_kernels_compile_for_hopper_onto_tensor_cores_and_mostly_into_registers():
    for shape, plain, found in run_program(__file__, "compile", interpret=False):
        for x in found:
            assert x["shared"] <= SHARED_MEMORY, x
            if x["kernel"] == "stretch_kernel":
                # Two programs share a multiprocessor.
                assert x["matrix"] > 0 and x["serialized"] == [] and 2 * x["shared"] + 1024 <= SHARED_MEMORY, x
                assert x["spills"] <= MAX_SPILLS.get(tuple(shape), 1500), x
            if x["kernel"].startswith("stretch_") and "backward" in x["kernel"]:
                assert x["matrix"] > 0 and x["spills"] <= MAX_SPILLS_BACKWARD[plain], x
                assert x["serialized"] == [] or not plain, x


def choose_small(dtype, head_dim, landmarks):
    from spectraformer.ops.triton.configurations import Configuration

    return Configuration(16 if landmarks == 24 else 32, 16, 4, 1, programs=100)


def choose_same(_, forward, *__):
    return forward


def choose_wider(name, forward, *_):
    return forward._replace(tokens=32) if name in ("queries", "keys") else forward


def choose_narrower(name, forward, *_):
    return forward._replace(landmarks=16)


@contextmanager
def backward_chosen_by(choose):
    from spectraformer.ops.triton import causal_plan, causal_stretch_backward_plan

    plans = (causal_plan, causal_stretch_backward_plan)
    shipped = causal_plan.choose_stretches_backward
    for plan in plans:
        plan.choose_stretches_backward = choose
    yield
    for plan in plans:
        plan.choose_stretches_backward = shipped


def with_wider_tiles():
    """Errors where two passes of the backward have tiles twice as wide as the forward's, as their stretches are cut."""
    with backward_chosen_by(choose_wider):
        return {name: errors_of(CASES[name], 64) for name in WIDER}


def with_narrower_blocks():
    """Errors where the backward takes half as many landmarks together, and some stretch leaves the range."""
    with backward_chosen_by(choose_narrower):
        return errors_of((1, 2, 1, 144, 16, 16, 40, {"growth": 30.0, "curvature": 0.2}))


def of_overflow():
    """Errors of output and gradients with one query far above the first keys, and with a block of landmarks removed."""
    found = {}
    for name, removed, off in (
        ("among the first keys", 0, 0),
        ("before the first key", 40, 0),
        ("a block of landmarks removed", 0, 32),
    ):
        operands, _ = operands_of(1, 1, 1, 64, 16, 16, 64, {})
        query, u = operands[0].clone(), operands[3]
        if not off:
            query[0, 0, 5] = 200 * u[0, 0, 0] / u[0, 0, 0].square().sum()
        landmark_bias, key_bias = operands[5].clone(), torch.zeros(1, 1, 64)
        landmark_bias[..., :off], key_bias[..., :removed] = float("-inf"), float("-inf")
        operands = [query, *operands[1:5], landmark_bias, key_bias, operands[7]]
        found[name], _ = compare_operands(operands, least=0.0)
    return found


def errors_of(case, span=48):
    from spectraformer.ops.triton import causal_configurations, launch

    launch.PLANS.clear()
    causal_configurations.LEAST_STRETCH = case[-1].get("span", span)
    errors, _ = compare(case)
    kernels = [x.kernel.__name__ for plan in launch.PLANS.values() for x in plan.launches]
    operands, state = operands_of(*case)
    state = (None, None) if state is None else state[:2]
    return {"errors": errors, "kernels": kernels, "beyond": beyond(operands, state)}


def beyond(operands, state=(None, None)):
    """Whether sums of some tile leave the range."""
    from spectraformer.ops.triton.causal_plan import plan_forward

    launches, _ = plan_forward(*operands, *state, needs_backward=False, precision="ieee")
    for x in launches:
        x.run()
    mass, total = (launches[-1].arguments[name] for name in ("query_mass", "peak_total"))
    return not ((mass > 2.0**-40).all() and (mass < 2.0**100).all() and (total <= 2.0**64).all())


def far_apart(key_logit, query_logit, bias, values, removed):
    """Error where all keys, and all queries, have one logit at the first 32 landmarks and others at the rest."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    n, m, d = 64, 64, 16
    query, key, value = torch.zeros(1, 1, n, d), 0.1 * normal(1, 1, n, d), values * normal(1, 1, n, d)
    query[..., 0] = key[..., 1] = 1.0
    u, w, landmark_bias = torch.zeros(1, 1, m, d), 0.1 * normal(1, 1, m, d), torch.zeros(1, 1, m)
    u[:, :, :32, 0], u[:, :, 32:, 0] = query_logit, query_logit - bias if bias else 0.0
    w[:, :, :32, 1], w[:, :, 32:, 1] = key_logit, 0.0
    landmark_bias[..., 32:] = bias
    key_bias = torch.zeros(1, 1, n)
    key_bias[..., :removed] = float("-inf")
    return compare_operands([query, key, value, u, w, landmark_bias, key_bias if removed else None, None])[0]["out"]


def late_first_key():
    """Error where one landmark has logits of -107 at keys and 87 at queries, and no key is in the first tile."""
    generator = torch.Generator().manual_seed(0)
    n, m, d = 64, 16, 16
    key = 0.01 * torch.randn(1, 1, n, d, generator=generator)
    query, value = torch.zeros(1, 1, n, d), torch.randn(1, 1, n, d, generator=generator)
    u, w = (0.01 * torch.randn(1, 1, m, d, generator=generator) for _ in range(2))
    query[..., 1] = 1.0
    key[..., 0], key[..., 2] = 1.0, torch.linspace(-1, 1, n)
    w[0, 0, 0, 0], w[0, 0, 0, 2], u[0, 0, 0, 1], u[0, 0, 1:, 1] = -107.0, 3.0, 87.0, -20.0
    key_bias = torch.zeros(1, 1, n)
    key_bias[..., :36] = float("-inf")
    return compare_operands([query, key, value, u, w, torch.zeros(1, 1, m), key_bias, None])[0]["out"]


def of_unknown_bias():
    """Share of outputs that are not finite where the bias of one landmark is NaN."""
    from spectraformer.ops.triton.causal import causal_landmark_attention

    operands, _ = operands_of(1, 1, 1, 100, 16, 16, 64, {})
    operands[5] = operands[5].clone()
    operands[5][..., 3] = float("nan")
    out, _ = causal_landmark_attention(*operands, precision="ieee")
    return 1.0 - out.isfinite().float().mean().item()


def distinct():
    """Whether results without a backward are tensors of their own, empty ones too, as operators must return them."""
    from spectraformer.ops.triton.causal_plan import plan_forward

    operands, _ = operands_of(1, 1, 1, 20, 16, 16, 16, {})
    _, found = plan_forward(*operands, None, None, needs_backward=False, precision="ieee")
    return len(set(map(id, found))) == len(found)


def computed_again():
    """Tiles whose outputs the careful kernel writes, where the first keys are removed."""
    from spectraformer.ops.triton.causal_plan import plan_forward

    operands, _ = operands_of(1, 1, 1, 144, 16, 16, 16, {"removed": slice(0, 70)})
    launches, found = plan_forward(*operands, None, None, needs_backward=False, precision="ieee")
    for x in launches:
        x.run()
    kept = found.out.clone()
    found.out.fill_(float("nan"))
    launches[-1].run()
    again = (~found.out.isnan()).any(-1).flatten().view(-1, 16).any(-1).nonzero().flatten().tolist()
    assert torch.equal(found.out[~found.out.isnan()], kept[~found.out.isnan()])
    return again


def causality(special, firsts):
    from spectraformer.ops.triton.causal import causal_landmark_attention

    case = (1, 1, 1, 150, 16, 16, 24, special)
    operands, other = operands_of(*case)[0], operands_of(*case, seed=1)[0]
    whole, _ = causal_landmark_attention(*operands, precision="ieee")
    earlier, later = [], []
    for first in firsts:
        changed = list(operands)
        for i in (0, 1, 2):
            changed[i] = torch.cat([operands[i][:, :, :first], 3 * other[i][:, :, first:]], 2)
        out, _ = causal_landmark_attention(*changed, precision="ieee")
        earlier.append(out[:, :, :first].equal(whole[:, :, :first]))
        later.append(out[:, :, first:].equal(whole[:, :, first:]))
    return {"earlier equal": earlier, "later equal": later, "beyond": beyond(operands)}


def interpret():
    from spectraformer.ops.triton import causal_configurations, causal_plan, causal_stretch_backward_plan
    from spectraformer.ops.triton.configurations import THIRTY_TWO_BIT

    causal_plan.choose_stretches = choose_small
    causal_plan.choose_stretches_backward = causal_stretch_backward_plan.choose_stretches_backward = choose_same
    causal_configurations.LEAST_PROGRAMS = 1
    causal_configurations.LEAST_STRETCH = 48
    for row in THIRTY_TWO_BIT.values():
        row["keys"] = row["keys"]._replace(tokens=16)
    with new_buffers(poisoned):
        found = {name: errors_of(case) for name, case in CASES.items()}
        causal_configurations.LEAST_STRETCH = 48
        results = {
            "cases": found,
            "wider": with_wider_tiles(),
            "narrower": with_narrower_blocks(),
            "overflow": of_overflow(),
            "fakes": fakes(),
            "distinct": distinct(),
            "far apart": {name: far_apart(*case) for name, case in FAR_APART.items()}
            | {"the first key is late": late_first_key()},
            "not finite": of_unknown_bias(),
            "computed again": computed_again(),
            "causality": {
                "plain": causality({}, (1, 15, 45, 127, 130)),
                "growth 11": causality({"growth": 11.0, "curvature": 0.2}, (16, 32, 48, 80, 128)),
                "growth 30": causality({"growth": 30.0, "curvature": 0.2}, (16, 32, 48, 80, 128)),
            },
        }
        sys.stdout.write(json.dumps(results))


def compile_all():
    from spectraformer.ops.triton import tiles
    from spectraformer.ops.triton.causal_backward import Wanted, plan_backward
    from spectraformer.ops.triton.causal_plan import plan_forward
    from spectraformer.ops.triton.causal_tiles import SIZES

    def meta(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    found = []
    for d, m, n, g, bias, needs_backward, dtype in (
        *((d, m, 8192, 1, None, False, torch.bfloat16) for d, m in MAX_SPILLS),
        (64, 128, 8192, 1, None, True, torch.bfloat16),
        (40, 100, 8000, 2, meta(8, 8, 8000), True, torch.float16),
    ):
        query, key, value = (meta(8, h, n, d, dtype=dtype) for h in (8 * g, 8, 8))
        operands = (query, key, value, meta(1, 8, m, d), meta(1, 8, m, d), meta(1, 8, m), bias, meta(1, 8, d))
        state = (meta(8, 8, m), meta(8, 8, m, d + 1)) if bias is not None else (None, None)
        launches, kept = plan_forward(*operands, *state, needs_backward=needs_backward, precision="tf32x3")
        if needs_backward:
            after = None if bias is None else meta(8, 8, m, d + 1)
            launches += plan_backward(
                kept.out, after, *operands, *state, None, kept.out, kept.log_scale, *kept[3:],
                wanted=Wanted(*[bias is not None] * 6), precision="tf32x3",
            )[0]  # fmt: skip
        shape = (d, m) if not needs_backward else ()
        found.append((shape, bias is None, [assemble(x, (*SIZES, *tiles.SIZES)) for x in launches]))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]]()
