"""The causal kernels on a GPU against float64: outputs, states, every gradient, steps, graphs, compilers."""

import pytest
import torch

from test_triton_causal import compare, operands_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here"),
]

SIZES = (2, 2, 1, 1500, 64, 64, 128)
CASES = {
    "plain": (*SIZES, {}),
    "d 64, m 256": (1, 2, 1, 700, 64, 64, 256, {}),
    "d 128, m 256": (1, 2, 1, 700, 128, 128, 256, {}),
    "d 32": (2, 2, 1, 700, 32, 32, 128, {"bias": False}),
    "d 256": (1, 1, 1, 300, 256, 256, 128, {}),
    "odd sizes": (2, 1, 3, 333, 40, 72, 100, {"transposed": True, "shared": False}),
    "m 1000": (1, 1, 1, 300, 16, 16, 1000, {}),
    "after a state": (2, 2, 2, 700, 64, 64, 128, {"state": True}),
    "the first keys removed": (*SIZES, {"removed": slice(0, 800)}),
    "std 3": (*SIZES, {"std": 3.0}),
    "norms that grow": (1, 2, 1, 700, 64, 64, 128, {"growth": 8.0, "curvature": 0.2}),
    "one token": (2, 2, 2, 1, 64, 64, 128, {"state": True}),
}
# Of the output and the state, and of gradients, in norm.
BOUNDS = {torch.bfloat16: (4e-3, 1.5e-2), torch.float16: (4e-3, 1.5e-2), torch.float32: (1e-5, 1e-4)}


PAIRS = [(torch.bfloat16, case) for case in CASES] + [(torch.float16, "plain"), (torch.float16, "std 3")]
PAIRS += [(torch.float32, case) for case in ("plain", "odd sizes", "after a state", "norms that grow")]


@pytest.mark.parametrize(("dtype", "case"), PAIRS, ids=str)
def test_outputs_states_and_gradients_agree_with_float64_and_are_the_same_bits_again(dtype, case):
    errors, results = compare(CASES[case], "cuda", dtype, 2)
    bounds = dict.fromkeys(("out", "sums_after"), BOUNDS[dtype][0]) | {"log_scale": 1e-3, "dense": 0.0}
    assert {name: e for name, e in errors.items() if not e <= bounds.get(name, BOUNDS[dtype][1])} == {}
    torch.manual_seed(0)
    assert all(map(torch.equal, _flat(results), _flat(compare(CASES[case], "cuda", dtype, 2)[1])))


def _flat(results):
    return [x for result in results for x in ([result] if isinstance(result, torch.Tensor) else result[:2])]


def test_steps_continue_the_whole_and_graphs_and_compilers_take_it():
    from spectraformer.ops.triton.causal import causal_landmark_attention, decode_step

    operands, _ = operands_of(2, 2, 2, 600, 64, 64, 128, {}, device="cuda", dtype=torch.bfloat16)

    def part(where):
        return [None if x is None else x[..., where, :] if i < 3 else x[..., where] if i == 6 else x
                for i, x in enumerate(operands)]  # fmt: skip

    whole, after = causal_landmark_attention(*operands)
    _, state = causal_landmark_attention(*part(slice(0, 599)))
    last, stepped = decode_step(*part(slice(599, 600)), state=state)
    assert ((last - whole[:, :, -1:]).norm() / last.norm()).item() < 6e-3
    assert ((stepped.sums - after.sums).norm() / after.sums.norm()).item() < 6e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = causal_landmark_attention(*operands)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, whole)
    operands[0].requires_grad_()
    run = torch.compile(lambda *x: causal_landmark_attention(*x)[0], fullgraph=True)
    out = run(*operands)
    out.sum().backward()
    assert torch.equal(out, whole) and operands[0].grad.isfinite().all()
