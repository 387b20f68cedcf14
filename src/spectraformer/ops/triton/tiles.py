# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Parts of kernels: tiles of rows in and out, and what landmarks and keys bring to a tile.

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, m landmarks, d head dim, e value dim.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Sizes that must not compile a kernel anew when they change.
SIZES = ("heads", "groups", "n", "s", "pieces", "key_pieces", "middle", "m_padded", "m_padded_forward")

# Sums relative to a fixed reference are exact in between: what underflows, at 2^-126 a term, is below 2^-20 of them.
LEAST_MASS = tl.constexpr(2.0**-80)
MOST_MASS = tl.constexpr(2.0**100)
# Stands for an exponent of -inf in products, where that would be inf - inf.
NOTHING = tl.constexpr(-1e30)
# Columns of the narrowest product.
NARROW = tl.constexpr(16)


@triton.jit
def parts_of(x, DTYPE: tl.constexpr):
    """Columns that add up to x beyond the precision of their dtype, (x, NARROW): an operand of a product."""
    column = tl.arange(0, NARROW)[None, :]
    first = x.to(DTYPE)
    rest = x - first.to(tl.float32)
    second = rest.to(DTYPE)
    third = (rest - second.to(tl.float32)).to(DTYPE)
    zero = tl.zeros((1, 1), DTYPE)
    return tl.where(
        column == 0,
        first[:, None],
        tl.where(column == 1, second[:, None], tl.where(column == 2, third[:, None], zero)),
    )


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Numbers >= 0 in float32, rounded to what bfloat16 can hold; as they are for products in float32."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        x = ((x.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def exponent_parts(x, DTYPE: tl.constexpr):
    """As parts_of, of exponents in units of log 2: to be added to a product in natural units."""
    # Not "> NOTHING": a NaN must show.
    return parts_of(tl.where(x <= NOTHING, NOTHING, x * (1.0 / LOG2_E)), DTYPE)


@triton.jit
def load_tile(pointer, row, stride, rows, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a matrix with unit column stride, 0 from ``rows`` on (None: all are there); pointer is at row 0."""
    wanted = None
    if rows is not None:
        wanted = row < rows
    return load_rows(pointer, row, stride, wanted, COLUMNS, PADDED)


@triton.jit
def load_rows(pointer, row, stride, wanted, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """As load_tile, 0 in rows that are not wanted, whatever they hold; None wants all."""
    column = tl.arange(0, PADDED)
    pointers = pointer + row[:, None] * stride + column[None, :]
    if wanted is None:
        if COLUMNS == PADDED:  # noqa: SIM108 - kernels have no conditional expressions of tensors
            x = tl.load(pointers)
        else:
            x = tl.load(pointers, mask=(column < COLUMNS)[None, :], other=0.0)
    elif COLUMNS == PADDED:
        x = tl.load(pointers, mask=wanted[:, None], other=0.0)
    else:
        x = tl.load(pointers, mask=wanted[:, None] & (column < COLUMNS)[None, :], other=0.0)
    return x


@triton.jit
def store_tile(pointer, row, stride, rows, x, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """The inverse of load_tile."""
    column = tl.arange(0, PADDED)
    pointers = pointer + row[:, None] * stride + column[None, :]
    x = x.to(pointer.dtype.element_ty)
    if rows is None:
        if COLUMNS == PADDED:
            tl.store(pointers, x)
        else:
            tl.store(pointers, x, mask=(column < COLUMNS)[None, :])
    elif COLUMNS == PADDED:
        tl.store(pointers, x, mask=(row < rows)[:, None])
    else:
        tl.store(pointers, x, mask=(row < rows)[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def load_vector(pointer, row, rows, other):
    """One number a row, ``other`` from ``rows`` on (None: all are there)."""
    if rows is None:  # noqa: SIM108
        x = tl.load(pointer + row)
    else:
        x = tl.load(pointer + row, mask=row < rows, other=other)
    return x


@triton.jit
def store_vector(pointer, row, rows, x):
    """The inverse of load_vector."""
    if rows is None:
        tl.store(pointer + row, x)
    else:
        tl.store(pointer + row, x, mask=row < rows)


@triton.jit
def load_keys(
    key, value, key_bias, key_quadratic, start, rows, key_row, value_row,
    D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A tile of keys, their values and log-weights (units of log 2), -inf from ``rows`` on and where removed."""
    row = tl.arange(0, TOKENS)
    offset = tl.cast(start, tl.int64)
    if (key_bias is None) and (rows is None):
        weight, present = tl.zeros((TOKENS,), tl.float32), None
    else:
        weight = load_key_bias(key_bias, start, row, rows)
        # Not "> -inf": a NaN must show.
        present = weight != float("-inf")
    k = load_rows(key + offset * key_row, row, key_row, present, D, D_PADDED)
    v = load_rows(value + offset * value_row, row, value_row, present, E, E_PADDED)
    return k, v, key_log_weight(k, weight, key_quadratic, D, D_PADDED)


@triton.jit
def piece_bounds(piece, span, middle, length, EARLY: tl.constexpr):
    """First token and end of a piece of span tokens.

    With EARLY, pieces are of EARLY tokens, up to middle, up to span, then of span tokens each; where middle is span,
    there is no third.
    """
    begin = piece * span
    end = begin + span
    if EARLY:
        regular = piece - tl.where(middle < span, 2, 1)
        begin = tl.where(piece == 0, 0, tl.where(piece == 1, EARLY, tl.maximum(regular * span, middle)))
        end = tl.where(piece == 0, EARLY, tl.where(piece == 1, middle, (regular + 1) * span))
    return begin, tl.minimum(end, length)


@triton.jit
def sequence_bounds(boundaries, sequence, tokens):
    """First token and length of a packed sequence, inside the tokens there are whatever boundaries say.

    Without boundaries: 0 and all of them.
    """
    begin = 0
    length = tokens
    if boundaries is not None:
        begin = tl.minimum(tl.maximum(tl.load(boundaries + sequence).to(tl.int64), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(boundaries + sequence + 1).to(tl.int64), begin), tokens)
        length = (end - begin).to(tl.int32)
    return begin, length


@triton.jit
def output_places(boundaries, begin, flat, heads, tokens):
    """Where a sequence and head begins in rows of tokens, rows from token to token, and where it begins in numbers.

    Both are (b h, n); of packed sequences rows are (n, h), as tokens came, and numbers (h, n), side by side.
    """
    number = flat * tokens
    place = number
    step = 1
    if boundaries is not None:
        head = flat % heads
        number = head * tokens + begin
        place = begin * heads + head
        step = heads
    return place, step, number


@triton.jit
def load_key_bias(key_bias, start, row, rows):
    """Bias of keys from start on, units of log 2, -inf outside: where it is -inf, nothing of the key is to be read."""
    if key_bias is None:
        bias = tl.where(row < rows, 0.0, float("-inf"))
    else:
        bias = load_vector(key_bias + start, row, rows, float("-inf")) * LOG2_E
    return bias


@triton.jit
def key_log_weight(k, bias, key_quadratic, D: tl.constexpr, D_PADDED: tl.constexpr):
    """What every landmark adds to a key's logit, in units of log 2: bias + sum_c C_c k_c^2."""
    if key_quadratic is not None:
        bias += quadratic_weight(k, load_quadratic(key_quadratic, D, D_PADDED))
    return bias


@triton.jit
def load_quadratic(key_quadratic, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Coefficients C of squared keys."""
    column = tl.arange(0, D_PADDED)
    return tl.load(key_quadratic + column, mask=column < D, other=0.0)


@triton.jit
def quadratic_weight(k, quadratic):
    """sum_c C_c k_c^2 in units of log 2."""
    wide = k.to(tl.float32)
    return tl.sum(wide * wide * quadratic[None, :], 1) * LOG2_E


@triton.jit
def absorb_keys(w, k, v, weight, top, mass, mean, PRECISION: tl.constexpr):
    """One more tile of keys into the running softmax of landmarks."""
    logits = tl.dot(w, tl.trans(k), input_precision=PRECISION) * LOG2_E + weight[None, :]
    higher = tl.maximum(top, tl.max(logits, 1))
    # A landmark that has seen no key yet: -inf - -inf would be NaN.
    reference = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(logits - reference[:, None])
    shrink = tl.exp2(top - reference)
    mass = mass * shrink + tl.sum(p, 1)
    mean = tl.dot(p.to(v.dtype), v, mean * shrink[:, None], input_precision=PRECISION)
    return higher, mass, mean


@triton.jit
def attend_landmarks(q, landmarks, PRECISION: tl.constexpr):
    """Queries over a first block of landmarks (rows, values, log-weights): peak, mass, and sum of values."""
    logits = tl.dot(q, tl.trans(landmarks[0]), input_precision=PRECISION) * LOG2_E + landmarks[2][None, :]
    top = tl.max(logits, 1)
    p = tl.exp2(logits - top[:, None])
    mass = tl.sum(p, 1)
    return top, mass, tl.dot(p.to(q.dtype), landmarks[1], input_precision=PRECISION)


@triton.jit
def load_query_landmarks(
    query_landmarks,
    landmark_bias,
    landmark_value,
    log_sum,
    query_landmarks_row,
    landmark,
    M: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    D_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr,
):
    """Landmarks, their values and log-weights (units of log 2), -inf for those that pad the tile."""
    u = load_tile(query_landmarks, landmark, query_landmarks_row, M, D, D_PADDED)
    o = load_tile(landmark_value, landmark, E, M, E, E_PADDED)
    bias = tl.load(landmark_bias + landmark, mask=landmark < M, other=float("-inf")) * LOG2_E
    return u, o, bias + tl.load(log_sum + landmark, mask=landmark < M, other=0.0)


@triton.jit
def load_key_landmarks(
    key_landmarks,
    log_sum,
    grad_landmark_value,
    sum_inner,
    key_landmarks_row,
    landmark,
    M: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    D_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr,
):
    """Landmarks, gradients of their values, log-sum-exps (units of log 2; inf pads, for 0) and sums c."""
    w = load_tile(key_landmarks, landmark, key_landmarks_row, M, D, D_PADDED)
    do = load_tile(grad_landmark_value, landmark, E, M, E, E_PADDED)
    normaliser = tl.load(log_sum + landmark, mask=landmark < M, other=float("inf"))
    return w, do, normaliser, tl.load(sum_inner + landmark, mask=landmark < M, other=0.0)


@triton.jit
def merge_pieces(
    partial_value,  # (pieces, m padded, e)
    partial_peak,  # (pieces, m padded)
    partial_total,
    pieces,
    m_padded,
    landmark,
    M: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
):
    """Values of landmarks and log-sum-exps (units of log 2), from pieces of the sequence taken in their order."""
    inside = landmark < M
    top = tl.full(landmark.shape, float("-inf"), tl.float32)
    for piece in range(pieces):
        top = tl.maximum(top, tl.load(partial_peak + piece * m_padded + landmark, mask=inside, other=float("-inf")))
    # Without any key: value 0 and a finite log-sum-exp, so that queries find no NaN.
    top = tl.where(top == float("-inf"), 0.0, top)
    mass = tl.zeros(landmark.shape, tl.float32)
    mean = tl.zeros((landmark.shape[0], E_PADDED), tl.float32)
    for piece in range(pieces):
        place = piece * m_padded
        scale = tl.exp2(tl.load(partial_peak + place + landmark, mask=inside, other=float("-inf")) - top)
        mass += scale * tl.load(partial_total + place + landmark, mask=inside, other=0.0)
        mean += scale[:, None] * load_tile(partial_value + place * E, landmark, E, M, E, E_PADDED)
    empty = mass == 0.0
    divisor = tl.where(empty, 1.0, mass)
    return mean / divisor[:, None], tl.where(empty, 0.0, top + tl.log2(divisor))
