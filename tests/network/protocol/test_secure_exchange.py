"""Secure sums between peers: those of the simulation to the bit, on every graph, for all that a method mixes once."""

from dataclasses import replace

import pytest
import torch
from in_memory import exchanges, together

from peerlora.config.sections import CompleteGraph, RandomGraph, RingGraph
from peerlora.errors import CompositionError, DivergenceError
from peerlora.exchange.combine import mean
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.topology.schedule import build_topology

HEAD = (("out.weight", (3, 2)),)
SPEC = AdapterSpec((LayerSpec("q", 5, 6), LayerSpec("v", 4, 3)), rank=2, alpha=4.0, head=HEAD)
PRIVATE = replace(SPEC, private_head=True)
CLIENTS = 5


def topology(kind):
    graphs = {"ring": RingGraph(kind="ring"), "complete": CompleteGraph(kind="complete")}
    graph = graphs.get(kind) or RandomGraph(kind="random", p=0.5)
    return replace(build_topology(graph, CLIENTS, seed=1), least_degree=2)


def adapters(spec=SPEC, dtype=torch.float32):
    flat = torch.randn(CLIENTS, spec.parameters, generator=torch.Generator().manual_seed(0))
    return Adapters(spec, flat.to(dtype), torch.tensor([spec.rank] * CLIENTS))


def simulated(kind, x, rounds):
    peers = StackedExchange(topology(kind), list(range(CLIENTS)))
    peers.secure = True
    for t in range(rounds):
        peers.begin(t)
        x = peers.mix(x)
    return x


@pytest.mark.parametrize("kind", ["ring", "complete", "random"])
@pytest.mark.parametrize("spec", [SPEC, PRIVATE])
def test_peers_and_simulation_add_the_same_whole_numbers(kind, spec):
    x, rounds = adapters(spec), 4
    with exchanges(topology(kind), secure=True) as peers:

        def run(client):
            own = x.rows([client])
            for t in range(rounds):
                peers[client].begin(t)
                own = peers[client].mix(own)
            return own, peers[client]

        found = together([lambda client=client: run(client) for client in range(CLIENTS)])
    expected = simulated(kind, x, rounds)
    for client, (own, exchange) in enumerate(found):
        assert torch.equal(own.flat, expected.flat[client : client + 1])
        assert exchange.given_up == 0 and not exchange.stats.missing and exchange.stats.received is None
    assert not torch.equal(expected.flat, x.flat)


def test_a_round_with_several_sums_and_other_trees():
    """Every sum of a round has a number, and masks, of its own."""
    values = torch.randn(CLIENTS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    W = torch.from_numpy(topology("ring").at(0).W)
    with exchanges(topology("ring"), secure=True) as peers:

        def run(client):
            own = {"u": values[client : client + 1], "v": 2 * values[client : client + 1]}
            peers[client].begin(0)
            return [peers[client].mix(own) for _ in range(3)]

        found = together([lambda client=client: run(client) for client in range(CLIENTS)])
    for client, sums in enumerate(found):
        for each in sums:
            assert torch.allclose(each["u"][0], (W @ values)[client], rtol=0, atol=1e-11)
            assert torch.allclose(each["v"][0], 2 * (W @ values)[client], rtol=0, atol=1e-11)


def test_no_message_that_crosses_holds_anything_of_what_it_says():
    """All neighbours send the same, all zeros: what a receiver gets of each differs in nearly every byte."""
    zeros, bodies = {"u": torch.zeros(1, 2048, dtype=torch.float64)}, []
    with exchanges(topology("complete"), secure=True) as peers:
        taken = peers[0].protocol.deliver

        async def noted(peer, header, body):
            bodies.extend([bytes(body[-8 * 2048 :])] if len(body) > 8 * 2048 else [])
            await taken(peer, header, body)

        peers[0].protocol.endpoint.transport.ends.receiver.deliver = noted

        def run(client):
            peers[client].begin(0)
            return peers[client].mix(zeros)["u"]

        found = together([lambda client=client: run(client) for client in range(CLIENTS)])
    assert all(not each.any() for each in found) and len(bodies) == CLIENTS - 1
    for body in bodies:
        assert abs(sum(byte == 0 for byte in body) - len(body) / 256) < 6 * (len(body) / 256) ** 0.5


def test_values_that_no_honest_senders_have_are_not_taken():
    """A member can spoil a sum, and nobody can say who it was; what is impossible is left out as a whole."""
    far = [1.0, 1.0, 1.0, 1.0, 3e6]
    with exchanges(topology("complete"), secure=True) as peers:

        def run(client):
            peers[client].begin(0)
            return float(peers[client].mix({"u": torch.full((1, 2), far[client])})["u"][0, 0])

        found = together([lambda client=client: run(client) for client in range(CLIENTS)])
        assert found[:4] == [1.0] * 4
        assert set(peers[0].stats.missing.values()) == {"out-of-range"} and peers[0].given_up == 1
        assert float(peers[0].stats.measures["sums_given_up"]) == 1 and not peers[0].graph.adjacency[0].any()


def test_what_secure_sums_cannot_do_is_refused_before_anything_is_sent():
    x = adapters().rows([0])
    with exchanges(topology("ring"), secure=True) as peers:
        peers[0].begin(0)
        for call in (lambda: peers[0].combine(x, mean), lambda: peers[0].mix({"c": torch.ones(1)}, target="c")):
            with pytest.raises(CompositionError, match="the mean over its neighbours alone"):
                call()
        with pytest.raises(DivergenceError, match="training has diverged"):
            peers[0].mix(replace(x, flat=x.flat * 1e9))
        assert peers[0].stats.bytes_sent == 0
