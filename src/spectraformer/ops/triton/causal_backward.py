# mypy: disable-error-code="import-untyped,import-not-found"
"""The kernels of the causal backward with their arguments, in order.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectraformer.ops.triton.causal_key_backward import chunk_key_backward_kernel
from spectraformer.ops.triton.causal_landmark_backward import landmark_backward_kernel
from spectraformer.ops.triton.causal_plan import (
    SCAN_STAGES,
    SCAN_WARPS,
    STEEP_WARPS,
    Given,
    by_stretches,
    columns_of,
    compile_time,
    configuration,
    cut,
    launch_of,
    of_inputs,
    spread_of,
    state_dtype,
)
from spectraformer.ops.triton.causal_query_backward import chunk_query_backward_kernel
from spectraformer.ops.triton.causal_scan import reverse_scan_kernel
from spectraformer.ops.triton.causal_steep_backward import steep_key_backward_kernel, steep_query_backward_kernel
from spectraformer.ops.triton.configurations import Configuration, split
from spectraformer.ops.triton.launch import Launch, strides

# Up to this head and value dim one kernel finds gradients of keys and of values.
JOINT_DIM = 64


class Wanted(NamedTuple):
    """Gradients wanted beyond those of queries, keys and values."""

    query_landmarks: bool
    key_landmarks: bool
    landmark_bias: bool
    key_bias: bool
    key_quadratic: bool
    sums: bool


class Gradients(NamedTuple):
    """What the kernels fill, dense; None where not wanted. Pieces, dimension 2 but of the first three, add up."""

    query: Tensor  # (b, h g, n, d)
    key: Tensor  # (b, h, n, d)
    value: Tensor  # (b, h, n, e)
    query_landmarks: Tensor | None  # (b, h, g pieces, m, d) float32
    key_landmarks: Tensor | None  # (b, h, pieces, m, d) float32
    landmark_bias: Tensor | None  # (b, h, chunks g tiles, m) float32
    key_bias: Tensor | None  # (b, h, 1, n) float32
    key_quadratic: Tensor | None  # (b, h, chunks tiles, d) float32
    sums: Tensor | None  # (b, h, m, e + 1) float32


def plan_backward(
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
    sums: Tensor | None,
    boundaries: Tensor | None,
    out: Tensor,
    log_scale_after: Tensor,
    query_log_sum: Tensor,
    entering_mean: Tensor,
    log_sum: Tensor,
    first: Tensor,
    steepest: Tensor,
    *,
    wanted: Wanted,
    precision: str,
    configurations: Given = None,
) -> tuple[list[Launch], Gradients]:
    """The kernels of the backward and the tensors they fill; operands as the forward had and returned them.

    Gradients of landmarks take those of logits through memory: n x m elements a head, of 16 bits for such inputs.

    Args:
        grad: Gradient of the output, (b, h g, n, e), in the dtype of the queries, any batch, head and row strides.
        grad_sums: Gradient of the sums after the last key, (b, h, m, e + 1) dense float32, or None for 0.
        query: Queries.
        key: Keys.
        value: Values.
        query_landmarks: Landmarks that queries see.
        key_landmarks: Landmarks that keys see.
        landmark_bias: Bias of landmarks.
        key_bias: Bias of keys or None.
        key_quadratic: Coefficients of squared keys or None.
        log_scale: Running maximum before the first key or None.
        sums: Sums before the first key or None.
        boundaries: Where packed sequences begin and the last ends, or None.
        out: The forward's output, dense.
        log_scale_after: The forward's running maximum after the last key.
        query_log_sum: The forward's log-sum-exps of queries.
        entering_mean: The forward's means that enter chunks.
        log_sum: The forward's log-sum-exps before and after chunks.
        first: The forward's logits of the first key.
        steepest: The forward's steepest rises.
        wanted: Which gradients to compute.
        precision: Of float32 products, as Triton names it.
        configurations: By name of pass, in place of the table's.
    """
    b, h, n, d = key.shape
    query_heads = query.shape[1]
    groups = query_heads // h
    e, m = value.shape[-1], query_landmarks.shape[-2]
    stretches = by_stretches(query, key, value, m, boundaries, configurations)
    if stretches is not None:
        from spectraformer.ops.triton.causal_stretch_backward_plan import plan_stretches_backward

        return plan_stretches_backward(
            grad, grad_sums, query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic,
            log_scale, out, log_scale_after, query_log_sum, entering_mean, log_sum, first, steepest,
            wanted=wanted, precision=precision, by=stretches,
        )  # fmt: skip
    new = query.new_empty
    found = cut(key, value, m, boundaries, configurations)
    chunks, items = found.chunks, b * found.sequences

    def floats(*shape: int, given: bool = True) -> Tensor | None:
        return new(shape, dtype=torch.float32) if given else None

    def products(*shape: int, given: bool = True) -> Tensor | None:
        return new(shape, dtype=state_dtype(key.dtype)) if given else None

    launches, arguments = of_inputs(
        query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic, boundaries, found
    )
    of_queries, of_keys = (
        configuration(x, key, value, m, configurations) for x in ("chunk_queries_backward", "chunk_keys_backward")
    )
    fixed, fixed_keys = (compile_time(x, found, m, d, e, precision, key.dtype) for x in (of_queries, of_keys))
    fixed_keys["ONE_GROUP"] = groups == 1
    # A piece is a tile of queries of one head.
    pieces = groups * fixed["TILES"]
    whole = {"TOKENS": found.chunk}
    grad_query, grad_key, grad_value = new(query.shape), new(key.shape), new(value.shape)
    of_sums = floats(items, h, m, e + 1, given=wanted.sums)
    arguments |= {
        "grad": grad,
        "out": out,
        "query_log_sum": query_log_sum,
        "entering_mean": entering_mean,
        "log_sum": log_sum,
        "first": first,
        "steepest": steepest,
        "log_scale": log_scale,
        **strides(grad=grad, log_scale=log_scale),
        "log_scale_after": log_scale_after,
        "grad_sums_after": grad_sums,
        "delta": floats(b * query_heads, n),
        "grad_mean": products(b * h, chunks, pieces, m, e),
        "grad_delta": floats(b * h, chunks, pieces, m),
        "suffix_value": products(b * h, chunks, m, e),
        "suffix_delta": floats(b * h, chunks, m),
        "grad_query": grad_query,
        "grad_key": grad_key,
        "grad_value": grad_value,
        "grad_query_logits": products(b * query_heads, n, m, given=wanted.query_landmarks),
        "grad_key_logits": products(b * h, n, m, given=wanted.key_landmarks),
        "grad_landmark_bias": floats(b, h, chunks * pieces, m, given=wanted.landmark_bias),
        "grad_key_bias": floats(b, h, 1, n, given=wanted.key_bias),
        "grad_key_quadratic": floats(b, h, chunks * fixed_keys["TILES"], d, given=wanted.key_quadratic),
        "grad_sums": of_sums,
        "spread": spread_of(found),
        "pieces": pieces,
    }
    spread = arguments["spread"]
    scans = items * h * found.row_blocks * found.column_blocks
    # Accumulators of both do not fit into registers beyond head dim 64.
    alone: list[dict[str, Any]] = [{}] if max(d, e) <= JOINT_DIM else [{"grad_value": None}, {"grad_key": None}]
    launches += [
        launch_of(
            chunk_query_backward_kernel,
            b * h * chunks * pieces,
            arguments,
            fixed,
            of_queries.warps,
            of_queries.registers,
        ),
        launch_of(steep_query_backward_kernel, items * query_heads * spread, arguments, fixed | whole, STEEP_WARPS),
        launch_of(reverse_scan_kernel, scans, arguments, fixed | {"STAGES": SCAN_STAGES}, SCAN_WARPS),
        *[
            launch_of(
                chunk_key_backward_kernel,
                b * h * chunks * fixed_keys["TILES"],
                arguments | one,
                fixed_keys,
                of_keys.warps,
                of_keys.registers,
            )
            for one in alone
        ],
        launch_of(steep_key_backward_kernel, items * h * spread, arguments, fixed_keys | whole, STEEP_WARPS),
    ]
    of_query_landmarks = of_landmarks(query, None, arguments["grad_query_logits"], boundaries, h, precision)
    of_key_landmarks = of_landmarks(key, key_bias, arguments["grad_key_logits"], boundaries, h, precision)
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
        sums=of_sums,
    )


def of_landmarks(
    tokens: Tensor,
    key_bias: Tensor | None,
    grad_logits: Tensor | None,
    boundaries: Tensor | None,
    key_heads: int,
    precision: str,
) -> tuple[list[Launch], Tensor | None]:
    """The kernel that sums gradients of logits times tokens over pieces of the sequence, and its sums; or nothing."""
    if grad_logits is None:
        return [], None
    b, heads, n, d = tokens.shape
    m, wide = grad_logits.shape[-1], grad_logits.dtype == torch.float32
    chosen = Configuration(32 if wide else 64, 32 if wide else 64, 4, 1 if wide else 3, programs=528)
    blocks = -(-m // chosen.landmarks)
    pieces, span = split(n, b * heads * blocks, chosen)
    part = tokens.new_empty((b, key_heads, heads // key_heads * pieces, m, d), dtype=torch.float32)
    found = strides(tokens=tokens, key_bias=key_bias)
    arguments = {
        "grad_logits": grad_logits,
        "tokens": tokens,
        "key_bias": key_bias,
        "boundaries": boundaries,
        "sequences": 1 if boundaries is None else len(boundaries) - 1,
        "part": part,
        **{name.removeprefix("tokens_"): x for name, x in found.items()},
        "heads": heads,
        "n": n,
        "span": span,
        "pieces": pieces,
    }
    fixed = {
        "M": m,
        "D": d,
        "D_PADDED": columns_of(d, tokens.dtype),
        "BLOCKS": blocks,
        "LANDMARKS": chosen.landmarks,
        "TOKENS": chosen.tokens,
        "STAGES": chosen.stages,
        "PRECISION": precision,
    }
    return [Launch(landmark_backward_kernel, b * heads * pieces * blocks, arguments, fixed, chosen.warps)], part
