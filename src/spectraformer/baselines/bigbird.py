"""Attention of BigBird: a fixed graph of blocks, some global, some near, some random."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from spectraformer.baselines.base import Baseline
from spectraformer.baselines.masked import masked_attention
from spectraformer.checks import check_dropout, require_integer


class BigBird(Baseline):
    r"""Exact softmax attention over a sparse graph of blocks, from existing tokens alone (BigBird-ITC).

    .. math:: \mathrm{softmax}_{j \in N(i)}(q_i \cdot k_j / \sqrt d)\, v_j

    N(i) are the tokens in blocks that the block of i sees: the first g blocks, w blocks around it, and r random
    others, each once; blocks among the first g see all. Every head has random blocks of its own, a function of
    ``seed`` and ``max_length``; a shorter input sees its corner of the graph, so that padding changes nothing.
    The paper leaves open which blocks are global; the authors' program takes the first and the last, and the last
    would be padding.

    Causal attention keeps the earlier tokens of the graph; the paper itself has dense decoders.

    Args:
        head_dim: d.
        num_heads: h.
        max_length: Most tokens.
        seed: Of the random blocks.
        block_size: Tokens in a block. This and the next three are the paper's for base models, and the
            setting for the Long Range Arena (arXiv 2405.15310).
        num_global_blocks: g.
        num_window_blocks: w, odd: a block and (w - 1) / 2 on each side.
        num_random_blocks: r; fewer where no more are left.
        dropout: Of attention weights, in training.

    Raises:
        ValueError: For options out of range.

    References:
        Big Bird (Zaheer et al., 2020), arXiv 2007.14062, section 2 and the appendix on blocks.
    """

    complexity = "n (g + w + r) block_size"
    memory = "n (g + w + r)"
    source = "Zaheer et al. 2020, arXiv 2007.14062"
    has_causal_form = True
    has_cross_form = False

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        max_length: int,
        seed: int,
        *,
        block_size: int = 64,
        num_global_blocks: int = 2,
        num_window_blocks: int = 3,
        num_random_blocks: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(head_dim, num_heads, max_length, seed)
        require_integer("block_size", block_size)
        require_integer("num_global_blocks", num_global_blocks, least=0)
        require_integer("num_window_blocks", num_window_blocks)
        require_integer("num_random_blocks", num_random_blocks, least=0)
        if num_window_blocks % 2 == 0:
            raise ValueError(
                f"num_window_blocks is {num_window_blocks}; expected an odd number: a block and as many on each side; "
                f"nearest: {num_window_blocks + 1}"
            )
        check_dropout(dropout)
        self.block_size = block_size
        self.num_global_blocks = num_global_blocks
        self.dropout = dropout
        columns = _columns(
            num_heads,
            math.ceil(max_length / block_size),
            (num_global_blocks, num_window_blocks, num_random_blocks),
            torch.Generator().manual_seed(seed),
        )
        self.columns: Tensor  # (h, blocks, slots): which blocks a block sees, -1 for none
        self.register_buffer("columns", columns)

    def attend(
        self,
        query: Tensor,  # (b, h, n, d)
        key: Tensor,  # (b, h, n, d)
        value: Tensor,  # (b, h, n, e)
        mask: Tensor | None,  # (b, n)
        is_causal: bool,
    ) -> Tensor:
        """Attention output, (b, h, n, e)."""
        length, size = query.shape[2], self.block_size
        if length > self.max_length:
            raise ValueError(f"query has {length} tokens; BigBird was made for max_length={self.max_length}")
        real = query.new_ones(1, length, dtype=torch.bool) if mask is None else mask
        behind = -length % size
        query, key, value = (functional.pad(x, (0, 0, 0, behind)) for x in (query, key, value))
        real = functional.pad(real, (0, behind))
        position = torch.arange(length + behind, device=query.device)
        border = min(self.num_global_blocks * size, length + behind)
        parts = []
        if border:
            first = query[:, :, :border]
            if is_causal:
                seen = real[:, None, None, :] & (position <= position[:border, None])
                parts.append(self._softmax(first, key, value, seen))
            else:
                parts.append(masked_attention(first, key, value, real[:, None], dropout=self._dropout()))
        if border < length + behind:
            parts.append(self._attend_sparse(query, key, value, real, position, border // size, is_causal))
        return torch.cat(parts, dim=2)[:, :, :length]

    def _attend_sparse(
        self,
        query: Tensor,  # (b, h, n, d), n a multiple of block_size
        key: Tensor,  # (b, h, n, d)
        value: Tensor,  # (b, h, n, e)
        real: Tensor,  # (b or 1, n)
        position: Tensor,  # (n,)
        first: int,
        is_causal: bool,
    ) -> Tensor:
        """Output of all blocks from ``first`` on, each of which attends to the blocks gathered for it."""
        into = (-1, self.block_size)
        blocks = query.shape[2] // self.block_size
        columns = self.columns[:, first:blocks]
        # (h, rows, slots); in place of a block that does not exist stands one of padding, behind all others
        columns = columns.masked_fill((columns < 0) | (columns >= blocks), blocks)
        head = torch.arange(self.num_heads, device=query.device)[:, None, None]
        key, value = (functional.pad(x, (0, 0, 0, self.block_size)) for x in (key, value))
        # (b, h, rows, slots * block_size, dim), then heads and rows as one: fused kernels take four dimensions.
        keys, values = (torch.unflatten(x, 2, into)[:, head, columns].flatten(3, 4).flatten(1, 2) for x in (key, value))
        seen = torch.unflatten(functional.pad(real, (0, self.block_size)), 1, into)[:, columns].flatten(3).flatten(1, 2)
        rows = torch.unflatten(query, 2, into)[:, :, first:].flatten(1, 2)
        if is_causal:
            at = torch.unflatten(functional.pad(position, (0, self.block_size), value=query.shape[2]), 0, into)
            earlier = at[columns].flatten(2).unsqueeze(2) <= at[first:blocks, :, None]
            out = self._softmax(rows, keys, values, seen.unsqueeze(2) & earlier.flatten(0, 1))
        else:
            out = masked_attention(rows, keys, values, seen, dropout=self._dropout())
        return torch.unflatten(out, 1, (self.num_heads, -1)).flatten(2, 3)

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def _softmax(
        self,
        query: Tensor,  # (b, rows, n, d)
        key: Tensor,  # (b, rows, s, d)
        value: Tensor,  # (b, rows, s, e)
        seen: Tensor,  # broadcast to (b, rows, n, s)
    ) -> Tensor:
        """Softmax attention to what each query sees, (b, rows, n, e); 0 where that is nothing."""
        none = ~seen.any(-1, keepdim=True)
        mask, dropout = seen | none, self._dropout()
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return out.masked_fill(none, 0.0)


def _columns(heads: int, blocks: int, counts: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Which blocks a block sees: global, then window, then random, -1 for none, (heads, blocks, slots)."""
    num_global, num_window, num_random = (min(count, 2 * blocks + 1) for count in counts)
    block = torch.arange(blocks)
    row = block[:, None]
    first = block[:num_global].expand(blocks, -1)
    window = row + torch.arange(num_window) - num_window // 2
    window = window.masked_fill((window < num_global) | (window >= blocks), -1)
    taken = ((row - block).abs() <= num_window // 2) | (block < num_global)
    draw = torch.rand(heads, blocks, blocks, generator=generator).masked_fill(taken, math.inf)
    lowest = draw.topk(min(num_random, blocks), largest=False)
    random = lowest.indices.masked_fill(lowest.values.isinf(), -1)
    return torch.cat((torch.cat((first, window), 1).expand(heads, -1, -1), random), -1)
