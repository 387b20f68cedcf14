# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Causal backward of keys: all chunks at the same time, from what later queries leave.

With features :math:`f_{in}` of keys and weights :math:`p_{ti}` of queries relative to the past of the chunk, primes for
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
    chunk_tokens,
    load_keys,
    load_landmark_weight,
    load_queries,
    load_reference,
    store_zeros,
)
from spectraformer.ops.triton.tiles import LOG2_E, load_rows, load_tile, store_tile


@triton.jit
def store_key_gradients(
    grad_key, grad_value, grad_key_bias, grad_key_quadratic, key_quadratic, key, key_row, present,
    dk, dv, dt, place, token, row, rows,
    D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk, with what its squared keys add, given those of their logits summed over landmarks."""
    if grad_value is not None:
        store_tile(grad_value + token * E, row, E, rows, dv, E, E_PADDED)
    if grad_key is not None:
        if grad_key_bias is not None:
            tl.store(grad_key_bias + token + row, dt, mask=row < rows)
        if key_quadratic is not None:
            column = tl.arange(0, D_PADDED)
            # Once more, rather than in registers all along; marked, or the compiler takes it for the first time.
            k = tl.load(
                key + row[:, None] * key_row + column[None, :],
                mask=present[:, None] & (column < D)[None, :],
                other=0.0,
                eviction_policy="evict_first",
            ).to(tl.float32)
            dk += 2 * dt[:, None] * tl.load(key_quadratic + column, mask=column < D, other=0.0)[None, :] * k
            if grad_key_quadratic is not None:
                of_quadratic = tl.sum(dt[:, None] * k * k, 0)
                tl.store(grad_key_quadratic + place * D + column, of_quadratic, mask=column < D)
        store_tile(grad_key + token * D, row, D, rows, dk, D, D_PADDED)


@triton.jit(do_not_specialize=SIZES)
def chunk_key_backward_kernel(
    query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic,
    boundaries,  # (sequences + 1,): sequences are packed into one batch item; or None
    chunk_sequence,  # (chunks,) int32 where they are
    log_sum,  # (b h, chunks + sequences, m) float32, units of log 2
    first,  # (b h, chunks, m) float32, units of log 2
    grad,  # (b, h g, n, e)
    query_log_sum,  # (b h g, n) float32, units of log 2
    delta,  # (b h g, n) float32
    suffix_value,  # (b h, chunks, m, e)
    suffix_delta,  # (b h, chunks, m) float32
    grad_key,  # (b h, n, d), or None where another launch fills it
    grad_value,  # (b h, n, e), or None likewise
    grad_key_bias,  # (b h, n) float32, or None
    grad_key_quadratic,  # (b h, chunks, tiles, d) float32, or None
    grad_key_logits,  # (b h, n, m), or None
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row, grad_batch,
    grad_head, grad_row, query_landmarks_batch, query_landmarks_head, key_landmarks_batch, key_landmarks_head,
    landmark_bias_batch, landmark_bias_head, key_bias_batch, key_bias_head, key_quadratic_batch, key_quadratic_head,
    heads, groups, n, chunks, sequences,
    ONE_GROUP: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr, BLOCKS: tl.constexpr, LANDMARKS: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """One tile of keys of a chunk, landmarks along the rows; queries of the chunk from that tile on."""
    program = tl.program_id(0)
    tile = program % TILES
    chunk = (program // TILES) % chunks
    flat = tl.cast(program // (TILES * chunks), tl.int64)
    batch, head = flat // heads, flat % heads
    begin, end, sequence = chunk_tokens(boundaries, chunk_sequence, chunk, n, chunks, sequences, TILES * TOKENS)
    start, place = begin + tile * TOKENS, flat * chunks + chunk
    if boundaries is not None:  # noqa: SIM102 - the first is known when compiled
        if begin >= end:  # of no sequence
            if grad_key_quadratic is not None:
                store_zeros(grad_key_quadratic + (place * TILES + tile) * D, D)
            return
    offset = tl.cast(start, tl.int64)
    query += batch * query_batch + head * groups * query_head
    grad += batch * grad_batch + head * groups * grad_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head + offset * value_row
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    key_landmarks += batch * key_landmarks_batch + head * key_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head
    log_sum += (place + flat * sequences + sequence) * M
    first += place * M
    suffix_value += place * M * E
    suffix_delta += place * M
    query_log_sum += flat * groups * n
    delta += flat * groups * n
    token = flat * n + start

    row = tl.arange(0, TOKENS)
    rows = end - start
    k, weight, present = load_keys(key, key_bias, key_quadratic, start, key_row, row, rows, D, D_PADDED)
    v = load_rows(value, row, value_row, present, E, E_PADDED).to(PRODUCT)
    dk = tl.zeros((TOKENS, D_PADDED), tl.float32)
    dv = tl.zeros((TOKENS, E_PADDED), tl.float32)
    dt = tl.zeros((TOKENS,), tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        landmark = block * LANDMARKS + tl.arange(0, LANDMARKS)
        inside = landmark < M
        w = load_tile(key_landmarks, landmark, D, M, D, D_PADDED)
        reference, _held = load_reference(log_sum, first, landmark, M)
        features = tl.dot(w, tl.trans(k), input_precision=PRECISION) * LOG2_E - reference[:, None]
        features = tl.exp2(features + weight[None, :]).to(PRODUCT)
        ds = tl.zeros((LANDMARKS, TOKENS), tl.float32)
        of_landmark = load_landmark_weight(landmark_bias, reference, landmark, M)
        tiles = TILES - tile
        for i in tl.range(0, tiles if ONE_GROUP else tiles * groups, num_stages=1):
            group, shift = tl.cast(i // tiles, tl.int64), (i % tiles) * TOKENS
            at = tl.cast(start + shift, tl.int64)
            ds, dv = _add_queries(
                query + group * query_head + at * query_row, grad + group * grad_head + at * grad_row,
                query_log_sum + group * n + at, delta + group * n + at,
                query_landmarks, landmark, of_landmark, features, v, ds, dv, row, rows - shift, shift,
                query_row, grad_row, grad_key is not None, grad_value is not None,
                M, D, E, D_PADDED, E_PADDED, PRECISION, PRODUCT,
            )  # fmt: skip
        left = load_tile(suffix_value, landmark, E, M, E, E_PADDED)
        left_delta = tl.load(suffix_delta + landmark, mask=inside, other=0.0)
        if grad_value is not None:
            dv = tl.dot(tl.trans(features), left, dv, input_precision=PRECISION)
        if grad_key is not None:
            ds = tl.dot(left, tl.trans(v), ds, input_precision=PRECISION) - left_delta[:, None]
            ds *= features.to(tl.float32)
            dt += tl.sum(ds, 0)
            ds = tl.trans(ds.to(PRODUCT))
            dk = tl.dot(ds, w.to(PRODUCT), dk, input_precision=PRECISION)
            if grad_key_logits is not None:
                tl.store(
                    grad_key_logits + (token + row)[:, None] * M + landmark[None, :],
                    ds,
                    mask=(row < rows)[:, None] & inside[None, :],
                )
    store_key_gradients(
        grad_key, grad_value, grad_key_bias, grad_key_quadratic, key_quadratic, key + offset * key_row, key_row,
        present, dk, dv, dt, place * TILES + tile, token, row, rows,
        D, E, D_PADDED, E_PADDED,
    )  # fmt: skip


@triton.jit
def _add_queries(
    query, grad, query_log_sum, delta, query_landmarks, landmark, of_landmark, features, v, ds, dv, row, rows, shift,
    query_row, grad_row, OF_KEY: tl.constexpr, OF_VALUE: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    PRECISION: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """What the chunk's queries of one head add to the gradients of its keys, by one block of landmarks."""
    q, do, normaliser, inner = load_queries(
        query, grad, query_log_sum, delta, row, rows, query_row, grad_row, D, E, D_PADDED, E_PADDED, PRODUCT
    )
    u = load_tile(query_landmarks, landmark, D, M, D, D_PADDED)
    logits = tl.dot(u, tl.trans(q), input_precision=PRECISION) * LOG2_E
    # Added up in the order of the forward, whose rounding the log-sums have.
    p = tl.exp2(logits + of_landmark[:, None] - normaliser[None, :]).to(PRODUCT)
    if OF_VALUE:
        scores = tl.dot(tl.trans(features), p, input_precision=PRECISION)
        scores = tl.where(row[:, None] <= row[None, :] + shift, scores, 0.0).to(PRODUCT)
        dv = tl.dot(scores, do, dv, input_precision=PRECISION)
    if OF_KEY:
        pairs = tl.dot(do, tl.trans(v), input_precision=PRECISION) - inner[:, None]
        pairs = tl.where(row[:, None] + shift >= row[None, :], pairs, 0.0).to(PRODUCT)
        ds = tl.dot(p, pairs, ds, input_precision=PRECISION)
    return ds, dv
