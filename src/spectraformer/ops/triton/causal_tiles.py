# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Parts of the causal kernels: chunks of keys, states in and out, and a chunk token by token.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

import triton
import triton.language as tl

from spectraformer.ops.triton.tiles import LOG2_E, key_log_weight, load_key_bias, load_rows, load_tile, store_tile

# Sizes that must not compile a kernel anew when they change.
SIZES = ("heads", "groups", "n", "segments", "parts", "pieces")
LN_2 = tl.constexpr(0.6931471805599453)
# In units of log 2. Features of queries lose what is below 2^-126, so a sum of m c terms, itself at least 1, loses at
# most m c 2^(90 - 126) < 2^-21; and sums of values stay finite up to values of 2^20.
SUDDEN = tl.constexpr(90.0)


@triton.jit
def finite(x):
    """A reference that can be subtracted from -inf."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def positive(x):
    """A total that can be divided by."""
    return tl.where(x == 0.0, 1.0, x)


@triton.jit
def log2(x):
    """Of normal positive numbers, to 2 ulp of the greater of the result and 1; the library's takes ten times as long.

    With x = 2^i y, 1/sqrt(2) <= y < sqrt(2) and z = (y - 1) / (y + 1): log2 y = 2 / ln 2 (z + z^3/3 + z^5/5 + ...).
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    y = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    z = (y - 1.0) / (y + 1.0)
    square = z * z
    series = 0.41219859 + square * (0.32059890 + square * 0.26230819)
    return exponent.to(tl.float32) + z * (2.88539008 + square * (0.96179669 + square * (0.57707802 + square * series)))


@triton.jit
def load_chunk(
    key, value, key_bias, key_quadratic, start, key_row, value_row, row, rows, w,
    D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys, values, logits (landmarks x tokens, units of log 2; -inf outside and where removed) of a chunk."""
    bias = key_bias
    if key_bias is not None:
        bias = key_bias + start
    weight = load_key_bias(bias, row, rows)
    # Not "> -inf": a NaN must show.
    present = weight != float("-inf")
    offset = tl.cast(start, tl.int64)
    k = load_rows(key + offset * key_row, row, key_row, present, D, D_PADDED)
    v = load_rows(value + offset * value_row, row, value_row, present, E, E_PADDED)
    weight = key_log_weight(k, weight, key_quadratic, D, D_PADDED)
    return k, v, tl.dot(w, tl.trans(k), input_precision=PRECISION) * LOG2_E + weight[None, :]


@triton.jit
def load_state(value, total, peak, place, landmark, M: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr):
    """A state of M landmarks (sums, totals, peaks in units of log 2); nothing outside."""
    s = load_tile(value + place * M * E, landmark, E, M, E, E_PADDED)
    z = tl.load(total + place * M + landmark, mask=landmark < M, other=0.0)
    return s, z, tl.load(peak + place * M + landmark, mask=landmark < M, other=float("-inf"))


@triton.jit
def store_state(
    value, total, peak, place, landmark, s, z, top, M: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr
):
    """The inverse of load_state."""
    store_tile(value + place * M * E, landmark, E, M, s, E, E_PADDED)
    tl.store(total + place * M + landmark, z, mask=landmark < M)
    tl.store(peak + place * M + landmark, top, mask=landmark < M)


@triton.jit
def load_normaliser(query_log_sum, row, rows):
    """Log-sums of queries; inf, for weights of 0, outside and for queries without any key."""
    normaliser = tl.load(query_log_sum + row, mask=row < rows, other=float("inf"))
    return tl.where(normaliser == float("-inf"), float("inf"), normaliser)


@triton.jit
def load_token(
    key, value, key_bias, key_quadratic, token,
    D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
):  # fmt: skip
    """One key, its value, and what every landmark adds to its logit; key and value point at the token."""
    column, column_e = tl.arange(0, D_PADDED), tl.arange(0, E_PADDED)
    weight = tl.full((), 0.0, tl.float32)
    if key_bias is not None:
        weight = tl.load(key_bias + token) * LOG2_E
    # Nothing is read of a key that is removed.
    visible = tl.where(weight == float("-inf"), 0, 1)
    k = tl.load(key + column, mask=column < visible * D, other=0.0).to(tl.float32)
    v = tl.load(value + column_e, mask=column_e < visible * E, other=0.0).to(tl.float32)
    if key_quadratic is not None:
        quadratic = tl.load(key_quadratic + column, mask=column < D, other=0.0)
        weight += tl.sum(k * k * quadratic, 0) * LOG2_E
    return k, v, weight


@triton.jit
def absorb_token(
    key, value, key_bias, key_quadratic, token, w, mean, total, top,
    D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
):  # fmt: skip
    """The state after one more key: the definition that chunks are a faster form of."""
    k, v, weight = load_token(key, value, key_bias, key_quadratic, token, D, E, D_PADDED, E_PADDED)
    logits = tl.sum(w * k[None, :], 1) * LOG2_E + weight
    higher = tl.maximum(top, logits)
    feature = tl.exp2(logits - finite(higher))
    held = total * tl.exp2(top - finite(higher))
    share = 1.0 / positive(held + feature)
    mean = mean * (held * share)[:, None] + (feature * share)[:, None] * v[None, :]
    return mean, held + feature, higher
