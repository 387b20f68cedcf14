# mypy: disable-error-code="import-untyped,import-not-found"
"""The forward: keys into landmarks, split over the sequence, a merge in fixed order, landmarks into queries.

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectraformer.ops.sequences import Sequences, extents
from spectraformer.ops.triton.configurations import Configuration, choose, choose_short, split
from spectraformer.ops.triton.key_forward import key_kernel, merge_kernel
from spectraformer.ops.triton.launch import Launch, constants, padded_dim, strides
from spectraformer.ops.triton.query_forward import query_kernel
from spectraformer.ops.triton.short_forward import launch_short

# Up to here every program of the queries merges the pieces of the keys itself; beyond, reading them costs more than
# a launch.
MOST_PIECES_AT_ONCE = 8


def plan_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_landmarks: Tensor,
    key_landmarks: Tensor,
    landmark_bias: Tensor,
    key_bias: Tensor | None,
    key_quadratic: Tensor | None,
    *,
    needs_backward: bool,
    precision: str,
    sequences: Sequences | None = None,
    keys: Configuration | None = None,
    queries: Configuration | None = None,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The kernels of the forward and the tensors they fill.

    Packed sequences are one batch item of operands, except that landmarks, their bias and key_quadratic may be of
    every sequence; b below is the number of sequences.

    Returns:
        Launches in order, and: output (b, h g, n, e), packed (n, h g, e); landmark values (b h, m padded, e) and
        log-sum-exps (b h, m padded) in units of log 2, float32; log-sum-exps of queries (b h g, n), packed (h g, n),
        empty unless needs_backward. Without a backward the state of landmarks may be left unfilled.
    """
    h, s, d = key.shape[1:]
    query_heads, n = query.shape[1:3]
    b, longest_query, longest_key, query_share, key_share = extents(query, key, sequences)
    e, m = value.shape[-1], query_landmarks.shape[-2]
    longest, dim = max(longest_query * query_heads // h, longest_key), max(d, e)
    short = None if needs_backward or keys or queries else choose_short(key.dtype, dim, m, longest, b * h)
    keys = keys or choose("keys", key.dtype, dim, m)
    queries = queries or choose("queries", key.dtype, dim, m)
    key_constants = constants(keys, m, d, e, precision)
    padded = key_constants["BLOCKS"] * keys.landmarks
    pieces, span = split(longest_key, b * h * key_constants["BLOCKS"], keys, key_share)
    # The exponents of float16 are too few for one.
    fixed, even = key.dtype != torch.float16, sequences is None
    new = query.new_empty
    landmark_value, log_sum = new(b * h, padded, e, dtype=torch.float32), new(b * h, padded, dtype=torch.float32)
    out = new(b, query_heads, n, e) if sequences is None else new(n, query_heads, e)
    if short is not None:
        operands = (query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic)
        launches = [launch_short(*operands, sequences, out, short, b, precision)]
        return launches, (out, landmark_value, log_sum, new(0, dtype=torch.float32))
    partial_value, partial_total, partial_peak = landmark_value, log_sum, None
    if pieces > 1:
        partial_value = new(b * h, pieces, padded, e, dtype=torch.float32)
        partial_total, partial_peak = (new(b * h, pieces, padded, dtype=torch.float32) for _ in range(2))
    launches = [
        Launch(
            key_kernel,
            b * h * pieces * key_constants["BLOCKS"],
            {
                "key": key,
                "value": value,
                "key_landmarks": key_landmarks,
                "key_bias": key_bias,
                "key_quadratic": key_quadratic,
                "key_boundaries": None if sequences is None else sequences.key,
                "landmark_value": partial_value,
                "peak": partial_peak,
                "total": partial_total,
                **strides(key=key, value=value, key_landmarks=key_landmarks, key_bias=key_bias),
                **strides(key_quadratic=key_quadratic),
                "heads": h,
                "s": s,
                "span": span,
                "middle": 0,
                "pieces": pieces,
            },
            key_constants
            | {"EARLY": 0, "ONE_PIECE": pieces == 1, "FIXED_REFERENCE": fixed, "EVEN": even and s % keys.tokens == 0},
            keys.warps,
            keys.registers,
        )
    ]
    query_constants = constants(queries, m, d, e, precision, resident=True)
    merge_at_once = 1 < pieces <= MOST_PIECES_AT_ONCE and queries.resident
    if pieces > 1 and not merge_at_once:
        launches.append(
            Launch(
                merge_kernel,
                b * h * -(-m // 16),
                {
                    "partial_value": partial_value,
                    "partial_peak": partial_peak,
                    "partial_total": partial_total,
                    "landmark_value": landmark_value,
                    "log_sum": log_sum,
                    "pieces": pieces,
                    "m_padded": padded,
                },
                {"M": m, "E": e, "E_PADDED": padded_dim(e), "ROWS": 16},
                4,
            )
        )
    rows = b * query_heads if sequences is None else query_heads
    query_log_sum = new(rows, n, dtype=torch.float32) if needs_backward else None
    key_pieces = pieces
    pieces, span = split(longest_query, b * query_heads, queries, query_share)
    launches.append(
        Launch(
            query_kernel,
            b * query_heads * pieces,
            {
                "query": query,
                "query_landmarks": query_landmarks,
                "landmark_bias": landmark_bias,
                "query_boundaries": None if sequences is None else sequences.query,
                "landmark_value": landmark_value,
                "log_sum": log_sum,
                "partial_value": partial_value if merge_at_once else None,
                "partial_peak": partial_peak if merge_at_once else None,
                "partial_total": partial_total if merge_at_once else None,
                "out": out,
                "query_log_sum": query_log_sum,
                **strides(query=query, query_landmarks=query_landmarks, landmark_bias=landmark_bias),
                "heads": h,
                "groups": query_heads // h,
                "n": n,
                "span": span,
                "pieces": pieces,
                "key_pieces": key_pieces,
                "m_padded": padded,
            },
            query_constants | {"FIXED_REFERENCE": fixed, "EVEN": even and n % queries.tokens == 0},
            queries.warps,
            queries.registers,
        )
    )
    empty = new(0, dtype=torch.float32)
    return launches, (out, landmark_value, log_sum, empty if query_log_sum is None else query_log_sum)
