"""Peers that average one number on the in-memory network under a virtual clock, while things go wrong."""

import asyncio

import numpy as np
import torch

from peerlora.network.protocol.control import PeerControl
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.neighbour_exchange import without
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.network.protocol.wire import Expected, encode_body, read_body
from peerlora.network.transport.heartbeat import Timing
from peerlora.network.transport.memory import MemoryNetwork
from peerlora.network.transport.virtual_loop import virtual_run
from peerlora.topology.schedule import build_topology

SCHEMA = {"x": ((), torch.float64)}
DEADLINE = 10.0


def site(client):
    return f"site-{client}"


class Federation:
    """``clients`` peers; everything they did is kept in ``used``, ``took`` and ``values``."""

    def __init__(self, graph, clients=4, rounds=8, deadline=DEADLINE, seconds=1.0, seed=0):
        self.topology, self.clients, self.rounds = build_topology(graph, clients, seed=1), clients, rounds
        self.deadline, self.seconds = deadline, dict.fromkeys(range(clients), seconds)
        self.network = MemoryNetwork(map(site, range(clients)), timing=Timing(beat=0.5), seed=seed)
        self.used = {}  # (round, client) -> the clients whose value it used
        self.took = {}  # (round, client) -> seconds of its exchange
        self.values = dict(enumerate(np.linspace(1.0, 2.0, clients)))
        self.missed, self.notices, self.reached = {}, [], {}
        self.endpoint, self.tasks = {}, {}

    def start(self, client, t=0):
        """Start the process of a client in round ``t``."""
        self.tasks[client] = asyncio.create_task(self.peer(client, t))

    async def peer(self, client, t):
        others = [site(j) for j in range(self.clients) if j != client]
        endpoint = Endpoint(self.transport(client), Expected("run", "ba5e", "5bec"), others, self.rounds)
        control = self.control(client, endpoint)
        protocol = RoundProtocol(endpoint, self.deadline, lambda kind: 1 << 12, control)
        self.endpoint[client] = endpoint
        await control.start(protocol)
        endpoint.start_at(t)
        endpoint.peers.isolated = t > 0  # it goes on from a checkpoint
        self.reached[client] = (await control.handshake(5.0)).reached
        loop = asyncio.get_running_loop()
        try:
            while t < self.rounds:
                called = endpoint.peers.round_to_follow(t)
                if called:
                    t = min(called[0], self.rounds - 1)
                self.enter(client, endpoint, t)
                await asyncio.sleep(self.seconds[client])
                began = loop.time()
                await self.exchange(client, t, protocol)
                self.took[t, client] = loop.time() - began
                t += 1
            endpoint.enter(self.rounds)
            await asyncio.sleep(3 * self.deadline)  # an evaluation, during which others may still ask
        finally:
            self.notices += [(client, *notice[1:]) for notice in endpoint.events.waiting]
            if asyncio.current_task().cancelling() == 0:
                await control.close()

    def transport(self, client):
        return self.network.transport(site(client))

    def control(self, client, endpoint):
        return PeerControl(endpoint, {}, self.deadline)

    def enter(self, client, endpoint, t):
        endpoint.enter(t)

    async def exchange(self, client, t, protocol):
        graph = self.topology.at(t)
        names = {site(j): j for j in graph.neighbours(client)}
        value = torch.tensor(self.values[client], dtype=torch.float64)
        body = encode_body({"x": value})
        outcome = await protocol.exchange(tuple(names), body, lambda h, b: read_body(h, b, SCHEMA), self.deadline)
        got = {names[peer]: float(found["x"]) for peer, found in outcome.received.items()}
        self.missed[t, client] = {names[peer]: reason for peer, reason in outcome.missing.items()}
        row = without(graph, [(client, names[peer]) for peer in outcome.missing]).W[client]
        self.values[client] = sum(row[j] * x for j, x in (got | {client: self.values[client]}).items())
        self.used[t, client] = set(got)

    def kill(self, client):
        self.network.crash(site(client))
        self.tasks[client].cancel()

    def W(self, t):
        """What really happened in a round: rows of those who exchanged, the identity for the others."""
        graph, W = self.topology.at(t), np.eye(self.clients)
        for client in range(self.clients):
            if (t, client) in self.used:
                away = [(client, j) for j in graph.neighbours(client) if j not in self.used[t, client]]
                W[client] = without(graph, away).W[client]
        return W

    def one_sided(self):
        """(round, user, other) of every edge that only one end used."""
        return [(t, i, j) for (t, i), used in self.used.items() for j in used if i not in self.used.get((t, j), set())]

    def check(self, patience=0.5):
        """What holds whatever goes wrong: nobody waits longer than the deadline, and W is doubly stochastic."""
        assert max(self.took.values()) <= self.deadline + patience
        assert self.one_sided() == []
        for t in range(self.rounds):
            W = self.W(t)
            assert np.allclose(W.sum(0), 1, atol=1e-12) and np.allclose(W.sum(1), 1, atol=1e-12) and (W >= 0).all()

    def done(self, client):
        return sum((t, client) in self.used for t in range(self.rounds))


def run(federation, script=None):
    """Run all peers, and beside them ``script(federation)``, until all have ended."""

    async def main():
        for client in range(federation.clients):
            federation.start(client)
        others = [asyncio.create_task(script(federation))] if script else []
        for other in others:
            await other
        while any(not task.done() for task in federation.tasks.values()):
            await asyncio.wait(federation.tasks.values())
        for task in federation.tasks.values():
            if not task.cancelled():
                task.result()
        await federation.network.close()

    virtual_run(main())
    return federation
