"""Values that no honest neighbour sends are refused; honest ones, at every scale that methods have, never are."""

import pytest
import torch

from peerlora.exchange.gossip_sum import LARGEST
from peerlora.network.base import Refused
from peerlora.network.protocol.value_bounds import allowed, check_state, check_values

OWN = {"A:q": torch.tensor([[0.5, -2.0]]), "B:q": torch.zeros(3, 1), "held": torch.ones(2, dtype=torch.bool)}
WEIGHTED = {"u.A": torch.tensor([4.0]), "w": torch.tensor(2.0, dtype=torch.float64)}


def weighted(value, weight):
    return {"u.A": torch.tensor([value]), "w": torch.tensor(weight, dtype=torch.float64)}


@pytest.mark.parametrize("value", [0.0, -1.0, 900.0, -1900.0, 1e-45])
def test_values_near_the_own_ones_are_taken(value):
    check_values(OWN, {**OWN, "B:q": torch.full((3, 1), value)})


@pytest.mark.parametrize("value", [2100.0, 1e6, -1e19, 3e38])
@pytest.mark.parametrize("places", ["all", "one"])
def test_values_far_from_the_own_ones_are_refused(value, places):
    sent = torch.zeros(3, 1)
    sent[: 3 if places == "all" else 1] = value
    with pytest.raises(Refused, match="out-of-range.*B:q"):
        check_values(OWN, {**OWN, "B:q": sent})


def test_the_bound_cannot_be_driven_up_round_by_round():
    """Who always sends the largest value that is taken moves the mean of two, and with it the next bound."""
    own = 1.0
    for _ in range(10):
        own = (own + allowed(own)) / 2
    assert own < 1e8  # by a thousand a round it would be 1e27
    assert allowed(0.0) == allowed(1.0) == 1e3 and allowed(1e7) == 2e7


@pytest.mark.parametrize("weight", [1e-9, 1.0, 4e8])
def test_weighted_values_are_compared_by_their_weight(weight):
    check_values(WEIGHTED, weighted(500 * weight, weight), ["w"], weighted=True)
    with pytest.raises(Refused, match="out-of-range.*u.A"):
        check_values(WEIGHTED, weighted(5000 * weight, weight), ["w"], weighted=True)


def test_a_target_weighs_nothing():
    check_values(WEIGHTED, weighted(5.0, 1e-9), ["w"])


@pytest.mark.parametrize("mass", [1e-300, 1e13, 1e300])
def test_masses_have_bounds(mass):
    with pytest.raises(Refused, match="out-of-range.*w is"):
        check_values(WEIGHTED, weighted(1.0, mass), ["w"])


@pytest.mark.parametrize("count", [-5.0, 2.0 * LARGEST, 1e300])
def test_sums_of_counts_have_bounds(count):
    own = {"sum": torch.tensor([3.0, 1e9], dtype=torch.float64)}
    check_values(own, {"sum": torch.tensor([float(LARGEST), 0.0], dtype=torch.float64)})
    with pytest.raises(Refused, match="out-of-range.*sum is"):
        check_values(own, {"sum": torch.tensor([count, 5.0], dtype=torch.float64)})


def test_a_state_that_nobody_could_train_on_is_refused():
    check_state(OWN.values(), {"A:q": torch.tensor([1e9])})
    with pytest.raises(Refused, match="out-of-range"):
        check_state(OWN.values(), {"A:q": torch.tensor([1e19])})
