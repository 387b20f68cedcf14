# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Backward of the chunks of ``causal_steep``: what the kernels of all chunks wrote for them is written again.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectraformer.ops.triton.causal_key_backward import store_key_gradients
from spectraformer.ops.triton.causal_steep import load_vector, logits_of
from spectraformer.ops.triton.causal_tiles import (
    SIZES,
    SUDDEN,
    load_keys,
    load_normaliser,
    load_queries,
    load_steepest,
    locate_sequence,
    suffix_reference,
)
from spectraformer.ops.triton.tiles import LOG2_E, load_rows, load_tile, store_tile


@triton.jit
def query_logit_gradient(of_queries, of_keys, before, normaliser, mean, do, inner, pairs, row):
    """Of queries at one landmark: from the keys of their tile, one by one, and from the mean of those before.

    The weights are added up in the order of the forward, whose rounding the log-sums have.
    """
    p = of_queries[:, None] + of_keys[None, :] - normaliser[:, None]
    p = tl.exp2(tl.where(row[None, :] <= row[:, None], p, float("-inf")))
    past = tl.exp2(of_queries + before - normaliser)
    ds = tl.sum(p * pairs, 1)
    return ds + past * (tl.sum(do.to(tl.float32) * mean[None, :], 1) - inner)


@triton.jit
def add_queries_of_landmark(ds, dv, of_queries, of_keys, normaliser, v, do, inner, row, PRECISION: tl.constexpr):
    """What a tile of queries adds to the gradients of its keys' logits at one landmark, and of their values.

    The weights are added up as in query_logit_gradient.
    """
    p = of_queries[None, :] + of_keys[:, None] - normaliser[None, :]
    p = tl.exp2(tl.where(row[:, None] <= row[None, :], p, float("-inf")))
    pairs = tl.dot(v, tl.trans(do), input_precision=PRECISION) - inner[None, :]
    return ds + tl.sum(p * pairs, 1), tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def steep_query_backward_kernel(
    query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic,
    boundaries,  # (sequences + 1,): sequences are packed into one batch item; or None
    entering_mean,  # (b h, chunks, m, e)
    log_sum,  # (b h, chunks + sequences, m) float32, units of log 2
    steepest,  # (b h, chunks + sequences, row blocks) float32, units of log 2
    grad,  # (b, h g, n, e)
    query_log_sum,  # (b h g, n) float32, units of log 2
    delta,  # (b h g, n) float32
    grad_query,  # (b h g, n, d)
    grad_query_logits,  # (b h g, n, m), or None
    grad_landmark_bias,  # (b h, chunks, g, tiles, m) float32, or None
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row, grad_batch,
    grad_head, grad_row, query_landmarks_batch, query_landmarks_head, key_landmarks_batch, key_landmarks_head,
    landmark_bias_batch, landmark_bias_head, key_bias_batch, key_bias_head, key_quadratic_batch, key_quadratic_head,
    heads, groups, n, chunks, sequences, spread,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    TOKENS: tl.constexpr, TILES: tl.constexpr, ROW_BLOCKS: tl.constexpr, ROW_BLOCKS_PADDED: tl.constexpr,
    PRECISION: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Every spread-th chunk of one query head of a sequence."""
    program = tl.program_id(0)
    group = tl.cast(program % groups, tl.int64)
    part = (program // groups) % spread
    flat, _sequence, begin, end, count, first_place, first_row = locate_sequence(
        program // (groups * spread), boundaries, n, chunks, sequences, TOKENS
    )  # fmt: skip
    steepest += first_row * ROW_BLOCKS
    if load_steepest(steepest + count * ROW_BLOCKS, ROW_BLOCKS, ROW_BLOCKS_PADDED) <= SUDDEN:
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
    row = tl.arange(0, TOKENS)
    for chunk in range(part, count, spread):
        if load_steepest(steepest + chunk * ROW_BLOCKS, ROW_BLOCKS, ROW_BLOCKS_PADDED) > SUDDEN:
            start, place = begin + chunk * TOKENS, first_place + chunk
            offset, rows = tl.cast(start, tl.int64), end - start
            token = (flat * groups + group) * n + start
            piece = (place * groups + group) * TILES * M
            k, weight, present = load_keys(key, key_bias, key_quadratic, start, key_row, row, rows, D, D_PADDED)
            v = load_rows(value + offset * value_row, row, value_row, present, E, E_PADDED)
            q = load_tile(query + offset * query_row, row, query_row, rows, D, D_PADDED)
            do = load_tile(grad + offset * grad_row, row, grad_row, rows, E, E_PADDED)
            normaliser = load_normaliser(query_log_sum + token, row, rows)
            inner = tl.load(delta + token + row, mask=row < rows, other=0.0)
            pairs = tl.dot(do.to(PRODUCT), tl.trans(v.to(PRODUCT)), input_precision=PRECISION) - inner[:, None]
            dq = tl.zeros((TOKENS, D_PADDED), tl.float32)
            for landmark in range(M):
                u = load_vector(query_landmarks + landmark * D, D, D_PADDED)
                o = load_vector(entering_mean + (place * M + landmark) * E, E, E_PADDED)
                of_keys = logits_of(k, load_vector(key_landmarks + landmark * D, D, D_PADDED)) + weight
                of_queries = logits_of(q, u) + tl.load(landmark_bias + landmark) * LOG2_E
                before = tl.load(log_sum + (first_row + chunk) * M + landmark)
                ds = query_logit_gradient(of_queries, of_keys, before, normaliser, o, do, inner, pairs, row)
                dq += ds[:, None] * u[None, :]
                if grad_landmark_bias is not None:
                    tl.store(grad_landmark_bias + piece + landmark, tl.sum(ds, 0))
                    for tile in tl.static_range(1, TILES):
                        tl.store(grad_landmark_bias + piece + tile * M + landmark, 0.0)
                if grad_query_logits is not None:
                    at = grad_query_logits + (token + row) * M + landmark
                    tl.store(at, ds.to(grad_query_logits.dtype.element_ty), mask=row < rows)
            store_tile(grad_query + token * D, row, D, rows, dq, D, D_PADDED)


@triton.jit(do_not_specialize=SIZES)
def steep_key_backward_kernel(
    query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic,
    boundaries,  # (sequences + 1,): sequences are packed into one batch item; or None
    log_sum,  # (b h, chunks + sequences, m) float32, units of log 2
    first,  # (b h, chunks, m) float32, units of log 2
    steepest,  # (b h, chunks + sequences, row blocks) float32, units of log 2
    grad,  # (b, h g, n, e)
    query_log_sum,  # (b h g, n) float32, units of log 2
    delta,  # (b h g, n) float32
    suffix_value,  # (b h, chunks, m, e)
    suffix_delta,  # (b h, chunks, m) float32
    grad_key,  # (b h, n, d)
    grad_value,  # (b h, n, e)
    grad_key_bias,  # (b h, n) float32, or None
    grad_key_quadratic,  # (b h, chunks, tiles, d) float32, or None
    grad_key_logits,  # (b h, n, m), or None
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row, grad_batch,
    grad_head, grad_row, query_landmarks_batch, query_landmarks_head, key_landmarks_batch, key_landmarks_head,
    landmark_bias_batch, landmark_bias_head, key_bias_batch, key_bias_head, key_quadratic_batch, key_quadratic_head,
    heads, groups, n, chunks, sequences, spread,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    TOKENS: tl.constexpr, TILES: tl.constexpr, ROW_BLOCKS: tl.constexpr, ROW_BLOCKS_PADDED: tl.constexpr,
    PRECISION: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Every spread-th chunk of one key head of a sequence, keys along the rows."""
    program = tl.program_id(0)
    part = program % spread
    flat, _sequence, begin, end, count, first_place, first_row = locate_sequence(
        program // spread, boundaries, n, chunks, sequences, TOKENS
    )  # fmt: skip
    steepest += first_row * ROW_BLOCKS
    if load_steepest(steepest + count * ROW_BLOCKS, ROW_BLOCKS, ROW_BLOCKS_PADDED) <= SUDDEN:
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
    row = tl.arange(0, TOKENS)
    for chunk in range(part, count, spread):
        if load_steepest(steepest + chunk * ROW_BLOCKS, ROW_BLOCKS, ROW_BLOCKS_PADDED) > SUDDEN:
            start, place = begin + chunk * TOKENS, first_place + chunk
            offset, rows = tl.cast(start, tl.int64), end - start
            token = flat * n + start
            k, weight, present = load_keys(key, key_bias, key_quadratic, start, key_row, row, rows, D, D_PADDED)
            v = load_rows(value + offset * value_row, row, value_row, present, E, E_PADDED).to(PRODUCT)
            dk = tl.zeros((TOKENS, D_PADDED), tl.float32)
            dv = tl.zeros((TOKENS, E_PADDED), tl.float32)
            dt = tl.zeros((TOKENS,), tl.float32)
            for landmark in range(M):
                w = load_vector(key_landmarks + landmark * D, D, D_PADDED)
                of_keys = logits_of(k, w) + weight
                before = tl.load(log_sum + (first_row + chunk) * M + landmark)
                before = tl.where(before == float("-inf"), tl.load(first + place * M + landmark), before)
                after = tl.load(log_sum + (first_row + chunk + 1) * M + landmark)
                feature = tl.exp2(of_keys - suffix_reference(before, after))
                left = load_vector(suffix_value + (place * M + landmark) * E, E, E_PADDED)
                left_delta = tl.load(suffix_delta + place * M + landmark)
                ds = feature * (tl.sum(v.to(tl.float32) * left[None, :], 1) - left_delta)
                dv += feature[:, None] * left[None, :]
                for group in range(groups):
                    index = tl.cast(group, tl.int64)
                    at = (flat * groups + index) * n + start
                    q, do, normaliser, inner = load_queries(
                        query + index * query_head + offset * query_row, grad + index * grad_head + offset * grad_row,
                        query_log_sum + at, delta + at, row, rows, query_row, grad_row,
                        D, E, D_PADDED, E_PADDED, PRODUCT,
                    )  # fmt: skip
                    of_queries = logits_of(q, load_vector(query_landmarks + landmark * D, D, D_PADDED))
                    of_queries += tl.load(landmark_bias + landmark) * LOG2_E
                    ds, dv = add_queries_of_landmark(
                        ds, dv, of_queries, of_keys, normaliser, v, do, inner, row, PRECISION
                    )
                dk += ds[:, None] * w[None, :]
                dt += ds
                if grad_key_logits is not None:
                    at_key = grad_key_logits + (token + row) * M + landmark
                    tl.store(at_key, ds.to(grad_key_logits.dtype.element_ty), mask=row < rows)
            store_key_gradients(
                grad_key, grad_value, grad_key_bias, grad_key_quadratic, key_quadratic, key + offset * key_row, key_row,
                present, dk, dv, dt, place * TILES, token, row, rows, D, E, D_PADDED, E_PADDED,
            )  # fmt: skip
            if grad_key_quadratic is not None:
                column = tl.arange(0, D_PADDED)
                for tile in tl.static_range(1, TILES):
                    at_tile = grad_key_quadratic + (place * TILES + tile) * D + column
                    tl.store(at_tile, tl.zeros((D_PADDED,), tl.float32), mask=column < D)
