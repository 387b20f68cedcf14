# mypy: disable-error-code="no-untyped-call,no-any-return"
r"""Causal landmark attention on a GPU: by stretches of many tiles with the state on chip, or by chunks side by side.

What holds for any finite input:

- The output of a query depends on its own past alone: changing later tokens changes no bit of it, except where a later
  token of the same chunk, or of the same tile of a stretch, makes it one of those computed another way (in a chunk, a
  key whose logit rises by 62 in natural units above the past); then earlier outputs of it keep their value up to
  rounding.
- Nothing underflows or overflows with values up to 2^20, however norms grow along the sequence: features are relative
  to the past, and what leaves the range of that reference is computed again (see ``causal_tiles.SUDDEN`` and
  ``causal_stretches.LEAST_MASS``).
- Every sum is taken in an order that depends on shapes alone: the same bits at every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectraformer.ops.graph import differentiable_once, is_plain, told_apart
from spectraformer.ops.streaming import AttentionState, empty_state
from spectraformer.ops.triton import LIBRARY, OPERANDS, PRECISIONS, autocast_dtype, launching, with_unit_stride
from spectraformer.ops.triton import refusals as refusals_of_any

# Of the operands of the kernels, and how many there are with them.
STATE = "Tensor? log_scale, Tensor? sums"
INPUTS = 11
# Of float32 heads; above it next to nothing would be in registers.
MAX_DIM_32 = 128


def refusals(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """Why causal attention of a feature map does not take the kernels; empty if it does."""
    reasons = refusals_of_any(query, key, value)
    dtype = autocast_dtype(query.device) or key.dtype
    widest = max(key.shape[-1], value.shape[-1])
    if dtype == torch.float32 and widest > MAX_DIM_32:
        reasons.append(f"head dim or value dim {widest} is above {MAX_DIM_32}: in float32 tiles do not fit registers")
    return reasons


def causal_landmark_attention(
    query: Tensor,  # (b, h * g, n, d)
    key: Tensor,  # (b, h, n, d)
    value: Tensor,  # (b, h, n, e)
    query_landmarks: Tensor,  # (b | 1, h | 1, m, d)
    key_landmarks: Tensor,  # (b | 1, h | 1, m, d)
    landmark_bias: Tensor,  # (b | 1, h | 1, m)
    key_bias: Tensor | None = None,  # (b | 1, h | 1, n), -inf removes a key
    key_quadratic: Tensor | None = None,  # (b | 1, h | 1, d)
    state: AttentionState | None = None,
    precision: str = "tf32x3",
    boundaries: Tensor | None = None,
) -> tuple[Tensor, AttentionState]:  # (b, h * g, n, e)
    r"""Query t attends to the state and to keys 0..t through landmarks, see :mod:`spectraformer.ops`.

    The logit of key n at landmark i is :math:`w_i\cdot k_n + t_n + \sum_c C_c k_{nc}^2`. Logits, exponentials, sums and
    the state are float32; products take operands in bfloat16 for inputs of 16 bits.

    Args:
        query: Queries, bfloat16, float16 or float32; g query heads share a key head. Any strides but the last: 1.
        key: Keys, same dtype.
        value: Values, same dtype.
        query_landmarks: Rows u_i that queries see, float32.
        key_landmarks: Rows w_i that keys see, float32.
        landmark_bias: a_i, float32; on the side of the queries, so the state does not hold it.
        key_bias: t_n, float32, or None for 0.
        key_quadratic: C_c, float32, or None for 0.
        state: What earlier calls returned, of this or of any other backend; None before the first key.
        precision: Of products of float32 inputs: one of PRECISIONS.
        boundaries: Of packed sequences, whose tokens are one batch item, as all operands are: sequence i is the tokens
            from entry i up to entry i + 1, (sequences + 1,), int32 or int64. They are read on the device. None leads
            outside of the tokens, but output and gradients of tokens in no sequence are undefined.

    Returns:
        Output, dense, in the dtype of the values, 0 for queries without any key; and the state after the last key (of
        packed sequences, of each: b of a state is their number), relative to running maxima or log-sum-exps in natural
        units. Both differentiable once in every operand and in the sums of the state; what they are relative to carries
        no gradient.

    Raises:
        ValueError: If the precision is unknown, the state is that of signed features or of other shapes, or operands
            of packed sequences are more than one batch item.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {PRECISIONS}")
    items = key.shape[0]
    if boundaries is not None:
        items = len(boundaries) - 1
        given = (query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic)
        shapes = [tuple(x.shape) for x in given if x is not None and x.shape[0] != 1]
        if shapes:
            raise ValueError(f"operands of packed sequences have shapes {shapes}; expected one batch item")
        boundaries = boundaries.contiguous()
    _check_state((items, key.shape[1], query_landmarks.shape[-2], value.shape[-1]), state)
    autocast = autocast_dtype(query.device)
    if autocast is not None:
        query, key, value = (x.to(autocast) for x in (query, key, value))
    if key.shape[0] == 0 or key.shape[2] == 0:
        m, e = query_landmarks.shape[-2], value.shape[-1]
        after = state or empty_state(items, key.shape[1], m, e, device=key.device, dtype=torch.float32)
        return value.new_zeros(*query.shape[:3], value.shape[-1]), after
    log_scale, sums = (None, None) if state is None else state[:2]
    floats = (query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic, log_scale, sums)
    operands = (
        *(with_unit_stride(x) for x in (query, key, value)),
        *(None if x is None else with_unit_stride(x.float()) for x in floats),
        boundaries,
    )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands):
        out, log_scale, sums = _CausalLandmarkAttention.apply(*told_apart(operands), precision)
        return out, AttentionState(log_scale, sums)
    plain = is_plain(*operands)
    if key.shape[2] == 1 and boundaries is None:
        step = _step if plain else torch.ops.spectraformer.landmark_attention_step
        out, log_scale, sums = step(*operands[:-1])
    elif plain:
        out, log_scale, sums = launching().planned(_plan_outputs, operands, (precision,))
    else:
        out, log_scale, sums, *_ = torch.ops.spectraformer.causal_landmark_attention(*operands, False, precision)
    return out, AttentionState(log_scale, sums)


def decode_step(
    query: Tensor,  # (b, h * g, 1, d)
    key: Tensor,  # (b, h, 1, d)
    value: Tensor,  # (b, h, 1, e)
    query_landmarks: Tensor,  # (b | 1, h | 1, m, d)
    key_landmarks: Tensor,  # (b | 1, h | 1, m, d)
    landmark_bias: Tensor,  # (b | 1, h | 1, m)
    key_bias: Tensor | None = None,  # (b | 1, h | 1, 1)
    key_quadratic: Tensor | None = None,  # (b | 1, h | 1, d)
    state: AttentionState | None = None,
) -> tuple[Tensor, AttentionState]:  # (b, h * g, 1, e)
    """One token of :func:`causal_landmark_attention` in one kernel that reads and writes the state once.

    Returns:
        Output, and the state after the token. Without gradients.

    Raises:
        ValueError: If there is not exactly one token, or the state is that of signed features or of other shapes.
    """
    if key.shape[2] != 1:
        raise ValueError(f"decode_step got {key.shape[2]} tokens; expected 1: use causal_landmark_attention for more")
    with torch.no_grad():
        return causal_landmark_attention(
            query, key, value, query_landmarks, key_landmarks, landmark_bias, key_bias, key_quadratic, state
        )


def _check_state(sizes: tuple[int, int, int, int], state: AttentionState | None) -> None:
    if state is None:
        return
    if state.magnitude is not None:
        raise ValueError("state is that of signed features (it has magnitudes); expected one of positive features")
    *lead, e = sizes
    for name, x, expected in (("log_scale", state.log_scale, (*lead,)), ("sums", state.sums, (*lead, e + 1))):
        if tuple(x.shape) != expected:
            raise ValueError(f"state.{name} has shape {tuple(x.shape)}; expected {expected}")


LIBRARY.define(
    f"causal_landmark_attention({OPERANDS}, {STATE}, Tensor? boundaries, bool needs_backward, str precision) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"causal_landmark_attention_backward(Tensor grad, Tensor? grad_sums, {OPERANDS}, {STATE}, Tensor? boundaries, "
    "Tensor out, Tensor log_scale_after, Tensor query_log_sum, Tensor entering_mean, Tensor log_sum, Tensor first, "
    "Tensor steepest, bool[] wanted, str precision) -> Tensor[]"
)
LIBRARY.define(f"landmark_attention_step({OPERANDS}, {STATE}) -> (Tensor, Tensor, Tensor)")


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(launching().planned(_plan_forward, arguments[:INPUTS], arguments[INPUTS:]))


def _plan_forward(operands: Any, needs_backward: bool, precision: str) -> Any:
    from spectraformer.ops.triton.causal_plan import plan_forward

    return plan_forward(*operands, needs_backward=needs_backward, precision=precision)


def _plan_outputs(operands: Any, precision: str) -> Any:
    """The forward without a backward: all but the output and the state is scratch."""
    launches, results = _plan_forward(operands, False, precision)
    return launches, results[:3]


def _forward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    from spectraformer.ops.triton.causal_plan import by_stretches, cut, kept_states, kept_stretches

    query, key, value, landmarks = arguments[:4]
    boundaries, needs_backward = arguments[INPUTS - 1 : INPUTS + 1]
    (b, h, n, _), e, m = key.shape, value.shape[-1], landmarks.shape[-2]
    stretches = by_stretches(query, key, value, m, boundaries)
    sequences = 1 if boundaries is None else len(boundaries) - 1

    def new(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    if stretches is None:
        kept = kept_states(query, cut(key, value, m, boundaries), b * h, m, e)
    else:
        kept = kept_stretches(query, stretches, b * h, m, e)
    kept = {"query_log_sum": new(b * query.shape[1], n), **kept}
    return (
        query.new_empty(*query.shape[:3], e),
        new(b * sequences, h, m),
        new(b * sequences, h, m, e + 1),
        *[x if needs_backward else x.new_empty(0) for x in kept.values()],
    )


def _backward(*arguments: Any) -> list[Tensor]:
    """Gradients of query, key and value, then of those of the other operands that are given and wanted."""
    *operands, wanted, precision = arguments
    query, key, value, *found = launching().planned(_plan_backward, operands, (*wanted, precision))

    def summed(x: Tensor, like: Tensor) -> Tensor:
        """Summed over pieces, dimension 2, and over what one operand serves."""
        dimensions = [2] + [i for i in range(2) if like.shape[i] == 1 and x.shape[i] > 1]
        return x.sum(dimensions).reshape(like.shape)

    others = zip(found, operands[5:10], wanted, strict=False)
    return [
        query,
        key,
        value,
        *[summed(x, y) for x, y, w in others if w and y is not None],
        *([found[5]] if wanted[5] else []),
    ]


def _plan_backward(operands: Any, *settings: Any) -> Any:
    from spectraformer.ops.triton.causal_backward import Wanted, plan_backward

    *wanted, precision = settings
    return plan_backward(*operands, wanted=Wanted(*wanted), precision=precision)


def _backward_shapes(*arguments: Any) -> list[Tensor]:
    operands, wanted = arguments[2 : 2 + INPUTS], arguments[-2]
    others = [x for x, w in zip((*operands[3:8], operands[9]), wanted, strict=True) if w and x is not None]
    return [
        *[x.new_empty(x.shape) for x in operands[:3]],
        *[x.new_empty(x.shape, dtype=torch.float32) for x in others],
    ]


def _step(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(launching().planned(_plan_step, arguments, ()))


def _plan_step(operands: Any) -> Any:
    from spectraformer.ops.triton.decode import plan_step

    return plan_step(*operands)


def _step_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    return _forward_shapes(*arguments, None, False, "")[:3]


for _name, _run, _shapes in (
    ("causal_landmark_attention", _forward, _forward_shapes),
    ("causal_landmark_attention_backward", _backward, _backward_shapes),
    ("landmark_attention_step", _step, _step_shapes),
):
    LIBRARY.impl(_name, _run, "CUDA")
    LIBRARY.impl(_name, _run, "CPU")
    torch.library.register_fake(f"spectraformer::{_name}", _shapes, lib=LIBRARY)


class _CausalLandmarkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *operands, precision = arguments
        results = torch.ops.spectraformer.causal_landmark_attention(*operands, True, precision)
        out, log_scale, sums, *kept = results
        ctx.save_for_backward(*operands, out, log_scale, *kept)
        ctx.mark_non_differentiable(log_scale)
        ctx.set_materialize_grads(False)
        ctx.precision = precision
        return out, log_scale, sums

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, _: None, grad_sums: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        grad = torch.zeros_like(saved[INPUTS]) if grad is None else with_unit_stride(grad)
        grad_sums = None if grad_sums is None else grad_sums.contiguous()
        wanted = [*needs[3:8], needs[9]]
        found = torch.ops.spectraformer.causal_landmark_attention_backward(
            grad, grad_sums, *saved, wanted, ctx.precision
        )
        others = iter(found[3:])
        of_floats = [next(others) if need else None for need in wanted]
        return (*found[:3], *of_floats[:5], None, of_floats[5], None, None)
