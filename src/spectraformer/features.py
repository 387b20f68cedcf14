r"""FeatureMap: a component function f applied to a weight matrix W, for one kernel.

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, d head dim, f features, e value dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectraformer import ops, registry
from spectraformer.checks import (
    check_causal,
    check_padding_mask,
    check_query_key,
    require_choice,
    require_flag,
    require_float_dtype,
    require_integer,
    require_number,
    resolve_scale,
)
from spectraformer.components import (
    KERNELS,
    ComponentFunction,
    Exponential,
    Kernel,
    Parameters,
    Signed,
    Tokens,
)
from spectraformer.components.statistics import Moments, RunningMoments, paired_moments
from spectraformer.ops.graph import is_recomputing
from spectraformer.weights.base import Projection, WeightMatrix

Statistics = Literal["auto", "batch", "running"]
STATISTICS = ("auto", "batch", "running")
NOTHING_FITTED = Parameters()
Mask = Tensor | None


class FeatureMap(nn.Module):
    r"""Random features phi with :math:`E\,\varphi(q)\cdot\varphi(k) = \kappa(\sqrt\tau q, \sqrt\tau k)`.

    kappa is :math:`e^{x\cdot y}` ("softmax") or :math:`e^{-|x-y|^2/2}` ("gaussian"), tau the attention scale.

    Args:
        head_dim: d, the dimension of queries and keys.
        num_features: m, rows of W. Component functions make one or more real features of a row
            (:attr:`feature_dim`), and quadrature rules have a fixed size near m.
        component: Name in :data:`spectraformer.COMPONENTS`, or a :class:`ComponentFunction`.
        weight: Name in :data:`spectraformer.WEIGHTS`, or a :class:`WeightMatrix`.
        num_heads: Key heads with parameters of their own; None for one set for any number of heads.
        kernel: "softmax" or "gaussian".
        seed: Seed of W and of any other randomness: one seed gives one W, on every device.
        center: Translate queries and keys by the mean of their means, an exact identity of the kernel that
            reduces the variance where the means are aligned. No effect on trigrf, nor on the + functions,
            which translate already.
        statistics: Where data-dependent parameters come from: "batch" is the sequence at hand (per batch item
            and head, real tokens only), "running" an average over training, "auto" batch for bidirectional and
            running for causal attention, which must not look ahead.
        momentum: Weight of a new batch in the running average, in (0, 1].
        redraw_every: Redraw W every so many forward passes in training; None never. Activation checkpointing
            repeats the last pass exactly: run backward after each.
        share_weight: One W for all heads; None shares a random W and gives each head its own learned W.
        component_options: Further arguments of the component function.
        weight_options: Further arguments of the weight matrix.
        device: Where to put parameters and buffers.
        dtype: Their dtype; logits are computed in float32 or better whatever it is.

    Attributes:
        unsafe_denominators: How many signed denominators were guarded, and of how many, since the last reset, (2,).

    Raises:
        ValueError: For unknown names, sizes and options, and for pairs without meaning, with the reason.
    """

    unsafe_denominators: Tensor

    def __init__(
        self,
        head_dim: int,
        num_features: int = 256,
        component: str | ComponentFunction = "oprf",
        weight: str | WeightMatrix = "orf",
        *,
        num_heads: int | None = None,
        kernel: Kernel = "softmax",
        seed: int = 0,
        center: bool = False,
        statistics: Statistics = "auto",
        momentum: float = 0.1,
        redraw_every: int | None = None,
        share_weight: bool | None = None,
        component_options: Mapping[str, Any] | None = None,
        weight_options: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_choice("kernel", kernel, KERNELS)
        require_choice("statistics", statistics, STATISTICS)
        require_flag("center", center)
        for name, size in (
            ("head_dim", head_dim),
            ("num_features", num_features),
            ("num_heads", 1 if num_heads is None else num_heads),
            ("redraw_every", 1 if redraw_every is None else redraw_every),
        ):
            require_integer(name, size)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed is {seed!r}; expected an integer")
        require_number("momentum", momentum, 0.0, math.nextafter(1.0, 2.0), "a number in (0, 1]")
        require_float_dtype(dtype)
        self.head_dim = head_dim
        self.num_features = num_features
        self.num_heads = num_heads
        self.kernel: Kernel = kernel
        self.seed = seed
        self.center = center
        self.statistics: Statistics = statistics
        self.momentum = momentum
        self.redraw_every = redraw_every
        self._passes = 0
        self._redraws = 0
        generator = self._generator()
        with torch.device("cpu"):  # all sampling, whatever the default device
            self.weight = registry.build_weight(
                weight, weight_options, head_dim, num_features, num_heads, share_weight, generator
            )
            self.component = registry.build_component(component, component_options, head_dim, num_heads, generator)
            registry.require_meaning(self.component, self.weight)
        if self.component.needs_minimum and statistics == "running":
            raise ValueError(
                f"{type(self.component).__name__} translates tokens by the least coordinates of the sequence at hand, "
                "which no running average bounds; use statistics='auto' or 'batch'"
            )
        self.register_buffer("unsafe_denominators", torch.zeros(2, dtype=torch.int64), persistent=False)
        self.running = RunningMoments(head_dim, num_heads, self.component.order) if self.data_dependent else None
        self.to(device=torch.get_default_device() if device is None else device, dtype=dtype)

    def _generator(self) -> torch.Generator:
        """A CPU generator that is a function of (seed, number of redraws) alone."""
        mixed = (self.seed * 0x9E3779B97F4A7C15 + self._redraws * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % (1 << 63)
        return torch.Generator().manual_seed(mixed)

    def redraw(self) -> None:
        """Draws W (and f's own randomness) anew: a function of the seed and of how often it was called."""
        self._redraws += 1
        generator = self._generator()
        with torch.device("cpu"):
            self.weight.redraw(generator)
            self.component.redraw(generator)

    def _count_pass(self) -> None:
        """Redraws on schedule."""
        if self.redraw_every is None or not self.training or is_recomputing():
            return
        if self._passes and self._passes % self.redraw_every == 0:
            self.redraw()
        self._passes += 1

    def get_extra_state(self) -> Tensor:
        """Counters of the redraws, so that a resumed run draws what an uninterrupted one would."""
        return torch.tensor([self._passes, self._redraws])

    def set_extra_state(self, state: Tensor) -> None:
        """Restores the counters of :meth:`get_extra_state`."""
        self._passes, self._redraws = (int(x) for x in state)

    # -- data-dependent parameters -----------------------------------------------------------------------

    @property
    def data_dependent(self) -> bool:
        """Whether anything in the map depends on the moments of queries and keys."""
        return self.component.data_dependent or self.center

    @torch.no_grad()
    def calibrate(
        self,
        q: Tensor,  # (b, h * g, n, d)
        k: Tensor,  # (b, h, s, d)
        *,
        key_padding_mask: Tensor | None = None,  # (b, s)
        query_padding_mask: Tensor | None = None,  # (b, n)
        scale: float | None = None,
    ) -> None:
        """Replaces the running moments by those of these tokens: for causal inference without training.

        Raises:
            ValueError: If shapes do not fit, or the map depends on no statistics.
        """
        if self.running is None:
            raise ValueError(f"{type(self.component).__name__} without center depends on no statistics")
        self._check(q, k, key_padding_mask, query_padding_mask, enable_gqa=True)
        root = math.sqrt(resolve_scale(scale, self.head_dim))
        self.running.replace(*self._batch_moments(q, k, key_padding_mask, query_padding_mask, root))

    def _batch_moments(
        self, q: Tensor, k: Tensor, key_mask: Mask, query_mask: Mask, root: float, packed: ops.Sequences | None = None
    ) -> tuple[Moments, Moments]:
        component = self.component
        return paired_moments(q, k, query_mask, key_mask, root, component.order, component.needs_minimum, packed)

    def _check_statistics(self, is_causal: bool) -> None:
        """Refuses parameters that would look into the future."""
        if not is_causal or not self.data_dependent:
            return
        name = type(self.component).__name__
        if self.component.needs_minimum:
            raise ValueError(
                f"{name} has no causal form: it translates tokens by the least coordinates of the whole sequence; "
                "use the function without '+', or oprf"
            )
        if self.statistics == "batch":
            raise ValueError(
                f"{name} with statistics='batch' would look into the future of causal attention; "
                "use statistics='auto' or 'running'"
            )

    def _moments(
        self,
        q: Tensor,
        k: Tensor,
        key_mask: Mask,
        query_mask: Mask,
        root: float,
        is_causal: bool,
        track: bool,
        sequences: ops.Sequences | None,
    ) -> tuple[Moments, Moments] | None:
        if self.running is None:
            return None
        if self.statistics == "batch" or (self.statistics == "auto" and not is_causal):
            return self._batch_moments(q, k, key_mask, query_mask, root, sequences)
        if not (track and self.training):
            held: tuple[Moments, Moments] = self.running()
        elif is_recomputing():
            held = self.running(previous=True)
        else:
            held = self.running()  # before the update: this call must not depend on its own tokens
            if q.shape[2] and k.shape[2]:
                fresh = self._batch_moments(q, k, key_mask, query_mask, root, sequences)
                real = None if key_mask is None else key_mask.any(-1)
                real = real if sequences is None else sequences.key.diff() > 0
                self.running.update(*fresh, self.momentum, real)
        return held

    def _shift(self, q: Moments, k: Moments) -> Tensor | None:  # (b | 1, h | 1, d)
        if self.component.needs_minimum:
            return self.component.shift(q, k)
        return 0.5 * (q.mean + k.mean) if self.center else None

    # -- features ----------------------------------------------------------------------------------------

    @property
    def feature_dim(self) -> int:
        """f, real features of a token."""
        return self.component.feature_dim(self.weight.num_rows)

    @property
    def positive(self) -> bool:
        """Whether all features are positive: attention is then a convex average of the values."""
        return self.component.positive and not self.weight.signed

    def forward(
        self,
        q: Tensor,  # (b, h * g, n, d)
        k: Tensor,  # (b, h, s, d)
        *,
        key_padding_mask: Tensor | None = None,  # (b, s), True for real keys
        query_padding_mask: Tensor | None = None,  # (b, n), True for real queries
        scale: float | None = None,
        is_causal: bool = False,
        enable_gqa: bool = False,
        track: bool = True,
        sequences: ops.Sequences | None = None,
    ) -> Exponential | Signed:
        """The features of queries and keys, as a pair that can attend; see :meth:`features` for plain tensors.

        In training a pass counts for the redraw schedule and the running moments, unless ``track`` is False.
        With ``sequences`` tokens are those of all, b = 1, and parameters have b of the sequences: see ``packs``.
        """
        self._check(q, k, key_padding_mask, query_padding_mask, enable_gqa)
        if is_causal:
            check_causal(q, k)
        if query_padding_mask is None and q.shape[2] == k.shape[2]:
            query_padding_mask = key_padding_mask  # self-attention: only the statistics look at it
        root = math.sqrt(resolve_scale(scale, self.head_dim))
        self._check_statistics(is_causal)
        if track:
            self._count_pass()
        with ops.full_precision(q.device):
            found = self._moments(q, k, key_padding_mask, query_padding_mask, root, is_causal, track, sequences)
            shift = None if found is None else self._shift(*found)
            if found is not None and shift is not None:
                found = (found[0].shifted(shift), found[1].shifted(shift))
            component, fitted = self.component, NOTHING_FITTED
            if found is not None and component.data_dependent:
                with torch.no_grad():
                    fitted = component.fit(*found)
            mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(1)
            dtype = torch.float64 if component.needs_float64 else ops.compute_dtype(q, k)
            tokens = Tokens(q, k, root, shift, mask, self.kernel, dtype)
            return component(tokens, self._projection(), fitted)  # type: ignore[no-any-return]

    def _projection(self) -> Projection:
        """The current W; a copy where a scheduled redraw, which is in place, may come before backward."""
        made: Projection = self.weight()
        if self.redraw_every is None or not torch.is_grad_enabled():
            return made

        def copied() -> Projection:
            copies = {name: getattr(made, name).clone() for name in ("omega", "log_abs_weight", "sign_weight")}
            return replace(made, **copies, kept=None if made.kept is None else {})

        return made.derived("copied", copied)

    def features(
        self,
        q: Tensor,  # (b, h * g, n, d)
        k: Tensor,  # (b, h, s, d)
        *,
        key_padding_mask: Tensor | None = None,  # (b, s)
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Dense phi(q), (b, h * g, n, f), and phi(k), (b, h, s, f): phi(q) . phi(k) estimates the kernel.

        They overflow where the kernel does; attention does not use them.
        """
        pair = self(q, k, key_padding_mask=key_padding_mask, scale=scale, enable_gqa=True, track=False)
        query, key = pair.features()
        return query.dense(), key.dense()

    def init_state(
        self,
        batch: int,
        num_heads: int,
        value_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ops.AttentionState:
        """The state of attention before the first key, for decoding; its size never grows.

        Args:
            batch: b.
            num_heads: Key heads h.
            value_dim: e.
            device: Where to put it; default where the feature map is.
            dtype: float32 (default) or float64.
        """
        for name, size in (("batch", batch), ("num_heads", num_heads), ("value_dim", value_dim)):
            require_integer(name, size, least=0)
        if self.num_heads is not None and num_heads != self.num_heads:
            raise ValueError(f"num_heads is {num_heads}, but the feature map was made for num_heads={self.num_heads}")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype is {dtype}; expected float32 or float64: sums over a stream need the precision")
        return ops.empty_state(
            batch,
            num_heads,
            self.feature_dim,
            value_dim,
            scales=1 if self.component.shared_log else None,
            signed=not self.positive,
            device=self.unsafe_denominators.device if device is None else torch.device(device),
            dtype=dtype or torch.float32,
        )

    @torch.no_grad()
    def record_unsafe(self, unsafe: Tensor | None) -> None:
        """Adds guarded denominators to :attr:`unsafe_denominators`; attention calls it."""
        if unsafe is not None and not is_recomputing():
            self.unsafe_denominators[0] += unsafe.sum()
            self.unsafe_denominators[1] += unsafe.numel()

    @property
    def unsafe_fraction(self) -> float:
        """Share of signed denominators that were guarded, in [0, 1]: above some per cent the map is unfit."""
        unsafe, total = (int(x) for x in self.unsafe_denominators)
        return unsafe / max(total, 1)

    def _check(self, q: Tensor, k: Tensor, key_mask: Mask, query_mask: Mask, enable_gqa: bool) -> None:
        check_query_key(q, k, self.head_dim, enable_gqa)
        if self.num_heads is not None and k.shape[1] != self.num_heads:
            raise ValueError(f"key has {k.shape[1]} heads, but the feature map was made for num_heads={self.num_heads}")
        held = self.unsafe_denominators.device
        if q.device != held:
            raise ValueError(f"query is on {q.device} but the feature map is on {held}; move one to the other")
        check_padding_mask("key_padding_mask", key_mask, k)
        check_padding_mask("query_padding_mask", query_mask, q)

    def extra_repr(self) -> str:
        options = f"center={self.center}, statistics={self.statistics}, redraw_every={self.redraw_every}"
        return f"kernel={self.kernel}, feature_dim={self.feature_dim}, seed={self.seed}, {options}"
