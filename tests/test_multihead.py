"""RandomFeatureAttention in the place of nn.MultiheadAttention: arguments, weights, masks, limits and training."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import spectraformer as sf

B, N, S, E, H = 2, 5, 7, 16, 4
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "kdim-vdim": {"kdim": 6, "vdim": 10},
    "kdim": {"kdim": 6, "bias": False},
    "bias-kv": {"add_bias_kv": True},
    "zero-attn": {"add_zero_attn": True},
    "bias-kv-zero-attn": {"add_bias_kv": True, "add_zero_attn": True, "vdim": 6},
    "batch-second": {"batch_first": False, "add_bias_kv": True},
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def pair(
    config: dict[str, Any] | None = None, **options: Any
) -> tuple[nn.MultiheadAttention, sf.RandomFeatureAttention]:
    """Torch's module in float64, its biases away from 0, and ours with its weights."""
    exact = nn.MultiheadAttention(E, H, **{"batch_first": True, "dtype": torch.float64} | (config or {}))
    for parameter in exact.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    return exact, sf.RandomFeatureAttention.from_multihead_attention(exact, **options)


def inputs(attention: nn.MultiheadAttention, n: int = N, s: int = S) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens whose projections are short: |x + y|^2 is about 1/2, where a few features estimate the kernel well."""
    sizes = ((n, E), (s, attention.kdim), (s, attention.vdim))
    q, k, v = (
        torch.randn(B, tokens, dim, dtype=torch.float64) / (dim**0.5 if dim < E else 2.0) for tokens, dim in sizes
    )
    return (q, k, v) if attention.batch_first else (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))


def small(component: str = "oprf", **options: Any) -> sf.RandomFeatureAttention:
    return sf.RandomFeatureAttention(8, 2, batch_first=True, num_features=16, component=component, **options)


# -- the same module from outside ----------------------------------------------------------------------------


def test_takes_every_argument_of_torch_in_its_place() -> None:
    for method in ("__init__", "forward"):
        theirs = list(inspect.signature(getattr(nn.MultiheadAttention, method)).parameters.values())
        ours = list(inspect.signature(getattr(sf.RandomFeatureAttention, method)).parameters.values())
        assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
        # Weights cost the n x s that the module is there to avoid, so they are not the default.
        same = [p for p in theirs if p.name != "need_weights"]
        assert [p.default for p in ours if p.name in {x.name for x in same}] == [p.default for p in same]
        assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in ours[len(theirs) :])


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_takes_over_weights_and_mode(config: dict[str, Any], dtype: torch.dtype) -> None:
    exact, _ = pair(config | {"dtype": dtype, "dropout": 0.25})
    exact.eval()
    before = copy.deepcopy(exact.state_dict())
    ours = sf.RandomFeatureAttention.from_multihead_attention(exact)
    held = ours.state_dict()
    assert not ours.training and ours.dropout == 0.25 and ours.batch_first == exact.batch_first
    assert set(held) - set(before) == {name for name in held if name.startswith("feature_map.")}
    for name, value in before.items():
        assert torch.equal(held[name], value) and held[name].dtype == dtype
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in exact.state_dict().items())


def forms() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Arguments for torch, and for ours where they may differ: torch wants its causal mask in any case."""
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, -2:] = padding[1, :3] = True
    minus = torch.zeros(B, S, dtype=torch.float64).masked_fill(padding, -math.inf)
    future = torch.ones(S, S, dtype=torch.bool).triu(1)
    both = {"attn_mask": future, "key_padding_mask": padding & ~padding[:, :1]}
    return {
        "all": ({}, {}),
        "bool-padding": ({"key_padding_mask": padding}, {"key_padding_mask": padding}),
        "float-padding": ({"key_padding_mask": minus}, {"key_padding_mask": minus}),
        "causal": ({"attn_mask": future}, {"is_causal": True}),
        "causal-mask": ({"attn_mask": future}, {"attn_mask": minus.new_zeros(S, S).masked_fill(future, -math.inf)}),
        "causal-mask-of-heads": ({"attn_mask": future}, {"attn_mask": future.expand(B * H, S, S)}),
        "causal-padding": (both, both),
        "unbatched": ({}, {}),
        "unbatched-padding": ({"key_padding_mask": padding[0]}, {"key_padding_mask": padding[0]}),
    }


@every_config
@pytest.mark.parametrize("form", forms())
def test_approaches_softmax_attention_as_features_grow(config: dict[str, Any], form: str) -> None:
    """The relative error of a weight is sqrt((e^{|x+y|^2} - 1) / m): 64 times the features, an eighth of the error.

    So any difference that does not vanish, such as a mask or a bias gone astray, shows. The error of eight draws with
    a W for each head is known to a fifth; a wrong mask would be an error of 0.02 at least.
    """
    exact, _ = pair(config)
    theirs, ours = forms()[form]
    q, k, v = inputs(exact, S if "causal" in form else N)
    if form.startswith("unbatched"):
        q, k, v = (x[0] if exact.batch_first else x[:, 0] for x in (q, k, v))
    expected, _ = exact(q, k, v, need_weights=False, **theirs)
    errors = []
    for m in (64, 4096):
        options = {"num_features": m, "component": "posrf", "weight": "mc", "share_weight": False}
        made = [sf.RandomFeatureAttention.from_multihead_attention(exact, seed=seed, **options) for seed in range(8)]
        outputs = [module(q, k, v, **ours) for module in made]
        assert all(out.shape == expected.shape and weights is None for out, weights in outputs)
        errors.append(torch.stack([out - expected for out, _ in outputs]).square().mean().sqrt())
    assert errors[1] < errors[0] / 4
    assert errors[1] < 0.01


@every_config
@pytest.mark.parametrize("is_causal", [False, True])
def test_weights_sum_to_one_and_make_the_output(config: dict[str, Any], is_causal: bool) -> None:
    exact, ours = pair(config, num_features=4096, component="posrf")
    q, k, v = inputs(exact, S if is_causal else N)
    mask = torch.ones(S, S, dtype=torch.bool).triu(1) if is_causal else None
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, -2:] = True
    arguments = {"attn_mask": mask, "key_padding_mask": padding}
    out, weights = ours(q, k, v, need_weights=True, average_attn_weights=False, **arguments)
    _, mean = ours(q, k, v, need_weights=True, **arguments)
    _, expected = exact(q, k, v, need_weights=True, average_attn_weights=False, **arguments)
    torch.testing.assert_close(ours(q, k, v, **arguments)[0], out)
    torch.testing.assert_close(mean, weights.mean(1))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert not weights[expected == 0].any()
    # Relative errors are of the order of 1 / sqrt(4096); a column in the wrong place differs by all of itself.
    torch.testing.assert_close(weights, expected, rtol=0.3, atol=0.01)

    # Extra keys stand last, as torch has them: the learned one, then the zero.
    value = linear(v if exact.batch_first else v.transpose(0, 1), *value_projection(exact))
    if exact.bias_v is not None:
        value = torch.cat((value, exact.bias_v.expand(B, 1, E)), 1)
    if exact.add_zero_attn:
        value = torch.cat((value, value.new_zeros(B, 1, E)), 1)
    heads = value.unflatten(-1, (H, -1)).transpose(1, 2)
    again = exact.out_proj((weights @ heads).transpose(1, 2).flatten(2))
    torch.testing.assert_close(again if exact.batch_first else again.transpose(0, 1), out)


def value_projection(exact: nn.MultiheadAttention) -> tuple[Tensor, Tensor | None]:
    weight = exact.v_proj_weight if exact.in_proj_weight is None else exact.in_proj_weight[-E:]
    return weight, None if exact.in_proj_bias is None else exact.in_proj_bias[-E:]


@every_config
def test_autocast_is_taken_as_torch_takes_it(config: dict[str, Any]) -> None:
    exact, ours = pair(config | {"dtype": torch.float32}, num_features=1024)
    q, k, v = (x.float() for x in inputs(exact))
    with torch.autocast("cpu", torch.bfloat16):
        expected, out = exact(q, k, v, need_weights=False)[0], ours(q, k, v)[0]
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), ours(q, k, v)[0], rtol=0.03, atol=0.03)


# -- its own state -------------------------------------------------------------------------------------------


def test_dropout_is_right_on_average_and_off_in_evaluation() -> None:
    """The value of a key is dropped for all queries: the same sequence 4000 times has 4000 draws."""
    attention = small(dropout=0.4).double().train()
    x = torch.randn(1, 6, 8, dtype=torch.float64).expand(4000, -1, -1)
    draws, _ = attention(x, x, x)
    kept, _ = attention.eval()(x, x, x)
    assert torch.equal(kept, attention(x, x, x)[0])
    error = draws.std(0) / math.sqrt(len(draws))
    assert error.min() > 0
    assert ((draws.mean(0) - kept[0]) / error).abs().max() < 4.5


@pytest.mark.parametrize("weight", ["orf", "ssr", "fastfoodl"])
@pytest.mark.parametrize("component", ["oprf", "hrf", "gerf"])
def test_state_dict_copies_and_dtypes_keep_the_function(component: str, weight: str) -> None:
    attention = small(component, weight=weight, add_bias_kv=True, redraw_every=2).train()
    x = torch.randn(B, N, 8) / 4
    for _ in range(4):
        attention(x, x, x, is_causal=True)
    out, _ = attention.eval()(x, x, x, is_causal=True)
    other = small(component, weight=weight, add_bias_kv=True, seed=1).eval()
    assert not torch.equal(other(x, x, x, is_causal=True)[0], out)
    other.load_state_dict(attention.state_dict())
    for same in (other, copy.deepcopy(attention)):
        assert torch.equal(same(x, x, x, is_causal=True)[0], out)
    wide, narrow = copy.deepcopy(attention).double(), copy.deepcopy(attention).bfloat16()
    torch.testing.assert_close(wide(*[x.double()] * 3, is_causal=True)[0], out.double(), rtol=1e-4, atol=1e-5)
    assert narrow(*[x.bfloat16()] * 3)[0].dtype == torch.bfloat16


def test_one_seed_gives_one_map_whatever_torch_has_drawn() -> None:
    """Ranks of a job differ in their random states; their features must not."""
    maps = []
    for rank in range(2):
        torch.manual_seed(rank)
        attention = small("hrf", redraw_every=1).train()
        for _ in range(3):
            attention(*[torch.randn(B, N, 8)] * 3)
        maps.append(attention.feature_map.state_dict())
    assert all(torch.equal(value, maps[1][name]) for name, value in maps[0].items())
    other = small("hrf", seed=1).feature_map.state_dict()
    assert not torch.equal(maps[0]["weight.omega"], other["weight.omega"])


# -- in torch's transformer ------------------------------------------------------------------------------------


class Counting(sf.RandomFeatureAttention):
    """Forward hooks would turn torch's fast path off, which is what the tests must meet."""

    calls = 0

    def forward(self, *args: Any, **options: Any) -> Any:
        Counting.calls += 1
        return super().forward(*args, **options)


def swapped(layer: nn.Module, **options: Any) -> nn.Module:
    for name, child in layer.named_children():
        if isinstance(child, nn.MultiheadAttention):
            setattr(layer, name, Counting.from_multihead_attention(child, **options))
    return layer


@pytest.mark.parametrize("nested", ["refused", "layers-swapped-later", "off"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_fast_path_of_the_encoder_does_not_pass_it_by(nested: str) -> None:
    """In evaluation torch computes softmax from the weights of a layer's self_attn, and makes padded input nested."""
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True).eval()
    x = torch.randn(B, S, E)
    padding = torch.arange(S) >= torch.tensor([[S], [4]])
    if nested == "layers-swapped-later":
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
        for each in encoder.layers:
            swapped(each)
    else:
        encoder = nn.TransformerEncoder(swapped(layer), 2, enable_nested_tensor=nested == "refused").eval()
    Counting.calls = 0
    out = encoder(x, src_key_padding_mask=padding)
    single = layer(x, src_key_padding_mask=padding) if nested != "layers-swapped-later" else None
    assert Counting.calls == 2 + (single is not None)
    torch.testing.assert_close(out[1:, :4], encoder(x[1:, :4]))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch.testing.assert_close(out[~padding], encoder(x, src_key_padding_mask=padding)[~padding])
        assert single is None or torch.allclose(single, layer(x, src_key_padding_mask=padding), atol=1e-5)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("training", [False, True])
def test_decoder_layer_decodes(training: bool) -> None:
    """Self- and cross-attention swapped: near the softmax layer with many features, deaf to padding and the future."""
    layer = nn.TransformerDecoderLayer(E, H, 32, 0.0, batch_first=True, dtype=torch.float64).train(training)
    x, memory = (torch.randn(B, n, E, dtype=torch.float64) for n in (N, S))
    padding = (torch.arange(S) >= 5).expand(B, S)
    arguments = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(N, dtype=torch.float64),
        "tgt_is_causal": True,
        "memory_key_padding_mask": padding,
    }
    expected = layer(x, memory, **arguments)
    Counting.calls = 0
    ours = swapped(layer, num_features=16384, component="posrf")
    out = ours(x, memory, **arguments)
    assert Counting.calls == 2
    assert (out - expected).square().mean().sqrt() < 0.05
    garbage = memory.masked_fill(padding.unsqueeze(-1), math.nan)
    torch.testing.assert_close(ours(x, garbage, **arguments), out)
    x[:, 3:] += 1
    torch.testing.assert_close(ours(x, memory, **arguments)[:, :3], out[:, :3])


# -- training ------------------------------------------------------------------------------------------------


def rows(attention: sf.RandomFeatureAttention) -> Tensor:
    return attention.feature_map.weight().omega.detach().clone()


def test_redraws_on_schedule_and_in_training_only() -> None:
    attention = small(redraw_every=3)
    x = torch.randn(B, N, 8)
    drawn = []
    for step in range(7):
        attention.train()(x, x, x)
        drawn.append(rows(attention))
        attention.eval()
        first, second = attention(x, x, x)[0], attention(x, x, x)[0]
        assert torch.equal(first, second) and torch.equal(rows(attention), drawn[step])
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(drawn)]
    assert changed == [False, False, True, False, False, True]


@pytest.mark.parametrize("component", ["oprf", "hrf"])
def test_a_resumed_run_draws_what_an_uninterrupted_one_does(component: str) -> None:
    """Counters, W, the randomness of f and the running moments are all in the state_dict."""
    x = torch.randn(12, B, N, 8)

    def run(attention: sf.RandomFeatureAttention, steps: range) -> Tensor:
        attention.train()
        return torch.stack([attention(*[x[i] / 4] * 3, is_causal=True)[0] for i in steps])

    whole = small(component, redraw_every=3)
    stopped = copy.deepcopy(whole)
    expected = run(whole, range(12))[5:]
    run(stopped, range(5))
    resumed = small(component, redraw_every=3)
    resumed.load_state_dict(stopped.state_dict())
    assert torch.equal(run(resumed, range(5, 12)), expected)


@pytest.mark.parametrize("component", ["oprf", "trigrf", "posrf", "sderf"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_is_exact(use_reentrant: bool, is_causal: bool, component: str) -> None:
    """A recomputed pass must see the W and the moments of the first, and counts for nothing."""
    attention = small(component, redraw_every=1, center=True).train()
    again = copy.deepcopy(attention)

    def attend(module: nn.Module, x: Tensor) -> Tensor:
        return module(x, x, x, is_causal=is_causal)[0]

    for batch in torch.randn(4, B, N, 8).split(1):
        plain, recomputed = (batch.clone().requires_grad_() for _ in range(2))
        sum(attend(attention, y).square().sum() for y in plain).backward()
        run = functools.partial(checkpoint, functools.partial(attend, again), use_reentrant=use_reentrant)
        sum(run(y).square().sum() for y in recomputed).backward()
        torch.testing.assert_close(recomputed.grad, plain.grad)
    for expected, found in zip(attention.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    for held, found in zip(attention.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(found, held)
    assert torch.equal(attention.feature_map.unsafe_denominators, again.feature_map.unsafe_denominators)


@pytest.mark.parametrize("component", sf.COMPONENTS)
def test_two_passes_before_one_backward(component: str) -> None:
    """As in accumulated losses and siamese models: a redraw must not change what the first pass saved."""
    attention = small(component, redraw_every=1).train()
    sum(attention(y, y, y)[0].sum() for y in torch.randn(2, B, N, 8) / 4).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in attention.parameters())


@pytest.mark.parametrize("component", ["oprf", "sderf", "aderf", "saderf", "poisrf", "posrf"])
@pytest.mark.parametrize("t", [2, 4])
def test_running_moments_never_show_the_future(component: str, t: int) -> None:
    """In training they are updated by every batch, but only for the batches after it."""
    attention = small(component, center=True, momentum=0.9).train()
    x = torch.randn(3, B, N, 8) / 4
    attention(x[0], x[0], x[0], is_causal=True)
    other = copy.deepcopy(attention)
    changed = x[1].clone()
    changed[:, t:] *= 3
    outputs = [m(y, y, y, is_causal=True)[0][:, :t] for m, y in ((attention, x[1]), (other, changed))]
    torch.testing.assert_close(*outputs)
    after = [m(x[2], x[2], x[2], is_causal=True)[0] for m in (attention, other)]
    assert not torch.equal(*after)  # the batch has been taken in


@pytest.mark.parametrize("extra", ["padding", "empty-sequence", "zero-attn"])
def test_running_moments_are_of_real_tokens(extra: str) -> None:
    """Neither padding, nor a sequence of nothing else, nor the queries that stand for extra keys are data."""
    attention, plain = small(add_zero_attn=extra == "zero-attn").train(), small().train()
    plain.load_state_dict(attention.state_dict())
    x = torch.randn(B, N, 8)
    padding = torch.zeros(B, N, dtype=torch.bool)
    if extra != "zero-attn":
        padding[1, 2 if extra == "padding" else 0 :] = True
    attention(x, x, x, key_padding_mask=padding, is_causal=True)
    x, padding = (x[:1], padding[:1]) if extra == "empty-sequence" else (x, padding)
    x = x.masked_fill(padding.unsqueeze(-1), 1e3)
    plain(x, x, x, key_padding_mask=padding, is_causal=True)
    for name in ("query_mean", "query_second"):
        torch.testing.assert_close(*(getattr(m.feature_map.running, name) for m in (attention, plain)))


def test_a_batch_that_overflows_does_not_spoil_the_running_moments() -> None:
    attention = small("oprf").train()
    x = torch.randn(2, N, 8)
    x[1] = math.nan
    attention(x, x, x, is_causal=True)
    assert all(buffer.isfinite().all() for buffer in attention.feature_map.running.buffers())
    assert attention.feature_map.running.updates == 1
    spoiled = x[1:]
    attention(spoiled, spoiled, spoiled, is_causal=True)
    assert attention.feature_map.running.updates == 1
