"""Work on fixed tensors, recorded once and replayed: on a GPU one CUDA graph in place of hundreds of launches.

What is replayed must be what was recorded. So a recording is refused, and the work runs as it is, if the work

- waits for the device, or does anything else that cannot be recorded;
- keeps state on the host, which a replay would not advance;
- gives, replayed from the same state, not bitwise the same results.
"""

from __future__ import annotations

import gc
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Work = Callable[[], None]


class NotRecordable(Exception):
    """Work that cannot be recorded, with the reason."""


class Captured(NamedTuple):
    """How work is done from now on.

    Attributes:
        run: Does it once.
        reason: Why ``run`` is not a replay; None if it is one.
    """

    run: Work
    reason: str | None


def record_cuda_graph(work: Work) -> Work:
    """A CUDA graph of some work on the current device; a failure leaves the process as it was.

    Raises:
        NotRecordable: If the work cannot be recorded.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.graphsafe_get_state()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    # A recording that fails leaves the random state it drew from unusable. So it is tried with a copy first; all
    # recordings that are kept draw from the one state that is saved and restored.
    generator.graphsafe_set_state(generator.clone_state())
    try:
        _record(work).reset()
    finally:
        generator.graphsafe_set_state(before)
    return _record(work).replay


def _record(work: Work) -> torch.cuda.CUDAGraph:
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # Other threads may go on using the device; autograd's belong to this recording.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    except (RuntimeError, torch.OutOfMemoryError) as error:
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise NotRecordable(reason_of(error.__context__ or error)) from error
    return graph


RECORDERS: dict[str, Callable[[Work], Work]] = {"cuda": record_cuda_graph}
"""How work is recorded, by type of device; elsewhere it runs as it is."""


def capture(
    work: Work,
    model: nn.Module,
    device: torch.device,
    *,
    state: Sequence[Tensor],
    results: Callable[[], Sequence[Tensor]],
) -> Captured:
    """Records work if its replay is the work; rehearses it, and leaves everything as it was.

    Args:
        work: Reads and writes tensors that stay where they are.
        model: Whose buffers it may change; parameters must not change.
        device: Where.
        state: Further tensors it changes.
        results: What must come out bitwise equal, to be read after each run.
    """
    recorder = RECORDERS.get(device.type)
    if recorder is None:
        return Captured(work, f"there are no recordings on device {device.type!r}")
    try:
        with _beside(device):
            with kept(model, state, device):  # lazy initialisation, compilation and tuning
                work()
            with kept(model, state, device) as changed:
                with _without_waiting(device):
                    work()
                expected = [x.clone() for x in results()]
                if changed():
                    raise NotRecordable(f"{', '.join(changed())} keeps state on the host")
            with kept(model, state, device):
                replay = recorder(work)
            with kept(model, state, device):
                replay()
                found = list(results())
                if not all(_same(a, b) for a, b in zip(expected, found, strict=True)):
                    raise NotRecordable("a replay does not give bitwise the same: there is state on the host")
    except NotRecordable as refusal:
        return Captured(work, str(refusal))
    return Captured(replay, None)


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: for every stream cuBLAS keeps a workspace of its own, for ever."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """Beside the default stream, where nothing can be recorded."""
    if device.type != "cuda":
        yield
        return
    stream, current = _side_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)


@contextmanager
def _without_waiting(device: torch.device) -> Iterator[None]:
    """Refuses work that waits for the device, and says where it does."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise NotRecordable(reason_of(error)) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def kept(model: nn.Module, state: Sequence[Tensor], device: torch.device) -> Iterator[Callable[[], list[str]]]:
    """Gives back tensors, buffers, states of modules on the host, and random states as they were.

    Yields:
        A function that names the modules whose state on the host changed meanwhile.
    """
    tensors = [*state, *model.buffers()]
    copies = [x.clone() for x in tensors]
    keepers = {
        name: module
        for name, module in model.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }
    held = {name: module.get_extra_state() for name, module in keepers.items()}

    def changed() -> list[str]:
        return [name for name, module in keepers.items() if not _equal(module.get_extra_state(), held[name])]

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield changed
        finally:
            with torch.no_grad():
                for x, copy in zip(tensors, copies, strict=True):
                    x.copy_(copy)
            for name in changed():
                keepers[name].set_extra_state(held[name])


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def reason_of(error: BaseException) -> str:
    """What an error says, and the line outside torch that it comes from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "torch" not in Path(frame.filename).parts]
    place = f", at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return str(error).splitlines()[0] + place
