# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Causal forward by stretches of many tiles: a program goes through one with its landmarks and its state on chip.

With R the log-sum-exp of the keys **before** the stretch, features :math:`f_{in} = e^{\ell^k_{in} - R_i}` of keys,
:math:`p_{ti} = e^{\ell^q_{ti} + R_i - c}` of queries, c the highest bias of a landmark plus R, and sums
:math:`S_i, Z_i` over all keys before a tile relative to R:

.. math::
    y_t = \frac{\sum_i p_{ti} S_i + \sum_{n \le t} \sum_i p_{ti} f_{in} v_n}
               {\sum_i p_{ti} Z_i + \sum_{n \le t} \sum_i p_{ti} f_{in}}, \quad
    S_i \leftarrow S_i + \sum_n f_{in} v_n, \quad Z_i \leftarrow Z_i + \sum_n f_{in}.

R and c stay as they are through a stretch, so nothing is rescaled and no maximum is taken. R moves most among the first
keys of all: the first stretches are short. Floating point leaves room to both sides; ``causal_careful`` computes again
what went beyond it.

Landmarks that do not fit on chip together are taken block by block, a launch each: with references for all keys and for
all queries, what blocks leave is added up, and outputs so far are the mean over the landmarks so far.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectraformer.ops.triton.causal_tiles import SIZES, finite, log_sum_exp, positive
from spectraformer.ops.triton.tiles import (
    LOG2_E,
    NARROW,
    exponent_parts,
    key_log_weight,
    load_key_bias,
    load_keys,
    load_quadratic,
    load_tile,
    load_vector,
    piece_bounds,
    quadratic_weight,
    store_tile,
    store_vector,
)

# Sums of weights of a query below or above which, and sums of features above which, a tile is computed again. Weights
# lose what is below 2^-126: m 2^(64 - 126) is below 2^-14 of the smallest sum of weights. Sums of values stay finite up
# to values of 2^27.
LEAST_MASS = tl.constexpr(2.0**-40)
MOST_MASS = tl.constexpr(2.0**100)
MOST_TOTAL = tl.constexpr(2.0**64)
# Sums over some blocks of landmarks below this are nothing beside those that count.
LEAST_KEPT = tl.constexpr(2.0**-100)


@triton.jit
def locate_stretch(program, programs, stretches, groups, span, middle, n, EARLY: tl.constexpr):
    """Of a program: its stretch with first token and end, its query head, its key head, and which of its query heads.

    The last stretches, the longest, first.
    """
    query_heads = programs // stretches
    stretch = stretches - 1 - program // query_heads
    flat_query = tl.cast(program % query_heads, tl.int64)
    flat, group = flat_query // groups, flat_query % groups
    begin, end = piece_bounds(stretch, span, middle, n, EARLY)
    return stretch, begin, end, flat_query, flat, group


@triton.jit
def merge_stretches(
    partial_value,  # (stretches, m padded, e) float32: sums over the keys of a stretch, relative to its peak
    partial_peak,  # (stretches, m padded) float32, units of log 2
    partial_total,  # (stretches, m padded) float32
    log_scale,  # (m,) float32, or None before the first key
    sums,  # (m, e + 1)
    sums_row, stretches, m_padded, landmark, M: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr,
):  # fmt: skip
    """Mean of values and log-sum-exp (units of log 2, -inf before the first key) of a state and some stretches."""
    inside = landmark < M
    top = tl.full(landmark.shape, float("-inf"), tl.float32)
    if log_scale is not None:
        top = tl.load(log_scale + landmark, mask=inside, other=float("-inf")) * LOG2_E
    given = top
    for stretch in range(stretches):
        top = tl.maximum(top, tl.load(partial_peak + stretch * m_padded + landmark, mask=inside, other=float("-inf")))
    total = tl.zeros(landmark.shape, tl.float32)
    mean = tl.zeros((landmark.shape[0], E_PADDED), tl.float32)
    if log_scale is not None:
        scale = tl.exp2(given - finite(top))
        total += scale * tl.load(sums + landmark * sums_row + E, mask=inside, other=0.0)
        mean += scale[:, None] * load_tile(sums, landmark, sums_row, M, E, E_PADDED)
    for stretch in range(stretches):
        place = stretch * m_padded
        scale = tl.exp2(tl.load(partial_peak + place + landmark, mask=inside, other=float("-inf")) - finite(top))
        total += scale * tl.load(partial_total + place + landmark, mask=inside, other=0.0)
        mean += scale[:, None] * load_tile(partial_value + place * E, landmark, E, M, E, E_PADDED)
    return mean * (1.0 / positive(total))[:, None], log_sum_exp(top, total)


@triton.jit
def load_tokens(
    query, key, value, key_bias, query_row, key_row, value_row, start, n,
    D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr, TOKENS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """A tile of queries, keys and values, and the bias of the keys in units of log 2, -inf where there is none."""
    rows = n - start
    if EVEN:
        rows = None
    row, offset = tl.arange(0, TOKENS), tl.cast(start, tl.int64)
    q = load_tile(query + offset * query_row, row, query_row, rows, D, D_PADDED)
    k, v, bias = load_keys(
        key, value, key_bias, None, start, rows, key_row, value_row, D, E, D_PADDED, E_PADDED, TOKENS
    )
    return q, k, v, bias


@triton.jit
def first_logit(logits, bias):
    """Of a tile of keys, landmarks along the rows: the logit of the first that is there; 0 if none is."""
    row = tl.arange(0, bias.shape[0])
    earliest = tl.min(tl.where(bias != float("-inf"), row, bias.shape[0]), 0)
    return tl.sum(tl.where(row[None, :] == earliest, logits, 0.0), 1)


@triton.jit
def store_state(
    state, reference, log_scale_after, sums_after, total, inside, landmark,
    M: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr,
):  # fmt: skip
    """Sums of values and of features of one head, and what they are relative to."""
    tl.store(log_scale_after + landmark, reference, mask=inside)
    tl.store(sums_after + landmark * (E + 1) + E, total, mask=inside)
    store_tile(sums_after, landmark, E + 1, M, state, E, E_PADDED)


@triton.jit(do_not_specialize=SIZES)
def stretch_kernel(
    query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic,
    partial_value,  # (b h, stretches - 1, m padded, e) float32: see merge_stretches
    partial_peak,  # (b h, stretches - 1, m padded)
    partial_total,  # (b h, stretches - 1, m padded)
    log_scale,  # (b, h, m), or None before the first key
    sums,  # (b, h, m, e + 1)
    out,  # (b h g, n, e)
    query_mass,  # (b h g, n) float32: sums of weights, relative to c; of earlier blocks of landmarks before
    highest,  # (b h g, stretches) float32: c in units of log 2, likewise
    peak_total,  # (b h g, stretches, blocks) float32: the largest sum of features
    in_range,  # (b h g, stretches) int32: whether all sums of weights were
    query_log_sum,  # (b h g, n) float32, units of log 2; this and what follows None unless needed backward
    entering_mean,  # (b h, stretches, m, e) float32
    log_sum,  # (b h, stretches + 1, m) float32, units of log 2: before each stretch and, by causal_careful, after all
    first,  # (b h, stretches, m) float32, units of log 2: what features are relative to
    log_scale_after,  # (b h, m) float32, units of log 2 until causal_careful has seen it
    sums_after,  # (b h, m, e + 1) float32
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    query_landmarks_batch, query_landmarks_head, query_landmarks_row, key_landmarks_batch, key_landmarks_head,
    key_landmarks_row, landmark_bias_batch, landmark_bias_head, key_bias_batch, key_bias_head, key_quadratic_batch,
    key_quadratic_head, log_scale_batch, log_scale_head, sums_batch, sums_head, sums_row, heads, groups, n, span,
    middle, stretches, m_padded,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, LANDMARKS: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, PRODUCT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A block of landmarks, a stretch of a query head, tile after tile."""
    stretch, begin, end, flat_query, flat, group = locate_stretch(
        tl.program_id(0), tl.num_programs(0), stretches, groups, span, middle, n, EARLY
    )
    batch, head = flat // heads, flat % heads
    query += batch * query_batch + (head * groups + group) * query_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    key_landmarks += batch * key_landmarks_batch + head * key_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head
    if log_scale is not None:
        log_scale += batch * log_scale_batch + head * log_scale_head
        sums += batch * sums_batch + head * sums_head
    out += flat_query * n * E
    query_mass += flat_query * n
    if query_log_sum is not None:
        query_log_sum += flat_query * n

    row, landmark = tl.arange(0, TOKENS), BLOCK * LANDMARKS + tl.arange(0, LANDMARKS)
    inside = landmark < M
    u = load_tile(query_landmarks, landmark, query_landmarks_row, M, D, D_PADDED).to(query.dtype.element_ty)
    w = load_tile(key_landmarks, landmark, key_landmarks_row, M, D, D_PADDED).to(key.dtype.element_ty)
    place = flat * (stretches - 1) * m_padded
    state, reference = merge_stretches(
        partial_value + place * E, partial_peak + place, partial_total + place, log_scale, sums, sums_row, stretch,
        m_padded, landmark, M, E, E_PADDED,
    )  # fmt: skip
    if query_log_sum is not None:  # noqa: SIM102 - known when compiled
        if group == 0:
            tl.store(log_sum + (flat * (stretches + 1) + stretch) * M + landmark, reference, mask=inside)
            store_tile(entering_mean + (flat * stretches + stretch) * M * E, landmark, E, M, state, E, E_PADDED)
    # Landmarks that pad have features of 0.
    reference = tl.where(inside, reference, float("inf"))
    total = tl.where(inside & (reference != float("-inf")), 1.0, 0.0)
    if tl.min(reference, 0) == float("-inf"):
        # Before the first key: its logit.
        at = begin
        if key_bias is not None:
            absent = tl.max(load_key_bias(key_bias, at, row, n - at), 0) == float("-inf")
            while absent:
                at += TOKENS
                absent = at < end
                if absent:
                    absent = tl.max(load_key_bias(key_bias, at, row, n - at), 0) == float("-inf")
            at = tl.where(at < end, at, begin)
        _q, k, _v, bias = load_tokens(
            query, key, value, key_bias, query_row, key_row, value_row, at, n, D, E, D_PADDED, E_PADDED, TOKENS, EVEN
        )
        weight = key_log_weight(k, bias, key_quadratic, D, D_PADDED)
        logits = tl.dot(w, tl.trans(k), input_precision=PRECISION) * LOG2_E + weight[None, :]
        reference = tl.where(reference == float("-inf"), first_logit(logits, bias), reference)
    if query_log_sum is not None:  # noqa: SIM102 - known when compiled
        if group == 0:
            tl.store(first + (flat * stretches + stretch) * M + landmark, reference, mask=inside)
    own = tl.where(
        inside, tl.load(landmark_bias + landmark, mask=inside, other=0.0) * LOG2_E + reference, float("-inf")
    )
    top = tl.max(own, 0)
    highest += flat_query * stretches + stretch
    faded = 0.0
    if BLOCK > 0:
        earlier_top = tl.load(highest)
        top = tl.maximum(top, earlier_top)
        faded = tl.exp2(earlier_top - top)
        tl.debug_barrier()  # others of the program read it
    tl.store(highest, top)
    # As a vector along columns it would take many registers, in a product it takes none.
    parts = exponent_parts(own - top, PRODUCT)
    if key_quadratic is not None:
        quadratic = load_quadratic(key_quadratic, D, D_PADDED)
    ones = tl.full((TOKENS, NARROW), 1.0, PRODUCT)
    least, most = tl.full((TOKENS,), 1.0, tl.float32), tl.full((TOKENS,), 1.0, tl.float32)
    for start in tl.range(begin, end, TOKENS, num_stages=STAGES):
        q, k, v, bias = load_tokens(
            query, key, value, key_bias, query_row, key_row, value_row, start, n, D, E, D_PADDED, E_PADDED, TOKENS, EVEN
        )
        place_out = out + tl.cast(start, tl.int64) * E
        rows = n - start
        if EVEN:
            rows = None
        weight = bias
        if key_quadratic is not None:
            weight += quadratic_weight(k, quadratic)
        v = v.to(PRODUCT)
        logits = tl.dot(w, tl.trans(k), input_precision=PRECISION)
        features = tl.exp2(logits * LOG2_E + weight[None, :] - reference[:, None])
        gained = tl.sum(features, 1)
        features = features.to(PRODUCT)
        entering = state.to(PRODUCT)
        # The state first: what comes after it needs the registers of the features.
        state = tl.dot(features, v, state, input_precision=PRECISION)
        logits = tl.dot(ones, tl.trans(parts), input_precision=PRECISION)
        logits = tl.dot(q, tl.trans(u), logits, input_precision=PRECISION)
        p = tl.exp2(logits * LOG2_E)
        mass = tl.sum(p * total[None, :], 1)
        total += gained
        p = p.to(PRODUCT)
        scores = tl.dot(p, features, input_precision=PRECISION)
        result = tl.dot(p, entering, input_precision=PRECISION)
        scores = tl.where(row[:, None] >= row[None, :], scores, 0.0)
        mass += tl.sum(scores, 1)
        result = tl.dot(scores.to(PRODUCT), v, result, input_precision=PRECISION)
        if BLOCK > 0:
            # Not at the top: there would be no room in shared memory to bring it to the layout of the sums.
            earlier = load_tile(place_out, row, E, rows, E, E_PADDED)
            earlier_mass = load_vector(query_mass + start, row, rows, 0.0) * faded
            result += earlier.to(tl.float32) * earlier_mass[:, None]
            mass += earlier_mass
        if BLOCK < BLOCKS - 1:
            # Outputs so far must be finite; of sums out of range no more is left than that they are.
            mass = tl.where(mass < MOST_MASS, tl.where(mass > LEAST_KEPT, mass, 0.0), float("inf"))
        else:
            # A NaN stays, and is not in the range.
            least = tl.minimum(least, mass, propagate_nan=tl.PropagateNan.ALL)
            most = tl.maximum(most, mass)
        # A query without any key: 0.
        store_tile(place_out, row, E, rows, result * (1.0 / positive(mass))[:, None], E, E_PADDED)
        store_vector(query_mass + start, row, rows, mass)
        if query_log_sum is not None:  # noqa: SIM102 - known when compiled
            if BLOCK == BLOCKS - 1:
                store_vector(query_log_sum + start, row, rows, log_sum_exp(top, mass))
    tl.store(peak_total + (flat_query * stretches + stretch) * BLOCKS + BLOCK, tl.max(total, 0))
    if BLOCK == BLOCKS - 1:
        # Compared before they are reduced: a reduction forgets a NaN.
        within = ((least > LEAST_MASS) & (most < MOST_MASS)).to(tl.int32)
        tl.store(in_range + flat_query * stretches + stretch, tl.min(within, 0))
    if (stretch == stretches - 1) & (group == 0):
        # As it is: causal_careful brings it to its log-sum-exp.
        store_state(
            state, reference, log_scale_after + flat * M, sums_after + flat * M * (E + 1), total, inside, landmark,
            M, E, E_PADDED,
        )  # fmt: skip
