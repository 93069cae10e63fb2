"""Peers without common rounds, forced into the order of a simulation, do what its clients do, call for call.

A simulation on uneven clocks writes down what happens in which order: a job ends, a message arrives, a job begins.
Real peers over the in-memory transport then wait at each of these places until it is their turn.  Tolerance: 1e-10 in
fp64; sums are taken over other shapes.
"""

import asyncio
import threading
from collections import defaultdict

import pytest
import torch
from in_memory import names, network, one_at_a_time, together

from cases import others_slow
from peerlora.algorithms import REGISTRY
from peerlora.errors import Stopped
from peerlora.network.protocol.wire import read_header
from peerlora.runs.events import RoundDone
from peerlora.runs.metrics import select_events
from peerlora.runs.store import read_events
from peerlora.runtime.asynchronous import AsynchronousRounds
from peerlora.runtime.peer.site import Site
from peerlora.runtime.peer.train import train_peer
from peerlora.runtime.simulate import simulate
from peerlora.train.learner import StackedLearner

pytestmark = pytest.mark.usefixtures("no_reports")

PATIENCE = 60
WORDS = ["eval.every=100", "eval.rows=4", "train.local_steps=2", "adapter.dropout=0.1"]
CLOCK = ["clock.speed=[1,0.7,0.31,0.13]", "clock.delay=0.4", "train.rounds=4"]
JOBS = 9  # of every peer; the fastest simulated client does fewer


class Calls:
    """What every hook of a method made of the model, by client and in order."""

    def __init__(self, monkeypatch, kind):
        self.made = defaultdict(list)
        for name in ("before_job", "on_job", "on_message"):
            monkeypatch.setattr(kind, name, self.noted(name, getattr(kind, name)))

    def noted(self, name, hook):
        def call(method, *arguments):
            state, mail = hook(method, *arguments), arguments[-1]
            self.made[mail.client].append((name, mail.version, method.model(state).flat.clone()))
            return state

        return call


def written_down(monkeypatch):
    """A list that a simulation fills: ("done", client), ("begins", client), ("arrived", sender, receiver)."""
    script = []

    def told(name, what):
        step = getattr(AsynchronousRounds, name)

        def call(self, event, t, state):
            script.append(what(self, event))
            return step(self, event, t, state)

        monkeypatch.setattr(AsynchronousRounds, name, call)

    def letter(self, event):
        receiver, message = self.mailboxes.in_flight[event.number]
        return ("arrived", message.sender, receiver)

    told("_job_done", lambda self, event: ("done", event.client))
    told("_begin", lambda self, event: ("begins", event.client))
    told("_arrived", letter)
    return script


class Held:
    """A transport whose letters leave one by one, when they are let go."""

    def __init__(self, inner):
        self.inner, self.me, self.free = inner, inner.me, False
        self.allowed, self.gone = (defaultdict(lambda: asyncio.Semaphore(0)) for _ in range(2))

    async def start(self, receiver):
        await self.inner.start(receiver)

    async def send(self, to, header, body, *, deadline):
        held = read_header(header).kind == "push" and not self.free
        if held:
            await self.allowed[to].acquire()
        try:
            await self.inner.send(to, header, body, deadline=deadline)
        finally:
            if held:
                self.gone[to].release()

    async def let_go(self, to):
        async with asyncio.timeout(PATIENCE):
            self.allowed[to].release()
            await self.gone[to].acquire()

    def let_all_go(self):
        self.free = True
        for allowed in self.allowed.values():
            for _ in range(100):
                allowed.release()

    def events(self):
        return self.inner.events()

    async def close(self):
        await self.inner.close()


class Conductor:
    """Lets peers begin and end their jobs when the script says so."""

    def __init__(self, monkeypatch, clients):
        self.begins, self.training, self.ends, self.ended = (
            [threading.Semaphore(0) for _ in range(clients)] for _ in range(4)
        )
        fit = StackedLearner.fit

        def held(learner, *arguments, **options):
            (client,) = learner.shards.clients
            self.training[client].release()
            assert self.ends[client].acquire(timeout=PATIENCE)
            return fit(learner, *arguments, **options)

        monkeypatch.setattr(StackedLearner, "fit", held)

    def listener(self, client):
        def listen(event):
            if isinstance(event, RoundDone):
                self.ended[client].release()
                assert self.begins[client].acquire(timeout=PATIENCE)

        return listen

    def play(self, script, transports, thread):
        begun = set()
        for what, client, *receiver in script:
            if what == "begins":
                if client in begun:
                    self.begins[client].release()
                begun.add(client)
                assert self.training[client].acquire(timeout=PATIENCE)
            elif what == "done":
                self.ends[client].release()
                assert self.ended[client].acquire(timeout=PATIENCE)
            else:
                thread.call(transports[client].let_go(names(len(transports))[receiver[0]]))
        for transport in transports:
            thread.ask(transport.let_all_go)
        for semaphore in (*self.begins, *self.ends):
            semaphore.release(1000)


def peers(config, folder, script, conductor):
    """The peers' results, once they have played the script and done the rest of their jobs in any order."""
    with one_at_a_time(), network(config.clients) as (net, thread):
        sites = names(config.clients)
        transports = [Held(net.transport(site)) for site in sites.values()]

        def run(client):
            site, listener = Site(client, sites, "run"), conductor.listener(client)
            return train_peer(config, site, transports[client], thread, folder / f"{client}", sinks=[listener])

        calls = [lambda client=client: run(client) for client in sites]
        return together([*calls, lambda: conductor.play(script, transports, thread)])[:-1]


@pytest.mark.parametrize(
    ("method", "extra"),
    others_slow(
        [
            ("aedfl", ["algorithm.ramp=2", "algorithm.refresh=1", "algorithm.density=0.4"]),
            ("aedfl", ["algorithm.density=1", "algorithm.interval=1", "train.optimizer_state=keep"]),
            ("ad-psgd", ["topology=path"]),
            ("ad-psgd", ["topology=complete", "algorithm.interval=2", "adapter.head=private"]),
        ],
        [3],
    ),
)
def test_in_the_same_order_peers_do_what_simulated_clients_do(config, tmp_path, monkeypatch, method, extra):
    words = [f"algorithm.name={method}", *WORDS, *extra]
    with monkeypatch.context() as patch:
        script, expected = written_down(patch), Calls(patch, REGISTRY[method]).made
        whole = simulate(config("bert", *words, *CLOCK), tmp_path / "whole")
    assert any(what == "arrived" for what, *_ in script)
    with monkeypatch.context() as patch:
        found, conductor = Calls(patch, REGISTRY[method]).made, Conductor(patch, 4)
        chosen = config("bert", *words, f"train.rounds={JOBS}", "peer.deadline=60", "peer.join=60")
        results = peers(chosen, tmp_path, script, conductor)
    for client, calls in expected.items():
        for ours, theirs in zip(found[client], calls, strict=False):
            assert ours[:2] == theirs[:2], client
            assert (ours[2][0] - theirs[2][0]).abs().max() < 1e-10, (client, *ours[:2])
        assert len(found[client]) >= len(calls)
    moved = max(float((calls[-1][2] - calls[0][2]).abs().max()) for calls in expected.values())
    assert moved > 1e-3, "nothing was trained"
    for result in results:
        told = select_events(read_events(result.run), RoundDone)
        assert [done.round for done in told] == list(range(JOBS))
        reasons = {reason for done in told for reason in done.missed.values()}
        assert reasons <= {"late", "down"}, "once the script is over, some are done before others"
    simulated = select_events(read_events(whole.run), RoundDone)
    assert max(done.bytes_per_edge for done in told) == max(done.bytes_per_edge for done in simulated)


@pytest.mark.parametrize("method", others_slow(["aedfl", "ad-psgd"], [0]))
def test_alone_a_peer_is_a_client_of_local_also_after_a_stop(config, tmp_path, method):
    """With a rate that follows the peer's own jobs."""
    words = [*WORDS, "train.rounds=4", "train.schedule=cosine", "train.warmup=0.25", "peer.join=0.2"]
    chosen = config("bert", *words, f"algorithm.name={method}", *(["algorithm.density=1"] if method == "aedfl" else []))
    done = []
    with network(4) as (net, thread):
        whole = simulate(config("bert", *words, "algorithm.name=local"), tmp_path / "whole")

        def run(folder, **options):
            return train_peer(chosen, Site(1, names(4), "run"), net.transport("site-1"), thread, folder, **options)

        undisturbed = run(tmp_path / "undisturbed")
        with pytest.raises(Stopped):
            run(tmp_path / "stopped", sinks=[done.append], stop=lambda: bool(select_events(done, RoundDone)))
        resumed = run(tmp_path / "stopped", resume=True)
    assert (undisturbed.adapters.flat - whole.adapters.flat[1:2]).abs().max() < 1e-10
    assert torch.equal(resumed.adapters.flat, undisturbed.adapters.flat)
