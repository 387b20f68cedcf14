"""Every weight matrix with the options that change what it promises, for the tests of W."""

import pytest
import torch

from spectraformer.weights import WEIGHTS

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


def close(actual, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand(actual.shape)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
