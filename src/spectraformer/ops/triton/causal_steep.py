# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Chunks where a logit rises too steeply above its past for features to be kept apart, for any finite input.

Landmarks one after another, and for each the weight of every key for every query,
:math:`e^{\ell^q_{ti} + \ell^k_{in} - c_t}`, whose exponent no key that the query sees takes above 0. Nothing is done
where no chunk is steep.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectraformer.ops.triton.causal_tiles import (
    SIZES,
    SUDDEN,
    finite,
    load_keys,
    load_steepest,
    locate_sequence,
    log_sum_exp,
    positive,
)
from spectraformer.ops.triton.tiles import LOG2_E, load_rows, load_tile, store_tile


@triton.jit
def load_vector(pointer, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """One row in float32, 0 outside."""
    column = tl.arange(0, PADDED)
    return tl.load(pointer + column, mask=column < SIZE, other=0.0).to(tl.float32)


@triton.jit
def load_landmark(landmarks, row, landmark, element: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    """One landmark in float32, rounded as for products."""
    return load_vector(landmarks + landmark * row, D, D_PADDED).to(element).to(tl.float32)


@triton.jit
def logits_of(x, landmark):
    """Logits of a tile of rows at one landmark, units of log 2."""
    return tl.sum(x.to(tl.float32) * landmark[None, :], 1) * LOG2_E


@triton.jit
def attend_steeply(
    query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic,
    entering_mean,  # (m, e), before the chunk
    log_sum,  # (m,) float32, units of log 2
    out, query_log_sum, token,  # where tokens of the query head begin in both
    start, end, steep, query_row, key_row, value_row, query_landmarks_row, key_landmarks_row,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    TOKENS: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk of one query head, if it is steep."""
    row, row_q = tl.arange(0, TOKENS), tl.arange(0, QUERIES)
    element = key.dtype.element_ty
    for skip in range(0, tl.where(steep, TOKENS, 0), QUERIES):
        first = start + skip
        offset = tl.cast(first, tl.int64)
        visible = row[None, :] <= (skip + row_q)[:, None]
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        mass = tl.zeros((QUERIES,), tl.float32)
        mean = tl.zeros((QUERIES, E_PADDED), tl.float32)
        scores = tl.zeros((QUERIES, TOKENS), tl.float32)
        for landmark in range(M):
            k, weight, _present = load_keys(key, key_bias, key_quadratic, start, key_row, row, end - start, D, D_PADDED)
            w = load_landmark(key_landmarks, key_landmarks_row, landmark, element, D, D_PADDED)
            of_keys = logits_of(k, w) + weight
            q = load_tile(query + offset * query_row, row_q, query_row, end - first, D, D_PADDED)
            u = load_landmark(query_landmarks, query_landmarks_row, landmark, element, D, D_PADDED)
            of_queries = logits_of(q, u) + tl.load(landmark_bias + landmark) * LOG2_E
            past = of_queries + tl.load(log_sum + landmark)
            pairs = tl.where(visible, of_queries[:, None] + of_keys[None, :], float("-inf"))
            higher = tl.maximum(tl.maximum(top, past), tl.max(pairs, 1))
            shrink, p = tl.exp2(top - finite(higher)), tl.exp2(past - finite(higher))
            o = load_vector(entering_mean + landmark * E, E, E_PADDED)
            mass = mass * shrink + p
            mean = mean * shrink[:, None] + p[:, None] * o[None, :]
            scores = scores * shrink[:, None] + tl.exp2(pairs - finite(higher)[:, None])
            top = higher
        _key, _weight, present = load_keys(key, key_bias, key_quadratic, start, key_row, row, end - start, D, D_PADDED)
        v = load_rows(value + tl.cast(start, tl.int64) * value_row, row, value_row, present, E, E_PADDED)
        mass += tl.sum(scores, 1)
        mean += tl.dot(scores.to(PRODUCT), v.to(PRODUCT), input_precision=PRECISION)
        at = token + first
        store_tile(out + at * E, row_q, E, end - first, mean * (1.0 / positive(mass))[:, None], E, E_PADDED)
        if query_log_sum is not None:
            tl.store(query_log_sum + at + row_q, log_sum_exp(finite(top), mass), mask=row_q < end - first)


@triton.jit(do_not_specialize=SIZES)
def steep_output_kernel(
    query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic,
    boundaries,  # (sequences + 1,): sequences are packed into one batch item; or None
    entering_mean,  # (b h, chunks, m, e)
    log_sum,  # (b h, chunks + sequences, m) float32, units of log 2
    steepest,  # (b h, chunks + sequences, row blocks) float32, units of log 2
    out,  # (b h g, n, e)
    query_log_sum,  # (b h g, n) float32, units of log 2, or None
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    query_landmarks_batch, query_landmarks_head, key_landmarks_batch, key_landmarks_head, landmark_bias_batch,
    landmark_bias_head, key_bias_batch, key_bias_head, key_quadratic_batch, key_quadratic_head, heads, groups, n,
    chunks, sequences, spread,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    TOKENS: tl.constexpr, ROW_BLOCKS: tl.constexpr, ROW_BLOCKS_PADDED: tl.constexpr, QUERIES: tl.constexpr,
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
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    key_landmarks += batch * key_landmarks_batch + head * key_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head
    for chunk in range(part, count, spread):
        steep = load_steepest(steepest + chunk * ROW_BLOCKS, ROW_BLOCKS, ROW_BLOCKS_PADDED) > SUDDEN
        start, place = begin + chunk * TOKENS, first_place + chunk
        attend_steeply(
            query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic,
            entering_mean + place * M * E, log_sum + (first_row + chunk) * M, out, query_log_sum,
            (flat * groups + group) * n, start, end, steep, query_row, key_row, value_row, D, D,
            M, D, E, D_PADDED, E_PADDED, TOKENS, QUERIES, PRECISION, PRODUCT,
        )  # fmt: skip
