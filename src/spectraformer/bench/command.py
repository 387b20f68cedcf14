"""The command ``spectraformer bench``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from spectraformer.bench.attention import Suite, failures_of_ours, run_attention_bench
from spectraformer.bench.competitors import COMPETITORS
from spectraformer.bench.plots import drawings
from spectraformer.bench.table import markdown, read_attention_record
from spectraformer.bench.tune import run_tune
from spectraformer.bench.workload import MODES
from spectraformer.checks import require_choice
from spectraformer.evaluation import resolve_device
from spectraformer.files import require_folder, write_atomically
from spectraformer.ops.triton.configuration_file import PASSES, load_configurations
from spectraformer.terminal import Device, choice, say

KINDS = {"bidirectional": (False,), "causal": (True,), "both": (False, True)}


def listed(metavar: str, help: str, default: str) -> Any:
    """An option of several values."""
    return arg(metavar=metavar, help=help, help_behavior_hint=f"({default})")


def bench(
    action: Positional[Literal["attention", "tune"]],
    /,
    shapes: Annotated[tuple[str, ...], listed("DxM ...", "head dim and features of each shape", "64x128")] = (
        "64x128",
    ),
    lengths: Annotated[
        tuple[int, ...], listed("N ...", "tokens; tune takes one", "512 to 8192 on a GPU, 256 to 2048 on a CPU")
    ] = (),
    modes: Annotated[tuple[str, ...], listed("NAME ...", "forward, forward+backward", "both")] = MODES,
    kind: Annotated[str, choice("bidirectional, causal or both", "bidirectional")] = "bidirectional",
    competitors: Annotated[tuple[str, ...], listed("NAME ...", ", ".join(COMPETITORS), "all")] = tuple(COMPETITORS),
    passes: Annotated[tuple[str, ...], listed("NAME ...", "tune: " + ", ".join(PASSES), "all")] = (),
    batch: Annotated[int, listed("N", "batch size", "8")] = 8,
    heads: Annotated[int, listed("N", "heads", "8")] = 8,
    dtype: Annotated[
        str | None, arg(metavar="NAME", help="bfloat16, float16 or float32", help_behavior_hint="(bfloat16 on a GPU)")
    ] = None,
    device: Device = "auto",
    rounds: Annotated[int, listed("N", "times each is timed", "10")] = 10,
    seconds: Annotated[float | None, listed("S", "for each length; tune: for all", "2; tune: 600")] = None,
    longest: Annotated[float, listed("S", "leave out what takes longer a call", "2")] = 2.0,
    out: Annotated[
        Path | None,
        arg(metavar="FILE", help="JSON file for the figures; drawings lie beside it", help_behavior_hint=""),
    ] = None,
    plot: Annotated[
        Path | None,
        arg(metavar="FILE", help="show and draw these figures again, measure nothing", help_behavior_hint=""),
    ] = None,
) -> None:
    """Measure attention against softmax and other packages, or search tile shapes for this GPU.

    docs/speed.md says what is measured and how to read it.
    """
    if plot is not None:
        if action != "attention":
            raise ValueError("--plot draws figures of `bench attention`; expected that action")
        record = read_attention_record(plot)
        say(markdown(record))
        draw(record, plot)
        return
    if out is not None:
        require_folder("the folder of --out", out.parent)
    place = resolve_device(device)
    on_gpu = place.type == "cuda"
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    pairs = tuple(parse_shape(shape) for shape in shapes)
    command = "spectraformer " + shlex.join(sys.argv[1:])
    if action == "tune":
        if len(lengths) > 1:
            raise ValueError(f"lengths are {', '.join(map(str, lengths))}; expected one: tune takes a single length")
        run_tune(
            pairs, place, passes=passes, dtype=dtype, tokens=lengths[0] if lengths else 8192, batch=batch, heads=heads,
            seconds=600.0 if seconds is None else seconds, rounds=rounds, out=out, say=say, command=command,
        )  # fmt: skip
        if out is not None:
            say(f"{len(load_configurations(out))} configurations faster than the shipped ones: {out}")
        return
    require_choice("kind", kind, tuple(KINDS))
    suite = Suite(
        shapes=pairs,
        lengths=lengths or ((512, 1024, 2048, 4096, 8192) if on_gpu else (256, 512, 1024, 2048)),
        modes=modes,
        causal=KINDS[kind],
        competitors=competitors,
        batch=batch,
        heads=heads,
        dtype=dtype,
    )
    record = run_attention_bench(
        [suite], place, rounds=rounds, seconds=2.0 if seconds is None else seconds, longest=longest, out=out, say=say,
        command=command,
    )  # fmt: skip
    say("")
    say(markdown(record))
    if out is not None:
        say(f"figures: {out}")
        draw(record, out)
    if failures := failures_of_ours(record):
        raise ValueError("this library failed: " + "; ".join(failures))


def draw(record: Mapping[str, Any], beside: Path) -> None:
    """Writes the drawings of a record as PNG and SVG beside a file, named after it."""
    made = drawings(record)
    if not made:
        say("nothing to draw: it takes times at two lengths or more")
    for drawing in made:
        for kind, content in (("png", drawing.png), ("svg", drawing.svg)):
            path = beside.with_name(f"{beside.stem}-{drawing.name}.{kind}")
            write_atomically(path, content)
            say(f"drawn: {path}")


def parse_shape(text: str) -> tuple[int, int]:
    """Head dim and features from a text such as "64x128".

    Raises:
        ValueError: For any other text.
    """
    parts = text.split("x")
    if len(parts) == 2 and all(part.isascii() and part.isdigit() for part in parts):
        return int(parts[0]), int(parts[1])
    raise ValueError(f"shape is {text!r}; expected head dim and features such as 64x128")
