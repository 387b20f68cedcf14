"""The command line as a newcomer uses it: help that fits a screen, one command to a result, the same command again."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from faults import TRAIN, counting_task, status_of
from spectraformer import records, registry
from spectraformer.baselines import ATTENTIONS
from spectraformer.cli import COMMANDS
from spectraformer.tasks import TASKS


@pytest.fixture(autouse=True)
def _a_small_task(monkeypatch, tmp_path):
    monkeypatch.setitem(TASKS.own, "counting", counting_task())
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_a_screen(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    assert status_of([*filter(None, [command]), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 112
    assert not any("{None}" in line or "default: None" in line for line in lines)
    text = " ".join(lines)
    expected = list(COMMANDS) if command is None else ["--help"]
    assert all(word in text for word in expected)


def test_one_command_from_nothing_to_a_result_and_a_page(capsys, tmp_path):
    assert status_of([*TRAIN, "--attention", "softmax", "oprf-orf"]) == 0
    shown = capsys.readouterr().out
    assert "preparing counting (tiny): 5 of 5 blocks" in shown
    assert "oprf-orf: step 24/24" in shown and "majority %" in shown
    results = sorted(Path("runs").glob(f"*/{records.RESULT}"))
    assert [path.parent.name.split(".")[1] for path in results] == ["oprf-orf", "softmax"]
    assert all(list(path.parent.glob("tensorboard/events.*")) for path in results)
    before = [path.stat().st_mtime_ns for path in results]

    assert status_of([*TRAIN, "--attention", "softmax", "oprf-orf"]) == 0
    assert [path.stat().st_mtime_ns for path in results] == before
    assert "step 24/24" not in capsys.readouterr().out

    assert status_of(["eval", "runs"]) == 0
    evaluated = capsys.readouterr().out
    for path in results:
        accuracy = f"{100 * json.loads(path.read_text())['accuracy']['test']:.2f}"
        assert evaluated.count(f" {accuracy} ") >= 2, "evaluated again, the accuracy is the recorded one"

    assert status_of(["report", "runs", "--least-margin", "-100"]) == 0
    assert Path("report/index.html").exists() and "every run beats the majority" in capsys.readouterr().out
    assert status_of(["report", "runs", "--least-margin", "99"]) == 2
    assert "beats the majority class by" in capsys.readouterr().err

    assert status_of(["list", "runs"]) == 0
    assert "oprf-orf" in capsys.readouterr().out
    assert status_of(["check", "runs", "data"]) == 0
    assert capsys.readouterr().out.count("ok  ") == 5
    assert status_of(["data", "show", "counting", "--size", "tiny"]) == 0
    assert "counting" in capsys.readouterr().out


def test_a_run_json_repeats_the_run(capsys):
    assert (
        status_of([*TRAIN, "--attention", "gerf-mc", "--set", "attention.options.redraw_every=5", "--seed", "3"]) == 0
    )
    (first,) = Path("runs").iterdir()
    assert status_of(["train", "--config", str(first / "run.json"), "--device", "cpu", "--runs", "again"]) == 0
    (second,) = Path("again").iterdir()
    assert first.name == second.name
    accuracies = [json.loads((path / records.RESULT).read_text())["loss"] for path in (first, second)]
    assert accuracies[0] == accuracies[1]


def test_settings_reach_the_run(capsys):
    more = ["--steps", "6", "--batch-size", "8", "--num-features", "24", "--set", "model.depth=1", "train.clip=0.5"]
    assert status_of([*TRAIN, "--protocol", "published", *more]) == 0
    (path,) = Path("runs").iterdir()
    run = records.read_record(path).run
    assert (run.protocol, run.train.steps, run.train.batch_size, run.train.warmup) == ("published", 6, 8, 1)
    assert (run.attention.num_features, run.model.depth, run.train.clip) == (24, 1, 0.5)


@pytest.mark.parametrize("what", ["attentions", "tasks"])
def test_lists(what, capsys):
    assert status_of(["list", what]) == 0
    shown = capsys.readouterr().out
    names = {"attentions": ["softmax", "oprf", "fastfoodl", "230 pairs"], "tasks": [*TASKS]}[what]
    assert all(name in shown for name in names)


def test_checks_of_the_installation_and_of_a_variant(capsys):
    assert status_of(["check"]) == 0
    shown = capsys.readouterr().out
    assert f"torch {torch.__version__}" in shown and "ok      installation" in shown
    assert status_of(["check", "posrf-orf", "softmax"]) == 0
    assert capsys.readouterr().out.count("ok  ") == 2


PLUGIN = """
import torch
class Mean(torch.nn.Module):
    "The mean of all values, whatever the query."
    def __init__(self, head_dim, num_heads, max_length, seed, *, gain=1.0):
        super().__init__()
        self.gain = gain
    def forward(self, query, key, value, key_padding_mask=None):
        mask = key_padding_mask[:, None, :, None]
        return self.gain * (value * mask).sum(2, keepdim=True).div(mask.sum(2, keepdim=True)).expand_as(query)
"""


def test_another_package_adds_an_attention(monkeypatch, tmp_path, capsys):
    (tmp_path / "plugged_attention.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = EntryPoint("mean", "plugged_attention:Mean", ATTENTIONS.group)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == ATTENTIONS.group else [])
    assert status_of([*TRAIN, "--attention", "mean", "--set", "attention.options.gain=2"]) == 0
    assert "mean: test accuracy" in capsys.readouterr().out
    assert status_of([*TRAIN, "--attention", "mean", "--set", "attention.options.grain=2"]) == 2
    assert "has no option 'grain'; its options: gain" in capsys.readouterr().err


def test_ctrl_c_saves_says_how_to_go_on_and_goes_on(tmp_path):
    """The installed program in a process of its own, on a real task."""
    command = [sys.executable, "-m", "spectraformer.cli", "train", "--task", "listops", "--size", "tiny"]
    command += ["--attention", "posrf-orf", "--steps", "60", "--batch-size", "4", "--threads", "1", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    for line in process.stdout:
        if "step 12/60" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, err
    assert "interrupted; the same command goes on where it was" in err and "Traceback" not in err
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "posrf-orf: going on from step" in again.stdout and "step 12/60" not in again.stdout


def test_progress_on_a_terminal_is_a_bar(tmp_path):
    """Through a pseudo-terminal: the bar moves, and shows loss and accuracy."""
    import pty

    command = [
        sys.executable,
        "-m",
        "spectraformer.cli",
        "train",
        "--task",
        "listops",
        "--size",
        "tiny",
        "--steps",
        "20",
    ]
    command += ["--batch-size", "4", "--threads", "1", "--device", "cpu"]
    main, side = pty.openpty()
    environment = os.environ | {"COLUMNS": "140", "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdout=side, stderr=side, cwd=tmp_path, env=environment)
    os.close(side)
    shown = b""
    started = time.monotonic()
    while time.monotonic() - started < 200:
        try:
            shown += os.read(main, 1 << 16)
        except OSError:
            break
    assert process.wait(timeout=10) == 0
    text = shown.decode(errors="replace")
    assert "20/20" in text and "loss" in text and "dev" in text and "preparing listops (tiny)" in text
