# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Causal forward: programs advance through segments of the sequence in chunks, the state in registers.

Within a chunk features are :math:`e^{\ell^q + R - c}` and :math:`e^{\ell^k - R}` with R the log-sum-exp of the keys
**before** the chunk (before the first key: its logit) and c the maximum over landmarks of a query. A feature of a query
is at most 1 and its denominator at least 1, whatever comes later. A feature of a key may exceed 1: up to 2^SUDDEN
nothing that counts is lost; a chunk with a key beyond that is computed token by token instead.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectraformer.ops.triton.causal_tiles import (
    LN_2,
    SIZES,
    SUDDEN,
    absorb_token,
    finite,
    load_chunk,
    load_state,
    log2,
    positive,
)
from spectraformer.ops.triton.tiles import LOG2_E, load_tile, store_tile


@triton.jit(do_not_specialize=SIZES)
def sweep_kernel(
    query,
    key,
    value,
    query_landmarks,
    key_landmarks,
    landmark_bias,
    key_bias,
    key_quadratic,
    entering_mean,  # (b h, segments, m, e) float32, or None before the first key of a single segment
    entering_total,
    entering_peak,
    out,  # (b h g, blocks, n, e)
    query_log_sum,  # (b h g, blocks, n) float32, units of log 2, or None
    log_scale,  # (b h, m) float32, after the last key
    sums,  # (b h, m, e + 1) float32, likewise
    steepest,  # (b h, segments, blocks) float32: the steepest rise of a logit above its past, units of log 2
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    query_landmarks_batch,
    query_landmarks_head,
    query_landmarks_row,
    key_landmarks_batch,
    key_landmarks_head,
    key_landmarks_row,
    landmark_bias_batch,
    landmark_bias_head,
    key_bias_batch,
    key_bias_head,
    key_quadratic_batch,
    key_quadratic_head,
    heads,
    groups,
    n,
    span,
    segments,
    CAREFUL: tl.constexpr,
    ONE_GROUP: tl.constexpr,
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
    """One segment, one block of landmarks: queries read out the state and the chunk, then the state takes it in.

    Run twice, so that the first run need not hold what the second does: CAREFUL goes over the segments again where a
    logit rose too steeply above its past, token by token through the chunks where it did.
    """
    program = tl.program_id(0)
    block = program % BLOCKS
    segment = (program // BLOCKS) % segments
    flat = tl.cast(program // (BLOCKS * segments), tl.int64)
    place = flat * segments + segment
    if CAREFUL and tl.load(steepest + place * BLOCKS + block) <= SUDDEN:
        return
    batch, head = flat // heads, flat % heads
    first = segment * span
    last = tl.minimum(first + span, n)
    # Query heads of a key head follow one another.
    query += batch * query_batch + head * groups * query_head
    out += (flat * groups * BLOCKS + block) * n * E
    if query_log_sum is not None:
        query_log_sum += (flat * groups * BLOCKS + block) * n
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    key_landmarks += batch * key_landmarks_batch + head * key_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head
    element = key.dtype.element_ty

    landmark = block * LANDMARKS + tl.arange(0, LANDMARKS)
    w = load_tile(key_landmarks, landmark, key_landmarks_row, M, D, D_PADDED).to(element)
    u = load_tile(query_landmarks, landmark, query_landmarks_row, M, D, D_PADDED).to(element)
    bias = tl.load(landmark_bias + landmark, mask=landmark < M, other=float("-inf")) * LOG2_E
    row = tl.arange(0, TOKENS)
    _first_key, _first_value, logits = load_chunk(
        key, value, key_bias, key_quadratic, first, key_row, value_row, row, last - first, w,
        D, E, D_PADDED, E_PADDED, PRECISION,
    )  # fmt: skip
    # Means, totals relative to the highest logit, and whether there is any key (0 or 1). Every query sees the first
    # key: the one reference at hand where none was seen before.
    mean = tl.zeros((LANDMARKS, E_PADDED), tl.float32)
    total = tl.full((LANDMARKS,), 1.0, tl.float32)
    top = tl.max(tl.where(row[None, :] == 0, logits, float("-inf")), 1)
    held = 0.0
    if entering_mean is not None:
        mean, mass, peak = load_state(entering_mean, entering_total, entering_peak, place, landmark, M, E, E_PADDED)
        held = tl.where(tl.max(mass, 0) > 0, 1.0, 0.0)
        total = positive(mass)
        top = tl.where(mass == 0.0, top, peak)

    worst = tl.full((LANDMARKS,), float("-inf"), tl.float32)
    gained = tl.full((LANDMARKS,), 1.0, tl.float32)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        rows = last - start
        _key, v, logits = load_chunk(
            key, value, key_bias, key_quadratic, start, key_row, value_row, row, rows, w,
            D, E, D_PADDED, E_PADDED, PRECISION,
        )  # fmt: skip
        v = v.to(PRODUCT)
        # Here, not where it was gained: a product whose result is read at once keeps the others waiting.
        mean *= (1.0 / gained)[:, None]
        reference = top + log2(total)
        higher = tl.maximum(top, tl.max(logits, 1))
        rise = tl.where(higher == float("-inf"), float("-inf"), higher - reference)
        sudden = False
        if CAREFUL:
            sudden = tl.max(rise, 0) > SUDDEN
            features = tl.exp2(logits - tl.where(sudden, float("inf"), finite(reference))[:, None])
        else:
            worst = tl.maximum(worst, rise)
            features = tl.exp2(logits - finite(reference)[:, None])
        gained = positive(held + tl.sum(features, 1))
        features = features.to(PRODUCT)
        before, held_before = mean.to(PRODUCT), held
        weight = bias + reference
        if sudden:
            mean, total, top = _token_by_token(
                query, key, value, query_landmarks, key_landmarks, key_bias, key_quadratic, out, query_log_sum,
                bias, mean, total * held, top, landmark, start, tl.minimum(start + TOKENS, last), n, groups,
                query_head, query_row, key_row, value_row, query_landmarks_row, key_landmarks_row,
                M, D, E, D_PADDED, E_PADDED, BLOCKS,
            )  # fmt: skip
            gained = tl.full((LANDMARKS,), 1.0, tl.float32)
            rows = 0
        mean = tl.dot(features, v, mean, input_precision=PRECISION)
        total = total * gained * tl.exp2(finite(top) - finite(higher))
        top = higher
        held = 1.0 if key_bias is None else tl.where(tl.max(higher, 0) > float("-inf"), 1.0, held)
        if ONE_GROUP:
            _read_out(
                query, out, query_log_sum, u, weight, features, v, before, held_before, start, rows,
                query_row, D, E, D_PADDED, E_PADDED, TOKENS, PRECISION, PRODUCT,
            )  # fmt: skip
        else:
            for group in range(groups):
                index = tl.cast(group, tl.int64)
                sums_of_group = query_log_sum
                if query_log_sum is not None:
                    sums_of_group = query_log_sum + index * BLOCKS * n
                _read_out(
                    query + index * query_head, out + index * BLOCKS * n * E, sums_of_group,
                    u, weight, features, v, before, held_before, start, rows,
                    query_row, D, E, D_PADDED, E_PADDED, TOKENS, PRECISION, PRODUCT,
                )  # fmt: skip

    if not CAREFUL:
        tl.store(steepest + place * BLOCKS + block, tl.max(worst, 0))
    if segment == segments - 1:
        total *= held
        mean *= (total / gained)[:, None]
        tl.store(log_scale + flat * M + landmark, top * LN_2, mask=landmark < M)
        store_tile(sums + flat * M * (E + 1), landmark, E + 1, M, mean, E, E_PADDED)
        tl.store(sums + (flat * M + landmark) * (E + 1) + E, total, mask=landmark < M)


@triton.jit
def _read_out(
    query, out, query_log_sum, u, weight, features, v, landmark_mean, held, start, rows, query_row,
    D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Outputs of a chunk of queries."""
    row = tl.arange(0, TOKENS)
    offset = tl.cast(start, tl.int64)
    q = load_tile(query + offset * query_row, row, query_row, rows, D, D_PADDED)
    logits = tl.dot(q, tl.trans(u), input_precision=PRECISION) * LOG2_E + weight[None, :]
    top = finite(tl.max(logits, 1))
    p = tl.exp2(logits - top[:, None])
    mass = tl.sum(p, 1) * held
    p = p.to(PRODUCT)
    mean = tl.dot(p, landmark_mean, input_precision=PRECISION)
    scores = tl.dot(p, features, input_precision=PRECISION)
    scores = tl.where(row[:, None] >= row[None, :], scores, 0.0)
    mass += tl.sum(scores, 1)
    mean = tl.dot(scores.to(PRODUCT), v, mean, input_precision=PRECISION)
    # A query without any key: 0.
    divisor = positive(mass)
    store_tile(out + offset * E, row, E, rows, mean * (1.0 / divisor)[:, None], E, E_PADDED)
    if query_log_sum is not None:
        log_sum = tl.where(mass == 0.0, float("-inf"), top + log2(divisor))
        tl.store(query_log_sum + start + row, log_sum, mask=row < rows)


@triton.jit
def _token_by_token(
    query, key, value, query_landmarks, key_landmarks, key_bias, key_quadratic, out, query_log_sum,
    bias, mean, total, top, landmark, first, last, n, groups,
    query_head, query_row, key_row, value_row, query_landmarks_row, key_landmarks_row,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Outputs of tokens first..last-1 and the state after them: each query has the reference of its own past."""
    element = key.dtype.element_ty
    w = load_tile(key_landmarks, landmark, key_landmarks_row, M, D, D_PADDED).to(element).to(tl.float32)
    column, column_e = tl.arange(0, D_PADDED), tl.arange(0, E_PADDED)
    for token in range(first, last):
        offset = tl.cast(token, tl.int64)
        mean, total, top = absorb_token(
            key + offset * key_row, value + offset * value_row, key_bias, key_quadratic, token, w, mean, total, top,
            D, E, D_PADDED, E_PADDED,
        )  # fmt: skip
        for group in range(groups):
            index = tl.cast(group, tl.int64)
            q = tl.load(query + index * query_head + offset * query_row + column, mask=column < D, other=0.0)
            u = load_tile(query_landmarks, landmark, query_landmarks_row, M, D, D_PADDED).to(element).to(tl.float32)
            x = tl.sum(u * q.to(tl.float32)[None, :], 1) * LOG2_E + bias + top
            peak = finite(tl.max(x, 0))
            p = tl.exp2(x - peak) * total
            mass = tl.sum(p, 0)
            result = tl.sum(p[:, None] * mean, 0) / positive(mass)
            place = index * BLOCKS * n + token
            tl.store(out + place * E + column_e, result.to(out.dtype.element_ty), mask=column_e < E)
            if query_log_sum is not None:
                log_sum = tl.where(mass == 0.0, float("-inf"), peak + log2(positive(mass)))
                tl.store(query_log_sum + place, log_sum)
    return mean, total, top
