"""Workers of a comparison that is stopped, or whose disk is full: what their trials have done stays."""

import errno
import re
from functools import partial
from pathlib import Path

import pytest

from peerlora.errors import RunError
from trial_pools import build_pool, finished, trials


@pytest.fixture
def pool_on(monkeypatch):
    return partial(build_pool, monkeypatch)


def stopped_after(count, pool, these, folder):
    """The trials that finish where a stop is asked for when so many have begun."""
    begun = []
    return [each.name for each in pool.run(these, folder, begun.append, lambda: len(begun) >= count)]


def test_trials_under_way_leave_their_checkpoints_when_a_comparison_is_stopped(pool_on, tmp_path):
    ray, pool, warned = pool_on(2)
    ray.long = {"cell-0"}
    assert stopped_after(2, pool, trials(3), tmp_path) == ["cell 1"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cell-0", "cell-1"]
    assert [each.name for each in (tmp_path / "cell-0").iterdir()] == ["run.json"]
    assert not ray.actors[0].alive and not warned
    ray.long, ray.jobs = set(), []
    assert finished(pool, trials(3), tmp_path) == ["cell 0", "cell 1", "cell 2"]
    assert [(job.run.name, list(job.files)) for job in ray.jobs][0] == ("cell-0", ["run.json"])


def test_a_worker_that_does_not_end_its_round_is_given_up_and_named(pool_on, tmp_path):
    ray, pool, warned = pool_on(2, timeout=0.2)
    ray.deaf, ray.long = {"cell-0"}, {"cell-1"}
    assert stopped_after(2, pool, trials(2), tmp_path) == []
    assert [each.name for each in tmp_path.iterdir()] == ["cell-1"] and not ray.living
    assert len(warned) == 1 and "the worker of cell 0 did not end its round within 0.2 s; resumed" in warned[0]


def test_a_worker_that_is_lost_while_it_stops_is_named(pool_on, tmp_path):
    ray, pool, warned = pool_on(2)
    ray.long = {"cell-0", "cell-1"}
    begun = []

    def stop():
        if len(begun) == 2:
            ray.actors[0].alive = False
        return len(begun) == 2

    assert list(pool.run(trials(2), tmp_path, begun.append, stop)) == []
    assert [each.name for each in tmp_path.iterdir()] == ["cell-1"]
    assert len(warned) == 1 and "the worker of cell 0 was lost" in warned[0] and "resumed" in warned[0]


def test_a_second_interrupt_ends_workers_at_once(pool_on, tmp_path, monkeypatch):
    ray, pool, _ = pool_on(2)
    ray.deaf = {"cell-0", "cell-1"}
    wait = ray.wait

    def interrupted(answers, **others):
        if any(each.asked for each in ray.actors):
            raise KeyboardInterrupt
        return wait(answers, **others)

    monkeypatch.setattr(ray, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stopped_after(2, pool, trials(2), tmp_path)
    assert not ray.living and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "what"), [(errno.ENOSPC, "no room left in {}"), (errno.EROFS, "{} cannot be written")]
)
@pytest.mark.parametrize("count", [2, 3])  # of two that have begun: it is stopped, or never
def test_results_that_cannot_be_written_are_one_message(pool_on, tmp_path, monkeypatch, number, what, count):
    ray, pool, _ = pool_on(2)
    ray.long = {"cell-0", "cell-1"} if count == 2 else set()

    def full(path, data):
        raise OSError(number, "as the system says")

    monkeypatch.setattr(Path, "write_bytes", full)
    said = f"^{re.escape(what.format(tmp_path))} .*go on: peerlora compare --resume {re.escape(str(tmp_path))}$"
    with pytest.raises(RunError, match=said):
        stopped_after(count, pool, trials(2), tmp_path)
    assert not list(tmp_path.iterdir())
    assert not [each for each in ray.actors if each.alive and each.asked]
