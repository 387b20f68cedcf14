"""How a long sequence is cut so that temporaries stay small."""

from __future__ import annotations

from spectraformer.ops.graph import is_exporting


def blocks(length: int, size: int) -> list[slice]:
    """Slices of at most ``size`` tokens that cover ``length``.

    One slice where that suffices, without a bound, and in any exported graph: its length stays symbolic.
    """
    if is_exporting() or length <= size:
        return [slice(None)]
    return [slice(start, start + size) for start in range(0, length, size)]
