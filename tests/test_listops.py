"""ListOps: the law of the generator, its labels, its order, and what is refused."""

from __future__ import annotations

import hashlib
import itertools
import pickle
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from scipy import stats

from spectraformer.tasks import listops
from spectraformer.tasks.base import Columns
from spectraformer.tasks.listops import BLOCK, OPERATORS, SETTINGS, TASK, Settings, build_block, decode, generate

LEAST_P = 1e-3
SMALL = Settings(padded=64, longer_than=10, shorter_than=50, max_depth=5, max_arguments=6)


class Expression(NamedTuple):
    """What a stack machine finds in a text."""

    value: int
    length: int
    depth: int  # of its deepest node; the root has depth 1
    operators: tuple[str, ...]
    arguments: tuple[int, ...]  # of each operator, in the order they close
    digits: str


def parse(text: str) -> Expression:
    """Reads an expression symbol by symbol; shares no code with the generator."""
    apply: dict[str, Callable[[list[int]], int]] = {
        "[MIN": min,
        "[MAX": max,
        "[MED": lambda values: int(statistics.median(values)),
        "[SM": lambda values: sum(values) % 10,
    }
    open_lists: list[tuple[str, list[int]]] = [("", [])]
    operators, arguments, digits, depth = [], [], [], 1
    symbols = text.split(" ")
    for symbol in symbols:
        if symbol in apply:
            open_lists.append((symbol, []))
            operators.append(symbol)
            depth = max(depth, len(open_lists))
        elif symbol == "]":
            operator, values = open_lists.pop()
            arguments.append(len(values))
            open_lists[-1][1].append(apply[operator](values))
        else:
            digits.append(symbol)
            open_lists[-1][1].append(int(symbol))
    ((_, (value,)),) = open_lists
    return Expression(value, len(symbols), depth, tuple(operators), tuple(arguments), "".join(digits))


def parse_all(columns: Columns) -> list[Expression]:
    return [parse(decode(tokens)) for tokens in columns["tokens"]]


def recursive(rng: random.Random, settings: Settings, depth: int = 1) -> list[str]:
    """The generator as its authors wrote it down: one node at a time."""
    if depth == settings.max_depth or rng.random() > settings.operator_probability:
        return [str(rng.randrange(10))]
    parts = [recursive(rng, settings, depth + 1) for _ in range(rng.randint(2, settings.max_arguments))]
    return [rng.choice(OPERATORS), *itertools.chain.from_iterable(parts), "]"]


def reference(settings: Settings, rows: int) -> list[Expression]:
    rng = random.Random(0)
    kept: list[Expression] = []
    while len(kept) < rows:
        symbols = recursive(rng, settings)
        if settings.longer_than < len(symbols) < settings.shorter_than:
            kept.append(parse(" ".join(symbols)))
    return kept


def two_sample_p(ours: list[int], theirs: list[int]) -> float:
    """p of a chi-square test that two samples have one law; values fewer than 20 of both are put together."""
    values, index = np.unique(ours + theirs, return_inverse=True)
    table = np.stack([np.bincount(part, minlength=len(values)) for part in (index[: len(ours)], index[len(ours) :])])
    rare = table.sum(0) < 20
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(1)]) if rare.any() else table
    return float(stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue)


def assert_same_law(ours: list[Expression], theirs: list[Expression]) -> None:
    many: list[Callable[[Expression], int]] = [lambda x: x.length, lambda x: len(x.operators)]
    few: list[Callable[[Expression], int]] = [
        lambda x: x.value,
        lambda x: x.depth,
        lambda x: x.arguments[-1],  # of the root
        lambda x: x.arguments[0],
        lambda x: OPERATORS.index(x.operators[0]),
    ]
    p = [float(stats.ks_2samp([*map(f, ours)], [*map(f, theirs)]).pvalue) for f in many]
    p += [two_sample_p([*map(f, ours)], [*map(f, theirs)]) for f in few]
    assert min(p) > LEAST_P, p


@pytest.fixture(scope="module")
def full() -> Columns:
    """Four blocks of the real thing."""
    blocks = [build_block(block) for block in TASK.recipe("full", None, 0).blocks[:4]]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


@pytest.fixture(scope="module")
def full_parsed(full: Columns) -> list[Expression]:
    return parse_all(full)


@pytest.fixture(scope="module")
def tiny() -> Columns:
    """All of the tiny size."""
    blocks = [build_block(block) for block in TASK.recipe("tiny", None, 0).blocks]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("[SM 9 9 9 ]", 7),
        ("[MED 1 2 ]", 1),
        ("[MED 9 3 8 4 ]", 6),
        ("[MED 5 0 9 ]", 5),
        ("[MIN 4 [MAX 2 3 ] 9 ]", 3),
    ],
)
def test_the_parser_of_these_tests_reads_hand_made_expressions(text: str, value: int) -> None:
    assert parse(text).value == value


def test_tokens_are_as_documented() -> None:
    assert decode([*range(1, 16), 0, 0]) == "0 1 2 3 4 5 6 7 8 9 [MIN [MAX [MED [SM ]"
    assert len(listops.SYMBOLS) == 15


def test_every_label_is_the_value_of_its_text(full: Columns, full_parsed: list[Expression], tiny: Columns) -> None:
    assert [x.value for x in full_parsed] == full["labels"].tolist()
    assert [x.value for x in parse_all(tiny)] == tiny["labels"].tolist()


def test_lengths_count_the_symbols_and_only_padding_follows(full: Columns, full_parsed: list[Expression]) -> None:
    assert [x.length for x in full_parsed] == full["lengths"].tolist()
    assert np.array_equal(full["tokens"] != 0, np.arange(2048) < full["lengths"][:, None])
    assert full["tokens"].shape == (4 * BLOCK, 2048)
    assert [full[name].dtype for name in ("tokens", "lengths", "labels")] == [np.uint8, np.int32, np.uint8]


def test_full_expressions_reach_their_limits_and_stay_inside(full_parsed: list[Expression]) -> None:
    lengths = np.array([x.length for x in full_parsed])
    assert 501 <= lengths.min() < 520 and 1980 < lengths.max() <= 1999
    assert max(x.depth for x in full_parsed) == 10
    counts = np.bincount(np.concatenate([x.arguments for x in full_parsed]))
    assert counts[:2].sum() == 0 and len(counts) == 11 and counts[2:].min() > 0.09 * counts.sum()


def test_tiny_expressions_stay_inside_their_limits(tiny: Columns) -> None:
    parsed = parse_all(tiny)
    assert {x.depth for x in parsed} == {3, 4}, "five digits in a list are too short to be kept"
    assert min(x.length for x in parsed) == 8 and max(x.length for x in parsed) <= 60
    assert set(itertools.chain.from_iterable(x.arguments for x in parsed)) == {2, 3, 4, 5}


def test_operators_and_digits_are_uniform(full_parsed: list[Expression]) -> None:
    operators = [sum(x.operators.count(operator) for x in full_parsed) for operator in OPERATORS]
    digits = [sum(x.digits.count(digit) for x in full_parsed) for digit in "0123456789"]
    assert stats.chisquare(operators).pvalue > LEAST_P, operators
    assert stats.chisquare(digits).pvalue > LEAST_P, digits


def test_the_majority_class_is_no_answer(full: Columns, tiny: Columns) -> None:
    shares = np.bincount(full["labels"], minlength=10) / len(full["labels"])
    assert set(np.argsort(shares)[-2:]) == {0, 9}, "MIN and MAX of many digits"
    assert 0.15 < shares.max() < 0.21 and shares.min() > 0.05
    assert np.bincount(tiny["labels"]).max() / len(tiny["labels"]) < 0.13


def test_shapes_have_exactly_the_law_of_the_recursion() -> None:
    """Against the probability of every shape there is, conditioned on the length."""
    settings = Settings(padded=16, longer_than=4, shorter_than=13, max_depth=3, max_arguments=3)

    def law(depth: int) -> dict[str, float]:
        shapes = {"d": 1.0 if depth == settings.max_depth else 1 - settings.operator_probability}
        if depth < settings.max_depth:
            for arguments in (2, 3):
                for parts in itertools.product(law(depth + 1).items(), repeat=arguments):
                    p = settings.operator_probability / 2 * float(np.prod([q for _, q in parts]))
                    shapes["(" + "".join(shape for shape, _ in parts) + ")"] = p
        return shapes

    kept = {shape: p for shape, p in law(1).items() if 4 < len(shape) < 13}
    assert len(kept) == 24
    columns = generate(np.random.default_rng(0), settings, 20_000)
    parts = np.array([*"?dddddddddd(((()"])  # what a token is to the shape
    drawn = ["".join(parts[tokens[tokens > 0]]) for tokens in columns["tokens"]]
    assert set(drawn) == set(kept)
    expected = np.array([*kept.values()]) * len(drawn) / sum(kept.values())
    assert stats.chisquare([drawn.count(shape) for shape in kept], expected).pvalue > LEAST_P


def test_small_expressions_have_the_law_of_the_recursion() -> None:
    assert_same_law(parse_all(generate(np.random.default_rng(1), SMALL, 8000)), reference(SMALL, 8000))


def test_full_expressions_have_the_law_of_the_recursion(full_parsed: list[Expression]) -> None:
    assert_same_law(full_parsed, reference(SETTINGS["full"], 2000))


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_a_block_is_the_same_whatever_was_built_before_it(size: str) -> None:
    recipe = TASK.recipe(size, None, 3)
    forward = [recipe.build(block) for block in recipe.blocks[:3]]
    for block, expected in reversed(list(zip(recipe.blocks, forward, strict=False))):
        again = recipe.build(pickle.loads(pickle.dumps(block)))
        assert all(np.array_equal(again[name], expected[name]) for name in expected)
    assert not np.array_equal(forward[0]["tokens"], forward[1]["tokens"])


def test_the_examples_of_a_seed_do_not_move_between_versions(tiny: Columns) -> None:
    assert decode(tiny["tokens"][0]) == "[MIN 9 3 6 [MIN [MED 3 6 ] 9 ] 6 ]"
    assert (
        hashlib.sha256(tiny["tokens"].tobytes()).hexdigest()
        == "310d26b57bd43b83e639cdb9cb029fbab93f591f1bb7074516cdc3a905883fc8"
    )


def test_seeds_rows_and_attempts_give_other_examples() -> None:
    settings = SETTINGS["tiny"]
    blocks = [build_block(listops.Block(settings, seed, number, 5)) for seed in (0, 1) for number in (0, 1)]
    distinct = TASK.recipe("tiny", None, 0).distinct
    assert distinct is not None
    single = [distinct(row, attempt) for row in (0, 1) for attempt in (1, 2)]
    assert all(column.shape[0] == 1 for columns in single for column in columns.values())
    texts = [decode(columns["tokens"][0]) for columns in blocks + single]
    assert len(set(texts)) == len(texts)
    assert [parse(decode(x["tokens"][0])).value for x in single] == [x["labels"][0] for x in single]


def test_examples_hardly_repeat_before_duplicates_are_refilled(full: Columns, tiny: Columns) -> None:
    assert len(np.unique(full["tokens"], axis=0)) == len(full["tokens"])
    assert len(np.unique(tiny["tokens"], axis=0)) > 0.999 * len(tiny["tokens"])


@pytest.mark.parametrize(("size", "examples"), [("full", (96_000, 2000, 2000)), ("tiny", (8000, 500, 500))])
def test_splits_are_consecutive_and_cover_everything(size: str, examples: tuple[int, ...]) -> None:
    recipe = TASK.recipe(size, None, 0)
    total = sum(block.rows for block in recipe.blocks)
    splits = recipe.split({"labels": np.arange(total) % 10})
    assert [len(splits[name].labels) for name in ("train", "dev", "test")] == list(examples)
    rows = np.concatenate([splits[name].rows[:, 0] for name in ("train", "dev", "test")])
    assert np.array_equal(rows, np.arange(total))
    assert all(np.array_equal(split.labels, split.rows[:, 0] % 10) for split in splits.values())


def test_arguments_tell_recipes_apart() -> None:
    recipes = [TASK.recipe(size, None, seed) for size in ("full", "tiny") for seed in (0, 1)]
    assert len({str(recipe.arguments) for recipe in recipes}) == 4
    assert {recipe.vocab_size for recipe in recipes} == {32}
    assert [recipe.length for recipe in recipes] == [2048, 2048, 64, 64]


# Files


def as_released(text: str) -> str:
    """The released form of an expression: "( a b )" pairs, nested to the left."""
    tree: list[list[str]] = [[]]
    for symbol in text.split(" "):
        if symbol.startswith("["):
            tree.append([symbol])
        elif symbol == "]":
            items = tree.pop()
            pair = items[0]
            for item in [*items[1:], symbol]:
                pair = f"( {pair} {item} )"
            tree[-1].append(pair)
        else:
            tree[-1].append(symbol)
    return tree[0][0]


def write_files(folder: Path, columns: Columns, counts: tuple[int, int, int]) -> None:
    start = 0
    for name, count in zip(("train", "val", "test"), counts, strict=True):
        lines = ["Source\tTarget"]
        for row in range(start, start + count):
            lines.append(f"{as_released(decode(columns['tokens'][row]))}\t{columns['labels'][row]}")
        (folder / f"basic_{name}.tsv").write_text("\r\n".join(lines) + "\r\n", newline="")
        start += count


def test_released_files_give_what_was_written(tmp_path: Path, tiny: Columns) -> None:
    counts = (BLOCK + 7, 3, 5)
    write_files(tmp_path, tiny, counts)
    assert "( ( (" in (tmp_path / "basic_train.tsv").read_text()
    recipe = TASK.recipe("full", str(tmp_path), 0)
    assert recipe.label == "listops (lra files)"
    blocks = [recipe.build(block) for block in recipe.blocks]
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    assert np.array_equal(columns["tokens"][:, :64], tiny["tokens"][: sum(counts)])
    assert not columns["tokens"][:, 64:].any()
    for name in ("lengths", "labels"):
        assert np.array_equal(columns[name], tiny[name][: sum(counts)])
    assert [len(split.labels) for split in recipe.split(columns).values()] == list(counts)


def test_changed_files_are_another_recipe(tmp_path: Path, tiny: Columns) -> None:
    write_files(tmp_path, tiny, (2, 2, 2))
    before = TASK.recipe("full", str(tmp_path), 0).arguments
    assert TASK.recipe("full", str(tmp_path), 1).arguments == before
    recipe = TASK.recipe("full", str(tmp_path), 0)
    path = tmp_path / "basic_val.tsv"
    path.write_bytes(path.read_bytes()[:-1])
    assert TASK.recipe("full", str(tmp_path), 0).arguments != before
    with pytest.raises(ValueError, match=r"basic_val\.tsv changed while it was being read"):
        recipe.build(recipe.blocks[1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[MIN 1 2 ] 1", r"line 3: 1 fields; expected 2"),
        ("[MIN 1 2 ]\t1\t1", r"line 3: 3 fields; expected 2"),
        ("[AVG 1 2 ]\t1", r"line 3: symbol '\[AVG'; expected one of 0 1"),
        ("[MIN 1 2 ]\t10", r"line 3: Target is '10'; expected a digit"),
        ("[MIN 1 2 ]\t", r"line 3: Target is ''"),
        ("\t1", r"line 3: 0 symbols; expected 1 to 2048"),
        ("[MIN " + "1 " * 2047 + "]\t1", r"line 3: 2049 symbols"),
        ("[MIN é 2 ]\t1", r"line 3: symbol"),
        ("", r"line 3: 1 fields"),
    ],
)
def test_lines_that_are_no_example_are_refused(tmp_path: Path, tiny: Columns, line: str, message: str) -> None:
    write_files(tmp_path, tiny, (1, 1, 1))
    with (tmp_path / "basic_train.tsv").open("a", encoding="utf-8", newline="") as file:
        file.write(line + "\n")
    recipe = TASK.recipe("full", str(tmp_path), 0)
    with pytest.raises(ValueError, match=message):
        recipe.build(recipe.blocks[0])


def test_files_without_names_or_examples_are_refused(tmp_path: Path, tiny: Columns) -> None:
    write_files(tmp_path, tiny, (1, 1, 1))
    path = tmp_path / "basic_test.tsv"
    path.write_text("Source\tTarget\n")
    with pytest.raises(ValueError, match=r"basic_test\.tsv holds no examples"):
        TASK.recipe("full", str(tmp_path), 0)
    path.write_text("[MIN 1 2 ]\t1\n")
    with pytest.raises(ValueError, match="expected the column names Source and Target"):
        TASK.recipe("full", str(tmp_path), 0)
    path.unlink()
    with pytest.raises(ValueError, match=r"without basic_test\.tsv; expected a folder with"):
        TASK.recipe("full", str(tmp_path), 0)


# Refusals


def test_unknown_sizes_seeds_and_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nearest: 'tiny'"):
        TASK.recipe("tinny", None, 0)
    with pytest.raises(ValueError, match="seed is -1; expected an integer of at least 0"):
        TASK.recipe("tiny", None, -1)
    with pytest.raises(ValueError, match="does not exist; expected none, to generate it, or a folder with basic_train"):
        TASK.recipe("full", str(tmp_path / "absent"), 0)
    with pytest.raises(ValueError, match="takes no source at size 'tiny': it is generated"):
        TASK.recipe("tiny", str(tmp_path), 0)


@pytest.mark.parametrize("tokens", [[1, 16], [-1], [[1, 2]], [1.5]])
def test_what_is_no_token_is_not_decoded(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        decode(tokens)


def test_limits_that_cannot_be_met_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected a length between the first two"):
        Settings(padded=64)
    with pytest.raises(ValueError, match="max_arguments is 1"):
        Settings(max_arguments=1)
    monkeypatch.setattr(listops, "FRUITLESS", 3)
    shallow = Settings(padded=64, longer_than=20, shorter_than=60, max_depth=2)
    with pytest.raises(ValueError, match="of 12288 expressions none was within"):
        generate(np.random.default_rng(0), shallow, 1)
