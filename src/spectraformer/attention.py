r"""Attention as functions: random features, the exact kernel, and decoding step by step.

Legend: b batch, h key heads, g query heads per key head, n queries, s keys, d head dim, e value dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from spectraformer import ops
from spectraformer.checks import (
    check_causal,
    check_dropout,
    check_padding_mask,
    check_query_key,
    check_value,
    require_choice,
    resolve_scale,
)
from spectraformer.components import KERNELS, Exponential, Kernel
from spectraformer.features import FeatureMap


def random_feature_attention(
    query: Tensor,  # (b, h * g, n, d)
    key: Tensor,  # (b, h, s, d)
    value: Tensor,  # (b, h, s, e)
    feature_map: FeatureMap,
    *,
    key_padding_mask: Tensor | None = None,  # (b, s)
    query_padding_mask: Tensor | None = None,  # (b, n)
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> Tensor:  # (b, h * g, n, e)
    r"""Kernel attention in time and memory linear in n and s, shaped like ``scaled_dot_product_attention``.

    .. math:: \mathrm{out}_l = \frac{\sum_n \varphi(q_l)\cdot\varphi(k_n)\,v_n}{\sum_n \varphi(q_l)\cdot\varphi(k_n)}

    Args:
        query: Queries.
        key: Keys; s may differ from n unless causal.
        value: Values; e may differ from d.
        feature_map: phi.
        key_padding_mask: True for **real** keys, False for padding. Padding is exact: it changes nothing.
        query_padding_mask: True for real queries. Only data-dependent parameters look at it; None means
            ``key_padding_mask`` if n = s (self-attention), else all.
        is_causal: Query t sees keys 0..t.
        scale: tau > 0; its square root goes to queries and keys. Default 1 / sqrt(d).
        dropout_p: Probability in [0, 1) of dropping a key's value, for all queries of its batch item and head
            at once. There is no n x s matrix to drop entries of; the expectation is the same. Applied as
            given: pass 0 in evaluation.
        enable_gqa: Allow h * g query heads to share h key heads.
        backend: "auto", "triton", "cpu" or "torch"; see :mod:`spectraformer.ops`.

    Returns:
        Output in the dtype of value, 0 where every key is padding.

    Raises:
        ValueError: For shapes, dtypes, devices, masks or options that do not fit; for causal attention with
            parameters that would look into the future; if a backend named explicitly refuses.

    References:
        Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794.
    """
    check_map(feature_map)
    check_query_key(query, key, feature_map.head_dim, enable_gqa)
    check_value(key, value)
    check_dropout(dropout_p)
    chosen = ops.choose_backend(
        backend,
        query,
        key,
        value,
        positive=feature_map.positive,
        trigonometric=feature_map.component.trigonometric,
        is_causal=is_causal,
    )
    check_padding_mask("key_padding_mask", key_padding_mask, key)
    if 0 in query.shape or 0 in value.shape:
        return value.new_zeros(*query.shape[:3], value.shape[-1])
    if chosen != "triton" or is_causal:  # the other kernels do not read padding
        key, value = clear_padding(key, value, key_padding_mask)
    pair = feature_map(
        query,
        key,
        key_padding_mask=key_padding_mask,
        query_padding_mask=query_padding_mask,
        scale=scale,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
    )
    value = drop_values(value, dropout_p)
    if not is_causal:
        attended = pair.attend(value, backend=chosen)
    elif chosen == "triton" and isinstance(pair, Exponential):
        attended = pair.attend(value, backend=chosen, is_causal=True)
    else:
        dtype = ops.compute_dtype(query, key, value)
        state = feature_map.init_state(key.shape[0], key.shape[1], value.shape[-1], device=value.device, dtype=dtype)
        attended = pair.attend(value, state=state, backend=chosen)
    if attended.unsafe is not None:
        feature_map.record_unsafe(attended.unsafe)
    out: Tensor = attended.out
    return out if out.dtype == value.dtype else out.to(value.dtype)


def attention_step(
    query: Tensor,  # (b, h * g, n, d)
    key: Tensor,  # (b, h, n, d)
    value: Tensor,  # (b, h, n, e)
    feature_map: FeatureMap,
    state: ops.AttentionState,
    *,
    key_padding_mask: Tensor | None = None,  # (b, n)
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, ops.AttentionState]:
    """Causal attention of the next n tokens given the state of all before: one token to decode, many to prefill.

    Any split of a sequence into calls gives the output of the whole sequence in one call, and costs the same.

    Args:
        query: Queries of the new tokens.
        key: Keys of the new tokens.
        value: Values of the new tokens.
        feature_map: phi; data-dependent parameters come from its running moments.
        state: From :meth:`FeatureMap.init_state`, or returned by the last call.
        key_padding_mask: True for real tokens among the new ones.
        scale: As in :func:`random_feature_attention`; the same in every call.
        enable_gqa: Allow h * g query heads to share h key heads.

    Returns:
        Output, (b, h * g, n, e), in the dtype of value, and the new state; the old one is not changed.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit each other or the state.
    """
    check_map(feature_map)
    check_query_key(query, key, feature_map.head_dim, enable_gqa)
    check_value(key, value)
    check_causal(query, key)
    check_padding_mask("key_padding_mask", key_padding_mask, key)
    _check_state(feature_map, key, value, state)
    if 0 in (*query.shape, *value.shape):
        return value.new_zeros(*query.shape[:3], value.shape[-1]), state
    key, value = clear_padding(key, value, key_padding_mask)
    pair = feature_map(
        query,
        key,
        key_padding_mask=key_padding_mask,
        scale=scale,
        is_causal=True,
        enable_gqa=enable_gqa,
        track=False,
    )
    attended = pair.attend(value, state=state)
    feature_map.record_unsafe(attended.unsafe)
    assert attended.state is not None
    return attended.out.to(value.dtype), attended.state


def kernel_attention(
    query: Tensor,  # (b, h * g, n, d)
    key: Tensor,  # (b, h, s, d)
    value: Tensor,  # (b, h, s, e)
    *,
    kernel: Kernel = "softmax",
    key_padding_mask: Tensor | None = None,  # (b, s)
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # (b, h * g, n, e)
    r"""Exact attention with the kernel that random features estimate: n s time, the oracle to compare with.

    "softmax" is ordinary softmax attention. "gaussian" weighs keys by :math:`e^{-|x-y|^2/2}` of the scaled
    tokens: softmax attention with the key bias :math:`-\tau|k|^2/2`.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        kernel: "softmax" or "gaussian".
        key_padding_mask: True for real keys.
        is_causal: Query t sees keys 0..t.
        scale: tau > 0, default 1 / sqrt(d).
        enable_gqa: Allow h * g query heads to share h key heads.

    Returns:
        Output in the dtype of value, 0 where every key is padding.

    Raises:
        ValueError: As :func:`random_feature_attention`.
    """
    require_choice("kernel", kernel, KERNELS)
    check_query_key(query, key, None, enable_gqa)
    check_value(key, value)
    check_padding_mask("key_padding_mask", key_padding_mask, key)
    tau = resolve_scale(scale, query.shape[-1])
    if is_causal:
        check_causal(query, key)
    if query.shape[2] == 0 or key.shape[2] == 0:
        return value.new_zeros(*query.shape[:3], value.shape[-1])
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if kernel == "softmax" and key_padding_mask is None:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=tau)
    bias = key.new_zeros(key.shape[:3]).unsqueeze(-2)  # (b, h, 1, s)
    if kernel == "gaussian":
        bias = bias - 0.5 * tau * key.square().sum(-1).unsqueeze(-2)
    visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
    visible = (visible.tril() if is_causal else visible).expand(query.shape[0], 1, -1, -1)
    if key_padding_mask is not None:
        key, value = clear_padding(key, value, key_padding_mask)
        visible = visible & key_padding_mask[:, None, None, :]
    seen = visible.any(-1, keepdim=True)
    bias = bias.masked_fill(~(visible | ~seen), -math.inf)
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=tau)
    return torch.where(seen, out, 0.0)


def clear_padding(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zeros in place of padding: even NaN there must not reach the sums, and 0 * NaN is NaN."""
    if mask is None:
        return key, value
    padding = ~mask[:, None, :, None]
    return key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)


def drop_values(value: Tensor, p: float) -> Tensor:
    """Values with some keys' values 0, in all entries at once, and the others larger for it."""
    if p == 0:
        return value
    keep = torch.rand(value.shape[:3], device=value.device).unsqueeze(-1) >= p
    return value * keep.to(value.dtype) / (1 - p)


def check_map(feature_map: object) -> None:
    """Refuses what is not a feature map."""
    if not isinstance(feature_map, FeatureMap):
        raise ValueError(f"feature_map is {type(feature_map).__name__}; expected a spectraformer.FeatureMap")


def _check_state(feature_map: FeatureMap, key: Tensor, value: Tensor, state: object) -> None:
    if not isinstance(state, ops.AttentionState):
        raise ValueError(f"state is {type(state).__name__}; expected an AttentionState from feature_map.init_state")
    expected = (*key.shape[:2], feature_map.feature_dim, value.shape[-1])
    found = (*state.sums.shape[:-1], state.sums.shape[-1] - 1)
    if found != expected:
        raise ValueError(f"state has (batch, heads, features, value dim) {found}; these tokens need {expected}")
    if (state.magnitude is None) != feature_map.positive:
        raise ValueError("state belongs to another feature map: one has signed features, the other positive ones")
    scales = 1 if feature_map.component.shared_log else feature_map.feature_dim
    if state.log_scale.shape[-1] != scales:
        raise ValueError(
            f"state belongs to another feature map: it keeps {state.log_scale.shape[-1]} scales a head, not {scales}"
        )
    needed = ops.compute_dtype(key, value)
    if state.sums.dtype != needed:
        raise ValueError(f"state has dtype {state.sums.dtype}; these tokens need {needed}: see init_state(dtype=...)")
    if state.sums.device != key.device:
        raise ValueError(f"state is on {state.sums.device} but key is on {key.device}; move one to the other")
