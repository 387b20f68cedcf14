"""Fused trigonometric attention on a GPU against float64: output and every gradient, dtypes, sizes."""

import itertools

import pytest
import torch

from spectraformer.ops.triton.trigonometric import trigonometric_attention
from test_triton_trigonometric import NAMES, operands_of, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here"),
]
CASES = {  # b, h, g, n, s, d, e, m, and what else is special
    "plain": (2, 2, 1, 500, 700, 64, 64, 128, {}),
    "d 128, m 256": (1, 2, 1, 300, 500, 128, 128, 256, {}),
    "d 32": (2, 2, 1, 500, 700, 32, 32, 128, {}),
    "odd sizes": (2, 1, 3, 129, 333, 40, 72, 100, {"transposed": True, "shared": False}),
    "narrow values": (1, 2, 1, 300, 500, 96, 16, 160, {"bias": False}),
    "negative weights, keys removed": (1, 2, 1, 300, 700, 64, 64, 128, {"signed": True, "removed": slice(350, None)}),
}
# Of the output and of gradients, in norm, where denominators are a hundredth of their terms or more.
BOUNDS = {torch.bfloat16: (4e-3, 1e-2), torch.float16: (2e-3, 1e-2), torch.float32: (2e-5, 1e-4)}


@pytest.mark.parametrize(("dtype", "case"), list(itertools.product(BOUNDS, CASES)), ids=str)
def test_output_and_every_gradient_agree_with_float64_and_are_the_same_bits_again(dtype, case):
    *sizes, special = CASES[case]
    operands = operands_of(*sizes, special)
    tokens = [x.to("cuda", dtype) for x in operands[:3]]
    operands = [*tokens, *(None if x is None else x.cuda() for x in operands[3:])]
    exact = [None if x is None else x.double().requires_grad_() for x in operands]
    given = [x.requires_grad_() for x in operands if x is not None]
    out, unsafe = trigonometric_attention(*operands, 0.3)
    weight = torch.randn(out.shape, device="cuda").to(out.dtype)
    got = torch.autograd.grad(out, given, weight)
    again, _ = trigonometric_attention(*operands, 0.3)
    assert all(map(torch.equal, (out, *got), (again, *torch.autograd.grad(again, given, weight))))
    want, flags, _ = reference(*exact, 0.3)
    expected = torch.autograd.grad(want, [x for x in exact if x is not None], weight.double())
    assert torch.equal(unsafe, flags)
    names = [name for name, x in zip(NAMES, operands, strict=True) if x is not None]
    errors = {"out": ((out - want).norm() / want.norm()).item()}
    errors |= {name: ((x - y).norm() / y.norm()).item() for name, x, y in zip(names, got, expected, strict=True)}
    bounds = dict.fromkeys(errors, BOUNDS[dtype][1]) | {"out": BOUNDS[dtype][0]}
    assert {name: e for name, e in errors.items() if not e <= bounds[name]} == {}
