"""The forward of short sequences in one launch, in Triton's interpreter: the same as in two, which is tested elsewhere.

This file is both the tests and the program they run.
"""

import json
import sys
from importlib.util import find_spec

import pytest
import torch

from offline_kernels import SHARED_MEMORY, assemble, new_buffers, poisoned, run_program

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
# name: b, h, g, n, s, d, e, m, and what else is special
CASES = {
    "plain": (2, 2, 1, 70, 90, 16, 16, 64, {}),
    "odd sizes": (1, 2, 1, 37, 45, 20, 24, 70, {}),
    "grouped queries": (2, 2, 3, 40, 50, 16, 16, 64, {"shared": False}),
    "no bias and no quadratic": (1, 1, 1, 40, 70, 16, 16, 64, {"bias": False}),
    "transposed inputs": (2, 3, 1, 50, 60, 16, 16, 64, {"transposed": True}),
    "a head without keys": (2, 2, 1, 40, 50, 16, 16, 64, {"removed": slice(None)}),
}
PACKED = {
    "self-attention": {},
    "cross-attention, grouped queries": {"key": (7, 0, 90, 33, 1), "g": 2, "shared": False},
}


@pytest.fixture(scope="module")
def interpreted():
    return run_program(__file__, "interpret", interpret=True)


@pytest.mark.parametrize("case", [*CASES, *PACKED])
def test_one_launch_gives_what_two_give(interpreted, case):
    found = interpreted[case]
    assert found["launches"] == 1
    assert found["error"] < 2e-6


def test_short_sequences_are_many_and_their_landmarks_fit():
    from spectraformer.ops.triton.configurations import SHORT_PROGRAMS, SHORT_TOKENS, choose_short

    fits = {
        "dtype": torch.bfloat16,
        "head_dim": 64,
        "landmarks": 128,
        "longest": SHORT_TOKENS,
        "independent": SHORT_PROGRAMS,
    }
    assert choose_short(**fits).landmarks == 128
    for changes in (
        {"dtype": torch.float32},
        {"head_dim": 65},
        {"landmarks": 129},
        {"longest": SHORT_TOKENS + 1},
        {"independent": SHORT_PROGRAMS - 1},
    ):
        assert choose_short(**fits | changes) is None


@pytest.mark.slow
def test_the_kernel_compiles_for_hopper_without_spills():
    for x in run_program(__file__, "compile", interpret=False):
        assert x["kernel"] == "short_kernel" and x["spills"] == 0 and x["shared"] <= SHARED_MEMORY / 3, x
        assert x["matrix"] > 0 and x["copies"] > 0, x


def interpret():
    import test_triton
    import test_triton_packed
    from spectraformer.ops import triton as kernels
    from spectraformer.ops.triton import forward
    from spectraformer.ops.triton.configurations import Configuration
    from spectraformer.ops.triton.launch import PLANS

    results = {}

    def compare(name, operands, sequences=None):
        found = []
        for short in (None, Configuration(128, 32, 4, 1)):
            forward.choose_short = lambda *_, short=short: short
            PLANS.clear()
            found.append(kernels.landmark_attention(*operands, precision="ieee", sequences=sequences))
        (plan,) = PLANS.values()
        error = (found[0] - found[1]).abs().max() / found[0].abs().max()
        results[name] = {"error": error.item(), "launches": len(plan.launches)}

    with new_buffers(poisoned):
        for name, (*sizes, special) in CASES.items():
            compare(name, test_triton.operands_of(*sizes, special))
        for name, changes in PACKED.items():
            case = test_triton_packed.BASE | changes
            compare(name, test_triton_packed.operands_of(**case), test_triton_packed.sequences_of(case)[0])
    sys.stdout.write(json.dumps(results))


def compile_all():
    from spectraformer.ops import Sequences
    from spectraformer.ops.triton.forward import plan_forward
    from spectraformer.ops.triton.tiles import SIZES

    def meta(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    results, ends = [], meta(33, dtype=torch.int32)
    for d, m, sequences in ((64, 128, None), (64, 128, Sequences(ends, ends, 256, 256)), (32, 64, None)):
        shape = (32, 8, 256, d) if sequences is None else (1, 8, 16384, d)
        tokens = [meta(*shape, dtype=torch.bfloat16) for _ in range(3)]
        operands = (*tokens, meta(1, 8, m, d), meta(1, 8, m, d), meta(1, 8, m), None, meta(1, 8, d))
        launches, _ = plan_forward(*operands, needs_backward=False, precision="tf32x3", sequences=sequences)
        results += [assemble(x, SIZES) for x in launches]
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]]()
