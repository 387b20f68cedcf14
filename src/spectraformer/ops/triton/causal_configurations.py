"""Tile shapes of the causal kernels: by shapes alone, nothing is tuned at run time."""

from __future__ import annotations

from typing import NamedTuple

import torch

from spectraformer.ops.triton.configurations import Configuration, bucket

# The chunk is the tokens of the first; others cut it into tiles of their own tokens.
PASSES = (
    "chunk_states",  # keys of a chunk into a state
    "chunk_outputs",  # queries of a chunk from the state that enters and its keys
    "chunk_queries_backward",  # gradients of queries, and what they leave for earlier chunks
    "chunk_keys_backward",  # gradients of keys and values
)
HEAD_DIMS = (32, 64, 128, 256)
LANDMARKS = (64, 128, 256)


def _sixteen_bit(d: int, m: int) -> dict[str, Configuration]:
    """Read off the compiler for sm_90: little outside registers, and as many programs a processor as fit.

    States are most of the traffic, so chunks are long; tiles of 64 tokens keep what a program holds small.
    """
    tile = Configuration(64, 64, 4, 1)
    if d == 256:
        wide = tile._replace(warps=8)
        return {**dict.fromkeys(PASSES, wide), "chunk_queries_backward": wide._replace(landmarks=32)}
    backward = tile if m == 64 and d <= 64 else Configuration(min(m, 128), 64, 8, 1)
    return {
        "chunk_states": Configuration(64, 128, 8 if d == 128 else 4, 1),
        # 168 registers let three programs share a processor.
        "chunk_outputs": tile if d == 128 else tile._replace(registers=168),
        "chunk_queries_backward": backward,
        "chunk_keys_backward": backward,
    }


def _thirty_two_bit(d: int, _: int) -> dict[str, Configuration]:
    """Exact products take three times the operands: small tiles."""
    landmarks = {32: 64, 64: 32, 128: 16, 256: 16}[d]
    return dict.fromkeys(PASSES, Configuration(landmarks, 32 if d <= 64 else 16, 4, 1))


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
    row = table[bucket(head_dim, HEAD_DIMS), bucket(landmarks, LANDMARKS)]
    return row[name]._replace(tokens=min(row[name].tokens, row[PASSES[0]].tokens))


# Of the backward by stretches.
STRETCH_PASSES = ("sums", "queries", "values", "keys")
# Head and value dims, and landmarks, up to which stretches are taken.
STRETCH_DIM, STRETCH_LANDMARKS = 128, 256
# Stretches but the first few have a multiple of so many tokens, of chunks; the second ends after so many tiles.
LEAST_STRETCH, MIDDLE = 512, 16
# States of earlier stretches that a program merges at most, and programs below which chunks side by side are faster.
MOST_STRETCHES, LEAST_PROGRAMS = 32, 128


class Stretches(NamedTuple):
    """How a sequence is cut into stretches, see ``tiles.piece_bounds``.

    Attributes:
        number: How many there are.
        span: Tokens of those that are as long as any.
        middle: Tokens before the end of the second.
        early: Tokens of the first.
    """

    number: int
    span: int
    middle: int
    early: int


def choose_stretches(dtype: torch.dtype, head_dim: int, landmarks: int) -> Configuration | None:
    """The configuration of the forward by stretches; None where only states of all chunks fit.

    Args:
        dtype: As in choose.
        head_dim: As in choose.
        landmarks: Number of landmarks m.
    """
    if dtype == torch.float32 or head_dim > STRETCH_DIM or landmarks > STRETCH_LANDMARKS:
        return None
    # Twice as many would not leave their state in registers.
    block = 64 if landmarks <= 64 else 128
    if head_dim > 64:
        return Configuration(64, 64, 4, 1) if block == 64 else Configuration(128, 128, 8, 1)
    return Configuration(block, 64, 4, 2 if head_dim * block > 32 * 128 else 3)


def choose_stretches_backward(
    name: str, forward: Configuration, dtype: torch.dtype, head_dim: int, landmarks: int
) -> Configuration:
    """The configuration of one pass of the backward by stretches.

    Args:
        name: One of STRETCH_PASSES.
        forward: That of the forward.
        dtype: As in choose.
        head_dim: As in choose.
        landmarks: Number of landmarks m.
    """
    if name == "sums" and landmarks > 64:
        # As the kernel of bidirectional keys.
        return Configuration(128, 64, 8, 3, registers=128 if head_dim <= 64 else None)
    if head_dim <= 32:
        return forward
    if head_dim > 64:
        return Configuration(64, 64, 4, 1)
    # In float16 copies of the landmarks in bfloat16 would take the room.
    if name in ("queries", "keys") and forward.landmarks == 128 and dtype == torch.bfloat16:
        # One program of twice the size a multiprocessor, for its state takes half the registers of a thread.
        return forward._replace(tokens=128, warps=8, stages=2)
    return forward._replace(stages=1)


def cut_stretches(
    tokens: int, independent: int, configuration: Configuration, early: int | None = None
) -> Stretches | None:
    """Stretches to cut a sequence into; None if programs are too few that way.

    Args:
        tokens: Length of the sequence, >= 1.
        independent: Programs there are without cutting.
        configuration: Gives the tile and the number of programs that a GPU has room for.
        early: Tokens of the first stretch, a multiple of the tiles of all passes; None for one tile.
    """
    early = early or configuration.tokens
    room = configuration.programs

    def filled(long: int) -> float:
        """How much of the rounds of programs is filled, and a little for fewer stretches."""
        return independent * long / (-(-independent * long // room) * room) - 0.01 * long

    wanted = max(range(1, min(MOST_STRETCHES, -(-2 * room // independent)) + 1), key=filled)
    span = max(LEAST_STRETCH, -(-tokens // (wanted * LEAST_STRETCH)) * LEAST_STRETCH)
    long = -(-tokens // span)
    if independent * long < LEAST_PROGRAMS:
        return None
    middle = min(MIDDLE * configuration.tokens, span)
    if tokens <= middle:
        return Stretches(1 if tokens <= early else 2, span, middle, early)
    return Stretches(long + (2 if middle < span else 1), span, middle, early)
