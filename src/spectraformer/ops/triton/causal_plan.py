# mypy: disable-error-code="import-untyped,import-not-found"
"""The kernels of causal landmark attention with their arguments, in order.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from spectraformer.ops.triton.causal_chunks import chunk_sequence_kernel, chunk_state_kernel, round_kernel
from spectraformer.ops.triton.causal_configurations import (
    PASSES,
    STRETCH_PASSES,
    Stretches,
    choose,
    choose_stretches,
    choose_stretches_backward,
    cut_stretches,
)
from spectraformer.ops.triton.causal_forward import chunk_output_kernel
from spectraformer.ops.triton.causal_scan import scan_kernel
from spectraformer.ops.triton.causal_steep import steep_output_kernel
from spectraformer.ops.triton.configurations import Configuration
from spectraformer.ops.triton.launch import Launch, constants, padded_dim, product_type, state_strides, strides

# Elements of a tile of a scan, 8 a thread; chunks it loads ahead.
SCAN_TILE, SCAN_WARPS, SCAN_STAGES = 1024, 4, 6
# Columns of the narrowest tile of tokens in 16 bits.
NARROWEST = 32
# Chunks of a sequence that are numbered at once.
NUMBERED = 128
# Programs of a head that look for steep chunks, and the tile of queries they work on.
SPREAD, STEEP_TILE, STEEP_WARPS = 16, 4096, 8


class Forward(NamedTuple):
    """What the forward fills; by stretches, what is kept of each is that of ``kept_stretches``."""

    out: Tensor  # (b, h g, n, e)
    log_scale: Tensor  # (b, h, m) float32, after the last key
    sums: Tensor  # (b, h, m, e + 1) float32, likewise
    query_log_sum: Tensor  # (b h g, n) float32, units of log 2; this and what follows empty unless needed backward
    entering_mean: Tensor  # (b h, chunks, m, e), bfloat16 for inputs of 16 bits
    log_sum: Tensor  # (b h, chunks + sequences, m) float32, units of log 2
    first: Tensor  # (b h, chunks, m) float32, units of log 2
    steepest: Tensor  # (b h, chunks + sequences, row blocks) float32, units of log 2


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of features and means of states: they need the exponents of bfloat16, float16 has too few."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


class Cut(NamedTuple):
    """How sequences and their states are cut, by shapes alone."""

    sequences: int  # of one batch item: 1 unless they are packed
    chunk: int
    chunks: int  # room for those of all sequences of one batch item
    rows: int  # landmarks of a tile of a scan
    columns: int  # its value dims
    row_blocks: int
    column_blocks: int


class ByStretches(NamedTuple):
    """How stretches are taken: the tile and the landmarks taken together, and how the sequence is cut."""

    chosen: Configuration
    stretches: Stretches


Given = dict[str, Configuration] | None


def configuration(name: str, key: Tensor, value: Tensor, landmarks: int, given: Given = None) -> Configuration:
    """That of one pass: given by name, else the table's."""
    widest = max(key.shape[-1], value.shape[-1])
    return (given or {}).get(name) or choose(name, key.dtype, widest, landmarks)


def cut(key: Tensor, value: Tensor, landmarks: int, boundaries: Tensor | None = None, given: Given = None) -> Cut:
    """How a call with these keys and values is cut."""
    n, e = key.shape[2], value.shape[-1]
    chunk = configuration(PASSES[0], key, value, landmarks, given).tokens
    sequences, chunks = 1, -(-n // chunk)
    if boundaries is not None:
        sequences = len(boundaries) - 1
        # Sequence i begins at its first token / chunk + i: see sequence_chunks.
        chunks = n // chunk + sequences
    columns = min(padded_dim(e), 64)
    rows = SCAN_TILE // columns
    return Cut(sequences, chunk, chunks, rows, columns, -(-landmarks // rows), -(-e // columns))


def by_stretches(
    query: Tensor, key: Tensor, value: Tensor, landmarks: int, boundaries: Tensor | None = None, given: Given = None
) -> ByStretches | None:
    """How a call goes by stretches; None if it goes by states of all chunks."""
    if boundaries is not None or given is not None:
        return None
    widest = max(key.shape[-1], value.shape[-1])
    chosen = choose_stretches(key.dtype, widest, landmarks)
    if chosen is None:
        return None
    passes = [choose_stretches_backward(name, chosen, key.dtype, widest, landmarks) for name in STRETCH_PASSES]
    early = max(x.tokens for x in (chosen, *passes))
    stretches = cut_stretches(key.shape[2], query.shape[0] * query.shape[1], chosen, early)
    return None if stretches is None else ByStretches(chosen, stretches)


def spread_of(found: Cut) -> int:
    """Programs of a sequence and head that look for steep chunks."""
    return max(1, min(SPREAD, found.chunks // found.sequences))


def launch_of(
    kernel: Any,
    programs: int,
    arguments: dict[str, Any],
    fixed: dict[str, Any],
    warps: int,
    registers: int | None = None,
) -> Launch:
    """A launch with what the kernel takes of all there is."""
    names = kernel.arg_names
    return Launch(
        kernel,
        programs,
        {name: arguments[name] for name in names if name in arguments},
        {name: fixed[name] for name in names if name in fixed},
        warps,
        registers,
    )


def columns_of(size: int, dtype: torch.dtype) -> int:
    """Columns of a tile of tokens.

    In 16 bits results were wrong on a GPU where there were 16, or fewer of values than of keys; see docs/kernels.md,
    "What one has to know of Triton".
    """
    return padded_dim(size) if dtype == torch.float32 else max(NARROWEST, padded_dim(size))


def padded_dims(d: int, e: int, dtype: torch.dtype) -> dict[str, int]:
    """Columns of tiles of keys and of values."""
    return {
        "D_PADDED": columns_of(d, dtype),
        "E_PADDED": columns_of(e if dtype == torch.float32 else max(d, e), dtype),
    }


def compile_time(
    chosen: Configuration, found: Cut, m: int, d: int, e: int, precision: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Compile-time arguments of every kernel."""
    fixed = constants(chosen, m, d, e, precision)
    fixed |= padded_dims(d, e, dtype)
    # A tile of steep chunks is of float32 and read without a pipeline.
    queries = max(16, min(found.chunk, STEEP_TILE // max(found.chunk, fixed["D_PADDED"], fixed["E_PADDED"])))
    return fixed | {
        "CHUNK": found.chunk,
        "PRODUCT": product_type(dtype),
        "ROWS": found.rows,
        "COLUMNS": found.columns,
        "ROW_BLOCKS": found.row_blocks,
        "ROW_BLOCKS_PADDED": triton.next_power_of_2(found.row_blocks),
        "COLUMN_BLOCKS": found.column_blocks,
        "QUERIES": queries,
        "TILES": found.chunk // chosen.tokens,
    }


def stretch_constants(by: ByStretches, m: int, d: int, e: int, precision: str, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments common to the kernels of stretches."""
    return {
        "M": m,
        "D": d,
        "E": e,
        **padded_dims(d, e, dtype),
        "EARLY": by.stretches.early,
        "ALL": max(16, triton.next_power_of_2(m)),
        "PRECISION": precision,
        "PRODUCT": product_type(dtype),
    }


def rounded(query_landmarks: Tensor, key_landmarks: Tensor, dtype: torch.dtype) -> tuple[Launch, dict[str, Any]]:
    """What makes landmarks dense and of the dtype of the keys, and the arguments they become."""
    given = {"query_landmarks": query_landmarks, "key_landmarks": key_landmarks}
    dense = {name: x.new_empty(x.shape, dtype=dtype) for name, x in given.items()}
    m, d = query_landmarks.shape[-2:]
    rows = max(1, 2048 // padded_dim(d))
    of_queries, of_keys = (x.shape[0] * x.shape[1] * -(-m // rows) for x in given.values())
    launch = Launch(
        round_kernel,
        of_queries + of_keys,
        given
        | {f"rounded_{name}": x for name, x in dense.items()}
        | strides(**given)
        | {"query_heads": query_landmarks.shape[1], "key_heads": key_landmarks.shape[1], "of_queries": of_queries},
        {"M": m, "D": d, "D_PADDED": padded_dim(d), "ROUND_ROWS": rows},
        4,
    )
    return launch, dense | {name: x for name, x in strides(**dense).items() if not name.endswith("_row")}


def of_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_landmarks: Tensor,
    key_landmarks: Tensor,
    landmark_bias: Tensor,
    key_bias: Tensor | None,
    key_quadratic: Tensor | None,
    boundaries: Tensor | None,
    found: Cut,
) -> tuple[list[Launch], dict[str, Any]]:
    """What rounds the landmarks and numbers chunks, and the arguments that kernels of both directions take."""
    rounding, landmarks = rounded(query_landmarks, key_landmarks, key.dtype)
    launches = [rounding]
    operands = {
        "query": query,
        "key": key,
        "value": value,
        "landmark_bias": landmark_bias,
        "key_bias": key_bias,
        "key_quadratic": key_quadratic,
    }
    sizes = {
        "heads": key.shape[1],
        "groups": query.shape[1] // key.shape[1],
        "n": key.shape[2],
        "chunks": found.chunks,
        "sequences": found.sequences,
    }
    places = {"boundaries": boundaries, "chunk_sequence": None}
    if boundaries is not None:
        places["chunk_sequence"] = query.new_empty(found.chunks, dtype=torch.int32)
        fixed = {"CHUNK": found.chunk, "AT_ONCE": NUMBERED}
        launches.append(launch_of(chunk_sequence_kernel, found.sequences, places | sizes, fixed, 4))
    return launches, operands | strides(**operands) | landmarks | places | sizes


def kept_states(query: Tensor, found: Cut, heads: int, m: int, e: int) -> dict[str, Tensor]:
    """States and what is known of them before every chunk, as in Forward; heads are those of all batch items."""
    after_last = found.chunks + found.sequences
    return {
        "entering_mean": query.new_empty((heads, found.chunks, m, e), dtype=state_dtype(query.dtype)),
        "log_sum": query.new_empty((heads, after_last, m), dtype=torch.float32),
        "first": query.new_empty((heads, found.chunks, m), dtype=torch.float32),
        "steepest": query.new_empty((heads, after_last, found.row_blocks), dtype=torch.float32),
    }


def kept_stretches(query: Tensor, found: ByStretches, heads: int, m: int, e: int) -> dict[str, Tensor]:
    """The same of stretches: what features are relative to as ``first``, the largest sums of features as ``steepest``.

    The latter are of every query head.
    """
    number, blocks = found.stretches.number, -(-m // found.chosen.landmarks)
    query_heads = query.shape[0] * query.shape[1]
    return {
        "entering_mean": query.new_empty((heads, number, m, e), dtype=torch.float32),
        "log_sum": query.new_empty((heads, number + 1, m), dtype=torch.float32),
        "first": query.new_empty((heads, number, m), dtype=torch.float32),
        "steepest": query.new_empty((query_heads, number, blocks), dtype=torch.float32),
    }


def forward_results(
    out: Tensor, log_scale: Tensor, sums: Tensor, query_log_sum: Tensor | None, kept: dict[str, Tensor]
) -> Forward:
    """With empty tensors, each its own, for what is kept for a backward where query_log_sum says that there is none."""
    if query_log_sum is not None:
        return Forward(out, log_scale, sums, query_log_sum, **kept)
    return Forward(out, log_scale, sums, sums.new_empty(0), **{name: x.new_empty(0) for name, x in kept.items()})


def plan_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_landmarks: Tensor,
    key_landmarks: Tensor,
    landmark_bias: Tensor,
    key_bias: Tensor | None,
    key_quadratic: Tensor | None,
    log_scale: Tensor | None,
    sums: Tensor | None,
    boundaries: Tensor | None = None,
    *,
    needs_backward: bool,
    precision: str,
    configurations: Given = None,
) -> tuple[list[Launch], Forward]:
    """The kernels of the forward and the tensors they fill.

    Packed sequences are one batch item of all operands but the state, and b of states at ends is their number.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        query_landmarks: Landmarks that queries see.
        key_landmarks: Landmarks that keys see.
        landmark_bias: Bias of landmarks.
        key_bias: Bias of keys or None.
        key_quadratic: Coefficients of squared keys or None.
        log_scale: Running maximum of the state before the first token, (b, h, m), or None.
        sums: Sums of that state, (b, h, m, e + 1), or None.
        boundaries: Where packed sequences begin and the last ends, (sequences + 1,), or None.
        needs_backward: Whether to keep what the backward takes.
        precision: Of float32 products, as Triton names it.
        configurations: By name of pass, in place of the table's.
    """
    b, h, n, d = key.shape
    query_heads, e, m = query.shape[1], value.shape[-1], query_landmarks.shape[-2]
    stretches = by_stretches(query, key, value, m, boundaries, configurations)
    if stretches is not None:
        from spectraformer.ops.triton.causal_stretch_plan import plan_stretches

        operands = (query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic)
        return plan_stretches(
            *operands, log_scale, sums, needs_backward=needs_backward, precision=precision, by=stretches
        )
    found = cut(key, value, m, boundaries, configurations)
    chunks, items = found.chunks, b * found.sequences

    def floats(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    out = query.new_empty(b, query_heads, n, e)
    after_scale, after_sums = floats(items, h, m), floats(items, h, m, e + 1)
    query_log_sum = floats(b * query_heads, n) if needs_backward else None
    kept = kept_states(query, found, b * h, m, e)
    launches, arguments = of_inputs(
        query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic, boundaries, found
    )
    arguments |= kept | {
        "part_mean": kept["entering_mean"].new_empty(b * h, chunks, m, e),
        "part_total": floats(b * h, chunks, m),
        "part_peak": floats(b * h, chunks, m),
        "log_scale": log_scale,
        "sums": sums,
        **state_strides(log_scale, sums),
        "log_scale_after": after_scale,
        "sums_after": after_sums,
        "out": out,
        "query_log_sum": query_log_sum,
        "spread": spread_of(found),
    }
    states_of, outputs = (configuration(x, key, value, m, configurations) for x in ("chunk_states", "chunk_outputs"))
    fixed = compile_time(outputs, found, m, d, e, precision, key.dtype)
    of_states = compile_time(states_of, found, m, d, e, precision, key.dtype)
    scans = items * h * found.row_blocks * found.column_blocks
    launches += [
        launch_of(
            chunk_state_kernel,
            b * h * chunks * of_states["BLOCKS"],
            arguments,
            of_states,
            states_of.warps,
            states_of.registers,
        ),
        launch_of(scan_kernel, scans, arguments, fixed | {"STAGES": SCAN_STAGES}, SCAN_WARPS),
        launch_of(
            chunk_output_kernel,
            b * query_heads * chunks * fixed["TILES"],
            arguments,
            fixed,
            outputs.warps,
            outputs.registers,
        ),
        launch_of(
            steep_output_kernel,
            items * query_heads * arguments["spread"],
            arguments,
            fixed | {"TOKENS": found.chunk},
            STEEP_WARPS,
        ),
    ]
    return launches, forward_results(out, after_scale, after_sums, query_log_sum, kept)
