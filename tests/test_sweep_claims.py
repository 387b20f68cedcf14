"""Who works on a run: one process, whoever else wants to, until it ends, dies or falls silent."""

import os
import signal
from collections import Counter
from types import SimpleNamespace

import pytest

from spectraformer.sweep import claims as claims_module
from spectraformer.sweep.claims import ClaimLostError, Claims, Vacancy

RUN = "listops.oprf-orf.seed0.0123456789ab"


def started(count, work):
    """Forked processes; the exit status of each is what its work returns, 99 if it raised."""
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            status = 99
            try:
                status = work(number)
            finally:
                os._exit(status)
        children.append(child)
    return children


def ended(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def a_dead_claim(runs, step=0):
    """Made by a process that is gone."""

    def work(_):
        claims = Claims(runs)
        return int(claims.take(RUN, claims.vacancy(RUN, step), step, "here") is not None)

    assert ended(started(1, work)) == [1]


def test_a_run_is_held_by_one(tmp_path):
    ours, theirs = Claims(tmp_path), Claims(tmp_path)
    assert theirs.vacancy(RUN, 0) == Vacancy(0, 0)
    with ours.hold(RUN, Vacancy(0, 0), 0, "here") as claim:
        assert claim is not None
        assert theirs.vacancy(RUN, 0) is None and theirs.take(RUN, Vacancy(0, 0), 0, "there") is None
        assert theirs.living()[RUN].device == "here"
        assert theirs.vacancy(RUN.replace("seed0", "seed1"), 0) is not None, "other runs are free"
    assert theirs.vacancy(RUN, 0) == Vacancy(1, 0) and not theirs.living()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_claim_at_once_one_wins(tmp_path, stale):
    """All look before the first claims, and live until the last has tried."""
    for trial in range(10):
        runs = tmp_path / f"{trial}"
        if stale:
            a_dead_claim(runs)
        (ready, is_ready), (told, go), (tried, has_tried), (over, end) = (os.pipe() for _ in range(4))

        def race(_, runs=runs, pipes=(is_ready, told, go, has_tried, over, end)):
            is_ready, told, go, has_tried, over, end = pipes
            os.close(go)
            os.close(end)
            claims = Claims(runs)
            vacancy = claims.vacancy(RUN, 0)
            os.write(is_ready, b".")
            os.read(told, 1)
            won = claims.take(RUN, vacancy, 0, "") is not None
            os.write(has_tried, b".")
            os.read(over, 1)
            return int(won)

        children = started(6, race)
        for pipe, release in ((ready, go), (tried, end)):
            for _ in range(6):
                assert os.read(pipe, 1)
            os.close(release)
        assert Counter(ended(children)) == {0: 5, 1: 1}


def test_a_takeover_seen_too_late_takes_nothing(tmp_path):
    """An observer that fell asleep finds the run taken over, worked on and let go of by others meanwhile."""
    sleeper, others = Claims(tmp_path), Claims(tmp_path)
    a_dead_claim(tmp_path)
    vacancy = sleeper.vacancy(RUN, 0)
    with others.hold(RUN, others.vacancy(RUN, 0), 0, ""):
        pass
    second = others.take(RUN, others.vacancy(RUN, 0), 0, "")
    assert second is not None and sleeper.take(RUN, vacancy, 0, "") is None
    second.check()
    assert others.vacancy(RUN, 0) is None
    second.release()


def test_a_dead_process_is_seen_at_once_even_if_nobody_waited_for_it(tmp_path):
    child = os.fork()
    if child == 0:
        Claims(tmp_path).take(RUN, Vacancy(0, 0), 0, "")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert Claims(tmp_path).vacancy(RUN, 0) == Vacancy(1, 1)
    os.waitpid(child, 0)
    assert Claims(tmp_path).vacancy(RUN, 0) == Vacancy(1, 1)


def test_deaths_count_until_the_run_gets_further(tmp_path):
    for deaths in range(3):
        assert Claims(tmp_path).vacancy(RUN, 5) == Vacancy(deaths, deaths)
        a_dead_claim(tmp_path, step=5)
    assert Claims(tmp_path).vacancy(RUN, 6) == Vacancy(3, 0)
    with (ours := Claims(tmp_path)).hold(RUN, ours.vacancy(RUN, 5), 5, ""):
        pass
    assert ours.vacancy(RUN, 5) == Vacancy(4, 0), "letting go is no death"


def test_another_machine_is_dead_when_its_heart_stops(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(claims_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    far, near = Claims(tmp_path), Claims(tmp_path)
    far.machine = "elsewhere"
    claim = far.take(RUN, Vacancy(0, 0), 0, "")
    for _ in range(5):
        now[0] += claims_module.STALE_SECONDS * 0.9
        claim.step += 1
        claim.beat()
        assert near.vacancy(RUN, 0) is None
    assert near.living()[RUN].step == 5 and near.living()[RUN].host == "elsewhere"
    now[0] += claims_module.STALE_SECONDS + 1
    assert Claims(tmp_path).vacancy(RUN, 0) is None, "who has only just come knows nothing"
    vacancy = near.vacancy(RUN, 0)
    assert vacancy == Vacancy(1, 1)
    mine = near.take(RUN, vacancy, 0, "")
    assert mine is not None
    # The other machine was only asleep.
    with pytest.raises(ClaimLostError, match="took over"):
        claim.check()
    claim.release()
    mine.check()
    assert near.living().keys() == {RUN}, "letting go of what was lost changes nothing"
    mine.release()


def test_a_claim_that_was_never_filled_is_no_hindrance(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(claims_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    claims = Claims(tmp_path)
    claims.folder.mkdir(parents=True)
    (claims.folder / f"{RUN}.000000").touch()
    assert claims.vacancy(RUN, 0) is None, "it may be filled at any moment"
    now[0] += claims_module.BEAT_SECONDS + 1
    assert claims.vacancy(RUN, 0) == Vacancy(1, 1)
