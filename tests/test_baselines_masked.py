"""The mask as a coordinate: the same attention, without a mask."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from spectraformer.attention import clear_padding
from spectraformer.baselines.masked import folded_attention, masked_attention
from spectraformer.baselines.softmax import Softmax
from spectraformer.evaluation import deterministic

BATCH, HEADS = 3, 2
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.02, torch.float16: 0.003}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
causal_or_not = pytest.mark.parametrize("is_causal", [False, True])


def tokens(n=19, s=None, d=6, e=5, dtype=torch.float64, device="cpu", norm=1.0):
    s = n if s is None else s
    made = (torch.randn(BATCH, HEADS, *size, dtype=dtype, device=device) for size in ((n, d), (s, d), (s, e)))
    q, k, v = made
    return norm * q, norm * k, v


def masks(s):
    """Right padding, left padding, and neither; the last item has no key."""
    position = torch.arange(s)
    return torch.stack((position < s // 2, position >= s // 3, position < 0))[:, None]


def reference(q, k, v, seen, is_causal):
    """With all weights written out; 0 where nothing is seen."""
    visible = seen.unsqueeze(-2).expand(*q.shape[:3], -1)
    if is_causal:
        visible = visible & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf)
    scores = scores.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return (scores.softmax(-1) * visible) @ v


def cleared(seen, *inputs):
    return tuple(x.masked_fill(~seen.unsqueeze(-1), 0.0) for x in inputs)


def gradients(attend, *inputs):
    """Output, and gradients of some sum over it that tells its entries apart."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attend(*inputs)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape))
    return out.detach(), *(x.grad for x in inputs)


@causal_or_not
@every_dtype
@pytest.mark.parametrize(("d", "e"), [(6, 5), (8, 3), (4, 20)])
def test_folded_is_masked(dtype, is_causal, d, e):
    q, k, v = tokens(d=d, e=e, dtype=dtype)
    seen = masks(19)
    k, v = cleared(seen, k, v)
    found = gradients(lambda q, k, v: folded_attention(q, k, v, seen, is_causal=is_causal), q, k, v)
    exact = (x.double() for x in (q, k, v))
    expected = gradients(lambda q, k, v: reference(q, k, v, seen, is_causal), *exact)
    kept = seen.unsqueeze(-1)
    for name, x, y in zip(("out", "query", "key", "value"), found, expected, strict=True):
        if name in ("key", "value"):  # what was cleared takes no gradient
            x, y = x.masked_fill(~kept, 0.0), y.masked_fill(~kept, 0.0)
        torch.testing.assert_close(x.double(), y, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], msg=name)


def test_a_mask_for_every_head():
    q, k, v = tokens(7, 23)
    seen = torch.rand(BATCH, HEADS, 23) < 0.5
    torch.testing.assert_close(folded_attention(q, k, v, seen), reference(q, k, v, seen, False))


@every_dtype
@pytest.mark.parametrize("norm", [1.0, 100.0])
def test_removed_keys_have_no_weight_at_all(dtype, norm):
    q, k, v = tokens(dtype=dtype, norm=norm)
    seen = masks(19)[:2].expand(-1, HEADS, -1)
    q, k, v = q[:2], *cleared(seen, k[:2], v[:2])
    loud = v.masked_fill(~seen.unsqueeze(-1), 6e4)
    assert folded_attention(q, k, loud, seen).equal(folded_attention(q, k, v, seen))


@causal_or_not
@every_dtype
def test_without_any_key_output_and_gradients_are_zero(dtype, is_causal):
    q, k, v = tokens(dtype=dtype)
    seen = torch.zeros(BATCH, 1, 19, dtype=torch.bool)
    k, v = cleared(seen, k, v)
    out, of_query, of_key, of_value = gradients(
        lambda q, k, v: folded_attention(q, k, v, seen, is_causal=is_causal), q, k, v
    )
    assert all(x.eq(0).all() for x in (out, of_query, of_key)) and of_value.isfinite().all()


def test_causal_rows_before_the_first_key_are_zero():
    q, k, v = tokens()
    mask = (torch.arange(19) >= 5).expand(BATCH, -1)
    out = Softmax(6, HEADS, 19, 0)(q, k, v, mask, is_causal=True)
    assert out[:, :, :5].eq(0).all() and out[:, :, 5:].ne(0).any(-1).all()


@causal_or_not
def test_nan_in_padding_changes_nothing(is_causal):
    q, k, v = tokens(17)
    mask = masks(17)[:, 0]
    seen = mask[:, None]
    poisoned = [x.masked_fill(~seen.unsqueeze(-1), math.nan) for x in (k, v)]

    def attend(q, k, v):
        return folded_attention(q, *clear_padding(k, v, mask), seen, is_causal=is_causal)

    for x, y in zip(gradients(attend, q, k, v), gradients(attend, q, *poisoned), strict=True):
        assert x.equal(y)
    module = Softmax(6, HEADS, 17, 0)
    assert module(q, *poisoned, mask, is_causal=is_causal).equal(module(q, k, v, mask, is_causal=is_causal))


@pytest.mark.parametrize("seen", [None, masks(19)], ids=["all", "some"])
@causal_or_not
def test_on_each_device_it_is_the_same(seen, is_causal):
    q, k, v = tokens()
    everything = torch.ones(BATCH, 1, 19, dtype=torch.bool)
    k, v = cleared(everything if seen is None else seen, k, v)
    expected = reference(q, k, v, everything if seen is None else seen, is_causal)
    torch.testing.assert_close(masked_attention(q, k, v, seen, is_causal=is_causal), expected)


def test_dropout_keeps_the_mean():
    q, k, v = (x[:1, :1] for x in tokens(4))
    seen = masks(4)[:1]
    many = folded_attention(*(x.expand(8000, -1, -1, -1) for x in (q, k, v)), seen.expand(8000, -1, -1), dropout=0.4)
    error = (many.mean(0) - folded_attention(q, k, v, seen)[0]) / (many.std(0) / math.sqrt(8000))
    assert many.std(0).min() > 0 and error.abs().max() < 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@causal_or_not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_flash_attention_takes_it_bit_for_bit(dtype, is_causal):
    q, k, v = tokens(300, d=32, e=32, dtype=dtype, device="cuda")
    seen = masks(300).cuda()
    k, v = cleared(seen, k, v)

    def attend(q, k, v):
        return masked_attention(q, k, v, seen, is_causal=is_causal)

    with deterministic():
        chosen = gradients(attend, q, k, v)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            flash, again = gradients(attend, q, k, v), gradients(attend, q, k, v)
    exact = gradients(lambda q, k, v: reference(q, k, v, seen, is_causal), *(x.double() for x in (q, k, v)))
    kept = seen.unsqueeze(-1)
    for place, (x, y, z, w) in enumerate(zip(chosen, flash, again, exact, strict=True)):
        assert x.equal(y) and y.equal(z)
        if place > 1:
            x, w = x.masked_fill(~kept, 0.0), w.masked_fill(~kept, 0.0)
        torch.testing.assert_close(x.double(), w, atol=0.02, rtol=0.02)
