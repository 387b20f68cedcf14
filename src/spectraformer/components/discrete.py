r"""Discretely induced features: powers of the coordinates with random integer exponents.

For any law p on 0, 1, 2, ... and exponents drawn independently, :math:`w_l\sim p`,

.. math:: \varphi(x) = \prod_l x_l^{w_l}\,(w_l!\,p_{w_l})^{-1/2},\qquad E\,\varphi(x)\varphi(y) = e^{x\cdot y}

by the Taylor series of the exponential. The exponents come from the rows of W through the quantile function of p,
:math:`w = Q(\Phi(\omega))`, so a row has the right law exactly if :math:`\omega\sim N(0,I)`. Features are signed
where coordinates are; the versions with a plus first translate all tokens to positive coordinates.

References:
    Likhosherstov et al., Chefs' Random Tables, arXiv 2205.15317.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from spectraformer.components.base import ComponentFunction, Parameters, Tokens
from spectraformer.components.pairs import Exponential, Features, Signed, with_key_signs, with_signs
from spectraformer.components.statistics import Moments
from spectraformer.weights.base import Projection

# log|x| of a coordinate that is exactly 0; its powers then underflow to 0, except the power 0.
SMALLEST_COORDINATE = 1e-30
# Any rate is unbiased, so clamping it only costs variance; the table of the distribution stays finite.
RATE_RANGE = (1e-4, 100.0)
RATE_TABLE = 256  # 15 standard deviations above the largest rate
PROBABILITY_GRID = 64
# What keeps translated coordinates positive, in root mean squares of a coordinate.
POSITIVE_MARGIN = 1e-2


class DiscreteFeatures(ComponentFunction):
    """What Poisson and geometric features share: exponents are landmarks that act on log|x|."""

    positive = False
    needs_gaussian_rows = True
    order = "diagonal"

    def feature_dim(self, num_rows: int) -> int:
        """One a row."""
        return num_rows

    @abstractmethod
    def exponents(self, projection: Projection, parameter: Tensor) -> Tensor:
        """Integer exponents w, (b, h, m, d), for a parameter of the law, (b, p)."""

    @abstractmethod
    def log_coefficient(self, exponents: Tensor, parameter: Tensor) -> Tensor:
        """Log of what multiplies the powers of |x| in one feature, (b, h, m)."""

    def forward(self, tokens: Tokens, projection: Projection, parameters: Parameters) -> Exponential | Signed:
        """Features of queries and keys."""
        assert parameters.law is not None
        w = self.exponents(projection, parameters.law)
        half = self.log_coefficient(w, parameters.law) + 0.5 * projection.log_abs_weight
        if self.needs_minimum:
            return self._positive(tokens, projection, w, half)
        half, sign = half.unsqueeze(-2), projection.sign_weight.unsqueeze(-2)

        def query_features(x: Tensor) -> Features:
            log = _log_abs(x) @ w.to(x.dtype).mT + half.to(x.dtype)
            odd = torch.remainder((x < 0).to(x.dtype) @ w.to(x.dtype).mT, 2)
            return Features(log, 1 - 2 * odd)

        return tokens.signed(query_features, with_key_signs(query_features, sign), self.feature_dim(w.shape[-2]))

    def _positive(self, tokens: Tokens, projection: Projection, w: Tensor, half: Tensor) -> Exponential | Signed:
        """All coordinates are positive after the translation: an exponential of log x."""
        dtype = tokens.dtype
        pair = Exponential(
            _log_abs(tokens.query),
            _log_abs(tokens.key),
            w.to(dtype),
            w.to(dtype),
            2 * half.to(dtype),
            lambda: tokens.key_bias(None),
            tokens.query_bias(None),
        )
        return with_signs(pair, projection)


def _log_abs(x: Tensor) -> Tensor:
    return x.abs().clamp_min(SMALLEST_COORDINATE).log()


def _log_upper_tail(projection: Projection) -> Tensor:  # (g, m, d), float64
    """log(1 - u) of the uniforms behind the rows, accurate in the upper tail."""
    if projection.uniform is not None:
        return torch.log1p(-projection.uniform.double())
    tail: Tensor = torch.special.log_ndtr(-projection.omega.detach().double())
    return tail


class PoisRF(DiscreteFeatures):
    r"""Poisson features, with the rate that minimises the mean log second moment.

    .. math:: \varphi(x) = e^{\lambda d/2}\prod_l (x_l/\sqrt\lambda)^{w_l},\quad w_l\sim\mathrm{Poisson}(\lambda),\quad
        \lambda^* = \Bigl(\tfrac1d\sum_l E x_l^2\, E y_l^2\Bigr)^{1/2}

    References:
        Likhosherstov et al., Chefs' Random Tables, arXiv 2205.15317.
    """

    def fit(self, q: Moments, k: Moments) -> Parameters:
        """lambda*, within the range of the table."""
        rate = (q.diagonal * k.diagonal).mean(-1).sqrt()
        return Parameters(law=rate.clamp(*RATE_RANGE))

    def exponents(self, projection: Projection, parameter: Tensor) -> Tensor:
        """The Poisson quantiles of the rows' uniforms, looked up in a table of the distribution function."""
        upper = _log_upper_tail(projection).unsqueeze(0)  # (1, g, m, d)
        rate = parameter.double().unsqueeze(-1)  # (b, p, 1)
        counts = torch.arange(RATE_TABLE, dtype=torch.float64, device=rate.device)
        log_mass = counts * rate.log() - rate - torch.lgamma(counts + 1)
        table = log_mass.exp().cumsum(-1)  # (b, p, k)
        b, h = table.shape[0], max(upper.shape[1], table.shape[1])
        u = -torch.expm1(upper.expand(b, h, *upper.shape[2:]))
        found = torch.searchsorted(table.expand(b, h, RATE_TABLE).contiguous(), u.flatten(2).contiguous())
        return found.clamp_max(RATE_TABLE - 1).view(u.shape)

    def log_coefficient(self, exponents: Tensor, parameter: Tensor) -> Tensor:
        """Lambda d / 2 - log(lambda) / 2 * sum_l w_l."""
        rate = parameter.unsqueeze(-1)
        return 0.5 * rate * self.head_dim - 0.5 * rate.log() * exponents.sum(-1)


class GeomRF(DiscreteFeatures):
    r"""Geometric features, with the success probability that minimises the mean log second moment.

    .. math:: \varphi(x) = p^{-d/2}\prod_l \frac{x_l^{w_l}}{\sqrt{w_l!}\,(1-p)^{w_l/2}},\quad
        P(w_l=k) = p(1-p)^k

    The second moment is :math:`p^{-d}\prod_l I_0(2|x_ly_l|/\sqrt{1-p})`; p* is its minimiser on a grid, with
    |x_l y_l| replaced by :math:`\sqrt{E x_l^2\,E y_l^2}`.

    References:
        Likhosherstov et al., Chefs' Random Tables, arXiv 2205.15317.
    """

    def fit(self, q: Moments, k: Moments) -> Parameters:
        """p* on a grid of (0, 1)."""
        size = (q.diagonal * k.diagonal).sqrt()  # (b, p, d)
        grid = torch.arange(1, PROBABILITY_GRID, device=size.device, dtype=size.dtype) / PROBABILITY_GRID
        z = 2 * size.unsqueeze(-2) / torch.sqrt(1 - grid).unsqueeze(-1)  # (b, p, k, d)
        objective = (torch.special.i0e(z).log() + z).sum(-1) - self.head_dim * grid.log()
        return Parameters(law=grid[objective.argmin(-1)])

    def exponents(self, projection: Projection, parameter: Tensor) -> Tensor:
        """The geometric quantiles of the rows' uniforms, in closed form."""
        upper = _log_upper_tail(projection).unsqueeze(0)
        failure = torch.log1p(-parameter.double())[..., None, None]  # (b, p, 1, 1)
        return torch.floor(upper / failure)

    def log_coefficient(self, exponents: Tensor, parameter: Tensor) -> Tensor:
        """-log(1 - p) / 2 * sum_l w_l - sum_l log(w_l!) / 2 - d log(p) / 2."""
        p = parameter.double().unsqueeze(-1)
        factorials = torch.lgamma(exponents.double() + 1).sum(-1)
        log = -0.5 * torch.log1p(-p) * exponents.sum(-1) - 0.5 * factorials
        return (log - 0.5 * self.head_dim * p.log()).to(parameter.dtype)


class PositiveCoordinates(DiscreteFeatures):
    """Discrete features of tokens translated to positive coordinates, in float64.

    Exponents of tens times log-coordinates sum to thousands, of which products of features leave a difference of
    order 1.
    """

    positive = True
    needs_minimum = True
    needs_float64 = True

    def shift(self, q: Moments, k: Moments) -> Tensor:
        """The least coordinates of all tokens, less a margin."""
        size = (q.diagonal + k.diagonal).mean(-1, keepdim=True).sqrt()
        margin = POSITIVE_MARGIN * size + torch.finfo(size.dtype).tiny
        assert q.minimum is not None and k.minimum is not None
        return torch.minimum(q.minimum, k.minimum) - margin


class PoisRFPlus(PositiveCoordinates, PoisRF):
    """Poisson features of tokens translated to positive coordinates: positive, for small norms.

    References:
        Likhosherstov et al., Chefs' Random Tables, arXiv 2205.15317.
    """


class GeomRFPlus(PositiveCoordinates, GeomRF):
    """Geometric features of tokens translated to positive coordinates: positive, for small norms.

    References:
        Likhosherstov et al., Chefs' Random Tables, arXiv 2205.15317.
    """
