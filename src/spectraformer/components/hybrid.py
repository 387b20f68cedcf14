"""Hybrid features: trigonometric near the diagonal, positive far from it, mixed by the angle of the tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from spectraformer.checks import require_integer
from spectraformer.components.base import ComponentFunction, Parameters, Tokens
from spectraformer.components.pairs import Features, Signed
from spectraformer.weights.base import Projection


class HRF(ComponentFunction):
    r"""Angular hybrid of antithetic positive and trigonometric features.

    .. math:: \hat\lambda\,\widehat{SM}_{hyp} + (1-\hat\lambda)\,\widehat{SM}_{trig},\qquad
        \hat\lambda = \tfrac12\Bigl(1-\tfrac1n\sum_j \mathrm{sgn}(t_j\cdot x)\,\mathrm{sgn}(t_j\cdot y)\Bigr)

    With t_j ~ N(0, I) independent of W, :math:`E\hat\lambda = \theta_{xy}/\pi`: the positive part, accurate at angle
    pi, is weighted by the angle; the trigonometric part, exact at angle 0, by the rest. Unbiased.
    No gradient flows through the signs.

    Args:
        head_dim: d.
        num_heads: Accepted for uniformity; the directions t are shared by heads.
        generator: Source of the directions t.
        num_directions: n; the number of features is 4 m (n + 1).

    References:
        Choromanski et al., Hybrid Random Features, arXiv 2110.04367.
    """

    positive = False
    directions: Tensor

    def __init__(
        self,
        head_dim: int,
        *,
        num_heads: int | None = None,
        generator: torch.Generator,
        num_directions: int = 8,
    ) -> None:
        super().__init__(head_dim, num_heads=num_heads, generator=generator)
        require_integer("num_directions", num_directions)
        self.num_directions = num_directions
        self.register_buffer("directions", self._draw(generator).to(torch.get_default_dtype()))

    def _draw(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.num_directions, self.head_dim, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        """New directions t, in place."""
        self.directions.copy_(self._draw(generator))

    def feature_dim(self, num_rows: int) -> int:
        """4 m (n + 1)."""
        return 4 * num_rows * (self.num_directions + 1)

    def forward(self, tokens: Tokens, projection: Projection, parameters: Parameters) -> Signed:
        """Features of queries and keys: blocks [hyp, trig, s x trig, s x hyp], the last one negated for keys."""
        weight = (0.5 * projection.log_abs_weight - 0.5 * math.log(2)).unsqueeze(-2)  # (g, 1, m)
        n = self.num_directions

        def features(last: float, key_sign: Tensor) -> Callable[[Tensor], Features]:
            def of(x: Tensor) -> Features:
                u = x @ projection.omega.to(x.dtype).mT  # (b, h, r, m)
                half = 0.5 * x.square().sum(-1, keepdim=True)
                base = weight.to(x.dtype)
                hyp = torch.cat((u, -u), -1) - half + (base - 0.5 * math.log(2)).repeat(1, 1, 2)
                trig = (half + base).expand_as(u).repeat(1, 1, 1, 2)
                wave = torch.cat((u.cos(), u.sin()), -1)
                side = torch.where(x @ self.directions.to(x.dtype).mT < 0, -1.0, 1.0).to(x.dtype)  # (b, h, r, n)
                spread = 0.5 * math.log(n)
                log = torch.cat((hyp, trig, (trig - spread).repeat(1, 1, 1, n), (hyp - spread).repeat(1, 1, 1, n)), -1)
                crossed = (side.unsqueeze(-1) * wave.unsqueeze(-2)).flatten(-2)
                plain = side.unsqueeze(-1).expand(*side.shape, hyp.shape[-1]).flatten(-2)
                sign = torch.cat((torch.ones_like(hyp), wave, crossed, last * plain), -1)
                return Features(log, sign * key_sign.to(x.dtype))

            return of

        copies = 4 * (n + 1)
        signs = projection.sign_weight.unsqueeze(-2).repeat(1, 1, copies)
        return tokens.signed(
            features(1.0, torch.ones_like(signs)),
            features(-1.0, signs),
            self.feature_dim(projection.omega.shape[-2]),
        )
