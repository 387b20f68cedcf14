# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""States of segments, the scan over them, and the sum over blocks of landmarks: what surrounds a sweep.

A state is kept as the mean of the values each landmark attends to, the total weight relative to the highest logit,
and that logit, the peak, in units of log 2: two states merge as two softmaxes do.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectraformer.ops.triton.causal_tiles import SIZES, finite, load_chunk, load_state, log2, positive, store_state
from spectraformer.ops.triton.tiles import LOG2_E, load_tile, store_tile


@triton.jit(do_not_specialize=SIZES)
def state_kernel(
    key,
    value,
    key_landmarks,
    key_bias,
    key_quadratic,
    part_mean,  # (b h, pieces, m, e) float32
    part_total,  # (b h, pieces, m) float32
    part_peak,  # (b h, pieces, m) float32, units of log 2
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    key_landmarks_batch,
    key_landmarks_head,
    key_landmarks_row,
    key_bias_batch,
    key_bias_head,
    key_quadratic_batch,
    key_quadratic_head,
    heads,
    n,
    span,
    pieces,
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
    """The state of the keys of one piece of the sequence, one block of landmarks."""
    program = tl.program_id(0)
    block = program % BLOCKS
    piece = (program // BLOCKS) % pieces
    flat = tl.cast(program // (BLOCKS * pieces), tl.int64)
    batch, head = flat // heads, flat % heads
    first = piece * span
    last = tl.minimum(first + span, n)
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    key_landmarks += batch * key_landmarks_batch + head * key_landmarks_head
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head

    landmark = block * LANDMARKS + tl.arange(0, LANDMARKS)
    w = load_tile(key_landmarks, landmark, key_landmarks_row, M, D, D_PADDED).to(key.dtype.element_ty)
    mean = tl.zeros((LANDMARKS, E_PADDED), tl.float32)
    total = tl.zeros((LANDMARKS,), tl.float32)
    top = tl.full((LANDMARKS,), float("-inf"), tl.float32)
    row = tl.arange(0, TOKENS)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        _key, v, logits = load_chunk(
            key, value, key_bias, key_quadratic, start, key_row, value_row, row, last - start, w,
            D, E, D_PADDED, E_PADDED, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(logits, 1))
        features = tl.exp2(logits - finite(higher)[:, None])
        held = total * tl.exp2(top - finite(higher))
        total = held + tl.sum(features, 1)
        share = 1.0 / positive(total)
        # Not the accumulator of the product: scaling it would make every matrix instruction wait for the last.
        gained = tl.dot(features.to(PRODUCT), v.to(PRODUCT), input_precision=PRECISION)
        mean = mean * (held * share)[:, None] + gained * share[:, None]
        top = higher
    store_state(part_mean, part_total, part_peak, flat * pieces + piece, landmark, mean, total, top, M, E, E_PADDED)


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    log_scale,  # (b, h, m), or None before the first key
    sums,  # (b, h, m, e + 1)
    part_mean,  # (b h, (segments - 1) parts, m, e), or None where there is one segment
    part_total,
    part_peak,
    entering_mean,  # (b h, segments, m, e) float32
    entering_total,  # (b h, segments, m) float32
    entering_peak,  # (b h, segments, m) float32, units of log 2
    log_scale_batch,
    log_scale_head,
    sums_batch,
    sums_head,
    sums_row,
    heads,
    segments,
    parts,
    M: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The state that enters each segment: parts merged in their order, whichever finished first."""
    program = tl.program_id(0)
    landmark = (program % tl.cdiv(M, ROWS)) * ROWS + tl.arange(0, ROWS)
    flat = tl.cast(program // tl.cdiv(M, ROWS), tl.int64)
    batch, head = flat // heads, flat % heads
    mean = tl.zeros((ROWS, E_PADDED), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    if log_scale is not None:
        log_scale += batch * log_scale_batch + head * log_scale_head
        sums += batch * sums_batch + head * sums_head
        total = tl.load(sums + landmark * sums_row + E, mask=landmark < M, other=0.0)
        mean = load_tile(sums, landmark, sums_row, M, E, E_PADDED) / positive(total)[:, None]
        top = tl.load(log_scale + landmark, mask=landmark < M, other=float("-inf")) * LOG2_E
    place = flat * segments
    store_state(entering_mean, entering_total, entering_peak, place, landmark, mean, total, top, M, E, E_PADDED)
    if part_mean is not None:
        for segment in range(1, segments):
            for part in range(parts):
                place = flat * (segments - 1) * parts + (segment - 1) * parts + part
                mean_part, total_part, top_part = load_state(
                    part_mean, part_total, part_peak, place, landmark, M, E, E_PADDED
                )
                higher = tl.maximum(top, top_part)
                before = total * tl.exp2(top - finite(higher))
                after = total_part * tl.exp2(top_part - finite(higher))
                total = before + after
                share = 1.0 / positive(total)
                mean = mean * (before * share)[:, None] + mean_part * (after * share)[:, None]
                top = higher
            place = flat * segments + segment
            store_state(entering_mean, entering_total, entering_peak, place, landmark, mean, total, top, M, E, E_PADDED)


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    part,  # (b h g, blocks, n, e)
    part_log_sum,  # (b h g, blocks, n) float32, units of log 2
    out,  # (b h g, n, e)
    query_log_sum,  # (b h g, n) float32, or None
    n,
    BLOCKS: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Outputs of blocks of landmarks weighted by their mass."""
    program = tl.program_id(0)
    start = (program % tl.cdiv(n, ROWS)) * ROWS
    flat = tl.cast(program // tl.cdiv(n, ROWS), tl.int64)
    row = tl.arange(0, ROWS)
    rows = n - start
    part += (flat * BLOCKS * n + start) * E
    part_log_sum += flat * BLOCKS * n + start
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for block in range(BLOCKS):
        top = tl.maximum(top, tl.load(part_log_sum + block * n + row, mask=row < rows, other=float("-inf")))
    mass = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS, E_PADDED), tl.float32)
    for block in range(BLOCKS):
        log_sum = tl.load(part_log_sum + block * n + row, mask=row < rows, other=float("-inf"))
        weight = tl.exp2(log_sum - finite(top))
        mass += weight
        x = load_tile(part + tl.cast(block, tl.int64) * n * E, row, E, rows, E, E_PADDED)
        mean += weight[:, None] * x.to(tl.float32)
    divisor = positive(mass)
    store_tile(out + (flat * n + start) * E, row, E, rows, mean / divisor[:, None], E, E_PADDED)
    if query_log_sum is not None:
        log_sum = tl.where(mass == 0.0, float("-inf"), top + log2(divisor))
        tl.store(query_log_sum + flat * n + start + row, log_sum, mask=row < rows)
