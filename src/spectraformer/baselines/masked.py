"""Softmax attention to some of the keys, by torch's fastest kernels on each device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Flash attention takes head dims that are multiples of it.
ALIGNMENT = 8
# What a removed key loses before scaling is its square, 2^20: far below all other scores, which are subtracted from
# it in float32 without any loss that matters; and 2^10 is exact in every floating-point format.
REMOVED = 1024.0


def masked_attention(
    query: Tensor,  # (b, h, n, d)
    key: Tensor,  # (b, h, s, d)
    value: Tensor,  # (b, h, s, e)
    seen: Tensor | None,  # (b | 1, h | 1, s)
    *,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:  # (b, h, n, e)
    """Softmax attention to the keys that are seen; to all, in some proportion, where that is none.

    Torch's flash attention on a GPU takes no mask, and with one the other kernel is ten times slower: its backward,
    where it must be deterministic, goes through the keys of a head one after another. So there the mask is a
    coordinate, see :func:`folded_attention`. On a CPU, where flash attention takes masks, that coordinate would cost
    a fifth; it saves the mask of all pairs that causal attention would need.

    Args:
        query: Queries.
        key: Keys, finite.
        value: Values, finite. If those of keys that are not seen are 0, so is the output where no key is seen.
        seen: True for keys that are seen; None if all are.
        is_causal: Query t sees keys 0..t of them only; n = s.
        dropout: Of attention weights.
    """
    if seen is None:
        return functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=is_causal)
    if is_causal or query.device.type == "cuda":
        return folded_attention(query, key, value, seen, is_causal=is_causal, dropout=dropout)
    mask = (seen | ~seen.any(-1, keepdim=True)).unsqueeze(-2)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def folded_attention(
    query: Tensor,  # (b, h, n, d)
    key: Tensor,  # (b, h, s, d)
    value: Tensor,  # (b, h, s, e)
    seen: Tensor,  # (b | 1, h | 1, s)
    *,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:  # (b, h, n, e)
    r"""As :func:`masked_attention`, the mask folded into one more coordinate of queries and keys.

    .. math:: [q, c] \cdot [k, 0] = q \cdot k, \qquad [q, c] \cdot [k, -c] = q \cdot k - c^2, \quad c = 2^{10}

    The weight of a removed key underflows to exactly 0 where any other is seen. Where none is, all weights are
    finite, and so are gradients. Deterministic kernels: on a GPU torch takes flash attention for bfloat16 and
    float16, whose backward then adds up in a fixed order, and the memory-efficient kernel for float32; cuDNN's refuses
    where deterministic algorithms are asked for.
    """
    d, e = query.shape[-1], value.shape[-1]
    width = -(-max(d + 1, e) // ALIGNMENT) * ALIGNMENT  # one for all three: flash attention takes no other
    beside = query.new_full((1,), REMOVED)
    removed = torch.zeros_like(seen, dtype=key.dtype).masked_fill_(~seen, -REMOVED).unsqueeze(-1)
    # (1,) and (b, h | 1, s, 1), each before as many zeros as are left
    beside, removed = (functional.pad(x, (0, width - d - 1)) for x in (beside, removed))
    query = torch.cat((query, beside.expand(*query.shape[:3], -1)), -1)
    key = torch.cat((key, removed.expand(*key.shape[:3], -1)), -1)
    value = functional.pad(value, (0, width - e))
    out = functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=is_causal, scale=d**-0.5
    )
    return out[..., :e]
