r"""The two forms a pair of feature sets can take: exponentials of affine functions, and signed features.

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, d head dim, f features, e value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spectraformer import ops
from spectraformer.ops.sequences import Sequences
from spectraformer.weights.base import Projection

# Elements of one block of explicit features of one side: bounds memory at any length, 64 MiB in float32.
BLOCK_ELEMENTS = 1 << 24
CAUSAL_CHUNK = 64


class Features(NamedTuple):
    """Explicit features ``sign * exp(log)``; ``log`` may end in 1 where a token's features share it."""

    log: Tensor  # (b, h, n, f | 1)
    sign: Tensor | None  # (b, h, n, f), n = 1 where all tokens share it; None where every feature is positive

    def dense(self) -> Tensor:
        """Phi itself, (b, h, n, f); may overflow where exp(log) does."""
        scale = torch.exp(self.log)
        return scale if self.sign is None else scale * self.sign


class Attended(NamedTuple):
    """What attending returns: output (b, h * g, n, e), unsafe denominators if signed, the causal state."""

    out: Tensor
    unsafe: Tensor | None = None
    state: ops.AttentionState | None = None


def fold_groups(x: Tensor, heads: int) -> Tensor:  # (b, h * g, n, d) -> (b, h, g * n, d)
    """Puts the query heads that share a key head into the token dimension."""
    b, all_heads, n, d = x.shape
    return x.reshape(b, heads, all_heads // heads * n, d)


@dataclass(frozen=True)
class Exponential:
    r"""Positive features, exponentials of affine functions: attention is two chained softmaxes.

    .. math:: \log\varphi_i(q) = u_i\cdot q + \tfrac12 a_i + r(q), \quad
        \log\varphi_i(k) = w_i\cdot k + \tfrac12 a_i + t(k)

    Attributes:
        query: Queries as the landmarks see them, (b, h * g, n, d).
        key: Keys as the landmarks see them, (b, h, s, d).
        query_landmarks: u, (b | 1, h | 1, m, d).
        key_landmarks: w, (b | 1, h | 1, m, d).
        landmark_bias: a, (b | 1, h | 1, m).
        full_key_bias: t, on demand, (b, h, s), -inf where a key is padding; see :attr:`key_bias`.
        query_bias: r, computed on demand because attention does not need it, (b, h * g, n).
        key_quadratic: C on demand, (b | 1, h | 1, d), where t(k) is :math:`\sum_c C_c k_c^2` for real keys; else None.
        key_mask: True for real keys, (b, 1, s), or None.
    """

    query: Tensor
    key: Tensor
    query_landmarks: Tensor
    key_landmarks: Tensor
    landmark_bias: Tensor
    full_key_bias: Callable[[], Tensor]
    query_bias: Callable[[], Tensor]
    key_quadratic: Callable[[], Tensor] | None = None
    key_mask: Tensor | None = None

    @property
    def key_bias(self) -> Tensor:
        """t, (b, h, s): a pass over the keys, which kernels that square them on the way do without."""
        with ops.full_precision(self.key.device):
            return self.full_key_bias()

    @property
    def feature_dim(self) -> int:
        """f: here the number of landmarks m."""
        return self.query_landmarks.shape[-2]

    def _logits(self, tokens: Tensor, landmarks: Tensor) -> Tensor:  # (b, h, n, d), (b, h, m, d) -> (b, h, n, m)
        half = 0.5 * self.landmark_bias.to(tokens.dtype).unsqueeze(-2)
        return tokens @ landmarks.to(tokens.dtype).mT + half

    def query_logits(self, tokens: Tensor) -> Tensor:
        """The logits u . q + a / 2 of folded query tokens, (b, h, r, d) -> (b, h, r, m)."""
        return self._logits(tokens, self.query_landmarks)

    def key_logits(self, tokens: Tensor) -> Tensor:
        """The logits w . k + a / 2 of key tokens, (b, h, r, d) -> (b, h, r, m)."""
        return self._logits(tokens, self.key_landmarks)

    def features(self) -> tuple[Features, Features]:
        """Explicit log-features of queries, (b, h * g, n, m), and keys, (b, h, s, m)."""
        dtype = ops.compute_dtype(self.query, self.key, self.query_landmarks)
        with ops.full_precision(self.query.device):
            folded = fold_groups(self.query.to(dtype), self.key.shape[1])
            log_query = self.query_logits(folded).reshape(*self.query.shape[:3], self.feature_dim)
            log_key = self.key_logits(self.key.to(dtype))
            return (
                Features(log_query + self.query_bias().to(dtype).unsqueeze(-1), None),
                Features(log_key + self.key_bias.to(dtype).unsqueeze(-1), None),
            )

    def attend(
        self,
        value: Tensor,  # (b, h, s, e)
        *,
        state: ops.AttentionState | None = None,
        backend: str = "auto",
        is_causal: bool = False,
        sequences: Sequences | None = None,
    ) -> Attended:
        """Attention output, (b, h * g, n, e); causal, from the first key on, or from ``state`` if one is given.

        Args:
            value: Values.
            state: Where causal attention begins.
            backend: "auto", or one that accepts these tokens.
            is_causal: Implied by a state.
            sequences: Of a packed batch; for backend "triton".
        """
        if value.dtype != self.key.dtype:
            value = value.to(torch.promote_types(value.dtype, self.key.dtype))
        is_causal = is_causal or state is not None
        if backend == "auto":
            tokens = (self.query, self.key, value)
            backend = ops.choose_backend(backend, *tokens, is_causal=is_causal)
        key_bias, key_quadratic = self._key_log_weight(backend)
        landmarks = (self.query_landmarks, self.key_landmarks, self.landmark_bias)
        operands = (self.query, self.key, value, *landmarks, key_bias, key_quadratic)
        if is_causal:
            out, after = ops.causal_landmark_attention(*operands, state, backend, sequences)
            return Attended(out, state=after)
        return Attended(ops.run_landmark_attention(backend, *operands, sequences))

    def _key_log_weight(self, backend: str) -> tuple[Tensor | None, Tensor | None]:
        """The log-weight t of keys, as bias and coefficients of their squares where kernels take it so."""
        if self.key_quadratic is None or backend != "triton":
            return self.key_bias, None
        return None if self.key_mask is None else log_mask(self.key_mask), self.key_quadratic()


def log_mask(mask: Tensor) -> Tensor:
    """0 where True, -inf where False: a key's log-weight, in float32."""
    return mask.log().float()


@dataclass(frozen=True)
class Signed:
    """Features that may be negative: explicit, computed block by block, with a guarded denominator.

    Attributes:
        query: Query tokens the features are functions of, (b, h * g, n, d).
        key: Key tokens likewise, (b, h, s, d).
        query_features: Features of a block of folded query tokens, (b, h, r, d) -> (b, h, r, f).
        key_features: Features of a block of key tokens.
        query_bias: Log-factor of each query, on demand, (b, h * g, n).
        key_bias: Log-factor of each key, (b, h, s), -inf where a key is padding.
        feature_dim: f.
    """

    query: Tensor
    key: Tensor
    query_features: Callable[[Tensor], Features]
    key_features: Callable[[Tensor], Features]
    query_bias: Callable[[], Tensor]
    key_bias: Tensor
    feature_dim: int

    def features(self) -> tuple[Features, Features]:
        """Explicit features of queries, (b, h * g, n, f), and keys, (b, h, s, f)."""
        with ops.full_precision(self.query.device):
            log, sign = self.query_features(fold_groups(self.query, self.key.shape[1]))
            shape = self.query.shape[:3]
            log = log.reshape(*shape, log.shape[-1]) + self.query_bias().unsqueeze(-1)
            query = Features(log, None if sign is None else sign.reshape(*shape, sign.shape[-1]))
            log, sign = self._key_block(slice(None))
            return query, Features(log, None if sign is None else sign.expand(*log.shape[:3], -1))

    def _key_block(self, block: slice) -> Features:
        log, sign = self.key_features(self.key[:, :, block])
        return Features(log + self.key_bias[:, :, block].unsqueeze(-1), sign)

    def attend(
        self,
        value: Tensor,  # (b, h, s, e)
        *,
        state: ops.AttentionState | None = None,
        backend: str = "auto",
    ) -> Attended:
        """Attention output, (b, h * g, n, e); causal from ``state`` if one is given."""
        ops.choose_backend(backend, self.query, self.key, value, positive=False, is_causal=state is not None)
        value = ops.with_ones(value.to(ops.compute_dtype(self.query, self.key, value)))
        with ops.full_precision(self.query.device):
            return self._attend_all(value) if state is None else self._attend_causal(value, state)

    def _attend_all(self, value: Tensor) -> Attended:
        b, h, s, _ = self.key.shape
        block = max(1, BLOCK_ELEMENTS // (b * h * self.feature_dim))
        state: ops.AttentionState | None = None
        for rows in ops.blocks(s, block):
            part = ops.absorb(*self._key_block(rows), value[:, :, rows])
            state = part if state is None else ops.merge(state, part)
        assert state is not None
        query = fold_groups(self.query, h)
        outputs, flags = [], []
        for rows in ops.blocks(query.shape[2], block):
            out, unsafe = ops.readout(*self.query_features(query[:, :, rows]), state)
            outputs.append(out)
            flags.append(unsafe)
        return Attended(
            torch.cat(outputs, 2).reshape(*self.query.shape[:3], -1),
            ops.concatenate_flags(flags, dim=2),
        )

    def _attend_causal(self, value: Tensor, state: ops.AttentionState) -> Attended:
        b, h, s, _ = self.key.shape
        query = self.query.reshape(b, h, -1, s, self.query.shape[-1])
        value, flat = value.flatten(0, 1), ops.flatten_heads(state)
        outputs, flags = [], []
        for rows in ops.blocks(s, CAUSAL_CHUNK):
            queries = _flatten_heads(self.query_features(query[:, :, :, rows].flatten(2, 3)))
            keys = _flatten_heads(self._key_block(rows))
            out, unsafe, flat = ops.advance(*queries, *keys, value[:, rows], flat)
            outputs.append(out.reshape(*query.shape[:3], -1, out.shape[-1]))
            flags.append(unsafe)
        unsafe = ops.concatenate_flags(flags, dim=1)
        return Attended(torch.cat(outputs, 3).flatten(1, 2), unsafe, ops.unflatten_heads(flat, h))


def _flatten_heads(features: Features) -> Features:
    log, sign = features
    return Features(log.flatten(0, 1), None if sign is None else sign.flatten(0, 1))


def with_key_signs(features: Callable[[Tensor], Features], sign: Tensor) -> Callable[[Tensor], Features]:
    """The same signed features times the signs of the rule, (g, 1, f), which stand on the key side only."""

    def of(y: Tensor) -> Features:
        log, own = features(y)
        assert own is not None
        return Features(log, own * sign.to(own.dtype))

    return of


def with_signs(pair: Exponential, projection: Projection, copies: int = 1) -> Exponential | Signed:
    """``pair`` itself; for a rule with negative weights the same features, their signs on the key side.

    Args:
        pair: Positive features with weights |a_i|.
        projection: The rule they were made of.
        copies: How often its rows stand among the features (2 for an antithetic pair).
    """
    if not projection.signed:
        return pair
    sign = projection.sign_weight.unsqueeze(-2).repeat(1, 1, copies)  # (g, 1, f)

    def query_features(x: Tensor) -> Features:
        return Features(pair.query_logits(x), None)

    def key_features(y: Tensor) -> Features:
        log = pair.key_logits(y)
        return Features(log, sign.to(log.dtype).expand(*log.shape[:2], 1, -1))

    dtype = ops.compute_dtype(pair.query, pair.key)
    return Signed(
        pair.query.to(dtype),
        pair.key.to(dtype),
        query_features,
        key_features,
        pair.query_bias,
        pair.key_bias,
        pair.feature_dim,
    )
