"""The command line: data, train, sweep, eval, report, list, check, bench."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.table import Table as Grid
from tyro.conf import Positional, arg

from spectraformer import distributed, inspection
from spectraformer.bench.command import bench
from spectraformer.checks import require_choice, require_integer
from spectraformer.evaluation import evaluate, load_model, resolve_device
from spectraformer.files import MANIFEST, require_folder
from spectraformer.interruption import Interrupted
from spectraformer.nonfinite import NonFiniteError
from spectraformer.plan import parse_setting, plan_runs
from spectraformer.report import write_report
from spectraformer.sweep.command import sweep
from spectraformer.tasks import SIZES, TASKS, Loader, prepared_path
from spectraformer.terminal import (
    ERRORS,
    OUT,
    Data,
    Device,
    Runs,
    Size,
    choice,
    found_records,
    number,
    prepare_with_progress,
    prepared_task,
    say,
)
from spectraformer.train import train as train_run
from spectraformer.watch import Curves, Screen, Together

DESCRIPTION = """Train and compare linear-time attentions on the Long Range Arena.

To begin: spectraformer train --task listops --size tiny --attention softmax oprf-orf
          spectraformer report runs
"""


def data(
    action: Positional[Literal["prepare", "show"]],
    task: Positional[str],
    /,
    size: Size = "full",
    source: Annotated[
        str | None, arg(metavar="PATH", help="what to make it from, see `list tasks`", help_behavior_hint="")
    ] = None,
    seed: Annotated[int, arg(metavar="N", help="of generators and held-out examples", help_behavior_hint="(0)")] = 0,
    data: Data = Path("data"),
    workers: Annotated[int | None, arg(metavar="N", help="processes", help_behavior_hint="(one a core)")] = None,
    overwrite: Annotated[bool, arg(help="replace data prepared from something else")] = False,
) -> None:
    """Prepare a task's data (interrupted, the same command goes on), or show what is prepared."""
    if action == "show":
        TASKS.lookup(task)
        require_choice("size", size, SIZES)
        show_data(data, task, size)
        return
    prepare_with_progress(task, data, size, source=source, seed=seed, workers=workers, overwrite=overwrite)
    show_data(data, task, size)


def show_data(data: Path, task: str, size: str) -> None:
    """What is prepared in a folder, after checking it."""
    dataset = prepared_task(data, task, size)
    manifest = dataset.manifest
    say(f"{prepared_path(data, task, size)}: {dataset.label}, from {manifest['source']}")
    say(
        f"{manifest['documents']:,} documents of up to {dataset.length} tokens below {dataset.vocab_size}, "
        f"{dataset.num_classes} classes"
    )
    grid = Grid("split", "examples", "majority class %", "examples of each class")
    for name, split in manifest["splits"].items():
        grid.add_row(
            name,
            f"{split['examples']:,}",
            f"{100 * dataset.majority(name):.2f}",
            " ".join(map(str, split["labels"])),
        )
    OUT.print(grid)


def train(
    task: Annotated[str | None, arg(metavar="NAME", help="see `list tasks`", help_behavior_hint="")] = None,
    attention: Annotated[
        tuple[str, ...],
        arg(
            metavar="NAME ...",
            help="see `list attentions`; several are trained in turn",
            help_behavior_hint="(oprf-orf)",
        ),
    ] = (),
    size: Size = "full",
    protocol: Annotated[
        str, choice("strict, or published: the paper's pooling and its text dev set", "strict")
    ] = "strict",
    seed: Annotated[
        int | None, arg(metavar="N", help="of weights, batch order and dropout", help_behavior_hint="(0)")
    ] = None,
    steps: Annotated[int | None, number("optimiser steps; warm-up scales with them")] = None,
    batch_size: Annotated[int | None, number("examples a step")] = None,
    learning_rate: Annotated[float | None, number("at its peak")] = None,
    num_features: Annotated[int | None, arg(metavar="N", help="random features m", help_behavior_hint="(128)")] = None,
    set: Annotated[
        tuple[str, ...],
        arg(
            metavar="NAME=VALUE",
            help="any other setting: model.depth=4 attention.options.center=true",
            help_behavior_hint="",
        ),
    ] = (),
    config: Annotated[
        Path | None, arg(metavar="FILE", help="all settings from a run.json, in place of --task", help_behavior_hint="")
    ] = None,
    device: Device = "auto",
    threads: Annotated[int | None, arg(metavar="N", help="CPU threads", help_behavior_hint="(torch's choice)")] = None,
    data: Data = Path("data"),
    runs: Runs = Path("runs"),
) -> None:
    """Train attentions on a task, test them, and record the results.

    Data that is missing is prepared first. An interrupted run goes on where it was; a finished one is not repeated.
    """
    given = {
        "train.seed": seed,
        "train.batch_size": batch_size,
        "train.learning_rate": learning_rate,
        "attention.num_features": num_features,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    changes |= dict(parse_setting(setting) for setting in set)
    plan = plan_runs(task, attention, size, protocol, steps, config, changes)
    resolve_device(device)
    if threads is not None:
        require_integer("threads", threads)
        torch.set_num_threads(threads)
    for run in plan:
        inspection.require_attention(run)
    require_folder("runs", runs)
    group = distributed.join()
    OUT.quiet = not group.is_first
    with group.first_alone():
        if not (prepared_path(data, plan[0].task, plan[0].size) / MANIFEST).exists():
            prepare_with_progress(plan[0].task, data, plan[0].size)
    dataset = prepared_task(data, plan[0].task, plan[0].size)
    grid = Grid("attention", "test %", "dev %", "majority %", "steps/s", "seconds", "run", title=dataset.label)
    for run in plan:
        screen = Screen(OUT)
        record = train_run(run, dataset, runs, device=device, watcher=Together(screen, Curves()))
        content = record.content
        timed = ((content["steps_per_second"], 1), (content["seconds"], 0))  # None of a run that shared its device
        say(f"{run.attention.name}: test accuracy {100 * content['accuracy']['test']:.2f} %, {record.path}")
        grid.add_row(
            run.attention.name,
            f"{100 * content['accuracy']['test']:.2f}",
            f"{100 * content['accuracy']['dev']:.2f}",
            f"{100 * content['data']['majority']['test']:.2f}",
            *("\N{EN DASH}" if x is None else f"{x:.{digits}f}" for x, digits in timed),
            content["key"],
        )
    OUT.print(grid)


def eval(
    runs: Positional[tuple[Path, ...]],
    /,
    split: Annotated[str, choice("dev or test", "test")] = "test",
    device: Device = "auto",
    data: Data = Path("data"),
) -> None:
    """Evaluate finished runs again from their saved weights, and compare with what they recorded."""
    require_choice("split", split, ("dev", "test"))
    place = resolve_device(device)
    found = found_records(runs)
    grid = Grid("run", "task", f"{split} %", "recorded %", "loss")
    for record in found:
        run = record.run
        dataset = prepared_task(data, run.task, run.size)
        model = load_model(record, dataset).to(place)
        chosen = "test" if run.protocol == "published" and "published_train" in dataset.splits else split
        loader = Loader(dataset, chosen, place)
        result = evaluate(model, loader, 2 * run.train.batch_size, run.train.precision)
        recorded = record.content["accuracy"][split]
        grid.add_row(
            record.path.name,
            record.content["task"],
            f"{100 * result.accuracy:.2f}",
            f"{100 * recorded:.2f}",
            f"{result.loss:.4f}",
        )
    OUT.print(grid)


def report(
    runs: Positional[tuple[Path, ...]],
    /,
    out: Annotated[
        Path, arg(metavar="FOLDER", help="for page, tables and plots", help_behavior_hint="(report)")
    ] = Path("report"),
    baseline: Annotated[str, arg(metavar="NAME", help="attention to compare with", help_behavior_hint="(softmax)")] = (
        "softmax"
    ),
    published: Annotated[
        Path | None,
        arg(metavar="FILE", help="published figures to stand beside", help_behavior_hint="(in $SPECTRAFORMER_DATA)"),
    ] = None,
    least_margin: Annotated[
        float | None,
        arg(metavar="POINTS", help="fail unless every run beats the majority class by so much", help_behavior_hint=""),
    ] = None,
) -> None:
    """Make tables, plots and one page from finished runs."""
    found = found_records(runs)
    paths = write_report(found, out, published=published, baseline=baseline)
    say(f"open {paths.page}; tables: {paths.markdown}, {paths.table}")
    if least_margin is None:
        return
    margins = {
        record.path.name: 100 * (record.content["accuracy"]["test"] - record.content["data"]["majority"]["test"])
        for record in found
    }
    worst = min(margins, key=margins.__getitem__)
    if margins[worst] < least_margin:
        raise ValueError(
            f"{worst} beats the majority class by {margins[worst]:.1f} points on the test set; "
            f"expected {least_margin:g} or more"
        )
    say(f"every run beats the majority class on the test set, by {margins[worst]:.1f} points or more")


def list_(
    what: Positional[Literal["attentions", "tasks", "runs"]] = "attentions",
    /,
    runs: Runs = Path("runs"),
) -> None:
    """List attentions, tasks or runs by name."""
    if what == "attentions":
        inspection.list_attentions(OUT)
    elif what == "tasks":
        inspection.list_tasks(OUT)
    else:
        inspection.list_runs(OUT, runs)


def check(what: Positional[tuple[str, ...]] = (), /) -> None:
    """Check this installation, or the variants, prepared data and runs named.

    A variant (oprf-orf) has its contract tested; a folder has every file compared with its sha256.
    """
    failed = inspection.check(OUT, what)
    if failed:
        raise ValueError(f"{failed} of {max(len(what), 1)} checks failed")


COMMANDS: dict[str, Callable[..., None]] = {
    "data": data,
    "train": train,
    "sweep": sweep,
    "eval": eval,
    "report": report,
    "list": list_,
    "check": check,
    "bench": bench,
}


def _terminate(number: int, frame: object) -> None:
    raise Interrupted(number)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, 1 if it failed, 2 if it was asked wrongly, 128 + n for signal n."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="spectraformer", description=DESCRIPTION, args=arguments)
    except Interrupted as stop:
        ERRORS.print("interrupted; the same command goes on where it was")
        return stop.exit_status
    except KeyboardInterrupt:
        ERRORS.print("interrupted; the same command goes on where it was")
        return 128 + signal.SIGINT
    except NonFiniteError as error:
        return _fail(error, 1)
    except ValueError as error:
        return _fail(error, 2)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""), 1)
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _fail(f"out of memory: {error}; a smaller --batch-size or a larger train.accumulate needs less", 1)
    except ImportError as error:
        return _fail(f"a package is missing or broken: {error}", 1)
    finally:
        distributed.leave()
        signal.signal(signal.SIGTERM, before)
    return 0


def _fail(error: Exception | str, status: int) -> int:
    ERRORS.print(f"error: {error}", soft_wrap=True, markup=False, highlight=False)
    return status


if __name__ == "__main__":
    sys.exit(main())
