"""The GPU kernels without a GPU: in Triton's interpreter against float64, and compiled for one without being run.

The interpreter must be chosen before kernels are defined, and a compiler is wanted beside it, so each runs in its own
process; this file is both the tests and the two programs.
"""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offline_kernels import SHARED_MEMORY, assemble, differences, new_buffers, poisoned, run_program

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

# name: b, h, g, n, s, d, e, m, and what else is special
CASES = {
    "plain": (2, 2, 1, 100, 300, 16, 16, 64, {}),
    "odd sizes": (1, 2, 1, 37, 45, 20, 24, 70, {}),
    "value dim above head dim": (1, 1, 1, 33, 65, 16, 40, 64, {}),
    "one token": (1, 2, 1, 1, 1, 16, 16, 16, {}),
    "grouped queries": (2, 2, 3, 40, 50, 16, 16, 64, {"shared": False}),
    "several blocks of landmarks": (1, 1, 1, 70, 90, 32, 32, 200, {}),
    "landmarks beyond shared memory": (1, 1, 1, 40, 40, 16, 16, 300, {}),
    "no bias and no quadratic": (1, 1, 1, 40, 70, 16, 16, 64, {"bias": False}),
    "transposed inputs": (2, 3, 1, 50, 60, 16, 16, 64, {"transposed": True}),
    "some keys removed": (1, 2, 1, 40, 90, 16, 16, 64, {"removed": slice(30, None)}),
    "a head without keys": (2, 2, 1, 40, 50, 16, 16, 64, {"removed": slice(None)}),
    "long logits": (1, 1, 1, 40, 90, 16, 16, 64, {"scale": 6.0}),
}
NAMES = ("query", "key", "value", "query_landmarks", "key_landmarks", "landmark_bias", "key_bias", "key_quadratic")
SHAPES = ((64, 128, "bfloat16"), (128, 256, "bfloat16"), (128, 256, "float16"))  # head dim, landmarks, dtype
# Bytes a thread keeps outside registers; fewer warps were measured to be worth these.
MAX_SPILLS = 512


@pytest.fixture(scope="module")
def interpreted():
    return run_program(__file__, "interpret", interpret=True)


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_float64(interpreted, case):
    errors = interpreted[case]
    assert errors["shape"] and errors["contiguous"]
    assert {name: e for name, e in errors["relative"].items() if not e < 2e-5} == {}


@needs_triton
def test_a_head_without_keys_gives_zero_and_takes_no_gradient(interpreted):
    assert interpreted["a head without keys"]["zero"] == [True] * 4


@needs_triton
def test_fakes_have_the_shapes_and_strides_of_results_which_share_no_memory(interpreted):
    assert interpreted["fakes"] == []


@needs_triton
def test_frozen_landmarks_get_no_gradient(interpreted):
    assert interpreted["frozen"] == [True, True]


@needs_triton
def test_operators_are_called_where_something_looks_and_only_there(interpreted):
    names = ["spectraformer.landmark_attention", "spectraformer.landmark_attention_backward"]
    assert interpreted["operators"] == {"seen": [names[0], *names], "same": True, "called unseen": []}


@needs_triton
def test_a_plan_serves_other_tensors_of_its_signature_and_no_others(interpreted):
    counts = {"first": 1, "again": 1, "transposed": 2, "misaligned": 3}
    assert interpreted["plans"] == counts | {f"same {name}": True for name in ("again", "transposed", "misaligned")}


@needs_triton
@pytest.mark.parametrize("direct", [True, False])
def test_a_compiled_kernel_is_started_without_dispatch_from_the_second_time(monkeypatch, direct):
    from spectraformer.ops.triton import launch

    dispatched, launched = [], []

    class Run:
        """Stands for the launcher of a compiled kernel."""

        global_scratch_size = profile_scratch_size = 0
        launch_cooperative_grid = launch_pdl = False

        @staticmethod
        def launch(*arguments):
            launched.append(arguments)

    class Compiled:
        run, function, packed_metadata = Run(), "function", "metadata"

    class Kernel:
        arg_names = ("x", "size", "between", "out", "BLOCK")

        def __getitem__(self, grid):
            def start(*arguments, **options):
                dispatched.append((grid, arguments, options))
                return Compiled()

            return start

    def make(operands):
        out, between = operands[0].new_empty(3), operands[0].new_empty(5)
        arguments = {"x": operands[0], "size": 5, "between": between, "out": out}
        return [launch.Launch(Kernel(), 7, arguments, {"BLOCK": 16}, 4, 168)], (out, None)

    monkeypatch.setattr(launch, "PLANS", {})
    monkeypatch.setattr(launch, "DIRECT", direct)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 99, raising=False)
    inputs = [torch.zeros(2), torch.ones(2)]
    results = [launch.planned(make, [x], ()) for x in inputs]
    assert (len(dispatched), len(launched)) == ((1, 1) if direct else (2, 0))
    grid, (x, size, between, out, block), options = dispatched[0]
    assert grid == (7, 1, 1) and x is inputs[0] and out is results[0][0] and between.shape == (5,)
    assert (size, block) == (5, 16) and options == {"num_warps": 4, "num_stages": 1, "maxnreg": 168}
    assert [nothing for _, nothing in results] == [None, None] and results[0][0] is not results[1][0]
    if direct:
        arguments = launched[0]
        assert arguments[:5] == (7, 1, 1, 99, "function") and arguments[9] == "metadata"
        x, size, between, out, block = arguments[13:]
        assert (x, size, out, block) == (inputs[1].data_ptr(), 5, results[1][0].data_ptr(), 16)
        assert isinstance(between, int) and between not in (x, out)


@pytest.fixture(scope="module")
def compiled():
    return run_program(__file__, "compile", interpret=False)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_compile_for_hopper_onto_tensor_cores_and_into_registers(compiled, shape):
    """Read off the assembler: matrix instructions, pipelined loads, spills, shared memory."""
    found = compiled[str(shape)]
    assert {x["kernel"] for x in found} >= {"key_kernel", "query_kernel", "landmark_sums_kernel"}
    for x in found:
        assert x["matrix"] > 0, x
        assert x["copies"] > 0 or x["stages"] == 1, x
        assert x["spills"] <= MAX_SPILLS, x
        assert x["shared"] <= SHARED_MEMORY, x


def test_refusals_say_every_reason():
    from spectraformer.ops import triton as kernels

    x = torch.zeros(1, 1, 4, 300, dtype=torch.float64)
    reasons = "; ".join(kernels.refusals(x, x, x))
    assert "float64" in reasons and "256" in reasons and "cpu" in reasons
    y = torch.zeros(1, 1, 4, 16)
    assert any("different dtypes" in reason for reason in kernels.refusals(y, y.bfloat16(), y))


def test_an_unknown_precision_is_refused_by_name():
    from spectraformer.ops import triton as kernels

    x = torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match=r"tf32'.*tf32x3"):
        kernels.landmark_attention(x, x, x, x, x, x[..., 0], precision="tf32")


def test_importing_the_library_does_not_import_triton():
    code = "import sys, spectraformer.ops.triton; sys.exit(any(m.startswith('triton') for m in sys.modules))"
    # torch itself may import it, so what counts is what we add.
    bare = "import sys, torch; sys.exit(any(m.startswith('triton') for m in sys.modules))"
    codes = [subprocess.run([sys.executable, "-c", x], check=False).returncode for x in (bare, code)]
    assert codes[0] == codes[1]


@needs_triton
def test_every_bucket_has_a_configuration_of_every_pass():
    from spectraformer.ops.triton.configurations import PASSES, SIXTEEN_BIT, THIRTY_TWO_BIT, choose, split

    for table in (SIXTEEN_BIT, THIRTY_TWO_BIT):
        assert all(set(passes) == set(PASSES) for passes in table.values())
    for tokens in (1, 63, 64, 65, 1000, 100_000):
        pieces, span = split(tokens, 3, choose("keys", torch.bfloat16, 64, 128))
        assert (pieces - 1) * span < tokens <= pieces * span


def operands_of(b, h, g, n, s, d, e, m, special):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def tokens(heads, length, dim):
        x = normal(b, length, heads, dim) * special.get("scale", 1.0)
        return x.transpose(1, 2) if special.get("transposed") else x.transpose(1, 2).contiguous()

    query, key, value = tokens(h * g, n, d), tokens(h, s, d), tokens(h, s, e)
    lead = (1, h) if special.get("shared", True) else (b, h)
    landmarks = [normal(*lead, m, d) * d**-0.25 for _ in range(2)]
    key_bias = quadratic = None
    if special.get("bias", True):
        key_bias, quadratic = normal(b, h, s), -0.1 * torch.rand(1, h, d, generator=generator)
        key_bias[0, 0, special.get("removed", slice(0))] = float("-inf")
    return [query, key, value, *landmarks, normal(1, 1, m), key_bias, quadratic]


def interpret():
    from spectraformer.ops import reference
    from spectraformer.ops import triton as kernels

    with new_buffers(poisoned):
        results = {}
        for name, (b, h, g, n, s, d, e, m, special) in CASES.items():
            operands = [None if x is None else x.requires_grad_() for x in operands_of(b, h, g, n, s, d, e, m, special)]
            present = [i for i, x in enumerate(operands) if x is not None]
            shown = list(operands)
            if "removed" in special:  # what a removed key and its value hold must not matter
                gone = (operands[6] == float("-inf")).unsqueeze(-1)
                shown[1:3] = (x.masked_fill(gone, float("nan")) for x in shown[1:3])
            out = kernels.landmark_attention(*shown, precision="ieee")
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            got = torch.autograd.grad(out, [operands[i] for i in present], weight)
            exact = [None if x is None else x.detach().double().requires_grad_() for x in operands]
            query, key, value, u, w, bias, key_bias, quadratic = exact
            added = torch.zeros(b, h, s, dtype=torch.float64)
            if key_bias is not None:
                added = added + key_bias + (key**2 * quadratic.unsqueeze(-2)).sum(-1)
            no_key = (added == float("-inf")).all(-1, keepdim=True)
            want = reference.landmark_attention(
                query.reshape(b, h, g * n, d),
                key,
                value,
                u.expand(b, h, m, d),
                w.expand(b, h, m, d),
                bias.expand(b, h, m),
                added.masked_fill(no_key, 0.0),
                no_key.unsqueeze(-1),
            ).reshape(out.shape)
            expected = torch.autograd.grad(want, [exact[i] for i in present], weight.double())
            # A gradient that is 0 in truth, as of a single key, is measured on the scale of the others.
            largest = max(x.abs().max().item() for x in expected)
            relative = {"out": ((out - want).abs().max() / want.abs().max()).item()}
            for i, x, y in zip(present, got, expected, strict=True):
                relative[NAMES[i]] = (x - y).abs().max().item() / max(y.abs().max().item(), 0.1 * largest)
            results[name] = {
                "shape": out.shape == (b, h * g, n, e) and out.dtype == operands[2].dtype,
                "contiguous": out.is_contiguous(),
                "relative": relative,
                "zero": [not x[0, 0].any() for x in (out, *got[:3])],
            }
    operands = operands_of(2, 2, 2, 33, 40, 16, 24, 70, {"transposed": True})
    problems = []
    for needs_backward in (True, False):
        arguments = (*operands, needs_backward, "ieee")
        real = torch.ops.spectraformer.landmark_attention(*arguments)
        problems += differences(real, kernels._forward_shapes(*arguments))
        if needs_backward:
            for wanted in ([True] * 5, [False] * 5):
                arguments = (torch.randn_like(real[0]), *operands, *real, wanted, "ieee")
                backward = torch.ops.spectraformer.landmark_attention_backward(*arguments)
                problems += differences(backward, kernels._backward_shapes(*arguments))
                if len({x.data_ptr() for x in backward}) < len(backward):
                    problems.append("results share memory")
    results["fakes"] = problems
    results["plans"] = count_plans(kernels)
    results["operators"] = operators_seen(kernels)
    operands[0].requires_grad_()
    kernels.landmark_attention(*operands, precision="ieee").sum().backward()
    results["frozen"] = [operands[0].grad is not None, operands[3].grad is None]
    sys.stdout.write(json.dumps(results))


def operators_seen(kernels):
    seen, called = [], []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation.namespace == "spectraformer":
                seen.append(f"spectraformer.{operation._opname}")
            return operation(*args, **(kwargs or {}))

    def step():
        with torch.no_grad():
            first = kernels.landmark_attention(query, *rest, precision="ieee")
        out = kernels.landmark_attention(query, *rest, precision="ieee")
        return first, out, *torch.autograd.grad(out, query, torch.ones_like(out))

    query, *rest = operands_of(1, 2, 1, 20, 30, 16, 16, 16, {})
    query.requires_grad_()
    with Watching():
        watched = step()
    with torch.profiler.profile() as profile:
        plain = step()
    called += [x.key for x in profile.key_averages() if x.key.startswith("spectraformer")]
    return {"seen": seen, "same": all(map(torch.equal, watched, plain)), "called unseen": called}


def count_plans(kernels):
    from spectraformer.ops.triton.launch import PLANS

    query, *rest = operands_of(1, 2, 1, 20, 30, 16, 16, 16, {})
    transposed = query.transpose(1, 2).contiguous().transpose(1, 2)
    misaligned = torch.empty(query.numel() + 1)[1:].view(query.shape).copy_(2 * query)
    PLANS.clear()
    counts, outs = {}, {}
    inputs = {"first": query, "again": 2 * query, "transposed": 2 * transposed, "misaligned": misaligned}
    for name, x in inputs.items():
        outs[name] = kernels.landmark_attention(x, *rest, precision="ieee")
        counts[name] = len(PLANS)
    PLANS.clear()
    want = kernels.landmark_attention(2 * query, *rest, precision="ieee")
    return counts | {f"same {name}": want.equal(outs[name]) for name in ("again", "transposed", "misaligned")}


def compile_all():
    from spectraformer.ops.triton.backward import Wanted, plan_backward
    from spectraformer.ops.triton.forward import plan_forward
    from spectraformer.ops.triton.tiles import SIZES

    def meta(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    results = {}
    for d, m, dtype in SHAPES:
        tokens = [meta(8, 8, 8192, d, dtype=getattr(torch, dtype)) for _ in range(3)]
        operands = (*tokens, meta(1, 8, m, d), meta(1, 8, m, d), meta(1, 8, m), None, meta(1, 8, d))
        launches, saved = plan_forward(*operands, needs_backward=True, precision="tf32x3")
        wanted = Wanted(*[False] * 5)
        launches = launches + plan_backward(tokens[0], *operands, *saved, wanted=wanted, precision="tf32x3")[0]
        masked = plan_forward(*operands[:6], meta(8, 1, 8192), operands[7], needs_backward=False, precision="tf32x3")[0]
        results[str((d, m, dtype))] = [assemble(x, SIZES) for x in [*launches, masked[0]] if "STAGES" in x.constants]
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]]()
