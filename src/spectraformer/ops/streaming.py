r"""Attention as a running state: absorb keys, merge states, read out queries, advance causally.

Legend of shapes, here and in every file that uses features:
    b batch   h key heads   g query heads per key head   n queries   s keys   d head dim   f features   e value dim

Features are given as ``sign * exp(log)``. ``log`` may end in 1 instead of f where all features of a token
share it (trigonometric features); ``sign`` is ``None`` where it is 1 (positive features). Grouped queries are
folded into the token dimension, (b, h, g * n, ...), so that one key state serves all of them. Values come with a
last column of ones (:func:`with_ones`), so that one product gives numerator and denominator.

Scale is removed in one place only: each feature of the keys by its running maximum M, each query by
:math:`c = \max_i(\ell^q_i + M_i)`. Both cancel exactly between numerator and denominator, so neither needs an
epsilon and neither carries a gradient. With positive features the denominator is at least 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from spectraformer.ops.blocks import blocks

NEGATIVE_INFINITY = float("-inf")
# Below this a denominator may have lost terms to underflow; far above the least normal float32, 1.2e-38.
UNDERFLOW = 2.0**-64
# A signed denominator below this fraction of the sum of its absolute terms is rounding error and variance.
UNSAFE_RATIO = 1e-6
# Elements of the largest temporary of the exact fallback: 64 MiB in float32.
FALLBACK_ELEMENTS = 1 << 24


class AttentionState(NamedTuple):
    """All that attention keeps of the keys and values it has seen: f (e + 2) numbers a head, however many.

    Attributes:
        log_scale: Running maximum M of the keys' log-features, or their log-sum-exp in states that GPU kernels made,
            -inf before the first key, (b, h, f) or (b, h, 1).
        sums: sum_n phi(k_n) [v_n, 1] / exp(M), (b, h, f, e + 1).
        magnitude: sum_n |phi(k_n)| / exp(M), (b, h, f), or None for positive features, where it is in ``sums``.
    """

    log_scale: Tensor
    sums: Tensor
    magnitude: Tensor | None = None


def with_ones(value: Tensor) -> Tensor:  # (..., s, e) -> (..., s, e + 1)
    """Values with a last column of ones."""
    return pad(value, (0, 1), value=1.0)


def _finite(x: Tensor) -> Tensor:
    """A reference that can be subtracted from -inf."""
    return x.clamp_min(torch.finfo(x.dtype).min)


def _signed(scale: Tensor, sign: Tensor | None) -> Tensor:
    return scale if sign is None else scale * sign


def absorb(
    log_key: Tensor,  # (b, h, s, f|1)
    sign_key: Tensor | None,  # (b, h, s | 1, f)
    value: Tensor,  # (b, h, s, e + 1)
) -> AttentionState:
    """The state of a block of keys and values."""
    log_scale = log_key.detach().amax(dim=-2)
    phi = (log_key - _finite(log_scale).unsqueeze(-2)).exp_()
    if sign_key is not None and sign_key.shape[-2] == 1:
        # Signs of features alone, whatever the key: they go to the sums, whose last column is the magnitude without.
        sums = phi.mT @ value
        signed = sums * sign_key.mT
        return AttentionState(log_scale, signed, sums.detach()[..., -1].expand(signed.shape[:-1]))
    phi = _signed(phi, sign_key)
    return AttentionState(log_scale, phi.mT @ value, None if sign_key is None else phi.detach().abs().sum(-2))


def merge(a: AttentionState, b: AttentionState) -> AttentionState:
    """The state of the keys of ``a`` and ``b`` together: associative and commutative up to rounding."""
    log_scale = torch.maximum(a.log_scale, b.log_scale)
    ra, rb = (torch.exp(x.log_scale - _finite(log_scale)) for x in (a, b))
    magnitude = None
    if a.magnitude is not None and b.magnitude is not None:
        magnitude = ra * a.magnitude + rb * b.magnitude
    return AttentionState(log_scale, ra.unsqueeze(-1) * a.sums + rb.unsqueeze(-1) * b.sums, magnitude)


def _divide(
    sums: Tensor,  # (b, h, n, e + 1)
    magnitude: Tensor | None,  # (b, h, n, 1) for signed features
) -> tuple[Tensor, Tensor | None]:
    """Numerator over denominator, 0 where no key was seen; signed denominators are kept away from 0."""
    numerator, denominator = sums[..., :-1], sums[..., -1:]
    if magnitude is None:
        # Not "> 0": a NaN must reach the output. Where no key was seen the numerator is 0 already.
        return numerator / denominator.masked_fill(denominator == 0, 1.0), None
    floor = UNSAFE_RATIO * magnitude
    unsafe = denominator.detach().abs() < floor
    safe = torch.where(unsafe, torch.where(denominator < 0, -floor, floor), denominator)
    return numerator / safe.masked_fill(magnitude == 0, 1.0), unsafe.squeeze(-1)


def readout(
    log_query: Tensor,  # (b, h, n, f|1)
    sign_query: Tensor | None,  # (b, h, n, f)
    state: AttentionState,
) -> tuple[Tensor, Tensor | None]:
    """Queries attend to everything in the state.

    Returns:
        Output, (b, h, n, e), 0 where the state is empty; and for signed features which denominators were
        unsafe, (b, h, n) bool.
    """
    if state.magnitude is None:
        return _divide(_query_features(log_query, sign_query, state.log_scale) @ state.sums, None)
    magnitude = state.magnitude.unsqueeze(-1)
    # A factor of all features of a query cancels, in the gradient too: with their sum at 1 it is one pass, not three.
    phi = (log_query + _finite(state.log_scale).unsqueeze(-2)).softmax(-1)
    if sign_query is None:
        sums, magnitude = torch.tensor_split(phi @ torch.cat((state.sums, magnitude), -1), [-1], -1)
        return _divide(sums, magnitude.detach())
    phi = phi * sign_query
    return _divide(phi @ state.sums, phi.detach().abs() @ magnitude)


def _query_features(log_query: Tensor, sign_query: Tensor | None, log_scale: Tensor) -> Tensor:
    """phi(q) relative to the keys' scale and to its own largest term."""
    shifted = log_query + log_scale.unsqueeze(-2)
    reference = _finite(shifted.detach().amax(-1, keepdim=True))
    return _signed(shifted.sub_(reference).exp_(), sign_query)


def advance(
    log_query: Tensor,  # (b * h, g * c, f|1), the chunk's queries
    sign_query: Tensor | None,  # (b * h, g * c, f)
    log_key: Tensor,  # (b * h, c, f|1), the chunk's keys
    sign_key: Tensor | None,  # (b * h, c | 1, f)
    value: Tensor,  # (b * h, c, e + 1)
    state: AttentionState,  # of (b * h)
) -> tuple[Tensor, Tensor | None, AttentionState]:
    """One causal chunk: query t attends to the state and to the chunk's keys up to t.

    Batch and heads are one dimension: the products then fuse with their sums.
    The chunk's products share one reference per feature, the maximum over state **and** chunk. Where a
    later key of the chunk is so much larger that an earlier row underflows, that row is computed again from
    pairwise log-features, so the output never depends on the future.

    Returns:
        Output, (b * h, g * c, e); unsafe denominators of signed features, (b * h, g * c); the state after the chunk.
    """
    chunk = log_key.shape[-2]
    log_scale = torch.maximum(state.log_scale, log_key.detach().amax(dim=-2))
    reference = _finite(log_scale)
    phi_k = _signed((log_key - reference.unsqueeze(-2)).exp_(), sign_key)
    carry = torch.exp(state.log_scale - reference)
    carried = carry.unsqueeze(-1) * state.sums
    phi_q = _query_features(log_query, sign_query, log_scale)
    scores = _past(phi_q @ phi_k.mT, chunk)
    sums = torch.baddbmm(phi_q @ carried, scores, value)

    magnitude = after_magnitude = None
    if state.magnitude is not None:
        abs_q, abs_k, held = phi_q.detach().abs(), phi_k.detach().abs(), carry * state.magnitude
        magnitude = _past(abs_q @ abs_k.mT, chunk).sum(-1, keepdim=True) + abs_q @ held.unsqueeze(-1)
        after_magnitude = held + abs_k.sum(-2)
    after = AttentionState(log_scale, torch.baddbmm(carried, phi_k.mT, value), after_magnitude)

    total = sums.detach()[..., -1:] if magnitude is None else magnitude
    if chunk > 1 and bool((total < UNDERFLOW).any()) and _lost_terms(total, log_key, state):
        return (*_advance_exactly(log_query, sign_query, log_key, sign_key, value, state), after)
    return (*_divide(sums, magnitude), after)


def _past(scores: Tensor, chunk: int) -> Tensor:  # (b, h, g * c, c)
    """Scores of keys up to each query, 0 for later ones."""
    if scores.shape[-2] == chunk:
        return scores.tril()
    return scores.reshape(*scores.shape[:-2], -1, chunk, chunk).tril().reshape(scores.shape)


def _lost_terms(total: Tensor, log_key: Tensor, state: AttentionState) -> bool:
    """Whether a row that has keys to attend to lost them to underflow; rows without any are rightly 0."""
    key_exists = (log_key > NEGATIVE_INFINITY).any(-1).cummax(-1).values  # (b * h, c)
    state_exists = (state.log_scale > NEGATIVE_INFINITY).any(-1, keepdim=True)
    groups = total.shape[-2] // log_key.shape[-2]
    row_has_key = (key_exists | state_exists).repeat(1, groups)
    return bool(((total.squeeze(-1) < UNDERFLOW) & row_has_key).any())


def _advance_exactly(
    log_query: Tensor,
    sign_query: Tensor | None,
    log_key: Tensor,
    sign_key: Tensor | None,
    value: Tensor,
    state: AttentionState,
) -> tuple[Tensor, Tensor | None]:
    """The rows of one chunk, each with a reference of its own: c times the memory, no underflow at all."""
    rows, chunk = log_query.shape[-2], log_key.shape[-2]
    past = torch.ones(chunk, chunk, dtype=torch.bool, device=log_key.device).tril().repeat(rows // chunk, 1)
    step = max(1, FALLBACK_ELEMENTS // max(1, state.sums[..., 0].numel() * chunk))
    outputs, flags = [], []
    for block in blocks(rows, step):
        lq = log_query[..., block, :]
        sq = None if sign_query is None else sign_query[..., block, :]
        pair = lq.unsqueeze(-2) + log_key.unsqueeze(-3)  # (b * h, r, c, f|1)
        pair = pair.masked_fill(~past[block].unsqueeze(-1), NEGATIVE_INFINITY)
        held = lq + state.log_scale.unsqueeze(-2)  # (b * h, r, f|1)
        top = torch.maximum(pair.detach().amax((-1, -2)), held.detach().amax(-1))
        top = _finite(top).unsqueeze(-1)  # (b * h, r, 1)
        terms = torch.exp(pair - top.unsqueeze(-1))
        terms = _signed(terms, None if sq is None else sq.unsqueeze(-2))
        terms = _signed(terms, None if sign_key is None else sign_key.unsqueeze(-3))
        phi = _signed(torch.exp(held - top), sq)
        magnitude = None
        if state.magnitude is not None:
            size = terms.detach().abs().sum((-1, -2)).unsqueeze(-1)
            magnitude = size + phi.detach().abs() @ state.magnitude.unsqueeze(-1)
        out, unsafe = _divide(terms.sum(-1) @ value + phi @ state.sums, magnitude)
        outputs.append(out)
        flags.append(unsafe)
    return torch.cat(outputs, dim=-2), concatenate_flags(flags, dim=-1)


def concatenate_flags(flags: list[Tensor | None], dim: int) -> Tensor | None:
    """Unsafe denominators of blocks as one tensor; None for positive features, which have none."""
    present = [flag for flag in flags if flag is not None]
    return torch.cat(present, dim=dim) if present else None


def flatten_heads(state: AttentionState) -> AttentionState:  # of (b, h) -> of (b * h)
    """The state with batch and heads as one dimension, as :func:`advance` takes it."""
    return AttentionState(*(None if x is None else x.flatten(0, 1) for x in state))  # type: ignore[arg-type]


def unflatten_heads(state: AttentionState, heads: int) -> AttentionState:  # of (b * h) -> of (b, h)
    """The inverse of :func:`flatten_heads`."""
    parts = (None if x is None else x.reshape(-1, heads, *x.shape[1:]) for x in state)
    return AttentionState(*parts)  # type: ignore[arg-type]


def empty_state(
    batch: int,
    heads: int,
    features: int,
    value_dim: int,
    *,
    scales: int | None = None,
    signed: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> AttentionState:
    """The state before the first key; ``scales`` is 1 where all features of a token share their log."""
    return AttentionState(
        torch.full((batch, heads, scales or features), NEGATIVE_INFINITY, device=device, dtype=dtype),
        torch.zeros(batch, heads, features, value_dim + 1, device=device, dtype=dtype),
        torch.zeros(batch, heads, features, device=device, dtype=dtype) if signed else None,
    )
