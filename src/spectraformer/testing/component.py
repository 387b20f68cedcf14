"""The contract of a component function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spectraformer.attention import random_feature_attention
from spectraformer.components import ComponentFunction, Exponential
from spectraformer.features import FeatureMap
from spectraformer.registry import refusal
from spectraformer.testing.report import MAX_Z, Report, name_of, random_tokens, seeded, z_score
from spectraformer.weights import WEIGHTS


def check_component(factory: Callable[..., ComponentFunction], *, draws: int = 2000, seed: int = 0) -> Report:
    """Checks everything a component function promises.

    Feature shapes and signs; unbiasedness for both kernels by a z-score over ``draws`` Gaussian W; agreement of
    attention, causal attention and explicit features; independence of the batch, of padding and of the future;
    seeds, ``state_dict``, gradients of inputs and parameters; stability at large norms.

    Args:
        factory: Called as ``factory(head_dim, num_heads=..., generator=...)``.
        draws: Independent Gaussian W for the statistical check.
        seed: Seed of all of it.

    Returns:
        What was checked.

    Raises:
        ContractError: If anything failed; the message says what in words.
    """
    report = Report(name_of(factory))
    for name, check in (
        ("makes features of the declared number and sign", _check_features),
        ("attends as its explicit features do", _check_attention),
        ("keeps batch items, padding and the future apart", _check_independence),
        ("keeps its state", _check_component_state),
        ("is differentiable", _check_component_gradients),
        ("is stable", _check_component_stability),
    ):
        report.attempt(name, lambda check=check: check(report, factory, seed))  # type: ignore[misc]
    for kernel in ("softmax", "gaussian"):
        report.attempt(
            f"estimates the {kernel} kernel",
            lambda kernel=kernel: _check_unbiased(report, factory, kernel, draws, seed),  # type: ignore[misc]
        )
    return report.verdict()


def _map(factory: Callable[..., ComponentFunction], seed: int, d: int = 16, m: int = 24) -> FeatureMap:
    component = factory(d, num_heads=2, generator=seeded(seed))
    return FeatureMap(d, m, component, "orf", num_heads=2, seed=seed).eval()


def _oracle(feature_map: FeatureMap, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention from the n x s matrix of explicit features, each row with a scale of its own."""
    query, key = feature_map(q, k, is_causal=causal).features()
    exponent = query.log.unsqueeze(-2) + key.log.unsqueeze(-3)
    terms = (exponent - exponent.amax((-1, -2), keepdim=True)).exp()
    if query.sign is not None:
        terms = terms * query.sign.unsqueeze(-2)
    if key.sign is not None:
        terms = terms * key.sign.unsqueeze(-3)
    scores = terms.sum(-1)
    scores = scores.tril() if causal else scores
    out: Tensor = (scores @ v) / scores.sum(-1, keepdim=True)
    return out


def _has_causal_form(feature_map: FeatureMap) -> bool:
    return not feature_map.component.needs_minimum


def _check_features(report: Report, factory: Callable[..., ComponentFunction], seed: int) -> None:
    feature_map = _map(factory, seed)
    q, k, _ = random_tokens(16, 9, 1.0, seed)
    pair = feature_map(q, k)
    query, key = pair.features()
    f = feature_map.feature_dim
    for name, side in (("query", query), ("key", key)):
        shape = tuple(side.dense().shape)
        report.expect(shape == (1, 2, 9, f), f"{name} features are (b, h, n, feature_dim)", f"{shape}, feature_dim {f}")
        report.expect(bool(side.dense().isfinite().all()), f"{name} features are finite at norm 1")
    positive = feature_map.positive
    report.expect(positive == isinstance(pair, Exponential), "positive features are Exponential, others Signed")
    signs = [side.sign for side in (query, key) if side.sign is not None]
    report.expect(not positive or not signs, "positive features have no signs")


def _check_attention(report: Report, factory: Callable[..., ComponentFunction], seed: int) -> None:
    feature_map = _map(factory, seed).double()
    q, k, v = (x.double() for x in random_tokens(16, 40, 0.7, seed))
    for causal in (False, True):
        if causal and not _has_causal_form(feature_map):
            continue
        out = random_feature_attention(q, k, v, feature_map, is_causal=causal)
        error = float(((out - _oracle(feature_map, q, k, v, causal)).norm() / out.norm()).detach())
        text = "causal attention" if causal else "attention"
        report.expect(error < 1e-9, f"{text} equals that of the explicit features in float64", f"error {error:.1e}")


def _check_independence(report: Report, factory: Callable[..., ComponentFunction], seed: int) -> None:
    feature_map = _map(factory, seed).double()
    q, k, v = (x.double() for x in random_tokens(16, 20, 0.7, seed, batch=2))
    both = random_feature_attention(q, k, v, feature_map)
    alone = random_feature_attention(q[:1], k[:1], v[:1], feature_map)
    report.expect(torch.allclose(both[:1], alone, atol=1e-9), "another batch item changes nothing")
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[:, 15:] = False
    padded = random_feature_attention(q, k, v, feature_map, key_padding_mask=mask)[:, :, :15]
    first = [x[:, :, :15] for x in (q, k, v)]
    cut = random_feature_attention(first[0], first[1], first[2], feature_map)
    report.expect(torch.allclose(padded, cut, atol=1e-9), "padding changes nothing: padded equals truncated")
    if _has_causal_form(feature_map):
        whole = random_feature_attention(q, k, v, feature_map, is_causal=True)[:, :, :15]
        early = random_feature_attention(first[0], first[1], first[2], feature_map, is_causal=True)
        report.expect(torch.allclose(whole, early, atol=1e-9), "causal output does not depend on later tokens")


def _check_component_state(report: Report, factory: Callable[..., ComponentFunction], seed: int) -> None:
    before = torch.get_rng_state()
    saved, again, other = (factory(16, num_heads=2, generator=seeded(s)) for s in (seed, seed, seed + 1))
    report.expect(torch.equal(before, torch.get_rng_state()), "draws from its generator only, not from torch's own")
    pairs = zip(saved.state_dict().values(), again.state_dict().values(), strict=True)
    report.expect(all(torch.equal(a, b) for a, b in pairs), "the same seed gives the same state")
    other.load_state_dict(saved.state_dict())
    q, k, v = random_tokens(16, 12, 0.7, seed)
    outputs = []
    for component in (saved, other):
        feature_map = FeatureMap(16, 24, component, "orf", num_heads=2, seed=seed).eval()
        outputs.append(random_feature_attention(q, k, v, feature_map))
    report.expect(torch.equal(*outputs), "a loaded state_dict gives the same output, bit for bit")


def _check_component_gradients(report: Report, factory: Callable[..., ComponentFunction], seed: int) -> None:
    component = factory(4, num_heads=1, generator=seeded(seed))
    feature_map = FeatureMap(4, 6, component, "mc", num_heads=1, seed=seed).double().eval()
    inputs = [x.double().requires_grad_() for x in random_tokens(4, 5, 0.7, seed, heads=1)]
    # Fitted parameters are detached: causal attention holds them still, and finite differences then apply.
    if _has_causal_form(feature_map):
        exact = torch.autograd.gradcheck(
            lambda q, k, v: random_feature_attention(q, k, v, feature_map, is_causal=True),
            inputs,
            raise_exception=False,
        )
        report.expect(exact, "gradients of queries, keys and values agree with finite differences")
    q, k, v = inputs
    random_feature_attention(q, k, v, feature_map).square().sum().backward()  # type: ignore[no-untyped-call]
    for name, tensor in (*zip(("query", "key", "value"), inputs, strict=True), *component.named_parameters()):
        reached = tensor.grad is not None and bool(tensor.grad.isfinite().all())
        report.expect(reached, f"a finite gradient reaches {name}")


def _check_component_stability(report: Report, factory: Callable[..., ComponentFunction], seed: int) -> None:
    feature_map = _map(factory, seed, d=16, m=64)
    norm = 100.0 if feature_map.positive else 1.0
    q, k, v = random_tokens(16, 64, norm, seed)
    out = random_feature_attention(q, k, v, feature_map)
    report.expect(bool(out.isfinite().all()), f"attention is finite at norm {norm:g}")
    if feature_map.positive:
        low, high = v.amin(-2, keepdim=True), v.amax(-2, keepdim=True)
        inside = bool(((out >= low - 1e-4) & (out <= high + 1e-4)).all())
        report.expect(inside, f"positive features: output lies between the least and largest value at norm {norm:g}")


def _check_unbiased(
    report: Report, factory: Callable[..., ComponentFunction], kernel: str, draws: int, seed: int
) -> None:
    d, m = 8, 16
    # One W a head: as many independent estimates as heads, in one call.
    weight = WEIGHTS["mc"](d, m, num_heads=draws, generator=seeded(seed))
    component = factory(d, num_heads=draws, generator=seeded(seed))
    if refusal(component, weight) is not None:
        raise ValueError("is refused with Gaussian rows")
    feature_map = FeatureMap(d, m, component, weight, num_heads=draws, kernel=kernel).eval()  # type: ignore[arg-type]
    x = torch.zeros(1, 1, 3, d)
    x[0, 0, 0, 0], x[0, 0, 1, 1], x[0, 0, 2, 2] = 0.8, 0.5, 0.6
    y = torch.zeros(1, 1, 3, d)
    y[0, 0, 0, :2], y[0, 0, 1, 2:4], y[0, 0, 2, 0] = 0.5, 0.4, 0.3
    phi_q, phi_k = feature_map.features(x.expand(1, draws, 3, d), y.expand(1, draws, 3, d), scale=1.0)
    estimate = (phi_q[0, :, 0] * phi_k[0, :, 0]).double().sum(-1).detach()
    a, b = x[0, 0, 0].double(), y[0, 0, 0].double()
    exact = float((a @ b).exp() if kernel == "softmax" else (-0.5 * (a - b).square().sum()).exp())
    z = z_score(estimate / exact, 1.0)
    report.expect(abs(z) < MAX_Z, f"E phi(q) . phi(k) is the {kernel} kernel, |z| < {MAX_Z}", f"z = {z:.1f}")
