# mypy: disable-error-code="import-untyped,import-not-found"
"""The attentions that are compared, by name: what each is, why it may refuse, and what it should compute.

All random-feature competitors get the same W, that of the feature map "posrf-orf", except "oprf-orf" with its own.

Legend: b batch, h heads, n tokens, d head dim, m features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex
from torch.nn.functional import scaled_dot_product_attention

from spectraformer import ops
from spectraformer.attention import random_feature_attention
from spectraformer.bench.autotuning import compiled_at_once
from spectraformer.bench.references import (
    Reference,
    Run,
    feature_map_reference,
    random_feature_reference,
    softmax_reference,
)
from spectraformer.bench.workload import Inputs, Workload
from spectraformer.features import FeatureMap
from spectraformer.registry import parse_variant

# torch 2.9 renamed it.
LOG_SUM_TOO: dict[str, Any] = (
    {"return_aux": flex.AuxRequest(lse=True)} if hasattr(flex, "AuxRequest") else {"return_lse": True}
)
PERFORMER_FLOOR = 1e-4  # performer-pytorch adds it to each feature


@dataclass(frozen=True)
class Built:
    """A competitor made ready for one workload.

    Attributes:
        run: From queries, keys and values (b, h, n, d) to the output.
        reference: What it should compute.
        backend: Which of this library's backends runs; None for others.
        setting: Around every use; torch's choice of kernels, for one.
    """

    run: Run
    reference: Reference
    backend: str | None = None
    setting: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)


@dataclass(frozen=True)
class Competitor:
    """One attention to compare.

    Attributes:
        claim: What it is, for people.
        order: Its time grows with this power of the length.
        refusal: Why it cannot take a workload, or None.
        build: Makes it ready; the inputs are an example, for those that calibrate.
        tokens_first: Whether it is at its best with memory laid out as (b, n, h, d), which it then gets.
    """

    claim: str
    order: int
    refusal: Callable[[Workload], str | None]
    build: Callable[[Workload, Inputs], Built]
    tokens_first: bool = False


def _never(workload: Workload) -> str | None:
    return None


def feature_map(workload: Workload, variant: str) -> FeatureMap:
    """The feature map of a variant such as "posrf-orf", one W for all heads."""
    component, weight = parse_variant(variant)
    statistics: Any = "running" if workload.is_causal else "auto"
    sizes = (workload.head_dim, workload.num_features, component, weight)
    return FeatureMap(*sizes, statistics=statistics, device=workload.device).eval()


def omega_of(workload: Workload) -> Tensor:
    """The rows of W that all share, (m, d) float32."""
    omega: Tensor = feature_map(workload, "posrf-orf").weight().omega
    return omega[0].detach()


def _ours(variant: str, backend: str) -> Callable[[Workload, Inputs], Built]:
    def build(workload: Workload, example: Inputs) -> Built:
        made = feature_map(workload, variant)
        if made.running is not None:
            made.calibrate(example.query.detach(), example.key.detach())
        exact = copy.deepcopy(made).double()
        # PosRF is written out; what depends on the data has no shorter definition than its feature map.
        reference = (
            random_feature_reference(omega_of(workload), is_causal=workload.is_causal)
            if variant == "posrf-orf"
            else feature_map_reference(exact.features, is_causal=workload.is_causal)
        )
        chosen = ops.choose_backend(
            backend, example.query, example.key, example.value, positive=made.positive, is_causal=workload.is_causal
        )

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return random_feature_attention(query, key, value, made, is_causal=workload.is_causal, backend=backend)

        return Built(run, reference, chosen)

    return build


def materialised_features(
    query: Tensor,  # (b, h, n, d), or (b, n, h, d)
    key: Tensor,  # likewise
    omega: Tensor,  # (m, d)
    token_dim: int = 2,
) -> tuple[Tensor, Tensor]:
    """Positive features as they are usually written, (..., m) in the dtype of the inputs.

    Products are in that dtype, exponentials in float32. Shifts, which cancel, are one a query and one a head of keys.
    """
    scale: float = query.shape[-1] ** -0.25
    omega = (omega * scale).to(query.dtype)
    log_query = (query @ omega.mT).float()
    log_key = (key @ omega.mT).float() - 0.5 * scale**2 * key.float().square().sum(-1, keepdim=True)
    phi_query = (log_query - log_query.amax(-1, keepdim=True).detach()).exp()
    phi_key = (log_key - log_key.amax(dim=(token_dim, -1), keepdim=True).detach()).exp()
    return phi_query.to(query.dtype), phi_key.to(key.dtype)


def materialised_attention(query: Tensor, key: Tensor, value: Tensor, omega: Tensor) -> Tensor:
    """Bidirectional random-feature attention from features in memory."""
    phi_query, phi_key = materialised_features(query, key, omega)
    mass = phi_key.sum(-2, dtype=torch.float32).to(key.dtype).unsqueeze(-1)
    return phi_query @ (phi_key.mT @ value) / (phi_query @ mass)


def keys_bias(key: Tensor) -> Tensor:  # (b, h, n, d) -> (b, h, n)
    """What positive features subtract from the logits of each key, half its scaled squared norm."""
    scale: float = key.shape[-1] ** -0.25
    return -0.5 * scale**2 * key.float().square().sum(-1)


def biased_softmax(
    query: Tensor,  # (b, h, r, d)
    key: Tensor,  # (b, h, n, d)
    value: Tensor,  # likewise
    bias: Tensor,  # (b, h, n)
    log_sum: bool,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention by FlexAttention with a bias of each key; and, if asked for, the log-sum of each query."""

    def with_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[b, h, j]

    scale: float = query.shape[-1] ** -0.25
    found: Any = flex.flex_attention(query, key, value, with_bias, scale=scale, **(LOG_SUM_TOO if log_sum else {}))
    if not log_sum:
        out: Tensor = found
        return out, None
    return found[0], found[1].lse if "return_aux" in LOG_SUM_TOO else found[1]


def two_softmaxes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    omega: Tensor,
    bias: Callable[[Tensor], Tensor] = keys_bias,
    softmax: Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]] = biased_softmax,
) -> Tensor:
    """Bidirectional random-feature attention by two calls of FlexAttention, chained through the landmarks omega."""
    landmarks = omega.to(query.dtype).expand(*query.shape[:2], -1, -1).contiguous()
    landmark_value, log_sum = softmax(landmarks, key, value, bias(key), True)
    assert log_sum is not None
    return softmax(query, landmarks, landmark_value, log_sum, False)[0]


def _random_features(
    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], *, compiled: bool
) -> Callable[[Workload, Inputs], Built]:
    def build(workload: Workload, example: Inputs) -> Built:
        omega = omega_of(workload)
        # Sizes are compiled in, one length at a time; a graph that breaks is an error, not a slow figure.
        inner = torch.compile(function, fullgraph=True, dynamic=False) if compiled else function
        reference = random_feature_reference(omega, is_causal=workload.is_causal)
        return Built(lambda q, k, v: inner(q, k, v, omega), reference)

    return build


def _build_flex(workload: Workload, example: Inputs) -> Built:
    omega = omega_of(workload)
    # Each call is a graph of its own: where nothing is differentiated, torch 2.11 cannot compile one with a bias that
    # the same graph computes ("convert FlexibleLayout to FixedLayout first").
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    bias, softmax = compiled(keys_bias), compiled(biased_softmax)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return two_softmaxes(query, key, value, omega, bias, softmax)

    return Built(run, random_feature_reference(omega, is_causal=False))


def _bidirectional(workload: Workload) -> str | None:
    return "it has no causal form" if workload.is_causal else None


def _compiled(workload: Workload) -> str | None:
    return _bidirectional(workload) or _without("triton" if workload.device.type == "cuda" else None)


def _flex(workload: Workload) -> str | None:
    if workload.device.type != "cuda":
        return "it is fused on a GPU only"
    return _bidirectional(workload) or _without("triton")


def _without(package: str | None) -> str | None:
    return None if package is None or find_spec(package) is not None else f"{package} is not installed"


def _softmax(backend: SDPBackend) -> Callable[[Workload, Inputs], Built]:
    def build(workload: Workload, example: Inputs) -> Built:
        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return scaled_dot_product_attention(query, key, value, is_causal=workload.is_causal)

        reference = softmax_reference(is_causal=workload.is_causal)
        return Built(run, reference, setting=lambda: sdpa_kernel([backend]))

    return build


def _cudnn(workload: Workload) -> str | None:
    if workload.device.type != "cuda":
        return "cuDNN needs a GPU"
    return "cuDNN takes 16-bit inputs only" if workload.dtype == torch.float32 else None


def _flash(workload: Workload) -> str | None:
    wide = workload.device.type == "cuda" and workload.dtype == torch.float32
    return "on a GPU it takes 16-bit inputs only" if wide else None


def _performer(workload: Workload) -> str | None:
    if workload.is_causal:
        return "its causal form needs a CUDA extension of another package"
    return _without("performer_pytorch")


def _build_performer(workload: Workload, example: Inputs) -> Built:
    from performer_pytorch import FastAttention

    omega = omega_of(workload)
    attention = FastAttention(workload.head_dim, workload.num_features).to(workload.device)
    attention.projection_matrix.copy_(omega)
    reference = random_feature_reference(omega, is_causal=False, floor=PERFORMER_FLOOR)
    return Built(attention.eval(), reference)


def _fla(workload: Workload) -> str | None:
    if not workload.is_causal:
        return "it is causal only"
    if workload.device.type != "cuda":
        return "its kernels need a GPU"
    return _without("fla")


def _build_fla(workload: Workload, example: Inputs) -> Built:
    from fla.ops.linear_attn import chunk_linear_attn

    omega = omega_of(workload)
    features = torch.compile(materialised_features, fullgraph=True, dynamic=False)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        phi_query, phi_key = features(query, key, omega, token_dim=1)
        out: Tensor = chunk_linear_attn(phi_query, phi_key, value, scale=1.0, normalize=True)[0]
        return out.transpose(1, 2)

    with compiled_at_once(), torch.set_grad_enabled(workload.backward):  # so that its search takes seconds, not minutes
        out = run(example.query, example.key, example.value)
        if workload.backward:
            torch.autograd.grad(out, (example.query, example.key, example.value), example.grad)
    return Built(run, random_feature_reference(omega, is_causal=True))


COMPETITORS: dict[str, Competitor] = {
    "posrf-orf": Competitor("this library, positive features", 1, _never, _ours("posrf-orf", "auto")),
    "oprf-orf": Competitor("this library, features fitted to the data", 1, _never, _ours("oprf-orf", "auto")),
    "posrf-orf-torch": Competitor(
        "this library in plain torch, logits in float32", 1, _never, _ours("posrf-orf", "torch")
    ),
    "torch": Competitor(
        "features in memory, plain torch", 1, _bidirectional, _random_features(materialised_attention, compiled=False)
    ),
    "torch-compile": Competitor(
        "the same, torch.compile", 1, _compiled, _random_features(materialised_attention, compiled=True)
    ),
    "flex-attention": Competitor(
        "the same attention as two softmaxes by FlexAttention, torch.compile",
        1,
        _flex,
        _build_flex,
    ),
    "performer-pytorch": Competitor("performer-pytorch's FastAttention", 1, _performer, _build_performer),
    "fla": Competitor(
        "flash-linear-attention's chunk_linear_attn with normaliser, features by torch.compile",
        1,
        _fla,
        _build_fla,
        tokens_first=True,
    ),
    "sdpa-cudnn": Competitor("softmax, torch's attention by cuDNN", 2, _cudnn, _softmax(SDPBackend.CUDNN_ATTENTION)),
    "sdpa-flash": Competitor(
        "softmax, torch's attention by FlashAttention", 2, _flash, _softmax(SDPBackend.FLASH_ATTENTION)
    ),
}
OURS = ("posrf-orf", "oprf-orf")
EXACT = ("sdpa-cudnn", "sdpa-flash")  # what break-even is with
