# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Backward of queries over landmarks: sums over queries for landmarks, then gradients of queries.

With :math:`P` the softmax of queries over landmarks, primes for gradients and :math:`\delta = o'\cdot o`:

.. math::
    O' = P^\top o', \quad c = P^\top \delta, \quad L' = O\cdot O' - c, \quad
    S = P \circ (o' O^\top - \delta), \quad q' = S u, \quad u' = S^\top q

Neither O' nor L' needs S, so landmarks take two products over the queries and queries three: no more together than in
one kernel for both, which would hold the sums in registers beside everything else.

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, m landmarks, d head dim, e value dim.
"""

import triton
import triton.language as tl

from spectraformer.ops.triton.tiles import (
    LOG2_E,
    NARROW,
    SIZES,
    exponent_parts,
    load_query_landmarks,
    load_tile,
    load_vector,
    output_places,
    rounded,
    sequence_bounds,
    store_tile,
    store_vector,
)


@triton.jit(do_not_specialize=SIZES)
def landmark_sums_kernel(
    query,
    out,  # (b h g, n, e); packed (n, h g, e)
    grad,  # (b h g, n, e)
    query_landmarks,
    landmark_bias,
    query_boundaries,  # (b + 1,): sequences are packed into one batch item; or None
    landmark_value,  # (b h, m padded, e) float32
    log_sum,  # (b h, m padded) float32, units of log 2
    query_log_sum,  # (b h g, n) float32, units of log 2; packed (h g, n)
    inner,  # as query_log_sum: delta, for the gradient of queries
    grad_landmark_value,  # (b h g, pieces, m padded, e) float32
    sum_inner,  # (b h g, pieces, m padded) float32: c
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
    EVEN: tl.constexpr,  # whether tokens fill every tile
):
    """One block of landmarks, along the rows; one piece of the queries."""
    program = tl.program_id(0)
    block = program % BLOCKS
    piece = (program // BLOCKS) % pieces
    flat = tl.cast(program // (BLOCKS * pieces), tl.int64)
    first = piece * span
    shared = flat // groups
    batch, head = shared // heads, shared % heads
    begin, length = sequence_bounds(query_boundaries, batch, n)
    last = tl.minimum(first + span, length)
    place, step, number = output_places(query_boundaries, begin, flat, heads * groups, n)
    query += batch * query_batch + (flat % (heads * groups)) * query_head + begin * query_row
    grad += batch * grad_batch + (flat % (heads * groups)) * grad_head + begin * grad_row
    out += place * E
    query_log_sum += number
    inner += number
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head
    element = query.dtype.element_ty

    landmark = block * LANDMARKS + tl.arange(0, LANDMARKS)
    u, o, bias = load_query_landmarks(
        query_landmarks, landmark_bias, landmark_value + shared * m_padded * E, log_sum + shared * m_padded,
        query_landmarks_row, landmark, M, D, E, D_PADDED, E_PADDED,
    )  # fmt: skip
    u, o = u.to(element), o.to(element)
    of_value = tl.zeros((LANDMARKS, E_PADDED), tl.float32)
    of_inner = tl.zeros((LANDMARKS,), tl.float32)
    of_landmarks = tl.zeros((LANDMARKS, D_PADDED), tl.float32)
    row = tl.arange(0, TOKENS)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        offset = tl.cast(start, tl.int64)
        rows = last - start
        if EVEN:
            rows = None
        q = load_tile(query + offset * query_row, row, query_row, rows, D, D_PADDED)
        do = load_tile(grad + offset * grad_row, row, grad_row, rows, E, E_PADDED)
        result = load_tile(out + offset * step * E, row, step * E, rows, E, E_PADDED)
        normaliser = load_vector(query_log_sum + start, row, rows, float("inf"))
        delta = tl.sum(do.to(tl.float32) * result.to(tl.float32), 1)
        # Else every thread would load what it needs of these from memory, instead of from the others.
        normaliser += 0.0 * delta
        if block == 0:
            store_vector(inner + start, row, rows, delta)
        logits = tl.dot(u, tl.trans(q), input_precision=PRECISION) * LOG2_E + bias[:, None]
        p = tl.exp2(logits - normaliser[None, :])
        # Both sums of the same weights: their difference is L', where an error of one alone would show.
        p = rounded(p, PRODUCT)
        of_value = tl.dot(p.to(PRODUCT), do.to(PRODUCT), of_value, input_precision=PRECISION)
        of_inner += tl.sum(p * delta[None, :], 1)
        if grad_query_landmarks is not None:
            ds = p * (tl.dot(o, tl.trans(do), input_precision=PRECISION) - delta[None, :])
            of_landmarks = tl.dot(ds.to(PRODUCT), q.to(PRODUCT), of_landmarks, input_precision=PRECISION)

    partial = (flat * pieces + piece) * (BLOCKS * LANDMARKS) + landmark
    tl.store(sum_inner + partial, of_inner)
    column = tl.arange(0, E_PADDED)
    tl.store(grad_landmark_value + partial[:, None] * E + column[None, :], of_value, mask=(column < E)[None, :])
    if grad_query_landmarks is not None:
        column = tl.arange(0, D_PADDED)
        tl.store(
            grad_query_landmarks + partial[:, None] * D + column[None, :], of_landmarks, mask=(column < D)[None, :]
        )


@triton.jit(do_not_specialize=SIZES)
def landmark_gradient_kernel(
    partial_value,  # (b h, g pieces, m padded, e)
    partial_inner,  # (b h, g pieces, m padded)
    landmark_value,  # (b h, forward's m padded, e)
    grad_landmark_value,  # (b h, m, e) float32
    grad_log_sum,  # (b h, m) float32
    sum_inner,  # (b h, m) float32: c, and what O . O' changes by when O' is rounded for a product
    pieces,
    m_padded,
    m_padded_forward,
    M: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Pieces added in their order."""
    program = tl.program_id(0)
    landmark = (program % tl.cdiv(M, ROWS)) * ROWS + tl.arange(0, ROWS)
    flat = tl.cast(program // tl.cdiv(M, ROWS), tl.int64)
    inside = landmark < M
    value = tl.zeros((ROWS, E_PADDED), tl.float32)
    inner = tl.zeros((ROWS,), tl.float32)
    for piece in range(pieces):
        place = (flat * pieces + piece) * m_padded
        value += load_tile(partial_value + place * E, landmark, E, M, E, E_PADDED)
        inner += tl.load(partial_inner + place + landmark, mask=inside, other=0.0)
    o = load_tile(landmark_value + flat * m_padded_forward * E, landmark, E, M, E, E_PADDED)
    store_tile(grad_landmark_value + flat * M * E, landmark, E, M, value, E, E_PADDED)
    log_sum = tl.sum(value * o, 1) - inner
    tl.store(grad_log_sum + flat * M + landmark, log_sum, mask=inside)
    # So that gradients of the logits of a landmark still add up to L'.
    value = value.to(PRODUCT).to(tl.float32)
    tl.store(sum_inner + flat * M + landmark, tl.sum(value * o, 1) - log_sum, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    query,
    grad,  # (b h g, n, e)
    query_landmarks,
    landmark_bias,
    query_boundaries,  # (b + 1,): sequences are packed into one batch item; or None
    landmark_value,  # (b h, m padded, e) float32
    log_sum,  # (b h, m padded) float32, units of log 2
    query_log_sum,  # (b h g, n) float32, units of log 2; packed (h g, n)
    inner,  # as query_log_sum
    grad_query,  # (b h g, n, d); packed (n, h g, d)
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
    EVEN: tl.constexpr,
):
    """Queries along the rows, so that gradients of logits go from registers into their product."""
    program = tl.program_id(0)
    first = (program % pieces) * span
    flat = tl.cast(program // pieces, tl.int64)
    shared = flat // groups
    batch, head = shared // heads, shared % heads
    begin, length = sequence_bounds(query_boundaries, batch, n)
    last = tl.minimum(first + span, length)
    place, step, number = output_places(query_boundaries, begin, flat, heads * groups, n)
    query += batch * query_batch + (flat % (heads * groups)) * query_head + begin * query_row
    grad += batch * grad_batch + (flat % (heads * groups)) * grad_head + begin * grad_row
    query_log_sum += number
    inner += number
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
            blocks = blocks + ((u.to(element), o.to(element), exponent_parts(bias, PRODUCT)),)  # noqa: RUF005 - kernels have no unpacking
    ones = tl.full((TOKENS, NARROW), 1.0, PRODUCT)
    row = tl.arange(0, TOKENS)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        offset = tl.cast(start, tl.int64)
        rows = last - start
        if EVEN:
            rows = None
        q = load_tile(query + offset * query_row, row, query_row, rows, D, D_PADDED)
        do = load_tile(grad + offset * grad_row, row, grad_row, rows, E, E_PADDED)
        normaliser = load_vector(query_log_sum + start, row, rows, float("inf"))
        delta = load_vector(inner + start, row, rows, 0.0)
        dq = tl.zeros((TOKENS, D_PADDED), tl.float32)
        if RESIDENT:
            for block in tl.static_range(BLOCKS):
                dq = _query_gradient(q, do, ones, normaliser, delta, blocks[block], dq, PRECISION, PRODUCT)
        else:
            for block in range(BLOCKS):
                u, o, bias = load_query_landmarks(
                    query_landmarks, landmark_bias, landmark_value, log_sum, query_landmarks_row,
                    block * LANDMARKS + tl.arange(0, LANDMARKS), M, D, E, D_PADDED, E_PADDED,
                )  # fmt: skip
                landmarks = (u.to(element), o.to(element), exponent_parts(bias, PRODUCT))
                dq = _query_gradient(q, do, ones, normaliser, delta, landmarks, dq, PRECISION, PRODUCT)
        store_tile(grad_query + (place + offset * step) * D, row, step * D, rows, dq, D, D_PADDED)


@triton.jit
def _query_gradient(q, do, ones, normaliser, delta, landmarks, dq, PRECISION: tl.constexpr, PRODUCT: tl.constexpr):
    logits = tl.dot(ones, tl.trans(landmarks[2]), input_precision=PRECISION)
    logits = tl.dot(q, tl.trans(landmarks[0]), logits, input_precision=PRECISION)
    p = tl.exp2(logits * LOG2_E - normaliser[:, None])
    ds = p * (tl.dot(do, tl.trans(landmarks[1]), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(PRODUCT), landmarks[0].to(PRODUCT), dq, input_precision=PRECISION)
