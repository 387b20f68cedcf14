"""Stops training before an optimiser step would spread NaN or infinity, and says where it came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(ValueError):
    """A loss or gradient is NaN or infinite."""


def explain(model: nn.Module, loss: Tensor, step: int, rate: float, forward: Callable[[], object]) -> NonFiniteError:
    """The error of a step whose loss or gradients are not finite.

    Args:
        model: With the weights before the step, and the gradients of the step.
        loss: Of the step, a scalar.
        step: Its number, from 0.
        rate: Its learning rate.
        forward: Computes the loss again, to find the layer.

    Returns:
        An error that names step, learning rate and layer.
    """
    what = "gradient" if bool(loss.isfinite()) else "loss"
    where = _parameter(model) or (_layer(model, forward) if what == "loss" else _gradient(model))
    return NonFiniteError(
        f"the {what} is not finite at step {step + 1}, learning rate {rate:.3g}: {where}. "
        "Nothing of this step was applied. A lower learning rate or more warm-up may help"
    )


def _parameter(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"parameter {name} holds {_kinds(parameter)}"
    return None


def _gradient(model: nn.Module) -> str:
    """The layer nearest to the loss: gradients flow from there to all before it."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return f"the gradient of {name} has {_kinds(parameter.grad)}"
    return "in another process, or in a computation that gave another result when it was repeated"


def _layer(model: nn.Module, forward: Callable[[], object]) -> str:
    """The first layer, in the order of computation, whose output is not finite."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(f"first in the output of {name} ({type(module).__name__}), {_kinds(output)}")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "in the loss itself; every layer's output is finite"


def _kinds(x: Tensor) -> str:
    nan, infinite = int(x.isnan().sum()), int(x.isinf().sum())
    return " and ".join(f"{count} {name}" for count, name in ((nan, "NaN"), (infinite, "infinite")) if count)
