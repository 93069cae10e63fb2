"""``(B R)(R^-1 A) = B A``: methods that exchange products don't see a client's R; those that average factors do."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_products import Drift
from test_merge_methods import models, parts, settled
from test_product_methods import GRAPHS, UNEQUAL, exchange, run, start

from cases import others_slow
from peerlora.algorithms import build_algorithm

DRAWN = settings(max_examples=15)
EQUAL = (4, 4, 4, 4)
GRAPH, SEEDS, SPREADS = st.sampled_from(GRAPHS), st.integers(0, 2**31 - 1), st.floats(0, 2)


def turned(x, seed, spread):
    """The same products from other factors: for each client and layer an R of either determinant, with singular
    values from e^-spread to e^spread."""
    y, draw = replace(x, flat=x.flat.clone()), torch.Generator().manual_seed(seed)
    for layer in x.A:
        for i, r in enumerate(x.ranks.tolist()):
            U, V = (torch.linalg.qr(torch.randn(r, r, generator=draw, dtype=torch.float64))[0] for _ in range(2))
            values = (spread * (2 * torch.rand(r, generator=draw, dtype=torch.float64) - 1)).exp()
            values *= 2 * torch.randint(2, (r,), generator=draw) - 1
            y.B[layer][i, :, :r] = x.B[layer][i, :, :r] @ ((U * values) @ V)
            y.A[layer][i, :r] = V.T @ ((U.T @ x.A[layer][i, :r]) / values[:, None])
    return y


def both_ways(algorithm, state, graph, t, seed, spread):
    """What a round leaves if clients send what they trained, and if they send it in another gauge."""
    found = []
    for gauge in (lambda x: x, lambda x: turned(x, seed, spread)):
        learner, peers = Drift(range(4)), exchange(graph)
        with learner.round(t):
            peers.begin(t)
            sender = SimpleNamespace(fit=lambda x, train, gauge=gauge, learner=learner: gauge(learner.fit(x, train)))
            found.append(algorithm.round(t, state, sender, peers))
    return found


def assert_models_equal(algorithm, one, other):
    one, other = (models(algorithm.model(state)) for state in (one, other))
    for n, W in one.items():
        assert (W - other[n]).abs().max() <= 1e-8


CASES = [("decaf", EQUAL), ("decaf", UNEQUAL), ("flexlora", UNEQUAL), ("flora", EQUAL), ("flora", UNEQUAL)]


@pytest.mark.parametrize(("name", "ranks"), others_slow([*CASES, ("fedex-lora", EQUAL)], [1, 4]))
@DRAWN
@given(GRAPH, SEEDS, SPREADS)
def test_no_client_s_gauge_is_seen(name, ranks, graph, seed, spread):
    algorithm = build_algorithm(name, {})
    state = run(algorithm, start(ranks), exchange(graph), 2)[-1]
    one, other = both_ways(algorithm, state, graph, 2, seed, spread)
    assert_models_equal(algorithm, one, other)
    if name != "fedex-lora":  # its factors are averages; in each gauge the base makes up for them
        assert torch.allclose(one.flat, other.flat, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weighting", ["squared", "plain", "equal"])
@DRAWN
@given(GRAPH, SEEDS, SPREADS)
def test_fedhl_adds_and_weighs_what_was_learned_in_any_gauge(weighting, graph, seed, spread):
    """From references of a higher rank than the clients', so that what is subtracted, and the weights, count."""
    _, state, _, _ = settled(start(UNEQUAL), graph, 6, apart=0.5)
    algorithm = build_algorithm("fedhl", {"weighting": weighting})
    one, other = both_ways(algorithm, state, graph, 2, seed, spread)
    assert_models_equal(algorithm, one, other)
    for n, F in parts(one)[1].items():
        assert (F - parts(other)[1][n]).abs().max() <= 1e-8


def test_those_references_give_weights_that_matter():
    _, state, _, _ = settled(start(UNEQUAL), GRAPHS[0], 6, apart=0.5)
    found = []
    for weighting in ("squared", "plain", "equal"):
        algorithm = build_algorithm("fedhl", {"weighting": weighting})
        found.append(parts(both_ways(algorithm, state, GRAPHS[0], 2, 0, 1.0)[0])[1])
    for n, F in found[0].items():
        assert (F - found[1][n]).abs().max() > 0.1 and (F - found[2][n]).abs().max() > 0.1


@DRAWN
@given(SEEDS, st.floats(0.5, 2))
def test_averages_of_factors_see_it(seed, spread):
    algorithm = build_algorithm("dec-lora", {})
    state = run(algorithm, start(), exchange(GRAPHS[0]), 2)[-1]
    one, other = (models(x) for x in both_ways(algorithm, state, GRAPHS[0], 2, seed, spread))
    assert max((one[n] - other[n]).abs().max() for n in one) > 0.1
