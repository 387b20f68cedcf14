"""One optimiser step that needs nothing from the host: its batch, its learning rate and its place are on the device.

Several steps are planned at once and run one after another; what came of them is read once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spectraformer.captured import Captured, capture, kept
from spectraformer.config import TrainConfig
from spectraformer.distributed import Group
from spectraformer.tasks.base import Array

BETAS = (0.9, 0.999)
EPSILON = 1e-6
# torch.optim.lr_scheduler.OneCycleLR's defaults: where the cycle begins and ends, as fractions of its peak.
FIRST_FRACTION = 1 / 25
LAST_FRACTION = FIRST_FRACTION / 1e4
# Steps that can be planned at once, by type of device. A CPU gains nothing from several.
PLANNED = {"cuda": 1024}


def learning_rate(train: TrainConfig, step: int) -> float:
    """One linear cycle: up to the peak in ``warmup`` steps, then down to almost nothing at the last step.

    Args:
        train: Peak, warm-up and number of steps.
        step: 0 for the first.
    """
    peak, last = train.learning_rate, train.steps - 1
    if step < train.warmup:
        return peak * (FIRST_FRACTION + (1 - FIRST_FRACTION) * step / train.warmup)
    down = (step - train.warmup) / max(last - train.warmup, 1)
    return peak * (1 - (1 - LAST_FRACTION) * down)


class Outcome(NamedTuple):
    """What came of the steps that were planned.

    Attributes:
        losses: Of every step up to the first that is not finite, nats.
        failed: Whether the step after those has a loss or gradient that is not finite. Neither it nor any later one
            was applied.
    """

    losses: list[float]
    failed: bool


class Stepper:
    """AdamW with gradients clipped by value, on the batches and at the rates that are planned.

    Args:
        model: What is trained.
        train: Settings.
        backward: Adds the gradients of a part of a batch, given by the numbers of its examples, (b,), and returns its
            share of the loss.
        group: With whom.
        device: Where.

    Attributes:
        optimizer: AdamW.
        most: Steps that can be planned at once.
        failed: 1.0 once a loss or gradient was not finite: from then on nothing is applied.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        backward: Callable[[Tensor], Tensor],
        group: Group,
        device: torch.device,
    ) -> None:
        self.model = model
        self.train = train
        self.backward = backward
        self.group = group
        self.device = device
        self.rate = torch.zeros((), device=device)
        # Fused, because that reads on the device whether to do nothing, and at what rate.
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=self.rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=train.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.failed = torch.zeros((), device=device)
        self.optimizer.found_inf = self.failed  # type: ignore[attr-defined]
        self.most = PLANNED.get(device.type, 1)
        self.share = group.share(train.batch_size, train.accumulate)
        self.examples = torch.zeros(self.most, train.batch_size // group.size, dtype=torch.int64, device=device)
        self.rates = torch.zeros(self.most, device=device)
        self.places = torch.arange(self.most, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.outcomes = torch.zeros(2, self.most, device=device)  # loss; whether not finite
        self.one = torch.ones((), device=device)
        self._captured: Captured | None = None

    def run(
        self,
        examples: Array,  # (k, batch_size) numbers of examples
        rates: Sequence[float],  # k
    ) -> Outcome:
        """Runs k steps, each on its examples at its learning rate, and waits for them."""
        count = len(rates)
        self.plan(examples, rates)
        for _ in range(count):
            self.advance()
        losses, failed = self.outcomes[:, :count].tolist()
        good = failed.index(1.0) if 1.0 in failed else count
        return Outcome(losses[:good], good < count)

    def plan(self, examples: Array, rates: Sequence[float]) -> None:
        """Puts on the device what the next steps are, as for :meth:`run`."""
        batches = self.share(torch.from_numpy(examples))
        self.examples[: len(batches)].copy_(batches)
        self.rates[: len(rates)].copy_(torch.tensor(rates, dtype=torch.float32))
        self.place.zero_()

    def advance(self) -> None:
        """The next step of the plan, by a replay if it is recorded."""
        if self._captured is None:
            self.step()
        else:
            self._captured.run()

    def step(self) -> None:
        """The next step of the plan, operation by operation."""
        examples = self.examples.index_select(0, self.place)[0]
        self.rate.copy_(self.rates.index_select(0, self.place)[0])
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        for part in examples.chunk(self.train.accumulate):
            loss = loss + self.backward(part)
        gradients = self.gradients()
        self.group.sum_([loss, *gradients])
        # Leaves finite numbers as they are: they are multiplied by one.
        torch._amp_foreach_non_finite_check_and_unscale_([loss, *gradients], self.failed, self.one)
        nn.utils.clip_grad_value_(self.model.parameters(), self.train.clip)
        self.optimizer.step()
        outcome = torch.stack((loss, self.failed)).unsqueeze(1)
        self.outcomes.copy_(torch.where(self.places == self.place, outcome, self.outcomes))
        self.place += 1

    def gradients(self) -> list[Tensor]:
        """Of all parameters that have one."""
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    def capture(self) -> str | None:
        """Records the step if that can be done; returns why not."""
        if self._captured is None:
            with self._nothing_applied():
                self._captured = capture(
                    self.step,
                    self.model,
                    self.device,
                    state=(self.place, self.outcomes),
                    results=lambda: [self.outcomes, *self.gradients()],
                )
        return self._captured.reason

    def rehearse(self) -> None:
        """Goes through a step and leaves everything as it was."""
        with self._nothing_applied(), kept(self.model, (self.place, self.outcomes), self.device):
            self.step()

    @contextmanager
    def _nothing_applied(self) -> Iterator[None]:
        self.plan(np.zeros((1, self.train.batch_size), np.int64), [0.0])
        self.failed.fill_(1.0)
        try:
            yield
        finally:
            self.failed.zero_()
