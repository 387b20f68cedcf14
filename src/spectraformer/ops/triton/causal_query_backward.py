# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Causal backward of queries: all chunks at the same time, from the states that entered them.

With :math:`p_{ti}` the weight of landmark i's past for query t (the forward's features over their denominator),
:math:`f_{in}` the features of keys relative to that past, :math:`O` its mean, primes for gradients:

.. math::
    S_{ti} = p_{ti} \Bigl(o'_t\cdot O_i - \delta_t + \sum_{n \le t} f_{in} (o'_t\cdot v_n - \delta_t)\Bigr),
    \quad \delta_t = o'_t\cdot o_t, \quad q' = S u, \quad u' = S^\top q, \quad a' = S^\top 1

What queries leave for keys of earlier chunks is :math:`\sum_t p_{ti} o'_t` and :math:`\sum_t p_{ti} \delta_t`.

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
    load_normaliser,
    load_reference,
    store_zeros,
)
from spectraformer.ops.triton.tiles import LOG2_E, load_rows, load_tile, store_tile


@triton.jit(do_not_specialize=SIZES)
def chunk_query_backward_kernel(
    query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic,
    boundaries,  # (sequences + 1,): sequences are packed into one batch item; or None
    chunk_sequence,  # (chunks,) int32 where they are
    entering_mean,  # (b h, chunks, m, e)
    log_sum,  # (b h, chunks + sequences, m) float32, units of log 2
    first,  # (b h, chunks, m) float32, units of log 2
    out,  # (b h g, n, e)
    grad,  # (b, h g, n, e)
    query_log_sum,  # (b h g, n) float32, units of log 2
    delta,  # (b h g, n) float32
    grad_query,  # (b h g, n, d)
    grad_mean,  # (b h, chunks, g, tiles, m, e)
    grad_delta,  # (b h, chunks, g, tiles, m) float32
    grad_query_logits,  # (b h g, n, m), or None
    grad_landmark_bias,  # (b h, chunks, g, tiles, m) float32, or None
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row, grad_batch,
    grad_head, grad_row, query_landmarks_batch, query_landmarks_head, key_landmarks_batch, key_landmarks_head,
    landmark_bias_batch, landmark_bias_head, key_bias_batch, key_bias_head, key_quadratic_batch, key_quadratic_head,
    heads, groups, n, chunks, sequences,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr, LANDMARKS: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """One tile of queries of a chunk, landmarks along the rows."""
    program = tl.program_id(0)
    tile = TILES - 1 - program % TILES  # the longest first
    group = tl.cast((program // TILES) % groups, tl.int64)
    chunk = (program // (TILES * groups)) % chunks
    flat = tl.cast(program // (TILES * groups * chunks), tl.int64)
    batch, head = flat // heads, flat % heads
    begin, end, sequence = chunk_tokens(boundaries, chunk_sequence, chunk, n, chunks, sequences, TILES * TOKENS)
    start, place = begin + tile * TOKENS, flat * chunks + chunk
    offset = tl.cast(start, tl.int64)
    query += batch * query_batch + (head * groups + group) * query_head + offset * query_row
    grad += batch * grad_batch + (head * groups + group) * grad_head + offset * grad_row
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
    token = (flat * groups + group) * n + start
    piece = ((place * groups + group) * TILES + tile) * M
    if boundaries is not None:  # noqa: SIM102 - the first is known when compiled
        if begin >= end:  # of no sequence
            if grad_landmark_bias is not None:
                store_zeros(grad_landmark_bias + piece, M)
            return

    row = tl.arange(0, TOKENS)
    rows = end - start
    do = load_tile(grad, row, grad_row, rows, E, E_PADDED)
    result = load_tile(out + token * E, row, E, rows, E, E_PADDED)
    inner = tl.sum(do.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + token + row, inner, mask=row < rows)
    normaliser = load_normaliser(query_log_sum + token, row, rows)
    q = load_tile(query, row, query_row, rows, D, D_PADDED)
    do = do.to(PRODUCT)
    dq = tl.zeros((TOKENS, D_PADDED), tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        landmark = block * LANDMARKS + tl.arange(0, LANDMARKS)
        inside = landmark < M
        w = load_tile(key_landmarks, landmark, D, M, D, D_PADDED)
        u = load_tile(query_landmarks, landmark, D, M, D, D_PADDED)
        o = load_tile(entering_mean, landmark, E, M, E, E_PADDED)
        reference, held = load_reference(log_sum, first, landmark, M)
        ds = tl.dot(o, tl.trans(do), input_precision=PRECISION) - held[:, None] * inner[None, :]
        for before in tl.range(0, tile + 1, num_stages=1):
            at = start - before * TOKENS
            k, weight, present = load_keys(key, key_bias, key_quadratic, at, key_row, row, end - at, D, D_PADDED)
            features = tl.dot(w, tl.trans(k), input_precision=PRECISION) * LOG2_E - reference[:, None]
            features = tl.exp2(features + weight[None, :]).to(PRODUCT)
            v = load_rows(value + tl.cast(at, tl.int64) * value_row, row, value_row, present, E, E_PADDED)
            pairs = tl.dot(v.to(PRODUCT), tl.trans(do), input_precision=PRECISION) - inner[None, :]
            pairs = tl.where(row[:, None] <= row[None, :] + before * TOKENS, pairs, 0.0).to(PRODUCT)
            ds = tl.dot(features, pairs, ds, input_precision=PRECISION)
        logits = tl.dot(u, tl.trans(q), input_precision=PRECISION) * LOG2_E
        # Added up in the order of the forward, whose rounding the log-sums have.
        logits += load_landmark_weight(landmark_bias, reference, landmark, M)[:, None]
        p = tl.exp2(logits - normaliser[None, :])
        ds *= p
        tl.store(grad_delta + piece + landmark, tl.where(held > 0.0, tl.sum(p * inner[None, :], 1), 0.0), mask=inside)
        left = tl.dot(p.to(PRODUCT), do, input_precision=PRECISION)
        store_tile(grad_mean + piece * E, landmark, E, M, tl.where(held[:, None] > 0.0, left, 0.0), E, E_PADDED)
        if grad_landmark_bias is not None:
            tl.store(grad_landmark_bias + piece + landmark, tl.sum(ds, 1), mask=inside)
        ds = tl.trans(ds.to(PRODUCT))
        dq = tl.dot(ds, u.to(PRODUCT), dq, input_precision=PRECISION)
        if grad_query_logits is not None:
            tl.store(
                grad_query_logits + (token + row)[:, None] * M + landmark[None, :],
                ds,
                mask=(row < rows)[:, None] & inside[None, :],
            )
    store_tile(grad_query + token * D, row, D, rows, dq, D, D_PADDED)
