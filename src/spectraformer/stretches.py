"""The encoder without its attentions: stretches of plain layers, which torch.compile can fuse.

They are the same for every attention, so that a process compiles them once for each shape. Legend: b documents,
l tokens, w width, h heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from spectraformer.model import Encoder, Layer

Merge: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
# Variants of one stretch in a process: layouts of what attentions return, shapes of tasks.
VARIANTS = 1024


class _Embed(torch.autograd.Function):
    """Rows of a small table; their gradients are added up by a product with one-hot tokens, without sorting."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, tokens: Tensor) -> Tensor:  # (v, w), (b, l) -> (b, l, w)
        ctx.save_for_backward(tokens)
        ctx.size = table.shape[0]
        # As autocast does for the gradient of any other weight.
        kind = tokens.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else table.dtype
        return table[tokens.int()]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient of the table, (v, w)."""
        (tokens,) = ctx.saved_tensors
        values = torch.arange(ctx.size, device=tokens.device, dtype=tokens.dtype)
        one_hot = (tokens.reshape(1, -1) == values[:, None]).to(ctx.dtype)
        return (one_hot @ gradient.flatten(0, -2).to(ctx.dtype)).to(gradient.dtype), None


class _Split(torch.autograd.Function):
    """Query, key and value of every head as views of their common projection."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, num_heads: int, merge: Merge) -> tuple[Tensor, ...]:
        ctx.merge = merge
        q, k, v = torch.unflatten(projected, -1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the projection, (b, l, 3 w)."""
        return ctx.merge(*gradients), None, None


def split_heads(
    projected: Tensor,  # (b, l, 3 w)
    num_heads: int,
    merge: Merge,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as views, (b, h, l, w / h) each; ``merge`` puts their gradients together again."""
    q, k, v = _Split.apply(projected, num_heads, merge)  # type: ignore[no-untyped-call]
    return q, k, v


def hashed_dropout(x: Tensor, p: float) -> Tensor:
    """Dropout whose mask is a hash of two drawn numbers and an element's place.

    Compiled it costs a fifth of the instructions of torch's generator, and is computed again in backward, not stored.

    Args:
        x: Anything of fewer than 2^32 elements.
        p: Probability of 0, in [0, 1).

    References:
        The hash is lowbias32 of C. Wellons, "Prospecting for hash functions" (2018).
    """
    seeds = torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int64, device=x.device).int()
    h = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    h = (h + seeds[0]) * (seeds[1] | 1)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
        h = (h ^ ((h >> shift) & (2 ** (32 - shift) - 1))) * factor
    return torch.where(h >= round(p * 2**32) - 2**31, x / (1 - p), 0.0).to(x.dtype)


class Dropout(nn.Dropout):
    """torch's dropout, and :func:`hashed_dropout` where it is compiled."""

    def forward(self, x: Tensor) -> Tensor:
        """Some elements 0, the others scaled up, in training."""
        if self.training and self.p and torch.compiler.is_compiling():
            return hashed_dropout(x, self.p)
        return super().forward(x)


def _enter(encoder: Encoder, first: Layer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """From tokens to the first attention."""
    if torch.compiler.is_compiling():
        embedded: Tensor = _Embed.apply(encoder.tokens.weight, tokens)  # type: ignore[no-untyped-call]
    else:
        embedded = encoder.tokens(tokens.int())
    x = encoder.dropout(embedded + encoder.positions.weight[: tokens.shape[1]])
    return x, first.begin(x)


def _between(layer: Layer, following: Layer, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    """From one attention to the next."""
    x = layer.end(x, attended)
    return x, following.begin(x)


def _leave(encoder: Encoder, last: Layer, x: Tensor, attended: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
    """From the last attention to one vector a document."""
    x = last.end(x, attended)
    norm, kept = encoder.norm, real[..., None]
    plain = functional.layer_norm(x, norm.normalized_shape, eps=norm.eps).float()
    # Weight and bias are the same for all tokens: after the sum they cost nothing, nor do their gradients.
    total: Tensor = (plain * kept).sum(1) * norm.weight + kept.sum(1) * norm.bias
    count = lengths[:, None] if encoder.protocol == "strict" else encoder.max_length
    return total / count


def _merge(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (b, h, l, w / h) each -> (b, l, 3 w)
    """Gradients of query, key and value side by side."""
    return torch.stack((q, k, v), dim=1).permute(0, 3, 1, 2, 4).flatten(2)


class Stretches(NamedTuple):
    """An encoder without its attentions: what lies before, between and after them, and the way back out of them.

    Every activation that one stretch hands on is used by one other: compiled, no gradients are added up outside. None
    is a view: compiled, it would be taken apart outside.
    """

    enter: Callable[[Encoder, Layer, Tensor], tuple[Tensor, Tensor]]
    between: Callable[[Layer, Layer, Tensor, Tensor], tuple[Tensor, Tensor]]
    leave: Callable[[Encoder, Layer, Tensor, Tensor, Tensor, Tensor], Tensor]
    merge: Merge


PLAIN = Stretches(_enter, _between, _leave, _merge)


@cache
def compiled() -> Stretches:
    """The stretches by torch.compile, once a process: they are the same for every attention."""
    return Stretches(
        torch.compile(_enter, dynamic=False),
        torch.compile(_between, dynamic=False),
        torch.compile(_leave, dynamic=False),
        torch.compile(_merge, dynamic=False),
    )


def compile_stretches(encoder: Encoder, rehearse: Callable[[], None]) -> str | None:
    """Compiles all of an encoder but its attentions, for training.

    Args:
        encoder: Whose ``stretches`` are set.
        rehearse: Goes through a step of training, in which they are compiled.

    Returns:
        Why it could not be done; None if it was.
    """
    import torch._dynamo

    encoder.stretches = compiled()
    try:
        # Beyond a limit a stretch would silently run as it is, with another dropout.
        with torch._dynamo.config.patch(recompile_limit=VARIANTS, accumulated_recompile_limit=VARIANTS):
            rehearse()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        encoder.stretches = PLAIN
        rehearse()  # what was not the compiler's fault comes again
        return str(error).splitlines()[0]
    return None
