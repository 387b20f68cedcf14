# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The forward of short sequences in one launch: a program a sequence and key head, its landmarks in registers.

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from spectraformer.ops.sequences import Sequences
from spectraformer.ops.triton.configurations import Configuration
from spectraformer.ops.triton.launch import Launch, constants, strides
from spectraformer.ops.triton.tiles import (
    LOG2_E,
    SIZES,
    absorb_keys,
    attend_landmarks,
    load_keys,
    load_tile,
    output_places,
    sequence_bounds,
    store_tile,
)


@triton.jit(do_not_specialize=SIZES)
def short_kernel(
    query,
    key,
    value,
    query_landmarks,
    key_landmarks,
    landmark_bias,
    key_bias,
    key_quadratic,
    query_boundaries,  # (b + 1,): sequences are packed into one batch item; or None
    key_boundaries,
    out,  # (b h g, n, e); packed (n, h g, e)
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    query_landmarks_batch,
    query_landmarks_head,
    query_landmarks_row,
    key_landmarks_batch,
    key_landmarks_head,
    key_landmarks_row,
    landmark_bias_batch,
    landmark_bias_head,
    key_bias_batch,
    key_bias_head,
    key_quadratic_batch,
    key_quadratic_head,
    heads,
    groups,
    n,
    s,
    M: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    D_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr,
    LANDMARKS: tl.constexpr,  # all, padded
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys into landmarks, then their queries of every head that shares them."""
    flat = tl.cast(tl.program_id(0), tl.int64)
    batch, head = flat // heads, flat % heads
    begin, length = sequence_bounds(key_boundaries, batch, s)
    key += batch * key_batch + head * key_head + begin * key_row
    value += batch * value_batch + head * value_head + begin * value_row
    key_landmarks += batch * key_landmarks_batch + head * key_landmarks_head
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head + begin
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head
    element = query.dtype.element_ty

    landmark = tl.arange(0, LANDMARKS)
    w = load_tile(key_landmarks, landmark, key_landmarks_row, M, D, D_PADDED).to(element)
    top = tl.full((LANDMARKS,), float("-inf"), tl.float32)
    mass = tl.zeros((LANDMARKS,), tl.float32)
    mean = tl.zeros((LANDMARKS, E_PADDED), tl.float32)
    row = tl.arange(0, TOKENS)
    for start in tl.range(0, length, TOKENS, num_stages=STAGES):
        k, v, weight = load_keys(
            key, value, key_bias, key_quadratic, start, length - start, key_row, value_row,
            D, E, D_PADDED, E_PADDED, TOKENS,
        )  # fmt: skip
        top, mass, mean = absorb_keys(w, k, v, weight, top, mass, mean, PRECISION)

    # Without any key: value 0 and a finite log-sum-exp, so that queries find no NaN.
    empty = mass == 0.0
    divisor = tl.where(empty, 1.0, mass)
    log_sum = tl.where(empty, 0.0, top + tl.log2(divisor))
    u = load_tile(query_landmarks, landmark, query_landmarks_row, M, D, D_PADDED).to(element)
    log_weight = tl.load(landmark_bias + landmark, mask=landmark < M, other=float("-inf")) * LOG2_E + log_sum
    landmarks = (u, (mean / divisor[:, None]).to(element), log_weight)
    first, count = sequence_bounds(query_boundaries, batch, n)
    for group in range(groups):
        query_flat = flat * groups + group
        place, step, _number = output_places(query_boundaries, first, query_flat, heads * groups, n)
        queries = query + batch * query_batch + (head * groups + group) * query_head + first * query_row
        for start in tl.range(0, count, TOKENS, num_stages=STAGES):
            offset = tl.cast(start, tl.int64)
            q = load_tile(queries + offset * query_row, row, query_row, count - start, D, D_PADDED)
            _peak, share, summed = attend_landmarks(q, landmarks, PRECISION)
            result = summed * (1.0 / share)[:, None]
            store_tile(out + (place + offset * step) * E, row, step * E, count - start, result, E, E_PADDED)


def launch_short(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_landmarks: Tensor,
    key_landmarks: Tensor,
    landmark_bias: Tensor,
    key_bias: Tensor | None,
    key_quadratic: Tensor | None,
    sequences: Sequences | None,
    out: Tensor,
    configuration: Configuration,
    count: int,
    precision: str,
) -> Launch:
    """The one kernel of the forward, operands as those of plan_forward; ``count`` sequences."""
    h, s, d = key.shape[1:]
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "query_landmarks": query_landmarks,
        "key_landmarks": key_landmarks,
        "landmark_bias": landmark_bias,
        "key_bias": key_bias,
        "key_quadratic": key_quadratic,
    }
    found = constants(configuration, query_landmarks.shape[-2], d, value.shape[-1], precision)
    assert found.pop("BLOCKS") == 1
    return Launch(
        short_kernel,
        count * h,
        {
            **tensors,
            "query_boundaries": None if sequences is None else sequences.query,
            "key_boundaries": None if sequences is None else sequences.key,
            "out": out,
            **strides(**tensors),
            "heads": h,
            "groups": query.shape[1] // h,
            "n": query.shape[2],
            "s": s,
        },
        found,
        configuration.warps,
    )
