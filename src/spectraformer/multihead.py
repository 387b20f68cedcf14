"""RandomFeatureAttention: the module shaped like ``torch.nn.MultiheadAttention``, with linear cost."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectraformer.attention import random_feature_attention
from spectraformer.checks import check_dropout, describe, require_integer
from spectraformer.features import FeatureMap

# need_weights=True builds the implied n x s matrix: refused above this many entries a head.
MAX_WEIGHTS = 4096 * 4096


class RandomFeatureAttention(nn.Module):
    """Multi-head attention by random features, a drop-in for ``nn.MultiheadAttention``.

    Takes its constructor and forward arguments, keeps its parameter names, and loads its weights
    (:meth:`from_multihead_attention`). What linear attention cannot do is refused with the reason: an
    arbitrary ``attn_mask``, and attention weights of long sequences. Masks have torch's polarity in this
    module: ``key_padding_mask`` is True for padding.

    Args:
        embed_dim: Dimension of the model, of queries and of the output.
        num_heads: Heads; embed_dim must be a multiple.
        dropout: Probability of dropping a key's value for all queries of a batch item and head, in training.
        bias: Whether the projections have biases.
        add_bias_kv: Add one learned key and value.
        add_zero_attn: Add one key and value of zeros.
        kdim: Dimension of keys, default embed_dim.
        vdim: Dimension of values, default embed_dim.
        batch_first: (batch, tokens, dim) instead of (tokens, batch, dim).
        device: Device of parameters and buffers.
        dtype: Their dtype.
        num_features: m, rows of W.
        component: Component function, by name or object.
        weight: Weight matrix, by name or object.
        scale: Attention scale, default 1 / sqrt(head dim).
        backend: "auto", "triton", "cpu" or "torch".
        feature_map_options: Further arguments of :class:`spectraformer.FeatureMap`: kernel, seed, center,
            statistics, momentum, redraw_every, share_weight, component_options, weight_options.

    Raises:
        ValueError: For sizes that do not fit, and for what FeatureMap refuses.
    """

    bias_k: Tensor | None
    bias_v: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_features: int = 256,
        component: Any = "oprf",
        weight: Any = "orf",
        scale: float | None = None,
        backend: str = "auto",
        **feature_map_options: Any,
    ) -> None:
        super().__init__()
        for name, value in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            require_integer(name, value)
        for name, size in (("kdim", kdim), ("vdim", vdim)):
            if size is not None:
                require_integer(name, size)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim is {embed_dim}; expected a multiple of num_heads={num_heads}")
        check_dropout(dropout)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout = dropout
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        self.scale = scale
        self.backend = backend
        # nn.TransformerEncoderLayer reads this in evaluation and, if it is True, computes softmax attention
        # from our weights without ever calling us.
        self._qkv_same_embed_dim = False

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        packed = self.kdim == embed_dim and self.vdim == embed_dim
        self.in_proj_weight = parameter(3 * embed_dim, embed_dim) if packed else None
        self.q_proj_weight = None if packed else parameter(embed_dim, embed_dim)
        self.k_proj_weight = None if packed else parameter(embed_dim, self.kdim)
        self.v_proj_weight = None if packed else parameter(embed_dim, self.vdim)
        self.in_proj_bias = parameter(3 * embed_dim) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.bias_k = parameter(1, 1, embed_dim) if add_bias_kv else None
        self.bias_v = parameter(1, 1, embed_dim) if add_bias_kv else None
        self.feature_map = FeatureMap(
            self.head_dim,
            num_features,
            component,
            weight,
            num_heads=num_heads,
            device=device,
            **feature_map_options,
        )
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """As nn.MultiheadAttention starts."""
        for matrix in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if matrix is not None:
                nn.init.xavier_uniform_(matrix)
        for vector in (self.in_proj_bias, self.out_proj.bias):
            if vector is not None:
                nn.init.zeros_(vector)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                nn.init.xavier_normal_(extra)

    @classmethod
    def from_multihead_attention(cls, attention: nn.MultiheadAttention, **options: Any) -> RandomFeatureAttention:
        """A random-feature attention with the weights of an ``nn.MultiheadAttention``.

        Args:
            attention: Where sizes, weights, dtype, device and training mode come from; not changed.
            options: num_features, component, weight and further options of this class.

        Raises:
            ValueError: If ``attention`` is something else.
        """
        if not isinstance(attention, nn.MultiheadAttention):
            raise ValueError(f"attention is {type(attention).__name__}; expected torch.nn.MultiheadAttention")
        made = cls(
            attention.embed_dim,
            attention.num_heads,
            dropout=attention.dropout,
            bias=attention.in_proj_bias is not None,
            add_bias_kv=attention.bias_k is not None,
            add_zero_attn=attention.add_zero_attn,
            kdim=attention.kdim,
            vdim=attention.vdim,
            batch_first=attention.batch_first,
            device=attention.out_proj.weight.device,
            dtype=attention.out_proj.weight.dtype,
            **options,
        )
        missing, unexpected = made.load_state_dict(attention.state_dict(), strict=False)
        assert not unexpected and all(name.startswith("feature_map.") for name in missing)
        return made.train(attention.training)

    def forward(
        self,
        query: Tensor,  # (n, b, embed_dim), (b, n, embed_dim) if batch_first, or (n, embed_dim)
        key: Tensor,  # (s, b, kdim) likewise
        value: Tensor,  # (s, b, vdim) likewise
        key_padding_mask: Tensor | None = None,  # (b, s) or (s,)
        need_weights: bool = False,
        attn_mask: Tensor | None = None,  # (n, s)
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output, shaped like query, and the implied attention weights if asked.

        Args:
            query: Queries.
            key: Keys.
            value: Values.
            key_padding_mask: True (or -inf) for **padding**, as in torch.
            need_weights: Return the weights that the random features imply, (b, n, s): costs n s, and is refused for
                long sequences. Unlike torch's, the default is False.
            attn_mask: None, or the causal mask in any of torch's forms; others are refused.
            average_attn_weights: Average the weights over heads; else (b, h, n, s).
            is_causal: Causal attention; unlike torch's, it needs no ``attn_mask`` beside it.

        Raises:
            ValueError: For inputs that do not fit and masks that linear attention cannot apply.
        """
        self._check_inputs(query, key, value)
        if query.is_nested:
            return self._forward_nested(query, key, value, key_padding_mask, need_weights, is_causal)
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            if isinstance(key_padding_mask, Tensor) and key_padding_mask.ndim == 1:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        causal = _is_causal_mask(attn_mask, query.shape[1], key.shape[1]) or is_causal
        real = _real_tokens(key_padding_mask, key)
        out, weights = self._attend(*self._project(query, key, value), real, causal, need_weights)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            out = out.squeeze(0)
            weights = None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out, weights

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, x, dim in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if not isinstance(x, Tensor) or x.ndim not in (2, 3):
                raise ValueError(f"{name} is {describe(x)}; expected (batch, tokens, {dim}) or (tokens, {dim})")
            held = self.out_proj.weight
            if x.is_sparse:
                raise ValueError(f"{name} is a sparse tensor; expected a dense one")
            if x.device != held.device:
                raise ValueError(f"{name} is on {x.device} but the module is on {held.device}; move one to the other")
            if x.dtype != held.dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
                raise ValueError(f"{name} has dtype {x.dtype}; expected {held.dtype}, that of the module's parameters")
            if x.ndim != query.ndim or x.is_nested != query.is_nested:
                raise ValueError(f"{name} is not batched as query is: {describe(x)} and {describe(query)}")
            if x.shape[-1] != dim if not x.is_nested else x.size(-1) != dim:
                raise ValueError(f"{name} has dimension {x.shape[-1]}; expected {dim}")
        if query.is_nested:
            return
        tokens = 1 if query.ndim == 3 and self.batch_first else 0
        if key.shape[tokens] != value.shape[tokens]:
            raise ValueError(
                f"key has {key.shape[tokens]} tokens but value has {value.shape[tokens]}; expected as many"
            )
        if query.ndim == 3 and not query.shape[1 - tokens] == key.shape[1 - tokens] == value.shape[1 - tokens]:
            hint = "" if self.batch_first else " (inputs are (tokens, batch, dim) unless batch_first=True)"
            raise ValueError(
                f"query, key and value have batch sizes {query.shape[1 - tokens]}, {key.shape[1 - tokens]} and "
                f"{value.shape[1 - tokens]}; expected them equal{hint}"
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, n, embed_dim) to (b, h, n, head_dim), each; learned and zero keys stand before the others."""
        weights: tuple[Tensor, ...]
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            assert self.q_proj_weight is not None
            assert self.k_proj_weight is not None
            assert self.v_proj_weight is not None
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (functional.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        if self.add_zero_attn:
            k, v = functional.pad(k, (0, 0, 1, 0)), functional.pad(v, (0, 0, 1, 0))
        if self.bias_k is not None and self.bias_v is not None:
            # Autocast makes k and v of lower precision than parameters.
            k = torch.cat((self.bias_k.to(k.dtype).expand(k.shape[0], 1, -1), k), dim=1)
            v = torch.cat((self.bias_v.to(v.dtype).expand(v.shape[0], 1, -1), v), dim=1)
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        n, e = q.shape[2], v.shape[3]
        extra = int(self.bias_k is not None) + int(self.add_zero_attn)
        if extra and real is not None:
            real = functional.pad(real, (extra, 0), value=True)
        query_real = None
        if extra and causal:
            # Every query sees the extra keys: they come first, before queries whose output nobody reads.
            q = functional.pad(q, (0, 0, extra, 0))
            query_real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
            query_real[:, :extra] = False
        s = k.shape[2]
        if need_weights:
            if n * s > MAX_WEIGHTS:
                raise ValueError(
                    f"need_weights=True asks for {n} x {s} weights a head; linear attention has none, and building "
                    f"them is limited to {MAX_WEIGHTS} entries; use need_weights=False"
                )
            # Attention with the identity as values is the matrix of weights.
            identity = torch.eye(s, dtype=v.dtype, device=v.device).expand(*v.shape[:2], s, s)
            v = torch.cat((v, identity), dim=-1)
        if n == 0:
            out = v[:, :, :0]
        else:
            out = random_feature_attention(
                q,
                k,
                v,
                self.feature_map,
                key_padding_mask=real,
                query_padding_mask=query_real,
                is_causal=causal,
                scale=self.scale,
                dropout_p=self.dropout if self.training else 0.0,
                backend=self.backend,
            )
        if query_real is not None:
            out = out[:, :, extra:]
        weights = None
        if need_weights:
            # torch puts the extra keys last.
            weights = out[..., e:].roll(-extra, dims=-1)
        out = out[..., :e].transpose(1, 2).flatten(2)
        projected: Tensor = self.out_proj(out)
        return projected, weights

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Nested tensors, which nn.TransformerEncoder makes of padded input in evaluation."""
        if key is not query or value is not query or key_padding_mask is not None or need_weights or is_causal:
            raise ValueError(
                "nested tensors are accepted as self-attention only, without masks and weights; "
                "pad them and pass key_padding_mask instead"
            )
        lengths = [len(x) for x in query.unbind()]
        padded = query.to_padded_tensor(0.0)
        positions = torch.arange(padded.shape[1], device=padded.device)
        real = positions < torch.tensor(lengths, device=padded.device).unsqueeze(-1)
        out, _ = self._attend(*self._project(padded, padded, padded), real, False, False)
        rows = [x[:n] for x, n in zip(out, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=query.layout), None

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"


def _real_tokens(mask: Tensor | None, key: Tensor) -> Tensor | None:
    """Torch's padding mask, bool with True or float with -inf for padding, as True for real tokens."""
    if mask is None:
        return None
    expected = tuple(key.shape[:2])
    if not isinstance(mask, Tensor) or tuple(mask.shape) != expected:
        raise ValueError(f"key_padding_mask is {describe(mask)}; expected (batch, tokens) = {expected}")
    if mask.dtype == torch.bool:
        return ~mask
    if not mask.dtype.is_floating_point:
        raise ValueError(f"key_padding_mask has dtype {mask.dtype}; expected bool (True is padding) or float")
    removed = mask == -math.inf
    if not torch.compiler.is_compiling() and not bool((removed | (mask == 0)).all()):
        wrong = "NaN" if bool(mask.isnan().any()) else "other values"
        raise ValueError(f"key_padding_mask has {wrong}; a float mask must be 0 for real tokens, -inf for padding")
    return ~removed


def _is_causal_mask(mask: Tensor | None, n: int, s: int) -> bool:
    """Whether attn_mask is the causal mask; any other is refused."""
    if mask is None:
        return False
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3) or tuple(mask.shape[-2:]) != (n, s):
        raise ValueError(f"attn_mask is {describe(mask)}; expected ({n}, {s})")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(f"attn_mask has dtype {mask.dtype}; expected bool (True is hidden) or float")
    if mask.dtype.is_floating_point and bool(mask.isnan().any()):
        raise ValueError("attn_mask has NaN; expected 0 for visible keys and -inf for hidden ones")
    hidden = mask if mask.dtype == torch.bool else mask == -math.inf
    future = torch.ones(n, s, dtype=torch.bool, device=mask.device).triu(1)
    visible = mask if mask.dtype == torch.bool else mask != 0
    if bool((hidden == future).all()) and bool((visible == future).all()):
        return True
    if not bool(visible.any()):
        return False
    raise ValueError(
        "attn_mask is neither causal nor empty: linear attention never forms the queries x keys matrix such a mask "
        "acts on; use key_padding_mask for padding and is_causal=True for causal attention"
    )
