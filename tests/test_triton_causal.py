"""The causal GPU kernels in Triton's interpreter against float64.

The interpreter must be chosen before kernels are defined, so it runs in its own process; this file is both the tests
and that program.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

from offline_kernels import new_buffers, poisoned
from spectraformer.ops import reference
from spectraformer.ops.streaming import AttentionState, empty_state

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

NAMES = ("query", "key", "value", "query_landmarks", "key_landmarks", "landmark_bias", "key_bias", "key_quadratic")
# b, h, g, n, d, e, m, and what else is special; chunks are of 32 tokens, blocks of 64 landmarks
CASES = {
    "five chunks": (1, 2, 1, 150, 16, 16, 64, {}),
    "odd sizes, two blocks, transposed": (1, 1, 2, 77, 20, 40, 70, {"transposed": True, "bias": False}),
    "after a state": (2, 1, 3, 100, 16, 16, 32, {"state": True, "shared": False}),
    "the first keys removed": (1, 2, 1, 140, 16, 16, 16, {"removed": slice(0, 70)}),
    "a head without keys": (1, 2, 1, 40, 16, 16, 16, {"removed": slice(None)}),
    "std 3, one chunk": (1, 1, 1, 20, 16, 16, 24, {"std": 3.0}),
    "norms that grow": (1, 1, 2, 80, 16, 16, 24, {"growth": 11.0, "curvature": 0.2}),
    "norms that grow after a state": (1, 1, 1, 75, 16, 24, 24, {"growth": 11.0, "curvature": 0.2, "state": True}),
    "head dim above the joint kernel's": (1, 1, 2, 40, 70, 16, 24, {"state": True}),
}


def operands_of(b, h, g, n, d, e, m, special, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def tokens(heads, dim):
        growth = 1.0 + special.get("growth", 0.0) * torch.arange(n) / n
        x = normal(b, n, heads, dim) * special.get("std", 1.0) * growth[:, None, None]
        x = x.transpose(1, 2) if special.get("transposed") else x.transpose(1, 2).contiguous()
        return x.to(device, dtype)

    lead = (1, h) if special.get("shared", True) else (b, h)
    query, key, value = tokens(h * g, d), tokens(h, d), tokens(h, e)
    landmarks = [(normal(*lead, m, d) * d**-0.25).to(dtype).float() for _ in range(2)]
    key_bias = quadratic = None
    if special.get("bias", True):
        key_bias = normal(b, h, n)
        quadratic = special.get("curvature", -0.5) * d**-0.5 * torch.rand(1, h, d, generator=generator)
        key_bias[0, 0, special.get("removed", slice(0))] = float("-inf")
    state = None
    if special.get("state"):
        state = AttentionState(normal(b, h, m), torch.rand(b, h, m, e + 1, generator=generator))
    floats = [*landmarks, normal(1, 1, m), key_bias, quadratic]
    return [query, key, value, *(None if x is None else x.to(device) for x in floats)], moved(state, device)


def moved(state, to):
    return None if state is None else AttentionState(state.log_scale.to(to), state.sums.to(to))


def exact_attention(operands, state):
    """Plain torch in the dtype and on the device of the operands."""
    q, k, v, u, w, a, t, c = operands
    (b, h, n, d), m = k.shape, u.shape[-2]
    bias = torch.zeros(b, h, n, dtype=k.dtype, device=k.device)
    bias = bias if t is None else bias + t
    bias = bias if c is None else bias + (k**2 * c.unsqueeze(-2)).sum(-1)
    state = state or empty_state(b, h, m, v.shape[-1], dtype=k.dtype, device=k.device)
    u, w, a = (x.expand(b, h, *x.shape[2:]) for x in (u, w, a))
    out, after = reference.causal_landmark_attention(q.reshape(b, h, -1, n, d), k, v, u, w, a, bias, state)
    return out.flatten(1, 2), after


def sums_like(state, other):
    """Sums of a state relative to what those of another are: their highest logit, or their log-sum-exp."""
    fade = torch.where(state.log_scale.isinf(), 0.0, state.log_scale - other.log_scale).exp().unsqueeze(-1)
    return state.sums * fade.to(state.sums.dtype)


def compare(case, device="cpu", dtype=torch.float32, norm=torch.inf):
    """As compare_operands, of a case."""
    return compare_operands(*operands_of(*case, device=device, dtype=dtype), norm=norm)


def compare_operands(operands, state=None, norm=torch.inf, least=0.01):
    """Errors of output, state and gradients, relative to the largest or to the norm; what is removed is NaN.

    Those of a gradient are relative to this share of the largest gradient at least.
    """
    from spectraformer.ops.triton.causal import causal_landmark_attention

    inputs = [x for x in operands if x is not None] + ([] if state is None else [state.sums])
    names = [x for x, y in zip(NAMES, operands, strict=True) if y is not None] + ([] if state is None else ["sums"])
    doubles = [x.double().requires_grad_() for x in inputs]
    found = iter(doubles)
    exact = [None if x is None else next(found) for x in operands]
    exact_state = None if state is None else AttentionState(state.log_scale.double(), next(found))
    shown = list(operands)
    if operands[6] is not None and operands[6].isneginf().any():
        gone = operands[6].isneginf().unsqueeze(-1)
        shown[1:3] = (x.masked_fill(gone, float("nan")) for x in shown[1:3])
        inputs[1:3] = shown[1:3]
    for x in inputs:
        x.requires_grad_()

    precision = "tf32x3" if operands[0].is_cuda else "ieee"
    out, after = causal_landmark_attention(*shown, state=state, precision=precision)
    want, wanted = exact_attention(exact, exact_state)
    sums = sums_like(after, wanted)
    weights = [torch.randn_like(out), torch.randn_like(after.sums) * (state is not None)]
    got = torch.autograd.grad((out, sums), inputs, weights)
    expected = torch.autograd.grad((want, wanted.sums), doubles, [x.double() for x in weights])

    def size(x):
        return torch.linalg.vector_norm(x.double(), norm).item() / x.numel() ** (1 / norm)

    floor = least * max(map(size, expected))
    errors = {"out": size(out - want) / size(want), "sums_after": size(sums - wanted.sums) / size(wanted.sums)}
    beyond = (after.log_scale - wanted.log_scale).nan_to_num()
    errors["log_scale"] = (
        size(torch.minimum(beyond.abs(), (beyond - wanted.sums[..., -1].log().nan_to_num()).abs())) / 10
    )
    for name, x, y in zip(names, got, expected, strict=True):
        errors[name] = size(x - y) / max(size(y), floor)
    dense = out.is_contiguous() and out.dtype == operands[2].dtype and out.shape == want.shape
    return errors | {"dense": 0.0 if dense else 1.0}, (out, after, *got)


@pytest.fixture(scope="module")
def interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_outputs_states_and_gradients_agree_with_float64(interpreted, case):
    assert {name: e for name, e in interpreted[case].items() if not e < 2e-5} == {}


@needs_triton
def test_chunks_are_steep_where_logits_rise_steeply_and_only_there(interpreted):
    assert interpreted["steepest"]["five chunks"] < 90 < interpreted["steepest"]["norms that grow"]
    assert interpreted["steepest"]["norms that grow after a state"] > 90


@needs_triton
def test_tiles_change_results_by_rounding_alone(interpreted):
    assert {name: e for name, e in interpreted["tiles"].items() if not e < 2e-5} == {}


@needs_triton
def test_no_bit_of_an_output_depends_on_later_tokens(interpreted):
    assert interpreted["earlier equal"] == [True] * 4 and interpreted["later equal"] == [False] * 4


@needs_triton
def test_pieces_and_steps_give_what_the_whole_gives_whatever_backend_made_the_state(interpreted):
    assert {name: e for name, e in interpreted["pieces"].items() if not e < 1e-5} == {}


@needs_triton
def test_fakes_have_the_shapes_and_strides_of_results_which_share_no_memory(interpreted):
    assert interpreted["fakes"] == []


@needs_triton
def test_only_what_is_wanted_gets_a_gradient(interpreted):
    assert interpreted["frozen"] == [True, True, True]


@needs_triton
def test_bad_states_are_refused_by_name(interpreted):
    refused = interpreted["refused"]
    assert "signed" in refused[0] and "log_scale" in refused[1] and "(1, 1, 16)" in refused[1]
    assert "sums" in refused[2] and "tf32x3" in refused[3] and "expected 1" in refused[4]


@needs_triton
def test_no_tokens_leave_the_state_as_it_is(interpreted):
    assert interpreted["no tokens"] == [True, True]


@needs_triton
def test_every_pass_cuts_the_chunk_into_whole_tiles():
    from spectraformer.ops.triton import causal_configurations as table
    from spectraformer.ops.triton.causal_plan import cut

    for dtype, d, m in itertools.product((torch.bfloat16, torch.float32), (16, 64, 128, 256), (16, 128, 1000)):
        key = torch.empty(1, 1, 100, d, dtype=dtype, device="meta")
        found = cut(key, key, m)
        assert all(found.chunk % table.choose(x, dtype, d, m).tokens == 0 for x in table.PASSES)
        assert (found.chunks - 1) * found.chunk < 100 <= found.chunks * found.chunk
        assert found.rows * found.row_blocks >= m and found.columns * found.column_blocks >= d
    row = table.SIXTEEN_BIT[64, 128]
    shipped = row["chunk_outputs"]
    row["chunk_outputs"] = shipped._replace(tokens=512)
    try:
        assert table.choose("chunk_outputs", torch.bfloat16, 64, 128).tokens == row["chunk_states"].tokens
    finally:
        row["chunk_outputs"] = shipped


@needs_triton
def test_float32_beyond_head_dim_128_is_refused_by_size():
    from spectraformer.ops.triton.causal import refusals as refusals_of

    for d, dtype, refused in ((160, torch.float32, True), (128, torch.float32, False), (160, torch.bfloat16, False)):
        x = torch.empty(1, 1, 2, d, dtype=dtype)
        assert any(f"{d} is above 128" in reason for reason in refusals_of(x, x, x)) == refused


def interpret():
    with new_buffers(poisoned):
        torch.manual_seed(0)
        results = {name: compare(case)[0] for name, case in CASES.items()}
    names = ("five chunks", "norms that grow", "norms that grow after a state")
    results["steepest"] = {name: steepest(CASES[name]) for name in names}
    results |= causality() | refusals() | {"pieces": pieces(), "tiles": tiles(), "fakes": fakes(), "frozen": frozen()}
    sys.stdout.write(json.dumps(results))


def steepest(case):
    from spectraformer.ops.triton.causal_plan import plan_forward

    operands, state = operands_of(*case)
    state = (None, None) if state is None else state[:2]
    launches, _ = plan_forward(*operands, *state, needs_backward=False, precision="ieee")
    for launch in launches:
        launch.run()
    return launches[-1].arguments["steepest"].max().item()


@contextmanager
def small_tiles():
    """Chunks of 64 tokens, of several tiles, and blocks of 16 landmarks."""
    from spectraformer.ops.triton import causal_configurations as table
    from spectraformer.ops.triton.launch import PLANS

    row = table.THIRTY_TWO_BIT[32, 64]
    shipped = dict(row)
    row.update({name: x._replace(tokens=16, landmarks=16) for name, x in row.items()})
    row["chunk_states"] = row["chunk_states"]._replace(tokens=64)
    row["chunk_outputs"] = row["chunk_outputs"]._replace(tokens=32)
    PLANS.clear()
    try:
        yield
    finally:
        row.update(shipped)
        PLANS.clear()


def tiles():
    with small_tiles():
        found = {case: compare(CASES[case])[0] for case in ("after a state", "norms that grow")}
    return {f"{case}, {name}": e for case, errors in found.items() for name, e in errors.items()}


def causality():
    from spectraformer.ops.triton.causal import causal_landmark_attention

    operands, _ = operands_of(1, 1, 1, 150, 16, 16, 16, {})
    other, _ = operands_of(1, 1, 1, 150, 16, 16, 16, {}, seed=1)
    whole, _ = causal_landmark_attention(*operands, precision="ieee")
    earlier, later = [], []
    for first in (1, 45, 127, 130):
        changed = list(operands)
        for i in (0, 1, 2):
            changed[i] = torch.cat([operands[i][:, :, :first], 3 * other[i][:, :, first:]], 2)
        out, _ = causal_landmark_attention(*changed, precision="ieee")
        earlier.append(out[:, :, :first].equal(whole[:, :, :first]))
        later.append(out[:, :, first:].equal(whole[:, :, first:]))
    return {"earlier equal": earlier, "later equal": later}


def pieces():
    from spectraformer.ops.triton.causal import causal_landmark_attention, decode_step

    operands, state = operands_of(1, 1, 3, 60, 16, 72, 40, {"state": True, "removed": slice(58, 59)})
    want, after = exact_attention([x.double() for x in operands], moved(state, torch.float64))
    outs = []
    for i, (first, last) in enumerate(itertools.pairwise((0, 33, 40, 57, 58, 59, 60))):
        piece = [
            x[..., first:last, :] if i < 3 else x[..., first:last] if i == 6 else x for i, x in enumerate(operands)
        ]
        if i == 1:  # plain torch goes on from the kernels' state, and they from its
            out, state = exact_attention([x.double() for x in piece], moved(state, torch.float64))
        elif last - first == 1:
            out, state = decode_step(*piece, state=state)
        else:
            out, state = causal_landmark_attention(*piece, state=state, precision="ieee")
        outs.append(out)
    out = torch.cat(outs, 2)
    scale = after.sums.abs().max()
    return {
        "out": ((out - want).abs().max() / want.abs().max()).item(),
        "log_scale": (state.log_scale - after.log_scale).abs().max().item(),
        "sums": ((state.sums - after.sums).abs().max() / scale).item(),
    }


def fakes():
    from spectraformer.ops.triton import causal

    def differences(real, fake):
        rows = [(x.shape, x.stride(), x.dtype) for x in real], [(x.shape, x.stride(), x.dtype) for x in fake]
        shared = len({x.data_ptr() for x in real if x.numel()}) < sum(x.numel() > 0 for x in real)
        return ([] if rows[0] == rows[1] else [str(rows)]) + (["results share memory"] if shared else [])

    problems = []
    for n, special in ((150, {"transposed": True}), (20, {"state": True}), (20, {})):
        operands, state = operands_of(1, 2, 2, n, 16, 24, 70, special)
        arguments = (*operands, *((None, None) if state is None else state[:2]))
        ops = torch.ops.spectraformer
        for needs_backward in (False, True):
            real = ops.causal_landmark_attention(*arguments, None, needs_backward, "ieee")
            problems += differences(real, causal._forward_shapes(*arguments, None, needs_backward, "ieee"))
        out, log_scale, _, *kept = real
        for wanted in ([True] * 5 + [state is not None], [False] * 6):
            given = (torch.randn_like(out), None, *arguments, None, out, log_scale, *kept, wanted, "ieee")
            real = ops.causal_landmark_attention_backward(*given)
            problems += differences(real, causal._backward_shapes(*given))
        step = [x[:, :, :1] if i < 3 or (i == 6 and x is not None) else x for i, x in enumerate(arguments)]
        problems += differences(ops.landmark_attention_step(*step), causal._step_shapes(*step))
    return problems


def frozen():
    from spectraformer.ops.triton.causal import causal_landmark_attention

    operands, _ = operands_of(1, 1, 1, 20, 16, 16, 16, {})
    operands[0].requires_grad_()
    out, after = causal_landmark_attention(*operands, precision="ieee")
    out.sum().backward()
    return [operands[0].grad is not None, operands[3].grad is None, not after.log_scale.requires_grad]


def refusals():
    from spectraformer.ops.triton.causal import causal_landmark_attention, decode_step

    operands, state = operands_of(1, 1, 1, 2, 16, 16, 16, {"state": True})
    said = []
    for run, options in (
        (causal_landmark_attention, {"state": state._replace(magnitude=state.log_scale)}),
        (causal_landmark_attention, {"state": state._replace(log_scale=state.log_scale[..., :3])}),
        (causal_landmark_attention, {"state": state._replace(sums=state.sums[..., :3])}),
        (causal_landmark_attention, {"precision": "tf32"}),
        (decode_step, {"state": state}),
    ):
        try:
            run(*operands, **options)
        except ValueError as error:
            said.append(str(error))
    none = [x[..., :0, :] if i < 3 else x[..., :0] if i == 6 else x for i, x in enumerate(operands)]
    out, after = causal_landmark_attention(*none, state=state)
    _, fresh = causal_landmark_attention(*none)
    kept = after.sums.equal(state.sums) and out.shape == (1, 1, 0, 16)
    return {"refused": said, "no tokens": [kept, not fresh.sums.any() and fresh.log_scale.max().item() == -math.inf]}


if __name__ == "__main__":
    interpret()
