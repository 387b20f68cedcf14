"""What an attention keeps of the tokens it has seen, where that does not grow with their number."""

from __future__ import annotations

import json
from functools import cache

import torch

from spectraformer import registry
from spectraformer.components import ComponentFunction
from spectraformer.config import AttentionConfig, ModelConfig, canonical
from spectraformer.features import FeatureMap
from spectraformer.weights.base import WeightMatrix


def state_numbers(attention: AttentionConfig, model: ModelConfig) -> int | None:
    """Numbers a head of the state that decodes token by token, f (e + 1) and the scales of f features.

    None for attentions that are not random features, such as softmax, whose state grows with every token, for
    functions without a causal form, and for names and options that are unknown here.
    """
    options = dict(attention.options)
    parts = {name: canonical(options.pop(name, None)) for name in ("component_options", "weight_options")}
    head_dim = model.width // model.num_heads
    try:
        component, weight = registry.parse_variant(attention.name)
        feature_map = FeatureMap(
            head_dim,
            attention.num_features,
            _component(component, parts["component_options"], head_dim, model.num_heads),
            _weight(weight, parts["weight_options"], head_dim, attention.num_features),
            num_heads=model.num_heads,
            **{name: option for name, option in options.items() if name != "share_weight"},  # a head has its W anyway
        )
    except (ValueError, TypeError):
        return None
    looks_ahead = feature_map.data_dependent and feature_map.statistics == "batch"
    if feature_map.component.needs_minimum or looks_ahead:
        return None
    state = feature_map.init_state(1, model.num_heads, head_dim, device="meta")
    return sum(part.numel() for part in state if part is not None) // model.num_heads


# A table of every pair has 19 matrices and 14 functions, not 266 of each; sampling one takes a tenth of a second.
@cache
def _weight(name: str, options: str, head_dim: int, num_features: int) -> WeightMatrix:
    generator = torch.Generator().manual_seed(0)
    return registry.build_weight(name, json.loads(options), head_dim, num_features, None, None, generator)


@cache
def _component(name: str, options: str, head_dim: int, num_heads: int) -> ComponentFunction:
    generator = torch.Generator().manual_seed(0)
    return registry.build_component(name, json.loads(options), head_dim, num_heads, generator)
