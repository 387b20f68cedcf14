"""Linear attention beside exact attention: how close, and how much faster.

Run: python examples/quickstart.py
"""

import time

import torch
from torch.nn.functional import scaled_dot_product_attention

import spectraformer as sf


def seconds(function, repeats=3):
    function()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def main():
    torch.manual_seed(0)
    head_dim, heads = 64, 4

    print("How close: relative error of attention, 1024 tokens of norm 1 (uniform attention would be 1.00)\n")
    x, y, v = (torch.randn(1, heads, 1024, head_dim) for _ in range(3))
    q, k = (torch.nn.functional.normalize(t, dim=-1) * head_dim**0.25 for t in (x, y))
    exact = sf.kernel_attention(q, k, v)
    uniform = v.mean(-2, keepdim=True)
    print(f"{'variant':>14} {'m = 64':>8} {'m = 256':>8} {'m = 1024':>9}")
    for variant in ("posrf-mc", "posrf-orf", "oprf-orf", "oprf-simrf", "trigrf-orf", "oprf-ssr"):
        errors = []
        for num_features in (64, 256, 1024):
            feature_map = sf.FeatureMap(head_dim, num_features, *sf.parse_variant(variant))
            out = sf.random_feature_attention(q, k, v, feature_map)
            errors.append(float((out - exact).norm() / (exact - uniform).norm()))
        print(f"{variant:>14} {errors[0]:8.2f} {errors[1]:8.2f} {errors[2]:9.2f}")

    print("\nHow fast: milliseconds forward, one sequence, 4 heads of 64, m = 128\n")
    feature_map = sf.FeatureMap(head_dim, 128, "oprf", "orf").eval()
    print(f"{'tokens':>14} {'softmax':>8} {'oprf-orf':>9} {'ratio':>7}")
    with torch.no_grad():
        for tokens in (512, 1024, 2048, 4096, 8192):
            q, k, v = (torch.randn(1, heads, tokens, head_dim) for _ in range(3))
            softmax = seconds(lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v))
            linear = seconds(lambda q=q, k=k, v=v: sf.random_feature_attention(q, k, v, feature_map))
            print(f"{tokens:>14} {1e3 * softmax:8.1f} {1e3 * linear:9.1f} {softmax / linear:6.1f}x")

    print("\nDecoding: the state of all tokens seen so far has a fixed size")
    feature_map = sf.FeatureMap(head_dim, 128, "posrf", "orf").eval()
    state = feature_map.init_state(batch=1, num_heads=heads, value_dim=head_dim)
    _, state = sf.attention_step(q, k, v, feature_map, state)  # prefill: 8192 tokens in one call
    out, state = sf.attention_step(q[:, :, :1], k[:, :, :1], v[:, :, :1], feature_map, state)  # then one by one
    size = sum(part.numel() * 4 for part in state if part is not None)
    print(
        f"after {tokens + 1} tokens it is {size / 1024:.0f} KiB; keys and values would be "
        f"{2 * 4 * heads * head_dim * (tokens + 1) / 1024:.0f} KiB"
    )


if __name__ == "__main__":
    main()
