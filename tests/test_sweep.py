"""One worker of a sweep: what becomes of each run, what fails, and what is measured."""

import re

import pytest
import torch

from spectraformer import records
from spectraformer.files import DamagedError, only_process
from spectraformer.records import SHARED, read_record
from spectraformer.sweep import ledger, worker
from spectraformer.sweep.claims import Claims, Vacancy
from spectraformer.sweep.ledger import FAILURE, Entry, read_failure
from spectraformer.sweep.worker import DEATHS, BrokenDeviceError, Worker
from spectraformer.train import train
from sweep_runs import CPU, entries_of, table, tiny, written

pytest_plugins = ["sweep_fixtures"]


def test_runs_are_trained_in_order_once(data, dataset, runs):
    plan = [tiny("softmax"), tiny("posrf-orf"), tiny("softmax", seed=1)]
    entries = entries_of(plan, dataset, data, runs)
    Worker(Claims(runs), CPU, shared=False).work(entries)
    found = written(runs)
    assert sorted(found, key=found.__getitem__) == [entry.name for entry in entries]
    assert all(read_record(entry.path).content["steps_per_second"] > 0 for entry in entries)
    assert not list((runs / ".claims").iterdir())
    # Runs are added in front, and what is done stays.
    more = entries_of([tiny("oprf-orf"), *plan], dataset, data, runs)
    Worker(Claims(runs), CPU, shared=False).work(more)
    again = written(runs)
    assert {name: again[name] for name in found} == found and len(again) == 4


def test_a_failure_is_kept_and_stops_nothing_until_it_is_tried_again(data, dataset, runs, monkeypatch):
    entries = entries_of([tiny(), tiny("softmax"), tiny("nystrom")], dataset, data, runs)

    def failing(run, *arguments, **more):
        if run.attention.name == "posrf-orf":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if run.attention.name == "softmax":
            raise KeyError("a mistake")
        return train(run, *arguments, **more)

    monkeypatch.setattr(worker, "train", failing)
    Worker(Claims(runs), CPU, shared=False).work(entries)
    assert [(entry.done, entry.failed) for entry in entries] == [(False, True), (False, True), (True, False)]
    memory, mistake = read_failure(entries[0]), read_failure(entries[1])
    assert memory.reason.startswith("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB; a smaller")
    assert mistake.reason == "KeyError: 'a mistake'"
    assert "in failing" in mistake.trace and 'raise KeyError("a mistake")' in mistake.trace

    # Nobody tries them again unasked.
    before = (entries[0].path / FAILURE).stat().st_mtime_ns
    Worker(Claims(runs), CPU, shared=False).work(entries)
    assert (entries[0].path / FAILURE).stat().st_mtime_ns == before
    monkeypatch.setattr(worker, "train", train)
    assert ledger.retry(entries) == 2
    Worker(Claims(runs), CPU, shared=False).work(entries)
    assert all(entry.done and not entry.failed for entry in entries)
    assert not list(runs.glob(f"*/{FAILURE}"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory; a smaller train.batch_size"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory: .*tried;",
        ),
        (ValueError("text is out of memory of men\nand more"), "text is out of memory of men$"),
        (
            RuntimeError("CUDA error: unspecified launch failure"),
            "RuntimeError: CUDA error: unspecified launch failure$",
        ),
        (AssertionError(), "AssertionError$"),
    ],
)
def test_a_reason_is_one_line(error, words):
    assert re.match(words, ledger.reason(error))


def test_a_changed_failure_is_not_believed(data, dataset, runs, monkeypatch):
    (entry,) = entries_of([tiny()], dataset, data, runs)
    ledger.write_failure(entry, "reasons", "host", "cpu")
    path = entry.path / FAILURE
    path.write_text(path.read_text().replace("reasons", "excuses"))
    with pytest.raises(DamagedError, match="was changed after it was written"):
        read_failure(entry)


def test_loss_that_is_not_finite_fails_the_run_with_its_reason(data, dataset, runs):
    entries = entries_of([tiny(learning_rate=1e30), tiny("softmax")], dataset, data, runs)
    Worker(Claims(runs), CPU, shared=False).work(entries)
    assert "is not finite at step" in read_failure(entries[0]).reason and entries[1].done


def test_data_that_changed_since_the_plan_fails_the_run(data, dataset, runs):
    (entry,) = entries_of([tiny()], dataset, data, runs)
    entry = Entry.of_json({**entry.as_json(), "sha256": "another"})
    Worker(Claims(runs), CPU, shared=False).work([entry])
    assert "changed since the sweep began" in read_failure(entry).reason


def test_a_run_that_kills_its_processes_is_given_up(data, dataset, runs):
    (entry,) = entries_of([tiny()], dataset, data, runs)
    hands = Worker(Claims(runs), CPU, shared=False)
    assert hands.perform(entry, Vacancy(DEATHS, DEATHS)) == "failed"
    assert f"{DEATHS} processes died at it" in read_failure(entry).reason
    ledger.retry([entry])
    hands.work([entry])
    assert entry.done, "tried again, it has all its tries"


def test_what_was_finished_meanwhile_is_not_repeated(data, dataset, runs, monkeypatch):
    (entry,) = entries_of([tiny()], dataset, data, runs)
    ours = Claims(runs)
    vacancy = ours.vacancy(entry.name, entry.step)
    Worker(Claims(runs), CPU, shared=False).work([entry])
    monkeypatch.setattr(worker, "train", None)
    assert Worker(ours, CPU, shared=False).perform(entry, vacancy) == "done"
    assert not ours.living() and not (entry.path / FAILURE).exists()


def test_a_run_that_the_train_command_works_on_is_left_to_it(data, dataset, runs):
    (entry,) = entries_of([tiny()], dataset, data, runs)
    hands = Worker(Claims(runs), CPU, shared=False)
    entry.path.mkdir(parents=True)
    with only_process(entry.path):
        assert hands.perform(entry, Vacancy(0, 0)) == "held"
    assert not entry.failed and not entry.done
    hands.work([entry])
    assert entry.done


def test_who_lost_the_run_stops_and_writes_nothing_more(data, dataset, runs, monkeypatch):
    (entry,) = entries_of([tiny()], dataset, data, runs)
    claims = Claims(runs)

    class Overtaken(worker._Attentive):
        def evaluated(self, row):
            self.claim.path.unlink()
            self.claim.beat()
            super().evaluated(row)

    monkeypatch.setattr(worker, "_Attentive", Overtaken)
    assert Worker(claims, CPU, shared=False).perform(entry, Vacancy(0, 0)) == "held"
    assert not entry.done and not entry.failed and entry.step == 0


def test_a_broken_device_ends_the_process_after_the_failure_is_kept(data, dataset, runs, monkeypatch):
    (entry,) = entries_of([tiny()], dataset, data, runs)
    hands = Worker(Claims(runs), CPU, shared=False)

    def crash(*arguments, **more):
        hands.device = torch.device("cuda")  # from now on: no test here has one
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore words")

    def refuse(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(worker, "train", crash)
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    with pytest.raises(BrokenDeviceError, match="cannot be used by this process any more"):
        hands.work([entry])
    assert read_failure(entry).reason == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert not Claims(runs).living()


# -- times and memory --------------------------------------------------------------------------------------


def measured(entry):
    content = read_record(entry.path).content
    values = [content[name] for name in records.MEASURED] + [row["seconds"] for row in content["history"]]
    assert len({value is None for value in values}) == 1, "all or none"
    return values[0] is not None


def test_runs_that_share_a_device_carry_no_time_and_no_memory(data, dataset, runs, tmp_path):
    (entry,) = entries_of([tiny()], dataset, data, runs)
    (alone,) = entries_of([tiny()], dataset, data, tmp_path / "alone")
    Worker(Claims(runs), CPU, shared=True).work([entry])
    Worker(Claims(alone.path.parent), CPU, shared=False).work([alone])
    assert not measured(entry) and measured(alone)
    assert table(runs) == table(alone.path.parent)


def test_two_sweeps_on_one_device_notice(data, dataset, runs, monkeypatch):
    mine, other = entries_of([tiny(), tiny("softmax")], dataset, data, runs)
    hands = Worker(Claims(runs), CPU, shared=False)
    with Claims(runs).hold(other.name, Vacancy(0, 0), 0, hands.identity):
        hands.work([mine])
    assert (other.path / SHARED).exists() and not measured(mine)
    third, fourth = entries_of([tiny(seed=1), tiny("softmax", seed=1)], dataset, data, runs)
    with Claims(runs).hold(fourth.name, Vacancy(0, 0), 0, "another device"):
        hands.work([third])
    assert not (fourth.path / SHARED).exists() and measured(third)


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_that_began_shared_stays_untimed_unless_it_begins_anew(data, dataset, runs, monkeypatch, saved):
    (entry,) = entries_of([tiny()], dataset, data, runs)

    class Stopping(worker._Attentive):
        def stepped(self, step, loss):
            if step == (5 if saved else 2):
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worker, "_Attentive", Stopping)
        with pytest.raises(KeyboardInterrupt):
            Worker(Claims(runs), CPU, shared=True).work([entry])
    assert entry.step == (3 if saved else 0)
    Worker(Claims(runs), CPU, shared=False).work([entry])
    assert measured(entry) == (not saved)
