# mypy: disable-error-code="import-untyped,import-not-found"
"""The kernels of the causal backward with their arguments, in order.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectraformer.ops.triton.causal_configurations import choose, cut
from spectraformer.ops.triton.causal_key_backward import key_sweep_kernel, suffix_kernel
from spectraformer.ops.triton.causal_plan import ROWS, compile_time
from spectraformer.ops.triton.causal_query_backward import query_state_kernel, query_sweep_kernel
from spectraformer.ops.triton.configurations import Configuration
from spectraformer.ops.triton.launch import Launch, padded_dim, strides


class Wanted(NamedTuple):
    """Gradients wanted beyond those of queries, keys and values."""

    query_landmarks: bool
    key_landmarks: bool
    landmark_bias: bool
    key_bias: bool
    key_quadratic: bool
    sums: bool


class Gradients(NamedTuple):
    """What the kernels fill, dense; None where not wanted. Blocks, segments and pieces are still to be added."""

    query: Tensor  # (b, h g, blocks, n, d)
    key: Tensor  # (b, h, blocks, n, d)
    value: Tensor  # (b, h, blocks, n, e)
    query_landmarks: Tensor | None  # (b, h, segments, m, d) float32
    key_landmarks: Tensor | None  # (b, h, segments, m, d) float32
    landmark_bias: Tensor | None  # (b, h, segments, m) float32
    key_bias: Tensor | None  # (b, h, blocks, n) float32
    key_quadratic: Tensor | None  # (b, h, segments blocks, d) float32
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
    out: Tensor,
    log_scale_after: Tensor,
    query_log_sum: Tensor,
    entering_mean: Tensor,
    entering_total: Tensor,
    entering_peak: Tensor,
    *,
    wanted: Wanted,
    precision: str,
    configurations: dict[str, Configuration] | None = None,
) -> tuple[list[Launch], Gradients]:
    """The kernels of the backward and the tensors they fill; operands as the forward had and returned them.

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
        out: The forward's output, dense.
        log_scale_after: The forward's running maximum after the last key.
        query_log_sum: The forward's log-sum-exps of queries.
        entering_mean: The forward's states that enter segments; empty where nothing enters.
        entering_total: Their totals.
        entering_peak: Their peaks.
        wanted: Which gradients to compute.
        precision: Of float32 products, as Triton names it.
        configurations: By name of pass, in place of the table's.
    """
    b, h, n, d = key.shape
    query_heads = query.shape[1]
    groups = query_heads // h
    e, m = value.shape[-1], query_landmarks.shape[-2]
    new = query.new_empty

    def floats(*shape: int) -> Tensor:
        return new(shape, dtype=torch.float32)

    def configuration(name: str) -> Configuration:
        return (configurations or {}).get(name) or choose(name, key.dtype, max(d, e), m)

    # The states that enter were computed for the forward's segments.
    count, span, parts = cut(key, value, m)
    of_queries, of_keys, of_states = (configuration(x) for x in ("sweep_queries", "sweep_keys", "query_states"))
    blocks = -(-m // of_queries.landmarks)
    assert of_queries[:2] == of_keys[:2] and span % of_queries.tokens == 0 == span % (parts * of_states.tokens)
    entering: dict[str, Tensor | None] = {
        "entering_mean": entering_mean if entering_mean.numel() else None,
        "entering_total": entering_total if entering_total.numel() else None,
        "entering_peak": entering_peak if entering_peak.numel() else None,
    }
    reference = floats(b * h, -(-n // of_queries.tokens), m)
    delta, steepest = floats(b * query_heads, n), floats(b * h, count, blocks)
    gradients = Gradients(
        query=new(b, query_heads, blocks, n, d),
        key=new(b, h, blocks, n, d),
        value=new(b, h, blocks, n, e),
        query_landmarks=floats(b, h, count, m, d) if wanted.query_landmarks else None,
        key_landmarks=floats(b, h, count, m, d) if wanted.key_landmarks else None,
        landmark_bias=floats(b, h, count, m) if wanted.landmark_bias else None,
        key_bias=floats(b, h, blocks, n) if wanted.key_bias else None,
        key_quadratic=floats(b, h, count * blocks, d) if wanted.key_quadratic else None,
        sums=floats(b, h, m, e + 1) if wanted.sums else None,
    )
    from_queries = {
        "query": query,
        "grad": grad,
        "query_landmarks": query_landmarks,
        "landmark_bias": landmark_bias,
        "query_log_sum": query_log_sum,
        "delta": delta,
        **strides(query=query, grad=grad, query_landmarks=query_landmarks, landmark_bias=landmark_bias),
        "heads": h,
        "groups": groups,
        "n": n,
        "segments": count,
    }
    shared = from_queries | {
        "key": key,
        "value": value,
        "key_landmarks": key_landmarks,
        "key_bias": key_bias,
        "key_quadratic": key_quadratic,
        "reference": reference,
        "steepest": steepest,
        **strides(key=key, value=value, key_landmarks=key_landmarks, key_bias=key_bias, key_quadratic=key_quadratic),
        "span": span,
    }
    launches = _twice(
        query_sweep_kernel,
        b * h * count * blocks,
        shared
        | entering
        | {
            "out": out,
            "grad_query": gradients.query,
            "grad_query_landmarks": gradients.query_landmarks,
            "grad_landmark_bias": gradients.landmark_bias,
        },
        compile_time(of_queries, m, d, e, precision, key.dtype) | {"ONE_GROUP": groups == 1},
        of_queries.warps,
    )
    part: dict[str, Tensor | None] = {"part_value": None, "part_delta": None}
    if count > 1:
        pieces = (count - 1) * groups * parts
        part = {"part_value": floats(b * h, pieces, m, e), "part_delta": floats(b * h, pieces, m)}
        launches.append(
            Launch(
                query_state_kernel,
                b * query_heads * (count - 1) * parts * -(-m // of_states.landmarks),
                from_queries
                | part
                | {
                    "entering_total": entering["entering_total"],
                    "entering_peak": entering["entering_peak"],
                    "span": span // parts,
                    "parts": parts,
                },
                compile_time(of_states, m, d, e, precision, key.dtype),
                of_states.warps,
            )
        )
    suffix = {
        "suffix_value": floats(b * h, count, m, e),
        "suffix_delta": floats(b * h, count, m),
        "suffix_reference": floats(b * h, count, m),
    }
    launches.append(
        Launch(
            suffix_kernel,
            b * h * -(-m // ROWS),
            {
                "grad_sums": grad_sums,
                "log_scale": log_scale_after,
                "entering_total": entering["entering_total"],
                "entering_peak": entering["entering_peak"],
                **part,
                **suffix,
                "segments": count,
                "parts": groups * parts,
            },
            {"M": m, "E": e, "E_PADDED": padded_dim(e), "ROWS": ROWS},
            4,
        )
    )
    launches += _twice(
        key_sweep_kernel,
        b * h * count * blocks,
        shared
        | suffix
        | {
            "grad_key": gradients.key,
            "grad_value": gradients.value,
            "grad_key_bias": gradients.key_bias,
            "grad_key_landmarks": gradients.key_landmarks,
            "grad_key_quadratic": gradients.key_quadratic,
            "log_scale": log_scale,
            "grad_sums": gradients.sums,
            **strides(log_scale=log_scale),
        },
        compile_time(of_keys, m, d, e, precision, key.dtype) | {"ONE_GROUP": groups == 1},
        of_keys.warps,
    )
    return launches, gradients


def _twice(
    kernel: object, programs: int, arguments: dict[str, object], fixed: dict[str, object], warps: int
) -> list[Launch]:
    """A sweep, and the careful one that does again what the first could not."""
    careful = fixed | {"CAREFUL": True, "STAGES": 1}
    return [Launch(kernel, programs, arguments, x, warps) for x in (fixed | {"CAREFUL": False}, careful)]
