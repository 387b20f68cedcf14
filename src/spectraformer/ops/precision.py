"""Log-features are computed in full precision, whatever the caller's autocast or tf32 settings are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of logits and sums: float32, or float64 if any operand is."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


UNCHANGED = nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Disables autocast and, on CUDA in eager mode, tf32 products inside the block.

    An error delta in a log-feature is a relative error delta in the feature, and logits reach 60: ten bits of
    mantissa (tf32) would be an error of several per cent.
    """
    compiling = torch.compiler.is_compiling()
    kind = device.type
    precise = kind != "cuda" or compiling or torch.get_float32_matmul_precision() == "highest"
    if precise and not compiling and not torch.is_autocast_enabled(kind):
        return UNCHANGED  # the common case, in a tenth of the time
    return _changed_precision(kind, precise)


@contextmanager
def _changed_precision(kind: str, precise: bool) -> Iterator[None]:
    with torch.autocast(device_type=kind, enabled=False):
        if precise:
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
