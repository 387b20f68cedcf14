"""A record of the attention benchmark as Markdown tables, with ratios and the length from which random features win."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spectraformer.bench.attention import FORMAT, KIND
from spectraformer.bench.competitors import EXACT, OURS
from spectraformer.files import DamagedError, read_json

Row = Mapping[str, Any]
_GROUP = ("head_dim", "num_features", "batch", "heads", "dtype", "causal", "mode")
# What every row has; those that were timed have more.
_ROW = frozenset((*_GROUP, "competitor", "reason", "status", "tokens"))
_TIMED = frozenset(
    ("device_milliseconds", "error", "host_milliseconds", "input_bytes", "memory_bytes", "milliseconds", "picoseconds")
)


class Group(NamedTuple):
    """Rows that differ in length and competitor only."""

    head_dim: int
    num_features: int
    batch: int
    heads: int
    dtype: str
    causal: bool
    mode: str

    @property
    def title(self) -> str:
        """For people."""
        kind = f"{'causal' if self.causal else 'bidirectional'} {self.mode.replace('+', ' + ')}"
        shape = f"d = {self.head_dim}, m = {self.num_features}, {self.dtype}"
        return f"{kind}, {shape}, batch {self.batch}, {self.heads} heads"


class BreakEven(NamedTuple):
    """From where on random features are faster.

    Attributes:
        ours: Which of ours.
        exact: Than which softmax attention.
        tokens: The length, interpolated between two that were measured; None if ours is slower at the longest.
        milliseconds: The time of both there, if it was met.
        met: False where ours is faster at the shortest length already, which is then ``tokens``.
    """

    ours: str
    exact: str
    tokens: float | None
    milliseconds: float
    met: bool


def read_attention_record(path: Path) -> dict[str, Any]:
    """A record that ``bench attention`` wrote.

    Raises:
        DamagedError: If it is not there, or something else.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise DamagedError(f"{path} is not the record of an {KIND}; expected what `bench attention --out` wrote")
    if content.get("format") != FORMAT:
        raise DamagedError(f"{path} has format {content.get('format')!r}; this version reads {FORMAT}")
    rows = content.get("rows")
    whole = isinstance(rows, list) and all(
        isinstance(row, dict) and row.keys() >= (_ROW | _TIMED if row.get("status") == "timed" else _ROW)
        for row in rows
    )
    if not whole:
        raise DamagedError(
            f"{path} has rows without {', '.join(sorted(_ROW))}, or without figures; it was changed or cut"
        )
    return content


def groups(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    """Rows by what they have in common, in the order they were measured."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        found.setdefault(Group(*(row[name] for name in _GROUP)), []).append(row)
    return found


def milliseconds(rows: Iterable[Row], competitor: str) -> dict[int, float]:
    """Median time by length, shortest first; what was measured twice counts once, the last time."""
    found = {r["tokens"]: r["milliseconds"]["median"] for r in rows if r["competitor"] == competitor and is_timed(r)}
    return dict(sorted(found.items()))


def is_timed(row: Row) -> bool:
    """Whether a row has figures."""
    return bool(row["status"] == "timed")


def break_evens(rows: Sequence[Row]) -> list[BreakEven]:
    """For each of ours and each softmax attention of a group that have two lengths or more in common."""
    found = []
    for ours in OURS:
        for exact in EXACT:
            mine, theirs = milliseconds(rows, ours), milliseconds(rows, exact)
            shared = [n for n in mine if n in theirs]
            if len(shared) < 2:
                continue
            slower = [n for n in shared if mine[n] >= theirs[n]]
            if not slower:
                found.append(BreakEven(ours, exact, shared[0], mine[shared[0]], False))
            elif slower[-1] == shared[-1]:
                found.append(BreakEven(ours, exact, None, mine[shared[-1]], False))
            else:
                low = slower[-1]
                high = shared[shared.index(low) + 1]
                found.append(BreakEven(ours, exact, *_crossing(low, high, mine, theirs), True))
    return found


def _crossing(low: int, high: int, mine: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float]:
    """Where two power laws through two lengths meet: tokens and milliseconds."""
    before, after = (math.log(theirs[n] / mine[n]) for n in (low, high))
    share = -before / (after - before)
    return low * (high / low) ** share, mine[low] * (mine[high] / mine[low]) ** share


def markdown(record: Mapping[str, Any]) -> str:
    """Tables of all groups: picoseconds per token and head, milliseconds, and how many times ours each takes."""
    lines = [f"{record['device']}; " + ", ".join(f"{name} {x}" for name, x in sorted(record["versions"].items()))]
    for group, rows in groups(record["rows"]).items():
        lines += ["", f"### {group.title}", "", *_table(rows), "", *_notes(rows)]
    return "\n".join(lines).rstrip() + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    lengths = sorted({row["tokens"] for row in rows})
    names = list(dict.fromkeys(row["competitor"] for row in rows if is_timed(row)))
    found = {(row["competitor"], row["tokens"]): row for row in rows if is_timed(row)}
    base = next((name for name in OURS if name in names), None)
    head = ["", *[f"{n:,}" for n in lengths], "host ms", "memory / qkvo", "error"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        cells = [_cell(found.get((name, n)), found.get((base, n)) if base != name else None) for n in lengths]
        own = [found[name, n] for n in lengths if (name, n) in found]
        lines.append("| " + " | ".join((name, *cells, _host(own), _memory(own), _error(own))) + " |")
    return lines


def _cell(row: Row | None, base: Row | None) -> str:
    if row is None:
        return ""
    median, device = row["milliseconds"]["median"], row["device_milliseconds"]
    each = row["picoseconds"]
    said = (f"{each:,.0f} ps" if each < 1e5 else f"{each / 1e3:,.0f} ns") + f", {median:.3g} ms"
    if device is not None and device < 0.9 * median:
        said += f" (GPU {device:.3g})"
    return said + (f", {_three(median / base['milliseconds']['median'])}x" if base else "")


def _three(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


def _host(rows: Sequence[Row]) -> str:
    found = [row["host_milliseconds"] for row in rows if row["host_milliseconds"] is not None]
    return f"{min(found):.3f}" if found else ""


def _memory(rows: Sequence[Row]) -> str:
    """Of the longest, over that of queries, keys, values and output."""
    found = rows[-1]["memory_bytes"]
    return "" if found is None else f"{found / (4 / 3 * rows[-1]['input_bytes']):.2f}"


def _error(rows: Sequence[Row]) -> str:
    return f"{max(rows[-1]['error'].values()):.1e}"


def _notes(rows: Sequence[Row]) -> list[str]:
    lines = []
    for found in break_evens(rows):
        if found.tokens is None:
            said = "not faster at any length measured in common"
        else:
            said = f"faster from {found.tokens:,.0f} tokens on" + ("" if found.met else " or fewer")
        lines.append(f"- {found.ours} against {found.exact}: {said}")
    out: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if not is_timed(row):
            out.setdefault((row["competitor"], row["status"], row["reason"]), []).append(f"{row['tokens']:,}")
    lines += [f"- {name} {status} at {', '.join(at)}: {reason}" for (name, status, reason), at in out.items()]
    return lines
