"""Rows as texts: cells of the tables, Markdown for a README, and one CSV line a run."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from spectraformer.config import canonical, to_json
from spectraformer.records import Record
from spectraformer.report.rows import Row, Section, flatten, settings, usual_settings
from spectraformer.report.statistics import TEST_SET, Estimate

SPACE = "\N{NO-BREAK SPACE}"
NOTHING = "\N{EN DASH}"
ALONE = "‡"  # marks intervals and tests of one seed
TOLD = {  # settings of the usual training that a reader wants to know, with their unit
    "train.steps": "steps",
    "train.batch_size": "examples a batch",
    "attention.num_features": "random features",
}


def percent(estimate: Estimate) -> str:
    """Such as "41.03 ± 0.28"."""
    deviation = "" if estimate.deviation is None else f" ± {100 * estimate.deviation:.2f}"
    return f"{100 * estimate.mean:.2f}{deviation}"


def interval(estimate: Estimate) -> str:
    """Such as "40.7 to 41.4"; marked if it is of the test set alone."""
    return f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}" + f" {ALONE}" * (estimate.basis == TEST_SET)


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


def said(number: float | None, show: Callable[[Any], str]) -> str:
    """The number as a text, or a dash where there is none."""
    return NOTHING if number is None else show(number)


def cells(row: Row) -> dict[str, str]:
    """A row of the table as texts, by column; a dash where there is nothing to say."""
    best = sorted({record.content["best_step"] for record in row.records})
    kind = " GPU" if row.memory_kind == "cuda" else ""
    parity = " †" * row.outside_parity
    return {
        "attention": row.label,
        "test %": percent(row.test),
        "95 % interval": interval(row.test),
        "seeds": str(row.test.count),
        "dev %": f"{100 * row.dev.mean:.2f}",
        "over majority": signed(100 * row.margin, 2),
        "parameters": said(row.parameters, lambda count: f"{count:,}"),
        "to softmax": said(row.parameters_change, lambda change: f"{signed(100 * change, 1)} %{parity}"),
        "steps/s": said(row.steps_per_second, three_digits),
        "speed to softmax": said(row.speed_ratio, lambda ratio: f"{ratio:.2f}\N{MULTIPLICATION SIGN}"),
        "peak memory": said(row.peak_memory, lambda count: memory(count) + kind),
        "state a head": said(row.state, lambda count: f"{count:,}"),
        "best step": "\N{EN DASH}".join(f"{step:,}" for step in dict.fromkeys((best[0], best[-1]))),
    }


def numbers(row: Row) -> dict[str, float | None]:
    """What the columns of :func:`cells` are sorted by."""
    return {
        "test %": row.test.mean,
        "95 % interval": row.test.low,
        "seeds": row.test.count,
        "dev %": row.dev.mean,
        "over majority": row.margin,
        "parameters": row.parameters,
        "to softmax": row.parameters_change,
        "steps/s": row.steps_per_second,
        "speed to softmax": row.speed_ratio,
        "peak memory": row.peak_memory,
        "state a head": row.state,
        "best step": min(record.content["best_step"] for record in row.records),
    }


def facts(section: Section) -> str:
    """Where the data of a section comes from and how it is usually trained on; one sentence a data set."""
    data = {record.content["data"]["sha256"]: record.content["data"] for record in section.records}
    sentences = []
    for sha256, found in sorted(data.items()):
        counts, majority = found["counts"], found["majority"]
        sizes = ", ".join(f"{counts[split]:,} {split}" for split in ("train", "dev", "test"))
        which = f" ({sha256[:8]})" if len(data) > 1 else ""
        sentences.append(
            f"Data{which}: {found['source'].rstrip('.')}; {sizes} examples; "
            f"the most common class is {100 * majority['test']:.2f}{SPACE}% of test, "
            f"{100 * majority['dev']:.2f}{SPACE}% of dev."
        )
    usual = usual_settings([(row.name, settings(row.records[0])) for row in section.rows])
    told = [f"{int(usual[path]):,} {unit}" for path, unit in TOLD.items() if usual.get(path)]
    return " ".join([*sentences, f"Unless a name says otherwise: {', '.join(told)}."])


def escape_markdown(text: str) -> str:
    """The text as itself in a Markdown table."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def markdown_table(
    columns: Sequence[str], lines: Sequence[Sequence[str]], bold: Sequence[Collection[int]] | None = None
) -> list[str]:
    """Lines of a table with its first column to the left; texts are escaped.

    Args:
        columns: Their names.
        lines: One text a column.
        bold: For each line, which columns are bold.
    """

    def line(texts: Sequence[str], strong: Collection[int]) -> str:
        written = [f"**{escape_markdown(t)}**" if j in strong else escape_markdown(t) for j, t in enumerate(texts)]
        return "| " + " | ".join(written) + " |"

    rule = "|---|" + "---:|" * (len(columns) - 1)
    return [line(columns, ()), rule, *(line(texts, bold[i] if bold else ()) for i, texts in enumerate(lines))]


def markdown(found: Sequence[Section], footnotes: Sequence[str]) -> str:
    """A page of tables, ready for a README."""
    lines = []
    for section in found:
        rows = [cells(row) for row in section.rows]
        lines += [f"### {escape_markdown(section.title)}", "", escape_markdown(facts(section)), ""]
        named = [
            [texts.pop("attention") + " (exact)" * row.exact, *texts.values()]
            for row, texts in zip(section.rows, rows, strict=True)
        ]
        lines += [*markdown_table(list(cells(section.rows[0])), named), ""]
    return "\n".join([*lines, *(f"- {escape_markdown(note)}" for note in footnotes), ""])


FIRST = ("key", "task", "protocol", "attention", "run.train.seed", "accuracy.test", "accuracy.dev")


def comma_separated(records: Sequence[Record]) -> str:
    """One line a run with all its scalars at full precision; options of attentions as JSON; no history.

    Columns are the names in ``FIRST``, then the others by name.
    """
    lines = [_scalars(record) for record in records]
    rest = sorted({path for line in lines for path in line} - set(FIRST))
    return csv_text([*FIRST, *rest], lines)


def csv_text(columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> str:
    """A CSV file; None and what is missing are empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
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
