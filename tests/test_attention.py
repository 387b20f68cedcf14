"""Attention as a user calls it: exact limits, stability at large norms, gradients, memory, compilation, export."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

import spectraformer as sf
from spectraformer import registry

POSITIVE = [name for name, f in sf.COMPONENTS.items() if f.positive]
CAUSAL = [name for name, f in sf.COMPONENTS.items() if not f.needs_minimum]


def tokens(norm, b=1, h=2, n=200, d=64, dtype=torch.float64):
    """Queries and keys of norms norm / 2 to norm after scaling, and values."""
    q, k = (
        functional.normalize(torch.randn(b, h, n, d, dtype=dtype), dim=-1)
        * (norm * d**0.25)
        * torch.empty(b, h, n, 1, dtype=dtype).uniform_(0.5, 1)
        for _ in range(2)
    )
    return q, k, torch.randn(b, h, n, d, dtype=dtype)


def pair_of_precisions(component, weight="orf", d=64, m=128, **options):
    single = sf.FeatureMap(d, m, component, weight, num_heads=2, **options).eval()
    double = sf.FeatureMap(d, m, component, weight, num_heads=2, **options).eval()
    double.load_state_dict(single.state_dict())
    return single, double.double()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("component", POSITIVE)
@pytest.mark.parametrize("norm", [0.5, 2.83, 6, 12])
def test_float32_agrees_with_float64(component, norm, is_causal):
    if is_causal and component not in CAUSAL:
        pytest.skip("a function with a plus has no causal form")
    q, k, v = (x.float().double() for x in tokens(norm))
    single, double = pair_of_precisions(component)
    out = sf.random_feature_attention(q.float(), k.float(), v.float(), single, is_causal=is_causal)
    exact = sf.random_feature_attention(q, k, v, double, is_causal=is_causal)
    assert (out - exact).norm() / exact.norm() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("component", POSITIVE)
def test_positive_features_are_finite_at_norm_100(component, dtype):
    q, k, v = (x.to(dtype).requires_grad_() for x in tokens(100, n=70))
    feature_map = sf.FeatureMap(64, 64, component, "orf")
    for is_causal in (False, True) if component in CAUSAL else (False,):
        out = sf.random_feature_attention(q, k, v, feature_map, is_causal=is_causal)
        assert out.dtype == dtype and out.isfinite().all()
        assert out.min() >= v.min() and out.max() <= v.max()
        gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("component", sf.COMPONENTS)
def test_gradients_agree_with_finite_differences(component):
    """Inputs with the data-dependent parameters held still, and every learned parameter."""
    feature_map = sf.FeatureMap(3, 5, component, "gmm" if component not in DISCRETE else "mc", num_heads=2)
    feature_map.double().eval()
    q, k, v = (x.requires_grad_() for x in tokens(1.0, n=4, d=3))
    names, parameters = (
        zip(*feature_map.named_parameters(), strict=True) if list(feature_map.parameters()) else ((), ())
    )
    is_causal = component in CAUSAL and feature_map.data_dependent
    if feature_map.data_dependent and not is_causal:
        return  # + functions: parameters follow the data and are detached; covered by the contract kit

    def attend(q, k, v, *values):
        return torch.func.functional_call(
            Attend(feature_map, is_causal), dict(zip(prefixed, values, strict=True)), (q, k, v)
        )

    prefixed = [f"feature_map.{name}" for name in names]
    assert torch.autograd.gradcheck(attend, (q, k, v, *(p.detach().clone().requires_grad_() for p in parameters)))


DISCRETE = [name for name, f in sf.COMPONENTS.items() if f.needs_gaussian_rows]


class Attend(nn.Module):
    def __init__(self, feature_map, is_causal=False):
        super().__init__()
        self.feature_map = feature_map
        self.is_causal = is_causal

    def forward(self, q, k, v):
        return sf.random_feature_attention(q, k, v, self.feature_map, is_causal=self.is_causal)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_second_derivative_is_there_or_refused_but_never_taken_for_zero(backend):
    q, k, v = (torch.randn(1, 1, 20, 16, requires_grad=True) for _ in range(3))
    out = sf.random_feature_attention(q, k, v, sf.FeatureMap(16, 16, "posrf"), backend=backend)
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    penalty = gradient.square().sum()
    if backend == "cpu":
        with pytest.raises(RuntimeError, match="differentiate twice"):
            penalty.backward()
    else:
        assert torch.autograd.grad(penalty, q)[0].norm() > 0


def test_identities_of_attention():
    q, k, v = tokens(2.0, n=30)
    for variant in ("oprf-orf", "sderf-ssr", "hyprf-mm"):
        feature_map = sf.FeatureMap(64, 128, *sf.parse_variant(variant)).double()
        one = sf.random_feature_attention(q, k[:, :, :1], v[:, :, :1], feature_map)
        torch.testing.assert_close(one, v[:, :, :1].expand_as(one))
        equal = sf.random_feature_attention(q, k[:, :, :1].expand_as(k), v, feature_map)
        torch.testing.assert_close(equal, v.mean(-2, keepdim=True).expand_as(equal))
    posrf = sf.FeatureMap(64, 128, "posrf", "mc").double()
    mean = sf.random_feature_attention(torch.zeros_like(q), torch.zeros_like(k), v, posrf)
    torch.testing.assert_close(mean, v.mean(-2, keepdim=True).expand_as(mean))


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_exact_kernel_is_what_it_says(kernel, is_causal):
    q, k, v = tokens(1.5, b=2, n=20, d=8)
    mask = torch.rand(2, 20) > 0.3
    mask[1] = False
    scores = torch.einsum("bhnd,bhsd->bhns", q, k) / math.sqrt(8)
    if kernel == "gaussian":
        scores = -0.5 * (q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1) / math.sqrt(8)
    visible = mask[:, None, None].expand(2, 1, 20, 20)
    visible = visible & torch.ones(20, 20).tril().bool() if is_causal else visible
    expected = scores.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0) @ v
    out = sf.kernel_attention(q, k, v, kernel=kernel, key_padding_mask=mask, is_causal=is_causal)
    torch.testing.assert_close(out, expected)
    groups = sf.kernel_attention(torch.cat((q, q), 1), k, v, kernel=kernel, is_causal=is_causal, enable_gqa=True)
    each = sf.kernel_attention(q, k, v, kernel=kernel, is_causal=is_causal)
    # Query heads 0, 1 share key head 0; heads 2, 3 share key head 1.
    torch.testing.assert_close(groups[:, 0], each[:, 0])
    torch.testing.assert_close(groups[:, 3], each[:, 1])


def test_unsafe_denominators_are_counted():
    q, k, v = tokens(2.83, n=128)
    feature_map = sf.FeatureMap(64, 16, "trigrf", "orf").double()
    sf.random_feature_attention(*(x * 0.1 for x in (q, k)), v, feature_map)
    assert feature_map.unsafe_fraction == 0
    sf.random_feature_attention(q * 100, torch.zeros_like(k), v, feature_map)
    assert feature_map.unsafe_denominators.tolist()[1] == 2 * 2 * 128
    posrf = sf.FeatureMap(64, 16, "posrf", "orf").double()
    sf.random_feature_attention(q, k, v, posrf)
    assert posrf.unsafe_denominators.tolist() == [0, 0]


@pytest.mark.parametrize("component", CAUSAL)
def test_decoding_a_calibrated_map(component):
    q, k, v = tokens(1.0, n=24, d=16)
    feature_map = sf.FeatureMap(16, 32, component, "orf", center=True).double().eval()
    feature_map.calibrate(q, k)
    state = feature_map.init_state(1, 2, 16, dtype=torch.float64)
    outputs = []
    for t in range(24):
        out, state = sf.attention_step(*(x[:, :, t : t + 1] for x in (q, k, v)), feature_map, state)
        outputs.append(out)
    whole = sf.random_feature_attention(q, k, v, feature_map, is_causal=True)
    torch.testing.assert_close(torch.cat(outputs, 2), whole, rtol=1e-8, atol=1e-8)


MEANINGFUL = [
    f"{c}-{w}"
    for c, f in sf.COMPONENTS.items()
    for w, factory in sf.WEIGHTS.items()
    if registry.refusal(f, factory(2, 8, generator=torch.Generator())) is None
]


@pytest.mark.parametrize("variant", MEANINGFUL)
def test_every_meaningful_pair_attends_and_learns(variant):
    """All pairs, at a head dim and a number of features that no construction likes."""
    q, k, v = (x.float().requires_grad_() for x in tokens(0.7, b=2, n=9, d=10))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    attention = Attend(sf.FeatureMap(10, 23, *sf.parse_variant(variant), num_heads=2))
    out = sf.random_feature_attention(q, k, v, attention.feature_map, key_padding_mask=mask)
    assert out.shape == q.shape and out.isfinite().all()
    out.square().sum().backward()
    for name, tensor in (("query", q), ("key", k), ("value", v), *attention.named_parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all(), name
    assert (k.grad[1, :, 6:] == 0).all() and (v.grad[1, :, 6:] == 0).all()


COMPILED = ["posrf-orf", "oprf-fastfoodl", "gerf-gmm", "aderf-mm", "trigrf-qmc", "hyprf-ssr", "poisrf-mc", "geomrf+-mc"]


@pytest.mark.parametrize("variant", COMPILED)
def test_compiles_without_a_graph_break(variant):
    feature_map = sf.FeatureMap(16, 32, *sf.parse_variant(variant), num_heads=2)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 12:] = False
    q, k, v = (x.float().requires_grad_() for x in tokens(0.7, b=2, n=20, d=16))

    def attend(q, k, v):
        return sf.random_feature_attention(q, k, v, feature_map, key_padding_mask=mask)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    wanted = [q, k, v, *feature_map.parameters()]
    plain, fused = attend(q, k, v), compiled(q, k, v)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(plain.square().sum(), wanted)
    for found, gradient in zip(torch.autograd.grad(fused.square().sum(), wanted), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiles_with_the_default_compiler():
    feature_map = sf.FeatureMap(16, 32, "oprf", "orf").eval()
    q, k, v = (x.float() for x in tokens(0.7, n=20, d=16))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: sf.random_feature_attention(*x, feature_map), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v), sf.random_feature_attention(q, k, v, feature_map))


@pytest.mark.parametrize("variant", COMPILED)
def test_exports_with_any_length(variant):
    module = Attend(sf.FeatureMap(16, 32, *sf.parse_variant(variant), num_heads=2)).eval()
    q, k, v = (x.float() for x in tokens(0.7, b=2, n=20, d=16))
    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(module, (q, k, v), dynamic_shapes=({2: length},) * 3).module()
    for n in (20, 37):
        q, k, v = (x.float() for x in tokens(0.7, b=2, n=n, d=16))
        torch.testing.assert_close(exported(q, k, v), module(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("variant", ["oprf-orf", "trigrf-orf"])
def test_64k_tokens_fit_in_two_gigabytes(variant, is_causal):
    program = f"""
import torch, spectraformer as sf
torch.set_num_threads(1)
feature_map = sf.FeatureMap(64, 128, *sf.parse_variant({variant!r})).eval()
q, k, v = (0.1 * torch.randn(1, 4, 65536, 64) for _ in range(3))
with torch.no_grad():
    sf.random_feature_attention(q, k, v, feature_map, is_causal={is_causal})
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2 * 2**30
