r"""Landmark attention in plain torch: any dtype, any device, the oracle of the other backends.

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectraformer.ops.blocks import blocks
from spectraformer.ops.streaming import AttentionState, advance, flatten_heads, unflatten_heads, with_ones

# Products within a chunk cost chunk / 2 a token; fewer chunks cost fewer calls. Measured at d = 64, m = 128.
CAUSAL_CHUNK = 64


def landmark_attention(
    query: Tensor,  # (b, h, g * n, d)
    key: Tensor,  # (b, h, s, d)
    value: Tensor,  # (b, h, s, e)
    query_landmarks: Tensor,  # (b, h, m, d)
    key_landmarks: Tensor,  # (b, h, m, d)
    landmark_bias: Tensor,  # (b, h, m)
    key_bias: Tensor,  # (b, h, s), -inf removes a key; at least one key of each row is finite
    no_key: Tensor,  # (b, h, 1, 1), where the output is to be 0
) -> Tensor:
    """Both softmaxes with their logits in memory: O((n + s) m) for each head."""
    logits = torch.einsum("bhmd,bhsd->bhms", key_landmarks, key) + key_bias.unsqueeze(-2)
    log_sum = logits.logsumexp(-1)
    landmark_value = (logits.softmax(-1) @ value).masked_fill(no_key, 0.0)
    attend = torch.einsum("bhnd,bhmd->bhnm", query, query_landmarks)
    return (attend + (landmark_bias + log_sum).unsqueeze(-2)).softmax(-1) @ landmark_value


def causal_landmark_attention(
    query: Tensor,  # (b, h, g, n, d)
    key: Tensor,  # (b, h, n, d)
    value: Tensor,  # (b, h, n, e)
    query_landmarks: Tensor,  # (b, h, m, d)
    key_landmarks: Tensor,  # (b, h, m, d)
    landmark_bias: Tensor,  # (b, h, m)
    key_bias: Tensor,  # (b, h, n), -inf removes a key
    state: AttentionState,
    chunk: int = CAUSAL_CHUNK,
) -> tuple[Tensor, AttentionState]:  # (b, h, g, n, e)
    """Query t attends to the state and to keys 0..t: chunks in order, linear in n."""
    b, h, groups, n, _ = query.shape
    query = query.flatten(0, 1)
    key, value, key_bias = key.flatten(0, 1), with_ones(value.flatten(0, 1)), key_bias.flatten(0, 1).unsqueeze(-1)
    wq, wk = query_landmarks.flatten(0, 1).mT, key_landmarks.flatten(0, 1).mT
    bias = landmark_bias.flatten(0, 1).unsqueeze(-2)
    flat = flatten_heads(state)
    outputs = []
    for block in blocks(n, chunk):
        log_query = torch.baddbmm(bias, query[:, :, block].flatten(1, 2), wq)
        log_key = torch.baddbmm(key_bias[:, block], key[:, block], wk)
        out, _, flat = advance(log_query, None, log_key, None, value[:, block], flat)
        outputs.append(out.reshape(b, h, groups, -1, out.shape[-1]))
    return torch.cat(outputs, dim=3), unflatten_heads(flat, h)
