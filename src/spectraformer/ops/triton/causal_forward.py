# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Causal forward: chunks of queries, each from the state that enters and its own keys, all at the same time.

Within a chunk features are :math:`e^{\ell^q + R - c}` and :math:`e^{\ell^k - R}` with R the log-sum-exp of the keys
**before** the chunk (before the first key: its logit) and c the maximum over landmarks of a query. A feature of a query
is at most 1 and its denominator at least 1, whatever comes later. A feature of a key may exceed 1: up to 2^SUDDEN
nothing that counts is lost; chunks with a key beyond that are left to ``causal_steep``.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectraformer.ops.triton.causal_tiles import (
    SIZES,
    chunk_tokens,
    finite,
    load_keys,
    load_landmark_weight,
    load_reference,
    log_sum_exp,
    positive,
)
from spectraformer.ops.triton.tiles import LOG2_E, load_rows, load_tile, store_tile


@triton.jit(do_not_specialize=SIZES)
def chunk_output_kernel(
    query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic,
    boundaries,  # (sequences + 1,): sequences are packed into one batch item; or None
    chunk_sequence,  # (chunks,) int32 where they are
    entering_mean,  # (b h, chunks, m, e)
    log_sum,  # (b h, chunks + sequences, m) float32, units of log 2
    first,  # (b h, chunks, m) float32, units of log 2
    out,  # (b h g, n, e)
    query_log_sum,  # (b h g, n) float32, units of log 2, or None
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    query_landmarks_batch, query_landmarks_head, key_landmarks_batch, key_landmarks_head, landmark_bias_batch,
    landmark_bias_head, key_bias_batch, key_bias_head, key_quadratic_batch, key_quadratic_head, heads, groups, n,
    chunks, sequences,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr, LANDMARKS: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """One tile of queries of a chunk, along the rows; blocks of landmarks under a running maximum."""
    program = tl.program_id(0)
    tile = TILES - 1 - program % TILES  # the longest first
    group = tl.cast((program // TILES) % groups, tl.int64)
    chunk = (program // (TILES * groups)) % chunks
    flat = tl.cast(program // (TILES * groups * chunks), tl.int64)
    batch, head = flat // heads, flat % heads
    begin, end, sequence = chunk_tokens(boundaries, chunk_sequence, chunk, n, chunks, sequences, TILES * TOKENS)
    start, place = begin + tile * TOKENS, flat * chunks + chunk
    if start >= end:
        return
    offset = tl.cast(start, tl.int64)
    # Query heads of a key head follow one another.
    query += batch * query_batch + (head * groups + group) * query_head + offset * query_row
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    key_landmarks += batch * key_landmarks_batch + head * key_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head
    entering_mean += place * M * E
    log_sum += (place + flat * sequences + sequence) * M
    first += place * M

    row = tl.arange(0, TOKENS)
    rows = end - start
    q = load_tile(query, row, query_row, rows, D, D_PADDED)
    top = tl.full((TOKENS,), float("-inf"), tl.float32)
    mass = tl.zeros((TOKENS,), tl.float32)
    mean = tl.zeros((TOKENS, E_PADDED), tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        landmark = block * LANDMARKS + tl.arange(0, LANDMARKS)
        u = load_tile(query_landmarks, landmark, D, M, D, D_PADDED)
        o = load_tile(entering_mean, landmark, E, M, E, E_PADDED)
        w = load_tile(key_landmarks, landmark, D, M, D, D_PADDED)
        reference, held = load_reference(log_sum, first, landmark, M)
        logits = tl.dot(q, tl.trans(u), input_precision=PRECISION) * LOG2_E
        logits += load_landmark_weight(landmark_bias, reference, landmark, M)[None, :]
        higher = tl.maximum(top, tl.max(logits, 1))
        p = tl.exp2(logits - finite(higher)[:, None])
        if BLOCKS > 1:
            shrink = tl.exp2(top - finite(higher))
            mass *= shrink
            mean *= shrink[:, None]
        mass += tl.sum(p * held[None, :], 1)
        p = p.to(PRODUCT)
        mean = tl.dot(p, o, mean, input_precision=PRECISION)
        top = higher
        for before in tl.range(0, tile + 1, num_stages=1):
            at = start - before * TOKENS
            k, weight, present = load_keys(key, key_bias, key_quadratic, at, key_row, row, end - at, D, D_PADDED)
            features = tl.dot(k, tl.trans(w), input_precision=PRECISION) * LOG2_E - reference[None, :]
            features = tl.exp2(features + weight[:, None]).to(PRODUCT)
            scores = tl.dot(p, tl.trans(features), input_precision=PRECISION)
            scores = tl.where(row[:, None] + before * TOKENS >= row[None, :], scores, 0.0)
            mass += tl.sum(scores, 1)
            v = load_rows(value + tl.cast(at, tl.int64) * value_row, row, value_row, present, E, E_PADDED)
            mean = tl.dot(scores.to(PRODUCT), v.to(PRODUCT), mean, input_precision=PRECISION)

    # A query without any key: 0.
    store_tile(
        out + ((flat * groups + group) * n + start) * E, row, E, rows, mean * (1.0 / positive(mass))[:, None],
        E, E_PADDED,
    )  # fmt: skip
    if query_log_sum is not None:
        query_log_sum += (flat * groups + group) * n + start
        tl.store(query_log_sum + row, log_sum_exp(finite(top), mass), mask=row < rows)
