"""Results of runs as tables, statistics, drawings and one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from re import sub

from spectraformer.files import require_folder, write_atomically
from spectraformer.records import Record
from spectraformer.report.analysis import Analysis, analyse, leaderboard_markdown
from spectraformer.report.curves import curve_files
from spectraformer.report.heatmap import heatmap_files
from spectraformer.report.latex import latex
from spectraformer.report.leaderboard import comparisons_csv, leaderboard_csv
from spectraformer.report.notes import footnotes
from spectraformer.report.page import html_page
from spectraformer.report.pareto import front_files
from spectraformer.report.published import find_published
from spectraformer.report.rank_chart import ranking_files
from spectraformer.report.rows import EXACT, Section, check_records
from spectraformer.report.table import comma_separated, markdown

__all__ = ["ReportPaths", "write_report"]


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report.

    Attributes:
        page: ``index.html``, all in one.
        markdown: ``table.md``, one table a task and protocol.
        table: ``table.csv``, one line a run.
        leaderboard: ``leaderboard.md``, all tasks in one table, ranking and comparisons in words.
        latex: ``leaderboard.tex``, the same tables for a paper.
        rows: ``leaderboard.csv``, one line an attention and task.
        comparisons: ``comparisons.csv``, one line a comparison with the baseline.
        curves: For each task and protocol an SVG and a PNG.
        drawings: Heatmaps, Pareto fronts and ranks, as SVG and PNG, where there is enough to draw.
    """

    page: Path
    markdown: Path
    table: Path
    leaderboard: Path
    latex: Path
    rows: Path
    comparisons: Path
    curves: tuple[Path, ...]
    drawings: tuple[Path, ...]


def write_report(
    records: Sequence[Record], out: Path, *, published: Path | None = None, baseline: str = EXACT
) -> ReportPaths:
    """Writes the report on these runs; equal records in any order give equal files.

    All is made before the first file is written, and each is replaced as a whole or not at all.

    Args:
        records: Results of finished runs.
        out: A folder, made if missing.
        published: A table of published figures to stand beside them; None for ``published_lra_table.csv`` in the
            folder that SPECTRAFORMER_DATA names, if it is there.
        baseline: The attention that others are compared with.

    Raises:
        ValueError: If there are no records, one is incomplete or twice there, ``out`` is no folder, ``published`` no
            such table, or ``baseline`` no attention of these runs.
    """
    checked = check_records(records)
    found = analyse(checked, find_published(published), baseline)
    require_folder("out", out)
    notes = footnotes(found)
    curves = _curves(found)
    drawings = _drawings(found)
    paths = ReportPaths(
        page=out / "index.html",
        markdown=out / "table.md",
        table=out / "table.csv",
        leaderboard=out / "leaderboard.md",
        latex=out / "leaderboard.tex",
        rows=out / "leaderboard.csv",
        comparisons=out / "comparisons.csv",
        curves=tuple(out / name for name in curves),
        drawings=tuple(out / name for name in drawings),
    )
    contents: dict[Path, str | bytes] = {
        paths.page: html_page(found, notes),
        paths.markdown: markdown(found.sections, notes),
        paths.table: comma_separated(checked),
        paths.leaderboard: leaderboard_markdown(found, notes),
        paths.latex: latex(found.boards),
        paths.rows: leaderboard_csv(found.boards),
        paths.comparisons: comparisons_csv([(part.section, part.comparisons) for part in found.parts]),
        **{out / name: content for name, content in {**curves, **drawings}.items()},
    }
    for path, content in contents.items():
        write_atomically(path, content)
    return paths


def _curves(found: Analysis) -> dict[str, bytes]:
    """Drawings by file name."""
    made: dict[str, bytes] = {}
    for section, name in zip(found.sections, _names(found.sections), strict=True):
        made |= _pair(f"curves-{name}", curve_files(section))
    return made


def _drawings(found: Analysis) -> dict[str, bytes]:
    made: dict[str, bytes] = {}
    for part, name in zip(found.parts, _names(found.sections), strict=True):
        if part.heatmap is not None:
            made |= _pair(f"heatmap-{name}", heatmap_files(part.heatmap))
        if part.fronts:
            made |= _pair(f"pareto-{name}", front_files(part.section, part.fronts))
    for board in found.boards:
        if board.ranking.critical is not None:
            title = f"Mean ranks over {len(board.ranking.tasks)} tasks, {board.protocol} protocol"
            made |= _pair(f"ranks-{_plain(board.protocol)}", ranking_files(board.ranking, title))
    return made


def _pair(name: str, content: tuple[bytes, bytes]) -> dict[str, bytes]:
    return dict(zip((f"{name}.svg", f"{name}.png"), content, strict=True))


def _names(found: Sequence[Section]) -> list[str]:
    """File names; titles that look alike without their punctuation get a number that tells them apart."""
    plain = [_plain(section.title) for section in found]
    return [
        name
        if name and plain.count(name) == 1
        else f"{name}-{sha256(section.title.encode()).hexdigest()[:8]}".strip("-")
        for name, section in zip(plain, found, strict=True)
    ]


def _plain(text: str) -> str:
    return sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
