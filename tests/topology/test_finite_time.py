import math

import numpy as np
import pytest

from cases import others_slow
from peerlora.errors import TopologyError
from peerlora.topology.finite_time import base_graph, hyper_hypercube, hypercube, one_peer


def product(plan):
    W = np.eye(len(plan.W(0, 0)))
    for t in range(plan.period):
        W = plan.W(0, t) @ W
    return W


def left(plan):
    W = product(plan)
    return np.abs(np.linalg.norm(W - 1 / len(W), 2))


@pytest.mark.parametrize("clients", range(2, 33))
def test_one_peer_reaches_the_mean_exactly_if_the_number_is_a_power_of_two(clients):
    plan = one_peer(clients)
    assert plan.period == math.ceil(math.log2(clients))
    assert (left(plan) < 1e-12) == (clients & (clients - 1) == 0)


def test_one_peer_leaves_what_is_known_for_six_and_twelve():
    for clients, entry in ((6, 1 / 12), (12, 1 / 24)):
        assert np.abs(product(one_peer(clients)) - 1 / clients).max() == pytest.approx(entry)


def test_one_peer_by_hand():
    W = one_peer(5).W(0, 1)  # i sends to i + 2
    assert W[2, 0] == W[0, 0] == 0.5 and W[0, 3] == 0.5


@pytest.mark.parametrize("clients", [1, 2, 4, 8, 64])
def test_hypercube_matchings_reach_the_mean_and_are_matchings(clients):
    plan = hypercube(clients)
    assert left(plan) < 1e-12
    for t in range(plan.period):
        W = plan.W(0, t)
        assert (W == W.T).all() and ((W - np.diag(np.diag(W)) > 0).sum(axis=1) == (clients > 1)).all()


@pytest.mark.parametrize("clients", [3, 6, 12])
def test_hypercubes_need_powers_of_two(clients):
    with pytest.raises(TopologyError, match=f"hypercube of {clients} clients .*base-k"):
        hypercube(clients)


def test_base_two_graph_of_five_by_hand():
    plan = base_graph(5, 1)
    assert plan.period == 5
    third = plan.W(0, 2)  # 4 and 0 meet with weight 4/5
    assert third[4, 0] == third[0, 4] == pytest.approx(4 / 5) and third[0, 0] == third[4, 4] == pytest.approx(1 / 5)
    x = plan.W(0, 2) @ plan.W(0, 1) @ plan.W(0, 0) @ np.arange(5.0)
    assert x[4] == pytest.approx(2)  # the mean, already there
    assert product(plan) == pytest.approx(np.full((5, 5), 1 / 5))


@pytest.mark.parametrize("k", others_slow([1, 2, 3, 4], [0, 2]))
def test_base_graphs_agree_within_a_short_period_for_every_number(k):
    for clients in [*range(1, 40), 64, 81, 97, 99]:
        plan = base_graph(clients, k)
        assert product(plan) == pytest.approx(np.full((clients, clients), 1 / clients), abs=1e-6), clients
        assert plan.period <= 2 * math.log(clients, k + 1) + 2, clients
        for t in range(plan.period):
            W = plan.W(0, t)
            assert (W == W.T).all() and (W >= -1e-12).all() and W.sum(axis=1) == pytest.approx(1)
            links = (W != 0) & ~np.eye(clients, dtype=bool)
            assert links.sum(axis=1).max() <= k, (clients, t)


def test_hyper_hypercube_uses_as_few_rounds_as_it_can():
    assert [len(groups[0]) for groups in hyper_hypercube(list(range(12)), 3)] == [4, 3]
    assert hyper_hypercube([5, 7, 9, 11], 1) == [[[5, 7], [9, 11]], [[5, 9], [7, 11]]]
