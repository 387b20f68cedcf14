"""Recorded steps are the steps: bitwise, wherever they stop; what cannot be recorded runs as it is, and says so.

On the CPU a recording is simulated; tests marked gpu do the same with CUDA graphs.
"""

import math
import re
import signal

import pytest
import torch
from torch import nn

from simulated_graph import simulated_graph
from small_runs import prepared, small_run
from spectraformer import captured, model, records, step
from spectraformer import train as training
from spectraformer.captured import RECORDERS, capture, kept, reason_of
from spectraformer.checkpoint import load_tensors
from spectraformer.interruption import Interrupted
from spectraformer.nonfinite import NonFiniteError
from spectraformer.step import learning_rate
from spectraformer.tasks.dataset import Loader
from spectraformer.train import Trainer, train
from spectraformer.watch import Silent

CPU = torch.device("cpu")
STEPS_AT_ONCE = 8
FEW = {"num_features": 8}  # of skyformer, which draws its landmarks in every call


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data") / "counting")


@pytest.fixture
def one_width(monkeypatch):
    """Batches as on a GPU."""
    monkeypatch.setattr(Loader, "_width", lambda self, lengths: self.tokens.shape[1])


@pytest.fixture
def recorded(one_width, monkeypatch):
    """The CPU records, and runs several steps at once."""
    monkeypatch.setitem(RECORDERS, "cpu", simulated_graph)
    monkeypatch.setitem(step.PLANNED, "cpu", STEPS_AT_ONCE)


class Listener(Silent):
    """Keeps what it is told, and may send a signal after a step."""

    def __init__(self, signal_at=None):
        self.notes, self.steps, self.signal_at = [], [], signal_at

    def note(self, text):
        self.notes.append(text)

    def stepped(self, step, loss):
        self.steps.append((step, loss))
        if step == self.signal_at:
            signal.raise_signal(signal.SIGTERM)


def same_result(one, other):
    ours, theirs = (load_tensors(record.path / records.MODEL) for record in (one, other))
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert torch.equal(ours[name], x), name
    for name in ("accuracy", "loss", "best_step"):
        assert one.content[name] == other.content[name]
    rows = [[{**row, "seconds": 0} for row in record.content["history"]] for record in (one, other)]
    assert rows[0] == rows[1]


def step_by_step(run, dataset, path, monkeypatch):
    with monkeypatch.context() as without:
        without.delitem(RECORDERS, "cpu")
        without.delitem(step.PLANNED, "cpu")
        return train(run, dataset, path, device="cpu")


@pytest.mark.parametrize(
    ("attention", "settings"),
    [
        ("posrf-orf", {}),
        ("oprf-fastfoodl", {"accumulate": 4}),
        ("skyformer", {"options": FEW}),
        ("saderf-sgq", {"precision": "bfloat16"}),
    ],
)
def test_recorded_training_is_bitwise_that_of_single_steps(
    dataset, tmp_path, recorded, monkeypatch, attention, settings
):
    run = small_run(attention, **settings)
    listener = Listener()
    together = train(run, dataset, tmp_path / "recorded", device="cpu", watcher=listener)
    assert listener.notes == [] and [number for number, _ in listener.steps] == list(range(1, 25))
    same_result(together, step_by_step(run, dataset, tmp_path / "single", monkeypatch))


def test_stopped_between_recorded_steps_and_resumed_is_bitwise_the_same(dataset, tmp_path, recorded):
    run = small_run("skyformer", FEW)
    whole = train(run, dataset, tmp_path / "whole", device="cpu")
    listener = Listener(signal_at=8)
    with pytest.raises(Interrupted):
        train(run, dataset, tmp_path / "stopped", device="cpu", watcher=listener)
    assert 8 <= listener.steps[-1][0] <= 12, "it stops when the host looks next"
    resumed = train(run, dataset, tmp_path / "stopped", device="cpu")
    assert resumed.content["sessions"] == 2
    same_result(resumed, whole)


def test_several_steps_are_run_before_the_host_looks(dataset, tmp_path, recorded, monkeypatch):
    counts = []
    inner = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, count=1: (counts.append(count), inner(self, count)))
    train(small_run(steps=40, eval_every=18), dataset, tmp_path, device="cpu")
    assert max(counts) == STEPS_AT_ONCE and sum(counts) == 40 and counts[0] == 1
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    assert {18, 36, 40} <= set(ends), "the host looks where an evaluation is due"


class Own(nn.Module):
    """An attention of somebody's own."""

    def __init__(self, head_dim, num_heads, max_length, seed):
        super().__init__()
        self.calls = 0

    def forward(self, query, key, value, key_padding_mask=None):
        return value * self.factor(query)


class Reads(Own):
    def factor(self, query):
        return 1.0 if query.abs().amax().item() > 0 else 0.5


class Counts(Own):
    def factor(self, query):
        self.calls += 1
        return 1.0 + self.calls / 64


class Fails(Own):
    def factor(self, query):
        raise RuntimeError("a mistake of its own")


def own_attention(monkeypatch, kind):
    monkeypatch.setattr(model, "build_attention", lambda config, *sizes: kind(*sizes))


def test_an_attention_that_reads_on_the_host_is_trained_step_by_step(dataset, tmp_path, recorded, monkeypatch):
    own_attention(monkeypatch, Reads)
    listener = Listener()
    record = train(small_run("softmax"), dataset, tmp_path / "recorded", device="cpu", watcher=listener)
    (note,) = listener.notes
    assert "step by step" in note and "reads a tensor on the host" in note
    same_result(record, step_by_step(small_run("softmax"), dataset, tmp_path / "single", monkeypatch))


def test_state_on_the_host_is_noticed(dataset, tmp_path, recorded, monkeypatch):
    run = small_run("gerf-mc", {"redraw_every": 5})
    listener = Listener()
    redrawn = train(run, dataset, tmp_path / "redrawn", device="cpu", watcher=listener)
    assert len(listener.notes) == 1 and "layers.0.attention.attention.feature_map" in listener.notes[0]
    same_result(redrawn, step_by_step(run, dataset, tmp_path / "single", monkeypatch))
    own_attention(monkeypatch, Counts)
    listener = Listener()
    train(small_run("softmax"), dataset, tmp_path / "counted", device="cpu", watcher=listener)
    assert len(listener.notes) == 1 and "not give bitwise the same" in listener.notes[0]


def test_mistakes_are_not_hidden(dataset, tmp_path, recorded, monkeypatch):
    own_attention(monkeypatch, Fails)
    with pytest.raises(RuntimeError, match="a mistake of its own"):
        train(small_run("softmax"), dataset, tmp_path, device="cpu")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_step_that_is_not_finite_is_named_and_nothing_of_it_applied(
    dataset, tmp_path, recorded, monkeypatch, value
):
    """In the middle of steps that are run at once: the sixth has an example whose loss is not finite."""
    run = small_run("softmax", model={"dropout": 0.0})
    expected = f"the loss is not finite at step 6, learning rate {learning_rate(run.train, 5):.3g}"
    healthy = Trainer(run, dataset, CPU, tmp_path / "a", "key", Silent())
    healthy.resume()
    with monkeypatch.context() as single:
        single.delitem(step.PLANNED, "cpu")
        for _ in range(5):
            healthy.train_step()
    trainer = Trainer(run, dataset, CPU, tmp_path / "b", "key", listener := Listener())
    trainer.resume()
    bad = trainer.order(5)[0, 3]
    inner = trainer._forward

    def poisoned(examples):
        return inner(examples) + torch.where((examples == bad).any(), value, 0.0)

    monkeypatch.setattr(trainer, "_forward", poisoned)
    trainer.capture()
    with pytest.raises(NonFiniteError, match=expected):
        trainer.train_step(STEPS_AT_ONCE)
    assert [number for number, _ in listener.steps] == [1, 2, 3, 4, 5] and trainer.step == 5
    for name, x in healthy.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], x), name
    for parameter, other in zip(trainer.model.parameters(), healthy.model.parameters(), strict=True):
        ours, theirs = (x.stepper.optimizer.state[y] for x, y in ((trainer, parameter), (healthy, other)))
        assert all(torch.equal(ours[entry], theirs[entry]) for entry in ("step", "exp_avg", "exp_avg_sq"))


def test_recording_changes_nothing(dataset, tmp_path, recorded):
    trainer = Trainer(small_run("trigrf-orf"), dataset, CPU, tmp_path, "key", Silent())
    trainer.resume()
    trainer.train_step(3)
    state = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    buffers = [x.clone() for x in trainer.model.buffers()]
    moments = [
        {entry: x.clone() for entry, x in entries.items()} for entries in trainer.stepper.optimizer.state.values()
    ]
    random = torch.get_rng_state()
    assert trainer.stepper.capture() is None and trainer._evaluator("dev").capture() is None
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(trainer.model.state_dict()[name], x) for name, x in state.items())
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.buffers(), buffers, strict=True))
    for entries, before in zip(trainer.stepper.optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(entries[entry], x) for entry, x in before.items())
    assert float(trainer.stepper.failed) == 0.0 and trainer.step == 3


def test_a_reason_names_the_line_outside_torch():
    with pytest.raises(RuntimeError) as error:
        nn.Sequential(nn.Linear(2, 3))(torch.zeros(5))
    assert re.fullmatch(r"mat1 and mat2 .*, at test_captured.py:\d+", reason_of(error.value))


def test_kept_gives_back_what_was_changed():
    module = nn.BatchNorm1d(2)
    extra, random = torch.zeros(3), torch.get_rng_state()
    with kept(module, [extra], CPU):
        module(torch.randn(5, 2))
        extra += 1
    assert not extra.any() and not module.running_mean.any() and int(module.num_batches_tracked) == 0
    assert torch.equal(torch.get_rng_state(), random)


def test_without_a_recorder_work_runs_as_it_is():
    x = torch.zeros(1)
    found = capture(lambda: x.add_(1), nn.Module(), CPU, state=[x], results=lambda: [x])
    assert "no recordings on device 'cpu'" in found.reason
    found.run()
    assert float(x) == 1


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize(
    "attention", ["posrf-orf", "posrf-sgq", "skyformer", "softmax", "nystrom", "informer", "reformer", "bigbird"]
)
def test_on_a_gpu_stopped_and_resumed_is_bitwise_the_same(dataset, tmp_path, monkeypatch, attention):
    if attention != "posrf-orf":
        uncompiled(monkeypatch)
    run = small_run(attention, steps=60, eval_every=25)
    listener = Listener()
    whole = train(run, dataset, tmp_path / "whole", device="cuda", watcher=listener)
    assert listener.notes == []
    with pytest.raises(Interrupted):
        train(run, dataset, tmp_path / "stopped", device="cuda", watcher=Listener(signal_at=21))
    same_result(train(run, dataset, tmp_path / "stopped", device="cuda"), whole)


def uncompiled(monkeypatch):
    """What torch.compile takes minutes for is tried once; recordings do not depend on it."""
    monkeypatch.setattr(training, "compile_stretches", lambda encoder, rehearse: None)


class Synchronizes(Own):
    def factor(self, query):
        torch.cuda.synchronize()
        return 1.0


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Reads, Counts, Synchronizes])
def test_on_a_gpu_a_failed_recording_leaves_the_process_sound(dataset, tmp_path, monkeypatch, kind):
    uncompiled(monkeypatch)
    listener = Listener()
    stream = torch.cuda.current_stream()
    with monkeypatch.context() as other:
        own_attention(other, kind)
        train(small_run("softmax"), dataset, tmp_path / "own", device="cuda", watcher=listener)
    assert len(listener.notes) == 1 and "step by step" in listener.notes[0]
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    listener = Listener()
    train(small_run("softmax"), dataset, tmp_path / "sound", device="cuda", watcher=listener)
    assert listener.notes == [], "the next recording works"
    torch.cuda.empty_cache()


def test_the_module_of_recorders_names_cuda_alone():
    assert list(captured.RECORDERS) == ["cuda"]
