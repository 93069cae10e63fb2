"""Peers without common rounds, in memory and in real time: at their own pace, alone, dead, back again."""

import pytest
import torch
from in_memory import network, one_at_a_time, together
from test_peer_runs import Runs, later

from cases import others_slow
from peerlora.algorithms.ad_psgd import ADPSGD
from peerlora.errors import Stopped
from peerlora.runs.events import Joined, NeighbourChanged, Resumed, RoundDone, RunStarted, Warned
from peerlora.train.learner import StackedLearner
from waiting import until

pytestmark = pytest.mark.usefixtures("no_reports")

QUICK = ["clients=3", "train.dtype=fp32", "train.local_steps=1", "eval.every=100", "eval.rows=4", "peer.join=20"]
METHODS = ["aedfl", "ad-psgd"]
PAIRS = {"aedfl": [(0, 1), (0, 2), (1, 2)], "ad-psgd": [(0, 1), (0, 2)]}  # on three clients: 0 asks 1 and 2


@pytest.fixture
def runs(config, tmp_path):
    with one_at_a_time(), network(3) as (net, thread):

        def build(method, *words):
            own = ["algorithm.patience=1"] if method == "ad-psgd" else []
            settings = [f"algorithm.name={method}", "peer.deadline=20", *QUICK, *own, *words]
            return Runs(config("bert", *settings), tmp_path, net, thread)

        yield build


def keep_in_step(made, monkeypatch, clients):
    """None of the clients begins a job while another one of them is four or more behind."""
    fit = StackedLearner.fit

    def fit_in_step(learner, *arguments):
        (client,) = learner.shards.clients
        if client in clients:
            until(lambda: made.rounds[client] <= min(made.rounds[other] for other in clients) + 3, every=0.005)
        return fit(learner, *arguments)

    monkeypatch.setattr(StackedLearner, "fit", fit_in_step)


def met(done, client):
    return any(client in edge for edge in done.edges)


def until_met(made, client, other, method):
    """Where the method lets the two meet."""
    if (client, other) in PAIRS[method]:
        until(lambda: any(met(done, other) for done in made.events(client, RoundDone)))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_peers_of_different_speeds_all_end_and_wait_for_nobody(runs, monkeypatch, method):
    """Client 1 goes on with its second half once the others have ended: they end without it."""
    made, fit = runs(method, "train.rounds=16"), StackedLearner.fit

    def fit_when_due(learner, *arguments):
        (client,) = learner.shards.clients
        halfway = made.rounds[1] >= 8
        until(lambda: made.rounds[1] >= 8 or made.rounds[client] <= min(made.rounds.values()) + 3)
        if client == 1 and halfway:
            until(lambda: made.rounds[0] == made.rounds[2] == 16)
        return fit(learner, *arguments)

    monkeypatch.setattr(StackedLearner, "fit", fit_when_due)
    results = together([lambda client=client: made.run(client) for client in range(3)])
    for client, result in enumerate(results):
        assert result.summary["rounds"] == 16 and result.summary["bytes_sent"] > 0
        told = made.events(client, RoundDone)
        assert [done.round for done in told] == list(range(16))
        assert any(done.contacts for done in told) and all(client in edge for done in told for edge in done.edges)
        assert all(done.virtual_seconds != done.virtual_seconds for done in told)
        stale = [done.measures["staleness_max"] for done in told if "staleness_max" in done.measures]
        assert stale and all(0 <= each <= 16 for each in stale)
        (started,) = made.events(client, RunStarted)
        assert started.clock is None and started.held == [client]
    metrics = results[0].metrics.to_pylist()
    assert {"staleness", "staleness_max"} <= {row["metric"] for row in metrics}


@pytest.mark.slow
def test_a_slow_peers_letters_are_stale(runs, monkeypatch):
    made, fit = runs("aedfl", "train.rounds=40", "topology=complete"), StackedLearner.fit

    def slowly(learner, *arguments):
        begun = min(made.rounds[0], made.rounds[1])
        if learner.shards.clients == [2]:
            until(lambda: min(made.rounds[0], made.rounds[1]) >= min(40, begun + 5), every=0.01)
        return fit(learner, *arguments)

    monkeypatch.setattr(StackedLearner, "fit", slowly)
    together([lambda client=client: made.run(client) for client in range(3)])
    largest = {
        client: max(done.measures.get("staleness_max", 0) for done in made.events(client, RoundDone))
        for client in range(3)
    }
    assert largest[0] >= 3 and largest[1] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_dead_peer_stops_nobody(runs, monkeypatch, method):
    made = runs(method, "train.rounds=50", "topology=complete")
    keep_in_step(made, monkeypatch, (0, 1))
    others = [later(lambda client=client: made.run(client)) for client in (0, 1)]
    dying, ended = later(lambda: made.run(2))
    made.until(2, 4)
    for client in (0, 1):
        until_met(made, client, 2, method)
    made.thread.ask(made.net.crash, "site-2")
    made.dead[2].set()
    for thread, found in others:
        thread.join()
        assert found[0].summary["rounds"] == 50
    dying.join()
    assert isinstance(ended[0], Stopped)
    for client in (0, 1):
        told = made.events(client, RoundDone)
        assert [done.round for done in told] == list(range(50))
        assert any(met(done, 2) for done in told) == ((client, 2) in PAIRS[method])
        assert not any(met(done, 2) for done in told[-10:]) and any(met(done, 1 - client) for done in told[-10:])
        downs = [event for event in made.events(client, NeighbourChanged) if event.client == 2 and event.kind == "down"]
        assert downs
    if method == "aedfl":  # everybody writes to everybody
        assert any(done.missed == {"2": "down"} for done in made.events(0, RoundDone)[-10:])


@pytest.mark.parametrize("method", others_slow(METHODS, ["ad-psgd"]))
def test_a_restarted_peer_goes_on_from_its_checkpoint(runs, method):
    made = runs(method, "train.rounds=40", "topology=complete", "checkpoint.every=3")
    others = [later(lambda client=client: made.run(client)) for client in (0, 1)]
    first, ended = later(lambda: made.run(2))
    made.until(2, 4)
    made.thread.ask(made.net.crash, "site-2")
    made.dead[2].set()
    first.join()
    assert isinstance(ended[0], Stopped)
    stopped = made.rounds[2]
    made.slow |= {0: 0.5, 1: 0.5}  # so that they are not done while the process starts
    made.rounds[2] = 0
    returned, found = later(lambda: made.run(2, resume=True))
    made.until(2, stopped + 6)
    made.slow |= {0: 0.02, 1: 0.02, 2: 0.02}
    returned.join()
    for thread, _ in others:
        thread.join()
    assert found[0].summary["rounds"] == 40
    (resumed,) = made.events(2, Resumed)
    assert resumed.round >= 3
    told = made.events(2, RoundDone)
    assert [done.round for done in told] == list(range(40)), "no job is left out, none done twice"
    assert any(done.contacts for done in told[resumed.round :])
    for client in (0, 1):
        changes = [event for event in made.events(client, NeighbourChanged) if event.client == 2]
        kinds = [event.kind for event in changes]
        assert "down" in kinds and "up" in kinds[kinds.index("down") :]
        back = max(event.round for event in changes if event.kind == "up")
        again = any(met(done, 2) for done in made.events(client, RoundDone) if done.round > back)
        assert again == ((client, 2) in PAIRS[method])


@pytest.mark.slow
def test_a_peer_that_stops_in_peace_keeps_the_letters_that_it_has_not_opened(runs, monkeypatch):
    """All stop and go on: nobody greets anew what he had, and jobs go on from where they were."""
    made, fit = runs("ad-psgd", "train.rounds=14", "topology=path"), StackedLearner.fit

    def may_train(client):
        """Ends of the path ask, once all are back; who is between them answers all that they ask before its last job.

        Before the stop nobody gets to the end.
        """
        if len(made.events(client, Joined)) == 1:
            return made.rounds[client] < 6 or made.dead[client].is_set()
        if client == 1:
            return made.rounds[1] < 13 or made.rounds[0] == made.rounds[2] == 14
        return all(len(made.events(other, Joined)) == 2 for other in range(3))

    def fit_when_due(learner, *arguments):
        until(lambda: may_train(*learner.shards.clients))
        return fit(learner, *arguments)

    monkeypatch.setattr(StackedLearner, "fit", fit_when_due)
    threads = [later(lambda client=client: made.run(client)) for client in range(3)]
    for client in range(3):
        made.until(client, 4)
    for client in range(3):
        made.dead[client].set()
    for thread, found in threads:
        thread.join()
        assert isinstance(found[0], Stopped) and "--resume" in str(found[0])
    stopped = dict(made.rounds)
    made.slow |= {0: 0.2, 2: 0.2}  # so that there is time for answers
    results = together([lambda client=client: made.run(client, resume=True) for client in range(3)])
    assert [result.summary["rounds"] for result in results] == [14, 14, 14]
    for client in range(3):
        assert len(made.events(client, Resumed)) == 1 and len(made.events(client, Joined)) == 2
        told = made.events(client, RoundDone)
        assert [done.round for done in told] == list(range(14)), "no job is left out, none done twice"
        assert any(done.contacts for done in told[stopped[client] :])


def test_alone_it_trains_and_says_so(runs):
    made = runs("aedfl", "train.rounds=3", "peer.join=0.5")
    result = made.run(1)
    assert result.summary["rounds"] == 3 and result.summary["bytes_sent"] == 0
    assert any("site-0, site-2" in warned.message for warned in made.events(1, Warned))
    told = made.events(1, RoundDone)
    assert not any(done.contacts for done in told) and told[-1].missed == {"0": "down", "2": "down"}


@pytest.mark.slow
def test_no_change_is_lost_between_letters_and_jobs(runs, monkeypatch):
    """Each hook gets what the one before it gave, though letters come on another thread; the last is the result."""
    models, jobs, messages = {}, [], []

    def noted(name, kind):
        hook = getattr(ADPSGD, name)

        def call(method, state, *arguments):
            client, given = arguments[-1].client, method.model(state).flat
            assert client not in models or torch.equal(models[client], given), (name, client)
            found = hook(method, state, *arguments)
            models[client] = method.model(found).flat.clone()
            kind.append(client)
            return found

        monkeypatch.setattr(ADPSGD, name, call)

    noted("before_job", [])
    noted("on_job", jobs)
    noted("on_message", messages)
    made = runs("ad-psgd", "train.rounds=40", "checkpoint.every=100")
    made.slow = dict.fromkeys(range(3), 0.0)
    results = together([lambda client=client: made.run(client) for client in range(3)])
    assert len(jobs) == 120 and len(messages) > 30
    for client, result in enumerate(results):
        assert torch.equal(result.adapters.flat, models[client])
