r"""Dense exponential features: a quadratic form of the row, and full d x d maps of the tokens.

.. math:: \log\varphi(x) = \tfrac14\log\det(I-4A) + \omega^\top A\,\omega + \omega^\top B x + x^\top C x

with :math:`B_q^\top(I-4A)^{-1}B_k = I` and :math:`C = -\tfrac12 B^\top(I-4A)^{-1}B` estimates
:math:`e^{x\cdot y}` without bias for any complex symmetric A with :math:`\mathrm{Re}(I-4A)\succ0`.

References:
    Likhosherstov et al., FAVOR#, arXiv 2302.00787, Theorem 4.1.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from spectraformer.checks import require_number
from spectraformer.components.base import ComponentFunction, Parameters, Tokens, minus_half_sqnorm
from spectraformer.components.exponential import OPRF, RIDGE
from spectraformer.components.pairs import Exponential, Features, Signed, with_signs
from spectraformer.components.statistics import Moments, Order, optimal_rho
from spectraformer.weights.base import Projection


def symmetric_power(matrix: Tensor, power: float) -> Tensor:  # (..., d, d)
    """A power of a symmetric positive definite matrix, by its eigenvalues."""
    values, vectors = eigh(matrix)
    floor = values.amax(-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny) * 1e-14
    scaled = vectors * values.maximum(floor).pow(power).unsqueeze(-2)
    return torch.matmul(scaled, vectors.mT)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:  # (..., d), (..., d, d)
    """Eigenvalues and eigenvectors; of the identity where the matrix is not finite, which would end the whole batch."""
    bad = ~matrix.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    values, vectors = torch.linalg.eigh(torch.where(bad, eye, matrix))
    return values, vectors


def _ridged(matrix: Tensor) -> Tensor:
    """A second moment kept well away from singular: with fewer tokens than dims its inverse would amplify rounding."""
    trace = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = RIDGE * trace + torch.finfo(torch.float32).tiny
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix + ridge[..., None, None] * eye


class ADERF(OPRF):
    r"""Asymmetric dense features: OPRF after the linear map that balances queries against keys.

    .. math:: P = M_q^{-1}\,\#\,M_k
        = M_q^{-1/2}(M_q^{1/2}M_kM_q^{1/2})^{1/2}M_q^{-1/2},\qquad x\to P^{1/2}x,\ y\to P^{-1/2}y

    the geometric mean of the second moments, which minimises the mean of |T_q x + T_k y|^2 over all T_q^T T_k = I.
    Costs three symmetric eigendecompositions of d x d a sequence and head.

    References:
        Likhosherstov et al., FAVOR#, arXiv 2302.00787 (the same up to a rotation).
    """

    order: ClassVar[Order] = "full"
    packs: ClassVar[bool] = False

    def fit(self, q: Moments, k: Moments) -> Parameters:
        """P^(1/2), its inverse, and rho of the balanced tokens; in float64."""
        m1, m2 = _ridged(q.matrix.double()), _ridged(k.matrix.double())
        root, inverse_root = symmetric_power(m1, 0.5), symmetric_power(m1, -0.5)
        middle = symmetric_power(root @ m2 @ root, 0.5)
        geometric = inverse_root @ middle @ inverse_root
        b1 = symmetric_power(geometric, 0.5)
        b2 = symmetric_power(geometric, -0.5)
        balanced = (b1 @ m1 @ b1 + b2 @ m2 @ b2).diagonal(dim1=-2, dim2=-1).sum(-1)
        phi = (balanced + 2 * (q.mean * k.mean).sum(-1).double()).clamp_min(0.0)
        dtype = q.mean.dtype
        return Parameters(optimal_rho(phi, self.head_dim).to(dtype), b1.to(dtype), b2.to(dtype))


class SDERF(ComponentFunction):
    r"""Symmetric dense features: one optimal coefficient for each principal axis of x + y.

    With :math:`E(x+y)(x+y)^\top = Q\Lambda Q^\top` and a_l the optimum of OPRF for d = 1 and phi = Lambda_l:

    .. math:: \log\varphi(x) = \sum_l\bigl[\tfrac14\log(1-4a_l) + a_l\omega_l^2
        + \sqrt{1-4a_l}\,\omega_l\,(Q^\top x)_l\bigr] - \tfrac12|x|^2

    The code uses :math:`Q^\top\omega`, of the same law, for :math:`\omega`: the features are then functions of the
    matrix :math:`Q\,\mathrm{diag}(a)\,Q^\top`, whatever eigenvectors rounding picks where eigenvalues meet.

    References:
        Likhosherstov et al., FAVOR#, arXiv 2302.00787.
    """

    order: ClassVar[Order] = "full"

    def feature_dim(self, num_rows: int) -> int:
        """One a row."""
        return num_rows

    def fit(self, q: Moments, k: Moments) -> Parameters:
        """Q^T and a from the eigenvectors of the mean of (x + y)(x + y)^T; in float64."""
        cross = q.mean.unsqueeze(-1) * k.mean.unsqueeze(-2)
        total = (q.matrix + k.matrix + cross + cross.mT).double()
        values, vectors = eigh(total)
        coefficients = (1 - 1 / optimal_rho(values.clamp_min(0.0), 1)) / 8
        dtype = q.mean.dtype
        return Parameters(query_transform=vectors.mT.to(dtype), coefficients=coefficients.to(dtype))

    def forward(self, tokens: Tokens, projection: Projection, parameters: Parameters) -> Exponential | Signed:
        """Features of queries and keys."""
        assert parameters.query_transform is not None and parameters.coefficients is not None
        axes = parameters.query_transform.to(projection.omega.dtype)  # (b, p, d, d)
        omega = projection.omega.unsqueeze(0) @ axes.mT  # (b, h, m, d)
        a = parameters.coefficients.to(omega.dtype).unsqueeze(-2)  # (b, p, 1, d)
        stretch = 1 - 4 * a
        constant = 0.25 * stretch.log().sum(-1)  # (b, p, 1)
        bias = 2 * (constant + (a * omega.square()).sum(-1)) + projection.log_abs_weight
        landmarks = (omega * stretch.sqrt()) @ axes
        return with_signs(
            tokens.exponential(landmarks, landmarks, bias, minus_half_sqnorm, minus_half_sqnorm), projection
        )


class CDERF(ComponentFunction):
    r"""Complex dense features: learned complex diagonal A and complex d x d map, the family of all others.

    In terms of :math:`S = (I-4A)^{1/2}` (diagonal) and any invertible complex G the constraints hold by construction:

    .. math:: \log\varphi_q(x) = \tfrac12\sum_l\log S_l + \sum_l \tfrac{1-S_l^2}4\omega_l^2
        + \omega^\top S\tilde x - \tfrac12\tilde x^\top\tilde x,\qquad \tilde x = Gx

    and the same for keys with :math:`\tilde y = G^{-\top}y`. Real features are
    :math:`[\mathrm{Re},\mathrm{Im}]` of the query side and :math:`[\mathrm{Re},-\mathrm{Im}]` of the key side. The
    parameters eta and nu give :math:`S_l^2 = \tfrac12(1+e^{\eta_l}) + 2i\nu_l\,\mathrm{Re}\,S_l` with
    :math:`\mathrm{Re}(1-8A) = e^{\eta} > 0`, so the variance is finite whatever they become.

    At the start A = 0 and G = e^{i angle} I: angle 0 is PosRF, pi/2 is TrigRF.

    Args:
        head_dim: d.
        num_heads: Heads with parameters of their own; None for one set.
        generator: Unused; there is no randomness in f.
        angle: Phase of G at the start, in radians.

    References:
        Likhosherstov et al., FAVOR#, arXiv 2302.00787, Theorem 4.1 for complex parameters.
    """

    positive = False

    def __init__(
        self,
        head_dim: int,
        *,
        num_heads: int | None = None,
        generator: torch.Generator,
        angle: float = math.pi / 4,
    ) -> None:
        super().__init__(head_dim, num_heads=num_heads, generator=generator)
        require_number("angle", angle, -math.inf, math.inf, "a finite number of radians")
        p = num_heads or 1
        eye = torch.eye(head_dim).expand(p, head_dim, head_dim)
        self.eta = nn.Parameter(torch.zeros(p, head_dim))
        self.nu = nn.Parameter(torch.zeros(p, head_dim))
        self.map_real = nn.Parameter(math.cos(angle) * eye.clone())
        self.map_imag = nn.Parameter(math.sin(angle) * eye.clone())

    def feature_dim(self, num_rows: int) -> int:
        """Two a row."""
        return 2 * num_rows

    def forward(self, tokens: Tokens, projection: Projection, parameters: Parameters) -> Signed:
        """Features of queries and keys; differentiable in every parameter."""
        omega = projection.omega  # (g, m, d)
        real = torch.sqrt(0.5 * (1 + self.eta.exp()) + self.nu.square())  # Re S, (p, d)
        imag = self.nu
        log_modulus = 0.5 * torch.log(real.square() + imag.square())
        angle = torch.atan2(imag, real)
        squared = omega.square()
        quadratic_real = (1 - real.square() + imag.square()) / 4
        quadratic_imag = -real * imag / 2
        log = 0.5 * log_modulus.sum(-1, keepdim=True) + (squared * quadratic_real.unsqueeze(-2)).sum(-1)
        log = log + 0.5 * projection.log_abs_weight  # (g, m)
        phase = 0.5 * angle.sum(-1, keepdim=True) + (squared * quadratic_imag.unsqueeze(-2)).sum(-1)
        rows_real = (omega * real.unsqueeze(-2)).mT  # (g, d, m)
        rows_imag = (omega * imag.unsqueeze(-2)).mT

        def features(map_real: Tensor, map_imag: Tensor, conjugate: float, sign: Tensor | None):  # type: ignore[no-untyped-def]
            def of(x: Tensor) -> Features:
                xr, xi = x @ map_real.mT.to(x.dtype), x @ map_imag.mT.to(x.dtype)
                size = 0.5 * (xr.square() - xi.square()).sum(-1, keepdim=True)
                turn = (xr * xi).sum(-1, keepdim=True)
                rr, ri = rows_real.to(x.dtype), rows_imag.to(x.dtype)
                exponent = xr @ rr - xi @ ri - size + log.to(x.dtype).unsqueeze(-2)
                argument = xr @ ri + xi @ rr - turn + phase.to(x.dtype).unsqueeze(-2)
                both = torch.cat((argument.cos(), conjugate * argument.sin()), dim=-1)
                if sign is not None:
                    both = both * sign.to(x.dtype)
                return Features(torch.cat((exponent, exponent), dim=-1), both)

            return of

        inverse_real, inverse_imag = _complex_inverse(self.map_real, self.map_imag)
        return tokens.signed(
            features(self.map_real, self.map_imag, 1.0, None),
            features(inverse_real.mT, inverse_imag.mT, -1.0, projection.sign_weight.repeat(1, 2).unsqueeze(-2)),
            self.feature_dim(omega.shape[-2]),
        )


def _complex_inverse(real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of (real + i imag)^-1, through the real 2d x 2d form that every backend compiles."""
    d = real.shape[-1]
    block = torch.cat((torch.cat((real, -imag), -1), torch.cat((imag, real), -1)), -2)
    inverse = torch.linalg.inv(block)
    return inverse[..., :d, :d], inverse[..., d:, :d]
