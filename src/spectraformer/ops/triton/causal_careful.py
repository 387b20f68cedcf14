# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Tiles of stretches whose sums left the range of one reference, computed again, for any finite input.

The state is brought along in memory with a reference of its own for every tile, from the beginning of the stretch; the
outputs of a tile that went beyond the range, and no others, are computed again, landmark by landmark. So the output of
a query keeps its bits whatever comes after its tile. Where no sum left the range, only the state after the last key is
brought to its log-sum-exp.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectraformer.ops.triton.causal_steep import attend_steeply
from spectraformer.ops.triton.causal_stretches import (
    LEAST_MASS,
    MOST_MASS,
    MOST_TOTAL,
    first_logit,
    load_tokens,
    locate_stretch,
    merge_stretches,
    store_state,
)
from spectraformer.ops.triton.causal_tiles import LN_2, SIZES, log_sum_exp, positive
from spectraformer.ops.triton.tiles import LOG2_E, key_log_weight, load_tile, store_tile


@triton.jit
def load_peak(peak_total, BLOCKS: tl.constexpr):
    """The largest sum of features of a stretch over blocks of landmarks, and whether none is above MOST_TOTAL."""
    most = tl.load(peak_total)
    # Not "> MOST_TOTAL": a NaN is out of range.
    good = most <= MOST_TOTAL
    for block in tl.static_range(1, BLOCKS):
        more = tl.load(peak_total + block)
        good = good & (more <= MOST_TOTAL)
        most = tl.maximum(most, more)
    return most, good


@triton.jit
def last_beyond(query_mass, start, end, empty, SIZE: tl.constexpr):
    """The last query from start to end, SIZE at most, whose sum of weights is not in the range; -1 if there is none.

    Where there is no key so far it is to be 0, and may be a NaN all the same.
    """
    row = start + tl.arange(0, SIZE)
    mass = tl.load(query_mass + row, mask=row < end, other=0.0)
    # So that a NaN is not.
    good = tl.where(empty, mass == 0.0, (mass > LEAST_MASS) & (mass < MOST_MASS))
    return tl.max(tl.where(good | (row >= end), -1, row), 0)


@triton.jit
def store_after(
    mean,  # (m, e)
    after,  # (m,), the log-sum-exp in units of log 2
    log_scale_after, sums_after,
    log_sum,  # (stretches + 1, m), or None
    stretches, inside, landmark, M: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr,
):  # fmt: skip
    """The state after the last key, relative to its log-sum-exp (in natural units): sums of weights are 1, or 0."""
    total = tl.where(after == float("-inf"), 0.0, 1.0)
    store_state(mean, after * LN_2, log_scale_after, sums_after, total, inside, landmark, M, E, E_PADDED)
    if log_sum is not None:
        tl.store(log_sum + stretches * M + landmark, after, mask=inside)


@triton.jit
def finish_state(
    log_scale_after, sums_after, log_sum, stretches, inside, landmark,
    M: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr,
):  # fmt: skip
    """What stretch_kernel left after the last key, brought to its log-sum-exp."""
    state = load_tile(sums_after, landmark, E + 1, M, E, E_PADDED)
    total = tl.load(sums_after + landmark * (E + 1) + E, mask=inside, other=0.0)
    reference = tl.load(log_scale_after + landmark, mask=inside, other=0.0)
    tl.debug_barrier()  # others wait for what this overwrites
    after = log_sum_exp(reference, total)
    mean = state * (1.0 / positive(total))[:, None]
    store_after(mean, after, log_scale_after, sums_after, log_sum, stretches, inside, landmark, M, E, E_PADDED)


@triton.jit(do_not_specialize=SIZES)
def careful_stretch_kernel(
    query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic,
    partial_value, partial_peak, partial_total, log_scale, sums,  # as in stretch_kernel, as most of what follows
    query_mass, peak_total, in_range,
    careful_mean,  # (b h g, stretches, m, e) float32: room for a state
    careful_log_sum,  # (b h g, stretches, m) float32, units of log 2
    out, query_log_sum, log_sum, log_scale_after, sums_after,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    query_landmarks_batch, query_landmarks_head, query_landmarks_row, key_landmarks_batch, key_landmarks_head,
    key_landmarks_row, landmark_bias_batch, landmark_bias_head, key_bias_batch, key_bias_head, key_quadratic_batch,
    key_quadratic_head, log_scale_batch, log_scale_head, sums_batch, sums_head, sums_row, heads, groups, n, span,
    middle, stretches, m_padded,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, D_PADDED: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr, ALL: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr, QUERIES: tl.constexpr,
    AT_ONCE: tl.constexpr, PRECISION: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """One stretch of one query head."""
    stretch, begin, end, flat_query, flat, group = locate_stretch(
        tl.program_id(0), tl.num_programs(0), stretches, groups, span, middle, n, EARLY
    )
    batch, head = flat // heads, flat % heads
    query_mass += flat_query * n
    peak_total += (flat_query * stretches + stretch) * BLOCKS
    most, good = load_peak(peak_total, BLOCKS)
    beyond = -1
    checked = tl.load(in_range + flat_query * stretches + stretch)
    empty = most == 0.0
    for start in range(begin, tl.where(empty | (checked == 0), end, begin), AT_ONCE):
        beyond = tl.maximum(beyond, last_beyond(query_mass, start, end, empty, AT_ONCE))
    landmark = tl.arange(0, ALL)
    inside = landmark < M
    final = (stretch == stretches - 1) & (group == 0)
    log_scale_after += flat * M
    sums_after += flat * M * (E + 1)
    if query_log_sum is not None:
        log_sum += flat * (stretches + 1) * M
    if final & good:
        finish_state(log_scale_after, sums_after, log_sum, stretches, inside, landmark, M, E, E_PADDED)
    if good & (beyond < 0):
        return

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
    careful_mean += (flat_query * stretches + stretch) * M * E
    careful_log_sum += (flat_query * stretches + stretch) * M

    w = load_tile(key_landmarks, landmark, key_landmarks_row, M, D, D_PADDED).to(key.dtype.element_ty)
    place = flat * (stretches - 1) * m_padded
    mean, before = merge_stretches(
        partial_value + place * E, partial_peak + place, partial_total + place, log_scale, sums, sums_row, stretch,
        m_padded, landmark, M, E, E_PADDED,
    )  # fmt: skip
    store_tile(careful_mean, landmark, E, M, mean, E, E_PADDED)
    tl.store(careful_log_sum + landmark, before, mask=inside)
    tl.debug_barrier()  # the state is read by others than wrote it, here and below
    # What the stretch is relative to, see stretch_kernel.
    fixed = before
    # No further than there is something to compute again, unless the state is to be, too.
    for start in range(begin, tl.where(good, beyond + 1, end), TOKENS):
        _q, k, v, bias = load_tokens(
            query, key, value, key_bias, query_row, key_row, value_row, start, n, D, E, D_PADDED, E_PADDED, TOKENS,
            False,
        )  # fmt: skip
        weight = key_log_weight(k, bias, key_quadratic, D, D_PADDED)
        logits = tl.dot(w, tl.trans(k), input_precision=PRECISION) * LOG2_E + weight[None, :]
        before = tl.load(careful_log_sum + landmark, mask=inside, other=0.0)
        mean = load_tile(careful_mean, landmark, E, M, E, E_PADDED)
        # Relative to the highest logit there has been.
        if tl.max(bias, 0) != float("-inf"):
            fixed = tl.where(fixed == float("-inf"), first_logit(logits, bias), fixed)
        reference = tl.maximum(before, tl.max(logits, 1))
        reference = tl.where(reference == float("-inf"), 0.0, reference)
        kept = tl.exp2(before - reference)
        features = tl.exp2(logits - reference[:, None])
        total = kept + tl.sum(features, 1)
        after = log_sum_exp(reference, total)
        held = inside & (after != float("-inf"))
        rise = tl.max(tl.where(held, after - fixed, float("-inf")), 0)
        empty_so_far = tl.max(held.to(tl.int32), 0) == 0
        within = (tl.exp2(rise) <= MOST_TOTAL) & (last_beyond(query_mass, start, end, empty_so_far, TOKENS) < 0)
        attend_steeply(
            query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic, careful_mean,
            careful_log_sum, out, query_log_sum, flat_query * n, start, n, within == 0, query_row, key_row, value_row,
            query_landmarks_row, key_landmarks_row,
            M, D, E, D_PADDED, E_PADDED, TOKENS, QUERIES, PRECISION, PRODUCT,
        )  # fmt: skip
        mean = tl.dot(features.to(PRODUCT), v.to(PRODUCT), mean * kept[:, None], input_precision=PRECISION)
        mean *= (1.0 / positive(total))[:, None]
        tl.debug_barrier()
        store_tile(careful_mean, landmark, E, M, mean, E, E_PADDED)
        tl.store(careful_log_sum + landmark, after, mask=inside)
        tl.debug_barrier()
    if final & (good == 0):
        mean = load_tile(careful_mean, landmark, E, M, E, E_PADDED)
        after = tl.load(careful_log_sum + landmark, mask=inside, other=0.0)
        store_after(mean, after, log_scale_after, sums_after, log_sum, stretches, inside, landmark, M, E, E_PADDED)
