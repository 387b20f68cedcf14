"""The encoder of the Long Range Arena, with any attention by name.

Legend: b examples, c documents an example, l tokens, w width, h heads.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from spectraformer.attention import random_feature_attention
from spectraformer.baselines import ATTENTIONS
from spectraformer.checks import require_choice
from spectraformer.config import PROTOCOLS, AttentionConfig, ModelConfig
from spectraformer.features import FeatureMap
from spectraformer.registry import COMPONENTS, build, nearest, parse_variant
from spectraformer.stretches import PLAIN, Dropout, Merge, split_heads


class RandomFeatures(nn.Module):
    """Random-feature attention, called as the baselines are.

    Args:
        feature_map: Its features.
    """

    def __init__(self, feature_map: FeatureMap) -> None:
        super().__init__()
        self.feature_map = feature_map

    def forward(
        self,
        query: Tensor,  # (b, h, n, d)
        key: Tensor,  # (b, h, s, d)
        value: Tensor,  # (b, h, s, e)
        key_padding_mask: Tensor | None = None,  # (b, s), True for real tokens
    ) -> Tensor:
        """Attention output, (b, h, n, e)."""
        return random_feature_attention(query, key, value, self.feature_map, key_padding_mask=key_padding_mask)


def build_attention(config: AttentionConfig, head_dim: int, num_heads: int, max_length: int, seed: int) -> nn.Module:
    """The attention a configuration names.

    Args:
        config: Name and options.
        head_dim: d.
        num_heads: Heads.
        max_length: Most tokens it will see.
        seed: Of its randomness.

    Raises:
        ValueError: For unknown names and options, and pairs of f and W without meaning.
    """
    if config.name in ATTENTIONS:
        return build(
            ATTENTIONS[config.name],
            f"attention {config.name!r}",
            config.options,
            (head_dim, num_heads, max_length, seed),
        )
    if "-" not in config.name:
        known = [*ATTENTIONS, *COMPONENTS]
        raise ValueError(
            f"unknown attention {config.name!r}; expected one of {', '.join(ATTENTIONS)}, or a component function and "
            f"a weight matrix such as 'oprf-orf' (`spectraformer list` shows all){nearest(config.name, known)}"
        )
    sizes = (head_dim, config.num_features, *parse_variant(config.name))
    reserved = {"num_heads": num_heads, "seed": seed, "device": None, "dtype": None}
    features = build(FeatureMap, f"attention {config.name!r}", config.options, sizes, **reserved)
    return RandomFeatures(features)


class Attention(nn.Module):
    """Multi-head self-attention around any attention, up to it and from it on.

    Args:
        width: w.
        num_heads: h.
        attention: From query, key and value (b, h, l, w / h) and key_padding_mask (b, l) to (b, h, l, w / h).
    """

    def __init__(self, width: int, num_heads: int, attention: nn.Module) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.project = nn.Linear(width, 3 * width)
        self.attention = attention
        self.out = nn.Linear(width, width)

    def join(self, attended: Tensor) -> Tensor:  # (b, h, l, w / h) -> (b, l, w)
        """What goes to the residual stream."""
        return self.out(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and a feed-forward block, each behind a norm and beside a residual connection.

    Args:
        config: Sizes and dropout.
        attention: As for :class:`Attention`.
    """

    def __init__(self, config: ModelConfig, attention: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.num_heads, attention)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.width, config.hidden),
            nn.GELU(),
            Dropout(config.dropout),
            nn.Linear(config.hidden, config.width),
        )
        self.dropout = Dropout(config.dropout)

    def begin(self, x: Tensor) -> Tensor:  # (b, l, w) -> (b, l, 3 w)
        """All before attention."""
        return self.attention.project(self.attention_norm(x))  # type: ignore[no-any-return]

    def attend(self, projected: Tensor, real: Tensor, merge: Merge) -> Tensor:
        """Attention itself, (b, l, 3 w) -> (b, h, l, w / h); real is (b, l) bool."""
        q, k, v = split_heads(projected, self.attention.num_heads, merge)
        return self.attention.attention(q, k, v, key_padding_mask=real)  # type: ignore[no-any-return]

    def end(self, x: Tensor, attended: Tensor) -> Tensor:  # (b, l, w), (b, h, l, w / h) -> (b, l, w)
        """All after attention."""
        x = x + self.dropout(self.attention.join(attended))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Token and learned position embeddings, layers, a norm, and the mean over tokens.

    Args:
        config: Sizes and dropout.
        attention: Which attention.
        vocab_size: Tokens are below it.
        max_length: Most tokens of a document.
        seed: Of the attentions' randomness; every layer has its own.
        protocol: "strict": the mean over real tokens; "published": their sum over the padded length.

    Attributes:
        stretches: How all but attention is computed in training, see :mod:`spectraformer.stretches`.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: AttentionConfig,
        vocab_size: int,
        max_length: int,
        seed: int,
        protocol: str,
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.protocol = protocol
        self.stretches = PLAIN
        self.tokens = nn.Embedding(vocab_size, config.width)
        self.positions = nn.Embedding(max_length, config.width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.dropout = Dropout(config.dropout)
        head_dim = config.width // config.num_heads
        self.layers = nn.ModuleList(
            Layer(config, build_attention(attention, head_dim, config.num_heads, max_length, seed * 1000 + number))
            for number in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(
        self,
        tokens: Tensor,  # (b, l) integers
        lengths: Tensor,  # (b,) how many of them are real
    ) -> Tensor:
        """One vector a document, (b, w)."""
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        layers = cast("list[Layer]", list(self.layers))
        # Evaluations are too few to be worth compiling.
        enter, between, leave, merge = self.stretches if self.training else PLAIN
        x, projected = enter(self, layers[0], tokens)
        for layer, following in pairwise(layers):
            x, projected = between(layer, following, x, layer.attend(projected, real, merge))
        return leave(self, layers[-1], x, layers[-1].attend(projected, real, merge), real, lengths)


class Classifier(nn.Module):
    """The encoder and a two-layer classifier of one document, or of two encoded alike.

    Two documents a, b are classified by [a, b, a * b, a - b].

    Args:
        config: Sizes.
        attention: Which attention.
        vocab_size: Tokens are below it.
        max_length: Most tokens of a document.
        num_classes: Number of classes.
        documents: Documents an example, 1 or 2.
        seed: Of the attentions' randomness.
        protocol: How tokens are averaged, see :class:`Encoder`.

    Raises:
        ValueError: For attentions that do not exist or do not fit.

    References:
        Long Range Arena (Tay et al., 2020), arXiv 2011.04006; sizes of Spectraformer, arXiv 2405.15310.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: AttentionConfig,
        *,
        vocab_size: int,
        max_length: int,
        num_classes: int,
        documents: int = 1,
        seed: int = 0,
        protocol: str = "strict",
    ) -> None:
        super().__init__()
        require_choice("protocol", protocol, PROTOCOLS)
        if documents not in (1, 2):
            raise ValueError(f"documents is {documents!r}; expected 1 or 2 documents an example")
        self.documents = documents
        self.encoder = Encoder(config, attention, vocab_size, max_length, seed, protocol)
        parts = 1 if documents == 1 else 4
        self.classifier = nn.Sequential(
            nn.Linear(parts * config.width, config.classifier), nn.ReLU(), nn.Linear(config.classifier, num_classes)
        )

    def forward(
        self,
        tokens: Tensor,  # (b, c, l) integers
        lengths: Tensor,  # (b, c)
    ) -> Tensor:
        """Logits, (b, classes).

        Raises:
            ValueError: If documents do not fit in number or length.
        """
        limit = self.encoder.max_length
        if tokens.ndim != 3 or tokens.shape[1] != self.documents or not 0 < tokens.shape[2] <= limit:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; "
                f"expected (batch, {self.documents} documents, 1 to {limit} tokens)"
            )
        encoded = self.encoder(tokens.flatten(0, 1), lengths.flatten()).unflatten(0, tokens.shape[:2])
        if self.documents == 1:
            joined = encoded[:, 0]
        else:
            a, b = encoded.unbind(1)
            joined = torch.cat((a, b, a * b, a - b), dim=-1)
        return self.classifier(joined)  # type: ignore[no-any-return]
