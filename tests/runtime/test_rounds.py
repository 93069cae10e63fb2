"""Synchronous rounds under the virtual clock: what waiting costs, and what happens to those who are not waited for."""

import numpy as np
import pytest
import torch
from toys import Quadratic, adapters, run, targets

from cases import others_slow
from peerlora import read_events
from peerlora.algorithms import build_algorithm
from peerlora.config.loading import parse_spec
from peerlora.errors import CompositionError, Stopped
from peerlora.exchange.schema import encoded_bytes
from peerlora.runs.events import Evaluated, RoundDone, RunStarted
from peerlora.runs.metrics import evaluated_within, select_events
from peerlora.runtime.compose import compose
from peerlora.runtime.simulate import resume, simulate
from peerlora.topology.schedule import build_topology
from peerlora.topology.weights import remove_links
from peerlora.tree import held

pytestmark = pytest.mark.usefixtures("no_reports")

DEC = build_algorithm("dec-lora", {})


def test_a_round_takes_as_long_as_its_slowest_client():
    b, size = targets(4), encoded_bytes(DEC.message(adapters(targets(1))))
    runner, _, _ = run(DEC, Quadratic(b, steps=5), 3, speed=[1, 2, 0.5, 4], step=0.1)
    assert runner.virtual_seconds == 3.0
    slow_link, _, _ = run(DEC, Quadratic(b, steps=5), 1, bandwidth=[1000, 1000, 1000, 100], delay=0.25)
    assert slow_link.virtual_seconds == pytest.approx(5 + 2 * size / 100 + 0.25, rel=1e-12)
    alone, _, _ = run(build_algorithm("local", {}), Quadratic(b, steps=5), 1, bandwidth=100.0, delay=0.25)
    assert alone.virtual_seconds == 5.0, "who sends nothing waits for no link"


@pytest.mark.parametrize("method", ["dfedavg", "fedprox", "dfedadmm", "k-gt", "dfedsam", "dfedadmm-sam", "fedspeed"])
def test_a_step_with_two_gradients_takes_twice_as_long(method):
    counted = Quadratic(targets(4), steps=5)
    runner, _, _ = run(build_algorithm(method, {}), counted, 1, step=0.1)
    twice = method in ("dfedsam", "dfedadmm-sam", "fedspeed")
    assert runner.virtual_seconds == pytest.approx(1.0 if twice else 0.5)


CLOCKS = [{}, {"speed": [1, 0.5, 0.1, 2], "delay": 1.0}, {"speed": 0.1, "deadline": 1e6}]


@pytest.mark.parametrize(("settings", "method"), list(zip(CLOCKS, ["adf-lora", "decaf", "rolora"], strict=True)))
def test_a_clock_that_waits_for_all_changes_no_bit(config, tmp_path, settings, method):
    words = [f"algorithm.name={method}", "topology.kind=random", "topology.p=0.6", "adapter.dropout=0.1"]
    plain = simulate(config("bert", *words), tmp_path / "plain")
    clock = [f"clock.{name}={value}" for name, value in settings.items()] or ["clock={}"]
    timed = simulate(config("bert", *words, *clock), tmp_path / "timed")
    assert torch.equal(plain.adapters.flat, timed.adapters.flat)
    ours, theirs = (select_events(read_events(each.run), RoundDone) for each in (timed, plain))
    assert [done.loss for done in ours] == [done.loss for done in theirs]
    assert [done.bytes_sent for done in ours] == [done.bytes_sent for done in theirs]
    assert all(done.absent == [] for done in ours)
    assert all(np.isnan(done.virtual_seconds) for done in theirs) and plain.summary["virtual_seconds"] is None
    assert timed.summary["virtual_seconds"] == ours[-1].virtual_seconds > 0


def test_who_is_late_keeps_training_and_is_back_when_ready():
    """Client 3 needs 2.5 windows of a deadline of 1: absent in rounds 0 and 1, there in 2, absent in 3 and 4, ..."""
    learner = Quadratic(targets(4))
    runner, _, passed = run(DEC, learner, 6, speed=[1, 1, 1, 0.4], deadline=1.0)
    assert [told.absent for told in passed] == [[3], [3], [], [3], [3], []]
    assert runner.virtual_seconds == 6.0
    assert [job for _, jobs in learner.fits for place, job in jobs if place == 3] == [0, 1]
    assert runner.jobs == [6, 6, 6, 2]


def test_a_round_ends_before_the_deadline_when_all_are_ready():
    runner, _, passed = run(DEC, Quadratic(targets(4)), 4, speed=[1, 1, 1, 0.4], deadline=10.0)
    assert runner.virtual_seconds == 10.0 and not any(told.absent for told in passed)


def test_the_late_one_has_no_links_and_its_state_is_held():
    b = targets(4)
    _, states, passed = run(DEC, Quadratic(b), 3, speed=[1, 1, 1, 0.4], deadline=1.0)
    full = build_topology(parse_spec("ring"), 4, 0).at(0)
    missing = full.adjacency.copy()
    missing[:3, :3] = False
    W = torch.from_numpy(remove_links(full.W, missing))
    assert passed[0].W is not None and torch.equal(torch.from_numpy(passed[0].W), W)
    assert (passed[0].W.sum(0) == 1).all() and (passed[0].W.sum(1) == 1).all()
    x = torch.zeros_like(b)
    for state in states[:2]:
        x = W @ torch.cat([x[:3] - 0.1 * (x[:3] - b[:3]), x[3:]])
        assert (state.flat - x).abs().max() < 1e-15
        assert (state.flat[3] == 0).all()
    x = torch.from_numpy(full.W) @ (x - 0.1 * (x - b))  # the late step, from where its job began, which nobody moved
    assert (states[2].flat - x).abs().max() < 1e-15


def test_with_a_deadline_stragglers_cost_no_time_but_their_share_of_the_work():
    runner, _, _ = run(DEC, Quadratic(targets(8)), 20, speed=[1] * 4 + [0.1] * 4, deadline=1.0)
    assert runner.virtual_seconds == 20.0 and runner.jobs == [20] * 4 + [2] * 4


def test_who_is_away_by_rounds_is_held():
    learner = Quadratic(targets(4))
    runner, states, passed = run(DEC, learner, 5, away=[{"client": 1, "leave": 1, "back": 3}])
    assert [told.absent for told in passed] == [[], [1], [1], [], []]
    assert torch.equal(states[2].flat[1], states[0].flat[1]) and not torch.equal(states[3].flat[1], states[0].flat[1])
    assert runner.virtual_seconds == 5.0 and runner.jobs == [5, 3, 5, 5]


def test_a_round_without_anybody_passes_at_once_by_rounds_and_goes_to_the_first_return_by_seconds():
    gone = [{"client": client, "leave": 1, "back": 3} for client in range(4)]
    runner, states, _ = run(DEC, Quadratic(targets(4)), 5, away=gone)
    assert runner.virtual_seconds == 3.0 and torch.equal(states[2].flat, states[0].flat)
    later = [each | {"unit": "seconds", "back": 7 + each["client"]} for each in gone]
    runner, _, passed = run(DEC, Quadratic(targets(4)), 4, away=later)
    assert [told.absent for told in passed] == [[], [0, 1, 2, 3], [1, 2, 3], [2, 3]]
    assert runner.virtual_seconds == 9.0


def test_held_puts_back_every_leaf_of_some_clients():
    before = {"x": adapters(torch.zeros(3, 18, dtype=torch.float64)), "dual": torch.zeros(3, 2)}
    after = {"x": adapters(torch.ones(3, 18, dtype=torch.float64)), "dual": torch.ones(3, 2)}
    found = held(before, after, [1])
    assert found["x"].flat[:, 0].tolist() == found["dual"][:, 0].tolist() == [1, 0, 1]
    assert (after["dual"] == 1).all(), "its input is left alone"


@pytest.mark.parametrize("kept", others_slow(["round", "keep"], [0]))
def test_a_stopped_run_with_a_deadline_goes_on_to_the_bit(config, tmp_path, kept):
    words = ["clock.speed=[1,1,0.7,0.3]", "clock.deadline=2.5", "train.rounds=6", "checkpoint.every=4"]
    words += [f"train.optimizer_state={kept}", "adapter.dropout=0.1", "algorithm.interval=1", "train.dtype=fp32"]
    whole = simulate(config("bert", *words), tmp_path / "whole")
    stopping = iter([False, False, True])
    with pytest.raises(Stopped):
        simulate(config("bert", *words), tmp_path / "part", stop=lambda: next(stopping))
    resumed = resume(tmp_path / "part")
    assert torch.equal(resumed.adapters.flat, whole.adapters.flat)
    ours, theirs = (select_events(read_events(each.run), RoundDone) for each in (resumed, whole))
    assert [done.absent for done in ours] == [done.absent for done in theirs] != [[]] * 6
    assert [done.virtual_seconds for done in ours] == [done.virtual_seconds for done in theirs]


def test_the_absent_have_no_loss_and_the_run_says_who_they_were(config, tmp_path):
    run_folder = simulate(config("bert", "clock.speed=[1,1,1,0.1]", "clock.deadline=2"), tmp_path / "run").run
    events = read_events(run_folder)
    for done in select_events(events, RoundDone):
        assert done.absent == [3] and [client for client in range(4) if np.isnan(done.loss[client])] == [3]
        assert all(3 not in edge for edge in done.edges or [])
    (started,) = select_events(events, RunStarted)
    assert started.clock is not None and started.clock["speed"] == [1, 1, 1, 0.1] and started.clock["deadline"] == 2


@pytest.mark.parametrize("words", [["clock.deadline=5"], ["clock.away=[{client: 1, leave: 1, back: 2}]"]])
@pytest.mark.parametrize("method", ["flora", "fedex-lora", "rac-lora", "fedhl"])
def test_methods_whose_merges_must_reach_everybody_wait_for_everybody(config, method, words):
    with pytest.raises(CompositionError, match=f"{method} cannot do without a client in a round"):
        compose(config("bert", f"algorithm.name={method}", "topology.kind=complete", *words))


def test_a_topology_that_clients_may_miss_is_not_static(config):
    waits, goes_on = (
        compose(config("bert", "algorithm.name=dec-lora", word)) for word in ("clock={}", "clock.deadline=1")
    )
    assert waits.topology.properties.static and not goes_on.topology.properties.static


def test_runs_are_compared_at_equal_seconds_and_bytes(config, tmp_path):
    events = read_events(simulate(config("bert", "eval.every=1", "clock.speed=0.5"), tmp_path / "run").run)
    sent = [done.bytes_sent for done in select_events(events, RoundDone)]
    assert [score.virtual_seconds for score in select_events(events, Evaluated)] == [0, 4, 8, 12]
    for seconds, round in ((0, 0), (7.9, 1), (8, 2), (99, 3)):
        found = evaluated_within(events, seconds=seconds)
        assert found is not None and found.round == round
    for budget, round in ((0, 0), (sent[0], 1), (sum(sent) - 1, 2), (sum(sent), 3)):
        found = evaluated_within(events, sent=budget)
        assert found is not None and found.round == round
    plain = read_events(simulate(config("bert"), tmp_path / "plain").run)
    assert evaluated_within(plain, seconds=99) is None
