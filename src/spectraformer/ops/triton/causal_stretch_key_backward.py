# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Causal backward of keys by stretches: a program goes through one from its last tile to its first.

With features :math:`f_{in}` of keys and weights :math:`p_{ti}` of queries relative to one reference for the stretch,
see ``causal_stretch_backward``, and sums over all queries after a tile
:math:`T_i = \sum_t p_{ti} o'_t`, :math:`\rho_i = \sum_t p_{ti} \delta_t`, primes for gradients:

.. math::
    D_{in} = f_{in} \Bigl(T_i\cdot v_n - \rho_i + \sum_{t \ge n} p_{ti} (o'_t\cdot v_n - \delta_t)\Bigr), \quad
    v'_n = \sum_i f_{in} T_i + \sum_{t \ge n} \Bigl(\sum_i p_{ti} f_{in}\Bigr) o'_t,

.. math::
    k' = D^\top w + 2 C k\, D^\top 1, \quad t' = D^\top 1, \quad w' = D k.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectraformer.ops.triton.causal_stretches import locate_stretch
from spectraformer.ops.triton.causal_tiles import SIZES, load_landmark_weight, load_queries, load_reference
from spectraformer.ops.triton.tiles import (
    LOG2_E,
    NARROW,
    exponent_parts,
    load_key_bias,
    load_quadratic,
    load_rows,
    load_tile,
    load_vector,
    quadratic_weight,
    rounded,
    store_tile,
    store_vector,
)


@triton.jit
def merge_left(
    left_value,  # (g, stretches, m, e) float32: what queries of a stretch leave, relative to its reference
    left_delta,  # (g, stretches, m) float32
    log_sum,  # (stretches + 1, m) float32, units of log 2
    first,  # (stretches, m) float32, units of log 2
    grad_sums_after,  # (m, e + 1) float32, gradient of the sums after the last key, or None
    log_scale_after,  # (m,) float32, what they are relative to
    reference,  # (landmarks,) units of log 2
    begin, stretches, groups, landmark, M: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr,
):  # fmt: skip
    """What queries from a stretch on and sums after the last key leave for earlier keys: sums of values and deltas."""
    inside = landmark < M
    value = tl.zeros((landmark.shape[0], E_PADDED), tl.float32)
    delta = tl.zeros(landmark.shape, tl.float32)
    if grad_sums_after is not None:
        scale = tl.load(log_scale_after + landmark, mask=inside, other=0.0) * LOG2_E
        # Not above 1 unless there is no key, and then nothing comes of it.
        weight = tl.where(inside, tl.exp2(tl.minimum(reference - scale, 0.0)), 0.0)
        value += weight[:, None] * load_tile(grad_sums_after, landmark, E + 1, M, E, E_PADDED)
        delta -= weight * tl.load(grad_sums_after + landmark * (E + 1) + E, mask=inside, other=0.0)
    for i in range(begin * groups, stretches * groups):
        stretch, group = i // groups, i % groups
        other, _held = load_reference(log_sum + stretch * M, first + stretch * M, landmark, M)
        weight = tl.where(inside, tl.exp2(tl.minimum(reference - other, 0.0)), 0.0)
        place = (group * stretches + stretch) * M
        value += weight[:, None] * load_tile(left_value + place * E, landmark, E, M, E, E_PADDED)
        delta += weight * tl.load(left_delta + place + landmark, mask=inside, other=0.0)
    return value, delta


@triton.jit
def add_queries(u, q, do, normaliser, inner, own, later, PRECISION: tl.constexpr):
    """Weights of a tile of queries, landmarks along the rows, the sums with what they leave, and that of deltas."""
    logits = tl.dot(u, tl.trans(q), input_precision=PRECISION) * LOG2_E
    p = tl.exp2(logits + own[:, None] - normaliser[None, :])
    # Of the rounded weights, as the other sums are: an error common to both cancels.
    gained = tl.sum(rounded(p, do.dtype) * inner[None, :], 1)
    p = p.to(do.dtype)
    return p, tl.dot(p, do, later, input_precision=PRECISION), gained


@triton.jit
def load_weighted_keys(
    key, key_row, weight, quadratic, row, present, D: tl.constexpr, D_PADDED: tl.constexpr
):  # fmt: skip
    """A tile of keys, and what every landmark adds to their logits; the pointer is at its first row."""
    k = load_rows(key, row, key_row, present, D, D_PADDED)
    if quadratic is not None:
        weight += quadratic_weight(k, quadratic)
    return k, weight


@triton.jit
def key_features(k, w, ones, parts, weight, PRECISION: tl.constexpr):
    """Features of a tile of keys, keys along the rows; parts are those of what they are relative to, negative."""
    logits = tl.dot(ones, tl.trans(parts), input_precision=PRECISION)
    logits = tl.dot(k, tl.trans(w), logits, input_precision=PRECISION)
    return tl.exp2(logits * LOG2_E + weight[:, None])


@triton.jit
def add_to_value_gradient(dv, features, p, do, row, PRECISION: tl.constexpr):
    """What queries of the tile that see its keys add."""
    scores = tl.dot(features, p, input_precision=PRECISION)
    scores = tl.where(row[:, None] <= row[None, :], scores, 0.0).to(p.dtype)
    return tl.dot(scores, do, dv, input_precision=PRECISION)


@triton.jit
def add_to_logit_gradient(ds, v, p, do, inner, row, PRECISION: tl.constexpr):
    """Likewise, before the product with the features."""
    pairs = tl.dot(v, tl.trans(do), input_precision=PRECISION) - inner[None, :]
    pairs = tl.where(row[:, None] <= row[None, :], pairs, 0.0).to(p.dtype)
    return tl.dot(pairs, tl.trans(p), ds, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def stretch_key_backward_kernel(
    query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic,
    log_sum,  # (b h, stretches + 1, m) float32, units of log 2
    first,  # (b h, stretches, m) float32, units of log 2
    grad,  # (b, h g, n, e)
    query_log_sum,  # (b h g, n) float32, units of log 2
    delta,  # (b h g, n) float32
    left_value,  # (b h g, stretches, m, e) float32
    left_delta,  # (b h g, stretches, m) float32
    grad_sums_after,  # (b h, m, e + 1) float32, or None
    log_scale_after,  # (b h, m) float32
    grad_key,  # (b h, n, d); of earlier blocks of landmarks before, as what follows; or None, as what follows but one
    grad_value,  # (b h, n, e), or None
    grad_key_bias,  # (b h, n) float32, or None
    grad_key_quadratic,  # (b h, stretches, blocks, d) float32, or None
    grad_key_logits,  # (b h, n, m), or None
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row, grad_batch,
    grad_head, grad_row, query_landmarks_batch, query_landmarks_head, query_landmarks_row, key_landmarks_batch,
    key_landmarks_head, key_landmarks_row, landmark_bias_batch, landmark_bias_head, key_bias_batch, key_bias_head,
    key_quadratic_batch, key_quadratic_head, heads, groups, n, span, middle, stretches,
    ONE_GROUP: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, LANDMARKS: tl.constexpr, TOKENS: tl.constexpr,
    EARLY: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PRODUCT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A block of landmarks, a stretch of a key head, queries of all its query heads.

    Gradients of keys and of values are a launch each: for both at once registers do not suffice by far.
    """
    stretch, begin, end, flat, _flat, _group = locate_stretch(
        tl.program_id(0), tl.num_programs(0), stretches, 1, span, middle, n, EARLY
    )
    batch, head = flat // heads, flat % heads
    query += batch * query_batch + head * groups * query_head
    grad += batch * grad_batch + head * groups * grad_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    key_landmarks += batch * key_landmarks_batch + head * key_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head
    log_sum += flat * (stretches + 1) * M
    first += flat * stretches * M
    query_log_sum += flat * groups * n
    delta += flat * groups * n
    if grad_sums_after is not None:
        grad_sums_after += flat * M * (E + 1)
        log_scale_after += flat * M

    row, landmark = tl.arange(0, TOKENS), BLOCK * LANDMARKS + tl.arange(0, LANDMARKS)
    inside = landmark < M
    u = load_tile(query_landmarks, landmark, query_landmarks_row, M, D, D_PADDED).to(query.dtype.element_ty)
    w = load_tile(key_landmarks, landmark, key_landmarks_row, M, D, D_PADDED).to(key.dtype.element_ty)
    of_logits = w.to(PRODUCT)
    reference, _held = load_reference(log_sum + stretch * M, first + stretch * M, landmark, M)
    later, later_inner = merge_left(
        left_value + flat * groups * stretches * M * E, left_delta + flat * groups * stretches * M, log_sum, first,
        grad_sums_after, log_scale_after, reference, stretch + 1, stretches, groups, landmark, M, E, E_PADDED,
    )  # fmt: skip
    own = load_landmark_weight(landmark_bias, reference, landmark, M)
    parts = exponent_parts(-reference, PRODUCT)
    column = tl.arange(0, D_PADDED)
    quadratic = key_quadratic
    if key_quadratic is not None:
        quadratic = load_quadratic(key_quadratic, D, D_PADDED)
    ones = tl.full((TOKENS, NARROW), 1.0, PRODUCT)
    of_quadratic = tl.zeros((D_PADDED,), tl.float32)
    last = begin + (tl.cdiv(end - begin, TOKENS) - 1) * TOKENS
    for back in tl.range(begin, end, TOKENS, num_stages=STAGES):
        start = last - (back - begin)
        offset = tl.cast(start, tl.int64)
        rows = n - start
        if EVEN:
            rows = None
        weight, present = tl.zeros((TOKENS,), tl.float32), None
        if EVEN == 0:
            weight = load_key_bias(key_bias, start, row, rows)
            # Not "> -inf": a NaN must show.
            present = weight != float("-inf")
        if STAGES > 1:  # copied ahead all together
            k, weight = load_weighted_keys(
                key + offset * key_row, key_row, weight, quadratic, row, present, D, D_PADDED
            )
        entering = later.to(PRODUCT)
        if ONE_GROUP:
            q, do, normaliser, inner = load_queries(
                query + offset * query_row, grad + offset * grad_row, query_log_sum + start, delta + start, row, rows,
                query_row, grad_row, D, E, D_PADDED, E_PADDED, PRODUCT,
            )  # fmt: skip
            # The sums first: what comes after it needs the registers.
            p, later, gained = add_queries(u, q, do, normaliser, inner, own, later, PRECISION)
        if grad_value is not None:
            if STAGES == 1:
                k, weight = load_weighted_keys(
                    key + offset * key_row, key_row, weight, quadratic, row, present, D, D_PADDED
                )
            features = key_features(k, w, ones, parts, weight, PRECISION).to(PRODUCT)
            dv = tl.dot(features, entering, input_precision=PRECISION)
            if ONE_GROUP:
                dv = add_to_value_gradient(dv, features, p, do, row, PRECISION)
        if grad_key is not None:
            v = load_rows(value + offset * value_row, row, value_row, present, E, E_PADDED).to(PRODUCT)
            ds = tl.dot(v, tl.trans(entering), input_precision=PRECISION)
            ds -= later_inner[None, :]
            if ONE_GROUP:
                ds = add_to_logit_gradient(ds, v, p, do, inner, row, PRECISION)
                later_inner += gained
        if ONE_GROUP == 0:
            for group in range(groups):
                index = tl.cast(group, tl.int64)
                q, do, normaliser, inner = load_queries(
                    query + index * query_head + offset * query_row, grad + index * grad_head + offset * grad_row,
                    query_log_sum + index * n + start, delta + index * n + start, row, rows, query_row, grad_row,
                    D, E, D_PADDED, E_PADDED, PRODUCT,
                )  # fmt: skip
                p, later, gained = add_queries(u, q, do, normaliser, inner, own, later, PRECISION)
                later_inner += gained
                if grad_value is not None:
                    dv = add_to_value_gradient(dv, features, p, do, row, PRECISION)
                if grad_key is not None:
                    ds = add_to_logit_gradient(ds, v, p, do, inner, row, PRECISION)
        if grad_value is not None:
            place = grad_value + (flat * n + offset) * E
            if BLOCK > 0:
                dv += load_tile(place, row, E, rows, E, E_PADDED).to(tl.float32)
            store_tile(place, row, E, rows, dv, E, E_PADDED)
        if grad_key is not None:
            if STAGES == 1:
                # Not before: they take the place of queries.
                k, weight = load_weighted_keys(
                    key + offset * key_row, key_row, weight, quadratic, row, present, D, D_PADDED
                )
            # Not before, either: registers.
            ds *= key_features(k, w, ones, parts, weight, PRECISION)
            dt = tl.sum(ds, 1)
            ds = ds.to(PRODUCT)
            dk = tl.dot(ds, of_logits, input_precision=PRECISION)
            if key_quadratic is not None:
                wide = k.to(tl.float32)
                dk += 2 * dt[:, None] * quadratic[None, :] * wide
                if grad_key_quadratic is not None:
                    of_quadratic += tl.sum(dt[:, None] * wide * wide, 0)
            place = grad_key + (flat * n + offset) * D
            if BLOCK > 0:
                dk += load_tile(place, row, D, rows, D, D_PADDED).to(tl.float32)
            store_tile(place, row, D, rows, dk, D, D_PADDED)
            if grad_key_bias is not None:
                if BLOCK > 0:
                    dt += load_vector(grad_key_bias + flat * n + start, row, rows, 0.0)
                store_vector(grad_key_bias + flat * n + start, row, rows, dt)
            if grad_key_logits is not None:
                tl.store(
                    grad_key_logits + (flat * n + start + row)[:, None] * M + landmark[None, :],
                    ds,
                    mask=(row < n - start)[:, None] & inside[None, :],
                )
    if grad_key_quadratic is not None:
        place_of_quadratic = ((flat * stretches + stretch) * BLOCKS + BLOCK) * D + column
        tl.store(grad_key_quadratic + place_of_quadratic, of_quadratic, mask=column < D)


@triton.jit(do_not_specialize=SIZES)
def given_sums_kernel(
    left_value, left_delta, log_sum, first, grad_sums_after, log_scale_after,  # as in stretch_key_backward_kernel
    log_scale,  # (b, h, m)
    grad_sums,  # (b h, m, e + 1) float32, gradient of the sums before the first key
    log_scale_batch, log_scale_head, heads, groups, stretches,
    M: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr, ROWS: tl.constexpr, ROW_BLOCKS: tl.constexpr,
):  # fmt: skip
    """A few landmarks of a key head."""
    program = tl.program_id(0)
    flat = tl.cast(program // ROW_BLOCKS, tl.int64)
    landmark = (program % ROW_BLOCKS) * ROWS + tl.arange(0, ROWS)
    inside = landmark < M
    log_sum += flat * (stretches + 1) * M
    first += flat * stretches * M
    if grad_sums_after is not None:
        grad_sums_after += flat * M * (E + 1)
        log_scale_after += flat * M
    reference, _held = load_reference(log_sum, first, landmark, M)
    value, delta = merge_left(
        left_value + flat * groups * stretches * M * E, left_delta + flat * groups * stretches * M, log_sum, first,
        grad_sums_after, log_scale_after, reference, 0, stretches, groups, landmark, M, E, E_PADDED,
    )  # fmt: skip
    scale = tl.load(
        log_scale + (flat // heads) * log_scale_batch + (flat % heads) * log_scale_head + landmark,
        mask=inside, other=float("-inf"),
    )  # fmt: skip
    weight = tl.exp2(scale * LOG2_E - reference)
    grad_sums += flat * M * (E + 1)
    store_tile(grad_sums, landmark, E + 1, M, value * weight[:, None], E, E_PADDED)
    tl.store(grad_sums + landmark * (E + 1) + E, -delta * weight, mask=inside)
