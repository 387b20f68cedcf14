# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Landmarks of optimal positive features from the moments, in one launch; plain torch takes 17 for them.

Legend: b batch, h key heads, p 1 or h, g copies of W, 1 or p, m rows of W, d head dim.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from spectraformer.ops.triton.launch import Launch, padded_dim
from spectraformer.ops.triton.tiles import load_tile, store_tile

ROWS = 32


@triton.jit
def optimal_landmarks_kernel(
    query_mean,  # (b, p, d)
    query_second,  # (b, p, d)
    key_mean,  # (b, p, d)
    key_second,  # (b, p, d)
    omega,  # (g, m, d)
    half,  # (1, g, m)
    start,  # (1, g, m)
    landmarks,  # (b, p, m, d)
    bias,  # (b, p, m)
    M: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rho of one batch item and head, and some rows at it."""
    flat = tl.cast(tl.program_id(0) // tl.cdiv(M, ROWS), tl.int64)
    row = (tl.program_id(0) % tl.cdiv(M, ROWS)) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D_PADDED)
    inside, place = column < D, flat * D + column
    q = tl.load(query_mean + place, mask=inside, other=0.0)
    k = tl.load(key_mean + place, mask=inside, other=0.0)
    squares = tl.load(query_second + place, mask=inside, other=0.0)
    squares += tl.load(key_second + place, mask=inside, other=0.0)
    u = tl.sum(squares + 2.0 * q * k, 0) / D
    u = tl.where(u < 0.0, 0.0, u)  # not a maximum: a NaN must show
    p = 1.0 + 2.0 * u
    ratio = 0.5 + 0.25 * (p + tl.sqrt(p * p + 8.0 * u))  # 1 / rho is half of the sum
    copy = flat % COPIES
    w = load_tile(omega + copy * M * D, row, D, M, D, D_PADDED)
    store_tile(landmarks + flat * M * D, row, D, M, w * tl.sqrt(ratio), D, D_PADDED)
    a = tl.load(start + copy * M + row, mask=row < M, other=0.0)
    a += 0.5 * D * tl.log(ratio) - ratio * tl.load(half + copy * M + row, mask=row < M, other=0.0)
    tl.store(bias + flat * M + row, a, mask=row < M)


def plan_optimal_landmarks(operands: Any) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The kernel and the tensors it fills: landmarks (b, p, m, d) and their log-weights (b, p, m), float32.

    Args:
        operands: Means and second moments of queries, then of keys, (b, p, d) each; W, (g, m, d); half of the squared
            norms of its rows, (1, g, m), and its log-weights plus these, (1, g, m). Float32, dense.
    """
    query_mean, query_second, key_mean, key_second, omega, half, start = operands
    (b, p, d), (copies, m, _) = query_mean.shape, omega.shape
    landmarks = omega.new_empty(b, p, m, d)
    bias = omega.new_empty(b, p, m)
    tensors = {
        "query_mean": query_mean,
        "query_second": query_second,
        "key_mean": key_mean,
        "key_second": key_second,
        "omega": omega,
        "half": half,
        "start": start,
        "landmarks": landmarks,
        "bias": bias,
    }
    constants = {"M": m, "D": d, "D_PADDED": padded_dim(d), "COPIES": copies, "ROWS": ROWS}
    return [Launch(optimal_landmarks_kernel, b * p * -(-m // ROWS), tensors, constants, 4)], (landmarks, bias)
