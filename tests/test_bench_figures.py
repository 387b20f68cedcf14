"""Times, break-even, tables and drawings: figures mean what they say."""

import time
from itertools import pairwise

import pytest
import torch

from spectraformer.bench import timing
from spectraformer.bench.plots import drawings
from spectraformer.bench.table import BreakEven, break_evens, markdown

CPU = torch.device("cpu")


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]])
def test_everyone_is_first_and_last_and_after_others(names):
    turns = [timing.turn_order(names, turn) for turn in range(2 * len(names))]
    assert all(sorted(order) == names for order in turns)
    assert sorted(order[0] for order in turns) == sorted(order[-1] for order in turns) == sorted(2 * names)
    before = {(x, y) for order in turns for x, y in pairwise(order)}
    assert {(y, x) for x, y in before} == before


def test_rounds_take_one_burst_of_each_and_inputs_rotate():
    order, sets = [], {"a": [], "b": []}

    def call(name):
        def run(i):
            order.append(name)
            sets[name].append(i)
            time.sleep(0.002)  # a burst is one call

        return run

    timeds = {name: timing.Timed(call(name)) for name in sets}
    timing.measure(timeds, CPU, 4, 10.0)
    assert all(len(timed.milliseconds) == 4 for timed in timeds.values())
    assert all(indices == list(range(len(indices))) for indices in sets.values())
    assert order[-8:] == ["a", "b", "b", "a", "b", "a", "a", "b"]


class _Gpu:
    """Stands for torch.cuda: a stream whose work takes 1 ms a call, queued by a host that needs ``host`` seconds."""

    def __init__(self, host):
        self.host, self.now, self.done, self.slept = host, 0.0, 0.0, 0

    def call(self, _):
        self.now += self.host
        self.done = max(self.done, self.now) + 1e-3

    def event(self):
        gpu = self

        class Event:
            def record(self):
                self.at = max(gpu.done, gpu.now)

            def synchronize(self):
                gpu.now = max(gpu.now, gpu.done)

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        return Event()

    def sleep(self, spins):
        self.slept += 1
        self.done = max(self.done, self.now) + spins / timing.SPINS_PER_SECOND


@pytest.mark.parametrize(("host", "elapsed"), [(0.1e-3, 1.0), (3e-3, 4.0)])
def test_device_time_is_told_from_host_time(monkeypatch, host, elapsed):
    gpu = _Gpu(host)
    monkeypatch.setattr(timing, "_event", gpu.event)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: gpu.now)
    for name, found in (
        ("synchronize", lambda device: None),
        ("_sleep", gpu.sleep),
        ("memory_allocated", lambda device: 100),
        ("reset_peak_memory_stats", lambda device: None),
        ("max_memory_allocated", lambda device: 164),
    ):
        monkeypatch.setattr(torch.cuda, name, found)
    timed = timing.Timed(gpu.call)
    timing.measure({"x": timed}, torch.device("cuda"), 3, 100.0)
    assert timed.failure is None and timed.memory_bytes == 64
    low, median, high = timing.quartiles(timed.milliseconds)
    # the host leads by one call of a burst, or is waited for in all
    assert low <= median <= high and median == pytest.approx(max(1.0, 1e3 * host), rel=0.6)
    assert timed.host_milliseconds[0] == pytest.approx(1e3 * host)
    assert timed.device_milliseconds[0] == pytest.approx(1.0, rel=0.15)
    assert (gpu.slept > 0) == (host > 1e-3)


def made_up(exponents, lengths=(256, 512, 1024, 2048)):
    """Rows of one group: milliseconds are factor * tokens ** power."""
    group = {"head_dim": 64, "num_features": 128, "batch": 1, "heads": 2, "dtype": "bfloat16"}
    group |= {"causal": False, "mode": "forward"}
    rows = []
    for name, (factor, power) in exponents.items():
        for n in lengths:
            ms = factor * n**power
            figures = {"milliseconds": {"median": ms}, "picoseconds": ms, "host_milliseconds": 0.04}
            figures |= {"device_milliseconds": ms / 2, "input_bytes": 768 * n, "memory_bytes": 1024 * n}
            row = {**group, "tokens": n, "competitor": name, "status": "timed", "reason": None}
            rows.append(row | figures | {"error": {"output": 0.002}})
    return rows


@pytest.mark.parametrize(
    ("factor", "tokens", "met"), [(2.0**-9.5, 724.077, True), (1.0, 256, False), (2.0**-20, None, False)]
)
def test_break_even_is_where_the_curves_cross(factor, tokens, met):
    (found,) = break_evens(made_up({"posrf-orf": (1.0, 1), "sdpa-cudnn": (factor, 2)}))
    assert (found.ours, found.exact, found.met) == ("posrf-orf", "sdpa-cudnn", met)
    assert found.tokens == (None if tokens is None else pytest.approx(tokens))
    if met:
        assert found.milliseconds == pytest.approx(tokens)


def test_break_even_is_after_the_last_length_where_softmax_wins():
    rows = made_up({"posrf-orf": (1.0, 1), "sdpa-cudnn": (1.0, 1)})
    for row, times in zip(rows[4:], (2.0, 0.5, 0.5, 2.0), strict=True):
        row["milliseconds"]["median"] *= times
    (found,) = break_evens(rows)
    assert found.tokens == pytest.approx(1024 * 2**0.5)
    assert isinstance(found, BreakEven)


def test_tables_have_ratios_and_reasons():
    rows = made_up({"posrf-orf": (1.0, 1), "sdpa-cudnn": (2.0**-9.5, 2)})
    rows[-1] |= {"status": "skipped", "reason": "too slow"}
    said = markdown({"device": "a GPU", "versions": {"torch": "2"}, "rows": rows})
    assert "| sdpa-cudnn | 91 ps, 90.5 ms (GPU 45.3), 0.354x |" in said
    assert "faster from 724 tokens on" in said and "- sdpa-cudnn skipped at 2,048: too slow" in said
    assert "| 0.040 | 1.00 | 2.0e-03 |" in said


def test_drawings_show_break_even():
    rows = made_up({"posrf-orf": (1.0, 1), "oprf-orf": (1.2, 1), "sdpa-cudnn": (2.0**-9.5, 2)})
    (drawing,) = drawings({"device": "a GPU", "rows": rows})
    assert drawing.name == "d64-m128" and drawing.png.startswith(b"\x89PNG") and len(drawing.png) > 20_000
    text = drawing.svg.decode()
    for said in ("sdpa-cudnn: 724", "Time, forward", "Peak memory, forward", "posrf-orf", "tokens", "GiB", "on a GPU"):
        assert said in text, said
    one_length = made_up({"posrf-orf": (1.0, 1)}, lengths=(64,))
    long = [row | {"batch": 7} for row in one_length]
    assert [drawing.name for drawing in drawings({"device": "a GPU", "rows": rows + long})] == ["d64-m128"]
    assert drawings({"device": "a GPU", "rows": one_length}) == []
