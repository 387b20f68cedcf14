"""Sequences of different lengths, laid end to end as one batch item.

Legend: b sequences, h key heads, g query heads per key head, n queries and s keys of all sequences together.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sequences(NamedTuple):
    """Where sequences of queries and of keys begin and end. They are read on the device: nothing waits for it.

    Attributes:
        query: Sequence i is the queries from entry i up to entry i + 1, (b + 1,), int32 or int64.
        key: The same of keys, (b + 1,).
        longest_query: Queries of the longest sequence, or more.
        longest_key: Keys of the longest sequence, or more.
    """

    query: Tensor
    key: Tensor
    longest_query: int
    longest_key: int


class Extents(NamedTuple):
    """Sequences by what is known of them without a look at the device: what work is cut by.

    Attributes:
        sequences: b.
        query: Queries of the longest.
        key: Keys of the longest.
        query_share: Share of b times the longest that there is of queries, 1 where all are as long.
        key_share: The same of keys.
    """

    sequences: int
    query: int
    key: int
    query_share: float = 1.0
    key_share: float = 1.0


def extents(
    query: Tensor,  # (b, h * g, n, d); packed (1, h * g, n, d)
    key: Tensor,  # (b, h, s, d); packed (1, h, s, d)
    sequences: Sequences | None,
) -> Extents:
    """Extents of the sequences of a batch, each of its items one unless they are packed."""
    n, s = query.shape[2], key.shape[2]
    if sequences is None:
        return Extents(key.shape[0], n, s)
    b, longest_query, longest_key = len(sequences.query) - 1, sequences.longest_query, sequences.longest_key
    shares = (min(1.0, x / (b * longest)) for x, longest in ((n, longest_query), (s, longest_key)))
    return Extents(b, longest_query, longest_key, *shares)
