# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Forward of keys into landmarks, split over the sequence, and the merge of the pieces in their order.

Logits are in units of log 2 from the dot product on, so that every exponential is one instruction. Landmarks lie along
the rows of a tile: reductions stay inside a warp, and weights go from registers straight into the second product.

No running maximum: weights are relative to one reference, the middle of the highest logits that landmarks have among
the first keys. Floating point leaves 2^80 to either side of it; a piece whose sums left that range is computed again,
with a maximum of its own for every landmark that rises as keys come.

Legend: b batch, h key heads, s keys, m landmarks, d head dim, e value dim.
"""

import triton
import triton.language as tl

from spectraformer.ops.triton.tiles import (
    LEAST_MASS,
    LOG2_E,
    MOST_MASS,
    NARROW,
    SIZES,
    absorb_keys,
    load_keys,
    load_tile,
    merge_pieces,
    piece_bounds,
    sequence_bounds,
    store_tile,
)

# Of a tile in the loop that is rarely run.
CAREFUL_TOKENS = tl.constexpr(32)


@triton.jit(do_not_specialize=SIZES)
def key_kernel(
    key,
    value,
    key_landmarks,
    key_bias,
    key_quadratic,
    key_boundaries,  # (b + 1,): sequences are packed into one batch item; or None
    landmark_value,  # (b h, pieces, m padded, e) float32, divided by the sum where there is one piece
    peak,  # (b h, pieces, m padded) float32
    total,  # (b h, pieces, m padded) float32; with one piece, the log-sum-exp instead
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
    middle,
    pieces,
    EARLY: tl.constexpr,
    ONE_PIECE: tl.constexpr,
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
    FIXED_REFERENCE: tl.constexpr,
    EVEN: tl.constexpr,  # whether tokens fill every tile
):
    """One block of landmarks, along the rows; one piece of the keys."""
    program = tl.program_id(0)
    block = program % BLOCKS
    piece = (program // BLOCKS) % pieces
    flat = tl.cast(program // (BLOCKS * pieces), tl.int64)
    batch, head = flat // heads, flat % heads
    begin, length = sequence_bounds(key_boundaries, batch, s)
    first, last = piece_bounds(piece, span, middle, length, EARLY)
    key += batch * key_batch + head * key_head + begin * key_row
    value += batch * value_batch + head * value_head + begin * value_row
    key_landmarks += batch * key_landmarks_batch + head * key_landmarks_head
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head + begin
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head
    element = key.dtype.element_ty

    landmark = block * LANDMARKS + tl.arange(0, LANDMARKS)
    top = tl.full((LANDMARKS,), float("-inf"), tl.float32)
    mass = tl.zeros((LANDMARKS,), tl.float32)
    mean = tl.zeros((LANDMARKS, E_PADDED), tl.float32)
    safe = False
    if FIXED_REFERENCE:
        w = load_tile(key_landmarks, landmark, key_landmarks_row, M, D, D_PADDED).to(element)
        rows_first = last - first
        if EVEN:
            rows_first = None
        k, v, weight = load_keys(
            key, value, key_bias, key_quadratic, first, rows_first, key_row, value_row, D, E, D_PADDED, E_PADDED, TOKENS
        )
        logits = tl.dot(w, tl.trans(k), input_precision=PRECISION) * LOG2_E + weight[None, :]
        highest = tl.max(logits, 1)
        reference = 0.5 * (tl.max(highest, 0) + tl.min(highest, 0))
        p = tl.exp2(logits - reference).to(v.dtype)
        # Masses are sums of the weights as the other product has them: an error common to both cancels.
        ones = tl.full((TOKENS, NARROW), 1.0, v.dtype)
        masses = tl.dot(p, ones, input_precision=PRECISION)
        mean = tl.dot(p, v, input_precision=PRECISION)
        # Without any key in the first tile there is no reference.
        end = tl.where(reference == float("-inf"), first, last)
        for start in tl.range(first + TOKENS, end, TOKENS, num_stages=STAGES):
            rows = last - start
            if EVEN:
                rows = None
            k, v, weight = load_keys(
                key, value, key_bias, key_quadratic, start, rows, key_row, value_row, D, E, D_PADDED, E_PADDED, TOKENS
            )
            weight -= reference
            logits = tl.dot(w, tl.trans(k), input_precision=PRECISION) * LOG2_E + weight[None, :]
            p = tl.exp2(logits).to(v.dtype)
            masses = tl.dot(p, ones, masses, input_precision=PRECISION)
            mean = tl.dot(p, v, mean, input_precision=PRECISION)
        mass = tl.max(masses, 1)
        safe = (tl.min(mass, 0) > LEAST_MASS) & (tl.max(mass, 0) < MOST_MASS)
        top = tl.zeros((LANDMARKS,), tl.float32) + reference
    if not safe:
        top = tl.full((LANDMARKS,), float("-inf"), tl.float32)
        mass = tl.zeros((LANDMARKS,), tl.float32)
        mean = tl.zeros((LANDMARKS, E_PADDED), tl.float32)
        # Loaded again, and in small tiles without a pipeline beside the other: that loop needs the registers.
        TILE: tl.constexpr = min(TOKENS, CAREFUL_TOKENS) if FIXED_REFERENCE else TOKENS
        w = load_tile(key_landmarks, landmark, key_landmarks_row, M, D, D_PADDED).to(element)
        for start in tl.range(first, last, TILE, num_stages=1 if FIXED_REFERENCE else STAGES):
            key_tile, value_tile, log_weight = load_keys(
                key, value, key_bias, key_quadratic, start, last - start, key_row, value_row,
                D, E, D_PADDED, E_PADDED, TILE,
            )  # fmt: skip
            top, mass, mean = absorb_keys(w, key_tile, value_tile, log_weight, top, mass, mean, PRECISION)

    place = (flat * pieces + piece) * (BLOCKS * LANDMARKS) + landmark
    if ONE_PIECE:
        # Without any key: value 0 and a finite log-sum-exp, so that queries find no NaN.
        empty = mass == 0.0
        divisor = tl.where(empty, 1.0, mass)
        mean = mean / divisor[:, None]
        tl.store(total + place, tl.where(empty, 0.0, top + tl.log2(divisor)))
    else:
        tl.store(peak + place, top)
        tl.store(total + place, mass)
    column = tl.arange(0, E_PADDED)
    tl.store(landmark_value + place[:, None] * E + column[None, :], mean, mask=(column < E)[None, :])


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    partial_value,  # (b h, pieces, m padded, e)
    partial_peak,  # (b h, pieces, m padded)
    partial_total,
    landmark_value,  # (b h, m padded, e)
    log_sum,  # (b h, m padded)
    pieces,
    m_padded,
    M: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Many pieces: merged once, by programs of a few landmarks."""
    program = tl.program_id(0)
    landmark = (program % tl.cdiv(M, ROWS)) * ROWS + tl.arange(0, ROWS)
    flat = tl.cast(program // tl.cdiv(M, ROWS), tl.int64)
    start = flat * pieces * m_padded
    mean, total = merge_pieces(
        partial_value + start * E, partial_peak + start, partial_total + start, pieces, m_padded, landmark,
        M, E, E_PADDED,
    )  # fmt: skip
    store_tile(landmark_value + flat * m_padded * E, landmark, E, M, mean, E, E_PADDED)
    tl.store(log_sum + flat * m_padded + landmark, total, mask=landmark < M)
