"""One client per peer gives what the stacked exchange gives all clients at once."""

from dataclasses import replace

import pytest
import torch
from in_memory import exchanges, together

from peerlora.config.sections import CompleteGraph, EdgesGraph, RandomGraph, RingGraph
from peerlora.exchange.combine import Combined, mean
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec, mask_ranks
from peerlora.topology.schedule import build_topology

SPEC = AdapterSpec((LayerSpec("q", 5, 6), LayerSpec("v", 4, 3)), rank=2, alpha=4.0, head=(("out.weight", (3, 2)),))
RING, COMPLETE, RANDOM = RingGraph(kind="ring"), CompleteGraph(kind="complete"), RandomGraph(kind="random", p=0.5)
NOBODY = EdgesGraph(kind="edges", edges=[], allow_disconnected=True)


def adapters(clients=4, spec=SPEC, ranks=None):
    flat = torch.randn(clients, spec.parameters, generator=torch.Generator().manual_seed(0))
    return mask_ranks(Adapters(spec, flat, torch.tensor(ranks or [spec.rank] * clients)))


def both(graph, call, clients=4, t=1):
    """What ``call(exchange, rows)`` gives on a stacked exchange and on peers, with the exchanges."""
    topology = build_topology(graph, clients, seed=1)
    stacked = StackedExchange(topology, range(clients))
    stacked.begin(t)
    whole = call(stacked, slice(None))
    with exchanges(topology) as peers:

        def one(i):
            peers[i].begin(t)
            return call(peers[i], [i])

        parts = together([lambda i=i: one(i) for i in range(clients)])
    return whole, parts, stacked, peers


@pytest.mark.parametrize("graph", [RING, COMPLETE, RANDOM, NOBODY])
@pytest.mark.parametrize("private", [True, False])
def test_peers_mix_as_the_stacked_exchange_does(graph, private):
    x = adapters(spec=replace(SPEC, private_head=private))
    whole, parts, stacked, peers = both(graph, lambda exchange, rows: exchange.mix(x.rows(rows)))
    for i, part in enumerate(parts):
        assert torch.allclose(part.flat, whole.flat[i : i + 1], rtol=0, atol=1e-6)
        assert not peers[i].stats.missing
    assert sum(each.stats.bytes_sent for each in peers) == stacked.stats.bytes_sent
    linked = [each for each in peers if each.stats.bytes_sent]
    assert all(each.stats.bytes_per_edge == stacked.stats.bytes_per_edge for each in linked)


def largest(received):
    everybody = received.all_adapters.flat[received.senders]
    flat = everybody.amax(1).expand(received.own.clients, -1)
    return Combined(replace(received.own, flat=flat.clone()), {"scale": received.scaling.sum(1)})


@pytest.mark.parametrize("graph", [RING, RANDOM, NOBODY])
@pytest.mark.parametrize("rule", [mean, largest])
@pytest.mark.parametrize("ranks", [None, [1, 2, 2, 1]])
def test_peers_combine_as_the_stacked_exchange_does(graph, rule, ranks):
    x = adapters(spec=replace(SPEC, private_head=True), ranks=ranks)
    whole, parts, stacked, peers = both(graph, lambda exchange, rows: exchange.combine(x.rows(rows), rule))
    for i, part in enumerate(parts):
        assert torch.allclose(part.flat, whole.flat[i : i + 1], rtol=0, atol=1e-6)
        assert torch.equal(part.ranks, x.ranks[i : i + 1])
        for name, values in peers[i].stats.measures.items():
            assert float(values) == pytest.approx(float(stacked.stats.measures[name][i]), abs=1e-6)


def test_trees_and_numbers_cross():
    mass = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x = adapters()
    whole, parts, _, _ = both(
        RING, lambda exchange, rows: exchange.mix({"mass": mass[rows], "pair": (x.rows(rows), x.flat[rows])})
    )
    for i, part in enumerate(parts):
        assert float(part["mass"]) == pytest.approx(float(whole["mass"][i]))
        assert torch.allclose(part["pair"][0].flat[0], whole["pair"][0].flat[i], atol=1e-6)
        assert torch.allclose(part["pair"][1][0], whole["pair"][1][i], atol=1e-6)


def test_merged_parts_cross():
    x = adapters().with_empty_merges()
    generator = torch.Generator().manual_seed(1)
    sums = {
        "q": (torch.randn(4, 6, 2, generator=generator), torch.randn(4, 2, 5, generator=generator)),
        "v": (torch.randn(4, 3, 1, generator=generator), torch.randn(4, 1, 4, generator=generator)),
    }
    x = replace(x, merged=x.merged.plus(sums))

    def summed(received):
        layers = received.all_adapters.merged.layers
        value = sum(own.left[received.senders].sum((1, 2, 3)) + own.right[received.senders].sum((1, 2, 3))
                    for own in layers.values())  # fmt: skip
        return Combined(replace(received.own), {"sum": value})

    _, parts, stacked, peers = both(RING, lambda exchange, rows: exchange.combine(x.rows(rows), summed, merged=True))
    for i in range(4):
        assert float(peers[i].stats.measures["sum"]) == pytest.approx(float(stacked.stats.measures["sum"][i]), abs=1e-5)
        assert parts[i].merged is not None
    assert sum(each.stats.bytes_sent for each in peers) == stacked.stats.bytes_sent


def test_shared_random_is_that_of_the_simulation():
    def draw(exchange, _rows):
        return torch.rand(3, generator=exchange.shared_random("factors"))

    whole, parts, _, _ = both(RING, draw)
    assert all(torch.equal(part, whole) for part in parts)
