"""Trigonometric features: cosines and sines of projections, bounded but signed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spectraformer.components.base import ComponentFunction, Parameters, Tokens
from spectraformer.components.pairs import Features, Signed
from spectraformer.weights.base import Projection


class TrigRF(ComponentFunction):
    r"""Random Fourier features of the softmax kernel.

    .. math:: \varphi_i(x) = \sqrt{|a_i|}\; e^{|x|^2/2}\, [\cos\omega_i\cdot x,\ \sin\omega_i\cdot x]

    Exact at x = y; the relative variance for Gaussian rows is :math:`(1-e^{-r^2})^2 e^{r^2}/2m` with
    :math:`r = |x-y|`. The estimated denominator of attention turns negative or vanishes once norms of
    scaled tokens exceed about 2: use it for small norms, or use positive features.

    References:
        Rahimi and Recht, Random Features for Large-Scale Kernel Machines, NeurIPS 2007.
        Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794.
    """

    positive = False
    shared_log = True

    def feature_dim(self, num_rows: int) -> int:
        """Two a row."""
        return 2 * num_rows

    def forward(self, tokens: Tokens, projection: Projection, parameters: Parameters) -> Signed:
        """Features of queries and keys; all features of a token share the log |x|^2 / 2."""
        amplitude = (0.5 * projection.log_abs_weight).exp().unsqueeze(-2)  # (g, 1, m)

        def features(key_sign: Tensor | float) -> Callable[[Tensor], Features]:
            def of(x: Tensor) -> Features:
                phase = x @ projection.omega.to(x.dtype).mT
                scale = (amplitude * key_sign).to(x.dtype)
                log = 0.5 * x.square().sum(-1, keepdim=True)
                return Features(log, torch.cat((phase.cos() * scale, phase.sin() * scale), dim=-1))

            return of

        return tokens.signed(
            features(1.0),
            features(projection.sign_weight.unsqueeze(-2)),
            self.feature_dim(projection.omega.shape[-2]),
        )
