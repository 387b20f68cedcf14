"""States of torch's generators: saved, restored in every process of a group, and taken back by some steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from spectraformer.distributed import Group

# Between the seeds of processes: far beyond those that people choose.
STRIDE = 1 << 40


def seed_all(seed: int, rank: int) -> None:
    """Seeds torch's generators: of the first process by the seed itself, of the others by seeds of their own."""
    torch.manual_seed((seed + rank * STRIDE) % (1 << 63))


def random_states(group: Group) -> dict[str, Tensor]:
    """States of the generators of all processes: "cpu" and "cuda" of the first, "cpu.1" … of the others."""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    gathered = {name: group.gather(state) for name, state in own.items()}
    return {_name(name, rank): state for name, states in gathered.items() for rank, state in enumerate(states)}


def restore_random(states: Mapping[str, Tensor], rank: int, step: int) -> None:
    """The inverse of :func:`random_states` in one process.

    A process that was not there when they were saved goes on from its own seed and the step.
    """
    if _name("cpu", rank) not in states:
        torch.manual_seed((torch.initial_seed() + step) % (1 << 63))
        return
    torch.set_rng_state(states[_name("cpu", rank)])
    if _name("cuda", rank) in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[_name("cuda", rank)])


def _name(kind: str, rank: int) -> str:
    return f"{kind}.{rank}" if rank else kind


class RandomSpan:
    """What some equal steps draw, so that the generators can be taken back to the beginning of one of them.

    On the CPU, which runs one step at a time, only to the beginning of the first.

    Args:
        device: Where they draw.
    """

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._generator = torch.cuda.default_generators[torch.cuda.current_device()] if device.type == "cuda" else None
        self._start = 0 if self._generator is None else self._generator.get_offset()

    def rewind(self, step: int, steps: int) -> None:
        """Back to the beginning of step 0, 1, …, of so many that were run."""
        torch.set_rng_state(self._cpu)
        if self._generator is not None:
            drawn = (self._generator.get_offset() - self._start) // steps
            self._generator.set_offset(self._start + step * drawn)


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Makes a GPU the current one, whose generator is torch's."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
