"""The published table beside our own: which numbers agree, and why they need not."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectraformer.config import to_json
from spectraformer.report.rows import EXACT, Row, Section, flatten, settings, usual_settings
from spectraformer.report.table import percent, said, signed, three_digits
from spectraformer.tasks import TASKS, default_run

FILE = "published_lra_table.csv"
FOLDER = "SPECTRAFORMER_DATA"  # environment variable
COLUMNS = ("variant", "task", "accuracy_percent", "accuracy_sd", "train_hours", "peak_memory_gb")
OTHER_NAMES = {"ot": "softmax", "big bird": "bigbird", "nystromformer": "nystrom", "nyströmformer": "nystrom"}
SOURCE = "Spectraformer, arXiv 2405.15310"
TRAINING = ("train.steps", "train.batch_size", "train.learning_rate", "train.weight_decay", "train.clip")


@dataclass(frozen=True)
class Published:
    """One cell of the published table.

    Attributes:
        accuracy: Mean over seeds, in [0, 1].
        deviation: Standard deviation over seeds, in the same unit.
        hours: Of training, on the authors' GPU.
        memory: Peak, GB, likewise.
    """

    accuracy: float
    deviation: float
    hours: float
    memory: float


PublishedTable = Mapping[tuple[str, str], Published]  # by task and attention


def our_name(variant: str) -> str:
    """Our name of an attention of the published table: its "OPRF-OR" is oprf-orf, its "OT" exact softmax."""
    name = variant.strip().lower()
    return OTHER_NAMES.get(name, name.removesuffix("-or") + "-orf" if name.endswith("-or") else name)


def find_published(path: Path | None) -> PublishedTable:
    """The published table from a file, or from the folder that SPECTRAFORMER_DATA names; empty if neither is there.

    Args:
        path: The file, or None to look for it.

    Raises:
        ValueError: If the file named is not there, or a file found is not such a table.
    """
    if path is None:
        folder = os.environ.get(FOLDER)
        path = Path(folder) / FILE if folder else None
        if path is None or not path.is_file():
            return {}
    if not path.is_file():
        raise ValueError(f"published is {str(path)!r}, which is no file; expected a table such as {FILE}")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if not set(COLUMNS) <= set(reader.fieldnames or ()):
                raise ValueError(
                    f"{path} has the columns {', '.join(reader.fieldnames or ()) or 'of no table'}; "
                    f"expected {', '.join(COLUMNS)}"
                )
            return {_key(line): _cell(line, f"{path}, line {reader.line_num}") for line in reader}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from None


def _key(line: Mapping[str, str | None]) -> tuple[str, str]:
    return (line["task"] or "").strip(), our_name(line["variant"] or "")


def _cell(line: Mapping[str, str | None], where: str) -> Published:
    numbers = []
    for name in COLUMNS[2:]:
        try:
            number = float(line[name] or "")
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number < 0:
            raise ValueError(f"{name} in {where} is {line[name]!r}; expected a number, 0 or more")
        numbers.append(number)
    return Published(numbers[0] / 100, numbers[1] / 100, *numbers[2:])


@dataclass(frozen=True)
class Beside:
    """A section beside the published table.

    Attributes:
        section: Ours.
        pairs: Rows of the usual settings that the table has, in the order of the section.
        baseline: The published softmax, if it is there.
        departures: In what ours differs from the published runs, in words.
        correlation: Spearman's, of ours and theirs, in [-1, 1]; None of fewer than 3 pairs, or if either is constant.
    """

    section: Section
    pairs: tuple[tuple[Row, Published], ...]
    baseline: Published | None
    departures: tuple[str, ...]
    correlation: float | None


def beside_published(section: Section, table: PublishedTable) -> Beside | None:
    """The rows that the published table has, too; None if there is none."""
    task = section.records[0].run.task
    pairs = tuple((row, table[task, row.name]) for row in section.rows if row.usual and (task, row.name) in table)
    if not pairs:
        return None
    ours, theirs = [row.test.mean for row, _ in pairs], [found.accuracy for _, found in pairs]
    return Beside(section, pairs, table.get((task, EXACT)), tuple(_departures(section)), _spearman(ours, theirs))


def _spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    from scipy import stats  # type: ignore[import-untyped]

    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    return float(stats.spearmanr(a, b).statistic)


def _departures(section: Section) -> list[str]:
    """How the usual runs of a section differ from those of the paper, as far as records tell."""
    run = section.records[0].run
    found = []
    if section.task != run.task:
        found.append(f"other data: {section.task}, not {run.task}")
    if section.protocol != "published":
        found.append("strict protocol: padding is masked in pooling, and dev and test are disjoint")
    usual = usual_settings([(row.name, settings(row.records[0])) for row in section.rows])
    if run.task in TASKS.own:
        theirs = default_run(run.task, protocol="published")
        paper: dict[str, Any] = dict(flatten({"train": to_json(theirs.train), "model": to_json(theirs.model)}))
        for path in (*TRAINING, *(path for path in paper if path.startswith("model."))):
            ours = usual.get(path)
            if ours is not None and float(ours) != float(paper[path]):
                found.append(
                    f"{path.partition('.')[2].replace('_', ' ')} {float(ours):,g}, not {float(paper[path]):,g}"
                )
    features = usual.get("attention.num_features")
    if features and int(features) != default_run("listops").attention.num_features:
        found.append(f"{features} random features, not {default_run('listops').attention.num_features}")
    return found


def beside_words(found: Beside) -> list[str]:
    """What the comparison says and what it cannot say, in sentences."""
    said = [f"Published figures: {SOURCE}; mean and standard deviation over seeds, on another GPU, by other code."]
    if found.departures:
        said.append(f"Ours differ in: {'; '.join(found.departures)}. Equal numbers are not to be expected.")
    if found.correlation is not None:
        said.append(
            f"Order of the {len(found.pairs)} attentions that both have: rank correlation (Spearman) "
            f"{signed(found.correlation, 2)}."
        )
    return said


def beside_cells(found: Beside, row: Row, published: Published) -> tuple[dict[str, str], dict[str, float | None]]:
    """A row beside its published cell: texts by column, and what they are sorted by; times as ratios to softmax."""
    softmax = next((r for r, _ in found.pairs if r.exact), None)
    ours = None
    if softmax is not None and softmax.seconds and row.seconds and row.device == softmax.device:
        ours = row.seconds / softmax.seconds
    theirs = published.hours / found.baseline.hours if found.baseline and found.baseline.hours else None
    difference = row.test.mean - published.accuracy

    def ratio(number: float) -> str:
        return f"{three_digits(number)}\N{MULTIPLICATION SIGN}"

    texts = {
        "attention": row.label,
        "ours %": percent(row.test),
        "published %": f"{100 * published.accuracy:.2f} ± {100 * published.deviation:.2f}",
        "difference": signed(100 * difference, 2),
        "time to softmax": said(ours, ratio),
        "published time to softmax": said(theirs, ratio),
    }
    numbers = {
        "ours %": row.test.mean,
        "published %": published.accuracy,
        "difference": difference,
        "time to softmax": ours,
        "published time to softmax": theirs,
    }
    return texts, numbers
