"""What lies between the attentions, compiled: the same function with the same gradients, and an honest dropout."""

from functools import partial

import pytest
import torch

from spectraformer import stretches
from spectraformer.config import AttentionConfig, ModelConfig
from spectraformer.model import Classifier
from spectraformer.stretches import PLAIN, Dropout, compile_stretches, hashed_dropout, split_heads


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without its code generator, and without what was compiled before."""
    torch.compiler.reset()
    made = stretches.compiled.__wrapped__
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(stretches, "compiled", made)
    yield
    torch.compiler.reset()


def classifier(attention="posrf-orf", dropout=0.0):
    return Classifier(
        ModelConfig(width=16, hidden=24, classifier=8, dropout=dropout),
        AttentionConfig(name=attention, num_features=16),
        vocab_size=11,
        max_length=20,
        num_classes=3,
    )


def batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 11, (4, 1, 20), generator=generator, dtype=torch.uint8)
    return tokens, torch.tensor([[20], [13], [5], [1]])


def gradients(model, precision=torch.float32):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        out = model(*batch())
    out.float().square().sum().backward()
    return {"out": out.detach(), **{name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}}


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_compiled_stretches_are_the_plain_ones(traced, precision, tolerance):
    model = classifier().train()
    plain = gradients(model, precision)
    assert compile_stretches(model.encoder, partial(gradients, model, precision)) is None
    assert model.encoder.stretches is not PLAIN
    fused = gradients(model, precision)
    assert fused.keys() == plain.keys()
    for name, x in plain.items():
        assert fused[name].dtype == x.dtype
        assert (fused[name] - x).norm() <= tolerance * x.norm(), name


def test_another_attention_compiles_nothing_anew(traced, monkeypatch):
    compiled = stretches.compiled()
    monkeypatch.setattr(stretches, "compiled", lambda: compiled)
    first, second = classifier("posrf-orf").train(), classifier("oprf-mc").train()
    compile_stretches(first.encoder, partial(gradients, first))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert compile_stretches(second.encoder, partial(gradients, second)) is None


def test_where_nothing_compiles_training_goes_on_as_it_is(monkeypatch):
    def broken(*args):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(stretches, "compiled", lambda: PLAIN._replace(enter=broken))
    model = classifier().train()
    assert compile_stretches(model.encoder, partial(gradients, model)) == "no compiler"
    assert model.encoder.stretches is PLAIN


def test_a_mistake_that_is_not_the_compilers_comes_out(traced):
    model = classifier().train()

    def rehearse():
        raise RuntimeError("a mistake of its own")

    with pytest.raises(RuntimeError, match="a mistake of its own"):
        compile_stretches(model.encoder, rehearse)


def test_evaluation_is_never_compiled(monkeypatch):
    model = classifier()
    model.encoder.stretches = None
    model.eval()(*batch())
    with pytest.raises(TypeError):
        model.train()(*batch())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_hashed_dropout_is_dropout(p):
    """Mean, variance between drawings, independence of neighbours and of drawings, at 6 standard deviations."""
    torch.manual_seed(0)
    drawings = torch.stack([hashed_dropout(torch.ones(64, 256), p) for _ in range(64)])
    kept = drawings != 0
    assert torch.all(drawings[kept] == torch.tensor(1.0) / (1 - p))
    dropped = (~kept).double()
    n = dropped.numel()
    assert abs(dropped.mean() - p) < 6 * (p * (1 - p) / n) ** 0.5
    shares = dropped.mean((1, 2))
    expected = (p * (1 - p) / dropped[0].numel()) ** 0.5
    assert 0.6 * expected < shares.std() < 1.4 * expected, "shares of single drawings scatter as they must"
    for a, b in (
        (dropped[:, :, 1:], dropped[:, :, :-1]),
        (dropped[:, 1:], dropped[:, :-1]),
        (dropped[1:], dropped[:-1]),
    ):
        both = ((a - p) * (b - p)).mean()
        assert abs(both) < 6 * p * (1 - p) / a.numel() ** 0.5


def test_both_drawn_numbers_choose_the_mask(monkeypatch):
    def mask(*seeds):
        monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.tensor(seeds))
        return hashed_dropout(torch.ones(2000), 0.5) != 0

    reference = mask(5, 10)
    for seeds in ((6, 10), (5, 12)):
        assert 0.4 < (mask(*seeds) == reference).double().mean() < 0.6, seeds


def test_heads_are_split_as_autograd_would():
    x = torch.randn(2, 5, 18, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([part.unflatten(-1, (2, 3)).transpose(1, 2) for part in x.split(6, dim=-1)])
    weights = torch.randn_like(expected)
    found = torch.stack(split_heads(x, 2, PLAIN.merge))
    assert torch.equal(found, expected)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), x)[0] for out in (found, expected))
    assert torch.equal(ours, theirs)


def test_hashed_dropout_follows_the_seed_and_carries_gradients():
    x = torch.randn(5, 7, requires_grad=True)
    torch.manual_seed(1)
    first = hashed_dropout(x, 0.4)
    torch.manual_seed(1)
    assert torch.equal(hashed_dropout(x, 0.4), first)
    assert not torch.equal(hashed_dropout(x, 0.4), first)
    (gradient,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(gradient, (first != 0) / 0.6)
    assert hashed_dropout(x.bfloat16(), 0.4).dtype == torch.bfloat16


def test_dropout_that_is_not_compiled_is_torchs():
    x = torch.ones(100)
    torch.manual_seed(2)
    expected = torch.nn.functional.dropout(x, 0.3)
    torch.manual_seed(2)
    assert torch.equal(Dropout(0.3)(x), expected)
    assert torch.equal(Dropout(0.3).eval()(x), x)
