"""Exact softmax attention: what random features estimate."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Softmax(nn.Module):
    r"""Exact softmax attention by torch's fused kernels, in n² time.

    .. math:: \mathrm{softmax}(q k^T / \sqrt d)\, v

    Args:
        head_dim: d.
        num_heads: Heads.
        max_length: Not used: any length goes.
        seed: Not used: there is nothing random.

    References:
        Attention is all you need (Vaswani et al., 2017), arXiv 1706.03762, section 3.2.1.
    """

    def __init__(self, head_dim: int, num_heads: int, max_length: int, seed: int) -> None:
        super().__init__()

    def forward(
        self,
        query: Tensor,  # (b, h, n, d)
        key: Tensor,  # (b, h, s, d)
        value: Tensor,  # (b, h, s, e)
        key_padding_mask: Tensor | None = None,  # (b, s), True for real tokens
    ) -> Tensor:
        """Attention output, (b, h, n, e); a row whose keys are all padding is 0."""
        mask = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if mask is not None:
            out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
        return out
