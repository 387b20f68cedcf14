"""Tasks from files: finding them, reading them with every assumption checked, and dividing them into splits.

Readers return arrays, or raise ``ValueError`` saying what the file holds and what was expected. Nothing here, and
nothing that uses it, reads a pickle.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from spectraformer.tasks.base import Array, existing_path

DATA_VARIABLE = "SPECTRAFORMER_DATA"
Stamp = tuple[int, int]


def find_source(source: str | None, task: str, expected: str) -> Path:
    """The file or folder named by a user, else the folder that the environment names.

    Raises:
        ValueError: If neither is given, or nothing is there.
    """
    if source is not None:
        return existing_path(source, task, expected)
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        raise ValueError(
            f"task {task} needs a source: give one, or name a folder in the environment variable {DATA_VARIABLE}; "
            f"expected {expected}"
        )
    if not Path(folder).is_dir():
        raise ValueError(f"{DATA_VARIABLE} is {folder!r}, which is no folder; expected one with {expected}")
    return Path(folder)


def unknown_source(path: Path, task: str, expected: str) -> ValueError:
    """What is said of a source in which no accepted form was found."""
    if path.is_dir():
        names = sorted(item.name for item in path.iterdir())
        held = f"a folder with {', '.join(names[:8])}{', …' * (len(names) > 8)}" if names else "an empty folder"
    else:
        held = "a file of another kind"
    return ValueError(f"source of task {task} is {str(path)!r}, {held}; expected {expected}")


def require_package(name: str, purpose: str) -> Any:
    """An optional package.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package = {"PIL.Image": "pillow"}.get(name, name.partition(".")[0])
        raise ValueError(
            f"{purpose} needs the package {package}, which is not installed; install it with 'pip install {package}'"
        ) from None


# Files and their identity


def stamp_of(path: Path) -> Stamp:
    """Modification time in ns and size in bytes: whether a file is still the one that was hashed."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def require_unchanged(path: Path, stamp: Stamp) -> None:
    """Raises ``ValueError`` if a file is no longer the one that was hashed."""
    if not path.is_file() or stamp_of(path) != stamp:
        raise ValueError(f"{path} changed while it was being read; run the preparation again")


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal; kept while the file stays as it is.

    Raises:
        ValueError: If it is no file or cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; expected a file")
    return _sha256(path, stamp_of(path))


@lru_cache(maxsize=16)
def _sha256(path: Path, stamp: Stamp) -> str:
    result = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                result.update(chunk)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return result.hexdigest()


def sha256_of_parts(parts: Iterable[bytes]) -> str:
    """sha256 of byte strings and where each ends, in hexadecimal."""
    result = hashlib.sha256()
    for part in parts:
        result.update(len(part).to_bytes(8, "little"))
        result.update(part)
    return result.hexdigest()


def describe_source(kind: str, sha256: Mapping[str, str]) -> str:
    """Where content comes from, in words: file names without folders, and their hashes."""
    return f"{kind}: " + ", ".join(f"{name} (sha256 {value})" for name, value in sha256.items())


# Checked reading


def read_parquet(path: Path, kinds: Mapping[str, str]) -> Any:
    """Columns of a parquet file; others are left where they are.

    Args:
        path: The file.
        kinds: From the names of columns to "text" or "integer".

    Returns:
        pyarrow.Table of these columns, without nulls, of at least one row.

    Raises:
        ValueError: If it is no such file.
    """
    arrow, parquet = require_package("pyarrow", "a parquet file"), require_package("pyarrow.parquet", "a parquet file")
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            _require_names(path, "column", kinds, schema.names)
            table = file.read(columns=list(kinds))
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {_first_line(error)}") from None
    return checked_table(table, str(path), kinds)


def checked_table(table: Any, where: str, kinds: Mapping[str, str]) -> Any:
    """A pyarrow.Table after checking the kinds of its columns; see :func:`read_parquet`."""
    types = require_package("pyarrow.types", "a table")
    _require_names(where, "column", kinds, table.column_names)
    for name, kind in kinds.items():
        column = table[name]
        found = column.type.value_type if types.is_dictionary(column.type) else column.type
        fits = types.is_string(found) or types.is_large_string(found) if kind == "text" else types.is_integer(found)
        if not fits:
            raise ValueError(f"column {name!r} of {where} has type {column.type}; expected {kind} values")
        if column.null_count:
            raise ValueError(f"column {name!r} of {where} has {column.null_count} missing values; expected none")
    if not len(table):
        raise ValueError(f"{where} has no rows")
    return table


@lru_cache(maxsize=2)
def parquet_table(path: Path, stamp: Stamp, kinds: tuple[tuple[str, str], ...]) -> Any:
    """:func:`read_parquet`, once a process while the file stays as it is."""
    require_unchanged(path, stamp)
    return read_parquet(path, dict(kinds))


def parquet_texts(path: Path, stamp: Stamp, kinds: tuple[tuple[str, str], ...], rows: Sequence[int]) -> list[bytes]:
    """UTF-8 of some rows of the column ``text``."""
    return table_texts(parquet_table(path, stamp, kinds), rows)


def table_texts(table: Any, rows: Sequence[int]) -> list[bytes]:
    """UTF-8 of some rows of the column ``text`` of a pyarrow.Table."""
    column = table["text"].take(np.asarray(rows))
    texts: list[bytes] = column.cast("large_string").cast("large_binary").to_pylist()
    return texts


@lru_cache(maxsize=2)
def hub_table(name: str, columns: tuple[str, ...]) -> Any:
    """Train and test of a data set of the Hugging Face hub under each other, once a process.

    Returns:
        pyarrow.Table of these columns and a column ``split``.

    Raises:
        ValueError: If the package is not installed, or cannot load it.
    """
    datasets = require_package("datasets", "source 'datasets'")
    arrow = require_package("pyarrow", "source 'datasets'")
    tables = []
    for split in ("train", "test"):
        try:
            table = datasets.load_dataset(name, split=split).with_format("arrow")[:]
        except Exception as error:  # the package lets through whatever its network layers raise
            raise ValueError(
                f"the datasets package could not load {name}, split {split}: {_first_line(error)}"
            ) from error
        _require_names(name, "column", columns, table.column_names)
        tables.append(table.select(columns).append_column("split", arrow.array([split] * len(table))))
    return arrow.concat_tables(tables)


def read_npz(path: Path, names: Collection[str]) -> dict[str, Array]:
    """Arrays of an npz file; others are left where they are.

    Raises:
        ValueError: If it is no such file, or an array in it is a pickle.
    """
    _require_names(path, "array", names, npz_names(path))
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in names:
                arrays[name] = np.asarray(archive[name])
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError) as error:
        if "allow_pickle" in str(error):
            raise ValueError(f"array {name!r} of {path} is a pickle, which can run code; expected numbers") from None
        raise ValueError(f"{path} is a damaged npz archive: {_first_line(error)}") from None
    return arrays


def npz_names(path: Path) -> list[str]:
    """Names of the arrays of an npz file.

    Raises:
        ValueError: If it is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError):
        raise ValueError(f"{path} is no npz archive, or a truncated one; pickles are not read") from None


def require_array(name: str, array: Array, kind: str, shape: tuple[int | None, ...]) -> None:
    """Raises ``ValueError`` unless an array is "uint8" or "integer" and of a shape; None stands for 1 or more."""
    fits = array.dtype == np.uint8 if kind == "uint8" else array.dtype.kind in "iu"
    fits = fits and array.ndim == len(shape)
    fits = fits and all(
        size > 0 if want is None else size == want for size, want in zip(array.shape, shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("n" if size is None else str(size) for size in shape) + "," * (len(shape) == 1)
        raise ValueError(f"{name} has shape {array.shape} and dtype {array.dtype}; expected ({sizes}) {kind}")


def require_labels(where: str, labels: Array, num_classes: int) -> Array:
    """Labels as (n,) uint8.

    Raises:
        ValueError: Unless they are integers in [0, num_classes).
    """
    require_array(f"the labels of {where}", labels, "integer", (None,))
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(
            f"{where} has label {labels[wrong[0]]} at row {wrong[0]}; expected labels from 0 to {num_classes - 1}"
        )
    return labels.astype(np.uint8)


def require_splits(where: str, names: Sequence[str], expected: tuple[str, ...]) -> Array:
    """Which of ``expected`` each row belongs to, (n,) int64.

    Raises:
        ValueError: For other names, and for a split without rows.
    """
    found = np.asarray(names)
    unknown = sorted(set(found.tolist()) - set(expected))
    if unknown:
        raise ValueError(f"{where} has split {unknown[0]!r}; expected {', '.join(expected)}")
    for name in expected:
        if not (found == name).any():
            raise ValueError(f"{where} has no rows of split {name!r}; expected {', '.join(expected)}")
    numbers = np.zeros(len(found), np.int64)
    for number, name in enumerate(expected):
        numbers[found == name] = number
    return numbers


def _require_names(where: object, what: str, names: Collection[str], found: Sequence[str]) -> None:
    for name in names:
        if name not in found:
            near = get_close_matches(name, list(found), n=1, cutoff=0.4)
            raise ValueError(
                f"{where} has no {what} {name!r}; it has {', '.join(map(str, found)) or 'none'}; "
                f"expected {', '.join(names)}{f'; nearest: {near[0]!r}' if near else ''}"
            )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
