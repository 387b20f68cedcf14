# mypy: disable-error-code="no-untyped-call"
"""Moments of queries and keys on a GPU: one read of both, in one launch and a merge of its pieces.

Sums are taken in an order that depends on shapes alone, so results are the same bits at every run. Triton is imported
at the first call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectraformer.ops import triton as kernels
from spectraformer.ops.graph import is_plain
from spectraformer.ops.sequences import Sequences

ORDERS = ("none", "trace", "diagonal", "full")
LIBRARY = torch.library.Library("spectraformer", "FRAGMENT")
LIBRARY.define(
    "sequence_moments(Tensor query, Tensor key, Tensor? query_mask, Tensor? key_mask, float root, str order, "
    f"str precision, {kernels.PACKING}) -> (Tensor, Tensor)"
)


def refusals(query: Tensor, key: Tensor, order: str) -> list[str]:
    """Why the kernels cannot take these tensors, or not precisely enough; empty if they can."""
    reasons = kernels.refusals(key, key, key)
    if query.dtype not in kernels.DTYPES:
        reasons.append(f"dtype {query.dtype} of the query is none of {', '.join(map(str, kernels.DTYPES))}")
    if 0 in query.shape or 0 in key.shape:
        reasons.append("a tensor is empty")
    if order == "full" and torch.float32 in (query.dtype, key.dtype):
        reasons.append("products of float32 tokens are summed in float64, which has no fused form")
    return reasons


def sequence_moments(
    query: Tensor,  # (b, h * g, n, d)
    key: Tensor,  # (b, h, s, d)
    query_mask: Tensor | None,  # (b, n), True for real tokens
    key_mask: Tensor | None,  # (b, s)
    root: float,
    order: str,
    precision: str = "tf32x3",
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:  # (2, b, h, d), (2, b, h, d) or (2, b, h, d, d)
    r"""Mean and second moment of ``root * tokens`` over real tokens, of queries [0] and of keys [1]; without gradient.

    Query heads that share a key head are one sequence. Moments of no token at all are 0. Padding is not read.

    Args:
        query: Queries, bfloat16, float16 or float32, any strides.
        key: Keys, likewise; their dtype may be another.
        query_mask: Which queries are real, bool; None means all.
        key_mask: Which keys are real, bool.
        root: The square root of the attention scale.
        order: Second moments wanted: "none" (zeros), "trace" (its d-th part in each entry), "diagonal" or "full".
        precision: Of products of float32 tokens, where order is "full": "tf32x3" or "ieee".
        sequences: Of a packed batch: tokens and masks are one batch item then, and b of the results is theirs.

    Returns:
        Mean, (2, b, h, d), and second moment, (2, b, h, d), or (2, b, h, d, d) for "full": float32, float64 for
        "full". Products of 16-bit tokens are exact, and their sums good to 1e-6 of the trace.

    Raises:
        ValueError: If the order or the precision is unknown.
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; expected one of {ORDERS}")
    if precision not in kernels.PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {kernels.PRECISIONS}")
    packing = kernels.packing_of(sequences)
    tensors = query, key, query_mask, key_mask
    if is_plain(*tensors, *packing[:2]):
        return _sum((*tensors, *packing[:2]), (root, order, precision, *packing[2:]))
    with torch.no_grad():
        found: tuple[Tensor, Tensor] = torch.ops.spectraformer.sequence_moments(
            *tensors, root, order, precision, *packing
        )
    return found


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    *boundaries, longest_query, longest_key = kernels.completed(arguments[7:])
    return _sum((*arguments[:4], *boundaries), (*arguments[4:7], longest_query, longest_key))


def _sum(tensors: tuple[Any, ...], settings: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    query, key, *masks, query_boundaries, key_boundaries = tensors
    query, key = kernels.with_unit_stride(query), kernels.with_unit_stride(key)
    masks = [None if x is None else x.view(torch.uint8) for x in masks]
    mean, second = kernels.launching().planned(_plan, (query, key, *masks, query_boundaries, key_boundaries), settings)
    return mean, second


def _plan(operands: Any, root: float, order: str, precision: str, *longest: int) -> Any:
    from spectraformer.ops.triton.moments_kernel import plan_moments

    sequences = kernels.sequences_of(operands[4:], longest)
    return plan_moments(*operands[:4], root=root, order=order, precision=precision, sequences=sequences)


def _shapes(query: Tensor, key: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    (b, h, _, d), order, boundaries = key.shape, arguments[3], kernels.completed(arguments[5:])[0]
    b = b if boundaries is None else len(boundaries) - 1
    dtype = torch.float64 if order == "full" else torch.float32
    mean = query.new_empty(2, b, h, d, dtype=dtype)
    return mean, query.new_empty(*mean.shape, d, dtype=dtype) if order == "full" else torch.empty_like(mean)


LIBRARY.impl("sequence_moments", _run, "CUDA")
LIBRARY.impl("sequence_moments", _run, "CPU")
torch.library.register_fake("spectraformer::sequence_moments", _shapes, lib=LIBRARY)
