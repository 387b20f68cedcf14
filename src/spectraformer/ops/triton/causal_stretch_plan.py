# mypy: disable-error-code="import-untyped,import-not-found"
"""The kernels of the causal forward by stretches with their arguments, in order.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectraformer.ops.triton.causal_careful import careful_stretch_kernel
from spectraformer.ops.triton.causal_plan import (
    STEEP_TILE,
    STEEP_WARPS,
    ByStretches,
    Forward,
    forward_results,
    kept_stretches,
    launch_of,
    stretch_constants,
)
from spectraformer.ops.triton.causal_stretches import stretch_kernel
from spectraformer.ops.triton.configurations import choose
from spectraformer.ops.triton.key_forward import key_kernel
from spectraformer.ops.triton.launch import Launch, constants, state_strides, strides

# Queries whose sums are checked at once; head dim up to which blocks of landmarks after the first have room to copy
# ahead.
CHECKED, NARROW_DIM = 2048, 32
# Tokens of a tile of what is computed again, at most.
CAREFUL_TILE = 64


def plan_stretches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_landmarks: Tensor,
    key_landmarks: Tensor,
    landmark_bias: Tensor,
    key_bias: Tensor | None,
    key_quadratic: Tensor | None,
    log_scale: Tensor | None,
    sums: Tensor | None,
    *,
    needs_backward: bool,
    precision: str,
    by: ByStretches,
) -> tuple[list[Launch], Forward]:
    """The kernels of the forward and the tensors they fill.

    Args:
        query: As in :func:`causal_plan.plan_forward`, as what follows.
        key: Keys.
        value: Values.
        query_landmarks: Landmarks that queries see.
        key_landmarks: Landmarks that keys see.
        landmark_bias: Bias of landmarks.
        key_bias: Bias of keys or None.
        key_quadratic: Coefficients of squared keys or None.
        log_scale: What the sums before the first token are relative to, or None.
        sums: Sums of that state, or None.
        needs_backward: Whether to keep what the backward takes.
        precision: Of float32 products, as Triton names it.
        by: How stretches are taken.
    """
    b, h, n, d = key.shape
    query_heads, e, m = query.shape[1], value.shape[-1], query_landmarks.shape[-2]
    chosen, stretches = by
    count, before_last = stretches.number, stretches.number - 1

    def floats(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    keys = choose("keys", key.dtype, max(d, e), m)
    of_keys = constants(keys, m, d, e, precision)
    padded = of_keys["BLOCKS"] * keys.landmarks
    out, after_scale, after_sums = query.new_empty(b, query_heads, n, e), floats(b, h, m), floats(b, h, m, e + 1)
    partial_value = floats(b * h, before_last, padded, e)
    partial_peak, partial_total = (floats(b * h, before_last, padded) for _ in range(2))
    query_log_sum = floats(b * query_heads, n) if needs_backward else None
    kept = kept_stretches(query, by, b * h, m, e)
    operands = {
        "query": query,
        "key": key,
        "value": value,
        "query_landmarks": query_landmarks,
        "key_landmarks": key_landmarks,
        "landmark_bias": landmark_bias,
        "key_bias": key_bias,
        "key_quadratic": key_quadratic,
    }
    arguments = operands | {
        **strides(**operands),
        "log_scale": log_scale,
        "sums": sums,
        **state_strides(log_scale, sums),
        "partial_value": partial_value,
        "partial_peak": partial_peak,
        "partial_total": partial_total,
        "out": out,
        "query_mass": floats(b * query_heads, n),
        "highest": floats(b * query_heads, count),
        "peak_total": kept["steepest"],
        "in_range": query.new_empty((b * query_heads, count), dtype=torch.int32),
        "careful_mean": floats(b * query_heads, count, m, e),
        "careful_log_sum": floats(b * query_heads, count, m),
        "query_log_sum": query_log_sum,
        **(kept if needs_backward else dict.fromkeys(kept)),
        "log_scale_after": after_scale,
        "sums_after": after_sums,
        "heads": h,
        "groups": query_heads // h,
        "n": n,
        "span": stretches.span,
        "middle": stretches.middle,
        "stretches": count,
        "m_padded": padded,
        # As the kernel of bidirectional attention names them.
        "s": n,
        "pieces": before_last,
        "landmark_value": partial_value,
        "peak": partial_peak,
        "total": partial_total,
        "key_boundaries": None,
    }
    fixed = stretch_constants(by, m, d, e, precision, key.dtype)
    of_stretches = fixed | {
        "BLOCKS": -(-m // chosen.landmarks),
        "LANDMARKS": chosen.landmarks,
        "TOKENS": chosen.tokens,
        "EVEN": key_bias is None and n % chosen.tokens == 0,
    }
    tile = min(chosen.tokens, CAREFUL_TILE)
    # Tiles of queries times keys, and times dims, are in registers as float32.
    queries = max(16, min(tile, STEEP_TILE // (2 * max(tile, fixed["D_PADDED"], fixed["E_PADDED"]))))
    careful = fixed | {"BLOCKS": of_stretches["BLOCKS"], "TOKENS": tile, "QUERIES": queries, "AT_ONCE": CHECKED}
    of_keys |= {
        "EARLY": stretches.early,
        "ONE_PIECE": False,
        "FIXED_REFERENCE": key.dtype == torch.bfloat16,
        "EVEN": n % keys.tokens == 0 and stretches.early % keys.tokens == 0,
    }
    programs = b * query_heads * count
    launches = []
    if before_last:
        blocks = b * h * before_last * of_keys["BLOCKS"]
        launches.append(launch_of(key_kernel, blocks, arguments, of_keys, keys.warps, keys.registers))
    for block in range(of_stretches["BLOCKS"]):
        # Outputs so far would be copied ahead too, and two programs would not fit a multiprocessor.
        stages = chosen.stages if block == 0 or fixed["D_PADDED"] <= NARROW_DIM else 1
        of_block = of_stretches | {"BLOCK": block, "STAGES": stages}
        launches.append(launch_of(stretch_kernel, programs, arguments, of_block, chosen.warps, chosen.registers))
    launches.append(launch_of(careful_stretch_kernel, programs, arguments, careful, STEEP_WARPS))
    return launches, forward_results(out, after_scale, after_sums, query_log_sum, kept)
