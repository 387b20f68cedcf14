"""What a feature map keeps between calls is what it would compute anew, whatever happened to W in between."""

import copy
import pickle

import pytest
import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import spectraformer as sf

D, M = 8, 16
# Each keeps something else: landmarks, both signs of them, norms of rows, copies for a redraw before backward.
MAPS = {
    "posrf": {},
    "hyprf": {},
    "oprf": {},
    "posrf, redrawn on schedule": {"redraw_every": 1000},
}


@pytest.fixture(params=MAPS)
def feature_map(request):
    return sf.FeatureMap(D, M, request.param.partition(",")[0], "mm", **MAPS[request.param])


def attend(feature_map):
    generator = torch.Generator().manual_seed(0)
    dtype = feature_map.weight.omega.dtype
    q, k, v = (torch.randn(1, 2, 5, D, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    out = sf.random_feature_attention(q, k, v, feature_map)
    return out if not out.requires_grad else torch.stack([out, *torch.autograd.grad(out.sum(), (q, k, v))])


class Watching(TorchDispatchMode):
    """Changes nothing; but what runs under it may be a recording."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return operation(*args, **(kwargs or {}))


def anew(feature_map):
    with Watching():
        return attend(feature_map)


def other(feature_map):
    made = copy.deepcopy(feature_map)
    made.redraw()
    return made


@torch.no_grad()
def edit(feature_map):
    feature_map.weight.omega.mul_(2.0)


@torch.no_grad()
def edit_weights_of_the_rule(feature_map):
    feature_map.weight.log_abs_weight.copy_(torch.randn(M))


@torch.inference_mode()
def edit_in_inference(feature_map):
    feature_map.weight.omega.mul_(2.0)


def replace(feature_map):
    feature_map.weight.omega = 2 * feature_map.weight.omega


def replace_by_a_view(feature_map):
    """The same memory and version, read otherwise."""
    omega = feature_map.weight.omega
    feature_map.weight.omega = omega.view(1, D, M).transpose(1, 2)


def replace_data(feature_map):
    feature_map.weight.omega.data = 2 * feature_map.weight.omega


def to_another_dtype_and_back(feature_map):
    """Two moves: the last buffer may have the identity, the address and the version of the first."""
    feature_map.to(torch.bfloat16)
    feature_map.to(torch.float32)


CHANGES = {
    "redraw": lambda x: x.redraw(),
    "load_state_dict": lambda x: x.load_state_dict(other(x).state_dict()),
    "load_state_dict, assigned": lambda x: x.load_state_dict(other(x).state_dict(), assign=True),
    "edit": edit,
    "edit of the rule": edit_weights_of_the_rule,
    "edit in inference": edit_in_inference,
    "replaced": replace,
    "replaced by a view": replace_by_a_view,
    "data replaced": replace_data,
    "another dtype": lambda x: x.double(),
    "another dtype and back": to_another_dtype_and_back,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weight_shows_in_the_next_call(feature_map, change):
    before = attend(feature_map)
    assert torch.equal(attend(feature_map), before) and torch.equal(anew(feature_map), before)
    CHANGES[change](feature_map)
    after = attend(feature_map)
    assert after.dtype != before.dtype or not torch.equal(after, before)
    assert torch.equal(after, anew(feature_map))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_keeps_nothing_of_the_original(copied):
    """Versions of the copied buffers start at 0, and reach that of the original by other edits."""
    feature_map = sf.FeatureMap(D, M, "posrf", "mm")
    edit(feature_map)
    attend(feature_map)
    assert feature_map.weight._kept is not None
    weight = copied(feature_map.weight)
    assert weight._kept is None
    twin = sf.FeatureMap(D, M, "posrf", weight)
    assert torch.equal(attend(twin), attend(feature_map))
    edit(twin)
    assert torch.equal(attend(twin), anew(twin))
    assert {name.split(".")[-1] for name in feature_map.state_dict()} <= {
        "omega",
        "log_abs_weight",
        "sign_weight",
        "_extra_state",
    }


def test_buffers_lent_for_one_call_are_those_of_that_call(feature_map):
    before = attend(feature_map)
    lent = {name: x for name, x in other(feature_map).named_buffers() if name.startswith("weight.")}
    q = torch.randn(1, 2, 5, D)
    mine, theirs = feature_map(q, q), functional_call(feature_map, lent, (q, q))
    assert not torch.equal(mine.query_landmarks, theirs.query_landmarks)
    assert torch.equal(attend(feature_map), before)


def test_gradients_of_a_weight_that_has_them_flow(feature_map):
    attend(feature_map)
    feature_map.weight.omega.requires_grad_()
    q = torch.randn(1, 2, 5, D)
    for _ in range(2):
        out = sf.random_feature_attention(q, q, q, feature_map)
        (found,) = torch.autograd.grad(out.square().sum(), feature_map.weight.omega)
        assert found.abs().sum() > 0


def test_what_inference_kept_can_be_trained_with(feature_map):
    with torch.inference_mode():
        attend(feature_map)
    assert feature_map.weight._kept is not None
    assert torch.equal(attend(feature_map), anew(feature_map))


def test_a_redraw_between_forward_and_backward_changes_no_gradient():
    feature_map = sf.FeatureMap(D, M, "posrf", "mm", redraw_every=1000)
    q = torch.randn(1, 2, 5, D, requires_grad=True)
    (want,) = torch.autograd.grad(sf.random_feature_attention(q, q, q, feature_map).sum(), q)
    out = sf.random_feature_attention(q, q, q, feature_map)
    feature_map.redraw()
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], want)


def test_a_weight_made_in_inference_is_used_as_it_is():
    with torch.inference_mode():
        feature_map = sf.FeatureMap(D, M, "posrf", "mm")
        before = attend(feature_map)
        feature_map.weight.omega.mul_(2.0)
        assert not torch.equal(attend(feature_map), before)
    assert feature_map.weight._kept is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here")
@pytest.mark.parametrize("component", ["posrf", "oprf"])
def test_every_replay_of_a_graph_sees_the_weight_of_its_time(component):
    feature_map = sf.FeatureMap(64, 128, component, "mm", device="cuda")
    q = torch.randn(1, 2, 200, 64, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        before = sf.random_feature_attention(q, q, q, feature_map)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = sf.random_feature_attention(q, q, q, feature_map)
        for _ in range(2):
            graph.replay()
            assert torch.equal(found, sf.random_feature_attention(q, q, q, feature_map))
            feature_map.redraw()
        assert not torch.equal(before, sf.random_feature_attention(q, q, q, feature_map))


def test_landmarks_are_computed_once():
    feature_map, q = sf.FeatureMap(D, M, "posrf", "mm"), torch.randn(1, 2, 5, D)
    first, second = feature_map(q, q), feature_map(q, q)
    assert first.query_landmarks is second.query_landmarks and first.key_quadratic() is second.key_quadratic()
    with Watching():
        assert feature_map(q, q).query_landmarks is not first.query_landmarks
    other_scale = feature_map(q, q, scale=0.1)
    assert not torch.equal(other_scale.query_landmarks, first.query_landmarks)
