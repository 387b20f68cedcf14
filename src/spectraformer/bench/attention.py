"""Attention against what else there is: checked, then timed, in one process; a record of it all.

Legend: b batch, h heads, n tokens, d head dim, m features.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from spectraformer import records
from spectraformer.bench.competitors import COMPETITORS, OURS, Built
from spectraformer.bench.references import largest_error
from spectraformer.bench.timing import OUT_OF_MEMORY, FailedError, Timed, falling_out, free, measure, quartiles
from spectraformer.bench.workload import DTYPES, MODES, Inputs, Workload
from spectraformer.checks import require_choice, require_integer, require_number
from spectraformer.files import write_json

FORMAT = 1
KIND = "attention benchmark"
# Above it a competitor computes something else: the bound tells wrong from rounded, not good from better.
BOUNDS = {"float32": 5e-3, "bfloat16": 0.1, "float16": 0.1}
# Up to so many tokens all outputs and gradients of a head are compared: the reference holds n x n weights of it.
MOST_ROWS = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What to measure: every combination.

    Attributes:
        shapes: Pairs of head dim d and features m.
        lengths: Tokens n.
        modes: Of MODES.
        causal: Bidirectional (False), causal (True) or both.
        competitors: Of COMPETITORS.
        batch: b.
        heads: h.
        dtype: Of DTYPES.

    Raises:
        ValueError: For anything else.
    """

    shapes: tuple[tuple[int, int], ...] = ((64, 128),)
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    modes: tuple[str, ...] = MODES
    causal: tuple[bool, ...] = (False,)
    competitors: tuple[str, ...] = tuple(COMPETITORS)
    batch: int = 8
    heads: int = 8
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("shapes", "lengths", "modes", "causal", "competitors"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; expected at least one")
        for d, m in self.shapes:
            require_integer("head dim", d)
            require_integer("num_features", m)
        for n in self.lengths:
            require_integer("length", n)
        for mode in self.modes:
            require_choice("mode", mode, MODES)
        for name in self.competitors:
            require_choice("competitor", name, tuple(COMPETITORS))
        require_integer("batch", self.batch)
        require_integer("heads", self.heads)
        require_choice("dtype", self.dtype, tuple(DTYPES))

    def workloads(self, device: torch.device) -> Iterator[Workload]:
        """One for each shape, kind and mode."""
        for (d, m), is_causal, mode in product(self.shapes, self.causal, self.modes):
            yield Workload(
                d, m, self.batch, self.heads, DTYPES[self.dtype], device, is_causal, backward=mode == MODES[1]
            )


def run_attention_bench(
    suites: Sequence[Suite],
    device: torch.device,
    *,
    rounds: int = 10,
    seconds: float = 2.0,
    longest: float = 2.0,
    budget: float | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    command: str = "",
    commit: str | None = None,
) -> dict[str, Any]:
    """Checks and times every competitor of every suite.

    Args:
        suites: What to measure.
        device: Where.
        rounds: Bursts of each competitor at each length.
        seconds: After so many at one length no further round begins.
        longest: Seconds a call may take; a competitor that is expected to take longer is left out, with the reason.
        budget: After so many seconds no further shape, kind or mode begins; None sets no limit.
        out: JSON file to write, anew after each length; None writes none.
        say: Told a line for each length.
        command: How to repeat it, for the record.
        commit: Of the sources; None asks git.

    Returns:
        The record, as docs/speed.md describes it.

    Raises:
        ValueError: For rounds or times that are not positive.
    """
    require_integer("rounds", rounds)
    for name, limit in (("seconds", seconds), ("longest", longest), ("budget", 1.0 if budget is None else budget)):
        require_number(name, limit, 0.0, float("inf"), "a positive finite number of seconds")
    rows: list[dict[str, Any]] = []
    record: dict[str, Any] = {
        "kind": KIND,
        "format": FORMAT,
        "command": command,
        "git_commit": commit or records.git_commit(),
        "device": records.device_name(device),
        "versions": _versions(device),
        "started": _now(),
        "finished": None,
        "rounds": rounds,
        "competitors": {
            name: COMPETITORS[name].claim for name in COMPETITORS if any(name in suite.competitors for suite in suites)
        },
        "rows": rows,
    }
    begin = time.perf_counter()
    for suite in suites:
        for workload in suite.workloads(device):
            if budget is not None and time.perf_counter() - begin > budget:
                rows.extend(_left_out(suite, workload, f"the {budget:g} s for all were over"))
                continue
            for found in _measured(suite, workload, rounds, seconds, longest):
                rows.extend(found)
                if out is not None:
                    write_json(out, record)
                say(_line(found))
    record["finished"] = _now()
    if out is not None:
        write_json(out, record)
    return record


@dataclass
class _Entry:
    """A competitor at one length: what is timed, which of our backends runs, errors of output and gradients."""

    timed: Timed
    backend: str | None = None
    error: dict[str, float] | None = None


def _measured(
    suite: Suite, workload: Workload, rounds: int, seconds: float, longest: float
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each length, shortest first."""
    out: dict[str, tuple[str, str]] = {}  # status and reason of those that are not timed any more
    last: dict[str, tuple[int, float]] = {}  # tokens, and seconds of a call
    for name in suite.competitors:
        if (reason := COMPETITORS[name].refusal(workload)) is not None:
            out[name] = ("skipped", reason)
    for tokens in sorted(set(suite.lengths)):
        for name in last.keys() - out.keys():
            before, took = last[name]
            expected = took * (tokens / before) ** COMPETITORS[name].order
            if expected > longest:
                out[name] = ("skipped", f"a call would take about {expected:.2g} s; the limit is {longest:g} s")
        racing = [name for name in suite.competitors if name not in out]
        entries = _entries(workload, tokens, racing)
        sound = {name: entry.timed for name, entry in entries.items() if entry.timed.failure is None}
        measure(sound, workload.device, rounds, seconds, longest)
        rows = []
        for name in suite.competitors:
            row = _row(suite, workload, tokens, name)
            if name in out:
                row["status"], row["reason"] = out[name]
            elif (failure := entries[name].timed.failure) is not None:
                row |= {"status": "failed", "reason": failure, "error": _rounded(entries[name].error)}
                out[name] = ("skipped", f"at {tokens:,} tokens: {failure}")
            else:
                row |= _figures(entries[name], workload, tokens)
                last[name] = (tokens, 1e-3 * row["milliseconds"]["median"])
            rows.append(row)
        del entries, sound
        free(workload.device.type == "cuda")
        yield rows


def _entries(workload: Workload, tokens: int, names: Sequence[str]) -> dict[str, _Entry]:
    """Competitors that compute what they say at one length; what does not has its reason in ``timed.failure``."""
    if "torch._dynamo" in sys.modules:  # its graphs of other lengths count against a limit
        torch.compiler.reset()
    entries = {name: _Entry(Timed(lambda i: None)) for name in names}
    sets: dict[bool, list[Inputs]] = {}
    for name, entry in entries.items():
        competitor = COMPETITORS[name]
        layout = competitor.tokens_first
        with falling_out(entry.timed):
            if layout not in sets:
                count = workload.sets(tokens)
                sets[layout] = [workload.inputs(tokens, i, tokens_first=layout) for i in range(count)]
            built = competitor.build(workload, sets[layout][0])
            entry.backend = built.backend
            entry.timed.call = _call(built, sets[layout], backward=workload.backward)
            entry.timed.setting = partial(_setting, built, backward=workload.backward)
            with built.setting():
                most = MOST_ROWS[workload.device.type]
                entry.error = largest_error(built.run, built.reference, sets[layout][0], most_rows=most)
            _require_right(entry.error, workload)
    return entries


def _require_right(errors: Mapping[str, float], workload: Workload) -> None:
    bound = BOUNDS[str(workload.dtype).removeprefix("torch.")]
    wrong = {name: error for name, error in errors.items() if not error <= bound}
    if wrong:
        said = ", ".join(f"{name} {error:.2g}" for name, error in wrong.items())
        raise FailedError(f"wrong: relative error against float64 of {said}; the bound is {bound:g}")


def _call(built: Built, sets: Sequence[Inputs], *, backward: bool) -> Callable[[int], object]:
    run = built.run

    def forward(i: int) -> object:
        x = sets[i % len(sets)]
        return run(x.query, x.key, x.value)

    def both(i: int) -> object:
        x = sets[i % len(sets)]
        return torch.autograd.grad(run(x.query, x.key, x.value), (x.query, x.key, x.value), x.grad)

    return both if backward else forward


@contextmanager
def _setting(built: Built, *, backward: bool) -> Iterator[None]:
    with torch.set_grad_enabled(backward), built.setting():
        yield


def _row(suite: Suite, workload: Workload, tokens: int, name: str) -> dict[str, Any]:
    return {
        "head_dim": workload.head_dim,
        "num_features": workload.num_features,
        "batch": workload.batch,
        "heads": workload.heads,
        "dtype": suite.dtype,
        "causal": workload.is_causal,
        "mode": workload.mode,
        "tokens": tokens,
        "competitor": name,
        "reason": None,
    }


def _left_out(suite: Suite, workload: Workload, reason: str) -> list[dict[str, Any]]:
    """Rows of a workload that is not measured."""
    return [
        {**_row(suite, workload, tokens, name), "status": "skipped", "reason": reason}
        for tokens in sorted(set(suite.lengths))
        for name in suite.competitors
    ]


def failures_of_ours(record: Mapping[str, Any]) -> list[str]:
    """What this library could not compute, or computed wrongly; to run out of memory is no mistake."""
    return [
        f"{row['competitor']}, {row['mode']}, d {row['head_dim']}, m {row['num_features']}, {row['tokens']:,} tokens: "
        f"{row['reason']}"
        for row in record["rows"]
        if row["status"] == "failed" and row["competitor"] in OURS and not row["reason"].startswith(OUT_OF_MEMORY)
    ]


def _figures(entry: _Entry, workload: Workload, tokens: int) -> dict[str, Any]:
    timed = entry.timed
    lower, median, upper = quartiles(timed.milliseconds)
    extra = timed.memory_bytes
    return {
        "status": "timed",
        "milliseconds": {
            "median": _digits(median),
            "lower_quartile": _digits(lower),
            "upper_quartile": _digits(upper),
            "least": _digits(min(timed.milliseconds)),
            "most": _digits(max(timed.milliseconds)),
        },
        "host_milliseconds": _digits(quartiles(timed.host_milliseconds)[1]) if timed.host_milliseconds else None,
        "device_milliseconds": _digits(quartiles(timed.device_milliseconds)[1]) if timed.device_milliseconds else None,
        "picoseconds": _digits(1e9 * median / (workload.batch * workload.heads * tokens)),
        "bursts": len(timed.milliseconds),
        "calls": timed.calls,
        "memory_bytes": None if extra is None else extra + workload.input_bytes(tokens),
        "input_bytes": workload.input_bytes(tokens),
        "error": _rounded(entry.error),
        "backend": entry.backend,
    }


def _rounded(error: Mapping[str, float] | None) -> dict[str, float | str] | None:
    """For JSON, which has no infinity."""
    if error is None:
        return None
    return {name: _digits(value) if value < float("inf") else "not finite" for name, value in error.items()}


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def _line(rows: Sequence[Mapping[str, Any]]) -> str:
    first = rows[0]
    kind = f"{first['mode']}{', causal' if first['causal'] else ''}"
    said = [
        f"{row['competitor']} {row['milliseconds']['median']:.4g} ms"
        if row["status"] == "timed"
        else f"{row['competitor']} {row['status']}"
        for row in rows
    ]
    return f"{kind}, d {first['head_dim']}, m {first['num_features']}, {first['tokens']:,} tokens: {'; '.join(said)}"


def _versions(device: torch.device) -> dict[str, str]:
    found = records.versions()
    for package in ("performer-pytorch", "flash-linear-attention", "fla-core"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return found


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
