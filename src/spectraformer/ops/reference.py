r"""Landmark attention in plain torch: any dtype, any device, the oracle of the other backends.

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, m landmarks, d head dim, e value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectraformer.ops.streaming import AttentionState, advance

CAUSAL_CHUNK = 128


def landmark_attention(
    query: Tensor,  # (b, h, g * n, d)
    key: Tensor,  # (b, h, s, d)
    value: Tensor,  # (b, h, s, e)
    query_landmarks: Tensor,  # (b, h, m, d)
    key_landmarks: Tensor,  # (b, h, m, d)
    landmark_bias: Tensor,  # (b, h, m)
    key_bias: Tensor,  # (b, h, s), -inf removes a key; at least one key of each row is finite
) -> Tensor:
    """Both softmaxes with their logits in memory: O((n + s) m) for each head."""
    logits = torch.einsum("bhmd,bhsd->bhms", key_landmarks, key) + key_bias.unsqueeze(-2)
    log_sum = logits.logsumexp(-1)
    landmark_value = logits.softmax(-1) @ value
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
) -> tuple[Tensor, AttentionState]:
    """Query t attends to the state and to keys 0..t: chunks in order, linear in n."""
    outputs = []
    groups = query.shape[2]
    wq = query_landmarks.transpose(-1, -2)
    wk = key_landmarks.transpose(-1, -2)
    for start in range(0, key.shape[2], chunk):
        block = slice(start, start + chunk)
        log_query = query[:, :, :, block].flatten(2, 3) @ wq + landmark_bias.unsqueeze(-2)
        log_key = key[:, :, block] @ wk + key_bias[:, :, block].unsqueeze(-1)
        out, _, state = advance(log_query, None, log_key, None, value[:, :, block], state)
        outputs.append(out.reshape(*out.shape[:2], groups, -1, out.shape[-1]))
    return torch.cat(outputs, dim=3), state
