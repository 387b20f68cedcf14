"""Linear-time attention by random features: every component function with every weight matrix."""

from spectraformer.attention import attention_step, kernel_attention, random_feature_attention
from spectraformer.components import ComponentFunction
from spectraformer.features import FeatureMap
from spectraformer.multihead import RandomFeatureAttention
from spectraformer.ops import AttentionState, landmark_attention
from spectraformer.packed import packed_random_feature_attention
from spectraformer.registry import COMPONENTS, WEIGHTS, parse_variant
from spectraformer.weights import Projection, WeightMatrix

__version__ = "0.1.0"

__all__ = [
    "COMPONENTS",
    "WEIGHTS",
    "AttentionState",
    "ComponentFunction",
    "FeatureMap",
    "Projection",
    "RandomFeatureAttention",
    "WeightMatrix",
    "attention_step",
    "kernel_attention",
    "landmark_attention",
    "packed_random_feature_attention",
    "parse_variant",
    "random_feature_attention",
]
