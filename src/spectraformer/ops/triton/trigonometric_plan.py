# mypy: disable-error-code="import-untyped,import-not-found"
"""What trigonometric attention launches, forward and backward, and with which tiles.

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, m rows of W, d head dim, e value dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectraformer.ops.triton.configurations import HEAD_DIMS, Configuration, bucket, split
from spectraformer.ops.triton.launch import Launch, constants, padded_dim, product_type, strides
from spectraformer.ops.triton.trigonometric_backward import (
    trigonometric_key_backward_kernel,
    trigonometric_query_backward_kernel,
    trigonometric_state_gradient_kernel,
)
from spectraformer.ops.triton.trigonometric_forward import (
    merge_trigonometric_kernel,
    trigonometric_key_kernel,
    trigonometric_query_kernel,
)

ROWS = 16
# Bytes of W and of a state in two 16-bit parts that stay in shared memory, so that two programs share a multiprocessor.
RESIDENT = 96 * 1024


class State(NamedTuple):
    """What the forward leaves for the backward, float32 but for the flags; log_total is in units of log 2."""

    out: Tensor  # (b, h g, n, e)
    unsafe: Tensor  # (b h g, n) uint8
    value: Tensor  # (b h, 2, m padded, e)
    sums: Tensor  # (b h, 3, 2, m padded)
    log_total: Tensor  # (b h,)
    divisor: Tensor  # (b h g, n), empty without backward


class Gradients(NamedTuple):
    """What the kernels fill; None where not wanted. Pieces are still to be added, rows beyond m cut."""

    query: Tensor  # (b, h g, n, d)
    key: Tensor  # (b, h, s, d)
    value: Tensor  # (b, h, s, e)
    query_rows: Tensor | None  # (b, h, g pieces, m padded, d) float32
    key_rows: Tensor | None  # (b, h, pieces, m padded, d) float32
    rule_weight: Tensor  # (b, h, 2, m) float32
    key_bias: Tensor | None  # (b, h, s) float32


def configuration(name: str, dtype: torch.dtype, head_dim: int, rows: int) -> Configuration:
    """Tiles of one pass: "keys", "queries", "keys_backward" or "queries_backward".

    Args:
        name: The pass.
        dtype: Of queries, keys and values: bfloat16, float16 or float32.
        head_dim: The larger of head dim and value dim, at most 128.
        rows: Rows of W.
    """
    d = bucket(head_dim, HEAD_DIMS)
    resident = rows * d * 12 <= RESIDENT
    if dtype == torch.float32:
        return Configuration(32 if d <= 64 else 16, 32, 4, 1, resident=False)
    block = 128 if rows > 64 else 64
    warps = 8 if block == 128 else 4
    if name == "queries":
        # What does not stay is read again for every tile: fewer, larger tiles.
        return Configuration(32, 64, 4, 1) if resident else Configuration(32, 128, 8, 1, resident=False)
    if d <= 64:
        return Configuration(block, 32, warps, 2)
    return Configuration(64, 32, 4, 2) if name == "keys" else Configuration(64, 32, 8, 1)


def plan_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    rule_weight: Tensor,
    key_bias: Tensor | None,
    *,
    key_factor: float,
    needs_backward: bool,
    precision: str,
) -> tuple[list[Launch], State]:
    """The kernels of the forward and the tensors they fill."""
    b, h, s, d = key.shape
    query_heads, n = query.shape[1:3]
    e, m = value.shape[-1], rows.shape[-2]

    def floats(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    keys, queries = (configuration(name, key.dtype, max(d, e), m) for name in ("keys", "queries"))
    of_keys = constants(keys, m, d, e, precision)
    blocks = of_keys["BLOCKS"]
    padded = blocks * keys.landmarks
    pieces, span = split(s, b * h * blocks, keys)
    partial_value, partial_sums = floats(b * h, pieces, 2, padded, e), floats(b * h, pieces, 2, 2, padded)
    partial_peak, partial_total = floats(b * h, pieces), floats(b * h, pieces)
    state = State(
        query.new_empty(b, query_heads, n, e),
        query.new_empty(b * query_heads, n, dtype=torch.uint8),
        floats(b * h, 2, padded, e),
        floats(b * h, 3, 2, padded),
        floats(b * h),
        floats(b * query_heads, n) if needs_backward else floats(0),
    )
    query_pieces, query_span = split(n, b * query_heads, queries)
    return [
        Launch(
            trigonometric_key_kernel,
            b * h * pieces * blocks,
            {
                "key": key,
                "value": value,
                "rows": rows,
                "key_bias": key_bias,
                "value_sums": partial_value,
                "sums": partial_sums,
                "peak": partial_peak,
                "total": partial_total,
                **strides(key=key, value=value, rows=rows, key_bias=key_bias),
                "key_factor": key_factor,
                "heads": h,
                "s": s,
                "span": span,
                "pieces": pieces,
            },
            of_keys,
            keys.warps,
        ),
        Launch(
            merge_trigonometric_kernel,
            b * h * 2 * (padded // ROWS),
            {
                "partial_value": partial_value,
                "partial_sums": partial_sums,
                "partial_peak": partial_peak,
                "partial_total": partial_total,
                "rule_weight": rule_weight,
                "state_value": state.value,
                "state": state.sums,
                "log_total": state.log_total,
                **strides(rule_weight=rule_weight),
                "heads": h,
                "pieces": pieces,
            },
            {"M": m, "M_PADDED": padded, "E": e, "E_PADDED": padded_dim(e), "ROWS": ROWS},
            4,
        ),
        Launch(
            trigonometric_query_kernel,
            b * query_heads * query_pieces,
            {
                "query": query,
                "rows": rows,
                "rule_weight": rule_weight,
                "state_value": state.value,
                "state": state.sums,
                "out": state.out,
                "unsafe": state.unsafe,
                "divisor": state.divisor if needs_backward else None,
                **strides(query=query, rows=rows, rule_weight=rule_weight),
                "heads": h,
                "groups": query_heads // h,
                "n": n,
                "span": query_span,
                "pieces": query_pieces,
            },
            constants(queries, m, d, e, precision, resident=True) | {"M_PADDED": padded},
            queries.warps,
        ),
    ], state


def plan_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    rule_weight: Tensor,
    key_bias: Tensor | None,
    *saved: Tensor,
    key_factor: float,
    wants_rows: bool,
    wants_key_bias: bool,
    precision: str,
) -> tuple[list[Launch], Gradients]:
    """The kernels of the backward and the tensors they fill; ``saved`` is the state that the forward returned."""
    state = State(*saved)
    b, h, s, d = key.shape
    query_heads, n = query.shape[1:3]
    groups = query_heads // h
    e, m = value.shape[-1], rows.shape[-2]
    padded = state.value.shape[2]
    product = product_type(key.dtype)

    def floats(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    queries, keys = (configuration(name, key.dtype, max(d, e), m) for name in ("queries_backward", "keys_backward"))
    launches: list[Launch] = []

    def launch(kernel: Any, programs: int, chosen: Configuration, parts: int, arguments: dict[str, Any]) -> None:
        compiled = constants(chosen, m, d, e, precision) | {"PARTS": parts, "PRODUCT": product, "M_PADDED": padded}
        names = kernel.arg_names
        launches.append(
            Launch(kernel, programs * parts, arguments, {x: compiled[x] for x in compiled if x in names}, chosen.warps)
        )

    grad_query, grad_key, grad_value = (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
    )
    blocks = -(-m // queries.landmarks)
    of_queries = {
        "query": query,
        "out": state.out,
        "grad": grad,
        "rows": rows,
        "rule_weight": rule_weight,
        "state_value": state.value,
        "state": state.sums,
        "unsafe": state.unsafe,
        "divisor": state.divisor,
        **strides(query=query, grad=grad, rows=rows, rule_weight=rule_weight),
        "heads": h,
        "groups": groups,
        "n": n,
    }
    pieces, span = split(n, b * query_heads * blocks, queries)
    query_padded = blocks * queries.landmarks
    partial_value = floats(b * query_heads, pieces, 2, query_padded, e)
    partial_sums = floats(b * query_heads, pieces, 2, query_padded)
    query_rows = floats(b, h, groups * pieces, query_padded, d) if wants_rows else None
    filled = {
        "grad_query": grad_query if blocks == 1 else None,
        "grad_value_sums": partial_value,
        "grad_sums": partial_sums,
        "grad_rows": query_rows,
        "span": span,
        "pieces": pieces,
    }
    launch(trigonometric_query_backward_kernel, b * query_heads * pieces, queries, blocks, of_queries | filled)
    if blocks > 1:
        token_pieces, token_span = split(n, b * query_heads, queries)
        filled = {
            "grad_query": grad_query,
            "grad_value_sums": None,
            "grad_sums": None,
            "grad_rows": None,
            "span": token_span,
            "pieces": token_pieces,
        }
        launch(trigonometric_query_backward_kernel, b * query_heads * token_pieces, queries, 1, of_queries | filled)

    grad_value_sums, grad_sums, grad_rule_weight = floats(b, h, 2, m, e), floats(b, h, 2, m), floats(b, h, 2, m)
    launches.append(
        Launch(
            trigonometric_state_gradient_kernel,
            b * h * 2 * -(-m // ROWS),
            {
                "partial_value": partial_value,
                "partial_sums": partial_sums,
                "rule_weight": rule_weight,
                "state_value": state.value,
                "state": state.sums,
                "grad_value_sums": grad_value_sums,
                "grad_sums": grad_sums,
                "grad_rule_weight": grad_rule_weight,
                **strides(rule_weight=rule_weight),
                "heads": h,
                "pieces": groups * pieces,
                "m_padded": query_padded,
                "m_padded_forward": padded,
            },
            {"M": m, "E": e, "E_PADDED": padded_dim(e), "ROWS": ROWS},
            4,
        )
    )

    of_keys = {
        "key": key,
        "value": value,
        "rows": rows,
        "key_bias": key_bias,
        "log_total": state.log_total,
        "grad_value_sums": grad_value_sums,
        "grad_sums": grad_sums,
        **strides(key=key, value=value, rows=rows, key_bias=key_bias),
        "key_factor": key_factor,
        "heads": h,
        "s": s,
    }
    blocks = -(-m // keys.landmarks)
    pieces, span = split(s, b * h, keys)
    grad_key_bias = floats(b, h, s) if wants_key_bias else None
    key_rows = floats(b, h, pieces, keys.landmarks, d) if wants_rows and blocks == 1 else None
    filled = {
        "grad_key": grad_key,
        "grad_value": grad_value,
        "grad_key_bias": grad_key_bias,
        "grad_rows": key_rows,
        "span": span,
        "pieces": pieces,
    }
    launch(trigonometric_key_backward_kernel, b * h * pieces, keys, 1, of_keys | filled)
    if wants_rows and blocks > 1:
        pieces, span = split(s, b * h * blocks, keys)
        key_rows = floats(b, h, pieces, blocks * keys.landmarks, d)
        filled = {"grad_key": None, "grad_value": None, "grad_key_bias": None, "grad_rows": key_rows}
        filled |= {"span": span, "pieces": pieces}
        launch(trigonometric_key_backward_kernel, b * h * pieces, keys, blocks, of_keys | filled)
    return launches, Gradients(grad_query, grad_key, grad_value, query_rows, key_rows, grad_rule_weight, grad_key_bias)
