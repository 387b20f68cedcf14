# mypy: disable-error-code="import-untyped,import-not-found"
"""The backward: probabilities are recomputed tile by tile, and no sum depends on the order of programs.

Sums over tokens are taken in pieces of the sequence, and pieces are added in their order.

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectraformer.ops.sequences import Sequences, extents
from spectraformer.ops.triton.configurations import Configuration, choose, split
from spectraformer.ops.triton.key_backward import key_gradient_kernel, key_landmark_gradient_kernel
from spectraformer.ops.triton.launch import Launch, constants, padded_dim, product_type, strides
from spectraformer.ops.triton.query_backward import (
    landmark_gradient_kernel,
    landmark_sums_kernel,
    query_gradient_kernel,
)

# Head dim up to which the gradients of keys and values stay in registers side by side.
MOST_TOGETHER = 64


class Wanted(NamedTuple):
    """Gradients wanted beyond those of queries, keys and values."""

    query_landmarks: bool
    key_landmarks: bool
    landmark_bias: bool
    key_bias: bool
    key_quadratic: bool


class Gradients(NamedTuple):
    """What the kernels fill, dense; None where not wanted. Pieces are still to be added, rows beyond m cut."""

    query: Tensor  # (b, h g, n, d); packed (n, h g, d)
    key: Tensor  # (b, h, s, d); packed (s, h, d)
    value: Tensor  # (b, h, s, e); packed (s, h, e)
    query_landmarks: Tensor | None  # (b, h, g pieces, m padded, d) float32
    key_landmarks: Tensor | None  # (b, h, pieces, m padded, d) float32
    landmark_bias: Tensor | None  # (b, h, m) float32
    key_bias: Tensor | None  # (b, h, s) float32; packed (1, h, s)
    key_quadratic: Tensor | None  # (b, h, pieces, d) float32


def plan_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_landmarks: Tensor,
    key_landmarks: Tensor,
    landmark_bias: Tensor,
    key_bias: Tensor | None,
    key_quadratic: Tensor | None,
    out: Tensor,
    landmark_value: Tensor,
    log_sum: Tensor,
    query_log_sum: Tensor,
    *,
    wanted: Wanted,
    precision: str,
    sequences: Sequences | None = None,
    configurations: Mapping[str, Configuration] | None = None,
) -> tuple[list[Launch], Gradients]:
    """The kernels of the backward and the tensors they fill; operands as the forward had and returned them.

    Args:
        grad: Gradient of the output, (b, h g, n, e), in the dtype of the queries, any batch, head and row strides.
        query: Queries.
        key: Keys.
        value: Values.
        query_landmarks: Landmarks that queries see.
        key_landmarks: Landmarks that keys see.
        landmark_bias: Bias of landmarks.
        key_bias: Bias of keys or None.
        key_quadratic: Coefficients of squared keys or None.
        out: The forward's output, dense.
        landmark_value: The forward's values of landmarks.
        log_sum: The forward's log-sum-exps of landmarks.
        query_log_sum: The forward's log-sum-exps of queries.
        wanted: Which gradients to compute.
        precision: Of float32 products, as Triton names it.
        sequences: Of packed operands, as the forward had them.
        configurations: By name of pass, in place of the table's.
    """
    h, s, d = key.shape[1:]
    query_heads, n = query.shape[1:3]
    b, longest_query, longest_key, query_share, key_share = extents(query, key, sequences)
    groups = query_heads // h
    e, m = value.shape[-1], query_landmarks.shape[-2]
    new = query.new_empty

    def configuration(name: str) -> Configuration:
        return (configurations or {}).get(name) or choose(name, key.dtype, max(d, e), m)

    def floats(*shape: int) -> Tensor:
        return new(shape, dtype=torch.float32)

    product = product_type(key.dtype)

    def compile_time(chosen: Configuration, tokens: int, *, resident: bool = False) -> dict[str, Any]:
        found = constants(chosen, m, d, e, precision, resident=resident)
        return found | {"PRODUCT": product, "EVEN": sequences is None and tokens % chosen.tokens == 0}

    shapes = ((query_heads, n, d), (h, s, d), (h, s, e))
    grad_query, grad_key, grad_value = (
        new(b, heads, *rest) if sequences is None else new(rest[0], heads, rest[1]) for heads, *rest in shapes
    )
    grad_landmark_value, grad_log_sum, sum_inner = floats(b, h, m, e), floats(b, h, m), floats(b, h, m)
    inner = floats(*query_log_sum.shape)
    of_queries = {
        "query": query,
        "grad": grad,
        "query_landmarks": query_landmarks,
        "landmark_bias": landmark_bias,
        "query_boundaries": None if sequences is None else sequences.query,
        "landmark_value": landmark_value,
        "log_sum": log_sum,
        "query_log_sum": query_log_sum,
        "inner": inner,
        **strides(query=query, grad=grad, query_landmarks=query_landmarks, landmark_bias=landmark_bias),
        "heads": h,
        "groups": groups,
        "n": n,
        "m_padded": log_sum.shape[-1],
    }
    chosen = configuration("landmark_sums_learned" if wanted.query_landmarks else "landmark_sums")
    blocks = -(-m // chosen.landmarks)
    padded = blocks * chosen.landmarks
    pieces, span = split(longest_query, b * query_heads * blocks, chosen, query_share)
    partial_value = floats(b * query_heads, pieces, padded, e)
    partial_inner = floats(b * query_heads, pieces, padded)
    grad_query_landmarks = floats(b, h, groups * pieces, padded, d) if wanted.query_landmarks else None
    filled = {
        "out": out,
        "grad_landmark_value": partial_value,
        "sum_inner": partial_inner,
        "grad_query_landmarks": grad_query_landmarks,
        "span": span,
        "pieces": pieces,
    }
    launches = [
        Launch(
            landmark_sums_kernel,
            b * query_heads * pieces * blocks,
            of_queries | filled,
            compile_time(chosen, n),
            chosen.warps,
            chosen.registers,
        ),
        Launch(
            landmark_gradient_kernel,
            b * h * -(-m // 16),
            {
                "partial_value": partial_value,
                "partial_inner": partial_inner,
                "landmark_value": landmark_value,
                "grad_landmark_value": grad_landmark_value,
                "grad_log_sum": grad_log_sum,
                "sum_inner": sum_inner,
                "pieces": groups * pieces,
                "m_padded": padded,
                "m_padded_forward": log_sum.shape[-1],
            },
            {"M": m, "E": e, "E_PADDED": padded_dim(e), "ROWS": 16, "PRODUCT": product},
            4,
        ),
    ]
    chosen = configuration("queries_backward")
    pieces, span = split(longest_query, b * query_heads, chosen, query_share)
    launches.append(
        Launch(
            query_gradient_kernel,
            b * query_heads * pieces,
            of_queries | {"grad_query": grad_query, "span": span, "pieces": pieces},
            compile_time(chosen, n, resident=True),
            chosen.warps,
            chosen.registers,
        )
    )

    of_keys = {
        "key": key,
        "value": value,
        "key_landmarks": key_landmarks,
        "key_bias": key_bias,
        "key_quadratic": key_quadratic,
        "key_boundaries": None if sequences is None else sequences.key,
        "log_sum": log_sum,
        "grad_landmark_value": grad_landmark_value,
        "sum_inner": sum_inner,
        **strides(key=key, value=value, key_landmarks=key_landmarks, key_bias=key_bias, key_quadratic=key_quadratic),
        "heads": h,
        "s": s,
        "m_padded_forward": log_sum.shape[-1],
    }
    pieces, _ = split(longest_key, b * h, configuration("keys_backward"), key_share)
    grad_key_bias = floats(b if sequences is None else 1, h, s) if wanted.key_bias else None
    grad_key_quadratic = floats(b, h, pieces, d) if wanted.key_quadratic else None
    of_key: dict[str, Tensor | None] = {
        "grad_key": grad_key,
        "grad_key_bias": grad_key_bias,
        "grad_key_quadratic": grad_key_quadratic,
    }
    of_value: dict[str, Tensor | None] = {"grad_value": grad_value}
    together = max(d, e) <= MOST_TOGETHER
    for name, filled in (
        ("keys_backward", of_key | of_value if together else of_key),
        *(() if together else (("values_backward", of_value),)),
    ):
        chosen = configuration(name)
        pieces, span = split(longest_key, b * h, chosen, key_share)
        launches.append(
            Launch(
                key_gradient_kernel,
                b * h * pieces,
                of_keys | dict.fromkeys((*of_key, *of_value)) | filled | {"span": span, "pieces": pieces},
                compile_time(chosen, s, resident=True),
                chosen.warps,
                chosen.registers,
            )
        )
    grad_key_landmarks = None
    if wanted.key_landmarks:
        chosen = configuration("keys_backward_learned")
        blocks = -(-m // chosen.landmarks)
        pieces, span = split(longest_key, b * h * blocks, chosen, key_share)
        grad_key_landmarks = floats(b, h, pieces, blocks * chosen.landmarks, d)
        launches.append(
            Launch(
                key_landmark_gradient_kernel,
                b * h * pieces * blocks,
                of_keys | {"grad_key_landmarks": grad_key_landmarks, "span": span, "pieces": pieces},
                compile_time(chosen, s),
                chosen.warps,
                chosen.registers,
            )
        )
    return launches, Gradients(
        grad_query,
        grad_key,
        grad_value,
        grad_query_landmarks,
        grad_key_landmarks,
        grad_log_sum if wanted.landmark_bias else None,
        grad_key_bias,
        grad_key_quadratic,
    )
