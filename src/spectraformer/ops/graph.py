"""What torch is doing with a call besides computing it."""

from __future__ import annotations

import torch

# torch 2.6 cannot tell export from compilation; there both count as export.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def is_recomputing() -> bool:
    """Whether this call runs inside backward: activation checkpointing repeats a forward pass there.

    A repeated pass must see what the first one saw, and count for nothing.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
