r"""Leaderboards as LaTeX, for a paper that uses the booktabs package."""

from __future__ import annotations

import re
from collections.abc import Sequence

from spectraformer.report.leaderboard import Leaderboard, Table, tables

ESCAPES = {
    "\\": r"\textbackslash{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{letter: f"{{{letter}}}" for letter in "[]*"},  # behind a line's end they would be its arguments
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "\N{EN DASH}": "--",
    "\N{MINUS SIGN}": "$-$",
    "±": r"$\pm$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{NO-BREAK SPACE}": "~",
}
HEAD = r"""% Made by `spectraformer report`; needs \usepackage{booktabs}, and \usepackage[T1]{fontenc} with pdfLaTeX.
% Bold is the best mean of a column, whether or not it differs from the others by more than noise.
"""


def escape_latex(text: str) -> str:
    """The text as itself in LaTeX, on one line."""
    return "".join(ESCAPES.get(letter, letter) for letter in " ".join(text.split(" ")).replace("\n", " "))


def latex(boards: Sequence[Leaderboard]) -> str:
    """One table environment for each of accuracy, time and memory, of each protocol."""
    parts = [HEAD]
    for board in boards:
        for table in tables(board):
            name = table.title.lower().replace(",", "").split(" %")[0].split(" on ")[0].split()
            parts.append(_environment(board, table, "-".join(["lra", board.protocol, *name[:2]])))
    return "\n".join(parts)


def _environment(board: Leaderboard, table: Table, label: str) -> str:
    caption = f"{table.title}, {board.protocol} protocol. {' '.join(table.notes)}".strip()
    columns = list(zip(*table.lines, strict=True))
    lines = [
        r"\begin{table}",
        r"  \centering",
        r"  \small",
        r"  \setlength{\abovecaptionskip}{0pt}\setlength{\belowcaptionskip}{6pt}% a caption above its table",
        rf"  \caption{{{escape_latex(caption)}}}",
        rf"  \label{{tab:{''.join(c for c in label if c.isalnum() or c == '-')}}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"    \toprule",
        f"    {' & '.join(map(escape_latex, table.columns))} \\\\",
        r"    \midrule",
    ]
    padded = zip(*(_padding(column) if j else [""] * len(column) for j, column in enumerate(columns)), strict=True)
    for texts, best, pads in zip(table.lines, table.best, padded, strict=True):
        shown = [_bold(escape_latex(text)) if j in best else escape_latex(text) for j, text in enumerate(texts)]
        lines.append(f"    {' & '.join(map(''.join, zip(shown, pads, strict=True)))} \\\\")
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


def _padding(texts: Sequence[str]) -> list[str]:
    """What follows each text of a column, unseen, so that decimal points stand below one another."""
    tails = [found[0] if (found := re.search(r"\..*", text)) else "" for text in texts]
    longest = max(tails, key=len)
    pads = [
        escape_latex(longest[len(tail) :]) if text[:1].isdigit() else ""
        for text, tail in zip(texts, tails, strict=True)
    ]
    return [rf"\phantom{{{pad}}}" if pad else "" for pad in pads]


def _bold(text: str) -> str:
    mean, sign, deviation = text.partition(r" $\pm$")
    return rf"\textbf{{{mean}}}{sign}{deviation}"
