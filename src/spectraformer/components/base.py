r"""The contract of a component function f, and the tokens it is applied to.

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, m rows of W, d head dim, f features.
``p`` stands for 1 or h: parameters shared by all heads, or one set a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from spectraformer import ops
from spectraformer.checks import require_integer
from spectraformer.components.pairs import Exponential, Features, Signed, fold_groups
from spectraformer.components.statistics import Moments, Order
from spectraformer.weights.base import Projection

Kernel = Literal["softmax", "gaussian"]
KERNELS = ("softmax", "gaussian")


class Parameters(NamedTuple):
    """What a component function fits to the data, all detached; unused entries are None.

    Attributes:
        rho: rho = 1 / (1 - 8 A) in (0, 1], (b | 1, p).
        query_transform: T_q, diagonal (b | 1, p, d) or matrix (b | 1, p, d, d).
        key_transform: T_k with T_q^T T_k = I, shaped alike.
        coefficients: One coefficient a head dim, (b | 1, p, d).
        law: The parameter of a discrete law, its rate or its probability, (b | 1, p).
        moments: Those of x and y, in place of rho where one kernel makes landmarks of them.
    """

    rho: Tensor | None = None
    query_transform: Tensor | None = None
    key_transform: Tensor | None = None
    coefficients: Tensor | None = None
    law: Tensor | None = None
    moments: tuple[Moments, Moments] | None = None


@dataclass(frozen=True)
class Tokens:
    r"""Queries and keys as a component function sees them: ``x = root * q - shift``, ``y = root * k - shift``.

    The translation is exact,
    :math:`e^{x\cdot y} = e^{(x-c)\cdot(y-c)}\, e^{c\cdot x - |c|^2/2}\, e^{c\cdot y - |c|^2/2}`.
    Here and in the component functions x and y are the translated ones; the token factors give back the rest of
    the softmax kernel, or turn it into the Gaussian kernel.

    Attributes:
        raw_query: Queries as given, (b, h * g, n, d).
        raw_key: Keys as given, (b, h, s, d).
        root: Square root of the attention scale; it goes to both sides.
        shift: c, (b | 1, h | 1, d), or None for 0.
        key_mask: True for real keys, (b, 1, s), or None.
        kernel: The kernel to estimate.
        dtype: Dtype of x, y and everything computed of them, float32 or float64.
    """

    raw_query: Tensor
    raw_key: Tensor
    root: float
    shift: Tensor | None
    key_mask: Tensor | None
    kernel: Kernel
    dtype: torch.dtype

    @property
    def heads(self) -> int:
        """H."""
        return self.raw_key.shape[1]

    def _translated(self, tokens: Tensor) -> Tensor:
        x = tokens.to(self.dtype) * self.root
        return x if self.shift is None else x - self.shift.to(x.dtype).unsqueeze(-2)

    @property
    def query(self) -> Tensor:
        """x, (b, h * g, n, d)."""
        folded = self._translated(fold_groups(self.raw_query, self.heads))
        return folded.reshape(self.raw_query.shape)

    @property
    def key(self) -> Tensor:
        """y, (b, h, s, d)."""
        return self._translated(self.raw_key)

    def _factor(self, x: Tensor) -> Tensor | None:
        """Log-factor between exp(x . y) of the translated tokens and the kernel; x is (b, h, n, d)."""
        if self.kernel == "gaussian":
            return -0.5 * x.square().sum(-1)
        if self.shift is None:
            return None
        # c . (x + c) - |c|^2 / 2 with x the translated token.
        shift = self.shift.to(x.dtype)
        return (x @ shift.unsqueeze(-1)).squeeze(-1) + 0.5 * shift.square().sum(-1, keepdim=True)

    def query_bias(self, own: Callable[[Tensor], Tensor] | None) -> Callable[[], Tensor]:
        """Sum of f's own log-factor of a query and the kernel's, on demand, (b, h * g, n)."""

        def bias() -> Tensor:
            x = fold_groups(self.query, self.heads)
            return self._total(x, own).reshape(self.raw_query.shape[:3])

        return bias

    def key_bias(self, own: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Sum of f's own log-factor of a key and the kernel's, -inf for padding, (b, h, s)."""
        if own is minus_half_sqnorm and self.shift is None:
            # The common case, without a copy of the keys.
            factor = -0.5 if self.kernel == "softmax" else -1.0
            key = self.raw_key.to(self.dtype)
            sqnorm: Tensor = torch.linalg.vecdot(key, key)
            total = sqnorm * (factor * self.root**2)
        elif self.key_mask is None:
            return self._total(self.key, own)
        else:
            # A NaN in padding must not reach gradients either.
            total = self._total(self.key.masked_fill(~self.key_mask.unsqueeze(-1), 0.0), own)
        if self.key_mask is None:
            return total
        return total.masked_fill(~self.key_mask, ops.streaming.NEGATIVE_INFINITY)

    def _total(self, x: Tensor, own: Callable[[Tensor], Tensor] | None) -> Tensor:
        factor = self._factor(x)
        if factor is None:
            factor = x.new_zeros(x.shape[:-1])
        return factor if own is None else factor + own(x)

    def exponential(
        self,
        query_landmarks: Tensor,  # (b | 1, h | 1, m, d)
        key_landmarks: Tensor,  # (b | 1, h | 1, m, d)
        bias: Tensor,  # (b | 1, h | 1, m)
        query_own: Callable[[Tensor], Tensor],
        key_own: Callable[[Tensor], Tensor],
        key_quadratic: Tensor | None = None,  # (b | 1, h | 1, d)
        projection: Projection | None = None,
        fixed: bool = False,
    ) -> Exponential:
        """Positive features exp(u . x + bias / 2 + own(x)), with scale and translation folded into the landmarks.

        Args:
            query_landmarks: u, acting on x.
            key_landmarks: w, acting on y.
            bias: Log-weights of the landmarks, both sides together.
            query_own: f's log-factor of a query x.
            key_own: f's log-factor of a key y.
            key_quadratic: C, where key_own(y) is sum_c C_c y_c^2 with other coefficients than -1/2.
            projection: W, which keeps what is a function of it alone.
            fixed: Whether landmarks and bias are.
        """

        def scaled() -> tuple[Tensor, Tensor]:
            query = query_landmarks * self.root
            return query, query if key_landmarks is query_landmarks else key_landmarks * self.root

        if self.shift is not None:
            both = query_landmarks + key_landmarks
            bias = bias - (both @ self.shift.to(both.dtype).unsqueeze(-1)).squeeze(-1)
        fixed_by = projection if fixed else None
        of_query, of_key = scaled() if fixed_by is None else fixed_by.derived(("scaled", self.root), scaled)
        return Exponential(
            self.raw_query,
            self.raw_key,
            of_query,
            of_key,
            bias,
            lambda: self.key_bias(key_own),
            self.query_bias(query_own),
            self._key_quadratic(key_own, key_quadratic, projection),
            self.key_mask,
        )

    def _key_quadratic(
        self, own: Callable[[Tensor], Tensor], coefficients: Tensor | None, projection: Projection | None
    ) -> Callable[[], Tensor] | None:
        """Coefficients of the squares of the raw keys in their log-factor; None where it has other terms."""
        if self.shift is not None or (coefficients is None and own is not minus_half_sqnorm):
            return None
        of_kernel = -0.5 if self.kernel == "gaussian" else 0.0
        if coefficients is None:
            d, factor, device = self.raw_key.shape[-1], self.root**2 * (of_kernel - 0.5), self.raw_key.device

            def equal() -> Tensor:
                return torch.full((1, 1, d), factor, device=device, dtype=torch.float32)

            if projection is None or projection.kept is None:
                return equal
            kept = projection.derived(("equal", factor), equal)
            return lambda: kept
        return lambda: self.root**2 * (coefficients + of_kernel)

    def signed(
        self,
        query_features: Callable[[Tensor], Features],
        key_features: Callable[[Tensor], Features],
        feature_dim: int,
    ) -> Signed:
        """Signed features that are functions of x and y, (b, h, r, d) -> (b, h, r, f)."""
        return Signed(
            self.query,
            self.key,
            query_features,
            key_features,
            self.query_bias(None),
            self.key_bias(None),
            feature_dim,
        )


def minus_half_sqnorm(x: Tensor) -> Tensor:  # (..., d) -> (...)
    """-|x|^2 / 2."""
    return -0.5 * x.square().sum(-1)


class ComponentFunction(nn.Module, ABC):
    """Base of every f: what it needs to know of the data, and how it makes features of tokens.

    A subclass is built as ``f(head_dim, num_heads=None, generator=generator, **options)``. Learned parameters
    are made in ``__init__``, one set for all heads or one a head, (p,).

    Attributes:
        positive: All features are positive whatever the tokens.
        needs_gaussian_rows: Unbiased, and meaningful, only if every row of W is exactly N(0, I_d).
        order: How much of the second moments :meth:`fit` needs.
        needs_minimum: f translates the tokens, by their least coordinates: see :meth:`shift`.
        shared_log: All features of a token share their log, which then ends in 1 instead of f.
        needs_float64: Its log-features are small differences of large terms.
        packs: What :meth:`fit` returns enters nothing but landmarks, their bias and coefficients of squared keys:
            packed sequences can have parameters each without being padded.
        trigonometric: Its pair is a Trigonometric, which has fused kernels.
    """

    positive: bool = True
    trigonometric: bool = False
    needs_gaussian_rows: ClassVar[bool] = False
    order: ClassVar[Order] = "none"
    needs_minimum: ClassVar[bool] = False
    shared_log: ClassVar[bool] = False
    needs_float64: ClassVar[bool] = False
    packs: ClassVar[bool] = False

    def __init__(self, head_dim: int, *, num_heads: int | None = None, generator: torch.Generator) -> None:
        super().__init__()
        require_integer("head_dim", head_dim)
        if num_heads is not None:
            require_integer("num_heads", num_heads)
        self.head_dim = head_dim
        self.num_heads = num_heads

    @property
    def data_dependent(self) -> bool:
        """Whether :meth:`fit` looks at the data, so that causal attention needs running statistics."""
        return self.order != "none" or self.needs_minimum

    def fit(self, q: Moments, k: Moments) -> Parameters:
        """Parameters for these moments of x and y; called without gradients."""
        return Parameters()

    def shift(self, q: Moments, k: Moments) -> Tensor:  # (b, h, d)
        """The translation of an f that ``needs_minimum``, from the moments before it."""
        raise AssertionError(f"{type(self).__name__} says needs_minimum but defines no shift")

    @abstractmethod
    def forward(self, tokens: Tokens, projection: Projection, parameters: Parameters) -> Exponential | Signed:
        """The features of queries and keys: their products estimate exp(x . y)."""

    @abstractmethod
    def feature_dim(self, num_rows: int) -> int:
        """f: real features for m rows of W."""

    def redraw(self, generator: torch.Generator) -> None:
        """Replaces f's own randomness in place; most f have none."""

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}" + ("" if self.num_heads is None else f", num_heads={self.num_heads}")
