r"""Rows that depend on parameters: fastfoodl, gmm, bbq here; dgm, inn in :mod:`.generative`.

A learned W stands for the law of its rows, not for N(0, I): positive features estimate the kernel
:math:`E f(\omega, x) f(\omega, y)` of that law. All start at, or very near, the Gaussian one. The random
inputs of the rows lie in buffers, so one state_dict is one function and ``forward`` draws nothing.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import require_choice, require_integer
from .base import Projection, WeightMatrix, next_power_of_two, num_blocks
from .quasi import BELOW_ONE, require_sobol_dimension, sobol
from .structured import draw_fastfood, fastfood_rows


def parameter(value: Tensor) -> nn.Parameter:
    """A parameter of the default dtype."""
    return nn.Parameter(value.to(torch.get_default_dtype()))


class LearnedWeight(WeightMatrix):
    """Base of the learned W: g sets of parameters, rows of equal weight unless a subclass says otherwise."""

    claim = "learned"
    gaussian_rows = False
    learned = True

    def _equally_weighted(self, omega: Tensor, uniform: Tensor | None = None) -> Projection:
        shape = omega.shape[:2]
        weight = omega.new_full(shape, -math.log(shape[1]))
        return Projection(omega, weight, omega.new_ones(shape), uniform)


class LearnedFastfood(LearnedWeight):
    r"""Fastfood with trained diagonals: **its own kernel**, the Gaussian one at initialisation.

    .. math:: W = n^{-1/2}\, S F G \Pi F B

    The diagonals S, G, B start at a draw of :class:`~spectraformer.weights.Fastfood`. B is real once trained,
    so row norms vary. :meth:`redraw` does nothing: the diagonals were trained for this one permutation.

    Args:
        head_dim: d, at least 1; padded to the power of two n.
        num_features: m, at least 1; blocks of n rows, the last one cut.
        num_heads: Sets of parameters; ``None`` for one that heads share.
        generator: CPU generator, the only source of randomness.

    Raises:
        ValueError: If a size is not a positive integer.

    References:
        Le, Sarlos and Smola, Fastfood, arXiv 1408.3060; Chowdhury et al., On learning the transformer kernel,
        arXiv 2110.08323.
    """

    permutation: Tensor

    def __init__(
        self,
        head_dim: int,
        num_features: int,
        *,
        num_heads: int | None = None,
        generator: torch.Generator,
    ) -> None:
        super().__init__(head_dim, num_features, num_heads=num_heads, generator=generator)
        n = next_power_of_two(head_dim)
        blocks = num_blocks(num_features, n)
        draws = [draw_fastfood(blocks, n, generator) for _ in range(self.num_copies)]
        scale, gauss, permutation, sign = (torch.stack(part) for part in zip(*draws, strict=True))
        self.scale = parameter(scale)
        self.gauss = parameter(gauss)
        self.sign = parameter(sign)
        self.register_buffer("permutation", permutation)

    def forward(self) -> Projection:
        rows = fastfood_rows(self.scale, self.gauss, self.permutation, self.sign, self.head_dim)
        return self._equally_weighted(rows.flatten(1, 2)[:, : self.num_features])

    def redraw(self, generator: torch.Generator) -> None:
        pass


class GaussianMixture(LearnedWeight):
    r"""A trained mixture of Gaussians: **its own kernel**, nearly the Gaussian one at initialisation.

    .. math:: \omega_{cj} = \mu_c + L_c \varepsilon_{cj}, \quad \varepsilon \sim N(0, I_d), \quad
              a_{cj} = \mathrm{softmax}(\beta)_c / m_c

    so positive features estimate
    :math:`\sum_c \pi_c \exp(\mu_c \cdot z + \tfrac12 z^\top L_c L_c^\top z)\, e^{-(|x|^2 + |y|^2)/2}`,
    z = x + y. The m rows are split over the components as evenly as possible; a trained mixture weight moves
    the quadrature weights, not the split. Means start at N(0, 0.02^2) to tell the components apart, L at I,
    the logits :math:`\beta` at the logarithm of the split. :meth:`redraw` replaces :math:`\varepsilon`.

    Args:
        head_dim: d, at least 1.
        num_features: m, at least 1.
        num_heads: Sets of parameters; ``None`` for one that heads share.
        num_components: Components, at least 1; no more than m are used.
        covariance: L is ``"diagonal"`` or a ``"full"`` lower triangle, its diagonal positive in both.
        generator: CPU generator, the only source of randomness.

    Raises:
        ValueError: If a size is not a positive integer or ``covariance`` is unknown.

    References:
        Chowdhury et al., On learning the transformer kernel, arXiv 2110.08323.
    """

    noise: Tensor
    component: Tensor
    log_count: Tensor

    def __init__(
        self,
        head_dim: int,
        num_features: int,
        *,
        num_heads: int | None = None,
        num_components: int = 2,
        covariance: Literal["diagonal", "full"] = "diagonal",
        generator: torch.Generator,
    ) -> None:
        super().__init__(head_dim, num_features, num_heads=num_heads, generator=generator)
        require_integer("num_components", num_components)
        require_choice("covariance", covariance, ("diagonal", "full"))
        self.num_components = min(num_components, num_features)
        self.covariance = covariance
        g, k, d, m = self.num_copies, self.num_components, head_dim, num_features
        component = torch.arange(m) * k // m
        log_count = torch.bincount(component, minlength=k).to(torch.float64).log()
        self.logits = parameter((log_count - math.log(m)).repeat(g, 1))
        self.mean = parameter(torch.randn(g, k, d, generator=generator, dtype=torch.float64) * 0.02)
        self.log_scale = parameter(torch.zeros(g, k, d))
        if covariance == "full":
            self.lower = parameter(torch.zeros(g, k, d, d))
        self.register_buffer("component", component)
        self.register_buffer("log_count", log_count.to(torch.get_default_dtype()))
        self.register_buffer("noise", torch.empty(g, m, d))
        self.redraw(generator)

    def forward(self) -> Projection:
        rows = self.noise * self.log_scale.exp()[:, self.component]
        if self.covariance == "full":
            lower = self.lower.tril(-1)[:, self.component]
            rows = rows + (lower @ self.noise[..., None])[..., 0]
        rows = rows + self.mean[:, self.component]
        log_weight = (self.logits.log_softmax(-1) - self.log_count)[:, self.component]
        return Projection(rows, log_weight, torch.ones_like(log_weight))

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        self.noise.copy_(torch.randn(self.noise.shape, generator=generator, dtype=torch.float64))


class BlackBoxQuantile(LearnedWeight):
    r"""A trained quantile function a coordinate: **its own kernel**, the Gaussian one at initialisation.

    .. math:: \omega_{il} = Q_l(u_{il}), \quad Q_l(t_j) = q_l + \sum_{i \le j} \mathrm{softplus}(s_{li}),
              \quad t_j = (j + \tfrac12)/J

    linear between the knots and beyond them, hence increasing; u are scrambled Sobol points. It starts at
    the normal quantile, with :math:`E\,\omega^2 = 0.987` at 64 knots: linear tails are shorter than
    Gaussian ones. :meth:`redraw` replaces u.

    Args:
        head_dim: d, at least 1; at most 21 201.
        num_features: m, at least 1.
        num_heads: Sets of parameters; ``None`` for one that heads share.
        num_knots: J, at least 2.
        generator: CPU generator, the only source of randomness.

    Raises:
        ValueError: If a size is not a positive integer, J is below 2, or d exceeds the Sobol tables.

    References:
        Tompkins, Senanayake, Morere and Ramos, Black box quantiles for kernel learning, AISTATS 2019.
    """

    uniform: Tensor

    def __init__(
        self,
        head_dim: int,
        num_features: int,
        *,
        num_heads: int | None = None,
        num_knots: int = 64,
        generator: torch.Generator,
    ) -> None:
        super().__init__(head_dim, num_features, num_heads=num_heads, generator=generator)
        require_sobol_dimension(head_dim)
        require_integer("num_knots", num_knots)
        if num_knots < 2:
            raise ValueError("num_knots is 1; a piecewise linear quantile needs at least 2; nearest: 2")
        self.num_knots = num_knots
        g, d, j = self.num_copies, head_dim, num_knots
        knots = torch.special.ndtri((torch.arange(j, dtype=torch.float64) + 0.5) / j)
        self.start = parameter(knots[:1].expand(g, d, 1))
        # log(expm1(s)) is the inverse of softplus.
        self.steps = parameter(knots.diff().expm1().log().expand(g, d, j - 1))
        self.register_buffer("uniform", torch.empty(g, num_features, d))
        self.redraw(generator)

    def forward(self) -> Projection:
        values = torch.cat((self.start, functional.softplus(self.steps)), dim=-1).cumsum(-1)  # (g, d, J)
        position = self.uniform.transpose(1, 2) * self.num_knots - 0.5
        # Clamping the knot but not the position extends the first and last pieces: the linear tails.
        knot = position.floor().clamp(0, self.num_knots - 2).long()
        left, right = values.gather(-1, knot), values.gather(-1, knot + 1)
        omega = left + (position - knot) * (right - left)
        return self._equally_weighted(omega.transpose(1, 2), self.uniform)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        shape = self.uniform.shape
        points = [sobol(shape[1], shape[2], generator) for _ in range(shape[0])]
        self.uniform.copy_(torch.stack(points).clamp(max=BELOW_ONE))
