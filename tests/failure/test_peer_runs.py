"""Whole runs, in memory and in real time: a peer that dies, returns, or falls behind, and everybody at once."""

import asyncio
import json
import threading
import time
from dataclasses import replace

import msgspec
import pytest
import torch
from in_memory import names, network, one_at_a_time, together
from safetensors.torch import load

from cases import others_slow
from peerlora.errors import CompositionError, RunError, Stopped
from peerlora.network.base import DeadlineMissed, PeerDown, Refused
from peerlora.network.protocol.wire import encode_header, read_header
from peerlora.runs.events import CaughtUp, Joined, NeighbourChanged, Resumed, RoundDone, RunStarted, Warned
from peerlora.runs.live.state import LiveRun
from peerlora.runs.metrics import select_events, summarise
from peerlora.runs.store import read_events
from peerlora.runtime.peer.checks import plan_peer
from peerlora.runtime.peer.site import Site
from peerlora.runtime.peer.synchronous import SynchronousPeer
from peerlora.runtime.peer.train import train_peer
from peerlora.runtime.resources import load_resources
from peerlora.train.schedule import rate
from waiting import until

pytestmark = pytest.mark.usefixtures("no_reports")

QUICK = ["train.dtype=fp32", "algorithm.name=dec-lora", "train.local_steps=1", "eval.every=100", "eval.rows=4"]


class Runs:
    """Peers as threads, whose processes can be killed and started again."""

    def __init__(self, config, folder, net, thread):
        self.config, self.folder, self.net, self.thread = config, folder, net, thread
        self.dead = {client: threading.Event() for client in range(config.clients)}
        self.slow = dict.fromkeys(range(config.clients), 0.02)
        self.rounds = dict.fromkeys(range(config.clients), 0)
        self.resources = None

    def run(self, client, resume=False):
        """The result, or how the process ended."""
        self.dead[client].clear()
        site, transport = Site(client, names(self.config.clients), "run"), None

        def listen(event):
            if isinstance(event, RoundDone):
                self.rounds[client] = event.round + 1
                time.sleep(self.slow[client])

        transport = self.net.transport(site.names[client])
        try:
            return train_peer(
                self.config,
                site,
                transport,
                self.thread,
                self.folder / f"peer-{client}",
                resume=resume,
                resources=self.resources,
                sinks=[listen],
                stop=self.dead[client].is_set,
            )
        except Stopped as end:
            return end

    def until(self, client, rounds):
        until(lambda: self.rounds[client] >= rounds)

    def events(self, client, kind=None):
        found = read_events(self.folder / f"peer-{client}")
        return select_events(found, kind) if kind else found


@pytest.fixture
def runs(config, tmp_path):
    with one_at_a_time(), network(3) as (net, thread):

        def build(*words):
            settings = ["clients=3", "peer.deadline=5", "peer.join=20", *QUICK, *words]
            return Runs(config("bert", *settings), tmp_path, net, thread)

        yield build


def later(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    return thread, found


def stop_and_return_later(made):
    """Client 2 dies after some rounds and returns when the others are some more ahead; its result."""
    others = [later(lambda client=client: made.run(client)) for client in (0, 1)]
    first, ended = later(lambda: made.run(2))
    made.until(2, 3)
    made.dead[2].set()
    first.join()
    assert isinstance(ended[0], Stopped) and "--resume" in str(ended[0])
    made.until(0, made.rounds[2] + 5)
    made.slow |= {0: 0.5, 1: 0.5, 2: 0.0}  # so that they are not done while the process starts
    back = later(lambda: (made.until(2, made.rounds[0]), made.slow.update({0: 0.0, 1: 0.0})))
    made.rounds[2] = 0
    again = made.run(2, resume=True)
    back[0].join()
    for thread, _ in others:
        thread.join()
    return again


def page_of(folder, clients=(0, 1, 2), until=None):
    """The live page's state of peers, their logs read one after the other; ``until``: but for later rounds."""
    found = LiveRun()
    for client in clients:
        for line in (folder / f"peer-{client}" / "events.jsonl").read_text().splitlines():
            event = json.loads(line)
            if until is None or event.get("round", 0) <= until and event["type"] != "RunFinished":
                found.add(event, [client])
    return found


def test_a_peer_that_stops_and_returns_pulls_a_neighbours_state(runs):
    learns = ["train.optimizer_state=keep", "train.schedule=cosine", "train.quiet=0.125"]
    made = runs("train.rounds=24", "peer.pull=3", "checkpoint.every=2", *learns)
    again = stop_and_return_later(made)
    (caught,) = made.events(2, CaughtUp)
    assert caught.pulled and caught.to >= caught.round + 3
    assert len(made.events(2, Resumed)) == 1
    rounds = [done.round for done in made.events(2, RoundDone)]
    assert rounds == sorted(set(rounds)) and rounds[-1] == 23
    assert made.events(2, RoundDone)[-1].contacts == 2
    assert again.summary["rounds"] == 24
    saved = load((made.folder / "peer-2" / "checkpoints" / "round-000024.safetensors").read_bytes())
    trained = [t for t in rounds if not made.config.train.is_quiet(t)]
    assert saved["learner.steps.A"].tolist() == [len(trained)], "it keeps its own moments with another's state"
    told = {done.round: done.measures.get("learning_rate") for done in made.events(2, RoundDone)}
    assert told == {t: rate(made.config.train, t) if t in trained else None for t in rounds}
    for client in (0, 1):
        told = made.events(client, RoundDone)
        assert [done.round for done in told] == list(range(24))
        assert any("2" in done.missed for done in told) and not told[-1].missed
        assert {"down", "up"} <= {event.kind for event in made.events(client, NeighbourChanged) if event.client == 2}
    assert page_of(made.folder).status == {}
    last = max(done.round for done in made.events(0, RoundDone) if "2" in done.missed)
    assert page_of(made.folder, clients=(0, 1), until=last).status[2] in ("absent", "late")


@pytest.mark.slow
def test_a_peer_that_pulls_a_neighbours_state_keeps_its_own_entries(runs, monkeypatch):
    """Relayed adapters are no part of a state: it goes on with those that it has, its own among them."""
    seen, adopt = [], SynchronousPeer._adopted

    def watched(peer, site, state):
        before = peer.exchange.state_dict()
        adopted = adopt(peer, site, state)
        seen.append((before, peer.exchange.state_dict(), state.flat, adopted and adopted.flat))
        return adopted

    monkeypatch.setattr(SynchronousPeer, "_adopted", watched)
    made = runs("train.rounds=24", "peer.pull=3", "checkpoint.every=2", "exchange.relay={}")
    again = stop_and_return_later(made)
    (caught,) = made.events(2, CaughtUp)
    ((before, after, own, adopted),) = seen
    assert caught.pulled and not torch.equal(own, adopted)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert before["relay.facts"][:, 0].tolist() == [0, 1, 2] and before["relay.facts"][2, 1] == caught.round
    told = {done.round: done.measures for done in made.events(2, RoundDone)}
    assert told[caught.to]["relayed_known_min"] == 3 and told[23]["relayed_age_max"] == 0
    assert "relayed_refused" not in told[caught.to] and again.summary["scores"]["relayed_mean"] is not None


def stop_and_resume_all(made):
    """Everybody dies after some rounds and goes on to the end."""
    threads = [later(lambda client=client: made.run(client)) for client in range(3)]
    made.until(0, 4)
    for client in range(3):
        made.dead[client].set()
    for thread, _ in threads:
        thread.join()
    results = together([lambda client=client: made.run(client, resume=True) for client in range(3)])
    rounds = made.config.train.rounds
    assert [result.summary["rounds"] for result in results] == [rounds, rounds, rounds]


@pytest.mark.slow
def test_everybody_restarts_from_the_checkpoints(runs):
    made = runs("train.rounds=14", "checkpoint.every=3")
    stop_and_resume_all(made)
    assert all(len(made.events(client, Resumed)) == 1 for client in range(3))
    assert all(len(made.events(client, RoundDone)[-1].edges) == 2 for client in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("words", others_slow([["algorithm.name=choco"], ["exchange.codec=top-k"]], [0]))
def test_compressed_gossip_goes_on_after_a_restart_with_whole_replicas(runs, words):
    made = runs("train.rounds=12", "checkpoint.every=3", *words)
    stop_and_resume_all(made)
    for client in range(3):
        events = made.events(client)
        again = next(place for place, event in enumerate(events) if isinstance(event, Resumed))
        first, later_on = select_events(events[:again], RoundDone), select_events(events[again:], RoundDone)
        assert not any("whole_replicas" in done.measures for done in first[:3])
        assert sum(done.measures.get("whole_replicas", 0) for done in later_on) >= 2
        assert not any("whole_replicas" in done.measures for done in later_on[-3:])
        assert len(later_on[-1].edges) == 2


@pytest.mark.slow
def test_a_peer_returns_to_a_graph_whose_links_go_one_way(runs):
    words = ["algorithm.name=push-diging", "train.optimizer=sgd", "topology.kind=directed-ring"]
    made = runs("train.rounds=24", "peer.pull=3", "checkpoint.every=2", *words)
    again = stop_and_return_later(made)
    assert made.events(2, CaughtUp)[0].pulled and again.adapters.flat.isfinite().all()
    for client, links in ((0, [[0, 1], [2, 0]]), (1, [[0, 1], [1, 2]]), (2, [[1, 2], [2, 0]])):
        assert sorted(made.events(client, RoundDone)[-1].edges) == links
    assert any("2" in done.missed for done in made.events(0, RoundDone))


POOLED = ["train.label_prior=pooled", "partition.kind=dirichlet"]


def test_label_counts_are_not_summed_without_a_neighbour(runs):
    made = runs("train.rounds=2", "peer.join=0.5", *POOLED)
    with pytest.raises(RunError, match="site-0 .not there after 0.5 s., site-2 .*label_prior=uniform"):
        made.run(1)
    made.config = made.config.model_copy(update={"peer": made.config.peer.model_copy(update={"join": 20.0})})
    assert not (made.folder / "peer-1").exists()  # nothing is there that a second try would find in use
    again = together([lambda client=client: made.run(client) for client in range(3)])
    assert [result.summary["rounds"] for result in again] == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("remembers", [True, False])
def test_a_restarted_peer_knows_the_label_counts_or_asks_for_them(runs, remembers):
    made = runs("train.rounds=24", "checkpoint.every=2", *POOLED)
    others = [later(lambda client=client: made.run(client)) for client in (0, 1)]
    first, _ = later(lambda: made.run(2))
    made.until(2, 3)
    made.dead[2].set()
    first.join()
    file = made.folder / "peer-2" / "label_counts.json"
    counts = file.read_text()
    held = made.events(0, RunStarted)[0].partition["counts"]
    assert json.loads(counts)["total"] == [sum(column) for column in zip(*held, strict=True)]
    if not remembers:
        file.unlink()
    made.slow |= {0: 0.5, 1: 0.5, 2: 0.0}  # so that they are not done while the process starts
    made.rounds[2] = 0
    back = later(lambda: (made.until(2, made.rounds[0]), made.slow.update({0: 0.0, 1: 0.0})))
    result = made.run(2, resume=True)
    for thread, _ in [back, *others]:
        thread.join()
    assert file.read_text() == counts and result.summary["rounds"] == 24
    assert made.events(2, RoundDone)[-1].contacts == 2


def test_without_anybody_a_peer_trains_alone_and_says_so(runs):
    made = runs("train.rounds=2", "peer.join=0.5")
    result = made.run(1)
    assert result.summary["rounds"] == 2
    assert any("site-0, site-2" in warned.message for warned in made.events(1, Warned))
    assert made.events(1, Joined)[0].reached == []
    assert [done.missed for done in made.events(1, RoundDone)] == [{"0": "down", "2": "down"}] * 2 or all(
        set(done.missed) == {"0", "2"} for done in made.events(1, RoundDone)
    )


class Mallory:
    """A site that trains nothing: it answers greetings with the first that it got, changed, again and again."""

    def __init__(self, transport, to, changes):
        self.transport, self.to, self.changes = transport, to, changes
        self.headers, self.answers, self.states, self.ends = [], [], [], threading.Event()

    def admit(self, peer, header):
        self.headers.append(read_header(header))
        return 1 << 20

    async def deliver(self, peer, header, body):
        if read_header(header).kind == "state":
            self.states.append(load(bytes(body)))
        elif read_header(header).kind != "hello":
            raise Refused("unexpected")

    async def run(self):
        await self.transport.start(self)
        while not self.ends.is_set():
            await asyncio.sleep(0.02)
            greetings = [header for header in self.headers if header.kind == "hello"]
            for peer in self.to if greetings else ():
                facts = greetings[0].facts | self.changes.get("facts", {})
                own = self.changes | {"sender": self.transport.me, "facts": facts}
                own = encode_header(msgspec.structs.replace(greetings[0], **own))
                try:
                    await self.transport.send(peer, own, b"", deadline=1)
                    self.answers.append("taken")
                except Refused as refusal:
                    self.answers.append(refusal.reason)
                except (PeerDown, DeadlineMissed):
                    pass


def disturbed(made, clients, to, **changes):
    """The results of some clients of a run in which site-2 is Mallory, and Mallory."""
    mallory = Mallory(made.net.transport("site-2"), to, changes)
    beside, _ = later(lambda: made.thread.call(mallory.run()))
    try:
        return together([lambda client=client: made.run(client) for client in clients]), mallory
    finally:
        mallory.ends.set()
        beside.join()


@pytest.mark.slow
def test_a_member_without_a_link_in_the_ring_disturbs_nobody(config, tmp_path):
    """Any site of a list without edges can greet any other; here one greets the site across the ring."""
    with one_at_a_time(), network(4) as (net, thread):
        settings = ["clients=4", "topology=ring", "train.rounds=4", "peer.deadline=5", "peer.join=2", *QUICK]
        made = Runs(config("bert", *settings), tmp_path, net, thread)
        results, mallory = disturbed(made, (0, 1, 3), ["site-0"], round=2, facts={"last": "0.0+"})
    assert [result.summary["rounds"] for result in results] == [4, 4, 4]
    assert set(mallory.answers) == {"not-a-neighbour"}
    assert {event.client for event in made.events(0, NeighbourChanged)} <= {1, 3}


@pytest.mark.parametrize("round", others_slow([4, 2**53], [0]))
def test_a_neighbour_that_claims_a_later_round_takes_nobody_along(runs, round):
    made = runs("train.rounds=4", "peer.pull=2", "peer.join=4")
    _, mallory = disturbed(made, (0, 1), ["site-0", "site-1"], round=round)
    assert set(mallory.answers) == {"taken" if round == 4 else "from-the-future"}
    for client in (0, 1):
        assert [done.round for done in made.events(client, RoundDone)] == list(range(4))
        assert not made.events(client, CaughtUp)


def test_one_neighbour_alone_is_followed_and_without_its_state_the_own_goes_on(runs):
    made = runs("train.rounds=4", "topology=path", "peer.pull=2", "peer.join=1")
    _, mallory = disturbed(made, (1,), ["site-1"], round=3)
    assert "ask" in {header.kind for header in mallory.headers}
    assert [(caught.to, caught.pulled) for caught in made.events(1, CaughtUp)] == [(3, False)]


def test_a_neighbour_that_asks_gets_no_factor_and_no_head_that_the_method_keeps(runs):
    made = runs("train.rounds=3", "algorithm.name=fedsa-lora", "adapter.head=private", "peer.join=1")
    (result,), mallory = disturbed(made, (0,), ["site-0"], kind="ask")
    spec, flat = result.adapters.spec, mallory.states[-1][".flat"]
    for block in ("A", "B", "head"):
        assert result.adapters.flat[:, spec.columns(block)].any()
        assert bool(flat[:, spec.columns(block)].any()) == (block == "A")


def test_of_a_method_that_sends_nothing_a_neighbour_gets_no_state(runs):
    made = runs("train.rounds=3", "algorithm.name=local", "peer.join=1")
    _, mallory = disturbed(made, (0,), ["site-0"], kind="ask")
    assert "taken" in mallory.answers and not mallory.states


def test_another_config_is_refused_on_both_sides_by_the_name_of_the_section(runs):
    made = runs("train.rounds=2", "clients=2", "topology=path")
    other = runs("train.rounds=2", "clients=2", "topology=path", "train.lr=0.5")
    other.net, other.thread = made.net, made.thread

    def ended(run, client):
        with pytest.raises(RunError, match="wrong-config.*other train"):
            run.run(client)
        return True

    assert together([lambda: ended(made, 0), lambda: ended(other, 1)]) == [True, True]


def test_sites_whose_files_have_other_class_names_refuse_each_other_before_round_0(runs):
    made, other = (runs("train.rounds=2", "clients=2", "topology=path") for _ in range(2))
    read = load_resources(made.config)
    renamed = replace(read.train_data, names=("class0", "class1", "class3"))
    other.net, other.thread, other.resources = made.net, made.thread, replace(read, train_data=renamed)

    def ended(run, client):
        with pytest.raises(RunError, match="wrong-config.*other labels"):
            run.run(client)
        return not (run.folder / f"peer-{client}").exists()  # nothing that would block the next try

    assert together([lambda: ended(made, 0), lambda: ended(other, 1)]) == [True, True]


def test_another_base_model_is_refused(runs, models):
    made = runs("train.rounds=2", "clients=2", "topology=path")
    other = runs("train.rounds=2", "clients=2", "topology=path", f"model.source={models('roberta')}", "seed=0")

    def ended(run, client):
        with pytest.raises(RunError, match="wrong-base|wrong-spec"):
            run.run(client)
        return True

    assert together([lambda: ended(made, 0), lambda: ended(other, 1)]) == [True, True]


def test_a_peer_knows_its_neighbourhood_only_and_says_so(runs):
    made = runs("train.rounds=3")
    results = together([lambda client=client: made.run(client) for client in range(3)])
    (started,) = made.events(1, RunStarted)
    assert started.held == [1] and started.names == {"0": "site-0", "1": "site-1", "2": "site-2"}
    done = made.events(1, RoundDone)[0]
    assert len(done.loss) == 1 and done.consensus_B > 0 and done.rho != done.rho
    summary = results[1].summary
    assert (
        summary["accuracy"]["averaged"] is None and summary["last_contact"] == summarise(made.events(1))["last_contact"]
    )
    metrics = results[1].metrics.to_pylist()
    assert {row["client"] for row in metrics} == {1, None}
    assert (results[1].run / "adapters" / "client-01" / "adapter_config.json").is_file()
    assert not (results[1].run / "adapters" / "average").exists()
    assert torch.equal(results[1].adapters.ranks, torch.tensor([3]))


def test_pairwise_weights_are_refused(runs):
    made = runs("topology.weights=pairwise")
    with pytest.raises(CompositionError, match="pairwise"):
        made.run(0)


def test_a_site_that_the_run_does_not_count_is_refused(runs):
    made = runs()
    with pytest.raises(CompositionError, match="clients=4"):
        train_peer(made.config, Site(3, names(4), "run"), made.net.transport("site-0"), made.thread)


@pytest.mark.parametrize(
    "words",
    [
        ["algorithm.name=ad-psgd", "clock.speed=0.5"],
        ["algorithm.name=ad-psgd", "train.label_prior=pooled"],
        ["algorithm.name=ad-psgd", "train.class_weights=pooled"],
        ["adversary.attack=ipm", "algorithm.name=dec-lora"],
        ["topology.kind=directed-ring", "algorithm.name=dec-lora"],  # its links may fail one way
        ["topology.kind=directed-ring", "exchange.codec=sign", "algorithm.name=dec-lora"],
        ["train.class_weights=pooled"],
        ["train.label_prior=pooled"],  # two of four are on the list
        ["topology.weights=pairwise"],
        ["clock.deadline=3"],
    ],
)
def test_what_only_a_simulation_can_do_is_refused(config, words):
    with pytest.raises(CompositionError, match="real peers|simulations only"):
        plan_peer(config("bert", *words), Site(0, {0: "a", 1: "b"}, "run"))
