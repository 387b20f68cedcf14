"""Every source that is not what it should be is refused in words: what it holds and what was expected."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spectraformer.tasks import text
from spectraformer.tasks.sources import hub_table, parquet_table, sha256_of
from task_sources import (
    AAN_LINES,
    TASKS,
    build,
    offer_datasets,
    refused,
    reviews,
    write_aan,
    write_jpeg_pictures,
    write_pairs,
    write_pictures,
    write_review_folder,
    write_reviews,
)

Prepare = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _no_default_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECTRAFORMER_DATA", raising=False)
    hub_table.cache_clear()


def table(path: Path, **columns: object) -> None:
    pq.write_table(pa.table(columns), path)


SPLIT = [split for split, _, _ in reviews()]
LABEL = [label for _, label, _ in reviews()]
TEXT = [content for _, _, content in reviews()]


def replaced(items: list[object], row: int, item: object) -> list[object]:
    return [*items[:row], item, *items[row + 1 :]]


REVIEW_TABLES: dict[str, tuple[Prepare, list[str]]] = {
    "not a parquet": (lambda p: p.write_bytes(b"hello, world" * 9), ["cannot be read as parquet"]),
    "empty file": (lambda p: p.write_bytes(b""), ["cannot be read as parquet"]),
    "truncated": (lambda p: p.write_bytes(write_reviews(p).read_bytes()[:-100]), ["cannot be read as parquet"]),
    "no text column": (
        lambda p: table(p, split=SPLIT, label=LABEL, texts=TEXT),
        ["has no column 'text'", "it has split, label, texts", "nearest: 'texts'"],
    ),
    "label as text": (
        lambda p: table(p, split=SPLIT, label=list(map(str, LABEL)), text=TEXT),
        ["column 'label'", "type string", "expected integer"],
    ),
    "text as number": (
        lambda p: table(p, split=SPLIT, label=LABEL, text=LABEL),
        ["column 'text'", "type int64", "expected text"],
    ),
    "missing text": (
        lambda p: table(p, split=SPLIT, label=LABEL, text=replaced(TEXT, 7, None)),
        ["column 'text'", "1 missing values"],
    ),
    "no rows": (
        lambda p: pq.write_table(pa.table({"split": SPLIT, "label": LABEL, "text": TEXT}).slice(0, 0), p),
        ["has no rows"],
    ),
    "label -1": (
        lambda p: table(p, split=SPLIT, label=replaced(LABEL, 3, -1), text=TEXT),
        ["r.parquet has label -1 at row 3", "expected labels from 0 to 1"],
    ),
    "unknown split": (
        lambda p: table(p, split=replaced(SPLIT, 3, "unsupervised"), label=LABEL, text=TEXT),
        ["has split 'unsupervised'", "expected train, test"],
    ),
    "no test": (
        lambda p: table(p, split=["train"] * 80, label=LABEL, text=TEXT),
        ["has no rows of split 'test'"],
    ),
    "empty text": (
        lambda p: table(p, split=SPLIT, label=LABEL, text=replaced(TEXT, 70, "")),
        ["document 70 of r.parquet is empty"],
    ),
    "too few to hold out": (
        lambda p: table(p, split=["train", "train", "test"], label=[0, 1, 0], text=["a", "b", "c"]),
        ["class 0 has 1 training examples", "hold out 10% as dev"],
    ),
    "only duplicates": (
        lambda p: table(p, split=SPLIT, label=LABEL, text=["same"] * 80),
        ["class 0 has 20 training examples, 0 of them without a duplicate"],
    ),
}


@pytest.mark.parametrize("case", REVIEW_TABLES)
def test_refused_tables_of_reviews(case: str, tmp_path: Path) -> None:
    prepare, expected = REVIEW_TABLES[case]
    prepare(tmp_path / "r.parquet")
    message = refused("text", str(tmp_path / "r.parquet"))
    assert [part for part in expected if part not in message] == [], message


def test_a_tiny_size_needs_enough_examples(tmp_path: Path) -> None:
    message = refused("text", str(write_reviews(tmp_path / "r.parquet")), "tiny")
    assert message == "train has 20 examples of class 0; expected at least 600"


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    folder = write_review_folder(tmp_path / "aclImdb")
    (folder / "test" / "pos" / "19_10.txt").write_bytes(b"caf\xff")
    assert refused("text", str(folder)) == "document 79 of aclImdb has byte 0xff; expected UTF-8 text"


FOLDERS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no pos": (
        lambda f: (f / "train" / "pos").rename(f / "train" / "positive") and None,
        ["has no folder train/pos", "expected an aclImdb folder"],
    ),
    "odd name": (
        lambda f: (f / "test" / "neg" / "notes.txt").write_text("x") and None,
        ["has a file 'notes.txt'", "names such as 0_9.txt"],
    ),
    "empty review": (
        lambda f: (f / "train" / "neg" / "4_1.txt").write_bytes(b"") and None,
        ["document 4 of aclImdb is empty"],
    ),
    "no reviews": (
        lambda f: [path.unlink() for path in (f / "test" / "neg").iterdir()] and None,
        ["has no .txt files"],
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_refused_folders_of_reviews(case: str, tmp_path: Path) -> None:
    spoil, expected = FOLDERS[case]
    spoil(write_review_folder(tmp_path / "aclImdb"))
    message = refused("text", str(tmp_path / "aclImdb"))
    assert [part for part in expected if part not in message] == [], message


@pytest.mark.parametrize("task", TASKS)
def test_no_source_and_wrong_places(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = TASKS[task].sources
    assert refused(task, None) == (
        f"task {task} needs a source: give one, or name a folder in the environment variable SPECTRAFORMER_DATA; "
        f"expected {expected}"
    )
    missing = tmp_path / "absent"
    assert refused(task, str(missing)) == (
        f"source of task {task} is {str(missing)!r}, which does not exist; expected {expected}"
    )
    assert f"is {str(tmp_path)!r}, an empty folder; expected {expected}" in refused(task, str(tmp_path))
    (tmp_path / "other.bin").write_bytes(b"x")
    assert f"is {str(tmp_path)!r}, a folder with other.bin; expected {expected}" in refused(task, str(tmp_path))
    monkeypatch.setenv("SPECTRAFORMER_DATA", str(missing))
    assert refused(task, None).startswith(f"SPECTRAFORMER_DATA is {str(missing)!r}, which is no folder; expected one")
    monkeypatch.setenv("SPECTRAFORMER_DATA", str(tmp_path))
    assert "a folder with other.bin" in refused(task, None)


@pytest.mark.parametrize("task", TASKS)
def test_wrong_sizes_and_seeds(task: str) -> None:
    assert refused(task, None, "fulll") == "size is 'fulll'; expected one of full, tiny; nearest: 'full'"
    with pytest.raises(ValueError, match="seed is -1; expected an integer of at least 0"):
        TASKS[task].recipe("full", None, -1)


def aan(**changes: list[str]) -> Callable[[Path], object]:
    return lambda folder: write_aan(folder, AAN_LINES | changes)


AAN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "ids only": (
        aan(eval=["1\tA\tB"]),
        ["line 1 of new_aan_pairs.eval.tsv has 3 fields", "expected label, id1, id2, text1, text2", "ids only"],
    ),
    "extra field": (
        aan(train=[*AAN_LINES["train"], "1\tA\tB\tx\ty\tz"]),
        ["line 3 of new_aan_pairs.train.tsv has 6 fields"],
    ),
    "blank line": (aan(test=[""]), ["line 1 of new_aan_pairs.test.tsv has 1 fields"]),
    "header": (aan(train=["label\tid1\tid2\ttext1\ttext2"]), ["has label 'label'; expected one of 0, 0.0, 1, 1.0"]),
    "label 2": (aan(test=["2.0\tA\tB\tx\ty"]), ["line 1 of new_aan_pairs.test.tsv has label '2.0'"]),
    "empty text": (aan(test=["1\tA\tB\t\ty"]), ["line 1 of new_aan_pairs.test.tsv has an empty text"]),
    "empty file": (aan(eval=[]), ["new_aan_pairs.eval.tsv is empty"]),
    "missing file": (
        lambda folder: write_aan(folder, {name: AAN_LINES[name] for name in ("train", "test")}),
        ["has no new_aan_pairs.eval.tsv"],
    ),
}


@pytest.mark.parametrize("case", AAN)
def test_refused_aan_files(case: str, tmp_path: Path) -> None:
    prepare, expected = AAN[case]
    prepare(tmp_path / "lra")
    message = refused("retrieval", str(tmp_path / "lra"))
    assert [part for part in expected if part not in message] == [], message


PAIRS: dict[str, tuple[dict[str, list[object]], list[str]]] = {
    "document too high": (
        {"doc2": [3, 9, 80, 12]},
        ["row 2 of retrieval_pairs.parquet names documents [0, 80]; expected rows of imdb.parquet, 0 to 79"],
    ),
    "negative document": ({"doc1": [7, -1, 0, 7]}, ["row 1 of retrieval_pairs.parquet names documents [-1, 9]"]),
    "document as text": ({"doc1": list("7307")}, ["column 'doc1'", "type string", "expected integer"]),
    "label 2": ({"label": [1, 0, 2, 1]}, ["retrieval_pairs.parquet has label 2 at row 2"]),
    "split name": ({"split": ["train", "dev", "train", "test"]}, ["has split 'dev'; expected train, val, test"]),
    "no val": ({"split": ["train", "train", "train", "test"]}, ["has no rows of split 'val'"]),
    "missing label": ({"label": [1, None, 0, 1]}, ["column 'label'", "1 missing values"]),
}


@pytest.mark.parametrize("case", PAIRS)
def test_refused_pairs(case: str, tmp_path: Path) -> None:
    changes, expected = PAIRS[case]
    message = refused("retrieval", str(write_pairs(tmp_path / "pairs", **changes)))
    assert [part for part in expected if part not in message] == [], message


def test_pairs_without_their_documents(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "pairs")
    (folder / "imdb.parquet").unlink()
    assert refused("retrieval", str(folder)).endswith("imdb.parquet is missing; expected a file")


@pytest.mark.parametrize("task", ["text", "image"])
def test_the_datasets_package(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refused(task, "datasets") == (
        "source 'datasets' needs the package datasets, which is not installed; install it with 'pip install datasets'"
    )

    def offline(name: str, split: str) -> None:
        raise ConnectionError(f"no route to {name}\nand much more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    name = {"text": "stanfordnlp/imdb", "image": "uoft-cs/cifar10"}[task]
    assert refused(task, "datasets") == (f"the datasets package could not load {name}, split train: no route to {name}")
    offer_datasets(
        monkeypatch, dict.fromkeys(("train", "test"), pa.table({"label": [0], "txt": ["a"], "images": ["b"]}))
    )
    assert f"{name} has no column" in refused(task, "datasets")


def test_a_source_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = write_reviews(tmp_path / "r.parquet")
    recipe = text.TASK.recipe("full", str(path), 0)
    write_reviews(path, reviews()[::-1])
    parquet_table.cache_clear()  # as in another process
    with pytest.raises(ValueError, match=r"r\.parquet changed while it was being read; run the preparation again"):
        build(recipe)


def test_the_hash_is_of_the_content_now(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(b"abd")
    os.utime(path, ns=(1, 1))
    assert sha256_of(path) == "a52d159f262b2c6ddb724a61840befc36eb30c88877a4030b65cbe86298449c9"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = write_reviews(tmp_path / "r.parquet")
    path.chmod(0)
    assert "cannot be read: Permission denied" in refused("text", str(path))


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_reviews(tmp_path / "r.parquet")
    write_jpeg_pictures(tmp_path / "p.npz", write_pictures(tmp_path / "p.npz"))
    for task, source, module, package in (
        ("text", path, "pyarrow", "pyarrow"),
        ("image", tmp_path / "p.npz", "PIL.Image", "pillow"),
    ):
        with monkeypatch.context() as context:
            context.setitem(sys.modules, module, None)
            assert f"needs the package {package}, which is not installed" in refused(task, str(source))
