"""The causal forward by stretches, in Triton's interpreter against float64, and compiled for a GPU without one.

As in the tests of attention kernels, this file is both the tests and the programs they run.
"""

import itertools
import json
import sys
from importlib.util import find_spec

import pytest
import torch

from offline_kernels import SHARED_MEMORY, assemble, run_program
from test_triton_causal import exact_attention, moved, operands_of

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

# b, h, g, n, d, e, m, and what else is special; chunks are of 16 tokens, stretches of 48
CASES = {
    "several stretches": (1, 2, 1, 144, 16, 16, 64, {}),
    "odd sizes, transposed": (1, 1, 2, 77, 20, 40, 70, {"transposed": True}),
    "without a bias, even": (1, 2, 1, 96, 16, 16, 32, {"bias": False}),
    "without a bias, uneven": (1, 1, 1, 75, 16, 32, 24, {"bias": False}),
    "after a state, landmarks of every item": (2, 1, 3, 100, 16, 16, 32, {"state": True, "shared": False}),
    "the first keys removed": (1, 2, 1, 140, 16, 16, 16, {"removed": slice(0, 70)}),
    "a head without keys": (1, 2, 1, 40, 16, 16, 16, {"removed": slice(None)}),
    "one stretch": (1, 1, 1, 20, 16, 16, 24, {"std": 3.0}),
    "norms that grow": (1, 1, 2, 144, 16, 16, 24, {"growth": 30.0, "curvature": 0.2}),
    "norms that grow after a state": (1, 1, 1, 75, 16, 24, 24, {"growth": 11.0, "curvature": 0.2, "state": True}),
}
MAX_SPILLS = 64  # bytes


@pytest.fixture(scope="module")
def interpreted():
    return run_program(__file__, "interpret", interpret=True)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_states_agree_with_float64(interpreted, case):
    found = interpreted["cases"][case]
    # Logits in the hundreds, in float32, make a state as good as their exponentials are.
    bounds = {"out": 2e-5, "sums": 2e-4 if "norms that grow" in case else 2e-5}
    assert {name: e for name, e in found["errors"].items() if not e < bounds[name]} == {}
    assert found["steep"] == ("norms that grow" in case)


def test_no_bit_of_an_output_depends_on_later_tokens(interpreted):
    assert interpreted["earlier equal"] == [True] * 4 and interpreted["later equal"] == [False] * 4


def test_stretches_fill_the_gpu_and_are_whole_chunks():
    from spectraformer.ops.triton.causal_configurations import LEAST_STRETCH, choose_stretches, cut_stretches

    chosen = choose_stretches(torch.bfloat16, 64, 128)
    assert cut_stretches(65536, 64, chosen) == (9, 7296) and cut_stretches(100, 64, chosen) == (1, 128)
    for n, heads in itertools.product((1, 63, 256, 1000, 4097, 1 << 20), (1, 16, 64, 5000)):
        count, span = cut_stretches(n, heads, chosen)
        assert span % chosen.tokens == 0 and (count - 1) * span < n <= count * span
        assert count == 1 or span >= LEAST_STRETCH - chosen.tokens
    for dtype, d, m in ((torch.float32, 64, 128), (torch.bfloat16, 128, 128), (torch.bfloat16, 64, 256)):
        assert choose_stretches(dtype, d, m) is None


@pytest.mark.slow
def test_kernels_compile_for_hopper_onto_tensor_cores_and_into_registers():
    for x in run_program(__file__, "compile", interpret=False):
        steep = "steep" in x["kernel"]
        assert x["shared"] <= SHARED_MEMORY and (x["spills"] <= MAX_SPILLS or steep), x
        if x["kernel"] == "stretch_output_kernel":
            # Two programs share a multiprocessor.
            assert x["matrix"] > 0 and x["copies"] > 0 and x["serialized"] == [], x
            assert 2 * (x["shared"] + 1024) <= SHARED_MEMORY + 1024, x


def choose_small(dtype, head_dim, landmarks):
    from spectraformer.ops.triton.configurations import Configuration

    return Configuration(max(16, 1 << (landmarks - 1).bit_length()), 16, 4, 1, programs=100)


def run(operands, state):
    """Output, state, and whether a chunk was steep."""
    from spectraformer.ops.triton import causal_plan

    state = (None, None) if state is None else state[:2]
    launches, found = causal_plan.plan_forward(*operands, *state, needs_backward=False, precision="ieee")
    for launch in launches:
        launch.run()
    assert launches[-1].kernel.__name__ == "steep_stretch_kernel"
    return found.out, found.log_scale, found.sums, bool(launches[-1].arguments["stretch_steepest"].max() > 90)


def errors_of(case):
    operands, state = operands_of(*case)
    exact = [None if x is None else x.double() for x in operands]
    want, after = exact_attention(exact, moved(state, torch.float64))
    if "removed" in case[-1]:  # what a removed key and its value hold must not matter
        gone = (operands[6] == float("-inf")).unsqueeze(-1)
        operands[1:3] = (x.masked_fill(gone, float("nan")) for x in operands[1:3])
    out, log_scale, sums, steep = run(operands, state)
    # Sums relative to whatever maximum the kernels keep.
    fade = torch.where(after.log_scale.isinf(), 0.0, after.log_scale - log_scale).exp().unsqueeze(-1)
    expected = fade * after.sums
    largest = expected.abs().amax((-1, -2)).clamp_min(1e-9)
    errors = {
        "out": ((out - want).abs().max() / want.abs().max().clamp_min(1e-9)).item(),
        "sums": ((sums - expected).abs().amax((-1, -2)) / largest).max().item(),
    }
    return {"errors": errors, "steep": steep}


def causality():
    case = (1, 1, 1, 150, 16, 16, 16, {})
    operands, other = operands_of(*case)[0], operands_of(*case, seed=1)[0]
    whole, *_ = run(operands, None)
    earlier, later = [], []
    for first in (1, 45, 127, 130):
        changed = list(operands)
        for i in (0, 1, 2):
            changed[i] = torch.cat([operands[i][:, :, :first], 3 * other[i][:, :, first:]], 2)
        out, *_ = run(changed, None)
        earlier.append(out[:, :, :first].equal(whole[:, :, :first]))
        later.append(out[:, :, first:].equal(whole[:, :, first:]))
    return {"earlier equal": earlier, "later equal": later}


def interpret():
    from spectraformer.ops.triton import causal_configurations, causal_plan
    from spectraformer.ops.triton.configurations import THIRTY_TWO_BIT

    causal_plan.choose_stretches, causal_configurations.LEAST_STRETCH = choose_small, 48
    for row in THIRTY_TWO_BIT.values():
        row["keys"] = row["keys"]._replace(tokens=16)
    # Every buffer a kernel is to fill starts as NaN: what is left unwritten shows.
    empty = torch.Tensor.new_empty
    torch.Tensor.new_empty = lambda *a, **k: empty(*a, **k).fill_(float("nan"))
    sys.stdout.write(json.dumps({"cases": {name: errors_of(case) for name, case in CASES.items()}} | causality()))


def compile_all():
    from spectraformer.ops.triton.causal_plan import plan_forward
    from spectraformer.ops.triton.causal_tiles import SIZES

    def meta(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    found = []
    for d, m, bias, dtype in (
        (64, 128, None, torch.bfloat16),
        (32, 128, None, torch.bfloat16),
        (40, 100, meta(8, 8, 8000), torch.float16),
    ):
        tokens = [meta(8, 8, 8192 if bias is None else 8000, d, dtype=dtype) for _ in range(3)]
        operands = (*tokens, meta(1, 8, m, d), meta(1, 8, m, d), meta(1, 8, m), bias, meta(1, 8, d), None, None)
        launches, _ = plan_forward(*operands, needs_backward=False, precision="tf32x3")
        found += [assemble(x, SIZES) for x in launches[1:]]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]]()
