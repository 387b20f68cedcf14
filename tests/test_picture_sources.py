"""Pictures that are not what they should be are refused in words."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from spectraformer.tasks.sources import hub_table
from task_sources import offer_datasets, refused, write_binary_pictures, write_jpeg_pictures, write_pictures

Prepare = Callable[[Path], object]


def write_npz(path: Path, **changes: object) -> None:
    arrays = write_pictures(path) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})  # type: ignore[arg-type]


def flip_last_member(path: Path) -> None:
    write_npz(path)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("y_test.npy").header_offset
    content = bytearray(path.read_bytes())
    content[start + 200] ^= 0xFF
    path.write_bytes(content)


def member_without_header(path: Path) -> None:
    write_npz(path, y_test=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y_test.npy", b"\x93NUMPY\x01\x00\x05\x00{")


LABELS = np.arange(100) % 10
ARCHIVES: dict[str, tuple[Prepare, list[str]]] = {
    "not a zip": (lambda p: p.write_bytes(b"\x80\x04K\x01."), ["no npz archive", "pickles are not read"]),
    "truncated": (
        lambda p: (write_npz(p), p.write_bytes(p.read_bytes()[:5000])),
        ["no npz archive, or a truncated one"],
    ),
    "bit flipped": (flip_last_member, ["is a damaged npz archive"]),
    "damaged array": (member_without_header, ["is a damaged npz archive"]),
    "missing array": (
        lambda p: write_npz(p, y_test=None, y_tests=LABELS[:20]),
        ["has no array 'y_test'", "it has x_train, y_train, x_test, y_tests", "nearest: 'y_tests'"],
    ),
    "pickled array": (
        lambda p: write_npz(p, y_train=np.array([None] * 100, object)),
        ["array 'y_train' of", "is a pickle, which can run code"],
    ),
    "float pixels": (
        lambda p: write_npz(p, x_train=np.zeros((100, 32, 32, 3))),
        ["x_train of p.npz has shape (100, 32, 32, 3) and dtype float64; expected (n, 32, 32, 3) uint8"],
    ),
    "channels first": (
        lambda p: write_npz(p, x_test=np.zeros((20, 3, 32, 32), np.uint8)),
        ["x_test of p.npz has shape (20, 3, 32, 32)", "expected (n, 32, 32, 3) uint8"],
    ),
    "no test images": (
        lambda p: write_npz(p, x_test=np.zeros((0, 32, 32, 3), np.uint8)),
        ["x_test of p.npz has shape (0, 32, 32, 3)"],
    ),
    "labels in a column": (
        lambda p: write_npz(p, y_train=LABELS[:, None]),
        ["the labels of y_train of p.npz has shape (100, 1) and dtype int64; expected (n,) integer"],
    ),
    "label 10": (
        lambda p: write_npz(p, y_train=LABELS + 1),
        ["y_train of p.npz has label 10 at row 9; expected labels from 0 to 9"],
    ),
    "too few labels": (
        lambda p: write_npz(p, y_train=LABELS[:90]),
        ["has 100 + 20 images, but 90 + 20 labels of train and test"],
    ),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_refused_archives_of_pictures(case: str, tmp_path: Path) -> None:
    prepare, expected = ARCHIVES[case]
    prepare(tmp_path / "p.npz")
    message = refused("image", str(tmp_path / "p.npz"))
    assert [part for part in expected if part not in message] == [], message


def png(width: int, height: int, mode: str) -> np.ndarray:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return np.frombuffer(file.getvalue(), np.uint8)


STREAM = {"header": np.zeros(1, np.uint8), "offsets": np.arange(121) * 9, "streams": np.zeros(1080, np.uint8)}
JPEG_ARCHIVES: dict[str, tuple[dict[str, np.ndarray], list[str]]] = {
    "no pictures": (STREAM, ["image 0 of p.npz cannot be decoded"]),
    "offsets past the end": (
        STREAM | {"offsets": np.arange(121) * 10},
        ["offsets of p.npz go from 0 to 1200; expected increasing from 0 to 1080"],
    ),
    "offsets fall": (STREAM | {"offsets": np.r_[0, 5, 4, 1080]}, ["expected increasing from 0 to 1080"]),
    "fewer streams": (STREAM | {"offsets": np.arange(0, 1081, 10)}, ["has 108 images, but 100 + 20 labels"]),
    "float offsets": (
        STREAM | {"offsets": np.arange(121) * 9.0},
        ["offsets of p.npz has shape (121,)", "(n,) integer"],
    ),
    "signed header": (STREAM | {"header": np.zeros(1, np.int8)}, ["header of p.npz", "expected (n,) uint8"]),
    "another size": (
        STREAM | {"header": png(16, 32, "RGB")},
        ["image 0 of p.npz is RGB (32, 16); expected RGB or L, 32 x 32 pixels"],
    ),
    "another mode": (STREAM | {"header": png(32, 32, "LA")}, ["image 0 of p.npz is LA (32, 32)"]),
}


@pytest.mark.parametrize("case", JPEG_ARCHIVES)
def test_refused_archives_of_jpegs(case: str, tmp_path: Path) -> None:
    changes, expected = JPEG_ARCHIVES[case]
    arrays = write_pictures(tmp_path / "p.npz")
    write_jpeg_pictures(tmp_path / "p.npz", arrays, **changes)
    message = refused("image", str(tmp_path / "p.npz"))
    assert [part for part in expected if part not in message] == [], message


def spoil_batch(folder: Path, change: Callable[[bytes], bytes]) -> None:
    path = folder / "data_batch_2.bin"
    path.write_bytes(change(path.read_bytes()))


BATCHES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated": (
        lambda f: spoil_batch(f, lambda content: content[:-1]),
        ["data_batch_2.bin has 61459 bytes; expected a multiple of 3073"],
    ),
    "empty": (lambda f: spoil_batch(f, lambda content: b""), ["data_batch_2.bin has 0 bytes"]),
    "missing": (lambda f: (f / "data_batch_4.bin").unlink(), ["data_batch_4.bin is missing; expected a file"]),
    "folder": (
        lambda f: ((f / "test_batch.bin").unlink(), (f / "test_batch.bin").mkdir()),
        ["test_batch.bin is a folder; expected a file"],
    ),
    "label 77": (
        lambda f: spoil_batch(f, lambda content: content[:3073] + b"\x4d" + content[3074:]),
        ["data_batch_2.bin has label 77 at row 1; expected labels from 0 to 9"],
    ),
}


@pytest.mark.parametrize("case", BATCHES)
def test_refused_binary_batches(case: str, tmp_path: Path) -> None:
    spoil, expected = BATCHES[case]
    spoil(write_binary_pictures(tmp_path / "cifar", write_pictures(tmp_path / "p.npz")))
    message = refused("image", str(tmp_path / "cifar"))
    assert [part for part in expected if part not in message] == [], message


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"])
def test_the_python_version_of_cifar_is_refused_with_the_reason(inside: str, tmp_path: Path) -> None:
    (tmp_path / inside).mkdir(exist_ok=True)
    (tmp_path / inside / "data_batch_1").write_bytes(b"\x80\x02}q\x01.")
    message = refused("image", str(tmp_path))
    assert "the Python version of CIFAR-10, which is pickled" in message
    assert "expected the binary version" in message


def test_hub_pictures_must_be_files(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_table.cache_clear()
    rows = pa.table({"label": [0, 1], "img": ["a", "b"]})
    offer_datasets(monkeypatch, {"train": rows, "test": rows})
    assert "column 'img' of uoft-cs/cifar10 has type string; expected image files" in refused("image", "datasets")
