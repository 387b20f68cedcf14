"""Rows and weights of quadrature rules: gq, sgq, ssr."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor

from ..checks import require_flag, require_integer
from .base import Draw, SampledWeight, chi, haar
from .gaussian import simplex

_MOST_NODES = 200_000
_ZERO = 1e-14


def gauss_hermite(order: int) -> tuple[Tensor, Tensor]:  # (order,), (order,)
    r"""Nodes and weights with :math:`\sum_k w_k p(t_k) = E\,p(t), t \sim N(0, 1)`, up to degree 2 order - 1.

    Golub and Welsch: the nodes are the eigenvalues of the Jacobi matrix of the orthonormal Hermite
    polynomials :math:`p_k`. A Newton step and :math:`w = 1 / \sum_k p_k(t)^2` then make small weights
    accurate too.
    """
    root = torch.arange(1, order + 1, dtype=torch.float64).sqrt()
    nodes = torch.linalg.eigvalsh(torch.diag(root[:-1], 1) + torch.diag(root[:-1], -1))

    def polynomials(t: Tensor) -> list[Tensor]:  # p_0 .. p_order
        values = [torch.ones_like(t), t]
        for k in range(1, order):
            values.append((t * values[k] - root[k - 1] * values[k - 1]) / root[k])
        return values

    values = polynomials(nodes)
    nodes = nodes - values[order] / (root[order - 1] * values[order - 1])
    nodes = (nodes - nodes.flip(0)) / 2
    weights = 1 / torch.stack(polynomials(nodes)[:order]).square().sum(0)
    return nodes, weights / weights.sum()


class GaussQuadrature(SampledWeight):
    r"""Random nodes of a dense Gauss-Hermite grid: **biased**, the bias vanishing as the order grows.

    .. math:: P(\omega_{ij} = t_k) = w_k \text{ independently}, \quad a_i = 1/m

    with (t, w) the L-point Gauss-Hermite rule of N(0, 1). Moments up to degree 2L - 1 a coordinate are
    Gaussian: the ratio of :math:`E\,e^{tz}` to :math:`e^{z^2/2}` is 0.9936 at L = 3, z = 1, and 0.99996 at
    L = 8, z = 2. The law is discrete, so it serves no discrete component function.

    Args:
        head_dim: d, at least 1.
        num_features: m, at least 1.
        num_heads: Independent copies; ``None`` for one that heads share.
        order: L, nodes a coordinate, at least 2.
        generator: CPU generator, the only source of randomness.

    Raises:
        ValueError: If a size is not a positive integer or ``order`` is below 2.

    References:
        Dao, De Sa and Re, Gaussian quadrature for kernel features, arXiv 1709.02605.
    """

    claim = "vanishing"
    gaussian_rows = False

    def __init__(
        self,
        head_dim: int,
        num_features: int,
        *,
        num_heads: int | None = None,
        order: int = 8,
        generator: torch.Generator,
    ) -> None:
        require_integer("order", order)
        if order < 2:
            raise ValueError("order is 1, whose only node is 0; expected at least 2; nearest: 2")
        self.order = order
        super().__init__(head_dim, num_features, num_heads=num_heads, generator=generator)

    def sample(self, generator: torch.Generator) -> Draw:
        nodes, weights = gauss_hermite(self.order)
        shape = (self.num_features, self.head_dim)
        u = torch.rand(shape, generator=generator, dtype=torch.float64)
        # The last edge is 1 but for rounding; left out, the last node takes every u above the others.
        return Draw(nodes[torch.bucketize(u, weights.cumsum(0)[:-1])])


def _compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    """Tuples of ``parts`` positive integers whose sum is at most ``total``."""
    every = itertools.product(range(1, total - parts + 2), repeat=parts)
    return [tuple(levels) for levels in every if sum(levels) <= total]


def smolyak_size(d: int, level: int) -> int:
    """Nodes of the Smolyak rule, those of weight zero included."""
    count = 0
    for p in range(min(d, level) + 1):
        # Over compositions of at most `level` into p parts, the sum of prod(2 e_j) is 2^p C(level + p, 2 p).
        count += math.comb(d, p) * 2**p * math.comb(level + p, 2 * p)
    return count


def _series(d: int, p: int, level: int, centre: list[float]) -> list[float]:
    """Coefficients of t^0 .. t^level in (1 - t)^(d - 1) Z(t)^(d - p), with Z(t) the sum of centre_e t^e."""
    coefficients = [(-1.0) ** k * math.comb(d - 1, k) for k in range(level + 1)]
    for _ in range(d - p):
        coefficients = [sum(coefficients[k - e] * centre[e] for e in range(k + 1)) for k in range(level + 1)]
    return coefficients


def smolyak(d: int, level: int) -> tuple[Tensor, Tensor]:  # (N, d), (N,)
    r"""Nodes and signed weights of the Smolyak rule of N(0, I_d), exact up to total degree 2 level + 1.

    .. math:: Q = \sum_{|e| \le \ell} (-1)^{\ell - |e|} \binom{d-1}{\ell - |e|}
              \bigotimes_j U_{e_j}, \quad U_e \text{ with } 2e + 1 \text{ Gauss-Hermite nodes}

    Nodes with p nonzero coordinates are built at once. Hermite polynomials of different odd degree share no
    zero but 0 (Schur, 1931), so the levels :math:`e_1, \dots, e_p` of the nonzero coordinates follow from the
    node, and summing over the levels of the others leaves the weight
    :math:`\prod_j w_j \cdot [t^{\ell - \sum e_j}] (1-t)^{d-1} Z(t)^{d-p}`, Z the series of centre weights.
    """
    rules = [gauss_hermite(2 * e + 1) for e in range(level + 1)]
    centre = [float(weights[e]) for e, (_, weights) in enumerate(rules)]
    every_node, every_weight = [], []
    for p in range(min(d, level) + 1):
        series = _series(d, p, level, centre)
        support = torch.tensor(list(itertools.combinations(range(d), p)), dtype=torch.long).reshape(math.comb(d, p), p)
        for levels in _compositions(level, p) if p else [()]:
            values, weights = torch.zeros(1, 0, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
            for e in levels:
                kept = torch.arange(2 * e + 1) != e
                node, weight = rules[e][0][kept], rules[e][1][kept]
                left = values.repeat_interleave(2 * e, dim=0)
                values = torch.cat((left, node.repeat(values.shape[0])[:, None]), dim=1)
                weights = torch.outer(weights, weight).flatten()
            weights = weights * series[level - sum(levels)]
            nodes = torch.zeros(len(support), len(values), d, dtype=torch.float64)
            shape = (len(support), len(values), p)
            nodes.scatter_(2, support[:, None].expand(shape), values.expand(shape))
            every_node.append(nodes.reshape(-1, d))
            every_weight.append(weights.repeat(len(support)))
    nodes, weights = torch.cat(every_node), torch.cat(every_weight)
    kept = weights.abs() >= _ZERO
    return nodes[kept], weights[kept]


class SparseGrid(SampledWeight):
    r"""A Smolyak sparse grid, signed weights: deterministic, exact for polynomials, **biased** otherwise.

    .. math:: \sum_i a_i\, p(\omega_i) = E\,p(\omega), \quad \deg p \le 2\ell + 1, \quad
              \ell = \text{level}

    Level 1 has the nodes 0 with the weight 1 - d/3 and :math:`\pm\sqrt3 e_j` with 1/6: 2d + 1 rows; level 2
    has :math:`2d^2 + 4d + 1`. The absolute weights sum to about 2d/3, and the rule is accurate for small
    inputs only (d = 16, |z| = 2, diagonal z: 0.42 of :math:`E\,e^{\omega\cdot z}` at level 1, 0.71 at level
    2). Positive features lose their positivity.

    Args:
        head_dim: d, at least 1.
        num_features: The number of rows to come near to: B rotated copies of the grid, each of weight 1/B,
            share the centre, B = max(1, round((m - 1) / (N - 1))) for a grid of N nodes.
        num_heads: Independent copies; ``None`` for one that heads share.
        level: :math:`\ell`, at least 1.
        rotate: Rotate each copy by an independent Haar matrix; without it there is one copy, the rule is
            fixed, and :meth:`redraw` changes nothing.
        generator: CPU generator, the only source of randomness.

    Raises:
        ValueError: If a size is not a positive integer, an option is unknown, or the grid has more than
            200 000 nodes.

    References:
        Dao, De Sa and Re, Gaussian quadrature for kernel features, arXiv 1709.02605;
        Smolyak, Quadrature and interpolation formulas for tensor products, 1963.
    """

    claim = "deterministic"
    gaussian_rows = False
    signed = True

    def __init__(
        self,
        head_dim: int,
        num_features: int,
        *,
        num_heads: int | None = None,
        level: int = 1,
        rotate: bool = True,
        generator: torch.Generator,
    ) -> None:
        require_integer("head_dim", head_dim)
        require_integer("level", level)
        require_flag("rotate", rotate)
        size = smolyak_size(head_dim, level)
        if size > _MOST_NODES:
            nearest = max((n for n in range(1, level) if smolyak_size(head_dim, n) <= _MOST_NODES), default=0)
            hint = f"nearest level: {nearest}" if nearest else "use 'ssr'"
            raise ValueError(
                f"level is {level}, which has {size} nodes at head_dim {head_dim}; expected at most "
                f"{_MOST_NODES} nodes; {hint}"
            )
        self.level = level
        self.rotate = rotate
        super().__init__(head_dim, num_features, num_heads=num_heads, generator=generator)

    def sample(self, generator: torch.Generator) -> Draw:
        nodes, weights = smolyak(self.head_dim, self.level)
        if not self.rotate:
            return Draw(nodes, weights)
        # The centre comes first, unless its weight vanished (d = 3 at level 1).
        shared = 0 if bool(nodes[0].any()) else 1
        outer = nodes[shared:]
        copies = max(1, round((self.num_features - shared) / len(outer)))
        rotated = [outer @ haar(self.head_dim, generator) for _ in range(copies)]
        rows = torch.cat([nodes[:shared], *rotated])
        return Draw(rows, torch.cat([weights[:shared], (weights[shared:] / copies).repeat(copies)]))


class SphericalRadial(SampledWeight):
    r"""Stochastic spherical-radial rules: unbiased for every integrand, exact for low degree in every draw.

    Degree 3, with :math:`v_j` the d + 1 corners of a regular simplex, :math:`Q_b` Haar and
    :math:`\rho_b^2 \sim \chi^2_{d+2}`, b = 1 .. B:

    .. math:: \omega = \pm\rho_b Q_b v_j, \; a = \frac{d}{2 (d+1) \rho_b^2 B}; \qquad
              \omega_0 = 0, \; a_0 = 1 - \frac1B \sum_b \frac{d}{\rho_b^2}

    Every draw has :math:`\sum a = 1`, :math:`\sum a\omega = 0`, :math:`\sum a\omega\omega^\top = I`. The
    weight :math:`a_0` is negative in almost half of the draws, so features are signed; clipping it would
    bias the rule. Degree 1 is the antithetic pair: rows [W; -W] of a Gaussian W, weights 1/m.

    Args:
        head_dim: d, at least 1.
        num_features: The number of rows to come near to. Degree 3 has 1 + 2(d+1)B rows with
            B = max(1, round((m - 1) / (2d + 2))); degree 1 rounds m up to the next even number.
        num_heads: Independent copies; ``None`` for one that heads share.
        degree: 3 or 1.
        generator: CPU generator, the only source of randomness.

    Raises:
        ValueError: If a size is not a positive integer or ``degree`` is neither 1 nor 3.

    References:
        Munkhoeva et al., Quadrature-based features for kernel approximation, arXiv 1802.03832.
    """

    def __init__(
        self,
        head_dim: int,
        num_features: int,
        *,
        num_heads: int | None = None,
        degree: Literal[1, 3] = 3,
        generator: torch.Generator,
    ) -> None:
        require_integer("degree", degree)
        if degree not in (1, 3):
            raise ValueError(f"degree is {degree}; expected 1 or 3; nearest: 3")
        self.degree = degree
        self.signed = degree == 3
        super().__init__(head_dim, num_features, num_heads=num_heads, generator=generator)

    def sample(self, generator: torch.Generator) -> Draw:
        d, m = self.head_dim, self.num_features
        if self.degree == 1:
            half = torch.randn((m + 1) // 2, d, generator=generator, dtype=torch.float64)
            return Draw(torch.cat((half, -half)))
        blocks = max(1, round((m - 1) / (2 * d + 2)))
        corners = simplex(d + 1)
        radius = chi(d + 2, blocks, generator)
        rotations = torch.stack([haar(d, generator) for _ in range(blocks)])
        outer = (radius[:, None, None] * (corners @ rotations)).reshape(-1, d)
        weight = (d / (2 * (d + 1) * blocks) / radius.square()).repeat_interleave(d + 1)
        centre = 1 - (d / radius.square()).mean()
        rows = torch.cat((torch.zeros(1, d, dtype=torch.float64), outer, -outer))
        return Draw(rows, torch.cat((centre[None], weight, weight)))
