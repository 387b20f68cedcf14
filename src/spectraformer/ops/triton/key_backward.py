# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Backward of landmarks over keys: gradients of keys, values and bias, and of landmarks where they are wanted.

With :math:`G` the softmax of landmarks over keys, primes for gradients and c as in ``query_backward``:

.. math::
    T = G \circ (v O'^\top - c), \quad v' = G^\top O', \quad k' = T^\top w + 2 C k\, T^\top 1, \quad t' = T^\top 1,
    \quad w' = T k

(:math:`L' - O'\cdot O = -c` is what every key of a landmark has in common, up to the rounding of O'.)

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, m landmarks, d head dim, e value dim.
"""

import triton
import triton.language as tl

from spectraformer.ops.triton.tiles import (
    LOG2_E,
    NARROW,
    SIZES,
    exponent_parts,
    load_key_landmarks,
    load_keys,
    output_places,
    parts_of,
    sequence_bounds,
    store_tile,
    store_vector,
)


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    key,
    value,
    key_landmarks,
    key_bias,
    key_quadratic,
    key_boundaries,  # (b + 1,): sequences are packed into one batch item; or None
    log_sum,  # (b h, forward's m padded) float32, units of log 2
    grad_landmark_value,  # (b h, m, e) float32
    sum_inner,  # (b h, m) float32
    grad_key,  # (b h, s, d); packed (s, h, d); or None
    grad_value,  # (b h, s, e); packed (s, h, e); or None
    grad_key_bias,  # (b h, s) float32; packed (h, s); or None
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
    PRECISION: tl.constexpr,
    PRODUCT: tl.constexpr,
    EVEN: tl.constexpr,  # whether tokens fill every tile
):
    """Keys along the rows, so that weights and their gradients go from registers into their products.

    Both gradients at once, or, where a head is too wide for the sums of both, one in each of two launches.
    """
    program = tl.program_id(0)
    piece = program % pieces
    flat = tl.cast(program // pieces, tl.int64)
    batch, head = flat // heads, flat % heads
    begin, length = sequence_bounds(key_boundaries, batch, s)
    first = piece * span
    last = tl.minimum(first + span, length)
    key += batch * key_batch + head * key_head + begin * key_row
    value += batch * value_batch + head * value_head + begin * value_row
    place, step, number = output_places(key_boundaries, begin, flat, heads, s)
    key_landmarks += batch * key_landmarks_batch + head * key_landmarks_head
    log_sum += flat * m_padded_forward
    grad_landmark_value += flat * M * E
    sum_inner += flat * M
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head + begin
    column = tl.arange(0, D_PADDED)
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head
        quadratic = tl.load(key_quadratic + column, mask=column < D, other=0.0)
    element = key.dtype.element_ty
    OF_KEYS: tl.constexpr = grad_key is not None
    OF_VALUES: tl.constexpr = grad_value is not None
    LOG_WEIGHT: tl.constexpr = (key_quadratic is not None) or (grad_key_bias is not None)

    blocks = ()
    if RESIDENT:
        for block in tl.static_range(BLOCKS):
            w, do, normaliser, constant = load_key_landmarks(
                key_landmarks, log_sum, grad_landmark_value, sum_inner, key_landmarks_row,
                block * LANDMARKS + tl.arange(0, LANDMARKS), M, D, E, D_PADDED, E_PADDED,
            )  # fmt: skip
            landmarks = (
                w.to(element),
                do.to(PRODUCT),
                exponent_parts(-normaliser, PRODUCT),
                parts_of(-constant, PRODUCT),
            )
            blocks = blocks + (landmarks,)  # noqa: RUF005 - kernels have no unpacking
    ones = tl.full((TOKENS, NARROW), 1.0, PRODUCT)
    sum_quadratic = tl.zeros((TOKENS, D_PADDED), tl.float32)
    row = tl.arange(0, TOKENS)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        offset = tl.cast(start, tl.int64)
        rows = last - start
        if EVEN:
            rows = None
        k, v, weight = load_keys(
            key, value, key_bias, key_quadratic, start, rows, key_row, value_row, D, E, D_PADDED, E_PADDED, TOKENS
        )
        dk = tl.zeros((TOKENS, D_PADDED), tl.float32)
        dv = tl.zeros((TOKENS, E_PADDED), tl.float32)
        dt = tl.zeros((TOKENS,), tl.float32)
        if RESIDENT:
            for block in tl.static_range(BLOCKS):
                dk, dv, dt = _key_gradients(
                    k, v, ones, weight, blocks[block], dk, dv, dt, OF_KEYS, OF_VALUES, LOG_WEIGHT, PRECISION, PRODUCT
                )
        else:
            for block in range(BLOCKS):
                w, do, normaliser, constant = load_key_landmarks(
                    key_landmarks, log_sum, grad_landmark_value, sum_inner, key_landmarks_row,
                    block * LANDMARKS + tl.arange(0, LANDMARKS), M, D, E, D_PADDED, E_PADDED,
                )  # fmt: skip
                landmarks = (
                    w.to(element),
                    do.to(PRODUCT),
                    exponent_parts(-normaliser, PRODUCT),
                    parts_of(-constant, PRODUCT),
                )
                dk, dv, dt = _key_gradients(
                    k, v, ones, weight, landmarks, dk, dv, dt, OF_KEYS, OF_VALUES, LOG_WEIGHT, PRECISION, PRODUCT
                )
        if OF_KEYS:
            if key_quadratic is not None:
                dk += (2 * dt)[:, None] * (quadratic[None, :] * k.to(tl.float32))
            store_tile(grad_key + (place + offset * step) * D, row, step * D, rows, dk, D, D_PADDED)
            if grad_key_bias is not None:
                store_vector(grad_key_bias + number + start, row, rows, dt)
            if grad_key_quadratic is not None:
                sum_quadratic += dt[:, None] * k.to(tl.float32) * k.to(tl.float32)
        if OF_VALUES:
            store_tile(grad_value + (place + offset * step) * E, row, step * E, rows, dv, E, E_PADDED)

    if grad_key_quadratic is not None:
        tl.store(grad_key_quadratic + (flat * pieces + piece) * D + column, tl.sum(sum_quadratic, 0), mask=column < D)


@triton.jit
def _key_gradients(
    k,
    v,
    ones,
    weight,
    landmarks,
    dk,
    dv,
    dt,
    OF_KEYS: tl.constexpr,
    OF_VALUES: tl.constexpr,
    LOG_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    # What landmarks add by products: as vectors along columns they would fill a quarter of the registers each.
    logits = tl.dot(ones, tl.trans(landmarks[2]), input_precision=PRECISION)
    logits = tl.dot(k, tl.trans(landmarks[0]), logits, input_precision=PRECISION)
    p = tl.exp2(logits * LOG2_E + weight[:, None])
    if OF_VALUES:
        dv = tl.dot(p.to(PRODUCT), landmarks[1], dv, input_precision=PRECISION)
    if OF_KEYS:
        inner = tl.dot(ones, tl.trans(landmarks[3]), input_precision=PRECISION)
        inner = tl.dot(v.to(PRODUCT), tl.trans(landmarks[1]), inner, input_precision=PRECISION)
        ds = p * inner
        dk = tl.dot(ds.to(PRODUCT), landmarks[0].to(PRODUCT), dk, input_precision=PRECISION)
        if LOG_WEIGHT:
            dt += tl.sum(ds, 1)
    return dk, dv, dt


@triton.jit(do_not_specialize=SIZES)
def key_landmark_gradient_kernel(
    key,
    value,
    key_landmarks,
    key_bias,
    key_quadratic,
    key_boundaries,  # (b + 1,): sequences are packed into one batch item; or None
    log_sum,  # (b h, forward's m padded) float32, units of log 2
    grad_landmark_value,  # (b h, m, e) float32
    sum_inner,  # (b h, m) float32
    grad_key_landmarks,  # (b h, pieces, m padded, d) float32
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
    PRECISION: tl.constexpr,
    PRODUCT: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The gradient of landmarks, along the rows; one block of them, one piece of the keys."""
    program = tl.program_id(0)
    block = program % BLOCKS
    piece = (program // BLOCKS) % pieces
    flat = tl.cast(program // (BLOCKS * pieces), tl.int64)
    batch, head = flat // heads, flat % heads
    begin, length = sequence_bounds(key_boundaries, batch, s)
    first = piece * span
    last = tl.minimum(first + span, length)
    key += batch * key_batch + head * key_head + begin * key_row
    value += batch * value_batch + head * value_head + begin * value_row
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head + begin
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head
    landmark = block * LANDMARKS + tl.arange(0, LANDMARKS)
    w, do, normaliser, constant = load_key_landmarks(
        key_landmarks + batch * key_landmarks_batch + head * key_landmarks_head, log_sum + flat * m_padded_forward,
        grad_landmark_value + flat * M * E, sum_inner + flat * M, key_landmarks_row, landmark,
        M, D, E, D_PADDED, E_PADDED,
    )  # fmt: skip
    w, do = w.to(key.dtype.element_ty), do.to(PRODUCT)
    of_landmarks = tl.zeros((LANDMARKS, D_PADDED), tl.float32)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        rows = last - start
        if EVEN:
            rows = None
        k, v, weight = load_keys(
            key, value, key_bias, key_quadratic, start, rows, key_row, value_row, D, E, D_PADDED, E_PADDED, TOKENS
        )
        logits = tl.dot(w, tl.trans(k), input_precision=PRECISION) * LOG2_E + weight[None, :]
        p = tl.exp2(logits - normaliser[:, None])
        ds = p * (tl.dot(do, tl.trans(v.to(PRODUCT)), input_precision=PRECISION) - constant[:, None])
        of_landmarks = tl.dot(ds.to(PRODUCT), k.to(PRODUCT), of_landmarks, input_precision=PRECISION)

    partial = (flat * pieces + piece) * (BLOCKS * LANDMARKS) + landmark
    column = tl.arange(0, D_PADDED)
    tl.store(grad_key_landmarks + partial[:, None] * D + column[None, :], of_landmarks, mask=(column < D)[None, :])
