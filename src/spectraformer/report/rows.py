"""Runs become rows: runs that differ in nothing but their seed are one row, and every row names what sets it apart."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from spectraformer.baselines import ATTENTIONS
from spectraformer.config import canonical, to_json
from spectraformer.records import FORMAT, Record
from spectraformer.report.state import state_numbers
from spectraformer.report.statistics import Estimate
from spectraformer.tasks import TASKS

EXACT = "softmax"
PARITY = 0.1  # LRA compares models only within this fraction of the baseline's parameters
NUMBERS = (
    *(f"accuracy.{split}" for split in ("dev", "test")),
    *(f"data.counts.{split}" for split in ("train", "dev", "test")),
    *(f"data.majority.{split}" for split in ("dev", "test")),
    *("parameters", "steps", "best_step", "sessions"),
)
SPEEDS_APART = 1.25  # of timed seeds, the fastest over the slowest
MEASURED = ("steps_per_second", "seconds", "peak_memory_bytes")  # None of runs that shared their device
TEXTS = ("key", "task", "attention", "protocol", "device", "data.sha256", "data.source")
APART = ("task", "size", "protocol", "attention.name", "train.seed")  # in columns and titles of their own


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone. Fractions are in [0, 1].

    Attributes:
        name: The attention.
        settings: "name=value" of what sets the row apart: from rows of the same attention under the same protocol,
            or from the usual training of its task.
        usual: Whether all its settings are the usual ones of its section.
        setup: All settings but those of the attention; accuracies are compared only where it is equal.
        records: One a seed, by seed.
        test: Test accuracy.
        dev: Dev accuracy; its interval is of seeds, or of the dev set.
        majority: Fraction of the test set that is of its most common class.
        parameters: Of the whole model; None if the runs disagree.
        parameters_change: parameters / softmax's - 1; None without a softmax row of the same model and batches.
        device: Where all timed runs ran; None if nowhere, or in several places.
        seconds: Of all optimiser steps, mean over the timed seeds; None without a device, or if they are far apart.
            Evaluation, and what is compiled and recorded when a run begins or goes on, is not in it: it says nothing
            of an attention.
        steps_per_second: Mean over the timed seeds; None likewise.
        speed_ratio: steps_per_second / softmax's; None without such a row on the same device.
        peak_memory: Bytes, the largest over seeds; None if not measured, or in different ways.
        memory_kind: How it was measured, or None.
        state: Numbers a head of the causal state; None where it grows with the length, or there is none.
    """

    name: str
    settings: tuple[str, ...]
    usual: bool
    setup: str
    records: tuple[Record, ...]
    test: Estimate
    dev: Estimate
    majority: float
    parameters: int | None
    parameters_change: float | None
    device: str | None
    seconds: float | None
    steps_per_second: float | None
    speed_ratio: float | None
    peak_memory: int | None
    memory_kind: str | None
    state: int | None

    @property
    def label(self) -> str:
        """Unique in its section; the same attention under the usual training has the same in every section."""
        return f"{self.name} ({', '.join(self.settings)})" if self.settings else self.name

    @property
    def exact(self) -> bool:
        """Softmax attention itself, which the others approximate or replace."""
        return self.name == EXACT

    @property
    def margin(self) -> float:
        """Test accuracy above that of always answering the most common class."""
        return self.test.mean - self.majority

    @property
    def outside_parity(self) -> bool:
        """More than 10 % from the parameters of softmax."""
        return self.parameters_change is not None and abs(self.parameters_change) > PARITY + 1e-9

    @property
    def by_seed(self) -> dict[int, float]:
        """Test accuracy of each seed."""
        return {record.run.train.seed: record.content["accuracy"]["test"] for record in self.records}


@dataclass(frozen=True)
class Section:
    """One task under one protocol; rows by test accuracy, best first."""

    task: str
    protocol: str
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """The task, and the protocol unless strict."""
        return self.task if self.protocol == "strict" else f"{self.task}, {self.protocol} protocol"

    @property
    def records(self) -> tuple[Record, ...]:
        """Of all rows."""
        return tuple(record for row in self.rows for record in row.records)

    @property
    def examples(self) -> int:
        """Of the smallest test set among its rows."""
        return min(int(record.content["data"]["counts"]["test"]) for record in self.records)


def value(content: Mapping[str, Any], path: str) -> Any:
    """What stands at a path such as "accuracy.test"; None where there is nothing."""
    at: Any = content
    for name in path.split("."):
        at = at.get(name) if isinstance(at, Mapping) else None
    return at


def check_records(records: Sequence[Record]) -> list[Record]:
    """The records by key.

    Raises:
        ValueError: If there are none, if one lacks a field, or if a run is there twice.
    """
    if not records:
        raise ValueError("there are no records to report; make one with `spectraformer train TASK` and give its folder")
    seen: dict[str, Record] = {}
    for record in records:
        if not isinstance(record, Record):
            raise ValueError(f"one of the records is {record!r}; expected a Record, as read from a result.json")
        _check(record)
        identity = canonical([to_json(record.run), record.content["task"], record.content["data"]["sha256"]])
        if identity in seen:
            raise ValueError(f"the same run is given twice: {seen[identity].path} and {record.path}; leave one out")
        seen[identity] = record
    return sorted(records, key=lambda record: (record.content["key"], str(record.path)))


def _check(record: Record) -> None:
    content = record.content
    if content.get("format") != FORMAT:
        raise ValueError(f"{record.path} has format {content.get('format')!r}; expected {FORMAT}")
    for path in (*NUMBERS, *MEASURED):
        found = value(content, path)
        if found is None and path in MEASURED:
            continue
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
            raise ValueError(f"{path} of {record.path} is {found!r}; expected a finite number")
        if path.startswith(("accuracy.", "data.majority.")) and not 0 <= found <= 1:
            raise ValueError(f"{path} of {record.path} is {found!r}; expected a fraction in [0, 1]")
        if path.startswith("data.counts.") and (found < 1 or found != int(found)):
            raise ValueError(f"{path} of {record.path} is {found!r}; expected a number of examples, 1 or more")
    for path in TEXTS:
        if not isinstance(value(content, path), str):
            raise ValueError(f"{path} of {record.path} is {value(content, path)!r}; expected a text")
    history = content.get("history")
    if not isinstance(history, list) or not all(isinstance(point, Mapping) for point in history):
        raise ValueError(f"history of {record.path} is no list of evaluations")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings with their paths."""
    for name, item in tree.items():
        if isinstance(item, Mapping):
            yield from flatten(item, f"{prefix}{name}.")
        else:
            yield prefix + name, item


def settings(record: Record) -> dict[str, Any]:
    """All that decides a result but the task, the name of the attention and the seed."""
    found = {"data": record.content["data"]["sha256"][:8], **dict(flatten(to_json(record.run)))}
    for path in APART:
        del found[path]
    if record.content["attention"] in ATTENTIONS.own:
        del found["attention.num_features"]  # it has none, whatever the configuration says
    return found


def sections(records: Sequence[Record]) -> list[Section]:
    """Checked records as sections: strict before published, tasks in the order of the benchmark."""
    protocols, tasks = {"strict": 0, "published": 1}, {name: i for i, name in enumerate(TASKS.own)}

    def place(record: Record) -> tuple[Any, ...]:
        protocol, task = record.content["protocol"], record.run.task
        return (
            *(protocols.get(protocol, len(protocols)), protocol),
            *(tasks.get(task, len(tasks)), record.content["task"]),
        )

    found = []
    for protocol in group(records, lambda record: place(record)[:2]).values():
        parts = [
            list(group(part, lambda r: (r.content["attention"], canonical(settings(r)))).values())
            for _, part in sorted(group(protocol, place).items())
        ]
        everywhere = [_named(runs) for part in parts for runs in part]
        for part in parts:
            content = part[0][0].content
            told = _told_apart([_named(runs) for runs in part], everywhere)
            found.append((place(part[0][0]), Section(content["task"], content["protocol"], _rows(part, told))))
    return [section for _, section in sorted(found, key=lambda item: item[0])]


def group(records: Sequence[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """Records by a key, in their order."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


_Named = tuple[str, Mapping[str, Any]]


def _named(runs: Sequence[Record]) -> _Named:
    return runs[0].content["attention"], settings(runs[0])


def _said(setting: Mapping[str, Any], path: str) -> str:
    found = setting.get(path)
    return "" if found is None else found if isinstance(found, str) else canonical(found)


def usual_settings(named: Sequence[_Named]) -> dict[str, str]:
    """The most common value of each setting, as text; "" where most do not have it."""
    usual = {}
    for path in {path for _, setting in named for path in setting}:
        counts = Counter(_said(setting, path) for _, setting in named if path in setting or "options." in path)
        usual[path] = min(counts, key=lambda text: (-counts[text], text))
    return usual


def _told_apart(named: Sequence[_Named], everywhere: Sequence[_Named]) -> list[tuple[tuple[str, ...], bool]]:
    """For each row what sets it apart, and whether all its settings are usual.

    Settings of the attention are compared over all tasks, so that one label means one attention in every table; those
    of the training within the task, whose usual ones stand above its table.
    """
    usual = {
        **usual_settings(named),
        **{path: text for path, text in usual_settings(everywhere).items() if path.startswith("attention.")},
    }
    told = []
    for name, setting in named:
        namesakes = [other for other_name, other in everywhere if other_name == name]
        unusual = [path for path in setting if _said(setting, path) != usual[path]]
        paths = [
            path
            for path in setting
            if path in unusual
            or (path.startswith("attention.") and len({_said(other, path) for other in namesakes}) > 1)
        ]
        texts = [f"{re.sub(r'^attention[.](options[.])?', '', path)}={_said(setting, path)}" for path in paths]
        told.append((tuple(texts), not unusual))
    return told


def _rows(groups: Sequence[Sequence[Record]], told: Sequence[tuple[tuple[str, ...], bool]]) -> tuple[Row, ...]:
    softmax = [_row(runs, (), True, None) for runs in groups if runs[0].content["attention"] == EXACT]
    reference = {_comparable(row.records[0]): row for row in reversed(softmax)}
    rows = [
        _row(runs, apart, usual, reference.get(_comparable(runs[0])))
        for runs, (apart, usual) in zip(groups, told, strict=True)
    ]
    return tuple(sorted(rows, key=lambda row: (-row.test.mean, row.label)))


def _comparable(record: Record) -> str:
    """Runs that agree in this may be compared in parameters and speed."""
    run = record.run
    return canonical(
        [to_json(run.model), run.train.batch_size, run.train.accumulate, run.train.precision, settings(record)["data"]]
    )


def _row(records: Sequence[Record], apart: tuple[str, ...], usual: bool, softmax: Row | None) -> Row:
    records = sorted(records, key=lambda record: record.run.train.seed)
    contents = [record.content for record in records]
    counts = {content["parameters"] for content in contents}
    parameters = counts.pop() if len(counts) == 1 else None
    timed = timed_records(records)
    device = devices(timed)[0] if len(devices(timed)) == 1 else None
    speeds = [record.content["steps_per_second"] for record in timed if device]
    speed = seconds = None
    if speeds and not far_apart(speeds):
        speed = fmean(speeds)
        seconds = fmean(r.content["steps"] / r.content["steps_per_second"] for r in timed)
    weighed = [content for content in contents if content["peak_memory_bytes"] is not None]
    kinds = {content.get("memory_kind") for content in weighed}
    kind = kinds.pop() if len(kinds) == 1 else None
    change = ratio = None
    if softmax is not None:
        if parameters is not None and softmax.parameters:
            change = parameters / softmax.parameters - 1
        if speed is not None and softmax.steps_per_second and device == softmax.device:
            ratio = speed / softmax.steps_per_second
    sizes = contents[0]["data"]["counts"]
    return Row(
        name=contents[0]["attention"],
        settings=apart,
        usual=usual,
        setup=canonical({path: item for path, item in settings(records[0]).items() if "attention." not in path}),
        records=tuple(records),
        test=Estimate.of([content["accuracy"]["test"] for content in contents], sizes["test"]),
        dev=Estimate.of([content["accuracy"]["dev"] for content in contents], sizes["dev"]),
        majority=contents[0]["data"]["majority"]["test"],
        parameters=parameters,
        parameters_change=change,
        device=device,
        seconds=seconds,
        steps_per_second=speed,
        speed_ratio=ratio,
        peak_memory=max(content["peak_memory_bytes"] for content in weighed) if kind else None,
        memory_kind=kind,
        state=state_numbers(records[0].run.attention, records[0].run.model),
    )


def timed_records(records: Sequence[Record]) -> list[Record]:
    """Those that had their device to themselves."""
    return [record for record in records if record.content["steps_per_second"] is not None]


def far_apart(speeds: Sequence[float]) -> bool:
    """Whether speeds of several seeds are too different for their mean to be that of anything."""
    return bool(speeds) and max(speeds) > SPEEDS_APART * min(speeds)


def devices(records: Sequence[Record]) -> list[str]:
    """Distinct devices, sorted."""
    return sorted({record.content["device"] for record in records})
