"""Kernelized attention: a Gaussian kernel in place of softmax, not normalised."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from spectraformer import ops
from spectraformer.baselines.base import Baseline
from spectraformer.checks import check_dropout


def gaussian_kernel(
    x: Tensor,  # (..., n, d)
    y: Tensor,  # (..., s, d)
) -> Tensor:  # (..., n, s)
    r"""Gaussian kernel of all pairs of tokens, in [0, 1].

    .. math:: \exp\left(-\frac{|x_i - y_j|^2}{2\sqrt d}\right)

    References:
        Skyformer (Chen et al., 2021), arXiv 2111.00035; the term with both tokens is that of softmax attention.
    """
    # [x, -|x|^2 / 2, 1] . [y, 1, -|y|^2 / 2]: the exponent in no pass over all pairs but that of the product.
    of_x, of_y = (-0.5 * tokens.square().sum(-1, keepdim=True) for tokens in (x, y))
    left = torch.cat((x, of_x, torch.ones_like(of_x)), -1) / math.sqrt(x.shape[-1])
    right = torch.cat((y, torch.ones_like(of_y), of_y), -1)
    # Rounding can make the squared distance of near tokens negative.
    return (left @ right.transpose(-1, -2)).clamp(max=0.0).exp()


class Kernelized(Baseline):
    r"""Attention with the weights of a Gaussian kernel: what Skyformer approximates.

    .. math:: \mathrm{out}_i = \sum_j \exp\left(-\frac{|q_i - k_j|^2}{2\sqrt d}\right) v_j

    As in its paper the weights are **not** divided by their sum: the output grows with the number of near keys, and
    is near 0 for a query far from all keys. Attention with the same kernel, normalised, is
    :func:`spectraformer.kernel_attention` with ``kernel="gaussian"``.

    Args:
        head_dim: d.
        num_heads: h.
        max_length: Not used: any length goes.
        seed: Not used: there is nothing random.
        dropout: Of attention weights, in training, by torch's global generator.

    Raises:
        ValueError: For sizes and options that do not fit.

    References:
        Skyformer (Chen et al., 2021), arXiv 2111.00035, "Kernelized Attention".
    """

    complexity = "n²"
    memory = "n²"
    source = "Chen et al. 2021, arXiv 2111.00035"
    has_causal_form = True

    def __init__(self, head_dim: int, num_heads: int, max_length: int, seed: int, *, dropout: float = 0.0) -> None:
        super().__init__(head_dim, num_heads, max_length, seed)
        check_dropout(dropout)
        self.dropout = dropout

    def attend(
        self,
        query: Tensor,  # (b, h, n, d)
        key: Tensor,  # (b, h, s, d)
        value: Tensor,  # (b, h, s, e)
        mask: Tensor | None,  # (b, s)
        is_causal: bool,
    ) -> Tensor:
        """Attention output, (b, h, n, e)."""
        dtype = ops.compute_dtype(query, key, value)
        q, k, v = (x.to(dtype) for x in (query, key, value))
        with ops.full_precision(query.device):
            weights = gaussian_kernel(q, k)
            if is_causal:
                weights = weights.tril()
            # Padding needs no weight of 0: its value is 0, and no sum of weights is taken.
            weights = functional.dropout(weights, self.dropout, self.training)
            return torch.matmul(weights, v).to(value.dtype)
