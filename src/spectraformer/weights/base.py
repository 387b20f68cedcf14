r"""The contract of a weight matrix W, and what every family shares.

Legend of shapes, here and in every other file of this folder:
    g  independent copies of W: 1 (shared by all heads) or the number of heads
    m  rows omega_i of W, the random features before a component function acts on them
    d  head dim

A weight matrix is a quadrature rule: ``sum_i a_i f(omega_i)`` stands for the Gaussian mean
``E f(omega), omega ~ N(0, I_d)``. Most rules have equal weights ``a_i = 1/m``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from spectraformer.checks import require_integer
from spectraformer.ops.graph import is_plain

Claim = Literal["unbiased", "vanishing", "deterministic", "learned"]
"""What a rule promises for a Gaussian mean: exact in expectation; biased, the bias vanishing as d, m or
the order of the rule grows; one fixed rule, accurate for small norms; a learned law with its own kernel."""

T = TypeVar("T")
# Of all copies of a W: beyond it a mistyped number would take all memory before anything is said of it.
MOST_ENTRIES = 1 << 28


@dataclass(frozen=True)
class Projection:
    """One W, ready for a component function.

    Attributes:
        omega: Rows, (g, m, d).
        log_abs_weight: log |a_i|, (g, m).
        sign_weight: sign of a_i, +1 or -1, (g, m).
        uniform: Points of the unit cube behind the rows, (g, m, d), in (0, 1), if the family has them.
        signed: Whether the rule may have negative weights: a property of the rule, not of this draw.
        kept: What was derived of this W, where the same W is given again in later calls; see :meth:`derived`.
    """

    omega: Tensor
    log_abs_weight: Tensor
    sign_weight: Tensor
    uniform: Tensor | None = None
    signed: bool = False
    kept: dict[Hashable, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def sqnorm(self) -> Tensor:
        """Squared row norms |omega_i|^2 of the rows as they are, (g, m)."""
        return self.derived("sqnorm", lambda: self.omega.square().sum(-1))

    def derived(self, what: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` computes of this W and of ``what`` alone: once for each W that is kept, else at every call.

        The result is shared by calls, and not to be written to.
        """
        if self.kept is None:
            return make()
        if what not in self.kept:
            with torch.inference_mode(False), torch.no_grad():  # a later call may be one that trains
                self.kept[what] = make()
        return cast(T, self.kept[what])


class Draw(NamedTuple):
    """What a sampler returns: one W for one head, float64, on the CPU.

    Attributes:
        omega: Rows, (m, d).
        weight: Quadrature weights a_i, any sign, (m,); ``None`` means 1/m each.
        uniform: Unit-cube points, (m, d), or ``None``.
    """

    omega: Tensor
    weight: Tensor | None = None
    uniform: Tensor | None = None


class WeightMatrix(nn.Module, ABC):
    """Base of every W: sizes, claims, and the two verbs ``forward`` and ``redraw``.

    A subclass is built as ``W(head_dim, num_features, num_heads=None, generator=generator, **options)``.
    ``num_features`` is what is asked for; ``num_rows`` is what the rule has (quadrature rules come in
    fixed sizes).

    Attributes:
        claim: What the rule promises (see :data:`Claim`); may depend on the options.
        gaussian_rows: Every row is exactly N(0, I_d) in law (or the weighted rule is exact in expectation
            for every integrand). Discrete component functions need it.
        signed: Some weights a_i may be negative; positive features then lose their positivity.
        learned: The rows depend on ``nn.Parameter``s.

    Raises:
        ValueError: If a size is not a positive integer.
    """

    claim: Claim = "unbiased"
    gaussian_rows: bool = True
    signed: bool = False
    learned: bool = False

    def __init__(
        self,
        head_dim: int,
        num_features: int,
        *,
        num_heads: int | None = None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        for name, value in (("head_dim", head_dim), ("num_features", num_features)):
            require_integer(name, value)
        if num_heads is not None:
            require_integer("num_heads", num_heads)
        most = MOST_ENTRIES // (head_dim * (num_heads or 1))
        if 0 < most < num_features:  # a head dim beyond all memory is another mistake
            raise ValueError(
                f"num_features is {num_features:,}; expected at most {most:,} of head dim {head_dim}: a weight matrix "
                f"has at most {MOST_ENTRIES:,} entries, which is 1 GiB"
            )
        if generator.device.type != "cpu":
            raise ValueError(
                f"generator is on {generator.device}; expected a CPU generator, so that one seed gives one W "
                "on every device"
            )
        self.head_dim = head_dim
        self.num_features = num_features
        self.num_heads = num_heads

    @property
    def num_copies(self) -> int:
        """g: independent copies of W, 1 if heads share it."""
        return self.num_heads or 1

    @property
    def num_rows(self) -> int:
        """m: rows this rule really has; differs from ``num_features`` for fixed-size rules."""
        return self.num_features

    @abstractmethod
    def forward(self) -> Projection:
        """The current W."""

    @abstractmethod
    def redraw(self, generator: torch.Generator) -> None:
        """Replaces the randomness in place: shapes, dtype and device stay; learned parameters stay."""

    def extra_repr(self) -> str:
        heads = "shared" if self.num_heads is None else f"num_heads={self.num_heads}"
        return f"head_dim={self.head_dim}, num_rows={self.num_rows}, {heads}, claim={self.claim}"


class SampledWeight(WeightMatrix):
    """A W without parameters: a sampler's draw, kept in persistent buffers.

    A subclass checks and sets its options **before** it calls ``super().__init__``, which draws, and defines
    :meth:`sample`, which reads them.

    What was derived of W is kept while its buffers are the same tensors, at the same version. An edit in place through
    ``buffer.data``, which torch does not count either, is not seen: edit under ``torch.no_grad()``.
    """

    omega: Tensor
    log_abs_weight: Tensor
    sign_weight: Tensor
    uniform: Tensor | None
    _kept: tuple[tuple[Any, ...], list[Tensor | None], Projection] | None = None

    def __init__(
        self,
        head_dim: int,
        num_features: int,
        *,
        num_heads: int | None = None,
        generator: torch.Generator,
    ) -> None:
        super().__init__(head_dim, num_features, num_heads=num_heads, generator=generator)
        for name, value in self._draw(generator).items():
            buffer = None if value is None else value.to(torch.get_default_dtype())
            self.register_buffer(name, buffer)

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Draw:
        """Draws one W for one head; float64, CPU."""

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor | None]:
        draws = [self.sample(generator) for _ in range(self.num_copies)]
        omega = torch.stack([draw.omega for draw in draws])
        m = omega.shape[1]
        equal = torch.full((m,), 1.0 / m, dtype=torch.float64)
        weight = torch.stack([equal if draw.weight is None else draw.weight for draw in draws])
        uniforms = [draw.uniform for draw in draws if draw.uniform is not None]
        return {
            "omega": omega,
            "log_abs_weight": weight.abs().log(),
            "sign_weight": torch.where(weight < 0, -1.0, 1.0).to(torch.float64),
            "uniform": torch.stack(uniforms) if uniforms else None,
        }

    @property
    def num_rows(self) -> int:
        return int(self.omega.shape[1])

    def forward(self) -> Projection:
        """The current W: the same object again, with what was derived of it, until a buffer is written or replaced."""
        tensors = [self._buffers.get(name) for name in BUFFERS]
        state = _state(tensors)
        if state is None:
            return Projection(self.omega, self.log_abs_weight, self.sign_weight, self.uniform, self.signed)
        if self._kept is None or self._kept[0] != state:
            made = Projection(self.omega, self.log_abs_weight, self.sign_weight, self.uniform, self.signed, {})
            self._kept = state, tensors, made  # the tensors too: an identity lasts as long as its object
        return self._kept[2]

    def __getstate__(self) -> dict[str, Any]:
        """Without what is kept: it is of these buffers, not of copies."""
        return {name: x for name, x in self.__dict__.items() if name != "_kept"}

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        for name, value in self._draw(generator).items():
            if value is not None:
                getattr(self, name).copy_(value)


BUFFERS = ("omega", "log_abs_weight", "sign_weight", "uniform")


def _state(tensors: list[Tensor | None]) -> tuple[Any, ...] | None:
    """Equal in two calls that saw the same numbers; None where nothing may be kept for another call.

    What a graph records must be computed in each replay, what needs gradients in each call, and another stream does
    not wait for this one.
    """
    first = tensors[0]
    if first is None or not is_plain(*tensors):
        return None
    state: list[Any] = [None]
    if first.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return None
        state[0] = torch._C._cuda_getCurrentRawStream(first.get_device())
    for x in tensors:
        if x is None:
            state.append(None)
        elif x.requires_grad or x.is_inference():
            return None
        else:
            state += (id(x), x._version, x.data_ptr())
    return tuple(state)


def haar(d: int, generator: torch.Generator) -> Tensor:  # (d, d)
    r"""A Haar-distributed orthogonal matrix, float64: QR of a Gaussian with the sign of R's diagonal removed.

    Without the sign correction LAPACK fixes the sign of one coordinate per row and
    :math:`E\,e^{\omega_0\cdot e_0}` is 0.53 instead of 1.65.

    References:
        Mezzadri, How to generate random matrices from the classical compact groups, math-ph/0609050.
    """
    q, r = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    sign = torch.where(torch.diagonal(r) < 0, -1.0, 1.0).to(torch.float64)
    matrix: Tensor = q * sign
    return matrix


def chi(d: int, m: int, generator: torch.Generator) -> Tensor:  # (m,)
    """Norms of m independent N(0, I_d) vectors, float64."""
    norms: Tensor = torch.linalg.vector_norm(torch.randn(m, d, generator=generator, dtype=torch.float64), dim=1)
    return norms


def rademacher(n: int, generator: torch.Generator) -> Tensor:  # (n,)
    """N independent fair signs, +1 or -1, float64."""
    return torch.randint(0, 2, (n,), generator=generator).to(torch.float64).mul_(2).sub_(1)


def next_power_of_two(d: int) -> int:
    """The least power of two that is at least d."""
    return 1 << (d - 1).bit_length()


def num_blocks(m: int, block: int) -> int:
    """How many stacked blocks of ``block`` rows give at least m rows."""
    return math.ceil(m / block)
