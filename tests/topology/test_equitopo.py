import numpy as np
import pytest

from peerlora.config.loading import parse_spec
from peerlora.errors import TopologyError
from peerlora.topology.equitopo import equidyn, shift_basis
from peerlora.topology.schedule import build_topology
from peerlora.topology.weights import rho


@pytest.mark.parametrize("clients", [2, 5, 9])
def test_the_mean_over_all_shifts_is_J(clients):
    mean = np.mean([shift_basis(clients, u) for u in range(1, clients)], axis=0)
    assert mean == pytest.approx(np.full((clients, clients), 1 / clients))


@pytest.mark.parametrize("clients", [5, 9, 16])
@pytest.mark.parametrize("eta", [0.3, 0.5, 1.0])
def test_contraction_of_od_equidyn_in_closed_form(clients, eta):
    each = [(1 - eta) * np.eye(clients) + eta * shift_basis(clients, u) for u in range(1, clients)]
    moment = np.mean([W.T @ W for W in each], axis=0)
    assert rho(moment) ** 2 == pytest.approx((1 - eta) ** 2 + eta**2 * (1 - 2 / clients))


@pytest.mark.slow
def test_contraction_of_od_equidyn_at_nine_clients_as_known():
    made = build_topology(parse_spec("od-equidyn"), 9, 0)
    assert made.rho(rounds=4000) ** 2 == pytest.approx(0.444, abs=0.02)
    with_one = build_topology(parse_spec("od-equidyn eta=1"), 9, 0)
    assert with_one.rho(rounds=4000) ** 2 == pytest.approx(1 - 2 / 9, abs=0.02)


@pytest.mark.parametrize("kind", ["d-equistatic", "u-equistatic"])
def test_static_shifts_mix_at_a_speed_that_does_not_depend_on_the_number(kind):
    rates = [build_topology(parse_spec(f"{kind} degree=8"), clients, 1).rho() for clients in (20, 80, 300)]
    assert max(rates) < 0.85
    assert build_topology(parse_spec("ring"), 300, 1).rho() > 0.999


def test_static_shifts_use_the_degree_and_all_of_them_are_J():
    drawn = build_topology(parse_spec("d-equistatic degree=3"), 10, 2)
    assert (drawn.at(0).degrees == 3).all() and (drawn.at(0).out_degrees == 3).all()
    assert (build_topology(parse_spec("d-equistatic"), 10, 2).at(0).degrees == 4).all()  # log2 of 10, rounded up
    assert build_topology(parse_spec("d-equistatic degree=9"), 10, 2).rho() < 1e-7
    with pytest.raises(TopologyError, match="there are 9 different shifts"):
        build_topology(parse_spec("d-equistatic degree=10"), 10, 2)


def test_one_peer_shifts_give_every_client_one_peer_a_round():
    for t in range(20):
        W = equidyn("od-equidyn", 7, 0.5).W(3, t)
        assert ((W != 0).sum(axis=0) == 2).all() and ((W != 0).sum(axis=1) == 2).all()
        W = equidyn("ou-equidyn", 7, 0.5).W(3, t)
        assert (W == W.T).all() and ((W != 0).sum(axis=1) <= 2).all() and ((W != 0).sum(axis=1) == 2).sum() >= 4
