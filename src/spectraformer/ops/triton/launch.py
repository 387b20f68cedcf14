# mypy: disable-error-code="import-untyped,import-not-found"
"""Kernels with their arguments, planned without a device once per signature, then only launched.

Planning and Triton's own dispatch cost more time than short sequences take on the GPU. Both depend on shapes, strides,
dtypes and alignment alone, so what they lead to is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectraformer.ops.triton.configurations import Configuration

# Versions whose launcher is called as here: with all arguments of the source, constants included, and addresses for
# tensors. Others go through dispatch.
DIRECT = triton.__version__.startswith("3.6.")
MAX_PLANS = 256
# Elements of float32 that pieces of an allocation begin at multiples of: 64 bytes.
ALIGNMENT = 16
STREAM = 3
# What a plan returns: a tensor, nothing, or one allocation of float32 with these side by side in it.
Result = Tensor | None | tuple[Tensor, ...]


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


def state_strides(log_scale: Tensor | None, sums: Tensor | None) -> dict[str, int]:
    """Strides of a causal state (b, h, m) and (b, h, m, e + 1); a row of the last dimension of log_scale is a landmark.

    Unlike one tensor, a state that is not there has a stride of rows too.
    """
    return {"sums_row": 0} | strides(log_scale=log_scale, sums=sums)


def product_type(dtype: torch.dtype) -> Any:
    """Of what a backward multiplies: float16 loses small probabilities and overflows with a scaled loss."""
    return tl.float32 if dtype == torch.float32 else tl.bfloat16


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


def side_by_side(shapes: Iterable[Sequence[int]]) -> tuple[list[int], int]:
    """First elements of tensors that share one allocation, and how many it has."""
    firsts, size = [], 0
    for shape in shapes:
        firsts.append(-(-size // ALIGNMENT) * ALIGNMENT)
        size = firsts[-1] + math.prod(shape)
    return firsts, size


def pieces(whole: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Tensors that lie side by side in one allocation; a plan knows them as such."""
    firsts, _ = side_by_side(shapes)
    return [whole[i : i + math.prod(shape)].view(*shape) for i, shape in zip(firsts, shapes, strict=True)]


class Plan:
    """Launches with places for tensors, and the tensors to allocate; built from "meta" tensors.

    Tensors have slots: operands first, then what is allocated, then pieces of either, which are float32. Intermediates
    of float32 are pieces of one allocation.
    """

    def __init__(
        self, operands: Sequence[Tensor | None], launches: Sequence[Launch], results: Iterable[Result]
    ) -> None:
        slots = {id(x): i for i, x in enumerate(operands) if x is not None}
        storages = {x.untyped_storage()._cdata: i for i, x in enumerate(operands) if x is not None}
        dtype_of_first = next(x.dtype for x in operands if x is not None)
        placed: list[tuple[Tensor, int, int]] = []  # a piece, the slot of its whole, its first element there
        # Sizes, and the dtype unless it is that of the first operand: naming it costs a fifth of an allocation.
        self.new: list[tuple[tuple[int, ...], torch.dtype | None]] = []

        def allocate(shape: Sequence[int], dtype: torch.dtype) -> int:
            self.new.append((tuple(shape), None if dtype == dtype_of_first else dtype))
            return len(operands) + len(self.new) - 1

        def allocate_together(tensors: Sequence[Tensor]) -> int:
            firsts, size = side_by_side([x.shape for x in tensors])
            whole = allocate((size,), torch.float32)
            placed.extend((x, whole, first) for x, first in zip(tensors, firsts, strict=True))
            return whole

        self.results: list[int | None] = []
        for result in results:
            if isinstance(result, tuple):
                self.results.append(allocate_together(result))
                continue
            if result is not None and id(result) not in slots:
                slots[id(result)] = allocate(result.shape, result.dtype)
            self.results.append(None if result is None else slots[id(result)])
        self.launches = list(launches)
        arguments = [
            [(launch.arguments | launch.constants)[name] for name in launch.kernel.arg_names] for launch in launches
        ]
        used = {id(x): x for some in arguments for x in some if isinstance(x, Tensor)}
        known = {*slots, *(id(x) for x, *_ in placed)}
        scratch = []
        for x in [x for name, x in used.items() if name not in known]:
            whole = storages.get(x.untyped_storage()._cdata)
            if whole is not None:
                assert x.dtype == torch.float32 and x.is_contiguous()
                placed.append((x, whole, int(x.storage_offset())))
            elif x.dtype == torch.float32:
                scratch.append(x)
            else:
                slots[id(x)] = allocate(x.shape, x.dtype)
        if scratch:
            allocate_together(scratch)
        before = len(operands) + len(self.new)
        slots |= {id(x): before + i for i, (x, *_) in enumerate(placed)}
        # Of pieces: the slot of the whole, the first element there, the shape; and the same in bytes, to start kernels.
        self.pieces = [(whole, first, tuple(x.shape)) for x, whole, first in placed]
        self.offsets = [(whole, 4 * first) for whole, first, _ in self.pieces]
        # Arguments of each kernel with None for tensors, and which of them is which slot.
        self.arguments: list[tuple[list[Any], list[tuple[int, int]]]] = [
            (
                [None if isinstance(x, Tensor) else x for x in some],
                [(i, slots[id(x)]) for i, x in enumerate(some) if isinstance(x, Tensor)],
            )
            for some in arguments
        ]
        # The same for what starts a compiled kernel, where tensors are addresses.
        self.starts: list[tuple[Callable[..., Any], list[Any], list[tuple[int, int]]]] = []

    def run(self, operands: Sequence[Tensor | None], addresses: list[int], device: int) -> list[Tensor | None]:
        """Allocate, launch, and return the results; ``addresses`` are those of the operands, on the device's index."""
        first = operands[0]
        assert first is not None
        new = first.new_empty
        # Sizes one by one, which are parsed in half the time of a tuple.
        made = [new(*sizes) if dtype is None else new(*sizes, dtype=dtype) for sizes, dtype in self.new]
        tensors = [*operands, *made]
        if self.starts:
            addresses += [x.data_ptr() for x in made]
            addresses += [addresses[whole] + offset for whole, offset in self.offsets]
            stream = torch._C._cuda_getCurrentRawStream(device)
            for start, template, places in self.starts:
                arguments = template.copy()
                arguments[STREAM] = stream
                for place, slot in places:
                    arguments[place] = addresses[slot]
                start(*arguments)
        else:
            self._dispatch(tensors)
        return [None if slot is None else tensors[slot] for slot in self.results]

    def _dispatch(self, tensors: list[Tensor | None]) -> None:
        """Launch through Triton, and keep what starts the compiled kernels, if there is such for all."""
        cut = []
        for whole, first, shape in self.pieces:
            base = tensors[whole]
            assert base is not None
            cut.append(base[first : first + math.prod(shape)].view(shape))
        filled, starts = [*tensors, *cut], []
        for launch, (template, places) in zip(self.launches, self.arguments, strict=True):
            arguments = template.copy()
            for place, slot in places:
                arguments[place] = filled[slot]
            found = launch.dispatch(*arguments)
            if found is not None:
                start, head = found
                starts.append((start, [*head, *template], [(len(head) + place, slot) for place, slot in places]))
        if len(starts) == len(self.launches):
            self.starts = starts


PLANS: dict[tuple[Any, ...], Plan] = {}


def planned(
    make: Callable[..., tuple[list[Launch], Iterable[Result]]],
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
    device = first.get_device()  # -1 on a CPU
    signature: list[Any] = [make, settings, device]
    addresses: list[int] = []
    every_address = 0
    for x in operands:
        if x is None:
            signature.append(None)
            addresses.append(0)
        else:
            signature += (x.shape, x.stride(), x.dtype)
            address = x.data_ptr()
            addresses.append(address)
            every_address |= address
    # A kernel is compiled for pointers aligned to 16 bytes or not, and loaded on one device.
    if every_address % 16:
        signature.append(tuple([x % 16 for x in addresses]))
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
    if device < 0 or device == torch._C._cuda_getDevice():
        return plan.run(operands, addresses, device)
    with torch.cuda.device(device):
        return plan.run(operands, addresses, device)
