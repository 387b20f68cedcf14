# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Forward kernels of trigonometric attention: keys into sums, split over the sequence; a fixed-order merge; queries.

Sums of signed features cancel, so a rounding error of a feature counts as many times over as they do. Operands of
16-bit products are therefore kept as two 16-bit parts each wherever they are not 16-bit already: rows of W, features,
sums over keys. Phases are in turns (units of 2 pi), so that taking off whole turns is exact.

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, m rows of W, d head dim, e value dim.
"""

import triton
import triton.language as tl

from spectraformer.ops.streaming import UNSAFE_RATIO
from spectraformer.ops.triton.tiles import LOG2_E, SIZES, load_key_bias, load_rows, load_tile, store_tile

TURNS = tl.constexpr(0.15915494309189535)  # in a radian
UNSAFE = tl.constexpr(UNSAFE_RATIO)
# Adding it rounds to an integer, which is then in the low bits.
ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def cos_sin(turns):
    """Cosine and sine of an angle in turns, each to 1e-7: polynomials within an eighth of a turn of a quarter."""
    quarters = 4.0 * turns
    rounded = quarters + ROUNDING
    whole = rounded.to(tl.int32, bitcast=True)
    r = quarters - (rounded - ROUNDING)
    # Beyond 2^22 quarters an angle in float32 is no angle any more; keep its features bounded, and a NaN a NaN.
    r = tl.maximum(r, -0.5, propagate_nan=tl.PropagateNan.ALL)
    r = tl.minimum(r, 0.5, propagate_nan=tl.PropagateNan.ALL)
    x = r * r
    sine = r * (1.5707963705 + x * (-0.64596349001 + x * (0.079680219293 - x * 0.0046021630988)))
    cosine = 1.0 + x * (-1.2336978912 + x * (0.25360569358 - x * 0.020424420014))
    odd = (whole & 1) != 0
    c, s = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    c = (c.to(tl.int32, bitcast=True) ^ (((whole + 1) & 2) << 30)).to(tl.float32, bitcast=True)
    s = (s.to(tl.int32, bitcast=True) ^ ((whole & 2) << 30)).to(tl.float32, bitcast=True)
    return c, s


@triton.jit
def in_parts(x, element: tl.constexpr):
    """A float32 tile as the sum of two of the dtype of products; of float32 itself the second is 0 and not used."""
    high = x.to(element)
    return high, (x - high.to(tl.float32)).to(element)


@triton.jit
def dot_parts(high, low, y, total, PRECISION: tl.constexpr):
    """The sum total + (high + low) y."""
    total = tl.dot(high, y, total, input_precision=PRECISION)
    if y.dtype != tl.float32:
        total = tl.dot(low, y, total, input_precision=PRECISION)
    return total


@triton.jit
def load_matrix(rows, row, stride, element: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Rows of W in turns, in two parts."""
    return in_parts(load_tile(rows, row, stride, M, D, D_PADDED) * TURNS, element)


@triton.jit
def phases(w_high, w_low, x, PRECISION: tl.constexpr):
    """W x in turns, rows of W along the rows."""
    turns = tl.dot(w_high, tl.trans(x), input_precision=PRECISION)
    if x.dtype != tl.float32:
        turns = tl.dot(w_low, tl.trans(x), turns, input_precision=PRECISION)
    return turns


@triton.jit(do_not_specialize=SIZES)
def trigonometric_key_kernel(
    key,
    value,
    rows,
    key_bias,
    value_sums,  # (b h, pieces, 2, m padded, e) float32
    sums,  # (b h, pieces, 2, 2, m padded) float32: of features, then of their absolute values
    peak,  # (b h, pieces) float32, units of log 2
    total,  # (b h, pieces) float32
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
    PRECISION: tl.constexpr,
):
    """One block of rows of W over one piece of the keys, relative to the largest weight of the piece."""
    program = tl.program_id(0)
    block = program % BLOCKS
    piece = (program // BLOCKS) % pieces
    flat = tl.cast(program // (BLOCKS * pieces), tl.int64)
    batch, head = flat // heads, flat % heads
    first = piece * span
    last = tl.minimum(first + span, s)
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    rows += batch * rows_batch + head * rows_head
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head
    element = key.dtype.element_ty

    i = block * LANDMARKS + tl.arange(0, LANDMARKS)
    w_high, w_low = load_matrix(rows, i, rows_row, element, M, D, D_PADDED)
    top = tl.full((1,), float("-inf"), tl.float32)
    mass = tl.zeros((1,), tl.float32)
    value_c = tl.zeros((LANDMARKS, E_PADDED), tl.float32)
    value_s = tl.zeros((LANDMARKS, E_PADDED), tl.float32)
    sum_c = tl.zeros((LANDMARKS,), tl.float32)
    sum_s = tl.zeros((LANDMARKS,), tl.float32)
    size_c = tl.zeros((LANDMARKS,), tl.float32)
    size_s = tl.zeros((LANDMARKS,), tl.float32)
    row = tl.arange(0, TOKENS)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        offset = tl.cast(start, tl.int64)
        bias = load_key_bias(key_bias, start, row, last - start)
        # Not "> -inf": a NaN must show.
        present = bias != float("-inf")
        k = load_rows(key + offset * key_row, row, key_row, present, D, D_PADDED)
        v = load_rows(value + offset * value_row, row, value_row, present, E, E_PADDED)
        weight = key_weight(k, bias, key_factor)
        higher = tl.maximum(top, tl.max(weight, 0))
        # No key seen yet: -inf - -inf would be NaN.
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(weight - reference)
        shrink = tl.exp2(top - reference)
        cosine, sine = cos_sin(phases(w_high, w_low, k, PRECISION))
        cosine, sine = cosine * p[None, :], sine * p[None, :]
        mass = mass * shrink + tl.sum(p, 0)
        sum_c, sum_s = sum_c * shrink + tl.sum(cosine, 1), sum_s * shrink + tl.sum(sine, 1)
        size_c = size_c * shrink + tl.sum(tl.abs(cosine), 1)
        size_s = size_s * shrink + tl.sum(tl.abs(sine), 1)
        high, low = in_parts(cosine, element)
        value_c = dot_parts(high, low, v, value_c * shrink[:, None], PRECISION)
        high, low = in_parts(sine, element)
        value_s = dot_parts(high, low, v, value_s * shrink[:, None], PRECISION)
        top = higher

    part = flat * pieces + piece
    if block == 0:
        one = tl.arange(0, 1)
        tl.store(peak + part + one, top)
        tl.store(total + part + one, mass)
    M_PADDED: tl.constexpr = BLOCKS * LANDMARKS
    store_tile(value_sums + part * 2 * M_PADDED * E, i, E, M_PADDED, value_c, E, E_PADDED)
    store_tile(value_sums + (part * 2 + 1) * M_PADDED * E, i, E, M_PADDED, value_s, E, E_PADDED)
    place = part * 4 * M_PADDED + i
    tl.store(sums + place, sum_c)
    tl.store(sums + place + M_PADDED, sum_s)
    tl.store(sums + place + 2 * M_PADDED, size_c)
    tl.store(sums + place + 3 * M_PADDED, size_s)


@triton.jit
def key_weight(k, bias, key_factor):
    """Log-weight of keys in units of log 2: bias, already in them, and key_factor |k|^2."""
    wide = k.to(tl.float32)
    return bias + tl.sum(wide * wide, 1) * (key_factor * LOG2_E)


@triton.jit(do_not_specialize=SIZES)
def merge_trigonometric_kernel(
    partial_value,  # (b h, pieces, 2, m padded, e)
    partial_sums,  # (b h, pieces, 2, 2, m padded)
    partial_peak,  # (b h, pieces)
    partial_total,
    rule_weight,
    state_value,  # (b h, 2, m padded, e) float32: means over the keys, by their weights
    state,  # (b h, 3, 2, m padded) float32: of features; of them and of absolute ones, with the weights of the rule
    log_total,  # (b h,) float32, units of log 2
    rule_weight_batch,
    rule_weight_head,
    heads,
    pieces,
    M: tl.constexpr,
    M_PADDED: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Pieces of the sequence merged in their order."""
    BLOCKS: tl.constexpr = 2 * M_PADDED // ROWS
    block = tl.program_id(0) % BLOCKS
    flat = tl.cast(tl.program_id(0) // BLOCKS, tl.int64)
    i = block * ROWS + tl.arange(0, ROWS)
    top = tl.full((1,), float("-inf"), tl.float32)
    one = tl.arange(0, 1)
    for piece in range(pieces):
        top = tl.maximum(top, tl.load(partial_peak + flat * pieces + piece + one))
    top = tl.where(top == float("-inf"), 0.0, top)
    mass = tl.zeros((1,), tl.float32)
    mean = tl.zeros((ROWS, E_PADDED), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    size = tl.zeros((ROWS,), tl.float32)
    for piece in range(pieces):
        part = flat * pieces + piece
        scale = tl.exp2(tl.load(partial_peak + part + one) - top)
        mass += scale * tl.load(partial_total + part + one)
        sums += scale * tl.load(partial_sums + part * 4 * M_PADDED + i)
        size += scale * tl.load(partial_sums + (part * 4 + 2) * M_PADDED + i)
        found = load_tile(partial_value + part * 2 * M_PADDED * E, i, E, 2 * M_PADDED, E, E_PADDED)
        mean += scale[:, None] * found
    divisor = tl.where(mass == 0.0, 1.0, mass)
    store_tile(state_value + flat * 2 * M_PADDED * E, i, E, 2 * M_PADDED, mean / divisor[:, None], E, E_PADDED)
    rule_weight += (flat // heads) * rule_weight_batch + (flat % heads) * rule_weight_head
    a = tl.load(rule_weight + i % M_PADDED, mask=i % M_PADDED < M, other=0.0) / divisor
    state += flat * 6 * M_PADDED + i
    tl.store(state, sums / divisor)
    tl.store(state + 2 * M_PADDED, sums * a)
    tl.store(state + 4 * M_PADDED, size * tl.abs(a))
    if block == 0:
        tl.store(log_total + flat + one, top + tl.log2(divisor))


@triton.jit
def load_state(
    rows, rule_weight, state_value, rows_row, i, element: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    M_PADDED: tl.constexpr,
):  # fmt: skip
    """Rows of W in turns, and sums of values, by cosines and by sines, with the weights of the rule in them."""
    a = tl.load(rule_weight + i, mask=i < M, other=0.0)
    w_high, w_low = load_matrix(rows, i, rows_row, element, M, D, D_PADDED)
    value_c = load_tile(state_value, i, E, M, E, E_PADDED) * a[:, None]
    value_s = load_tile(state_value + M_PADDED * E, i, E, M, E, E_PADDED) * a[:, None]
    return w_high, w_low, value_c, value_s


@triton.jit
def load_sums(state, i, M: tl.constexpr, M_PADDED: tl.constexpr):
    """Sums of cosines and of sines with the weights of the rule."""
    sum_c = tl.load(state + 2 * M_PADDED + i, mask=i < M, other=0.0)
    return sum_c, tl.load(state + 3 * M_PADDED + i, mask=i < M, other=0.0)


@triton.jit
def _load_block(
    rows, rule_weight, state_value, rows_row, i, element: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    M_PADDED: tl.constexpr,
):  # fmt: skip
    w_high, w_low, value_c, value_s = load_state(
        rows, rule_weight, state_value, rows_row, i, element, M, D, E, D_PADDED, E_PADDED, M_PADDED
    )
    c_high, c_low = in_parts(value_c, element)
    s_high, s_low = in_parts(value_s, element)
    return w_high, w_low, c_high, c_low, s_high, s_low


@triton.jit
def _attend(
    q, block, state, i, numerator, denominator, magnitude,
    M: tl.constexpr, M_PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One more block of rows of W into the sums of the queries, which lie along the rows."""
    turns = tl.dot(q, tl.trans(block[0]), input_precision=PRECISION)
    if q.dtype != tl.float32:
        turns = tl.dot(q, tl.trans(block[1]), turns, input_precision=PRECISION)
    c, s = cos_sin(turns)
    # Read again for every tile: each thread would hold too many of them.
    sum_c, sum_s = load_sums(state, i, M, M_PADDED)
    size_c, size_s = load_sums(state + 2 * M_PADDED, i, M, M_PADDED)
    denominator += tl.sum(c * sum_c[None, :] + s * sum_s[None, :], 1)
    magnitude += tl.sum(tl.abs(c) * size_c[None, :] + tl.abs(s) * size_s[None, :], 1)
    high, low = in_parts(c, q.dtype)
    numerator = dot_parts(high, low, block[2], numerator, PRECISION)
    if q.dtype != tl.float32:
        numerator = tl.dot(high, block[3], numerator, input_precision=PRECISION)
    high, low = in_parts(s, q.dtype)
    numerator = dot_parts(high, low, block[4], numerator, PRECISION)
    if q.dtype != tl.float32:
        numerator = tl.dot(high, block[5], numerator, input_precision=PRECISION)
    return numerator, denominator, magnitude


@triton.jit(do_not_specialize=SIZES)
def trigonometric_query_kernel(
    query,
    rows,
    rule_weight,
    state_value,  # (b h, 2, m padded, e) float32
    state,  # (b h, 3, 2, m padded) float32
    out,  # (b h g, n, e)
    unsafe,  # (b h g, n) uint8
    divisor,  # (b h g, n) float32, or None
    query_batch,
    query_head,
    query_row,
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
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One piece of the queries of one head over all rows of W; the guard of denominators is that of plain torch."""
    program = tl.program_id(0)
    first = (program % pieces) * span
    last = tl.minimum(first + span, n)
    flat = tl.cast(program // pieces, tl.int64)
    shared = flat // groups
    batch, head = shared // heads, shared % heads
    query += batch * query_batch + (flat % (heads * groups)) * query_head
    rows += batch * rows_batch + head * rows_head
    rule_weight += batch * rule_weight_batch + head * rule_weight_head
    state_value += shared * 2 * M_PADDED * E
    state += shared * 6 * M_PADDED
    out += flat * n * E
    element = query.dtype.element_ty

    blocks = ()
    if RESIDENT:
        for i in tl.static_range(BLOCKS):
            block = _load_block(
                rows, rule_weight, state_value, rows_row, i * LANDMARKS + tl.arange(0, LANDMARKS), element,
                M, D, E, D_PADDED, E_PADDED, M_PADDED,
            )  # fmt: skip
            blocks = blocks + (block,)  # noqa: RUF005 - kernels have no unpacking
    row = tl.arange(0, TOKENS)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        offset = tl.cast(start, tl.int64)
        q = load_tile(query + offset * query_row, row, query_row, last - start, D, D_PADDED)
        numerator = tl.zeros((TOKENS, E_PADDED), tl.float32)
        denominator = tl.zeros((TOKENS,), tl.float32)
        magnitude = tl.zeros((TOKENS,), tl.float32)
        if RESIDENT:
            for i in tl.static_range(BLOCKS):
                numerator, denominator, magnitude = _attend(
                    q, blocks[i], state, i * LANDMARKS + tl.arange(0, LANDMARKS), numerator, denominator, magnitude,
                    M, M_PADDED, PRECISION,
                )  # fmt: skip
        else:
            for i in range(BLOCKS):
                landmark = i * LANDMARKS + tl.arange(0, LANDMARKS)
                block = _load_block(
                    rows, rule_weight, state_value, rows_row, landmark, element, M, D, E, D_PADDED, E_PADDED, M_PADDED
                )
                numerator, denominator, magnitude = _attend(
                    q, block, state, landmark, numerator, denominator, magnitude, M, M_PADDED, PRECISION
                )
        floor = UNSAFE * magnitude
        guarded = tl.abs(denominator) < floor
        safe = tl.where(guarded, tl.where(denominator < 0, -floor, floor), denominator)
        safe = tl.where(magnitude == 0.0, 1.0, safe)
        store_tile(out + offset * E, row, E, last - start, numerator / safe[:, None], E, E_PADDED)
        place = flat * n + start + row
        tl.store(unsafe + place, guarded.to(tl.uint8), mask=row < last - start)
        if divisor is not None:
            tl.store(divisor + place, safe, mask=row < last - start)
