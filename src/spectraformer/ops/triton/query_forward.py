# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Forward of landmarks into queries.

Queries lie along the rows of a tile, and weights go from registers straight into the second product. As for keys, one
reference serves all: here the highest bias of a landmark. A piece with a query beyond its range is computed again, with
a maximum for every query.

Legend: b batch, h key heads, g query heads per key head, n queries, m landmarks, d head dim, e value dim.
"""

import triton
import triton.language as tl

from spectraformer.ops.triton.tiles import (
    LEAST_MASS,
    LOG2_E,
    MOST_MASS,
    NARROW,
    SIZES,
    exponent_parts,
    load_query_landmarks,
    load_tile,
    merge_pieces,
    output_places,
    sequence_bounds,
    store_tile,
    store_vector,
)


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    query,
    query_landmarks,
    landmark_bias,
    query_boundaries,  # (b + 1,): sequences are packed into one batch item; or None
    landmark_value,  # (b h, m padded, e) float32
    log_sum,  # (b h, m padded) float32, units of log 2
    partial_value,  # (b h, key pieces, m padded, e): given, the two above are filled from these; or None
    partial_peak,  # (b h, key pieces, m padded)
    partial_total,
    out,  # (b h g, n, e); packed (n, h g, e)
    query_log_sum,  # (b h g, n) float32, units of log 2; packed (h g, n); or None
    query_batch,
    query_head,
    query_row,
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
    key_pieces,
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
    FIXED_REFERENCE: tl.constexpr,
    EVEN: tl.constexpr,  # whether tokens fill every tile
):
    """All landmarks; one piece of the queries."""
    program = tl.program_id(0)
    first = (program % pieces) * span
    flat = tl.cast(program // pieces, tl.int64)
    shared = flat // groups
    batch, head = shared // heads, shared % heads
    begin, length = sequence_bounds(query_boundaries, batch, n)
    last = tl.minimum(first + span, length)
    place, step, number = output_places(query_boundaries, begin, flat, heads * groups, n)
    query += batch * query_batch + (flat % (heads * groups)) * query_head + begin * query_row
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head
    landmark_value += shared * m_padded * E
    log_sum += shared * m_padded
    element = query.dtype.element_ty

    blocks = ()
    if RESIDENT:
        for block in tl.static_range(BLOCKS):
            landmark = block * LANDMARKS + tl.arange(0, LANDMARKS)
            if partial_value is not None:
                # Every program merges what it needs, the first of a head for the backward: one launch less.
                state = shared * key_pieces * m_padded
                o, merged = merge_pieces(
                    partial_value + state * E, partial_peak + state, partial_total + state, key_pieces, m_padded,
                    landmark, M, E, E_PADDED,
                )  # fmt: skip
                if program % (pieces * groups) == 0:
                    store_tile(landmark_value, landmark, E, M, o, E, E_PADDED)
                    tl.store(log_sum + landmark, merged, mask=landmark < M)
                u = load_tile(query_landmarks, landmark, query_landmarks_row, M, D, D_PADDED)
                bias = tl.load(landmark_bias + landmark, mask=landmark < M, other=float("-inf")) * LOG2_E + merged
            else:
                u, o, bias = load_query_landmarks(
                    query_landmarks, landmark_bias, landmark_value, log_sum, query_landmarks_row,
                    landmark, M, D, E, D_PADDED, E_PADDED,
                )  # fmt: skip
            blocks = blocks + ((u.to(element), o.to(element), bias),)  # noqa: RUF005 - kernels have no unpacking
    row = tl.arange(0, TOKENS)
    safe = False
    if FIXED_REFERENCE and RESIDENT:
        reference = tl.max(blocks[0][2], 0)
        for block in tl.static_range(1, BLOCKS):
            reference = tl.maximum(reference, tl.max(blocks[block][2], 0))
        parts = ()
        for block in tl.static_range(BLOCKS):
            parts = parts + (exponent_parts(blocks[block][2] - reference, element),)  # noqa: RUF005
        ones = tl.full((TOKENS, NARROW), 1.0, element)
        ones_of_landmarks = tl.full((LANDMARKS, NARROW), 1.0, element)
        least, most = tl.full((TOKENS,), 1.0, tl.float32), tl.full((TOKENS,), 1.0, tl.float32)
        for start in tl.range(first, last, TOKENS, num_stages=STAGES):
            offset = tl.cast(start, tl.int64)
            rows = last - start
            if EVEN:
                rows = None
            q = load_tile(query + offset * query_row, row, query_row, rows, D, D_PADDED)
            masses = tl.zeros((TOKENS, NARROW), tl.float32)
            mean = tl.zeros((TOKENS, E_PADDED), tl.float32)
            for block in tl.static_range(BLOCKS):
                # The bias of landmarks by a product: as a vector along columns it would fill a fifth of the registers.
                logits = tl.dot(ones, tl.trans(parts[block]), input_precision=PRECISION)
                logits = tl.dot(q, tl.trans(blocks[block][0]), logits, input_precision=PRECISION)
                p = tl.exp2(logits * LOG2_E).to(element)
                masses = tl.dot(p, ones_of_landmarks, masses, input_precision=PRECISION)
                mean = tl.dot(p, blocks[block][1], mean, input_precision=PRECISION)
            mass = tl.max(masses, 1)
            least, most = tl.minimum(least, mass), tl.maximum(most, mass)
            store_tile(
                out + (place + offset * step) * E, row, step * E, rows, mean * (1.0 / mass)[:, None], E, E_PADDED
            )
            if query_log_sum is not None:
                store_vector(query_log_sum + number + start, row, rows, reference + tl.log2(mass))
        safe = (tl.min(least, 0) > LEAST_MASS) & (tl.max(most, 0) < MOST_MASS)
    if not safe:
        # Without a pipeline beside the other: that loop needs the registers.
        for start in tl.range(first, last, TOKENS, num_stages=1 if FIXED_REFERENCE and RESIDENT else STAGES):
            offset = tl.cast(start, tl.int64)
            q = load_tile(query + offset * query_row, row, query_row, last - start, D, D_PADDED)
            top = tl.full((TOKENS,), -1e38, tl.float32)
            mass = tl.zeros((TOKENS,), tl.float32)
            mean = tl.zeros((TOKENS, E_PADDED), tl.float32)
            if RESIDENT:
                for block in tl.static_range(BLOCKS):
                    top, mass, mean = _attend(q, blocks[block], top, mass, mean, PRECISION)
            else:
                for block in range(BLOCKS):
                    u, o, bias = load_query_landmarks(
                        query_landmarks, landmark_bias, landmark_value, log_sum, query_landmarks_row,
                        block * LANDMARKS + tl.arange(0, LANDMARKS), M, D, E, D_PADDED, E_PADDED,
                    )  # fmt: skip
                    top, mass, mean = _attend(q, (u.to(element), o.to(element), bias), top, mass, mean, PRECISION)
            store_tile(
                out + (place + offset * step) * E,
                row,
                step * E,
                last - start,
                mean * (1.0 / mass)[:, None],
                E,
                E_PADDED,
            )
            if query_log_sum is not None:
                store_vector(query_log_sum + number + start, row, last - start, top + tl.log2(mass))


@triton.jit
def _attend(q, landmarks, top, mass, mean, PRECISION: tl.constexpr):
    """One more block of landmarks into a running softmax."""
    logits = tl.dot(q, tl.trans(landmarks[0]), input_precision=PRECISION) * LOG2_E + landmarks[2][None, :]
    higher = tl.maximum(top, tl.max(logits, 1))
    p = tl.exp2(logits - higher[:, None])
    shrink = tl.exp2(top - higher)
    mean = tl.dot(p.to(q.dtype), landmarks[1], mean * shrink[:, None], input_precision=PRECISION)
    return higher, mass * shrink + tl.sum(p, 1), mean
