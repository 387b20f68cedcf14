"""Tile shapes of the causal kernels: by shapes alone, nothing is tuned at run time."""

from __future__ import annotations

import torch

from spectraformer.ops.triton.configurations import Configuration, bucket

# The chunk is the tokens of the first; all passes work on the same chunks, whatever their own entry says.
PASSES = (
    "chunk_states",  # keys of a chunk into a state
    "chunk_outputs",  # queries of a chunk from the state that enters and its keys
    "chunk_queries_backward",  # gradients of queries, and what they leave for earlier chunks
    "chunk_keys_backward",  # gradients of keys and values
)
HEAD_DIMS = (32, 64, 128, 256)
LANDMARKS = (64, 128, 256)


def _sixteen_bit(d: int, m: int) -> dict[str, Configuration]:
    """Read off the compiler for sm_90: little outside registers, and as many programs a processor as fit."""
    block = min(m, 128)
    if d == 256:
        wide = Configuration(64, 64, 8, 1)
        return {**dict.fromkeys(PASSES, wide), "chunk_queries_backward": wide._replace(landmarks=32)}
    if d == 128:
        backward = Configuration(block, 64, 8, 1)
        outputs = Configuration(64, 64, 4, 1)
    else:
        # 168 registers let three programs of four warps share a processor, 128 two of eight.
        few = Configuration(64, 64, 4, 1, registers=168)
        backward = few if m == 64 else Configuration(128, 64, 8, 1, registers=128)
        outputs = few if m > 128 else few._replace(landmarks=block)
    return {
        "chunk_states": Configuration(64, 64, 4, 1),
        "chunk_outputs": outputs,
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
    return row[name]._replace(tokens=row[PASSES[0]].tokens)
