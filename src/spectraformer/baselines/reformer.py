"""Attention of the Reformer: among tokens that locality-sensitive hashing puts into one bucket."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from spectraformer.baselines.base import Baseline
from spectraformer.checks import check_dropout, require_integer
from spectraformer.ops.rows import select_rows

MOST_ROTATED = 128  # more buckets than this are pairs of two hashes: directions to compare with grow as sqrt(n), not n
SELF = -1e5  # the score of a token with itself (Appendix A): it counts only where nothing else is seen


class Reformer(Baseline):
    r"""LSH attention with queries shared as keys: the union of several rounds of hashing.

    .. math::
        o_i = \sum_{j \in P_i} \frac{\exp(q_i \cdot q_j / |q_j|)}{Z_i} v_j, \quad
        P_i = \bigcup_r \{j \ne i : h_r(q_j) = h_r(q_i),\ 0 \le c_r(i) - c_r(j) \le 1\}, \quad
        h_r(x) = \arg\max [x R_r; -x R_r]

    where c_r(i) is the chunk of i after sorting by (h_r, position). A token that sees nothing else sees itself.
    Rounds are merged by their log-sum-exp, and a pair that several rounds see counts once, as in Appendix A.

    **The key argument is ignored**: queries are the keys, normalised (section 2, "shared-QK"), with no further
    scaling. In training every forward draws R from torch's global generator; in evaluation R is a function of
    ``seed``. Padding sorts behind all tokens, is seen by none and outputs 0. The number of buckets depends on
    ``max_length``, not on the length at hand, so that padding changes nothing.

    There is no causal form: with later tokens masked, chunk borders, hence which earlier tokens are seen, still
    depend on them.

    Args:
        head_dim: d.
        num_heads: h.
        max_length: Decides the default number of buckets; longer inputs go too.
        seed: Of the rotations in evaluation.
        num_hashes: Rounds of hashing. 2 is the setting for the Long Range Arena (arXiv 2405.15310).
        chunk_size: m, sorted tokens in a chunk, 64 likewise; each sees its own chunk and the one before.
        num_buckets: Even. Default 2 max_length / m (section 2); above 128 two hashes are combined.
        dropout: Of attention weights, in training.

    Raises:
        ValueError: For options out of range.

    References:
        Reformer (Kitaev et al., 2020), arXiv 2001.04451, section 2 and Appendix A.
    """

    complexity = "n log n to sort, n m to attend"
    memory = "n m"
    source = "Kitaev et al. 2020, arXiv 2001.04451"
    has_cross_form = False

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        max_length: int,
        seed: int,
        *,
        num_hashes: int = 2,
        chunk_size: int = 64,
        num_buckets: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(head_dim, num_heads, max_length, seed)
        require_integer("num_hashes", num_hashes)
        require_integer("chunk_size", chunk_size)
        if num_buckets is not None:
            require_integer("num_buckets", num_buckets, least=2)
            if num_buckets % 2:
                raise ValueError(
                    f"num_buckets is {num_buckets}; expected an even number: a bucket is a direction or its opposite; "
                    f"nearest: {num_buckets + 1}"
                )
        check_dropout(dropout)
        self.num_hashes = num_hashes
        self.chunk_size = chunk_size
        self.dropout = dropout
        wanted = 2 * math.ceil(max_length / chunk_size) if num_buckets is None else num_buckets
        self.factors = (wanted,) if wanted <= MOST_ROTATED else _two_even_factors(wanted)
        self.num_buckets = math.prod(self.factors)
        shape = (num_hashes, num_heads, head_dim, sum(self.factors) // 2)
        self.rotations: Tensor
        self.register_buffer("rotations", torch.randn(shape, generator=torch.Generator().manual_seed(seed)))

    def attend(
        self,
        query: Tensor,  # (b, h, n, d)
        key: Tensor,  # (b, h, n, d), ignored
        value: Tensor,  # (b, h, n, e)
        mask: Tensor | None,  # (b, n)
        is_causal: bool,
    ) -> Tensor:
        """Attention output, (b, h, n, e)."""
        length, size, dtype = query.shape[2], self.chunk_size, value.dtype
        precise = torch.promote_types(torch.promote_types(query.dtype, value.dtype), torch.float32)
        buckets = self._hash(query.detach().to(precise))  # (r, b, h, n)
        if mask is not None:
            buckets = buckets.masked_fill(~mask[:, None, :], self.num_buckets)
        behind = -length % size
        buckets = functional.pad(buckets, (0, behind), value=self.num_buckets)
        tokens = functional.pad(torch.cat((query, value), -1), (0, 0, 0, behind))
        order = buckets.argsort(stable=True, dim=-1)  # (r, b, h, n): which token stands at a place
        place = order.argsort(-1)  # its inverse
        codes = self._codes(buckets, place)
        # Tokens of all sequences and heads are rows of one matrix.
        start = torch.arange(0, tokens.shape[:3].numel(), tokens.shape[2], device=query.device)
        start = start.view(*tokens.shape[:2], 1)
        rounds = []
        for number in range(self.num_hashes):
            there, back = ((x[number] + start).flatten() for x in (order, place))
            queries, values = torch.tensor_split(
                select_rows(tokens.flatten(0, 2), there, back).view(tokens.shape).to(precise), [query.shape[3]], -1
            )
            bias = self._bias(number, order[number], buckets, codes, precise)
            out, log_total = self._attend_round(queries, values, bias)
            found = torch.cat((out.to(precise), log_total.unsqueeze(-1)), -1)
            rounds.append(select_rows(found.flatten(0, 2), back, there).view(found.shape))
        together = torch.stack(rounds)
        merged = (together[..., :-1] * together[..., -1:].softmax(0)).sum(0)
        return merged[:, :, :length].to(dtype)

    def _codes(
        self,
        buckets: Tensor,  # (r, b, h, n)
        place: Tensor,  # (r, b, h, n)
    ) -> Tensor:
        """Numbers, (r, b, h, n), that are equal in one bucket and chunk, and one less in the chunk before."""
        return buckets * (buckets.shape[-1] // self.chunk_size + 1) + place // self.chunk_size

    @torch.no_grad()
    def _bias(
        self,
        number: int,
        order: Tensor,  # (b, h, n)
        buckets: Tensor,  # (r, b, h, n)
        codes: Tensor,  # (r, b, h, n)
        dtype: torch.dtype,
    ) -> Tensor:
        """What is added to the scores of a round, (b, h, chunks, m, 2 m).

        Minus the logarithm of how many rounds see the pair, -inf if this one does not; :data:`SELF` for a token with
        itself.
        """

        def pairs(x: Tensor) -> tuple[Tensor, Tensor]:  # (b, h, n) -> (b, h, chunks, m, 1), (b, h, chunks, 1, 2 m)
            chunks = torch.unflatten(x.take_along_dim(order, 2), 2, (-1, self.chunk_size)).unsqueeze(-1)
            return chunks, _with_previous(chunks, -2).mT

        bias = torch.zeros((), dtype=dtype, device=order.device)
        repeats = torch.zeros((), dtype=torch.uint8, device=order.device)
        for other in range(self.num_hashes):
            if other != number:
                of_query, of_key = pairs(codes[other])
                repeats = repeats + ((of_query == of_key) | (of_query == of_key + 1))
        for count in range(1, self.num_hashes):
            bias = torch.where(repeats == count, -math.log(1 + count), bias)
        of_query, of_key = pairs(buckets[number])
        bias = torch.where(of_query == of_key, bias, -math.inf)
        bias.diagonal(self.chunk_size, -2, -1).fill_(SELF)
        return bias

    def _attend_round(
        self,
        queries: Tensor,  # (b, h, n, d)
        values: Tensor,  # (b, h, n, e)
        bias: Tensor,  # (b, h, chunks, m, 2 m)
    ) -> tuple[Tensor, Tensor]:
        """Output (b, h, n, e) and logarithm of its normaliser (b, h, n) of one round, in the round's order."""
        into = (-1, self.chunk_size)
        keys = _with_previous(torch.unflatten(functional.normalize(queries, dim=-1), 2, into), 0.0)
        values = _with_previous(torch.unflatten(values, 2, into), 0.0)
        # In place: all but the product and the exponential is linear, and its gradient needs nothing.
        scores = (torch.unflatten(queries, 2, into) @ keys.mT).to(bias.dtype).add_(bias)
        top = scores.detach().amax(-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        out = functional.dropout(weights, self.dropout, self.training) @ values / total
        return out.flatten(2, 3), (top + total.log()).flatten(2)

    @torch.no_grad()
    def _hash(
        self,
        x: Tensor,  # (b, h, n, d)
    ) -> Tensor:
        """The bucket of every token in every round, (r, b, h, n)."""
        rotations = torch.randn_like(self.rotations) if self.training else self.rotations
        rounds = []
        for rotation in rotations.to(x.dtype):
            bucket = x.new_zeros(x.shape[:3], dtype=torch.int64)
            for factor, part in zip(self.factors, rotation.split([f // 2 for f in self.factors], -1), strict=True):
                rotated = x @ part
                best = rotated.abs().argmax(-1, keepdim=True)
                opposite = rotated.gather(-1, best) < 0
                bucket = bucket * factor + (best + opposite * (factor // 2)).squeeze(-1)
            rounds.append(bucket)
        return torch.stack(rounds)


def _with_previous(
    x: Tensor,  # (b, h, chunks, m, f)
    nothing: float,
) -> Tensor:
    """Every chunk behind the one before it, (b, h, chunks, 2 m, f); ``nothing`` before the first."""
    before = functional.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0), value=nothing)
    return torch.cat((before, x), dim=3)


def _two_even_factors(product: int) -> tuple[int, int]:
    """Two even numbers of about equal size whose product is at least ``product``."""
    first = 2 * math.ceil(math.sqrt(product) / 2)
    return first, 2 * math.ceil(product / first / 2)
