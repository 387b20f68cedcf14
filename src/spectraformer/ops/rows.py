"""A choice of rows, whose gradient moves rows too, not single numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def select_rows(
    x: Tensor,  # (n, ...)
    rows: Tensor,  # (r,)
    inverse: Tensor | None = None,  # (n,)
) -> Tensor:  # (r, ...)
    """Rows by number; torch's own gradient would add them up one by one, sorted where it must be deterministic.

    Args:
        x: Where they are.
        rows: Which, as integers; none twice, unless there is an inverse.
        inverse: Where each row of ``x`` stands among the chosen, of which only those count; None if some stand nowhere.
    """
    chosen: Tensor = _Select.apply(x, rows, inverse)  # type: ignore[no-untyped-call]
    return chosen


def token_rows(
    x: Tensor,  # (b, h, n, d)
    chosen: Tensor,  # (b, h | 1, c)
) -> tuple[Tensor, Tensor, Tensor]:
    """An index of x that takes tokens by number, each as a whole: ``x[token_rows(x, chosen)]`` is (b, h, c, d).

    Where it must be deterministic, a gradient of gathered numbers would sort them one by one.
    """
    batch, head = (torch.arange(size, device=x.device) for size in x.shape[:2])
    return batch[:, None, None], head[:, None], chosen


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, inverse: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, inverse)
        ctx.size = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, inverse = ctx.saved_tensors
        if inverse is not None:
            return grad.index_select(0, inverse), None, None
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy(0, rows, grad), None, None
