r"""Moments of the queries and keys of one sequence and head: what data-dependent parameters are made of.

One rule for all of them: per batch item and head, over real tokens only, after scaling, detached. So no batch
item influences another, padding influences nothing, and gradients never flow through a parameter of the
estimator.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from spectraformer.components.pairs import fold_groups
from spectraformer.ops.sequences import Sequences
from spectraformer.ops.triton import moments as fused

Order = Literal["none", "trace", "diagonal", "full"]
"""How much of the second moment is needed: nothing, its trace, its diagonal, or the whole matrix."""


class Moments(NamedTuple):
    """Sums over the tokens of one side, divided by their number.

    Attributes:
        mean: mu, (b, h, d).
        second: E x x^T, (b, h, d, d), or its diagonal, (b, h, d); where only the trace is needed, its d-th part in
            each entry.
        minimum: Least coordinate over all tokens, (b, h, d); None where nothing needs it.
    """

    mean: Tensor
    second: Tensor
    minimum: Tensor | None = None

    @property
    def diagonal(self) -> Tensor:
        """E x_l^2, (b, h, d)."""
        full = self.second.ndim == self.mean.ndim + 1
        return self.second.diagonal(dim1=-2, dim2=-1) if full else self.second

    @property
    def matrix(self) -> Tensor:
        """E x x^T, (b, h, d, d)."""
        full = self.second.ndim == self.mean.ndim + 1
        return self.second if full else torch.diag_embed(self.second)

    def shifted(self, shift: Tensor) -> Moments:  # shift: (b, h, d)
        """The moments of x - shift."""
        mean = self.mean - shift
        if self.second.ndim == self.mean.ndim:
            second = self.second - 2 * shift * self.mean + shift.square()
        else:
            cross = shift.unsqueeze(-1) * self.mean.unsqueeze(-2)
            outer = shift.unsqueeze(-1) * shift.unsqueeze(-2)
            second = self.second - cross - cross.transpose(-1, -2) + outer
        return Moments(mean, second, None if self.minimum is None else self.minimum - shift)


@torch.no_grad()
def moments(
    tokens: Tensor,  # (b, h, n, d)
    mask: Tensor | None,  # (b, n), True for real tokens
    root: float,
    order: Order,
    minimum: bool,
) -> Moments:
    """Moments of ``root * tokens`` over real tokens; zeros where there are none.

    Args:
        tokens: Queries or keys as given.
        mask: Which tokens are real; None means all.
        root: The square root of the attention scale.
        order: How much of the second moment is computed.
        minimum: Whether the least coordinates are computed.
    """
    # Eigenvectors and translations amplify rounding into another estimator of the same kernel: sum those in float64.
    precise = order == "full" or minimum
    x = tokens.to(torch.float64 if precise else torch.promote_types(tokens.dtype, torch.float32))
    n = x.shape[-2]
    mask = None if mask is None else mask.unsqueeze(1)
    if mask is None:
        count = x.new_full((1, 1, 1), max(n, 1))
    else:
        x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        count = mask.sum(-1).clamp_min(1).unsqueeze(-1).to(x.dtype)  # (b, 1, 1)
    mean = x.sum(-2) * (root / count)
    if order == "full":
        second = (x.mT @ x) * (root * root / count.unsqueeze(-1))
    elif order == "diagonal":
        second = x.square().sum(-2) * (root * root / count)
    elif order == "trace":
        # One pass in memory order, a tenth of the time of sums over each coordinate.
        trace = torch.linalg.vector_norm(x, dim=(-2, -1)).square()[..., None] * (root * root / count)
        second = (trace / x.shape[-1]).expand_as(mean)
    else:
        second = torch.zeros_like(mean)
    if not minimum:
        return Moments(mean, second)
    if n == 0:
        return Moments(mean, second, torch.zeros_like(mean))
    hidden = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), torch.finfo(x.dtype).max)
    least = hidden.amin(-2) * root
    if mask is not None:
        least = torch.where(mask.any(-1, keepdim=True), least, 0.0)
    return Moments(mean, second, least)


def paired_moments(
    query: Tensor,  # (b, h * g, n, d)
    key: Tensor,  # (b, h, s, d)
    query_mask: Tensor | None,  # (b, n), True for real tokens
    key_mask: Tensor | None,  # (b, s)
    root: float,
    order: Order,
    minimum: bool,
    sequences: Sequences | None = None,
) -> tuple[Moments, Moments]:
    """:func:`moments` of queries and of keys; query heads that share a key head are one sequence.

    On a GPU both sides take one read of the tokens, in one launch; least coordinates, and whole matrices of float32
    tokens, stay with plain torch, which sums them in float64.

    Args:
        query: Queries as given.
        key: Keys as given.
        query_mask: Which queries are real; None means all.
        key_mask: Which keys are real; None means all.
        root: The square root of the attention scale.
        order: How much of the second moments is computed.
        minimum: Whether the least coordinates are computed.
        sequences: Of a packed batch, which must suit the fused kernels; b of the results is theirs.
    """
    if sequences is not None or (not minimum and not fused.refusals(query, key, order)):
        mean, second = fused.sequence_moments(query, key, query_mask, key_mask, root, order, sequences=sequences)
        q, k = map(Moments, mean.unbind(), second.unbind())
        return q, k
    h = key.shape[1]
    rows = None if query_mask is None else query_mask.repeat(1, query.shape[1] // h)
    folded = fold_groups(query, h)
    return moments(folded, rows, root, order, minimum), moments(key, key_mask, root, order, minimum)


def mean_squared_sum(q: Moments, k: Moments) -> Tensor:  # (b, h)
    r"""phi, the mean of :math:`\|x_i + y_j\|^2` over all pairs, without forming a pair."""
    return torch.addcmul(q.diagonal + k.diagonal, q.mean, k.mean, value=2).sum(-1).clamp_min(0.0)


def optimal_rho(phi: Tensor, d: int) -> Tensor:
    r"""The rho that minimises the mean log second moment of positive features.

    .. math:: \rho^* = \frac{2d}{2\varphi + d + \sqrt{(2\varphi + d)^2 + 8 d\varphi}} \in (0, 1]

    with :math:`A = -(1-\rho)/(8\rho)`; phi = 0 gives rho = 1, plain positive features.

    References:
        Likhosherstov et al., Chefs' Random Tables, arXiv 2205.15317.
    """
    # In units of d, and in as few operations as there are: each is a launch.
    u4 = phi * (8 / d)
    p = torch.rsub(u4, 1.0, alpha=-0.25)
    return (p + torch.addcmul(u4, p, p).sqrt()).reciprocal() * 2


class RunningMoments(nn.Module):
    """Moments averaged over training, in persistent buffers: what causal attention uses, which must not look ahead.

    They start at unit-variance queries and keys under the default scale: mean 0, E x_l^2 = 1 / sqrt(d). The moments
    before the last update are kept beside them (not saved): a pass repeated in backward must see those.

    Args:
        head_dim: d.
        num_heads: Heads with moments of their own; None pools the heads.
        order: How much of the second moments is kept.
    """

    query_mean: Tensor
    query_second: Tensor
    key_mean: Tensor
    key_second: Tensor
    updates: Tensor

    def __init__(self, head_dim: int, num_heads: int | None, order: Order) -> None:
        super().__init__()
        self.num_heads = num_heads
        p = num_heads or 1
        second = torch.full((p, head_dim), 1 / math.sqrt(head_dim))
        for side in ("query", "key"):
            start = {
                "mean": torch.zeros(p, head_dim),
                "second": torch.diag_embed(second) if order == "full" else second,
            }
            for part, value in start.items():
                self.register_buffer(f"{side}_{part}", value.clone())
                self.register_buffer(f"previous_{side}_{part}", value.clone(), persistent=False)
        self.register_buffer("updates", torch.zeros(()))

    def forward(self, previous: bool = False) -> tuple[Moments, Moments]:
        """Copies of the moments of queries and keys, (1, p, d) each, now or before the last update; no minima."""
        prefix = "previous_" if previous else ""
        query, key = (
            Moments(
                getattr(self, f"{prefix}{side}_mean").clone().unsqueeze(0),
                getattr(self, f"{prefix}{side}_second").clone().unsqueeze(0),
            )
            for side in ("query", "key")
        )
        return query, key

    @torch.no_grad()
    def update(self, q: Moments, k: Moments, momentum: float, real: Tensor | None = None) -> None:
        """Moves towards the moments of a batch; the first batches are averaged with equal weights.

        Args:
            q: Moments of queries, (b, h, d).
            k: Moments of keys, (b, h, d).
            momentum: Least weight of the batch.
            real: Which batch items have real tokens at all, (b,); None means all. Items that are not finite are left
                out: one overflow must not spoil the moments for good.
        """
        finite = (
            q.mean.sum((1, 2)) + k.mean.sum((1, 2)) + q.second.flatten(1).sum(1) + k.second.flatten(1).sum(1)
        ).isfinite()
        real = finite if real is None else finite & real
        share = real.to(q.mean.dtype)
        total = share.sum()
        weight = torch.where(total > 0, (1 / (self.updates + 1)).clamp_min(momentum), 0.0)
        for side, moments_of_side in (("query", q), ("key", k)):
            for part in ("mean", "second"):
                held: Tensor = getattr(self, f"{side}_{part}")
                getattr(self, f"previous_{side}_{part}").copy_(held)
                found = getattr(moments_of_side, part).to(share.dtype)
                found = torch.where(real.view(-1, *(1,) * (found.ndim - 1)), found, 0.0)
                pooled = torch.tensordot(share, found, 1) / total.clamp_min(1)
                pooled = pooled if self.num_heads is not None else pooled.mean(0, keepdim=True)
                held.lerp_(pooled.to(held.dtype), weight.to(held.dtype))
        self.updates += (total > 0).to(self.updates.dtype)

    @torch.no_grad()
    def replace(self, q: Moments, k: Moments) -> None:
        """Forgets everything but these moments."""
        self.updates.zero_()
        self.update(q, k, momentum=0.0)
