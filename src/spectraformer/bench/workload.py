"""What is measured: one shape, one kind of attention, and the inputs of both.

Legend: b batch, h heads, n tokens, d head dim, m features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MODES = ("forward", "forward+backward")
# Inputs are rotated over so many times the last-level cache, so that none is found there again.
CACHES = 4
LAST_LEVEL_BYTES = 32 << 20  # of a CPU; a GPU tells its own
MAX_SETS = 64


class Inputs(NamedTuple):
    """One set of inputs, and the gradient of the output; all (b, h, n, d)."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor


@dataclass(frozen=True)
class Workload:
    """One shape and one kind of attention.

    Attributes:
        head_dim: d, of queries, keys and values.
        num_features: m.
        batch: b.
        heads: h.
        dtype: Of the inputs.
        device: Where.
        is_causal: Whether query t sees keys 0..t only.
        backward: Whether gradients of queries, keys and values are computed too.
    """

    head_dim: int
    num_features: int
    batch: int
    heads: int
    dtype: torch.dtype
    device: torch.device
    is_causal: bool
    backward: bool

    @property
    def mode(self) -> str:
        """One of MODES."""
        return MODES[self.backward]

    def inputs(self, tokens: int, seed: int, *, tokens_first: bool = False) -> Inputs:
        """Standard normal inputs of some length; a function of length and seed, whatever the layout.

        Args:
            tokens: n.
            seed: Of the set.
            tokens_first: Whether memory is laid out as (b, n, h, d).
        """
        generator = torch.Generator(self.device).manual_seed(1_000_003 * seed + tokens)
        shape = (self.batch, self.heads, tokens, self.head_dim)
        made = []
        for _ in range(4 if self.backward else 3):
            x = torch.empty(shape, dtype=self.dtype, device=self.device).normal_(generator=generator)
            if tokens_first:
                x = x.transpose(1, 2).contiguous().transpose(1, 2)
            made.append(x)
        for x in made[:3]:
            x.requires_grad_(self.backward)
        return Inputs(made[0], made[1], made[2], made[-1])

    def input_bytes(self, tokens: int) -> int:
        """Bytes of queries, keys and values of one set."""
        return 3 * self.batch * self.heads * tokens * self.head_dim * self.dtype.itemsize

    def sets(self, tokens: int) -> int:
        """How many sets of inputs outgrow the last-level cache: 1 for long sequences."""
        cache = LAST_LEVEL_BYTES
        if self.device.type == "cuda":
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(1, min(MAX_SETS, -(-CACHES * cache // self.input_bytes(tokens))))
