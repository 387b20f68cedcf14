r"""Sequences of different lengths, laid end to end: attention within each, and nothing between them.

Legend: b sequences, t and s tokens of all sequences together, h key heads, g query heads per key head, d head dim,
e value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectraformer import ops
from spectraformer.attention import check_map, drop_values, random_feature_attention
from spectraformer.checks import check_dropout, check_query_key, check_value, require_integer
from spectraformer.components import Exponential
from spectraformer.features import FeatureMap
from spectraformer.ops.rows import select_rows
from spectraformer.ops.triton import heads_first
from spectraformer.ops.triton.moments import refusals as moments_refusals


def packed_random_feature_attention(
    query: Tensor,  # (t, h * g, d)
    key: Tensor,  # (s, h, d)
    value: Tensor,  # (s, h, e)
    feature_map: FeatureMap,
    cu_seqlens: Tensor,  # (b + 1,)
    max_seqlen: int,
    *,
    cu_seqlens_key: Tensor | None = None,  # (b + 1,)
    max_seqlen_key: int | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> Tensor:  # (t, h * g, e)
    """:func:`spectraformer.random_feature_attention` of every sequence of a packed batch on its own.

    Sequence i is the tokens from ``cu_seqlens[i]`` up to ``cu_seqlens[i + 1]``, as in the packed form of other
    attentions. The fused kernels of positive features read packed tokens as they are. All others, and features that
    translate tokens or map them by a fitted matrix, take sequences side by side with padding, which is exact: time and
    memory are those of b sequences of the longest. Nothing waits for a GPU, and a captured graph may be replayed with
    other boundaries.

    Args:
        query: Queries of all sequences, one after another.
        key: Keys, likewise.
        value: Values, likewise.
        feature_map: phi. Parameters that depend on data are fitted to each sequence.
        cu_seqlens: Where sequences of queries begin and the last ends: 0, ..., t, ascending, int32 or int64. What it
            holds is checked on the CPU only: a look at it would have to wait for a GPU. There, output and gradients of
            tokens in no sequence are undefined: give tokens to spare a sequence of their own.
        max_seqlen: Length of the longest of them, or more; with less, which a GPU does not see, output and gradients of
            sequences that are longer are undefined.
        cu_seqlens_key: The same of keys; None where queries and keys are the same tokens. Causal attention takes
            padding where it is given, even if it says the same.
        max_seqlen_key: The same of keys.
        is_causal: Query t of a sequence sees its keys 0..t.
        scale: As in :func:`spectraformer.random_feature_attention`.
        dropout_p: Likewise.
        enable_gqa: Likewise.
        backend: Likewise.

    Returns:
        Output in the dtype of value.

    Raises:
        ValueError: For shapes, dtypes, devices or options that do not fit.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.ndim != 3:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} has shape {found}; expected (tokens of all sequences, heads, dim)")
    require_integer("max_seqlen", max_seqlen)
    _check_boundaries("cu_seqlens", cu_seqlens, max_seqlen, query)
    if (cu_seqlens_key is None) != (max_seqlen_key is None):
        raise ValueError("cu_seqlens_key and max_seqlen_key are given together or not at all")
    if cu_seqlens_key is None or max_seqlen_key is None:
        if key.shape[0] != query.shape[0]:
            raise ValueError(
                f"key has {key.shape[0]} tokens and query {query.shape[0]}; "
                "expected as many, or cu_seqlens_key and max_seqlen_key"
            )
        cu_seqlens_key, max_seqlen_key = cu_seqlens, max_seqlen
    require_integer("max_seqlen_key", max_seqlen_key)
    _check_boundaries("cu_seqlens_key", cu_seqlens_key, max_seqlen_key, key)
    if len(cu_seqlens_key) != len(cu_seqlens):
        raise ValueError(
            f"cu_seqlens_key has {len(cu_seqlens_key)} entries and cu_seqlens {len(cu_seqlens)}; expected one more "
            "than there are sequences in both"
        )
    if query.shape[0] == 0 or key.shape[0] == 0:
        return value.new_zeros(*query.shape[:2], value.shape[-1])
    sequences = ops.Sequences(cu_seqlens, cu_seqlens_key, max_seqlen, max_seqlen_key)
    tokens = heads_first(query), heads_first(key), heads_first(value)
    # Causal kernels have one set of boundaries.
    fits = not is_causal or sequences.key is sequences.query
    if fits and _unpadded(*tokens, feature_map, is_causal, enable_gqa, backend):
        check_dropout(dropout_p)
        return _attend(*tokens, feature_map, sequences, is_causal, scale, dropout_p)
    of_query = _Places(cu_seqlens, max_seqlen, query.shape[0])
    of_key = of_query if cu_seqlens_key is cu_seqlens else _Places(cu_seqlens_key, max_seqlen_key, key.shape[0])
    out = random_feature_attention(
        of_query.unpack(query),
        of_key.unpack(key),
        of_key.unpack(value),
        feature_map,
        key_padding_mask=of_key.real,
        query_padding_mask=of_query.real,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout_p,
        enable_gqa=enable_gqa,
        backend=backend,
    )
    return of_query.pack(out)


def _unpadded(
    q: Tensor,  # (1, h * g, t, d)
    k: Tensor,  # (1, h, s, d)
    v: Tensor,  # (1, h, s, e)
    feature_map: FeatureMap,
    is_causal: bool,
    enable_gqa: bool,
    backend: str,
) -> bool:
    """Whether the fused kernels take these tokens as they are."""
    check_map(feature_map)
    component = feature_map.component
    check_query_key(q, k, feature_map.head_dim, enable_gqa)
    check_value(k, v)
    if component.trigonometric or not feature_map.positive:
        return False
    if ops.choose_backend(backend, q, k, v, is_causal=is_causal) != "triton":
        return False
    if not feature_map.data_dependent:
        return True
    return component.packs and not feature_map.center and not moments_refusals(q, k, component.order)


def _attend(
    q: Tensor,  # (1, h * g, t, d)
    k: Tensor,  # (1, h, s, d)
    v: Tensor,  # (1, h, s, e)
    feature_map: FeatureMap,
    sequences: ops.Sequences,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
) -> Tensor:  # (t, h * g, e)
    pair = feature_map(q, k, scale=scale, is_causal=is_causal, enable_gqa=True, sequences=sequences)
    assert isinstance(pair, Exponential)
    kept = drop_values(v, dropout_p)
    attended = pair.attend(kept, backend="triton", is_causal=is_causal, sequences=sequences)
    return attended.out.to(v.dtype).squeeze(0).transpose(0, 1).contiguous()


def _check_boundaries(name: str, boundaries: object, longest: int, tokens: Tensor) -> None:
    if not isinstance(boundaries, Tensor) or boundaries.ndim != 1 or len(boundaries) < 2:
        found = tuple(boundaries.shape) if isinstance(boundaries, Tensor) else type(boundaries).__name__
        raise ValueError(f"{name} is {found}; expected a tensor with one entry more than there are sequences, (b + 1,)")
    if boundaries.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} has dtype {boundaries.dtype}; expected int32 or int64")
    if boundaries.device != tokens.device:
        raise ValueError(
            f"{name} is on {boundaries.device} but its tokens are on {tokens.device}; move one to the other"
        )
    if boundaries.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lengths = boundaries.diff()
    if boundaries[0] != 0 or boundaries[-1] != tokens.shape[0] or lengths.min() < 0:
        raise ValueError(f"{name} is {boundaries.tolist()}; expected 0, ..., {tokens.shape[0]}, ascending")
    if lengths.max() > longest:
        raise ValueError(f"{name} has a sequence of {int(lengths.max())} tokens; expected at most {longest}")


class _Places:
    """Where tokens of a packed batch stand in the padded one, and the reverse."""

    def __init__(self, boundaries: Tensor, longest: int, tokens: int) -> None:
        starts, self.sequences = boundaries[:-1].long(), len(boundaries) - 1
        position = torch.arange(longest, device=boundaries.device)
        self.real = position < boundaries.diff().unsqueeze(-1)  # (b, longest)
        self.packed = (starts.unsqueeze(-1) + position).clamp_max(tokens - 1).flatten()  # (b * longest,)
        token = torch.arange(tokens, device=boundaries.device)
        # In all boundaries, not from the second on: compiled for a GPU, torch 2.11 reads such a view from the first.
        sequence = torch.searchsorted(boundaries.contiguous(), token, right=True) - 1
        sequence = sequence.clamp(0, self.sequences - 1)
        self.padded = sequence * longest + (token - starts[sequence]).clamp(0, longest - 1)  # (tokens,)
        self.longest = longest

    def unpack(self, x: Tensor) -> Tensor:  # (tokens, h, d) -> (b, h, longest, d)
        """One sequence beside the other; padding holds other tokens and is not to be read."""
        chosen = select_rows(x, self.packed, self.padded)
        return chosen.view(self.sequences, self.longest, *x.shape[1:]).transpose(1, 2)

    def pack(self, x: Tensor) -> Tensor:  # (b, h, longest, d) -> (tokens, h, d)
        """The real tokens, one sequence after the other."""
        return select_rows(x.transpose(1, 2).flatten(0, 1), self.padded)
