"""Shares that are handed on over links that go one way: none vanishes, whatever is lost."""

import asyncio
from functools import partial

import numpy as np
import pytest
import torch
from in_memory import exchanges, names, together

from cases import others_slow
from peerlora.config.loading import load_config
from peerlora.exchange.stacked import StackedExchange
from peerlora.network.protocol.control import PeerControl
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.neighbour_exchange import without
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.network.protocol.wire import Expected, encode_body, read_body
from peerlora.network.transport.heartbeat import Timing
from peerlora.network.transport.memory import MemoryNetwork
from peerlora.network.transport.virtual_loop import virtual_run
from peerlora.topology.schedule import build_topology

CHORD = {"kind": "directed-ring", "chords": [[0, 2]]}
GRAPHS = [CHORD, {"kind": "random-out", "degree": 2}, {"kind": "one-peer"}, {"kind": "star", "weights": "push-sum"}]


def topology(graph):
    return build_topology(load_config({"topology": graph}).topology, 4, seed=1)


class Handing:
    """Push-sum of one number between four peers, round by round."""

    def __init__(self, peers):
        self.peers, self.t = peers, 0
        self.u, self.w = torch.tensor([3.0, 1.0, 4.0, 1.5]).double(), torch.ones(4).double()

    def round(self):
        def one(i):
            self.peers[i].begin(self.t)
            return self.peers[i].mix({"u": self.u[[i]], "w": self.w[[i]]})

        mixed = together([partial(one, i) for i in range(4)])
        self.u, self.w = (torch.cat([each[name] for each in mixed]) for name in "uw")
        self.t += 1
        return [dict(each.stats.missing) for each in self.peers]


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_peers_hand_on_as_the_simulation_does(graph):
    graph = topology(graph)
    stacked = StackedExchange(graph, range(4))
    with exchanges(graph) as peers:
        found = Handing(peers)
        u, w = found.u, found.w
        for t in range(4):
            stacked.begin(t)
            mixed = stacked.mix({"u": u, "w": w})
            u, w = mixed["u"], mixed["w"]
            assert found.round() == [{}] * 4
            assert sum(each.stats.bytes_sent for each in peers) == stacked.stats.bytes_sent
            links = {edge for i, each in enumerate(peers) for edge in each.graph.edges if i in edge}
            assert links == set(stacked.graph.edges)
        assert torch.allclose(found.u, u, atol=1e-14) and torch.allclose(found.w, w, atol=1e-14)


@pytest.mark.slow
def test_what_is_not_acknowledged_stays_with_the_sender():
    with exchanges(topology(CHORD), deadline=1.0) as peers:
        found = Handing(peers)
        found.round()
        found.peers[0].protocol.endpoint.transport.network.lose("site-0", "site-2")
        assert found.round() == [{2: "no acknowledgement"}, {}, {0: "no message"}, {}]
        assert float(found.w.sum()) == pytest.approx(4, abs=1e-14)
        assert float(found.u.sum()) == pytest.approx(9.5, abs=1e-14)
        for _ in range(60):
            found.round()
        assert float(found.w.sum()) == pytest.approx(4, abs=1e-12)
        assert found.u / found.w == pytest.approx(9.5 / 4, abs=1e-6)


def test_a_lost_acknowledgement_doubles_a_share_and_is_told():
    with exchanges(topology(CHORD), deadline=1.0) as peers:
        found = Handing(peers)
        network = peers[0].protocol.endpoint.transport.network
        network.lose("site-0", "site-2", what="ack")
        assert found.round() == [{2: "no acknowledgement"}, {}, {}, {}]
        assert float(found.w.sum()) == pytest.approx(4 + 1 / 3, abs=1e-14)
        for _ in range(3):
            found.round()
        assert float(found.w.sum()) == pytest.approx(4 + 1 / 3, abs=1e-12)
        told = [notice for notice in peers[2].protocol.endpoint.events.waiting if notice.kind == "half-used"]
        assert [(notice.peer, notice.detail) for notice in told] == [("site-0", "round 0: used here only")]
        assert (found.u / found.w).min() > 1 and (found.u / found.w).max() < 4


def test_a_peer_that_is_cut_off_keeps_what_it_has():
    with exchanges(topology(CHORD), deadline=1.0) as peers:
        found = Handing(peers)
        network = peers[0].protocol.endpoint.transport.network
        found.round()
        network.split(["site-2"])
        for _ in range(4):
            found.round()
            assert float(found.w.sum()) == pytest.approx(4, abs=1e-13)
        for other in ("site-0", "site-1", "site-3"):
            network.heal("site-2", other)
        for _ in range(200):
            if not any(found.round()):
                break
        assert not any(found.round()) and float(found.w.sum()) == pytest.approx(4, abs=1e-12)


# --- whatever gets lost, under a virtual clock

SCHEMA = {"u": ((), torch.float64)}
ROUNDS, DEADLINE = 25, 5.0


async def handing(network, client, mass, graph):
    """One peer's rounds of handing on one number."""
    sites = names(4)
    others = [site for site in sites.values() if site != sites[client]]
    endpoint = Endpoint(network.transport(sites[client]), Expected("run", "ba5e", "5bec"), others)
    control = PeerControl(endpoint, {}, DEADLINE)
    protocol = RoundProtocol(endpoint, DEADLINE, lambda kind: 1 << 12, control)
    await control.start(protocol)
    await control.handshake(DEADLINE)
    numbers = {site: j for j, site in sites.items()}
    t, used = 0, 0
    while t < ROUNDS:
        called = endpoint.peers.round_to_follow(t)
        t = min(called[0], ROUNDS - 1) if called else t
        endpoint.enter(t)
        await asyncio.sleep(0.3 * client)
        planned = graph.at(t)
        senders, receivers = planned.neighbours(client), planned.receivers(client)
        value = encode_body({"u": torch.tensor(mass[client], dtype=torch.float64)})
        to, by = ([sites[j] for j in clients] for clients in (receivers, senders))
        outcome = await protocol.exchange(to, value, lambda h, b: read_body(h, b, SCHEMA), DEADLINE, by)
        got = {numbers[peer]: float(found["u"]) for peer, found in outcome.received.items()}
        taken = {numbers[peer] for peer in outcome.delivered}
        missing = [(client, j) for j in senders if j not in got] + [(j, client) for j in receivers if j not in taken]
        row = without(planned, missing, one_way=True).W[client]
        mass[client] = sum(row[j] * x for j, x in (got | {client: mass[client]}).items())
        t, used = t + 1, used + len(got)
    endpoint.enter(ROUNDS)
    await asyncio.sleep(3 * DEADLINE)
    await control.close()
    return endpoint.history.one_sided, used


@pytest.mark.parametrize("seed", others_slow(range(4), [0]))
@pytest.mark.parametrize("what", ["message", "ack"])
@pytest.mark.parametrize("graph", GRAPHS[:2], ids=str)
def test_no_share_ever_vanishes(graph, what, seed):
    mass = dict.fromkeys(range(4), 1.0)

    async def main():
        network = MemoryNetwork(names(4).values(), timing=Timing(beat=0.5), seed=seed)
        for one in names(4).values():
            for other in names(4).values():
                network.loss(one, other, 0.05, what)
        found = await asyncio.gather(*(handing(network, client, mass, topology(graph)) for client in range(4)))
        await network.close()
        return zip(*found, strict=True)

    one_sided, used = virtual_run(main())
    assert min(used) >= 5
    if what == "message":
        assert sum(mass.values()) == pytest.approx(4, abs=1e-12) and not any(one_sided)
    else:
        assert sum(mass.values()) > 4 - 1e-12 and any(one_sided)
    assert min(mass.values()) > 0 and np.isfinite(sum(mass.values()))
