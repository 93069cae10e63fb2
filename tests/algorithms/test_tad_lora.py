"""The interval that TAD-LoRA chooses, from closed forms of rho and from draws."""

import math

import pytest

from cases import others_slow
from peerlora.algorithms import build_algorithm
from peerlora.algorithms.adf_lora import ADFLoRA
from peerlora.algorithms.base import prepare
from peerlora.config.loading import parse_spec
from peerlora.errors import ConfigError
from peerlora.topology.schedule import build_topology


def topology(words, clients=10, seed=0):
    return build_topology(parse_spec(words), clients, seed)


def chosen(words, clients=10, rounds=150, seed=0, **settings):
    """(interval, reason)."""
    algorithm, (reason,) = prepare(build_algorithm("tad-lora", settings), topology(words, clients, seed), rounds)
    assert isinstance(algorithm, ADFLoRA)
    return algorithm.interval, reason


CLOSED = {
    "complete": (10, 0.0),
    "ring": (10, (1 + 2 * math.cos(2 * math.pi / 10)) / 3),
    "star": (10, 1 - 1 / 10),  # every link has weight 1/10: 1 - 1/10 is an eigenvalue of all leaf differences
    "path": (3, 2 / 3),  # weights 1/3: eigenvalues 1, 2/3, 0
    "torus rows=3": (9, 0.4),  # weights 1/5: eigenvalues 1, 2/5, -1/5
    "edges edges=[[0,1],[2,3]] allow_disconnected=true": (4, 1.0),
}


@pytest.mark.parametrize("words", CLOSED)
def test_rho_of_static_graphs_has_a_closed_form_and_gives_the_interval(words):
    clients, rho = CLOSED[words]
    assert topology(words, clients).rho() == pytest.approx(rho, abs=1e-12)
    expected = round(1 / math.sqrt(1 - rho)) if rho < 1 else 75
    interval, reason = chosen(words, clients)
    assert interval == expected
    assert f"every {expected} rounds" in reason and f"{rho:.4f}" in reason and "exact" in reason


@pytest.mark.parametrize(
    ("p", "expected", "seed"),
    others_slow(
        [(0.5, 1, 0), (0.2, 2, 1), (0.1, 2, 0), (0.05, 3, 1), (0.02, 5, 0), (0.02, 5, 1), (0.01, 6, 0)], [0, 3]
    ),
)
def test_sparser_random_graphs_get_longer_phases(p, expected, seed):
    # 1 / sqrt(1 - rho) is 1.28, 1.70, 2.22, 2.99, 4.57 and 6.40.
    exact = 1 / math.sqrt(1 - metropolis_rho(10, p))
    interval, reason = chosen(f"random p={p}", seed=seed)
    assert interval == expected == round(exact)
    assert "estimated from 5000 draws" in reason


def metropolis_rho(clients, p):
    """Exact rho of a graph drawn anew every round: E[W^T W] has one value on its diagonal, one elsewhere."""
    others = clients - 2  # of a neighbour: besides itself and the client

    def degree(count, fixed, at_least, power):
        """E[1 / (1 + max(at_least, fixed + Binomial(count, p)))^power]."""
        return sum(
            math.comb(count, k) * p**k * (1 - p) ** (count - k) / (1 + max(at_least, fixed + k)) ** power
            for k in range(count + 1)
        )

    diagonal = 0.0
    for m in range(clients):  # the client's own degree
        own = math.comb(clients - 1, m) * p**m * (1 - p) ** (clients - 1 - m)
        links, squares = m * degree(others, 1, m, 1), m * degree(others, 1, m, 2)
        # Two neighbours are linked with probability p; given that, their degrees are independent.
        apart, linked = (degree(others - 1, fixed, m, 1) ** 2 if m > 1 else 0.0 for fixed in (1, 2))
        pairs = m * (m - 1) * ((1 - p) * apart + p * linked)
        diagonal += own * (squares + 1 - 2 * links + squares + pairs)
    return math.sqrt(diagonal - (1 - diagonal) / (clients - 1))


def test_rho_of_two_clients_that_meet_at_random_has_a_closed_form():
    # W is J with probability p, else the identity: E[W^T W] - J = (1 - p)(I - J).
    assert topology("random p=0.36", 2).rho() == pytest.approx(0.8, abs=0.02)
    assert chosen("random p=0.36", 2)[0] == 2  # 1 / sqrt(0.2) = 2.2


def test_every_client_comes_to_the_same_interval_alone():
    # One object per client, as peers have; the run's own rounds are asked for in between by one of them only.
    alone = [topology("random p=0.03 drop_links=0.2", 24, seed=4) for _ in range(3)]
    for t in range(20):
        alone[1].at(t)
    answers = [prepare(build_algorithm("tad-lora", {}), each, 100) for each in alone]
    assert answers[0] == answers[1] == answers[2]


def test_contacts_that_happened_are_not_looked_at(monkeypatch):
    scheduled = topology("random p=0.1")
    monkeypatch.setattr(type(scheduled), "at", lambda self, t: pytest.fail("looked at a round of the run"))
    assert prepare(build_algorithm("tad-lora", {}), scheduled, 50)[0] == ADFLoRA(2)


@pytest.mark.parametrize(
    ("rounds", "words", "settings", "expected"),
    [
        (1, "ring", {}, 1),
        (2, "ring", {}, 1),
        (5, "ring", {}, 2),  # 2.8, but not more than half of the run
        (6, "ring", {}, 3),
        (150, "ring", {"c": 2.0}, 6),
        (150, "ring", {"c": 0.01}, 1),
        (150, "ring", {"c": 1e9}, 75),
        (7, "edges edges=[] allow_disconnected=true", {}, 3),
    ],
)
def test_the_interval_is_rounded_and_clamped(rounds, words, settings, expected):
    interval, reason = chosen(words, rounds=rounds, **settings)
    assert interval == expected
    assert f"within 1 to {max(1, rounds // 2)}" in reason


def test_one_client_switches_every_round():
    assert chosen("complete", 1)[0] == 1


def test_a_seed_decides_a_static_random_graph_and_so_the_interval():
    drawn = {seed: topology("erdos-renyi p=0.3", seed=seed).rho() for seed in range(4)}
    assert len(set(drawn.values())) == 4
    for seed, rho in drawn.items():
        assert chosen("erdos-renyi p=0.3", seed=seed)[0] == round(1 / math.sqrt(1 - rho))


@pytest.mark.parametrize("c", [0.0, -1.0, math.inf, math.nan])
def test_a_constant_that_gives_no_interval_is_refused(c):
    with pytest.raises(ConfigError, match=r"algorithm\.c"):
        build_algorithm("tad-lora", {"c": c})


def test_methods_that_choose_nothing_are_ready_as_they_are():
    for name in ("local", "dec-lora", "adf-lora", "rolora", "ffa-lora", "fedsa-lora"):
        algorithm = build_algorithm(name, {})
        assert prepare(algorithm, topology("ring"), 10) == (algorithm, ())
