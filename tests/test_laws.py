"""Laws of attention: what must change nothing, what must change one thing, and which ways must agree.

Hypothesis draws shapes, dtypes, weight matrices and options; the component functions are taken from the table,
so that a new one is under these laws from its first day.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace as Case

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import spectraformer as sf
from spectraformer.components import pairs
from spectraformer.registry import refusal

# The laws hold exactly; what is left is the order of the sums, and in float64 the loss of inverting a second moment
# of fewer tokens than dims. bfloat16 rounds its output to 8 bits.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-6, torch.bfloat16: 2.0**-7}
# Signed features divide sums with cancellation, by a denominator that may itself be small.
SIGNED_LOSS = 30.0
SIGNED_NORM = 0.3
CAUSAL = [name for name, f in sf.COMPONENTS.items() if not f.needs_minimum]
POSITIVE = [name for name, f in sf.COMPONENTS.items() if f.positive]

every_component = pytest.mark.parametrize("component", list(sf.COMPONENTS))
every_causal_component = pytest.mark.parametrize("component", CAUSAL)
every_mode = pytest.mark.parametrize(
    ("component", "is_causal"), [(name, False) for name in sf.COMPONENTS] + [(name, True) for name in CAUSAL]
)


def laws(examples: int = 16) -> settings:
    """Reproducible, and without a deadline: CI machines stall."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        # The one fixture seeds torch once a test; every example has a generator of its own.
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def cases(**fixed: st.SearchStrategy) -> st.SearchStrategy[Case]:
    """Sizes and options; ssr has negative weights, which makes any f signed, and fastfoodl is learned, one W a head."""
    drawn = {
        "weight": st.sampled_from(["mc", "orf", "ssr", "fastfoodl"]),
        "kernel": st.sampled_from(["softmax", "gaussian"]),
        "center": st.booleans(),
        "dtype": st.sampled_from(list(TOLERANCE)),
        "scale": st.sampled_from([None, 0.3, 1.0]),
        "norm": st.sampled_from([0.3, 1.0, 3.0]),
        "per_head": st.booleans(),
        "seed": st.integers(0, 99),
        **{size: st.integers(1, most) for size, most in {"b": 3, "h": 3, "g": 2, "d": 6, "e": 6}.items()},
        **{size: st.integers(0, 7) for size in "ns"},
    }
    return st.builds(Case, **(drawn | fixed))


def some(*values: object) -> st.SearchStrategy:
    return st.sampled_from(values)


def varied(case: Case, **fixed: object) -> Case:
    return Case(**(vars(case) | fixed))


MASKS = {"keep": some(0.0, 0.5, 0.8), "garbage": some(math.nan, math.inf, -1e30), "self_attention": st.booleans()}


class Problem:
    """Tokens and a feature map for one case; the norm of tokens is cut where features are signed."""

    def __init__(self, component: str, case: Case, *, statistics: str = "auto", most_norm: float = 1e9) -> None:
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)
        weight = sf.WEIGHTS[case.weight](4, 8, generator=torch.Generator())
        self.map = sf.FeatureMap(
            case.d,
            48,
            component,
            "mc" if refusal(sf.COMPONENTS[component], weight) else case.weight,
            num_heads=case.h if case.per_head else None,
            kernel=case.kernel,
            center=case.center,
            statistics=statistics,
            seed=case.seed,
            dtype=torch.float64 if case.dtype == torch.float64 else None,
        ).eval()
        self.norm = min(case.norm, most_norm if self.map.positive else SIGNED_NORM)
        self.q = self.tokens(case.h * case.g, case.n)
        self.k = self.tokens(case.h, case.s)
        self.v = self.normal(case.b, case.h, case.s, case.e)
        if self.map.running is not None:
            # Moments of other tokens: those a new map starts with are too simple to find faults.
            self.map.calibrate(self.tokens(case.h * case.g, 9), self.tokens(case.h, 9))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.case.dtype)

    def tokens(self, heads: int, n: int) -> Tensor:
        """Tokens with a mean, or centring would have nothing to do."""
        d = self.case.d
        return (self.normal(self.case.b, heads, n, d) + 0.5) * (self.norm / math.sqrt(d))

    def mask(self, n: int, keep: float) -> Tensor:
        return torch.rand(self.case.b, n, generator=self.generator) < keep

    def attend(
        self, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None, **options: object
    ) -> Tensor:
        q, k, v = (own if x is None else x for x, own in zip((q, k, v), (self.q, self.k, self.v), strict=True))
        options = {"scale": self.case.scale, "enable_gqa": True} | options
        return sf.random_feature_attention(q, k, v, self.map, **options)

    def same(self, out: Tensor, expected: Tensor, loss: float = 1.0) -> None:
        loss *= 1.0 if self.map.positive else SIGNED_LOSS
        loss *= max(1.0, self.norm**2) if self.case.dtype != torch.bfloat16 else 1.0  # rounding of the logits
        tolerance = TOLERANCE[self.case.dtype] * loss
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def filled(x: Tensor, real: Tensor, garbage: float) -> Tensor:
    return x.masked_fill(~real[:, None, :, None], garbage)


@every_component
@laws(24)
@given(case=cases(), **MASKS)
def test_masked_tokens_are_as_good_as_absent(
    component: str, case: Case, keep: float, garbage: float, self_attention: bool
) -> None:
    """Padding on any side or in the middle, whatever stands there; the truncated sequences run one by one."""
    p = Problem(component, varied(case, n=case.s) if self_attention else case)
    keys = p.mask(p.case.s, keep)
    queries = keys if self_attention else p.mask(p.case.n, keep)
    out = p.attend(
        filled(p.q, queries, garbage),
        filled(p.k, keys, garbage),
        filled(p.v, keys, garbage),
        key_padding_mask=keys,
        query_padding_mask=None if self_attention else queries,
    )
    assert out.dtype == case.dtype
    for i in range(case.b):
        one = slice(i, i + 1)
        expected = p.attend(p.q[one, :, queries[i]], p.k[one, :, keys[i]], p.v[one, :, keys[i]])
        p.same(out[one, :, queries[i]], expected, 3)
        if not keys[i].any():
            assert not expected.any()


@every_mode
@laws(5)
@given(case=cases(n=st.integers(1, 5), s=st.integers(1, 5)), backend=some("auto", "torch"))
def test_without_real_keys_output_is_zero_and_gradients_finite(
    component: str, is_causal: bool, case: Case, backend: str
) -> None:
    p = Problem(component, varied(case, n=case.s) if is_causal else case)
    leaves = [x.requires_grad_() for x in (p.q, p.k, p.v)]
    none = torch.zeros(case.b, case.s, dtype=torch.bool)
    out = p.attend(key_padding_mask=none, is_causal=is_causal, backend=backend)
    assert not out.any()
    out.sum().backward()
    for x in (*leaves, *p.map.parameters()):
        assert x.grad is None or x.grad.isfinite().all()


@every_component
@laws()
@given(case=cases(), keep=some(0.0, 0.6, 1.0))
def test_order_of_keys_is_nothing_and_of_queries_that_of_outputs(component: str, case: Case, keep: float) -> None:
    p = Problem(component, case)
    real = p.mask(case.s, keep)
    all_queries = torch.ones(case.b, case.n, dtype=torch.bool)
    order, turn = (torch.randperm(size, generator=p.generator) for size in (case.n, case.s))
    out = p.attend(key_padding_mask=real, query_padding_mask=all_queries)
    q, k, v = p.q[:, :, order], p.k[:, :, turn], p.v[:, :, turn]
    turned = p.attend(q, k, v, key_padding_mask=real[:, turn], query_padding_mask=all_queries)
    p.same(turned, out[:, :, order], 3)


@every_mode
@laws(8)
@given(case=cases(n=st.integers(1, 7)), axis=some(0, 1))
def test_other_batch_items_and_heads_change_nothing(component: str, is_causal: bool, case: Case, axis: int) -> None:
    p = Problem(component, varied(case, s=case.n, b=case.b + 1, h=case.h + 1))
    before = p.attend(is_causal=is_causal)
    changed = [x.clone() for x in (p.q, p.k, p.v)]
    for x in changed:
        x.narrow(axis, 0, x.shape[axis] // p.k.shape[axis]).mul_(50.0)
    after = p.attend(*changed, is_causal=is_causal)
    first = case.g if axis else 1
    kept = before.shape[axis] - first
    p.same(after.narrow(axis, first, kept), before.narrow(axis, first, kept))


@every_causal_component
@laws()
@given(case=cases(n=some(2, 5, 70, 131)), now=st.floats(0, 1), size=some(1.0, 300.0))
def test_causal_output_ignores_the_future(component: str, case: Case, now: float, size: float) -> None:
    """Also a future key so large that what came before underflows in the chunk they share."""
    p = Problem(component, varied(case, s=case.n))
    t = 1 + int(now * (case.n - 2))
    q, k, v = (x.clone() for x in (p.q, p.k, p.v))
    for x in (q, k):
        x[:, :, t:] = torch.randn(x[:, :, t:].shape, generator=p.generator) * size
    v[:, :, t:] *= -1e3
    p.same(p.attend(q, k, v, is_causal=True)[:, :, :t], p.attend(is_causal=True)[:, :, :t], 3)


@every_causal_component
@laws()
@given(
    case=cases(n=some(1, 3, 6, 67, 130)),
    cuts=st.lists(st.floats(0, 1), max_size=4),
    padding=st.floats(0, 0.9),
    one_by_one=st.booleans(),
)
def test_steps_chunks_and_one_call_agree(
    component: str, case: Case, cuts: list[float], padding: float, one_by_one: bool
) -> None:
    """Any split, empty pieces too, after any left padding; a step leaves its state as it was, and as large."""
    n = case.n
    p = Problem(component, varied(case, s=n))
    real = torch.arange(n).expand(case.b, n) >= int(padding * n)
    k, v = filled(p.k, real, math.nan), filled(p.v, real, math.nan)
    whole = p.attend(None, k, v, is_causal=True, key_padding_mask=real)
    edges = list(range(min(n, 8) + 1)) if one_by_one else sorted(int(c * n) for c in cuts)
    state = p.map.init_state(case.b, case.h, case.e, dtype=torch.promote_types(case.dtype, torch.float32))
    shapes = [x.shape for x in state if x is not None]
    outputs = []
    for start, end in itertools.pairwise([0, *edges, n]):
        block = slice(start, end)
        before = [None if x is None else x.clone() for x in state]
        out, after = sf.attention_step(
            p.q[:, :, block],
            k[:, :, block],
            v[:, :, block],
            p.map,
            state,
            key_padding_mask=real[:, block],
            scale=case.scale,
            enable_gqa=True,
        )
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(state, before, strict=True))
        outputs.append(out)
        state = after
    assert [x.shape for x in state if x is not None] == shapes
    p.same(torch.cat(outputs, 2), whole, 3)


@every_causal_component
@laws()
@given(case=cases(n=some(1, 4, 66)), now=st.floats(0, 1))
def test_a_causal_query_sees_what_it_would_see_alone(component: str, case: Case, now: float) -> None:
    """Causal output t is the bidirectional one of query t and keys 0..t, with the same fixed parameters."""
    p = Problem(component, varied(case, s=case.n), statistics="running")
    t = int(now * (case.n - 1))
    alone = p.attend(p.q[:, :, t : t + 1], p.k[:, :, : t + 1], p.v[:, :, : t + 1])
    p.same(p.attend(is_causal=True)[:, :, t : t + 1], alone, 3)


@every_mode
@laws(12)
@given(case=cases(norm=some(0.1, 3.0, 30.0, 100.0), s=st.integers(1, 7), weight=some("mc", "fastfoodl")))
def test_positive_features_average_the_values(component: str, is_causal: bool, case: Case) -> None:
    """At any norm; signed features must only give 1 for values of 1."""
    p = Problem(component, varied(case, n=case.s) if is_causal else case)
    real = p.mask(case.s, 0.7)
    real[:, 0] = True
    out = p.attend(is_causal=is_causal, key_padding_mask=real)
    assert out.isfinite().all()
    if p.map.positive:
        value = p.v.repeat_interleave(case.g, dim=1)
        least, most = filled(value, real, math.inf), filled(value, real, -math.inf)
        if is_causal:
            least, most = least.cummin(2).values, most.cummax(2).values
        else:
            least, most = least.amin(2, keepdim=True), most.amax(2, keepdim=True)
        assert (out >= least - 1e-5).all() and (out <= most + 1e-5).all()
    ones = p.attend(v=torch.ones_like(p.v), is_causal=is_causal, key_padding_mask=real)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=2 * max(TOLERANCE[case.dtype], 1e-6))


@every_causal_component
@laws()
@given(case=cases(per_head=st.just(False), g=st.integers(2, 3)))
def test_grouped_queries_are_repeated_keys_and_values(component: str, case: Case) -> None:
    """Where parameters are fixed: those of the sequence at hand belong to a key head and all its queries."""
    p = Problem(component, case, statistics="running")
    k, v = (x.repeat_interleave(case.g, dim=1) for x in (p.k, p.v))
    p.same(p.attend(), p.attend(None, k, v, enable_gqa=False))


@every_component
@laws()
@given(case=cases(scale=some(0.25, 0.7, 2.0), dtype=st.just(torch.float64)))
def test_scale_is_its_root_on_queries_and_keys(component: str, case: Case) -> None:
    p, root = Problem(component, case), math.sqrt(case.scale)
    p.same(p.attend(), p.attend(p.q * root, p.k * root, scale=1.0), 3)


@pytest.mark.parametrize(
    ("component", "statistics"), [(name, "batch") for name in sf.COMPONENTS] + [(name, "running") for name in CAUSAL]
)
@laws(8)
@given(case=cases(dtype=st.just(torch.float64), n=st.integers(1, 7)), keep=some(0.5, 1.0))
def test_attention_is_the_quotient_of_dense_features(
    component: str, statistics: str, case: Case, keep: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The definition, in float64, without the rescaling that attention does, and without its blocks: one token each."""
    monkeypatch.setattr(pairs, "BLOCK_ELEMENTS", 1)
    p = Problem(component, case, statistics=statistics, most_norm=1.0)
    real = p.mask(case.s, keep)
    query, key = p.map.features(p.q, p.k, key_padding_mask=real, scale=case.scale)
    key, value = (x.repeat_interleave(case.g, dim=1) for x in (key, p.v))
    weights = query @ key.mT
    total = weights.sum(-1, keepdim=True)
    expected = torch.where(total == 0, 0.0, weights @ value / total)
    p.same(p.attend(key_padding_mask=real), expected)


@pytest.mark.parametrize("component", POSITIVE)
@laws()
@given(
    case=cases(
        weight=some("mc", "orf", "fastfoodl"),
        n=st.integers(1, 7),
        s=st.integers(1, 7),
    ),
    keep=some(0.0, 0.6, 1.0),
)
def test_backends_agree_in_outputs_and_gradients(component: str, case: Case, keep: float) -> None:
    p = Problem(component, varied(case, e=case.d))
    real = p.mask(case.s, keep)
    weight = p.normal(*p.q.shape[:3], case.d)
    found = []
    for backend in ("torch", "cpu"):
        leaves = [x.detach().clone().requires_grad_() for x in (p.q, p.k, p.v)]
        out = p.attend(*leaves, key_padding_mask=real, backend=backend)
        leaves += p.map.parameters()
        found.append(
            [out, *torch.autograd.grad((out * weight).sum(), leaves, materialize_grads=True, allow_unused=True)]
        )
    for expected, other in zip(*found, strict=True):
        p.same(other, expected, 20)


@every_component
def test_order_of_few_tokens_with_many_dims_is_nothing(component: str) -> None:
    """Second moments are then singular: which eigenvectors rounding picks must not matter."""
    fm = sf.FeatureMap(64, 64, component).eval()
    q, k, v = (torch.randn(64, 2, 16, 64) / (8 if i < 2 else 1) for i in range(3))
    order = torch.randperm(16)
    out = sf.random_feature_attention(q, k, v, fm, scale=1.0)
    turned = sf.random_feature_attention(q, k[:, :, order], v[:, :, order], fm, scale=1.0)
    torch.testing.assert_close(turned, out, rtol=1e-5, atol=1e-5)


@every_component
def test_nan_in_one_sequence_stays_there(component: str) -> None:
    """One bad sequence is shown by its own output, not by an exception, by zeros or by NaN in its neighbours."""
    q, k, v = (0.3 * torch.randn(3, 2, 5, 4) for _ in range(3))
    fm = sf.FeatureMap(4, 32, component).eval()
    before = sf.random_feature_attention(q, k, v, fm)
    q[1], k[1] = math.nan, math.nan
    after = sf.random_feature_attention(q, k, v, fm)
    assert after[1].isnan().all()
    torch.testing.assert_close(after[::2], before[::2], rtol=1e-5, atol=1e-5)


@every_component
@pytest.mark.parametrize("empty", ["batch", "queries", "keys", "everything"])
def test_empty_tensors_give_empty_or_zero_outputs(component: str, empty: str) -> None:
    """A last batch may be empty, and a filter may leave no token; that is no error."""
    sizes = {"batch": 2, "queries": 3, "keys": 4}
    b, n, s = (0 if empty in (axis, "everything") else size for axis, size in sizes.items())
    fm = sf.FeatureMap(6, 8, component)
    q, k, v = torch.randn(b, 4, n, 6), torch.randn(b, 2, s, 6), torch.randn(b, 2, s, 5)
    out = sf.random_feature_attention(q, k, v, fm, enable_gqa=True)
    assert out.shape == (b, 4, n, 5)
    assert out.isfinite().all() and (s or not out.any())
    query, key = fm.features(q, k)
    assert query.shape == (b, 4, n, fm.feature_dim) and key.shape == (b, 2, s, fm.feature_dim)
