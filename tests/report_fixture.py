"""Made-up results of runs, with the curves that such runs have."""

import math
from pathlib import Path
from random import Random

from spectraformer.config import AttentionConfig, Run, TrainConfig, digest, to_json
from spectraformer.records import FORMAT, Record

TASKS = {
    "listops": ("listops (tiny)", "generated from the grammar, seed 0", (2000, 500, 500), (0.172, 0.184)),
    "image": ("image (jpeg)", "CIFAR-10 through JPEG, in grey", (45_000, 5000, 10_000), (0.1, 0.1)),
    "text": ("text (tiny)", "IMDb reviews, first 512 bytes", (2000, 500, 500), (0.5, 0.5)),
    "retrieval": ("retrieval (imdb-film)", "pairs of IMDb reviews", (147_086, 18_090, 17_437), (0.5, 0.5)),
    "pathfinder": ("pathfinder", "generated, seed 0", (160_000, 20_000, 20_000), (0.5, 0.5)),
}
# The first two colours of drawings.
SERIES = {"light": ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)), "dark": ((0x56, 0xB4, 0xE9), (0xE6, 0x9F, 0x00))}
FULL = {"listops": "listops", "text": "text", "image": "image (jpeg)"}  # labels of the size "full"


def make_record(task, attention, seed=0, test=0.4, *, protocol="strict", steps=600, speed=12.5, **other):
    """The result of one run; a speed of None for one that shared its device.

    Keywords: size; options and num_features of the attention; device; parameters; memory and memory_kind; evaluations.
    """
    label, source, counts, majority = TASKS[task]
    size = other.get("size", "tiny")
    if size == "full":
        label = FULL.get(task, label)
    run = Run(
        task=task,
        size=size,
        protocol=protocol,
        attention=AttentionConfig(
            name=attention, options=other.get("options", {}), num_features=other.get("num_features", 128)
        ),
        train=TrainConfig(steps=steps, warmup=50, eval_every=100, seed=seed),
    )
    sha256 = digest([task, "data"])
    key = digest([to_json(run), sha256])
    content = {
        "format": FORMAT,
        "key": key,
        "run": to_json(run),
        "task": other.get("label", label),
        "attention": attention,
        "protocol": protocol,
        "data": {
            "sha256": sha256,
            "source": source,
            "counts": dict(zip(("train", "dev", "test"), counts, strict=True)),
            "majority": dict(zip(("dev", "test"), majority, strict=True)),
        },
        "accuracy": {"dev": round(test + 0.0125, 6), "test": test},
        "loss": {"train": 1.52, "dev": 1.58, "test": 1.6},
        "best_step": steps - 100,
        "steps": steps,
        "steps_per_second": speed,
        "seconds": None if speed is None else round(steps / speed, 3),
        "peak_memory_bytes": None if speed is None else other.get("memory", 500 * 2**20),
        "memory_kind": other.get("memory_kind", "process"),
        "parameters": other.get("parameters", 200_000),
        "sessions": 1,
        "history": history(test + 0.0125, majority[0], steps, speed, seed, other.get("evaluations", 24)),
        "versions": {"spectraformer": "0.1.0", "torch": "2.13.0", "python": "3.12.1"},
        "git_commit": None,
        "device": other.get("device", "CPU, made up, 2 threads"),
        "started": "2026-11-22T18:00:00+00:00",
        "finished": "2026-11-22T18:01:00+00:00",
    }
    return Record(Path("runs") / f"{task}-{size}.{attention}.seed{seed}.{key[:8]}", run, content)


def history(accuracy, majority, steps, speed, seed, evaluations):
    """Evaluations of a run that learns, with a wobble that depends on its seed."""
    points = []
    for i in range(1, evaluations + 1):
        step = steps * i // evaluations
        learned = 1 - math.exp(-4 * i / evaluations)
        wobble = 0.008 * math.sin(2.3 * i + 5 * seed + 40 * accuracy)
        points.append(
            {
                "step": step,
                "learning_rate": 1e-4 * (1 - i / (evaluations + 1)),
                "train_loss": 2.3 - 1.6 * accuracy * learned + wobble * 2,
                "dev_loss": 2.3 - 1.5 * accuracy * learned + wobble * 3,
                "dev_accuracy": majority + (accuracy - majority) * learned + wobble,
                "seconds": None if speed is None else step / speed,
            }
        )
    return points


def seven_records():
    """Two tasks: seeds, an option, a foreign device, a published row."""
    return [
        make_record("listops", "softmax", 0, 0.378, speed=8.0, memory=3 * 2**30, parameters=200_000),
        make_record("listops", "oprf-orf", 0, 0.366, memory=700 * 2**20, parameters=200_100),
        make_record("listops", "oprf-orf", 1, 0.372, memory=720 * 2**20, parameters=200_100),
        make_record("listops", "posrf-fastfoodl", 0, 0.184, speed=10.0, parameters=231_000, device="CPU, another"),
        make_record("image", "oprf-orf", 0, 0.3921, options={"center": True}, memory_kind="cuda", speed=123.4),
        make_record("image", "oprf-orf", 0, 0.3847, memory_kind="cuda", speed=130.0),
        make_record("image", "softmax", 0, 0.4102, protocol="published", speed=61.25),
    ]


def many_records():
    """More attentions than curves can be told apart, for looking at."""
    names = (
        *("softmax", "nystrom", "linformer", "skyformer", "posrf-mm", "posrf-orf", "oprf-orf"),
        *("oprf-fastfoodl", "gerf-orf", "trigrf-sorf", "saderf-qmc", "reformer"),
    )
    found = []
    for t, task in enumerate(TASKS):
        for i, name in enumerate(names):
            for seed in range(3):
                test = max(0.1, round(TASKS[task][3][1] + 0.14 - 0.011 * ((i * 5 + t) % 12) + 0.004 * seed, 4))
                more = {
                    "speed": 6.0 + 1.7 * i,
                    "memory": (300 + 170 * (12 - i)) * 2**20,
                    "parameters": 200_000 + 4000 * i,
                }
                found.append(make_record(task, name, seed, test, steps=5000, evaluations=50, **more))
                if task == "text" and i < 4:
                    found.append(make_record(task, name, seed, test + 0.03, steps=5000, protocol="published", **more))
    return found


PAPER = (
    *("softmax", "nystrom", "linformer", "informer", "reformer", "bigbird", "skyformer"),
    *(f"{f}-{w}" for f in ("posrf", "oprf", "saderf") for w in ("orf", "sorf", "qmc", "mm", "sgq", "fastfoodl")),
)


def paper_records(seeds=range(5), *, steps=10_000, evaluations=40):
    """A whole sweep, 25 attentions on 5 tasks: what the report has to be readable with."""
    found = []
    for task in ("listops", "text", "retrieval", "image", "pathfinder"):
        for i, name in enumerate(PAPER):
            random = Random(f"{task} {name}")
            centre = TASKS[task][3][1] + 0.22 + random.gauss(0, 0.015) - 0.002 * i
            unstable = name in ("posrf-sorf", "informer") and task in ("listops", "pathfinder")
            for seed in seeds:
                random = Random(f"{task} {name} {seed}")
                test = round(centre + random.gauss(0, 0.03 if unstable else 0.004), 4)
                speed = 1500 / (1 + 0.06 * i + random.random() / 50)
                memory = round((0.7 + 0.11 * i) * 2**30)
                found.append(
                    make_record(
                        *(task, name, seed, test),
                        size="full",
                        steps=steps,
                        speed=speed,
                        memory=memory,
                        memory_kind="cuda",
                        evaluations=evaluations,
                        device="NVIDIA H200",
                        parameters=200_000 + 1000 * i,
                    )
                )
    return found
