# mypy: disable-error-code="misc,assignment,import-untyped,import-not-found,untyped-decorator"
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
r"""Forward kernels: keys into landmarks (split over the sequence), a fixed-order merge, landmarks into queries.

Logits are in units of log 2 from the dot product on, so that every exponential is one instruction. Landmarks lie along
the rows of a tile where they accumulate, and along its columns where tokens are written: then every reduction stays
inside a warp and probabilities go from registers straight into the second product.

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectraformer.ops.triton.configurations import Configuration, choose, split
from spectraformer.ops.triton.launch import Launch, constants, padded_dim, strides
from spectraformer.ops.triton.tiles import (
    LOG2_E,
    SIZES,
    key_log_weight,
    load_key_bias,
    load_query_landmarks,
    load_rows,
    load_tile,
    merge_pieces,
    store_tile,
)

# Up to here every program of the queries merges the pieces of the keys itself; beyond, reading them costs more than
# a launch.
MOST_PIECES_AT_ONCE = 8


@triton.jit(do_not_specialize=SIZES)
def _key_kernel(
    key,
    value,
    key_landmarks,
    key_bias,
    key_quadratic,
    landmark_value,  # (b h, pieces, m padded, e) float32, divided by the sum where there is one piece
    peak,  # (b h, pieces, m padded) float32
    total,  # (b h, pieces, m padded) float32; with one piece, the log-sum-exp instead
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    key_landmarks_batch,
    key_landmarks_head,
    key_landmarks_row,
    key_bias_batch,
    key_bias_head,
    key_quadratic_batch,
    key_quadratic_head,
    heads,
    s,
    span,
    pieces,
    ONE_PIECE: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    D_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANDMARKS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    block = program % BLOCKS
    piece = (program // BLOCKS) % pieces
    flat = tl.cast(program // (BLOCKS * pieces), tl.int64)
    batch, head = flat // heads, flat % heads
    first = piece * span
    last = tl.minimum(first + span, s)
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    key_landmarks += batch * key_landmarks_batch + head * key_landmarks_head
    if key_bias is not None:
        key_bias += batch * key_bias_batch + head * key_bias_head
    if key_quadratic is not None:
        key_quadratic += batch * key_quadratic_batch + head * key_quadratic_head

    landmark = block * LANDMARKS + tl.arange(0, LANDMARKS)
    w = load_tile(key_landmarks, landmark, key_landmarks_row, M, D, D_PADDED).to(key.dtype.element_ty)
    top = tl.full((LANDMARKS,), float("-inf"), tl.float32)
    mass = tl.zeros((LANDMARKS,), tl.float32)
    mean = tl.zeros((LANDMARKS, E_PADDED), tl.float32)
    row = tl.arange(0, TOKENS)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        offset = tl.cast(start, tl.int64)
        bias = key_bias
        if key_bias is not None:
            bias = key_bias + start
        weight = load_key_bias(bias, row, last - start)
        # Not "> -inf": a NaN must show.
        present = weight != float("-inf")
        k = load_rows(key + offset * key_row, row, key_row, present, D, D_PADDED)
        v = load_rows(value + offset * value_row, row, value_row, present, E, E_PADDED)
        weight = key_log_weight(k, weight, key_quadratic, D, D_PADDED)
        logits = tl.dot(w, tl.trans(k), input_precision=PRECISION) * LOG2_E + weight[None, :]
        higher = tl.maximum(top, tl.max(logits, 1))
        # A landmark that has seen no key yet: -inf - -inf would be NaN.
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(logits - reference[:, None])
        shrink = tl.exp2(top - reference)
        mass = mass * shrink + tl.sum(p, 1)
        mean = tl.dot(p.to(v.dtype), v, mean * shrink[:, None], input_precision=PRECISION)
        top = higher

    place = (flat * pieces + piece) * (BLOCKS * LANDMARKS) + landmark
    if ONE_PIECE:
        # Without any key: value 0 and a finite log-sum-exp, so that queries find no NaN.
        empty = mass == 0.0
        divisor = tl.where(empty, 1.0, mass)
        mean = mean / divisor[:, None]
        tl.store(total + place, tl.where(empty, 0.0, top + tl.log2(divisor)))
    else:
        tl.store(peak + place, top)
        tl.store(total + place, mass)
    column = tl.arange(0, E_PADDED)
    tl.store(landmark_value + place[:, None] * E + column[None, :], mean, mask=(column < E)[None, :])


@triton.jit(do_not_specialize=SIZES)
def _merge_kernel(
    partial_value,  # (b h, pieces, m padded, e)
    partial_peak,  # (b h, pieces, m padded)
    partial_total,
    landmark_value,  # (b h, m padded, e)
    log_sum,  # (b h, m padded)
    pieces,
    m_padded,
    M: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Many pieces: merged once, by programs of a few landmarks."""
    program = tl.program_id(0)
    landmark = (program % tl.cdiv(M, ROWS)) * ROWS + tl.arange(0, ROWS)
    flat = tl.cast(program // tl.cdiv(M, ROWS), tl.int64)
    start = flat * pieces * m_padded
    mean, total = merge_pieces(
        partial_value + start * E, partial_peak + start, partial_total + start, pieces, m_padded, landmark,
        M, E, E_PADDED,
    )  # fmt: skip
    store_tile(landmark_value + flat * m_padded * E, landmark, E, M, mean, E, E_PADDED)
    tl.store(log_sum + flat * m_padded + landmark, total, mask=landmark < M)


@triton.jit(do_not_specialize=SIZES)
def _query_kernel(
    query,
    query_landmarks,
    landmark_bias,
    landmark_value,  # (b h, m padded, e) float32
    log_sum,  # (b h, m padded) float32, units of log 2
    partial_value,  # (b h, key pieces, m padded, e): given, the two above are filled from these; or None
    partial_peak,  # (b h, key pieces, m padded)
    partial_total,
    out,  # (b h g, n, e)
    query_log_sum,  # (b h g, n) float32, units of log 2, or None
    query_batch,
    query_head,
    query_row,
    query_landmarks_batch,
    query_landmarks_head,
    query_landmarks_row,
    landmark_bias_batch,
    landmark_bias_head,
    heads,
    groups,
    n,
    span,
    pieces,
    key_pieces,
    m_padded,
    M: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    D_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANDMARKS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    first = (program % pieces) * span
    last = tl.minimum(first + span, n)
    flat = tl.cast(program // pieces, tl.int64)
    shared = flat // groups
    batch, head = shared // heads, shared % heads
    query += batch * query_batch + (flat % (heads * groups)) * query_head
    query_landmarks += batch * query_landmarks_batch + head * query_landmarks_head
    landmark_bias += batch * landmark_bias_batch + head * landmark_bias_head
    landmark_value += shared * m_padded * E
    log_sum += shared * m_padded
    out += flat * n * E
    element = query.dtype.element_ty

    blocks = ()
    if RESIDENT:
        for block in tl.static_range(BLOCKS):
            landmark = block * LANDMARKS + tl.arange(0, LANDMARKS)
            if partial_value is not None:
                # Every program merges what it needs, the first of a head for the backward: one launch less.
                begin = shared * key_pieces * m_padded
                o, merged = merge_pieces(
                    partial_value + begin * E, partial_peak + begin, partial_total + begin, key_pieces, m_padded,
                    landmark, M, E, E_PADDED,
                )  # fmt: skip
                if program % (pieces * groups) == 0:
                    store_tile(landmark_value, landmark, E, M, o, E, E_PADDED)
                    tl.store(log_sum + landmark, merged, mask=landmark < M)
                u = load_tile(query_landmarks, landmark, query_landmarks_row, M, D, D_PADDED)
                bias = tl.load(landmark_bias + landmark, mask=landmark < M, other=float("-inf")) * LOG2_E + merged
            else:
                u, o, bias = load_query_landmarks(
                    query_landmarks, landmark_bias, landmark_value, log_sum, query_landmarks_row,
                    landmark, M, D, E, D_PADDED, E_PADDED,
                )  # fmt: skip
            blocks = blocks + ((u.to(element), o.to(element), bias),)  # noqa: RUF005 - kernels have no unpacking
    row = tl.arange(0, TOKENS)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        offset = tl.cast(start, tl.int64)
        q = load_tile(query + offset * query_row, row, query_row, last - start, D, D_PADDED)
        if RESIDENT:
            logits = tl.dot(q, tl.trans(blocks[0][0]), input_precision=PRECISION) * LOG2_E + blocks[0][2][None, :]
            top = tl.max(logits, 1)
            p = tl.exp2(logits - top[:, None])
            mass = tl.sum(p, 1)
            mean = tl.dot(p.to(element), blocks[0][1], input_precision=PRECISION)
            for block in tl.static_range(1, BLOCKS):
                top, mass, mean = _attend(q, blocks[block], top, mass, mean, PRECISION)
        else:
            top = tl.full((TOKENS,), -1e38, tl.float32)
            mass = tl.zeros((TOKENS,), tl.float32)
            mean = tl.zeros((TOKENS, E_PADDED), tl.float32)
            for block in range(BLOCKS):
                u, o, bias = load_query_landmarks(
                    query_landmarks, landmark_bias, landmark_value, log_sum, query_landmarks_row,
                    block * LANDMARKS + tl.arange(0, LANDMARKS), M, D, E, D_PADDED, E_PADDED,
                )  # fmt: skip
                top, mass, mean = _attend(q, (u.to(element), o.to(element), bias), top, mass, mean, PRECISION)
        store_tile(out + offset * E, row, E, last - start, mean / mass[:, None], E, E_PADDED)
        if query_log_sum is not None:
            tl.store(query_log_sum + flat * n + start + row, top + tl.log2(mass), mask=row < last - start)


@triton.jit
def _attend(q, landmarks, top, mass, mean, PRECISION: tl.constexpr):
    """One more block of landmarks into a running softmax."""
    logits = tl.dot(q, tl.trans(landmarks[0]), input_precision=PRECISION) * LOG2_E + landmarks[2][None, :]
    higher = tl.maximum(top, tl.max(logits, 1))
    p = tl.exp2(logits - higher[:, None])
    shrink = tl.exp2(top - higher)
    mean = tl.dot(p.to(q.dtype), landmarks[1], mean * shrink[:, None], input_precision=PRECISION)
    return higher, mass * shrink + tl.sum(p, 1), mean


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
    keys: Configuration | None = None,
    queries: Configuration | None = None,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The kernels of the forward and the tensors they fill.

    Returns:
        Launches in order, and: output (b, h g, n, e); landmark values (b h, m padded, e) and log-sum-exps
        (b h, m padded) in units of log 2, float32; log-sum-exps of queries (b h g, n), empty unless needs_backward.
    """
    b, h, s, d = key.shape
    query_heads, n = query.shape[1:3]
    e, m = value.shape[-1], query_landmarks.shape[-2]
    keys = keys or choose("keys", key.dtype, max(d, e), m)
    queries = queries or choose("queries", key.dtype, max(d, e), m)
    key_constants = constants(keys, m, d, e, precision)
    padded = key_constants["BLOCKS"] * keys.landmarks
    pieces, span = split(s, b * h * key_constants["BLOCKS"], keys)
    new = query.new_empty
    landmark_value, log_sum = new(b * h, padded, e, dtype=torch.float32), new(b * h, padded, dtype=torch.float32)
    partial_value, partial_total, partial_peak = landmark_value, log_sum, None
    if pieces > 1:
        partial_value = new(b * h, pieces, padded, e, dtype=torch.float32)
        partial_total, partial_peak = (new(b * h, pieces, padded, dtype=torch.float32) for _ in range(2))
    launches = [
        Launch(
            _key_kernel,
            b * h * pieces * key_constants["BLOCKS"],
            {
                "key": key,
                "value": value,
                "key_landmarks": key_landmarks,
                "key_bias": key_bias,
                "key_quadratic": key_quadratic,
                "landmark_value": partial_value,
                "peak": partial_peak,
                "total": partial_total,
                **strides(key=key, value=value, key_landmarks=key_landmarks, key_bias=key_bias),
                **strides(key_quadratic=key_quadratic),
                "heads": h,
                "s": s,
                "span": span,
                "pieces": pieces,
            },
            {"ONE_PIECE": pieces == 1, **key_constants},
            keys.warps,
        )
    ]
    query_constants = constants(queries, m, d, e, precision, resident=True)
    merge_at_once = 1 < pieces <= MOST_PIECES_AT_ONCE and queries.resident
    if pieces > 1 and not merge_at_once:
        launches.append(
            Launch(
                _merge_kernel,
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
    out = new(b, query_heads, n, e)
    query_log_sum = new(b * query_heads, n, dtype=torch.float32) if needs_backward else None
    key_pieces = pieces
    pieces, span = split(n, b * query_heads, queries)
    launches.append(
        Launch(
            _query_kernel,
            b * query_heads * pieces,
            {
                "query": query,
                "query_landmarks": query_landmarks,
                "landmark_bias": landmark_bias,
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
            query_constants,
            queries.warps,
            queries.registers,
        )
    )
    empty = new(0, dtype=torch.float32)
    return launches, (out, landmark_value, log_sum, empty if query_log_sum is None else query_log_sum)
