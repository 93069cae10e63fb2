"""Over how many clients models average the noise of steps."""

import numpy as np
import pytest

from peerlora.config.loading import parse_spec
from peerlora.topology.averaging import noise_averaged_over
from peerlora.topology.schedule import build_topology


def topology(*words, clients=6, seed=0):
    return build_topology(parse_spec(list(words)), clients, seed)


@pytest.mark.parametrize("clients", [2, 10])
def test_on_a_complete_graph_noise_is_averaged_over_all(clients):
    assert noise_averaged_over(topology("complete", clients=clients), [1.0, 0.5, 0.2]) == pytest.approx(clients)


def test_of_a_fixed_graph_it_follows_from_the_eigenvalues():
    graph, rounds, n = topology("ring", clients=8), 12, 8
    eigenvalues = np.linalg.eigvalsh(graph.at(0).W)
    rates = [1 - t / rounds for t in range(rounds)]
    left = sum(rate**2 * (eigenvalues ** (2 * (rounds - t))).sum() / n for t, rate in enumerate(rates))
    assert noise_averaged_over(graph, rates) == pytest.approx(sum(rate**2 for rate in rates) / left)


@pytest.mark.parametrize(
    "words", [("random", "p=0.1"), ("directed-ring", "weights=push-sum"), ("random-out", "degree=1")]
)
def test_it_is_what_noise_of_that_size_leaves(words):
    graph, rates = topology(*words), [1.0] * 10 + [0.3] * 10
    noise, x, mass = np.random.default_rng(0), np.zeros((6, 40_000)), np.ones((6, 1))
    for t, rate in enumerate(rates):
        W = graph.at(t).W
        fresh = mass * rate * noise.standard_normal(x.shape)
        x, mass = W @ (x + fresh), W @ mass
    left = float(((x / mass) ** 2).mean())
    assert noise_averaged_over(graph, rates) == pytest.approx(sum(rate**2 for rate in rates) / left, rel=0.03)


def test_links_at_the_end_count_for_little_where_the_rate_has_fallen():
    rare, constant = topology("random", "p=0.05", clients=10), [1.0] * 60
    falling = [1 - t / 60 for t in range(60)]
    assert 1 < noise_averaged_over(rare, constant) < noise_averaged_over(rare, falling) < 10


def test_the_noise_of_clients_that_never_meet_is_their_own():
    assert noise_averaged_over(topology("random", "p=0.000001"), [1.0] * 5) == pytest.approx(1)
