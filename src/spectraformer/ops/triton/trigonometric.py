# mypy: disable-error-code="no-untyped-call,no-any-return"
"""Attention with trigonometric features on a GPU: fused Triton kernels, forward and backward, that keep no features.

Keys are read once and queries once, by strides; every sum is taken in an order that depends on shapes alone, so
results are the same bits at every run. Triton is imported at the first call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectraformer.ops import triton as kernels
from spectraformer.ops.graph import differentiable_once, is_plain

# Beyond it sums of cosines and of sines leave no room in registers.
MAX_HEAD_DIM = 128


def refusals(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """Why the kernels cannot take these tensors; empty if they can."""
    reasons = kernels.refusals(query, key, value)
    d, e = key.shape[-1], value.shape[-1]
    if max(d, e) > MAX_HEAD_DIM:
        reasons.append(f"head dim {d} or value dim {e} is above {MAX_HEAD_DIM}, too wide for trigonometric features")
    return reasons


def trigonometric_attention(
    query: Tensor,  # (b, h * g, n, d)
    key: Tensor,  # (b, h, s, d)
    value: Tensor,  # (b, h, s, e)
    rows: Tensor,  # (b | 1, h | 1, m, d)
    rule_weight: Tensor,  # (b | 1, h | 1, m)
    key_bias: Tensor | None = None,  # (b | 1, h | 1, s), -inf removes a key
    key_factor: float = 0.0,
    precision: str = "tf32x3",
) -> tuple[Tensor, Tensor]:  # (b, h * g, n, e), (b, h * g, n)
    r"""Attention of queries to keys with the weights :math:`e^{t_n + C|k_n|^2} \sum_i a_i \cos w_i\cdot(q - k_n)`.

    .. math:: \mathrm{out} = \frac{\psi(q)^\top \sum_n p_n A\,\psi(k_n)\,v_n^\top}
        {\psi(q)^\top \sum_n p_n A\,\psi(k_n)}, \qquad \psi(x) = [\cos W x,\ \sin W x],\quad p_n = e^{t_n + C|k_n|^2}

    with A the weights of the rule, whose scale cancels. Sums of signed terms cancel, so features, phases and sums are
    good to 1e-5 or better whatever the dtype. A denominator below 1e-6 of the sum of its absolute terms is moved
    there, keeping its sign, and reported.

    Args:
        query: Queries, bfloat16, float16 or float32; g query heads share a key head. Any strides but the last: 1.
        key: Keys, same dtype.
        value: Values, same dtype.
        rows: w_i in radians per unit of the tokens as given, float32.
        rule_weight: a_i, any sign, float32, at most about 1.
        key_bias: t_n, float32, or None for 0. Where it is -inf nothing of the key is read.
        key_factor: C.
        precision: Of products of float32 inputs: one of PRECISIONS.

    Returns:
        Output, dense, in the dtype of the values, 0 where no key is left, differentiable once in every tensor; and
        which denominators were guarded, bool.

    Raises:
        ValueError: If the precision is unknown.

    References:
        Rahimi and Recht, Random Features for Large-Scale Kernel Machines, NeurIPS 2007.
        Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794.
    """
    if precision not in kernels.PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {kernels.PRECISIONS}")
    autocast = kernels.autocast_dtype(query.device)
    if autocast is not None:
        query, key, value = (x.to(autocast) for x in (query, key, value))
    operands = [kernels.with_unit_stride(x) for x in (query, key, value, rows.float(), rule_weight.float())]
    bias = None if key_bias is None else kernels.with_unit_stride(key_bias.float())
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*operands, bias)):
        out, unsafe = _TrigonometricAttention.apply(*operands, bias, key_factor, precision)
    else:
        run = _forward if is_plain(*operands, bias) else torch.ops.spectraformer.trigonometric_attention
        found = run(*operands, bias, key_factor, False, precision)
        out, unsafe = found[:2]
    return out, unsafe.view(torch.bool).reshape(query.shape[:3])


OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor rows, Tensor rule_weight, Tensor? key_bias"
LIBRARY = torch.library.Library("spectraformer", "FRAGMENT")
LIBRARY.define(
    f"trigonometric_attention({OPERANDS}, float key_factor, bool needs_backward, str precision) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"trigonometric_attention_backward(Tensor grad, {OPERANDS}, Tensor out, Tensor unsafe, Tensor state_value, "
    "Tensor state_sums, Tensor log_total, Tensor divisor, float key_factor, bool wants_rows, bool wants_rule_weight, "
    "bool wants_key_bias, str precision) -> Tensor[]"
)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    from spectraformer.ops.triton.launch import planned

    return tuple(planned(_plan_forward, arguments[:6], arguments[6:]))


def _plan_forward(operands: Any, key_factor: float, needs_backward: bool, precision: str) -> Any:
    from spectraformer.ops.triton.trigonometric_plan import plan_forward

    return plan_forward(*operands, key_factor=key_factor, needs_backward=needs_backward, precision=precision)


def _forward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    from spectraformer.ops.triton.trigonometric_plan import configuration

    query, key, value, rows, *_, needs_backward, _ = arguments
    (b, h), e, m = key.shape[:2], value.shape[-1], rows.shape[-2]
    block = configuration("keys", key.dtype, max(key.shape[-1], e), m).landmarks
    padded = -(-m // block) * block
    floats = {"dtype": torch.float32}
    return (
        query.new_empty(*query.shape[:3], e),
        query.new_empty(b * query.shape[1], query.shape[2], dtype=torch.uint8),
        query.new_empty(b * h, 2, padded, e, **floats),
        query.new_empty(b * h, 3, 2, padded, **floats),
        query.new_empty(b * h, **floats),
        query.new_empty(b * query.shape[1], query.shape[2], **floats)
        if needs_backward
        else query.new_empty(0, **floats),
    )


def _backward(*arguments: Any) -> list[Tensor]:
    """Gradients of query, key and value, then of rows, weights of the rule and key bias where wanted."""
    from spectraformer.ops.triton.launch import planned

    operands, (key_factor, wants_rows, wants_rule_weight, wants_key_bias, precision) = arguments[:13], arguments[13:]
    query, key, value, query_rows, key_rows, rule_weight, key_bias = planned(
        _plan_backward, operands, (key_factor, wants_rows, wants_key_bias, precision)
    )
    results = [query, key, value]
    m = operands[4].shape[-2]
    if wants_rows:
        total = query_rows[..., :m, :].sum(2) + key_rows[..., :m, :].sum(2)
        results.append(_summed(total, operands[4]))
    if wants_rule_weight:
        results.append(_summed(rule_weight.sum(2), operands[5]))
    if wants_key_bias:
        results.append(_summed(key_bias, operands[6]))
    return results


def _summed(x: Tensor, like: Tensor) -> Tensor:
    """Gradients of what is shared by batch items or heads."""
    dimensions = [i for i in range(2) if like.shape[i] == 1 and x.shape[i] > 1]
    return x.sum(dimensions, keepdim=True) if dimensions else x


def _plan_backward(operands: Any, key_factor: float, wants_rows: bool, wants_key_bias: bool, precision: str) -> Any:
    from spectraformer.ops.triton.trigonometric_plan import plan_backward

    return plan_backward(
        *operands, key_factor=key_factor, wants_rows=wants_rows, wants_key_bias=wants_key_bias, precision=precision
    )


def _backward_shapes(*arguments: Any) -> list[Tensor]:
    operands, wanted = arguments[1:7], arguments[14:17]
    others = [x for x, w in zip(operands[3:], wanted, strict=True) if w]
    return [
        *[x.new_empty(x.shape) for x in operands[:3]],
        *[x.new_empty(x.shape, dtype=torch.float32) for x in others],
    ]


for _name, _run, _shapes in (
    ("trigonometric_attention", _forward, _forward_shapes),
    ("trigonometric_attention_backward", _backward, _backward_shapes),
):
    LIBRARY.impl(_name, _run, "CUDA")
    LIBRARY.impl(_name, _run, "CPU")
    torch.library.register_fake(f"spectraformer::{_name}", _shapes, lib=LIBRARY)


class _TrigonometricAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *operands, key_factor, precision = arguments
        run = _forward if is_plain(*operands) else torch.ops.spectraformer.trigonometric_attention
        results = run(*operands, key_factor, True, precision)
        ctx.save_for_backward(*operands, *results)
        ctx.settings = key_factor, precision
        ctx.mark_non_differentiable(results[1])
        return results[0], results[1]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        needs, saved = ctx.needs_input_grad, ctx.saved_tensors
        wanted = [*needs[3:5], needs[5] and saved[5] is not None]
        tensors = (kernels.with_unit_stride(grad), *saved)
        run = _backward if is_plain(*tensors) else torch.ops.spectraformer.trigonometric_attention_backward
        found = run(*tensors, ctx.settings[0], *wanted, ctx.settings[1])
        others = iter(found[3:])
        return (*found[:3], *(next(others) if need else None for need in wanted), None, None)
