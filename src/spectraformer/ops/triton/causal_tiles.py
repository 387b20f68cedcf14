# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Parts of the causal kernels: keys of a chunk, what features are relative to, logarithms.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

import triton
import triton.language as tl

from spectraformer.ops.triton.tiles import (
    LOG2_E,
    key_log_weight,
    load_key_bias,
    load_rows,
    load_tile,
    load_vector,
    sequence_bounds,
)

# Sizes that must not compile a kernel anew when they change.
SIZES = (
    "heads", "groups", "n", "chunks", "pieces", "span", "middle", "stretches", "m_padded", "spread", "query_heads",
    "key_heads", "of_queries", "sequences",
)  # fmt: skip
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
def log_sum_exp(top, total):
    """Units of log 2; -inf where there is nothing."""
    return tl.where(total == 0.0, float("-inf"), top + log2(positive(total)))


@triton.jit
def sequence_chunks(boundaries, sequence, n, chunks, CHUNK: tl.constexpr):
    """First token, end, first chunk and number of chunks of a packed sequence; without boundaries of all tokens.

    Sequence i has its chunks from its first token / CHUNK + i on. The next begins no earlier than they end.
    """
    begin = 0
    end = n
    first = 0
    count = chunks
    if boundaries is not None:
        at, length = sequence_bounds(boundaries, sequence, n)
        begin = at.to(tl.int32)
        end = begin + length
        first = begin // CHUNK + sequence
        count = tl.cdiv(length, CHUNK)
    return begin, end, first, count


@triton.jit
def locate_sequence(program, boundaries, n, chunks, sequences, CHUNK: tl.constexpr):
    """Of a program for a head and sequence: both, first token, end, number of chunks, and where its chunks begin.

    The last as rows of states, (b h, chunks), and of log-sum-exps, (b h, chunks + sequences).
    """
    flat, sequence = tl.cast(program // sequences, tl.int64), program % sequences
    begin, end, first, count = sequence_chunks(boundaries, sequence, n, chunks, CHUNK)
    place = flat * chunks + first
    return flat, sequence, begin, end, count, place, place + flat * sequences + sequence


@triton.jit
def chunk_tokens(boundaries, chunk_sequence, chunk, n, chunks, sequences, CHUNK: tl.constexpr):
    """First token of a chunk, end of its sequence (the same if it has no tokens), and which sequence that is."""
    start = chunk * CHUNK
    end = n
    sequence = 0
    if boundaries is not None:
        # Chunks of no sequence hold anything here.
        sequence = tl.load(chunk_sequence + chunk)
        sequence = tl.where((sequence >= 0) & (sequence < sequences), sequence, 0)
        begin, end, first, count = sequence_chunks(boundaries, sequence, n, chunks, CHUNK)
        inside = (chunk >= first) & (chunk < first + count)
        start = tl.where(inside, begin + (chunk - first) * CHUNK, end)
    return start, end, sequence


@triton.jit
def store_zeros(pointer, SIZE: tl.constexpr):
    """One row of float32."""
    column = tl.arange(0, triton.next_power_of_2(SIZE))
    tl.store(pointer + column, tl.zeros((triton.next_power_of_2(SIZE),), tl.float32), mask=column < SIZE)


@triton.jit
def load_keys(key, key_bias, key_quadratic, start, key_row, row, rows, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Keys of a chunk, what every landmark adds to their logits (units of log 2), and whether each is there."""
    weight = load_key_bias(key_bias, start, row, rows)
    # Not "> -inf": a NaN must show.
    present = weight != float("-inf")
    k = load_rows(key + tl.cast(start, tl.int64) * key_row, row, key_row, present, D, D_PADDED)
    return k, key_log_weight(k, weight, key_quadratic, D, D_PADDED), present


@triton.jit
def load_reference(log_sum, first, landmark, M: tl.constexpr):
    """What features of a chunk are relative to (units of log 2; inf for landmarks that pad), and 1 where keys entered.

    The log-sum-exp of the keys before the chunk; before the first key its logit, which every query that has any key
    sees.
    """
    inside = landmark < M
    entering = tl.load(log_sum + landmark, mask=inside, other=float("inf"))
    alone = entering == float("-inf")
    reference = tl.where(alone, tl.load(first + landmark, mask=inside, other=0.0), entering)
    return reference, tl.where(alone, 0.0, 1.0)


@triton.jit
def suffix_reference(reference, after):
    """What later queries leave for a chunk is relative to: the chunk's reference, unless the chunk is steep.

    There the log-sum-exp after the chunk is so far above its reference that the product of what is left and of a
    feature, none above that log-sum-exp, is kept from under- and overflow by a lesser distance.
    """
    return tl.maximum(reference, after - 100.0)


@triton.jit
def load_landmark_weight(landmark_bias, reference, landmark, M: tl.constexpr):
    """What a landmark adds to the logits of queries, units of log 2; -inf where it pads."""
    bias = tl.load(landmark_bias + landmark, mask=landmark < M, other=0.0) * LOG2_E
    return tl.where(landmark < M, bias + reference, float("-inf"))


@triton.jit
def load_normaliser(query_log_sum, row, rows):
    """Log-sums of queries; inf, for weights of 0, outside and for queries without any key."""
    normaliser = load_vector(query_log_sum, row, rows, float("inf"))
    return tl.where(normaliser == float("-inf"), float("inf"), normaliser)


@triton.jit
def load_queries(
    query, grad, query_log_sum, delta, row, rows, query_row, grad_row,
    D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """A tile of queries, gradients of their outputs, their log-sum-exps and deltas; pointers are at its first row."""
    q = load_tile(query, row, query_row, rows, D, D_PADDED)
    do = load_tile(grad, row, grad_row, rows, E, E_PADDED).to(PRODUCT)
    return q, do, load_normaliser(query_log_sum, row, rows), load_vector(delta, row, rows, 0.0)


@triton.jit
def load_steepest(steepest, ROW_BLOCKS: tl.constexpr, ROW_BLOCKS_PADDED: tl.constexpr):
    """The steepest rise of a logit above its past in a chunk or a sequence, over the parts of the scan."""
    part = tl.arange(0, ROW_BLOCKS_PADDED)
    return tl.max(tl.load(steepest + part, mask=part < ROW_BLOCKS, other=float("-inf")), 0)
