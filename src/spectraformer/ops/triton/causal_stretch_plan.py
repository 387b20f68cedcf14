"""The kernels of the causal forward by stretches with their arguments, in order.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectraformer.ops.triton.causal_configurations import cut_stretches
from spectraformer.ops.triton.causal_plan import (
    SCAN_STAGES,
    SCAN_WARPS,
    STEEP_WARPS,
    Forward,
    compile_time,
    cut,
    launch_of,
    of_inputs,
    state_dtype,
)
from spectraformer.ops.triton.causal_stretches import steep_stretch_kernel, stretch_output_kernel, stretch_scan_kernel
from spectraformer.ops.triton.configurations import Configuration, choose
from spectraformer.ops.triton.key_forward import key_kernel
from spectraformer.ops.triton.launch import Launch, constants, strides


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
    precision: str,
    chosen: Configuration,
) -> tuple[list[Launch], Forward]:
    """The kernels of a forward without a backward, and the tensors they fill.

    Args:
        query: As in :func:`causal_plan.plan_forward`, as what follows.
        key: Keys.
        value: Values.
        query_landmarks: Landmarks that queries see.
        key_landmarks: Landmarks that keys see.
        landmark_bias: Bias of landmarks.
        key_bias: Bias of keys or None.
        key_quadratic: Coefficients of squared keys or None.
        log_scale: Running maximum of the state before the first token, or None.
        sums: Sums of that state, or None.
        precision: Of float32 products, as Triton names it.
        chosen: Tile of a chunk; its landmarks are all there are, padded.
    """
    b, h, n, d = key.shape
    query_heads, e, m = query.shape[1], value.shape[-1], query_landmarks.shape[-2]
    stretches, span = cut_stretches(n, b * query_heads, chosen)
    found = cut(key, value, m)._replace(chunk=chosen.tokens)

    def floats(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    keys = choose("keys", key.dtype, max(d, e), m)
    of_keys = constants(keys, m, d, e, precision)
    padded = of_keys["BLOCKS"] * keys.landmarks
    launches, arguments = of_inputs(
        query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic, None, found
    )
    out, after_scale, after_sums = query.new_empty(b, query_heads, n, e), floats(b, h, m), floats(b, h, m, e + 1)
    partial_value = floats(b * h, stretches, padded, e)
    partial_peak, partial_total = (floats(b * h, stretches, padded) for _ in range(2))
    arguments |= {
        "partial_value": partial_value,
        "partial_peak": partial_peak,
        "partial_total": partial_total,
        "m_padded": padded,
        "log_scale": log_scale,
        "sums": sums,
        **strides(log_scale=log_scale),
        **({"sums_batch": 0, "sums_head": 0, "sums_row": 0} if sums is None else strides(sums=sums)),
        "stretch_mean": floats(b * h, stretches, m, e),
        "stretch_log_sum": floats(b * h, stretches, m),
        "stretch_steepest": floats(b * h, stretches),
        "log_scale_after": after_scale,
        "sums_after": after_sums,
        "out": out,
        "stretches": stretches,
        "span": span,
        # As the kernel of bidirectional attention names them.
        "s": n,
        "pieces": stretches,
        "landmark_value": partial_value,
        "peak": partial_peak,
        "total": partial_total,
        "key_boundaries": None,
        "key_landmarks_row": d,
    }
    fixed = compile_time(chosen, found, m, d, e, precision, key.dtype)
    whole = fixed | {"EVEN": key_bias is None and n % chosen.tokens == 0, "STAGES": chosen.stages}
    of_keys |= {
        "ONE_PIECE": False,
        "FIXED_REFERENCE": key.dtype == torch.bfloat16,
        "EVEN": n % keys.tokens == 0 and span % keys.tokens == 0,
    }
    launches += [
        launch_of(key_kernel, b * h * stretches * of_keys["BLOCKS"], arguments, of_keys, keys.warps, keys.registers),
        launch_of(
            stretch_scan_kernel,
            b * h * found.row_blocks * found.column_blocks,
            arguments,
            fixed | {"STAGES": SCAN_STAGES},
            SCAN_WARPS,
        ),
        launch_of(stretch_output_kernel, b * query_heads * stretches, arguments, whole, chosen.warps, chosen.registers),
        launch_of(steep_stretch_kernel, b * h * stretches, arguments, fixed, STEEP_WARPS),
    ]
    mean = query.new_empty(0, dtype=state_dtype(key.dtype))
    return launches, Forward(out, after_scale, after_sums, floats(0), mean, floats(0), floats(0), floats(0))
