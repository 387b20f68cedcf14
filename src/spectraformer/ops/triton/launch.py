# mypy: disable-error-code="import-untyped,import-not-found"
"""Kernels with their arguments, planned without a device once per signature, then only launched.

Planning and Triton's own dispatch cost more time than short sequences take on the GPU. Both depend on shapes, strides,
dtypes and alignment alone, so what they lead to is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from spectraformer.ops.triton.configurations import Configuration

# Versions whose launcher is called as here: with all arguments of the source, constants included, and addresses for
# tensors. Others go through dispatch.
DIRECT = triton.__version__.startswith("3.6.")
MAX_PLANS = 256
# Elements of float32 between intermediates: 256 bytes.
ALIGNMENT = 64
STREAM = 3


class Launch(NamedTuple):
    """One kernel with all it needs; built on any device, "meta" included, and run on the device of its tensors."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    registers: int | None = None

    def run(self) -> None:
        """Start the kernel with its own arguments."""
        self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.options)

    @property
    def options(self) -> dict[str, int]:
        """How to compile the kernel. Loops say their own pipeline depth; those that do not are not to be pipelined."""
        options = {"num_warps": self.warps, "num_stages": 1}
        return options if self.registers is None else options | {"maxnreg": self.registers}

    def dispatch(self, *arguments: Any) -> tuple[Callable[..., Any], list[Any]] | None:
        """Start the kernel with other tensors of the same signature, compiling if need be.

        Returns:
            What starts the compiled kernel again, and its first arguments, with a place for the stream at STREAM;
            arguments of the source follow, addresses in place of tensors. None when there is no such way.
        """
        grid = (self.programs, 1, 1)
        compiled = self.kernel[grid](*arguments, **self.options)
        if compiled is None or not DIRECT:
            return None
        run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
        if run.global_scratch_size or run.profile_scratch_size:
            return None
        # As the launcher's own call does, without its hooks and what finds the stream and the address of every tensor.
        how = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, packed, None, None, None)
        return run.launch, [*grid, None, *how]


def strides(**tensors: Tensor | None) -> dict[str, int]:
    """Strides of batch, head and row (of 3 dimensions: batch and head; of 4: all), 0 where one serves for all."""
    found = {}
    for name, x in tensors.items():
        dimensions = ("batch", "head", "row")[: max(2, x.ndim - 1) if x is not None else 2]
        for i, dimension in enumerate(dimensions):
            found[f"{name}_{dimension}"] = 0 if x is None or (i < 2 and x.shape[i] == 1) else x.stride(i)
    return found


def padded_dim(size: int) -> int:
    """The power of two >= 16 that holds a head dim."""
    return max(16, 1 << (size - 1).bit_length())


def constants(
    configuration: Configuration, landmarks: int, d: int, e: int, precision: str, *, resident: bool = False
) -> dict[str, Any]:
    """Compile-time arguments common to the kernels."""
    found = {
        "M": landmarks,
        "D": d,
        "E": e,
        "D_PADDED": padded_dim(d),
        "E_PADDED": padded_dim(e),
        "BLOCKS": -(-landmarks // configuration.landmarks),
        "LANDMARKS": configuration.landmarks,
        "TOKENS": configuration.tokens,
        "STAGES": configuration.stages,
        "PRECISION": precision,
    }
    return found | {"RESIDENT": configuration.resident} if resident else found


class Plan:
    """Launches with places for tensors, and the tensors to allocate; built from "meta" tensors.

    Intermediates are pieces of one allocation.
    """

    def __init__(
        self, operands: Sequence[Tensor | None], launches: Sequence[Launch], results: Iterable[Tensor | None]
    ) -> None:
        slots = {id(x): i for i, x in enumerate(operands) if x is not None}
        allocated: list[Tensor] = []

        def slot(x: Tensor) -> int:
            if id(x) not in slots:
                slots[id(x)] = len(operands) + len(allocated)
                allocated.append(x)
            return slots[id(x)]

        self.results = [None if x is None else slot(x) for x in results]
        self.launches = list(launches)
        # What starts a kernel, all its arguments, and which of them is the address of which slot.
        self.starts: list[tuple[Callable[..., Any], list[Any], list[tuple[int, int]]]] = []
        self.arguments: list[tuple[list[Any], list[tuple[int, int]]]] = []
        # Shapes as plain tuples, which are parsed in half the time.
        self.new: list[tuple[tuple[int, ...], torch.dtype] | None] = [(tuple(x.shape), x.dtype) for x in allocated]
        for launch in launches:
            arguments = [(launch.arguments | launch.constants)[name] for name in launch.kernel.arg_names]
            places = [(i, slot(x)) for i, x in enumerate(arguments) if isinstance(x, Tensor)]
            self.arguments.append(([None if isinstance(x, Tensor) else x for x in arguments], places))
        # Intermediates of float32: (slot, first element, shape).
        self.scratch: list[tuple[int, int, torch.Size]] = []
        self.scratch_size = 0
        for i, x in enumerate(allocated[len(self.new) :], len(operands) + len(self.new)):
            if x.dtype != torch.float32:
                self.new.append((tuple(x.shape), x.dtype))
                continue
            self.new.append(None)
            self.scratch.append((i, self.scratch_size, x.shape))
            self.scratch_size += -(-x.numel() // ALIGNMENT) * ALIGNMENT

    def run(self, operands: Sequence[Tensor | None], addresses: list[int | None]) -> list[Tensor | None]:
        """Allocate, launch, and return the results; ``addresses`` are those of the operands."""
        first = operands[0]
        assert first is not None
        new = first.new_empty
        tensors = [*operands, *[None if x is None else new(x[0], dtype=x[1]) for x in self.new]]
        scratch = new(self.scratch_size, dtype=torch.float32) if self.scratch else None
        if self.starts:
            addresses += [None if x is None else x.data_ptr() for x in tensors[len(operands) :]]
            if scratch is not None:
                base = scratch.data_ptr()
                for slot, offset, _ in self.scratch:
                    addresses[slot] = base + 4 * offset
            stream = torch._C._cuda_getCurrentRawStream(first.get_device())
            for start, template, places in self.starts:
                arguments = template.copy()
                arguments[STREAM] = stream
                for place, slot in places:
                    arguments[place] = addresses[slot]
                start(*arguments)
        else:
            if scratch is not None:
                for slot, offset, shape in self.scratch:
                    tensors[slot] = scratch[offset : offset + shape.numel()].view(shape)
            starts = []
            for launch, (template, places) in zip(self.launches, self.arguments, strict=True):
                arguments = template.copy()
                for place, slot in places:
                    arguments[place] = tensors[slot]
                found = launch.dispatch(*arguments)
                if found is not None:
                    start, head = found
                    starts.append((start, [*head, *template], [(len(head) + place, slot) for place, slot in places]))
            if len(starts) == len(self.launches):
                self.starts = starts
        return [None if slot is None else tensors[slot] for slot in self.results]


PLANS: dict[tuple[Any, ...], Plan] = {}


def planned(
    make: Callable[..., tuple[list[Launch], Iterable[Tensor | None]]],
    operands: Sequence[Tensor | None],
    settings: tuple[Any, ...],
) -> list[Any]:
    """Run what make(operands, *settings) plans, made anew only for a signature not met before.

    Args:
        make: From operands on the device "meta" to launches and results.
        operands: Tensors, all on one device, or None.
        settings: All else that the plan depends on.

    Returns:
        Results of the plan, freshly allocated; None where the plan has none.
    """
    first = operands[0]
    assert first is not None
    signature: list[Any] = [make, settings, first.device]
    addresses: list[int | None] = []
    every_address = 0
    for x in operands:
        if x is None:
            signature.append(None)
            addresses.append(None)
        else:
            signature += (x.shape, x.stride(), x.dtype)
            address = x.data_ptr()
            addresses.append(address)
            every_address |= address
    # A kernel is compiled for pointers aligned to 16 bytes or not, and loaded on one device.
    if every_address % 16:
        signature.append(tuple(0 if x is None else x % 16 for x in addresses))
    key = tuple(signature)
    plan = PLANS.get(key)
    if plan is None:
        if len(PLANS) >= MAX_PLANS:
            PLANS.clear()
        shadows = [
            None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
            for x in operands
        ]
        plan = PLANS[key] = Plan(shadows, *make(shadows, *settings))
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.get_device()):
            return plan.run(operands, addresses)
    return plan.run(operands, addresses)
