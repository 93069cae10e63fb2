"""Sparse tables of many clients against the dense ones: the same topologies, weights, eigenvalues and rounds."""

import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy.sparse import csr_array

from peerlora.config.topology import TopologyConfig
from peerlora.topology import storage
from peerlora.topology.describe import describe
from peerlora.topology.graphs import components, out_draw, pair_draw
from peerlora.topology.schedule import Topology, build_topology
from peerlora.topology.second_moment import KEPT, SecondMoment
from peerlora.topology.spectrum import largest_off_mean, mean_gram
from peerlora.topology.storage import as_dense, from_entries
from peerlora.topology.weights import (
    metropolis,
    metropolis_target,
    pairwise_weights,
    remove_links,
    rho,
    rho_of_eigenvalue,
)

SETTINGS = {
    "ring": {"kind": "ring"},
    "lazy ring": {"kind": "ring", "lazy": True},
    "clients away": {"kind": "torus", "drop_clients": 0.3},
    "path, Laplacian": {"kind": "path", "weights": "laplacian"},
    "star": {"kind": "star", "weights": "uniform"},
    "complete": {"kind": "complete"},
    "exponential": {"kind": "exponential"},
    "regular": {"kind": "random-regular", "degree": 4},
    "edges": {"kind": "edges", "edges": [[0, 1], [1, 2], [1, 0], [2, 3]], "allow_disconnected": True},
    "push-sum": {"kind": "directed-ring", "chords": [[0, 5], [3, 9]]},
    "rows": {"kind": "directed-ring", "chords": [[0, 5]], "weights": "row-average", "drop_clients": 0.2},
    "directed exponential": {"kind": "directed-exponential"},
    "one-peer": {"kind": "one-peer"},
    "hypercube": {"kind": "hypercube"},
    "base-k": {"kind": "base-k", "degree": 2},
    "equistatic": {"kind": "u-equistatic"},
    "directed equistatic": {"kind": "d-equistatic"},
    "equidyn": {"kind": "ou-equidyn"},
    "directed equidyn": {"kind": "od-equidyn"},
    "matcha": {"kind": "matcha", "base": "ring"},
    "pairwise": {"kind": "ring", "weights": "pairwise", "drop_clients": 0.2},
}
CLIENTS = 16


def topology(settings, clients=CLIENTS, seed=3):
    return build_topology(TypeAdapter(TopologyConfig).validate_python(settings), clients, seed)


@pytest.fixture
def sparse(monkeypatch):
    """Make all tables sparse from now on."""
    return lambda: monkeypatch.setattr(storage, "LARGE", 2)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_sparse_topology_is_the_dense_one(sparse, monkeypatch, name):
    drawn = topology(SETTINGS[name]).draws and 50  # in place of a thousand, the same ones for both
    monkeypatch.setattr(Topology, "draws", drawn)
    plain = topology(SETTINGS[name])
    rounds = [(plain.at(t), plain.at(t, [2, 5])) for t in range(6)]
    expected = describe(plain, 6, 8)
    sparse()
    found = topology(SETTINGS[name])
    assert found.properties == plain.properties and found.directed == plain.directed
    for t, (whole, without) in enumerate(rounds):
        for dense, made in ((whole, found.at(t)), (without, found.at(t, [2, 5]))):
            assert isinstance(made.W, csr_array) and isinstance(made.adjacency, csr_array)
            assert np.array_equal(made.adjacency.toarray(), dense.adjacency)
            assert np.allclose(made.W.toarray(), dense.W, rtol=0, atol=1e-12)
            assert made.edges == dense.edges and made.clients == CLIENTS
            assert made.degrees.tolist() == dense.degrees.tolist()
            assert made.out_degrees.tolist() == dense.out_degrees.tolist()
            assert [made.receivers(i) for i in range(CLIENTS)] == [dense.receivers(i) for i in range(CLIENTS)]
            assert [made.neighbours(i) for i in range(CLIENTS)] == [dense.neighbours(i) for i in range(CLIENTS)]
            assert np.allclose(made.weights([3, 1], [2, 3]), dense.W[np.ix_([3, 1], [2, 3])], rtol=0, atol=1e-12)
    told = describe(found, 6, 8)
    for figure, value in expected.items():
        if isinstance(value, float):
            assert told[figure] == pytest.approx(value, abs=1e-7), figure
        else:
            assert told[figure] == value, figure


@pytest.mark.parametrize("settings", [{"kind": "random", "p": 0.2}, {"kind": "random-out", "degree": 3}])
def test_drawn_graphs_of_many_clients_are_drawn_anew_and_the_same_for_a_seed(sparse, settings):
    sparse()
    one, other = topology(settings, 40), topology(settings, 40)
    assert np.array_equal(as_dense(one.at(1).adjacency), as_dense(other.at(1).adjacency))
    assert not np.array_equal(as_dense(one.at(1).adjacency), as_dense(one.at(2).adjacency))
    W = as_dense(one.at(1).W)
    assert np.allclose(W.sum(axis=0), 1) and (W >= 0).all()


def test_drawn_pairs_have_their_probability_each(sparse):
    sparse()
    clients, p, draws = 7, 0.3, 4000
    generator = np.random.default_rng(0)
    seen = sum(as_dense(pair_draw(p, clients, generator)).astype(int) for _ in range(draws))
    off = seen[~np.eye(clients, dtype=bool)] / draws
    assert np.abs(off - p).max() < 5 * np.sqrt(p * (1 - p) / draws) and seen.trace() == 0
    assert as_dense(pair_draw(1.0, 5, generator)).sum() == 20


def test_every_client_sends_to_so_many_others_each_as_often(sparse):
    sparse()
    seen = sum(as_dense(out_draw(2, 6, 0, t)).astype(int) for t in range(3000))
    assert (seen.sum(axis=0) == 6000).all() and seen.trace() == 0
    off = seen[~np.eye(6, dtype=bool)] / 3000
    assert np.abs(off - 0.4).max() < 5 * np.sqrt(0.4 * 0.6 / 3000)


@pytest.mark.parametrize("settings", [{"kind": "exponential"}, {"kind": "directed-exponential"}])
def test_dropped_links_of_many_clients_have_their_probability_and_leave_the_sums(sparse, settings):
    sparse()
    made = topology(settings | {"drop_links": 0.25}, 40)
    rounds = [made.at(t) for t in range(100)]
    planned = topology(settings, 40).at(0).degrees.sum()
    share = np.mean([graph.degrees.sum() for graph in rounds]) / planned
    assert share == pytest.approx(0.75, abs=0.02)
    assert np.array_equal(as_dense(rounds[7].W), as_dense(made.at(7).W))
    for graph in rounds[:5]:
        W = as_dense(graph.W)
        assert np.allclose(W.sum(axis=0), 1, rtol=0, atol=1e-12)
        assert made.directed or np.array_equal(W, W.T)


def test_formulas_take_both_kinds():
    adjacency = pair_draw(0.3, 12, np.random.default_rng(1))
    kept, c = csr_array(adjacency), np.random.default_rng(2).uniform(1, 3, 12)
    missing = np.triu(adjacency, 3) | np.triu(adjacency, 3).T
    for dense, made in [
        (metropolis(adjacency), metropolis(kept)),
        (metropolis_target(adjacency, c), metropolis_target(kept, c)),
        (
            pairwise_weights(adjacency, np.random.default_rng(3)),
            pairwise_weights(kept, np.random.default_rng(3)),
        ),
        (
            remove_links(metropolis(adjacency), missing, True),
            remove_links(metropolis(kept), csr_array(missing), True),
        ),
    ]:
        assert np.allclose(made.toarray(), dense, rtol=0, atol=1e-14)
    assert components(kept).tolist() == components(adjacency).tolist()


def test_entries_that_are_named_twice_keep_the_last_value(sparse):
    dense = from_entries(3, [0, 0, 1], [1, 1, 2], np.array([1.0, 2.0, 3.0]))
    sparse()
    assert np.array_equal(as_dense(from_entries(3, [0, 0, 1], [1, 1, 2], np.array([1.0, 2.0, 3.0]))), dense)


@pytest.mark.parametrize("clients", [300, 5000])
def test_a_large_ring_has_the_rho_of_the_closed_form(sparse, clients):
    sparse()
    expected = (1 + 2 * np.cos(2 * np.pi / clients)) / 3
    assert 1 - topology({"kind": "ring"}, clients).rho() == pytest.approx(1 - expected, rel=1e-4)


def test_a_ring_of_a_million_agrees_and_two_of_them_never_do():
    """An eigenvalue so close to 1 says by itself neither."""
    gap = 2 / 3 * (1 - np.cos(2 * np.pi / 10**6))
    assert 1 - rho_of_eigenvalue((1 - gap) ** 2, 10**6, connected=True) == pytest.approx(gap, rel=1e-4)
    assert rho_of_eigenvalue(1.0, 10**6, connected=True) < 1
    assert rho_of_eigenvalue((1 - gap) ** 2, 10**6) == 1.0


def test_a_random_regular_graph_of_many_clients_mixes_in_a_few_rounds():
    made = topology({"kind": "random-regular", "degree": 4}, 3000)
    assert isinstance(made.at(0).W, csr_array)
    W = made.at(0).W.toarray()
    x = np.random.default_rng(0).standard_normal(3000)
    for _ in range(300):  # a power iteration
        x = W @ x
        x -= x.mean()
        x /= np.linalg.norm(x)
    assert made.rho() == pytest.approx(float(np.linalg.norm(W @ x)), rel=1e-3)


def test_the_second_moment_of_sparse_rounds_is_that_of_dense_ones_and_comes_back_from_a_checkpoint(sparse):
    plain = topology({"kind": "torus", "drop_clients": 0.3})
    dense, matrices = SecondMoment(CLIENTS), [plain.at(t).W for t in range(7)]
    matrices[3] = matrices[2]
    sparse()
    made = SecondMoment(CLIENTS)
    for done, W in enumerate(matrices, start=1):
        dense.add(W)
        made.add(csr_array(W))
        assert made.rho(done) == pytest.approx(dense.rho(done), abs=1e-9)
    again = SecondMoment(CLIENTS)
    again.load_state_dict(made.state_dict())
    assert again.rho(7) == pytest.approx(dense.rho(7), abs=1e-9)
    again.add(csr_array(matrices[0]))
    dense.add(matrices[0])
    assert again.rho(8) == pytest.approx(dense.rho(8), abs=1e-9)
    fresh = SecondMoment(CLIENTS)
    fresh.load_state_dict(SecondMoment(CLIENTS).state_dict())
    fresh.add(csr_array(matrices[0]))
    assert fresh.rho(1) == pytest.approx(rho(matrices[0].T @ matrices[0]), abs=1e-9)


def test_of_many_different_rounds_a_sample_is_kept(sparse):
    sparse()
    made, drawn = SecondMoment(CLIENTS), topology({"kind": "torus", "drop_clients": 0.3})
    matrices = [drawn.at(t).W for t in range(2 * KEPT + 3)]
    for W in matrices:
        made.add(W)
    largest = largest_off_mean(mean_gram(matrices, [1] * len(matrices)), CLIENTS)
    assert made.rho(len(matrices)) == pytest.approx(np.sqrt(largest), abs=0.01)
    assert KEPT / 4 < len(made.state_dict()["moment.times"]) <= KEPT


def test_no_period_of_a_graph_is_in_step_with_the_sample(sparse):
    """A hypercube of 16 averages along four directions in turn: of two of them alone nobody would ever agree."""
    sparse()
    cube, made = topology({"kind": "hypercube"}), SecondMoment(CLIENTS)
    for t in range(KEPT + 52):
        made.add(cube.at(t).W)
        if t == KEPT + 10:
            again = SecondMoment(CLIENTS)
            again.load_state_dict(made.state_dict())
            made = again
    assert made.rho(KEPT + 52) == pytest.approx(np.sqrt(3 / 4), abs=1e-9)
    assert made.state_dict()["moment.times"].tolist() == [63] * 4
