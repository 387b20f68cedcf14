"""The mean of the estimate is the kernel: exactly by quadrature, in expectation by sampling, and nowhere else."""

import math
from functools import cache

import pytest
import torch
from scipy import special, stats

import spectraformer as sf
from spectraformer import registry

DISCRETE = [name for name, f in sf.COMPONENTS.items() if f.needs_gaussian_rows]
CONTINUOUS = [name for name in sf.COMPONENTS if name not in DISCRETE]
# Every f once, then options that change the formula and not only a number in it.
EVERY_F = [(name, {}) for name in sf.COMPONENTS] + [("gerf", {"sign": -1}), ("hrf", {"num_directions": 3})]


@pytest.fixture(autouse=True)
def _one_thread():
    # Thousands of small matrices: threads would cost ten times what they bring.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def label(variant):
    return variant[0] + "".join(f"-{key}{value}" for key, value in variant[1].items())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def build(name, d, m, heads=None, seed=0, **options):
    return sf.WEIGHTS[name](d, m, num_heads=heads, generator=seeded(seed), **options)


def kernel_of(q, k, kernel, scale):
    """Log-kernel of all pairs, (b, h * g, n, s), in terms of raw tokens."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    log = scale * q @ k.mT
    if kernel == "gaussian":
        log = log - 0.5 * scale * (q.square().sum(-1).unsqueeze(-1) + k.square().sum(-1).unsqueeze(-2))
    return log


def move_learned_parameters(component, size=0.2, alike=False):
    # At their start A = 0 and complex maps are multiples of I, which hides half of the formulas.
    generator = seeded(3)
    with torch.no_grad():
        for p in component.parameters():
            p.add_(size * torch.randn(p.shape[alike:], generator=generator, dtype=p.dtype))


# ---- exact: a rule that integrates the Gaussian mean to rounding makes phi(q) . phi(k) the kernel itself ----


class Rule(sf.WeightMatrix):
    """Given nodes (g, m, d) with given weights (g, m) of any sign."""

    def __init__(self, omega, weight, uniform=None, signed=False):
        super().__init__(omega.shape[-1], omega.shape[-2], generator=seeded(0))
        self.signed = signed
        self.fixed = sf.Projection(omega, weight.abs().log(), weight.sign(), uniform, signed)

    def forward(self):
        return self.fixed

    def redraw(self, generator):
        pass


def gauss_hermite(points):
    nodes, weights = map(torch.from_numpy, special.roots_hermitenorm(points))
    weights = weights / weights.sum()
    return torch.cartesian_prod(nodes, nodes).unsqueeze(0), torch.cartesian_prod(weights, weights).prod(-1).unsqueeze(0)


@cache
def plain_rule():
    return Rule(*gauss_hermite(64))


@cache
def signed_rule():
    # Twice one exact rule minus another is exact too, and a third of its weights are negative.
    (nodes, weights), (others, less) = gauss_hermite(64), gauss_hermite(72)
    return Rule(torch.cat((nodes, others), 1), torch.cat((2 * weights, -less), 1), signed=True)


def enumerating_rule(law, poisson):
    """All pairs of exponents that matter, each by the middle of its quantile cell, a rule a head: law is (h,)."""
    rows, masses = [], []
    for parameter in law.tolist():
        p = stats.poisson(parameter) if poisson else stats.geom(parameter, loc=-1)
        k = torch.arange(40)
        mass = torch.from_numpy(p.pmf(k))
        middle = torch.from_numpy(p.cdf(k)) - 0.5 * mass
        # Beyond, quantile cells are too small for float64; a mass of 0 is no weight, so both heads keep 40 points.
        mass = torch.where(torch.from_numpy(p.sf(k - 1)) > 1e-13, mass, 1e-300)
        middle = middle.clamp_max(1 - 1e-13)
        rows.append(torch.cartesian_prod(middle, middle))
        masses.append(torch.cartesian_prod(mass, mass).prod(-1).clamp_min(1e-300))
    uniform, weight = torch.stack(rows), torch.stack(masses)
    return Rule(torch.special.ndtri(uniform), weight, uniform)


def planar_tokens():
    # Two key heads with different moments, two query heads each; moderate ratios |x_l y_l| for the discrete laws.
    g = seeded(5)
    q = torch.randn(1, 4, 3, 2, generator=g, dtype=torch.float64).clamp(-1.5, 1.5) * torch.tensor([1.2, 0.5])
    k = torch.randn(1, 2, 4, 2, generator=g, dtype=torch.float64).clamp(-1.5, 1.5) * torch.tensor([0.6, 1.0])
    return q, k + torch.tensor([[[[0.4, -0.2]], [[-0.3, 0.6]]]], dtype=torch.float64)


def assert_exact(fm, q, k, scale):
    x, y = fm.features(q, k, scale=scale)
    y = y.repeat_interleave(2, 1)
    expected = kernel_of(q, k, fm.kernel, scale).exp()
    torch.testing.assert_close((x @ y.mT).detach(), expected, rtol=1e-6, atol=1e-9)
    return x, y


@pytest.mark.parametrize("scale", [0.3, 2**-0.5, 2.0])
@pytest.mark.parametrize("center", [False, True], ids=["plain", "centered"])
@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("variant", [v for v in EVERY_F if v[0] in CONTINUOUS], ids=label)
def test_exact_by_quadrature(variant, kernel, center, scale):
    q, k = planar_tokens()
    for rule in (plain_rule(), signed_rule()):
        name, options = variant
        fm = sf.FeatureMap(
            2, 8, name, rule, kernel=kernel, center=center, num_heads=2, component_options=options
        ).double()
        move_learned_parameters(fm.component)
        x, y = assert_exact(fm, q, k, scale)
        assert fm.positive == (fm.component.positive and not rule.signed)
        assert not fm.positive or (x.min() >= 0 and y.min() >= 0)


@pytest.mark.parametrize("scale", [0.3, 2**-0.5, 1.0])
@pytest.mark.parametrize("center", [False, True], ids=["plain", "centered"])
@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("name", DISCRETE)
def test_exact_by_enumeration(name, kernel, center, scale, monkeypatch):
    q, k = planar_tokens()
    fm = sf.FeatureMap(2, 8, name, plain_rule(), kernel=kernel, center=center, num_heads=2).double()
    fit, fitted = fm.component.fit, []
    monkeypatch.setattr(fm.component, "fit", lambda *sides: fitted.append(fit(*sides)) or fitted[-1])
    fm.features(q, k, scale=scale)
    fm.weight = enumerating_rule(fitted[0].law[0], name.startswith("pois"))
    x, y = assert_exact(fm, q, k, scale)
    assert not fm.positive or (x.min() >= 0 and y.min() >= 0)


# ---- in expectation: every pair whose W claims unbiasedness, thousands of independent W as heads ----

D, M, DRAWS = 16, 24, 4000
OPTIONS = [
    ("qmc", {"sequence": "halton"}),
    ("pmodel", {"structure": "hankel", "rotate": False}),
    ("pmodel", {"structure": "circulant"}),
    ("ssr", {"degree": 1}),
]
EVERY_W = [(name, {}) for name in sf.WEIGHTS] + OPTIONS
UNBIASED = [v for v in EVERY_W if build(v[0], D, M, **v[1]).claim == "unbiased"]
# A slightly negative keeps the tails light enough for a normal z; hrf mixes by two of its own directions.
SAMPLED_F = [(name, {}) for name in sf.COMPONENTS if name not in ("gerf", "hrf")] + [
    ("gerf", {"initial_eta": 0.336}),
    ("gerf", {"initial_eta": 0.2, "sign": -1}),
    ("hrf", {"num_directions": 2}),
]


def tokens():
    """Scaled queries and keys, (n, d): two pairs at 60 degrees, the first of norm 1, and anisotropic others."""
    g = seeded(11)
    plane = torch.linalg.qr(torch.randn(D, 2, generator=g, dtype=torch.float64)).Q.mT
    half = math.pi / 6
    x = math.cos(half) * plane[0] + math.sin(half) * plane[1]
    y = math.cos(half) * plane[0] - math.sin(half) * plane[1]
    # The second pair's sum lies on an axis and its difference on another: structured W have preferred directions.
    # It is shorter: along an axis stratified points leave only the far tail to chance, and z would be skew.
    axes = torch.eye(D, dtype=torch.float64)[:2] / math.sqrt(3)
    x2, y2 = (math.cos(half) * axes[0] + sign * math.sin(half) * axes[1] for sign in (1, -1))
    profile = torch.linspace(1.5, 0.5, D, dtype=torch.float64)
    others = torch.randn(2, 4, D, generator=g, dtype=torch.float64) / math.sqrt(D)
    return torch.cat((torch.stack((x, x2)), others[0] * profile)), torch.cat(
        (torch.stack((y, y2)), others[1] * profile.flip(0) + 0.05)
    )


def mean_and_error(ratio):
    return ratio.mean(0), ratio.std(0) / math.sqrt(len(ratio))


@cache
def shared_weight(name, options=(), draws=DRAWS):
    slow_to_draw = name == "ssf" or ("sequence", "halton") in options
    return build(name, D, M, draws // 4 if slow_to_draw else draws, seed=17, **dict(options)).double()


def ratios(component, options, weight, kernel="softmax", center=False, pairs=None):
    """Estimate over kernel of the first two pairs, (draws, 2)."""
    x, y = tokens() if pairs is None else pairs
    draws = weight.num_heads
    with torch.no_grad():
        fm = sf.FeatureMap(
            D,
            M,
            component,
            weight,
            num_heads=draws,
            kernel=kernel,
            center=center,
            seed=4,
            component_options=options,
        ).double()
        if component == "cderf":
            move_learned_parameters(fm.component, 0.05, alike=True)
        q, k = (side.expand(1, draws, *side.shape) for side in (x, y))
        left, right = fm.features(q, k, scale=1.0)
        log = kernel_of(q[:, :1], k[:, :1], kernel, 1.0).diagonal(dim1=-2, dim2=-1)[..., :2]
        return ((left[0, :, :2] * right[0, :, :2]).sum(-1) / log[0].exp()).clone()


@cache
def z_scores(f, w):
    (component, options), (name, weight_options) = (SAMPLED_F[f], UNBIASED[w])
    weight = shared_weight(name, tuple(weight_options.items()))
    # The law of the estimate is that of the softmax kernel times a number; alternate, so that both are sampled.
    kernel, center = ("softmax", "gaussian")[(f + w) % 2], component in ("oprf", "sderf")
    mean, error = mean_and_error(ratios(component, options, weight, kernel, center))
    return (mean - 1) / error


@pytest.mark.slow
@pytest.mark.parametrize("w", range(len(UNBIASED)), ids=[label(v) for v in UNBIASED])
def test_unbiased_in_expectation(w):
    z = {label(v): z_scores(f, w) for f, v in enumerate(SAMPLED_F)}
    assert all(registry.standing(sf.COMPONENTS[f], shared_weight(UNBIASED[w][0])) == "unbiased" for f, _ in SAMPLED_F)
    assert {name: z[name].tolist() for name in z if z[name].abs().max() > 4.5} == {}


@pytest.mark.slow
def test_scores_have_the_spread_of_noise():
    # A bias too small for a single z would show in the whole: and a z far below 1 means the noise is miscounted.
    z = torch.stack([z_scores(f, w) for f in range(len(SAMPLED_F)) for w in range(len(UNBIASED))])
    assert 0.8 < z.square().mean().sqrt() < 1.25


# ---- biased W have the bias they are known for ----


def hyp0f1(z):
    return float(special.hyp0f1(D / 2, z))


A = -0.02  # for GERF; eta = log(1 - 8 A)
FIXED_NORMS = {
    # The mean of exp(omega . z) over a sphere of radius sqrt(d) is 0F1(; d/2; d |z|^2 / 4).
    "posrf": ({}, 1, lambda v: hyp0f1(D * v**2 / 4) * math.exp(-(v**2) / 2)),
    "trigrf": ({}, -1, lambda r: hyp0f1(-D * r**2 / 4) * math.exp(r**2 / 2)),
    "gerf": (
        {"initial_eta": math.log(1 - 8 * A)},
        1,
        lambda v: (1 - 4 * A) ** (D / 2) * math.exp(2 * A * D - v**2 / 2) * hyp0f1((1 - 4 * A) * D * v**2 / 4),
    ),
}


def pairs_of_sum(sign):
    """Two pairs with |x + sign y| = 1 and 2, y = sign x."""
    z = torch.randn(D, generator=seeded(2), dtype=torch.float64)
    x = 0.5 * torch.stack((z, 2 * z)) / z.norm()
    return x, sign * x


@pytest.mark.parametrize("component", FIXED_NORMS)
@pytest.mark.parametrize(("name", "options"), [("orf", (("norms", "sqrt_d"),)), ("sorf", ())], ids=["orf", "sorf"])
def test_fixed_norms_have_the_closed_form_bias(name, options, component):
    given, sign, closed = FIXED_NORMS[component]
    mean, error = mean_and_error(
        ratios(component, given, shared_weight(name, options, 20000), pairs=pairs_of_sum(sign))
    )
    assert error.max() < 0.007
    assert mean.tolist() == pytest.approx([closed(1), closed(2)], abs=0.02)
    assert abs(closed(2) - 1) > 0.04  # so 0.02 tells the closed form from no bias


@pytest.mark.parametrize("component", FIXED_NORMS)
def test_chi_norms_remove_the_bias_of_sorf(component):
    given, sign, _ = FIXED_NORMS[component]
    weight = shared_weight("sorf", (("norms", "chi"),), 10000)
    mean, error = mean_and_error(ratios(component, given, weight, pairs=pairs_of_sum(sign)))
    assert ((mean - 1).abs() < 4.5 * error).all()


@pytest.mark.parametrize(
    ("component", "expected"), [("trigrf", 0.992), ("posrf", 0.938), ("hyprf", 0.941), ("oprf", 1.003)]
)
def test_moment_matching_is_slightly_biased(component, expected):
    # No closed form; these are means of 12 000 independent draws of another implementation, each within 0.01.
    mean, error = mean_and_error(ratios(component, {}, shared_weight("mm")))
    assert mean[0].item() == pytest.approx(expected, abs=0.01 + 3 * error[0].item())


@pytest.mark.parametrize("order", [3, 8])
@pytest.mark.parametrize("component", ["trigrf", "posrf"])
def test_subsampled_quadrature_has_the_bias_of_its_nodes(component, order):
    # Coordinates are independent, so the mean is a product of univariate rules at the coordinates of x +- y.
    nodes, weights = map(torch.from_numpy, special.roots_hermitenorm(order))
    weights = weights / weights.sum()
    x, y = (side[:2] for side in tokens())
    grid = (x + y if component == "posrf" else x - y).unsqueeze(-1) * nodes
    value = grid.exp() if component == "posrf" else grid.cos()  # the sines cancel: nodes are symmetric
    size = (x + y if component == "posrf" else x - y).square().sum(-1)
    expected = (value @ weights).prod(-1) * (-0.5 * size if component == "posrf" else 0.5 * size).exp()
    mean, error = mean_and_error(ratios(component, {}, shared_weight("gq", (("order", order),))))
    assert ((mean - expected).abs() < 4.5 * error).all()


# ---- pairs without meaning are refused, and no others ----

REFUSING = ["sorf", "rom", "gq", "sgq", "fastfoodl", "gmm", "dgm", "bbq", "inn"]


def test_exactly_the_meaningless_pairs_are_refused():
    refused = set()
    for name in sf.WEIGHTS:
        weight = build(name, 4, 8)
        for component, factory in sf.COMPONENTS.items():
            if registry.standing(factory, weight) == "refused":
                refused.add((component, name))
            else:
                sf.FeatureMap(4, 8, component, name)
                assert registry.standing(factory, weight) == weight.claim
    assert refused == {
        (component, name) for component in ("poisrf", "geomrf", "poisrf+", "geomrf+") for name in REFUSING
    }


@pytest.mark.parametrize("name", REFUSING)
@pytest.mark.parametrize("component", DISCRETE)
def test_a_refusal_says_what_and_what_instead(component, name):
    with pytest.raises(ValueError, match="is refused") as refusal:
        sf.FeatureMap(4, 8, component, name)
    reason, _, advice = str(refusal.value).partition("; use it with one of ")
    assert sf.COMPONENTS[component].__name__ in reason
    assert sf.WEIGHTS[name].__name__ in reason
    offered = advice.partition(", or another")[0].split(", ")
    assert set(offered) == set(sf.WEIGHTS) - set(REFUSING)
    for other in offered:
        sf.FeatureMap(4, 8, component, other)


# ---- attention converges at the Monte Carlo rate ----


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("component", ["trigrf", "posrf", "oprf", "geomrf"])
def test_attention_error_falls_like_one_over_root_m(component, kernel):
    g = seeded(1)
    q, k, v = (torch.randn(1, 2, 12, 6, generator=g, dtype=torch.float64) for _ in range(3))
    q, k = (side / side.norm(dim=-1).amax() for side in (q, k))
    exact = sf.kernel_attention(q, k, v, kernel=kernel, scale=1.0)
    sizes, seeds = [64, 256, 1024, 4096, 16384], 12
    errors = torch.zeros(len(sizes), dtype=torch.float64)
    for i, m in enumerate(sizes):
        for seed in range(seeds):
            fm = sf.FeatureMap(6, m, component, "mc", kernel=kernel, seed=seed).double()
            out = sf.random_feature_attention(q, k, v, fm, scale=1.0)
            errors[i] += (out - exact).square().mean() / seeds
    log_m, log_error = torch.tensor(sizes).log().double(), 0.5 * errors.log()
    centred = log_m - log_m.mean()
    slope = (centred * log_error).sum() / centred.square().sum()
    assert -0.65 < slope < -0.35
    assert log_error[-1] < math.log(0.02)
