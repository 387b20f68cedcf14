# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Causal forward by stretches of many chunks: a program goes through one with its landmarks and its state on chip.

States are needed at the ends of stretches alone, and weights of keys serve both the outputs of their chunk and the
state. With O the mean of the values of all keys before a chunk, as each landmark weighs them, L its log-sum-exp, and
features :math:`f_{in} = e^{\ell^k_{in} - L_i}` of keys, :math:`p_{ti} = e^{\ell^q_{ti} + L_i - c_t}` of queries:

.. math::
    y_t = \frac{\sum_i p_{ti} O_i + \sum_{n \le t} \sum_i p_{ti} f_{in} v_n}
               {\sum_i p_{ti} + \sum_{n \le t} \sum_i p_{ti} f_{in}}, \quad
    O_i \leftarrow \frac{O_i + \sum_n f_{in} v_n}{1 + \sum_n f_{in}}, \quad
    L_i \leftarrow L_i + \log\Bigl(1 + \sum_n f_{in}\Bigr).

The same references as in ``causal_forward``, with the same consequences. Where a chunk is steep its features are taken
relative to its own highest logit as well, so that the state stays right, and ``steep_stretch_kernel`` computes its
outputs again.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectraformer.ops.triton.causal_steep import attend_steeply
from spectraformer.ops.triton.causal_tiles import (
    LN_2,
    SIZES,
    SUDDEN,
    finite,
    load_landmark_weight,
    log2,
    log_sum_exp,
    positive,
)
from spectraformer.ops.triton.tiles import LOG2_E, NARROW, exponent_parts, load_keys, load_tile, store_tile


@triton.jit(do_not_specialize=SIZES)
def stretch_scan_kernel(
    partial_value,  # (b h, stretches, m padded, e) float32: sums over the keys of a stretch, relative to its peak
    partial_peak,  # (b h, stretches, m padded) float32, units of log 2
    partial_total,  # (b h, stretches, m padded) float32
    log_scale,  # (b, h, m), or None before the first key
    sums,  # (b, h, m, e + 1)
    stretch_mean,  # (b h, stretches, m, e) float32: before each stretch
    stretch_log_sum,  # (b h, stretches, m) float32, units of log 2
    log_scale_after,  # (b h, m) float32
    sums_after,  # (b h, m, e + 1) float32
    log_scale_batch, log_scale_head, sums_batch, sums_head, sums_row, heads, stretches, m_padded,
    M: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_BLOCKS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state before each stretch, in their order: a tile of landmarks and value dims."""
    program = tl.program_id(0)
    column_block, row_block = program % COLUMN_BLOCKS, (program // COLUMN_BLOCKS) % ROW_BLOCKS
    flat = tl.cast(program // (COLUMN_BLOCKS * ROW_BLOCKS), tl.int64)
    batch, head = flat // heads, flat % heads
    landmark = row_block * ROWS + tl.arange(0, ROWS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    inside = landmark < M
    mine = inside & (column_block == 0)
    tile = inside[:, None] & (column < E)[None, :]
    offset = landmark[:, None] * E + column[None, :]

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
    for stretch in tl.range(0, stretches, num_stages=STAGES):
        place = flat * stretches + stretch
        peak = tl.load(partial_peak + place * m_padded + landmark, mask=inside, other=float("-inf"))
        gained = tl.load(partial_total + place * m_padded + landmark, mask=inside, other=0.0)
        more = tl.load(partial_value + place * m_padded * E + offset, mask=tile, other=0.0)

        tl.store(stretch_mean + place * M * E + offset, s * (1.0 / positive(total))[:, None], mask=tile)
        tl.store(stretch_log_sum + place * M + landmark, log_sum_exp(top, total), mask=mine)
        higher = tl.maximum(top, peak)
        shrink, grow = tl.exp2(top - finite(higher)), tl.exp2(peak - finite(higher))
        s = s * shrink[:, None] + more * grow[:, None]
        total = total * shrink + gained * grow
        top = higher
    tl.store(log_scale_after + flat * M + landmark, top * LN_2, mask=mine)
    sums_after += flat * M * (E + 1)
    tl.store(sums_after + landmark * (E + 1) + E, total, mask=mine)
    tl.store(sums_after + landmark[:, None] * (E + 1) + column[None, :], s, mask=tile)


@triton.jit
def features_of_keys(w, k, weight, log_sum, inside, PRECISION: tl.constexpr, PRODUCT: tl.constexpr):
    """Features of a chunk of keys, landmarks along the rows.

    Returns:
        Features in the dtype of products; what they are relative to (units of log 2); what is left of the past relative
        to that, 0 where there is none; the steepest rise of a logit above its past.
    """
    logits = tl.dot(w, tl.trans(k), input_precision=PRECISION) * LOG2_E + weight[None, :]
    alone = log_sum == float("-inf")
    reference = log_sum
    if tl.max(alone.to(tl.int32), 0) > 0:
        # Before the first key: its logit.
        row = tl.arange(0, k.shape[0])
        earliest = tl.min(tl.where(weight != float("-inf"), row, k.shape[0]), 0)
        first = tl.sum(tl.where(row[None, :] == earliest, logits, 0.0), 1)
        reference = tl.where(alone, first, log_sum)
    rise = tl.maximum(tl.max(logits, 1) - reference, 0.0)
    steepest = tl.max(tl.where(inside, rise, 0.0), 0)
    rise = tl.where(steepest > SUDDEN, rise, 0.0)
    reference += rise
    features = tl.exp2(logits - reference[:, None]).to(PRODUCT)
    return features, reference, tl.where(alone, 0.0, tl.exp2(-rise)), steepest


@triton.jit
def absorb_chunk(features, kept, reference, v, mean, PRECISION: tl.constexpr, PRODUCT: tl.constexpr):
    """The state after a chunk of keys, given their features in the dtype of products."""
    ones = tl.full((v.shape[0], NARROW), 1.0, PRODUCT)
    total = kept + tl.max(tl.dot(features, ones, input_precision=PRECISION), 1)
    mean = tl.dot(features, v, mean * kept[:, None], input_precision=PRECISION)
    log_sum = tl.where(total == 0.0, float("-inf"), reference + log2(positive(total)))
    return mean * (1.0 / positive(total))[:, None], log_sum


@triton.jit(do_not_specialize=SIZES)
def stretch_output_kernel(
    query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic,
    stretch_mean,  # (b h, stretches, m, e) float32
    stretch_log_sum,  # (b h, stretches, m) float32, units of log 2
    out,  # (b h g, n, e)
    stretch_steepest,  # (b h, stretches) float32, units of log 2: the steepest rise of a logit above its past
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    query_landmarks_batch, query_landmarks_head, key_landmarks_batch, key_landmarks_head, landmark_bias_batch,
    landmark_bias_head, key_bias_batch, key_bias_head, key_quadratic_batch, key_quadratic_head, heads, groups, n,
    span, stretches,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    LANDMARKS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    PRODUCT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One stretch of one query head, chunk after chunk."""
    program = tl.program_id(0)
    group = tl.cast(program % groups, tl.int64)
    stretch = (program // groups) % stretches
    flat = tl.cast(program // (groups * stretches), tl.int64)
    batch, head = flat // heads, flat % heads
    place = flat * stretches + stretch
    begin = stretch * span
    end = tl.minimum(begin + span, n)
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
    out += (flat * groups + group) * n * E

    row, landmark = tl.arange(0, TOKENS), tl.arange(0, LANDMARKS)
    inside = landmark < M
    u = load_tile(query_landmarks, landmark, D, M, D, D_PADDED)
    w = load_tile(key_landmarks, landmark, D, M, D, D_PADDED)
    mean = load_tile(stretch_mean + place * M * E, landmark, E, M, E, E_PADDED)
    log_sum = tl.load(stretch_log_sum + place * M + landmark, mask=inside, other=0.0)
    ones = tl.full((TOKENS, NARROW), 1.0, PRODUCT)
    worst = 0.0
    for start in tl.range(begin, end, TOKENS, num_stages=STAGES):
        offset = tl.cast(start, tl.int64)
        rows = end - start
        if EVEN:
            rows = None
        k, v, weight = load_keys(
            key, value, key_bias, key_quadratic, start, rows, key_row, value_row, D, E, D_PADDED, E_PADDED, TOKENS
        )
        v = v.to(PRODUCT)
        q = load_tile(query + offset * query_row, row, query_row, rows, D, D_PADDED)
        features, reference, kept, steepest = features_of_keys(w, k, weight, log_sum, inside, PRECISION, PRODUCT)
        worst = tl.maximum(worst, steepest)
        # The state first: what comes after it needs the registers of the one before.
        entering = (mean * kept[:, None]).to(PRODUCT)
        mean, log_sum = absorb_chunk(features, kept, reference, v, mean, PRECISION, PRODUCT)
        # Vectors along columns take many registers: in products, what landmarks add and what is left of them take few.
        own = exponent_parts(load_landmark_weight(landmark_bias, reference, landmark, M), PRODUCT)
        logits = tl.dot(ones, tl.trans(own), input_precision=PRECISION)
        logits = tl.dot(q, tl.trans(u), logits, input_precision=PRECISION)
        p = tl.exp2((logits - tl.max(logits, 1)[:, None]) * LOG2_E).to(PRODUCT)
        past = (kept[:, None] + tl.zeros((LANDMARKS, NARROW), tl.float32)).to(PRODUCT)
        masses = tl.dot(p, past, input_precision=PRECISION)
        result = tl.dot(p, entering, input_precision=PRECISION)
        scores = tl.dot(p, features, input_precision=PRECISION)
        scores = tl.where(row[:, None] >= row[None, :], scores, 0.0).to(PRODUCT)
        mass = tl.max(masses, 1) + tl.sum(scores.to(tl.float32), 1)
        result = tl.dot(scores, v, result, input_precision=PRECISION)
        # A query without any key: 0.
        store_tile(out + offset * E, row, E, rows, result * (1.0 / positive(mass))[:, None], E, E_PADDED)
    if group == 0:
        tl.store(stretch_steepest + place, worst)


@triton.jit(do_not_specialize=SIZES)
def steep_stretch_kernel(
    query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic,
    stretch_mean,  # (b h, stretches, m, e) float32; used up
    stretch_log_sum,  # (b h, stretches, m) float32, units of log 2; used up
    stretch_steepest,  # (b h, stretches) float32, units of log 2
    out,  # (b h g, n, e)
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    query_landmarks_batch, query_landmarks_head, key_landmarks_batch, key_landmarks_head, landmark_bias_batch,
    landmark_bias_head, key_bias_batch, key_bias_head, key_quadratic_batch, key_quadratic_head, heads, groups, n,
    span, stretches,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    LANDMARKS: tl.constexpr, TOKENS: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    """Outputs of steep chunks of one stretch and key head, once more."""
    program = tl.program_id(0)
    stretch = program % stretches
    flat = tl.cast(program // stretches, tl.int64)
    place = flat * stretches + stretch
    if tl.load(stretch_steepest + place) <= SUDDEN:
        return
    batch, head = flat // heads, flat % heads
    begin = stretch * span
    end = tl.minimum(begin + span, n)
    query += batch * query_batch + head * groups * query_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    key_landmarks += batch * key_landmarks_batch + head * key_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head
    stretch_mean += place * M * E
    stretch_log_sum += place * M
    landmark = tl.arange(0, LANDMARKS)
    inside = landmark < M
    w = load_tile(key_landmarks, landmark, D, M, D, D_PADDED)
    # The state goes through memory, where outputs read it landmark by landmark.
    for start in range(begin, end, TOKENS):
        k, v, weight = load_keys(
            key, value, key_bias, key_quadratic, start, end - start, key_row, value_row, D, E, D_PADDED, E_PADDED,
            TOKENS,
        )  # fmt: skip
        v = v.to(PRODUCT)
        log_sum = tl.load(stretch_log_sum + landmark, mask=inside, other=0.0)
        features, reference, kept, steepest = features_of_keys(w, k, weight, log_sum, inside, PRECISION, PRODUCT)
        for group in range(groups):
            index = tl.cast(group, tl.int64)
            attend_steeply(
                query + index * query_head, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias,
                key_quadratic, stretch_mean, stretch_log_sum, out, None, (flat * groups + index) * n, start, end,
                steepest > SUDDEN, query_row, key_row, value_row,
                M, D, E, D_PADDED, E_PADDED, TOKENS, QUERIES, PRECISION, PRODUCT,
            )  # fmt: skip
        mean = load_tile(stretch_mean, landmark, E, M, E, E_PADDED)
        mean, log_sum = absorb_chunk(features, kept, reference, v, mean, PRECISION, PRODUCT)
        tl.debug_barrier()  # the state was read by others than write it
        store_tile(stretch_mean, landmark, E, M, mean, E, E_PADDED)
        tl.store(stretch_log_sum + landmark, log_sum, mask=inside)
        tl.debug_barrier()
