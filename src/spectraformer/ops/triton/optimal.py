# mypy: disable-error-code="no-any-return"
"""Landmarks of optimal positive features on a GPU. Triton is imported at the first call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectraformer.ops import triton as kernels
from spectraformer.ops.graph import is_plain


def refusals(*tensors: Tensor) -> list[str]:
    """Why the kernel cannot take these moments and this W; empty if it can.

    It is no operator: compilers fuse what torch computes in its place, and gradients of W flow through that.
    """
    if not kernels.INSTALLED or not is_plain(*tensors):
        return ["Triton is not installed, or something looks at single operations"]
    reasons = []
    for x in tensors:
        if not (x.is_cuda or kernels.INTERPRETED):
            reasons.append(f"a tensor is on {x.device}, not on a CUDA device")
        if x.dtype != torch.float32 or not x.is_contiguous() or x.requires_grad:
            reasons.append("a tensor is not float32 and dense, or needs a gradient")
    return reasons


def optimal_landmarks(*operands: Tensor) -> tuple[Tensor, Tensor]:  # (b, p, m, d), (b, p, m)
    r"""Rows and log-weights of positive features at the rho that the moments ask for; operands as the plan has them.

    .. math:: \sqrt{r}\,\omega_i, \qquad \log a_i + \tfrac{1-r}{2}|\omega_i|^2 + \tfrac d2\log r, \qquad
        r = \frac{1+\rho}{2\rho}

    with :func:`~spectraformer.components.statistics.optimal_rho`.
    """
    landmarks, bias = kernels.launching().planned(_plan, operands, ())
    return landmarks, bias


def _plan(operands: Any) -> Any:
    from spectraformer.ops.triton.optimal_kernel import plan_optimal_landmarks

    return plan_optimal_landmarks(operands)
