import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerlora.errors import TopologyError
from peerlora.topology.graphs import complete, is_connected, pair_draw, path, ring, star
from peerlora.topology.weights import (
    lazy,
    mean_over_permutations,
    metropolis,
    metropolis_target,
    pairwise_weights,
    push_sum,
    remove_links,
    rho,
    row_average,
    spectral_gap,
    uniform,
    weights,
)

DOUBLY = ["laplacian", "metropolis", "uniform"]
random_graphs = st.builds(
    lambda clients, p, seed: pair_draw(p, clients, np.random.default_rng(seed)),
    st.integers(1, 12),
    st.floats(0, 1),
    st.integers(0, 1000),
)


def assert_doubly_stochastic(W):
    assert W.dtype == np.float64
    assert W.sum(axis=0) == pytest.approx(1, abs=1e-12) and W.sum(axis=1) == pytest.approx(1, abs=1e-12)
    assert (W >= -1e-12).all()


def second_largest(W):
    return np.sort(np.abs(np.linalg.eigvalsh(W)))[-2]


def test_metropolis_on_a_star_and_a_path_by_hand():
    assert metropolis(star(4)) * 4 == pytest.approx(np.array([[1, 1, 1, 1], [1, 3, 0, 0], [1, 0, 3, 0], [1, 0, 0, 3]]))
    assert metropolis(path(3)) * 3 == pytest.approx(np.array([[2, 1, 0], [1, 1, 1], [0, 1, 2]]))


def test_laplacian_of_one_link_by_hand():
    # L = [[1, -1], [-1, 1]] has largest eigenvalue 2, so the link weighs 2 / (3 * 2).
    assert weights(path(2), "laplacian") * 3 == pytest.approx(np.array([[2, 1], [1, 2]]))


def test_laplacian_weights_without_links_are_the_identity():
    assert (weights(np.zeros((3, 3), dtype=bool), "laplacian") == np.eye(3)).all()


def test_uniform_weighs_every_link_the_same():
    assert uniform(path(4)) * 3 == pytest.approx(np.array([[2, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 2]]))


@pytest.mark.parametrize("rule", ["metropolis", "uniform"])
def test_complete_graph_agrees_in_one_round(rule):
    W = weights(complete(7), rule)
    assert pytest.approx(1 / 7) == W
    assert rho(W.T @ W) == 0.0


@pytest.mark.parametrize("clients", [3, 4, 5, 10, 33])
def test_rho_of_a_ring_in_closed_form(clients):
    W = metropolis(ring(clients))
    assert rho(W.T @ W) == pytest.approx(1 / 3 + 2 / 3 * math.cos(2 * math.pi / clients), abs=1e-7)


def test_rho_of_rings_of_ten_as_known():
    for rule, expected in (("uniform", 0.873), ("laplacian", 0.936)):
        W = weights(ring(10), rule)
        assert rho(W.T @ W) == pytest.approx(expected, abs=5e-4)
        assert spectral_gap(W.T @ W) == pytest.approx(1 - expected, abs=5e-4)


def test_rho_of_a_path_by_hand():
    # Eigenvalues of [[2, 1, 0], [1, 1, 1], [0, 1, 2]] / 3 are 1, 2/3 and 0.
    W = metropolis(path(3))
    assert rho(W.T @ W) == pytest.approx(2 / 3)


def test_rho_of_no_mixing_is_exactly_one():
    assert rho(np.eye(5)) == 1.0
    assert rho(np.eye(1)) == 0.0


@given(random_graphs, st.sampled_from(DOUBLY))
@settings(max_examples=80)
def test_rules_are_symmetric_doubly_stochastic_and_local(adjacency, rule):
    W = weights(adjacency, rule)
    assert_doubly_stochastic(W)
    assert (W == W.T).all()
    assert ((W > 0) == (adjacency | np.eye(len(W), dtype=bool))).all()
    if rule == "laplacian":
        assert (W.diagonal() >= 1 / 3 - 1e-12).all()


@given(random_graphs, st.sampled_from(DOUBLY), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=80)
def test_removed_links_leave_their_weight_at_both_ends(adjacency, rule, share, seed):
    full = weights(adjacency, rule)
    missing = pair_draw(share, len(full), np.random.default_rng(seed))
    W = remove_links(full, missing)
    assert_doubly_stochastic(W)
    assert (W == W.T).all()
    kept = adjacency & ~missing
    assert (W[kept] == full[kept]).all() and (W[missing] == 0).all()


def test_removed_link_by_hand():
    missing = np.zeros((3, 3), dtype=bool)
    missing[0, 1] = missing[1, 0] = True
    W = remove_links(metropolis(path(3)), missing)
    assert W * 3 == pytest.approx(np.array([[3, 0, 0], [0, 2, 1], [0, 1, 2]]))


@given(random_graphs, st.integers(0, 99))
@settings(max_examples=60)
def test_pairwise_is_doubly_stochastic_and_seeded(adjacency, seed):
    W = pairwise_weights(adjacency, np.random.default_rng(seed))
    assert_doubly_stochastic(W)
    assert (W == pairwise_weights(adjacency, np.random.default_rng(seed))).all()


def test_pairwise_on_a_path_is_one_of_two_orders():
    first = np.array([[0.5, 0.5, 0], [0.25, 0.25, 0.5], [0.25, 0.25, 0.5]])  # 0-1 meet, then 1-2
    orders = {pairwise_weights(path(3), np.random.default_rng(seed)).tobytes() for seed in range(20)}
    assert orders == {first.tobytes(), first[::-1, ::-1].tobytes()}


@given(random_graphs, st.sampled_from(DOUBLY), st.integers(0, 99))
@settings(max_examples=60)
def test_mixing_keeps_the_mean_and_shrinks_disagreement_by_rho(adjacency, rule, seed):
    W = weights(adjacency, rule)
    x = np.random.default_rng(seed).normal(size=(len(W), 4))
    mixed = W @ x
    assert mixed.mean(axis=0) == pytest.approx(x.mean(axis=0), abs=1e-12)
    before, after = (np.linalg.norm(y - y.mean(axis=0)) for y in (x, mixed))
    assert after <= rho(W.T @ W) * before + 1e-6


@given(random_graphs.filter(lambda adjacency: len(adjacency) > 1), st.sampled_from(DOUBLY))
@settings(max_examples=40)
def test_rho_of_a_symmetric_w_is_its_second_largest_eigenvalue(adjacency, rule):
    W = weights(adjacency, rule)
    assert rho(W.T @ W) == pytest.approx(second_largest(W), abs=1e-6)


def test_mean_over_permutations_by_hand():
    # The mean over both orders of [[3, 1], [0, 1]] is [[2, 0.5], [0.5, 2]].
    assert mean_over_permutations(4.0, 5.0, 2) == pytest.approx(1.5, abs=1e-15)
    assert mean_over_permutations(1.0, 1.0, 1) == 0.0


@given(random_graphs, st.integers(0, 99))
@settings(max_examples=60)
def test_metropolis_with_a_target_keeps_detailed_balance_and_reaches_the_weighted_mean(adjacency, seed):
    c = np.random.default_rng(seed).uniform(0.2, 3, len(adjacency))
    W = metropolis_target(adjacency, c)
    assert (W >= -1e-12).all() and W.sum(axis=1) == pytest.approx(1, abs=1e-12)
    balance = c[:, None] * W
    assert balance == pytest.approx(balance.T, abs=1e-12)
    assert (W[~(adjacency | np.eye(len(c), dtype=bool))] == 0).all()
    if is_connected(adjacency) and len(c) > 1:
        limit = np.linalg.matrix_power(W, 20_000)
        assert limit == pytest.approx(np.tile(c / c.sum(), (len(c), 1)), abs=1e-9)


def test_renormalised_rows_miss_the_weighted_mean_that_the_target_weights_reach():
    c, x = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.arange(5.0)
    plain = metropolis(path(5)) * c
    biased = np.linalg.matrix_power(plain / plain.sum(axis=1, keepdims=True), 5000) @ x
    exact = np.linalg.matrix_power(metropolis_target(path(5), c), 5000) @ x
    assert exact == pytest.approx(c @ x / c.sum(), abs=1e-12)
    assert abs(biased[0] - c @ x / c.sum()) > 0.05


def test_equal_targets_on_a_regular_graph_are_metropolis_weights():
    assert metropolis_target(ring(6), np.full(6, 7.0)) == pytest.approx(metropolis(ring(6)))


@pytest.mark.parametrize("c", [[1.0, 0.0, 1.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0], [1.0, math.inf, 1.0]])
def test_targets_must_be_positive_numbers(c):
    with pytest.raises(TopologyError, match="needs a positive number"):
        metropolis_target(path(3), np.array(c))


def test_lazy_weights_have_no_negative_eigenvalue():
    W = metropolis(ring(4))
    assert np.linalg.eigvalsh(W)[0] == pytest.approx(-1 / 3)
    assert np.linalg.eigvalsh(lazy(W)) == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1])


def test_push_sum_and_row_average_by_hand():
    hears = np.array([[0, 0, 1], [1, 0, 0], [1, 1, 0]], dtype=bool)  # links 0 -> 1, 0 -> 2, 1 -> 2, 2 -> 0
    assert push_sum(hears) * 6 == pytest.approx(np.array([[2, 0, 3], [2, 3, 0], [2, 3, 3]]))
    assert row_average(hears) * 6 == pytest.approx(np.array([[3, 0, 3], [3, 3, 0], [2, 2, 2]]))
