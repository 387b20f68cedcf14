"""Attentions to compare with, one a file, all called alike.

A factory ``(head_dim, num_heads, max_length, seed, **options)`` makes a module that maps query, key, value
(b, h, tokens, dim) and ``key_padding_mask`` (b, s), True for real tokens, to (b, h, n, e). Another package adds
its own by the entry-point group ``spectraformer.attentions``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from spectraformer.baselines.softmax import Softmax
from spectraformer.registry import Table

MakeAttention = Callable[..., nn.Module]

ATTENTIONS: Table[MakeAttention] = Table("attention", {"softmax": Softmax}, "spectraformer.attentions")

__all__ = ["ATTENTIONS", "MakeAttention", "Softmax"]
