# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Causal backward of queries: the forward's states once more, and what queries leave for the keys before them.

With :math:`p_{ti}` the weight of landmark i's past for query t (the forward's features over their denominator),
:math:`f_{in}` the features of keys relative to that past, :math:`O` its mean, primes for gradients:

.. math::
    S_{ti} = p_{ti} \Bigl(o'_t\cdot O_i - \delta_t + \sum_{n \le t} f_{in} (o'_t\cdot v_n - \delta_t)\Bigr),
    \quad \delta_t = o'_t\cdot o_t, \quad q' = S u, \quad u' = S^\top q, \quad a' = S^\top 1

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectraformer.ops.triton.causal_tiles import (
    SIZES,
    SUDDEN,
    absorb_token,
    finite,
    load_chunk,
    load_normaliser,
    load_state,
    log2,
    positive,
)
from spectraformer.ops.triton.tiles import LOG2_E, load_tile, store_tile


@triton.jit(do_not_specialize=SIZES)
def query_sweep_kernel(
    query,
    key,
    value,
    query_landmarks,
    key_landmarks,
    landmark_bias,
    key_bias,
    key_quadratic,
    out,  # (b h g, n, e)
    grad,  # (b, h g, n, e)
    query_log_sum,  # (b h g, n) float32, units of log 2
    entering_mean,  # (b h, segments, m, e) float32, or None before the first key of a single segment
    entering_total,
    entering_peak,
    reference,  # (b h, chunks, m) float32, units of log 2: what features of a chunk are relative to
    delta,  # (b h g, n) float32
    steepest,  # (b h, segments, blocks) float32, units of log 2
    grad_query,  # (b h g, blocks, n, d)
    grad_query_landmarks,  # (b h, segments, m, d) float32, or None
    grad_landmark_bias,  # (b h, segments, m) float32, or None
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    grad_batch,
    grad_head,
    grad_row,
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
    """One segment, one block of landmarks, chunk after chunk; landmarks along the rows. CAREFUL as in the forward."""
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
    query += batch * query_batch + head * groups * query_head
    grad += batch * grad_batch + head * groups * grad_head
    out += flat * groups * n * E
    query_log_sum += flat * groups * n
    delta += flat * groups * n
    grad_query += (flat * groups * BLOCKS + block) * n * D
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
    mean = tl.zeros((LANDMARKS, E_PADDED), tl.float32)
    total = tl.full((LANDMARKS,), 1.0, tl.float32)
    top = tl.max(tl.where(row[None, :] == 0, logits, float("-inf")), 1)
    held = 0.0
    if entering_mean is not None:
        mean, mass, peak = load_state(entering_mean, entering_total, entering_peak, place, landmark, M, E, E_PADDED)
        held = tl.where(tl.max(mass, 0) > 0, 1.0, 0.0)
        total = positive(mass)
        top = tl.where(mass == 0.0, top, peak)

    sum_landmarks = tl.zeros((LANDMARKS, D_PADDED), tl.float32)
    sum_bias = tl.zeros((LANDMARKS,), tl.float32)
    worst = tl.full((LANDMARKS,), float("-inf"), tl.float32)
    gained = tl.full((LANDMARKS,), 1.0, tl.float32)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        rows = last - start
        _key, v, logits = load_chunk(
            key, value, key_bias, key_quadratic, start, key_row, value_row, row, rows, w,
            D, E, D_PADDED, E_PADDED, PRECISION,
        )  # fmt: skip
        v = v.to(PRODUCT)
        mean *= (1.0 / gained)[:, None]
        past = top + log2(total)
        chunk = flat * tl.cdiv(n, TOKENS) + start // TOKENS
        tl.store(reference + chunk * M + landmark, past, mask=landmark < M)
        higher = tl.maximum(top, tl.max(logits, 1))
        rise = tl.where(higher == float("-inf"), float("-inf"), higher - past)
        sudden = False
        if CAREFUL:
            sudden = tl.max(rise, 0) > SUDDEN
            features = tl.exp2(logits - tl.where(sudden, float("inf"), finite(past))[:, None])
        else:
            worst = tl.maximum(worst, rise)
            features = tl.exp2(logits - finite(past)[:, None])
        gained = positive(held + tl.sum(features, 1))
        features = features.to(PRODUCT)
        before, held_before = mean.to(PRODUCT), held
        if sudden:
            mean, total, top, sum_landmarks, sum_bias = _token_by_token(
                query, key, value, grad, key_bias, key_quadratic, query_log_sum, delta, grad_query,
                query_landmarks, key_landmarks, bias, landmark, mean, total * held, top, sum_landmarks, sum_bias,
                start, tl.minimum(start + TOKENS, last), n, groups,
                query_head, query_row, key_row, value_row, grad_head, grad_row,
                query_landmarks_row, key_landmarks_row, M, D, E, D_PADDED, E_PADDED, BLOCKS,
            )  # fmt: skip
            gained = tl.full((LANDMARKS,), 1.0, tl.float32)
            rows = 0
        if ONE_GROUP:
            sum_landmarks, sum_bias = _gradients(
                query, grad, out, query_log_sum, delta, grad_query, u, bias + past, before, held_before,
                features, v, sum_landmarks, sum_bias, start, rows, query_row, grad_row, block == 0,
                grad_query_landmarks is not None, grad_landmark_bias is not None,
                D, E, D_PADDED, E_PADDED, TOKENS, PRECISION, PRODUCT,
            )  # fmt: skip
        else:
            for group in range(groups):
                index = tl.cast(group, tl.int64)
                skip = index * n
                sum_landmarks, sum_bias = _gradients(
                    query + index * query_head, grad + index * grad_head, out + skip * E, query_log_sum + skip,
                    delta + skip, grad_query + skip * BLOCKS * D, u, bias + past, before, held_before,
                    features, v, sum_landmarks, sum_bias, start, rows, query_row, grad_row, block == 0,
                    grad_query_landmarks is not None, grad_landmark_bias is not None,
                    D, E, D_PADDED, E_PADDED, TOKENS, PRECISION, PRODUCT,
                )  # fmt: skip
        mean = tl.dot(features, v, mean, input_precision=PRECISION)
        total = total * gained * tl.exp2(finite(top) - finite(higher))
        top = higher
        held = 1.0 if key_bias is None else tl.where(tl.max(higher, 0) > float("-inf"), 1.0, held)

    if not CAREFUL:
        tl.store(steepest + place * BLOCKS + block, tl.max(worst, 0))
    if grad_query_landmarks is not None:
        store_tile(grad_query_landmarks + place * M * D, landmark, D, M, sum_landmarks, D, D_PADDED)
    if grad_landmark_bias is not None:
        tl.store(grad_landmark_bias + place * M + landmark, sum_bias, mask=landmark < M)


@triton.jit
def _gradients(
    query, grad, out, query_log_sum, delta, grad_query, u, weight, landmark_mean, held,
    features, v, sum_landmarks, sum_bias, start, rows, query_row, grad_row, is_first_block,
    WITH_LANDMARKS: tl.constexpr, WITH_BIAS: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk of queries; sums over queries for landmarks and their bias."""
    row = tl.arange(0, TOKENS)
    offset = tl.cast(start, tl.int64)
    q = load_tile(query + offset * query_row, row, query_row, rows, D, D_PADDED)
    do = load_tile(grad + offset * grad_row, row, grad_row, rows, E, E_PADDED)
    result = load_tile(out + offset * E, row, E, rows, E, E_PADDED)
    inner = tl.sum(do.to(tl.float32) * result.to(tl.float32), 1)
    if is_first_block:
        tl.store(delta + start + row, inner, mask=row < rows)
    normaliser = load_normaliser(query_log_sum + start, row, rows)
    do = do.to(PRODUCT)
    logits = tl.dot(u, tl.trans(q), input_precision=PRECISION) * LOG2_E + weight[:, None]
    p = tl.exp2(logits - normaliser[None, :])
    pairs = tl.dot(v, tl.trans(do), input_precision=PRECISION) - inner[None, :]
    pairs = tl.where(row[:, None] <= row[None, :], pairs, 0.0).to(PRODUCT)
    ds = tl.dot(landmark_mean, tl.trans(do), input_precision=PRECISION)
    ds = tl.dot(features, pairs, ds, input_precision=PRECISION)
    ds = p * (ds - held * inner[None, :])
    ds_product = ds.to(PRODUCT)
    dq = tl.dot(tl.trans(ds_product), u.to(PRODUCT), input_precision=PRECISION)
    store_tile(grad_query + offset * D, row, D, rows, dq, D, D_PADDED)
    if WITH_LANDMARKS:
        sum_landmarks = tl.dot(ds_product, q.to(PRODUCT), sum_landmarks, input_precision=PRECISION)
    if WITH_BIAS:
        sum_bias += tl.sum(ds, 1)
    return sum_landmarks, sum_bias


@triton.jit
def _token_by_token(
    query, key, value, grad, key_bias, key_quadratic, query_log_sum, delta, grad_query,
    query_landmarks, key_landmarks, bias, landmark, mean, total, top, sum_landmarks, sum_bias,
    first, last, n, groups,
    query_head, query_row, key_row, value_row, grad_head, grad_row, query_landmarks_row, key_landmarks_row,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Gradients of queries first..last-1, each from the state of its own past."""
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
            place = index * n + token
            q = tl.load(query + index * query_head + offset * query_row + column, mask=column < D, other=0.0)
            do = tl.load(grad + index * grad_head + offset * grad_row + column_e, mask=column_e < E, other=0.0)
            q, do = q.to(tl.float32), do.to(tl.float32)
            u = load_tile(query_landmarks, landmark, query_landmarks_row, M, D, D_PADDED).to(element).to(tl.float32)
            normaliser = tl.load(query_log_sum + place)
            normaliser = tl.where(normaliser == float("-inf"), float("inf"), normaliser)
            p = tl.exp2(tl.sum(u * q[None, :], 1) * LOG2_E + bias + top - normaliser) * total
            ds = p * (tl.sum(mean * do[None, :], 1) - tl.load(delta + place))
            dq = tl.sum(ds[:, None] * u, 0).to(grad_query.dtype.element_ty)
            place_query = index * BLOCKS * n + token
            tl.store(grad_query + place_query * D + column, dq, mask=column < D)
            sum_landmarks += ds[:, None] * q[None, :]
            sum_bias += ds
    return mean, total, top, sum_landmarks, sum_bias


@triton.jit(do_not_specialize=SIZES)
def query_state_kernel(
    query,
    grad,  # (b, h g, n, e)
    query_landmarks,
    landmark_bias,
    query_log_sum,  # (b h g, n) float32, units of log 2
    delta,  # (b h g, n) float32
    entering_total,  # (b h, segments, m) float32
    entering_peak,
    part_value,  # (b h, segments - 1, g parts, m, e) float32
    part_delta,  # (b h, segments - 1, g parts, m) float32
    query_batch,
    query_head,
    query_row,
    grad_batch,
    grad_head,
    grad_row,
    query_landmarks_batch,
    query_landmarks_head,
    query_landmarks_row,
    landmark_bias_batch,
    landmark_bias_head,
    heads,
    groups,
    n,
    span,
    segments,
    parts,
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
    """What the queries of a part of a segment, the first segment apart, leave for keys of earlier segments."""
    program = tl.program_id(0)
    block = program % BLOCKS
    part = (program // BLOCKS) % parts
    segment = 1 + (program // (BLOCKS * parts)) % (segments - 1)
    flat_query = tl.cast(program // (BLOCKS * parts * (segments - 1)), tl.int64)
    flat, group = flat_query // groups, flat_query % groups
    batch, head = flat // heads, flat % heads
    first = segment * span * parts + part * span
    last = tl.minimum(first + span, n)
    query += batch * query_batch + (head * groups + group) * query_head
    grad += batch * grad_batch + (head * groups + group) * grad_head
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head

    landmark = block * LANDMARKS + tl.arange(0, LANDMARKS)
    inside = landmark < M
    u = load_tile(query_landmarks, landmark, query_landmarks_row, M, D, D_PADDED).to(query.dtype.element_ty)
    bias = tl.load(landmark_bias + landmark, mask=inside, other=float("-inf")) * LOG2_E
    total = tl.load(entering_total + (flat * segments + segment) * M + landmark, mask=inside, other=0.0)
    peak = tl.load(entering_peak + (flat * segments + segment) * M + landmark, mask=inside, other=float("-inf"))
    bias += peak + log2(positive(total))
    value = tl.zeros((LANDMARKS, E_PADDED), tl.float32)
    sum_delta = tl.zeros((LANDMARKS,), tl.float32)
    row = tl.arange(0, TOKENS)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        rows, offset = last - start, tl.cast(start, tl.int64)
        q = load_tile(query + offset * query_row, row, query_row, rows, D, D_PADDED)
        do = load_tile(grad + offset * grad_row, row, grad_row, rows, E, E_PADDED)
        normaliser = load_normaliser(query_log_sum + flat_query * n + start, row, rows)
        inner = tl.load(delta + flat_query * n + start + row, mask=row < rows, other=0.0)
        logits = tl.dot(u, tl.trans(q), input_precision=PRECISION) * LOG2_E + bias[:, None]
        p = tl.exp2(logits - normaliser[None, :])
        sum_delta += tl.sum(p * inner[None, :], 1)
        value = tl.dot(p.to(PRODUCT), do.to(PRODUCT), value, input_precision=PRECISION)
    place = ((flat * (segments - 1) + segment - 1) * groups + group) * parts + part
    store_tile(part_value + place * M * E, landmark, E, M, value, E, E_PADDED)
    tl.store(part_delta + place * M + landmark, sum_delta, mask=inside)
