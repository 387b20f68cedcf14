"""Linformer: softmax attention to learned combinations of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectraformer.baselines.base import Baseline
from spectraformer.checks import check_dropout, require_flag, require_integer

INITIAL_DEVIATION = 0.02  # of the projections; the runs of arXiv 2405.15310 and 2111.00035


class Linformer(Baseline):
    r"""Softmax attention to k learned combinations of keys and of values.

    .. math:: \mathrm{softmax}(q (E k)^T / \sqrt d)\, F v

    E and F have a column a position, so the length is bounded by ``max_length``; a shorter sequence uses the first
    columns. Padding is set to 0 before it is projected and changes nothing. Which position a token has matters: this
    is not a function of the set of keys, and it does not estimate softmax attention.

    E and F are the bulk of a small model's parameters: h k ``max_length`` of them a layer by default.

    Args:
        head_dim: d.
        num_heads: h.
        max_length: Columns of E and F: most tokens it can see.
        seed: Of the first E and F.
        num_projections: k; 128 in the Long Range Arena runs of arXiv 2405.15310.
        share_heads: One E and F for all heads, the paper's "headwise sharing"; the Long Range Arena runs have one a
            head.
        share_key_value: F = E, as in the Long Range Arena runs. With ``share_heads`` it is the paper's "key-value
            sharing".
        dropout: Of attention weights, in training, by torch's global generator.

    Attributes:
        project_key: E, (h or 1, k, max_length).
        project_value: F, of the same shape; None if it is E.

    Raises:
        ValueError: For sizes and options that do not fit, and for sequences longer than ``max_length``.

    References:
        Linformer (Wang et al., 2020), arXiv 2006.04768.
    """

    complexity = "n k"
    memory = "n k"
    source = "Wang et al. 2020, arXiv 2006.04768"

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        max_length: int,
        seed: int,
        *,
        num_projections: int = 128,
        share_heads: bool = False,
        share_key_value: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(head_dim, num_heads, max_length, seed)
        require_integer("num_projections", num_projections)
        require_flag("share_heads", share_heads)
        require_flag("share_key_value", share_key_value)
        check_dropout(dropout)
        self.dropout = dropout
        generator = torch.Generator().manual_seed(seed)
        shape = (1 if share_heads else num_heads, num_projections, max_length)
        self.project_key = nn.Parameter(INITIAL_DEVIATION * torch.randn(shape, generator=generator))
        # One parameter under two names would be saved twice.
        self.project_value: nn.Parameter | None = None
        if not share_key_value:
            self.project_value = nn.Parameter(INITIAL_DEVIATION * torch.randn(shape, generator=generator))

    def attend(
        self,
        query: Tensor,  # (b, h, n, d)
        key: Tensor,  # (b, h, s, d), s <= max_length
        value: Tensor,  # (b, h, s, e)
        mask: Tensor | None,  # (b, s)
        is_causal: bool,
    ) -> Tensor:
        """Attention output, (b, h, n, e)."""
        length = key.shape[2]
        if length > self.max_length:
            raise ValueError(
                f"key has {length} tokens, but Linformer has one column a position and was made for "
                f"max_length={self.max_length}; expected at most {self.max_length} tokens"
            )
        project_value = self.project_key if self.project_value is None else self.project_value
        keys = self.project_key[..., :length].to(key.dtype) @ key  # (b, h, k, d)
        values = project_value[..., :length].to(value.dtype) @ value  # (b, h, k, e)
        dropout = self.dropout if self.training else 0.0
        out = functional.scaled_dot_product_attention(
            query, keys.to(query.dtype), values.to(query.dtype), dropout_p=dropout
        )
        return out.to(value.dtype)
