"""A sweep whose workers and driver are killed at random again and again, beside one that nobody disturbed.

    python benchmarks/sweep_kills.py --runs 200 --workers 4 --kills 300

Every kill is SIGKILL: mostly of one process of a driver, sometimes of the driver, sometimes of all at once. In the end
every run must be done exactly once, every file whole, and the table equal, byte for byte, but for columns that say how
long it took.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from spectraformer.config import AttentionConfig, ModelConfig, Run, TrainConfig

ATTENTIONS = ("softmax", "posrf-orf", "oprf-orf", "linformer")
# How it went, not what came of it.
TIMES = ("finished", "peak_memory_bytes", "seconds", "sessions", "started", "steps_per_second")
# Of so many kills one takes the driver, and of so many of these one takes all its processes with it.
DRIVER, ALL = 10, 3


def runs() -> list[Run]:
    """The sweep: runs of about a second."""
    return [
        Run(
            task="listops",
            size="tiny",
            attention=AttentionConfig(name=ATTENTIONS[number % len(ATTENTIONS)], num_features=16),
            model=ModelConfig(width=16, hidden=16, classifier=16),
            train=TrainConfig(steps=12, batch_size=16, warmup=2, eval_every=4, seed=number // len(ATTENTIONS)),
        )
        for number in range(int(os.environ.get("SWEEP_RUNS", "8")))
    ]


def drive(folder: Path, workers: int) -> None:
    """One driver: the command itself."""
    from spectraformer.sweep.command import sweep

    sweep(__file__, device="cpu", workers=workers, threads=1, data=folder.parent / "data", runs=folder)


def start(folder: Path, arguments: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, __file__, "--drive", str(folder), "--workers", str(arguments.workers)]
    environment = os.environ | {"SWEEP_RUNS": str(arguments.runs), "OMP_NUM_THREADS": "1"}
    log = folder.with_suffix(".log").open("a")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def descendants(pid: int) -> list[int]:
    """Processes below a process."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if fields[0] not in "XZ":
            parents[int(path.parent.name)] = int(fields[1])
    found = [pid]
    for above in found:
        found += [child for child, parent in parents.items() if parent == above]
    return found[1:]


def results(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*/result.json")}


def disturbed(folder: Path, arguments: argparse.Namespace) -> dict[str, int]:
    """Kills until enough were killed, then lets the sweep end; returns who was killed how often."""
    chance = random.Random(arguments.seed)
    killed = {"worker": 0, "driver": 0}
    seen: dict[Path, tuple[int, int]] = {}
    # The last tenth is left in peace, and a run of every worker: so many may end between two looks.
    troubled = max(1, min(0.9 * arguments.runs, arguments.runs - arguments.workers))
    driver = start(folder, arguments)
    try:
        while True:
            time.sleep(chance.uniform(0.0, arguments.pause))
            for path, found in (now := results(folder)).items():
                assert seen.setdefault(path, found) == found, f"{path} was written twice"
            assert not seen.keys() - now.keys(), "a result vanished"
            kills = killed["worker"] + killed["driver"]
            if kills >= arguments.kills or len(seen) == arguments.runs:
                break
            if driver.poll() is not None:
                raise SystemExit(f"the driver ended by itself: {folder.with_suffix('.log').read_text()[-2000:]}")
            # Kills go in step with what is done, so that each finds something to kill.
            if kills >= arguments.kills * (len(seen) + 1) / troubled:
                continue
            processes = descendants(driver.pid)
            if (kills + 1) % DRIVER != DRIVER // 2:
                if processes:
                    kill(chance.choice(processes))
                    killed["worker"] += 1
                continue
            driver.kill()
            killed["driver"] += 1
            if killed["driver"] % ALL == 0:
                for process in processes:
                    kill(process)
                    killed["worker"] += 1
            driver.wait()
            driver = start(folder, arguments)
        if driver.wait():
            raise SystemExit(f"the last driver failed: {folder.with_suffix('.log').read_text()[-2000:]}")
    finally:
        if driver.poll() is None:
            driver.terminate()
            driver.wait()
    for path, found in results(folder).items():
        assert seen.setdefault(path, found) == found, f"{path} was written twice"
    return killed


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def table(folder: Path) -> tuple[str, int]:
    """The report's table without times; and how many results cannot be read."""
    from spectraformer.records import find_records
    from spectraformer.report import write_report

    found, refused = find_records([folder])
    path = write_report(found, folder.with_name(f"{folder.name}-report")).table
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    file = io.StringIO()
    writer = csv.DictWriter(file, [name for name in rows[0] if name not in TIMES], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue(), len(refused)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--pause", type=float, default=1.0, help="most seconds between kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the figures are written")
    parser.add_argument("--keep", type=Path, help="a folder for both sweeps; otherwise they are removed")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(arguments.drive, arguments.workers)
        return
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="sweep-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        began = time.monotonic()
        assert start(folder / "whole", arguments).wait() == 0, (folder / "whole.log").read_text()[-2000:]
        undisturbed = time.monotonic() - began
        killed = disturbed(folder / "killed", arguments)
        (whole, _), (other, unreadable) = table(folder / "whole"), table(folder / "killed")
        done = len(results(folder / "killed"))
        found = {
            "runs": arguments.runs,
            "workers": arguments.workers,
            "killed": killed,
            "kills": killed["worker"] + killed["driver"],
            "lost": arguments.runs - done,
            "duplicated": done - len({line.split(",")[0] for line in other.splitlines()[1:]}),
            "unreadable": unreadable,
            "half_written": len(list((folder / "killed").rglob(".unfinished-*"))),
            "claims_left": len(list((folder / "killed" / ".claims").iterdir())),
            "failures": len(list((folder / "killed").glob("*/failure.json"))),
            "table_identical": whole == other,
            "seconds_undisturbed": round(undisturbed, 1),
            "seconds_disturbed": round(time.monotonic() - began - undisturbed, 1),
        }
        print(json.dumps(found, indent=1))
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
