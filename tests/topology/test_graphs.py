import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from peerlora.config.sections import TopologyConfig
from peerlora.errors import TopologyError
from peerlora.topology.graphs import build_graph, components, edge_draw, is_connected, keep_degrees

ADAPTER = TypeAdapter(TopologyConfig)
FIXED = ["ring", "torus", "path", "star", "complete", "exponential", "random-regular", "erdos-renyi"]


def graph(clients, kind, seed=0, **settings):
    return build_graph(ADAPTER.validate_python({"kind": kind, **settings}), clients, seed)


def edges(adjacency):
    return {(int(i), int(j)) for i, j in np.argwhere(np.triu(adjacency))}


@pytest.mark.parametrize(
    ("kind", "clients", "expected"),
    [
        ("ring", 4, {(0, 1), (1, 2), (2, 3), (0, 3)}),
        ("path", 4, {(0, 1), (1, 2), (2, 3)}),
        ("star", 4, {(0, 1), (0, 2), (0, 3)}),
        ("complete", 3, {(0, 1), (0, 2), (1, 2)}),
        ("path", 2, {(0, 1)}),
        ("star", 2, {(0, 1)}),
        ("exponential", 2, {(0, 1)}),
    ],
)
def test_small_graphs_by_hand(kind, clients, expected):
    assert edges(graph(clients, kind)) == expected


def test_torus_wraps_both_ways():
    grid = graph(12, "torus", rows=3)  # 0 1 2 3 / 4 5 6 7 / 8 9 10 11
    assert np.flatnonzero(grid[0]).tolist() == [1, 3, 4, 8]
    assert (grid.sum(axis=1) == 4).all()


def test_torus_without_rows_is_as_square_as_possible():
    assert (graph(36, "torus") == graph(36, "torus", rows=6)).all()
    assert (graph(15, "torus") == graph(15, "torus", rows=3)).all()


def test_exponential_neighbours():
    assert np.flatnonzero(graph(16, "exponential")[0]).tolist() == [1, 2, 4, 8, 12, 14, 15]


@pytest.mark.parametrize("degree", [2, 3, 4, 9])
def test_random_regular_has_the_degree_and_is_seeded(degree):
    first = graph(10, "random-regular", seed=1, degree=degree)
    assert (first.sum(axis=1) == degree).all()
    assert is_connected(first)
    assert (first == graph(10, "random-regular", seed=1, degree=degree)).all()
    assert degree == 9 or (first != graph(10, "random-regular", seed=2, degree=degree)).any()


def test_erdos_renyi_redraws_until_connected():
    sparse = [graph(10, "erdos-renyi", seed=seed, p=0.2) for seed in range(20)]
    assert all(map(is_connected, sparse))
    assert (sparse[3] == graph(10, "erdos-renyi", seed=3, p=0.2)).all()
    free = [graph(10, "erdos-renyi", seed=seed, p=0.2, allow_disconnected=True) for seed in range(20)]
    assert not all(map(is_connected, free))


@pytest.mark.parametrize("kind", FIXED)
def test_one_client_is_always_fine(kind):
    assert graph(1, kind).tolist() == [[False]]


def test_one_client_without_edges_is_fine():
    assert graph(1, "edges", edges=[]).tolist() == [[False]]


@pytest.mark.parametrize(
    ("clients", "settings", "told"),
    [
        (2, {"kind": "ring"}, "ring of 2 clients has a double edge; use at least 3"),
        (10, {"kind": "torus"}, "torus of 10 clients does not exist"),
        (7, {"kind": "torus"}, "torus of 7 clients does not exist"),
        (12, {"kind": "torus", "rows": 5}, "12 clients in 5 rows"),
        (12, {"kind": "torus", "rows": 6}, "both be at least 3"),
        (5, {"kind": "random-regular", "degree": 3}, "must be even; use topology.degree=4"),
        (3, {"kind": "random-regular", "degree": 3}, "at most 2 neighbours"),
        (4, {"kind": "random-regular", "degree": 1}, "disconnected in 200 of 200 .*allow_disconnected=true"),
        (30, {"kind": "erdos-renyi", "p": 0.01}, "p=0.01 and 30 clients .*allow_disconnected=true"),
        (3, {"kind": "edges", "edges": [[0, 1], [1, 3]]}, r"names client 3 in \[1, 3\]"),
        (3, {"kind": "edges", "edges": [[1, 1]]}, "links client 1 to itself"),
        (4, {"kind": "directed-ring", "chords": [[0, 9]]}, r"topology.chords names client 9 in \[0, 9\]"),
        (3, {"kind": "edges", "edges": [[0, 1], [1, 2]], "directed": True}, "disconnected: client 0 never hears from"),
        (4, {"kind": "edges", "edges": [[0, 1], [2, 3]]}, "never hears from 2, 3; .*allow_disconnected=true"),
    ],
)
def test_refusals_say_what_to_do(clients, settings, told):
    with pytest.raises(TopologyError, match=told):
        graph(clients, **settings)


def test_disconnected_graphs_can_be_wanted():
    split = graph(4, "edges", edges=[[0, 1], [3, 2]], allow_disconnected=True)
    assert edges(split) == {(0, 1), (2, 3)}
    assert components(split).tolist() == [0, 0, 1, 1]
    assert (graph(4, "random-regular", degree=1, allow_disconnected=True).sum(axis=1) == 1).all()


def test_an_edge_named_twice_counts_once():
    assert edges(graph(2, "edges", edges=[[0, 1], [1, 0]])) == {(0, 1)}


@given(st.sampled_from(FIXED), st.integers(2, 30), st.integers(0, 5))
@settings(max_examples=60)
def test_every_graph_is_symmetric_without_loops_and_connected(kind, clients, seed):
    try:
        built = graph(clients, kind, seed=seed)
    except TopologyError:
        assert kind in ("torus", "random-regular", "erdos-renyi") or (kind, clients) == ("ring", 2)
        return
    assert built.dtype == bool
    assert (built == built.T).all() and not built.diagonal().any()
    assert is_connected(built)


def test_edge_draw_has_the_probability_and_is_pure():
    drawn = [edge_draw(0.3, 10, 7, t) for t in range(300)]
    share = np.mean([adjacency.sum() / 90 for adjacency in drawn])
    assert share == pytest.approx(0.3, abs=0.02)
    assert (drawn[5] == edge_draw(0.3, 10, 7, 5)).all()
    assert (drawn[5] != drawn[6]).any() and (drawn[5] != edge_draw(0.3, 10, 8, 5)).any()


def test_directed_graphs_by_hand():
    assert np.argwhere(graph(3, "directed-ring", chords=[[0, 2]])).tolist() == [[0, 2], [1, 0], [2, 0], [2, 1]]
    assert np.flatnonzero(graph(16, "directed-exponential")[:, 0]).tolist() == [1, 2, 4, 8]
    assert np.argwhere(graph(3, "edges", edges=[[0, 1], [1, 2], [2, 0]], directed=True)).tolist() == [
        [0, 2],
        [1, 0],
        [2, 1],
    ]


def test_directed_parts_are_those_in_which_all_reach_each_other():
    one_way = graph(3, "edges", edges=[[0, 1], [1, 0], [1, 2]], directed=True, allow_disconnected=True)
    labels = components(one_way)
    assert labels[0] == labels[1] != labels[2] and not is_connected(one_way)


def test_weights_that_need_both_ways_are_refused_where_links_go_one_way():
    with pytest.raises(ValueError, match="weights=metropolis needs links both ways"):
        graph(3, "edges", edges=[[0, 1]], directed=True, weights="metropolis")
    with pytest.raises(ValueError, match="push-sum"):
        graph(3, "directed-ring", weights="metropolis")


@given(st.integers(1, 12), st.integers(0, 2**31), st.integers(1, 4))
def test_the_links_that_are_kept_are_all_that_can_be(clients, seed, least):
    """networkx' k-core: the largest part in which everybody has so many neighbours."""
    adjacency = edge_draw(0.4, clients, seed, 0)
    kept = keep_degrees(adjacency, least)
    degrees = kept.sum(axis=1)
    assert ((degrees == 0) | (degrees >= least)).all() and not (kept & ~adjacency).any()
    core = networkx.k_core(networkx.from_numpy_array(adjacency), least)
    assert {tuple(sorted(edge)) for edge in core.edges} == set(map(tuple, np.argwhere(np.triu(kept)).tolist()))
