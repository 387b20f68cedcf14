"""The contract of every W, the algebra each promises in every draw, and the law of its rows."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy import special, stats

from spectraformer.weights import WEIGHTS, base, gaussian, quadrature, quasi

OPTIONS = [
    ("orf", {"norms": "sqrt_d"}),
    ("sorf", {"norms": "chi"}),
    ("sorf", {"num_factors": 1}),
    ("rom", {"kind": "rademacher"}),
    ("rom", {"transform": "fourier"}),
    ("rom", {"kind": "rademacher", "transform": "fourier", "num_factors": 2}),
    ("pmodel", {"structure": "hankel", "rotate": False}),
    ("pmodel", {"structure": "circulant"}),
    ("pmodel", {"rotate": False}),
    ("qmc", {"sequence": "halton"}),
    ("qmc", {"scramble": False}),
    ("qmc", {"sequence": "halton", "scramble": False}),
    ("ssf", {"rotate": False}),
    ("gq", {"order": 3}),
    ("sgq", {"level": 2}),
    ("sgq", {"rotate": False}),
    ("ssr", {"degree": 1}),
    ("gmm", {"num_components": 3, "covariance": "full"}),
    ("bbq", {"num_knots": 7}),
    ("inn", {"num_layers": 3}),
]
VARIANTS = [(name, {}) for name in WEIGHTS] + OPTIONS
SHAPES = [(16, 24), (12, 20), (7, 5), (64, 128), (1, 3), (2, 1)]


def label(variant):
    return variant[0] + "".join(f"-{value}" for value in variant[1].values())


every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=label)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def build(variant, d=8, m=20, heads=None, seed=0):
    return WEIGHTS[variant[0]](d, m, num_heads=heads, generator=seeded(seed), **variant[1])


def draw(variant, d, m, seed=0):
    """One float64 draw."""
    return build(variant, d, m).sample(seeded(seed))


def weights_of(projection):
    return projection.sign_weight * projection.log_abs_weight.exp()


def assert_same(one, other):
    for name in ("omega", "log_abs_weight", "sign_weight", "uniform"):
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None), name
        assert left is None or torch.equal(left, right), name


def is_fixed(variant):
    name, options = variant
    return (name == "qmc" and options.get("scramble") is False) or (name == "sgq" and options.get("rotate") is False)


def perturb(weight, seed=9, size=0.1):
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in weight.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


# ---- the contract ----


@every_variant
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize(("d", "m"), SHAPES)
def test_projection(variant, d, m, heads):
    if variant[0] == "simrf" and d == 1:
        pytest.skip("a simplex needs two dimensions")
    state = torch.get_rng_state()
    weight = build(variant, d, m, heads)
    projection = weight()
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    g, rows = heads or 1, weight.num_rows
    if variant[0] not in ("sgq", "ssr"):
        assert rows == m
    assert projection.omega.shape == (g, rows, d)
    assert projection.log_abs_weight.shape == projection.sign_weight.shape == (g, rows)
    assert projection.omega.dtype == projection.log_abs_weight.dtype == projection.sign_weight.dtype
    assert projection.omega.dtype == torch.float32
    assert projection.omega.isfinite().all()
    assert projection.log_abs_weight.isfinite().all()
    assert (projection.sign_weight.abs() == 1).all()
    assert weight.signed == projection.signed
    assert weight.signed or (projection.sign_weight == 1).all()
    torch.testing.assert_close(weights_of(projection).sum(-1), torch.ones(g), atol=1e-4, rtol=0)
    if projection.uniform is not None:
        assert projection.uniform.shape == projection.omega.shape
        assert projection.uniform.min() > 0
        assert projection.uniform.max() < 1
    if heads and not is_fixed(variant) and d > 1 and m > 1:
        assert not torch.equal(projection.omega[0], projection.omega[1])
    assert weight.learned == bool(list(weight.parameters()))
    assert "claim=" in repr(weight)


@every_variant
def test_seed_decides_the_draw(variant):
    assert_same(build(variant, seed=3)(), build(variant, seed=3)())
    same = torch.equal(build(variant, seed=3)().omega, build(variant, seed=4)().omega)
    assert same == is_fixed(variant)


@every_variant
def test_redraw_replaces_the_noise_in_place(variant):
    weight = build(variant, heads=2).double()
    parameters = [parameter.clone() for parameter in weight.parameters()]
    buffers = [buffer.data_ptr() for buffer in weight.buffers()]
    weight.redraw(seeded(4))
    before = weight().omega.detach().clone()
    weight.redraw(seeded(5))
    after = weight().omega
    assert after.shape == before.shape
    assert after.dtype == torch.float64
    assert [buffer.data_ptr() for buffer in weight.buffers()] == buffers
    assert all(map(torch.equal, parameters, weight.parameters()))
    assert torch.equal(before, after) == (is_fixed(variant) or variant[0] == "fastfoodl")
    if not weight.learned:
        weight = build(variant, heads=2, seed=1)
        weight.redraw(seeded(5))
        assert_same(weight(), build(variant, heads=2, seed=5)())


@every_variant
def test_state_dict_is_the_function(variant):
    source, target = build(variant, heads=2, seed=0), build(variant, heads=2, seed=1)
    perturb(source)
    target.load_state_dict(source.state_dict())
    assert_same(source(), target())


@every_variant
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(variant, dtype):
    weight = build(variant, heads=2)
    integers = [name for name, buffer in weight.named_buffers() if not buffer.is_floating_point()]
    full = weight().omega
    weight.to(dtype)
    projection = weight()
    assert projection.omega.dtype == projection.log_abs_weight.dtype == projection.sign_weight.dtype == dtype
    assert [name for name, buffer in weight.named_buffers() if not buffer.is_floating_point()] == integers
    # Rounding in half precision, up to the magnitude of intermediate sums.
    torch.testing.assert_close(projection.omega.float(), full, atol=0.15, rtol=0.05)


@pytest.mark.parametrize("name", WEIGHTS)
def test_forward_compiles_without_a_break(name):
    weight = build((name, {}), heads=2)
    torch._dynamo.reset()
    assert_same(torch.compile(weight, fullgraph=True, backend="eager")(), weight())


def test_default_dtype_is_kept():
    torch.set_default_dtype(torch.float64)
    try:
        for name in WEIGHTS:
            weight = build((name, {}))
            assert weight().omega.dtype == torch.float64
            kept = weight.state_dict().values()
            assert all(value.dtype == torch.float64 for value in kept if value.is_floating_point())
    finally:
        torch.set_default_dtype(torch.float32)


UNBIASED = ("unbiased", True, False)
LEARNED = ("learned", False, False)
CLAIMS = {
    "mc": UNBIASED,
    "orf": UNBIASED,
    "orf-sqrt_d": ("vanishing", False, False),
    "sorf": ("vanishing", False, False),
    "sorf-chi": ("vanishing", False, False),
    "rom": ("vanishing", False, False),
    "simrf": UNBIASED,
    "scrf": UNBIASED,
    "pmodel": UNBIASED,
    "fastfood": UNBIASED,
    "qmc": UNBIASED,
    "qmc-halton": UNBIASED,
    "qmc-False": ("deterministic", True, False),
    "mm": ("vanishing", True, False),
    "ssf": UNBIASED,
    "ssf-False": ("deterministic", False, False),
    "gq": ("vanishing", False, False),
    "sgq": ("deterministic", False, True),
    "sgq-False": ("deterministic", False, True),
    "ssr": ("unbiased", True, True),
    "ssr-1": UNBIASED,
    "fastfoodl": LEARNED,
    "gmm": LEARNED,
    "dgm": LEARNED,
    "bbq": LEARNED,
    "inn": LEARNED,
}


def test_every_weight_states_its_claim():
    assert set(WEIGHTS) <= set(CLAIMS)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if label(v) in CLAIMS], ids=label)
def test_claims(variant):
    weight = build(variant)
    assert (weight.claim, weight.gaussian_rows, weight.signed) == CLAIMS[label(variant)]


REFUSED = [
    ("orf", {"norms": "chy"}, "norms is 'chy'; expected one of chi, sqrt_d; nearest: 'chi'"),
    ("sorf", {"norms": "sqrt"}, "nearest: 'sqrt_d'"),
    ("sorf", {"num_factors": 0}, "num_factors is 0; expected an integer of at least 1"),
    ("rom", {"kind": "hybrids"}, "nearest: 'hybrid'"),
    ("rom", {"transform": "dft"}, "transform is 'dft'; expected one of hadamard, fourier"),
    ("rom", {"num_factors": 1.5}, "num_factors is 1.5"),
    ("pmodel", {"structure": "toplitz"}, "nearest: 'toeplitz'"),
    ("pmodel", {"rotate": "no"}, "rotate is 'no'; expected True or False"),
    ("qmc", {"sequence": "sobel"}, "nearest: 'sobol'"),
    ("qmc", {"scramble": 1}, "scramble is 1; expected True or False; nearest: True"),
    ("ssf", {"rotate": None}, "rotate is None"),
    ("gq", {"order": 1}, "order is 1, .* at least 2; nearest: 2"),
    ("gq", {"order": "8"}, "order is '8'; expected an integer"),
    ("sgq", {"level": 0}, "level is 0"),
    ("sgq", {"level": 9}, "level is 9, which has .* nodes at head_dim 8; .* nearest level: 6"),
    ("sgq", {"rotate": 0}, "rotate is 0"),
    ("ssr", {"degree": 2}, "degree is 2; expected 1 or 3; nearest: 3"),
    ("gmm", {"num_components": -1}, "num_components is -1"),
    ("gmm", {"covariance": "fall"}, "nearest: 'full'"),
    ("bbq", {"num_knots": 1}, "num_knots is 1; .* at least 2"),
    ("inn", {"num_layers": 0}, "num_layers is 0"),
]


@pytest.mark.parametrize(("name", "options", "text"), REFUSED)
def test_wrong_options_are_refused(name, options, text):
    with pytest.raises(ValueError, match=text):
        build((name, options))


@pytest.mark.parametrize("name", WEIGHTS)
def test_wrong_sizes_are_refused(name):
    for sizes, text in (
        ((0, 4), "head_dim is 0"),
        ((4, 2.0), "num_features is 2.0"),
        ((4, 4, 0), "num_heads"),
    ):
        with pytest.raises(ValueError, match=text):
            build((name, {}), *sizes)
    with pytest.raises(TypeError):
        WEIGHTS[name](4, 4, generator=seeded(0), colour="red")


def test_sizes_beyond_a_family_are_refused():
    with pytest.raises(ValueError, match="a simplex needs at least 2"):
        build(("simrf", {}), 1, 4)
    for name in ("qmc", "bbq"):
        with pytest.raises(ValueError, match="head_dim is 21202; Sobol points have at most 21201"):
            build((name, {}), 21202, 1)


# ---- what each draw satisfies exactly ----


def close(actual, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand(actual.shape)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_orthogonal_blocks():
    for norms in ("chi", "sqrt_d"):
        rows = draw(("orf", {"norms": norms}), 12, 20).omega
        for block in (rows[:12], rows[12:]):
            gram = block @ block.T
            close(gram - torch.diag(gram.diagonal()), 0.0, 1e-11)
        if norms == "sqrt_d":
            close(rows.square().sum(-1), 12.0)
        else:
            assert rows.norm(dim=-1).std() > 0.1
        assert (rows[:12] @ rows[12:].T).abs().max() > 0.1


def test_simplex_cosines():
    rows = draw(("simrf", {}), 12, 20).omega
    for block in (rows[:12], rows[12:]):
        unit = block / block.norm(dim=-1, keepdim=True)
        cosines = unit @ unit.T
        close(cosines[~torch.eye(len(block), dtype=torch.bool)], -1 / 11)
    close(gaussian.simplex(2), [[-1.0], [1.0]])


@pytest.mark.parametrize("m", [16, 17, 40])
def test_moments_are_matched(m):
    rows = draw(("mm", {}), 8, m).omega
    close(rows.mean(0), 0.0)
    close(rows.T @ rows / m, torch.eye(8, dtype=torch.float64))


def test_moment_matching_of_few_rows_keeps_their_norms():
    rows = draw(("mm", {}), 32, 16).omega
    assert torch.linalg.matrix_rank(rows) == 16
    assert 5.2 < rows.norm(dim=-1).mean() < 5.7  # sqrt(32) = 5.66, 3.87 if 16 rows were whitened alone
    assert rows.norm(dim=-1).std() > 0.2  # 0 if only 33 were


def test_structured_orthogonal_blocks():
    rows = draw(("sorf", {}), 16, 40).omega
    for block in (rows[:16], rows[16:32], rows[32:]):
        close(block @ block.T, 16 * torch.eye(len(block), dtype=torch.float64))
    assert rows.abs().unique().numel() > 2, "one Hadamard factor only"
    padded = draw(("sorf", {}), 12, 16).omega
    close(padded.T @ padded, 16 * torch.eye(12, dtype=torch.float64))


@pytest.mark.parametrize("transform", ["hadamard", "fourier"])
@pytest.mark.parametrize("kind", ["hybrid", "rademacher"])
def test_random_orthogonal_products(kind, transform):
    for d in (8, 6):
        n = 8 if transform == "hadamard" else d
        size = 2 * n if kind == "hybrid" else n
        rows = draw(("rom", {"kind": kind, "transform": transform}), d, 2 * size).omega
        for block in (rows[:size], rows[size:]):
            close(block.T @ block, size * torch.eye(d, dtype=torch.float64))
        many = build(("rom", {"kind": kind, "transform": transform, "num_factors": 2}), d, 3, heads=3000)
        first = many().omega[:, 1].double()
        outer = first[:, :, None] * first[:, None, :]
        deviation = (outer.mean(0) - torch.eye(d)) / (outer.std(0) / math.sqrt(3000) + 1e-9)
        assert deviation.abs().max() < 4.5


def test_signed_circulant_blocks():
    rows = draw(("scrf", {}), 7, 14).omega
    for block in (rows[:7], rows[7:]):
        magnitude = block.abs()
        for i in range(6):
            assert torch.equal(magnitude[i].roll(1), magnitude[i + 1])
    ratio = rows[1:7] / torch.stack([rows[0].roll(i) for i in range(1, 7)])
    close(ratio.abs(), 1.0)
    assert (ratio == ratio[:, :1]).all(), "the sign is one per row"
    assert ratio.unique().numel() == 2, "no signs"


def test_pmodel_structures():
    toeplitz = draw(("pmodel", {"rotate": False}), 5, 9).omega
    assert torch.equal(toeplitz[1:, 1:], toeplitz[:-1, :-1])
    assert toeplitz.unique().numel() == 13
    hankel = draw(("pmodel", {"rotate": False, "structure": "hankel"}), 5, 9).omega
    assert torch.equal(hankel[1:, :-1], hankel[:-1, 1:])
    assert hankel.unique().numel() == 13
    for m in (9, 3):
        circulant = draw(("pmodel", {"rotate": False, "structure": "circulant"}), 5, m).omega
        assert torch.equal(circulant[1:, 1:], circulant[:-1, :-1])
        assert circulant.unique().numel() == max(m, 5)
    rotated = draw(("pmodel", {}), 8, 9).omega
    gram = rotated @ rotated.T  # of a Toeplitz matrix with the same 16 numbers
    plain = draw(("pmodel", {"rotate": False}), 8, 9).omega
    close(gram, plain @ plain.T, 1e-10)
    assert not torch.allclose(rotated, plain)


def test_fastfood_row_norms_are_chi():
    n = 16
    square = build(("fastfood", {}), n, n, heads=400)().sqnorm.double().flatten()
    assert stats.kstest(square.numpy(), stats.chi2(n).cdf).pvalue > 1e-4
    assert abs(square.mean() - n) < 4.5 * math.sqrt(2 * n / square.numel())
    assert abs(square.var() - 2 * n) < 0.1 * 2 * n


def test_fastfood_permutes():
    rows = draw(("fastfood", {}), 16, 16).omega
    unit = rows / rows.norm(dim=-1, keepdim=True)
    # Without the permutation entry (i, j) depends on i xor j only: every row holds the same magnitudes.
    assert (unit.abs().sort(dim=-1).values.diff(dim=0).abs().amax(dim=-1) > 1e-3).all()


def test_sobol_points_are_stratified():
    for options in ({}, {"scramble": False}):
        points = draw(("qmc", options), 6, 64)
        close(torch.special.ndtri(points.uniform), points.omega)
    assert (draw(("qmc", {}), 6, 64).uniform * 64).floor().sort(0).values.eq(torch.arange(64)[:, None]).all()
    close(draw(("qmc", {"scramble": False}), 6, 1).omega, 0.0, 1e-8)


def test_halton_points():
    plain = quasi.halton(4, 3, None)
    close(plain[:, 0], [1 / 2, 1 / 4, 3 / 4, 1 / 8])
    close(plain[:, 1], [1 / 3, 2 / 3, 1 / 9, 4 / 9])
    close(plain[:, 2], [1 / 5, 2 / 5, 3 / 5, 4 / 5])
    scrambled = quasi.halton(125, 3, seeded(0))
    for column, cells in enumerate((64, 81, 125)):
        assert (scrambled[:cells, column] * cells).floor().unique().numel() == cells
    assert (scrambled - quasi.halton(125, 3, seeded(1))).abs().max() > 0.1


@pytest.mark.parametrize(("d", "count"), [(2, 1), (2, 9), (6, 5), (8, 64), (64, 128), (128, 700)])
def test_spherical_points(d, count):
    points = quasi.spherical_points(d, count)
    assert len(points) >= count
    close(points.square().sum(-1), 1.0)
    close(points.T @ points, len(points) / d * torch.eye(d, dtype=torch.float64), 1e-9)
    assert len(points.round(decimals=9).unique(dim=0)) == len(points)


def test_spherical_frequencies_are_a_subgroup():
    assert sorted(quasi._subgroup(4, 13)) == [1, 5, 8, 12]
    members = quasi._subgroup(32, 97)
    assert {a * b % 97 for a in members for b in members} == set(members)
    assert len(members) == 32


def test_spherical_radii_are_stratified():
    u = torch.tensor([2.0**-31, 1e-6, 0.1, 0.5, 0.9, 1 - 1e-6, 1 - 2.0**-31], dtype=torch.float64)
    for d in (1, 2, 16, 128):
        expected = torch.from_numpy(stats.chi(d).ppf(u.numpy()))
        torch.testing.assert_close(quasi.chi_quantile(u, d), expected, rtol=1e-7, atol=1e-12)
    for rotate in (True, False):
        norms = draw(("ssf", {"rotate": rotate}), 8, 20).omega.norm(dim=-1)
        strata = np.floor(stats.chi(8).cdf(norms.numpy()) * 20)
        assert sorted(strata) == list(range(20))
        assert list(strata) != list(range(20))


@pytest.mark.parametrize("order", [1, 2, 3, 8, 21, 64])
def test_gauss_hermite(order):
    nodes, weights = quadrature.gauss_hermite(order)
    expected_nodes, expected_weights = np.polynomial.hermite_e.hermegauss(order)
    close(nodes, torch.from_numpy(expected_nodes), 1e-13)
    close(weights, torch.from_numpy(expected_weights / expected_weights.sum()), 1e-13)
    for degree in range(0, min(2 * order, 20), 2):
        moment = float(math.prod(range(1, degree, 2)))
        assert abs((weights * nodes**degree).sum() / moment - 1) < 1e-12


def test_gauss_quadrature_frequencies():
    rows = build(("gq", {"order": 3}), 10, 10_000)().omega
    for node, probability in ((-math.sqrt(3), 1 / 6), (0.0, 2 / 3), (math.sqrt(3), 1 / 6)):
        frequency = (rows - node).abs().lt(1e-6).double().mean()
        assert abs(frequency - probability) < 4.5 * math.sqrt(probability * (1 - probability) / 100_000)


def gaussian_moment(powers):
    return math.prod(0 if k % 2 else math.prod(range(1, k, 2)) for k in powers)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_sparse_grid_is_exact(d, level, rotate):
    rule = draw(("sgq", {"level": level, "rotate": rotate}), d, 60)
    for powers in itertools.product(range(2 * level + 2), repeat=d):
        if sum(powers) <= 2 * level + 1:
            value = (rule.weight * (rule.omega ** torch.tensor(powers)).prod(-1)).sum()
            assert abs(value - gaussian_moment(powers)) < 1e-9, powers


def test_sparse_grid_sizes():
    for d in (4, 16, 64, 128):
        nodes, weights = quadrature.smolyak(d, 2)
        assert len(nodes) == quadrature.smolyak_size(d, 2) == 2 * d * d + 4 * d + 1
        close((weights[:, None] * nodes**4).sum(0), 3.0, 1e-8)
        assert abs((weights * nodes[:, 0] ** 2 * nodes[:, 1] ** 2).sum() - 1) < 1e-8
    nodes, weights = quadrature.smolyak(16, 1)
    assert len(nodes) == quadrature.smolyak_size(16, 1) == 33
    close(weights, [1 - 16 / 3] + [1 / 6] * 32)
    assert abs((weights * nodes[:, 0] ** 2 * nodes[:, 1] ** 2).sum()) < 1e-12  # what level 1 misses
    assert build(("sgq", {}), 16, 128).num_rows == 1 + 4 * 32
    assert build(("sgq", {}), 3, 12).num_rows == 12  # the centre weighs 1 - d/3 = 0
    assert build(("sgq", {"rotate": False}), 16, 128).num_rows == 33
    with pytest.raises(ValueError, match=r"level is 3, .* at most 200000 nodes; nearest level: 2"):
        build(("sgq", {"level": 3}), 64, 128)
    with pytest.raises(ValueError, match="use 'ssr'"):
        build(("sgq", {"level": 1}), 100_001, 1)


@pytest.mark.parametrize(("d", "m", "rows"), [(1, 3, 5), (7, 40, 33), (16, 24, 35), (64, 128, 131)])
def test_spherical_radial_identities(d, m, rows):
    rule = draw(("ssr", {}), d, m)
    assert len(rule.omega) == build(("ssr", {}), d, m).num_rows == rows
    assert abs(rule.weight.sum() - 1) < 1e-12
    close(rule.weight @ rule.omega, 0.0)
    second = torch.einsum("i,ij,ik->jk", rule.weight, rule.omega, rule.omega)
    close(second, torch.eye(d, dtype=torch.float64), 1e-11)
    third = torch.einsum("i,ij,ik,il->jkl", rule.weight, rule.omega, rule.omega, rule.omega)
    close(third, 0.0, 1e-10)


def test_antithetic_pairs():
    for m in (8, 7):
        rows = draw(("ssr", {"degree": 1}), 5, m).omega
        assert torch.equal(rows[:4], -rows[4:])
        assert len(rows) == 8


# ---- the law of the rows ----

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


# ---- learned ----

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
