"""A limit in seconds: counted over interruptions, and what ends with it."""

import json
from itertools import count

import pytest
import torch
from in_memory import federation

from peerlora.errors import Stopped
from peerlora.runs.events import CaughtUp, Evaluated, RoundDone, Warned
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime import trainer
from peerlora.runtime.peer.config_digest import section_hashes
from peerlora.runtime.simulate import resume, simulate
from peerlora.runtime.wall_clock import WallClock

pytestmark = pytest.mark.usefixtures("no_reports")

WORDS = ("bert", "train.rounds=8", "train.max_seconds=3", "eval.every=1")


class Now:
    """A clock that a test sets."""

    def __init__(self):
        self.moment = 100.0

    def __call__(self):
        return self.moment


def test_a_limit_is_noticed_once_and_counts_what_was_spent_before():
    now = Now()
    clock = WallClock(10.0, now)
    now.moment = 106.0
    assert not clock.look() and not clock.ended
    later = Now()
    again = WallClock(10.0, later)
    again.load_state_dict(json.loads(json.dumps(clock.state_dict())))
    later.moment = 103.9
    assert not again.look()
    later.moment = 104.0
    assert again.look() and again.ended and not again.look()
    third = WallClock(10.0, Now())
    third.load_state_dict(again.state_dict())
    assert third.ended
    assert again.describe(3, 8) == "train.max_seconds=10 have passed after 3 of 8 rounds: the run ends here"


def test_a_limit_is_told_as_it_was_given():
    assert "train.max_seconds=1234567.5 have" in WallClock(1234567.5, Now()).describe(3, 8)
    assert "train.max_seconds=60 have" in WallClock(60.0, Now()).describe(3, 8)


def test_without_a_limit_nothing_is_counted_or_kept():
    clock = WallClock(None, iter([0.0, 1e9, 2e9]).__next__)
    assert not clock.look() and clock.state_dict() == {}


@pytest.fixture
def second_per_look(monkeypatch):
    """Every look at the clock, of which a round takes one, takes a second; so does a checkpoint."""

    def clock(limit):
        ticks = count()
        return WallClock(limit, lambda: float(next(ticks)))

    monkeypatch.setattr(trainer, "WallClock", clock)


def test_the_run_ends_with_the_round_and_is_finished(config, tmp_path, second_per_look):
    result = simulate(config(*WORDS, "checkpoint.every=100"), tmp_path / "run")
    events = read_events(result.run)
    assert result.summary["rounds"] == 3 == len(select_events(events, RoundDone))
    assert "train.max_seconds=3 have passed after 3 of 8 rounds" in select_events(events, Warned)[-1].message
    found = [(each.round, each.final) for each in select_events(events, Evaluated)]
    assert found == [(0, False), (1, False), (2, False), (3, True)], "the last round is evaluated once"
    shorter = simulate(config("bert", "train.rounds=3"), tmp_path / "short")
    assert torch.equal(result.adapters.flat, shorter.adapters.flat)


def test_a_resumed_run_has_what_is_left(config, tmp_path, second_per_look):
    """Stopped after a round and its checkpoint, that is after two of three seconds."""
    with pytest.raises(Stopped):
        simulate(config(*WORDS), tmp_path / "run", stop=lambda: True)
    assert resume(tmp_path / "run").summary["rounds"] == 2


def test_one_that_is_killed_at_its_end_trains_no_more(config, tmp_path, second_per_look, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_tensors", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            simulate(config(*WORDS, "checkpoint.every=100"), tmp_path / "run")
    again = resume(tmp_path / "run")
    shorter = simulate(config("bert", "train.rounds=3"), tmp_path / "short")
    assert again.summary["rounds"] == 3 and torch.equal(again.adapters.flat, shorter.adapters.flat)
    warned = [each.message for each in select_events(read_events(again.run), Warned)]
    assert sum("max_seconds" in each for each in warned) == 1


def test_a_limit_that_is_not_reached_changes_nothing(config, tmp_path):
    one = simulate(config("bert", "train.max_seconds=1e6"), tmp_path / "limit")
    other = simulate(config("bert"), tmp_path / "none")
    assert torch.equal(one.adapters.flat, other.adapters.flat) and one.summary["rounds"] == 3


@pytest.mark.parametrize("method", ["dec-lora", "ad-psgd"])
def test_a_peer_that_ends_is_missed_and_makes_nobody_skip_rounds(config, tmp_path, monkeypatch, method):
    """The first peer to look ends after its first round, the others do all of theirs."""
    first = count()

    def clock(limit):
        ticks, speed = count(), 0.0 if next(first) else 100.0
        return WallClock(50.0, lambda: speed * next(ticks))

    monkeypatch.setattr(trainer, "WallClock", clock)
    words = ["train.rounds=4", "peer.deadline=120", "peer.join=120", "topology=complete", f"algorithm.name={method}"]
    results = federation(config("bert", *words), tmp_path)
    rounds = [result.summary["rounds"] for result in results]
    assert sorted(rounds) == [1, 4, 4, 4]
    early = rounds.index(1)
    for client, result in enumerate(results):
        events = read_events(result.run)
        assert not select_events(events, CaughtUp)
        if client != early and method == "dec-lora":
            later = select_events(events, RoundDone)[2:]
            assert all(str(early) in each.missed for each in later)
            assert all(set(each.missed) == {str(early)} for each in later), "the others go on with each other"


def test_sites_may_have_limits_of_their_own(config):
    one, other = config("bert"), config("bert", "train.max_seconds=60")
    assert section_hashes(one, ["a"]) == section_hashes(other, ["a"])
    assert section_hashes(one, ["a"]) != section_hashes(config("bert", "train.accumulate=2"), ["a"])
    assert section_hashes(one, ["a"]) != section_hashes(config("bert", "train.class_weights=balanced"), ["a"])
