"""Times, host times and memory of functions that are called in turn.

A figure is of a burst: calls one after another, from an idle device to the end of the last, over their number. Every
round takes one burst of each function, in an order that changes, so that a slow moment or another clock hits all.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from spectraformer.interruption import Interrupted

BURST_SECONDS = 2e-3
MAX_CALLS = 20  # of a burst: the device's queue must hold them all
WARM_UP_CALLS = 3
OUT_OF_MEMORY = "out of memory"  # a reason begins with it
LEAST_ROUNDS = 3
# Queued before a burst, it keeps the device busy until the host has queued the burst.
SPINS_PER_SECOND = 2_000_000_000


class FailedError(RuntimeError):
    """A competitor could not run, or ran wrongly."""


@dataclass
class Timed:
    """A function to time.

    Attributes:
        call: Makes one call with the set of inputs of some number; what it returns is dropped.
        setting: Around every burst, outside its time.
        calls: Calls of a burst.
        milliseconds: Of a call, by burst.
        host_milliseconds: Until a call of a burst is queued, by burst; on a GPU.
        device_milliseconds: Of a call where the host is never waited for, by burst; on a GPU.
        memory_bytes: Most bytes that a call allocates, its results included; on a GPU.
        failure: Why it fell out.
    """

    call: Callable[[int], object]
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext
    calls: int = 1
    milliseconds: list[float] = field(default_factory=list)
    host_milliseconds: list[float] = field(default_factory=list)
    device_milliseconds: list[float] = field(default_factory=list)
    memory_bytes: int | None = None
    failure: str | None = None
    _next: int = 0

    def burst(self, device: torch.device, calls: int, *, queued: bool = False) -> tuple[float, float]:
        """Milliseconds of a call, and milliseconds until it was queued.

        Args:
            device: Where it runs.
            calls: How many; each takes the next set of inputs.
            queued: Whether the device is kept busy until the host has queued them all.
        """
        first, self._next = self._next, self._next + calls
        with self.setting():
            if device.type != "cuda":
                begin = time.perf_counter()
                for i in range(calls):
                    self.call(first + i)
                elapsed = 1e3 * (time.perf_counter() - begin) / calls
                return elapsed, elapsed
            start, end = _event(), _event()
            torch.cuda.synchronize(device)
            if queued:
                host = statistics.median(self.host_milliseconds)
                torch.cuda._sleep(int(SPINS_PER_SECOND * 1e-3 * 1.5 * calls * host))  # type: ignore[no-untyped-call]
            start.record()
            begin = time.perf_counter()
            for i in range(calls):
                self.call(first + i)
            host = time.perf_counter() - begin
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / calls, 1e3 * host / calls


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def measure(
    functions: Mapping[str, Timed], device: torch.device, rounds: int, seconds: float, longest: float = float("inf")
) -> None:
    """Warms up, counts memory and times functions, which keep their figures.

    A function that fails falls out and says why; others go on.

    Args:
        functions: By name.
        device: Where they run.
        rounds: Bursts of each, at least LEAST_ROUNDS.
        seconds: After so many no further round begins once there are LEAST_ROUNDS.
        longest: Seconds a call may take; a slower one falls out.
    """
    for timed in functions.values():
        if timed.failure is None:
            with falling_out(timed):
                _warm_up(timed, device, longest)
    begin, names = time.perf_counter(), [name for name, timed in functions.items() if timed.failure is None]
    for turn in range(max(rounds, LEAST_ROUNDS)):
        if turn >= LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for name in turn_order(names, turn):
            timed = functions[name]
            if timed.failure is None:
                with falling_out(timed):
                    _take(timed, device)


def turn_order(names: list[str], turn: int) -> list[str]:
    """The order of one round: there, back, then the same from the next name on."""
    place = turn // 2 % max(len(names), 1)
    order = names[place:] + names[:place]
    return order if turn % 2 == 0 else order[::-1]


def _warm_up(timed: Timed, device: torch.device, longest: float) -> None:
    timed.burst(device, 1)  # compiles
    once = 1e-3 * timed.burst(device, 1)[0]
    if once > longest:
        raise FailedError(f"a call takes {once:.2g} s; the limit is {longest:g} s")
    if once * WARM_UP_CALLS < 0.2:
        once = 1e-3 * timed.burst(device, WARM_UP_CALLS)[0]
    timed.calls = max(1, min(MAX_CALLS, round(BURST_SECONDS / max(once, 1e-9))))
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        timed.burst(device, 1)
        timed.memory_bytes = torch.cuda.max_memory_allocated(device) - before


def _take(timed: Timed, device: torch.device) -> None:
    elapsed, host = timed.burst(device, timed.calls)
    timed.milliseconds.append(elapsed)
    if device.type != "cuda":
        return
    timed.host_milliseconds.append(host)
    # Where the host keeps up, the device never waited.
    waited = host > 0.7 * elapsed
    timed.device_milliseconds.append(timed.burst(device, timed.calls, queued=True)[0] if waited else elapsed)


@contextmanager
def falling_out(timed: Timed) -> Iterator[None]:
    """Keeps the reason of a failure inside the block in place of raising it, and frees what it held."""
    try:
        yield
    except Interrupted:
        raise
    except FailedError as error:
        timed.failure = str(error)
    except Exception as error:  # another project's code: any
        what = OUT_OF_MEMORY if _is_out_of_memory(error) else type(error).__name__
        timed.failure = f"{what}: {_first_line(error)}"
    if timed.failure is not None:
        free(torch.cuda.is_available())


def _is_out_of_memory(error: Exception) -> bool:
    # torch's CPU allocator has no exception of its own.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def free(cuda: bool) -> None:
    """Returns memory that nothing uses."""
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return line if len(line) <= 300 else line[:297] + "..."


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
