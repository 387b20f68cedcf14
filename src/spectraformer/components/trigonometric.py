"""Trigonometric features: cosines and sines of projections, bounded but signed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spectraformer import ops
from spectraformer.components.base import ComponentFunction, Parameters, Tokens
from spectraformer.components.pairs import Attended, Features, Signed, log_mask
from spectraformer.ops.triton import trigonometric as fused
from spectraformer.weights.base import Projection


class Trigonometric(Signed):
    r"""Signed features whose products are :math:`e^{(|x|^2+|y|^2)/2} \sum_i a_i \cos w_i\cdot(x - y)`.

    On a GPU they attend in fused kernels, from the tokens as given: their translation cancels in differences. All that
    only plain torch needs is computed on demand.

    Args:
        tokens: Queries and keys.
        query_features: Features of a block of x, as in :class:`Signed`.
        key_features: Features of a block of y.
        rows: w, (g, m, d).
        log_abs_weight: log |a|, (g, m).
        sign_weight: Sign of a, (g, m).
    """

    _tokens: Tokens
    _rule: tuple[Tensor, Tensor, Tensor]

    def __init__(
        self,
        tokens: Tokens,
        query_features: Callable[[Tensor], Features],
        key_features: Callable[[Tensor], Features],
        rows: Tensor,
        log_abs_weight: Tensor,
        sign_weight: Tensor,
    ) -> None:
        parts = {
            "_tokens": tokens,
            "query_features": query_features,
            "key_features": key_features,
            "query_bias": tokens.query_bias(None),
            "feature_dim": 2 * rows.shape[-2],
            "_rule": (rows, log_abs_weight, sign_weight),
        }
        for name, value in parts.items():
            object.__setattr__(self, name, value)

    @property
    def query(self) -> Tensor:
        """Translated queries x, (b, h * g, n, d)."""
        return self._tokens.query

    @property
    def key(self) -> Tensor:
        """Translated keys y, (b, h, s, d)."""
        return self._tokens.key

    @property
    def key_bias(self) -> Tensor:
        """Log-factor of each key, (b, h, s), -inf where a key is padding."""
        return self._tokens.key_bias(None)

    def attend(
        self,
        value: Tensor,  # (b, h, s, e)
        *,
        state: ops.AttentionState | None = None,
        backend: str = "auto",
    ) -> Attended:
        """Attention output, (b, h * g, n, e), in the dtype of value from fused kernels."""
        tokens = self._tokens
        query, key = tokens.raw_query, tokens.raw_key
        fits = state is None and backend in ("auto", "triton") and 0 not in (*query.shape, *value.shape)
        if not fits or fused.refusals(query, key, value):
            plain = tokens.signed(self.query_features, self.key_features, self.feature_dim)
            return plain.attend(value, state=state, backend=backend)
        rows, log_weight, sign = (x.float().unsqueeze(0) for x in self._rule)
        # The scale of the weights cancels.
        weight = sign * (log_weight - log_weight.detach().amax(-1, keepdim=True)).exp()
        bias = None if tokens.key_mask is None else log_mask(tokens.key_mask)
        factor = 0.5 * tokens.root**2 if tokens.kernel == "softmax" else 0.0
        return Attended(*fused.trigonometric_attention(query, key, value, rows * tokens.root, weight, bias, factor))


class TrigRF(ComponentFunction):
    r"""Random Fourier features of the softmax kernel.

    .. math:: \varphi_i(x) = \sqrt{|a_i|}\; e^{|x|^2/2}\, [\cos\omega_i\cdot x,\ \sin\omega_i\cdot x]

    Exact at x = y; the relative variance for Gaussian rows is :math:`(1-e^{-r^2})^2 e^{r^2}/2m` with
    :math:`r = |x-y|`. The estimated denominator of attention turns negative or vanishes once norms of
    scaled tokens exceed about 2: use it for small norms, or use positive features.

    References:
        Rahimi and Recht, Random Features for Large-Scale Kernel Machines, NeurIPS 2007.
        Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794.
    """

    positive = False
    shared_log = True
    trigonometric = True

    def feature_dim(self, num_rows: int) -> int:
        """Two a row."""
        return 2 * num_rows

    def forward(self, tokens: Tokens, projection: Projection, parameters: Parameters) -> Signed:
        """Features of queries and keys; all features of a token share the log |x|^2 / 2."""
        amplitude = (0.5 * projection.log_abs_weight).exp().unsqueeze(-2)  # (g, 1, m)

        def features(key_sign: Tensor | float) -> Callable[[Tensor], Features]:
            def of(x: Tensor) -> Features:
                phase = x @ projection.omega.to(x.dtype).mT
                scale = (amplitude * key_sign).to(x.dtype)
                log = 0.5 * x.square().sum(-1, keepdim=True)
                return Features(log, torch.cat((phase.cos() * scale, phase.sin() * scale), dim=-1))

            return of

        return Trigonometric(
            tokens,
            features(1.0),
            features(projection.sign_weight.unsqueeze(-2)),
            projection.omega,
            projection.log_abs_weight,
            projection.sign_weight,
        )
