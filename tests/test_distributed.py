"""Two processes train as one: on the CPU by gloo, started as torchrun starts them; on two GPUs by NCCL and torchrun."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from small_runs import prepared, small_run
from spectraformer import distributed, records
from spectraformer import train as training
from spectraformer.checkpoint import load_tensors
from spectraformer.distributed import ALONE, Group, join, own_device
from spectraformer.evaluation import resolve_device
from spectraformer.randomness import random_states, restore_random
from spectraformer.train import train

PROCESSES = 2
PROGRAM = """
import json, math, os, pathlib, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from small_runs import small_run
from spectraformer import distributed, records
from spectraformer.interruption import Interrupted
from spectraformer.nonfinite import NonFiniteError
from spectraformer.tasks.dataset import open_dataset
from spectraformer.train import Trainer, train
from spectraformer.watch import Silent

root = pathlib.Path(sys.argv[2])
data, rank = open_dataset(root / "data"), int(os.environ["RANK"])
told, found = [], {}

class Listener(Silent):
    def __init__(self):
        told.append(0)
    def stepped(self, step, loss):
        told[-1] = step

def work(name, run, **options):
    record = train(run, data, root / name, device="cpu", watcher=Listener(), **options)
    found[name] = [record.content["key"], record.content["sessions"], record.content["accuracy"]]

work("sum", small_run("softmax", model={"dropout": 0.0}))
work("accumulated", small_run("oprf-orf", model={"dropout": 0.0}, accumulate=4))
work("whole", small_run("skyformer", {"num_features": 8}))

# Only the second process is asked to stop.
inner = Trainer.train_step
def stop(self, count=1):
    inner(self, count)
    if self.step == 8 and rank == 1:
        signal.raise_signal(signal.SIGTERM)
Trainer.train_step = stop
try:
    work("stopped", small_run("skyformer", {"num_features": 8}))
except Interrupted as stopped:
    found["interrupted"] = [stopped.exit_status, told[-1]]
Trainer.train_step = inner
work("stopped", small_run("skyformer", {"num_features": 8}))

# Only in the second process something becomes infinite.
forward = Trainer._forward
def poisoned(self, examples):
    return forward(self, examples) + (math.inf if rank == 1 and self.step == 5 else 0.0)
Trainer._forward = poisoned
try:
    work("poisoned", small_run("softmax"))
except NonFiniteError as error:
    found["not finite"] = str(error)
Trainer._forward = forward
try:
    work("odd", small_run(batch_size=15))
except ValueError as error:
    found["odd"] = str(error)
found["told"] = told
(root / f"found.{rank}.json").write_text(json.dumps(found))
distributed.leave()
"""


GPU_PROGRAM = """
import json, os, pathlib, sys
sys.path.insert(0, sys.argv[1])
from small_runs import small_run
from spectraformer import distributed, train as training
from spectraformer.tasks.dataset import open_dataset
from spectraformer.train import train
from spectraformer.watch import Silent

training.compile_stretches = lambda encoder, rehearse: None  # would take minutes, and exchanges nothing
root = pathlib.Path(sys.argv[2])
notes = []

class Listener(Silent):
    def note(self, text):
        notes.append(text)

for name, settings in json.loads(sys.argv[3]).items():
    record = train(small_run(**settings), open_dataset(root / "data"), root / name, watcher=Listener())
seen = {"device": record.content["device"], "own": distributed.own_device("auto"), "notes": notes}
(root / f"seen.{os.environ['RANK']}.json").write_text(json.dumps(seen))
distributed.leave()
"""
ON_GPUS = {
    name: {"attention": name, "model": {"dropout": 0.0}, "precision": "float32", "accumulate": parts}
    for name, parts in (("posrf-orf", 1), ("oprf-orf", 4))
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where two processes trained."""
    path = tmp_path_factory.mktemp("two")
    prepared(path / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(PROCESSES), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(path)]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES, "\n".join(errors)
    return path


@pytest.fixture(scope="module")
def found(root):
    return [json.loads((root / f"found.{rank}.json").read_text()) for rank in range(PROCESSES)]


def result(path):
    (directory,) = path.iterdir()
    return records.read_record(directory)


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("sum", small_run("softmax", model={"dropout": 0.0})),
        ("accumulated", small_run("oprf-orf", model={"dropout": 0.0}, accumulate=4)),
    ],
)
def test_two_processes_end_where_one_does(root, tmp_path, name, run):
    """Up to the order of sums: the same batches, the same W, the same mean over the batch."""
    same_end(result(root / name), train(run, prepared(tmp_path / "data"), tmp_path / "runs", device="cpu"))


def same_end(two, one):
    assert two.content["key"] == one.content["key"]
    ours, theirs = (load_tensors(record.path / records.MODEL) for record in (two, one))
    for key, x in theirs.items():
        torch.testing.assert_close(ours[key], x, rtol=1e-3, atol=2e-5, msg=key)
    for mine, other in zip(two.content["history"], one.content["history"], strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert mine["dev_loss"] == pytest.approx(other["dev_loss"], rel=1e-4)
    assert two.content["accuracy"] == pytest.approx(one.content["accuracy"], abs=0.021)


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory):
    """Where two processes trained, each on a GPU of its own."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 CUDA devices; there are {torch.cuda.device_count()}")
    path = tmp_path_factory.mktemp("gpus")
    prepared(path / "data")
    (path / "program.py").write_text(GPU_PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    command = [*launcher, str(path / "program.py"), str(Path(__file__).parent), str(path), json.dumps(ON_GPUS)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    return path


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPUS)
def test_two_gpus_end_where_one_does(on_gpus, tmp_path, monkeypatch, name):
    monkeypatch.setattr(training, "compile_stretches", lambda encoder, rehearse: None)
    one = train(small_run(**ON_GPUS[name]), prepared(tmp_path / "data"), tmp_path / "runs", device="cuda")
    same_end(result(on_gpus / name), one)


@pytest.mark.gpu
def test_each_process_has_its_gpu_and_records_its_steps(on_gpus):
    seen = [json.loads((on_gpus / f"seen.{rank}.json").read_text()) for rank in range(PROCESSES)]
    assert [x["own"] for x in seen] == ["cuda:0", "cuda:1"] and all(x["device"].endswith(" x 2") for x in seen)
    assert [x["notes"] for x in seen] == [[], []], "sums over the processes are in the recording"


def test_all_processes_return_the_one_record(found):
    for name in ("sum", "accumulated", "whole", "stopped"):
        assert found[0][name] == found[1][name]


def test_only_the_first_process_speaks(found):
    assert found[0]["told"] == [24, 24, 24, 8, 24, 5, 0] and not any(found[1]["told"])


def test_a_signal_to_one_process_stops_all_and_the_rest_is_bitwise_the_same(root, found):
    """With dropout and drawn landmarks: each process goes on with random numbers of its own."""
    assert [x["interrupted"] for x in found] == [[143, 8], [143, 0]]
    assert found[0]["stopped"][1] == 2
    ours, theirs = (load_tensors(result(root / name).path / records.MODEL) for name in ("stopped", "whole"))
    assert all(torch.equal(ours[key], x) for key, x in theirs.items())


def test_processes_draw_random_numbers_of_their_own(root):
    (directory,) = (root / "stopped").iterdir()
    newest = max((directory / "checkpoints").iterdir())
    states = load_tensors(newest / "random.safetensors")
    assert {"cpu", "cpu.1"} <= states.keys() and not torch.equal(states["cpu"], states["cpu.1"])


def test_what_is_not_finite_in_one_process_stops_all(root, found):
    for x in found:
        assert "the loss is not finite at step 6" in x["not finite"]
    (directory,) = (root / "poisoned").iterdir()
    assert not (directory / records.RESULT).exists()


def test_batches_must_divide(found):
    for x in found:
        assert "train.batch_size is 15" in x["odd"] and "expected a multiple of 2; nearest: 16" in x["odd"]


def test_shares_are_those_of_the_parts():
    """Every example is computed once, in the part it would be in without a group."""
    batch = torch.arange(24).view(2, 12)
    shares = [Group(rank, 3).share(12, 2)(batch) for rank in range(3)]
    assert shares[1].tolist() == [[2, 3, 8, 9], [14, 15, 20, 21]]
    parts = torch.stack([share.unflatten(-1, (2, 2)) for share in shares], 2)
    assert torch.equal(parts.flatten(2).flatten(1), batch)


def test_alone_nothing_is_exchanged():
    x = torch.ones(3)
    ALONE.sum_([x])
    assert x.tolist() == [1, 1, 1] and ALONE.agree(3, -1) == [3, -1] and ALONE.gather(x) == [x]
    with ALONE.first_alone():
        assert ALONE.is_first


def test_a_process_that_was_not_there_gets_numbers_of_its_own():
    before = torch.get_rng_state()
    try:
        torch.manual_seed(3)
        states = random_states(ALONE)
        torch.manual_seed(5)
        restore_random(states, rank=0, step=7)
        assert torch.equal(torch.get_rng_state(), states["cpu"])
        torch.manual_seed(5)
        restore_random(states, rank=1, step=7)
        assert torch.initial_seed() == 12
    finally:
        torch.set_rng_state(before)


def test_the_environment_is_torchruns(monkeypatch):
    for name in (*distributed.VARIABLES, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert join() is ALONE and own_device("cpu") == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        join()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_device("auto") == own_device("cuda") == "cuda:1" and own_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="each of the processes takes its own GPU"):
        own_device("cuda:0")
    monkeypatch.undo()
    assert resolve_device("cpu").type == "cpu"
