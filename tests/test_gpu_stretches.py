"""The causal forward by stretches on a GPU against float64, by states of chunks, and in graphs."""

import pytest
import torch

from offline_kernels import new_buffers, poisoned
from spectraformer.ops.triton import causal_configurations, causal_plan
from spectraformer.ops.triton.causal import causal_landmark_attention
from spectraformer.ops.triton.launch import PLANS
from test_gpu_causal import wrong
from test_triton_causal import compare, exact_attention, operands_of, sums_like

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here"),
]
BFLOAT, HALF = torch.bfloat16, torch.float16
CASES = {  # dtype, then b, h, g, n, d, e, m, and what else is special
    "plain": (BFLOAT, 2, 2, 1, 5000, 64, 64, 128, {}),
    "even, without a bias": (BFLOAT, 2, 2, 1, 4096, 64, 64, 128, {"bias": False}),
    "d 32": (BFLOAT, 2, 2, 1, 2048, 32, 32, 128, {"bias": False}),
    "d 16, m 16": (BFLOAT, 1, 2, 1, 1000, 16, 16, 16, {}),
    "m 64, after a state, several query heads": (BFLOAT, 2, 2, 3, 1000, 64, 64, 64, {"state": True}),
    "odd sizes, transposed": (BFLOAT, 2, 1, 3, 1333, 40, 56, 100, {"transposed": True, "shared": False}),
    "the first keys removed": (BFLOAT, 1, 2, 1, 1700, 64, 64, 128, {"removed": slice(0, 700)}),
    "narrow values": (BFLOAT, 1, 2, 1, 700, 64, 16, 128, {}),
    "std 3": (BFLOAT, 2, 2, 1, 1500, 64, 64, 128, {"std": 3.0, "bias": False}),
    "norms that grow": (BFLOAT, 1, 2, 2, 700, 64, 64, 128, {"growth": 8.0, "curvature": 0.2, "state": True}),
    "m 256, after a state, several query heads": (BFLOAT, 2, 2, 2, 1000, 64, 64, 256, {"state": True}),
    "m 256, d 32, even": (BFLOAT, 1, 2, 1, 1024, 32, 32, 256, {"bias": False}),
    "d 128, m 256, the first keys removed": (BFLOAT, 1, 2, 1, 700, 128, 128, 256, {"removed": slice(0, 400)}),
    "d 128, m 256, even": (BFLOAT, 1, 2, 1, 1024, 128, 128, 256, {"bias": False}),
    "odd sizes, d 72, m 200": (BFLOAT, 2, 1, 3, 333, 72, 40, 200, {"transposed": True, "shared": False}),
    "norms that grow, d 128": (BFLOAT, 1, 1, 1, 700, 128, 128, 64, {"growth": 8.0, "curvature": 0.2}),
    "float16, d 128, m 200": (HALF, 1, 2, 1, 500, 128, 64, 200, {}),
    "float16": (HALF, 2, 2, 1, 1500, 64, 64, 128, {"std": 2.0}),
    "float16, few tokens": (HALF, 1, 1, 2, 30, 32, 64, 70, {"state": True}),
}


@pytest.fixture(autouse=True)
def _few_programs_suffice(monkeypatch):
    monkeypatch.setattr(causal_configurations, "LEAST_PROGRAMS", 1)
    PLANS.clear()
    yield
    PLANS.clear()


def kernels():
    return {x.kernel.__name__ for plan in PLANS.values() for x in plan.launches}


@pytest.mark.parametrize("case", CASES)
def test_outputs_states_and_gradients_agree_with_float64_and_are_the_same_bits_again(case):
    dtype, *case = CASES[case]
    results = []
    for made in (poisoned, lambda x: x):
        torch.manual_seed(0)
        with new_buffers(lambda x, made=made: made(x) if x.is_cuda else x):
            errors, (out, after, *gradients) = compare(case, "cuda", dtype, 2)
        assert wrong(dtype, errors) == {}
        results.append([out, *after[:2], *gradients])
    assert all(map(torch.equal, *results))
    assert {"stretch_kernel", "careful_stretch_kernel"} <= kernels() and "chunk_output_kernel" not in kernels()


def size(x):
    return torch.linalg.vector_norm(x.double()).item()


@pytest.mark.parametrize("n", [1, 64, 65, 129, 1000, 4097])
def test_any_length_without_a_backward_as_by_states_of_chunks(n, monkeypatch):
    operands, _ = operands_of(2, 2, 1, n, 64, 64, 128, {"bias": n % 2 == 1}, device="cuda", dtype=BFLOAT)
    want, after = exact_attention([None if x is None else x.double() for x in operands], None)
    boundaries = torch.tensor([0, n], device="cuda") if n == 1 else None  # of one token is a step otherwise
    if n == 1:
        operands = [None if x is None else x[:1] for x in operands]
        want, after = want[:1], after._replace(log_scale=after.log_scale[:1], sums=after.sums[:1])
    outs = []
    for shipped in (True, False):
        if not shipped:
            monkeypatch.setattr(causal_plan, "choose_stretches", lambda *_: None)
        PLANS.clear()
        out, found = causal_landmark_attention(*operands, boundaries=boundaries)
        assert ("stretch_kernel" in kernels()) == (shipped and boundaries is None)
        assert size(out - want) / size(want) < 4e-3
        assert size(sums_like(found, after) - after.sums) / size(after.sums) < 4e-3
        outs.append(out)
    assert size(outs[0] - outs[1]) / size(want) < 6e-3


def test_a_graph_replays_them_and_pieces_continue_the_whole():
    operands, _ = operands_of(2, 2, 1, 3000, 64, 64, 128, {"bias": False}, device="cuda", dtype=BFLOAT)
    whole, after = causal_landmark_attention(*operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = causal_landmark_attention(*operands)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, whole)
    state, outs = None, []
    for first, last in ((0, 700), (700, 701), (701, 3000)):
        out, state = causal_landmark_attention(*[x[:, :, first:last] for x in operands[:3]], *operands[3:], state=state)
        outs.append(out)
    assert size(torch.cat(outs, 2) - whole) / size(whole) < 5e-3
    sums = sums_like(after, state)
    assert size(state.sums - sums) / size(sums) < 5e-3


def test_no_bit_of_an_output_depends_on_later_tokens():
    operands, _ = operands_of(1, 2, 1, 1500, 64, 64, 128, {"bias": False}, device="cuda", dtype=BFLOAT)
    whole, _ = causal_landmark_attention(*operands)
    for first in (1, 450, 1300):
        changed = [torch.cat([x[:, :, :first], 2 * x[:, :, first:].flip(2)], 2) for x in operands[:3]]
        out, _ = causal_landmark_attention(*changed, *operands[3:])
        assert torch.equal(out[:, :, :first], whole[:, :, :first]) and not torch.equal(out, whole)
