"""Results of runs as tables, curves and one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from re import sub

from spectraformer.files import write_atomically
from spectraformer.records import Record
from spectraformer.report.page import footnotes, html_page
from spectraformer.report.plots import curves_png, curves_svg
from spectraformer.report.table import Section, check_records, comma_separated, markdown, sections

__all__ = ["ReportPaths", "write_report"]


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report.

    Attributes:
        page: ``index.html``, all in one.
        markdown: ``table.md``.
        table: ``table.csv``, one line a run.
        curves: For each task and protocol an SVG and a PNG.
    """

    page: Path
    markdown: Path
    table: Path
    curves: tuple[Path, ...]


def write_report(records: Sequence[Record], out: Path) -> ReportPaths:
    """Writes the report on these runs; equal records in any order give equal files.

    All is made before the first file is written, and each is replaced as a whole or not at all.

    Args:
        records: Results of finished runs.
        out: A folder, made if missing.

    Raises:
        ValueError: If there are no records, one is incomplete or twice there, or ``out`` is no folder.
    """
    checked = check_records(records)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"out is {str(out)!r}, where a file is in the way; expected a folder, or a place for one"
        ) from None
    found = sections(checked)
    paths = ReportPaths(
        out / "index.html",
        out / "table.md",
        out / "table.csv",
        tuple(out / f"curves-{name}.{kind}" for name in _names(found) for kind in ("svg", "png")),
    )
    contents = {
        paths.page: html_page(found).encode(),
        paths.markdown: markdown(found, footnotes(found)).encode(),
        paths.table: comma_separated(checked).encode(),
        **dict(
            zip(paths.curves, (draw(section) for section in found for draw in (curves_svg, curves_png)), strict=True)
        ),
    }
    for path, content in contents.items():
        write_atomically(path, content)
    return paths


def _names(found: Sequence[Section]) -> list[str]:
    """File names; titles that look alike without their punctuation get a number that tells them apart."""
    plain = [sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") for section in found]
    return [
        name
        if name and plain.count(name) == 1
        else f"{name}-{sha256(section.title.encode()).hexdigest()[:8]}".strip("-")
        for name, section in zip(plain, found, strict=True)
    ]
