"""Random-feature attention by the fused kernels, in Triton's interpreter, against plain torch in float64.

The interpreter must be chosen before kernels are defined, so the cases run in a process of their own: this file is both
the tests and that program.
"""

import copy
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

import spectraformer as sf

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
# variant: options of the feature map, then of the call
CASES = {
    "posrf-orf": ({}, {}),
    "posrf-orf, gaussian kernel": ({"kernel": "gaussian"}, {}),
    "posrf-orf, padded": ({}, {"mask": True}),
    "posrf-orf, padded, gaussian kernel": ({"kernel": "gaussian"}, {"mask": True}),
    "posrf-orf, centered, padded": ({"center": True}, {"mask": True}),
    "oprf-orf, padded": ({}, {"mask": True}),
    "oprf-orf, grouped queries": ({"num_heads": 2}, {"groups": 3}),
    "oprf-fastfoodl": ({"num_heads": 2}, {}),
    "gerf-mm, padded": ({"num_heads": 2}, {"mask": True}),
    "hyprf-qmc": ({}, {}),
    "saderf-orf, padded": ({}, {"mask": True}),
    "aderf-orf, padded": ({}, {"mask": True}),
    "trigrf-orf, padded": ({}, {"mask": True}),
    "posrf-orf, causal": ({}, {"causal": True}),
    "oprf-fastfoodl, causal, padded, gaussian kernel": (
        {"num_heads": 2, "kernel": "gaussian"},
        {"causal": True, "mask": True},
    ),
}


@pytest.fixture(scope="module")
def interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_fused_attention_is_the_attention_of_the_features(interpreted, case):
    errors = interpreted[case]
    # Cosines cancel: plain torch in float32 is as far from float64 there.
    bound = 5e-3 if "trigrf" in case else 1e-4
    assert {name: e for name, e in errors.items() if not e < bound} == {}
    assert {"out", "query", "key", "value"} <= set(errors)
    assert len(errors) > 4 or not any(name in case for name in ("fastfoodl", "gerf"))


@needs_triton
def test_auto_takes_the_kernels_and_autocast_gives_its_dtype(interpreted):
    assert interpreted["auto"] == ["triton", "triton", "torch", "torch"]


def test_a_backend_that_cannot_run_says_why():
    q = torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match=r"'triton' cannot run here: tensors are on cpu.*use backend='auto'"):
        sf.random_feature_attention(q, q, q, sf.FeatureMap(16, 32, "posrf"), backend="triton")


def attention_of(name, made, call, dtype, **options):
    variant = name.partition(",")[0].split("-")
    groups = call.get("groups", 1)
    torch.manual_seed(0)
    feature_map = sf.FeatureMap(16, 24, *variant, **made).to(dtype)
    q, k, v = (
        torch.randn(2, h, n, e, dtype=torch.float64).to(dtype).requires_grad_()
        for h, n, e in ((2 * groups, 33 if call.get("causal") else 20, 16), (2, 33, 16), (2, 33, 24))
    )
    mask, shown = None, [k, v]
    if call.get("mask"):
        mask = torch.rand(2, 33) < 0.7
        mask[0] = False
        # What padding holds must not matter: to the kernels not even if it is NaN.
        hole = float("nan") if options else 0.0
        shown = [x.masked_fill(~mask[:, None, :, None], hole) for x in shown]
    out = sf.random_feature_attention(
        q,
        *shown,
        feature_map,
        key_padding_mask=mask,
        enable_gqa=groups > 1,
        is_causal="causal" in call,
        **(options or {"backend": "torch"}),
    )
    learned = dict(feature_map.named_parameters())
    inputs = {"query": q, "key": k, "value": v} | learned
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    found = torch.autograd.grad(out, list(inputs.values()), weight, allow_unused=True)
    return {"out": out} | dict(zip(inputs, found, strict=True))


def interpret():
    from spectraformer import ops

    results = {}
    for name, (made, call) in CASES.items():
        got = attention_of(name, made, call, torch.float32, backend="triton")
        want = attention_of(name, copy.copy(made), call, torch.float64)
        largest = max(x.abs().max().item() for key, x in want.items() if x is not None and key != "out")
        results[name] = {
            key: (got[key] - x).abs().max().item() / max(x.abs().max().item(), 0.0 if key == "out" else 0.01 * largest)
            for key, x in want.items()
            if x is not None
        }
    q = torch.randn(1, 2, 8, 16)
    results["auto"] = [
        ops.choose_backend("auto", q, q, q),
        ops.choose_backend("auto", q.half(), q.half(), q.half()),
        ops.choose_backend("auto", q, q.half(), q),
        ops.choose_backend("auto", q, q, q, positive=False),
    ]
    results["auto"] = [("torch" if x == "cpu" else x) for x in results["auto"]]
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    interpret()
