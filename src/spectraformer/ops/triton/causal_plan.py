# mypy: disable-error-code="import-untyped,import-not-found"
"""The kernels of causal landmark attention with their arguments, in order.

Legend: b batch, h key heads, g query heads per key head, n tokens, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from spectraformer.ops.triton.causal_configurations import choose, segments
from spectraformer.ops.triton.causal_forward import sweep_kernel
from spectraformer.ops.triton.causal_states import combine_kernel, scan_kernel, state_kernel
from spectraformer.ops.triton.configurations import Configuration
from spectraformer.ops.triton.launch import Launch, constants, padded_dim, strides

# Landmarks of a program that merges states; tokens of one that adds up blocks of landmarks.
ROWS = 16


class Forward(NamedTuple):
    """What the forward fills."""

    out: Tensor  # (b, h g, n, e)
    log_scale: Tensor  # (b, h, m) float32, after the last key
    sums: Tensor  # (b, h, m, e + 1) float32, likewise
    query_log_sum: Tensor  # (b h g, n) float32, units of log 2; empty unless needed backward
    entering_mean: Tensor  # (b h, segments, m, e) float32; empty where nothing enters
    entering_total: Tensor  # (b h, segments, m) float32
    entering_peak: Tensor  # (b h, segments, m) float32, units of log 2


def compile_time(chosen: Configuration, m: int, d: int, e: int, precision: str, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments of a pass; features need the exponents of bfloat16, float16 has too few."""
    product = tl.float32 if dtype == torch.float32 else tl.bfloat16
    return constants(chosen, m, d, e, precision) | {"PRODUCT": product}


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
    *,
    needs_backward: bool,
    precision: str,
    configurations: dict[str, Configuration] | None = None,
) -> tuple[list[Launch], Forward]:
    """The kernels of the forward and the tensors they fill.

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
        needs_backward: Whether to keep what the backward takes.
        precision: Of float32 products, as Triton names it.
        configurations: By name of pass, in place of the table's.
    """
    b, h, n, d = key.shape
    query_heads = query.shape[1]
    groups = query_heads // h
    e, m = value.shape[-1], query_landmarks.shape[-2]
    new = query.new_empty

    def floats(*shape: int) -> Tensor:
        return new(shape, dtype=torch.float32)

    def configuration(name: str) -> Configuration:
        return (configurations or {}).get(name) or choose(name, key.dtype, max(d, e), m)

    states, sweep = configuration("states"), configuration("sweep")
    blocks = -(-m // sweep.landmarks)
    cut = segments(n, b * h * blocks, sweep, states)
    of_keys = {
        "key": key,
        "value": value,
        "key_landmarks": key_landmarks,
        "key_bias": key_bias,
        "key_quadratic": key_quadratic,
        **strides(key=key, value=value, key_landmarks=key_landmarks, key_bias=key_bias, key_quadratic=key_quadratic),
        "heads": h,
        "n": n,
    }
    launches = []
    part: dict[str, Tensor | None] = dict.fromkeys(("part_mean", "part_total", "part_peak"))
    if cut.number > 1:
        pieces = (cut.number - 1) * cut.parts
        part = {
            "part_mean": floats(b * h, pieces, m, e),
            "part_total": floats(b * h, pieces, m),
            "part_peak": floats(b * h, pieces, m),
        }
        launches.append(
            Launch(
                state_kernel,
                b * h * pieces * -(-m // states.landmarks),
                of_keys | part | {"span": cut.span // cut.parts, "pieces": pieces},
                compile_time(states, m, d, e, precision, key.dtype),
                states.warps,
            )
        )
    entering: dict[str, Tensor | None] = dict.fromkeys(("entering_mean", "entering_total", "entering_peak"))
    if cut.number > 1 or log_scale is not None:
        entering = {
            "entering_mean": floats(b * h, cut.number, m, e),
            "entering_total": floats(b * h, cut.number, m),
            "entering_peak": floats(b * h, cut.number, m),
        }
        # A row of the last dimension of log_scale is a landmark: strides() gives batch and head.
        launches.append(
            Launch(
                scan_kernel,
                b * h * -(-m // ROWS),
                {
                    "log_scale": log_scale,
                    "sums": sums,
                    **strides(log_scale=log_scale),
                    **({"sums_batch": 0, "sums_head": 0, "sums_row": 0} if sums is None else strides(sums=sums)),
                    **part,
                    **entering,
                    "heads": h,
                    "segments": cut.number,
                    "parts": cut.parts,
                },
                {"M": m, "E": e, "E_PADDED": padded_dim(e), "ROWS": ROWS},
                4,
            )
        )
    out, after_scale, after_sums = new(b, query_heads, n, e), floats(b, h, m), floats(b, h, m, e + 1)
    query_log_sum = floats(b * query_heads, n) if needs_backward else None
    written: tuple[Tensor, Tensor | None] = (out, query_log_sum)
    if blocks > 1:
        written = new(b * query_heads, blocks, n, e), floats(b * query_heads, blocks, n)
    arguments = (
        of_keys
        | entering
        | {
            "query": query,
            "query_landmarks": query_landmarks,
            "landmark_bias": landmark_bias,
            **strides(query=query, query_landmarks=query_landmarks, landmark_bias=landmark_bias),
            "out": written[0],
            "query_log_sum": written[1],
            "log_scale": after_scale,
            "sums": after_sums,
            "steepest": floats(b * h, cut.number, blocks),
            "groups": groups,
            "span": cut.span,
            "segments": cut.number,
        }
    )
    fixed = {"ONE_GROUP": groups == 1, **compile_time(sweep, m, d, e, precision, key.dtype)}
    programs = b * h * cut.number * blocks
    launches.append(Launch(sweep_kernel, programs, arguments, fixed | {"CAREFUL": False}, sweep.warps))
    launches.append(Launch(sweep_kernel, programs, arguments, fixed | {"CAREFUL": True, "STAGES": 1}, sweep.warps))
    if blocks > 1:
        rows = 2048 // padded_dim(e)
        launches.append(
            Launch(
                combine_kernel,
                b * query_heads * -(-n // rows),
                {
                    "part": written[0],
                    "part_log_sum": written[1],
                    "out": out,
                    "query_log_sum": query_log_sum,
                    "n": n,
                },
                {"BLOCKS": blocks, "E": e, "E_PADDED": padded_dim(e), "ROWS": rows},
                4,
            )
        )
    kept = [floats(0) if x is None or not needs_backward else x for x in (query_log_sum, *entering.values())]
    return launches, Forward(out, after_scale, after_sums, *kept)
