# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Backward of landmarks over keys: gradients of keys and values, and sums over keys for landmarks and bias.

With :math:`G` the softmax of landmarks over keys, primes for gradients:

.. math::
    T = G \circ (v O'^\top + L' - O'\cdot O), \quad v' = G O', \quad k' = T w + 2 C k\, T 1, \quad t' = T 1, \quad
    w' = T^\top k

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, m landmarks, d head dim, e value dim.
"""

import triton
import triton.language as tl

from spectraformer.ops.triton.tiles import (
    LOG2_E,
    SIZES,
    key_log_weight,
    load_key_bias,
    load_key_landmarks,
    load_rows,
    store_tile,
)


@triton.jit(do_not_specialize=SIZES)
def key_backward_kernel(
    key,
    value,
    key_landmarks,
    key_bias,
    key_quadratic,
    log_sum,  # (b h, forward's m padded) float32, units of log 2
    grad_landmark_value,  # (b h, m, e) float32
    shift,  # (b h, m) float32
    grad_key,  # (b h, s, d), or None where only landmarks are wanted
    grad_value,  # (b h, s, e), likewise
    grad_key_bias,  # (b h, s) float32, or None
    grad_key_landmarks,  # (b h, pieces, m padded, d) float32, or None
    grad_key_quadratic,  # (b h, pieces, d) float32, or None
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
    s,
    span,
    pieces,
    m_padded_forward,
    M: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    D_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANDMARKS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    RESIDENT: tl.constexpr,
    PARTS: tl.constexpr,  # blocks of landmarks in the grid: 1, or BLOCKS where only landmarks are wanted
    PRECISION: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Landmarks along the rows. One program sees every landmark, or one block of them if PARTS says so."""
    program = tl.program_id(0)
    part = program % PARTS
    piece = (program // PARTS) % pieces
    flat = tl.cast(program // (PARTS * pieces), tl.int64)
    batch, head = flat // heads, flat % heads
    first = piece * span
    last = tl.minimum(first + span, s)
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    key_landmarks += batch * key_landmarks_batch + head * key_landmarks_head
    log_sum += flat * m_padded_forward
    grad_landmark_value += flat * M * E
    shift += flat * M
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head
    column = tl.arange(0, D_PADDED)
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head
        quadratic = tl.load(key_quadratic + column, mask=column < D, other=0.0)
    element = key.dtype.element_ty
    TOKEN_GRADIENTS: tl.constexpr = grad_key is not None
    LOG_WEIGHT_GRADIENT: tl.constexpr = (key_quadratic is not None) or (grad_key_bias is not None)

    # BLOCKS // PARTS blocks: all of them, or this program's own.
    blocks = ()
    if RESIDENT:
        for block in tl.static_range(BLOCKS // PARTS):
            w, do, normaliser, constant = load_key_landmarks(
                key_landmarks, log_sum, grad_landmark_value, shift, key_landmarks_row,
                (part + block) * LANDMARKS + tl.arange(0, LANDMARKS), M, D, E, D_PADDED, E_PADDED,
            )  # fmt: skip
            blocks = blocks + ((w.to(element), do.to(PRODUCT), normaliser, constant),)  # noqa: RUF005 - kernels have no unpacking
    sum_landmarks = tl.zeros((LANDMARKS, D_PADDED), tl.float32)
    sum_quadratic = tl.zeros((TOKENS, D_PADDED), tl.float32)
    row = tl.arange(0, TOKENS)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        offset = tl.cast(start, tl.int64)
        rows = last - start
        bias = key_bias
        if key_bias is not None:
            bias = key_bias + start
        weight = load_key_bias(bias, row, rows)
        # Not "> -inf": a NaN must show.
        present = weight != float("-inf")
        k = load_rows(key + offset * key_row, row, key_row, present, D, D_PADDED)
        v = load_rows(value + offset * value_row, row, value_row, present, E, E_PADDED)
        weight = key_log_weight(k, weight, key_quadratic, D, D_PADDED)
        dk = tl.zeros((TOKENS, D_PADDED), tl.float32)
        dv = tl.zeros((TOKENS, E_PADDED), tl.float32)
        dt = tl.zeros((TOKENS,), tl.float32)
        if RESIDENT:
            for block in tl.static_range(BLOCKS // PARTS):
                dk, dv, dt, ds = _key_gradients(
                    k, v, weight, blocks[block], dk, dv, dt, TOKEN_GRADIENTS, LOG_WEIGHT_GRADIENT, PRECISION, PRODUCT
                )
                if grad_key_landmarks is not None:
                    sum_landmarks = tl.dot(ds, k.to(PRODUCT), sum_landmarks, input_precision=PRECISION)
        else:
            for block in range(BLOCKS // PARTS):
                w, do, normaliser, constant = load_key_landmarks(
                    key_landmarks, log_sum, grad_landmark_value, shift, key_landmarks_row,
                    (part + block) * LANDMARKS + tl.arange(0, LANDMARKS), M, D, E, D_PADDED, E_PADDED,
                )  # fmt: skip
                landmarks = (w.to(element), do.to(PRODUCT), normaliser, constant)
                dk, dv, dt, ds = _key_gradients(
                    k, v, weight, landmarks, dk, dv, dt, TOKEN_GRADIENTS, LOG_WEIGHT_GRADIENT, PRECISION, PRODUCT
                )
                if grad_key_landmarks is not None:
                    sum_landmarks = tl.dot(ds, k.to(PRODUCT), sum_landmarks, input_precision=PRECISION)
        if grad_key is not None:
            if key_quadratic is not None:
                dk += 2 * dt[:, None] * quadratic[None, :] * k.to(tl.float32)
            store_tile(grad_key + (flat * s + offset) * D, row, D, rows, dk, D, D_PADDED)
            store_tile(grad_value + (flat * s + offset) * E, row, E, rows, dv, E, E_PADDED)
        if grad_key_bias is not None:
            tl.store(grad_key_bias + flat * s + start + row, dt, mask=row < rows)
        if grad_key_quadratic is not None:
            sum_quadratic += dt[:, None] * k.to(tl.float32) * k.to(tl.float32)

    if grad_key_landmarks is not None:
        place = (flat * pieces + piece) * (BLOCKS * LANDMARKS) + part * LANDMARKS + tl.arange(0, LANDMARKS)
        tl.store(grad_key_landmarks + place[:, None] * D + column[None, :], sum_landmarks, mask=(column < D)[None, :])
    if grad_key_quadratic is not None:
        place = (flat * pieces + piece) * D
        tl.store(grad_key_quadratic + place + column, tl.sum(sum_quadratic, 0), mask=column < D)


@triton.jit
def _key_gradients(
    k,
    v,
    weight,
    landmarks,
    dk,
    dv,
    dt,
    TOKEN_GRADIENTS: tl.constexpr,
    LOG_WEIGHT_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    logits = tl.dot(landmarks[0], tl.trans(k), input_precision=PRECISION) * LOG2_E + weight[None, :]
    p = tl.exp2(logits - landmarks[2][:, None])
    inner = tl.dot(landmarks[1], tl.trans(v.to(PRODUCT)), input_precision=PRECISION)
    ds = p * (inner + landmarks[3][:, None])
    ds_product = ds.to(PRODUCT)
    if TOKEN_GRADIENTS:
        dv = tl.dot(tl.trans(p.to(PRODUCT)), landmarks[1], dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds_product), landmarks[0].to(PRODUCT), dk, input_precision=PRECISION)
        if LOG_WEIGHT_GRADIENT:
            dt += tl.sum(ds, 0)
    return dk, dv, dt, ds_product
