"""Attention on tensors: backends against a float64 oracle, states, and the rare exact path."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from spectraformer import ops
from spectraformer.ops import reference, streaming
from spectraformer.ops.graph import is_plain

NEG = float("-inf")


def operands(b=2, h=3, g=2, n=37, s=29, m=12, d=8, e=6, dtype=torch.float64, scale=1.0):
    t = torch.randn(b, h, s, dtype=dtype)
    t[0, 0] = NEG  # no key at all
    t[1, :, s // 2 :] = NEG
    return [
        torch.randn(b, h * g, n, d, dtype=dtype) * scale,
        torch.randn(b, h, s, d, dtype=dtype) * scale,
        torch.randn(b, h, s, e, dtype=dtype),
        torch.randn(1, h, m, d, dtype=dtype),
        torch.randn(b, 1, m, d, dtype=dtype),
        torch.randn(1, 1, m, dtype=dtype),
        t,
    ]


def brute_force(q, k, v, u, w, a, t):
    """The n x s matrix of feature products, each row shifted by its own maximum."""
    b, h = k.shape[:2]
    q = q.reshape(b, h, -1, *q.shape[2:])  # (b, h, g, n, d)
    log_q = torch.einsum("bhgnd,bhmd->bhgnm", q, u.expand(b, h, -1, -1)) + a.expand(b, h, -1)[:, :, None, None]
    log_k = torch.einsum("bhsd,bhmd->bhsm", k, w.expand(b, h, -1, -1)) + t.unsqueeze(-1)
    scores = (log_q.unsqueeze(-2) + log_k[:, :, None, None]).logsumexp(-1)  # (b, h, g, n, s)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhgns,bhse->bhgne", weights, v).flatten(1, 2)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("e", [3, 8, 13])
def test_two_softmaxes_are_the_feature_products(backend, e):
    x = operands(e=e)
    if backend == "cpu" and e == 3:
        with pytest.raises(ValueError, match="value dim 3 and head dim 8"):
            ops.landmark_attention(*x, backend)
        return
    torch.testing.assert_close(ops.landmark_attention(*x, backend), brute_force(*x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_every_gradient_agrees_with_finite_differences(backend):
    x = [t.requires_grad_() for t in operands(b=2, h=1, g=2, n=3, s=4, m=3, d=2, e=3)]

    def attend(q, k, v, u, w, a, t):
        return ops.landmark_attention(q, k, v, u, w, a, t.masked_fill(removed, NEG), backend)

    removed = x[-1].detach() == NEG
    with torch.no_grad():
        x[-1][removed] = 0.0
    assert gradcheck(attend, x)


def test_gradients_do_not_depend_on_the_blocks_of_recomputation(monkeypatch):
    x = [t.requires_grad_() for t in operands(n=150, s=140)]
    whole = torch.autograd.grad(ops.landmark_attention(*x, "cpu").square().sum(), x)
    monkeypatch.setattr(ops.cpu, "BLOCK_ELEMENTS", 1)  # blocks of 64 rows, the least
    blocked = torch.autograd.grad(ops.landmark_attention(*x, "cpu").square().sum(), x)
    for one, other in zip(whole, blocked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n", "s"), [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_empty_and_single_tokens(n, s):
    out = ops.landmark_attention(*operands(n=n, s=s, g=1))
    assert out.shape == (2, 3, n, 6) and out.isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_strided_inputs_equal_contiguous_ones(backend):
    x = operands(g=1)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x[:3]]
    assert not strided[0].is_contiguous()
    out = ops.landmark_attention(*strided, *x[3:], backend)
    torch.testing.assert_close(out, ops.landmark_attention(*x, backend))


def features(signed, n=23, f=7, b=2, h=2, spread=1.0):
    log = torch.randn(b, h, n, f, dtype=torch.float64) * spread
    return log, torch.randn(b, h, n, f, dtype=torch.float64).sign() if signed else None


@pytest.mark.parametrize("signed", [False, True])
def test_merging_states_is_absorbing_all_keys(signed):
    log, sign = features(signed)
    value = ops.with_ones(torch.randn(2, 2, 23, 5, dtype=torch.float64))
    parts = [
        ops.absorb(log[:, :, i:j], None if sign is None else sign[:, :, i:j], value[:, :, i:j])
        for i, j in itertools.pairwise([0, 4, 5, 23])
    ]
    empty = ops.empty_state(2, 2, 7, 5, signed=signed, dtype=torch.float64)
    query = features(signed)
    whole, _ = ops.readout(*query, ops.absorb(log, sign, value))
    for order in itertools.permutations([*parts, empty]):
        state = order[0]
        for part in order[1:]:
            state = ops.merge(state, part)
        torch.testing.assert_close(ops.readout(*query, state)[0], whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("signed_queries", [False, True])
def test_signs_that_all_keys_share_are_signs_of_every_key(signed_queries):
    log_q, sign_q = features(signed_queries)
    log_k, _ = features(True, n=19, spread=20.0)
    sign = torch.randn(1, 2, 1, 7, dtype=torch.float64).sign().expand(2, -1, -1, -1)
    value = streaming.with_ones(torch.randn(2, 2, 19, 5, dtype=torch.float64))
    found = []
    for signs in (sign, sign.expand_as(log_k)):
        inputs = [x.detach().requires_grad_() for x in (log_q, log_k, value)]
        state = streaming.absorb(inputs[1], signs, inputs[2])
        out, unsafe = streaming.readout(inputs[0], sign_q, state)
        out.square().sum().backward()
        found.append((*state, out, unsafe, *(x.grad for x in inputs)))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    assert not found[0][1].allclose(streaming.absorb(log_k, None, value).sums)


def test_guarded_denominators_take_no_gradient_from_their_guard():
    log_q, log_k = features(False)[0].requires_grad_(), features(False, n=4)[0].repeat(1, 1, 2, 1)
    value = streaming.with_ones(torch.randn(2, 2, 8, 5, dtype=torch.float64))
    signs = torch.ones_like(log_k)
    signs[:, :, 4:] = -1.0  # every denominator is the difference of equal sums
    state = streaming.absorb(log_k, signs, value)
    gradients = []
    for sign_q in (None, torch.ones_like(log_q)):
        out, unsafe = streaming.readout(log_q, sign_q, state)
        assert unsafe.all()
        gradients += torch.autograd.grad(out.sum(), log_q)
    torch.testing.assert_close(*gradients)


def pairwise_oracle(log_q, sign_q, log_k, sign_k, value):
    exponent = log_q.unsqueeze(-2) + log_k.unsqueeze(-3)
    exponent = exponent.masked_fill(~torch.ones(exponent.shape[-3:-1]).tril().bool().unsqueeze(-1), NEG)
    terms = (exponent - exponent.amax((-1, -2), keepdim=True)).exp()
    if sign_q is not None:
        terms = terms * sign_q.unsqueeze(-2) * sign_k.unsqueeze(-3)
    scores = terms.sum(-1)
    return (scores @ value) / scores.sum(-1, keepdim=True)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_a_chunk_is_exact_whatever_the_spread_of_its_keys(signed, spread):
    """A spread of 300 in the log underflows any product with a shared reference, in float64 too."""
    (log_q, sign_q), (log_k, sign_k) = features(signed), features(signed)
    # Later keys ever larger: the chunk's own reference belongs to the last one.
    log_k = log_k + torch.linspace(0, spread, 23, dtype=torch.float64)[:, None]
    value = torch.randn(2, 2, 23, 5, dtype=torch.float64)
    flat = [None if x is None else x.flatten(0, 1) for x in (log_q, sign_q, log_k, sign_k)]
    state = ops.flatten_heads(ops.empty_state(2, 2, 7, 5, signed=signed, dtype=torch.float64))
    out, unsafe, after = ops.advance(*flat, ops.with_ones(value.flatten(0, 1)), state)
    expected = pairwise_oracle(log_q, sign_q, log_k, sign_k, value).flatten(0, 1)
    kept = torch.ones_like(expected[..., 0]).bool() if unsafe is None else ~unsafe
    torch.testing.assert_close(out[kept], expected[kept], rtol=1e-8, atol=1e-8)
    assert after.sums.isfinite().all()


def test_the_exact_path_runs_only_where_it_is_needed(monkeypatch):
    calls = []
    exactly = streaming._advance_exactly
    monkeypatch.setattr(streaming, "_advance_exactly", lambda *a: calls.append(1) or exactly(*a))
    log_q, log_k = features(False)[0].flatten(0, 1), features(False)[0].flatten(0, 1)
    value = ops.with_ones(torch.randn(4, 23, 5, dtype=torch.float64))
    state = ops.flatten_heads(ops.empty_state(2, 2, 7, 5, dtype=torch.float64))
    ops.advance(log_q, None, log_k, None, value, state)
    padded = log_k.clone()
    padded[:, :10] = NEG  # left padding: rows without keys are rightly 0
    out, _, _ = ops.advance(log_q, None, padded, None, value, state)
    assert not calls and (out[:, :10] == 0).all()
    ops.advance(log_q, None, log_k + torch.linspace(0, 300, 23)[:, None], None, value, state)
    assert calls == [1]


def test_the_exact_path_works_in_blocks_of_rows(monkeypatch):
    log_q, log_k = features(False)[0].flatten(0, 1), features(False)[0].flatten(0, 1)
    log_k = log_k + torch.linspace(0, 300, 23, dtype=torch.float64)[:, None]
    value = ops.with_ones(torch.randn(4, 23, 5, dtype=torch.float64))
    state = ops.flatten_heads(ops.empty_state(2, 2, 7, 5, dtype=torch.float64))
    whole = ops.advance(log_q, None, log_k, None, value, state)[0]
    monkeypatch.setattr(streaming, "FALLBACK_ELEMENTS", 1)
    torch.testing.assert_close(ops.advance(log_q, None, log_k, None, value, state)[0], whole)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_causal_attention_does_not_depend_on_the_chunk(chunk):
    b, h, g, n, m, d, e = 2, 2, 3, 50, 12, 8, 6
    q, k, v, u, w, a, t = operands(b, h, g, n, n, m, d, e)
    args = (q.unflatten(1, (h, g)), k, v, u.expand(b, h, m, d), w.expand(b, h, m, d), a.expand(b, h, m), t)
    state = ops.empty_state(b, h, m, e, dtype=torch.float64)
    out, _ = reference.causal_landmark_attention(*args, state, chunk=chunk)
    whole, _ = reference.causal_landmark_attention(*args, state, chunk=n)
    torch.testing.assert_close(out, whole, rtol=1e-10, atol=1e-10)


def test_signed_denominators_are_guarded_and_counted():
    log = torch.zeros(1, 1, 2, 2)
    key_sign = torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]]])  # cancels exactly for a query of ones
    state = ops.absorb(log, key_sign, ops.with_ones(torch.ones(1, 1, 2, 3)))
    out, unsafe = ops.readout(log, torch.ones(1, 1, 2, 2), state)
    assert out.isfinite().all() and unsafe.all()
    out, unsafe = ops.readout(log, torch.tensor([1.0, -1.0]).expand(1, 1, 2, 2), state)
    torch.testing.assert_close(out, torch.ones(1, 1, 2, 3))
    assert not unsafe.any()


def test_nan_reaches_the_output():
    for backend in ("cpu", "torch"):
        x = operands(g=1)
        x[0][1, 0, 0] = float("nan")
        out = ops.landmark_attention(*x, backend)
        assert out[1, 0, 0].isnan().all() and out[1, 0, 1:].isfinite().all()
    x = operands(g=1, n=29)
    x[1][1, 0, 5] = float("nan")
    state = ops.empty_state(2, 3, 12, 6, dtype=torch.float64)
    out, _ = ops.causal_landmark_attention(*x, state=state)
    assert out[1, 0, 5:].isnan().all(), "a NaN key must not vanish in the sums"


@pytest.mark.parametrize("n", [1, 2, 16])
def test_the_hadamard_transform_is_its_matrix(n):
    matrix = ops.hadamard(torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))
    assert (matrix.abs() == 1).all() and (matrix[0] == 1).all()
    with pytest.raises(ValueError, match="power of two"):
        ops.hadamard(torch.ones(3, 6))


def test_autocast_and_low_precision_do_not_reach_the_logits():
    x = operands(dtype=torch.float32)
    plain = ops.landmark_attention(*x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ops.landmark_attention(*x), plain, rtol=0, atol=0)
    halves = [t.bfloat16() if i < 3 else t for i, t in enumerate(x)]
    exact = brute_force(*(t.double() for t in halves))
    out = ops.landmark_attention(*halves)
    assert out.dtype == torch.float32
    assert (out - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("operand", range(7))
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_any_layout_of_any_operand(backend, operand):
    """torch's fused CPU kernel reads the last dimension as contiguous without looking at its stride."""
    x = operands(g=1)
    expected = ops.landmark_attention(*x, backend)
    last = x[operand].ndim - 1
    x[operand] = x[operand].transpose(1, last).contiguous().transpose(1, last)
    assert x[operand].stride(-1) != 1 or x[operand].shape[1] == 1
    torch.testing.assert_close(ops.landmark_attention(*x, backend), expected)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return operation(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    pass


def test_operations_are_plain_only_where_nothing_compiles_traces_transforms_or_intercepts_them():
    seen = []

    def look(x):
        seen.append(is_plain(x, None))
        return x * 2

    x = torch.ones(3)
    look(x)
    look(torch.nn.Parameter(x))
    with torch.inference_mode():
        look(x)
    assert seen == [True] * 3
    seen.clear()
    look(x.as_subclass(Marked))
    torch.func.vmap(look)(x)
    torch.func.grad(lambda y: look(y).sum())(x)
    torch.func.functionalize(look)(x)
    with Watching():
        look(x)
    with FakeTensorMode():
        look(torch.ones(3))
    torch.jit.trace(look, x, check_trace=False)
    make_fx(look)(x)
    assert seen == [False] * 8
    assert not torch.compile(lambda y: y * is_plain(y), fullgraph=True, backend="eager")(x).any()
