"""kill -9 anywhere: the run that goes on ends with bitwise the weights of one that was never disturbed.

A child process is forked for each try and kills itself with SIGKILL at the n-th of the events at which something
can be half done: within a step, and before and after every call that writes, syncs, renames or removes.
"""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from small_runs import prepared, small_run
from spectraformer import checkpoint, records
from spectraformer.checkpoint import load_tensors
from spectraformer.train import Trainer, train

RUNS = {
    "posrf-orf": {},
    "oprf-fastfoodl": {},
    "gerf-mc": {"redraw_every": 5},
    "softmax": {},
}
KILLS = 20
KEPT = ("accuracy", "loss", "best_step", "parameters")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to kill a child process")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data") / "counting")


class Events:
    """Counts the moments at which a process may die, and dies at one of them."""

    def __init__(self, fatal=None):
        self.count, self.fatal = 0, fatal
        for owner, name in (
            (os, "fsync"),
            (os, "replace"),
            (os, "rename"),
            (os, "mkdir"),
            (os, "unlink"),
            (os, "rmdir"),
            (pathlib.Path, "write_bytes"),
            (pathlib.Path, "write_text"),
            (shutil, "rmtree"),
            (checkpoint, "save_tensors"),
            (Trainer, "train_step"),
            (Trainer, "_backward"),
            (torch.optim.AdamW, "step"),
            (Trainer, "evaluate"),
        ):
            self._watch(owner, name)

    def _watch(self, owner, name):
        inner = getattr(owner, name)

        def watched(*args, **kwargs):
            self.happen()
            result = inner(*args, **kwargs)
            self.happen()
            return result

        setattr(owner, name, watched)

    def happen(self):
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(work):
    """Runs work in a forked process; returns the signal that ended it (0: none) and what it returned."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            answer = work()
            os.write(writing, str(answer).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed"
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), answer


def run_child(run, dataset, path, fatal=None):
    def work():
        events = Events(fatal)
        train(run, dataset, path, device="cpu")
        return events.count

    return in_child(work)


@pytest.mark.slow
@pytest.mark.parametrize("attention", RUNS)
def test_killed_anywhere_the_result_is_bitwise_the_same(dataset, tmp_path, attention):
    run = small_run(attention, RUNS[attention])
    whole = train(run, dataset, tmp_path / "whole", device="cpu")
    expected = load_tensors(whole.path / records.MODEL)
    ended, total = run_child(run, dataset, tmp_path / "counted")
    assert ended == 0 and int(total) > 300
    chance = random.Random(attention)
    resumed = []
    for number, fatal in enumerate(sorted(chance.sample(range(1, int(total) + 1), KILLS))):
        path = tmp_path / f"{number}"
        ended, _ = run_child(run, dataset, path, fatal)
        assert ended == signal.SIGKILL, f"event {fatal} of {total} did not kill"
        # Half of them are killed again while they go on.
        if number % 2:
            run_child(run, dataset, path, fatal=chance.randint(1, 150))
        record = train(run, dataset, path, device="cpu")
        weights = load_tensors(record.path / records.MODEL)
        assert weights.keys() == expected.keys()
        for name, x in expected.items():
            assert torch.equal(weights[name], x), f"{name} differs after a kill at event {fatal} of {total}"
        history = [{key: row[key] for key in row if key != "seconds"} for row in record.content["history"]]
        assert history == [{key: row[key] for key in row if key != "seconds"} for row in whole.content["history"]]
        assert all(record.content[name] == whole.content[name] for name in KEPT)
        assert not list(path.rglob(".unfinished-*")), "something half written is left"
        resumed.append(record.content["sessions"] > 1)
    assert sum(resumed) > KILLS // 2, "most kills must come after the first checkpoint"


def test_killed_by_another_process_at_any_time(tmp_path):
    """The command line, killed from outside after a random time, again and again, until a try gets through."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import pathlib, torch; torch.set_num_threads(1)\n"
        "from small_runs import prepared, small_run\n"
        "from spectraformer.tasks.dataset import open_dataset\n"
        "from spectraformer.train import train\n"
        "path = pathlib.Path(sys.argv[2])\n"
        "data = open_dataset(path / 'data') if (path / 'data').exists() else prepared(path / 'data')\n"
        "print('ready', flush=True)\n"
        "record = train(small_run('oprf-orf', steps=60), data, path / sys.argv[3], device='cpu')\n"
        "print('done', flush=True)\n"
    )
    prepared(tmp_path / "data")
    command = [sys.executable, "-c", program, str(pathlib.Path(__file__).parent), str(tmp_path)]
    subprocess.run([*command, "whole"], check=True, capture_output=True)
    chance = random.Random(0)
    killed = 0
    for _ in range(3):
        process = subprocess.Popen([*command, "killed"], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0.1, 0.6))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed
    subprocess.run([*command, "killed"], check=True, capture_output=True)
    (whole,), (other,) = ((tmp_path / name).iterdir() for name in ("whole", "killed"))
    ours, theirs = (load_tensors(path / records.MODEL) for path in (other, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
