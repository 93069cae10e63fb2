"""Combining by a rule: what a rule gets to see, what it costs, and that mixing is the rule ``mean``."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from peerlora.config.sections import CompleteGraph, EdgesGraph, PathGraph, RandomGraph, RingGraph, StarGraph
from peerlora.exchange import combine as combine_module
from peerlora.exchange.combine import Combined, mean, receiver_blocks
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec, mask_ranks
from peerlora.topology.schedule import build_topology

SPEC = AdapterSpec((LayerSpec("q", 5, 6), LayerSpec("v", 4, 3)), rank=2, alpha=4.0, head=(("out.weight", (3, 2)),))
RING, PATH, COMPLETE = RingGraph(kind="ring"), PathGraph(kind="path"), CompleteGraph(kind="complete")
STAR, RANDOM = StarGraph(kind="star"), RandomGraph(kind="random", p=0.5)
NOBODY = EdgesGraph(kind="edges", edges=[], allow_disconnected=True)
SOMEBODY = EdgesGraph(kind="edges", edges=[(0, 1), (1, 2)], allow_disconnected=True)
PAIRWISE = RandomGraph(kind="random", p=0.6, weights="pairwise")


def adapters(clients=6, spec=SPEC, dtype=torch.float64, ranks=None, seed=0):
    flat = torch.randn(clients, spec.parameters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mask_ranks(Adapters(spec, flat.to(dtype), torch.tensor(ranks or [spec.rank] * clients)))


def exchange(graph=RING, clients=6, t=0, held=None, **options):
    made = StackedExchange(build_topology(graph, clients, seed=1), held or list(range(clients)), **options)
    made.begin(t)
    return made


def largest(received):
    """A rule that is no average: entry by entry the largest value that reached the receiver."""
    everybody = received.all_adapters.flat[received.senders]
    flat = everybody.amax(1).expand(received.own.clients, -1)
    return Combined(replace(received.own, flat=flat.clone()), {"count": (everybody * 0 + 1).sum((1, 2))})


@pytest.mark.parametrize("graph", [RING, PATH, COMPLETE, STAR, RANDOM, PAIRWISE, SOMEBODY, NOBODY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("private", [True, False])
def test_the_mean_is_mix(graph, dtype, private):
    x = adapters(spec=replace(SPEC, private_head=private), dtype=dtype)
    one, other = exchange(graph, t=3), exchange(graph, t=3)
    found, expected = one.combine(x, mean), other.mix(x)
    assert torch.allclose(found.flat, expected.flat, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)
    assert found.flat.dtype == dtype and torch.equal(found.ranks, x.ranks)
    assert (one.stats.bytes_sent, one.stats.bytes_per_edge) == (other.stats.bytes_sent, other.stats.bytes_per_edge)
    assert one.stats.sent is x is other.stats.sent and one.stats.seconds > 0


@pytest.mark.parametrize("graph", [RING, PATH, COMPLETE, STAR, RANDOM, SOMEBODY])
def test_a_rule_sees_every_sender_with_weight_and_nobody_else(graph):
    x, peers = adapters(), exchange(graph, t=2)
    found = peers.combine(x, largest)
    for i in range(6):
        senders = np.flatnonzero(peers.graph.W[i])
        assert torch.equal(found.flat[i], x.flat[senders].amax(0))
        told = len(senders) * SPEC.parameters if len(senders) > 1 else 0
        assert peers.stats.measures["count"][i] == told


def test_a_rule_gets_own_values_senders_weights_and_scaling_of_real_ranks():
    x, peers = adapters(ranks=[1, 2, 2, 1, 2, 2]), exchange(STAR)
    seen = {}

    def look(received):
        for k, own in enumerate(received.own.flat):
            i = int((x.flat == own).all(1).nonzero())
            row = min(k, len(received.senders) - 1)
            seen[i] = received.senders[row].tolist(), received.weights[row], received.scaling[row]
            assert torch.equal(received.A("v")[row], x.A["v"][received.senders[row]])
            assert torch.equal(received.B("v")[row], x.B["v"][received.senders[row]])
        assert received.layers == ("q", "v")
        return mean(received)

    peers.combine(x, look)
    assert sorted(seen) == list(range(6))
    for i, (senders, weights, scaling) in seen.items():
        assert senders == np.flatnonzero(peers.graph.W[i]).tolist() and i in senders
        assert torch.equal(weights, torch.from_numpy(peers.graph.W[i, senders]))
        assert torch.equal(scaling, 4.0 / x.ranks[senders])


@pytest.mark.parametrize("clients", [4, 10, 30])
def test_receivers_that_got_the_same_share_it(clients):
    blocks = []
    x = adapters(clients)
    exchange(COMPLETE, clients).combine(x, lambda received: blocks.append(received) or mean(received))
    (only,) = blocks
    assert only.own.clients == clients and only.senders.shape == only.weights.shape == (1, clients)


@pytest.mark.parametrize("graph", [RING, COMPLETE, STAR, RANDOM])
def test_blocks_hold_every_receiver_once_and_stay_within_the_bound(graph, monkeypatch):
    peers = exchange(graph, 30)
    for scalars in (1, 500, 10**9):
        monkeypatch.setattr(combine_module, "_SCALARS", scalars)
        rows = []
        for block in receiver_blocks(peers.graph.W, 100):
            rows += block.rows.tolist()
            dense = np.zeros((len(block.senders), 30))
            np.put_along_axis(dense, block.senders, block.weights, axis=1)
            assert np.allclose(np.broadcast_to(dense, (len(block.rows), 30)), peers.graph.W[block.rows], atol=1e-14)
            assert len(block.rows) == 1 or block.senders.size * 100 <= scalars or len(block.senders) == 1
            assert len(block.rows) == 1 or len(block.rows) * 100 <= scalars
        assert sorted(rows) == list(range(30))


def test_the_size_of_blocks_changes_nothing(monkeypatch):
    x = adapters()
    whole = exchange(RANDOM, t=1).combine(x, largest)
    monkeypatch.setattr(combine_module, "_SCALARS", 1)
    assert torch.equal(exchange(RANDOM, t=1).combine(x, largest).flat, whole.flat)


def test_combining_never_holds_all_pairs_at_once(monkeypatch):
    monkeypatch.setattr(combine_module, "_SCALARS", 4 * SPEC.parameters)
    sizes = []

    def note(received):
        sizes.append(received.all_adapters.flat[received.senders].numel())
        return mean(received)

    exchange(RANDOM, 20).combine(adapters(20), note)
    assert max(sizes) <= 20 * SPEC.parameters and len(sizes) >= 15


def test_without_contact_a_client_keeps_what_it_has_to_the_bit():
    x, peers = adapters(), exchange(SOMEBODY)
    found = peers.combine(x, largest)
    assert torch.equal(found.flat[3:], x.flat[3:]) and not torch.equal(found.flat[:3], x.flat[:3])
    assert torch.equal(exchange(NOBODY).combine(x, lambda received: 1 / 0).flat, x.flat)


def test_a_private_head_stays_and_is_not_shown():
    x = adapters(spec=replace(SPEC, private_head=True))

    def no_head(received):
        assert received.own.head == received.all_adapters.head == {}
        return largest(received)

    found = exchange().combine(x, no_head)
    assert torch.equal(found.select("head").flat, x.select("head").flat)
    assert torch.equal(found.select("A", "B").flat, exchange().combine(adapters(), largest).select("A", "B").flat)


@pytest.mark.parametrize("graph", [RING, COMPLETE, RANDOM])
def test_new_factors_leave_a_mixed_head_averaged(graph):
    x = adapters()

    def zeros(received):
        return received.with_factors({n: (torch.zeros(()), torch.ones(())) for n in received.layers}, {})

    found = exchange(graph, t=1).combine(x, zeros)
    assert torch.allclose(
        found.select("head").flat, exchange(graph, t=1).mix(x).select("head").flat, rtol=0, atol=1e-14
    )
    reached = exchange(graph, t=1).graph.degrees > 0
    assert (found.select("B").flat[reached] == 0).all() and (found.select("A").flat[reached] == 1).all()


def test_the_input_stays_as_it_was():
    x = adapters()
    before = x.flat.clone()
    exchange().combine(x, largest)
    assert torch.equal(x.flat, before)


def test_bytes_follow_the_real_ranks():
    x = adapters(ranks=[1, 2, 2, 2, 2, 2])
    one, other = exchange(), exchange()
    one.combine(x, mean), other.mix(x)
    assert one.stats.bytes_sent == other.stats.bytes_sent > 0 and one.stats.bytes_per_edge == other.stats.bytes_per_edge


def collective(x):
    """What a shard's ``gather`` collects: the rows of all clients, for its ranks and for its values."""
    return lambda rows: x.ranks[:, None] if rows.dtype == torch.int64 else x.flat


@pytest.mark.parametrize("graph", [RING, COMPLETE, RANDOM])
@pytest.mark.parametrize("held", [[0, 1], [2, 3, 4], [5]])
def test_a_shard_gets_its_rows_of_what_all_would_get(graph, held):
    x = adapters(ranks=[1, 2, 2, 1, 2, 2])

    def scaled(received):  # uses the senders' ranks, which a shard has to collect
        W = received.weights * received.scaling
        A = {n: torch.einsum("ij,ijrd->ird", W, received.A(n)) for n in received.layers}
        return received.with_factors({n: (torch.zeros(()), A[n]) for n in A}, {"scale": W.sum(1)})

    shard, whole = exchange(graph, held=held, gather=collective(x)), exchange(graph)
    part, everybody = shard.combine(x.rows(held), scaled), whole.combine(x, scaled)
    assert torch.allclose(part.flat, everybody.flat[held], rtol=0, atol=1e-14)
    assert torch.allclose(shard.stats.measures["scale"], whole.stats.measures["scale"][held], rtol=0, atol=1e-14)


def test_a_new_round_forgets_what_was_measured():
    peers = exchange()
    peers.combine(adapters(), largest)
    assert set(peers.stats.measures) == {"count"}
    peers.begin(1)
    assert peers.stats.measures == {}


def test_shared_draws_are_the_same_for_all_clients_of_a_round_and_differ_by_round_and_purpose():
    def draw(peers, purpose="sketch"):
        return torch.rand(5, generator=peers.shared_random(purpose))

    first = draw(exchange(held=[0, 1]))
    assert torch.equal(first, draw(exchange(held=[2])))
    others = [draw(exchange(t=1)), draw(exchange(), "other"), draw(StackedExchange(build_topology(RING, 6, 2), [0]))]
    assert not any(torch.equal(first, other) for other in others)
