"""The causal forward by stretches on a GPU against float64, by states of chunks, and in graphs."""

import pytest
import torch

from spectraformer.ops.triton import causal_plan
from spectraformer.ops.triton.causal import causal_landmark_attention
from spectraformer.ops.triton.launch import PLANS
from test_triton_causal import exact_attention, moved, operands_of

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
    "float16": (HALF, 2, 2, 1, 1500, 64, 64, 128, {"std": 2.0}),
    "float16, few tokens": (HALF, 1, 1, 2, 30, 32, 64, 70, {"state": True}),
}


def size(x):
    return torch.linalg.vector_norm(x.double()).item()


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_states_agree_with_float64_and_with_states_of_chunks(case, monkeypatch):
    dtype, *case = CASES[case]
    operands, state = operands_of(*case, device="cuda", dtype=dtype)
    exact = [None if x is None else x.double() for x in operands]
    want, after = exact_attention(exact, moved(state, torch.float64))
    if "removed" in case[-1]:  # what a removed key and its value hold must not matter
        gone = (operands[6] == float("-inf")).unsqueeze(-1)
        operands[1:3] = (x.masked_fill(gone, float("nan")) for x in operands[1:3])
    results = []
    for shipped in (True, True, False):
        if not shipped:
            monkeypatch.setattr(causal_plan, "choose_stretches", lambda *_: None)
        PLANS.clear()
        out, found = causal_landmark_attention(*operands, state=state)
        (plan,) = PLANS.values()
        assert (plan.launches[-1].kernel.__name__ == "steep_stretch_kernel") == shipped
        results.append((out, *found[:2]))
        fade = torch.where(after.log_scale.isinf(), 0.0, after.log_scale - found.log_scale).exp().unsqueeze(-1)
        assert size(out - want) / size(want) < 4e-3
        assert size(found.sums - fade * after.sums) / size(fade * after.sums) < 4e-3
    assert all(map(torch.equal, *results[:2]))
    assert size(results[0][0] - results[2][0]) / size(want) < 6e-3


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
    fade = (after.log_scale - state.log_scale).exp().unsqueeze(-1)
    assert size(state.sums - fade * after.sums) / size(after.sums * fade) < 5e-3


def test_no_bit_of_an_output_depends_on_later_tokens():
    operands, _ = operands_of(1, 2, 1, 1500, 64, 64, 128, {"bias": False}, device="cuda", dtype=BFLOAT)
    whole, _ = causal_landmark_attention(*operands)
    for first in (1, 450, 1300):
        changed = [torch.cat([x[:, :, :first], 2 * x[:, :, first:].flip(2)], 2) for x in operands[:3]]
        out, _ = causal_landmark_attention(*changed, *operands[3:])
        assert torch.equal(out[:, :, :first], whole[:, :, :first]) and not torch.equal(out, whole)
