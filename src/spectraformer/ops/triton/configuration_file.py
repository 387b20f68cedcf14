"""Tile shapes found by ``bench tune``, in a file: written, read back with every entry checked, and put in use.

::

    {"kind": "tile configurations", "format": 1, "device": "NVIDIA H200", "versions": {...}, "configurations": [
        {"bits": 16, "head_dim": 64, "num_features": 128, "pass": "keys",
         "landmarks": 128, "tokens": 64, "warps": 8, "stages": 3, "programs": 264, "resident": true, "registers": null},
        ...]}

Head dim and features are the smallest bucket of the table that holds a shape, as there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from spectraformer.checks import require_choice, require_flag, require_integer
from spectraformer.ops.triton import causal_configurations, configurations
from spectraformer.ops.triton.configurations import HEAD_DIMS, LANDMARKS, Configuration

KIND = "tile configurations"
FORMAT = 1
TABLES = (configurations, causal_configurations)
PASSES = tuple(name for table in TABLES for name in table.PASSES)
BITS = (16, 32)
MAX_WARPS = 32


class Place(NamedTuple):
    """Where a configuration stands in the tables: bits of the dtype, buckets of head dim and features, and pass."""

    bits: int
    head_dim: int
    num_features: int
    name: str


Row = dict[str, Configuration]


def table_row(place: Place) -> Row:
    """The configurations of all passes of one kind of attention at one shape: the table's own, to read and replace."""
    for table in TABLES:
        if place.name in table.PASSES:
            shapes = table.THIRTY_TWO_BIT if place.bits == 32 else table.SIXTEEN_BIT
            found: Row = shapes[place.head_dim, place.num_features]
            return found
    raise AssertionError(place)


def use_configurations(found: Mapping[Place, Configuration]) -> None:
    """Puts configurations into the tables, for this process; before the first call of a kernel."""
    for place, configuration in found.items():
        table_row(place)[place.name] = configuration


@contextmanager
def configured(place: Place, configuration: Configuration) -> Iterator[None]:
    """Another configuration inside the block."""
    row = table_row(place)
    before = row[place.name]
    row[place.name] = configuration
    try:
        yield
    finally:
        row[place.name] = before


def as_entry(place: Place, configuration: Configuration) -> dict[str, Any]:
    """One entry of the file."""
    bits, head_dim, num_features, name = place
    where = {"bits": bits, "head_dim": head_dim, "num_features": num_features, "pass": name}
    return where | configuration._asdict()


_FIELDS = frozenset(as_entry(Place(16, 64, 64, "keys"), Configuration(64, 64, 4, 1)))


def load_configurations(path: Path) -> dict[Place, Configuration]:
    """The configurations of a file.

    Raises:
        ValueError: If there is no such file, or it is not one of configurations; for an entry that no kernel could
            take: which, what it has and what is expected.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ValueError(f"{path} does not hold {KIND}; expected what `bench tune --out` wrote")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has format {content.get('format')!r}; this version reads {FORMAT}")
    entries = content.get("configurations")
    if not isinstance(entries, list):
        raise ValueError(f"{path} has no list of configurations")
    found: dict[Place, Configuration] = {}
    for number, entry in enumerate(entries, 1):
        try:
            place, configuration = _checked(entry)
            if place in found:
                raise ValueError(f"{place} is there already; expected one configuration a pass")
        except ValueError as error:
            raise ValueError(f"{path}, configuration {number}: {error}") from None
        found[place] = configuration
    return found


def _checked(entry: object) -> tuple[Place, Configuration]:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        have = ", ".join(map(str, entry)) if isinstance(entry, dict) else repr(entry)
        raise ValueError(f"it has {have or 'nothing'}; expected {', '.join(sorted(_FIELDS))}")
    for name, choices in (("bits", BITS), ("head_dim", HEAD_DIMS), ("num_features", LANDMARKS)):
        if isinstance(entry[name], bool) or entry[name] not in choices:
            raise ValueError(f"{name} is {entry[name]!r}; expected one of {', '.join(map(str, choices))}")
    require_choice("pass", entry["pass"], PASSES)
    for name, least in (("landmarks", 16), ("tokens", 16), ("warps", 1), ("stages", 1), ("programs", 1)):
        require_integer(name, entry[name], least)
    for name in ("landmarks", "tokens", "warps"):
        if entry[name] & (entry[name] - 1):
            raise ValueError(f"{name} is {entry[name]}; expected a power of two, nearest: {_power(entry[name])}")
    if entry["warps"] > MAX_WARPS:
        raise ValueError(f"warps is {entry['warps']}; expected at most {MAX_WARPS}")
    require_flag("resident", entry["resident"])
    if entry["registers"] is not None:
        require_integer("registers", entry["registers"], 16)
    place = Place(entry["bits"], entry["head_dim"], entry["num_features"], entry["pass"])
    return place, Configuration(*(entry[name] for name in Configuration._fields))


def _power(size: int) -> int:
    """The power of two nearest to a number >= 1."""
    below = 1 << (size.bit_length() - 1)
    return below if size - below <= 2 * below - size else 2 * below
