"""The contract of every W: sizes, seeds, state, claims, refusals."""

import pytest
import torch

from spectraformer.weights import WEIGHTS
from weight_variants import (
    SHAPES,
    VARIANTS,
    assert_same,
    build,
    every_variant,
    is_fixed,
    label,
    perturb,
    seeded,
    weights_of,
)


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
