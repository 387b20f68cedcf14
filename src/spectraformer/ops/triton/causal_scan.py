# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The scans over chunks: states forward, what later queries leave backward. The only loops along the sequence.

Loads do not depend on what is carried, so they are in flight many chunks ahead; what is carried is float32.

Legend: b batch, h key heads, g query heads per key head, m landmarks, e value dim. Where sequences are packed, b is 1,
and what stands for the end of a sequence, (b h, ...) below, is (sequences h, ...).
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectraformer.ops.triton.causal_tiles import (
    LN_2,
    SIZES,
    finite,
    locate_sequence,
    log_sum_exp,
    positive,
    suffix_reference,
)
from spectraformer.ops.triton.tiles import LOG2_E


@triton.jit
def _tile(landmark, column, row, M: tl.constexpr, E: tl.constexpr):
    """Offsets of a tile of a state, and what of it there is."""
    return landmark[:, None] * row + column[None, :], (landmark < M)[:, None] & (column < E)[None, :]


@triton.jit
def _sequence(program, boundaries, heads, n, chunks, sequences, CHUNK: tl.constexpr):
    """Of a program: its sequence and head in states at ends, number of chunks, first rows of states and of sums."""
    flat, sequence, _begin, _end, count, place, row = locate_sequence(
        program, boundaries, n, chunks, sequences, CHUNK
    )  # fmt: skip
    item = flat
    if boundaries is not None:
        item = tl.cast(sequence, tl.int64) * heads + flat
    return item, count, place, row


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    boundaries,  # (sequences + 1,): sequences are packed into one batch item; or None
    part_mean,  # (b h, chunks, m, e)
    part_total,  # (b h, chunks, m) float32
    part_peak,  # (b h, chunks, m) float32, units of log 2
    first,  # (b h, chunks, m) float32, units of log 2
    log_scale,  # (b, h, m), or None before the first key
    sums,  # (b, h, m, e + 1)
    entering_mean,  # (b h, chunks, m, e)
    log_sum,  # (b h, chunks + sequences, m) float32, units of log 2: before each chunk and after the last
    steepest,  # (b h, chunks + sequences, row blocks) float32, units of log 2: rise of a logit; last: the most
    log_scale_after,  # (b h, m) float32
    sums_after,  # (b h, m, e + 1) float32
    log_scale_batch, log_scale_head, sums_batch, sums_head, sums_row, heads, n, chunks, sequences,
    M: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_BLOCKS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state that enters each chunk, in the order of chunks: a tile of landmarks and value dims."""
    program = tl.program_id(0)
    column_block, row_block = program % COLUMN_BLOCKS, (program // COLUMN_BLOCKS) % ROW_BLOCKS
    item, count, begin, row = _sequence(
        program // (COLUMN_BLOCKS * ROW_BLOCKS), boundaries, heads, n, chunks, sequences, CHUNK
    )  # fmt: skip
    batch, head = item // heads, item % heads
    landmark = row_block * ROWS + tl.arange(0, ROWS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    inside = landmark < M
    mine = inside & (column_block == 0)
    offset, tile = _tile(landmark, column, E, M, E)

    s = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    if log_scale is not None:
        sums += batch * sums_batch + head * sums_head
        top = tl.load(
            log_scale + batch * log_scale_batch + head * log_scale_head + landmark, mask=inside, other=float("-inf")
        )
        top *= LOG2_E
        total = tl.load(sums + landmark * sums_row + E, mask=inside, other=0.0)
        s = tl.load(sums + landmark[:, None] * sums_row + column[None, :], mask=tile, other=0.0)
    last = tl.cast(count, tl.int64)
    worst = tl.full((ROWS,), float("-inf"), tl.float32)
    steepest += row * ROW_BLOCKS + row_block
    log_sum += row * M
    for chunk in tl.range(0, count, num_stages=STAGES):
        at = tl.cast(chunk, tl.int64)
        place = (begin + chunk) * M
        peak = tl.load(part_peak + place + landmark, mask=inside, other=float("-inf"))
        gained = tl.load(part_total + place + landmark, mask=inside, other=0.0)
        mean = tl.load(part_mean + place * E + offset, mask=tile, other=0.0).to(tl.float32)
        alone = tl.load(first + place + landmark, mask=inside, other=0.0)

        before = (s * (1.0 / positive(total))[:, None]).to(entering_mean.dtype.element_ty)
        tl.store(entering_mean + place * E + offset, before, mask=tile)
        entering = log_sum_exp(top, total)
        tl.store(log_sum + at * M + landmark, entering, mask=mine)
        rise = peak - tl.where(entering == float("-inf"), alone, entering)
        rise = tl.where(peak == float("-inf"), float("-inf"), rise)
        worst = tl.maximum(worst, rise)
        tl.store(steepest + at * ROW_BLOCKS, tl.max(rise, 0), mask=column_block == 0)

        higher = tl.maximum(top, peak)
        shrink = tl.exp2(top - finite(higher))
        gained *= tl.exp2(peak - finite(higher))
        s = s * shrink[:, None] + mean * gained[:, None]
        total = total * shrink + gained
        top = higher
    tl.store(steepest + last * ROW_BLOCKS, tl.max(worst, 0), mask=column_block == 0)
    tl.store(log_sum + last * M + landmark, log_sum_exp(top, total), mask=mine)
    tl.store(log_scale_after + item * M + landmark, top * LN_2, mask=mine)
    sums_after += item * M * (E + 1)
    tl.store(sums_after + landmark * (E + 1) + E, total, mask=mine)
    tl.store(sums_after + landmark[:, None] * (E + 1) + column[None, :], s, mask=tile)


@triton.jit(do_not_specialize=SIZES)
def reverse_scan_kernel(
    boundaries,  # (sequences + 1,): sequences are packed into one batch item; or None
    grad_mean,  # (b h, chunks, pieces, m, e): sums over queries of a piece of their weight of the past times gradient
    grad_delta,  # (b h, chunks, pieces, m) float32: of that weight times their delta
    log_sum,  # (b h, chunks + sequences, m) float32, units of log 2
    first,  # (b h, chunks, m) float32, units of log 2
    grad_sums_after,  # (b h, m, e + 1) float32, gradient of the sums after the last key, or None
    log_scale_after,  # (b h, m) float32
    suffix_value,  # (b h, chunks, m, e): what queries after each chunk leave, relative to suffix_reference
    suffix_delta,  # (b h, chunks, m) float32
    log_scale,  # (b, h, m) before the first key, or None
    grad_sums,  # (b h, m, e + 1) float32, gradient of the sums before the first key, or None
    log_scale_batch, log_scale_head, heads, pieces, n, chunks, sequences,
    M: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_BLOCKS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first, pieces of a chunk in their order."""
    program = tl.program_id(0)
    column_block, row_block = program % COLUMN_BLOCKS, (program // COLUMN_BLOCKS) % ROW_BLOCKS
    item, count, begin, row = _sequence(
        program // (COLUMN_BLOCKS * ROW_BLOCKS), boundaries, heads, n, chunks, sequences, CHUNK
    )  # fmt: skip
    landmark = row_block * ROWS + tl.arange(0, ROWS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    inside = landmark < M
    mine = inside & (column_block == 0)
    offset, tile = _tile(landmark, column, E, M, E)

    value = tl.zeros((ROWS, COLUMNS), tl.float32)
    delta = tl.zeros((ROWS,), tl.float32)
    log_sum += row * M
    if grad_sums_after is not None:
        grad_sums_after += item * M * (E + 1)
        scale = tl.load(log_scale_after + item * M + landmark, mask=inside, other=0.0) * LOG2_E
        after = tl.load(log_sum + tl.cast(count, tl.int64) * M + landmark, mask=inside, other=float("-inf"))
        weight = tl.exp2(after - finite(scale))
        value = tl.load(grad_sums_after + landmark[:, None] * (E + 1) + column[None, :], mask=tile, other=0.0)
        value *= weight[:, None]
        delta = -weight * tl.load(grad_sums_after + landmark * (E + 1) + E, mask=inside, other=0.0)
    for i in tl.range(0, count * pieces, num_stages=STAGES):
        chunk, index = tl.cast(count - 1 - i // pieces, tl.int64), i % pieces
        piece = ((begin + chunk) * pieces + index) * M
        more = tl.load(grad_mean + piece * E + offset, mask=tile, other=0.0).to(tl.float32)
        more_delta = tl.load(grad_delta + piece + landmark, mask=inside, other=0.0)
        before = tl.load(log_sum + chunk * M + landmark, mask=inside, other=float("-inf"))
        after = tl.load(log_sum + (chunk + 1) * M + landmark, mask=inside, other=float("-inf"))
        place = (begin + chunk) * M
        alone = tl.load(first + place + landmark, mask=inside, other=0.0)

        starts = index == 0
        reference = suffix_reference(tl.where(before == float("-inf"), alone, before), after)
        fade = tl.where(after == float("-inf"), 0.0, tl.exp2(reference - finite(after)))
        left = (value * fade[:, None]).to(suffix_value.dtype.element_ty)
        tl.store(suffix_value + place * E + offset, left, mask=tile & starts)
        tl.store(suffix_delta + place + landmark, delta * fade, mask=mine & starts)
        shrink = tl.where(starts, tl.exp2(before - finite(after)), 1.0)
        value = value * shrink[:, None] + more
        delta = delta * shrink + more_delta
    if grad_sums is not None:
        batch, head = item // heads, item % heads
        scale = tl.load(
            log_scale + batch * log_scale_batch + head * log_scale_head + landmark, mask=inside, other=float("-inf")
        )
        weight = tl.exp2(scale * LOG2_E - finite(tl.load(log_sum + landmark, mask=inside, other=0.0)))
        grad_sums += item * M * (E + 1)
        tl.store(grad_sums + landmark[:, None] * (E + 1) + column[None, :], value * weight[:, None], mask=tile)
        tl.store(grad_sums + landmark * (E + 1) + E, -delta * weight, mask=mine)
