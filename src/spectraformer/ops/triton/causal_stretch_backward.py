# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Causal backward of queries by stretches, from what the forward kept of each: see ``causal_stretches``.

With features :math:`f_{in}` of keys relative to R, the log-sum-exp of the keys before the stretch, weights
:math:`p_{ti} = e^{\ell^q_{ti} + R_i - L_t}` of queries, L their log-sum-exps, and sums :math:`S_i, Z_i` over all keys
before a tile relative to R, primes for gradients:

.. math::
    D_{ti} = p_{ti} \Bigl(o'_t\cdot S_i - \delta_t Z_i + \sum_{n \le t} f_{in} (o'_t\cdot v_n - \delta_t)\Bigr),
    \quad \delta_t = o'_t\cdot o_t, \quad q' = D u, \quad u' = D^\top q, \quad a' = D^\top 1.

What queries of a stretch leave for earlier keys is :math:`\sum_t p_{ti} o'_t` and :math:`\sum_t p_{ti} \delta_t`: at
most 1 is the weight of a past in a query, so these sums stay in the range of floating point whatever the keys are.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectraformer.ops.triton.causal_stretches import locate_stretch
from spectraformer.ops.triton.causal_tiles import SIZES, load_landmark_weight, load_normaliser, load_reference
from spectraformer.ops.triton.tiles import (
    LOG2_E,
    NARROW,
    exponent_parts,
    load_keys,
    load_quadratic,
    load_tile,
    load_vector,
    quadratic_weight,
    rounded,
    store_tile,
    store_vector,
)


@triton.jit(do_not_specialize=SIZES)
def stretch_sums_kernel(
    query, query_landmarks, landmark_bias,
    log_sum,  # (b h, stretches + 1, m) float32, units of log 2: before each stretch and after the last
    first,  # (b h, stretches, m) float32, units of log 2: what features are relative to
    out,  # (b h g, n, e)
    grad,  # (b, h g, n, e)
    query_log_sum,  # (b h g, n) float32, units of log 2
    delta,  # (b h g, n) float32
    left_value,  # (b h g, stretches, m, e) float32: sums over the queries of a stretch of weight times gradient
    left_delta,  # (b h g, stretches, m) float32: of weight times delta
    query_batch, query_head, query_row, grad_batch, grad_head, grad_row, query_landmarks_batch, query_landmarks_head,
    query_landmarks_row, landmark_bias_batch, landmark_bias_head, heads, groups, n, span, middle, stretches,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr, LANDMARKS: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, PRODUCT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A block of landmarks, along the rows; a stretch of a query head."""
    program = tl.program_id(0)
    block = program % BLOCKS
    stretch, begin, end, flat_query, flat, group = locate_stretch(
        program // BLOCKS, tl.num_programs(0) // BLOCKS, stretches, groups, span, middle, n, EARLY
    )
    batch, head = flat // heads, flat % heads
    query += batch * query_batch + (head * groups + group) * query_head
    grad += batch * grad_batch + (head * groups + group) * grad_head
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head
    out += flat_query * n * E
    query_log_sum += flat_query * n
    delta += flat_query * n

    row, landmark = tl.arange(0, TOKENS), block * LANDMARKS + tl.arange(0, LANDMARKS)
    u = load_tile(query_landmarks, landmark, query_landmarks_row, M, D, D_PADDED).to(query.dtype.element_ty)
    reference, _held = load_reference(
        log_sum + (flat * (stretches + 1) + stretch) * M, first + (flat * stretches + stretch) * M, landmark, M
    )
    own = load_landmark_weight(landmark_bias, reference, landmark, M)
    left = tl.zeros((LANDMARKS, E_PADDED), tl.float32)
    left_inner = tl.zeros((LANDMARKS,), tl.float32)
    for start in tl.range(begin, end, TOKENS, num_stages=STAGES):
        offset = tl.cast(start, tl.int64)
        rows = n - start
        if EVEN:
            rows = None
        q = load_tile(query + offset * query_row, row, query_row, rows, D, D_PADDED)
        do = load_tile(grad + offset * grad_row, row, grad_row, rows, E, E_PADDED)
        result = load_tile(out + offset * E, row, E, rows, E, E_PADDED)
        inner = tl.sum(do.to(tl.float32) * result.to(tl.float32), 1)
        if block == 0:
            store_vector(delta + start, row, rows, inner)
        normaliser = load_normaliser(query_log_sum + start, row, rows)
        logits = tl.dot(u, tl.trans(q), input_precision=PRECISION) * LOG2_E
        p = tl.exp2(logits + own[:, None] - normaliser[None, :])
        # Of the rounded weights, as the other sums are: an error common to both cancels.
        left_inner += tl.sum(rounded(p, PRODUCT) * inner[None, :], 1)
        left = tl.dot(p.to(PRODUCT), do.to(PRODUCT), left, input_precision=PRECISION)
    place = (flat_query * stretches + stretch) * M
    tl.store(left_delta + place + landmark, left_inner, mask=landmark < M)
    store_tile(left_value + place * E, landmark, E, M, left, E, E_PADDED)


@triton.jit(do_not_specialize=SIZES)
def stretch_query_backward_kernel(
    query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic,
    entering_mean,  # (b h, stretches, m, e) float32
    log_sum,  # (b h, stretches + 1, m) float32, units of log 2
    first,  # (b h, stretches, m) float32, units of log 2
    grad,  # (b, h g, n, e)
    query_log_sum,  # (b h g, n) float32, units of log 2
    delta,  # (b h g, n) float32
    grad_query,  # (b h g, n, d); of earlier blocks of landmarks before
    grad_query_logits,  # (b h g, n, m), or None
    grad_landmark_bias,  # (b h, g, stretches, m) float32, or None
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row, grad_batch,
    grad_head, grad_row, query_landmarks_batch, query_landmarks_head, query_landmarks_row, key_landmarks_batch,
    key_landmarks_head, key_landmarks_row, landmark_bias_batch, landmark_bias_head, key_bias_batch, key_bias_head,
    key_quadratic_batch, key_quadratic_head, heads, groups, n, span, middle, stretches,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, LANDMARKS: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, PRODUCT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A block of landmarks, a stretch of a query head, tile after tile."""
    stretch, begin, end, flat_query, flat, group = locate_stretch(
        tl.program_id(0), tl.num_programs(0), stretches, groups, span, middle, n, EARLY
    )
    batch, head = flat // heads, flat % heads
    query += batch * query_batch + (head * groups + group) * query_head
    grad += batch * grad_batch + (head * groups + group) * grad_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    key_landmarks += batch * key_landmarks_batch + head * key_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head
    query_log_sum += flat_query * n
    delta += flat_query * n
    grad_query += flat_query * n * D

    row, landmark = tl.arange(0, TOKENS), BLOCK * LANDMARKS + tl.arange(0, LANDMARKS)
    u = load_tile(query_landmarks, landmark, query_landmarks_row, M, D, D_PADDED).to(query.dtype.element_ty)
    w = load_tile(key_landmarks, landmark, key_landmarks_row, M, D, D_PADDED).to(key.dtype.element_ty)
    of_logits = u.to(PRODUCT)
    reference, total = load_reference(
        log_sum + (flat * (stretches + 1) + stretch) * M, first + (flat * stretches + stretch) * M, landmark, M
    )
    state = load_tile(entering_mean + (flat * stretches + stretch) * M * E, landmark, E, M, E, E_PADDED)
    own = load_landmark_weight(landmark_bias, reference, landmark, M)
    top = tl.max(own, 0)
    # A bias may remove all landmarks of the block.
    top = tl.where(top == float("-inf"), 0.0, top)
    parts = exponent_parts(own - top, PRODUCT)
    if key_quadratic is not None:
        quadratic = load_quadratic(key_quadratic, D, D_PADDED)
    ones = tl.full((TOKENS, NARROW), 1.0, PRODUCT)
    of_bias = tl.zeros((LANDMARKS,), tl.float32)
    for start in tl.range(begin, end, TOKENS, num_stages=STAGES):
        offset = tl.cast(start, tl.int64)
        rows = n - start
        if EVEN:
            rows = None
        k, v, weight = load_keys(
            key, value, key_bias, None, start, rows, key_row, value_row, D, E, D_PADDED, E_PADDED, TOKENS
        )
        do = load_tile(grad + offset * grad_row, row, grad_row, rows, E, E_PADDED).to(PRODUCT)
        inner = load_vector(delta + start, row, rows, 0.0)
        normaliser = load_normaliser(query_log_sum + start, row, rows)
        if key_quadratic is not None:
            weight += quadratic_weight(k, quadratic)
        v = v.to(PRODUCT)
        logits = tl.dot(w, tl.trans(k), input_precision=PRECISION)
        features = tl.exp2(logits * LOG2_E + weight[None, :] - reference[:, None])
        gained = tl.sum(features, 1)
        features = features.to(PRODUCT)
        entering = state.to(PRODUCT)
        # The state first: what comes after it needs the registers of the features.
        state = tl.dot(features, v, state, input_precision=PRECISION)
        pairs = tl.dot(do, tl.trans(v), input_precision=PRECISION) - inner[:, None]
        pairs = tl.where(row[:, None] >= row[None, :], pairs, 0.0).to(PRODUCT)
        ds = tl.dot(do, tl.trans(entering), input_precision=PRECISION)
        ds = tl.dot(pairs, tl.trans(features), ds, input_precision=PRECISION)
        ds -= inner[:, None] * total[None, :]
        total += gained
        # Not before: where nothing is copied ahead, queries take the place of keys.
        q = load_tile(query + offset * query_row, row, query_row, rows, D, D_PADDED)
        logits = tl.dot(ones, tl.trans(parts), input_precision=PRECISION)
        logits = tl.dot(q, tl.trans(u), logits, input_precision=PRECISION)
        ds *= tl.exp2(logits * LOG2_E + (top - normaliser)[:, None])
        if grad_landmark_bias is not None:
            of_bias += tl.sum(ds, 0)
        ds = ds.to(PRODUCT)
        dq = tl.dot(ds, of_logits, input_precision=PRECISION)
        place = grad_query + offset * D
        if BLOCK > 0:
            dq += load_tile(place, row, D, rows, D, D_PADDED).to(tl.float32)
        store_tile(place, row, D, rows, dq, D, D_PADDED)
        if grad_query_logits is not None:
            tl.store(
                grad_query_logits + (flat_query * n + start + row)[:, None] * M + landmark[None, :],
                ds,
                mask=(row < n - start)[:, None] & (landmark < M)[None, :],
            )
    if grad_landmark_bias is not None:
        tl.store(grad_landmark_bias + (flat_query * stretches + stretch) * M + landmark, of_bias, mask=landmark < M)
