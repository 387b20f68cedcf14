"""Damaged files are named, refused and gone round: never used, never an obscure error, and the result is the same."""

import random
import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch

import spectraformer
from faults import DAMAGES, FullDisk, damages, writes_of
from small_runs import build, prepared, recipe, small_run
from spectraformer import records
from spectraformer.checkpoint import latest_checkpoint, load_tensors, read_checkpoint
from spectraformer.cli import main
from spectraformer.evaluation import load_model
from spectraformer.files import DamagedError
from spectraformer.interruption import Interrupted
from spectraformer.tasks.dataset import open_dataset
from spectraformer.tasks.prepare import prepare
from spectraformer.train import train
from spectraformer.watch import Silent

CHECKPOINT_FILES = (
    "model.safetensors",
    "best.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
    "manifest.json",
)
DATA_FILES = (
    "tokens.npy",
    "lengths.npy",
    "labels.npy",
    *(f"{split}.{part}.npy" for split in ("train", "dev", "test") for part in ("rows", "labels")),
    "manifest.json",
)
RUN_FILES = ("run.json", "result.json", "model.safetensors")
REASON = (
    r"is missing|has no manifest|has \d+ bytes; expected|was changed after it was written|is not JSON|cannot be read|"
    r"is not the manifest|is not the result|does not describe|is not what the run tested|describes another run|"
    r"is of run"
)
RUN = small_run("gerf-mc", {"redraw_every": 5})


def test_so_many_cases():
    assert len(damages()) * len(CHECKPOINT_FILES + DATA_FILES + RUN_FILES) >= 350
    assert len(DAMAGES) >= 14


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data") / "counting")


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A run that was never disturbed, and one of another seed beside it."""
    runs = tmp_path_factory.mktemp("whole")
    train(replace(RUN, train=replace(RUN.train, seed=1)), dataset, runs, device="cpu")
    return train(RUN, dataset, runs, device="cpu")


class Notes(Silent):
    """Keeps what it is told; after some step it asks to stop."""

    def __init__(self, stop_after=None):
        self.stop_after, self.notes, self.began = stop_after, [], None

    def begin(self, run, step, directory):
        self.began = step

    def note(self, text):
        self.notes.append(text)

    def stepped(self, step, loss):
        if step == self.stop_after:
            signal.raise_signal(signal.SIGTERM)


def stopped(run, dataset, runs, after):
    """The directory of a run that was stopped after some steps."""
    with pytest.raises(Interrupted):
        train(run, dataset, runs, device="cpu", watcher=Notes(after))
    return next(path for path in runs.iterdir() if f"seed{run.train.seed}" in path.name)


@pytest.fixture(scope="module")
def half(dataset, tmp_path_factory):
    """A run stopped after step 14: it has checkpoints of steps 12 and 14."""
    return stopped(RUN, dataset, tmp_path_factory.mktemp("half"), 14)


def names(file, message, name, files):
    """Whether a message names the damaged file. With another's manifest, any file may be the first that differs."""
    swap = name.startswith("swapped") and file == "manifest.json"
    return any(x in message for x in files) if swap else file in message


def assert_reason(message, name):
    assert re.search(REASON, message), f"{name}: no reason in {message!r}"
    assert len(message) < 600 and "\n" not in message, f"{name}: {message!r}"


def assert_same_weights(record, whole):
    ours, theirs = (load_tensors(x.path / records.MODEL) for x in (record, whole))
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert torch.equal(ours[name], x), name
    assert record.content["loss"] == whole.content["loss"] and record.content["accuracy"] == whole.content["accuracy"]


# -- checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", CHECKPOINT_FILES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(half, whole, tmp_path, file):
    key = half.name.rpartition(".")[2]
    (other,) = whole.path.parent.glob("*seed1*/checkpoints/step-00000018")
    older = read_checkpoint(half / "checkpoints" / "step-00000012", key)
    for name, damage, chance in damages():
        directory = tmp_path / name
        shutil.copytree(half / "checkpoints", directory)
        damage(directory / "step-00000014" / file, chance, other / file)
        found, refused = latest_checkpoint(directory, key)
        assert found is not None and found.step == 12, name
        for part in ("model", "best", "optimizer", "random"):
            ours, theirs = getattr(found, part), getattr(older, part)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[x], theirs[x]) for x in theirs), (name, part)
        (message,) = refused
        assert names(file, message, name, CHECKPOINT_FILES) and "step-00000014" in message, f"{name}: {message}"
        assert_reason(message, name)
        assert not list(tmp_path.rglob("unpickled"))
        again, refused = latest_checkpoint(directory, key)
        assert again is not None and again.step == 12 and not refused, "it was refused twice"


@pytest.mark.parametrize("damage", ["truncated", "bit_flipped", "missing", "appended", "directory", "pickled"])
def test_training_goes_on_from_the_checkpoint_before_the_damaged_one(dataset, whole, half, tmp_path, damage):
    shutil.copytree(half, tmp_path / half.name)
    file = CHECKPOINT_FILES[len(damage) % len(CHECKPOINT_FILES)]
    saved = tmp_path / half.name / "checkpoints"
    DAMAGES[damage](saved / "step-00000014" / file, random.Random(0), None)
    watcher = Notes()
    record = train(RUN, dataset, tmp_path, device="cpu", watcher=watcher)
    assert watcher.began == 12
    assert "checkpoint refused" in watcher.notes[0] and file in watcher.notes[0]
    assert watcher.notes[1] == "going on from step 12"
    assert_same_weights(record, whole)


def test_with_both_checkpoints_damaged_training_starts_anew(dataset, whole, half, tmp_path):
    shutil.copytree(half, tmp_path / half.name)
    saved = tmp_path / half.name / "checkpoints"
    DAMAGES["bit_flipped"](saved / "step-00000014" / "model.safetensors", random.Random(0), None)
    DAMAGES["emptied"](saved / "step-00000012" / "state.json", random.Random(0), None)
    watcher = Notes()
    record = train(RUN, dataset, tmp_path, device="cpu", watcher=watcher)
    assert watcher.began == 0 and watcher.notes[-1] == "going on from step 0"
    assert "step-00000014" in watcher.notes[0] and "step-00000012" in watcher.notes[1]
    assert_same_weights(record, whole)


def test_a_checkpoint_of_another_run_is_refused(dataset, whole, tmp_path):
    ours = stopped(RUN, dataset, tmp_path / "ours", 8)
    foreign = stopped(replace(RUN, train=replace(RUN.train, learning_rate=1e-3)), dataset, tmp_path / "foreign", 14)
    shutil.copytree(foreign / "checkpoints" / "step-00000014", ours / "checkpoints" / "step-00000014")
    watcher = Notes()
    record = train(RUN, dataset, tmp_path / "ours", device="cpu", watcher=watcher)
    assert watcher.began == 8 and f"belongs to run {foreign.name.rpartition('.')[2]}" in watcher.notes[0]
    assert_same_weights(record, whole)


@pytest.mark.parametrize("where", ["step-00000014", "refused-step-00000014", "step-00000099", "both"])
def test_files_where_checkpoints_should_be(dataset, whole, half, tmp_path, where):
    """A file in the way of a checkpoint, of one that was set aside, or of both."""
    shutil.copytree(half, tmp_path / half.name)
    saved = tmp_path / half.name / "checkpoints"
    for name in ("step-00000014", "refused-step-00000014") if where == "both" else (where,):
        shutil.rmtree(saved / name, ignore_errors=True)
        (saved / name).write_text("in the way")
    if where.startswith("refused"):
        DAMAGES["emptied"](saved / "step-00000014" / "state.json", random.Random(0), None)
    watcher = Notes()
    record = train(RUN, dataset, tmp_path, device="cpu", watcher=watcher)
    assert watcher.began == (14 if where == "step-00000099" else 12) and "checkpoint refused" in watcher.notes[0]
    assert_same_weights(record, whole)


# -- prepared data -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prepared data, and other data with files of the same names and sizes."""
    path = tmp_path_factory.mktemp("prepared")
    prepared(path / "counting")
    other = recipe(build=other_build, arguments={"blocks": 5, "other": True}, split=other_split)
    prepare(other, path / "other", task="counting", size="tiny", version=spectraformer.__version__, workers=1)
    return path


def other_build(number):
    return build(number + 100)


def other_split(columns):
    splits = recipe().split(columns)
    return {name: type(split)(split.rows[::-1].copy(), split.labels[::-1].copy()) for name, split in splits.items()}


@pytest.mark.parametrize("file", DATA_FILES)
def test_damaged_data_is_refused(data, tmp_path, file):
    for name, damage, chance in damages():
        path = tmp_path / name
        shutil.copytree(data / "counting", path)
        damage(path / file, chance, data / "other" / file)
        with pytest.raises(DamagedError) as error:
            open_dataset(path)
        assert names(file, str(error.value), name, DATA_FILES), f"{name}: {error.value}"
        assert_reason(str(error.value), name)
        assert not list(tmp_path.rglob("unpickled"))


def test_undamaged_data_is_not_refused(data, tmp_path):
    shutil.copytree(data / "counting", tmp_path / "copy")
    assert open_dataset(tmp_path / "copy").fingerprint == open_dataset(data / "counting").fingerprint


# -- finished runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", RUN_FILES)
def test_a_damaged_run_is_refused(dataset, whole, tmp_path, capsys, file):
    other = next(path for path in whole.path.parent.iterdir() if "seed1" in path.name)
    for name, damage, chance in damages():
        path = tmp_path / name / whole.path.name
        shutil.copytree(whole.path, path)
        damage(path / file, chance, other / file)
        if name.startswith("missing") and file == "run.json":
            # The result says the same, and is whole.
            assert records.read_record(path).content == whole.content
            continue
        found, refused = records.find_records([path.parent])
        if file == "model.safetensors":
            assert len(found) == 1, "the result itself is whole"
            with pytest.raises(DamagedError) as error:
                load_model(found[0], dataset)
            message = str(error.value)
        else:
            assert not found, name
            with pytest.raises(DamagedError) as error:
                records.read_record(path)
            message = str(error.value)
            assert refused == ([] if name.startswith("missing") else [message])
        assert file in message, f"{name}: {message}"
        assert_reason(message, name)
        if not (name.startswith("missing") and file == "result.json"):
            assert main(["check", str(path)]) == 2
            printed = capsys.readouterr()
            assert "FAILED" in printed.out and file in printed.out and "1 of 1 checks failed" in printed.err
        assert main(["list", "runs", "--runs", str(path.parent)]) == 0
        printed = capsys.readouterr().out
        if file != "model.safetensors":
            assert ("unfinished" if name.startswith("missing") else "damaged") in printed, name
        if file == "run.json":
            with pytest.raises(DamagedError, match=r"run\.json"):
                train(RUN, dataset, path.parent, device="cpu")
        assert not list(tmp_path.rglob("unpickled"))


def test_a_run_whose_result_was_removed_is_finished_again(dataset, whole, tmp_path):
    """What the message of a damaged result leads to: remove it, and the last checkpoint is tested again."""
    shutil.copytree(whole.path, tmp_path / whole.path.name)
    DAMAGES["truncated"](tmp_path / whole.path.name / "result.json", random.Random(0), None)
    with pytest.raises(DamagedError, match=r"remove it .*result\.json|result\.json.*"):
        train(RUN, dataset, tmp_path, device="cpu")
    (tmp_path / whole.path.name / "result.json").unlink()
    watcher = Notes()
    record = train(RUN, dataset, tmp_path, device="cpu", watcher=watcher)
    assert watcher.began == 24
    assert_same_weights(record, whole)


# -- a full disk ---------------------------------------------------------------------------------------------


def test_a_disk_full_while_training_harms_nothing(dataset, whole, tmp_path, monkeypatch):
    total = writes_of(monkeypatch, lambda: train(RUN, dataset, tmp_path / "counted", device="cpu"))
    assert total > 40
    for fatal in (1, 2, 4, 9, total // 2, total - 8, total - 3, total - 1, total):
        runs = tmp_path / f"{fatal}"
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
            FullDisk(patch, fatal)
            train(RUN, dataset, runs, device="cpu")
        assert not list(runs.rglob(".unfinished-*")), "half a file is left"
        found, refused = records.find_records([runs])
        assert not refused and len(found) == (fatal == total)  # the last write is the folder's sync
        for saved in runs.glob("*/checkpoints"):
            _, refused = latest_checkpoint(saved, saved.parent.name.rpartition(".")[2])
            assert not refused, "half a checkpoint is there"
        assert_same_weights(train(RUN, dataset, runs, device="cpu"), whole)
