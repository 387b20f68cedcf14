r"""Attention as a running state: absorb keys, merge states, read out queries, advance causally.

Legend of shapes, here and in every file that uses features:
    b batch   h key heads   g query heads per key head   n queries   s keys   d head dim   f features   e value dim

Features are given as ``sign * exp(log)``. ``log`` may end in 1 instead of f where all features of a token
share it (trigonometric features); ``sign`` is ``None`` where it is 1 (positive features). Grouped queries are
folded into the token dimension, (b, h, g * n, ...), so that one key state serves all of them.

Scale is removed in one place only: each feature of the keys by its running maximum M, each query by
:math:`c = \max_i(\ell^q_i + M_i)`. Both cancel exactly between numerator and denominator, so neither needs an
epsilon and neither carries a gradient. With positive features the denominator is at least 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
        log_scale: Running maximum M of the keys' log-features, -inf before the first key, (b, h, f) or (b, h, 1).
        value_sum: sum_n phi(k_n) v_n / exp(M), (b, h, f, e).
        weight_sum: sum_n phi(k_n) / exp(M), (b, h, f).
        magnitude: sum_n |phi(k_n)| / exp(M), (b, h, f), or None for positive features, where it is weight_sum.
    """

    log_scale: Tensor
    value_sum: Tensor
    weight_sum: Tensor
    magnitude: Tensor | None = None


def _finite_or_zero(x: Tensor) -> Tensor:
    return torch.where(x > NEGATIVE_INFINITY, x, 0.0)


def _scaled(log: Tensor, sign: Tensor | None, reference: Tensor) -> Tensor:
    scale = torch.exp(log - reference)
    return scale if sign is None else scale * sign


def absorb(
    log_key: Tensor,  # (b, h, s, f|1)
    sign_key: Tensor | None,  # (b, h, s, f)
    value: Tensor,  # (b, h, s, e)
) -> AttentionState:
    """The state of a block of keys and values."""
    log_scale = log_key.detach().amax(dim=-2)
    phi = _scaled(log_key, sign_key, _finite_or_zero(log_scale).unsqueeze(-2))
    weight_sum = phi.sum(-2)
    magnitude = None if sign_key is None else phi.detach().abs().sum(-2)
    return AttentionState(log_scale, phi.transpose(-1, -2) @ value, weight_sum, magnitude)


def merge(a: AttentionState, b: AttentionState) -> AttentionState:
    """The state of the keys of ``a`` and ``b`` together: associative and commutative up to rounding."""
    log_scale = torch.maximum(a.log_scale, b.log_scale)
    reference = _finite_or_zero(log_scale)
    ra, rb = torch.exp(a.log_scale - reference), torch.exp(b.log_scale - reference)
    magnitude = None
    if a.magnitude is not None and b.magnitude is not None:
        magnitude = ra * a.magnitude + rb * b.magnitude
    return AttentionState(
        log_scale,
        ra.unsqueeze(-1) * a.value_sum + rb.unsqueeze(-1) * b.value_sum,
        ra * a.weight_sum + rb * b.weight_sum,
        magnitude,
    )


def _divide(
    numerator: Tensor,  # (b, h, n, e)
    denominator: Tensor,  # (b, h, n)
    magnitude: Tensor | None,  # (b, h, n) for signed features
) -> tuple[Tensor, Tensor | None]:
    """The quotient, 0 where no key was seen; signed denominators are kept away from 0."""
    unsafe = None
    if magnitude is None:
        seen = denominator != 0  # not "> 0": a NaN must reach the output
        safe = torch.where(seen, denominator, 1.0)
    else:
        seen = magnitude != 0
        floor = UNSAFE_RATIO * magnitude
        unsafe = seen & (denominator.detach().abs() < floor)
        pushed = torch.where(denominator < 0, -floor, floor)
        safe = torch.where(seen, torch.where(unsafe, pushed, denominator), 1.0)
    out = torch.where(seen.unsqueeze(-1), numerator / safe.unsqueeze(-1), 0.0)
    return out, unsafe


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
    shifted = log_query + state.log_scale.unsqueeze(-2)
    phi = _scaled(shifted, sign_query, _finite_or_zero(shifted.detach().amax(-1, keepdim=True)))
    magnitude = None
    if state.magnitude is not None:
        magnitude = (phi.detach().abs() @ state.magnitude.unsqueeze(-1)).squeeze(-1)
    denominator = (phi @ state.weight_sum.unsqueeze(-1)).squeeze(-1)
    return _divide(phi @ state.value_sum, denominator, magnitude)


def advance(
    log_query: Tensor,  # (b, h, g * c, f|1), the chunk's queries
    sign_query: Tensor | None,  # (b, h, g * c, f)
    log_key: Tensor,  # (b, h, c, f|1), the chunk's keys
    sign_key: Tensor | None,  # (b, h, c, f)
    value: Tensor,  # (b, h, c, e)
    state: AttentionState,
) -> tuple[Tensor, Tensor | None, AttentionState]:
    """One causal chunk: query t attends to the state and to the chunk's keys up to t.

    The chunk's products share one reference per feature, the maximum over state **and** chunk. Where a
    later key of the chunk is so much larger that an earlier row underflows, that row is computed again from
    pairwise log-features, so the output never depends on the future.

    Returns:
        Output, (b, h, g * c, e); unsafe denominators of signed features, (b, h, g * c); the state after the chunk.
    """
    rows, keys = log_query.shape[-2], log_key.shape[-2]
    log_scale = torch.maximum(state.log_scale, log_key.detach().amax(dim=-2))
    reference = _finite_or_zero(log_scale).unsqueeze(-2)

    phi_k = _scaled(log_key, sign_key, reference)
    carried = torch.exp(state.log_scale.unsqueeze(-2) - reference).squeeze(-2)
    value_sum = carried.unsqueeze(-1) * state.value_sum
    weight_sum = carried * state.weight_sum

    shifted = log_query + log_scale.unsqueeze(-2)
    phi_q = _scaled(shifted, sign_query, _finite_or_zero(shifted.detach().amax(-1, keepdim=True)))
    past = torch.ones(keys, keys, dtype=torch.bool, device=log_key.device).tril().repeat(rows // keys, 1)
    scores = (phi_q @ phi_k.transpose(-1, -2)) * past
    numerator = scores @ value + phi_q @ value_sum
    denominator = scores.sum(-1) + (phi_q @ weight_sum.unsqueeze(-1)).squeeze(-1)

    magnitude = after_magnitude = None
    if state.magnitude is not None:
        abs_q, abs_k = phi_q.detach().abs(), phi_k.detach().abs()
        carried_magnitude = carried * state.magnitude
        magnitude = ((abs_q @ abs_k.transpose(-1, -2)) * past).sum(-1)
        magnitude = magnitude + (abs_q @ carried_magnitude.unsqueeze(-1)).squeeze(-1)
        after_magnitude = carried_magnitude + abs_k.sum(-2)
    after = AttentionState(
        log_scale,
        value_sum + phi_k.transpose(-1, -2) @ value,
        weight_sum + phi_k.sum(-2),
        after_magnitude,
    )

    total = denominator if magnitude is None else magnitude
    if keys > 1 and bool((total.detach() < UNDERFLOW).any()) and _lost_terms(total, log_key, state, past):
        exact = _advance_exactly(log_query, sign_query, log_key, sign_key, value, state, past)
        return (*exact, after)
    return (*_divide(numerator, denominator, magnitude), after)


def _lost_terms(total: Tensor, log_key: Tensor, state: AttentionState, past: Tensor) -> bool:
    """Whether a row that has keys to attend to lost them to underflow; rows without any are rightly 0."""
    key_exists = (log_key > NEGATIVE_INFINITY).any(-1)
    state_exists = (state.log_scale > NEGATIVE_INFINITY).any(-1, keepdim=True)
    row_has_key = (key_exists.unsqueeze(-2) & past).any(-1) | state_exists
    return bool(((total < UNDERFLOW) & row_has_key).any())


def _advance_exactly(
    log_query: Tensor,
    sign_query: Tensor | None,
    log_key: Tensor,
    sign_key: Tensor | None,
    value: Tensor,
    state: AttentionState,
    past: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """The rows of one chunk, each with a reference of its own: c times the memory, no underflow at all."""
    b, h, rows, _ = log_query.shape
    f = state.weight_sum.shape[-1]
    step = max(1, FALLBACK_ELEMENTS // max(1, b * h * log_key.shape[-2] * f))
    outputs, flags = [], []
    for start in range(0, rows, step):
        block = slice(start, start + step)
        lq = log_query[:, :, block]
        sq = None if sign_query is None else sign_query[:, :, block]
        pair = lq.unsqueeze(-2) + log_key.unsqueeze(-3)  # (b, h, r, c, f|1)
        pair = pair.masked_fill(~past[block].unsqueeze(-1), NEGATIVE_INFINITY)
        held = lq + state.log_scale.unsqueeze(-2)  # (b, h, r, f|1)
        top = torch.maximum(pair.detach().amax((-1, -2)), held.detach().amax(-1))
        top = _finite_or_zero(top).unsqueeze(-1)  # (b, h, r, 1)
        terms = torch.exp(pair - top.unsqueeze(-1))
        phi = _scaled(held, sq, top)
        sign = None if sq is None else sq.unsqueeze(-2)
        if sign_key is not None:
            sign = sign_key.unsqueeze(-3) if sign is None else sign * sign_key.unsqueeze(-3)
        scores = (terms if sign is None else terms * sign).sum(-1)
        numerator = scores @ value + phi @ state.value_sum
        denominator = scores.sum(-1) + (phi @ state.weight_sum.unsqueeze(-1)).squeeze(-1)
        magnitude = None
        if state.magnitude is not None:
            size = terms.detach() if sign is None else (terms * sign).detach().abs()
            magnitude = size.sum((-1, -2))
            magnitude = magnitude + (phi.detach().abs() @ state.magnitude.unsqueeze(-1)).squeeze(-1)
        out, unsafe = _divide(numerator, denominator, magnitude)
        outputs.append(out)
        flags.append(unsafe)
    joined = None if flags[0] is None else torch.cat([flag for flag in flags if flag is not None], dim=2)
    return torch.cat(outputs, dim=2), joined


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
    weight_sum = torch.zeros(batch, heads, features, device=device, dtype=dtype)
    return AttentionState(
        torch.full((batch, heads, scales or features), NEGATIVE_INFINITY, device=device, dtype=dtype),
        torch.zeros(batch, heads, features, value_dim, device=device, dtype=dtype),
        weight_sum,
        torch.zeros_like(weight_sum) if signed else None,
    )
