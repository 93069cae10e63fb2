"""Exact sums over the network by gossip."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_memory import exchanges, together

from peerlora.config.loading import load_config
from peerlora.errors import CompositionError, DataError, RunError
from peerlora.exchange.gossip_sum import gossip_rounds, network_sum, sum_schema
from peerlora.exchange.schema import encoded_bytes
from peerlora.exchange.stacked import StackedExchange
from peerlora.topology.schedule import build_topology


def topology(words, clients, seed=0, **settings):
    return build_topology(load_config({"topology": {"kind": words, **settings}}).topology, clients, seed)


def exchange(words, clients, **settings):
    return StackedExchange(topology(words, clients, **settings), range(clients))


GRAPHS = {
    "ring": {},
    "star": {},
    "complete": {},
    "random": {"p": 0.15},
    "path": {"drop_links": 0.3},
    "exponential": {"drop_clients": 0.2},
}


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("weights", ["metropolis", "pairwise"])
def test_gossip_gives_every_client_the_exact_sum(kind, weights):
    generator = np.random.default_rng(3)
    own = torch.from_numpy(generator.integers(0, 70_000, (9, 4)))
    peers = exchange(kind, 9, weights=weights, **GRAPHS[kind])
    found, _ = network_sum(own.double(), peers, peers.topology)
    assert torch.equal(found, own.sum(0).double().expand(9, 4))


@settings(max_examples=15)
@given(st.integers(2, 8), st.integers(0, 20), st.data())
def test_gossip_on_drawn_graphs(clients, seed, data):
    counts = data.draw(st.lists(st.integers(0, 10**9 // 8), min_size=clients, max_size=clients))
    own = torch.tensor(counts)[:, None].double()
    peers = StackedExchange(topology("random", clients, seed, p=0.4), range(clients))
    assert torch.equal(network_sum(own, peers, peers.topology)[0], own.sum(0).expand(clients, 1))


ONE_WAY = {
    "chord": ("directed-ring", {"chords": [[0, 3], [2, 7]]}),
    "drawn": ("random-out", {"degree": 2}),
    "failing": ("directed-ring", {"drop_links": 0.3}),
    "uneven": ("star", {"weights": "push-sum"}),
}


@pytest.mark.parametrize("graph", ONE_WAY)
def test_where_only_columns_sum_to_one_a_mass_goes_along(graph):
    kind, more = ONE_WAY[graph]
    own = torch.from_numpy(np.random.default_rng(3).integers(0, 70_000, (9, 4))).double()
    peers = exchange(kind, 9, **more)
    rounds = gossip_rounds(peers.topology)
    assert torch.equal(network_sum(own, peers, peers.topology)[0], own.sum(0).expand(9, 4))
    assert peers.stats.bytes_per_edge == encoded_bytes(sum_schema(4, peers.topology))
    plain = exchange(kind, 9, **more)  # without its mass: the same sums of N numbers are far off
    x = torch.cat([own, torch.ones(9, 1).double()], dim=1)
    for t in range(-rounds, 0):
        plain.begin(t)
        x = plain.mix({"sum": x})["sum"]
    assert float((9 * x[:, :4] - own.sum(0)).abs().max()) > 1000 < float(own.sum(0).min())


def test_a_round_less_would_not_be_enough_on_a_ring_with_a_chord():
    graph = topology("directed-ring", 5, chords=[[0, 3]])
    product = np.eye(5)
    for _ in range(gossip_rounds(graph) - 1):
        product = product @ graph.at(0).W
    share = product / product.sum(axis=1, keepdims=True)
    assert 5 * 2**31 * np.abs(share - 1 / 5).max() >= 1 / 20


@settings(max_examples=15)
@given(st.integers(3, 8), st.integers(0, 20), st.data())
def test_push_sum_on_drawn_graphs(clients, seed, data):
    counts = data.draw(st.lists(st.integers(0, 10**9 // 8), min_size=clients, max_size=clients))
    own = torch.tensor(counts)[:, None].double()
    peers = StackedExchange(topology("random-out", clients, seed, degree=1, drop_links=0.2), range(clients))
    assert torch.equal(network_sum(own, peers, peers.topology)[0], own.sum(0).expand(clients, 1))


def test_rows_that_sum_to_one_alone_keep_no_sum():
    with pytest.raises(CompositionError, match="the columns of its mixing matrix don't sum to 1"):
        gossip_rounds(topology("directed-ring", 5, chords=[[0, 2]], weights="row-average"))


def test_who_hears_of_nobody_on_one_way_links_is_refused():
    graph = topology("edges", 3, edges=[[0, 1], [1, 2]], directed=True, allow_disconnected=True)
    with pytest.raises(CompositionError, match="disconnected"):
        gossip_rounds(graph)


def test_one_client_needs_nobody():
    peers = exchange("complete", 1)
    own = torch.tensor([[3.0, 4.0]]).double()
    found, sent = network_sum(own, peers, peers.topology)
    assert torch.equal(found, own) and sent == 0


def test_one_round_is_enough_on_a_complete_graph():
    assert gossip_rounds(topology("complete", 7)) == 1


def test_a_network_with_too_many_rows_is_refused():
    peers = exchange("complete", 3)
    with pytest.raises(DataError, match="use fewer rows"):
        network_sum(torch.full((3, 2), 2.0**30).double(), peers, peers.topology)


def test_a_network_that_never_agrees_is_refused():
    parts = topology("edges", 4, edges=[[0, 1], [2, 3]], allow_disconnected=True)
    with pytest.raises(CompositionError, match="disconnected.*label_prior=uniform"):
        gossip_rounds(parts)
    with pytest.raises(CompositionError, match="more than 20000 rounds"):
        gossip_rounds(topology("ring", 400))


class Interrupted(StackedExchange):
    """Client 0 is away in some rounds."""

    def __init__(self, topology, away):
        self.away = away
        super().__init__(replace(topology, interrupted=True), range(topology.clients))

    def begin(self, t, absent=()):
        return super().begin(t, [0] if t in self.away else [])


@pytest.mark.parametrize("kind", ["ring", "complete"])
def test_a_sum_without_somebody_is_known_to_be_none(kind):
    peers = Interrupted(topology(kind, 6), range(-1000, 0))
    own = torch.arange(12).view(6, 2).double()
    with pytest.raises(RunError, match="links failed while it was gossiped.*label_prior=uniform"):
        network_sum(own, peers, peers.topology)


def test_links_that_fail_early_or_late_only_slow_it_down():
    plain = topology("ring", 6)
    rounds = gossip_rounds(plain)
    own = torch.arange(12).view(6, 2).double()
    for away in (range(-rounds, 5 - rounds), range(-3, 0), [-rounds // 2]):
        peers = Interrupted(plain, away)
        found, _ = network_sum(own, peers, plain)
        assert torch.equal(found, own.sum(0).expand(6, 2))


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.1, 0.9))
def test_a_sum_is_right_or_refused_whatever_fails(seed, share):
    plain = topology("random", 5, seed, p=0.6)
    draw = np.random.default_rng(seed)
    own = torch.from_numpy(draw.integers(0, 10**4, (5, 3))).double()
    away = [t for t in range(-gossip_rounds(plain), 0) if draw.random() < share]
    peers = Interrupted(plain, away)
    try:
        found, _ = network_sum(own, peers, plain)
    except RunError:
        return
    assert torch.equal(found, own.sum(0).expand(5, 3))


# --- between peers


def between_peers(own, before, deadline=1.0, graph=("ring", {})):
    """What each of four peers comes to, once ``before(network)`` has made something go wrong."""
    plain = topology(graph[0], 4, **graph[1])

    def one(peer, row):
        try:
            return network_sum(row[None], peer, plain)
        except RunError as error:
            return error, 0

    with exchanges(plain, deadline, first=-gossip_rounds(plain)) as peers:
        before(peers[0].protocol.endpoint.transport.network)
        calls = [partial(one, peer, row) for peer, row in zip(peers, own, strict=True)]
        return tuple(zip(*together(calls), strict=True))


OWN = torch.arange(12).view(4, 3).double()


@pytest.mark.parametrize("graph", [("ring", {}), ("directed-ring", {"chords": [[0, 2]]})], ids=["both ways", "one way"])
def test_peers_sum_as_the_simulation_does(graph):
    stacked = StackedExchange(topology(graph[0], 4, **graph[1]), range(4))
    expected, sent_by_all = network_sum(OWN, stacked, stacked.topology)
    found, sent = between_peers(OWN, lambda network: None, graph=graph)
    assert torch.equal(torch.cat(found), expected) and sum(sent) == sent_by_all


def test_a_lost_message_costs_nothing_of_the_sum():
    found, _ = between_peers(OWN, lambda network: network.lose("site-0", "site-1"))
    assert torch.equal(torch.cat(found), OWN.sum(0).expand(4, 3))


@pytest.mark.slow
def test_over_one_way_links_a_lost_message_costs_nothing_or_the_sum_is_refused():
    """Nobody knows of the other end of a one-way link before the deadline, when all lose patience at one moment: then a
    link may count at its receiver's end alone, and the share that its sender kept is there twice."""
    graph = ("directed-ring", {"chords": [[0, 2]]})
    found, _ = between_peers(OWN, lambda network: network.lose("site-0", "site-1"), graph=graph)
    for each in found:
        assert isinstance(each, RunError) or torch.equal(each, OWN.sum(0, keepdim=True))


def test_who_is_cut_off_is_missing_in_nobodys_sum():
    def cut(network):
        network.split(["site-2"])

    found, _ = between_peers(OWN, cut)
    assert all(isinstance(each, RunError) for each in found)
