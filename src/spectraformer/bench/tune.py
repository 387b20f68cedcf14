"""Explicit search for faster tile shapes on the GPU at hand; nothing here ever runs by itself.

From the shipped configuration of a pass one number is changed at a time, and the best is kept, until none is faster.
What a configuration is timed by is the whole forward or backward that it is part of, since it decides too how a
sequence is cut and how much is merged after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectraformer import records
from spectraformer.attention import random_feature_attention
from spectraformer.bench.competitors import feature_map, omega_of
from spectraformer.bench.timing import FailedError, Timed, falling_out, measure, quartiles
from spectraformer.bench.workload import DTYPES, Inputs, Workload
from spectraformer.checks import require_choice, require_integer, require_number
from spectraformer.files import write_json
from spectraformer.ops import triton as kernels
from spectraformer.ops.triton.configuration_file import (
    FORMAT,
    KIND,
    PASSES,
    TABLES,
    Place,
    Row,
    as_entry,
    configured,
    table_row,
)
from spectraformer.ops.triton.configurations import HEAD_DIMS, LANDMARKS, Configuration, bucket

# Less is noise.
LEAST_GAIN = 0.02
# Relative difference from the shipped configuration: only the order of sums may differ.
BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}
PROGRAMS = (132, 264, 396, 528, 792)
REGISTERS = (None, 128, 168)  # 4 or 3 programs of four warps share a multiprocessor
TILE_PER_WARP = (128, 2048)  # elements: less leaves threads idle, more does not fit into registers


@dataclass(frozen=True)
class _Work:
    """What a pass is timed by: runs once and returns what it computed."""

    name: str
    run: Callable[[int], Sequence[Tensor]]


def run_tune(
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
    *,
    passes: Sequence[str] = (),
    dtype: str = "bfloat16",
    tokens: int = 8192,
    batch: int = 8,
    heads: int = 8,
    seconds: float = 600.0,
    rounds: int = 5,
    out: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    command: str = "",
) -> dict[str, Any]:
    """Searches for each pass of each shape, and writes what is faster than the table.

    Args:
        shapes: Pairs of head dim and features; each tunes the bucket of the table that holds it.
        device: Where; the kernels must run there.
        passes: Names of passes to tune; none is all.
        dtype: Of DTYPES; float32 has a table of its own.
        tokens: Length to tune for.
        batch: Batch size.
        heads: Heads.
        seconds: After so many no further configuration is tried.
        rounds: Bursts of each configuration.
        out: JSON file to write, anew after each pass; None writes none.
        say: Told a line for each pass.
        command: How to repeat it, for the record.

    Returns:
        The content of the file: ``configurations`` that are faster, and all that was ``measured``.

    Raises:
        ValueError: If the kernels refuse the device or dtype, or fail as shipped, with the reasons; for sizes that are
            not positive.
    """
    require_choice("dtype", dtype, tuple(DTYPES))
    for name, size in (("tokens", tokens), ("batch", batch), ("heads", heads), ("rounds", rounds)):
        require_integer(name, size)
    require_number("seconds", seconds, 0.0, float("inf"), "a positive finite number of seconds")
    if not shapes:
        raise ValueError("shapes is empty; expected at least one pair of head dim and features")
    for d, m in shapes:
        require_integer("head dim", d)
        require_integer("num_features", m)
    for name in passes:
        require_choice("pass", name, PASSES)
    record: dict[str, Any] = {
        "kind": KIND,
        "format": FORMAT,
        "command": command,
        "device": records.device_name(device),
        "versions": records.versions(),
        "configurations": [],
        "measured": [],
    }
    deadline = time.perf_counter() + seconds
    for d, m in shapes:
        workload = Workload(d, m, batch, heads, DTYPES[dtype], device, is_causal=False, backward=True)
        tuned = set(PASSES).difference(passes or PASSES)
        for work, used in _works(workload, tokens, say):
            for name in used:
                if name in tuned:
                    continue
                tuned.add(name)
                bits = 32 if dtype == "float32" else 16
                place = Place(bits, bucket(d, HEAD_DIMS), bucket(m, LANDMARKS), name)
                found = _search(place, work, workload, rounds, deadline)
                record["measured"].append(
                    found | {"shape": [d, m], "work": work.name, "tokens": tokens, "dtype": dtype}
                )
                if found["best"] != found["shipped"]:
                    record["configurations"].append(as_entry(place, Configuration(**found["best"])))
                if out is not None:
                    write_json(out, record)
                say(_line(place, work, found))
            if tuned.issuperset(PASSES):
                break
    if out is not None:
        write_json(out, record)
    return record


def _works(workload: Workload, tokens: int, say: Callable[[str], None]) -> Iterator[tuple[_Work, list[str]]]:
    """What there is to time, each with the names of the passes it runs."""
    inputs = workload.inputs(tokens, 0)
    if reasons := kernels.refusals(*inputs[:3]):
        raise ValueError("the GPU kernels cannot run here: " + "; ".join(reasons))
    for work in (*_bidirectional(workload, inputs), *_causal(workload, inputs)):
        try:
            used = _used(work, workload)
        except ValueError as error:  # a form the kernels do not have
            say(f"not tuned: {work.name}: {error}")
            continue
        yield work, used


def _bidirectional(workload: Workload, inputs: Inputs) -> Iterator[_Work]:
    d = workload.head_dim
    scale = d**-0.25
    query, key, value, grad = inputs
    omega = (scale * omega_of(workload)).expand(1, 1, -1, -1)
    frozen = [omega.clone(), omega.clone()]
    learned = [omega.clone().requires_grad_(), omega.clone().requires_grad_()]
    bias = torch.zeros(1, 1, workload.num_features, device=workload.device)
    quadratic = torch.full((1, 1, d), -0.5 * scale**2, device=workload.device)

    def attend(of_queries: Tensor, of_keys: Tensor) -> Tensor:
        return kernels.landmark_attention(query, key, value, of_queries, of_keys, bias, None, quadratic)

    def forward(_: int) -> Sequence[Tensor]:
        with torch.no_grad():
            return [attend(*frozen)]

    yield _Work("forward", forward)
    yield _Work("backward", _backward(partial(attend, *frozen), (query, key, value), grad))
    everything = (query, key, value, *learned)
    yield _Work("backward of landmarks too", _backward(partial(attend, *learned), everything, grad))


def _causal(workload: Workload, inputs: Inputs) -> Iterator[_Work]:
    query, key, value, grad = inputs
    made = feature_map(workload, "posrf-orf")

    def attend() -> Tensor:
        return random_feature_attention(query, key, value, made, is_causal=True, backend="triton")

    def forward(_: int) -> Sequence[Tensor]:
        with torch.no_grad():
            return [attend()]

    yield _Work("causal forward", forward)
    yield _Work("causal backward", _backward(attend, (query, key, value), grad))


def _backward(attend: Callable[[], Tensor], of: Sequence[Tensor], grad: Tensor) -> Callable[[int], Sequence[Tensor]]:
    kept: list[Tensor] = []

    def run(_: int) -> Sequence[Tensor]:
        if not kept:
            kept.append(attend())
        return torch.autograd.grad(kept[0], of, grad, retain_graph=True)

    return run


class _Recording(Row):
    """A row of a table that remembers what was read."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.read: list[str] = []

    def __getitem__(self, name: str) -> Configuration:
        self.read.append(name)
        return super().__getitem__(name)


def _used(work: _Work, workload: Workload) -> list[str]:
    """Names of the passes that a piece of work runs, in order."""
    work.run(0)  # a backward's forward is not asked for
    shape = bucket(workload.head_dim, HEAD_DIMS), bucket(workload.num_features, LANDMARKS)
    wide = workload.dtype == torch.float32
    tables = [table.THIRTY_TWO_BIT if wide else table.SIXTEEN_BIT for table in TABLES]
    rows = [table[shape] for table in tables]
    recording = [_Recording(row) for row in rows]
    try:
        for table, row in zip(tables, recording, strict=True):
            table[shape] = row
        with _plans({}):
            work.run(0)
    finally:
        for table, original in zip(tables, rows, strict=True):
            table[shape] = original
    return list(dict.fromkeys(name for row in recording for name in row.read))


@contextmanager
def _plans(own: dict[Any, Any]) -> Iterator[None]:
    """Kernels' plans, which keep the configuration they were made with, of one configuration alone."""
    from spectraformer.ops.triton.launch import PLANS

    before = dict(PLANS)
    PLANS.clear()
    PLANS.update(own)
    try:
        yield
    finally:
        own.clear()
        own.update(PLANS)
        PLANS.clear()
        PLANS.update(before)


@dataclass
class _Trial:
    """One configuration of one pass, with its own plans."""

    place: Place
    configuration: Configuration
    plans: dict[Any, Any] = field(default_factory=dict)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with configured(self.place, self.configuration), _plans(self.plans):
            yield


def neighbours(configuration: Configuration, num_features: int) -> list[Configuration]:
    """Configurations that differ in one number and could be faster."""
    c = configuration
    most = max(16, 1 << (num_features - 1).bit_length())
    changes: list[dict[str, Any]] = [
        {name: size}
        for name, low, high in (("landmarks", 16, min(most, 256)), ("tokens", 16, 256), ("warps", 2, 16))
        for size in (getattr(c, name) // 2, getattr(c, name) * 2)
        if low <= size <= high
    ]
    changes += [{"stages": stages} for stages in (c.stages - 1, c.stages + 1) if 1 <= stages <= 5]
    changes += [{"programs": programs} for programs in PROGRAMS if programs != c.programs]
    changes += [{"registers": registers} for registers in REGISTERS if registers != c.registers]
    changes.append({"resident": not c.resident})
    # A tile twice as long in one direction and half as long in the other is one step too.
    changes += [{"landmarks": c.landmarks * 2, "tokens": c.tokens // 2}] if c.landmarks < most and c.tokens > 16 else []
    changes += [{"landmarks": c.landmarks // 2, "tokens": c.tokens * 2}] if c.landmarks > 16 and c.tokens < 256 else []
    low, high = TILE_PER_WARP
    found = [c._replace(**change) for change in changes]
    return [x for x in found if low <= x.landmarks * x.tokens / x.warps <= high]


def _search(place: Place, work: _Work, workload: Workload, rounds: int, deadline: float) -> dict[str, Any]:
    """The best configuration of one pass, found step by step from the shipped one."""
    shipped = best = table_row(place)[place.name]
    with _Trial(place, shipped)():
        want = [x.detach().clone() for x in work.run(0)]
    seen: dict[Configuration, dict[str, Any]] = {}
    while True:
        fresh = [c for c in neighbours(best, workload.num_features) if c not in seen]
        candidates = list(dict.fromkeys((best, shipped, *fresh)))
        times = {}
        for candidate, timed in _timed(place, work, workload, want, candidates, rounds, deadline).items():
            median = quartiles(timed.device_milliseconds or timed.milliseconds)[1] if timed.failure is None else None
            seen[candidate] = {
                "configuration": candidate._asdict(),
                "milliseconds": median,
                "reason": timed.failure,
            }
            if median is not None:
                times[candidate] = median
        if shipped not in times:
            raise ValueError(f"{place.name} fails here with the shipped configuration: {seen[shipped]['reason']}")
        best = best if best in times else shipped
        winner = min(times, key=times.__getitem__)
        if times[winner] > (1 - LEAST_GAIN) * times[best]:
            return {
                "pass": place.name,
                "shipped": shipped._asdict(),
                "shipped_milliseconds": times[shipped],
                "best": best._asdict(),
                "best_milliseconds": times[best],
                "tried": list(seen.values()),
            }
        best = winner


def _timed(
    place: Place,
    work: _Work,
    workload: Workload,
    want: Sequence[Tensor],
    candidates: Sequence[Configuration],
    rounds: int,
    deadline: float,
) -> dict[Configuration, Timed]:
    """Configurations checked against what the shipped one gave, and timed in turn; after the deadline two only."""
    timeds: dict[Configuration, Timed] = {}
    for candidate in candidates:
        if len(timeds) > 1 and time.perf_counter() > deadline:
            break
        trial = _Trial(place, candidate)
        timed = timeds[candidate] = Timed(work.run, setting=trial)
        with falling_out(timed), trial():
            _require_same(work.run(0), want, workload)
    measure({str(c): timed for c, timed in timeds.items()}, workload.device, rounds, 10.0)
    return timeds


def _require_same(got: Sequence[Tensor], want: Sequence[Tensor], workload: Workload) -> None:
    bound = BOUNDS[str(workload.dtype).removeprefix("torch.")]
    errors = [((x.float() - y.float()).norm() / y.float().norm()).item() for x, y in zip(got, want, strict=True)]
    if not max(errors) <= bound:
        raise FailedError(f"differs from the shipped configuration by {max(errors):.2g}; the bound is {bound:g}")


def _line(place: Place, work: _Work, found: dict[str, Any]) -> str:
    tried = sum(row["milliseconds"] is not None for row in found["tried"])
    said = f"d {place.head_dim}, m {place.num_features}, {place.name}: {tried} configurations, {work.name} "
    if found["best"] == found["shipped"]:
        return said + f"{found['shipped_milliseconds']:.4g} ms: the shipped one is the fastest"
    changed = {name: value for name, value in found["best"].items() if value != found["shipped"][name]}
    return said + (
        f"{found['shipped_milliseconds']:.4g} -> {found['best_milliseconds']:.4g} ms with "
        + ", ".join(f"{name} {found['shipped'][name]} -> {value}" for name, value in changed.items())
    )
