"""Exact softmax attention: what random features estimate."""

from __future__ import annotations

from torch import Tensor

from spectraformer.baselines.base import Baseline
from spectraformer.baselines.masked import masked_attention
from spectraformer.checks import check_dropout


class Softmax(Baseline):
    r"""Exact softmax attention by torch's fused kernels.

    .. math:: \mathrm{softmax}(q k^T / \sqrt d)\, v

    Args:
        head_dim: d.
        num_heads: h.
        max_length: Not used: any length goes.
        seed: Not used: there is nothing random.
        dropout: Of attention weights, in training.

    References:
        Attention is all you need (Vaswani et al., 2017), arXiv 1706.03762, section 3.2.1.
    """

    complexity = "n²"
    memory = "n"
    source = "Vaswani et al. 2017, arXiv 1706.03762"
    has_causal_form = True

    def __init__(self, head_dim: int, num_heads: int, max_length: int, seed: int, *, dropout: float = 0.0) -> None:
        super().__init__(head_dim, num_heads, max_length, seed)
        check_dropout(dropout)
        self.dropout = dropout

    def attend(
        self,
        query: Tensor,  # (b, h, n, d)
        key: Tensor,  # (b, h, s, d)
        value: Tensor,  # (b, h, s, e)
        mask: Tensor | None,  # (b, s)
        is_causal: bool,
    ) -> Tensor:
        """Attention output, (b, h, n, e)."""
        dropout = self.dropout if self.training else 0.0
        seen = None if mask is None else mask[:, None]
        return masked_attention(query, key, value, seen, is_causal=is_causal, dropout=dropout)
