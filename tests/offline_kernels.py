"""Kernels without a GPU: programs in a process of their own, and what the compiler for one makes of a kernel."""

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

SHARED_MEMORY = 232_448  # bytes a program may have on compute capability 9.0
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


def run_program(file, program, *, interpret):
    """What a test file prints when run with the name of a program; the interpreter is chosen before kernels exist."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, file, program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def new_buffers(made):
    """Within, every buffer that a kernel is to fill is made(buffer)."""
    empty = torch.Tensor.new_empty
    torch.Tensor.new_empty = lambda *arguments, **options: made(empty(*arguments, **options))
    try:
        yield
    finally:
        torch.Tensor.new_empty = empty


def poisoned(x):
    """A buffer that starts as NaN, or as numbers that nothing has: what is left unwritten shows."""
    return x.fill_(float("nan") if x.is_floating_point() else 123)


def differences(real, fake):
    """Where results and their fakes differ in shape, strides or dtype."""
    return [
        f"result {i}: {tuple(x.shape)} {x.stride()} {x.dtype}, fake {tuple(y.shape)} {y.stride()} {y.dtype}"
        for i, (x, y) in enumerate(zip(real, fake, strict=True))
        if (x.shape, x.stride(), x.dtype) != (y.shape, y.stride(), y.dtype)
    ]


def assemble(launch, sizes):
    """The kernel of a launch compiled for compute capability 9.0 as a GPU would specialise it.

    Args:
        launch: With tensors on the device "meta".
        sizes: Names of integers that the kernel is not specialised on.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        x = launch.arguments[name] if name in launch.arguments else launch.constants[name]
        if name in launch.constants or x is None or (isinstance(x, int) and x == 1 and name not in sizes):
            signature[name], constants[name] = "constexpr", x
            continue
        if isinstance(x, float):
            signature[name] = "fp32"
            continue
        signature[name] = TYPES[x.dtype] if isinstance(x, torch.Tensor) else "i32"
        if isinstance(x, torch.Tensor) or (x % 16 == 0 and name not in sizes):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(binary.asm["ptx"])
        report = subprocess.run(
            [assembler, "-v", "--gpu-name=sm_90a", f"{folder}/kernel.ptx", "-o", f"{folder}/kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    return {
        "kernel": launch.kernel.__name__,
        "spills": int(re.search(r"(\d+) bytes spill stores", report)[1]),
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "shared": binary.metadata.shared,
        "matrix": binary.asm["ptx"].count("wgmma.mma_async"),
        "copies": binary.asm["ptx"].count("cp.async.cg"),
        "stages": launch.constants.get("STAGES"),
        # Said where matrix instructions wait for one another.
        "serialized": re.findall(r"\((C75\d\d)\) Potential", report),
    }
