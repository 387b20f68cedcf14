# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Parts of kernels: tiles of rows in and out, and what landmarks and keys bring to a tile.

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, m landmarks, d head dim, e value dim.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Sizes that must not compile a kernel anew when they change.
SIZES = ("heads", "groups", "n", "s", "pieces", "key_pieces", "m_padded", "m_padded_forward")


@triton.jit
def load_tile(pointer, row, stride, rows, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a matrix with unit column stride, 0 outside; pointer is at row 0 of the tile."""
    return load_rows(pointer, row, stride, row < rows, COLUMNS, PADDED)


@triton.jit
def load_rows(pointer, row, stride, wanted, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """As load_tile, 0 in rows that are not wanted, whatever they hold."""
    column = tl.arange(0, PADDED)
    inside = wanted[:, None]
    if COLUMNS != PADDED:
        inside = inside & (column < COLUMNS)[None, :]
    return tl.load(pointer + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(pointer, row, stride, rows, x, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """The inverse of load_tile."""
    column = tl.arange(0, PADDED)
    inside = (row < rows)[:, None]
    if COLUMNS != PADDED:
        inside = inside & (column < COLUMNS)[None, :]
    tl.store(pointer + row[:, None] * stride + column[None, :], x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_key_bias(key_bias, row, rows):
    """Bias of keys in units of log 2, -inf outside: where it is -inf, nothing of the key is to be read."""
    bias = tl.where(row < rows, 0.0, float("-inf"))
    if key_bias is not None:
        bias = tl.load(key_bias + row, mask=row < rows, other=float("-inf")) * LOG2_E
    return bias


@triton.jit
def key_log_weight(k, bias, key_quadratic, D: tl.constexpr, D_PADDED: tl.constexpr):
    """What every landmark adds to a key's logit, in units of log 2: bias + sum_c C_c k_c^2."""
    if key_quadratic is not None:
        column = tl.arange(0, D_PADDED)
        quadratic = tl.load(key_quadratic + column, mask=column < D, other=0.0)
        wide = k.to(tl.float32)
        bias += tl.sum(wide * wide * quadratic[None, :], 1) * LOG2_E
    return bias


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
    shift,
    key_landmarks_row,
    landmark,
    M: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    D_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr,
):
    """Landmarks, gradients of their values, log-sum-exps (units of log 2; inf pads, for 0) and constants."""
    w = load_tile(key_landmarks, landmark, key_landmarks_row, M, D, D_PADDED)
    do = load_tile(grad_landmark_value, landmark, E, M, E, E_PADDED)
    normaliser = tl.load(log_sum + landmark, mask=landmark < M, other=float("inf"))
    return w, do, normaliser, tl.load(shift + landmark, mask=landmark < M, other=0.0)


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
