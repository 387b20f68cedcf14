"""Exact softmax attention: what random features estimate."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from spectraformer.baselines.base import Baseline
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
        if mask is None:
            return functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=is_causal)
        seen = mask[:, None, None, :]
        if is_causal:
            seen = seen & seen.new_ones(query.shape[2], query.shape[2]).tril()
        # A row without any key would be NaN, in the gradient too: it sees all, and its output is dropped.
        none = ~seen.any(-1, keepdim=True)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen | none, dropout_p=dropout)
        return out.masked_fill(none, 0.0)
