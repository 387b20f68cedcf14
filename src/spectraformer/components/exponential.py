r"""Positive features whose exponent is affine in the token: PosRF and its antithetic, generalised, optimal kin.

All are special cases of one estimator. With :math:`\rho = 1/(1-8A)`, a linear map T_q of queries and T_k of keys,
:math:`T_q^\top T_k = I`, and :math:`\omega\sim N(0, I_d)`:

.. math::
    \log\varphi(x) = \tfrac d4\log\tfrac{1+\rho}{2\rho} - \tfrac{1-\rho}{8\rho}|\omega|^2
        + \sqrt{\tfrac{1+\rho}{2\rho}}\;\omega\cdot T x - \tfrac12|T x|^2

has :math:`E\,\varphi(x)\varphi(y) = e^{x\cdot y}` and relative second moment
:math:`((1+\rho)^2/4\rho)^{d/2}\, e^{\rho|T_q x+T_k y|^2}`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spectraformer.checks import require_number
from spectraformer.components.base import ComponentFunction, Parameters, Tokens, minus_half_sqnorm
from spectraformer.components.pairs import Exponential, Features, Signed, with_key_signs, with_signs
from spectraformer.components.statistics import Moments, Order, mean_squared_sum, optimal_rho
from spectraformer.components.trigonometric import Trigonometric
from spectraformer.ops.triton import optimal as fused
from spectraformer.weights.base import Projection

# Added to second moments before they are inverted, relative to their mean: with fewer tokens than dims they are
# singular, and the inverse would amplify rounding. Any transform is unbiased, so this only costs variance.
RIDGE = 1e-4


def generalized_exponential(
    tokens: Tokens,
    projection: Projection,
    rho: Tensor | None = None,  # (b | 1, p)
    query_transform: Tensor | None = None,  # (b | 1, p, d) or (b | 1, p, d, d)
    key_transform: Tensor | None = None,  # likewise
) -> Exponential:
    """The module's estimator as landmarks; rho = None is 1, a transform None is the identity."""
    omega, bias = projection.derived(  # (1, g, m, d), (1, g, m)
        "of one item", lambda: (projection.omega.unsqueeze(0), projection.log_abs_weight.unsqueeze(0))
    )
    fixed = rho is None and query_transform is None and key_transform is None
    if rho is not None:
        half, start = projection.derived("half sqnorm", lambda: _halves(projection))
        # As few operations as there are: each is a launch. (1 - rho) / 4 rho is (ratio - 1) / 2.
        ratio = torch.rsub(rho.to(omega.dtype).reciprocal(), 0.5, alpha=-0.5).unsqueeze(-1)  # (b | 1, p, 1)
        bias = torch.addcmul(start, ratio, half, value=-1).add(ratio.log(), alpha=0.5 * omega.shape[-1])
        omega = omega * ratio.sqrt().unsqueeze(-1)
    return tokens.exponential(
        _rows_times(omega, query_transform),
        _rows_times(omega, key_transform),
        bias,
        lambda x: minus_half_sqnorm(_transformed(x, query_transform)),
        minus_half_sqnorm if key_transform is None else lambda y: minus_half_sqnorm(_transformed(y, key_transform)),
        -0.5 * key_transform.square() if key_transform is not None and key_transform.ndim == 3 else None,
        projection,
        fixed,
    )


def _optimal_exponential(tokens: Tokens, projection: Projection, q: Moments, k: Moments) -> Exponential | None:
    """The features of the optimal rho in one launch, where W is one that it takes; else None."""
    if len(projection.omega) not in (1, q.mean.shape[1]) or fused.refusals(projection.omega, projection.log_abs_weight):
        return None
    half, start = projection.derived("half sqnorm", lambda: _halves(projection))
    landmarks, bias = fused.optimal_landmarks(q.mean, q.second, k.mean, k.second, projection.omega, half, start)
    return tokens.exponential(landmarks, landmarks, bias, minus_half_sqnorm, minus_half_sqnorm, projection=projection)


def _halves(projection: Projection) -> tuple[Tensor, Tensor]:  # (1, g, m) each
    """|omega|^2 / 2, and the log-weights plus it."""
    half = 0.5 * projection.sqnorm.unsqueeze(0)
    return half, projection.log_abs_weight.unsqueeze(0) + half


def _rows_times(omega: Tensor, transform: Tensor | None) -> Tensor:
    """Landmarks that act on x as omega acts on T x."""
    if transform is None:
        return omega
    transform = transform.to(omega.dtype)
    return omega * transform.unsqueeze(-2) if transform.ndim == 3 else omega @ transform


def _transformed(x: Tensor, transform: Tensor | None) -> Tensor:
    """T x."""
    if transform is None:
        return x
    transform = transform.to(x.dtype)
    return x * transform.unsqueeze(-2) if transform.ndim == 3 else x @ transform.mT


class PosRF(ComponentFunction):
    r"""Positive random features (FAVOR+).

    .. math:: \log\varphi_i(x) = \omega_i\cdot x - \tfrac12|x|^2

    Relative variance :math:`(e^{v^2}-1)/m` with :math:`v=|x+y|` for Gaussian rows; exact at x = -y.

    References:
        Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794, Lemma 1.
    """

    def feature_dim(self, num_rows: int) -> int:
        """One a row."""
        return num_rows

    def forward(self, tokens: Tokens, projection: Projection, parameters: Parameters) -> Exponential | Signed:
        """Features of queries and keys."""
        pair = generalized_exponential(tokens, projection)
        return with_signs(pair, projection)


class HypRF(ComponentFunction):
    r"""Antithetic positive features (FAVOR+, hyperbolic): each row and its negative.

    .. math:: \log\varphi_i^\pm(x) = \pm\omega_i\cdot x - \tfrac12|x|^2 - \tfrac12\log 2

    Relative variance :math:`(\cosh v^2-1)/m` with :math:`v=|x+y|` for m Gaussian rows.

    References:
        Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794, Lemma 1.
    """

    def feature_dim(self, num_rows: int) -> int:
        """Two a row."""
        return 2 * num_rows

    def forward(self, tokens: Tokens, projection: Projection, parameters: Parameters) -> Exponential | Signed:
        """Features of queries and keys."""

        def antithetic() -> Projection:
            both = torch.cat((projection.omega, -projection.omega), dim=-2)
            weight = (projection.log_abs_weight - math.log(2)).repeat(1, 2)
            kept: dict[Hashable, Any] | None = None if projection.kept is None else {}
            return Projection(both, weight, projection.sign_weight, signed=projection.signed, kept=kept)

        pair = generalized_exponential(tokens, projection.derived("antithetic", antithetic))
        return with_signs(pair, projection, copies=2)


class GERF(ComponentFunction):
    r"""Generalised exponential features with learned A, one a head.

    A = (1 - exp(eta)) / 8 with a parameter eta, so A < 1/8 always; eta = 0 is PosRF, eta > 0 bounds the features.

    .. math:: \log\varphi_i(x) = \tfrac d4\log(1-4A) + A|\omega_i|^2 + \sqrt{1-4A}\,\omega_i\cdot x - \tfrac12|x|^2

    With ``sign=-1`` the projection enters as a phase, which gives signed features:
    :math:`e^{\ldots + A|\omega|^2 + |x|^2/2}[\cos, \sin](\sqrt{1-4A}\,\omega\cdot x)`; A = 0 is TrigRF.

    Args:
        head_dim: d.
        num_heads: Heads with an eta of their own; None for one eta.
        generator: Unused; there is no randomness in f.
        sign: +1 for positive features, -1 for signed ones.
        initial_eta: Start of eta, any real number.

    References:
        Likhosherstov et al., Chefs' Random Tables, arXiv 2205.15317, Theorem 3.1.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        num_heads: int | None = None,
        generator: torch.Generator,
        sign: int = 1,
        initial_eta: float = 0.0,
    ) -> None:
        super().__init__(head_dim, num_heads=num_heads, generator=generator)
        if sign not in (1, -1):
            raise ValueError(f"sign is {sign!r}; expected 1 (positive features) or -1 (signed features)")
        require_number("initial_eta", initial_eta, -math.inf, math.inf, "a finite number")
        self.sign = sign
        self.positive = sign == 1
        self.trigonometric = sign == -1
        self.eta = nn.Parameter(torch.full((num_heads or 1,), float(initial_eta)))

    def feature_dim(self, num_rows: int) -> int:
        """One a row; two with sign = -1."""
        return num_rows if self.sign == 1 else 2 * num_rows

    def forward(self, tokens: Tokens, projection: Projection, parameters: Parameters) -> Exponential | Signed:
        """Features of queries and keys; differentiable in eta."""
        if self.sign == 1:
            pair = generalized_exponential(tokens, projection, torch.exp(-self.eta).unsqueeze(0))
            return with_signs(pair, projection)
        return self._signed(tokens, projection)

    def _signed(self, tokens: Tokens, projection: Projection) -> Trigonometric:
        quadratic = ((1 - self.eta.exp()) / 8).unsqueeze(-1)  # (p, 1)
        slope = torch.sqrt(1 - 4 * quadratic).unsqueeze(-1)  # (p, 1, 1)
        log = 0.25 * self.head_dim * torch.log1p(-4 * quadratic) + quadratic * projection.sqnorm
        log_weight = 2 * log + projection.log_abs_weight  # (g, m)
        log = (0.5 * log_weight).repeat(1, 2).unsqueeze(-2)  # (g, 1, 2 m)
        sign = projection.sign_weight.repeat(1, 2).unsqueeze(-2)
        rows = slope * projection.omega  # (g, m, d)

        def query_features(x: Tensor) -> Features:
            phase = x @ rows.to(x.dtype).mT
            half_sqnorm = 0.5 * x.square().sum(-1, keepdim=True)
            return Features(half_sqnorm + log.to(x.dtype), torch.cat((phase.cos(), phase.sin()), dim=-1))

        return Trigonometric(
            tokens, query_features, with_key_signs(query_features, sign), rows, log_weight, projection.sign_weight
        )


class OPRF(ComponentFunction):
    r"""Optimal positive features (FAVOR++): A in closed form from the data.

    rho minimises the mean log second moment over all pairs of a sequence and head, a function of
    :math:`\varphi = \mathrm{mean}\,|x_i+y_j|^2` alone (see :func:`~spectraformer.components.statistics.optimal_rho`).
    A <= 0, so features are bounded.

    References:
        Likhosherstov et al., Chefs' Random Tables, arXiv 2205.15317.
    """

    order: ClassVar[Order] = "trace"
    packs: ClassVar[bool] = True

    def feature_dim(self, num_rows: int) -> int:
        """One a row."""
        return num_rows

    def fit(self, q: Moments, k: Moments) -> Parameters:
        """Rho from the mean of |x + y|^2."""
        if not fused.refusals(q.mean, q.second, k.mean, k.second):
            return Parameters(moments=(q, k))
        return Parameters(rho=optimal_rho(mean_squared_sum(q, k), self.head_dim))

    def forward(self, tokens: Tokens, projection: Projection, parameters: Parameters) -> Exponential | Signed:
        """Features of queries and keys."""
        rho = parameters.rho
        if parameters.moments is not None:
            pair = _optimal_exponential(tokens, projection, *parameters.moments)
            if pair is not None:
                return with_signs(pair, projection)
            rho = optimal_rho(mean_squared_sum(*parameters.moments), self.head_dim)
        pair = generalized_exponential(tokens, projection, rho, parameters.query_transform, parameters.key_transform)
        return with_signs(pair, projection)


class SADERF(OPRF):
    r"""Simplified asymmetric dense features (FAVOR#): OPRF after a diagonal rescaling of queries against keys.

    .. math:: \Psi_l = (E y_l^2 / E x_l^2)^{1/4}, \qquad x \to \Psi x,\ y \to \Psi^{-1} y

    which leaves x . y alone and minimises the mean of :math:`|\Psi x+\Psi^{-1}y|^2`.

    References:
        Likhosherstov et al., FAVOR#: Sharp Attention Kernel Approximations via New Classes of Positive
        Random Features, arXiv 2302.00787.
    """

    order: ClassVar[Order] = "diagonal"

    def fit(self, q: Moments, k: Moments) -> Parameters:
        """Psi from the diagonals of the second moments, then rho from the rescaled tokens."""
        m1, m2 = _ridged(q.diagonal), _ridged(k.diagonal)
        psi = (m2 / m1).pow(0.25)
        phi = (psi.square() * m1 + m2 / psi.square() + 2 * q.mean * k.mean).sum(-1).clamp_min(0.0)
        return Parameters(optimal_rho(phi, self.head_dim), psi, 1 / psi)


def _ridged(diagonal: Tensor) -> Tensor:
    """Second moments kept away from 0: a coordinate that is 0 for every token must not divide by 0."""
    floor = RIDGE * diagonal.mean(-1, keepdim=True) + torch.finfo(diagonal.dtype).tiny
    return diagonal + floor
