"""Rows from well spread points of the cube or the sphere: qmc, ssf."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..checks import require_choice, require_flag, require_integer
from .base import Draw, SampledWeight, haar

_EDGE = 2.0**-31
# The largest number below 1 that single precision can hold: a stored point must stay inside the open cube.
BELOW_ONE = 1.0 - 2.0**-24


def sobol(m: int, d: int, generator: torch.Generator | None) -> Tensor:  # (m, d)
    """Returns m Sobol points in d dimensions, float64, in [2**-31, 1 - 2**-31]; scrambled with a generator.

    Torch's points have 30 bits; the centre of each cell is returned, so that no point is at 0 and the law of
    a scrambled point is symmetric. Without scrambling the first point, the origin, is left out.
    """
    if generator is None:
        engine = torch.quasirandom.SobolEngine(d)  # type: ignore[no-untyped-call]
        engine.fast_forward(1)  # type: ignore[no-untyped-call]
    else:
        seed = int(torch.randint(2**62, (), generator=generator))
        engine = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    return engine.draw(m, dtype=torch.float64) + _EDGE


def require_sobol_dimension(d: int) -> None:
    """Raises ``ValueError`` if there is no Sobol sequence in d dimensions."""
    limit = torch.quasirandom.SobolEngine.MAXDIM
    if d > limit:
        raise ValueError(f"head_dim is {d}; Sobol points have at most {limit} dimensions; nearest: {limit}")


def _primes(count: int) -> list[int]:
    found: list[int] = []
    candidate = 2
    while len(found) < count:
        if _is_prime(candidate):
            found.append(candidate)
        candidate += 1
    return found


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, math.isqrt(n) + 1))


def halton(m: int, d: int, generator: torch.Generator | None) -> Tensor:  # (m, d)
    """Returns m Halton points in d dimensions, float64; a generator permutes every digit at random.

    A shift modulo 1 would be unbiased too, but leaves dimensions whose primes exceed m on straight lines.

    References:
        Owen, A randomized Halton algorithm in R, arXiv 1706.02808.
    """
    points = torch.zeros(m, d, dtype=torch.float64)
    start = 1 if generator is None else 0
    for column, base in enumerate(_primes(d)):
        rest = torch.arange(start, start + m)
        unit = 1.0
        while unit > _EDGE:
            unit /= base
            digit = rest % base
            if generator is not None:
                digit = torch.randperm(base, generator=generator)[digit]
            points[:, column] += digit.to(torch.float64) * unit
            rest = rest // base
        if generator is not None:
            points[:, column] += torch.rand(m, generator=generator, dtype=torch.float64) * unit
    return points


class QuasiMonteCarlo(SampledWeight):
    r"""The normal quantile of a low-discrepancy sequence: unbiased if scrambled, variance below Monte Carlo.

    .. math:: \omega_i = \Phi^{-1}(u_i), \quad u_1, \dots, u_m \in (0, 1)^d

    A scrambled point is uniform in the cube, so its row is Gaussian. Unscrambled, the rule is one fixed set
    of points and :meth:`redraw` changes nothing.

    Args:
        head_dim: d, at least 1; at most 21 201 for Sobol.
        num_features: m, at least 1; for Sobol a power of two keeps the points balanced.
        num_heads: Independent copies; ``None`` for one that heads share.
        sequence: ``"sobol"`` or ``"halton"``; Sobol is the better one in more than ten dimensions.
        scramble: Randomise the points.
        generator: CPU generator, the only source of randomness.

    Raises:
        ValueError: If a size is not a positive integer, an option is unknown, or d exceeds the Sobol tables.

    References:
        Avron, Sindhwani, Yang and Mahoney, Quasi-Monte Carlo feature maps for shift-invariant kernels,
        arXiv 1412.8293.
    """

    def __init__(
        self,
        head_dim: int,
        num_features: int,
        *,
        num_heads: int | None = None,
        sequence: Literal["sobol", "halton"] = "sobol",
        scramble: bool = True,
        generator: torch.Generator,
    ) -> None:
        require_integer("head_dim", head_dim)
        require_choice("sequence", sequence, ("sobol", "halton"))
        require_flag("scramble", scramble)
        if sequence == "sobol":
            require_sobol_dimension(head_dim)
        self.sequence = sequence
        self.scramble = scramble
        self.claim = "unbiased" if scramble else "deterministic"
        super().__init__(head_dim, num_features, num_heads=num_heads, generator=generator)

    def sample(self, generator: torch.Generator) -> Draw:
        points = sobol if self.sequence == "sobol" else halton
        u = points(self.num_features, self.head_dim, generator if self.scramble else None)
        u = u.clamp(_EDGE, 1 - _EDGE)
        return Draw(torch.special.ndtri(u), uniform=u.clamp(max=BELOW_ONE))


def chi_quantile(u: Tensor, d: int) -> Tensor:
    """Quantile of the chi law with d degrees of freedom, u in (0, 1), float64, by bisection."""
    # Laurent and Massart (2000): a chi-square exceeds d + 2 sqrt(d t) + 2 t with probability at most exp(-t).
    t = -torch.log1p(-u)
    low, high = torch.zeros_like(u), (d + 2 * (d * t).sqrt() + 2 * t).sqrt()
    shape = torch.full_like(u, d / 2)
    for _ in range(60):  # past the last bit of a double
        middle = (low + high) / 2
        below = torch.special.gammainc(shape, middle.square() / 2) < u
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def _subgroup(order: int, prime: int) -> list[int]:
    """The residues of multiplicative order dividing ``order`` modulo ``prime``; order divides prime - 1."""
    exponent = (prime - 1) // order
    for base in range(1, prime):
        generator = pow(base, exponent, prime)
        members = [pow(generator, j, prime) for j in range(order)]
        if len(set(members)) == order:
            return members
    raise AssertionError(f"{prime} has no subgroup of order {order}")


def spherical_points(d: int, count: int) -> Tensor:  # (2 N, d)
    r"""At least ``count`` unit vectors in even dimension d with :math:`\sum v v^\top = (2N/d) I`, float64.

    .. math:: V = h^{-1/2} \begin{bmatrix} \mathrm{Re}\,F & -\mathrm{Im}\,F \\
              \mathrm{Im}\,F & \mathrm{Re}\,F \end{bmatrix}, \quad
              F_{jl} = e^{2\pi i \Lambda_j l / N}, \quad h = d/2

    with N the least prime of the form 1 + h t and 2N >= count, :math:`\Lambda` its subgroup of order h, which
    keeps the coherence of the rows of F low. The vectors are the columns of V.
    """
    half = d // 2
    steps = 1
    while not (_is_prime(1 + half * steps) and 2 * (1 + half * steps) >= count):
        steps += 1
    prime = 1 + half * steps
    residues = torch.tensor(_subgroup(half, prime))
    phase = (residues[:, None] * torch.arange(prime) % prime).to(torch.float64) * (2 * math.pi / prime)
    real, imag = phase.cos(), phase.sin()
    top, bottom = torch.cat((real, -imag), dim=1), torch.cat((imag, real), dim=1)
    return torch.cat((top, bottom)).T / math.sqrt(half)


class SphericalStructured(SampledWeight):
    r"""Well spread directions on the sphere with stratified chi radii: unbiased if rotated.

    .. math:: \omega_i = r_i\, Q v_i, \quad Q \text{ Haar}, \quad
              r_i = F_{\chi_d}^{-1}\bigl((\pi(i) + U_i)/m\bigr), \quad U_i \sim U(0, 1)

    with :math:`v_i` a random subset of the 2N columns of a partial Fourier matrix, N prime, and :math:`\pi`
    a random permutation. An odd d is served in d + 1 dimensions with the last column dropped. Without the
    rotation the directions belong to one fixed set, and the rule is **biased**; radii and subset are still
    random, so :meth:`redraw` still acts.

    Args:
        head_dim: d, at least 1.
        num_features: m, at least 1.
        num_heads: Independent copies; ``None`` for one that heads share.
        rotate: Apply Q.
        generator: CPU generator, the only source of randomness.

    Raises:
        ValueError: If a size is not a positive integer or ``rotate`` is not a bool.

    References:
        Lyu, Spherical structured feature maps for kernel approximation, ICML 2017.
    """

    def __init__(
        self,
        head_dim: int,
        num_features: int,
        *,
        num_heads: int | None = None,
        rotate: bool = True,
        generator: torch.Generator,
    ) -> None:
        require_flag("rotate", rotate)
        self.rotate = rotate
        self.gaussian_rows = rotate
        self.claim = "unbiased" if rotate else "deterministic"
        super().__init__(head_dim, num_features, num_heads=num_heads, generator=generator)

    def sample(self, generator: torch.Generator) -> Draw:
        d, m = self.head_dim, self.num_features
        even = d + d % 2
        points = spherical_points(even, m)
        directions = points[torch.randperm(points.shape[0], generator=generator)[:m]]
        if self.rotate:
            directions = directions @ haar(even, generator)
        stratum = torch.randperm(m, generator=generator)
        u = (stratum + torch.rand(m, generator=generator, dtype=torch.float64)) / m
        radius = chi_quantile(u.clamp(_EDGE, 1 - _EDGE), even)
        return Draw((directions * radius[:, None])[:, :d].contiguous())
