"""Who is told how training goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from spectraformer.config import Run


class Watcher(Protocol):
    """Who is told how training goes."""

    def begin(self, run: Run, step: int, directory: Path) -> None:
        """Training starts, or goes on, after ``step`` steps."""

    def note(self, text: str) -> None:
        """Something a person should know."""

    def stepped(self, step: int, loss: float) -> None:
        """A step is done."""

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """The dev set was evaluated: a row of the history."""

    def end(self) -> None:
        """Training ended, for whatever reason."""


class Silent:
    """A watcher that says nothing."""

    def begin(self, run: Run, step: int, directory: Path) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def stepped(self, step: int, loss: float) -> None:
        """Nothing."""

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


class Together:
    """Tells several watchers.

    Args:
        watchers: Whom, in order.
    """

    def __init__(self, *watchers: Watcher) -> None:
        self.watchers = watchers

    def begin(self, run: Run, step: int, directory: Path) -> None:
        """Training starts, or goes on."""
        for watcher in self.watchers:
            watcher.begin(run, step, directory)

    def note(self, text: str) -> None:
        """Something a person should know."""
        for watcher in self.watchers:
            watcher.note(text)

    def stepped(self, step: int, loss: float) -> None:
        """A step is done."""
        for watcher in self.watchers:
            watcher.stepped(step, loss)

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """The dev set was evaluated."""
        for watcher in self.watchers:
            watcher.evaluated(row)

    def end(self) -> None:
        """Training ended."""
        for watcher in self.watchers:
            watcher.end()


class Curves(Silent):
    """TensorBoard curves in the run's directory; a resumed run goes on where its checkpoint is."""

    EVERY = 10

    def __init__(self) -> None:
        self._writer: Any = None

    def begin(self, run: Run, step: int, directory: Path) -> None:
        """Opens the curves; later points of an interrupted session are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def stepped(self, step: int, loss: float) -> None:
        """One point of the training loss."""
        if step % self.EVERY == 0:
            self._writer.add_scalar("train/loss_of_a_batch", loss, step)

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """One point of each curve in the history."""
        for name in ("learning_rate", "train_loss", "dev_loss", "dev_accuracy"):
            self._writer.add_scalar(name.replace("_", "/", 1), row[name], row["step"])

    def end(self) -> None:
        """Closes the curves."""
        self._writer.close()


class Screen(Silent):
    """A progress bar on a terminal, and a plain line for each evaluation elsewhere.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None

    def begin(self, run: Run, step: int, directory: Path) -> None:
        """Says what is trained, and shows the bar."""
        self._steps, self._loss = run.train.steps, float("nan")
        self._accuracy = ""
        self._name = run.attention.name
        if step:
            self.note(f"{self._name}: going on from step {step}")
        if self.console.is_terminal:
            self._bar = progress_bar(self.console, TextColumn("{task.fields[state]}"))
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self._steps, completed=step, state="")

    def note(self, text: str) -> None:
        """A line."""
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def stepped(self, step: int, loss: float) -> None:
        """Moves the bar."""
        self._loss = loss if self._loss != self._loss else 0.98 * self._loss + 0.02 * loss
        if self._bar is not None:
            self._bar.update(self._task, completed=step, state=f"loss {self._loss:.3f} {self._accuracy}")

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """Shows the dev accuracy."""
        self._accuracy = f"dev {100 * row['dev_accuracy']:.1f} %"
        if self._bar is None:
            self.note(
                f"{self._name}: step {row['step']}/{self._steps}, {row['seconds']:.0f} s, "
                f"loss {row['train_loss']:.4f}, dev loss {row['dev_loss']:.4f}, {self._accuracy}"
            )

    def end(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def progress_bar(console: Console, *more: ProgressColumn) -> Progress:
    """A bar with counts, elapsed and remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *more,
        console=console,
    )
