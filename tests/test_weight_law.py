"""The law of the rows: means, marginals, closed-form biases, orderings of variances; and learned laws."""

import math
from functools import cache

import pytest
import torch
from scipy import special, stats

from spectraformer.weights import base, quadrature
from weight_variants import (
    VARIANTS,
    build,
    close,
    label,
    perturb,
    seeded,
    weights_of,
)

DRAWS = 1500
DIM, ROWS = 12, 20


@cache
def many_draws(name, items):
    """DRAWS independent copies of one W: rows (DRAWS, m, DIM) and weights (DRAWS, m)."""
    projection = build((name, dict(items)), DIM, ROWS, heads=DRAWS, seed=11)()
    return projection.omega.double(), weights_of(projection).double()


def directions():
    axis, dense = torch.zeros(DIM, dtype=torch.float64), torch.ones(DIM, dtype=torch.float64)
    axis[0] = 1
    other = torch.randn(DIM, generator=seeded(2), dtype=torch.float64)
    return torch.stack([axis, -axis, axis.roll(-1), dense / dense.norm(), other / other.norm()])


UNBIASED_VARIANTS = [v for v in VARIANTS if build(v, 2, 4).claim == "unbiased"]
GAUSSIAN_VARIANTS = [v for v in UNBIASED_VARIANTS if label(v) != "ssr"]


@pytest.mark.parametrize("variant", UNBIASED_VARIANTS, ids=label)
def test_unbiased(variant):
    rows, weights = many_draws(variant[0], tuple(variant[1].items()))
    for z in directions():
        for scale in (1.0, 0.5):
            value = (weights * (scale * (rows @ z) - scale**2 / 2).exp()).sum(-1)
            score = (value.mean() - 1) / (value.std() / math.sqrt(DRAWS))
            assert abs(score) < 4.5, (z, scale, float(value.mean()))


@pytest.mark.parametrize("variant", GAUSSIAN_VARIANTS, ids=label)
def test_rows_are_gaussian(variant):
    rows, _ = many_draws(variant[0], tuple(variant[1].items()))
    for row in (0, DIM - 1, ROWS - 1):
        assert stats.kstest(rows[:, row].square().sum(-1).numpy(), stats.chi2(DIM).cdf).pvalue > 1e-5
        for z in directions():
            assert stats.kstest((rows[:, row] @ z).numpy(), stats.norm.cdf).pvalue > 1e-5


def test_haar_has_no_preferred_sign():
    first = torch.stack([base.haar(6, generator)[0, 0] for generator in [seeded(0)] for _ in range(1000)])
    assert abs(first.mean()) < 4 * first.std() / math.sqrt(1000)


@pytest.mark.parametrize("variant", [("orf", {"norms": "sqrt_d"}), ("sorf", {})], ids=label)
def test_bias_of_constant_norms_is_the_closed_form(variant):
    rows = build(variant, 16, 64, heads=4000)().omega.double()
    expected = special.hyp0f1(8, 16 * 4 / 4) * math.exp(-2)
    assert abs(expected - 0.837) < 1e-3
    other = torch.randn(16, generator=seeded(2), dtype=torch.float64)
    for z in (torch.eye(16, dtype=torch.float64)[0], torch.full((16,), 0.25).double(), other / other.norm()):
        assert abs((2 * (rows @ z) - 2).exp().mean() - expected) < 0.02


@pytest.mark.parametrize(("level", "small", "large"), [(1, 0.915, 0.42), (2, 0.988, 0.71)])
def test_sparse_grid_falls_short_of_large_norms(level, small, large):
    nodes, weights = quadrature.smolyak(16, level)
    for norm, ratio in ((1, small), (2, large)):
        value = (weights * (norm / 4 * nodes.sum(-1) - norm**2 / 2).exp()).sum()
        assert abs(value - ratio) < 0.005


@cache
def relative_variances():
    """Variance over draws of the mean of exp(w.z) and of cos(w.z), |z| = 1, times m over the squared mean."""
    d = m = 32
    z = torch.randn(d, generator=seeded(7), dtype=torch.float64)
    z = z / z.norm()
    found = {}
    for name in ("mc", "orf", "simrf", "mm", "qmc"):
        u = build((name, {}), d, m, heads=800, seed=1)().omega.double() @ z
        exponential, cosine = (u - 0.5).exp().mean(-1), (u.cos() * math.exp(0.5)).mean(-1)
        found[name] = float(exponential.var() * m), float(cosine.var() * m)
    return found


def test_variance_of_independent_rows():
    exponential, cosine = relative_variances()["mc"]
    assert abs(exponential / (math.e - 1) - 1) < 0.25
    assert abs(cosine / 0.5431 - 1) < 0.25


@pytest.mark.parametrize(
    ("better", "worse", "functions"), [("orf", "mc", (0, 1)), ("simrf", "orf", (0,)), ("mm", "orf", (0,))]
)
def test_variance_ordering(better, worse, functions):
    for function in functions:
        assert relative_variances()[better][function] < relative_variances()[worse][function]


def test_quasi_monte_carlo_variance():
    assert relative_variances()["qmc"][0] < 0.7 * relative_variances()["mc"][0]


LEARNED_VARIANTS = [v for v in VARIANTS if build(v, 2, 4).learned]
every_learned = pytest.mark.parametrize("variant", LEARNED_VARIANTS, ids=label)


def loss_of(weight):
    """A function of rows and weights that no symmetry of the rows leaves flat."""
    projection = weight()
    x = torch.randn(projection.omega.shape[-1], generator=seeded(4)) / 2
    return (projection.log_abs_weight + projection.omega @ x).logsumexp(-1).square().sum()


@every_learned
@pytest.mark.parametrize("d", [6, 1])
def test_gradients_reach_every_parameter(variant, d):
    weight = build(variant, d, 32, heads=2)
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.1)
    touched = set()
    for step in range(2):
        optimizer.zero_grad()
        loss_of(weight).backward()
        for name, parameter in weight.named_parameters():
            if parameter.numel() and all(gradient.abs().sum() > 0 for gradient in parameter.grad):
                touched.add(name)
        optimizer.step()
        # Behind a last layer of zeros the gradient is zero until the first step.
        expected = {
            name
            for name, parameter in weight.named_parameters()
            if parameter.numel() and (step == 1 or not name.startswith(("network", "layers")))
        }
        assert expected - touched == ({"lower"} & expected if d == 1 else set())


def test_last_layers_have_a_gradient_at_once():
    for name, last in (("dgm", "network.weights.2"), ("inn", "layers.3.weights.1")):
        weight = build((name, {}), 6, 32)
        loss_of(weight).backward()
        parameters = dict(weight.named_parameters())
        assert parameters[last].abs().sum() == 0
        assert parameters[last].grad.abs().sum() > 0


@every_learned
def test_initial_kernel_is_nearly_gaussian(variant):
    projection = build(variant, 8, 8192, heads=2)()
    generator = seeded(5)
    for _ in range(3):
        z = torch.randn(8, generator=generator)
        z = z / z.norm()
        value = (weights_of(projection) * (projection.omega @ z - 0.5).exp()).sum(-1)
        tolerance = 0.1 if variant[1].get("num_knots") == 7 else 0.06
        assert (value - 1).abs().max() < tolerance


def test_learned_fastfood_starts_at_fastfood():
    for d, m, heads in ((12, 20, 2), (16, 40, None)):
        learned, fixed = build(("fastfoodl", {}), d, m, heads), build(("fastfood", {}), d, m, heads)
        torch.testing.assert_close(learned().omega, fixed().omega, atol=1e-5, rtol=1e-5)


def test_flow_and_generator_start_at_their_noise():
    for name in ("dgm", "inn"):
        weight = build((name, {}), 7, 9, heads=2)
        torch.testing.assert_close(weight().omega, weight.noise)
        perturb(weight)
        assert (weight().omega - weight.noise).abs().max() > 0.01


def test_mixture_is_the_mixture():
    weight = build(("gmm", {"num_components": 3, "covariance": "full"}), 4, 50_000)
    perturb(weight, size=0.3)
    weight.double()
    projection, z = weight(), torch.tensor([0.3, -0.4, 0.5, 0.2], dtype=torch.float64)
    estimate = (weights_of(projection) * (projection.omega @ z).exp()).sum()
    share = weight.logits[0].softmax(-1)
    factor = weight.lower[0].tril(-1) + torch.diag_embed(weight.log_scale[0].exp())
    expected = (share * (weight.mean[0] @ z + (z @ factor).square().sum(-1) / 2).exp()).sum()
    assert abs(estimate / expected - 1) < 0.03
    close(torch.zeros(3).double().index_add(0, weight.component, weights_of(projection)[0]), share, 1e-6)
    assert weight.component.bincount().tolist() == [16667, 16667, 16666]
    assert build(("gmm", {"num_components": 5}), 4, 3).num_components == 3


@pytest.mark.parametrize("size", [0.0, 0.5])
def test_quantiles_increase(size):
    weight = build(("bbq", {}), 5, 200, heads=2)
    perturb(weight, size=size)
    order = weight.uniform.argsort(1)
    assert (weight().omega.gather(1, order).diff(dim=1) >= 0).all()


def test_quantiles_start_at_the_normal_ones():
    weight = build(("bbq", {}), 4, 4096).double()
    omega, expected = weight().omega, torch.special.ndtri(weight.uniform)
    centre = expected.abs() < 1.5
    assert (omega - expected)[centre].abs().max() < 0.005
    assert abs(omega.square().mean() - 0.987) < 0.002
    coarse = build(("bbq", {"num_knots": 2}), 1, 64).double()
    slope = 4 * torch.special.ndtri(torch.tensor(0.75))
    close(coarse().omega.detach(), (coarse.uniform - 0.5) * slope, 1e-5)


@pytest.mark.parametrize("d", [1, 5])
def test_flow_density_is_exact(d):
    weight = build(("inn", {}), d, 3).double()
    perturb(weight, size=0.3)
    noise = weight.noise.clone()

    def transform(row):
        return torch.func.functional_call(weight, {"noise": row[None, None]}).omega[0, 0]

    for i, value in enumerate(weight.log_density()[0]):
        jacobian = torch.autograd.functional.jacobian(transform, noise[0, i])
        log_gaussian = -0.5 * (noise[0, i].square().sum() + d * math.log(2 * math.pi))
        close(value.detach(), float(log_gaussian - jacobian.slogdet().logabsdet), 1e-10)
