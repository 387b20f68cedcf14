# mypy: disable-error-code="import-untyped,import-not-found"
"""The kernels of the causal backward by stretches with their arguments, in order.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectraformer.ops.triton.causal_backward import Gradients, Wanted, of_landmarks
from spectraformer.ops.triton.causal_careful_backward import careful_key_backward_kernel, careful_query_backward_kernel
from spectraformer.ops.triton.causal_configurations import STRETCH_PASSES, choose_stretches_backward
from spectraformer.ops.triton.causal_plan import STEEP_WARPS, ByStretches, launch_of, state_dtype, stretch_constants
from spectraformer.ops.triton.causal_stretch_backward import stretch_query_backward_kernel, stretch_sums_kernel
from spectraformer.ops.triton.causal_stretch_key_backward import given_sums_kernel, stretch_key_backward_kernel
from spectraformer.ops.triton.causal_stretch_plan import CAREFUL_TILE
from spectraformer.ops.triton.configurations import Configuration
from spectraformer.ops.triton.launch import Launch, strides

# Landmarks of a program that finds the gradient of given sums, and its warps.
GIVEN_ROWS, GIVEN_WARPS = 16, 4
# What the kernel of keys fills unless it fills gradients of values alone.
OF_KEYS = ("grad_key", "grad_key_bias", "grad_key_quadratic", "grad_key_logits")


def plan_stretches_backward(
    grad: Tensor,
    grad_sums: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_landmarks: Tensor,
    key_landmarks: Tensor,
    landmark_bias: Tensor,
    key_bias: Tensor | None,
    key_quadratic: Tensor | None,
    log_scale: Tensor | None,
    out: Tensor,
    log_scale_after: Tensor,
    query_log_sum: Tensor,
    entering_mean: Tensor,
    log_sum: Tensor,
    first: Tensor,
    peak_total: Tensor,
    *,
    wanted: Wanted,
    precision: str,
    by: ByStretches,
) -> tuple[list[Launch], Gradients]:
    """The kernels of the backward and the tensors they fill.

    Args:
        grad: As in :func:`causal_backward.plan_backward`, as what follows.
        grad_sums: Gradient of the sums after the last key, or None.
        query: Queries.
        key: Keys.
        value: Values.
        query_landmarks: Landmarks that queries see.
        key_landmarks: Landmarks that keys see.
        landmark_bias: Bias of landmarks.
        key_bias: Bias of keys or None.
        key_quadratic: Coefficients of squared keys or None.
        log_scale: What the sums before the first key are relative to, or None.
        out: The forward's output, dense.
        log_scale_after: What the forward's sums after the last key are relative to.
        query_log_sum: The forward's log-sum-exps of queries.
        entering_mean: The forward's means that enter stretches.
        log_sum: The forward's log-sum-exps before and after stretches.
        first: What features of a stretch are relative to.
        peak_total: The largest sums of features in a stretch.
        wanted: Which gradients to compute.
        precision: Of float32 products, as Triton names it.
        by: How stretches were taken.
    """
    b, h, n, d = key.shape
    query_heads, e, m = query.shape[1], value.shape[-1], query_landmarks.shape[-2]
    groups, number = query_heads // h, by.stretches.number
    new, product = query.new_empty, state_dtype(key.dtype)

    def floats(*shape: int, given: bool = True) -> Tensor | None:
        return new(shape, dtype=torch.float32) if given else None

    of_sums, of_queries, of_values, of_keys = (
        choose_stretches_backward(name, by.chosen, key.dtype, max(d, e), m) for name in STRETCH_PASSES
    )
    blocks = -(-m // of_keys.landmarks)
    grad_query, grad_key, grad_value = new(query.shape), new(key.shape), new(value.shape)
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
    arguments: dict[str, Any] = operands | {
        **strides(**operands, grad=grad, log_scale=log_scale),
        "grad": grad,
        "grad_sums_after": grad_sums,
        "log_scale": log_scale,
        "out": out,
        "log_scale_after": log_scale_after,
        "query_log_sum": query_log_sum,
        "entering_mean": entering_mean,
        "log_sum": log_sum,
        "first": first,
        "peak_total": peak_total,
        "delta": floats(b * query_heads, n),
        "left_value": floats(b * query_heads, number, m, e),
        "left_delta": floats(b * query_heads, number, m),
        "careful_mean": floats(b * query_heads, number, m, e),
        "careful_log_sum": floats(b * query_heads, number, m),
        "careful_value": floats(b * h, number, m, e),
        "careful_delta": floats(b * h, number, m),
        "careful_top": floats(b * h, number, m),
        "grad_query": grad_query,
        "grad_key": grad_key,
        "grad_value": grad_value,
        "grad_query_logits": new((b * query_heads, n, m), dtype=product) if wanted.query_landmarks else None,
        "grad_key_logits": new((b * h, n, m), dtype=product) if wanted.key_landmarks else None,
        "grad_landmark_bias": floats(b, h, groups * number, m, given=wanted.landmark_bias),
        "grad_key_bias": floats(b, h, 1, n, given=wanted.key_bias),
        "grad_key_quadratic": floats(b, h, number * blocks, d, given=wanted.key_quadratic),
        "grad_sums": floats(b, h, m, e + 1, given=wanted.sums),
        "heads": h,
        "groups": groups,
        "n": n,
        "span": by.stretches.span,
        "middle": by.stretches.middle,
        "stretches": number,
    }
    fixed = stretch_constants(by, m, d, e, precision, key.dtype)
    tile = min(by.chosen.tokens, CAREFUL_TILE)
    careful = fixed | {"BLOCKS": peak_total.shape[-1], "KEY_BLOCKS": blocks, "TOKENS": tile}
    of_query_heads, of_key_heads = b * query_heads * number, b * h * number

    def of_pass(chosen: Configuration, block: int = 0) -> dict[str, Any]:
        return fixed | {
            "ONE_GROUP": groups == 1,
            "BLOCK": block,
            "BLOCKS": -(-m // chosen.landmarks),
            "LANDMARKS": chosen.landmarks,
            "TOKENS": chosen.tokens,
            "STAGES": chosen.stages,
            "EVEN": key_bias is None and n % chosen.tokens == 0,
        }

    constants = of_pass(of_sums)
    programs = of_query_heads * constants["BLOCKS"]
    launches = [launch_of(stretch_sums_kernel, programs, arguments, constants, of_sums.warps, of_sums.registers)]
    for kernel, programs, chosen, given in (
        (stretch_query_backward_kernel, of_query_heads, of_queries, arguments),
        (stretch_key_backward_kernel, of_key_heads, of_values, arguments | dict.fromkeys(OF_KEYS)),
        (stretch_key_backward_kernel, of_key_heads, of_keys, arguments | {"grad_value": None}),
    ):
        # Every block of landmarks adds to what those before left.
        for block in range(-(-m // chosen.landmarks)):
            launches.append(launch_of(kernel, programs, given, of_pass(chosen, block), chosen.warps, chosen.registers))
    launches += [
        launch_of(careful_query_backward_kernel, of_query_heads, arguments, careful, STEEP_WARPS),
        launch_of(careful_key_backward_kernel, of_key_heads, arguments, careful, STEEP_WARPS),
    ]
    if wanted.sums:
        rows = {"ROWS": GIVEN_ROWS, "ROW_BLOCKS": -(-m // GIVEN_ROWS)}
        launches.append(launch_of(given_sums_kernel, b * h * rows["ROW_BLOCKS"], arguments, fixed | rows, GIVEN_WARPS))
    of_query_landmarks = of_landmarks(query, None, arguments["grad_query_logits"], None, h, precision)
    of_key_landmarks = of_landmarks(key, key_bias, arguments["grad_key_logits"], None, h, precision)
    launches += of_query_landmarks[0] + of_key_landmarks[0]
    return launches, Gradients(
        query=grad_query,
        key=grad_key,
        value=grad_value,
        query_landmarks=of_query_landmarks[1],
        key_landmarks=of_key_landmarks[1],
        landmark_bias=arguments["grad_landmark_bias"],
        key_bias=arguments["grad_key_bias"],
        key_quadratic=arguments["grad_key_quadratic"],
        sums=arguments["grad_sums"],
    )
