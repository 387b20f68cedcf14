"""Host time of a call, in microseconds: python benchmarks/host_time.py [profile CASE].

On a CUDA device as it is, with sequences so short that the GPU waits for the host; elsewhere on CPU tensors and with
kernels that do nothing, which leaves out the driver's part of a launch, of ours and of torch's. Goals: 40 forward,
120 forward + backward.
"""

import cProfile
import pstats
import sys
import time
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

import spectraformer as sf
from spectraformer.ops import triton as kernels

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# On a CPU so small that memory comes without a call of the system.
B, H, N, D, M = (1, 4, 128, 64, 128) if CUDA else (1, 1, 16, 16, 16)
CALLS = 2000


def without_kernels():
    """Backend "triton" on CPU tensors, starting nothing."""
    from spectraformer.ops.triton import launch

    kernels.INTERPRETED = True
    launch.Launch.dispatch = lambda self, *arguments: (lambda *addressed: None, [None] * 13)
    torch._C._cuda_getCurrentRawStream = lambda device: 0


def microseconds(run, calls=CALLS, rounds=100):
    """The least mean time of a call among rounds: what others do on the machine only adds."""
    for _ in range(calls // 10):
        run()
    times = []
    for _ in range(rounds):
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls // rounds):
            run()
        times.append((time.perf_counter() - start) / (calls // rounds))
    return 1e6 * min(times)


def cases():
    """Name to (function of tokens, whether it can be differentiated)."""
    w = torch.randn(1, H, M, D, device=DEVICE) * D**-0.25
    bias = torch.zeros(1, H, M, device=DEVICE)
    quadratic = torch.full((1, 1, D), -0.5 * D**-0.5, device=DEVICE)
    maps = {
        name: sf.FeatureMap(D, M, *name.split("-"), num_heads=H, device=DEVICE) for name in ("posrf-orf", "oprf-orf")
    }
    found = {
        "torch.ops": (
            lambda q, k, v: torch.ops.spectraformer.landmark_attention(
                q, k, v, w, w, bias, None, quadratic, False, "tf32x3"
            )[0],
            False,
        ),
        "ops.triton": (lambda q, k, v: kernels.landmark_attention(q, k, v, w, w, bias, None, quadratic), True),
    }
    for name, feature_map in maps.items():
        found[name] = (lambda q, k, v, f=feature_map: sf.random_feature_attention(q, k, v, f, backend="triton"), True)
    if CUDA:
        found["torch's attention"] = (scaled_dot_product_attention, True)
    return found


def main():
    if not CUDA:
        torch.set_num_threads(1)
        without_kernels()
    tokens = [torch.randn(B, H, N, D, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
    learned = [x.clone().requires_grad_() for x in tokens]
    grad = torch.randn_like(tokens[0])

    def both(run):
        torch.autograd.grad(run(*learned), learned, grad)

    def forward(run):
        with torch.no_grad():
            run(*tokens)

    if sys.argv[1:2] == ["profile"]:
        step = both if sys.argv[3:] else forward
        run, _ = cases()[sys.argv[2]]
        microseconds(partial(step, run), 500)
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(CALLS):
            step(run)
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
        return
    print(
        f"{'us a call':>18} {'forward':>8} {'both':>8}   {torch.cuda.get_device_name() if CUDA else 'CPU, no kernels'}"
    )
    for name, (run, differentiable) in cases().items():
        of = [microseconds(partial(step, run)) for step in ((forward, both) if differentiable else (forward,))]
        print(f"{name:>18} " + " ".join(f"{x:8.1f}" for x in of), flush=True)


if __name__ == "__main__":
    main()
