# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Backward of queries over landmarks: gradients of queries, and sums over queries for landmarks.

With :math:`P` the softmax of queries over landmarks, primes for gradients:

.. math::
    S = P \circ (o' O^\top - o'\cdot o), \quad q' = S u, \quad O' = P^\top o', \quad L' = S^\top 1, \quad u' = S^\top q

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, m landmarks, d head dim, e value dim.
"""

import triton
import triton.language as tl

from spectraformer.ops.triton.tiles import LOG2_E, SIZES, load_query_landmarks, load_tile, store_tile


@triton.jit(do_not_specialize=SIZES)
def query_backward_kernel(
    query,
    out,  # (b h g, n, e)
    grad,  # (b, h g, n, e)
    query_landmarks,
    landmark_bias,
    landmark_value,  # (b h, m padded, e) float32
    log_sum,  # (b h, m padded) float32, units of log 2
    query_log_sum,  # (b h g, n) float32, units of log 2
    grad_query,  # (b h g, n, d), or None where another kernel computes it
    grad_landmark_value,  # (b h g, pieces, m padded, e) float32
    grad_log_sum,  # (b h g, pieces, m padded) float32
    grad_query_landmarks,  # (b h g, pieces, m padded, d) float32, or None
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
    pieces,
    m_padded,
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
    PRODUCT: tl.constexpr,  # dtype of probabilities and of their gradients in products
):
    """One block of landmarks, along the rows; one piece of the queries."""
    program = tl.program_id(0)
    block = program % BLOCKS
    piece = (program // BLOCKS) % pieces
    flat = tl.cast(program // (BLOCKS * pieces), tl.int64)
    first = piece * span
    last = tl.minimum(first + span, n)
    shared = flat // groups
    batch, head = shared // heads, shared % heads
    query += batch * query_batch + (flat % (heads * groups)) * query_head
    grad += batch * grad_batch + (flat % (heads * groups)) * grad_head
    out += flat * n * E
    query_log_sum += flat * n
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head
    element = query.dtype.element_ty

    landmark = block * LANDMARKS + tl.arange(0, LANDMARKS)
    u, o, bias = load_query_landmarks(
        query_landmarks, landmark_bias, landmark_value + shared * m_padded * E, log_sum + shared * m_padded,
        query_landmarks_row, landmark, M, D, E, D_PADDED, E_PADDED,
    )  # fmt: skip
    u, o = u.to(element), o.to(element)
    sum_value = tl.zeros((LANDMARKS, E_PADDED), tl.float32)
    sum_log = tl.zeros((LANDMARKS,), tl.float32)
    sum_landmarks = tl.zeros((LANDMARKS, D_PADDED), tl.float32)
    row = tl.arange(0, TOKENS)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        offset = tl.cast(start, tl.int64)
        rows = last - start
        q = load_tile(query + offset * query_row, row, query_row, rows, D, D_PADDED)
        do = load_tile(grad + offset * grad_row, row, grad_row, rows, E, E_PADDED)
        result = load_tile(out + offset * E, row, E, rows, E, E_PADDED)
        normaliser = tl.load(query_log_sum + start + row, mask=row < rows, other=float("inf"))
        inner = tl.sum(do.to(tl.float32) * result.to(tl.float32), 1)
        logits = tl.dot(u, tl.trans(q), input_precision=PRECISION) * LOG2_E + bias[:, None]
        p = tl.exp2(logits - normaliser[None, :])
        ds = p * (tl.dot(o, tl.trans(do), input_precision=PRECISION) - inner[None, :])
        sum_log += tl.sum(ds, 1)
        ds_product = ds.to(PRODUCT)
        sum_value = tl.dot(p.to(PRODUCT), do.to(PRODUCT), sum_value, input_precision=PRECISION)
        if grad_query_landmarks is not None:
            sum_landmarks = tl.dot(ds_product, q.to(PRODUCT), sum_landmarks, input_precision=PRECISION)
        if grad_query is not None:
            dq = tl.dot(tl.trans(ds_product), u.to(PRODUCT), input_precision=PRECISION)
            store_tile(grad_query + (flat * n + offset) * D, row, D, rows, dq, D, D_PADDED)

    place = (flat * pieces + piece) * (BLOCKS * LANDMARKS) + landmark
    tl.store(grad_log_sum + place, sum_log)
    column = tl.arange(0, E_PADDED)
    tl.store(grad_landmark_value + place[:, None] * E + column[None, :], sum_value, mask=(column < E)[None, :])
    if grad_query_landmarks is not None:
        column = tl.arange(0, D_PADDED)
        tl.store(grad_query_landmarks + place[:, None] * D + column[None, :], sum_landmarks, mask=(column < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    query,
    out,  # (b h g, n, e)
    grad,  # (b, h g, n, e)
    query_landmarks,
    landmark_bias,
    landmark_value,  # (b h, m padded, e) float32
    log_sum,  # (b h, m padded) float32, units of log 2
    query_log_sum,  # (b h g, n) float32, units of log 2
    grad_query,  # (b h g, n, d)
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
    pieces,
    m_padded,
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
):
    """The gradient of queries alone, where no program of the other kernel sees every landmark."""
    program = tl.program_id(0)
    first = (program % pieces) * span
    last = tl.minimum(first + span, n)
    flat = tl.cast(program // pieces, tl.int64)
    shared = flat // groups
    batch, head = shared // heads, shared % heads
    query += batch * query_batch + (flat % (heads * groups)) * query_head
    grad += batch * grad_batch + (flat % (heads * groups)) * grad_head
    out += flat * n * E
    query_log_sum += flat * n
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head
    landmark_value += shared * m_padded * E
    log_sum += shared * m_padded
    element = query.dtype.element_ty

    blocks = ()
    if RESIDENT:
        for block in tl.static_range(BLOCKS):
            u, o, bias = load_query_landmarks(
                query_landmarks, landmark_bias, landmark_value, log_sum, query_landmarks_row,
                block * LANDMARKS + tl.arange(0, LANDMARKS), M, D, E, D_PADDED, E_PADDED,
            )  # fmt: skip
            blocks = blocks + ((u.to(element), o.to(element), bias),)  # noqa: RUF005 - kernels have no unpacking
    row = tl.arange(0, TOKENS)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        offset = tl.cast(start, tl.int64)
        rows = last - start
        q = load_tile(query + offset * query_row, row, query_row, rows, D, D_PADDED)
        do = load_tile(grad + offset * grad_row, row, grad_row, rows, E, E_PADDED)
        result = load_tile(out + offset * E, row, E, rows, E, E_PADDED)
        normaliser = tl.load(query_log_sum + start + row, mask=row < rows, other=float("inf"))
        inner = tl.sum(do.to(tl.float32) * result.to(tl.float32), 1)
        dq = tl.zeros((TOKENS, D_PADDED), tl.float32)
        if RESIDENT:
            for block in tl.static_range(BLOCKS):
                dq = _query_gradient(q, do, normaliser, inner, blocks[block], dq, PRECISION, PRODUCT)
        else:
            for block in range(BLOCKS):
                u, o, bias = load_query_landmarks(
                    query_landmarks, landmark_bias, landmark_value, log_sum, query_landmarks_row,
                    block * LANDMARKS + tl.arange(0, LANDMARKS), M, D, E, D_PADDED, E_PADDED,
                )  # fmt: skip
                landmarks = (u.to(element), o.to(element), bias)
                dq = _query_gradient(q, do, normaliser, inner, landmarks, dq, PRECISION, PRODUCT)
        store_tile(grad_query + (flat * n + offset) * D, row, D, rows, dq, D, D_PADDED)


@triton.jit
def _query_gradient(q, do, normaliser, inner, landmarks, dq, PRECISION: tl.constexpr, PRODUCT: tl.constexpr):
    logits = tl.dot(landmarks[0], tl.trans(q), input_precision=PRECISION) * LOG2_E + landmarks[2][:, None]
    p = tl.exp2(logits - normaliser[None, :])
    ds = p * (tl.dot(landmarks[1], tl.trans(do), input_precision=PRECISION) - inner[None, :])
    return tl.dot(tl.trans(ds.to(PRODUCT)), landmarks[0].to(PRODUCT), dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def landmark_gradient_kernel(
    partial_value,  # (b h, g pieces, m padded, e)
    partial_log_sum,  # (b h, g pieces, m padded)
    landmark_value,  # (b h, forward's m padded, e)
    grad_landmark_value,  # (b h, m, e) float32
    grad_log_sum,  # (b h, m) float32
    shift,  # (b h, m) float32: L' - O'.O
    pieces,
    m_padded,
    m_padded_forward,
    M: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Pieces added in their order."""
    program = tl.program_id(0)
    landmark = (program % tl.cdiv(M, ROWS)) * ROWS + tl.arange(0, ROWS)
    flat = tl.cast(program // tl.cdiv(M, ROWS), tl.int64)
    inside = landmark < M
    value = tl.zeros((ROWS, E_PADDED), tl.float32)
    log_sum = tl.zeros((ROWS,), tl.float32)
    for piece in range(pieces):
        place = (flat * pieces + piece) * m_padded
        value += load_tile(partial_value + place * E, landmark, E, M, E, E_PADDED)
        log_sum += tl.load(partial_log_sum + place + landmark, mask=inside, other=0.0)
    o = load_tile(landmark_value + flat * m_padded_forward * E, landmark, E, M, E, E_PADDED)
    store_tile(grad_landmark_value + flat * M * E, landmark, E, M, value, E, E_PADDED)
    tl.store(grad_log_sum + flat * M + landmark, log_sum, mask=inside)
    tl.store(shift + flat * M + landmark, log_sum - tl.sum(value * o, 1), mask=inside)
