"""The contract of a weight matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from spectraformer.attention import random_feature_attention
from spectraformer.features import FeatureMap
from spectraformer.testing.report import MAX_Z, Report, name_of, random_tokens, seeded, z_score
from spectraformer.weights.base import Projection, WeightMatrix

SHAPES = ((16, 24), (12, 20), (6, 5))


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
    report = Report(name_of(factory))
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
    weight = factory(d, m, num_heads=heads, generator=seeded(seed))
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
    first, again, other = (factory(16, 24, generator=seeded(s)) for s in (seed, seed, seed + 1))
    report.expect(torch.equal(before, torch.get_rng_state()), "draws from its generator only, not from torch's own")
    report.expect(_same(first(), again()), "the same seed gives the same W")
    if first.claim == "unbiased":
        report.expect(not _same(first(), other()), "another seed gives another W")


def _check_redraw(report: Report, factory: Callable[..., WeightMatrix], seed: int) -> None:
    weight = factory(16, 24, generator=seeded(seed))
    before = {name: (x.data_ptr(), x.shape, x.dtype) for name, x in weight.state_dict().items()}
    old = weight().omega.detach().clone()
    weight.redraw(seeded(seed + 1))
    after = {name: (x.data_ptr(), x.shape, x.dtype) for name, x in weight.state_dict().items()}
    report.expect(before == after, "redraw keeps storage, shape and dtype of every buffer")
    if weight.claim == "unbiased":
        report.expect(not torch.equal(old, weight().omega), "redraw changes the rows")


def _check_state(report: Report, factory: Callable[..., WeightMatrix], seed: int) -> None:
    saved, loaded = (factory(16, 24, num_heads=2, generator=seeded(s)) for s in (seed, seed + 1))
    loaded.load_state_dict(saved.state_dict())
    report.expect(_same(saved(), loaded()), "a loaded state_dict gives the same W, bit for bit")


def _check_gradients(report: Report, factory: Callable[..., WeightMatrix], seed: int) -> None:
    weight = factory(16, 24, num_heads=2, generator=seeded(seed))
    parameters = dict(weight.named_parameters())
    report.expect(weight.learned == bool(parameters), "learned is True exactly if there are parameters")
    if not parameters:
        return
    made = weight()
    probe = torch.randn(made.omega.shape, generator=seeded(seed))
    ((made.omega * probe).sum() + (made.log_abs_weight * probe[..., 0]).sum()).backward()
    for name, parameter in parameters.items():
        reached = parameter.grad is not None and bool(parameter.grad.isfinite().all())
        report.expect(reached, f"a finite gradient reaches parameter {name}")


def _check_moments(report: Report, factory: Callable[..., WeightMatrix], draws: int, seed: int) -> None:
    d = 16
    if factory(d, 24, generator=seeded(seed)).claim != "unbiased":
        return
    weight = factory(d, 24, num_heads=draws, generator=seeded(seed))
    made = weight()
    weights = (made.sign_weight * made.log_abs_weight.exp()).double()
    directions = {
        "an axis": torch.eye(d)[0],
        "the diagonal": torch.ones(d) / math.sqrt(d),
        "a random direction": torch.nn.functional.normalize(torch.randn(d, generator=seeded(seed)), dim=0),
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
    weight = factory(16, 24, generator=seeded(seed))
    q, k, v = random_tokens(16, 32, 100.0 if not weight.signed else 1.0, seed)
    out = random_feature_attention(q, k, v, FeatureMap(16, 24, "posrf", weight))
    report.expect(bool(out.isfinite().all()), "posrf attention with it is finite")
