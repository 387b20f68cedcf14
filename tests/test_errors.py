"""Every mistake is answered by a ValueError that says what was given and what was expected.

Each case is one call with one mistake and the words its message must have. A bad call must also leave no trace.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import spectraformer as sf
from spectraformer.weights import WEIGHTS

B, H, N, D = 2, 2, 6, 4


def x(b: int = B, h: int = H, n: int = N, d: int = D) -> Tensor:
    """Tokens of functions."""
    return torch.zeros(b, h, n, d)


def y(b: int = B, n: int = N, d: int = 8) -> Tensor:
    """Tokens of the module."""
    return torch.zeros(b, n, d)


def mask(b: int = B, n: int = N) -> Tensor:
    return torch.ones(b, n, dtype=torch.bool)


def make(component: Any = "posrf", weight: Any = "mc", **options: Any) -> sf.FeatureMap:
    return sf.FeatureMap(options.pop("head_dim", D), options.pop("num_features", 8), component, weight, **options)


def attend(q: Any = None, k: Any = None, v: Any = None, fm: Any = None, **options: Any) -> Tensor:
    q, k, v = (x() if given is None else given for given in (q, k, v))
    return sf.random_feature_attention(q, k, v, make() if fm is None else fm, **options)


def masked(mask: Any) -> Tensor:
    return attend(key_padding_mask=mask)


def exact(*qkv: Tensor, **options: Any) -> Tensor:
    return sf.kernel_attention(*(qkv or [x()] * 3), **options)


def step(n: int = 1, fm: Any = None, state: Any = None, **options: Any) -> Any:
    fm = make() if fm is None else fm
    new = x(n=n)
    return sf.attention_step(new, new, new, fm, state or fm.init_state(B, H, D), **options)


def module(*qkv: Any, padding: Any = None, scale: Any = None, backend: str = "auto", **call: Any) -> Any:
    """Missing keys and values are the queries."""
    query, key, value = (*(qkv or [y()]), *[(qkv or [y()])[-1]] * 2)[:3]
    attention = sf.RandomFeatureAttention(8, 2, batch_first=True, num_features=8, scale=scale, backend=backend)
    return attention(query, key, value, key_padding_mask=padding, **call)


def landmarks(q: Any = None, k: Any = None, v: Any = None, backend: str = "auto") -> Tensor:
    q, k, v = (x() if given is None else given for given in (q, k, v))
    rows = x(n=3)
    return sf.landmark_attention(q, k, v, rows, rows, rows[..., 0], torch.zeros(B, H, N), backend)


def begun(component: str = "posrf", b: int = B, h: int = H, e: int = D, m: int = 8, **options: Any) -> Any:
    return make(component, num_features=m).init_state(b, h, e, **options)


def w(name: str, **options: Any) -> sf.FeatureMap:
    return make("posrf", name, weight_options=options)


def f(name: str, **options: Any) -> sf.FeatureMap:
    return make(name, "mc", component_options=options)


nested = torch.nested.nested_tensor
from_torch = sf.RandomFeatureAttention.from_multihead_attention
bad: dict[str, tuple[Callable[[], Any], str]] = {
    # Tokens.
    "query-list": (lambda: attend([1.0]), r"query is list \[1.0\]; expected a tensor \(batch, heads, tokens, dim\)"),
    "query-3d": (lambda: attend(x()[0]), r"query has shape \(2, 6, 4\); expected 4 dimensions"),
    "key-5d": (lambda: attend(None, x()[None]), r"key has shape \(1, 2, 2, 6, 4\); expected 4 dimensions"),
    "value-2d": (lambda: attend(None, None, x()[0, 0]), r"value has shape \(6, 4\); expected 4 dim"),
    "query-int": (lambda: attend(x().long()), r"query has dtype torch.int64; expected float16, bfloat16"),
    "key-complex": (lambda: attend(None, x().cfloat()), r"key has dtype torch.complex64; expected float"),
    "value-bool": (lambda: attend(None, None, x().bool()), r"value has dtype torch.bool; expected float"),
    "query-float8": (lambda: attend(x().to(torch.float8_e4m3fn)), r"query has dtype torch.float8.*expected float16"),
    "query-nested": (lambda: attend(nested([x(n=3)[0]] * 2)), r"query is a nested or sparse.*key_padding_mask"),
    "key-sparse": (lambda: attend(None, x().to_sparse()), r"key is a nested or sparse tensor; expected a dense"),
    "value-nested": (lambda: attend(None, None, nested([x(n=3)[0]] * 2)), r"value is a nested or sparse"),
    "head-dim-of-map": (lambda: attend(x(d=5)), r"query has head dim 5, but the feature map.*head_dim=4"),
    "head-dim-of-key": (lambda: attend(None, x(d=5)), r"key has head dim 5, but the feature map.*head_dim=4"),
    "exact-head-dims": (lambda: exact(x(), x(d=5), x()), r"head dim 4 but key has 5"),
    "batch-of-key": (lambda: attend(None, x(b=3), x(b=3)), r"batch size 2 but key has 3; expected equal"),
    "batch-of-value": (lambda: attend(None, None, x(b=1)), r"value has \(batch.*\(1, 2, 6\) but key has \(2, 2, 6\)"),
    "heads-of-value": (lambda: attend(None, None, x(h=1)), r"value has .*\(2, 1, 6\) but key has \(2, 2, 6\)"),
    "tokens-of-value": (lambda: attend(None, None, x(n=5)), r"value has .*\(2, 2, 5\) but key has \(2, 2, 6\)"),
    "dtype-of-key": (lambda: attend(None, x().double()), r"key has dtype torch.float64 but query has torch.float32"),
    "dtype-of-value": (lambda: attend(None, None, x().half()), r"value has dtype torch.float16 but key has.*cast"),
    "device-of-key": (lambda: attend(None, x().to("meta")), r"key is on meta but query is on cpu; move one"),
    "device-of-value": (lambda: attend(None, None, x().to("meta")), r"value is on meta but key is on cpu; move"),
    "device-of-map": (lambda: attend(*[x().to("meta")] * 3), r"query is on meta but the feature map is on cpu"),
    "groups-unasked": (lambda: attend(x(h=4)), r"query has 4 heads but key has 2; expected equal.*enable_gqa=True"),
    "groups-uneven": (lambda: attend(x(h=3), enable_gqa=True), r"3 heads, which is not a multiple of the key's 2"),
    "groups-fewer": (lambda: attend(x(h=1), enable_gqa=True), r"1 heads, which is not a multiple of the key's 2"),
    "no-heads": (lambda: attend(*[x(h=0)] * 3), r"heads"),
    "no-head-dim": (lambda: exact(x(d=0), x(d=0), x()), r"head dim"),
    "no-value-dim": (lambda: attend(None, None, x(d=0)), r"value has shape \(2, 2, 6, 0\).*expected at least 1"),
    # Masks.
    "mask-float": (lambda: masked(mask().float()), r"\(2, 6\) float32; expected a bool.*True for"),
    "mask-int": (lambda: masked(mask().long()), r"\(2, 6\) int64; expected a bool tensor \(2, 6\)"),
    "mask-uint8": (lambda: masked(mask().byte()), r"uint8; expected a bool tensor \(2, 6\)"),
    "mask-list": (lambda: masked([True]), r"key_padding_mask is list \[True\]; expected a bool tensor"),
    "mask-tokens": (lambda: masked(mask(n=5)), r"shape \(2, 5\); expected \(batch, tokens\) = \(2, 6\)"),
    "mask-batch": (lambda: masked(mask(b=1)), r"shape \(1, 6\); expected \(batch, tokens\) = \(2, 6\)"),
    "mask-4d": (lambda: masked(mask()[:, None, None].expand(-1, 1, N, N)), r"cannot apply a mask of queries"),
    "mask-meta": (lambda: masked(mask().to("meta")), r"key_padding_mask is on meta but the tokens are on"),
    "mask-of-queries": (lambda: attend(query_padding_mask=mask(n=7)), r"query_padding_mask has shape \(2, 7\)"),
    "mask-of-queries-float": (lambda: attend(query_padding_mask=mask().half()), r"query_padding_mask is.*float16"),
    "mask-of-features": (lambda: make().features(x(), x(), key_padding_mask=mask(n=1)), r"shape \(2, 1\)"),
    "mask-of-step": (lambda: step(key_padding_mask=mask()), r"key_padding_mask has shape \(2, 6\).*= \(2, 1\)"),
    "mask-exact": (lambda: exact(key_padding_mask=mask(n=2)), r"shape \(2, 2\)"),
    # Options of a call.
    "causal-lengths": (lambda: attend(x(n=1), is_causal=True), r"1 queries and 6 keys.*attention_step"),
    "causal-lengths-exact": (lambda: exact(x(n=1), x(), x(), is_causal=True), r"1 queries and 6"),
    "scale-0": (lambda: attend(scale=0), r"scale is 0; expected a positive finite number"),
    "scale-negative": (lambda: attend(scale=-1.0), r"scale is -1.0; expected a positive finite number"),
    "scale-inf": (lambda: attend(scale=math.inf), r"scale is inf; expected a positive finite number"),
    "scale-nan": (lambda: attend(scale=math.nan), r"scale is nan; expected a positive finite number"),
    "scale-text": (lambda: attend(scale="auto"), r"scale is 'auto'; expected a positive finite number"),
    "scale-flag": (lambda: exact(scale=True), r"scale is True; expected a positive"),
    "dropout-1": (lambda: attend(dropout_p=1.0), r"dropout is 1.0; expected a probability in \[0, 1\)"),
    "dropout-negative": (lambda: attend(dropout_p=-0.1), r"dropout is -0.1; expected a probability"),
    "dropout-nan": (lambda: attend(dropout_p=math.nan), r"dropout is nan; expected a probability"),
    "dropout-text": (lambda: attend(dropout_p="0.1"), r"dropout is '0.1'; expected a probability"),
    "backend-unknown": (lambda: attend(backend="troch"), r"backend is 'troch'; expected .*cpu, torch.*'torch'"),
    "backend-signed": (lambda: attend(fm=make("trigrf"), backend="cpu"), r"'cpu' cannot run here: signed.*'auto'"),
    "backend-wide": (lambda: attend(v=x(d=64), backend="cpu"), r"'cpu' cannot.*value dim 64 and head dim 4.*'auto'"),
    "backend-causal": (lambda: attend(is_causal=True, backend="cpu"), r"'cpu' cannot run here.*causal"),
    "map-name": (lambda: attend(fm="oprf"), r"feature_map is str; expected a spectraformer.FeatureMap"),
    "map-component": (lambda: attend(fm=make().component), r"feature_map is PosRF; expected a .*FeatureMap"),
    "kernel-exact": (lambda: exact(kernel="gauss"), r"'gauss'; expected.*nearest: 'gaussian'"),
    # Feature maps.
    "features-0": (lambda: make(num_features=0), r"num_features is 0; expected an integer of at least 1"),
    "features-huge": (lambda: make(num_features=10**14), r"num_features is 100,000,000,000,000; expected at most \d+,"),
    "features-float": (lambda: make(num_features=8.0), r"num_features is 8.0; expected an integer of at least 1"),
    "features-flag": (lambda: make(num_features=True), r"num_features is True; expected an integer"),
    "head-dim-0": (lambda: make(head_dim=0), r"head_dim is 0; expected an integer of at least 1"),
    "head-dim-text": (lambda: make(head_dim="64"), r"head_dim is '64'; expected an integer"),
    "heads-0": (lambda: make(num_heads=0), r"num_heads is 0; expected an integer of at least 1"),
    "seed-float": (lambda: make(seed=0.5), r"seed is 0.5; expected an integer"),
    "component-unknown": (lambda: make("oprff"), r"unknown component function 'oprff'.*posrf.*did you mean 'oprf'"),
    "component-upper": (lambda: make("OPRF"), r"unknown component function 'OPRF'.*did you mean 'oprf'"),
    "component-class": (lambda: make(sf.COMPONENTS["posrf"]), r"unknown component function .*PosRF.*expected one of"),
    "weight-unknown": (lambda: make(weight="fastfod"), r"unknown weight matrix 'fastfod'.*did you mean 'fastfood'"),
    "weight-none": (lambda: make(weight=None), r"unknown weight matrix None; expected one of mc, orf"),
    "kernel-unknown": (lambda: make(kernel="sofmax"), r"kernel is 'sofmax'; expected.*nearest: 'softmax'"),
    "statistics-unknown": (lambda: make(statistics="runing"), r"statistics is 'runing'.*nearest: 'running'"),
    "statistics-of-plus": (lambda: make("poisrf+", statistics="running"), r"PoisRFPlus translates.*'auto' or 'batch'"),
    "momentum-0": (lambda: make(momentum=0), r"momentum is 0; expected a number in \(0, 1\]"),
    "momentum-text": (lambda: make(momentum="0.1"), r"momentum is '0.1'; expected a number"),
    "redraw-0": (lambda: make(redraw_every=0), r"redraw_every is 0; expected an integer of at least 1"),
    "share-without-heads": (lambda: make(share_weight=False), r"share_weight=False needs num_heads"),
    "option-of-weight": (lambda: w("orf", norm="chi"), r"'orf' has no option 'norm'; its options: norms"),
    "option-of-component": (lambda: f("gerf", eta=1), r"'gerf' has no option 'eta'; its options: sign, initial_eta"),
    "option-of-none": (lambda: f("posrf", eta=1), r"'posrf' has no option 'eta'; its options: none"),
    "options-no-mapping": (lambda: make(component_options=5), r"component_options is 5; expected a mapping"),
    "options-of-object": (lambda: make(f("posrf").component, component_options={"a": 1}), r"given by name; build"),
    "weight-options-of-object": (lambda: make(weight=w("mc").weight, weight_options={"a": 1}), r"given by name; build"),
    "component-of-other-dim": (lambda: make(f("posrf").component, head_dim=5), r"component has head_dim=4; expected 5"),
    "weight-of-other-dim": (lambda: make(weight=w("mc").weight, head_dim=5), r"weight has head_dim=4; expected 5"),
    "weight-of-other-heads": (lambda: make(weight=make(weight="fastfoodl", num_heads=3).weight), r"=3.*has None"),
    "map-of-dtype-int": (lambda: make(dtype=torch.int64), r"dtype is torch.int64; expected float"),
    "map-of-dtype-complex": (lambda: make(dtype=torch.complex64), r"dtype is torch.complex64; expected float"),
    **{
        f"refused-{name}-{weight}": (lambda name=name, weight=weight: make(name, weight), r"refused: .*one of mc, orf")
        for name in ("poisrf", "geomrf", "poisrf+", "geomrf+")
        for weight in ("sorf", "rom", "sgq", "fastfoodl")
    },
    # Option values.
    "orf-norms": (lambda: w("orf", norms="sqrt"), r"norms is 'sqrt'; expected one of chi, sqrt_d; nearest: 'sqrt_d'"),
    "qmc-sequence": (lambda: w("qmc", sequence="sobel"), r"sequence is 'sobel'; expected.*nearest: 'sobol'"),
    "qmc-flag": (lambda: w("qmc", scramble="no"), r"scramble is 'no'; expected True or False"),
    "sgq-level": (lambda: w("sgq", level=0), r"level is 0; expected an integer of at least 1"),
    "ssr-degree": (lambda: w("ssr", degree=2), r"degree is 2; expected 1 or 3; nearest: 3"),
    "gq-order": (lambda: w("gq", order=1), r"order is 1.*expected at least 2"),
    "gmm-components": (lambda: w("gmm", num_components=0), r"num_components is 0; expected an integer of at least 1"),
    "bbq-knots": (lambda: w("bbq", num_knots=1), r"num_knots is 1.*at least 2"),
    "simrf-dim": (lambda: make(weight="simrf", head_dim=1), r"head_dim is 1; a simplex needs at least 2"),
    "sobol-dim": (lambda: make(weight="qmc", head_dim=10**6), r"head_dim is 1000000; Sobol points have at most \d+"),
    "gerf-sign": (lambda: f("gerf", sign=0), r"sign is 0; expected 1 \(positive features\) or -1"),
    "gerf-eta": (lambda: f("gerf", initial_eta=math.nan), r"initial_eta is nan; expected a finite number"),
    "gerf-eta-text": (lambda: f("gerf", initial_eta="0"), r"initial_eta is '0'; expected a finite number"),
    "cderf-angle": (lambda: f("cderf", angle=math.inf), r"angle is inf; expected a finite number of radians"),
    "cderf-angle-text": (lambda: f("cderf", angle="pi"), r"angle is 'pi'; expected a finite number of radians"),
    "hrf-directions": (lambda: f("hrf", num_directions=0), r"num_directions is 0; expected an integer of at least 1"),
    "generator-device": (
        lambda: WEIGHTS["mc"](4, 8, generator=type("Fake", (), {"device": torch.device("cuda")})()),
        r"generator is on cuda; expected a CPU generator",
    ),
    # Data-dependent parameters, states, names.
    "heads-of-map": (lambda: attend(fm=make(num_heads=3)), r"key has 2 heads, but .*was made for num_heads=3"),
    "causal-batch": (lambda: attend(fm=make("oprf", statistics="batch"), is_causal=True), r"OPRF.*the future.*'auto'"),
    "causal-plus": (lambda: attend(fm=make("geomrf+"), is_causal=True), r"GeomRFPlus has no causal form.*or oprf"),
    "calibrate-nothing": (lambda: make().calibrate(x(), x()), r"PosRF without center depends on no statistics"),
    "calibrate-heads": (lambda: make("oprf", num_heads=3).calibrate(x(), x()), r"key has 2 heads.*num_heads=3"),
    "state-none": (lambda: sf.attention_step(*[x()] * 3, make(), None), r"state is NoneType; expected an Attention"),
    "state-batch": (lambda: step(state=begun(b=3)), r"state has .*\(3, 2, 8, 4\); these tokens need \(2, 2, 8, 4\)"),
    "state-values": (lambda: step(state=begun(e=5)), r"\(2, 2, 8, 5\); these tokens need \(2, 2, 8, 4\)"),
    "state-features": (lambda: step(state=begun(m=9)), r"\(2, 2, 9, 4\); these tokens need"),
    "state-signed": (lambda: step(state=begun("trigrf", m=4)), r"another feature map: one has signed"),
    "state-scales": (lambda: step(fm=make("poisrf"), state=begun("trigrf", m=4)), r"state belongs to another"),
    "state-device": (lambda: step(state=begun(device="meta")), r"state is on meta but key is on cpu"),
    "state-double": (lambda: step(state=begun(dtype=torch.float64)), r"state .*float64"),
    "step-causal-lengths": (
        lambda: sf.attention_step(x(n=2), x(), x(), make(), make().init_state(B, H, D)),
        r"2 queries and 6 keys",
    ),
    "init-batch": (lambda: make().init_state(-1, H, D), r"batch is -1; expected an integer of at least 0"),
    "init-heads": (lambda: make().init_state(B, 2.0, D), r"num_heads is 2.0; expected an integer of at least 0"),
    "init-values": (lambda: make().init_state(B, H, None), r"value_dim is None; expected an integer of at least 0"),
    "init-other-heads": (lambda: make(num_heads=3).init_state(B, H, D), r"num_heads is 2.*num_heads=3"),
    "init-dtype": (lambda: begun(dtype=torch.float16), r"dtype is torch.float16; expected float32 or"),
    "variant-no-dash": (lambda: sf.parse_variant("oprf"), r"variant is 'oprf'; expected 'component-weight'"),
    "variant-half": (lambda: sf.parse_variant("oprf-"), r"variant is 'oprf-'; expected 'component-weight'"),
    "variant-none": (lambda: sf.parse_variant(None), r"variant is None; expected 'component-weight', for example"),
    "variant-component": (lambda: sf.parse_variant("opfr-orf"), r"unknown component function 'opfr'.*did you mean"),
    "variant-weight": (lambda: sf.parse_variant("oprf-orfs"), r"unknown weight matrix 'orfs'.*did you mean 'orf'"),
    # Landmark attention.
    "landmarks-backend": (lambda: landmarks(backend="cuda"), r"backend is 'cuda'; expected one of auto, triton"),
    "landmarks-refused": (lambda: landmarks(v=x(d=64), backend="cpu"), r"'cpu' cannot run here.*value dim 64.*'auto'"),
    "landmarks-dim": (lambda: landmarks(k=x(d=3)), r"head dim"),
    "landmarks-groups": (lambda: landmarks(q=x(h=3)), r"3 heads, which is not a multiple of the key's 2"),
    # The module.
    "module-heads": (lambda: sf.RandomFeatureAttention(8, 3), r"embed_dim is 8; expected a multiple of num_heads=3"),
    "module-embed-0": (lambda: sf.RandomFeatureAttention(0, 1), r"embed_dim is 0; expected an integer of at least 1"),
    "module-kdim": (lambda: sf.RandomFeatureAttention(8, 2, kdim=0), r"kdim is 0; expected an integer of at least 1"),
    "module-dropout": (lambda: sf.RandomFeatureAttention(8, 2, dropout=1), r"dropout is 1; expected a probability"),
    "module-scale": (lambda: module(scale=-2), r"scale is -2; expected a positive finite number"),
    "module-backend": (lambda: module(backend="gpu"), r"backend is 'gpu'; expected one of"),
    "module-query-dim": (lambda: module(y(d=7)), r"query has dimension 7; expected 8"),
    "module-key-dim": (lambda: module(y(), y(d=7)), r"key has dimension 7; expected 8"),
    "module-query-none": (lambda: module(None), r"query is NoneType.*expected \(batch"),
    "module-4d": (lambda: module(x(d=8)), r"query is \(2, 2, 6, 8\) float32; expected \(batch, tokens, 8\)"),
    "module-unbatched-mix": (lambda: module(y(), y()[0]), r"key is not batched as query is"),
    "module-batch-second": (
        lambda: sf.RandomFeatureAttention(8, 2)(y().transpose(0, 1), *[y(b=3).transpose(0, 1)] * 2),
        r"batch sizes 2, 3 and 3.*unless batch_first=True",
    ),
    "module-batch": (lambda: module(y(), y(b=3)), r"batch sizes 2, 3 and 3; expected them equal"),
    "module-value-tokens": (lambda: module(y(), y(), y(n=5)), r"key has 6 tokens but value has 5"),
    "module-causal-lengths": (lambda: module(y(n=3), y(), is_causal=True), r"3 queries and 6"),
    "module-double": (lambda: module(y().double()), r"query has dtype torch.float64"),
    "module-int": (lambda: module(y().long()), r"query has dtype torch.int64"),
    "module-sparse": (lambda: module(y().to_sparse()), r"query is a .*sparse tensor"),
    "module-meta": (lambda: module(y().to("meta")), r"query is on meta"),
    "module-mask-shape": (lambda: module(padding=mask(n=5)), r"\(2, 5\) bool; expected \(batch, tokens\) = \(2, 6\)"),
    "module-mask-int": (lambda: module(padding=mask().long()), r"dtype torch.int64; expected bool \(True is padding\)"),
    "module-mask-other": (lambda: module(padding=mask().half()), r"has other values.*0 for real tokens, -inf"),
    "module-mask-nan": (lambda: module(padding=mask().half() * math.nan), r"key_padding_mask has NaN"),
    "module-mask-list": (lambda: module(y()[0], padding=[False] * N), r"key_padding_mask is list"),
    "module-attn-mask": (lambda: module(attn_mask=torch.eye(N).bool()), r"neither causal nor empty.*key_padding_mask"),
    "module-attn-bias": (lambda: module(attn_mask=torch.ones(N, N)), r"neither causal nor empty"),
    "module-attn-mask-nan": (lambda: module(attn_mask=torch.ones(N, N) * math.nan), r"attn_mask has NaN"),
    "module-attn-mask-shape": (lambda: module(attn_mask=torch.ones(N, 5)), r"attn_mask is \(6, 5\) .*expected \(6"),
    "module-attn-mask-int": (lambda: module(attn_mask=torch.ones(N, N).long()), r"dtype torch.int64; expected bool"),
    "module-weights": (lambda: module(y(b=1, n=4097), need_weights=True), r"4097 x 4097 weights.*limited to 16777216"),
    "module-nested": (lambda: module(nested([y()[0]]), need_weights=True), r"nested tensors.*pad them"),
    "module-nested-cross": (lambda: module(nested([y()[0]]), nested([y()[0]])), r"nested tensors.*self-attention only"),
    "module-from-map": (lambda: from_torch(make()), r"attention is FeatureMap; expected torch.nn.Multihead"),
}  # fmt: skip


@pytest.mark.parametrize("name", bad)
def test_mistake_is_answered_by_what_was_given_and_what_was_expected(name: str) -> None:
    call, words = bad[name]
    with pytest.raises(ValueError, match="(?s)" + words):
        call()


@pytest.mark.parametrize(
    "options",
    [
        {"key_padding_mask": torch.ones(B, N)},
        {"scale": -1.0},
        {"backend": "troch"},
        {"backend": "cpu", "is_causal": False},
        {"dropout_p": 2.0},
        {"query_padding_mask": mask(n=3)},
        {"k": x(n=5), "v": x(n=5), "is_causal": True},
        {"v": x(n=5)},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("weight", ["mc", "fastfoodl"])
def test_a_bad_call_leaves_no_trace(options: dict[str, Any], weight: str) -> None:
    """Neither in W, nor in the running moments, nor in the counters: a loop that catches it goes on as before."""
    fm = make("gerf", weight, center=True, redraw_every=1, statistics="running", component_options={"sign": -1}).train()
    x = torch.randn(B, H, N, D)
    for _ in range(2):  # the schedule is under way: the next good pass redraws
        attend(x, x, x, fm, is_causal=True)
    before = copy.deepcopy((fm.state_dict(), dict(fm.named_buffers())))
    with pytest.raises(ValueError):
        attend(fm=fm, **({"is_causal": True} | options))
    for held, now in zip(before, (fm.state_dict(), dict(fm.named_buffers())), strict=True):
        assert held.keys() == now.keys()
        for name in held:
            assert torch.equal(held[name], now[name]), name
