"""What is accepted, and what is said about everything else. Shapes and dtypes only: no synchronisation."""

from __future__ import annotations

import math
from difflib import get_close_matches

import torch
from torch import Tensor


def require_integer(name: str, value: object, least: int = 1) -> None:
    """Raises ``ValueError`` unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")


def require_flag(name: str, value: object) -> None:
    """Raises ``ValueError`` unless ``value`` is True or False; a non-empty string is no flag."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; expected True or False; nearest: {bool(value)}")


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``choices``; names the nearest."""
    if value not in choices:
        near = get_close_matches(str(value), choices, n=1, cutoff=0.0)
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}; nearest: {near[0]!r}")


def require_number(name: str, value: object, low: float, high: float, expected: str) -> None:
    """Raises ``ValueError`` unless value is a real number with low < value < high; both may be infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def require_float_dtype(dtype: torch.dtype | None) -> None:
    """Raises ``ValueError`` unless dtype is None or one that parameters can have."""
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not _is_supported(dtype)):
        raise ValueError(f"dtype is {dtype}; expected float16, bfloat16, float32 or float64")


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _is_supported(dtype: torch.dtype) -> bool:
    return dtype in DTYPES


def describe(x: object) -> str:
    """How an error message shows an argument: its shape and dtype if it is a tensor."""
    if isinstance(x, Tensor):
        return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
    return f"{type(x).__name__} {x!r}"


def _is_usual(x: object, y: object) -> bool:
    """Whether both are what attention is nearly always given, so that there is nothing to look for one by one."""
    return (
        isinstance(x, Tensor)
        and isinstance(y, Tensor)
        and not (x.is_nested or y.is_nested)
        and x.layout == y.layout == torch.strided
        and x.dtype in DTYPES
        and x.dtype == y.dtype
        and x.device == y.device
        and x.ndim == 4
        and 0 not in x.shape
        and x.shape == y.shape
    )


def check_tokens(name: str, x: object, head_dim: int | None = None) -> None:
    """Raises ``ValueError`` unless x is a dense floating (batch, heads, tokens, dim) tensor."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is {describe(x)}; expected a tensor (batch, heads, tokens, dim)")
    if x.is_nested or x.layout != torch.strided:
        raise ValueError(f"{name} is a nested or sparse tensor; expected a dense one: pad it and pass key_padding_mask")
    if x.ndim != 4:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected 4 dimensions (batch, heads, tokens, dim)")
    if not _is_supported(x.dtype):
        raise ValueError(f"{name} has dtype {x.dtype}; expected float16, bfloat16, float32 or float64")
    for what, size in (("heads", x.shape[1]), ("value dim" if name == "value" else "head dim", x.shape[3])):
        if size == 0:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: 0 {what}; expected at least 1")
    if head_dim is not None and x.shape[-1] != head_dim:
        raise ValueError(f"{name} has head dim {x.shape[-1]}, but the feature map was made for head_dim={head_dim}")


def check_same(reference: str, x: Tensor, name: str, y: Tensor) -> None:
    """Raises ``ValueError`` unless x and y agree in dtype and device."""
    if x.dtype != y.dtype:
        raise ValueError(f"{name} has dtype {y.dtype} but {reference} has {x.dtype}; cast one to the other")
    if x.device != y.device:
        raise ValueError(f"{name} is on {y.device} but {reference} is on {x.device}; move one to the other")


def check_query_key(q: Tensor, k: Tensor, head_dim: int | None, enable_gqa: bool) -> None:
    """Raises ``ValueError`` unless queries and keys fit each other and the head dim."""
    if _is_usual(q, k) and (head_dim is None or q.shape[3] == head_dim):
        return
    check_tokens("query", q, head_dim)
    check_tokens("key", k, head_dim)
    check_same("query", q, "key", k)
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"query has head dim {q.shape[-1]} but key has {k.shape[-1]}; expected equal head dims")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"query has batch size {q.shape[0]} but key has {k.shape[0]}; expected equal batches")
    hq, hk = q.shape[1], k.shape[1]
    if hq == hk:
        return
    if not enable_gqa:
        raise ValueError(
            f"query has {hq} heads but key has {hk}; expected equal numbers, or enable_gqa=True for grouped queries"
        )
    if hq % hk:
        raise ValueError(f"query has {hq} heads, which is not a multiple of the key's {hk}")


def check_value(k: Tensor, v: Tensor) -> None:
    """Raises ``ValueError`` unless values fit the keys."""
    if _is_usual(k, v):
        return
    check_tokens("value", v)
    check_same("key", k, "value", v)
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"value has (batch, heads, tokens) {tuple(v.shape[:3])} but key has {tuple(k.shape[:3])}; "
            "expected them equal"
        )


def check_padding_mask(name: str, mask: Tensor | None, tokens: Tensor) -> None:
    """Raises ``ValueError`` unless mask is None or bool (batch, tokens)."""
    if mask is None:
        return
    expected = (tokens.shape[0], tokens.shape[2])
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ValueError(
            f"{name} is {describe(mask)}; expected a bool tensor {expected}, True for real tokens and False for padding"
        )
    if mask.shape != expected:
        hint = "; linear attention cannot apply a mask of queries x keys" if mask.ndim > 2 else ""
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; expected (batch, tokens) = {expected}{hint}")
    if mask.device != tokens.device:
        raise ValueError(f"{name} is on {mask.device} but the tokens are on {tokens.device}; move one to the other")


def check_causal(q: Tensor, k: Tensor) -> None:
    """Raises ``ValueError`` unless there is one query for each key."""
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"causal attention got {q.shape[2]} queries and {k.shape[2]} keys; expected one query for each key "
            "(to decode with earlier keys, pass their state to attention_step)"
        )


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """The attention scale, 1 / sqrt(head_dim) unless given.

    Raises:
        ValueError: If it is not a positive finite number.
    """
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    require_number(
        "scale", scale, 0.0, math.inf, "a positive finite number: its square root goes to queries and keys alike"
    )
    return float(scale)


def check_dropout(p: float) -> None:
    """Raises ``ValueError`` unless p is a probability below 1."""
    require_number("dropout", p, -math.ulp(0.0), 1.0, "a probability in [0, 1)")
