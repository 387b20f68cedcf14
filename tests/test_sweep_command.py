"""The sweep command: which runs, the same table whatever works, and how it says how it goes."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import fake_gpus
from spectraformer import records
from spectraformer.config import Run
from spectraformer.records import SHARED
from spectraformer.sweep import claims as claims_module
from spectraformer.sweep import ledger, local, presets
from spectraformer.sweep import progress as progress_module
from spectraformer.sweep.claims import Claims, Vacancy
from spectraformer.sweep.command import _devices, planned_runs, sweep
from spectraformer.sweep.ledger import FAILURE, SweepError
from spectraformer.sweep.progress import Progress, clock
from spectraformer.sweep.worker import Worker
from sweep_runs import CPU, ROOT, entries_of, table, tiny, written

pytest_plugins = ["sweep_fixtures"]

# -- which runs --------------------------------------------------------------------------------------------


def test_the_paper_has_its_25_attentions_in_order_of_value():
    plan = presets.preset_runs("paper")
    assert len(plan) == len(set(plan)) == 25 * 5 * 5
    names = {run.attention.name for run in plan}
    features = {
        f"{f}-{w}" for f in ("posrf", "oprf", "saderf") for w in ("orf", "sorf", "qmc", "mm", "sgq", "fastfoodl")
    }
    assert names == features | {"softmax", "nystrom", "linformer", "informer", "reformer", "bigbird", "skyformer"}
    # Whatever interrupts leaves whole comparisons.
    assert [run.train.seed for run in plan] == sorted(run.train.seed for run in plan)
    first = [run.task for run in plan[: 25 * 5]]
    assert first == [task for task in ("listops", "text", "retrieval", "image", "pathfinder") for _ in range(25)]
    assert [run.attention.name for run in plan[:5]] == ["softmax", "posrf-orf", "oprf-orf", "oprf-fastfoodl", "nystrom"]
    assert plan[0].train.steps == 50_000 and plan[0].attention.num_features == 128


def test_presets_are_changed_by_options():
    plan = presets.preset_runs("paper", tasks=["listops", "text"], seeds=[3, 1], attentions=["softmax"], steps=5000)
    assert [(run.task, run.train.seed) for run in plan] == [("listops", 3), ("text", 3), ("listops", 1), ("text", 1)]
    assert {(run.train.steps, run.train.warmup) for run in plan} == {(5000, 100), (5000, 8)}
    assert {run.size for run in presets.preset_runs("demo")} == {"tiny"}


def test_all_is_every_pair_that_has_meaning():
    plan = planned_runs("all", {"tasks": ("listops",)}, {})
    names = [run.attention.name for run in plan]
    assert len(names) == len(set(names)) > 200 and names[0] == "softmax"
    assert "poisrf-mc" in names and "poisrf-sorf" not in names
    assert {"trigrf-ssr", "hrf-bbq", "geomrf+-orf", "kernelized"} <= set(names)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"what": "papers"}, "'papers' is neither a preset nor a Python file.*did you mean 'paper'"),
        ({"what": "paper", "given": {"tasks": ("listop",)}}, "unknown task 'listop'.*did you mean 'listops'"),
        ({"what": "paper", "given": {"attentions": ("oprf-off",)}}, "did you mean 'orf'"),
        ({"what": "paper", "given": {"seeds": (-1,)}}, "seed is -1"),
        ({"what": "demo", "changes": {"train.step": 3}}, "did you mean 'train.steps'"),
        ({"what": "missing.py"}, "'missing.py' is no file"),
        ({"what": "none.py"}, "has no function `runs`"),
        ({"what": "wrong.py"}, "returned 'listops'; expected a list"),
        ({"what": "empty.py"}, "has no runs"),
        ({"what": "broken.py"}, "broken.py, line 3: ZeroDivisionError"),
        ({"what": "syntax.py"}, "syntax.py, line 1: SyntaxError"),
        ({"what": "fine.py", "given": {"seeds": (1,)}}, "--seeds: for presets only"),
    ],
)
def test_what_cannot_be_planned_is_said(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fine = "from spectraformer.config import Run\ndef runs():\n    return [Run(task='listops')]\n"
    for name, text in {
        "none": "run = []",
        "wrong": "def runs():\n    return ['listops']",
        "empty": "def runs():\n    return []",
        "broken": "def runs():\n    seeds = 0\n    return 1 / seeds",
        "syntax": "def runs(",
        "fine": fine,
    }.items():
        Path(f"{name}.py").write_text(text)
    with pytest.raises(ValueError, match=words):
        planned_runs(**({"given": {}, "changes": {}} | given))


def test_the_example_is_a_sweep():
    plan = planned_runs(str(ROOT / "examples" / "sweep.py"), {}, {"train.batch_size": 8})
    assert len(plan) > 4 and {run.train.batch_size for run in plan} == {8} and all(isinstance(run, Run) for run in plan)


def test_the_sweep_of_the_paper_goes_on_from_the_results_there_are():
    plan = planned_runs(str(ROOT / "benchmarks" / "paper_sweep.py"), {}, {"train.precision": "bfloat16"})
    first = [run for run in plan if run.train.seed == 0]
    assert {(run.task, run.attention.name) for run in first} == {
        (t, a) for t in ("text", "listops") for a in presets.PAPER
    }
    further = {(run.task, run.attention.name, run.train.seed) for run in plan if run.train.seed}
    judged = ("softmax", "posrf-orf", "oprf-orf", "oprf-fastfoodl", "nystrom")
    assert further == {(t, a, seed) for t in ("text", "listops") for a in judged for seed in (1, 2)}
    assert len(plan) == len(first) + len(further) == 70 and {run.train.steps for run in plan} == {10_000}
    assert plan[-1].attention.name == "reformer" and {run.attention.name for run in plan[-8:-2]} == {
        f"{component}-sgq" for component in ("oprf", "posrf", "saderf")
    }
    finished, _ = records.find_records([ROOT / "results" / "runs_h200"])
    assert finished and {record.run for record in finished} <= {*plan}, "their directories have the same names"


# -- the command -------------------------------------------------------------------------------------------

FILE = """
import sys
sys.path.insert(0, {tests!r})
from small_runs import small_run

def runs():
    settings = {{"steps": 6, "warmup": 2, "eval_every": 3}}
    return [small_run(name, seed=seed, **settings) for seed in range({seeds}) for name in {names!r}]
"""


@pytest.fixture
def ask(data, tmp_path, capsys, monkeypatch):
    """Runs the command in a folder of its own; returns what it says."""
    monkeypatch.chdir(tmp_path)

    def command(seeds=2, names=("softmax", "posrf-orf"), **options):
        Path("mine.py").write_text(FILE.format(tests=str(Path(__file__).parent), seeds=seeds, names=names))
        before = torch.get_num_threads()
        try:
            sweep("mine.py", **({"device": "cpu", "threads": 1, "data": data} | options))
        finally:
            torch.set_num_threads(before)
        return capsys.readouterr().out

    return command


def test_the_same_table_by_one_process_and_by_several(ask):
    assert "4 to do" in ask(dry_run=True) and not Path("runs").exists()
    shown = ask()
    assert shown.count("done    counting-tiny.") == 4 and "4 of 4 runs done, 0 running, 0 failed, 0 to do" in shown
    before = written(Path("runs"))
    assert "done    counting" not in ask() and written(Path("runs")) == before, "nothing is repeated"
    assert "4 of 6" not in ask(seeds=3) and len(written(Path("runs"))) == 6, "runs are added"
    assert {name: written(Path("runs"))[name] for name in before} == before
    ask(seeds=3, workers=2, runs=Path("several"))
    assert table(Path("several")) == table(Path("runs"))
    assert "6 done" in ask(seeds=3, dry_run=True, runs=Path("several"))
    assert all((path.parent / SHARED).exists() for path in Path("several").glob("*/result.json"))
    assert not list(Path("runs").glob(f"*/{SHARED}"))


def test_workers_are_spread_over_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    every, second = torch.device("cuda"), torch.device("cuda:1")
    assert _devices(every, None) == ["cuda:0", "cuda:1"], "one each"
    assert _devices(every, 1) == ["cuda:0"] and _devices(every, 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert _devices(second, None) == ["cuda:1"] and _devices(second, 2) == ["cuda:1", "cuda:1"]
    assert _devices(CPU, None) == ["cpu"] and _devices(CPU, 2) == ["cpu", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "visible", "expected"),
    [
        (None, None, [("0", False), ("1", False)]),
        (3, "GPU-5, GPU-7", [("GPU-5", True), ("GPU-5", True), ("GPU-7", False)]),
    ],
)
def test_each_worker_sees_its_own_gpu_and_those_who_share_one_are_untimed(
    ask, tmp_path, monkeypatch, workers, visible, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(local, "serve", fake_gpus.serve)
    monkeypatch.delenv(fake_gpus.VISIBLE, raising=False)
    if visible is not None:
        monkeypatch.setenv(fake_gpus.VISIBLE, visible)
    ask(device="auto", workers=workers, seeds=3)
    assert os.environ.get(fake_gpus.VISIBLE) == visible, "this process sees what it saw"
    seen = [json.loads(path.read_text()) for path in tmp_path.glob("seen.*.json")]
    assert sorted((found["visible"], found["shared"]) for found in seen) == expected
    assert {found["device"] for found in seen} == {"cuda:0"}
    found, _ = records.find_records([Path("runs")])
    assert len(found) == 6
    for record in found:
        untimed = (record.path / SHARED).exists()
        assert [record.content[name] is None for name in records.MEASURED] == [untimed] * len(records.MEASURED)
    if workers is None:
        assert not list(Path("runs").glob(f"*/{SHARED}"))


@pytest.mark.slow
def test_ray_makes_the_same_table(ask, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'spectraformer[sweep]'")
    ask(names=("softmax", "posrf-orf", "nystrom"), seeds=1)
    shown = ask(names=("softmax", "posrf-orf", "nystrom"), seeds=1, engine="ray", workers=2, runs=Path("by_ray"))
    assert "3 of 3 runs done" in shown
    assert table(Path("by_ray")) == table(Path("runs"))


def test_a_failed_run_ends_the_command_with_what_to_do(ask, capsys):
    name = re.search(r"to do +(\S+)", ask(seeds=1, dry_run=True))[1]
    damaged = Path("runs") / name / records.DESCRIPTION
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{}")
    with pytest.raises(SweepError, match=r"1 of 2 runs failed; --retry tries them again\. Tracebacks: .*failure\.json"):
        ask(seeds=1)
    shown = capsys.readouterr().out
    assert re.search(f"FAILED  {name}: .* does not describe a run; remove it", shown) and "1 of 2 runs done" in shown
    damaged.unlink()
    with pytest.raises(SweepError):
        ask(seeds=1)
    assert "1 runs failed before and are left alone; --retry" in capsys.readouterr().out
    assert "2 of 2 runs done" in ask(seeds=1, retry=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "rai"}, "engine is 'rai'.*nearest: 'ray'"),
        ({"workers": 0}, "workers is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"gpus_per_run": 0.5}, "gpus-per-run is for --engine ray"),
        ({"engine": "ray", "gpus_per_run": 1.5}, "gpus-per-run is 1.5; expected 0, a fraction below 1, or 1"),
        ({"engine": "ray", "device": "cuda:1"}, "device is 'cuda:1'; expected auto with --engine ray"),
        ({"set": ("train.steps",)}, "expected NAME=VALUE"),
        ({"runs": Path("mine.py")}, "where a file is in the way"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_begins(ask, options, words):
    with pytest.raises(ValueError, match=words):
        ask(**options)
    assert not Path("runs").exists()


DRIVER = """
import sys
sys.path.insert(0, {tests!r})
import signal
from pathlib import Path
from spectraformer.interruption import Interrupted
from spectraformer.sweep.command import sweep

def stop(number, frame):
    raise Interrupted(number)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    # Tests may run in the background of a shell, which has Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sweep("mine.py", device="cpu", threads=1, workers=2, data=Path({data!r}))
"""


def eventually(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_whatever_stops_the_driver_its_workers_save_and_stop(data, tmp_path, number):
    endless = FILE.replace('"steps": 6', '"steps": 100000').replace('"eval_every": 3', '"eval_every": 50')
    tests, runs = str(Path(__file__).parent), tmp_path / "runs"
    (tmp_path / "mine.py").write_text(endless.format(tests=tests, seeds=2, names=("softmax", "posrf-orf")))
    (tmp_path / "drive.py").write_text(DRIVER.format(tests=tests, data=str(data)))
    driver = subprocess.Popen(
        [sys.executable, "drive.py"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )

    def saved():
        return {path.parents[1].name: int(path.name[5:]) for path in sorted(runs.glob("*/checkpoints/step-*"))}

    before = eventually(lambda: len(found := saved()) == 2 and found)
    workers = [int(holder.process.split()[0]) for holder in Claims(runs).living().values()]
    assert len(workers) == 2 and all(map(claims_module.process_identity, workers))
    driver.send_signal(number)
    said = driver.communicate(timeout=180)[1]
    assert driver.returncode and ("KeyboardInterrupt" in said) == (number == signal.SIGINT)
    eventually(lambda: not any(map(claims_module.process_identity, workers)))
    assert all(saved()[name] > step for name, step in before.items())
    assert any(step % 50 for step in saved().values()), "saved where it was, not at an evaluation"
    released = [json.loads(path.read_text())["released"] for path in (runs / ".claims").iterdir()]
    assert released == [True, True] and not list(runs.glob(f"*/{FAILURE}"))


# -- how it goes -------------------------------------------------------------------------------------------


def test_progress_says_what_is_done_and_when_it_will_end(data, dataset, runs, monkeypatch):
    plan = [tiny(seed=seed) for seed in range(4)]
    entries = entries_of(plan, dataset, data, runs)
    now = [0.0]
    progress = Progress(Console(file=io.StringIO(), width=200), entries, Claims(runs))
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    progress._began = 0.0
    assert progress.summary().endswith("0 of 4 runs done, 0 running, 0 failed, 4 to do; estimated end not known yet")
    Worker(Claims(runs), CPU, shared=False).work(entries[:1])
    ledger.write_failure(entries[1], "reasons", "host", "cpu")
    claims = Claims(runs)
    with claims.hold(entries[2].name, Vacancy(0, 0), 3, "") as claim:
        now[0] = 5 * 3600.0
        progress._tell()
        summary = progress.summary()
        assert "1 of 4 runs done, 1 running, 1 failed, 1 to do; estimated end" in summary
        # 2.5 of 4 in five hours: 1.5 in three.
        assert progress.seconds_left() == pytest.approx(3 * 3600) and summary.endswith("(in 3 h)")
        claim.step = 6
    said = progress.console.file.getvalue()
    assert re.search(r"done    counting-tiny\.posrf-orf\.seed0\.\w+: test accuracy \d+\.\d\d %", said)
    assert re.search(r"FAILED  counting-tiny\.posrf-orf\.seed1\.\w+: reasons", said)


def test_the_live_view_names_what_runs_and_where(data, dataset, runs):
    entries = entries_of([tiny(seed=seed) for seed in range(2)], dataset, data, runs)
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    claims = Claims(runs)
    with claims.hold(entries[0].name, Vacancy(0, 0), 3, ""), Progress(console, entries, Claims(runs)) as progress:
        console.print(progress._view())
    shown = console.file.getvalue()
    assert f"{entries[0].name}: step 3 of 6, {claims.machine.split()[0]}" in shown
    assert "0 of 2 runs done, 1 running, 0 failed, 1 to do" in shown


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (10, "in 1 min"),
        (3600, "in 1 h"),
        (11_550, "in 3 h 12 min"),
        (90_000, "in 1 d 1 h"),
        (86_400 * 3 + 60, "in 3 d 1 min"),
    ],
)
def test_a_span_is_said_in_two_units(seconds, words):
    assert re.fullmatch(r"\w{3} \d\d:\d\d \((.*)\)", clock(seconds))[1] == words
