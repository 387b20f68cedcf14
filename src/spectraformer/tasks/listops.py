"""ListOps: nested lists of MIN, MAX, MED and SM over digits; the class is the value (0-9) of the whole expression.

Generated as Long Range Arena does (Nangia & Bowman 2018, arXiv 1804.06028; Tay et al. 2021, arXiv 2011.04006): the
root has depth 1; a node above the deepest level is an operator with probability 1/4, else a uniform digit; an operator
is uniform among four and has uniformly many arguments; only lengths within limits are kept. Trees are grown level by
level, many at once, and dropped once too long: those kept have the law of the recursive generator.

Tokens: 0 is padding, 1-10 the digits 0-9, 11 ``[MIN``, 12 ``[MAX``, 13 ``[MED``, 14 ``[SM``, 15 ``]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spectraformer.checks import require_choice, require_integer
from spectraformer.config import TrainConfig
from spectraformer.tasks.base import (
    SIZES,
    SPLITS,
    Array,
    Columns,
    Recipe,
    Split,
    Task,
    existing_path,
    index_splits,
)
from spectraformer.tasks.sources import Stamp, describe_source, require_unchanged, sha256_of, stamp_of

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS = (*"0123456789", *OPERATORS, "]")
"""The symbol of token t is ``SYMBOLS[t - 1]``."""

VOCAB_SIZE = 32  # the embedding of the published models; 16 are used
NUM_CLASSES = 10
BLOCK = 500  # examples built together; decides the content
CANDIDATES = 4096  # trees grown at once; decides the content
FRUITLESS = 1000  # times in a row that none of the candidates is kept before giving up
FILES = {"train": "basic_train.tsv", "dev": "basic_val.tsv", "test": "basic_test.tsv"}
FOLDER = f"a folder with {', '.join(FILES.values())}"

_TOKENS = {symbol: token for token, symbol in enumerate(SYMBOLS, start=1)}
_DIGIT, _OPERATOR, _CLOSE = _TOKENS["0"], _TOKENS["[MIN"], _TOKENS["]"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits of the generator; the defaults are Long Range Arena's.

    Attributes:
        examples: Of train, dev and test.
        padded: Padded length, tokens.
        longer_than: Kept expressions have more symbols than this.
        shorter_than: Kept expressions have fewer symbols than this; each digit, operator and ``]`` is one.
        max_depth: Nodes on the longest path from the root; those that deep are digits.
        max_arguments: Operators have 2 to this many arguments.
        operator_probability: That a node above ``max_depth`` is an operator.
    """

    examples: tuple[int, int, int] = (96_000, 2000, 2000)
    padded: int = 2048
    longer_than: int = 500
    shorter_than: int = 2000
    max_depth: int = 10
    max_arguments: int = 10
    operator_probability: float = 0.25

    def __post_init__(self) -> None:
        require_integer("max_depth", self.max_depth)
        require_integer("max_arguments", self.max_arguments, least=2)
        if not 0 <= self.longer_than < self.shorter_than - 1 <= self.padded:
            raise ValueError(
                f"longer_than, shorter_than, padded are {self.longer_than}, {self.shorter_than}, {self.padded}; "
                "expected a length between the first two, none above the last"
            )


SETTINGS: Mapping[str, Settings] = {
    "full": Settings(),
    "tiny": Settings(
        examples=(8000, 500, 500), padded=64, longer_than=7, shorter_than=61, max_depth=4, max_arguments=5
    ),
}


class Level(NamedTuple):
    """Nodes of one depth of many trees, ordered by tree, in each from left to right."""

    tree: Array  # (nodes,) the node's tree
    arity: Array  # (nodes,) its arguments; 0 for a digit


class Block(NamedTuple):
    """Generated examples ``BLOCK * number`` and the ``rows - 1`` after it."""

    settings: Settings
    seed: int
    number: int
    rows: int


class FileBlock(NamedTuple):
    """Consecutive lines of a file."""

    path: Path
    stamp: Stamp
    columns: tuple[str, ...]  # their names
    offset: int  # bytes before the first line
    line: int  # its number; the column names are line 1
    rows: int


def decode(tokens: Array | Sequence[int]) -> str:
    """The expression as text, symbols separated by blanks, padding dropped.

    Args:
        tokens: (length,) integers in 0..15.

    Raises:
        ValueError: For other shapes, and for numbers that are no token.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ValueError(f"tokens have shape {tokens.shape}, dtype {tokens.dtype}; expected integers (length,)")
    unknown = tokens[(tokens < 0) | (tokens > len(SYMBOLS))]
    if unknown.size:
        raise ValueError(f"token {unknown[0]} stands for nothing; expected 0 (padding) to {len(SYMBOLS)}")
    return " ".join(SYMBOLS[token - 1] for token in tokens.tolist() if token)


def grow(rng: np.random.Generator, settings: Settings, candidates: int) -> list[Level]:
    """Shapes of those of so many random trees whose length is within the limits, by depth from the root on.

    Trees are numbered from 0 in the order of the candidates. The symbols are left open: lengths do not depend on them.
    """
    tree = np.arange(candidates)
    length = np.zeros(candidates, dtype=np.int64)
    levels = []
    for depth in range(1, settings.max_depth + 1):
        is_operator = np.zeros(len(tree), dtype=bool)
        if depth < settings.max_depth:
            is_operator = rng.random(len(tree)) < settings.operator_probability
        length += np.bincount(tree, minlength=candidates)
        length += np.bincount(tree[is_operator], minlength=candidates)
        # What would follow cannot make these short enough again; as they are, they are rejected below.
        is_operator &= (length < settings.shorter_than)[tree]
        arity = np.zeros(len(tree), dtype=np.int64)
        arity[is_operator] = rng.integers(2, settings.max_arguments + 1, size=int(is_operator.sum()))
        levels.append(Level(tree, arity))
        tree = np.repeat(tree, arity)
    kept = (length > settings.longer_than) & (length < settings.shorter_than)
    number = np.cumsum(kept) - 1
    return [Level(number[tree[kept[tree]]], arity[kept[tree]]) for tree, arity in levels]


def fill(rng: np.random.Generator, levels: Sequence[Level], padded: int) -> Columns:
    """Draws the symbols of trees; their tokens, lengths and values.

    Args:
        rng: Source of randomness.
        levels: Shapes of n trees, from the root on.
        padded: At least the longest length.

    Returns:
        tokens (n, padded) uint8, lengths (n,) int32, labels (n,) uint8.
    """
    symbols: list[Array] = []  # by depth from the deepest on, each (nodes,)
    sizes: list[Array] = []  # symbols of the node's subexpression
    below = sizes_below = np.zeros(0, dtype=np.int64)  # values and sizes of the level below
    for _, arity in reversed(levels):
        inner = arity > 0
        value = rng.integers(NUM_CLASSES, size=len(arity))
        symbol = _DIGIT + value
        size = np.ones(len(arity), dtype=np.int64)
        if inner.any():
            operator = rng.integers(len(OPERATORS), size=int(inner.sum()))
            symbol[inner] = _OPERATOR + operator
            value[inner] = _apply(operator, arity[inner], below)
            size[inner] = 2 + np.add.reduceat(sizes_below, _offsets(arity[inner]))
        symbols.append(symbol)
        sizes.append(size)
        below, sizes_below = value, size

    tokens = np.zeros((len(below), padded), dtype=np.uint8)
    start = np.zeros(len(below), dtype=np.int64)
    for depth, (tree, arity) in enumerate(levels):
        symbol, size = symbols[-1 - depth], sizes[-1 - depth]
        tokens[tree, start] = symbol
        inner = arity > 0
        tokens[tree[inner], (start + size)[inner] - 1] = _CLOSE
        if not inner.any():
            break
        before = _offsets(sizes[-2 - depth])  # a child starts behind its parent's symbol and its elder siblings
        first = before[_offsets(arity[inner])]
        start = before + np.repeat(start[inner] + 1 - first, arity[inner])
    return {"tokens": tokens, "lengths": sizes_below.astype(np.int32), "labels": below.astype(np.uint8)}


def _offsets(counts: Array) -> Array:
    """Where each group starts when groups of these counts are laid end to end."""
    return np.cumsum(counts) - counts


def _apply(operator: Array, arity: Array, arguments: Array) -> Array:
    """Values of operators on their arguments, which lie end to end; the median of an even number is rounded down."""
    first = _offsets(arity)
    group = np.repeat(np.arange(len(arity)), arity)
    ordered = np.sort(group * NUM_CLASSES + arguments) % NUM_CLASSES
    median = (ordered[first + (arity - 1) // 2] + ordered[first + arity // 2]) // 2
    total = np.add.reduceat(arguments, first) % NUM_CLASSES
    return np.choose(operator, [ordered[first], ordered[first + arity - 1], median, total])


def generate(rng: np.random.Generator, settings: Settings, rows: int) -> Columns:
    """The first ``rows`` expressions within the limits.

    Returns:
        tokens (rows, padded) uint8, lengths (rows,) int32, labels (rows,) uint8.

    Raises:
        ValueError: If next to none is.
    """
    parts: list[Columns] = []
    missing, fruitless = rows, 0
    while missing:
        levels = grow(rng, settings, CANDIDATES)
        levels = [Level(tree[tree < missing], arity[tree < missing]) for tree, arity in levels]
        kept = len(levels[0].tree)
        fruitless = 0 if kept else fruitless + 1
        if fruitless == FRUITLESS:
            raise ValueError(
                f"of {FRUITLESS * CANDIDATES} expressions none was within {settings}; expected wider limits"
            )
        if kept:
            parts.append(fill(rng, levels, settings.padded))
            missing -= kept
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def build_block(block: Block) -> Columns:
    """Examples of one block: tokens (rows, padded), lengths (rows,), labels (rows,)."""
    return generate(_rng(block.seed, block.number), block.settings, block.rows)


def build_replacement(settings: Settings, seed: int, row: int, attempt: int) -> Columns:
    """One more example, for a row that repeats an earlier one."""
    return generate(_rng(seed, row, attempt), settings, 1)


def _rng(seed: int, *key: int) -> np.random.Generator:
    # Named, so that the examples do not move with the default generator of numpy.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def build_file_block(block: FileBlock) -> Columns:
    """Examples of consecutive lines: tokens (rows, padded), lengths (rows,), labels (rows,).

    Raises:
        ValueError: For a line that is no example, with its number; and if the file has changed.
    """
    require_unchanged(block.path, block.stamp)
    padded = SETTINGS["full"].padded
    tokens = np.zeros((block.rows, padded), dtype=np.uint8)
    lengths = np.zeros(block.rows, dtype=np.int32)
    labels = np.zeros(block.rows, dtype=np.uint8)
    with block.path.open("rb") as file:
        file.seek(block.offset)
        for row in range(block.rows):
            where = f"{block.path}, line {block.line + row}"
            fields = file.readline().decode("ascii", errors="replace").rstrip("\r\n").split("\t")
            if len(fields) != len(block.columns):
                raise ValueError(f"{where}: {len(fields)} fields; expected {len(block.columns)} separated by tabs")
            example = dict(zip(block.columns, fields, strict=True))
            symbols = example["Source"].replace("(", " ").replace(")", " ").split()
            if not 0 < len(symbols) <= padded:
                raise ValueError(f"{where}: {len(symbols)} symbols; expected 1 to {padded}")
            try:
                tokens[row, : len(symbols)] = [_TOKENS[symbol] for symbol in symbols]
            except KeyError as error:
                raise ValueError(f"{where}: symbol {error}; expected one of {' '.join(SYMBOLS)}") from None
            if example["Target"] not in SYMBOLS[:NUM_CLASSES]:
                raise ValueError(f"{where}: Target is {example['Target']!r}; expected a digit")
            lengths[row], labels[row] = len(symbols), int(example["Target"])
    return {"tokens": tokens, "lengths": lengths, "labels": labels}


def _file_blocks(path: Path) -> list[FileBlock]:
    """Where the blocks of a file start."""
    stamp = stamp_of(path)
    blocks: list[FileBlock] = []
    with path.open("rb") as file:
        header = file.readline()
        columns = tuple(header.decode("ascii", errors="replace").rstrip("\r\n").split("\t"))
        if not {"Source", "Target"} <= set(columns):
            raise ValueError(
                f"{path} starts with {header[:80]!r}; expected the column names Source and Target, a tab between"
            )
        offset = len(header)
        for row, line in enumerate(file):
            if row % BLOCK == 0:
                blocks.append(FileBlock(path, stamp, columns, offset, line=row + 2, rows=0))
            blocks[-1] = blocks[-1]._replace(rows=row % BLOCK + 1)
            offset += len(line)
    if not blocks:
        raise ValueError(f"{path} holds no examples; expected one a line below the column names")
    return blocks


def split_in_order(examples: Sequence[int], columns: Columns) -> dict[str, Split]:
    """The first rows are train, then dev, then test."""
    ends = accumulate(examples, initial=0)
    rows = {name: np.arange(*span) for name, span in zip(SPLITS, pairwise(ends), strict=True)}
    return index_splits(columns["labels"], **rows)


def recipe(size: str, source: str | None, seed: int) -> Recipe:
    """Generated expressions, or the files Long Range Arena released.

    Args:
        size: "full" or "tiny".
        source: None to generate; at full size also a folder with basic_train.tsv, basic_val.tsv and basic_test.tsv.
        seed: Of the generator, 0 or more; files do not depend on it.

    Raises:
        ValueError: For an unknown size, a negative seed, and a source that is no such folder.
    """
    require_choice("size", size, SIZES)
    require_integer("seed", seed, least=0)
    settings = SETTINGS[size]
    if source is not None:
        if size != "full":
            raise ValueError(f"task listops takes no source at size {size!r}: it is generated; leave out {source!r}")
        return _file_recipe(existing_path(source, "listops", f"none, to generate it, or {FOLDER}"), settings)
    total = sum(settings.examples)
    starts = range(0, total, BLOCK)
    return Recipe(
        label="listops",
        source=f"generated with seed {seed}",
        arguments={"generator": 1, "seed": seed, "block": BLOCK, "candidates": CANDIDATES} | asdict(settings),
        length=settings.padded,
        vocab_size=VOCAB_SIZE,
        num_classes=NUM_CLASSES,
        blocks=[Block(settings, seed, start // BLOCK, min(BLOCK, total - start)) for start in starts],
        build=build_block,
        split=partial(split_in_order, settings.examples),
        distinct=partial(build_replacement, settings, seed),
    )


def _file_recipe(folder: Path, settings: Settings) -> Recipe:
    missing = [name for name in FILES.values() if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"source of task listops is {str(folder)!r}, without {', '.join(missing)}; expected {FOLDER}")
    blocks = {name: _file_blocks(folder / FILES[name]) for name in SPLITS}
    sha256 = {file: sha256_of(folder / file) for file in FILES.values()}
    return Recipe(
        label="listops (lra files)",
        source=describe_source("files of Long Range Arena", sha256),
        arguments={"sha256": sha256, "padded": settings.padded},
        length=settings.padded,
        vocab_size=VOCAB_SIZE,
        num_classes=NUM_CLASSES,
        blocks=[block for name in SPLITS for block in blocks[name]],
        build=build_file_block,
        split=partial(split_in_order, [sum(block.rows for block in blocks[name]) for name in SPLITS]),
    )


TASK = Task(
    name="listops",
    claim="The value of a nested list of operations: hierarchy over up to 2000 symbols.",
    sources=f"none: it is generated; at full size also {FOLDER}, as Long Range Arena released them",
    recipe=recipe,
    train={
        "full": TrainConfig(steps=50_000, batch_size=32, learning_rate=1e-4, warmup=1000, eval_every=500),
        "tiny": TrainConfig(steps=600, batch_size=32, learning_rate=1e-3, warmup=60, eval_every=100),
    },
)
