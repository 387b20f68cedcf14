"""The public contract kit: every entry of both tables passes it, and it says in words what is broken."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import spectraformer as sf
from spectraformer.components import ComponentFunction
from spectraformer.components.exponential import PosRF
from spectraformer.components.trigonometric import TrigRF
from spectraformer.testing import ContractError, Report, check_component, check_weight
from spectraformer.weights import Draw, SampledWeight
from spectraformer.weights.gaussian import Gaussian


@pytest.mark.parametrize("name", sf.WEIGHTS)
def test_every_weight_matrix_keeps_its_contract(name):
    report = check_weight(sf.WEIGHTS[name], draws=1000)
    assert len(report.passed) > 50 and not report.failed


@pytest.mark.parametrize("name", sf.COMPONENTS)
def test_every_component_function_keeps_its_contract(name):
    report = check_component(sf.COMPONENTS[name], draws=1500)
    assert len(report.passed) > 15 and not report.failed


class WrongScale(SampledWeight):
    def sample(self, generator):
        return Draw(1.1 * torch.randn(self.num_features, self.head_dim, generator=generator, dtype=torch.float64))


class ForgetsSeed(SampledWeight):
    def sample(self, generator):
        return Draw(torch.randn(self.num_features, self.head_dim, dtype=torch.float64))


class PlainAttribute(Gaussian):
    """Keeps its rows where state_dict does not look, as published code has done."""

    def __init__(self, head_dim, num_features, *, num_heads=None, generator):
        super().__init__(head_dim, num_features, num_heads=num_heads, generator=generator)
        rows = self.omega
        del self.omega
        self.rows = rows

    @property
    def num_rows(self):
        return self.num_features

    def forward(self):
        return sf.Projection(self.rows, self.log_abs_weight, self.sign_weight)

    def redraw(self, generator):
        self.rows = torch.randn(self.rows.shape, generator=generator)


class WrongWeights(SampledWeight):
    def sample(self, generator):
        omega = torch.randn(self.num_features, self.head_dim, generator=generator, dtype=torch.float64)
        return Draw(omega, weight=torch.ones(self.num_features, dtype=torch.float64))


class FrozenRedraw(Gaussian):
    def redraw(self, generator):
        pass


class Idle(Gaussian):
    """Claims to learn, with a parameter that nothing depends on."""

    learned = True

    def __init__(self, head_dim, num_features, *, num_heads=None, generator):
        super().__init__(head_dim, num_features, num_heads=num_heads, generator=generator)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self):
        made = super().forward()
        return sf.Projection(made.omega.clone().requires_grad_(), made.log_abs_weight, made.sign_weight)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (WrongScale, r"exp\(1/2\).*along an axis.*found z = "),
        (WrongScale, r"E \|omega\|\^2 = d.*found z = "),
        (ForgetsSeed, r"draws from its generator only"),
        (PlainAttribute, r"loaded state_dict gives the same W"),
        (WrongWeights, r"weights a_i sum to 1"),
        (FrozenRedraw, r"redraw changes the rows"),
        (Idle, r"finite gradient reaches parameter scale"),
        (lambda *args, **kwargs: None, r"is a WeightMatrix"),
        (Gaussian.__mro__[1], r"abstract"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_broken_weight_matrix_is_told_what_is_wrong(factory, words):
    with pytest.raises(ContractError, match=words):
        check_weight(factory, draws=800)


class NoNorm(PosRF):
    """Without -|x|^2 / 2: neither kernel."""

    def forward(self, tokens, projection, parameters):
        omega = projection.omega.unsqueeze(0)
        zero = lambda x: torch.zeros_like(x[..., 0])  # noqa: E731
        return tokens.exponential(omega, omega, projection.log_abs_weight.unsqueeze(0), zero, zero)


class PerTokenMaximum(PosRF):
    """Subtracts each key's largest log-feature, the commonest error in published code."""

    def forward(self, tokens, projection, parameters):
        pair = super().forward(tokens, projection, parameters)
        top = (pair.key @ pair.key_landmarks.mT).amax(-1)
        return replace(pair, full_key_bias=lambda: -top, key_quadratic=None)


class PositionInBatch(PosRF):
    """Scales by a mean over the batch: one example changes another."""

    def forward(self, tokens, projection, parameters):
        pair = super().forward(tokens, projection, parameters)
        shift = tokens.raw_key.mean() * torch.arange(pair.key_bias.shape[-1])
        shifted = pair.key_bias + shift.to(pair.key_bias.dtype)
        return replace(pair, full_key_bias=lambda: shifted, key_quadratic=None)


class WrongCount(TrigRF):
    def feature_dim(self, num_rows):
        return num_rows


class ClaimsPositive(TrigRF):
    positive = True


class Detached(PosRF):
    def forward(self, tokens, projection, parameters):
        pair = super().forward(tokens, projection, parameters)
        object.__setattr__(pair, "key", pair.key.detach())
        return pair


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (NoNorm, r"is the softmax kernel.*found z = "),
        (PerTokenMaximum, r"is the softmax kernel.*found z = "),
        (PositionInBatch, r"another batch item changes nothing"),
        (WrongCount, r"features are \(b, h, n, feature_dim\)"),
        (ClaimsPositive, r"positive features are Exponential"),
        (Detached, r"agree with finite differences"),
        (ComponentFunction, r"abstract"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_broken_component_function_is_told_what_is_wrong(factory, words):
    with pytest.raises(ContractError, match=words):
        check_component(factory, draws=800)


def test_a_report_shows_what_passed_and_what_failed():
    report = Report("thing")
    report.expect(True, "holds")
    report.expect(False, "does not", "3")
    report.attempt("raises", lambda: math.sqrt(-1))
    text = str(report)
    assert "1 checks passed, 2 failed" in text
    assert "FAILED  does not; found 3" in text and "FAILED  raises; raised ValueError" in text
    with pytest.raises(ContractError, match="does not; found 3"):
        report.verdict()
