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
REGISTERS = 65_536  # of a multiprocessor
# Head dim, landmarks: bytes kept outside registers by a thread of the backward of queries, of keys or values.
MAX_SPILLS = {(64, 128): (20, 40), (32, 128): (20, 60), (128, 256): (300, 480)}
CHUNK = {"chunk_state_kernel", "chunk_output_kernel", "chunk_query_backward_kernel", "chunk_key_backward_kernel"}
STEEP = {"steep_output_kernel", "steep_query_backward_kernel", "steep_key_backward_kernel"}
OTHER = {"round_kernel", "scan_kernel", "reverse_scan_kernel"}


@pytest.fixture(scope="module")
def compiled():
    return run_program(__file__, "compile", interpret=False)


@pytest.mark.parametrize("shape", [*MAX_SPILLS, "packed"], ids=str)
def test_kernels_compile_for_hopper_onto_tensor_cores_and_mostly_into_registers(compiled, shape):
    """Matrix instructions, whether they wait for each other, spills, what shares a multiprocessor, loads ahead."""
    found = [x for x in compiled[str(shape)] if x["kernel"] not in STEEP]
    assert {x["kernel"] for x in found} == CHUNK | OTHER | ({"chunk_sequence_kernel"} if shape == "packed" else set())
    queries, keys = MAX_SPILLS[(64, 128) if shape == "packed" else shape]
    spills = {"chunk_query_backward_kernel": queries, "chunk_key_backward_kernel": keys, "chunk_output_kernel": 80}
    for x in found:
        assert x["spills"] <= spills.get(x["kernel"], 0), x
        assert x["serialized"] == [], x
        if x["kernel"] in CHUNK:
            warps = min(REGISTERS // (32 * x["registers"]), SHARED_MEMORY // (x["shared"] + 1024) * x["warps"])
            assert x["matrix"] > 0, x
            assert warps - warps % x["warps"] >= 8, x
        # Scans wait for memory unless loads are under way before they are wanted.
        assert x["copies"] > 0 or "scan" not in x["kernel"], x


def test_every_kernel_compiles_with_every_operand_and_uneven_sizes(compiled):
    for dtype in ("torch.bfloat16", "torch.float16", "torch.float32", "wide"):
        found = compiled[dtype]
        assert {x["kernel"] for x in found} == CHUNK | STEEP | OTHER | {"landmark_backward_kernel", "step_kernel"}
        assert all(x["shared"] + 1024 <= SHARED_MEMORY for x in found), found


def compile_all():
    from spectraformer.ops.triton import causal_plan
    from spectraformer.ops.triton.causal_backward import Wanted, plan_backward
    from spectraformer.ops.triton.causal_plan import plan_forward
    from spectraformer.ops.triton.decode import plan_step

    # Stretches have tests of their own.
    causal_plan.choose_stretches = lambda *_: None

    meta = functools.partial(torch.empty, device="meta")
    results = {}
    shapes = [(8, None, d, m) for d, m in MAX_SPILLS]
    for b, boundaries, d, m in (*shapes, (1, meta(33, dtype=torch.int32), 64, 128)):
        tokens = [meta(b, 8, 65_536 // b, d, dtype=torch.bfloat16) for _ in range(3)]
        floats = (meta(1, 8, m, d), meta(1, 8, m, d), meta(1, 8, m), None, meta(1, 8, d))
        operands = (*tokens, *floats, None, None, boundaries)
        launches, (out, log_scale, _, *kept) = plan_forward(*operands, needs_backward=True, precision="tf32x3")
        launches += plan_backward(
            tokens[0], None, *operands, out, log_scale, *kept, wanted=Wanted(*[False] * 6), precision="tf32x3"
        )[0]
        results[str((d, m)) if boundaries is None else "packed"] = [
            read(x) for x in launches if "steep" not in x.kernel.__name__
        ]
    b, h, g, n = 2, 1, 3, 1333
    for name, dtype, d, e, m in (
        ("torch.bfloat16", torch.bfloat16, 40, 72, 100),
        ("torch.float16", torch.float16, 64, 32, 70),
        ("torch.float32", torch.float32, 40, 72, 100),
        ("wide", torch.bfloat16, 256, 200, 300),
    ):
        tokens = [meta(b, x, n, y, dtype=dtype) for x, y in ((h * g, d), (h, d), (h, e))]
        floats = [meta(b, h, m, d), meta(b, h, m, d), meta(b, h, m), meta(b, h, n), meta(b, h, d)]
        operands = (*tokens, *floats, meta(b, h, m), meta(b, h, m, e + 1), None)
        launches, (out, log_scale, sums, *kept) = plan_forward(*operands, needs_backward=True, precision="tf32x3")
        launches += plan_backward(
            torch.empty_like(out), sums, *operands, out, log_scale, *kept, wanted=Wanted(*[True] * 6),
            precision="tf32x3",
        )[0]  # fmt: skip
        launches += plan_step(*[x[:, :, :1] for x in tokens], *floats[:3], floats[3][..., :1], *operands[7:-1])[0]
        results[name] = [read(x) for x in launches]
    sys.stdout.write(json.dumps(results))


def read(launch):
    from spectraformer.ops.triton.causal_tiles import SIZES

    return assemble(launch, SIZES) | {"warps": launch.warps}


if __name__ == "__main__":
    compile_all()
