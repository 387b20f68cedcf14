"""What torch is doing with a call besides computing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def is_exporting() -> bool:
    """Whether a graph is traced to be taken elsewhere, not to be compiled for here."""
    # Compilers before torch 2.13 take torch.compiler.is_exporting() for true, but read what it returns as it is.
    # torch 2.6 cannot tell export from compilation; there both count as export.
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_compiling() if flag is None else flag


def is_recomputing() -> bool:
    """Whether this call runs inside backward: activation checkpointing repeats a forward pass there.

    A repeated pass must see what the first one saw, and count for nothing.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether operations on these tensors just run: nothing compiles, traces, transforms, or intercepts them.

    Only then may a call leave torch's dispatcher out, or keep what it computed for the next.
    """
    if torch.compiler.is_compiling():
        return False
    for x in tensors:
        if x is not None and type(x) is not Tensor and type(x) is not torch.nn.Parameter:
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def told_apart(operands: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Operands as an autograd function may take them.

    The compiler takes no tensor twice, and both sides may see the same landmarks.
    """
    if not torch.compiler.is_compiling():
        return operands
    return [None if x is None else x.view_as(x) for x in operands]


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of an autograd function whose results say that they have no second derivative, if one is asked for.

    torch's own decorator says nothing where the gradient that comes in needs none, as that of a sum, and a penalty on
    gradients would be taken for a constant.
    """
    refusing = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        if torch.compiler.is_compiling():
            return refusing(ctx, *gradients)
        return refusing(ctx, *(None if x is None else _recorded(x) for x in gradients))

    return run


def _recorded(x: Tensor) -> Tensor:
    return x if x.requires_grad or not x.is_floating_point() else x.detach().requires_grad_()
