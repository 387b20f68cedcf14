# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Backward of stretches whose sums of features left the range of one reference: all they wrote is written again.

Landmarks one after another in every tile, with the weight :math:`e^{\ell^q_{ti} + \ell^k_{in} - L_t} \le 1` of every
key for every query. What is brought from tile to tile lies in memory: of queries the mean of values and the
log-sum-exp of the keys so far; of keys, from the last tile to the first, sums relative to
:math:`Q_i = \max_t \ell^q_{ti} - L_t` over the queries so far, so that :math:`\ell^k_{in} + Q_i \le 0`.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectraformer.ops.triton.causal_careful import load_peak
from spectraformer.ops.triton.causal_steep import load_landmark, load_vector, logits_of
from spectraformer.ops.triton.causal_steep_backward import add_queries_of_landmark, query_logit_gradient
from spectraformer.ops.triton.causal_stretch_key_backward import merge_left
from spectraformer.ops.triton.causal_stretches import locate_stretch
from spectraformer.ops.triton.causal_tiles import SIZES, finite, load_keys, load_queries, log_sum_exp, positive
from spectraformer.ops.triton.tiles import LOG2_E, load_quadratic, load_rows, load_tile, store_tile, store_vector


@triton.jit(do_not_specialize=SIZES)
def careful_query_backward_kernel(
    query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic,
    entering_mean, log_sum, grad, query_log_sum, delta,  # as in stretch_query_backward_kernel, as what follows but two
    peak_total,  # (b h g, stretches, blocks) float32
    careful_mean,  # (b h g, stretches, m, e) float32: room for a state
    careful_log_sum,  # (b h g, stretches, m) float32, units of log 2
    grad_query, grad_query_logits, grad_landmark_bias,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row, grad_batch,
    grad_head, grad_row, query_landmarks_batch, query_landmarks_head, query_landmarks_row, key_landmarks_batch,
    key_landmarks_head, key_landmarks_row, landmark_bias_batch, landmark_bias_head, key_bias_batch, key_bias_head,
    key_quadratic_batch, key_quadratic_head, heads, groups, n, span, middle, stretches,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr, ALL: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    """One stretch of one query head."""
    stretch, begin, end, flat_query, flat, group = locate_stretch(
        tl.program_id(0), tl.num_programs(0), stretches, groups, span, middle, n, EARLY
    )
    place = flat_query * stretches + stretch
    _most, good = load_peak(peak_total + place * BLOCKS, BLOCKS)
    if good:
        return
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
    careful_mean += place * M * E
    careful_log_sum += place * M

    element: tl.constexpr = key.dtype.element_ty
    row, every, column = tl.arange(0, TOKENS), tl.arange(0, ALL), tl.arange(0, E_PADDED)
    state = load_tile(entering_mean + (flat * stretches + stretch) * M * E, every, E, M, E, E_PADDED)
    store_tile(careful_mean, every, E, M, state, E, E_PADDED)
    log_sums = tl.load(log_sum + (flat * (stretches + 1) + stretch) * M + every, mask=every < M, other=0.0)
    tl.store(careful_log_sum + every, log_sums, mask=every < M)
    tl.debug_barrier()  # the state is read by others than wrote it, here and below
    of_bias = tl.zeros((ALL,), tl.float32)
    for start in range(begin, end, TOKENS):
        offset, rows = tl.cast(start, tl.int64), end - start
        k, weight, present = load_keys(key, key_bias, key_quadratic, start, key_row, row, rows, D, D_PADDED)
        v = load_rows(value + offset * value_row, row, value_row, present, E, E_PADDED).to(PRODUCT)
        q, do, normaliser, inner = load_queries(
            query + offset * query_row, grad + offset * grad_row, query_log_sum + start, delta + start, row, rows,
            query_row, grad_row, D, E, D_PADDED, E_PADDED, PRODUCT,
        )  # fmt: skip
        pairs = tl.dot(do, tl.trans(v), input_precision=PRECISION) - inner[:, None]
        dq = tl.zeros((TOKENS, D_PADDED), tl.float32)
        for landmark in range(M):
            u = load_landmark(query_landmarks, query_landmarks_row, landmark, element, D, D_PADDED)
            w = load_landmark(key_landmarks, key_landmarks_row, landmark, element, D, D_PADDED)
            mean = load_vector(careful_mean + landmark * E, E, E_PADDED)
            before = tl.load(careful_log_sum + landmark)
            of_keys = logits_of(k, w) + weight
            of_queries = logits_of(q, u) + tl.load(landmark_bias + landmark) * LOG2_E
            # Rounded as for products, as in the outputs that delta is of.
            read = mean.to(PRODUCT).to(tl.float32)
            ds = query_logit_gradient(of_queries, of_keys, before, normaliser, read, do, inner, pairs, row)
            dq += ds[:, None] * u[None, :]
            if grad_landmark_bias is not None:
                of_bias += tl.where(every == landmark, tl.sum(ds, 0), 0.0)
            if grad_query_logits is not None:
                at = grad_query_logits + (flat_query * n + offset + row) * M + landmark
                tl.store(at, ds.to(grad_query_logits.dtype.element_ty), mask=row < rows)
            top = finite(tl.maximum(before, tl.max(of_keys, 0)))
            kept, features = tl.exp2(before - top), tl.exp2(of_keys - top)
            total = kept + tl.sum(features, 0)
            mean = kept * mean + tl.sum(features[:, None] * v.to(tl.float32), 0)
            tl.debug_barrier()
            tl.store(careful_mean + landmark * E + column, mean / positive(total), mask=column < E)
            tl.store(careful_log_sum + landmark, log_sum_exp(top, total))
        store_tile(grad_query + offset * D, row, D, rows, dq, D, D_PADDED)
        tl.debug_barrier()
    if grad_landmark_bias is not None:
        tl.store(grad_landmark_bias + place * M + every, of_bias, mask=every < M)


@triton.jit(do_not_specialize=SIZES)
def careful_key_backward_kernel(
    query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic,
    log_sum, first, grad, query_log_sum, delta, left_value, left_delta, grad_sums_after,
    log_scale_after,  # as in stretch_key_backward_kernel, as what follows but four
    peak_total,  # (b h g, stretches, blocks) float32
    careful_value,  # (b h, stretches, m, e) float32: room for sums
    careful_delta,  # (b h, stretches, m) float32
    careful_top,  # (b h, stretches, m) float32, units of log 2: what they are relative to
    grad_key, grad_value, grad_key_bias, grad_key_quadratic, grad_key_logits,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row, grad_batch,
    grad_head, grad_row, query_landmarks_batch, query_landmarks_head, query_landmarks_row, key_landmarks_batch,
    key_landmarks_head, key_landmarks_row, landmark_bias_batch, landmark_bias_head, key_bias_batch, key_bias_head,
    key_quadratic_batch, key_quadratic_head, heads, groups, n, span, middle, stretches,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr, KEY_BLOCKS: tl.constexpr, ALL: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr,
    PRECISION: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """One stretch of one key head, keys along the rows."""
    stretch, begin, end, flat, _flat, _group = locate_stretch(
        tl.program_id(0), tl.num_programs(0), stretches, 1, span, middle, n, EARLY
    )
    # Sums of features are of keys alone: those of the first query head will do.
    _most, good = load_peak(peak_total + (flat * groups * stretches + stretch) * BLOCKS, BLOCKS)
    if good:
        return
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
    place = flat * stretches + stretch
    careful_value += place * M * E
    careful_delta += place * M
    careful_top += place * M

    element: tl.constexpr = key.dtype.element_ty
    row, every, column = tl.arange(0, TOKENS), tl.arange(0, ALL), tl.arange(0, E_PADDED)
    # No key of the stretch is above the log-sum-exp after it.
    after = finite(tl.load(log_sum + (stretch + 1) * M + every, mask=every < M, other=0.0))
    later, later_inner = merge_left(
        left_value + flat * groups * stretches * M * E, left_delta + flat * groups * stretches * M, log_sum, first,
        grad_sums_after, log_scale_after, after, stretch + 1, stretches, groups, every, M, E, E_PADDED,
    )  # fmt: skip
    store_tile(careful_value, every, E, M, later, E, E_PADDED)
    tl.store(careful_delta + every, later_inner, mask=every < M)
    tl.store(careful_top + every, -after, mask=every < M)
    tl.debug_barrier()  # these are read by others than wrote them, here and below
    of_quadratic = tl.zeros((D_PADDED,), tl.float32)
    last = begin + (tl.cdiv(end - begin, TOKENS) - 1) * TOKENS
    for back in range(begin, end, TOKENS):
        start = last - (back - begin)
        offset, rows = tl.cast(start, tl.int64), end - start
        k, weight, present = load_keys(key, key_bias, key_quadratic, start, key_row, row, rows, D, D_PADDED)
        v = load_rows(value + offset * value_row, row, value_row, present, E, E_PADDED).to(PRODUCT)
        dk = tl.zeros((TOKENS, D_PADDED), tl.float32)
        dv = tl.zeros((TOKENS, E_PADDED), tl.float32)
        dt = tl.zeros((TOKENS,), tl.float32)
        for landmark in range(M):
            u = load_landmark(query_landmarks, query_landmarks_row, landmark, element, D, D_PADDED)
            w = load_landmark(key_landmarks, key_landmarks_row, landmark, element, D, D_PADDED)
            left = load_vector(careful_value + landmark * E, E, E_PADDED)
            left_inner = tl.load(careful_delta + landmark)
            top = tl.load(careful_top + landmark)
            of_keys = logits_of(k, w) + weight
            feature = tl.exp2(of_keys + top)
            ds = feature * (tl.sum(v.to(tl.float32) * left[None, :], 1) - left_inner)
            dv += feature[:, None] * left[None, :]
            for group in range(groups):
                index = tl.cast(group, tl.int64)
                q, do, normaliser, inner = load_queries(
                    query + index * query_head + offset * query_row, grad + index * grad_head + offset * grad_row,
                    query_log_sum + index * n + start, delta + index * n + start, row, rows, query_row, grad_row,
                    D, E, D_PADDED, E_PADDED, PRODUCT,
                )  # fmt: skip
                of_queries = logits_of(q, u) + tl.load(landmark_bias + landmark) * LOG2_E
                ds, dv = add_queries_of_landmark(ds, dv, of_queries, of_keys, normaliser, v, do, inner, row, PRECISION)
                of_queries -= normaliser
                higher = tl.maximum(top, tl.max(of_queries, 0))
                kept, p_left = tl.exp2(top - higher), tl.exp2(of_queries - higher)
                left = kept * left + tl.sum(p_left[:, None] * do.to(tl.float32), 0)
                left_inner = kept * left_inner + tl.sum(p_left * inner, 0)
                top = higher
            dk += ds[:, None] * w[None, :]
            dt += ds
            if grad_key_logits is not None:
                at = grad_key_logits + (flat * n + offset + row) * M + landmark
                tl.store(at, ds.to(grad_key_logits.dtype.element_ty), mask=row < rows)
            tl.debug_barrier()
            tl.store(careful_value + landmark * E + column, left, mask=column < E)
            tl.store(careful_delta + landmark, left_inner)
            tl.store(careful_top + landmark, top)
        if key_quadratic is not None:
            wide = k.to(tl.float32)
            quadratic = load_quadratic(key_quadratic, D, D_PADDED)
            dk += 2 * dt[:, None] * quadratic[None, :] * wide
            of_quadratic += tl.sum(dt[:, None] * wide * wide, 0)
        store_tile(grad_key + (flat * n + offset) * D, row, D, rows, dk, D, D_PADDED)
        store_tile(grad_value + (flat * n + offset) * E, row, E, rows, dv, E, E_PADDED)
        if grad_key_bias is not None:
            store_vector(grad_key_bias + flat * n + start, row, rows, dt)
        tl.debug_barrier()
    if grad_key_quadratic is not None:
        at_quadratic = tl.arange(0, D_PADDED)
        for block in tl.static_range(KEY_BLOCKS):
            of_block = of_quadratic if block == 0 else tl.zeros((D_PADDED,), tl.float32)
            tl.store(
                grad_key_quadratic + (place * KEY_BLOCKS + block) * D + at_quadratic, of_block, mask=at_quadratic < D
            )
