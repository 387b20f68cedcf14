"""A preparation stopped, killed, damaged or out of disk anywhere goes on to the same bytes and repeats no block."""

import os
import shutil
import signal

import pytest

import spectraformer
from faults import FullDisk, contents, damages, writes_of
from small_runs import build, prepared, recipe
from spectraformer.tasks.prepare import prepare

BLOCK_FILES = ("000000.block", "000002.block", "origin.json")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("prepared") / "counting"
    prepared(path)
    return contents(path)


class Counted:
    """A build that counts its blocks, and may end the process at one of them."""

    def __init__(self, fatal=None):
        self.built, self.fatal = [], fatal

    def __call__(self, number):
        if number == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.built.append(number)
        return build(number)


class StopError(Exception):
    pass


def prepare_at(path, build=build, progress=None):
    prepare(
        recipe(build=build),
        path,
        task="counting",
        size="tiny",
        version=spectraformer.__version__,
        workers=1,
        progress=progress,
    )


def stop_after(blocks):
    def progress(what, done, total):
        if done == blocks:
            raise StopError

    return progress


def interrupted_at(path, blocks=3):
    with pytest.raises(StopError):
        prepare_at(path, progress=stop_after(blocks))
    assert not path.exists()
    return path.with_name(f".blocks-{path.name}")


@pytest.mark.parametrize("file", BLOCK_FILES)
def test_damaged_blocks_are_built_again(undisturbed, tmp_path, file):
    foreign = interrupted_at(tmp_path / "foreign" / "counting")
    # Whole blocks, of the same preparation, but of another number.
    shutil.copyfile(foreign / "000001.block", foreign / "000000.block")
    shutil.copyfile(foreign / "000001.block", foreign / "000002.block")
    (foreign / "origin.json").write_text('{"arguments": {}, "label": "counting", "version": "0"}')
    for name, damage, chance in damages():
        path = tmp_path / name / "counting"
        blocks = interrupted_at(path)
        damage(blocks / file, chance, foreign / file)
        counted = Counted()
        prepare_at(path, counted)
        number = [int(file[:6])] if file != "origin.json" else [0, 1, 2]
        assert counted.built == [*number, 3, 4], name
        assert contents(path) == undisturbed, name
        assert sorted(x.name for x in path.parent.iterdir()) == ["counting"], "something is left"
        assert not list(tmp_path.rglob("unpickled"))


def test_a_preparation_stopped_after_any_block_goes_on(undisturbed, tmp_path):
    for blocks in range(6):
        path = tmp_path / f"{blocks}" / "counting"
        interrupted_at(path, blocks)
        counted = Counted()
        prepare_at(path, counted)
        assert counted.built == list(range(blocks, 5)), "a finished block was built again"
        assert contents(path) == undisturbed
        assert sorted(x.name for x in path.parent.iterdir()) == ["counting"]


def test_a_preparation_whose_version_changed_keeps_no_block(tmp_path):
    path = tmp_path / "counting"
    interrupted_at(path)
    counted = Counted()
    prepare(recipe(build=counted), path, task="counting", size="tiny", version="another", workers=1)
    assert counted.built == [0, 1, 2, 3, 4]


def ended_by(work):
    """The signal that ended a forked process; 0 if it got through."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to kill a child process")
def test_a_preparation_killed_anywhere_goes_on(undisturbed, tmp_path, monkeypatch):
    """kill -9 in every block, and before every sync, rename and removal after the last block."""

    def killed_at_event(path, fatal):
        count = 0

        def event(function):
            def called(*args, **kwargs):
                nonlocal count
                count += 1
                if count == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return called

        # In the forked process only: nothing to restore.
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (shutil, "rmtree")):
            setattr(owner, name, event(getattr(owner, name)))
        prepare_at(path)

    for number in range(5):
        path = tmp_path / f"block-{number}" / "counting"
        assert ended_by(lambda path=path, number=number: prepare_at(path, Counted(fatal=number))) == signal.SIGKILL
        assert not path.exists()
        counted = Counted()
        prepare_at(path, counted)
        assert counted.built == list(range(number, 5)) and contents(path) == undisturbed
    killed = 0
    for fatal in range(1, 80, 2):
        path = tmp_path / f"event-{fatal}" / "counting"
        if ended_by(lambda path=path, fatal=fatal: killed_at_event(path, fatal)) != signal.SIGKILL:
            break
        killed += 1
        if path.exists():
            assert contents(path) == undisturbed, "it appeared before it was whole"
        prepare_at(path)
        assert contents(path) == undisturbed
        assert sorted(x.name for x in path.parent.iterdir()) == ["counting"], f"left after a kill at event {fatal}"
    assert killed >= 15


def test_a_disk_full_while_preparing_harms_nothing(undisturbed, tmp_path, monkeypatch):
    total = writes_of(monkeypatch, lambda: prepare_at(tmp_path / "counted" / "counting"))
    for fatal in range(1, total + 1, 3):
        path = tmp_path / f"{fatal}" / "counting"
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
            FullDisk(patch, fatal)
            prepare_at(path)
        assert not list(path.parent.rglob(".unfinished-*"))
        if path.exists():
            assert contents(path) == undisturbed
        counted = Counted()
        prepare_at(path, counted)
        assert contents(path) == undisturbed and (fatal < 4 or len(counted.built) < 5)


def test_a_disk_full_while_replacing_data_keeps_the_old(undisturbed, tmp_path, monkeypatch):
    path = tmp_path / "counting"
    prepared(path, build=other_build)
    old = contents(path)
    total = writes_of(monkeypatch, lambda: prepare_at(tmp_path / "counted"))
    for fatal in (1, 2, total // 2, total - 1):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
            FullDisk(patch, fatal)
            prepare_at(path)
        assert contents(path) == old and sorted(x.name for x in tmp_path.iterdir())[1:] == ["counted", "counting"]
        shutil.rmtree(tmp_path / ".blocks-counting")
    prepare_at(path)
    assert contents(path) == undisturbed


def other_build(number):
    return build(number + 100)
