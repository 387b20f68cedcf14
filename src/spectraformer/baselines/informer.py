"""ProbSparse attention of the Informer: softmax for the queries that are far from uniform, the mean for others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectraformer.baselines.base import Baseline
from spectraformer.baselines.masked import masked_attention
from spectraformer.checks import check_dropout, require_integer
from spectraformer.ops.rows import token_rows


class Informer(Baseline):
    r"""ProbSparse attention: u queries attend to every key, all others output the mean of the values.

    .. math:: \bar M(q_i) = \max_{j \in S} q_i k_j^T / \sqrt d - \frac{1}{|S|} \sum_{j \in S} q_i k_j^T / \sqrt d

    over a sample S of keys picks them, one sample for all queries (Algorithm 1, lines 1 to 4; the authors' program
    draws S anew for each query, and divides by the number of all keys). S is drawn without replacement, so it is all
    keys once ``num_keys`` reaches their number. In training every forward draws S from torch's global generator; in
    evaluation S is a function of ``seed`` and of the number of real keys.

    Padding is neither sampled, nor selected, nor in the mean. If n = s, the mask is that of the queries too.

    There is no causal form: the paper masks the scores and takes cumulative means, but which queries are among the
    top u, and the sample that ranks them, still depend on later tokens.

    Args:
        head_dim: d.
        num_heads: h.
        max_length: Most keys.
        seed: Of the sample in evaluation.
        num_queries: u. The paper's c ln n; 128 is the setting for the Long Range Arena (arXiv 2405.15310).
        num_keys: |S|, the paper's c ln s; 128 likewise.
        dropout: Of attention weights of the u queries, in training.

    Raises:
        ValueError: For options out of range.

    References:
        Informer (Zhou et al., 2021), arXiv 2012.07436, Algorithm 1.
    """

    complexity = "n (u + s), u queries and s sampled keys"
    memory = "n s"
    source = "Zhou et al. 2021, arXiv 2012.07436"

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        max_length: int,
        seed: int,
        *,
        num_queries: int = 128,
        num_keys: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(head_dim, num_heads, max_length, seed)
        require_integer("num_queries", num_queries)
        require_integer("num_keys", num_keys)
        check_dropout(dropout)
        self.num_queries = num_queries
        self.num_keys = num_keys
        self.dropout = dropout
        self.priority: Tensor  # the real keys of lowest priority are the sample
        self.register_buffer("priority", torch.rand(max_length, generator=torch.Generator().manual_seed(seed)))

    def attend(
        self,
        query: Tensor,  # (b, h, n, d)
        key: Tensor,  # (b, h, s, d)
        value: Tensor,  # (b, h, s, e)
        mask: Tensor | None,  # (b, s)
        is_causal: bool,
    ) -> Tensor:
        """Attention output, (b, h, n, e)."""
        if key.shape[2] > self.max_length:
            raise ValueError(f"key has {key.shape[2]} tokens; Informer was made for max_length={self.max_length}")
        real = key.new_ones(1, key.shape[2], dtype=torch.bool) if mask is None else mask
        real_queries = real if query.shape[2] == key.shape[2] else None
        if mask is not None and real_queries is not None:
            query = query.masked_fill(~mask[:, None, :, None], 0.0)
        chosen = self._select(query.detach(), key.detach(), real, real_queries)
        rows = token_rows(query, chosen)
        attended = masked_attention(
            query[rows],
            key,
            value,
            None if mask is None else mask[:, None],
            dropout=self.dropout if self.training else 0.0,
        )
        total = value.sum(2, keepdim=True, dtype=torch.promote_types(value.dtype, torch.float32))
        mean = (total / real.sum(-1).clamp(min=1)[:, None, None, None]).to(value.dtype)
        # Compiled, rows that share their memory would all be written.
        out = mean.expand(-1, -1, query.shape[2], -1).contiguous()
        return out.index_put(rows, attended.to(value.dtype))

    def _select(
        self,
        query: Tensor,  # (b, h, n, d)
        key: Tensor,  # (b, h, s, d), 0 at padding
        real: Tensor,  # (b or 1, s)
        real_queries: Tensor | None,  # (b or 1, n)
    ) -> Tensor:
        """Indices of the u queries with the largest sparsity measure, (b, h, u)."""
        priority = torch.rand_like(self.priority) if self.training else self.priority
        # A key's priority is that of its rank among real keys: padding must not change the sample.
        rank = (real.cumsum(-1) - 1).clamp(min=0)
        drawn = priority[rank].masked_fill(~real, math.inf)
        sample = drawn.topk(min(self.num_keys, key.shape[2]), largest=False).indices  # (b or 1, |S|)
        counted = real.gather(1, sample)[:, None, None, :]
        scores = query @ key.take_along_dim(sample[:, None, :, None], 2).mT  # padding scores 0: not in the sum
        mean = scores.sum(-1, dtype=torch.promote_types(scores.dtype, torch.float32)) / counted.sum(-1).clamp(min=1)
        measure = scores.masked_fill(~counted, -math.inf).amax(-1) - mean
        if real_queries is not None:
            measure = measure.masked_fill(~real_queries[:, None, :], -math.inf)
        return measure.topk(min(self.num_queries, query.shape[2])).indices
