"""Runs become rows: runs that differ in nothing but their seed are one row, and every row names what sets it apart."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectraformer.config import canonical, to_json
from spectraformer.records import FORMAT, Record

EXACT = "softmax"
SPACE = "\N{NO-BREAK SPACE}"
NOTHING = "\N{EN DASH}"
PARITY = 0.1  # LRA compares models only within this fraction of the baseline's parameters
NUMBERS = (
    *(f"accuracy.{split}" for split in ("dev", "test")),
    *(f"data.counts.{split}" for split in ("train", "dev", "test")),
    *(f"data.majority.{split}" for split in ("dev", "test")),
    *("parameters", "steps", "best_step", "steps_per_second", "seconds", "peak_memory_bytes", "sessions"),
)
TEXTS = ("key", "task", "attention", "protocol", "device", "memory_kind", "data.sha256", "data.source")


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n − 1) over seeds; of one seed there is no deviation.

    Attributes:
        mean: Mean, in the unit of the values.
        deviation: Standard deviation in the same unit, or None.
        count: Number of seeds.
    """

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone. Fractions are in [0, 1].

    Attributes:
        name: The attention.
        settings: "name=value" of what sets the row apart: from rows of the same attention, or from most of its section.
        records: One a seed.
        test: Test accuracy.
        dev: Dev accuracy.
        majority: Fraction of the test set that is of its most common class.
        parameters: Of the whole model; None if the runs disagree.
        parameters_change: parameters / softmax's − 1; None without a softmax row of the same model and batches.
        steps_per_second: Mean over seeds; None if they ran on different devices.
        speed_ratio: steps_per_second / softmax's; None without such a row on the same device.
        peak_memory: Bytes, the largest over seeds; None if measured in different ways.
    """

    name: str
    settings: tuple[str, ...]
    records: tuple[Record, ...]
    test: Spread
    dev: Spread
    majority: float
    parameters: int | None
    parameters_change: float | None
    steps_per_second: float | None
    speed_ratio: float | None
    peak_memory: int | None

    @property
    def label(self) -> str:
        """Unique in its section."""
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
    for path in NUMBERS:
        found = value(content, path)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
            raise ValueError(f"{path} of {record.path} is {found!r}; expected a finite number")
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
    for path in ("task", "size", "protocol", "attention.name", "train.seed"):
        del found[path]
    if record.content["attention"] == EXACT:
        del found["attention.num_features"]  # it has none, whatever the configuration says
    return found


def sections(records: Sequence[Record]) -> list[Section]:
    """Checked records as sections, by task, strict before published."""
    order = {"strict": 0, "published": 1}
    parts = _group(records, lambda r: (r.content["task"], order.get(r.content["protocol"], 2), r.content["protocol"]))
    return [Section(task, protocol, _rows(part)) for (task, _, protocol), part in sorted(parts.items())]


def _group(records: Sequence[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _rows(records: Sequence[Record]) -> tuple[Row, ...]:
    groups = list(_group(records, lambda r: (r.content["attention"], canonical(settings(r)))).values())
    told = _told_apart([(group[0].content["attention"], settings(group[0])) for group in groups])
    softmax = [_row(group, (), None) for group in groups if group[0].content["attention"] == EXACT]
    reference = {_comparable(row.records[0]): row for row in reversed(softmax)}
    rows = [_row(group, apart, reference.get(_comparable(group[0]))) for group, apart in zip(groups, told, strict=True)]
    return tuple(sorted(rows, key=lambda row: (-row.test.mean, row.label)))


def _told_apart(named: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """For each row the settings in which it differs from its namesakes or from most rows."""

    def said(setting: Mapping[str, Any], path: str) -> str:
        found = setting.get(path)
        return "" if found is None else found if isinstance(found, str) else canonical(found)

    usual = {}
    for path in {path for _, setting in named for path in setting}:
        counts = Counter(said(setting, path) for _, setting in named if path in setting or "options." in path)
        usual[path] = min(counts, key=lambda text: (-counts[text], text))
    told = []
    for name, setting in named:
        namesakes = [other for other_name, other in named if other_name == name]
        paths = [
            path
            for path in setting
            if said(setting, path) != usual[path] or len({said(other, path) for other in namesakes}) > 1
        ]
        told.append(tuple(f"{re.sub(r'^attention[.](options[.])?', '', path)}={said(setting, path)}" for path in paths))
    return told


def _comparable(record: Record) -> str:
    """Runs that agree in this may be compared in parameters and speed."""
    run = record.run
    return canonical(
        [to_json(run.model), run.train.batch_size, run.train.accumulate, run.train.precision, settings(record)["data"]]
    )


def _row(records: Sequence[Record], apart: tuple[str, ...], softmax: Row | None) -> Row:
    contents = [record.content for record in records]
    kinds = {content["memory_kind"] for content in contents}
    counts = {content["parameters"] for content in contents}
    parameters = counts.pop() if len(counts) == 1 else None
    speed = (
        statistics.fmean(content["steps_per_second"] for content in contents) if len(devices(records)) == 1 else None
    )
    change = ratio = None
    if softmax is not None:
        if parameters is not None and softmax.parameters:
            change = parameters / softmax.parameters - 1
        if speed is not None and softmax.steps_per_second and devices(records) == devices(softmax.records):
            ratio = speed / softmax.steps_per_second
    return Row(
        name=contents[0]["attention"],
        settings=apart,
        records=tuple(records),
        test=Spread.of([content["accuracy"]["test"] for content in contents]),
        dev=Spread.of([content["accuracy"]["dev"] for content in contents]),
        majority=contents[0]["data"]["majority"]["test"],
        parameters=parameters,
        parameters_change=change,
        steps_per_second=speed,
        speed_ratio=ratio,
        peak_memory=max(content["peak_memory_bytes"] for content in contents) if len(kinds) == 1 else None,
    )


def devices(records: Sequence[Record]) -> list[str]:
    """Distinct devices, sorted."""
    return sorted({record.content["device"] for record in records})


def percent(spread: Spread) -> str:
    """Such as "41.03 ± 0.28"."""
    deviation = "" if spread.deviation is None else f" ± {100 * spread.deviation:.2f}"
    return f"{100 * spread.mean:.2f}{deviation}"


def signed(number: float, digits: int) -> str:
    """With its sign, a true minus, and no negative zero."""
    text = f"{abs(number):.{digits}f}"
    return text if not float(text) else ("+" if number > 0 else "\N{MINUS SIGN}") + text


def three_digits(number: float) -> str:
    """A positive number with three significant digits, never in scientific notation."""
    return f"{number:,.{max(0, 2 - math.floor(math.log10(number)))}f}" if number > 0 else "0"


def memory(count: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def cells(row: Row) -> dict[str, str]:
    """A row of the table as texts, by column; a dash where there is nothing to say."""
    best = sorted({record.content["best_step"] for record in row.records})
    kind = " GPU" if row.records[0].content["memory_kind"] == "cuda" else ""
    parity = " †" * row.outside_parity

    def said(number: float | None, show: Callable[[float], str]) -> str:
        return NOTHING if number is None else show(number)

    return {
        "attention": row.label,
        "test %": percent(row.test),
        "seeds": str(row.test.count),
        "dev %": percent(row.dev),
        "over majority": signed(100 * row.margin, 2),
        "parameters": said(row.parameters, lambda count: f"{count:,}"),
        "to softmax": said(row.parameters_change, lambda change: f"{signed(100 * change, 1)} %{parity}"),
        "steps/s": said(row.steps_per_second, three_digits),
        "speed to softmax": said(row.speed_ratio, lambda ratio: f"{ratio:.2f}\N{MULTIPLICATION SIGN}"),
        "peak memory": said(row.peak_memory, lambda count: memory(count) + kind),
        "best step": "\N{EN DASH}".join(f"{step:,}" for step in dict.fromkeys((best[0], best[-1])))
        + f" / {row.records[0].content['steps']:,}",
    }


def facts(section: Section) -> str:
    """Where the data of a section comes from and how many examples it has, one sentence a data set."""
    data = {record.content["data"]["sha256"]: record.content["data"] for record in section.records}
    sentences = []
    for sha256, found in sorted(data.items()):
        counts, majority = found["counts"], found["majority"]
        numbers = ", ".join(f"{counts[split]:,} {split}" for split in ("train", "dev", "test"))
        which = f" ({sha256[:8]})" if len(data) > 1 else ""
        sentences.append(
            f"Data{which}: {found['source'].rstrip('.')}; {numbers} examples; "
            f"the most common class is {100 * majority['test']:.2f}{SPACE}% of test, "
            f"{100 * majority['dev']:.2f}{SPACE}% of dev."
        )
    return " ".join(sentences)


def escape_markdown(text: str) -> str:
    """The text as itself in a Markdown table."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def markdown(found: Sequence[Section], footnotes: Sequence[str]) -> str:
    """A page of tables, ready for a README."""
    lines = []
    for section in found:
        rows = [cells(row) for row in section.rows]
        columns = list(rows[0])
        lines += [f"### {escape_markdown(section.title)}", "", escape_markdown(facts(section)), ""]
        lines += [_line(columns), "|---|" + "---:|" * (len(columns) - 1)]
        for row, texts in zip(section.rows, rows, strict=True):
            mark = " (exact)" if row.exact else ""
            lines.append(_line([escape_markdown(texts.pop("attention")) + mark, *texts.values()]))
        lines.append("")
    return "\n".join([*lines, *(f"- {escape_markdown(note)}" for note in footnotes), ""])


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


FIRST = ("key", "task", "protocol", "attention", "run.train.seed", "accuracy.test", "accuracy.dev")


def comma_separated(records: Sequence[Record]) -> str:
    """One line a run with all its scalars at full precision; options of attentions as JSON; no history.

    Columns are the names in ``FIRST``, then the others by name.
    """
    lines = [_scalars(record) for record in records]
    rest = sorted({path for line in lines for path in line} - set(FIRST))
    file = io.StringIO()
    writer = csv.DictWriter(file, [*FIRST, *rest], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def _scalars(record: Record) -> dict[str, Any]:
    tree = {name: item for name, item in record.content.items() if name not in ("history", "run")}
    run = to_json(record.run)
    run["attention"]["options"] = canonical(run["attention"]["options"])
    return {
        "folder": record.path.name,
        **{path: canonical(item) if isinstance(item, list) else item for path, item in flatten({**tree, "run": run})},
    }
