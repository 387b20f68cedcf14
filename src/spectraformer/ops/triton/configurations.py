"""Tile shapes of the kernels: one table, no tuning at run time, the same choice on every machine.

Every program works on ``tokens`` tokens and ``landmarks`` landmarks at a time. Reading the sequence in one piece gives
too few programs to fill a GPU, so ``programs`` says how many to aim at; the number depends on shapes alone, and with
it the order of every sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

PASSES = (
    "keys",
    "queries",
    "landmark_sums",  # over queries, for gradients
    "landmark_sums_learned",  # with the gradient of landmarks that queries see
    "queries_backward",
    "keys_backward",  # of values too, for narrow heads
    "values_backward",
    "keys_backward_learned",  # the gradient of landmarks that keys see
)
# Programs, idle ones included, per program to aim at. More are for lengths so different that the longest would be read
# by few: each may leave a state behind, of as many rows as landmarks, and all together as many as there are tokens.
MOST_IDLE = 4
HEAD_DIMS = (32, 64, 128, 256)
LANDMARKS = (64, 128, 256)


class Configuration(NamedTuple):
    """How one kernel cuts its work.

    Attributes:
        landmarks: Landmarks of a tile, a power of two >= 16.
        tokens: Tokens of a tile, a power of two >= 16.
        warps: Warps of a program.
        stages: Depth of the software pipeline over tiles.
        programs: Programs to aim at; the sequence is split until there are as many.
        resident: Whether all landmarks stay in shared memory over the whole loop.
        registers: Most registers a thread, so that more programs share a processor; None leaves it to the compiler.
    """

    landmarks: int
    tokens: int
    warps: int
    stages: int
    programs: int = 264
    resident: bool = True
    registers: int | None = None


def bucket(size: int, limits: tuple[int, ...]) -> int:
    """The smallest limit that holds size, else the largest."""
    return next((limit for limit in limits if size <= limit), limits[-1])


def _sixteen_bit(d: int, m: int) -> dict[str, Configuration]:
    """Measured on an H200 for (d, m) of (32, 128), (64, 128), (64, 256) and (128, 256); the rest read off these."""
    block = min(m, 128)
    warps, registers = (8, 128) if block == 128 else (4, 168)
    if d == 256:
        few = Configuration(64, 32, 4, 1, resident=m == 64)
        return dict.fromkeys(PASSES, few) | {
            "keys": Configuration(64, 64, 4, 2),
            "queries": Configuration(64, 64, 4, 1, resident=m <= 128),
        }
    if d == 128:
        return {
            "keys": Configuration(block, 64, warps, 3),
            "queries": Configuration(64, 64, 4, 3),
            "landmark_sums": Configuration(block, 64, warps, 3),
            "landmark_sums_learned": Configuration(block, 64, warps, 2),
            "queries_backward": Configuration(block, 128, 8, 1),
            "keys_backward": Configuration(64, 128, 8, 1, resident=m < 256),
            "values_backward": Configuration(block, 128, 8, 2),
            "keys_backward_learned": Configuration(64, 64, 4, 2),
        }
    if m == 256:
        queries, of_queries = Configuration(block, 64, 4, 3), Configuration(block, 64, 4, 2)
        of_keys = Configuration(64, 64, 4, 2)
    elif d == 64:
        # 168 registers let three programs share a processor.
        queries, of_queries = Configuration(block, 64, 4, 3, 396, registers=168), Configuration(block, 64, 4, 3)
        of_keys = Configuration(block, 64, 4, 3)
    else:
        queries = Configuration(block, 64, 4, 3, 528, registers=128)
        of_queries, of_keys = Configuration(block, 64, 4, 3, 396, registers=168), Configuration(block, 64, 4, 3)
    return {
        "keys": Configuration(block, 64, warps, 3, registers=registers),
        "queries": queries,
        "landmark_sums": Configuration(block, 64, warps, 3, registers=registers),
        "landmark_sums_learned": Configuration(block, 64, warps, 2, registers=registers),
        "queries_backward": of_queries,
        "keys_backward": of_keys,
        "values_backward": of_keys,
        "keys_backward_learned": Configuration(block, 64, warps, 2, registers=registers),
    }


def _thirty_two_bit(d: int, m: int) -> dict[str, Configuration]:
    """Exact products take three times the operands: small tiles, and landmarks read again for each."""
    landmarks = {32: 64, 64: 64, 128: 32, 256: 16}[d]
    small = Configuration(landmarks, 32, 4, 1, resident=d * m <= 64 * 64)
    return dict.fromkeys(PASSES, small)


# Keyed by head dim and landmarks, then pass: the smallest bucket that holds each.
_BUCKETS = [(d, m) for d in HEAD_DIMS for m in LANDMARKS]
SIXTEEN_BIT = {(d, m): _sixteen_bit(d, m) for d, m in _BUCKETS}
THIRTY_TWO_BIT = {(d, m): _thirty_two_bit(d, m) for d, m in _BUCKETS}


def choose(name: str, dtype: torch.dtype, head_dim: int, landmarks: int) -> Configuration:
    """The configuration of one pass.

    Args:
        name: One of PASSES.
        dtype: Of queries, keys and values: bfloat16, float16 or float32.
        head_dim: The larger of head dim and value dim.
        landmarks: Number of landmarks m.
    """
    table = THIRTY_TWO_BIT if dtype == torch.float32 else SIXTEEN_BIT
    d, m = bucket(head_dim, HEAD_DIMS), bucket(landmarks, LANDMARKS)
    chosen = table[d, m][name]
    # Gradients of float16 take bfloat16 copies of landmarks beside them: no room is left for all of both.
    if dtype == torch.float16 and (d, m) == (128, 256) and "backward" in name:
        chosen = chosen._replace(stages=1, resident=False)
    # More landmarks than the last bucket do not fit in shared memory together.
    return chosen._replace(resident=False) if landmarks > LANDMARKS[-1] else chosen


# One program reads keys, keeps the state of landmarks in registers and reads queries: up to so many tokens, and from so
# many programs on. On an H200 it took half the time of two launches at 64 tokens, 0.8 of it at 256, as long at 512.
SHORT_TOKENS = 256
SHORT_PROGRAMS = 132


def choose_short(
    dtype: torch.dtype, head_dim: int, landmarks: int, longest: int, independent: int
) -> Configuration | None:
    """The configuration of the forward in one launch; None where it is better done, or only fits, in two.

    Args:
        dtype: As in choose.
        head_dim: As in choose.
        landmarks: Number of landmarks m.
        longest: Keys of the longest sequence, or queries of a key head, whichever are more.
        independent: Sequences times key heads.
    """
    if dtype == torch.float32 or longest > SHORT_TOKENS or independent < SHORT_PROGRAMS:
        return None
    d, m = bucket(head_dim, HEAD_DIMS), bucket(landmarks, LANDMARKS)
    fits = landmarks <= m <= 128 and d <= 64
    return Configuration(m, 64, 4, 2) if fits else None


def split(tokens: int, independent: int, configuration: Configuration, share: float = 1.0) -> tuple[int, int]:
    """Pieces to cut a sequence into: (number of pieces, tokens of each but the last).

    Args:
        tokens: Length of the sequence, the longest if they differ, >= 1.
        independent: Programs there are without cutting.
        configuration: Gives the tile and the number of programs to aim at.
        share: Share of the work there would be if all sequences were as long; programs of the rest end at once.
    """
    tiles = -(-tokens // configuration.tokens)
    most = max(MOST_IDLE * configuration.programs // independent, int(share * tokens / configuration.landmarks))
    pieces = max(1, min(tiles, int(configuration.programs / (independent * share)), most))
    span = -(-tiles // pieces) * configuration.tokens
    return -(-tokens // span), span
