"""The fused moments without a GPU: in Triton's interpreter against float64, and compiled for one without being run.

As in the tests of attention kernels, this file is both the tests and the two programs they run.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from offline_kernels import SHARED_MEMORY, assemble, differences, new_buffers, poisoned, run_program

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
# name: b, h, g, n, s, d, and what else is special
CASES = {
    "plain": (2, 2, 1, 100, 300, 16, {}),
    "odd sizes": (1, 2, 1, 37, 700, 20, {}),
    "one token": (1, 2, 1, 1, 1, 16, {}),
    "grouped queries": (2, 2, 3, 70, 50, 16, {"mask": True}),
    "transposed": (2, 3, 1, 50, 260, 16, {"transposed": True, "mask": True}),
    "columns apart": (1, 2, 1, 40, 50, 16, {"columns apart": True}),
    "several blocks of the matrix": (1, 1, 1, 70, 90, 80, {"mask": True}),
    "nothing but padding": (2, 2, 1, 40, 50, 16, {"mask": True, "empty": True}),
}
ORDERS = ("none", "trace", "diagonal", "full")
SHAPES = ((64, "bfloat16", False), (64, "bfloat16", True), (128, "float16", False), (32, "float32", True))


@pytest.fixture(scope="module")
def interpreted():
    return run_program(__file__, "interpret", interpret=True)


@needs_triton
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES)
def test_moments_agree_with_float64(interpreted, case, order):
    found = interpreted["cases"][f"{case}, {order}"]
    assert found["fake"] == []
    assert found["error"] < 1e-6


@needs_triton
def test_a_long_sequence_far_from_0_loses_no_bits(interpreted):
    """Summed one after the other in float32, so many like terms are wrong by 1e-5."""
    assert interpreted["long"] < 3e-7


@needs_triton
def test_the_moments_of_the_library_are_these(interpreted):
    """Also compiled as one graph; float64 and least coordinates stay with torch."""
    assert interpreted["library"] == {"trace": True, "diagonal": True, "compiled": True, "minimum": 0, "float64": 0}


def test_tokens_of_a_cpu_stay_with_torch():
    from spectraformer.components.statistics import moments, paired_moments

    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 7, 8)
    query_mask = torch.arange(9) < torch.tensor([[9], [4]])
    for order in ORDERS:
        for minimum in (False, True):
            got = paired_moments(q, k, query_mask, None, 0.5, order, minimum)
            folded = q.reshape(2, 2, 18, 8)
            want = (
                moments(folded, query_mask.repeat(1, 2), 0.5, order, minimum),
                moments(k, None, 0.5, order, minimum),
            )
            assert all(map(_same, got, want)) and all((x.minimum is not None) == minimum for x in got)


def test_products_of_16_bit_tokens_summed_in_float32_tiles_give_the_same_attention():
    """What the GPU does for whole matrices, and that the eigenvectors of ADERF and SDERF do not mind."""
    import spectraformer as sf
    from spectraformer.components import statistics

    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    spectrum = torch.logspace(0, -3, 16)  # nearly singular: inverses amplify most
    q, k, v = ((torch.randn(1, 2, 200, 16, generator=generator) * spectrum @ rotation).bfloat16() for _ in range(3))

    def tiled(tokens, mask, root, order, minimum):
        x = tokens.float()
        tiles = [t.mT @ t for t in x.split(64, 2)]
        second = torch.stack([t.double() for t in tiles]).sum(0) * root**2 / x.shape[2]
        return exact(tokens, mask, root, order, minimum)._replace(second=second)

    exact = statistics.moments
    for component in ("aderf", "sderf"):
        feature_map = sf.FeatureMap(16, 64, component, "orf")
        want = sf.random_feature_attention(q.double(), k.double(), v.double(), feature_map)
        pairs = [f(q, None, 0.5, "full", False).second for f in (exact, tiled)]
        assert 0 < (pairs[1] - pairs[0]).abs().max() < 1e-6 * pairs[0].diagonal(dim1=-2, dim2=-1).sum(-1).min()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(statistics, "moments", tiled)
            got = sf.random_feature_attention(q.double(), k.double(), v.double(), feature_map)
        assert 0 < (got - want).abs().max() < 3e-4 * want.abs().max()


def test_an_unknown_order_or_precision_is_refused_by_name():
    from spectraformer.ops.triton.moments import refusals, sequence_moments

    x = torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match=r"'half'.*diagonal"):
        sequence_moments(x, x, None, None, 1.0, "half")
    with pytest.raises(ValueError, match=r"tf32'.*tf32x3"):
        sequence_moments(x, x, None, None, 1.0, "full", precision="tf32")
    reasons = "; ".join(refusals(x.double(), x[:, :, :0], "full"))
    assert "float64 of the query" in reasons and "empty" in reasons and "cpu" in reasons
    assert "summed in float64" in "; ".join(refusals(x.bfloat16(), x, "full"))


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_hopper_without_spills():
    found = run_program(__file__, "compile", interpret=False)
    assert {x["kernel"] for x in found} == {"moments_kernel", "merge_moments_kernel"}
    for x in found:
        assert x["spills"] == 0 and x["shared"] <= SHARED_MEMORY, x
        if x["kernel"] == "moments_kernel":
            assert (x["matrix"] > 0) == (x["order"] == "full" and x["dtype"] != "float32"), x
            assert x["copies"] > 0, x


def tokens_of(b, heads, n, d, special, generator):
    x = torch.randn(b, n, heads, d, generator=generator) + 1.0
    if special.get("columns apart"):
        return x.permute(0, 2, 3, 1).contiguous().transpose(2, 3)
    return x.transpose(1, 2) if special.get("transposed") else x.transpose(1, 2).contiguous()


def mask_of(b, n, special, generator):
    if not special.get("mask"):
        return None
    mask = torch.rand(n, b, generator=generator).T < 0.7
    if special.get("empty"):
        mask[0] = False
    return mask


def relative(got, want):
    return max(((x - y).abs().max() / y.abs().max().clamp_min(1e-30)).item() for x, y in zip(got, want, strict=True))


def interpret():
    from spectraformer.components.statistics import moments
    from spectraformer.ops.triton import moments as fused
    from spectraformer.ops.triton import moments_kernel

    # So few programs that some take several tiles and some heads several programs.
    moments_kernel.PROGRAMS = dict.fromkeys(ORDERS, 12)
    with new_buffers(poisoned):
        results = {}
        for name, (b, h, g, n, s, d, special) in CASES.items():
            generator = torch.Generator().manual_seed(0)
            query, key = tokens_of(b, h * g, n, d, special, generator), tokens_of(b, h, s, d, special, generator)
            masks = mask_of(b, n, special, generator), mask_of(b, s, special, generator)
            # What padding holds reaches nothing.
            dirty = [_spoilt(x, mask) for x, mask in zip((query, key), masks, strict=True)]
            rows = None if masks[0] is None else masks[0].repeat(1, g)
            for order in ORDERS:
                got = fused.sequence_moments(*dirty, *masks, 0.6, order, precision="ieee")
                want = [
                    moments(x.double(), mask, 0.6, order, False)
                    for x, mask in ((query.reshape(b, h, g * n, d), rows), (key, masks[1]))
                ]
                want = [torch.stack([x.mean for x in want]), torch.stack([x.second for x in want])]
                fake = fused._shapes(*dirty, *masks, 0.6, order, "ieee")
                results[f"{name}, {order}"] = {"error": relative(got, want), "fake": differences(got, fake)}
    x = torch.rand(1, 1, 30_000, 16, generator=torch.Generator().manual_seed(0)) + 1.0
    got = fused.sequence_moments(x, x, None, None, 1.0, "diagonal")
    want = moments(x.double(), None, 1.0, "diagonal", False)
    long = relative(got, [torch.stack([y, y]) for y in want[:2]])
    sys.stdout.write(json.dumps({"cases": results, "long": long, "library": in_the_library()}))


def _spoilt(x, mask):
    return x if mask is None else x.masked_fill(~mask[:, None, :, None], float("nan"))


def _same(a, b):
    """Whether two moments are the same bits."""
    return all(x is y if x is None or y is None else x.equal(y) for x, y in zip(a, b, strict=True))


def in_the_library():
    """Whether the library's own function goes through the kernels, and when not."""
    from spectraformer.components.statistics import paired_moments
    from spectraformer.ops.triton import moments as fused

    calls = []
    run = fused.sequence_moments
    x, y = torch.randn(1, 4, 33, 16), torch.randn(1, 2, 20, 16)
    results = {}
    for order in ("trace", "diagonal"):
        got = paired_moments(x, y, None, None, 0.5, order, False)
        mean, second = run(x, y, None, None, 0.5, order)
        results[order] = all(a.mean.equal(mean[i]) and a.second.equal(second[i]) for i, a in enumerate(got))
    compiled = torch.compile(paired_moments, fullgraph=True, backend="aot_eager")
    got, want = (f(x, y, None, None, 0.5, "trace", False) for f in (compiled, paired_moments))
    results["compiled"] = all(map(_same, got, want))
    fused.sequence_moments = lambda *a, **k: calls.append(a) or run(*a, **k)
    paired_moments(x, y, None, None, 0.5, "trace", False)
    assert len(calls) == 1
    calls.clear()
    paired_moments(x, y, None, None, 0.5, "trace", True)
    results["minimum"] = len(calls)
    paired_moments(x.double(), y.double(), None, None, 0.5, "trace", False)
    return results | {"float64": len(calls)}


def compile_all():
    from spectraformer.ops.triton.moments_kernel import SIZES, plan_moments

    results = []
    for d, dtype, masked in SHAPES:
        x = torch.empty(8, 8192, 8, d, dtype=getattr(torch, dtype), device="meta").transpose(1, 2)
        mask = torch.empty(8, 8192, dtype=torch.uint8, device="meta") if masked else None
        for order in ORDERS[1:]:
            launches, _ = plan_moments(x, x, mask, mask, root=0.35, order=order, precision="tf32x3")
            results += [assemble(x, SIZES) | {"order": order, "dtype": dtype} for x in launches]
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]]()
