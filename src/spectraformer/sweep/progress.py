"""How a sweep goes, read from its folder alone: whoever works on it, wherever, is seen."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from types import TracebackType
from typing import NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from spectraformer.files import DamagedError
from spectraformer.records import read_record
from spectraformer.sweep.claims import Claims, Holder
from spectraformer.sweep.ledger import Entry, read_failure

LOOK_SECONDS = 2.0
# A plain line at least as often, while nothing ends.
LINE_SECONDS = 60.0
SHOWN = 12


class Standing(NamedTuple):
    """How far a sweep is.

    Attributes:
        done: Runs with a result.
        failed: Runs whose last try failed.
        running: Who works on which entry.
        total: All runs.
        work: Of what is done, with parts of what is running, in [0, 1]; failed runs count as done.
    """

    done: int
    failed: int
    running: tuple[tuple[Entry, Holder], ...]
    total: int
    work: float


class Progress:
    """Shows how a sweep goes, from a thread, inside a block.

    Args:
        console: A terminal has a live view, anything else plain lines.
        entries: The runs.
        claims: Of their folder.
    """

    def __init__(self, console: Console, entries: Sequence[Entry], claims: Claims) -> None:
        self.console = console
        self.entries = entries
        self.claims = claims
        self._ended: dict[str, bool] = {entry.name: entry.failed for entry in entries if entry.done or entry.failed}
        self._whole = sum(entry.work for entry in entries) or 1.0
        self._began = time.monotonic()
        self._standing = self.look()
        self._first = self._standing.work
        self._said = self._began
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._live = Live(console=console, get_renderable=self._view, refresh_per_second=2, transient=True)

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self.console.is_terminal:
            self._live.stop()
        self._tell()
        self.note(self.summary())

    def note(self, text: str) -> None:
        """A line for people."""
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _watch(self) -> None:
        took = 0.0
        # Looking at many runs on a slow file system is to stay a small part of what that does.
        while not self._stop.wait(max(LOOK_SECONDS, 20 * took)):
            began = time.monotonic()
            with suppress(OSError):  # it may be away for a while
                self._tell()
            took = time.monotonic() - began

    def _tell(self) -> None:
        """Looks, and says what ended since."""
        for entry in self.entries:
            failed = self._ended.get(entry.name)
            if failed is False:
                continue
            if entry.done:
                self._ended[entry.name] = False
                self.note(f"done    {entry.name}: {self._accuracy(entry)}")
            elif entry.failed and failed is None:
                self._ended[entry.name] = True
                self.note(f"FAILED  {entry.name}: {self._reason(entry)}")
            elif failed and not entry.failed:
                del self._ended[entry.name]  # another process tries it again
        self._standing = self.look()
        if not self.console.is_terminal and not self._stop.is_set() and time.monotonic() - self._said > LINE_SECONDS:
            self._said = time.monotonic()
            self.note(self.summary())

    def look(self) -> Standing:
        """How far the sweep is."""
        living = self.claims.living()
        running = tuple(
            (entry, living[entry.name])
            for entry in self.entries
            if entry.name in living and entry.name not in self._ended
        )
        work = sum(entry.work for entry in self.entries if entry.name in self._ended)
        work += sum(entry.work * min(holder.step / entry.run.train.steps, 1.0) for entry, holder in running)
        failed = sum(self._ended.values())
        return Standing(len(self._ended) - failed, failed, running, len(self.entries), work / self._whole)

    def seconds_left(self) -> float | None:
        """Expected from what was done since the block began; None before anything was."""
        done, left = self._standing.work - self._first, 1.0 - self._standing.work
        if left <= 0:
            return 0.0
        return (time.monotonic() - self._began) * left / done if done > 0 else None

    def summary(self) -> str:
        """One line: done, running, failed, to do, and the estimated end."""
        at = self._standing
        to_do = at.total - at.done - at.failed - len(at.running)
        text = f"{at.done} of {at.total} runs done, {len(at.running)} running, {at.failed} failed, {to_do} to do"
        left = self.seconds_left()
        if at.done + at.failed == at.total or self._stop.is_set():
            return text
        return f"{text}; estimated end {'not known yet' if left is None else clock(left)}"

    def _view(self) -> RenderableType:
        at = self._standing
        lines: list[RenderableType] = [
            ProgressBar(total=1.0, completed=at.work, width=60),
            Text(self.summary(), no_wrap=True, overflow="ellipsis"),
        ]
        for entry, holder in at.running[:SHOWN]:
            step = f"step {holder.step} of {entry.run.train.steps}"
            lines.append(Text(f"  {entry.name}: {step}, {holder.host}", no_wrap=True, overflow="ellipsis"))
        if len(at.running) > SHOWN:
            lines.append(Text(f"  and {len(at.running) - SHOWN} more"))
        return Group(*lines)

    @staticmethod
    def _accuracy(entry: Entry) -> str:
        try:
            return f"test accuracy {100 * read_record(entry.path).content['accuracy']['test']:.2f} %"
        except DamagedError as error:
            return str(error)

    @staticmethod
    def _reason(entry: Entry) -> str:
        try:
            return read_failure(entry).reason
        except DamagedError as error:
            return str(error)


def clock(seconds: float) -> str:
    """When it is in so many seconds, and how long that is: "Sat 14:32 (in 3 h 12 min)"."""
    minutes = max(1, round(seconds / 60))
    days, rest = divmod(minutes, 24 * 60)
    hours, rest = divmod(rest, 60)
    spans = [f"{count} {unit}" for count, unit in ((days, "d"), (hours, "h"), (rest, "min")) if count]
    return f"{datetime.now() + timedelta(seconds=seconds):%a %H:%M} (in {' '.join(spans[:2])})"
