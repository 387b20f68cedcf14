"""Skyformer: a Nyström approximation of kernelized attention with sampled landmarks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectraformer import ops
from spectraformer.baselines.base import Baseline
from spectraformer.baselines.kernelized import gaussian_kernel
from spectraformer.baselines.nystrom import count_real, pseudo_inverse
from spectraformer.checks import require_integer, require_number
from spectraformer.ops.rows import token_rows

DRAW_BITS = 31


class Skyformer(Baseline):
    r"""Nyström approximation of kernelized attention.

    .. math::
        \kappa(q, l)\, (\kappa(l, l) + \gamma I)^{-1}\, \kappa(l, k)\, v, \qquad
        \kappa(x, y) = \exp\left(-\frac{|x - y|^2}{2\sqrt d}\right)

    The kernel matrix of queries and keys is no positive semi-definite one, but a block of that of all tokens, which
    is. The landmarks l are tokens: half are queries and half keys, drawn uniformly with replacement among the
    **real** tokens of each sequence; a sequence of at most ``num_features / 2`` real tokens has each token once.
    With all tokens as landmarks the error of the kernel matrix is at most gamma in spectral norm. As in kernelized
    attention the weights are not normalised.

    The inverse is taken of :math:`D^{-1/2} (\kappa(l, l) + \gamma I) D^{-1/2}`, D being the row sums: its
    eigenvalues lie in (0, 1], so that the iteration of :func:`~spectraformer.baselines.nystrom.pseudo_inverse`
    converges from :math:`Z_0 = I`; public code starts from the scaled matrix, which squares its small eigenvalues.

    In training the landmarks are drawn anew in each call by torch's global generator; in evaluation they are a
    function of ``seed`` and the number of real tokens.

    Args:
        head_dim: d.
        num_heads: h.
        max_length: Not used: any length goes.
        seed: Of the landmarks in evaluation.
        num_features: Number of landmarks, even; 128 in the paper's Long Range Arena runs. There each landmark is one
            token (an "accumulation" of 1), and the "sampling factor" plays no part once this number is given.
        regularisation: gamma > 0; 0.1 in the paper's runs. Landmarks may be equal: without it the inverse may not
            exist.
        iterations: Of the inverse; 6 in the paper's runs.

    Raises:
        ValueError: For sizes and options that do not fit.

    References:
        Skyformer (Chen et al., 2021), arXiv 2111.00035.
    """

    complexity = "n m"
    memory = "n m"
    source = "Chen et al. 2021, arXiv 2111.00035"
    has_cross_form = False
    draws: Tensor

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        max_length: int,
        seed: int,
        *,
        num_features: int = 128,
        regularisation: float = 0.1,
        iterations: int = 6,
    ) -> None:
        super().__init__(head_dim, num_heads, max_length, seed)
        require_integer("num_features", num_features, least=2)
        if num_features % 2:
            raise ValueError(
                f"num_features is {num_features}; expected an even number: half of the landmarks are queries, half "
                f"are keys; nearest: {num_features + 1}"
            )
        require_number("regularisation", regularisation, 0.0, math.inf, "a positive finite number")
        require_integer("iterations", iterations)
        self.regularisation = regularisation
        self.iterations = iterations
        generator = torch.Generator().manual_seed(seed)
        # Integers: no cast of the module to a short float type can round them.
        self.register_buffer("draws", torch.randint(2**DRAW_BITS, (2, num_features // 2), generator=generator))

    def attend(
        self,
        query: Tensor,  # (b, h, n, d)
        key: Tensor,  # (b, h, n, d)
        value: Tensor,  # (b, h, n, e)
        mask: Tensor | None,  # (b, n)
        is_causal: bool,
    ) -> Tensor:
        """Attention output, (b, h, n, e)."""
        dtype = ops.compute_dtype(query, key, value)
        q, k, v = (x.to(dtype) for x in (query, key, value))
        with ops.full_precision(query.device):
            landmarks, exists = self._landmarks(q, k, mask)
            exists = exists[:, None, :, None].to(dtype)  # (b, 1, m, 1)
            # A landmark that does not exist has a column of zeros outside, and a row and column of gamma I inside.
            inner = gaussian_kernel(landmarks, landmarks) * exists * exists.transpose(-1, -2)
            inner = inner + self.regularisation * torch.eye(inner.shape[-1], dtype=dtype, device=q.device)
            scale = inner.sum(-1, keepdim=True).rsqrt()  # (b, h, m, 1): D^(-1/2)
            normal = inner * scale * scale.transpose(-1, -2)
            inverse = pseudo_inverse(normal, torch.eye(inner.shape[-1], dtype=dtype, device=q.device), self.iterations)
            summary = gaussian_kernel(landmarks, k) @ v  # padded values are 0
            summary = exists * scale * (inverse @ (scale * summary))
            out = gaussian_kernel(q, landmarks) @ summary
        return out.to(value.dtype)

    def _landmarks(self, q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Landmarks, (b, h, m, d), and which of them exist, (b or 1, m)."""
        draws = torch.randint_like(self.draws, 2**DRAW_BITS) if self.training else self.draws
        count, seen = count_real(mask, q.shape[2], q.device)
        number = torch.arange(draws.shape[1], device=q.device)
        chosen = []
        for tokens, drawn in zip((q, k), draws, strict=True):
            # Ranks among the real tokens, from 0.
            rank = torch.where(count <= draws.shape[1], number, drawn * count >> DRAW_BITS)  # (b, m / 2)
            place = torch.searchsorted(seen, rank + 1).clamp(max=q.shape[2] - 1)
            chosen.append(tokens[token_rows(tokens, place[:, None])])
        exists = number < count
        return torch.cat(chosen, 2), torch.cat((exists, exists), -1)
