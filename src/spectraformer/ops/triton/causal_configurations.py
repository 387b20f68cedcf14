"""Tile shapes of the causal kernels, and how a sequence is cut into segments: by shapes alone, nothing is tuned."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectraformer.ops.triton.configurations import Configuration, bucket

PASSES = (
    "states",  # keys of a segment into a state
    "sweep",  # forward, chunk after chunk
    "sweep_queries",  # gradients of queries, chunk after chunk
    "query_states",  # queries of a segment into a gradient of the state
    "sweep_keys",  # gradients of keys and values, chunk after chunk from the end
)
HEAD_DIMS = (32, 64, 128, 256)
LANDMARKS = (64, 128, 256)
# Shorter segments cost more in states than they save in waiting.
MIN_SEGMENT = 512


class Segments(NamedTuple):
    """How a sequence is cut: programs advance through segments at the same time, each from an entering state.

    Attributes:
        number: Of segments.
        span: Tokens of a segment, a multiple of the chunk; the last may be shorter.
        parts: Parts of a segment whose states are computed at the same time.
    """

    number: int
    span: int
    parts: int


def _sixteen_bit(d: int, m: int) -> dict[str, Configuration]:
    """Read off the compiler for sm_90: no matrix instruction waits for the last, and little is kept outside registers.

    Up to head dim 64 two programs of the forward share a multiprocessor; the backward has no room for that.
    """
    block = 64 if d == 256 else min(m, 128)
    warps = 4 if block == 64 and d <= 128 else 8
    stages = 1 if d == 256 else 2
    backward = Configuration(block, 64 if d <= 64 else 32, warps, 2 if d <= 64 else 1)
    sweep = Configuration(block, 64, 4, stages, 264) if d <= 64 else Configuration(block, 64, warps, stages, 132)
    return {
        "states": Configuration(block, 64, warps, stages + 1, 528),
        "sweep": sweep,
        "sweep_queries": backward,
        "query_states": Configuration(block, 64, warps, stages),
        "sweep_keys": backward,
    }


def _thirty_two_bit(d: int, _: int) -> dict[str, Configuration]:
    """Exact products take three times the operands: small tiles."""
    forward = {32: (64, 32, 4), 64: (64, 32, 4), 128: (32, 16, 8), 256: (16, 16, 8)}[d]
    backward = (32, 32, 8) if d == 64 else forward
    return {name: Configuration(*(backward if name.startswith("sweep_") else forward), 1) for name in PASSES}


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
    return table[bucket(head_dim, HEAD_DIMS), bucket(landmarks, LANDMARKS)][name]


def segments(tokens: int, independent: int, sweep: Configuration, states: Configuration) -> Segments:
    """How to cut a sequence: one segment where heads alone fill the GPU.

    Args:
        tokens: Length of the sequence, >= 1.
        independent: Programs there are without cutting.
        sweep: Configuration of the sweep: gives the chunk and the number of programs to aim at.
        states: Configuration of the pass over keys that gives segments their entering states.
    """
    count = max(1, min(sweep.programs // independent, tokens // MIN_SEGMENT))
    unit = max(sweep.tokens, states.tokens)
    span = -(-tokens // (count * unit)) * unit
    count = -(-tokens // span)
    if count == 1:
        return Segments(1, span, 1)
    parts = max(1, min(states.programs // ((count - 1) * independent), span // MIN_SEGMENT))
    while span % (parts * unit):
        parts -= 1
    return Segments(count, span, parts)


def cut(key: Tensor, value: Tensor, landmarks: int) -> Segments:
    """How the sequence of these keys and values is cut."""
    b, h, n, d = key.shape
    sweep, states = (choose(x, key.dtype, max(d, value.shape[-1]), landmarks) for x in ("sweep", "states"))
    return segments(n, b * h * -(-landmarks // sweep.landmarks), sweep, states)
