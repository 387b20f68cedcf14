"""Tile shapes: their file, the search, and that nothing stays changed after it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from spectraformer.bench import timing, tune
from spectraformer.bench.tune import neighbours
from spectraformer.bench.workload import Workload
from spectraformer.ops.triton.configuration_file import (
    PASSES,
    Place,
    as_entry,
    configured,
    load_configurations,
    table_row,
)
from spectraformer.ops.triton.configurations import Configuration

WORKLOAD = Workload(16, 32, 2, 2, torch.float32, torch.device("cpu"), is_causal=False, backward=False)
PLACE = Place(16, 64, 128, "keys")
FOUND = Configuration(64, 128, 4, 2, 528, False)


def written(path, entries, **changes):
    content = {"kind": "tile configurations", "format": 1, "configurations": entries} | changes
    path.write_text(json.dumps(content))
    return path


def test_configurations_come_back(tmp_path):
    other = Place(32, 128, 256, "chunk_outputs")
    entries = [as_entry(PLACE, FOUND), as_entry(other, FOUND._replace(stages=1))]
    loaded = load_configurations(written(tmp_path / "x.json", entries))
    assert loaded == {PLACE: FOUND, other: FOUND._replace(stages=1)}
    assert set(PASSES) >= {"keys", "queries", "chunk_outputs"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits": 8}, "bits is 8; expected one of 16, 32"),
        ({"head_dim": 48}, "head_dim is 48; expected one of 32, 64"),
        ({"pass": "kyes"}, "pass is 'kyes'.*nearest: 'keys'"),
        ({"tokens": 48}, "tokens is 48; expected a power of two, nearest: 32"),
        ({"landmarks": 8}, "landmarks is 8"),
        ({"warps": 64}, "at most 32"),
        ({"stages": 0}, "stages is 0"),
        ({"programs": "many"}, "programs is 'many'"),
        ({"resident": 1}, "resident is 1"),
        ({"registers": 0}, "registers is 0"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_configuration_no_kernel_could_take_is_refused(tmp_path, changes, says):
    good = as_entry(PLACE, FOUND)
    path = written(tmp_path / "x.json", [good, good | {"pass": "queries"} | changes])
    with pytest.raises(ValueError, match=f"configuration 2: .*{says}"):
        load_configurations(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"kind": "recipe"}, "expected what `bench tune"),
        ({"format": 2}, "format 2"),
        ({"configurations": None}, "no list"),
        ({"configurations": [as_entry(PLACE, FOUND)] * 2}, "there already"),
        ({"configurations": [3]}, "it has 3"),
    ],
)
def test_another_file_of_configurations_is_refused(tmp_path, content, says):
    with pytest.raises(ValueError, match=says):
        load_configurations(written(tmp_path / "x.json", [], **content))


def test_a_configuration_is_in_use_inside_the_block_only():
    before = table_row(PLACE)["keys"]
    with configured(PLACE, FOUND):
        assert table_row(PLACE)["keys"] == FOUND != before
    assert table_row(PLACE)["keys"] == before


def test_neighbours_are_a_step_away_and_fit():
    start = Configuration(128, 64, 8, 3)
    found = neighbours(start, 128)
    assert start not in found and len(set(found)) == len(found) > 8
    assert all(x.landmarks <= 128 and x.tokens <= 256 and x.landmarks * x.tokens / x.warps <= 2048 for x in found)
    assert Configuration(64, 128, 8, 3) in found and Configuration(128, 64, 4, 3) in found


TUNE = """
import json, sys, torch
from pathlib import Path
from spectraformer.bench import tune
from spectraformer.ops.triton.configuration_file import Place, load_configurations, table_row
from spectraformer.ops.triton.configurations import Configuration
torch.set_num_threads(1)
out, said = Path(sys.argv[1]), []
row = table_row(Place(32, 32, 64, "queries"))
shipped = dict(row)
fast, unfit = row["queries"], Configuration(64, 24, 4, 1)
row["queries"] = slow = Configuration(16, 16, 2, 1)
tune.neighbours = lambda configuration, features: [fast, unfit] if configuration == slow else []
record = tune.run_tune([(16, 64)], torch.device("cpu"), passes=("queries",), dtype="float32", tokens=32, batch=1,
                       heads=1, rounds=3, out=out, say=said.append)
(found,) = record["measured"]
print(json.dumps({"found": found, "untouched": row == shipped | {"queries": slow}, "said": said[0],
                  "fast": fast._asdict(), "loaded": load_configurations(out) == {Place(32, 32, 64, "queries"): fast}}))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_tuning_finds_the_faster_tile_and_leaves_the_tables_alone(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", TUNE, str(tmp_path / "tiles.json")], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    found = result["found"]
    assert (found["pass"], found["work"], found["best"]) == ("queries", "forward", result["fast"])
    assert found["best_milliseconds"] < 0.9 * found["shipped_milliseconds"]
    unfit = [row for row in found["tried"] if row["milliseconds"] is None]
    assert (
        len(found["tried"]) == 3
        and len(unfit) == 1
        and unfit[0]["configuration"]["tokens"] == 24
        and unfit[0]["reason"]
    )
    assert result["loaded"] and result["untouched"] and "landmarks 16 -> 64" in result["said"]


def test_a_tile_that_computes_something_else_is_not_timed():
    given = [torch.ones(4, 4)]
    tune._require_same(given, given, WORKLOAD)
    for wrong in (1.001 * given[0], given[0] * float("nan")):
        with pytest.raises(timing.FailedError, match="differs from the shipped"):
            tune._require_same([wrong], given, WORKLOAD)
