"""Sparse mixing matrices against the dense ones."""

import numpy as np
import pytest

from peerlora.errors import TopologyError
from peerlora.topology.sparse import (
    random_regular_links,
    ring_links,
    rounds_to_agree,
    sparse_metropolis,
    sparse_rho,
    torus_links,
)
from peerlora.topology.weights import metropolis, rho

GRAPHS = {
    "ring": (ring_links(40), 40),
    "torus": (torus_links(6), 36),
    "regular": (random_regular_links(50, 4, np.random.default_rng(0)), 50),
    "star and a tail": (np.array([[0, 1], [0, 2], [0, 3], [3, 4]]), 5),
}


def dense(links, nodes):
    adjacency = np.zeros((nodes, nodes), dtype=bool)
    adjacency[links[:, 0], links[:, 1]] = adjacency[links[:, 1], links[:, 0]] = True
    return adjacency


@pytest.mark.parametrize("name", GRAPHS)
def test_weights_and_rho_are_those_of_the_dense_matrix(name):
    links, nodes = GRAPHS[name]
    W, expected = sparse_metropolis(links, nodes), metropolis(dense(links, nodes))
    assert np.allclose(W.toarray(), expected, rtol=0, atol=1e-15)
    assert sparse_rho(W) == pytest.approx(rho(expected.T @ expected), abs=1e-9)


def test_a_large_ring_has_the_rho_of_the_closed_form():
    nodes = 300
    assert sparse_rho(sparse_metropolis(ring_links(nodes), nodes)) == pytest.approx(
        (1 + 2 * np.cos(2 * np.pi / nodes)) / 3, abs=1e-10
    )


def test_graphs_are_connected_and_have_their_degrees():
    degrees = dense(torus_links(5), 25).sum(axis=0)
    assert (degrees == 4).all()
    degrees = dense(random_regular_links(1000, 6, np.random.default_rng(1)), 1000).sum(axis=0)
    assert degrees.max() <= 6 and degrees.mean() > 5.9


@pytest.mark.parametrize("links", [[[0, 0], [0, 1]], [[0, 1], [1, 0]], [[0, 1], [0, 1]]])
def test_links_that_are_none_are_refused(links):
    with pytest.raises(TopologyError, match="each pair of different nodes once"):
        sparse_metropolis(np.array(links), 2)


def test_an_odd_degree_is_refused():
    with pytest.raises(TopologyError, match="degree=3 given"):
        random_regular_links(10, 3, np.random.default_rng(0))


def test_rounds_are_counted_until_little_disagreement_is_left():
    W = sparse_metropolis(torus_links(6), 36)
    x = np.random.default_rng(0).standard_normal((36, 3))
    rounds, after = rounds_to_agree(W, x, 0.01, 1000)
    assert rounds is not None
    power = np.linalg.matrix_power(W.toarray(), rounds)
    assert np.allclose(after, power @ x)
    left = [np.linalg.norm(y - y.mean(axis=0)) / np.linalg.norm(x - x.mean(axis=0)) for y in (after,)]
    assert left[0] <= 0.01 and np.allclose(after.mean(axis=0), x.mean(axis=0))
    assert rounds_to_agree(W, x, 0.01, rounds - 1)[0] is None
