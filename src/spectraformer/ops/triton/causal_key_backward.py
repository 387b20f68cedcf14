# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Causal backward of keys, from the last chunk to the first: what later queries leave, in registers.

With features :math:`f_{in}` of keys and weights :math:`p_{ti}` of queries relative to the same past, primes for
gradients, :math:`b_{tn} = o'_t\cdot v_n - \delta_t`, and sums over the queries of later chunks
:math:`R_i = \sum_t p_{ti} o'_t`, :math:`\rho_i = \sum_t p_{ti} \delta_t`:

.. math::
    T_{in} = f_{in} \Bigl(R_i\cdot v_n - \rho_i + \sum_{t \ge n} p_{ti} b_{tn}\Bigr), \quad
    v'_n = \sum_i f_{in} R_i + \sum_{t \ge n} \Bigl(\sum_i p_{ti} f_{in}\Bigr) o'_t,

.. math::
    k' = T^\top w + 2 C k\, T^\top 1, \quad t' = T^\top 1, \quad w' = T k.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectraformer.ops.triton.causal_tiles import (
    SIZES,
    SUDDEN,
    finite,
    load_chunk,
    load_normaliser,
    load_state,
    load_token,
    log2,
    positive,
    store_state,
)
from spectraformer.ops.triton.tiles import LOG2_E, load_tile, store_tile


@triton.jit(do_not_specialize=SIZES)
def suffix_kernel(
    grad_sums,  # (b h, m, e + 1) float32, gradient of the sums after the last key, or None
    log_scale,  # (b h, m) float32, running maximum after the last key
    entering_total,  # (b h, segments, m) float32, or None where there is one segment
    entering_peak,
    part_value,  # (b h, segments - 1, g parts, m, e) float32, or None where there is one segment
    part_delta,  # (b h, segments - 1, g parts, m) float32
    suffix_value,  # (b h, segments, m, e) float32
    suffix_delta,  # (b h, segments, m) float32
    suffix_reference,  # (b h, segments, m) float32, units of log 2
    segments,
    parts,
    M: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What queries after each segment leave for it, from the last segment to the first."""
    program = tl.program_id(0)
    landmark = (program % tl.cdiv(M, ROWS)) * ROWS + tl.arange(0, ROWS)
    flat = tl.cast(program // tl.cdiv(M, ROWS), tl.int64)
    inside = landmark < M
    value = tl.zeros((ROWS, E_PADDED), tl.float32)
    delta = tl.zeros((ROWS,), tl.float32)
    reference = tl.load(log_scale + flat * M + landmark, mask=inside, other=0.0) * LOG2_E
    if grad_sums is not None:
        value = load_tile(grad_sums + flat * M * (E + 1), landmark, E + 1, M, E, E_PADDED)
        delta = -tl.load(grad_sums + (flat * M + landmark) * (E + 1) + E, mask=inside, other=0.0)
    place = flat * segments + segments - 1
    store_state(suffix_value, suffix_delta, suffix_reference, place, landmark, value, delta, reference, M, E, E_PADDED)
    if part_value is not None:
        for i in range(1, segments):
            segment = segments - 1 - i
            after = (flat * segments + segment + 1) * M + landmark
            total = tl.load(entering_total + after, mask=inside, other=1.0)
            entering = tl.load(entering_peak + after, mask=inside, other=0.0) + log2(positive(total))
            shrink = tl.exp2(entering - finite(reference))
            value, delta, reference = value * shrink[:, None], delta * shrink, entering
            for part in range(parts):
                piece = (flat * (segments - 1) + segment) * parts + part
                value += load_tile(part_value + piece * M * E, landmark, E, M, E, E_PADDED)
                delta += tl.load(part_delta + piece * M + landmark, mask=inside, other=0.0)
            place = flat * segments + segment
            store_state(
                suffix_value, suffix_delta, suffix_reference, place, landmark, value, delta, reference, M, E, E_PADDED
            )


@triton.jit(do_not_specialize=SIZES)
def key_sweep_kernel(
    query,
    key,
    value,
    query_landmarks,
    key_landmarks,
    landmark_bias,
    key_bias,
    key_quadratic,
    grad,  # (b, h g, n, e)
    query_log_sum,  # (b h g, n) float32, units of log 2
    delta,  # (b h g, n) float32
    reference,  # (b h, chunks, m) float32, units of log 2
    steepest,  # (b h, segments, blocks) float32, units of log 2
    suffix_value,  # (b h, segments, m, e) float32
    suffix_delta,  # (b h, segments, m) float32
    suffix_reference,  # (b h, segments, m) float32, units of log 2
    grad_key,  # (b h, blocks, n, d)
    grad_value,  # (b h, blocks, n, e)
    grad_key_bias,  # (b h, blocks, n) float32, or None
    grad_key_landmarks,  # (b h, segments, m, d) float32, or None
    grad_key_quadratic,  # (b h, segments blocks, d) float32, or None
    log_scale,  # (b, h, m) before the first key, or None
    grad_sums,  # (b h, m, e + 1) float32, of the sums before the first key, or None
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    grad_batch,
    grad_head,
    grad_row,
    query_landmarks_batch,
    query_landmarks_head,
    query_landmarks_row,
    key_landmarks_batch,
    key_landmarks_head,
    key_landmarks_row,
    landmark_bias_batch,
    landmark_bias_head,
    key_bias_batch,
    key_bias_head,
    key_quadratic_batch,
    key_quadratic_head,
    log_scale_batch,
    log_scale_head,
    heads,
    groups,
    n,
    span,
    segments,
    CAREFUL: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    D_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANDMARKS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """One segment, one block of landmarks, along the rows. CAREFUL as in the forward."""
    program = tl.program_id(0)
    block = program % BLOCKS
    segment = (program // BLOCKS) % segments
    flat = tl.cast(program // (BLOCKS * segments), tl.int64)
    place = flat * segments + segment
    if CAREFUL and tl.load(steepest + place * BLOCKS + block) <= SUDDEN:
        return
    batch, head = flat // heads, flat % heads
    first = segment * span
    last = tl.minimum(first + span, n)
    query += batch * query_batch + head * groups * query_head
    grad += batch * grad_batch + head * groups * grad_head
    query_log_sum += flat * groups * n
    delta += flat * groups * n
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    grad_key += (flat * BLOCKS + block) * n * D
    grad_value += (flat * BLOCKS + block) * n * E
    if grad_key_bias is not None:
        grad_key_bias += (flat * BLOCKS + block) * n
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    key_landmarks += batch * key_landmarks_batch + head * key_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head
    column = tl.arange(0, D_PADDED)
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head
    element = key.dtype.element_ty

    landmark = block * LANDMARKS + tl.arange(0, LANDMARKS)
    w = load_tile(key_landmarks, landmark, key_landmarks_row, M, D, D_PADDED).to(element)
    u = load_tile(query_landmarks, landmark, query_landmarks_row, M, D, D_PADDED).to(element)
    bias = tl.load(landmark_bias + landmark, mask=landmark < M, other=float("-inf")) * LOG2_E
    left, left_delta, behind = load_state(
        suffix_value, suffix_delta, suffix_reference, place, landmark, M, E, E_PADDED
    )  # fmt: skip
    sum_landmarks = tl.zeros((LANDMARKS, D_PADDED), tl.float32)
    sum_quadratic = tl.zeros((D_PADDED,), tl.float32)
    row = tl.arange(0, TOKENS)
    for i in tl.range(0, tl.cdiv(last - first, TOKENS), num_stages=STAGES):
        start = first + (tl.cdiv(last - first, TOKENS) - 1 - i) * TOKENS
        rows, offset = last - start, tl.cast(start, tl.int64)
        k, v, logits = load_chunk(
            key, value, key_bias, key_quadratic, start, key_row, value_row, row, rows, w,
            D, E, D_PADDED, E_PADDED, PRECISION,
        )  # fmt: skip
        chunk = flat * tl.cdiv(n, TOKENS) + start // TOKENS
        # Landmarks that pad the block: no feature, nothing left. Elsewhere the bound is never met.
        past = tl.load(reference + chunk * M + landmark, mask=landmark < M, other=1e30)
        shrink = tl.exp2(tl.minimum(past - finite(behind), 64.0))
        sudden = False
        if CAREFUL:
            rise = tl.max(logits, 1)
            sudden = tl.max(tl.where(rise == float("-inf"), float("-inf"), rise - past), 0) > SUDDEN
            features = tl.exp2(logits - tl.where(sudden, float("inf"), finite(past))[:, None])
        else:
            features = tl.exp2(logits - finite(past)[:, None])
        if sudden:
            left, left_delta, sum_landmarks, sum_quadratic = _token_by_token(
                query, key, value, grad, key_bias, key_quadratic, query_log_sum, delta,
                grad_key, grad_value, grad_key_bias, query_landmarks, key_landmarks, bias, landmark,
                left, left_delta, behind, past, sum_landmarks, sum_quadratic,
                start, tl.minimum(start + TOKENS, last), n, groups,
                query_head, query_row, key_row, value_row, grad_head, grad_row,
                query_landmarks_row, key_landmarks_row, M, D, E, D_PADDED, E_PADDED,
            )  # fmt: skip
            shrink = tl.full((LANDMARKS,), 1.0, tl.float32)
            rows = 0
        left *= shrink[:, None]
        left_delta *= shrink
        behind = past
        v = v.to(PRODUCT)
        features_product, left_product = features.to(PRODUCT), left.to(PRODUCT)
        inner = tl.dot(left_product, tl.trans(v), input_precision=PRECISION) - left_delta[:, None]
        dv = tl.dot(tl.trans(features_product), left_product, input_precision=PRECISION)
        if ONE_GROUP:
            inner, dv, left, left_delta = _add_queries(
                query, grad, query_log_sum, delta, u, bias + past, features_product, v,
                inner, dv, left, left_delta, start, rows, query_row, grad_row,
                D, E, D_PADDED, E_PADDED, TOKENS, PRECISION, PRODUCT,
            )  # fmt: skip
        else:
            for group in range(groups):
                index = tl.cast(group, tl.int64)
                skip = index * n
                inner, dv, left, left_delta = _add_queries(
                    query + index * query_head, grad + index * grad_head, query_log_sum + skip, delta + skip,
                    u, bias + past, features_product, v,
                    inner, dv, left, left_delta, start, rows, query_row, grad_row,
                    D, E, D_PADDED, E_PADDED, TOKENS, PRECISION, PRODUCT,
                )  # fmt: skip
        ds = features * inner
        ds_product = ds.to(PRODUCT)
        dk = tl.dot(tl.trans(ds_product), w.to(PRODUCT), input_precision=PRECISION)
        if key_quadratic is not None:
            dt = tl.sum(ds, 0)
            wide = k.to(tl.float32)
            quadratic = tl.load(key_quadratic + column, mask=column < D, other=0.0)
            dk += 2 * dt[:, None] * quadratic[None, :] * wide
            if grad_key_quadratic is not None:
                sum_quadratic += tl.sum(dt[:, None] * wide * wide, 0)
        if grad_key_bias is not None:
            tl.store(grad_key_bias + start + row, tl.sum(ds, 0), mask=row < rows)
        if grad_key_landmarks is not None:
            sum_landmarks = tl.dot(ds_product, k.to(PRODUCT), sum_landmarks, input_precision=PRECISION)
        store_tile(grad_key + offset * D, row, D, rows, dk, D, D_PADDED)
        store_tile(grad_value + offset * E, row, E, rows, dv, E, E_PADDED)

    if grad_key_landmarks is not None:
        store_tile(grad_key_landmarks + place * M * D, landmark, D, M, sum_landmarks, D, D_PADDED)
    if grad_key_quadratic is not None:
        tl.store(grad_key_quadratic + (place * BLOCKS + block) * D + column, sum_quadratic, mask=column < D)
    if grad_sums is not None and segment == 0:
        log_scale += batch * log_scale_batch + head * log_scale_head
        scale = tl.load(log_scale + landmark, mask=landmark < M, other=float("-inf")) * LOG2_E
        shrink = tl.exp2(scale - finite(behind))
        store_tile(grad_sums + flat * M * (E + 1), landmark, E + 1, M, left * shrink[:, None], E, E_PADDED)
        tl.store(grad_sums + (flat * M + landmark) * (E + 1) + E, -left_delta * shrink, mask=landmark < M)


@triton.jit
def _add_queries(
    query, grad, query_log_sum, delta, u, weight, features, v, inner, dv, left, left_delta, start, rows,
    query_row, grad_row,
    D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """What a chunk of queries adds to the gradients of the chunk's keys, and leaves for earlier ones."""
    row = tl.arange(0, TOKENS)
    offset = tl.cast(start, tl.int64)
    q = load_tile(query + offset * query_row, row, query_row, rows, D, D_PADDED)
    do = load_tile(grad + offset * grad_row, row, grad_row, rows, E, E_PADDED).to(PRODUCT)
    normaliser = load_normaliser(query_log_sum + start, row, rows)
    constant = tl.load(delta + start + row, mask=row < rows, other=0.0)
    logits = tl.dot(u, tl.trans(q), input_precision=PRECISION) * LOG2_E + weight[:, None]
    p = tl.exp2(logits - normaliser[None, :])
    left_delta += tl.sum(p * constant[None, :], 1)
    p = p.to(PRODUCT)
    pairs = tl.dot(do, tl.trans(v), input_precision=PRECISION) - constant[:, None]
    pairs = tl.where(row[:, None] >= row[None, :], pairs, 0.0).to(PRODUCT)
    inner = tl.dot(p, pairs, inner, input_precision=PRECISION)
    scores = tl.dot(tl.trans(features), p, input_precision=PRECISION)
    scores = tl.where(row[:, None] <= row[None, :], scores, 0.0).to(PRODUCT)
    dv = tl.dot(scores, do, dv, input_precision=PRECISION)
    left = tl.dot(p, do, left, input_precision=PRECISION)
    return inner, dv, left, left_delta


@triton.jit
def _token_by_token(
    query, key, value, grad, key_bias, key_quadratic, query_log_sum, delta,
    grad_key, grad_value, grad_key_bias, query_landmarks, key_landmarks, bias, landmark,
    left, left_delta, behind, past, sum_landmarks, sum_quadratic, first, last, n, groups,
    query_head, query_row, key_row, value_row, grad_head, grad_row, query_landmarks_row, key_landmarks_row,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
):  # fmt: skip
    """Gradients of keys last-1..first. The reference is the highest weight of later queries: no feature exceeds 1."""
    element = key.dtype.element_ty
    w = load_tile(key_landmarks, landmark, key_landmarks_row, M, D, D_PADDED).to(element).to(tl.float32)
    column, column_e = tl.arange(0, D_PADDED), tl.arange(0, E_PADDED)
    top = -finite(behind)
    for i in range(last - first):
        token = last - 1 - i
        offset = tl.cast(token, tl.int64)
        for group in range(groups):
            index = tl.cast(group, tl.int64)
            place = index * n + token
            q = tl.load(query + index * query_head + offset * query_row + column, mask=column < D, other=0.0)
            do = tl.load(grad + index * grad_head + offset * grad_row + column_e, mask=column_e < E, other=0.0)
            u = load_tile(query_landmarks, landmark, query_landmarks_row, M, D, D_PADDED).to(element).to(tl.float32)
            normaliser = tl.load(query_log_sum + place)
            normaliser = tl.where(normaliser == float("-inf"), float("inf"), normaliser)
            x = tl.sum(u * q.to(tl.float32)[None, :], 1) * LOG2_E + bias - normaliser
            higher = tl.maximum(top, x)
            shrink, p = tl.exp2(top - finite(higher)), tl.exp2(x - finite(higher))
            left = left * shrink[:, None] + p[:, None] * do.to(tl.float32)[None, :]
            left_delta = left_delta * shrink + p * tl.load(delta + place)
            top = higher
        k, v, weight = load_token(
            key + offset * key_row, value + offset * value_row, key_bias, key_quadratic, token,
            D, E, D_PADDED, E_PADDED,
        )  # fmt: skip
        feature = tl.exp2(tl.sum(w * k[None, :], 1) * LOG2_E + weight + top)
        feature = tl.where(landmark < M, feature, 0.0)
        ds = feature * (tl.sum(left * v[None, :], 1) - left_delta)
        dt = tl.sum(ds, 0)
        dk = tl.sum(ds[:, None] * w, 0)
        if key_quadratic is not None:
            dk += 2 * dt * k * tl.load(key_quadratic + column, mask=column < D, other=0.0)
            sum_quadratic += dt * k * k
        if grad_key_bias is not None:
            tl.store(grad_key_bias + token, dt)
        dv = tl.sum(feature[:, None] * left, 0)
        tl.store(grad_key + offset * D + column, dk.to(grad_key.dtype.element_ty), mask=column < D)
        tl.store(grad_value + offset * E + column_e, dv.to(grad_value.dtype.element_ty), mask=column_e < E)
        sum_landmarks += ds[:, None] * k[None, :]
    shrink = tl.exp2(tl.minimum(top + past, 64.0))
    return left * shrink[:, None], left_delta * shrink, sum_landmarks, sum_quadratic
