"""The Walsh-Hadamard transform, used to build structured weight matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:  # (..., n) -> (..., n)
    r"""Unnormalised Walsh-Hadamard transform F of the last dimension, with :math:`F F^\top = n I`.

    Args:
        x: Any tensor whose last dimension n is a power of two, (..., n).

    Returns:
        F x in natural (Sylvester) order, (..., n); differentiable; n log2 n additions a row.

    Raises:
        ValueError: If n is not a power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"the last dimension is {n}; the Hadamard transform needs a power of two")
    shape = x.shape
    half = n // 2
    while half >= 1:
        pair = x.reshape(*shape[:-1], n // (2 * half), 2, half)
        a, b = pair[..., 0, :], pair[..., 1, :]
        x = torch.stack((a + b, a - b), dim=-2).reshape(shape)
        half //= 2
    return x
