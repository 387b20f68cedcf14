"""The causal kernels on a GPU against float64: outputs, states, every gradient, steps, graphs, compilers."""

import pytest
import torch

from test_triton_causal import compare, operands_of, sums_like

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here"),
]

BFLOAT, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
# Dtype, then b, h, g, n, d, e, m, and what else is special. Each takes its own kernels, compiled in seconds.
CASES = {
    "plain": (BFLOAT, 2, 2, 1, 1500, 64, 64, 128, {}),
    "m 256, after a state, several query heads": (BFLOAT, 2, 2, 2, 1000, 64, 64, 256, {"state": True}),
    "d 128, m 256, the first keys removed": (BFLOAT, 1, 2, 1, 700, 128, 128, 256, {"removed": slice(0, 400)}),
    "d 32, no key bias": (BFLOAT, 2, 2, 1, 4097, 32, 32, 128, {"bias": False}),
    "d 256, m 300": (BFLOAT, 1, 1, 1, 300, 256, 256, 300, {}),
    "odd sizes": (BFLOAT, 2, 1, 3, 333, 40, 72, 100, {"transposed": True, "shared": False}),
    "m 1000": (BFLOAT, 1, 1, 1, 300, 32, 32, 1000, {}),
    "std 3": (BFLOAT, 2, 2, 1, 1500, 64, 64, 128, {"std": 3.0, "bias": False}),
    "norms that grow": (BFLOAT, 1, 2, 2, 700, 64, 64, 128, {"growth": 8.0, "curvature": 0.2, "state": True}),
    "norms that grow, d 128": (BFLOAT, 1, 1, 1, 700, 128, 128, 64, {"growth": 8.0, "curvature": 0.2}),
    "value dim above head dim": (BFLOAT, 1, 2, 1, 200, 32, 64, 64, {"state": True}),
    "value dim 16 beside head dim 96": (BFLOAT, 1, 2, 1, 300, 96, 16, 16, {}),
    "value dim 32 beside head dim 128": (BFLOAT, 1, 2, 1, 300, 128, 32, 64, {"state": True}),
    "value dim 16 beside head dim 256": (BFLOAT, 1, 1, 1, 200, 256, 16, 64, {}),
    "d 16, m 1000": (BFLOAT, 1, 1, 2, 300, 16, 16, 1000, {}),
    "d 16, m 64": (BFLOAT, 2, 2, 1, 500, 16, 16, 64, {}),
    "float16, d 16": (HALF, 2, 2, 1, 500, 16, 16, 64, {}),
    "float16": (HALF, 2, 2, 1, 700, 64, 64, 128, {"std": 2.0}),
    "float16, odd sizes": (HALF, 1, 1, 2, 100, 32, 64, 70, {"state": True}),
    "float32": (FLOAT, 2, 2, 1, 700, 64, 64, 128, {}),
    "float32, odd sizes": (FLOAT, 2, 1, 3, 333, 40, 72, 100, {"transposed": True, "shared": False, "state": True}),
    "float32, d 128": (FLOAT, 1, 1, 1, 200, 128, 128, 64, {"removed": slice(0, 20)}),
    "float32, norms that grow": (FLOAT, 1, 2, 1, 700, 16, 16, 24, {"growth": 11.0, "curvature": 0.2}),
}
# Of the output and the state, and of gradients, in norm.
BOUNDS = {BFLOAT: (4e-3, 1.5e-2), HALF: (4e-3, 1.5e-2), FLOAT: (1e-5, 1e-4)}


def wrong(dtype, errors):
    """Errors beyond their bounds."""
    bounds = dict.fromkeys(("out", "sums_after"), BOUNDS[dtype][0]) | {"log_scale": 1e-3, "dense": 0.0}
    return {name: e for name, e in errors.items() if not e <= bounds.get(name, BOUNDS[dtype][1])}


@pytest.mark.parametrize("case", CASES)
def test_outputs_states_and_gradients_agree_with_float64_and_are_the_same_bits_again(case):
    dtype, *case = CASES[case]
    torch.manual_seed(0)
    errors, results = compare(case, "cuda", dtype, 2)
    assert wrong(dtype, errors) == {}
    torch.manual_seed(0)
    assert all(map(torch.equal, _flat(results), _flat(compare(case, "cuda", dtype, 2)[1])))


def test_any_length():
    # After a state: of a single token without one most gradients are 0, and only rounding would be compared.
    for n in (1, 2, 63, 64, 65, 129, 1000, 4097):
        errors, _ = compare((1, 2, 1, n, 64, 64, 128, {"state": n % 2 == 1}), "cuda", BFLOAT, 2)
        assert wrong(BFLOAT, errors) == {}, n


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
    sums = sums_like(after, stepped)
    assert ((stepped.sums - sums).norm() / sums.norm()).item() < 6e-3
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
