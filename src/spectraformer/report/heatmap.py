"""Test accuracy of component function x weight matrix, on one task."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure

from spectraformer.registry import COMPONENTS, WEIGHTS
from spectraformer.report.drawing import INK, PALETTE, drawing_settings, saved_png, saved_svg, shortened
from spectraformer.report.rows import Row, Section

DARKEST = 0.62  # share of the colour in the best cell: ink stays readable on it


@dataclass(frozen=True)
class Heatmap:
    """Test accuracy of component function x weight matrix on one task.

    Attributes:
        section: The task.
        components: Names of the lines, those that have any run.
        weights: Names of the columns.
        rows: By line and column; None where there is no run.
        left_out: Labels of pairs whose settings are not the usual ones.
    """

    section: Section
    components: tuple[str, ...]
    weights: tuple[str, ...]
    rows: tuple[tuple[Row | None, ...], ...]
    left_out: tuple[str, ...]

    def shade(self, row: Row) -> float:
        """Place of a cell between the worst, 0, and the best, 1."""
        means = [cell.test.mean for line in self.rows for cell in line if cell is not None]
        low, high = min(means), max(means)
        return (row.test.mean - low) / (high - low) if high > low else 0.5


def heatmap(section: Section) -> Heatmap | None:
    """The heatmap of a section; None unless it has two lines, two columns and four cells."""
    known_components, known_weights = tuple(COMPONENTS), tuple(WEIGHTS)  # other packages' are looked up each time
    found: dict[tuple[str, str], Row] = {}
    left_out = []
    for row in section.rows:
        component, dash, weight = row.name.partition("-")
        if not dash or component not in known_components or weight not in known_weights:
            continue
        if row.usual:
            found[component, weight] = row
        else:
            left_out.append(row.label)
    components = tuple(name for name in known_components if any(c == name for c, _ in found))
    weights = tuple(name for name in known_weights if any(w == name for _, w in found))
    if len(components) < 2 or len(weights) < 2 or len(found) < 4:
        return None
    rows = tuple(tuple(found.get((c, w)) for w in weights) for c in components)
    return Heatmap(section, components, weights, rows, tuple(left_out))


def heatmap_files(found: Heatmap) -> tuple[bytes, bytes]:
    """As an SVG and a PNG file."""
    lines, columns = len(found.components), len(found.weights)
    width, height = 1.3 + 0.72 * columns, 1.25 + 0.42 * lines
    with drawing_settings(f"{found.section.title}/heatmap"):
        figure = Figure(figsize=(max(width, 5.0), height), facecolor="white")
        axes = figure.add_axes(
            (1.1 / max(width, 5.0), 0.15 / height, 0.72 * columns / max(width, 5.0), 0.42 * lines / height)
        )
        axes.set(xlim=(0, columns), ylim=(lines, 0))
        axes.grid(False)
        axes.tick_params(length=0, labelcolor=INK)
        axes.xaxis.tick_top()
        axes.set_xticks([j + 0.5 for j in range(columns)], [shortened(name) for name in found.weights])
        axes.set_yticks([i + 0.5 for i in range(lines)], [shortened(name) for name in found.components])
        for spine in axes.spines.values():
            spine.set_visible(False)
        for i, line in enumerate(found.rows):
            for j, row in enumerate(line):
                if row is None:
                    continue
                share = 0.04 + (DARKEST - 0.04) * found.shade(row)
                axes.fill_between([j + 0.02, j + 0.98], i + 0.03, i + 0.97, color=PALETTE[0], alpha=share, linewidth=0)
                weight = "bold" if found.shade(row) == 1 else "normal"
                axes.text(j + 0.5, i + 0.5, f"{100 * row.test.mean:.1f}", ha="center", va="center", weight=weight)
        figure.text(
            0.1 / max(width, 5.0),
            1 - 0.22 / height,
            f"{found.section.title}: test accuracy, %",
            size=13,
            weight="bold",
            va="center",
        )
        return saved_svg(figure), saved_png(figure)
