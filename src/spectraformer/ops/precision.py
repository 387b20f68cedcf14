"""Log-features are computed in full precision, whatever the caller's autocast or tf32 settings are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of logits and sums: float32, or float64 if any operand is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disables autocast and, on CUDA in eager mode, tf32 products inside the block.

    An error delta in a log-feature is a relative error delta in the feature, and logits reach 60: ten bits of
    mantissa (tf32) would be an error of several per cent.
    """
    compiling = torch.compiler.is_compiling()
    precise = device.type != "cuda" or compiling or torch.get_float32_matmul_precision() == "highest"
    if precise and not compiling and not torch.is_autocast_enabled(device.type):
        yield  # the common case, in a tenth of the time
        return
    with torch.autocast(device_type=device.type, enabled=False):
        if precise:
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
