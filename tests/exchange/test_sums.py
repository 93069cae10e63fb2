"""Exact sums over the network by gossip."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerlora.config import load_config
from peerlora.errors import CompositionError, DataError
from peerlora.exchange.stacked import StackedExchange
from peerlora.exchange.sums import gossip_rounds, network_sum
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
    found = network_sum(own.double(), peers, peers.topology)
    assert torch.equal(found, own.sum(0).double().expand(9, 4))


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 8), st.integers(0, 20), st.data())
def test_gossip_on_drawn_graphs(clients, seed, data):
    counts = data.draw(st.lists(st.integers(0, 10**9 // 8), min_size=clients, max_size=clients))
    own = torch.tensor(counts)[:, None].double()
    peers = StackedExchange(topology("random", clients, seed, p=0.4), range(clients))
    assert torch.equal(network_sum(own, peers, peers.topology), own.sum(0).expand(clients, 1))


def test_one_client_needs_nobody():
    peers = exchange("complete", 1)
    own = torch.tensor([[3.0, 4.0]]).double()
    assert torch.equal(network_sum(own, peers, peers.topology), own) and peers.bytes_sent == 0


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
