"""Prepared data and recipes that are wrong: a clear error, an exit status, no traceback, and nothing written half."""

import json
import os
import shutil

import numpy as np
import pytest

import spectraformer
from faults import TRAIN, assert_refused, contents, counting_task, make_recipe
from small_runs import BLOCK, LENGTH, build, recipe
from spectraformer.cli import main
from spectraformer.config import digest
from spectraformer.tasks import TASKS
from spectraformer.tasks.base import index_splits
from spectraformer.tasks.prepare import prepare


@pytest.fixture(autouse=True)
def _a_small_task(monkeypatch, tmp_path):
    monkeypatch.setitem(TASKS.own, "counting", counting_task())
    monkeypatch.delenv("SPECTRAFORMER_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(capsys, tmp_path):
    assert main(["data", "prepare", "counting", "--size", "tiny"]) == 0
    return tmp_path / "data" / "counting-tiny"


def change_manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    del manifest["sha256"]
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest(manifest)}))


def file_instead(path):
    shutil.rmtree(path)
    path.write_text("in the way")


def folder_is_a_file(path):
    shutil.rmtree(path.parent)
    path.parent.write_text("in the way")


def longer(path):
    with (path / "tokens.npy").open("ab") as file:
        file.write(b"more")


def flipped(path):
    content = bytearray((path / "tokens.npy").read_bytes())
    content[-1] ^= 1
    (path / "tokens.npy").write_bytes(bytes(content))


def of_another_size(path):
    prepare(make_recipe("full", None, 0), path, task="counting", size="full", version=spectraformer.__version__)


BAD_DATA = {
    "half prepared": (lambda p: (p / "manifest.json").unlink(), ["holds files, but no manifest.json", "--overwrite"]),
    "a file": (file_instead, ["data is 'data/counting-tiny', where a file is in the way; expected a folder"]),
    "folder is a file": (folder_is_a_file, ["where a file is in the way; expected a folder"]),
    "hash": (flipped, ["tokens.npy was changed after it was written: its sha256 does not match"]),
    "longer": (longer, ["tokens.npy has", "bytes; expected", "truncated or another file"]),
    "file missing": (lambda p: (p / "lengths.npy").unlink(), ["lengths.npy is missing"]),
    "manifest changed": (
        lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text().replace("counting", "kounting")),
        ["manifest.json was changed after it was written"],
    ),
    "newer format": (lambda p: change_manifest(p, format=2), ["has format 2, newer than this version reads (1)"]),
    "other kind": (lambda p: change_manifest(p, kind="checkpoint"), ["holds a checkpoint; expected a prepared task"]),
    "other size": (of_another_size, ["holds task 'counting', size 'full'; expected 'counting', 'tiny'"]),
    "no such split": (lambda p: change_manifest(p, splits={"train": {}}), ["its arrays do not fit each other"]),
    "more classes": (lambda p: change_manifest(p, num_classes=2), ["its arrays do not fit each other"]),
    "no classes": (lambda p: change_manifest(p, num_classes=None), ["cannot be read as a prepared task"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_folders(case, data, capsys, tmp_path):
    damage, expected = BAD_DATA[case]
    damage(data)
    assert_refused(TRAIN, expected, capsys, tmp_path)


def test_a_place_where_nothing_can_be_written(capsys, tmp_path):
    """As root every folder can be written to but those of the kernel."""
    place = "/proc/self/fd/none"
    printed = assert_refused(("data", "prepare", "counting", "--data", place), [place], capsys, tmp_path, status=1)
    assert "Errno" not in printed.err


def test_runs_in_the_place_of_a_file(data, capsys, tmp_path):
    (tmp_path / "runs").write_text("in the way")
    assert_refused(TRAIN, ["runs is 'runs', where a file is in the way; expected a folder"], capsys, tmp_path)


def test_nothing_is_prepared_for_a_run_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "runs").write_text("in the way")
    assert_refused(TRAIN, ["runs is 'runs', where a file is in the way"], capsys, tmp_path)
    assert not (tmp_path / "data").exists()


def test_data_from_another_seed_is_not_replaced(data, capsys, tmp_path):
    command = ("data", "prepare", "counting", "--size", "tiny", "--seed", "1")
    assert_refused(command, ["is prepared already, from another source or seed", "--overwrite"], capsys, tmp_path)
    before = contents(data)
    assert main([*command, "--overwrite"]) == 0
    assert contents(data) != before and sorted(os.listdir(tmp_path / "data")) == ["counting-tiny"]


def test_sources(capsys, tmp_path):
    for task in ("listops", "text", "image", "retrieval"):
        command = ("data", "prepare", task, "--source", "nowhere")
        assert_refused(command, [f"source of task {task} is 'nowhere', which does not exist"], capsys, tmp_path)
    for task in ("text", "image", "retrieval"):
        assert_refused(("data", "prepare", task), [f"task {task} needs a source"], capsys, tmp_path)


def test_data_to_show(capsys, tmp_path):
    expected = ["data/counting does not exist", "`spectraformer data prepare counting --size full` makes it"]
    assert_refused(("data", "show", "counting"), expected, capsys, tmp_path)


# -- recipes -------------------------------------------------------------------------------------------------


def columns_with(**changes):
    return lambda number: dict(build(number)) | {name: change(build(number)) for name, change in changes.items()}


def splits_with(change):
    def split(columns):
        rows = np.arange(200)
        return change(index_splits(columns["labels"], train=rows[:120], dev=rows[120:170], test=rows[170:]))

    return split


def replaced(**parts):
    return lambda splits: splits | {"dev": splits["dev"]._replace(**parts)}


BAD_RECIPES = {
    "label too large": ({"num_classes": 2}, "has label 2; expected labels below 2"),
    "token too large": ({"vocab_size": 3}, "values up to 3; expected 1 to 24 tokens below 3"),
    "no tokens": (
        {"build": lambda n: {"lengths": np.ones(3, np.int32)}},
        r"has columns \{'lengths': 3\}; expected tokens, lengths",
    ),
    "uneven columns": ({"build": columns_with(lengths=lambda c: c["lengths"][1:])}, "as many rows each"),
    "too wide": ({"length": LENGTH - 1}, rf"has tokens \({BLOCK}, 24\) uint8; expected \(n, 23\) uint8"),
    "tokens of floats": (
        {"build": columns_with(tokens=lambda c: c["tokens"] + np.nan)},
        r"has tokens \(40, 24\) float64; expected \(n, 24\) uint8",
    ),
    "longer than it is": ({"build": columns_with(lengths=lambda c: c["lengths"] + LENGTH)}, "expected 1 to 24 tokens"),
    "empty document": ({"build": columns_with(lengths=lambda c: c["lengths"] * 0)}, "documents of 0 to 0 tokens"),
    "empty split": (
        {"split": splits_with(replaced(rows=np.zeros((0, 1), np.int32), labels=np.zeros(0, np.uint8)))},
        "split dev of counting has no examples",
    ),
    "missing split": (
        {"split": splits_with(lambda s: {name: s[name] for name in ("train", "test")})},
        "has splits train, test; expected train, dev, test",
    ),
    "label of floats": (
        {"split": splits_with(replaced(labels=np.full(50, np.nan)))},
        r"labels \(50,\) float64; expected",
    ),
    "unknown document": (
        {"split": splits_with(replaced(rows=np.full((50, 1), 200, np.int32)))},
        r"names documents outside 0..199",
    ),
    "negative document": (
        {"split": splits_with(replaced(rows=np.full((50, 1), -1, np.int32)))},
        r"names documents outside 0..199",
    ),
    "fewer labels": ({"split": splits_with(replaced(labels=np.zeros(49, np.uint8)))}, r"labels \(49,\) uint8"),
    "flat rows": ({"split": splits_with(replaced(rows=np.zeros(50, np.int32)))}, r"rows \(50,\) int32"),
    "two documents in one split": (
        {"split": splits_with(replaced(rows=np.zeros((50, 2), np.int32)))},
        "documents an example",
    ),
    "no blocks": ({"blocks": 0}, "has no blocks"),
    "no new examples": (
        {
            "build": columns_with(tokens=lambda c: c["tokens"] * 0 + 1),
            "distinct": lambda row, attempt: {"tokens": np.ones((1, LENGTH), np.uint8)},
        },
        "no new example in 10000 attempts: the generator has too few",
    ),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_recipes(case, tmp_path):
    changes, expected = BAD_RECIPES[case]
    with pytest.raises(ValueError, match=expected):
        prepare(recipe(**changes), tmp_path / "counting", task="counting", size="tiny", version="0", workers=1)
    assert not (tmp_path / "counting").exists() and not list(tmp_path.glob(".unfinished-*"))


def test_so_many_cases():
    assert len(BAD_DATA) + len(BAD_RECIPES) >= 30
