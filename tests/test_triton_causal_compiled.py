"""The causal GPU kernels compiled for a GPU without one: what the assembler says of them.

The compiler is wanted whatever the tests beside run in, so it runs in its own process; this file is both the tests and
that program.
"""

import functools
import json
import sys
from importlib.util import find_spec

import pytest
import torch

from offline_kernels import assemble, run_program

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
]

SHARED_MEMORY = 233_472  # bytes of a multiprocessor of compute capability 9.0, 1024 of them for each program
# Head dim, landmarks: bytes kept outside registers by a thread of the forward, of either sweep of the backward.
MAX_SPILLS = {(64, 128): (720, 640), (32, 128): (340, 520), (128, 256): (1280, 600)}
SWEEPS = {"sweep_kernel", "query_sweep_kernel", "key_sweep_kernel"}


@pytest.fixture(scope="module")
def compiled():
    found = run_program(__file__, "compile", interpret=False)
    return {name: {x["kernel"]: x for x in kernels} for name, kernels in found.items()}


@pytest.mark.parametrize("shape", MAX_SPILLS, ids=str)
def test_kernels_compile_for_hopper_onto_tensor_cores_and_mostly_into_registers(compiled, shape):
    """Matrix instructions, whether they wait for each other, spills, shared memory."""
    found = compiled[str(shape)]
    assert set(found) >= SWEEPS
    for name, x in found.items():
        assert x["matrix"] > 0, x
        assert x["serialized"] == [] or name not in SWEEPS | {"state_kernel"}, x
        assert x["spills"] <= (MAX_SPILLS[shape][name != "sweep_kernel"] if name in SWEEPS else 0), x
    # Two programs of the forward share a multiprocessor up to head dim 64.
    assert found["sweep_kernel"]["shared"] + 1024 <= SHARED_MEMORY // (2 if shape[0] <= 64 else 1)
    assert all(x["shared"] + 1024 <= SHARED_MEMORY for x in found.values())


def test_every_kernel_compiles_with_every_operand_and_uneven_sizes(compiled):
    found = compiled["everything"]
    careful = {f"careful {name}" for name in SWEEPS}
    helpers = {"state_kernel", "scan_kernel", "query_state_kernel", "suffix_kernel", "step_kernel"}
    assert set(found) == SWEEPS | careful | helpers
    assert all(x["shared"] + 1024 <= SHARED_MEMORY for x in found.values())


def compile_all():
    from spectraformer.ops.triton.causal_backward import Wanted, plan_backward
    from spectraformer.ops.triton.causal_plan import plan_forward
    from spectraformer.ops.triton.decode import plan_step

    meta = functools.partial(torch.empty, device="meta")
    results = {}
    for d, m in MAX_SPILLS:
        tokens = [meta(8, 8, 8192, d, dtype=torch.bfloat16) for _ in range(3)]
        operands = (*tokens, meta(1, 8, m, d), meta(1, 8, m, d), meta(1, 8, m), None, meta(1, 8, d), None, None)
        launches, (out, log_scale, _, *kept) = plan_forward(*operands, needs_backward=True, precision="tf32x3")
        launches += plan_backward(
            tokens[0], None, *operands, out, log_scale, *kept, wanted=Wanted(*[False] * 6), precision="tf32x3"
        )[0]
        results[str((d, m))] = [read(x) for x in launches if "STAGES" in x.constants and not x.constants.get("CAREFUL")]
    b, h, g, n, d, e, m = 2, 1, 3, 1333, 40, 72, 100
    tokens = [meta(b, x, n, y, dtype=torch.bfloat16) for x, y in ((h * g, d), (h, d), (h, e))]
    floats = [meta(b, h, m, d), meta(b, h, m, d), meta(b, h, m), meta(b, h, n), meta(b, h, d)]
    operands = (*tokens, *floats, meta(b, h, m), meta(b, h, m, e + 1))
    launches, (out, log_scale, sums, *kept) = plan_forward(*operands, needs_backward=True, precision="tf32x3")
    launches += plan_backward(
        torch.empty_like(out), sums, *operands, out, log_scale, *kept, wanted=Wanted(*[True] * 6), precision="tf32x3"
    )[0]
    launches += plan_step(*[x[:, :, :1] for x in tokens], *floats[:3], floats[3][..., :1], *operands[7:])[0]
    results["everything"] = [read(x) for x in launches]
    sys.stdout.write(json.dumps(results))


def read(launch):
    """What the assembler says, the kernel that takes care of sudden keys by a name of its own."""
    from spectraformer.ops.triton.causal_tiles import SIZES

    found = assemble(launch, SIZES)
    return found | {"kernel": ("careful " if launch.constants.get("CAREFUL") else "") + found["kernel"]}


if __name__ == "__main__":
    compile_all()
