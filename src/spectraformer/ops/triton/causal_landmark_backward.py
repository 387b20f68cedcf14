# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Causal backward of landmarks: gradients of logits times queries or keys, summed over tokens.

Legend: b batch, h heads of the tokens, n tokens, m landmarks, d head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectraformer.ops.triton.causal_tiles import SIZES
from spectraformer.ops.triton.tiles import load_key_bias, load_rows, store_tile


@triton.jit(do_not_specialize=SIZES)
def landmark_backward_kernel(
    grad_logits,  # (b h, n, m)
    tokens,  # (b, h, n, d)
    key_bias,  # nothing is read of keys that are removed; None for queries
    boundaries,  # (sequences + 1,): tokens before the first or behind the last belong to no sequence; or None
    part,  # (b h, pieces, m, d) float32
    batch, head, row, key_bias_batch, key_bias_head, heads, n, span, pieces,
    sequences,
    M: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCKS: tl.constexpr, LANDMARKS: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One piece of a sequence, one block of landmarks."""
    program = tl.program_id(0)
    block = program % BLOCKS
    piece = (program // BLOCKS) % pieces
    flat = tl.cast(program // (BLOCKS * pieces), tl.int64)
    tokens += (flat // heads) * batch + (flat % heads) * head
    if key_bias is not None:
        key_bias += (flat // heads) * key_bias_batch + (flat % heads) * key_bias_head
    grad_logits += flat * n * M + block * LANDMARKS
    landmark, column = tl.arange(0, LANDMARKS), tl.arange(0, TOKENS)
    total = tl.zeros((LANDMARKS, D_PADDED), tl.float32)
    begin = piece * span
    last = tl.minimum(begin + span, n)
    if boundaries is not None:
        begin = tl.maximum(tl.minimum(tl.load(boundaries), last), begin).to(tl.int32)
        last = tl.minimum(tl.maximum(tl.load(boundaries + sequences), 0), last).to(tl.int32)
    for start in tl.range(begin, last, TOKENS, num_stages=STAGES):
        offset = tl.cast(start, tl.int64)
        present = column < last - start
        if key_bias is not None:
            present = load_key_bias(key_bias, start, column, last - start) != float("-inf")
        ds = tl.load(
            grad_logits + offset * M + column[:, None] * M + landmark[None, :],
            mask=(column < last - start)[:, None] & (landmark < M - block * LANDMARKS)[None, :],
            other=0.0,
        )
        x = load_rows(tokens + offset * row, column, row, present, D, D_PADDED)
        total = tl.dot(tl.trans(ds), x.to(ds.dtype), total, input_precision=PRECISION)
    store_tile(
        part + (flat * pieces + piece) * M * D, block * LANDMARKS + landmark, D, M, total, D, D_PADDED
    )  # fmt: skip
