"""A sweep killed at random, workers and drivers alike: nothing is lost or done twice, and the table is the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "sweep_kills.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find processes to kill")
def test_a_sweep_that_is_killed_again_and_again_ends_as_if_it_was_not(tmp_path):
    command = [sys.executable, SCRIPT, "--runs", "6", "--workers", "2", "--kills", "7", "--pause", "0.4"]
    result = subprocess.run(
        [*command, "--out", tmp_path / "found.json", "--keep", tmp_path / "sweeps"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["kills"] >= 7 and found["killed"]["driver"] >= 1
    wrong = {
        name: found[name] for name in ("lost", "duplicated", "unreadable", "half_written", "claims_left", "failures")
    }
    assert not any(wrong.values()), wrong
    assert found["table_identical"]
