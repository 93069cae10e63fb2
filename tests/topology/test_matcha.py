import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import others_slow
from peerlora.config.loading import parse_spec
from peerlora.topology.graphs import complete, pair_draw, path, ring, star
from peerlora.topology.matcha import best_weight, contraction, matcha, matchings, mean_square, probabilities
from peerlora.topology.schedule import build_topology


def enumerated(made):
    """E[W'W] over all ways in which the matchings can be active."""
    clients = made.L.shape[1]
    moment = np.zeros((clients, clients))
    for used in itertools.product([0, 1], repeat=len(made.p)):
        chance = np.prod(np.where(used, made.p, 1 - made.p))
        W = np.eye(clients) - made.a * np.tensordot(np.array(used), made.L, 1)
        moment += chance * W.T @ W
    return moment


def test_a_ring_of_six_at_full_and_half_budget_as_known():
    full = matcha(ring(6), 1.0)
    assert len(full.p) == 2 and full.p.tolist() == [1, 1]
    assert full.a == pytest.approx(0.4, abs=1e-4)  # 2 / (lambda_2 + lambda_max) = 2 / (1 + 4)
    assert contraction(full.L, full.p, full.a) == pytest.approx(0.36, abs=1e-4)
    half = matcha(ring(6), 0.5)
    assert half.p == pytest.approx([0.5, 0.5])
    # Eigenvalues mu of Lbar give 1 - 2 a mu + a^2 (mu^2 + mu); those of mu = 1/2 and mu = 2 meet at a = 4/7.
    assert half.a == pytest.approx(4 / 7, abs=1e-4)
    assert contraction(half.L, half.p, half.a) == pytest.approx(33 / 49, abs=1e-4)
    assert contraction(half.L, half.p, 0.566) == pytest.approx(0.674, abs=1e-3)


@pytest.mark.parametrize("budget", others_slow([0.3, 0.5, 1.0], [1]))
@pytest.mark.parametrize("graph", [ring(6), path(5), star(4), complete(4)])
def test_the_mean_square_is_that_of_the_enumeration(graph, budget):
    made = matcha(graph, budget)
    assert mean_square(made.L, made.p, made.a) == pytest.approx(enumerated(made), abs=1e-12)


@given(st.integers(2, 12), st.floats(0.2, 1), st.integers(0, 50))
@settings(max_examples=40)
def test_matchings_cover_every_link_once_and_share_no_client(clients, p, seed):
    graph = pair_draw(p, clients, np.random.default_rng(seed))
    found = matchings(graph)
    assert (
        sorted(pair for matching in found for pair in matching) == np.argwhere(np.triu(graph)).tolist()
        or sorted(map(list, (pair for matching in found for pair in matching))) == np.argwhere(np.triu(graph)).tolist()
    )
    for matching in found:
        ends = [i for pair in matching for i in pair]
        assert len(ends) == len(set(ends))
    assert len(found) <= max(0, 2 * int(graph.sum(axis=1).max()) - 1)


def two_cliques():
    """Two complete graphs of four with one bridge: the link that matters most."""
    graph = np.zeros((8, 8), dtype=bool)
    graph[:4, :4] = graph[4:, 4:] = True
    np.fill_diagonal(graph, False)
    graph[0, 4] = graph[4, 0] = True
    return graph


def test_the_bridge_is_used_more_often_than_the_rest_and_beats_equal_chances():
    made = matcha(two_cliques(), 0.4)
    bridge = next(m for m, pairs in enumerate(matchings(two_cliques())) if (0, 4) in pairs)
    assert made.p[bridge] == made.p.max() > 0.4 and made.p.mean() <= 0.4 + 1e-3
    equal = np.full(len(made.p), 0.4)
    assert contraction(made.L, made.p, made.a) < contraction(made.L, equal, best_weight(made.L, equal))


def test_the_chances_are_the_best_of_a_fine_grid():
    L = matcha(path(4), 0.5).L
    found = np.linalg.eigvalsh(np.tensordot(probabilities(L, 0.5), L, 1))[1]
    grid = [np.array([share, 1 - share]) for share in np.linspace(0, 1, 201)]
    assert found >= max(np.linalg.eigvalsh(np.tensordot(p, L, 1))[1] for p in grid) - 2e-3


def test_rounds_use_matchings_of_the_base_at_the_budget():
    made = build_topology(parse_spec("matcha base=ring budget=0.5"), 6, 1)
    base = ring(6)
    used = [made.links(t) for t in range(400)]
    assert all((links <= base).all() for links in used)
    assert np.mean([links.sum() / base.sum() for links in used]) == pytest.approx(0.5, abs=0.05)
    assert made.rho(rounds=4000) ** 2 == pytest.approx(0.674, abs=0.03)


def test_settings_of_the_base_that_would_do_nothing_are_refused():
    with pytest.raises(Exception, match="weights of the base graph given"):
        parse_spec("matcha base={kind: ring, weights: uniform}")
