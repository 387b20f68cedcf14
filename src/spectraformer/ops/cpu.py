r"""Landmark attention on torch's fused CPU attention: two calls forward, a blocked recomputation backward.

The fused CPU kernel returns the log-sum-exp beside the output, which is all that chaining two softmaxes
needs; it keeps no logits, so memory is that of inputs and output. Its own backward gives no gradient of the
additive bias or of the log-sum-exp, so ours recomputes the probabilities block by block.

Legend: b batch, h key heads, n queries, s keys, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from spectraformer.ops.blocks import blocks
from spectraformer.ops.graph import differentiable_once, is_exporting

# Elements of one block of recomputed probabilities: 4 MiB in float32, about a core's share of cache.
BLOCK_ELEMENTS = 1 << 20
# The fused kernel needs equal query and value dims. Beyond this ratio padding costs more than it saves.
MAX_PADDING = 2
# Stands for -inf in the fused kernel, which would return NaN for a block of nothing but -inf.
REMOVED = -1e30


def refusals(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """Why the fused CPU path cannot take these tensors; empty if it can."""
    reasons = []
    if is_exporting():
        reasons.append("the graph is being exported, and torch's fused CPU kernel would tie it to this device")
    if query.device.type != "cpu":
        reasons.append(f"tensors are on {query.device}, not on the CPU")
    d, e = key.shape[-1], value.shape[-1]
    if max(d, e) > MAX_PADDING * min(d, e):
        reasons.append(f"value dim {e} and head dim {d} differ by more than {MAX_PADDING} times")
    return reasons


def landmark_attention(
    query: Tensor,  # (b, h, n, d)
    key: Tensor,  # (b, h, s, d)
    value: Tensor,  # (b, h, s, e)
    query_landmarks: Tensor,  # (b, h, m, d)
    key_landmarks: Tensor,  # (b, h, m, d)
    landmark_bias: Tensor,  # (b, h, m)
    key_bias: Tensor,  # (b, h, s), -inf removes a key; at least one key of each row is finite
    no_key: Tensor,  # (b, h, 1, 1), where the output is to be 0
) -> Tensor:
    """Both softmaxes through the fused CPU kernel; memory linear in n and s with no factor m."""
    out: Tensor = _FusedLandmarkAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias.clamp_min(REMOVED), no_key
    )
    return out


def _fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T + bias) v and its log-sum-exp; bias (b, h, keys) is the same for every query."""
    d, e = query.shape[-1], value.shape[-1]
    if e < d:
        value = pad(value, (0, d - e))
    elif d < e:
        query, key = pad(query, (0, e - d)), pad(key, (0, e - d))
    query, key, value, bias = (_with_unit_stride(x) for x in (query, key, value, bias))
    mask = bias.unsqueeze(-2).expand(-1, -1, query.shape[-2], -1)
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=mask, scale=1.0
    )
    return out[..., :e], log_sum


def _with_unit_stride(x: Tensor) -> Tensor:
    """The kernel reads the last dimension as if it were contiguous, and silently reads other memory if it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _FusedLandmarkAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, u: Tensor, w: Tensor, a: Tensor, t: Tensor, no_key: Tensor
    ) -> Tensor:
        landmark_value, log_sum = _fused(w, k, v, t)
        landmark_value = landmark_value.masked_fill(no_key, 0.0)
        out, _ = _fused(q, u, landmark_value, a + log_sum)
        ctx.save_for_backward(q, k, v, u, w, a, t, no_key, landmark_value, log_sum, out)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, u, w, a, t, no_key, landmark_value, log_sum, out = ctx.saved_tensors
        b, h, m, _ = u.shape
        block = max(64, BLOCK_ELEMENTS // (b * h * m))

        # Queries: softmax over landmarks. Gradients of o and of its log-sum-exp are sums over queries.
        bias = (a + log_sum).unsqueeze(-2)
        dq = torch.empty_like(q)
        du, d_log_sum = torch.zeros_like(u), torch.zeros_like(log_sum)
        d_landmark_value = torch.zeros_like(landmark_value)
        for rows in blocks(q.shape[2], block):
            g, qb = grad[:, :, rows], q[:, :, rows]
            p = torch.softmax(qb @ u.mT + bias, dim=-1)  # (b, h, r, m)
            inner = (g * out[:, :, rows]).sum(-1, keepdim=True)
            ds = p * (g @ landmark_value.mT - inner)
            dq[:, :, rows] = ds @ u
            du += ds.mT @ qb
            d_log_sum += ds.sum(-2)
            d_landmark_value += p.mT @ g

        d_landmark_value = d_landmark_value.masked_fill(no_key, 0.0)

        # Keys: softmax over keys, whose normaliser is a function of every key.
        outer = (d_log_sum - (d_landmark_value * landmark_value).sum(-1)).unsqueeze(-2)
        dk, dv, dt = torch.empty_like(k), torch.empty_like(v), torch.empty_like(t)
        dw = torch.zeros_like(w)
        for rows in blocks(k.shape[2], block):
            kb, vb = k[:, :, rows], v[:, :, rows]
            p = torch.exp(kb @ w.mT + t[:, :, rows].unsqueeze(-1) - log_sum.unsqueeze(-2))  # (b, h, r, m)
            ds = p * (vb @ d_landmark_value.mT + outer)
            dk[:, :, rows] = ds @ w
            dv[:, :, rows] = p @ d_landmark_value
            dw += ds.mT @ kb
            dt[:, :, rows] = ds.sum(-1)
        return dq, dk, dv, du, dw, d_log_sum, dt, None
