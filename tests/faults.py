"""Ways in which a file can be damaged, and what tells whether a folder changed."""

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path

from small_runs import recipe
from spectraformer.cli import main
from spectraformer.config import ModelConfig, TrainConfig
from spectraformer.tasks.base import Task


def truncated(path, chance, other):
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(1, len(content))])


def emptied(path, chance, other):
    path.write_bytes(b"")


def zeroed(path, chance, other):
    path.write_bytes(bytes(path.stat().st_size))


def bit_flipped(path, chance, other):
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(content))


def swapped(path, chance, other):
    """A valid file of the same name, from somewhere else."""
    assert other.read_bytes() != path.read_bytes(), "the other file must differ"
    shutil.copyfile(other, path)


def random_bytes(path, chance, other):
    path.write_bytes(chance.randbytes(path.stat().st_size))


class Bomb:
    """Makes a folder when unpickled: evidence that something did."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickled(path, chance, other):
    path.write_bytes(pickle.dumps(Bomb(path.with_name("unpickled"))))


def huge_header(path, chance, other):
    """A safetensors file whose header claims 2^60 bytes."""
    path.write_bytes((1 << 60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}')


def other_json(path, chance, other):
    path.write_text(json.dumps({"name": "something else", "files": [1, 2], "run": None, "version": 3}))


def not_a_number(path, chance, other):
    """NaN, which Python's json reads and which no hash is made of."""
    path.write_text('{"files": {}, "run": {}, "key": NaN, "sha256": 1e999, "step": NaN}')


def nested_json(path, chance, other):
    depth = chance.choice((900, 3000, 200_000))
    path.write_text('{"files": {}, "run": {}, "x": ' + "[" * depth + "]" * depth + "}")


def missing(path, chance, other):
    path.unlink()


def appended(path, chance, other):
    with path.open("ab") as file:
        file.write(chance.randbytes(chance.randrange(1, 100)))


def directory(path, chance, other):
    path.unlink()
    path.mkdir()


DAMAGES = {
    function.__name__: function
    for function in (
        truncated,
        emptied,
        zeroed,
        bit_flipped,
        swapped,
        random_bytes,
        pickled,
        huge_header,
        other_json,
        not_a_number,
        nested_json,
        missing,
        appended,
        directory,
    )
}
# Where chance has a say, more than one draw.
DRAWS = {"truncated": 3, "bit_flipped": 5}


def damages():
    """Every damage as often as it is drawn: its name, its function, and the chance it is to use."""
    return [
        (f"{name}-{draw}", function, random.Random(f"{name} {draw}"))
        for name, function in DAMAGES.items()
        for draw in range(DRAWS.get(name, 1))
    ]


def contents(folder):
    """Every file below a folder with its hash, every empty folder with None; locks aside, which hold nothing."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
        if path.name != ".lock" and (path.is_file() or not any(path.iterdir()))
    }


class FullDisk:
    """From the n-th write on, half of what is written arrives, and the system says that the disk is full.

    A write is what ends in a sync, or a call of ``Path.write_bytes``, ``Path.write_text``.
    """

    def __init__(self, patch, fatal=None):
        self.count, self.fatal = 0, fatal
        sync, write = os.fsync, Path.write_bytes

        def fsync(descriptor):
            self.happen()
            sync(descriptor)

        def write_bytes(path, content):
            if self.is_full():
                write(path, content[: len(content) // 2])
            self.happen()
            return write(path, content)

        def write_text(path, content, encoding="utf-8"):
            return write_bytes(path, content.encode(encoding))

        patch.setattr(os, "fsync", fsync)
        patch.setattr(Path, "write_bytes", write_bytes)
        patch.setattr(Path, "write_text", write_text)

    def is_full(self):
        return self.fatal is not None and self.count + 1 >= self.fatal

    def happen(self):
        full = self.is_full()
        self.count += 1
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def writes_of(monkeypatch, work):
    """How many writes work makes on a disk that has room."""
    with monkeypatch.context() as patch:
        disk = FullDisk(patch)
        work()
    return disk.count


TRAIN = ("train", "--task", "counting", "--size", "tiny", "--device", "cpu")


def make_recipe(size, source, seed):
    made = recipe(arguments={"blocks": 5, "size": size, "seed": seed})
    return replace(made, blocks=range(5 * seed, 5 * seed + 5))


def counting_task():
    """The task of small_runs, with a training that takes a moment."""
    train = TrainConfig(steps=24, batch_size=16, warmup=4, eval_every=6, learning_rate=3e-3)
    model = ModelConfig(width=16, hidden=16, classifier=16)
    return Task(
        name="counting",
        claim="which digit is most frequent",
        sources="nothing",
        recipe=make_recipe,
        train={"full": train, "tiny": train},
        model={"full": model, "tiny": model},
    )


def status_of(arguments):
    """The exit status; a wrong usage of the command line ends in SystemExit."""
    try:
        return main(list(arguments))
    except SystemExit as end:
        return end.code


def assert_refused(arguments, expected, capsys, tmp_path, status=2):
    """It fails with all of the expected texts in what it says, and every file is as before."""
    before = contents(tmp_path)
    capsys.readouterr()
    assert status_of(arguments) == status
    printed = capsys.readouterr()
    # What is wrong with the command line as such is shown in a box, whose lines are broken anywhere.
    said = " ".join(printed.err.replace("│", " ").split())
    for text in expected:
        assert text in said, said
    assert "Traceback" not in printed.out + printed.err
    assert contents(tmp_path) == before
    return printed
