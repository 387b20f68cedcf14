# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Decoding: one token in, the state read and written once, one token out, in one kernel.

Legend: b batch, h key heads, g query heads per key head, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectraformer.ops.triton.causal_tiles import finite, positive
from spectraformer.ops.triton.launch import Launch, padded_dim, state_strides, strides
from spectraformer.ops.triton.tiles import LOG2_E, load_tile

# Elements of a tile of landmarks x head dim or value dim; value dims of a program: heads alone are few programs.
TILE = 8192
VALUES = 64


@triton.jit(do_not_specialize=("heads",))
def step_kernel(
    query,
    key,
    value,
    query_landmarks,
    key_landmarks,
    landmark_bias,
    key_bias,
    key_quadratic,
    log_scale,  # (b, h, m), or None before the first key
    sums,  # (b, h, m, e + 1)
    out,  # (b h g, e)
    log_scale_after,  # (b h, m)
    sums_after,  # (b h, m, e + 1)
    query_batch,
    query_head,
    key_batch,
    key_head,
    value_batch,
    value_head,
    query_landmarks_batch,
    query_landmarks_head,
    query_landmarks_row,
    key_landmarks_batch,
    key_landmarks_head,
    key_landmarks_row,
    landmark_bias_batch,
    landmark_bias_head,
    key_bias_batch,
    key_bias_head,
    key_quadratic_batch,
    key_quadratic_head,
    log_scale_batch,
    log_scale_head,
    sums_batch,
    sums_head,
    sums_row,
    heads,
    GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    D_PADDED: tl.constexpr,
    VALUES: tl.constexpr,
    PARTS: tl.constexpr,
    LANDMARKS: tl.constexpr,
):
    """One key head, VALUES of the value dims: blocks of landmarks in order, a running softmax for each query head."""
    program = tl.program_id(0)
    part = program % PARTS
    flat = tl.cast(program // PARTS, tl.int64)
    batch, head = flat // heads, flat % heads
    element = key.dtype.element_ty
    key_landmarks += batch * key_landmarks_batch + head * key_landmarks_head
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head
    query += batch * query_batch + head * GROUPS * query_head
    if log_scale is not None:
        log_scale += batch * log_scale_batch + head * log_scale_head
        sums += batch * sums_batch + head * sums_head
    sums_after += flat * M * (E + 1)

    column, value_column = tl.arange(0, D_PADDED), part * VALUES + tl.arange(0, VALUES)
    weight = tl.full((), 0.0, tl.float32)
    if key_bias is not None:
        weight = tl.load(key_bias + batch * key_bias_batch + head * key_bias_head)
    # Nothing is read of a key that is removed.
    visible = tl.where(weight == float("-inf"), 0, 1)
    k = tl.load(key + batch * key_batch + head * key_head + column, mask=column < visible * D, other=0.0)
    k = k.to(tl.float32)
    v = tl.load(
        value + batch * value_batch + head * value_head + value_column, mask=value_column < visible * E, other=0.0
    ).to(tl.float32)
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head
        weight += tl.sum(k * k * tl.load(key_quadratic + column, mask=column < D, other=0.0), 0)

    group = tl.arange(0, GROUPS_PADDED)
    peaks = tl.full((GROUPS_PADDED,), float("-inf"), tl.float32)
    masses = tl.zeros((GROUPS_PADDED,), tl.float32)
    results = tl.zeros((GROUPS_PADDED, VALUES), tl.float32)
    for block in range(tl.cdiv(M, LANDMARKS)):
        landmark = block * LANDMARKS + tl.arange(0, LANDMARKS)
        inside = landmark < M
        w = load_tile(key_landmarks, landmark, key_landmarks_row, M, D, D_PADDED).to(element).to(tl.float32)
        # Natural units, as the state has them: a maximum that stays is not to drift from step to step.
        logits = tl.sum(w * k[None, :], 1) + weight
        top = logits
        total = tl.zeros((LANDMARKS,), tl.float32)
        s = tl.zeros((LANDMARKS, VALUES), tl.float32)
        if log_scale is not None:
            before = tl.load(log_scale + landmark, mask=inside, other=float("-inf"))
            top = tl.maximum(logits, before)
            shrink = tl.exp2((before - finite(top)) * LOG2_E)
            total = shrink * tl.load(sums + landmark * sums_row + E, mask=inside, other=0.0)
            s = shrink[:, None] * tl.load(
                sums + landmark[:, None] * sums_row + value_column[None, :],
                mask=inside[:, None] & (value_column < E)[None, :],
                other=0.0,
            )
        feature = tl.exp2((logits - finite(top)) * LOG2_E)
        total += feature
        s += feature[:, None] * v[None, :]
        tl.store(
            sums_after + landmark[:, None] * (E + 1) + value_column[None, :],
            s,
            mask=inside[:, None] & (value_column < E)[None, :],
        )
        if part == 0:
            tl.store(sums_after + landmark * (E + 1) + E, total, mask=inside)
            tl.store(log_scale_after + flat * M + landmark, top, mask=inside)

        u = load_tile(query_landmarks, landmark, query_landmarks_row, M, D, D_PADDED).to(element).to(tl.float32)
        bias = tl.load(landmark_bias + landmark, mask=inside, other=float("-inf")) + top
        for i in tl.static_range(GROUPS):
            q = tl.load(query + tl.cast(query_head, tl.int64) * i + column, mask=column < D, other=0.0).to(tl.float32)
            x = (tl.sum(u * q[None, :], 1) + bias) * LOG2_E
            mine = group == i
            old = tl.max(tl.where(mine, peaks, float("-inf")), 0)
            peak = tl.maximum(old, tl.max(x, 0))
            p = tl.exp2(x - finite(peak))
            shrink = tl.exp2(old - finite(peak))
            mass, result = tl.sum(p * total, 0), tl.sum(p[:, None] * s, 0)
            masses = tl.where(mine, masses * shrink + mass, masses)
            results = tl.where(mine[:, None], results * shrink + result[None, :], results)
            peaks = tl.where(mine, peak, peaks)
    # A query without any key: 0.
    results = results / positive(masses)[:, None]
    tl.store(
        out + flat * GROUPS * E + group[:, None] * E + value_column[None, :],
        results.to(out.dtype.element_ty),
        mask=(group < GROUPS)[:, None] & (value_column < E)[None, :],
    )


def plan_step(
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
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """The kernel of one step; operands as :func:`spectraformer.ops.triton.causal.decode_step` takes them.

    Returns:
        The launch, and: output (b, h g, 1, e), running maximum (b, h, m) and sums (b, h, m, e + 1) after the token.
    """
    b, h, _, d = key.shape
    query_heads, e, m = query.shape[1], value.shape[-1], query_landmarks.shape[-2]
    out = query.new_empty(b, query_heads, 1, e)
    after = (
        query.new_empty(b, h, m, dtype=torch.float32),
        query.new_empty(b, h, m, e + 1, dtype=torch.float32),
    )
    values = min(VALUES, padded_dim(e))
    parts = -(-e // values)
    of_tokens = strides(query=query, key=key, value=value)
    found = {
        **{name: x for name, x in of_tokens.items() if not name.endswith("_row")},
        **strides(query_landmarks=query_landmarks, key_landmarks=key_landmarks, landmark_bias=landmark_bias),
        **strides(key_bias=key_bias, key_quadratic=key_quadratic),
        **state_strides(log_scale, sums),
    }
    launch = Launch(
        step_kernel,
        b * h * parts,
        {
            "query": query,
            "key": key,
            "value": value,
            "query_landmarks": query_landmarks,
            "key_landmarks": key_landmarks,
            "landmark_bias": landmark_bias,
            "key_bias": key_bias,
            "key_quadratic": key_quadratic,
            "log_scale": log_scale,
            "sums": sums,
            "out": out,
            "log_scale_after": after[0],
            "sums_after": after[1],
            **found,
            "heads": h,
        },
        {
            "GROUPS": query_heads // h,
            "GROUPS_PADDED": triton.next_power_of_2(query_heads // h),
            "M": m,
            "D": d,
            "E": e,
            "D_PADDED": padded_dim(d),
            "VALUES": values,
            "PARTS": parts,
            "LANDMARKS": max(16, min(64, TILE // padded_dim(max(d, values)))),
        },
        4,
    )
    return [launch], (out, *after)
