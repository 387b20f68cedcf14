# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""States of chunks, each of its own keys alone, all at the same time.

A state is kept as the mean of the values each landmark attends to, the total weight relative to the highest logit,
and that logit, the peak, in units of log 2: two states merge as two softmaxes do.

Legend: b batch, h key heads, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectraformer.ops.triton.causal_tiles import SIZES, chunk_tokens, finite, load_keys, positive, sequence_chunks
from spectraformer.ops.triton.tiles import LOG2_E, load_rows, load_tile, store_tile


@triton.jit(do_not_specialize=SIZES)
def chunk_sequence_kernel(
    boundaries,  # (sequences + 1,)
    chunk_sequence,  # (chunks,) int32; of chunks of no sequence nothing is written
    n, chunks,
    CHUNK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Which packed sequence chunks belong to: a program a sequence."""
    sequence = tl.program_id(0)
    _begin, _end, first, count = sequence_chunks(boundaries, sequence, n, chunks, CHUNK)
    chunk = tl.arange(0, AT_ONCE)
    for start in range(0, count, AT_ONCE):
        here = tl.full((AT_ONCE,), 0, tl.int32) + sequence
        tl.store(chunk_sequence + first + start + chunk, here, mask=start + chunk < count)


@triton.jit(do_not_specialize=SIZES)
def round_kernel(
    query_landmarks,  # (b | 1, h | 1, m, d) float32
    key_landmarks,  # likewise
    rounded_query_landmarks,  # the same dense, in the dtype of the keys
    rounded_key_landmarks, query_landmarks_batch, query_landmarks_head, query_landmarks_row, key_landmarks_batch,
    key_landmarks_head, key_landmarks_row, query_heads, key_heads,
    of_queries,  # programs for landmarks of queries; the others are for those of keys
    M: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, ROUND_ROWS: tl.constexpr,
):  # fmt: skip
    """Landmarks as products take them: every chunk reads them again, so half the bytes count."""
    program = tl.program_id(0)
    if program < of_queries:
        _round(
            query_landmarks, rounded_query_landmarks, query_landmarks_batch, query_landmarks_head, query_landmarks_row,
            query_heads, program, M, D, D_PADDED, ROUND_ROWS,
        )  # fmt: skip
    else:
        _round(
            key_landmarks, rounded_key_landmarks, key_landmarks_batch, key_landmarks_head, key_landmarks_row,
            key_heads, program - of_queries, M, D, D_PADDED, ROUND_ROWS,
        )  # fmt: skip


@triton.jit
def _round(
    landmarks, rounded, batch, head, row, heads, program,
    M: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    landmark = (program % tl.cdiv(M, ROWS)) * ROWS + tl.arange(0, ROWS)
    flat = tl.cast(program // tl.cdiv(M, ROWS), tl.int64)
    x = load_tile(landmarks + (flat // heads) * batch + (flat % heads) * head, landmark, row, M, D, D_PADDED)
    store_tile(rounded + flat * M * D, landmark, D, M, x, D, D_PADDED)


@triton.jit(do_not_specialize=SIZES)
def chunk_state_kernel(
    key, value, key_landmarks, key_bias, key_quadratic,
    boundaries,  # (sequences + 1,): sequences are packed into one batch item; or None
    chunk_sequence,  # (chunks,) int32 where they are
    part_mean,  # (b h, chunks, m, e)
    part_total,  # (b h, chunks, m) float32
    part_peak,  # (b h, chunks, m) float32, units of log 2
    first,  # (b h, chunks, m) float32, units of log 2: logits of the first key, written where none may be before it
    key_batch, key_head, key_row, value_batch, value_head, value_row, key_landmarks_batch, key_landmarks_head,
    key_bias_batch, key_bias_head, key_quadratic_batch, key_quadratic_head, heads, n, chunks, sequences,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr, LANDMARKS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    """One chunk, one block of landmarks, along the rows."""
    program = tl.program_id(0)
    block = program % BLOCKS
    chunk = (program // BLOCKS) % chunks
    flat = tl.cast(program // (BLOCKS * chunks), tl.int64)
    batch, head = flat // heads, flat % heads
    start, end, _sequence = chunk_tokens(boundaries, chunk_sequence, chunk, n, chunks, sequences, TOKENS)
    if boundaries is not None:  # noqa: SIM102 - the first is known when compiled
        if start >= end:
            return
    place = (flat * chunks + chunk) * M
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head + tl.cast(start, tl.int64) * value_row
    key_landmarks += batch * key_landmarks_batch + head * key_landmarks_head
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head

    row = tl.arange(0, TOKENS)
    landmark = block * LANDMARKS + tl.arange(0, LANDMARKS)
    inside = landmark < M
    w = load_tile(key_landmarks, landmark, D, M, D, D_PADDED)
    k, weight, present = load_keys(key, key_bias, key_quadratic, start, key_row, row, end - start, D, D_PADDED)
    v = load_rows(value, row, value_row, present, E, E_PADDED)
    logits = tl.dot(w, tl.trans(k), input_precision=PRECISION) * LOG2_E + weight[None, :]
    peak = tl.max(logits, 1)
    features = tl.exp2(logits - finite(peak)[:, None])
    total = tl.sum(features, 1)
    mean = tl.dot(features.to(PRODUCT), v.to(PRODUCT), input_precision=PRECISION)
    store_tile(part_mean + place * E, landmark, E, M, mean * (1.0 / positive(total))[:, None], E, E_PADDED)
    tl.store(part_total + place + landmark, total, mask=inside)
    tl.store(part_peak + place + landmark, peak, mask=inside)
    if (chunk == 0) | (key_bias is not None) | (boundaries is not None):
        earliest = tl.min(tl.where(present, row, TOKENS), 0)
        tl.store(first + place + landmark, tl.sum(tl.where(row[None, :] == earliest, logits, 0.0), 1), mask=inside)
