"""Landmarks of the optimal rho in one kernel: in Triton's interpreter against float64, and compiled for a GPU."""

import json
import sys
from importlib.util import find_spec

import pytest
import torch

from offline_kernels import assemble, run_program
from spectraformer.components.exponential import OPRF
from spectraformer.components.statistics import Moments, mean_squared_sum, optimal_rho

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
# b, p, g, m, d, size of tokens
CASES = {
    "one W": (2, 3, 1, 64, 16, 1.0),
    "one W a head": (2, 3, 3, 64, 16, 1.0),
    "odd sizes": (1, 2, 2, 70, 20, 1.0),
    "one landmark": (1, 1, 1, 1, 16, 1.0),
    "wide": (1, 1, 1, 40, 256, 1.0),
    "large norms": (1, 2, 1, 32, 16, 30.0),
    "tokens that are 0": (1, 2, 1, 32, 16, 0.0),
}


@pytest.fixture(scope="module")
def interpreted():
    return run_program(__file__, "interpret", interpret=True)


@pytest.mark.parametrize("case", CASES)
def test_landmarks_and_weights_agree_with_float64(interpreted, case):
    assert max(interpreted[case]) < 2e-6


def test_moments_of_nan_give_nan_of_their_head_alone(interpreted):
    assert interpreted["nan"] == [True, False]


def test_the_feature_map_takes_the_kernel_where_it_may(interpreted):
    assert interpreted["library"] == {
        "eager": 1,
        "watched": 0,
        "a W with gradients": 0,
        "bfloat16 W": 0,
        "running moments": 1,
    }


def test_without_a_gpu_rho_is_fitted_as_ever():
    one = Moments(torch.zeros(1, 1, 8), torch.full((1, 1, 8), 2.0))
    parameters = OPRF(8, generator=torch.Generator()).fit(one, one)
    assert parameters.moments is None and torch.equal(parameters.rho, optimal_rho(mean_squared_sum(one, one), 8))


def test_the_kernel_compiles_for_hopper_without_spills():
    for found in run_program(__file__, "compile", interpret=False):
        assert found["spills"] == 0 and found["registers"] <= 128, found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here")
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_too_and_a_nan_shows(case):
    from spectraformer.ops.triton.optimal import optimal_landmarks

    operands = [x.cuda() for x in operands_of(*CASES[case])]
    for x, y in zip(optimal_landmarks(*operands), exact(*(x.double() for x in operands)), strict=True):
        assert ((x - y).abs().max() / y.abs().max()).item() < 2e-6
    operands[0][0, 0, 3] = float("nan")
    assert optimal_landmarks(*operands)[1][0, 0].isnan().all()


def operands_of(b, p, g, m, d, size):
    mean = [size * torch.randn(b, p, d) for _ in range(2)]
    second = [x.square() + size * torch.rand(b, p, d) for x in mean]
    omega, log_weight = torch.randn(g, m, d), torch.randn(1, g, m)
    half = 0.5 * omega.square().sum(-1).unsqueeze(0)
    return [mean[0], second[0], mean[1], second[1], omega, half, log_weight + half]


def exact(q_mean, q_second, k_mean, k_second, omega, half, start):
    """As the formulas of the module say, rho first."""
    d = omega.shape[-1]
    phi = (q_second + k_second + 2 * q_mean * k_mean).sum(-1)
    rho = (2 * d / (2 * phi + d + torch.sqrt((2 * phi + d) ** 2 + 8 * d * phi))).unsqueeze(-1)  # (b, p, 1)
    ratio = (1 + rho) / (2 * rho)
    bias = start - half + 0.5 * d * ratio.log() - (1 - rho) / (4 * rho) * 2 * half
    return omega * ratio.sqrt().unsqueeze(-1), bias


def interpret():
    from torch.utils._python_dispatch import TorchDispatchMode

    import spectraformer as sf
    from spectraformer.ops.triton import optimal

    torch.manual_seed(0)
    results = {}
    for name, case in CASES.items():
        operands = operands_of(*case)
        got, want = optimal.optimal_landmarks(*operands), exact(*(x.double() for x in operands))
        results[name] = [((x - y).abs().max() / y.abs().max()).item() for x, y in zip(got, want, strict=True)]
    operands = operands_of(*CASES["odd sizes"])
    operands[0][0, 0, 3] = float("nan")
    landmarks, bias = optimal.optimal_landmarks(*operands)
    results["nan"] = [bool(x.isnan().any()) for x in (bias[0, 0], torch.cat((landmarks[0, 1].flatten(), bias[0, 1])))]

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            return operation(*args, **(kwargs or {}))

    run, calls = optimal.optimal_landmarks, []
    optimal.optimal_landmarks = lambda *x: calls.append(x) or run(*x)
    q = torch.randn(1, 2, 9, 16)

    def count(made, **options):
        calls.clear()
        sf.random_feature_attention(q, q, q, made, backend="triton", **options)
        return len(calls)

    library = {"eager": count(sf.FeatureMap(16, 32))}
    with Watching():
        library["watched"] = count(sf.FeatureMap(16, 32))
    learned = sf.FeatureMap(16, 32)
    learned.weight.omega.requires_grad_()
    library["a W with gradients"] = count(learned)
    library["bfloat16 W"] = count(sf.FeatureMap(16, 32, dtype=torch.bfloat16))
    library["running moments"] = count(sf.FeatureMap(16, 32, statistics="running").eval())
    sys.stdout.write(json.dumps(results | {"library": library}))


def compile_all():
    from spectraformer.ops.triton.optimal_kernel import plan_optimal_landmarks

    def meta(*shape):
        return torch.empty(*shape, device="meta")

    results = []
    for d in (16, 64, 256):
        moments = [meta(8, 8, d) for _ in range(4)]
        launches, _ = plan_optimal_landmarks([*moments, meta(8, 256, d), meta(1, 8, 256), meta(1, 8, 256)])
        results += [assemble(x, ()) for x in launches]
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]]()
