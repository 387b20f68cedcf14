"""Attentions to compare with, one a file, all called alike.

A factory ``(head_dim, num_heads, max_length, seed, **options)`` makes a module that maps query, key, value
(b, h, tokens, dim) and ``key_padding_mask`` (b, s), True for real tokens, to (b, h, n, e). Another package adds
its own by the entry-point group ``spectraformer.attentions``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from spectraformer.baselines.base import Baseline
from spectraformer.baselines.bigbird import BigBird
from spectraformer.baselines.informer import Informer
from spectraformer.baselines.kernelized import Kernelized
from spectraformer.baselines.linformer import Linformer
from spectraformer.baselines.nystrom import Nystrom
from spectraformer.baselines.reformer import Reformer
from spectraformer.baselines.skyformer import Skyformer
from spectraformer.baselines.softmax import Softmax
from spectraformer.registry import Table

MakeAttention = Callable[..., nn.Module]

ATTENTIONS: Table[MakeAttention] = Table(
    "attention",
    {
        "softmax": Softmax,
        "kernelized": Kernelized,
        "nystrom": Nystrom,
        "linformer": Linformer,
        "informer": Informer,
        "reformer": Reformer,
        "bigbird": BigBird,
        "skyformer": Skyformer,
    },
    "spectraformer.attentions",
)

__all__ = [
    "ATTENTIONS",
    "Baseline",
    "BigBird",
    "Informer",
    "Kernelized",
    "Linformer",
    "MakeAttention",
    "Nystrom",
    "Reformer",
    "Skyformer",
    "Softmax",
]
