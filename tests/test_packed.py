"""Packed sequences: each is attended to on its own, and bad boundaries are answered in words."""

import pytest
import torch

import spectraformer as sf

LENGTHS = (5, 1, 0, 12, 7)
CU = torch.tensor([0, 5, 6, 6, 18, 25])


def tokens(heads=2, dim=8, count=25, dtype=torch.float64):
    return torch.randn(count, heads, dim, dtype=dtype)


def one_by_one(q, k, v, feature_map, cu, cu_key, **options):
    """The definition: a call a sequence."""
    parts = []
    for a, b, c, d in zip(cu[:-1], cu[1:], cu_key[:-1], cu_key[1:], strict=True):
        sequence = [x[i:j].transpose(0, 1).unsqueeze(0) for x, i, j in ((q, a, b), (k, c, d), (v, c, d))]
        parts.append(sf.random_feature_attention(*sequence, feature_map, **options)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("variant", ["posrf-orf", "oprf-orf", "saderf-qmc", "trigrf-orf", "discrete"])
@pytest.mark.parametrize("longest", [12, 16])
def test_every_sequence_is_attended_to_on_its_own(variant, longest):
    names = ("poisrf", "mc") if variant == "discrete" else variant.split("-")
    feature_map = sf.FeatureMap(8, 16, *names).double()
    inputs = [x.requires_grad_() for x in (tokens(), tokens(), tokens(dim=6))]
    got = sf.packed_random_feature_attention(*inputs, feature_map, CU, longest)
    want = one_by_one(*inputs, feature_map, CU, CU)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(got)
    for x, y in zip(torch.autograd.grad(got, inputs, weight), torch.autograd.grad(want, inputs, weight), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_causal_cross_and_grouped():
    feature_map = sf.FeatureMap(8, 16, "posrf").double()
    q, k, v = tokens(heads=6), tokens(), tokens()
    causal = sf.packed_random_feature_attention(q, k, v, feature_map, CU, 12, is_causal=True, enable_gqa=True)
    want = one_by_one(q, k, v, feature_map, CU, CU, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(causal, want, rtol=1e-10, atol=1e-10)
    other = torch.tensor([0, 3, 3, 4, 9, 11], dtype=torch.int32)
    cross = sf.packed_random_feature_attention(
        q, k[:11], v[:11], feature_map, CU, 12, cu_seqlens_key=other, max_seqlen_key=5, enable_gqa=True
    )
    torch.testing.assert_close(
        cross, one_by_one(q, k, v, feature_map, CU, other, enable_gqa=True), rtol=1e-10, atol=1e-10
    )
    assert not cross[5:6].any()  # a sequence without keys


def test_compiles_without_a_graph_break():
    feature_map = sf.FeatureMap(8, 16, "posrf")
    q = tokens(dtype=torch.float32)
    compiled = torch.compile(sf.packed_random_feature_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(q, q, q, feature_map, CU, 12), sf.packed_random_feature_attention(q, q, q, feature_map, CU, 12)
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cu_seqlens": CU.float()}, "dtype torch.float32; expected int32 or int64"),
        ({"cu_seqlens": CU.unsqueeze(0)}, r"cu_seqlens is \(1, 6\); expected a tensor with one entry more"),
        ({"cu_seqlens": [0, 25]}, "cu_seqlens is list"),
        ({"max_seqlen": 0}, "max_seqlen is 0"),
        ({"max_seqlen": 11}, "a sequence of 12 tokens; expected at most 11"),
        ({"cu_seqlens": CU[:-1]}, r"cu_seqlens is \[0, 5, 6, 6, 18\]; expected 0, ..., 25, ascending"),
        ({"cu_seqlens": CU.flip(0)}, "ascending"),
        ({"key": torch.randn(9, 2, 8)}, "key has 9 tokens and query 25; expected as many, or cu_seqlens_key"),
        ({"query": torch.randn(1, 25, 2, 8)}, r"query has shape \(1, 25, 2, 8\); expected \(tokens"),
        ({"cu_seqlens_key": CU}, "given together"),
        ({"cu_seqlens_key": torch.tensor([0, 13, 25]), "max_seqlen_key": 13}, "has 3 entries and cu_seqlens 6"),
    ],
)
def test_what_does_not_fit_is_answered_in_words(changes, words):
    q = tokens(dtype=torch.float32)
    given = {"query": q, "key": q, "value": q, "cu_seqlens": CU, "max_seqlen": 12} | changes
    with pytest.raises(ValueError, match=words):
        sf.packed_random_feature_attention(**given, feature_map=sf.FeatureMap(8, 16, "posrf"))
