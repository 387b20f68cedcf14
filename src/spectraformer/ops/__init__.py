r"""Attention on tensors: no modules, no names. This file chooses a backend, or says why each refused.

Attention with positive random features is exactly two softmax attentions chained through m landmarks, the
rows of the weight matrix. With log-features :math:`\log\varphi_i(q) = u_i\cdot q + \tfrac12 a_i + \ldots` and
:math:`\log\varphi_i(k) = w_i\cdot k + \tfrac12 a_i + t(k)`:

.. math::
    O_i = \sum_n \mathrm{softmax}_n(w_i\cdot k_n + t_n)\, v_n, \qquad
    L_i = \log\sum_n e^{w_i\cdot k_n + t_n}, \qquad
    \mathrm{out} = \sum_i \mathrm{softmax}_i(u_i\cdot q + a_i + L_i)\, O_i

Terms of a query alone cancel. No epsilon, no overflow, and the output stays in the convex hull of the values.
"""

from __future__ import annotations

from torch import Tensor

from spectraformer.checks import check_query_key, check_value, require_choice
from spectraformer.ops import cpu, reference
from spectraformer.ops import triton as kernels
from spectraformer.ops.blocks import blocks
from spectraformer.ops.hadamard import hadamard
from spectraformer.ops.precision import compute_dtype, full_precision
from spectraformer.ops.sequences import Sequences
from spectraformer.ops.streaming import (
    AttentionState,
    absorb,
    advance,
    concatenate_flags,
    empty_state,
    flatten_heads,
    merge,
    readout,
    unflatten_heads,
    with_ones,
)
from spectraformer.ops.triton import causal as causal_kernels
from spectraformer.ops.triton import trigonometric as trigonometric_kernels

BACKENDS = ("auto", "triton", "cpu", "torch")

__all__ = [
    "BACKENDS",
    "AttentionState",
    "Sequences",
    "absorb",
    "advance",
    "blocks",
    "causal_landmark_attention",
    "choose_backend",
    "compute_dtype",
    "concatenate_flags",
    "empty_state",
    "flatten_heads",
    "full_precision",
    "hadamard",
    "landmark_attention",
    "merge",
    "readout",
    "run_landmark_attention",
    "unflatten_heads",
    "with_ones",
]


def landmark_attention(
    query: Tensor,  # (b, h * g, n, d)
    key: Tensor,  # (b, h, s, d)
    value: Tensor,  # (b, h, s, e)
    query_landmarks: Tensor,  # (b | 1, h | 1, m, d)
    key_landmarks: Tensor,  # (b | 1, h | 1, m, d)
    landmark_bias: Tensor,  # (b | 1, h | 1, m)
    key_bias: Tensor | None = None,  # (b | 1, h | 1, s)
    backend: str = "auto",
    key_quadratic: Tensor | None = None,  # (b | 1, h | 1, d)
) -> Tensor:  # (b, h * g, n, e)
    """Two softmax attentions chained through landmarks: queries attend to landmarks, landmarks to keys.

    Args:
        query: Queries; g query heads share a key head.
        key: Keys.
        value: Values, any value dim e.
        query_landmarks: Rows u_i that queries see.
        key_landmarks: Rows w_i that keys see.
        landmark_bias: a_i, both sides together.
        key_bias: t_n, any additive log-weight of a key; -inf removes the key, whatever it and its value hold on a
            GPU, finite elsewhere. None is 0.
        backend: "auto", "triton" (fused GPU kernels), "cpu" (torch's fused CPU attention) or "torch" (plain torch).
        key_quadratic: C_c, adds the sum of C_c k_c^2 to a key's log-weight. None is 0.

    Returns:
        Attention output, 0 where every key is removed: in the dtype of value from "triton", else in float32 (float64
        if any operand is).

    Raises:
        ValueError: If shapes do not fit, or the backend is unknown or refuses, with every reason.
    """
    operands = (query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic)
    _check(*operands)
    return run_landmark_attention(choose_backend(backend, query, key, value), *operands)


def run_landmark_attention(
    backend: str,
    query: Tensor,  # (b, h * g, n, d)
    key: Tensor,  # (b, h, s, d)
    value: Tensor,  # (b, h, s, e)
    query_landmarks: Tensor,  # (b | 1, h | 1, m, d)
    key_landmarks: Tensor,  # (b | 1, h | 1, m, d)
    landmark_bias: Tensor,  # (b | 1, h | 1, m)
    key_bias: Tensor | None = None,  # (b | 1, h | 1, s)
    key_quadratic: Tensor | None = None,  # (b | 1, h | 1, d)
    sequences: Sequences | None = None,
) -> Tensor:  # (b, h * g, n, e)
    """As :func:`landmark_attention` by a backend that was chosen, on operands that fit; "triton" takes sequences."""
    b, h, s, d = key.shape
    heads, n = query.shape[1:3]
    if b == 0 or n == 0 or s == 0:
        dtype = value.dtype if backend == "triton" else compute_dtype(query, key, value)
        return value.new_zeros(b, heads, n, value.shape[-1], dtype=dtype)
    if backend == "triton":
        operands = (query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic)
        return kernels.landmark_attention(*operands, sequences=sequences)
    query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias = _prepare(
        query, key, value, query_landmarks, key_landmarks, landmark_bias, _whole_bias(key, key_bias, key_quadratic)
    )
    run = cpu if backend == "cpu" else reference
    # A NaN is a key, and shows. Without any key the bias is made finite and the landmarks' values are made 0.
    no_key = (key_bias == float("-inf")).all(-1, keepdim=True)  # (b, h, 1)
    key_bias = key_bias.masked_fill(no_key, 0.0)
    with full_precision(query.device):
        out: Tensor = run.landmark_attention(
            query.reshape(b, h, heads // h * n, d),
            key,
            value,
            query_landmarks,
            key_landmarks,
            landmark_bias,
            key_bias,
            no_key.unsqueeze(-1),
        )
    return out.reshape(b, heads, n, out.shape[-1])


def causal_landmark_attention(
    query: Tensor,  # (b, h * g, n, d)
    key: Tensor,  # (b, h, n, d)
    value: Tensor,  # (b, h, n, e)
    query_landmarks: Tensor,  # (b | 1, h | 1, m, d)
    key_landmarks: Tensor,  # (b | 1, h | 1, m, d)
    landmark_bias: Tensor,  # (b | 1, h | 1, m)
    key_bias: Tensor | None = None,  # (b | 1, h | 1, n)
    key_quadratic: Tensor | None = None,  # (b | 1, h | 1, d)
    state: AttentionState | None = None,
    backend: str = "torch",
    sequences: Sequences | None = None,
) -> tuple[Tensor, AttentionState]:
    """As :func:`run_landmark_attention`, query t seeing the state and keys 0..t only; linear in n.

    Packed sequences are for the backend "triton"; queries and keys are the same tokens.

    Returns:
        Output, (b, h * g, n, e), and the state after the last key.
    """
    if backend == "triton":
        operands = (query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic)
        boundaries = None if sequences is None else sequences.key
        return causal_kernels.causal_landmark_attention(*operands, state, boundaries=boundaries)
    b, h, n, d = key.shape
    query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias = _prepare(
        query, key, value, query_landmarks, key_landmarks, landmark_bias, _whole_bias(key, key_bias, key_quadratic)
    )
    if state is None:
        m, e = query_landmarks.shape[-2], value.shape[-1]
        state = empty_state(b, h, m, e, device=value.device, dtype=value.dtype)
    if b == 0 or n == 0:
        return value.new_zeros(*query.shape[:3], value.shape[-1]), state
    with full_precision(query.device):
        out, state = reference.causal_landmark_attention(
            query.reshape(b, h, query.shape[1] // h, n, d),
            key,
            value,
            query_landmarks,
            key_landmarks,
            landmark_bias,
            key_bias,
            state,
        )
    return out.flatten(1, 2), state


def _whole_bias(key: Tensor, bias: Tensor | None, quadratic: Tensor | None) -> Tensor:
    """What both say of a key's log-weight, (b | 1, h | 1, s)."""
    if quadratic is None:
        return key.new_zeros(1, 1, key.shape[2]) if bias is None else bias
    squares = (key.to(compute_dtype(key)).square() * quadratic.unsqueeze(-2)).sum(-1)
    return squares if bias is None else squares + bias


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_landmarks: Tensor,
    key_landmarks: Tensor,
    landmark_bias: Tensor,
    key_bias: Tensor,
) -> tuple[Tensor, ...]:
    """One dtype for all, and landmarks expanded to every batch item and head (a view, no copy)."""
    b, h = key.shape[:2]
    dtype = compute_dtype(query, key, value)
    m, d = query_landmarks.shape[-2:]
    return (
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        query_landmarks.to(dtype).expand(b, h, m, d),
        key_landmarks.to(dtype).expand(b, h, m, d),
        landmark_bias.to(dtype).expand(b, h, m),
        key_bias.to(dtype).expand(b, h, key.shape[2]),
    )


def choose_backend(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    positive: bool = True,
    trigonometric: bool = False,
    is_causal: bool = False,
) -> str:
    """The backend that will run: "triton", "cpu" or "torch".

    Args:
        backend: What is asked for; "auto" takes the fastest that accepts.
        query: Queries.
        key: Keys.
        value: Values.
        positive: Whether features are positive.
        trigonometric: Whether they are cosines and sines, which have kernels of their own on a GPU.
        is_causal: Whether attention is causal.

    Raises:
        ValueError: If the name is unknown, or a backend named explicitly cannot run; with every reason.
    """
    require_choice("backend", backend, BACKENDS)
    if backend == "torch":
        return "torch"
    asked = ("triton", "cpu") if backend == "auto" else (backend,)
    reasons: list[str] = []
    for name in asked:
        waves = trigonometric and name == "triton"
        if name == "cpu":
            reasons = cpu.refusals(query, key, value)
        elif waves:
            reasons = trigonometric_kernels.refusals(query, key, value)
        elif is_causal:
            reasons = causal_kernels.refusals(query, key, value)
        else:
            reasons = kernels.refusals(query, key, value)
        if not positive and not waves:
            reasons.append("signed features are not a softmax over landmarks")
        if is_causal and (waves or name == "cpu"):
            reasons.append(f"causal attention with these features has no form in backend {name!r}")
        if not reasons:
            return name
    if backend == "auto":
        return "torch"
    raise ValueError(f"backend {backend!r} cannot run here: " + "; ".join(reasons) + "; use backend='auto' or 'torch'")


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_landmarks: Tensor,
    key_landmarks: Tensor,
    landmark_bias: Tensor,
    key_bias: Tensor | None,
    key_quadratic: Tensor | None,
) -> None:
    check_query_key(query, key, None, enable_gqa=True)
    check_value(key, value)
    b, h, s, d = key.shape
    m = query_landmarks.shape[-2] if query_landmarks.ndim == 4 else 0
    for name, x, expected in (
        ("query_landmarks", query_landmarks, (b, h, m, d)),
        ("key_landmarks", key_landmarks, (b, h, m, d)),
        ("landmark_bias", landmark_bias, (b, h, m)),
        ("key_bias", key_bias, (b, h, s)),
        ("key_quadratic", key_quadratic, (b, h, d)),
    ):
        if x is None:
            continue
        fits = len(expected) == x.ndim and all(
            n == e or (n == 1 and i < 2) for i, (n, e) in enumerate(zip(x.shape, expected, strict=False))
        )
        if not fits or not m:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected {expected}, where batch and heads may be 1 for all"
            )
