"""The forward of short sequences in one launch, on a GPU, against float64 and against two launches."""

import pytest
import torch

from spectraformer.ops import reference
from spectraformer.ops import triton as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here"),
]
CASES = {  # b, h, g, n, s, d, m
    "plain": (32, 8, 1, 128, 128, 64, 128),
    "the longest": (17, 8, 1, 256, 256, 64, 128),
    "odd sizes": (40, 4, 1, 129, 233, 40, 100),
    "grouped queries": (33, 4, 3, 80, 200, 64, 64),
    "one token": (64, 4, 1, 1, 1, 32, 128),
    "d 32": (32, 8, 1, 200, 150, 32, 128),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_one_launch_agrees_with_float64_and_with_two(case, dtype, monkeypatch):
    from spectraformer.ops.triton import forward
    from spectraformer.ops.triton.launch import PLANS

    b, h, g, n, s, d, m = CASES[case]
    torch.manual_seed(0)
    q, k, v = (torch.randn(b, x, y, d, device="cuda", dtype=dtype) for x, y in ((h * g, n), (h, s), (h, s)))
    u, w = ((torch.randn(1, h, m, d, device="cuda") * d**-0.25).to(dtype).float() for _ in range(2))
    a, t = torch.randn(1, h, m, device="cuda"), torch.randn(b, 1, s, device="cuda")
    t[0], t[1, :, ::2] = float("-inf"), float("-inf")
    PLANS.clear()
    out = kernels.landmark_attention(q, k, v, u, w, a, t)
    (plan,) = PLANS.values()
    assert len(plan.launches) == 1 and not out[0].any()
    assert torch.equal(out, kernels.landmark_attention(q, k, v, u, w, a, t))
    monkeypatch.setattr(forward, "choose_short", lambda *_: None)
    PLANS.clear()
    two = kernels.landmark_attention(q, k, v, u, w, a, t)
    assert ((out - two).norm() / two.norm()).item() < 3e-3
    none = (t == float("-inf")).all(-1, keepdim=True).expand(b, h, 1)
    bias = t.double().expand(b, h, s).masked_fill(none, 0.0)
    exact = [x.double() for x in (k, v)]
    landmarks = [x.double().expand(b, h, *x.shape[2:]) for x in (u, w, a)]
    want = reference.landmark_attention(
        q.double().reshape(b, h, g * n, d), *exact, *landmarks, bias, none.unsqueeze(-1)
    ).reshape(out.shape)
    assert ((out - want).norm() / want.norm()).item() < (3e-3 if dtype == torch.bfloat16 else 1e-3)
