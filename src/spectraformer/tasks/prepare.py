"""From a recipe to memory-mapped arrays with a manifest: on all cores, interrupted and resumed without loss.

::

    DATA/listops-tiny/
        tokens.npy lengths.npy …             one row a document
        train.rows.npy train.labels.npy …    one row an example
        manifest.json                        written last: source, arguments, counts, sha256 of every file
    DATA/.blocks-listops-tiny/               finished blocks of a preparation under way
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from io import BytesIO
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spectraformer.config import canonical, digest
from spectraformer.files import (
    DamagedError,
    new_directory,
    only_process,
    read_json,
    remove,
    remove_unfinished,
    require_folder,
    write_atomically,
    write_json,
    write_manifest,
)
from spectraformer.tasks.base import SPLITS, Array, Columns, Recipe, Split

FORMAT = 1
KIND = "prepared task"
# Starting processes takes longer than so: what is done sooner needs none.
SECONDS_BEFORE_PROCESSES = 2.0
# A block begins with the sha256 of what it is, where it belongs and what it is made from.
SEAL_BYTES = hashlib.sha256().digest_size

Progress = Callable[[str, int, int], None]  # what, done, of how many


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(
    recipe: Recipe,
    directory: Path,
    *,
    task: str,
    size: str,
    version: str,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Builds what a recipe says and writes it to a directory, which appears when it is complete.

    Args:
        recipe: What to build.
        directory: Where to.
        task: Name of the task, for the manifest.
        size: Its size, likewise.
        version: Of this package: blocks of another version are built anew.
        workers: Processes; None for one a core.
        progress: Told how many blocks are done.

    Returns:
        The manifest.

    Raises:
        ValueError: If the recipe's blocks do not have the promised shape and range: what its source holds is not
            what it should be; and if another process prepares the same.
    """
    require_folder("data", directory)
    if not len(recipe.blocks):
        raise ValueError(f"{recipe.label} has no blocks: its source holds no documents")
    blocks = directory.with_name(f".blocks-{directory.name}")
    blocks.mkdir(parents=True, exist_ok=True)
    with only_process(blocks):
        remove_unfinished(directory.parent, directory.name)
        origin = {"arguments": dict(recipe.arguments), "label": recipe.label, "version": version}
        _open_blocks(blocks, origin)
        places = [Place(blocks / f"{number:06d}.block", digest(origin)) for number in range(len(recipe.blocks))]
        _build_missing(recipe, places, workers, progress or (lambda what, done, total: None))
        manifest = _write(recipe, places, directory, {"task": task, "size": size, "version": version})
        shutil.rmtree(blocks)
    return manifest


def _write(recipe: Recipe, places: list[Place], directory: Path, named: Mapping[str, str]) -> dict[str, Any]:
    """Assembles the blocks in a directory, which appears with its manifest; returns that."""
    with new_directory(directory) as unfinished:
        columns = _assemble(recipe, places, unfinished)
        splits = _checked(recipe.split(columns), recipe, len(columns["lengths"]))
        for name, split in splits.items():
            np.save(unfinished / f"{name}.rows.npy", split.rows)
            np.save(unfinished / f"{name}.labels.npy", split.labels)
        return write_manifest(
            unfinished,
            {
                "kind": KIND,
                "format": FORMAT,
                **named,
                "label": recipe.label,
                "source": recipe.source,
                "arguments": dict(recipe.arguments),
                "length": recipe.length,
                "vocab_size": recipe.vocab_size,
                "num_classes": recipe.num_classes,
                "documents": len(columns["lengths"]),
                "splits": {
                    name: {
                        "examples": len(split.labels),
                        "labels": np.bincount(split.labels, minlength=recipe.num_classes).tolist(),
                    }
                    for name, split in splits.items()
                },
            },
        )


def _open_blocks(blocks: Path, origin: Mapping[str, Any]) -> None:
    """Keeps finished blocks of the same origin, and removes all others."""
    stamp = blocks / "origin.json"
    try:
        same = digest(read_json(stamp)) == digest(origin)
    except (DamagedError, TypeError, RecursionError):
        same = False
    if not same:
        for path in blocks.glob("[!.]*"):
            remove(path)
        write_json(stamp, origin)
    remove_unfinished(blocks)


class Place(NamedTuple):
    """Where a block is, and the hash of what all blocks beside it are made from."""

    path: Path
    origin: str

    def write(self, archive: bytes) -> None:
        write_atomically(self.path, self._seal(archive) + archive)

    def read(self) -> bytes:
        """The archive written here.

        Raises:
            DamagedError: If it is missing, was changed, or was written for another place.
        """
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise DamagedError(f"{self.path} cannot be read: {error.strerror or error}") from None
        seal, archive = content[:SEAL_BYTES], content[SEAL_BYTES:]
        if seal != self._seal(archive):
            raise DamagedError(f"{self.path} was changed after it was written; the same command builds it again")
        return archive

    def _seal(self, archive: bytes) -> bytes:
        return hashlib.sha256(f"{self.origin}/{self.path.name}/".encode() + archive).digest()

    def is_whole(self) -> bool:
        """Whether the block is there and unchanged; removes it otherwise."""
        try:
            self.read()
        except DamagedError:
            remove(self.path)
            return False
        return True


def _build_missing(recipe: Recipe, places: list[Place], workers: int | None, report: Progress) -> None:
    missing = [number for number, place in enumerate(places) if not place.is_whole()]
    done = len(places) - len(missing)
    report("blocks", done, len(places))
    for _ in _build(recipe, missing, places, workers):
        done += 1
        report("blocks", done, len(places))


def _build(recipe: Recipe, missing: list[int], places: list[Place], workers: int | None) -> Iterator[int]:
    """Builds blocks in any order; yields the number of each as it is done."""
    count = min(workers or cores(), len(missing))
    begun = time.monotonic()
    left = list(missing)
    while left and (count == 1 or time.monotonic() - begun < SECONDS_BEFORE_PROCESSES):
        _build_block(recipe.build, recipe.blocks[left[0]], places[left[0]])
        yield left.pop(0)
    if not left:
        return
    # A fork of a process that has run threads may hang.
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
        waiting = {
            pool.submit(_build_block, recipe.build, recipe.blocks[number], places[number]): number for number in left
        }
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    future.result()
                    yield waiting.pop(future)
        except BrokenProcessPool:
            raise ChildProcessError(
                f"a process that prepared {recipe.label} was killed, perhaps for want of memory; "
                f"the same command goes on, and with fewer than {count} workers needs less"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _build_block(build: Callable[[Any], Columns], block: Any, place: Place) -> None:
    archive = BytesIO()
    np.savez(archive, allow_pickle=False, **dict(build(block)))
    place.write(archive.getvalue())


def _read_block(place: Place) -> dict[str, Array]:
    with np.load(BytesIO(place.read()), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _assemble(recipe: Recipe, places: list[Place], directory: Path) -> dict[str, Array]:
    """Writes the columns of all blocks in order; returns all but the tokens."""
    others: dict[str, list[Array]] = {}
    counts = []
    for place in places:
        block = _read_block(place)
        _check_block(block, recipe)
        counts.append(len(block["tokens"]))
        for name, column in block.items():
            if name != "tokens":
                others.setdefault(name, []).append(column)
    columns = {name: np.concatenate(parts) for name, parts in others.items()}
    tokens: Array = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
        directory / "tokens.npy", mode="w+", dtype=np.uint8, shape=(sum(counts), recipe.length)
    )
    _reserve(directory / "tokens.npy")
    start = 0
    for place, count in zip(places, counts, strict=True):
        tokens[start : start + count] = _read_block(place)["tokens"]
        start += count
    if recipe.distinct is not None:
        _replace_duplicates(recipe.distinct, tokens, columns)
    tokens.flush()  # type: ignore[attr-defined]
    for name, column in columns.items():
        np.save(directory / f"{name}.npy", column)
    return columns


def _reserve(path: Path) -> None:
    """Takes the space of a mapped file now: on a full disk, writing to a page that has none would kill the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # else the file system knows no reservations
                raise


def _check_block(block: Columns, recipe: Recipe) -> None:
    rows = {name: len(column) for name, column in block.items()}
    if not {"tokens", "lengths"} <= set(rows) or len(set(rows.values())) != 1:
        raise ValueError(f"a block of {recipe.label} has columns {rows}; expected tokens, lengths, as many rows each")
    tokens, lengths = block["tokens"], block["lengths"]
    if tokens.dtype != np.uint8 or tokens.shape[1:] != (recipe.length,):
        raise ValueError(
            f"a block of {recipe.label} has tokens {tokens.shape} {tokens.dtype}; expected (n, {recipe.length}) uint8"
        )
    if len(tokens) and (lengths.min() < 1 or lengths.max() > recipe.length or tokens.max() >= recipe.vocab_size):
        raise ValueError(
            f"{recipe.label} has documents of {lengths.min()} to {lengths.max()} tokens, values up to {tokens.max()}; "
            f"expected 1 to {recipe.length} tokens below {recipe.vocab_size}"
        )


def _replace_duplicates(distinct: Callable[[int, int], Columns], tokens: Array, columns: dict[str, Array]) -> None:
    """Gives every row that repeats an earlier one further attempts, in row order: no choice depends on timing."""
    seen: set[bytes] = set()
    for row in range(len(tokens)):
        attempt = 0
        while (content := tokens[row].tobytes()) in seen:
            attempt += 1
            if attempt > 10_000:
                raise ValueError(f"no new example in {attempt - 1} attempts: the generator has too few to choose from")
            for name, column in distinct(row, attempt).items():
                (tokens if name == "tokens" else columns[name])[row] = column[0]
        seen.add(content)


def _checked(splits: Mapping[str, Split], recipe: Recipe, documents: int) -> Mapping[str, Split]:
    if not set(SPLITS) <= set(splits):
        raise ValueError(f"{recipe.label} has splits {', '.join(splits)}; expected {', '.join(SPLITS)}")
    for name, (rows, labels) in splits.items():
        if rows.ndim != 2 or len(rows) != len(labels) or rows.dtype != np.int32 or labels.dtype != np.uint8:
            raise ValueError(
                f"split {name} of {recipe.label} has rows {rows.shape} {rows.dtype} and labels {labels.shape} "
                f"{labels.dtype}; expected (examples, documents) int32 and (examples,) uint8"
            )
        if not len(labels):
            raise ValueError(f"split {name} of {recipe.label} has no examples")
        if labels.max() >= recipe.num_classes:
            raise ValueError(
                f"split {name} of {recipe.label} has label {labels.max()}; expected labels below {recipe.num_classes}"
            )
        if rows.min() < 0 or rows.max() >= documents:
            raise ValueError(f"split {name} of {recipe.label} names documents outside 0..{documents - 1}")
    if len(numbers := {rows.shape[1] for rows, _ in splits.values()}) > 1:
        raise ValueError(f"splits of {recipe.label} have {sorted(numbers)} documents an example; expected one number")
    return splits


def same_recipe(manifest: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether prepared data is what a recipe would make."""
    return canonical(manifest["arguments"]) == canonical(dict(recipe.arguments)) and manifest["label"] == recipe.label
