"""The algebra that each W promises in every draw."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from spectraformer.weights import gaussian, quadrature, quasi
from weight_variants import (
    build,
    close,
    draw,
    seeded,
)


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
