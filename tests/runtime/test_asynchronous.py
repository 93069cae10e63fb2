"""Asynchronous runs: the limits in which they are synchronous, the invariants, resume."""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Quadratic, adapters, rounds_for, run, targets

from cases import others_slow
from peerlora import read_events
from peerlora.algorithms import build_algorithm
from peerlora.config.loading import parse_spec
from peerlora.errors import CompositionError, RunError, Stopped
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters
from peerlora.runs.events import Evaluated, RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runtime.asynchronous import AsynchronousRounds
from peerlora.runtime.compose import compose
from peerlora.runtime.simulate import resume, simulate
from peerlora.topology.schedule import build_topology
from peerlora.tree import leaves

pytestmark = pytest.mark.usefixtures("no_reports")

DENSE = {"sigma": 0.0, "density": 1.0}
UNEVEN = {"speed": [1.0, 0.7, 0.31, 0.1], "delay": 0.4, "bandwidth": [500.0, 900.0, 10_000.0, 200.0]}


def model(algorithm, state) -> torch.Tensor:
    return algorithm.model(state).flat


def same_states(found, expected):
    return all(torch.equal(leaf, leaves(expected)[name]) for name, leaf in leaves(found).items())


# --- equal speeds


@pytest.mark.parametrize("graph", ["ring", "path", "star", "complete"])
@pytest.mark.parametrize("bandwidth", [None, 1000.0])
def test_aedfl_at_equal_speeds_is_dec_lora(graph, bandwidth):
    """Adapt, then combine: x <- W (x - step).  An upload that takes time delays all alike."""
    b = targets(5)
    algorithm, plain = build_algorithm("aedfl", DENSE), build_algorithm("dec-lora", {})
    links = bandwidth if graph in ("ring", "complete") else None  # elsewhere uploads to fewer neighbours end earlier
    _, found, passed = run(algorithm, Quadratic(b, steps=3, noise=0.1), 6, graph, bandwidth=links)
    _, expected, _ = run(plain, Quadratic(b, steps=3, noise=0.1), 6, graph)
    for ours, theirs in zip(found, expected, strict=True):
        assert (model(algorithm, ours) - theirs.flat).abs().max() < 1e-14
    assert all(told.measures["staleness_max"] == 0 for told in passed)


def test_aedfl_with_any_sigma_at_equal_speeds_is_dec_lora_since_nothing_is_stale():
    b = targets(4)
    algorithm, plain = build_algorithm("aedfl", {"sigma": 3.0, "density": 1.0}), build_algorithm("dec-lora", {})
    _, found, _ = run(algorithm, Quadratic(b), 5)
    _, expected, _ = run(plain, Quadratic(b), 5)
    assert (model(algorithm, found[-1]) - expected[-1].flat).abs().max() < 1e-14


@pytest.mark.parametrize("interval", [1, 2])
def test_aedfl_that_alternates_at_equal_speeds_is_adf_lora(interval):
    b = targets(4)
    algorithm = build_algorithm("aedfl", DENSE | {"interval": interval})
    plain = build_algorithm("adf-lora", {"interval": interval})
    _, found, _ = run(algorithm, Quadratic(b), 6)
    _, expected, _ = run(plain, Quadratic(b), 6)
    for ours, theirs in zip(found, expected, strict=True):
        assert (model(algorithm, ours) - theirs.flat).abs().max() < 1e-14


def test_equal_speeds_on_text_are_dec_lora(config):
    """Through the real Learner: the same batches, job for round."""
    words = ["algorithm.name=aedfl", "algorithm.sigma=0", "algorithm.density=1"]
    one, other = compose(config("bert", *words)), compose(config("bert", "algorithm.name=dec-lora"))
    assert one.clock is not None
    runner = AsynchronousRounds(one.algorithm, one.learner, one.exchange, one.clock)  # pyright: ignore[reportArgumentType]
    state, x = one.algorithm.start(one.start, one.exchange), other.start
    for t in range(3):
        state, told = runner.advance(t, state)
        with other.learner.round(t) as trained:
            other.exchange.begin(t)
            x = other.algorithm.round(t, x, other.learner, other.exchange)
            assert (model(one.algorithm, state) - x.flat).abs().max() < 1e-13
            assert told.losses == pytest.approx(trained.losses.tolist(), rel=1e-12)


def matched(states, learner, algorithm, graph):
    """DSGD whose W of a round is a product of half/half averages, with the partners that the method draws."""
    clients = len(learner.b)
    peers = StackedExchange(build_topology(parse_spec(graph), clients, 0), range(clients))
    partners = algorithm.start(adapters(torch.zeros_like(learner.b)), peers).partners
    runner, x = rounds_for(algorithm, learner, graph), torch.zeros_like(learner.b)
    for t, state in enumerate(states):
        with learner.round(t):
            x = learner.fit(adapters(x), "AB").flat
        W = torch.eye(clients, dtype=torch.float64)
        for client in range(clients):
            (mine,) = np.nonzero(partners[client].numpy())
            if len(mine):
                runner.mailboxes.versions[client] = t + 1
                other = int(runner.mailboxes.mailbox(client).random("partner").choice(mine))
                half = torch.eye(clients, dtype=torch.float64)
                half[[client, client, other, other], [client, other, client, other]] = 0.5
                W = half @ W
        assert (W.sum(0) - 1).abs().max() < 1e-15 and (W.sum(1) - 1).abs().max() < 1e-15
        x = W @ x
        assert (model(algorithm, state) - x).abs().max() < 1e-14


@pytest.mark.parametrize("graph", ["path", "ring", "complete", "star"])
def test_ad_psgd_at_equal_speeds_is_random_matching_dsgd(graph):
    """x <- W_t (x - step), W_t a product of halves, the active clients in order."""
    learner, algorithm = Quadratic(targets(6), noise=0.1), build_algorithm("ad-psgd", {})
    _, states, _ = run(algorithm, learner, 8, graph)
    matched(states, learner, algorithm, graph)


# --- the round of a job, which decides its rate


class Noted(Quadratic):
    """Notes which job was computed with the rate of which round: (client, job) -> round."""

    def __init__(self, clients):
        super().__init__(targets(clients))
        self.round_of = {}

    @contextmanager
    def round(self, t, jobs=None, clients=None, step_seconds=None):
        assert jobs is not None and clients is not None
        self.round_of |= {(client, jobs[client]): t for client in clients}
        with super().round(t, jobs, clients) as stats:
            yield stats


def test_at_equal_speeds_the_round_of_a_job_is_the_clients_own_count_as_with_real_peers():
    learner = Noted(4)
    run(build_algorithm("aedfl", DENSE), learner, 5)
    assert learner.round_of == {(client, job): job for client in range(4) for job in range(5)}


def test_a_job_learns_with_the_rate_of_the_round_in_which_it_begins():
    """Client 1 sends for 0.7 s, so round 0 ends at 1.7 s: after client 0's second job began, before it is computed."""
    algorithm = build_algorithm("aedfl", DENSE)
    size = run(algorithm, Quadratic(targets(2)), 1, "path")[2][0].bytes_per_edge
    learner = Noted(2)
    runner, _, _ = run(algorithm, learner, 2, "path", bandwidth=[1e15, size / 0.7])
    assert runner.virtual_seconds == pytest.approx(3)
    assert learner.round_of == {(0, 0): 0, (1, 0): 0, (0, 1): 0, (1, 1): 1, (0, 2): 1}


# --- invariants


@given(
    speeds=st.lists(st.floats(0.05, 3), min_size=5, max_size=5),
    delay=st.floats(0, 4),
    bandwidth=st.sampled_from([None, 40.0, 400.0]),
    graph=st.sampled_from(["path", "ring", "complete", "star"]),
)
@settings(max_examples=25)
def test_ad_psgd_keeps_the_sum_but_for_local_steps_and_what_is_on_the_way(speeds, delay, bandwidth, graph):
    algorithm, start = build_algorithm("ad-psgd", {}), targets(5, seed=1)
    learner = Quadratic(targets(5), rate=0.0)  # nothing but averages
    runner, states, _ = run(algorithm, learner, 4, graph, start, speed=speeds, delay=delay, bandwidth=bandwidth)
    pending = [each.payload["d"] for _, each in runner.mailboxes.in_flight.values() if "d" in each.payload]
    total = model(algorithm, states[-1]).sum(0) - (torch.stack(pending).sum(0) if pending else 0)
    assert (total - start.sum(0)).abs().max() < 1e-12


def test_ad_psgd_with_delays_loses_nothing_of_the_local_steps():
    """Sum of models = sum of starts + sum of all displacements - what is on the way."""
    b, seen = targets(4), []
    algorithm, learner = build_algorithm("ad-psgd", {}), Quadratic(b)
    fit = learner.fit

    def noted(x, plan):
        result = fit(x, plan)
        seen.extend((place, job, result.flat[place] - x.flat[place]) for place, job in learner.fits[-1][1])
        return result

    learner.fit = noted
    runner, states, _ = run(algorithm, learner, 6, **UNEVEN)
    done = runner.mailboxes.versions
    moved = sum(change for place, job, change in seen if job < done[place])
    pending = sum(each.payload["d"] for _, each in runner.mailboxes.in_flight.values() if "d" in each.payload)
    assert (model(algorithm, states[-1]).sum(0) - (moved + pending)).abs().max() < 1e-12


def late_mean(algorithm, states):
    return torch.stack([model(algorithm, state).mean(0) for state in states[-100:]]).mean(0)


SPEEDS = torch.tensor([1, 0.7, 0.5, 0.3], dtype=torch.float64)


@pytest.mark.slow
def test_ad_psgd_of_uneven_speeds_comes_to_the_minimum_weighted_by_speed():
    """Everybody's steps count, and a fast client takes more of them; on f_i = |x - b_i|^2/2."""
    b, algorithm = targets(4), build_algorithm("ad-psgd", {})
    _, states, _ = run(algorithm, Quadratic(b, rate=0.02), 300, "complete", speed=SPEEDS.tolist(), delay=0.5)
    weighted, plain = (SPEEDS[:, None] * b).sum(0) / SPEEDS.sum(), b.mean(0)
    found = late_mean(algorithm, states)
    assert (found - weighted).norm() < 0.03 * plain.norm() < 0.3 * plain.norm() < (found - plain).norm()
    x = model(algorithm, states[-1])
    assert (x - x.mean(0)).square().sum() < 0.01 * (b - plain).square().sum()


def test_aedfl_of_uneven_speeds_agrees_on_a_point_between_the_minima():
    """Not on a known mean: rows of its weights sum to one, columns don't."""
    b, algorithm = targets(4), build_algorithm("aedfl", {"density": 1.0})
    _, states, _ = run(algorithm, Quadratic(b, rate=0.02), 60, "complete", speed=SPEEDS.tolist(), delay=0.5)
    x = model(algorithm, states[-1])
    assert (x - x.mean(0)).square().sum() < 0.01 * (b - b.mean(0)).square().sum()
    assert ((x >= b.min(0).values) & (x <= b.max(0).values)).all()


@pytest.mark.slow
def test_ad_psgd_of_equal_speeds_and_delays_comes_to_the_mean_of_the_minima():
    b = targets(4)
    algorithm = build_algorithm("ad-psgd", {})
    _, states, _ = run(algorithm, Quadratic(b, rate=0.02), 300, "complete", delay=2.5)
    assert (late_mean(algorithm, states) - b.mean(0)).norm() < 0.02 * b.mean(0).norm()
    x = model(algorithm, states[-1])
    assert (x - x.mean(0)).square().sum() < 0.02 * (b - b.mean(0)).square().sum()


# --- time


def test_a_round_is_as_many_jobs_as_there_are_clients():
    learner = Quadratic(targets(4))
    runner, _, passed = run(build_algorithm("aedfl", {}), learner, 5, speed=[1, 1, 1, 0.1])
    # 10 s: 10 jobs of each fast client and 1 of the slow one.  3 jobs a second: 4, 8, 12, ... are reached in second
    # 2, 3, 4, 6, 7 (the 9th second has the 27th).
    assert runner.virtual_seconds == 7 and runner.done == 21
    assert [sum(not math.isnan(loss) for loss in told.losses) for told in passed] == [3] * 5
    assert runner.mailboxes.versions == [7, 7, 7, 0]


def test_stragglers_hold_up_the_synchronous_run_only():
    def jobs_per_second(name):
        learner = Quadratic(targets(8))
        runner, _, _ = run(build_algorithm(name, {}), learner, 20, speed=[1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1])
        done = runner.mailboxes.versions if isinstance(runner, AsynchronousRounds) else runner.jobs
        return sum(done) / runner.virtual_seconds

    synchronous = jobs_per_second("dec-lora")
    assert synchronous == pytest.approx(0.8)  # 8 jobs in 10 s
    for name in ("aedfl", "ad-psgd"):
        assert jobs_per_second(name) > 5 * synchronous  # 4 + 4/10 a second


def test_an_upload_keeps_a_client_from_its_next_job():
    learner = Quadratic(targets(4))
    algorithm = build_algorithm("aedfl", DENSE)
    runner, _, passed = run(algorithm, learner, 3, bandwidth=100.0)
    assert runner.virtual_seconds == pytest.approx(3 * (1 + 2 * passed[0].bytes_per_edge / 100), rel=1e-12)
    assert passed[0].bytes_sent == 8 * passed[0].bytes_per_edge


def test_a_message_of_two_seconds_is_three_jobs_late_at_both_ends():
    """What j knew of i when it began is one way old, what i hears of j another way."""
    _, _, passed = run(build_algorithm("aedfl", DENSE), Quadratic(targets(4)), 12, delay=2.5)
    # Sent at second k, there at k + 2.5, used at k + 3: then i's last job began with version k + 2.  The sender's job
    # began at k - 1, when it knew what i had sent at k - 4, version k - 4.
    assert passed[-1].measures == {"staleness": 6.0, "staleness_max": 6.0}


def test_who_is_away_neither_works_nor_answers():
    learner = Quadratic(targets(4))
    away = [{"client": 0, "leave": 2, "back": 6, "unit": "seconds"}, {"client": 1, "leave": 3, "unit": "seconds"}]
    runner, _, _ = run(build_algorithm("ad-psgd", {}), learner, 5, away=away)
    # Jobs begin at 0, 1, 2, ...; 0 does not at 2 to 5, 1 does not from 3 on; who has begun, finishes.
    done = [job for _, jobs in learner.fits for place, job in jobs if place == 0]
    assert done[:4] == [0, 1, 2, 3][: len(done)] and runner.mailboxes.versions[1] == 3
    assert runner.mailboxes.versions[2] == runner.mailboxes.versions[3] == int(runner.virtual_seconds)
    assert runner.mailboxes.versions[0] == int(runner.virtual_seconds) - 4


def test_a_run_that_everybody_has_left_says_so():
    away = [{"client": client, "leave": 2.5, "unit": "seconds"} for client in range(4)]
    with pytest.raises(RunError, match="all clients have left for good after 12 jobs, in round 4"):
        run(build_algorithm("aedfl", {}), Quadratic(targets(4)), 5, away=away)


# --- order and grouping


@pytest.mark.parametrize("method", ["aedfl", "ad-psgd"])
def test_the_same_seed_gives_the_same_run_to_the_bit(method):
    once, again = (run(build_algorithm(method, {}), Quadratic(targets(4), noise=1.0), 6, **UNEVEN) for _ in range(2))
    assert same_states(once[1][-1], again[1][-1])
    assert once[0].queue.to_list() == again[0].queue.to_list()
    assert [told.bytes_sent for told in once[2]] == [told.bytes_sent for told in again[2]]


def test_outstanding_jobs_are_computed_together():
    learner = Quadratic(targets(4))
    run(build_algorithm("aedfl", {}), learner, 5, speed=[1, 1, 1, 0.1])
    assert learner.fits[0][1] == [(0, 0), (1, 0), (2, 0), (3, 0)], "the slow client's with the first that is needed"
    assert learner.fits[1][1] == [(0, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize("method", others_slow(["aedfl", "ad-psgd"], [0]))
def test_results_do_not_depend_on_how_jobs_are_grouped(config, tmp_path, monkeypatch, method):
    words = [f"algorithm.name={method}", "clock.speed=[1,0.7,0.31,0.1]", "clock.delay=0.4", "adapter.dropout=0.1"]
    words += ["train.rounds=5", "algorithm.interval=2", "train.optimizer_state=keep"]
    words += ["algorithm.density=1"] if method == "aedfl" else []
    together = simulate(config("bert", *words), tmp_path / "together").adapters.flat
    begin = AsynchronousRounds._begin

    def at_once(self, event, t, state):
        begin(self, event, t, state)
        if self.outstanding:
            self._compute(state)

    monkeypatch.setattr(AsynchronousRounds, "_begin", at_once)
    alone = simulate(config("bert", *words), tmp_path / "alone").adapters.flat
    assert (together - alone).abs().max() < 1e-12


# --- a run's folder


@pytest.fixture
def uneven(config):
    def build(method, *words):
        settings = [f"algorithm.name={method}", "train.rounds=6", "train.dtype=fp32", "adapter.dropout=0.1"]
        settings += ["clock.speed=[1,0.7,0.31,0.1]", "clock.delay=0.4", "clock.bandwidth=3000", "checkpoint.every=2"]
        return config("bert", *settings, *words)

    return build


KEPT = ["train.optimizer_state=keep", "algorithm.interval=1"]
SPARSE = ["algorithm.ramp=2", "algorithm.refresh=1", "algorithm.density=0.3"]


@pytest.mark.parametrize(
    ("method", "words"),
    others_slow([("aedfl", SPARSE), ("aedfl", [*KEPT, "algorithm.density=1"]), ("ad-psgd", KEPT)], [0]),
)
def test_a_stopped_run_goes_on_to_the_bit(uneven, tmp_path, method, words):
    whole = simulate(uneven(method, *words), tmp_path / "whole")
    stopping = iter([False, False, True])
    with pytest.raises(Stopped):
        simulate(uneven(method, *words), tmp_path / "part", stop=lambda: next(stopping))
    again = iter([True])
    with pytest.raises(Stopped):
        resume(tmp_path / "part", stop=lambda: next(again))
    resumed = resume(tmp_path / "part")
    assert torch.equal(resumed.adapters.flat, whole.adapters.flat)

    def told(run):
        return [(done.loss, done.bytes_sent, done.edges, done.virtual_seconds, done.measures) for done in run]

    ours, theirs = (told(select_events(read_events(each), RoundDone)) for each in (resumed.run, whole.run))
    assert str(ours) == str(theirs)  # as text, because NaN does not equal itself


def test_events_carry_virtual_seconds(uneven, tmp_path):
    events = read_events(simulate(uneven("aedfl"), tmp_path / "run").run)
    moments = [done.virtual_seconds for done in select_events(events, RoundDone)]
    assert moments == sorted(moments) and moments[0] > 0
    scores = select_events(events, Evaluated)
    assert scores[0].virtual_seconds == 0 and scores[-1].virtual_seconds == moments[-1]
    assert all(math.isnan(done.rho) and math.isnan(done.weak_mismatch) for done in select_events(events, RoundDone))


# --- what is refused


@pytest.mark.parametrize("method", ["aedfl", "ad-psgd"])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["topology.kind=random", "topology.p=0.5"], "needs a topology whose mixing matrix is static"),
        (["topology.drop_links=0.1"], "static"),
        (["topology.weights=pairwise"], "symmetric and static and neighbours only"),
        (["clock.deadline=3"], "waits for nobody, so clock.deadline=3 has no round to cut short"),
        (["clock.away=[{client: 0}]"], "have no rounds in common.*use unit: seconds"),
        (["train.optimizer_state=phase"], "no common phase"),
        (["adapter.rank=[1,2,3,3]"], "cannot work with different ranks"),
        (["clock.away=[" + ",".join(f"{{client: {i}, unit: seconds}}" for i in range(4)) + "]"], "no client that ever"),
    ],
)
def test_what_cannot_work_is_refused(config, method, words, told):
    with pytest.raises(CompositionError, match=told):
        compose(config("bert", f"algorithm.name={method}", *words))


def test_moments_of_components_that_come_and_go_are_not_kept(config):
    with pytest.raises(CompositionError, match=r"aedfl cannot keep the optimiser's memory.*density < 1"):
        compose(config("bert", "algorithm.name=aedfl", "train.optimizer_state=keep"))
    assert isinstance(compose(config("bert", "algorithm.name=aedfl")).start, Adapters)
