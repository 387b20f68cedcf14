"""What every attention to compare with has in common: how it is made, called, checked and described."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from spectraformer.attention import clear_padding
from spectraformer.checks import (
    check_causal,
    check_padding_mask,
    check_query_key,
    check_value,
    require_flag,
    require_integer,
)


class Baseline(nn.Module, ABC):
    """An attention to compare random features with.

    Options of a subclass are its keyword-only arguments; whatever is random is a function of ``seed``.

    Args:
        head_dim: d of queries and keys.
        num_heads: h, heads.
        max_length: Most tokens it will see.
        seed: Of its randomness.

    Attributes:
        complexity: Time for n tokens, in words.
        memory: Memory beside inputs and output.
        has_causal_form: Whether ``is_causal`` is possible without leaking.
        has_cross_form: Whether queries may differ from keys in number.
        source: Paper and arXiv id.

    Raises:
        ValueError: For sizes and options that do not fit.
    """

    complexity: ClassVar[str]
    memory: ClassVar[str]
    source: ClassVar[str]
    has_causal_form: ClassVar[bool] = False
    has_cross_form: ClassVar[bool] = True

    def __init__(self, head_dim: int, num_heads: int, max_length: int, seed: int) -> None:
        super().__init__()
        for name, value in (("head_dim", head_dim), ("num_heads", num_heads), ("max_length", max_length)):
            require_integer(name, value)
        require_integer("seed", seed, least=0)
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.max_length = max_length
        self.seed = seed

    def forward(
        self,
        query: Tensor,  # (b, h, n, d)
        key: Tensor,  # (b, h, s, d)
        value: Tensor,  # (b, h, s, e)
        key_padding_mask: Tensor | None = None,  # (b, s), True for real tokens
        *,
        is_causal: bool = False,
    ) -> Tensor:
        """Attention output in the dtype of value, (b, h, n, e); 0 where every key is padding.

        Raises:
            ValueError: If shapes do not fit, or what is asked for has no meaning for this attention.
        """
        name = type(self).__name__
        check_query_key(query, key, self.head_dim, enable_gqa=False)
        check_value(key, value)
        check_padding_mask("key_padding_mask", key_padding_mask, key)
        require_flag("is_causal", is_causal)
        if query.shape[1] != self.num_heads:
            raise ValueError(f"query has {query.shape[1]} heads; {name} was made for num_heads={self.num_heads}")
        if is_causal and not self.has_causal_form:
            raise ValueError(f"{name} has no causal form: a query would see later keys; use softmax or random features")
        if is_causal:
            check_causal(query, key)
        if not self.has_cross_form and query.shape[2] != key.shape[2]:
            raise ValueError(
                f"{name} attends within one sequence, but query has {query.shape[2]} tokens and key {key.shape[2]}"
            )
        if not query.shape[0] * query.shape[2] * key.shape[2]:
            return value.new_zeros(*query.shape[:3], value.shape[3])
        key, value = clear_padding(key, value, key_padding_mask)
        if key_padding_mask is not None and not self.has_cross_form:
            query = query.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
        out = self.attend(query, key, value, key_padding_mask, is_causal)
        if key_padding_mask is not None:
            out = out.masked_fill(~key_padding_mask.any(-1)[:, None, None, None], 0.0)
        return out

    @abstractmethod
    def attend(
        self,
        query: Tensor,  # (b, h, n, d)
        key: Tensor,  # (b, h, s, d)
        value: Tensor,  # (b, h, s, e)
        mask: Tensor | None,  # (b, s), True for real tokens
        is_causal: bool,
    ) -> Tensor:
        """Attention output, (b, h, n, e), of checked, non-empty inputs; finite where every key is padding.

        Padded keys and values are 0 already, and so are padded queries where queries and keys are of one sequence.
        """
