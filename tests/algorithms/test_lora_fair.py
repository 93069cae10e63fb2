"""What LoRA-FAIR promises: its objective never rises, and its closed form is where a long descent ends."""

from functools import partial

import numpy as np
import pytest
import torch
from plain_products import Drift
from scipy.optimize import minimize
from test_product_methods import GRAPHS, exchange, run, start

from cases import others_slow
from peerlora.algorithms import build_algorithm
from peerlora.algorithms.lora_fair import corrected_average

GRAPH_IDS = [graph.kind for graph in GRAPHS]


def trained(size=0.3):
    return Drift(range(4), size).fit(start(), "AB")


def pieces(x, peers, i, layer):
    """(D, Bbar, Abar) of one receiver, dense."""
    w = torch.from_numpy(peers.graph.W[i])[:, None, None]
    B, A = x.B[layer].double(), x.A[layer].double()
    return (w * (B @ A)).sum(0), (w * B).sum(0), (w * A).sum(0)


def frobenius(D, B, A, dB, ridge):
    return (D - (B + dB) @ A).square().sum() + ridge * dB.square().sum()


def cosine(D, B, A, dB, ridge):
    X = (B + dB) @ A
    return 1 - (D * X).sum() / (D.norm() * X.norm()) + ridge * dB.square().sum()


OBJECTIVES = {"ridge": frobenius, "cosine": cosine}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("graph", GRAPHS, ids=GRAPH_IDS)
@pytest.mark.parametrize("size", [1e-3, 0.3])
@pytest.mark.parametrize("ridge", others_slow([1e-4, 0.01, 10.0], [1]))
def test_the_objective_never_rises(objective, graph, size, ridge):
    x, peers = trained(size), exchange(graph)
    found = peers.combine(x, partial(corrected_average, ridge=ridge, cosine=objective == "cosine"))
    for i in np.flatnonzero(peers.graph.degrees):
        for layer in x.A:
            D, B, A = pieces(x, peers, i, layer)
            assert torch.allclose(found.A[layer][i], A, rtol=0, atol=1e-13)
            dB = found.B[layer][i] - B
            assert OBJECTIVES[objective](D, B, A, dB, ridge) <= OBJECTIVES[objective](D, B, A, 0 * dB, ridge) + 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("ridge", others_slow([0.05, 1.0], [0]))
def test_the_closed_form_is_where_a_long_descent_ends(ridge):
    x, peers = trained(), exchange(GRAPHS[0])
    found = peers.combine(x, partial(corrected_average, ridge=ridge, cosine=False))
    D, B, A = pieces(x, peers, 2, "v")
    dB = torch.zeros_like(B, requires_grad=True)
    optimizer = torch.optim.SGD([dB], lr=0.02)
    for _ in range(5000):
        optimizer.zero_grad()
        frobenius(D, B, A, dB, ridge).backward()
        optimizer.step()
    assert torch.allclose(found.B["v"][2] - B, dB.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "ridge"), [(0.3, 0.01), (0.3, 1.0), (1.0, 0.1)])
def test_the_cosine_objective_gets_as_low_as_a_library_s_minimiser(size, ridge):
    x, peers = trained(size), exchange(GRAPHS[0])
    found = peers.combine(x, partial(corrected_average, ridge=ridge, cosine=True))
    D, B, A = pieces(x, peers, 1, "q")

    def value(flat):
        dB = torch.tensor(flat, requires_grad=True)
        total = cosine(D, B, A, dB.view_as(B), ridge)
        total.backward()
        return total.item(), dB.grad.numpy()

    best = minimize(value, np.zeros(B.numel()), jac=True, method="L-BFGS-B", options={"maxiter": 2000}).fun
    start_value = float(cosine(D, B, A, 0 * B, ridge))
    ours = float(cosine(D, B, A, found.B["q"][1] - B, ridge))
    assert ours <= best + 0.01 * (start_value - best)


@pytest.mark.parametrize("ridge", [1e-6, 0.01, 1.0])
def test_a_common_A_needs_no_correction(ridge):
    x, peers = Drift(range(4)).fit(start(), "B"), exchange(GRAPHS[0])  # only B moved
    found = peers.combine(x, partial(corrected_average, ridge=ridge, cosine=False))
    assert torch.allclose(found.flat, peers.mix(x).flat, rtol=0, atol=1e-12)
    assert peers.stats.measures["uncorrected"].max() < 1e-24


@pytest.mark.parametrize("cosine_too", [False, True])
def test_what_was_left_uncorrected_is_measured(cosine_too):
    x, peers = trained(), exchange(GRAPHS[1])
    found = peers.combine(x, partial(corrected_average, ridge=0.01, cosine=cosine_too))
    for i in range(4):
        left = 0.0
        for layer in x.A:
            D, _, A = pieces(x, peers, i, layer)
            left += float((D - found.B[layer][i] @ A).square().sum())
        assert float(peers.stats.measures["uncorrected"][i]) == pytest.approx(left, rel=1e-9)


def test_less_ridge_leaves_less_and_the_projection_is_the_limit():
    x, peers = trained(), exchange(GRAPHS[2])
    left = []
    for ridge in (1e6, 1.0, 0.01, 1e-12):
        found = peers.combine(x, partial(corrected_average, ridge=ridge, cosine=False))
        left.append(float(peers.stats.measures["uncorrected"][0]))
    assert left == sorted(left, reverse=True)
    D, _, A = pieces(x, peers, 0, "q")
    projection = A.mT @ torch.linalg.solve(A @ A.mT, A)
    assert torch.allclose(found.B["q"][0] @ A, D @ projection, rtol=0, atol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_untrained_adapters_pass_unchanged(objective):
    x = start()
    found = exchange(GRAPHS[0]).combine(x, partial(corrected_average, ridge=0.01, cosine=objective == "cosine"))
    assert torch.allclose(found.flat, x.flat, rtol=0, atol=1e-14)


@pytest.mark.slow
def test_the_cosine_objective_runs_and_differs():
    ridge, cosine_run = (
        run(build_algorithm("lora-fair", {"objective": o}), start(), exchange(GRAPHS[0])) for o in OBJECTIVES
    )
    assert not torch.allclose(ridge[-1].flat, cosine_run[-1].flat) and cosine_run[-1].flat.isfinite().all()
