"""Exact relations between component functions, kernels and translations: no sampling error, no closed forms."""

import math

import pytest
import torch
from torch.testing import assert_close

import spectraformer as sf
from spectraformer.components import Parameters

F64 = torch.float64
D, M = 8, 12
EVERY_F = list(sf.COMPONENTS)
PLUS = [name for name in EVERY_F if name.endswith("+")]
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def feature_map(component, weight="orf", **options):
    fm = sf.FeatureMap(D, M, component, weight, seed=5, **options).double()
    generator = seeded(6)
    with torch.no_grad():  # learned parameters away from their start, alike in any two maps
        for p in fm.component.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=F64))
    return fm


def untouched(component, weight="orf", **options):
    """With learned parameters where their options put them."""
    return sf.FeatureMap(D, M, component, weight, seed=5, **options).double()


def tokens(seed=0, n=12, s=15, batch=2, heads=2, mean=0.3):  # more than D, so that second moments are regular
    g = seeded(seed)
    q = 0.9 * torch.randn(batch, heads, n, D, generator=g, dtype=F64) + mean
    k = 0.6 * torch.randn(batch, heads, s, D, generator=g, dtype=F64) + 0.5 * mean
    return q, k


def products(fm, q, k, **options):
    x, y = fm.features(q, k, **options)
    return (x @ y.mT).detach()


# ---- one family inside another ----


@pytest.mark.parametrize("weight", ["orf", "ssr"])
@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (("posrf", {}), ("gerf", {"initial_eta": 0.0})),
        (("trigrf", {}), ("gerf", {"initial_eta": 0.0, "sign": -1})),
        (("posrf", {}), ("cderf", {"angle": 0.0})),
        (("trigrf", {}), ("cderf", {"angle": math.pi / 2})),
    ],
    ids=["posrf=gerf", "trigrf=signed-gerf", "posrf=cderf", "trigrf=cderf"],
)
def test_learned_families_start_as_the_ones_they_extend(narrow, wide, weight):
    q, k = tokens()
    one, two = (untouched(name, weight, component_options=options) for name, options in (narrow, wide))
    assert_close(products(two, q, k), products(one, q, k), rtol=1e-6, atol=1e-8)  # cos(pi / 2) is no 0 in float32
    if two.feature_dim == one.feature_dim:
        for found, expected in zip(two.features(q, k), one.features(q, k), strict=True):
            assert_close(found.detach(), expected, **EXACT)


def fix(fm, monkeypatch, **parameters):
    monkeypatch.setattr(fm.component, "fit", lambda q, k: Parameters(**parameters))
    return fm


@pytest.mark.parametrize("weight", ["orf", "ssr"])
@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
def test_fitted_families_reduce_to_gerf(kernel, weight, monkeypatch):
    q, k = tokens()
    rho, eye = torch.full((2, 2), 0.6, dtype=F64), torch.eye(D, dtype=F64).expand(2, 2, D, D)
    ones, a = torch.ones(2, 2, D, dtype=F64), (1 - 1 / rho) / 8
    given = {
        "oprf": {"rho": rho},
        "saderf": {"rho": rho, "query_transform": ones, "key_transform": ones},
        "aderf": {"rho": rho, "query_transform": eye, "key_transform": eye},
        "sderf": {"query_transform": eye, "coefficients": a.unsqueeze(-1) * ones},
    }
    gerf = untouched("gerf", weight, kernel=kernel, component_options={"initial_eta": -math.log(0.6)})
    with torch.no_grad():
        gerf.component.eta.fill_(-math.log(0.6))  # in float64
    for name, parameters in given.items():
        fm = fix(untouched(name, weight, kernel=kernel), monkeypatch, **parameters)
        for found, expected in zip(fm.features(q, k), gerf.features(q, k), strict=True):
            assert_close(found, expected.detach(), **EXACT)


@pytest.mark.parametrize("name", ["saderf", "aderf"])
def test_self_attention_needs_no_balancing(name):
    _, k = tokens()
    assert_close(products(feature_map(name), k, k), products(feature_map("oprf"), k, k), rtol=1e-4, atol=0)


def test_aderf_is_saderf_for_diagonal_second_moments():
    # Rows of a Hadamard matrix have the second moment I, exactly; profiles make it any diagonal.
    design = torch.tensor([[1.0]], dtype=F64)
    while len(design) < D:
        design = torch.cat((torch.cat((design, design), 1), torch.cat((design, -design), 1)))
    profile = torch.linspace(0.3, 1.4, D, dtype=F64)
    q, k = (side.expand(1, 1, D, D) for side in (design * profile, 0.5 * design * profile.flip(0)))
    for found, expected in zip(feature_map("aderf").features(q, k), feature_map("saderf").features(q, k), strict=True):
        assert_close(found, expected, rtol=1e-8, atol=0)


def test_hyprf_is_posrf_on_antithetic_rows():
    q, k = tokens()
    antithetic = sf.WEIGHTS["ssr"](D, 2 * M, degree=1, generator=seeded(3))
    half = sf.WEIGHTS["mc"](D, M, generator=seeded(0))
    rows = antithetic().omega
    half.omega.copy_(rows[:, :M] if torch.equal(rows[:, :M], -rows[:, M:]) else rows[:, ::2])
    hyp = sf.FeatureMap(D, M, "hyprf", half).double()
    pos = sf.FeatureMap(D, 2 * M, "posrf", antithetic).double()
    assert_close(products(hyp, q, k), products(pos, q, k), rtol=1e-6, atol=0)


# ---- where an estimate has no variance: it is the kernel for every single W ----


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("weight", ["mc", "scrf", "ssr", "sgq", "fastfoodl"])
@pytest.mark.parametrize(("component", "sign"), [("trigrf", 1), ("posrf", -1), ("hyprf", -1), ("hrf", 1), ("hrf", -1)])
def test_exact_for_every_weight(component, sign, weight, kernel):
    # hrf: its trigonometric part counts alone at angle 0, its positive part at angle pi, each where it is exact.
    q = torch.nn.functional.normalize(tokens()[0], dim=-1)  # hrf cancels terms of size exp(|x|^2)
    fm = untouched(component, weight, kernel=kernel)
    found = products(fm, q, sign * q, scale=0.7).diagonal(dim1=-2, dim2=-1)
    log = 0.7 * sign * q.square().sum(-1)
    if kernel == "gaussian":
        log = log - 0.7 * q.square().sum(-1)
    assert_close(found, log.exp(), rtol=1e-6, atol=0)


# ---- kernels, scale and translation ----


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centered"])
@pytest.mark.parametrize("component", EVERY_F)
def test_kernels_differ_by_token_factors(component, center):
    q, k = tokens()
    softmax, gaussian = (feature_map(component, kernel=kernel, center=center) for kernel in ("softmax", "gaussian"))
    for side, one, two in zip(
        (q, k), softmax.features(q, k, scale=0.5), gaussian.features(q, k, scale=0.5), strict=True
    ):
        factor = (-0.25 * side.square().sum(-1, keepdim=True)).exp()
        assert_close(one * factor, two, **EXACT)


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centered"])
@pytest.mark.parametrize("component", EVERY_F)
def test_the_scale_goes_to_both_sides(component, center):
    q, k = tokens()
    fm = feature_map(component, center=center)
    for found, expected in zip(fm.features(q, k, scale=0.36), fm.features(0.6 * q, 0.6 * k, scale=1.0), strict=True):
        assert_close(found, expected, **EXACT)
    assert_close(products(fm, q, k), products(fm, q, k, scale=D**-0.5), **EXACT)


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("component", [name for name in EVERY_F if name not in PLUS])
def test_centering_runs_f_on_translated_tokens(component, kernel):
    q, k = tokens()
    scale = 0.5
    centered, plain = (feature_map(component, kernel=kernel, center=center) for center in (True, False))
    c = 0.5 * (q.mean(-2, keepdim=True) + k.mean(-2, keepdim=True))
    found, expected = products(centered, q, k, scale=scale), products(plain, q - c, k - c, scale=scale)
    if kernel == "softmax":  # the Gaussian kernel does not see translations
        expected = expected * (scale * (c @ (q - c).mT).mT + scale * (c @ k.mT)).exp()
    assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("component", ["trigrf", *PLUS])
def test_centering_changes_nothing_for(component):
    q, k = tokens()
    centered, plain = (products(feature_map(component, center=center), q, k) for center in (True, False))
    assert_close(centered, plain, **EXACT)


@pytest.mark.parametrize("component", [name for name in EVERY_F if name not in ("trigrf", *PLUS)])
def test_centering_changes_something_for_all_others(component):
    q, k = tokens()
    centered, plain = (products(feature_map(component, center=center), q, k) for center in (True, False))
    assert (centered / plain - 1).abs().max() > 1e-3


@pytest.mark.parametrize("component", PLUS)
def test_plus_makes_every_feature_positive(component):
    wide, narrow = tokens(mean=-0.5)
    for q, k in ((wide, narrow), (narrow, wide)):  # whichever side has the least coordinates
        assert all((side > 0).all() for side in feature_map(component).features(q, k))
        assert any((side < 0).any() for side in feature_map(component.removesuffix("+")).features(q, k))


# ---- the angular hybrid ----


def test_hrf_mixes_by_the_angle():
    # The weight of the positive part can be read off the three estimates on the same W.
    n = 4000
    for degrees in (10, 60, 90, 150):
        angle = math.radians(degrees)
        q = torch.eye(D, dtype=F64)[:1].expand(1, 1, 1, D)
        k = torch.zeros(1, 1, 1, D, dtype=F64)
        k[..., 0], k[..., 1] = 1.3 * math.cos(angle), 1.3 * math.sin(angle)
        shared = sf.WEIGHTS["mc"](D, 2, generator=seeded(4))
        whole, hyp, trig = (
            float(products(sf.FeatureMap(D, 2, name, shared, component_options=options).double(), q, k, scale=1.0))
            for name, options in (("hrf", {"num_directions": n}), ("hyprf", {}), ("trigrf", {}))
        )
        assert abs(hyp - trig) > 0.05
        share = angle / math.pi
        assert abs((whole - trig) / (hyp - trig) - share) < 4.5 * math.sqrt(share * (1 - share) / n)


@pytest.mark.parametrize("angle", [0.2, 1.0, 2.2, 2.9])
def test_hrf_has_the_variance_of_the_mixture(angle):
    # For |x| = |y| the two parts are uncorrelated; the share has a binomial variance. Swapped parts would give the
    # value of pi - angle with r and v exchanged: more than ten times as much at both ends.
    size2, draws, n, seeds = 0.25, 200, 8, 250
    weight = sf.WEIGHTS["mc"](D, D, num_heads=draws, generator=seeded(8))
    q, k = torch.zeros(2, 1, draws, 1, D, dtype=F64)
    root = math.sqrt(size2)
    q[..., 0], k[..., 0], k[..., 1] = root, root * math.cos(angle), root * math.sin(angle)
    deviations = []
    for seed in range(seeds):
        fm = sf.FeatureMap(D, D, "hrf", weight, num_heads=draws, seed=seed).double()
        x, y = fm.features(q, k, scale=1.0)
        deviations.append(((x * y).sum(-1) / math.exp(size2 * math.cos(angle)) - 1).square().mean())
        weight.redraw(seeded(100 + seed))
    v2, r2, share = 2 * size2 * (1 + math.cos(angle)), 2 * size2 * (1 - math.cos(angle)), angle / math.pi
    positive, trigonometric = (math.cosh(v2) - 1) / D, (1 - math.exp(-r2)) ** 2 * math.exp(r2) / (2 * D)
    spread = share * (1 - share) / n
    expected = (share**2 + spread) * positive + ((1 - share) ** 2 + spread) * trigonometric
    found = torch.stack(deviations)
    error = float(found.std()) / math.sqrt(seeds)
    assert error < 0.2 * expected
    assert abs(float(found.mean()) - expected) < 4 * error


# ---- parameters fitted to one sequence and head see nothing else ----


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centered"])
@pytest.mark.parametrize("component", EVERY_F)
def test_batch_items_and_heads_do_not_influence_each_other(component, center):
    q, k = tokens(batch=3, heads=2)
    fm = feature_map(component, center=center)
    before = products(fm, q, k)
    other_q, other_k = q.clone(), k.clone()
    other_q[1], other_k[1] = 3 * q[1] - 1, 2 * k[1] + 1
    other_q[:, 1], other_k[:, 1] = -2 * other_q[:, 1], other_k[:, 1] + 0.5
    after = products(fm, other_q, other_k)
    assert_close(after[::2, 0], before[::2, 0], **EXACT)
    assert (after[1, 1] / before[1, 1] - 1).abs().max() > 1e-3
    assert_close(products(fm, q[2:], k[2:]), before[2:], **EXACT)


@pytest.mark.parametrize("poison", [1e3, math.nan], ids=["large", "nan"])
@pytest.mark.parametrize("center", [False, True], ids=["plain", "centered"])
@pytest.mark.parametrize("component", EVERY_F)
def test_padding_does_not_influence_real_tokens(component, center, poison):
    q, k = (side.abs() + 0.1 for side in tokens(n=14, s=17))  # a minimum of 0 would be that of the padding
    v = torch.randn(2, 2, 17, 3, generator=seeded(1), dtype=F64)
    lengths = [(10, 17), (14, 11)]  # real queries and keys of the two items
    query_mask, key_mask = torch.ones(2, 14, dtype=torch.bool), torch.ones(2, 17, dtype=torch.bool)
    for item, (n, s) in enumerate(lengths):
        query_mask[item, n:], key_mask[item, s:] = False, False
        q[item, :, n:], k[item, :, s:], v[item, :, s:] = poison, poison, poison
    fm = feature_map(component, center=center)
    out = sf.random_feature_attention(q, k, v, fm, key_padding_mask=key_mask, query_padding_mask=query_mask)
    for item, (n, s) in enumerate(lengths):
        rows = slice(item, item + 1)
        alone = sf.random_feature_attention(q[rows, :, :n], k[rows, :, :s], v[rows, :, :s], fm)
        assert_close(out[rows, :, :n], alone, rtol=1e-7, atol=1e-9)
