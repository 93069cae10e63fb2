"""What DeCAF and FlexLoRA promise: exact up to the tail, and no dead directions."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import plain_products as plain
import pytest
import torch
from plain_products import Drift
from test_product_methods import GRAPHS, UNEQUAL, exchange, run, start

from peerlora.algorithms import build_algorithm
from peerlora.algorithms.decaf import averaged_products
from peerlora.lora.adapters import mask_ranks
from peerlora.runtime.compose import compose

GRAPH_IDS = [graph.kind for graph in GRAPHS]


def trained(ranks=(4, 4, 4, 4), size=0.3):
    return Drift(range(4), size).fit(start(ranks), "AB")


def updates(x):
    """The dense s B A of every client, by layer."""
    return {layer: x.scaling[:, None, None] * (x.B[layer] @ A) for layer, A in x.A.items()}


def low_rank(rank):
    """Every client's factors in use up to this rank; beyond it B is zero."""
    x = trained()
    for B in x.B.values():
        B[:, :, rank:] = 0
    return x


@pytest.mark.parametrize("graph", GRAPHS, ids=GRAPH_IDS)
@pytest.mark.parametrize("ranks", [(4, 4, 4, 4), UNEQUAL])
def test_what_is_lost_is_the_tail_and_nothing_else(graph, ranks):
    x, peers = trained(ranks), exchange(graph)
    found, W = updates(peers.combine(x, averaged_products)), torch.from_numpy(peers.graph.W)
    lost = torch.zeros(4, dtype=torch.float64)
    for layer, P in updates(x).items():
        wanted = torch.einsum("ij,jdk->idk", W, P)
        lost += (wanted - found[layer]).square().sum((1, 2))
        values = torch.linalg.svdvals(wanted)
        best = torch.stack([own[r:].square().sum() for own, r in zip(values, ranks, strict=True)])
        reached = torch.from_numpy(peers.graph.degrees > 0)
        assert torch.allclose((wanted - found[layer]).square().sum((1, 2))[reached], best[reached], rtol=1e-9)
    assert torch.allclose(peers.stats.measures["truncation_tail"], lost, rtol=1e-9, atol=1e-12) and lost.max() > 0.1


@pytest.mark.parametrize("graph", GRAPHS, ids=GRAPH_IDS)
def test_with_rank_enough_it_is_exact_gossip_of_products(graph):
    x, peers = low_rank(1), exchange(graph)  # four products of rank 1 have sums of rank 4 at most
    found, W = updates(peers.combine(x, averaged_products)), torch.from_numpy(peers.graph.W)
    for layer, P in updates(x).items():
        assert torch.allclose(found[layer], torch.einsum("ij,jdk->idk", W, P), rtol=0, atol=1e-12)
        assert torch.allclose(found[layer].mean(0), P.mean(0), rtol=0, atol=1e-12)  # W is doubly stochastic
    assert peers.stats.measures["truncation_tail"].abs().max() < 1e-24


def test_alone_the_product_stays():
    x = trained()
    found = exchange(GRAPHS[2], 4).combine(replace(x, flat=x.flat[:1].repeat(4, 1)), averaged_products)
    for layer, P in updates(x).items():
        assert torch.allclose(updates(found)[layer], P[:1].expand(4, -1, -1), rtol=0, atol=1e-12)


def test_by_hand_ranks_one_and_two_count_with_their_scaling():
    # alpha 6: s = 6, 3, 2, 1.5.  Clients 0 and 1 (ranks 1, 2) have s B A = 6 * 1 * 2 and 3 * 2 * 4 in one corner.
    x = start((1, 2, 3, 4))
    x = replace(x, flat=torch.zeros_like(x.flat))
    x.B["q"][0, 0, 0], x.A["q"][0, 0, 0], x.B["q"][1, 0, 0], x.A["q"][1, 0, 0] = 1, 2, 2, 4
    found = exchange(GRAPHS[2]).combine(x, averaged_products)
    for i, s in enumerate([6, 3, 2, 1.5]):
        assert float(updates(found)["q"][i, 0, 0]) == pytest.approx((12 + 24) / 4)
        assert float(found.B["q"][i, 0, 0]) == pytest.approx((9 / s) ** 0.5) == float(found.A["q"][i, 0, 0])


# --- the traps


@pytest.mark.parametrize("name", ["decaf", "flexlora"])
@pytest.mark.parametrize("ranks", [(4, 4, 4, 4), UNEQUAL])
def test_before_anything_was_trained_the_exchange_changes_nothing(name, ranks):
    x, peers, idle = start(ranks), exchange(GRAPHS[0]), SimpleNamespace(fit=lambda x, train: x)
    found = build_algorithm(name, {}).round(0, x, idle, peers)
    assert torch.equal(found.flat, x.flat) and found.select("A").flat.any()
    assert not peers.stats.measures["truncation_tail"].any()


def test_the_cycle_is_the_paper_s_whatever_it_starts_with():
    # The paper: consensus, local steps, consensus, ...; ours begins with local steps.
    algorithm, peers, learner = build_algorithm("decaf", {}), exchange(GRAPHS[3]), Drift(range(4))
    x = start()
    for t in range(4):
        peers.begin(max(0, t - 1))  # the graph that we use at the end of round t - 1
        x = peers.combine(x, averaged_products)
        if t < 3:
            with learner.round(t):
                x = learner.fit(x, "AB")
    assert torch.equal(run(algorithm, start(), exchange(GRAPHS[3]), 3)[-1].flat, x.flat)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_directions_that_the_average_lacks_can_still_train(kept):
    x, peers = low_rank(kept), exchange(GRAPHS[2])
    for layer in x.A:  # the same product everywhere: the average has its rank
        x.A[layer].copy_(x.A[layer][:1].expand_as(x.A[layer]).clone())
        x.B[layer].copy_(x.B[layer][:1].expand_as(x.B[layer]).clone())
    found = peers.combine(x, averaged_products)
    for layer, A in found.A.items():
        assert not found.B[layer][:, :, kept:].any() and torch.equal(A[:, kept:], x.A[layer][:, kept:])
        B, A, wanted = found.B[layer][0].requires_grad_(), A[0], torch.ones(found.B[layer].shape[1], A.shape[-1])
        (gradient,) = torch.autograd.grad((B @ A - wanted).square().sum(), B)
        assert (gradient.norm(dim=0) > 1e-3).all()


def test_unequal_ranks_keep_their_padding():
    x = trained(UNEQUAL)
    found = exchange(GRAPHS[0]).combine(x, averaged_products)
    assert torch.equal(found.flat, mask_ranks(found).flat) and torch.equal(found.ranks, x.ranks)


def test_receivers_with_the_same_neighbourhood_get_the_same_factors():
    found = exchange(GRAPHS[2]).combine(trained(), averaged_products)
    assert torch.equal(found.flat, found.flat[:1].expand(4, -1))


# --- the server


def served(x):
    """FlexLoRA's server: the mean of the products by layer, and for each client its best approximation of rank r_i."""
    clients = plain.taken_apart(x)
    sent = [[] for _ in clients]
    for n in x.A:
        U, values, V = np.linalg.svd(np.mean([client.product(n) for client in clients], axis=0), full_matrices=False)
        for parts, client in zip(sent, clients, strict=True):
            r = client.rank
            parts.append((U[:, :r] * values[:r]) @ V[:r])
    return sent, np.mean([client.head for client in clients], axis=0)


@pytest.mark.parametrize("name", ["decaf", "flexlora"])
@pytest.mark.parametrize("ranks", [(4, 4, 4, 4), UNEQUAL])
def test_on_the_complete_graph_it_is_flexlora_with_a_server(name, ranks):
    learner, seen = Drift(range(4)), []

    def fit(x, train):
        seen.append(learner.fit(x, train))
        return seen[-1]

    both = SimpleNamespace(round=learner.round, fit=fit)
    states = run(build_algorithm(name, {}), start(ranks), exchange(GRAPHS[2]), learner=both)
    for trained, found in zip(seen, states, strict=True):
        sent, head = served(trained)
        for client, products in zip(plain.taken_apart(found), sent, strict=True):
            assert np.allclose(client.head, head, rtol=0, atol=1e-12)
            for n, P in zip(found.A, products, strict=True):
                assert np.allclose(client.product(n), P, rtol=0, atol=1e-11)


def test_flexlora_says_where_there_is_no_server():
    algorithm = build_algorithm("flexlora", {})
    assert algorithm.prepared(exchange(GRAPHS[2]).topology, 5) == (algorithm, ())
    assert "decentralised form, decaf" in algorithm.prepared(exchange(GRAPHS[0]).topology, 5)[1][0]


def test_it_learns_on_a_real_model(config):
    federation = compose(config("bert", "algorithm.name=decaf", "train.lr=0.02", "train.local_steps=5"))
    losses = []
    state = federation.algorithm.start(federation.start, federation.exchange)
    for t in range(10):
        with federation.learner.round(t) as trained:
            federation.exchange.begin(t)
            state = federation.algorithm.round(t, state, federation.learner, federation.exchange)
            losses.append(float(trained.losses.mean()))
    assert losses[-1] < 0.7 * losses[0]
