"""The contract of a weight matrix and of a component function, as checks that anybody can run on their own.

::

    from spectraformer.testing import check_component, check_weight

    check_weight(MyWeight)         # raises ContractError, which says in words what is broken
    print(check_component(MyFunction))

Every check runs, so that one call shows everything there is to mend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectraformer.attention import random_feature_attention
from spectraformer.components import ComponentFunction, Exponential
from spectraformer.features import FeatureMap
from spectraformer.registry import refusal
from spectraformer.weights import WEIGHTS
from spectraformer.weights.base import Projection, WeightMatrix

# One false alarm in 150 000 tests of a standard normal z.
MAX_Z = 4.5
# Some rules integrate low degrees exactly in every draw: what is left is rounding, alike in all of them.
ROUNDING = 1e-6
SHAPES = ((16, 24), (12, 20), (6, 5))


class ContractError(AssertionError):
    """A weight matrix or component function breaks its contract; the message lists how."""


@dataclass
class Report:
    """What a contract check found.

    Attributes:
        subject: Name of what was checked.
        passed: Checks that hold, in words.
        failed: Checks that do not, each with what was found.
    """

    subject: str
    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def expect(self, holds: bool, claim: str, found: str = "") -> None:
        """Records one check."""
        (self.passed if holds else self.failed).append(claim if holds or not found else f"{claim}; found {found}")

    def attempt(self, claim: str, check: Callable[[], None]) -> None:
        """Runs checks that may raise; an exception is a failure of ``claim``, not the end of the report."""
        try:
            check()
        except Exception as error:
            self.failed.append(f"{claim}; raised {type(error).__name__}: {error}")

    def __str__(self) -> str:
        lines = [f"{self.subject}: {len(self.passed)} checks passed, {len(self.failed)} failed"]
        return "\n".join(
            lines + [f"  FAILED  {text}" for text in self.failed] + [f"  passed  {x}" for x in self.passed]
        )

    def verdict(self) -> Report:
        """The report itself, or ``ContractError`` if anything failed."""
        if self.failed:
            raise ContractError(str(self))
        return self


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _name(factory: object) -> str:
    return getattr(factory, "__name__", type(factory).__name__)


def z_score(samples: Tensor, expected: float) -> float:
    """(mean - expected) / standard error of independent samples, (n,); rounding of float32 counts as error."""
    samples = samples.detach().double()
    error = samples.std() / math.sqrt(samples.numel())
    return float((samples.mean() - expected) / error.clamp_min(ROUNDING * max(1.0, abs(expected))))


# -- weight matrices -----------------------------------------------------------------------------------------


def check_weight(factory: Callable[..., WeightMatrix], *, draws: int = 2000, seed: int = 0) -> Report:
    """Checks everything a weight matrix promises.

    Shapes and finiteness at several sizes, shared and per head; seeds and redraws; ``state_dict``; gradients of
    learned parameters; the moments of rows that claim to be Gaussian; Gaussian means without bias where the claim is
    "unbiased", by a z-score over ``draws`` independent W; finite attention at large norms.

    Args:
        factory: Called as ``factory(head_dim, num_features, num_heads=..., generator=...)``.
        draws: Independent W for the statistical checks.
        seed: Seed of all of it.

    Returns:
        What was checked.

    Raises:
        ContractError: If anything failed; the message says what in words.
    """
    report = Report(_name(factory))
    for d, m in SHAPES:
        for heads in (None, 2):
            where = f"head_dim={d}, num_features={m}, num_heads={heads}"
            report.attempt(
                f"can be built and used with {where}",
                lambda d=d, m=m, heads=heads, where=where: _check_shapes(report, factory, d, m, heads, where, seed),  # type: ignore[misc]
            )
    report.attempt("is a function of its generator alone", lambda: _check_seeds(report, factory, seed))
    report.attempt("redraws in place", lambda: _check_redraw(report, factory, seed))
    report.attempt("survives a state_dict round trip", lambda: _check_state(report, factory, seed))
    report.attempt("has gradients where it claims to learn", lambda: _check_gradients(report, factory, seed))
    report.attempt("has the moments it claims", lambda: _check_moments(report, factory, draws, seed))
    report.attempt("gives finite attention", lambda: _check_weight_stability(report, factory, seed))
    return report.verdict()


def _check_shapes(
    report: Report, factory: Callable[..., WeightMatrix], d: int, m: int, heads: int | None, where: str, seed: int
) -> None:
    weight = factory(d, m, num_heads=heads, generator=_generator(seed))
    report.expect(isinstance(weight, WeightMatrix), f"is a WeightMatrix ({where})", type(weight).__name__)
    made = weight()
    rows = (heads or 1, weight.num_rows)
    report.expect(made.omega.shape == (*rows, d), f"omega is (g, num_rows, d) ({where})", f"{tuple(made.omega.shape)}")
    for name in ("log_abs_weight", "sign_weight"):
        shape = getattr(made, name).shape
        report.expect(shape == rows, f"{name} is (g, num_rows) ({where})", f"{tuple(shape)}, expected {rows}")
    report.expect(bool(made.omega.isfinite().all()), f"omega is finite ({where})")
    report.expect(bool((made.sign_weight.abs() == 1).all()), f"sign_weight is +1 or -1 ({where})")
    negative = bool((made.sign_weight < 0).any())
    report.expect(made.signed == weight.signed, f"Projection.signed equals signed ({where})", f"{made.signed}")
    report.expect(weight.signed or not negative, f"negative weights only where signed is True ({where})")
    total = (made.sign_weight * made.log_abs_weight.exp()).sum(-1)
    exact = bool(torch.allclose(total, torch.ones_like(total), atol=1e-4))
    report.expect(exact, f"the weights a_i sum to 1 ({where})", f"{total.tolist()}")
    if made.uniform is not None:
        inside = bool(((made.uniform > 0) & (made.uniform < 1)).all())
        report.expect(inside and made.uniform.shape == made.omega.shape, f"uniform is in (0, 1), like omega ({where})")


def _same(a: Projection, b: Projection) -> bool:
    return torch.equal(a.omega, b.omega) and torch.equal(a.log_abs_weight, b.log_abs_weight)


def _check_seeds(report: Report, factory: Callable[..., WeightMatrix], seed: int) -> None:
    before = torch.get_rng_state()
    first, again, other = (factory(16, 24, generator=_generator(s)) for s in (seed, seed, seed + 1))
    report.expect(torch.equal(before, torch.get_rng_state()), "draws from its generator only, not from torch's own")
    report.expect(_same(first(), again()), "the same seed gives the same W")
    if first.claim == "unbiased":
        report.expect(not _same(first(), other()), "another seed gives another W")


def _check_redraw(report: Report, factory: Callable[..., WeightMatrix], seed: int) -> None:
    weight = factory(16, 24, generator=_generator(seed))
    before = {name: (x.data_ptr(), x.shape, x.dtype) for name, x in weight.state_dict().items()}
    old = weight().omega.detach().clone()
    weight.redraw(_generator(seed + 1))
    after = {name: (x.data_ptr(), x.shape, x.dtype) for name, x in weight.state_dict().items()}
    report.expect(before == after, "redraw keeps storage, shape and dtype of every buffer")
    if weight.claim == "unbiased":
        report.expect(not torch.equal(old, weight().omega), "redraw changes the rows")


def _check_state(report: Report, factory: Callable[..., WeightMatrix], seed: int) -> None:
    saved, loaded = (factory(16, 24, num_heads=2, generator=_generator(s)) for s in (seed, seed + 1))
    loaded.load_state_dict(saved.state_dict())
    report.expect(_same(saved(), loaded()), "a loaded state_dict gives the same W, bit for bit")


def _check_gradients(report: Report, factory: Callable[..., WeightMatrix], seed: int) -> None:
    weight = factory(16, 24, num_heads=2, generator=_generator(seed))
    parameters = dict(weight.named_parameters())
    report.expect(weight.learned == bool(parameters), "learned is True exactly if there are parameters")
    if not parameters:
        return
    made = weight()
    probe = torch.randn(made.omega.shape, generator=_generator(seed))
    ((made.omega * probe).sum() + (made.log_abs_weight * probe[..., 0]).sum()).backward()  # type: ignore[no-untyped-call]
    for name, parameter in parameters.items():
        reached = parameter.grad is not None and bool(parameter.grad.isfinite().all())
        report.expect(reached, f"a finite gradient reaches parameter {name}")


def _check_moments(report: Report, factory: Callable[..., WeightMatrix], draws: int, seed: int) -> None:
    d = 16
    if factory(d, 24, generator=_generator(seed)).claim != "unbiased":
        return
    weight = factory(d, 24, num_heads=draws, generator=_generator(seed))
    made = weight()
    weights = (made.sign_weight * made.log_abs_weight.exp()).double()
    directions = {
        "an axis": torch.eye(d)[0],
        "the diagonal": torch.ones(d) / math.sqrt(d),
        "a random direction": torch.nn.functional.normalize(torch.randn(d, generator=_generator(seed)), dim=0),
    }
    for where, direction in directions.items():
        dot = (made.omega.detach() @ direction.to(made.omega.dtype)).double()
        for text, values, expected in (
            ("E sum a_i exp(omega_i . z) = exp(1/2)", dot.exp(), math.exp(0.5)),
            ("E sum a_i cos(omega_i . z) = exp(-1/2)", dot.cos(), math.exp(-0.5)),
            ("E sum a_i (omega_i . z)^2 = 1", dot.square(), 1.0),
        ):
            z = z_score((weights * values).sum(-1).detach(), expected)
            report.expect(abs(z) < MAX_Z, f"{text} along {where} of length 1, |z| < {MAX_Z}", f"z = {z:.1f}")
    if weight.gaussian_rows and not weight.signed:
        row = made.omega[:, 0].detach()
        for text, values, expected in (
            ("the first row has mean 0", row[:, 0], 0.0),
            ("the first row has E |omega|^2 = d", row.square().sum(-1), float(d)),
            ("the first row has E omega_1^4 = 3", row[:, 0].pow(4), 3.0),
        ):
            z = z_score(values, expected)
            report.expect(abs(z) < MAX_Z, f"{text}, |z| < {MAX_Z}", f"z = {z:.1f}")


def _check_weight_stability(report: Report, factory: Callable[..., WeightMatrix], seed: int) -> None:
    weight = factory(16, 24, generator=_generator(seed))
    q, k, v = _tokens(16, 32, 100.0 if not weight.signed else 1.0, seed)
    out = random_feature_attention(q, k, v, FeatureMap(16, 24, "posrf", weight))
    report.expect(bool(out.isfinite().all()), "posrf attention with it is finite")


# -- component functions -------------------------------------------------------------------------------------


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
    report = Report(_name(factory))
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


def _tokens(d: int, n: int, norm: float, seed: int, batch: int = 1, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys of the given root mean square norm after scaling, and values, (batch, heads, n, d)."""
    generator = _generator(seed)
    x, y, v = (torch.randn(batch, heads, n, d, generator=generator) for _ in range(3))
    size = norm * d**0.25 / math.sqrt(d)
    return x * size, y * size, v


def _map(factory: Callable[..., ComponentFunction], seed: int, d: int = 16, m: int = 24) -> FeatureMap:
    component = factory(d, num_heads=2, generator=_generator(seed))
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
    return (scores @ v) / scores.sum(-1, keepdim=True)


def _has_causal_form(feature_map: FeatureMap) -> bool:
    return not feature_map.component.needs_minimum


def _check_features(report: Report, factory: Callable[..., ComponentFunction], seed: int) -> None:
    feature_map = _map(factory, seed)
    q, k, _ = _tokens(16, 9, 1.0, seed)
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
    q, k, v = (x.double() for x in _tokens(16, 40, 0.7, seed))
    for causal in (False, True):
        if causal and not _has_causal_form(feature_map):
            continue
        out = random_feature_attention(q, k, v, feature_map, is_causal=causal)
        error = float(((out - _oracle(feature_map, q, k, v, causal)).norm() / out.norm()).detach())
        text = "causal attention" if causal else "attention"
        report.expect(error < 1e-9, f"{text} equals that of the explicit features in float64", f"error {error:.1e}")


def _check_independence(report: Report, factory: Callable[..., ComponentFunction], seed: int) -> None:
    feature_map = _map(factory, seed).double()
    q, k, v = (x.double() for x in _tokens(16, 20, 0.7, seed, batch=2))
    both = random_feature_attention(q, k, v, feature_map)
    alone = random_feature_attention(q[:1], k[:1], v[:1], feature_map)
    report.expect(torch.allclose(both[:1], alone, atol=1e-9), "another batch item changes nothing")
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[:, 15:] = False
    padded = random_feature_attention(q, k, v, feature_map, key_padding_mask=mask)[:, :, :15]
    cut = random_feature_attention(*(x[:, :, :15] for x in (q, k, v)), feature_map)
    report.expect(torch.allclose(padded, cut, atol=1e-9), "padding changes nothing: padded equals truncated")
    if _has_causal_form(feature_map):
        whole = random_feature_attention(q, k, v, feature_map, is_causal=True)[:, :, :15]
        early = random_feature_attention(*(x[:, :, :15] for x in (q, k, v)), feature_map, is_causal=True)
        report.expect(torch.allclose(whole, early, atol=1e-9), "causal output does not depend on later tokens")


def _check_component_state(report: Report, factory: Callable[..., ComponentFunction], seed: int) -> None:
    before = torch.get_rng_state()
    saved, again, other = (factory(16, num_heads=2, generator=_generator(s)) for s in (seed, seed, seed + 1))
    report.expect(torch.equal(before, torch.get_rng_state()), "draws from its generator only, not from torch's own")
    pairs = zip(saved.state_dict().values(), again.state_dict().values(), strict=True)
    report.expect(all(torch.equal(a, b) for a, b in pairs), "the same seed gives the same state")
    other.load_state_dict(saved.state_dict())
    q, k, v = _tokens(16, 12, 0.7, seed)
    outputs = []
    for component in (saved, other):
        feature_map = FeatureMap(16, 24, component, "orf", num_heads=2, seed=seed).eval()
        outputs.append(random_feature_attention(q, k, v, feature_map))
    report.expect(torch.equal(*outputs), "a loaded state_dict gives the same output, bit for bit")


def _check_component_gradients(report: Report, factory: Callable[..., ComponentFunction], seed: int) -> None:
    component = factory(4, num_heads=1, generator=_generator(seed))
    feature_map = FeatureMap(4, 6, component, "mc", num_heads=1, seed=seed).double().eval()
    if component.data_dependent:
        # The parameters are detached: hold them still, as running moments in causal attention do.
        causal = _has_causal_form(feature_map)
    else:
        causal = True
    inputs = [x.double().requires_grad_() for x in _tokens(4, 5, 0.7, seed, heads=1)]
    if causal:
        exact = torch.autograd.gradcheck(
            lambda *x: random_feature_attention(*x, feature_map, is_causal=True), inputs, raise_exception=False
        )
        report.expect(exact, "gradients of queries, keys and values agree with finite differences")
    random_feature_attention(*inputs, feature_map).square().sum().backward()  # type: ignore[no-untyped-call]
    for name, tensor in (*zip(("query", "key", "value"), inputs, strict=True), *component.named_parameters()):
        reached = tensor.grad is not None and bool(tensor.grad.isfinite().all())
        report.expect(reached, f"a finite gradient reaches {name}")


def _check_component_stability(report: Report, factory: Callable[..., ComponentFunction], seed: int) -> None:
    feature_map = _map(factory, seed, d=16, m=64)
    norm = 100.0 if feature_map.positive else 1.0
    q, k, v = _tokens(16, 64, norm, seed)
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
    weight = WEIGHTS["mc"](d, m, num_heads=draws, generator=_generator(seed))
    component = factory(d, num_heads=draws, generator=_generator(seed))
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
