"""Image: what is in a grey 32 × 32 picture, read pixel by pixel?

CIFAR-10 (Krizhevsky, 2009, Learning Multiple Layers of Features from Tiny Images): 50 000 + 10 000 images of 10
classes. As in the Long Range Arena (Tay et al., arXiv 2011.04006) a token is a grey level from 0 to 255, in rows from
the top. Nothing is padded, so level 0 is a token like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from spectraformer.checks import require_choice, require_integer
from spectraformer.config import TrainConfig
from spectraformer.tasks.base import SIZES, Array, Columns, Recipe, Task
from spectraformer.tasks.selection import Block, Corpus, choose_rows, digest_rows, make_blocks, strict_splits
from spectraformer.tasks.sources import (
    Stamp,
    describe_source,
    find_source,
    hub_table,
    npz_names,
    read_npz,
    require_array,
    require_labels,
    require_package,
    require_splits,
    require_unchanged,
    sha256_of,
    sha256_of_parts,
    stamp_of,
    unknown_source,
)

HUB_NAME = "uoft-cs/cifar10"
FOLDER = "cifar-10-batches-bin"
ARCHIVES = ("cifar10.npz", "cifar10_jpeg.npz")
EXPECTED = (
    f"the binary version of CIFAR-10 (folder {FOLDER}), an .npz with x_train (n, 32, 32, 3) uint8, y_train, x_test, "
    "y_test or with header, streams, offsets, y_train, y_test (JPEG; a folder may hold it as "
    f"{' or '.join(ARCHIVES)}), or 'datasets' for {HUB_NAME} through the datasets package"
)
NUM_CLASSES = 10
SIDE = 32
OFFICIAL = (50_000, 10_000)
BATCHES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
# One label byte, then the red, green and blue plane.
RECORD = 1 + 3 * SIDE * SIDE
RAW_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
JPEG_ARRAYS = ("header", "streams", "offsets", "y_train", "y_test")
# What the archive leaves out of every JPEG file.
JPEG_END = b"\xff\xd9"
# Of red, green and blue, in TensorFlow's rgb_to_grayscale.
LUMA = (0.2989, 0.5870, 0.1140)


def grey_levels(pixels: Array) -> Array:
    """Grey levels as TensorFlow's ``rgb_to_grayscale`` computes them.

    trunc(((R, G, B) / 255 · (0.2989, 0.5870, 0.1140)) · 255.5), in float32, summed from red to blue. Exact arithmetic
    gives another level, by 1, for 237 of the 2^24 colours.

    Args:
        pixels: (..., 3) uint8.

    Returns:
        (...) uint8.
    """
    scaled = pixels.astype(np.float32) * np.float32(1 / 255)
    red, green, blue = (scaled[..., channel] * np.float32(weight) for channel, weight in enumerate(LUMA))
    levels: Array = ((red + green + blue) * np.float32(255.5)).astype(np.uint8)
    return levels


def make_recipe(size: str, source: str | None, seed: int) -> Recipe:
    """The recipe of the image task.

    Args:
        size: "full", or "tiny": 1000 / 200 / 200 images of 16 × 16, each pixel the rounded mean of 2 × 2.
        source: See :data:`EXPECTED`; None looks in the folder named by the environment.
        seed: Of which images are held out as dev and which are in the tiny size.

    Raises:
        ValueError: If there is no such source, or it does not hold what it should.
    """
    require_choice("size", size, SIZES)
    require_integer("seed", seed, least=0)
    corpus = open_corpus(source)
    rows, fraction = choose_rows(corpus, size, NUM_CLASSES, seed)
    length = SIDE * SIDE if size == "full" else SIDE * SIDE // 4
    label = "image (jpeg)" if corpus.kind == "jpeg" else "image"
    return Recipe(
        label=label if corpus.counts == OFFICIAL else f"{label} (custom)",
        source=describe_source(corpus.kind, corpus.sha256),
        arguments={"task": "image", "form": corpus.kind, "sha256": corpus.sha256, "seed": seed, "size": size},
        length=length,
        vocab_size=256,
        num_classes=NUM_CLASSES,
        blocks=make_blocks(corpus.read, rows, corpus.name, length, length),
        build=build_images,
        split=partial(strict_splits, labels=corpus.labels[rows], test=corpus.test[rows], fraction=fraction, seed=seed),
    )


def build_images(block: Block) -> Columns:
    """Grey levels as tokens, in rows from the top.

    Returns:
        ``tokens`` (n, length) uint8, ``lengths`` (n,) int32 and ``digest`` (n,) uint64, equal for equal tokens.
    """
    levels: Array = block.read()
    if block.length < SIDE * SIDE:
        levels = mean_pool(levels)
    tokens = np.ascontiguousarray(levels.reshape(len(levels), block.length))
    lengths = np.full(len(tokens), block.length, np.int32)
    return {"tokens": tokens, "lengths": lengths, "digest": digest_rows(row.tobytes() for row in tokens)}


def mean_pool(levels: Array) -> Array:
    """Means of 2 × 2 pixels, halves rounded up: (n, 2 h, 2 w) uint8 to (n, h, w) uint8."""
    count, height, width = levels.shape
    sums = levels.reshape(count, height // 2, 2, width // 2, 2).sum(axis=(2, 4), dtype=np.uint16)
    means: Array = ((sums + 2) // 4).astype(np.uint8)
    return means


def open_corpus(source: str | None) -> Corpus:
    """The images of a source, in a form that it is recognised by.

    Raises:
        ValueError: If it is none of :data:`EXPECTED`.
    """
    if source == "datasets":
        return _hub()
    path = find_source(source, "image", EXPECTED)
    if path.is_file():
        return _archive(path)
    for folder in (path, path / FOLDER):
        if any((folder / name).is_file() for name in BATCHES):
            return _binary(folder)
    for name in ARCHIVES:
        if (path / name).is_file():
            return _archive(path / name)
    if any((folder / "data_batch_1").is_file() for folder in (path, path / "cifar-10-batches-py")):
        raise ValueError(
            f"source of task image is {str(path)!r}, the Python version of CIFAR-10, which is pickled; reading a "
            f"pickle can run any code, so it is refused; expected {EXPECTED}"
        )
    raise unknown_source(path, "image", EXPECTED)


def _binary(folder: Path) -> Corpus:
    paths = [folder / name for name in BATCHES]
    sha256 = {path.name: sha256_of(path) for path in paths}
    for path in paths:
        size = path.stat().st_size
        if not size or size % RECORD:
            raise ValueError(
                f"{path} has {size} bytes; expected a multiple of {RECORD}, one label byte and 3 x 1024 pixels an image"
            )
    stamps = [stamp_of(path) for path in paths]
    parts = [
        require_labels(path.name, _records(path, stamp)[:, 0], NUM_CLASSES)
        for path, stamp in zip(paths, stamps, strict=True)
    ]
    test = np.arange(sum(map(len, parts))) >= sum(map(len, parts[:-1]))
    return Corpus(
        "binary", sha256, np.concatenate(parts), test, lambda rows: partial(_binary_images, paths, stamps, rows)
    )


def _records(path: Path, stamp: Stamp) -> Array:
    require_unchanged(path, stamp)
    return np.memmap(path, np.uint8, "r").reshape(-1, RECORD)


def _binary_images(paths: Sequence[Path], stamps: Sequence[Stamp], rows: Sequence[int]) -> Array:
    files = [_records(path, stamp) for path, stamp in zip(paths, stamps, strict=True)]
    starts = np.cumsum([0, *map(len, files)])
    numbers = np.searchsorted(starts, rows, side="right") - 1
    records = np.stack([files[number][row - starts[number]] for number, row in zip(numbers, rows, strict=True)])
    return grey_levels(records[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))


def _archive(path: Path) -> Corpus:
    """The form is told by the arrays that the archive holds."""
    stamp = stamp_of(path)
    sha256 = {path.name: sha256_of(path)}
    jpeg = "streams" in npz_names(path)
    arrays = (_jpeg_arrays if jpeg else _raw_arrays)(path, stamp)
    parts = [require_labels(f"y_{name} of {path.name}", arrays[f"y_{name}"], NUM_CLASSES) for name in ("train", "test")]
    held = [len(arrays["offsets"]) - 1] if jpeg else [len(arrays["x_train"]), len(arrays["x_test"])]
    if held not in ([len(part) for part in parts], [sum(map(len, parts))]):
        raise ValueError(
            f"{path} has {' + '.join(map(str, held))} images, but {len(parts[0])} + {len(parts[1])} labels of train "
            "and test; expected one label an image"
        )
    images = _jpeg_images if jpeg else _raw_images
    return Corpus(
        "jpeg" if jpeg else "npz",
        sha256,
        np.concatenate(parts),
        np.arange(sum(map(len, parts))) >= len(parts[0]),
        lambda rows: partial(images, path, stamp, rows),
    )


@lru_cache(maxsize=1)
def _raw_arrays(path: Path, stamp: Stamp) -> dict[str, Array]:
    require_unchanged(path, stamp)
    arrays = read_npz(path, RAW_ARRAYS)
    for name in ("x_train", "x_test"):
        require_array(f"{name} of {path.name}", arrays[name], "uint8", (None, SIDE, SIDE, 3))
    return arrays


def _raw_images(path: Path, stamp: Stamp, rows: Sequence[int]) -> Array:
    arrays = _raw_arrays(path, stamp)
    train, test, chosen = arrays["x_train"], arrays["x_test"], np.asarray(rows)
    first = chosen < len(train)
    pixels = np.empty((len(chosen), SIDE, SIDE, 3), np.uint8)
    pixels[first], pixels[~first] = train[chosen[first]], test[chosen[~first] - len(train)]
    return grey_levels(pixels)


@lru_cache(maxsize=1)
def _jpeg_arrays(path: Path, stamp: Stamp) -> dict[str, Array]:
    require_unchanged(path, stamp)
    arrays = read_npz(path, JPEG_ARRAYS)
    for name, kind in (("header", "uint8"), ("streams", "uint8"), ("offsets", "integer")):
        require_array(f"{name} of {path.name}", arrays[name], kind, (None,))
    offsets, end = arrays["offsets"].astype(np.int64), len(arrays["streams"])
    if offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) <= 0).any():
        raise ValueError(
            f"offsets of {path.name} go from {offsets[0]} to {offsets[-1]}; expected increasing from 0 to {end}, "
            "the length of streams"
        )
    return arrays


def _jpeg_images(path: Path, stamp: Stamp, rows: Sequence[int]) -> Array:
    arrays = _jpeg_arrays(path, stamp)
    header, streams, offsets = arrays["header"].tobytes(), arrays["streams"], arrays["offsets"]
    files = (header + streams[offsets[row] : offsets[row + 1]].tobytes() + JPEG_END for row in rows)
    return np.stack([decode(file, f"image {row} of {path.name}") for row, file in zip(rows, files, strict=True)])


def decode(file: bytes, where: str) -> Array:
    """Grey levels (32, 32) uint8 of an image file, colour or grey.

    Raises:
        ValueError: If it is damaged, or of another size or kind.
    """
    reader = require_package("PIL.Image", "a compressed image")
    try:
        with reader.open(BytesIO(file)) as image:
            mode, pixels = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{where} cannot be decoded: {error}") from None
    if mode not in ("RGB", "L") or pixels.shape[:2] != (SIDE, SIDE):
        raise ValueError(f"{where} is {mode} {pixels.shape[:2]}; expected RGB or L, {SIDE} x {SIDE} pixels")
    return grey_levels(pixels) if mode == "RGB" else pixels


def _hub() -> Corpus:
    table = hub_table(HUB_NAME, ("img", "label"))
    labels = require_labels(HUB_NAME, np.asarray(table["label"]), NUM_CLASSES)
    test = require_splits(HUB_NAME, table["split"].to_pylist(), ("train", "test")) == 1
    sha256 = {HUB_NAME: sha256_of_parts([labels.tobytes(), *_hub_files(table, range(len(table)))])}
    return Corpus("hub", sha256, labels, test, lambda rows: partial(_hub_images, rows))


def _hub_files(table: Any, rows: Sequence[int]) -> list[bytes]:
    """The package stores an image as a record of the file's bytes and path."""
    found = table["img"].take(np.asarray(rows)).to_pylist()
    files = [item["bytes"] for item in found if isinstance(item, dict) and isinstance(item.get("bytes"), bytes)]
    if len(files) < len(found):
        raise ValueError(f"column 'img' of {HUB_NAME} has type {table['img'].type}; expected image files, as bytes")
    return files


def _hub_images(rows: Sequence[int]) -> Array:
    files = _hub_files(hub_table(HUB_NAME, ("img", "label")), rows)
    return np.stack([decode(file, f"image {row} of {HUB_NAME}") for row, file in zip(rows, files, strict=True)])


TASK = Task(
    name="image",
    claim="object in a grey picture, pixel by pixel",
    sources=EXPECTED,
    recipe=make_recipe,
    train={
        "full": TrainConfig(steps=50_000, batch_size=256, learning_rate=1e-4, warmup=175, eval_every=50),
        "tiny": TrainConfig(steps=600, batch_size=32, learning_rate=1e-3, warmup=60, eval_every=100),
    },
)
