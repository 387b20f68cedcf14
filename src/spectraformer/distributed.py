"""Data parallel training by torchrun: processes that compute parts of every batch, and agree on everything else.

Each process has the whole model and draws the same W and the same batch order from the seed. Losses and gradients of
the parts are added up in one all-reduce a step, so that all processes take the same step.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

# The first process may prepare data for long while the others wait for it.
PATIENCE = timedelta(hours=6)
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@dataclass(frozen=True)
class Group:
    """The processes that train together; by default this one alone.

    Attributes:
        rank: Number of this process, 0 for the first.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors, of one device and dtype, by their sums over all processes, in one all-reduce."""
        if self.size == 1:
            return
        flat = torch.cat([x.reshape(-1) for x in tensors])
        distributed.all_reduce(flat)
        parts = torch.split(flat, [x.numel() for x in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(x) for part, x in zip(parts, tensors, strict=True)])

    def agree(self, *numbers: int) -> list[int]:
        """The largest of every number over all processes: what one knows, all know."""
        if self.size == 1:
            return list(numbers)
        held = torch.tensor(numbers, dtype=torch.int64)
        distributed.all_reduce(held, distributed.ReduceOp.MAX)
        return [int(x) for x in held]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """One tensor of every process, of one shape and on the CPU, in order of rank."""
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(found, tensor)
        return found

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes through the block before all others: what it makes, they find."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def wait(self) -> None:
        """Until all processes are here."""
        self.agree(0)

    def share(self, examples: int, parts: int) -> Callable[[Tensor], Tensor]:
        """This process's share of batches of so many examples that are computed in so many parts.

        Returns:
            From the numbers of batches, (..., examples), to those of them that are computed here, in the order of the
            parts, (..., examples / size).

        Raises:
            ValueError: If a part does not divide into equal shares.
        """
        if examples % (parts * self.size):
            least = parts * self.size
            nearest = max(least, round(examples / least) * least)
            raise ValueError(
                f"train.batch_size is {examples}, in {parts} part(s) for {self.size} processes; expected a multiple of "
                f"{least}; nearest: {nearest}"
            )

        def mine(batch: Tensor) -> Tensor:
            return torch.unflatten(batch, -1, (parts, self.size, -1))[..., self.rank, :].flatten(-2)

        return mine


ALONE = Group()


def join() -> Group:
    """The group that torchrun started this process in; without torchrun, this process alone.

    Control messages go by gloo between CPUs and never wait for a GPU; gradients on GPUs go by NCCL.

    Raises:
        ValueError: If the environment names only a part of a group.
    """
    if not is_started_in_a_group():
        return ALONE
    if not distributed.is_initialized():
        missing = [name for name in (*VARIABLES, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; "
                "expected all that torchrun sets, or none of it"
            )
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=PATIENCE)
    return Group(distributed.get_rank(), distributed.get_world_size())


def is_started_in_a_group() -> bool:
    """Whether torchrun started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def leave() -> None:
    """Ends the group, if this process is in one."""
    if distributed.is_available() and distributed.is_initialized():
        gc.collect()  # NCCL waits for recorded steps, which hold its communicator
        distributed.destroy_process_group()


def own_device(device: str) -> str:
    """Which device this process takes of those a name may mean: under torchrun each its own GPU.

    Raises:
        ValueError: If all processes would take the same GPU.
    """
    if not is_started_in_a_group() or device == "cpu" or not torch.cuda.is_available():
        return device
    if device in ("auto", "cuda"):
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    raise ValueError(f"device is {device!r}; expected auto, cpu or cuda: each of the processes takes its own GPU")
