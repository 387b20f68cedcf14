# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Kernels of the moments: one read of queries and keys in pieces of the sequence, and a merge in a fixed order.

Each place of a tile has a float32 sum of its own; these are short, and are added in a tree. Whole second moments are
products of tiles, added in float64 from tile to tile. Pieces are added in float64, in their order.

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, d head dim. A part is one piece of one
head of one side; all parts of queries come before those of keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectraformer.ops.sequences import Sequences, extents
from spectraformer.ops.triton.configurations import Configuration, split
from spectraformer.ops.triton.launch import Launch, padded_dim, strides
from spectraformer.ops.triton.tiles import sequence_bounds

# Sizes that must not compile a kernel anew when they change.
SIZES = ("heads", "groups", "n", "s", "query_span", "query_pieces", "key_span", "key_pieces", "query_parts", "flats")
# Columns of a block of whole second moments.
BLOCK = 64
ROWS = 16
# Programs to aim at: eight on each multiprocessor hide the latency of memory; whole matrices leave more to merge.
PROGRAMS = {"none": 1056, "trace": 1056, "diagonal": 1056, "full": 264}


@triton.jit(do_not_specialize=SIZES)
def moments_kernel(
    query,
    key,
    query_mask,  # (b, n) uint8, or None
    key_mask,  # (b, s) uint8, or None
    query_boundaries,  # (b + 1,): sequences are packed into one batch item; or None
    key_boundaries,
    mean,  # (parts, d) sums; MERGED: (2 b h, d) means
    second,  # (parts, d) or FULL (parts, d, d) sums; MERGED: (2 b h, ...) second moments
    count,  # (parts,) int32; MERGED: None
    query_batch,
    query_head,
    query_row,
    query_mask_batch,
    query_mask_row,
    key_batch,
    key_head,
    key_row,
    key_mask_batch,
    key_mask_row,
    heads,
    groups,
    n,
    s,
    query_span,
    query_pieces,
    key_span,
    key_pieces,
    query_parts,
    root,
    root_rest,  # what float32 leaves of the root
    D: tl.constexpr,
    COLUMNS: tl.constexpr,  # all, padded, unless FULL
    BLOCKS: tl.constexpr,  # of columns
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    ORDER: tl.constexpr,
    MERGED: tl.constexpr,  # each head of each side is one part
    PRECISION: tl.constexpr,
):
    """Sums over one part; FULL: one block of the products."""
    part = tl.program_id(0) // (BLOCKS * BLOCKS)
    block = tl.program_id(0) % (BLOCKS * BLOCKS)
    if part < query_parts:
        flat = tl.cast(part // query_pieces, tl.int64)
        batch = flat // (heads * groups)
        first = (part % query_pieces) * query_span
        begin, length = sequence_bounds(query_boundaries, batch, n)
        if query_mask is not None:
            query_mask += batch * query_mask_batch + begin * query_mask_row
        _sum(
            query + batch * query_batch + (flat % (heads * groups)) * query_head + begin * query_row, query_row,
            query_mask, query_mask_row, first, tl.minimum(first + query_span, length), mean, second, count, part, block,
            root, root_rest, D, COLUMNS, BLOCKS, TOKENS, STAGES, ORDER, MERGED, PRECISION,
        )  # fmt: skip
    else:
        flat = tl.cast((part - query_parts) // key_pieces, tl.int64)
        batch = flat // heads
        first = ((part - query_parts) % key_pieces) * key_span
        begin, length = sequence_bounds(key_boundaries, batch, s)
        if key_mask is not None:
            key_mask += batch * key_mask_batch + begin * key_mask_row
        _sum(
            key + batch * key_batch + (flat % heads) * key_head + begin * key_row, key_row, key_mask,
            key_mask_row, first, tl.minimum(first + key_span, length), mean, second, count, part, block, root,
            root_rest, D, COLUMNS, BLOCKS, TOKENS, STAGES, ORDER, MERGED, PRECISION,
        )  # fmt: skip


@triton.jit
def _load(pointer, row, stride, real, column, D: tl.constexpr, ALL: tl.constexpr):
    inside = real[:, None]
    if not ALL:
        inside = inside & (column < D)[None, :]
    return tl.load(pointer + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _sum(
    tokens,
    stride,
    mask,
    mask_stride,
    first,
    last,
    mean,
    second,
    count,
    part,
    block,
    root,
    root_rest,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    ORDER: tl.constexpr,
    MERGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    FULL: tl.constexpr = ORDER == "full"
    ALL: tl.constexpr = D == COLUMNS * BLOCKS
    row = tl.arange(0, TOKENS)
    left = (block // BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    right = (block % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((TOKENS, COLUMNS), tl.float32)
    squares = tl.zeros((TOKENS, COLUMNS), tl.float32)
    if FULL:
        products = tl.zeros((COLUMNS, COLUMNS), tl.float64)
    found = tl.zeros((TOKENS,), tl.int32)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        real = row < last - start
        if mask is not None:
            # Padding is not read, whatever it holds.
            real = tl.load(mask + (start + row) * mask_stride, mask=real, other=0) != 0
        found += real.to(tl.int32)
        tile = tokens + tl.cast(start, tl.int64) * stride
        x = _load(tile, row, stride, real, left, D, ALL)
        wide = x.to(tl.float32)
        sums += wide
        if FULL:
            y = x
            if BLOCKS > 1:
                y = _load(tile, row, stride, real, right, D, ALL)
            products += tl.dot(tl.trans(x), y, input_precision=PRECISION).to(tl.float64)
        elif ORDER != "none":
            squares += wide * wide

    total = tl.sum(found, 0)
    if not MERGED and block == 0:
        tl.store(count + part, total)
    part = tl.cast(part, tl.int64)
    if FULL:
        total_sum, total_second = tl.sum(sums.to(tl.float64), 0), products
        if MERGED:
            total_sum, total_second = _scaled(total_sum, total_second, total, root, root_rest)
        tl.store(
            second + (part * D + left[:, None]) * D + right[None, :],
            total_second,
            mask=(left < D)[:, None] & (right < D)[None, :],
        )
    else:
        total_sum, total_second = tl.sum(sums, 0), tl.sum(squares, 0)
        if MERGED:
            total_sum, total_second = _scaled(total_sum, total_second, total, root, root_rest)
            if ORDER == "trace":
                total_second = total_second * 0.0 + tl.sum(total_second, 0) / D
        tl.store(second + part * D + left, total_second, mask=left < D)
    if block % BLOCKS == 0:
        tl.store(mean + part * D + left, total_sum, mask=left < D)


@triton.jit
def _scaled(total, second, count, root, root_rest):
    """Moments of root times the tokens, from sums."""
    precise = tl.cast(root, tl.float64) + tl.cast(root_rest, tl.float64)
    share = precise / tl.cast(tl.maximum(count, 1), tl.float64)
    return (total * share).to(total.dtype), (second * (share * precise)).to(second.dtype)


@triton.jit(do_not_specialize=SIZES)
def merge_moments_kernel(
    partial_mean,  # (parts, d)
    partial_second,  # (parts, d) or FULL (parts, d, d)
    partial_count,  # (parts,)
    mean,  # (2 b h, d)
    second,  # (2 b h, d) or FULL (2 b h, d, d)
    groups,
    query_pieces,
    key_pieces,
    query_parts,
    flats,
    root,
    root_rest,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Parts of one head of one side added in their order; FULL: some rows of them."""
    FULL: tl.constexpr = ORDER == "full"
    BLOCKS: tl.constexpr = tl.cdiv(D, ROWS) if FULL else 1
    flat = tl.program_id(0) // BLOCKS
    row = (tl.program_id(0) % BLOCKS) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D_PADDED)
    parts, first = query_pieces * groups, flat * query_pieces * groups
    if flat >= flats:
        parts, first = key_pieces, query_parts + (flat - flats) * key_pieces
    total = tl.zeros((D_PADDED,), tl.float64)
    squares = tl.zeros((D_PADDED,), tl.float64)
    if FULL:
        products = tl.zeros((ROWS, D_PADDED), tl.float64)
        inside = (row < D)[:, None] & (column < D)[None, :]
    count = 0
    for i in range(parts):
        part = tl.cast(first + i, tl.int64)
        count += tl.load(partial_count + part)
        total += tl.load(partial_mean + part * D + column, mask=column < D, other=0.0).to(tl.float64)
        if FULL:
            place = (part * D + row[:, None]) * D + column[None, :]
            products += tl.load(partial_second + place, mask=inside, other=0.0)
        else:
            squares += tl.load(partial_second + part * D + column, mask=column < D, other=0.0).to(tl.float64)
    place = tl.cast(flat, tl.int64) * D
    if FULL:
        total, products = _scaled(total, products, count, root, root_rest)
        tl.store(second + (place + row[:, None]) * D + column[None, :], products, mask=inside)
    else:
        total, squares = _scaled(total, squares, count, root, root_rest)
        if ORDER == "trace":
            squares = squares * 0.0 + tl.sum(squares, 0) / D
        tl.store(second + place + column, squares, mask=column < D)
    if tl.program_id(0) % BLOCKS == 0:
        tl.store(mean + place + column, total, mask=column < D)


def plan_moments(
    query: Tensor,
    key: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    *,
    root: float,
    order: str,
    precision: str,
    sequences: Sequences | None = None,
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The kernels and the tensors they fill: mean (2, b, h, d), second (2, b, h, d) or (2, b, h, d, d)."""
    h, s, d = key.shape[1:]
    query_heads, n = query.shape[1:3]
    b, longest_query, longest_key, query_share, key_share = extents(query, key, sequences)
    full = order == "full"
    columns = min(padded_dim(d), BLOCK) if full else padded_dim(d)
    blocks = -(-d // columns) if full else 1
    tokens = 64 if full else max(16, 4096 // columns)
    cut = Configuration(columns, tokens, 4, 3, PROGRAMS[order])
    independent = b * (query_heads + h) * blocks * blocks
    query_pieces, query_span = split(longest_query, independent, cut, query_share)
    key_pieces, key_span = split(longest_key, independent, cut, key_share)
    query_parts, parts = b * query_heads * query_pieces, b * query_heads * query_pieces + b * h * key_pieces
    merged = parts == 2 * b * h

    def moments(lead: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if full else torch.float32
        return query.new_empty(*lead, d, dtype=dtype), query.new_empty(*lead, *([d, d] if full else [d]), dtype=dtype)

    mean, second = moments((2, b, h))
    partial_mean, partial_second = (mean, second) if merged else moments((parts,))
    count = None if merged else query.new_empty(parts, dtype=torch.int32)
    rounded = torch.tensor(root, dtype=torch.float32).item()
    shared = {
        "groups": query_heads // h,
        "query_pieces": query_pieces,
        "key_pieces": key_pieces,
        "query_parts": query_parts,
        "root": rounded,
        "root_rest": root - rounded,
    }
    masks = {
        f"{name}_mask_{dimension}": 0 if x is None or x.shape[i] == 1 else x.stride(i)
        for name, x in (("query", query_mask), ("key", key_mask))
        for i, dimension in enumerate(("batch", "row"))
    }
    launches = [
        Launch(
            moments_kernel,
            parts * blocks * blocks,
            {
                "query": query,
                "key": key,
                "query_mask": query_mask,
                "key_mask": key_mask,
                "query_boundaries": None if sequences is None else sequences.query,
                "key_boundaries": None if sequences is None else sequences.key,
                "mean": partial_mean,
                "second": partial_second,
                "count": count,
                **strides(query=query, key=key),
                **masks,
                "heads": h,
                "n": n,
                "s": s,
                "query_span": query_span,
                "key_span": key_span,
                **shared,
            },
            {
                "D": d,
                "COLUMNS": columns,
                "BLOCKS": blocks,
                "TOKENS": tokens,
                "STAGES": 3,
                "ORDER": order,
                "MERGED": merged,
                "PRECISION": precision,
            },
            4,
        )
    ]
    if not merged:
        launches.append(
            Launch(
                merge_moments_kernel,
                2 * b * h * (-(-d // ROWS) if full else 1),
                {
                    "partial_mean": partial_mean,
                    "partial_second": partial_second,
                    "partial_count": count,
                    "mean": mean,
                    "second": second,
                    "flats": b * h,
                    **shared,
                },
                {"D": d, "D_PADDED": padded_dim(d), "ROWS": ROWS, "ORDER": order},
                4,
            )
        )
    return launches, (mean, second)
