# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Backward kernels of trigonometric attention: features are recomputed tile by tile, sums have a fixed order.

With features :math:`\psi = [\cos, \sin](\theta)`, :math:`\theta = W q`, sums S of values and z of features over keys,
denominators D, primes for gradients, and :math:`\bar D = -o'\cdot o / D`, 0 where the denominator was guarded:

.. math::
    \psi' = S\,o'/D + z \bar D, \quad \theta' = \cos\theta\,\psi'_{\sin} - \sin\theta\,\psi'_{\cos}, \quad
    q' = W^\top\theta', \quad W' = \theta' q^\top, \quad S' = \psi\,o'^\top/D, \quad z' = \psi \bar D

and for keys of weight p, :math:`\varphi' = p(S'v + z')`, then :math:`\theta'`, k' and W' likewise,
:math:`v' = p\,S'^\top\varphi` and :math:`(\log p)' = \varphi\cdot\varphi'`. Nothing here cancels, so products take
16-bit operands in one part; phases take two, as in the forward.

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, m rows of W, d head dim, e value dim.
"""

import triton
import triton.language as tl

from spectraformer.ops.triton.tiles import SIZES, load_key_bias, load_rows, load_tile, store_tile
from spectraformer.ops.triton.trigonometric_forward import (
    TURNS,
    cos_sin,
    key_weight,
    load_matrix,
    load_state,
    load_sums,
    phases,
)


@triton.jit
def _feature_gradients(value_c, value_s, sum_c, sum_s, y, own, one, PRECISION: tl.constexpr):
    """S y own + z one, of cosines and of sines; rows of W along the rows."""
    grad_c = tl.dot(value_c, tl.trans(y), input_precision=PRECISION) * own[None, :] + sum_c[:, None] * one[None, :]
    grad_s = tl.dot(value_s, tl.trans(y), input_precision=PRECISION) * own[None, :] + sum_s[:, None] * one[None, :]
    return grad_c, grad_s


@triton.jit(do_not_specialize=SIZES)
def trigonometric_query_backward_kernel(
    query,
    out,  # (b h g, n, e)
    grad,  # (b h g, n, e)
    rows,
    rule_weight,
    state_value,  # (b h, 2, m padded, e) float32
    state,  # (b h, 3, 2, m padded) float32
    unsafe,  # (b h g, n) uint8
    divisor,  # (b h g, n) float32
    grad_query,  # (b h g, n, d), or None
    grad_value_sums,  # (b h g, pieces, 2, m padded, e) float32, or None
    grad_sums,  # (b h g, pieces, 2, m padded) float32, or None
    grad_rows,  # (b h g, pieces, m padded, d) float32, or None
    query_batch,
    query_head,
    query_row,
    grad_batch,
    grad_head,
    grad_row,
    rows_batch,
    rows_head,
    rows_row,
    rule_weight_batch,
    rule_weight_head,
    heads,
    groups,
    n,
    span,
    pieces,
    M_PADDED: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    D_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANDMARKS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,  # blocks of rows in the grid: 1, or BLOCKS where gradients of queries are not wanted
    PRECISION: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """One program sees every row of W, for gradients of queries, or one block of them, for sums over queries."""
    program = tl.program_id(0)
    part = program % PARTS
    piece = (program // PARTS) % pieces
    flat = tl.cast(program // (PARTS * pieces), tl.int64)
    first = piece * span
    last = tl.minimum(first + span, n)
    shared = flat // groups
    batch, head = shared // heads, shared % heads
    query += batch * query_batch + (flat % (heads * groups)) * query_head
    grad += batch * grad_batch + (flat % (heads * groups)) * grad_head
    out += flat * n * E
    unsafe += flat * n
    divisor += flat * n
    rows += batch * rows_batch + head * rows_head
    rule_weight += batch * rule_weight_batch + head * rule_weight_head
    state_value += shared * 2 * M_PADDED * E
    state += shared * 6 * M_PADDED
    element = query.dtype.element_ty
    SUMS: tl.constexpr = grad_value_sums is not None
    ROWS: tl.constexpr = grad_rows is not None
    TOGETHER: tl.constexpr = BLOCKS == PARTS

    i = part * LANDMARKS + tl.arange(0, LANDMARKS)
    if TOGETHER:
        w_high, w_low, value_c, value_s = load_state(
            rows, rule_weight, state_value, rows_row, i, element, M, D, E, D_PADDED, E_PADDED, M_PADDED
        )
        sum_c, sum_s = load_sums(state, i, M, M_PADDED)
        value_c, value_s = value_c.to(PRODUCT), value_s.to(PRODUCT)
    total_c = tl.zeros((LANDMARKS, E_PADDED), tl.float32)
    total_s = tl.zeros((LANDMARKS, E_PADDED), tl.float32)
    ones_c = tl.zeros((LANDMARKS,), tl.float32)
    ones_s = tl.zeros((LANDMARKS,), tl.float32)
    total_rows = tl.zeros((LANDMARKS, D_PADDED), tl.float32)
    row = tl.arange(0, TOKENS)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        offset = tl.cast(start, tl.int64)
        left = last - start
        q = load_tile(query + offset * query_row, row, query_row, left, D, D_PADDED)
        do = load_tile(grad + offset * grad_row, row, grad_row, left, E, E_PADDED)
        result = load_tile(out + offset * E, row, E, left, E, E_PADDED)
        own = 1.0 / tl.load(divisor + start + row, mask=row < left, other=float("inf"))
        guarded = tl.load(unsafe + start + row, mask=row < left, other=1) != 0
        one = tl.where(guarded, 0.0, -tl.sum(do.to(tl.float32) * result.to(tl.float32), 1) * own)
        y = do.to(PRODUCT)
        dq = tl.zeros((TOKENS, D_PADDED), tl.float32)
        for block in range(BLOCKS // PARTS):
            if not TOGETHER:
                i = block * LANDMARKS + tl.arange(0, LANDMARKS)
                w_high, w_low, value_c, value_s = load_state(
                    rows, rule_weight, state_value, rows_row, i, element, M, D, E, D_PADDED, E_PADDED, M_PADDED
                )
                sum_c, sum_s = load_sums(state, i, M, M_PADDED)
                value_c, value_s = value_c.to(PRODUCT), value_s.to(PRODUCT)
            cosine, sine = cos_sin(phases(w_high, w_low, q, PRECISION))
            grad_c, grad_s = _feature_gradients(value_c, value_s, sum_c, sum_s, y, own, one, PRECISION)
            turn = (cosine * grad_s - sine * grad_c).to(PRODUCT)
            if SUMS:
                ones_c += tl.sum(cosine * one[None, :], 1)
                ones_s += tl.sum(sine * one[None, :], 1)
                total_c = tl.dot((cosine * own[None, :]).to(PRODUCT), y, total_c, input_precision=PRECISION)
                total_s = tl.dot((sine * own[None, :]).to(PRODUCT), y, total_s, input_precision=PRECISION)
            if ROWS:
                total_rows = tl.dot(turn, q.to(PRODUCT), total_rows, input_precision=PRECISION)
            if grad_query is not None:
                dq = tl.dot(tl.trans(turn), w_high.to(PRODUCT), dq, input_precision=PRECISION)
        if grad_query is not None:
            store_tile(grad_query + (flat * n + offset) * D, row, D, left, dq / TURNS, D, D_PADDED)

    place = flat * pieces + piece
    ALL: tl.constexpr = BLOCKS * LANDMARKS
    if SUMS:
        store_tile(grad_value_sums + place * 2 * ALL * E, i, E, ALL, total_c, E, E_PADDED)
        store_tile(grad_value_sums + (place * 2 + 1) * ALL * E, i, E, ALL, total_s, E, E_PADDED)
        tl.store(grad_sums + place * 2 * ALL + i, ones_c)
        tl.store(grad_sums + (place * 2 + 1) * ALL + i, ones_s)
    if ROWS:
        store_tile(grad_rows + place * ALL * D, i, D, ALL, total_rows, D, D_PADDED)


@triton.jit(do_not_specialize=SIZES)
def trigonometric_state_gradient_kernel(
    partial_value,  # (b h, g pieces, 2, m padded, e)
    partial_sums,  # (b h, g pieces, 2, m padded)
    rule_weight,
    state_value,  # (b h, 2, m padded of the forward, e)
    state,  # (b h, 3, 2, m padded of the forward)
    grad_value_sums,  # (b h, 2, m, e) float32
    grad_sums,  # (b h, 2, m) float32
    grad_rule_weight,  # (b h, 2, m) float32: through cosines, through sines
    rule_weight_batch,
    rule_weight_head,
    heads,
    pieces,
    m_padded,
    m_padded_forward,
    M: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Pieces added in their order; the sums of the state have no weights of the rule in them, their gradients do."""
    BLOCKS: tl.constexpr = tl.cdiv(M, ROWS)
    i = (tl.program_id(0) % BLOCKS) * ROWS + tl.arange(0, ROWS)
    both = tl.cast(tl.program_id(0) // BLOCKS, tl.int64)
    flat, wave = both // 2, both % 2
    inside = i < M
    a = tl.load(
        rule_weight + (flat // heads) * rule_weight_batch + (flat % heads) * rule_weight_head + i,
        mask=inside, other=0.0,
    )  # fmt: skip
    value = tl.zeros((ROWS, E_PADDED), tl.float32)
    one = tl.zeros((ROWS,), tl.float32)
    for piece in range(pieces):
        place = ((flat * pieces + piece) * 2 + wave) * m_padded
        value += load_tile(partial_value + place * E, i, E, M, E, E_PADDED)
        one += tl.load(partial_sums + place + i, mask=inside, other=0.0)
    held = load_tile(state_value + both * m_padded_forward * E, i, E, M, E, E_PADDED)
    held_one = tl.load(state + (flat * 6 + wave) * m_padded_forward + i, mask=inside, other=0.0)
    store_tile(grad_value_sums + both * M * E, i, E, M, value * a[:, None], E, E_PADDED)
    tl.store(grad_sums + both * M + i, one * a, mask=inside)
    tl.store(grad_rule_weight + both * M + i, tl.sum(value * held, 1) + one * held_one, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def trigonometric_key_backward_kernel(
    key,
    value,
    rows,
    key_bias,
    log_total,  # (b h,) float32, units of log 2
    grad_value_sums,  # (b h, 2, m, e) float32
    grad_sums,  # (b h, 2, m) float32
    grad_key,  # (b h, s, d), or None where only rows are wanted
    grad_value,  # (b h, s, e), likewise
    grad_key_bias,  # (b h, s) float32, or None
    grad_rows,  # (b h, pieces, m padded, d) float32, or None
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    rows_batch,
    rows_head,
    rows_row,
    key_bias_batch,
    key_bias_head,
    key_factor,
    heads,
    s,
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
    PARTS: tl.constexpr,  # blocks of rows in the grid: 1, or BLOCKS where only gradients of rows are wanted
    PRECISION: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """One program sees every row of W, for gradients of keys and values, or one block of them, for those of rows."""
    program = tl.program_id(0)
    part = program % PARTS
    piece = (program // PARTS) % pieces
    flat = tl.cast(program // (PARTS * pieces), tl.int64)
    batch, head = flat // heads, flat % heads
    first = piece * span
    last = tl.minimum(first + span, s)
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    rows += batch * rows_batch + head * rows_head
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head
    log_sum = tl.load(log_total + flat)
    grad_value_sums += flat * 2 * M * E
    grad_sums += flat * 2 * M
    element = key.dtype.element_ty
    TOGETHER: tl.constexpr = BLOCKS == PARTS

    i = part * LANDMARKS + tl.arange(0, LANDMARKS)
    if TOGETHER:
        w_high, w_low = load_matrix(rows, i, rows_row, element, M, D, D_PADDED)
        value_c, value_s, sum_c, sum_s = _load_gradients(grad_value_sums, grad_sums, i, PRODUCT, M, E, E_PADDED)
    total_rows = tl.zeros((LANDMARKS, D_PADDED), tl.float32)
    row = tl.arange(0, TOKENS)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        offset = tl.cast(start, tl.int64)
        left = last - start
        bias = load_key_bias(key_bias, start, row, left)
        present = bias != float("-inf")
        k = load_rows(key + offset * key_row, row, key_row, present, D, D_PADDED)
        v = load_rows(value + offset * value_row, row, value_row, present, E, E_PADDED)
        p = tl.exp2(key_weight(k, bias, key_factor) - log_sum)
        y = v.to(PRODUCT)
        dk = tl.zeros((TOKENS, D_PADDED), tl.float32)
        dv = tl.zeros((TOKENS, E_PADDED), tl.float32)
        dt = tl.zeros((TOKENS,), tl.float32)
        for block in range(BLOCKS // PARTS):
            if not TOGETHER:
                i = block * LANDMARKS + tl.arange(0, LANDMARKS)
                w_high, w_low = load_matrix(rows, i, rows_row, element, M, D, D_PADDED)
                value_c, value_s, sum_c, sum_s = _load_gradients(grad_value_sums, grad_sums, i, PRODUCT, M, E, E_PADDED)
            cosine, sine = cos_sin(phases(w_high, w_low, k, PRECISION))
            grad_c, grad_s = _feature_gradients(value_c, value_s, sum_c, sum_s, y, p, p, PRECISION)
            turn = (cosine * grad_s - sine * grad_c).to(PRODUCT)
            if grad_rows is not None:
                total_rows = tl.dot(turn, k.to(PRODUCT), total_rows, input_precision=PRECISION)
            if grad_key is not None:
                dt += tl.sum(cosine * grad_c + sine * grad_s, 0)
                dk = tl.dot(tl.trans(turn), w_high.to(PRODUCT), dk, input_precision=PRECISION)
                wave = tl.trans((cosine * p[None, :]).to(PRODUCT))
                dv = tl.dot(wave, value_c, dv, input_precision=PRECISION)
                wave = tl.trans((sine * p[None, :]).to(PRODUCT))
                dv = tl.dot(wave, value_s, dv, input_precision=PRECISION)
        if grad_key is not None:
            dk = dk / TURNS + (2 * key_factor * dt)[:, None] * k.to(tl.float32)
            store_tile(grad_key + (flat * s + offset) * D, row, D, left, dk, D, D_PADDED)
            store_tile(grad_value + (flat * s + offset) * E, row, E, left, dv, E, E_PADDED)
        if grad_key_bias is not None:
            tl.store(grad_key_bias + flat * s + start + row, dt, mask=row < left)

    if grad_rows is not None:
        ALL: tl.constexpr = BLOCKS * LANDMARKS
        store_tile(grad_rows + (flat * pieces + piece) * ALL * D, i, D, ALL, total_rows, D, D_PADDED)


@triton.jit
def _load_gradients(
    grad_value_sums, grad_sums, i, PRODUCT: tl.constexpr, M: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr
):
    """Gradients of the sums of values and of features, of cosines and of sines."""
    value_c = load_tile(grad_value_sums, i, E, M, E, E_PADDED).to(PRODUCT)
    value_s = load_tile(grad_value_sums + M * E, i, E, M, E, E_PADDED).to(PRODUCT)
    sum_c = tl.load(grad_sums + i, mask=i < M, other=0.0)
    return value_c, value_s, sum_c, tl.load(grad_sums + M + i, mask=i < M, other=0.0)
