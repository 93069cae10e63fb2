"""The methods that change local gradients, on quadratics whose solutions are known.

Fixtures and figures: Q1 equal curvatures, Q2 unequal ones, Q3 coupled blocks (quadratics.py).  Figures with a seed were
found by an independent script on the same draw.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratics import ROUNDING, Quadratics, adapters, coupled, curvatures, end, exchange, run

from cases import others_slow
from peerlora.algorithms import build_algorithm
from peerlora.algorithms.k_gt import KGT
from peerlora.errors import ConfigError
from peerlora.lora.adapters import Adapters
from peerlora.network.protocol.wire import encoded_bytes
from peerlora.train.base import LocalPlan
from peerlora.train.local_rules import DualProx

RING4 = {"kind": "ring", "weights": "uniform"}  # every weight 1/3: eigenvalues 1, 1/3, 1/3, -1/3
ALONE = {"kind": "edges", "edges": [], "allow_disconnected": True}
DUALS = ["dfedadmm", "dfedadmm-sam", "fedspeed"]
PENALTY = {"penalty": 10.0}  # lambda = 0.1, that of the closed forms


def drawn(clients=6):
    """b and a of the seeded figures."""
    draw = np.random.default_rng(0)
    return 3 * draw.normal(size=clients), draw.uniform(0.5, 2, clients)


def errors(learner, u):
    """(error of the mean, disagreement) of the first coordinate."""
    mean = u[:, 0].mean()
    return float((mean - learner.solution[0]).abs()), float((u[:, 0] - mean).norm())


def noisy(x, seed=1, size=1.0):
    return replace(x, flat=x.flat + size * torch.from_numpy(np.random.default_rng(seed).normal(size=x.flat.shape)))


# --- closed forms on a ring of 4 with weights 1/3

CLOSED = [
    ("dsgd", {}, {}, 0.0476190, -0.0256410),
    ("dfedavg", {}, {"local_steps": 5}, 0.1699557, -0.1140541),
    ("dfedavgm", {}, {"momentum": 0.0, "local_steps": 5}, 0.1699557, -0.1140541),
    ("fedprox", {"mu": 2.0}, {"local_steps": 300}, 1 / 7, -1 / 11),  # eta is 1 / (1 + mu)
    ("dfedadmm", PENALTY, {"local_steps": 5, "lr": 0.05}, 0.0476190, -0.0256410),
    ("dfedadmm", PENALTY, {"local_steps": 1, "lr": 0.1}, 0.0476190, -0.0256410),
    ("fedspeed", PENALTY | {"alpha": 0.0}, {"local_steps": 3, "lr": 0.02}, 0.0476190, -0.0256410),
    ("k-gt", {}, {"local_steps": 5}, 0.0, 0.0),
    ("d2", {}, {}, 0.0, 0.0),
    ("consensus-admm", {"rho": 0.3}, {"local_steps": 5}, 0.0, 0.0),
]


@pytest.mark.parametrize(("method", "own", "train", "slow", "fast"), CLOSED)
def test_where_clients_end_on_a_ring_of_four(method, own, train, slow, fast):
    peers = exchange(RING4, 4)
    for b, expected in (([1.0, 0.0, -1.0, 0.0], slow), ([1.0, -1.0, 1.0, -1.0], fast)):
        u = end(method, own, curvatures(np.ones(4), np.array(b), **train), peers, adapters(4))
        assert float(u[0, 0]) == pytest.approx(expected, abs=5e-8)
        assert u[:, 0].numpy() == pytest.approx(float(u[0, 0]) * np.array(b), abs=ROUNDING)


# --- what is exact, and what is not

TABLE = [  # mean error and disagreement on Q1, then on Q2; ring of 6, lr 0.1
    ("dsgd", {}, {}, "ring", (0, 1.7e-1, 1.3e-2, 3.2e-1)),
    ("dfedavg", {}, {"local_steps": 5, "lr": 0.05}, "ring", (0, 3.2e-1, 4.4e-3, 5.5e-1)),
    ("dfedadmm", PENALTY, {"local_steps": 5}, "ring", (0, 1.7e-1, 1.3e-2, 3.2e-1)),
    ("dfedadmm", PENALTY, {"local_steps": 5}, "complete", (0, 0, 0, 0)),
    ("k-gt", {}, {"local_steps": 1}, "ring", (0, 0, 0, 0)),
    ("k-gt", {}, {"local_steps": 5, "lr": 0.05}, "ring", (0, 0, 0, 0)),
    ("d2", {}, {}, "ring", (0, 0, 0, 0)),
    ("consensus-admm", {"rho": 0.3}, {"local_steps": 5}, "ring", (0, 0, 0, 0)),
    ("consensus-admm", {"rho": 0.3}, {"local_steps": 60}, "ring", (0, 0, 0, 0)),
]


@pytest.mark.parametrize(("method", "own", "train", "topology", "expected"), others_slow(TABLE, [0, 2, 4, 6, 7]))
def test_bias_and_disagreement_on_equal_and_unequal_curvatures(method, own, train, topology, expected):
    b, a = drawn()
    found = []
    for curvature in (np.ones(6), a):
        learner = curvatures(curvature, b, **train)
        found += errors(learner, end(method, own, learner, exchange(topology, 6), adapters(6)))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours < ROUNDING if theirs == 0 else ours == pytest.approx(theirs, rel=0.05)


# --- what we do not have, written out: why the methods are as they are


def combine_then_adapt(learner, W, lr=0.1, rounds=2000):
    """``x+ = W x - lr g(x)``: the form of DSGD that takes its gradient before mixing."""
    u = torch.zeros_like(learner.r)
    for _ in range(rounds):
        u = W @ u - lr * (torch.einsum("cij,cj->ci", learner.H, u) - learner.r)
    return u


@pytest.mark.parametrize(("b", "expected"), [([1, 0, -1, 0], 0.1304348), ([1, -1, 1, -1], 0.0697674)])
def test_combine_then_adapt_ends_farther_apart_on_a_ring_of_four(b, expected):
    W, b = torch.from_numpy(exchange(RING4, 4).graph.W), np.array(b, float)
    u = combine_then_adapt(curvatures(np.ones(4), b), W)[:, 0].numpy()
    assert u == pytest.approx(expected * b, abs=5e-8)
    eigenvalue = 1 / 3 if b[1] == 0 else -1 / 3
    assert expected == pytest.approx(0.1 / (1 - eigenvalue + 0.1), abs=5e-8)


def test_combine_then_adapt_has_less_bias_and_more_disagreement_than_dsgd():
    (b, a), W = drawn(), torch.from_numpy(exchange("ring", 6).graph.W)
    found = [errors(curvatures(c, b), combine_then_adapt(curvatures(c, b), W)) for c in (np.ones(6), a)]
    (mean1, apart1), (mean2, apart2) = found
    assert mean1 < 1e-11 and apart1 == pytest.approx(3.3e-1, rel=0.05)
    assert (mean2, apart2) == pytest.approx((5.0e-3, 5.2e-1), rel=0.05)


@pytest.mark.parametrize("held", [True, False])
def test_a_tracker_that_is_fed_zeros_for_the_factor_that_rests_ends_elsewhere(held):
    """``y = W y + g - g_last, u = W (u - lr y)`` with B and A in turn, on coupled blocks."""
    learner, x = coupled(5, 3), adapters(5, 1, 1, head=1)
    W = torch.from_numpy(exchange("ring", 5).graph.W)
    method = KGT(interval=1)  # for its schedule alone
    u, y, last = (torch.zeros_like(x.flat) for _ in range(3))
    for t in range(4000):
        trains = method.changing(t, x)
        g = torch.einsum("cij,cj->ci", learner.H, u) - learner.r
        now = torch.where(trains, g, last if held else torch.zeros_like(g))
        y, last = W @ y + now - last, now
        u = W @ (u - 0.05 * y * trains)
    error = float((u - learner.solution).abs().max())
    assert error < 1e-10 if held else error > 0.01


def test_the_z_correction_would_move_the_factor_that_rests_if_it_were_not_masked():
    learner, peers, alone = coupled(5, 3, local_steps=5, lr=0.05), exchange("ring", 5), exchange(ALONE, 5)
    x = noisy(adapters(5, 1, 1, head=1))
    method, states = run("dfedadmm", PENALTY | {"interval": 3}, learner, peers, x, 5)
    resting = x.spec.columns("B")  # in rounds 3 to 5
    before, after = states[-1], method.round(5, states[-1], learner, alone)
    wrong = before.x.flat - after.dual / 10  # of a block that rests: x_K - lambda g^, x_K where it was
    assert torch.equal(after.x.flat[:, resting], before.x.flat[:, resting])
    assert float((wrong - before.x.flat)[:, resting].abs().max()) > 0.05


@pytest.mark.parametrize(("smallest", "grows"), [(-0.33, False), (-0.34, True)])
def test_without_the_half_d2_needs_eigenvalues_above_minus_a_third(smallest, grows):
    """``x+ = W (2x - x_last - lr (g - g_last))`` for two clients, whose W has the eigenvalues 1 and ``smallest``."""
    plain = np.array([[1 + smallest, 1 - smallest], [1 - smallest, 1 + smallest]]) / 2
    b, lr = np.array([1.0, -0.5]), 0.01
    for W, runs_away in ((plain, grows), ((np.eye(2) + plain) / 2, False)):  # ours is the second
        last, x = np.zeros(2), W @ (lr * b)
        for _ in range(4000):
            last, x = x, W @ (2 * x - last - lr * (x - last))
        assert (np.abs(x).max() > 1e6) == runs_away
        assert runs_away or x == pytest.approx([0.25, 0.25], abs=1e-9)


@pytest.mark.parametrize(("steps", "lr"), [(1, 0.1), (5, 0.1), (20, 0.03)])
def test_dfedadmm_ends_where_dsgd_with_the_step_lambda_does_whatever_the_local_steps(steps, lr):
    b, a = drawn()
    peers, x = exchange("ring", 6), adapters(6)
    dsgd = end("dsgd", {}, curvatures(a, b, lr=0.1), peers, x)
    ours = end("dfedadmm", PENALTY, curvatures(a, b, local_steps=steps, lr=lr), peers, x)
    assert (ours - dsgd).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("penalty", "grows"), others_slow([(0.2, True), (0.24, True), (0.26, False), (0.5, False)], [1, 2])
)
def test_a_negative_eigenvalue_bounds_lambda(penalty, grows):
    # Curvature 1 and eigenvalue -1/3: lambda < (1 + 3) / 1, which is a penalty above 1/4.  Exact local minimisation.
    learner = curvatures(np.ones(4), np.array([1.0, -1.0, 1.0, -1.0]), lr=0.5, local_steps=60)
    own, peers = {"penalty": penalty}, exchange(RING4, 4)
    early, late = (end("dfedadmm", own, learner, peers, adapters(4), doublings=m).abs().max() for m in (9, 10))
    assert (late > 10 * early) == grows and (late > 1.1 * early) == grows


@pytest.mark.parametrize("method", ["k-gt", "consensus-admm", "d2"])
def test_exact_methods_agree_from_any_start(method):
    b, a = drawn()
    learner = curvatures(a, b)
    u = end(
        method, {"rho": 0.3} if method == "consensus-admm" else {}, learner, exchange("ring", 6), noisy(adapters(6))
    )
    assert (u - learner.solution).abs().max() < ROUNDING


@pytest.mark.parametrize(
    "topology",
    others_slow(
        [{"kind": "random", "p": 0.4}, {"kind": "ring", "drop_links": 0.3}, {"kind": "path", "weights": "pairwise"}],
        [1],
    ),
)
def test_k_gt_is_exact_on_graphs_that_change(topology):
    b, a = drawn()
    learner = curvatures(a, b, local_steps=2, lr=0.1)
    states = run("k-gt", {}, learner, exchange(topology, 6), adapters(6), 250)[1]
    assert (states[-1].x.flat - learner.solution).abs().max() < 1e-4


@pytest.mark.slow
def test_without_its_z_correction_the_dual_would_agree_on_a_point_that_depends_on_the_start():
    # What step 3 is for: mixing x_K alone gives consensus, but not at the solution.
    b, a = drawn()
    learner, peers = curvatures(a, b, local_steps=5), exchange("ring", 6)
    method, found = build_algorithm("dfedadmm", PENALTY), []
    for seed in (1, 2):
        state = method.start(noisy(adapters(6), seed), peers)
        for t in range(100):
            trained = method.round(t, state, learner, exchange(ALONE, 6))
            x_K = replace(trained.x, flat=trained.x.flat + trained.dual / 10)
            state = replace(trained, x=peers.mix(x_K))
        mean_error, disagreement = errors(learner, state.x.flat)
        assert disagreement < 1e-3 and mean_error > 1e-2
        found.append(state.x.flat)
    assert (found[0] - found[1]).abs().max() > 1e-2


# --- the identities of the dual, for any gradients


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    steps=st.integers(1, 6),
    penalty=st.floats(0.5, 10),
    lr=st.floats(0.01, 0.1),
    method=st.sampled_from(DUALS),
    interval=st.sampled_from([None, 1]),
)
def test_the_two_identities_of_dfedadmm(seed, steps, penalty, lr, method, interval):
    """g^ is an exponential average of gradients, z an optimistic gradient step of size lambda."""
    learner = coupled(4, 4, seed, local_steps=steps, lr=lr, noise=1.0)
    gradients = []
    algorithm = build_algorithm(method, {"penalty": penalty, "interval": interval})

    class Watched(Quadratics):
        def fit(self, x, plan):
            gradients.clear()
            oracle = plan.rule.oracle

            def watch(step):
                found = oracle(step)
                row = torch.zeros_like(x.flat)
                for block, columns in step.active.items():
                    row[:, columns] = found[block]
                gradients.append(row)
                return found

            return super().fit(x, replace(plan, rule=replace(plan.rule, oracle=watch)))

    learner.__class__ = Watched
    peers, alone = exchange("ring", 4), exchange(ALONE, 4)
    state = algorithm.start(noisy(adapters(4, 2, 2), seed), peers)
    shrink = 1 - lr * penalty
    gamma = 1 - shrink**steps
    for t in range(3):
        after = algorithm.round(t, state, learner, alone)  # without links x is z
        average = sum(lr * penalty * shrink ** (steps - 1 - k) * g for k, g in enumerate(gradients))
        trains = algorithm.changing(t, state.x)
        dual = torch.where(trains, (1 - gamma) * state.dual + average, state.dual)
        z = torch.where(trains, state.x.flat - (2 * dual - state.dual) / penalty, state.x.flat)
        assert torch.allclose(after.dual, dual, rtol=1e-9, atol=1e-9)
        assert torch.allclose(after.x.flat, z, rtol=1e-9, atol=1e-9)
        state = replace(after, x=peers.mix(after.x))


def test_the_dual_persists_and_is_the_local_gradient_where_it_ends():
    b, a = drawn()
    learner = curvatures(a, b, local_steps=5)
    algorithm, states = run("fedspeed", PENALTY | {"rho": 0.0}, learner, exchange("ring", 6), adapters(6), 100)
    x_K = learner.fit(states[-1].x, LocalPlan("AB", DualProx(-states[-1].dual, 10.0))).flat
    gradient = torch.einsum("cij,cj->ci", learner.H, x_K) - learner.r
    assert (gradient - states[-1].dual).abs().max() < 1e-3 < states[-1].dual.abs().max()


# --- coupled blocks, trained in turn


EXACT = [
    ("k-gt", {}, {"local_steps": 3}),
    ("k-gt", {}, {"local_steps": 5, "lr": 0.02}),
    ("d2", {}, {}),
    ("consensus-admm", {"rho": 0.3}, {"local_steps": 5}),
]


@pytest.mark.parametrize("interval", others_slow([None, 1, 3], [2]))
@pytest.mark.parametrize(("method", "own", "train"), EXACT)
def test_exact_methods_stay_exact_with_factors_in_turn(method, own, train, interval):
    learner, x = coupled(5, 3, **{"lr": 0.05, **train}), adapters(5, 1, 1, head=1)
    u = end(method, own | {"interval": interval}, learner, exchange("ring", 5), x, period=2 * (interval or 1))
    assert (u - learner.solution).abs().max() < ROUNDING


def test_the_dual_methods_have_the_same_bias_as_dsgd_with_coupled_blocks_too():
    x, peers = adapters(5, 1, 1, head=1), exchange("ring", 5)
    dsgd = end("dsgd", {}, coupled(5, 3, lr=0.1), peers, x)
    found = end("dfedadmm", PENALTY, coupled(5, 3, lr=0.05, local_steps=4), peers, x)
    assert (found - dsgd).abs().max() < ROUNDING
    assert (dsgd - coupled(5, 3).solution).abs().max() > 0.1


@pytest.mark.parametrize("method", ["fedspeed", "k-gt", "d2", "consensus-admm"])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_what_is_remembered_of_a_frozen_factor_is_held_and_the_factor_only_mixed(method, factor):
    x = noisy(adapters(6, 2, 3, head=2))
    learner, peers = coupled(6, 7, lr=0.05), exchange("ring", 6)
    _, states = run(method, {"interval": 1}, learner, peers, x, 6)
    before = states[2] if factor == "A" else states[3]  # rounds 0, 2, 4 train B
    algorithm = build_algorithm(method, {"interval": 1})
    t, columns = (4, x.spec.columns("A")) if factor == "A" else (5, x.spec.columns("B"))
    before = states[t - 1]
    peers.begin(t)
    after = algorithm.round(t, before, learner, peers)
    memory = {"fedspeed": ["dual"], "k-gt": ["c"], "d2": ["psi"], "consensus-admm": ["alpha"]}[method]
    for name in memory:
        was, now = getattr(before, name), getattr(after, name)
        assert torch.equal(now[:, columns], was[:, columns]) and was[:, columns].abs().min() > 1e-6
        assert not torch.equal(now[:, x.spec.columns("head")], was[:, x.spec.columns("head")]), "a head always trains"
    W = torch.from_numpy(peers.graph.W)
    if method == "d2":
        W = (torch.eye(6) + W) / 2
    expected = before.x.flat if method == "consensus-admm" else W @ before.x.flat
    assert (after.x.flat[:, columns] - expected[:, columns]).abs().max() < 1e-14


# --- invariants

GRAPHS = st.sampled_from(["ring", "star", "path", {"kind": "random", "p": 0.3}, {"kind": "ring", "drop_clients": 0.3}])


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), topology=GRAPHS, interval=st.sampled_from([None, 1, 2]), steps=st.integers(1, 4))
def test_corrections_of_k_gt_sum_to_zero_and_mixing_keeps_the_mean(seed, topology, interval, steps):
    learner = coupled(5, 5, seed, local_steps=steps, lr=0.05, noise=1.0)
    own = {"interval": interval}
    x = noisy(adapters(5, 2, 2, head=1), seed)
    _, states = run("k-gt", own, learner, exchange(topology, 5, seed), x, 5)
    for state in states:
        assert state.c.sum(0).abs().max() < 1e-12
    _, again = run("k-gt", own, coupled(5, 5, seed, local_steps=steps, lr=0.05, noise=1.0), exchange(topology, 5), x, 1)
    assert torch.allclose(again[0].x.flat.mean(0), states[0].x.flat.mean(0)), "the mean does not depend on the graph"


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), topology=GRAPHS, interval=st.sampled_from([None, 1, 2]))
def test_prices_of_consensus_admm_sum_to_zero(seed, topology, interval):
    learner = coupled(5, 5, seed, local_steps=2, lr=0.05, noise=1.0)
    x = noisy(adapters(5, 2, 2, head=1), seed)
    for state in run("consensus-admm", {"interval": interval}, learner, exchange(topology, 5, seed), x, 5)[1]:
        assert state.alpha.sum(0).abs().max() < 1e-12
        assert state.gap.sum(0).abs().max() < 1e-12


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), topology=GRAPHS, method=st.sampled_from(DUALS), interval=st.sampled_from([None, 1]))
def test_the_mean_of_the_models_follows_the_mean_of_z(seed, topology, method, interval):
    x = noisy(adapters(5, 2, 2, head=1), seed)
    found = []
    for peers in (exchange(topology, 5, seed), exchange(ALONE, 5)):
        learner = coupled(5, 5, seed, local_steps=2, lr=0.05, noise=1.0)
        found.append(run(method, {"interval": interval}, learner, peers, x, 1)[1][0].x.flat.mean(0))
    assert torch.allclose(*found, rtol=1e-12, atol=1e-12)


def test_the_mean_of_dsgd_moves_by_the_mean_gradient():
    x, learner = noisy(adapters(5, 2, 2)), coupled(5, 4, noise=1.0)
    after = run("dsgd", {}, learner, exchange("star", 5), x, 1)[1][0]
    alone = coupled(5, 4, noise=1.0).fit(x, "AB")
    assert torch.allclose(after.flat.mean(0), alone.flat.mean(0), rtol=1e-12)


# --- settings that make one method another


def same(one, other, train=None, rounds=6, topology="ring", exact=True):
    """Two (method, settings) on noisy gradients of coupled blocks."""
    x, found = noisy(adapters(5, 2, 2, head=1)), []
    for method, own in (one, other):
        learner = coupled(5, 5, noise=0.5, **{"lr": 0.05, "local_steps": 3, **(train or {})})
        algorithm, states = run(method, own, learner, exchange(topology, 5), x, rounds)
        found.append([algorithm.model(state).flat for state in states])
    if exact:
        return all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    return max(float((ours - theirs).abs().max()) for ours, theirs in zip(*found, strict=True)) < 1e-11


EQUAL = [
    (("fedspeed", {"alpha": 0.0}), ("dfedadmm", {})),
    (("fedspeed", {"rho": 0.0}), ("feddyn", {})),
    (("fedspeed", {"alpha": 1.0}), ("dfedadmm-sam", {})),
    (("dfedadmm-sam", {"rho": 0.0}), ("dfedadmm", {})),
    (("dfedsam", {"rho": 0.0}), ("dfedavg", {})),
    (("fedprox", {"mu": 0.0}), ("dfedavg", {})),
    (("dfedavg", {}), ("dec-lora", {})),
    (("dfedavg", {"interval": 2}), ("adf-lora", {"interval": 2})),
    (("dfedavgm", {}), ("dfedavg", {})),  # of a Learner without momentum
    (("scaffold", {}), ("k-gt", {})),
]


@pytest.mark.parametrize("interval", [None, 1])
@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_limit_cases_to_the_bit(one, other, interval):
    if interval is not None:
        one, other = ((name, {"interval": interval, **own}) for name, own in (one, other))
    if other[0] != "dec-lora" or interval is None:
        assert same(one, other)


def test_one_local_step_is_dsgd():
    assert same(("dfedavg", {}), ("dsgd", {}), {"local_steps": 1})
    assert same(("dfedavgm", {}), ("dsgd", {}), {"local_steps": 1, "momentum": 0.9}), "the first step of a round"


@pytest.mark.parametrize("method", ["k-gt", "d2", "consensus-admm"])
def test_without_links_what_agrees_with_nobody_is_plain_training(method):
    train = {"local_steps": 1 if method == "d2" else 3}
    assert same((method, {}), ("dfedavg", {}), train, topology=ALONE, exact=False)


def test_an_infinite_lambda_leaves_the_local_steps_of_dfedavg():
    x, plain = noisy(adapters(5, 2, 2)), coupled(5, 4, local_steps=3)
    assert torch.equal(
        plain.fit(x, LocalPlan("AB", DualProx(torch.zeros_like(x.flat), 0.0))).flat, plain.fit(x, "AB").flat
    )
    nearly = plain.fit(x, LocalPlan("AB", DualProx(torch.zeros_like(x.flat), 1e-12))).flat
    assert (nearly - plain.fit(x, "AB").flat).abs().max() < 1e-11


def test_k_gt_on_the_complete_graph_is_scaffold():
    """Option II: c_i+ = c_i - c + (x - x_K) / (K lr), c+ = mean c_i; the server's c - c_i is our correction."""
    K, lr, x = 3, 0.05, noisy(adapters(5, 2, 2)).flat[:1].repeat(5, 1)
    learner = coupled(5, 4, local_steps=K, lr=lr)
    own = torch.zeros_like(x)
    start = replace(adapters(5, 2, 2), flat=x)
    _, states = run("k-gt", {}, learner, exchange("complete", 5), start, 6)
    for state in states:
        c, y = own.mean(0, keepdim=True), x.clone()
        for _ in range(K):
            y = y - lr * (torch.einsum("cij,cj->ci", learner.H, y) - learner.r - own + c)
        own, x = own - c + (x - y) / (K * lr), y.mean(0, keepdim=True).repeat(5, 1)
        assert (state.x.flat - x).abs().max() < 1e-12
        assert (state.c - (own.mean(0, keepdim=True) - own)).abs().max() < 1e-11


def test_fedspeed_on_the_complete_graph_is_the_servers():
    """The authors' code in its own letters: h = -lambda g^, lamb = 1/lambda, server = mean x_K + mean h."""
    K, lr, lamb, rho, alpha = 3, 0.05, 0.4, 0.2, 0.7
    learner, x = coupled(5, 4, local_steps=K, lr=lr), noisy(adapters(5, 2, 2)).flat[:1]
    start = replace(adapters(5, 2, 2), flat=x.repeat(5, 1))
    own = {"penalty": lamb, "rho": rho, "alpha": alpha}
    _, states = run("fedspeed", own, learner, exchange("complete", 5), start, 6)

    def gradient(y):
        return torch.einsum("cij,cj->ci", learner.H, y) - learner.r

    h = torch.zeros(5, 4, dtype=torch.float64)
    for state in states:
        y = x.repeat(5, 1)
        for _ in range(K):
            g = gradient(y)
            g = (1 - alpha) * g + alpha * gradient(y + rho * g / g.norm(dim=1, keepdim=True))
            y = y - lr * (g + lamb * (y - x + h))
        h = h + y - x
        x = (y.mean(0) + h.mean(0))[None]
        assert (state.x.flat - x).abs().max() < 1e-12
        assert (state.dual + lamb * h).abs().max() < 1e-12


def test_d2_is_the_form_with_old_gradients():
    """x+ = Wbar (2x - x_last - lr (g - g_last))."""
    x, peers, learner = noisy(adapters(5, 2, 2)), exchange("path", 5), coupled(5, 4, lr=0.05)
    _, states = run("d2", {}, learner, peers, x, 8)
    W = (torch.eye(5, dtype=torch.float64) + torch.from_numpy(peers.graph.W)) / 2

    def step(u):
        return 0.05 * (torch.einsum("cij,cj->ci", learner.H, u) - learner.r)

    before, now = x.flat, W @ (x.flat - step(x.flat))
    for state in states[1:]:
        before, now = now, W @ (2 * now - before - step(now) + step(before))
        assert (state.x.flat - now).abs().max() < 1e-12


def test_consensus_admm_is_the_node_form_written_out():
    """Gradient steps on f + alpha x + rho sum_j |x - (x_i + x_j)/2|^2, then alpha += rho sum_j (x_i - x_j)."""
    K, lr, rho = 3, 0.02, 0.4
    x = replace(adapters(5, 2, 2), flat=noisy(adapters(5, 2, 2)).flat[:1].repeat(5, 1))
    peers, learner = exchange("star", 5), coupled(5, 4, lr=lr, local_steps=K)
    _, states = run("consensus-admm", {"rho": rho}, learner, peers, x, 6)
    links = torch.from_numpy(peers.graph.adjacency.astype(float))
    now, alpha = x.flat, torch.zeros_like(x.flat)
    for state in states:
        y = now.clone()
        for _ in range(K):
            g = torch.einsum("cij,cj->ci", learner.H, y) - learner.r + alpha
            for i in range(5):
                for j in range(5):
                    g[i] += 2 * rho * links[i, j] * (y[i] - (now[i] + now[j]) / 2)
            y = y - lr * g
        now, alpha = y, alpha + rho * (links.sum(1)[:, None] * y - links @ y)
        assert (state.x.flat - now).abs().max() < 1e-12 and (state.alpha - alpha).abs().max() < 1e-11


# --- AdamW, noise, and the step sizes that are not there


def test_under_adamw_k_gt_by_mean_gradients_has_less_bias_than_by_displacements():
    """Small gradients: AdamW's steps do not shrink with them, so displacements are no gradients."""
    b, a = drawn()
    learner = curvatures(1e-3 * a, b, optimizer="adamw", lr=0.05, local_steps=2)
    peers, x, tail = exchange("ring", 6), adapters(6), {}
    for name in ("k-gt", "dfedavg"):
        algorithm, states = run(name, {}, learner, peers, x, 60)
        tail[name] = [algorithm.model(state).flat for state in states]
    c, at, tail["displacement"] = torch.zeros_like(x.flat), x, []
    for _ in range(60):
        after = learner.fit(at, LocalPlan("AB", DualProx(c)))
        z = (at.flat - after.flat) / (2 * 0.05)
        c, at = c - z + peers.mix(z), peers.mix(after)
        tail["displacement"].append(at.flat)
    bias = {name: np.mean([errors(learner, u)[0] for u in found[-20:]]) for name, found in tail.items()}
    assert bias["k-gt"] < 0.1 * bias["dfedavg"] and bias["k-gt"] < 0.2 * bias["displacement"], bias


def test_half_a_step_of_k_gt_takes_half_of_the_displacement():
    x, learner = noisy(adapters(5, 2, 2)), coupled(5, 4, local_steps=3)
    whole = run("k-gt", {}, learner, exchange(ALONE, 5), x, 1)[1][0].x.flat
    half = run("k-gt", {"step": 0.5}, learner, exchange(ALONE, 5), x, 1)[1][0].x.flat
    assert torch.allclose(half, (x.flat + whole) / 2, rtol=1e-13)
    u = end("k-gt", {"step": 0.5}, curvatures(drawn()[1], drawn()[0], local_steps=3), exchange("ring", 6), adapters(6))
    assert (u - curvatures(drawn()[1], drawn()[0]).solution).abs().max() < 1e-11


@pytest.mark.parametrize(
    ("method", "looks"), [("dfedavg", 1), ("fedprox", 1), ("dfedsam", 2), ("fedspeed", 2), ("k-gt", 1)]
)
def test_how_many_gradients_a_local_step_costs(method, looks):
    learner = coupled(4, 4, local_steps=3)
    run(method, {}, learner, exchange("ring", 4), noisy(adapters(4, 2, 2)), 2)
    assert learner.looks == 2 * 3 * looks


# --- heads and messages


@pytest.mark.parametrize("method", ["dfedavg", "dfedadmm", "k-gt", "d2", "consensus-admm"])
@pytest.mark.parametrize("interval", [None, 1])
def test_a_private_head_is_never_sent_and_follows_only_its_own_client(method, interval):
    learner, x = coupled(4, 6, lr=0.05), noisy(adapters(4, 2, 2, head=2, private=True))
    # Without coupling to the factors a private head must not feel the neighbours at all.
    learner.H[:, 4:, :4], learner.H[:, :4, 4:] = 0, 0
    peers, alone, head = exchange("ring", 4), exchange(ALONE, 4), x.spec.columns("head")
    algorithm, ring = run(method, {"interval": interval}, learner, peers, x, 5)
    single = run(method, {"interval": interval}, learner, alone, x, 5)[1]
    if method != "consensus-admm":  # which pulls it to the round's start in proportion to the degree
        assert (algorithm.model(ring[-1]).flat[:, head] - algorithm.model(single[-1]).flat[:, head]).abs().max() < 1e-14
    else:
        assert not ring[-1].alpha[:, head].any() and not ring[-1].gap[:, head].any()
    assert not any("head" in name for name in algorithm.message(x))


@pytest.mark.parametrize("method", ["dfedavg", "fedspeed", "k-gt", "d2", "consensus-admm"])
@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("interval", [None, 1])
def test_one_message_per_edge_and_round_and_it_is_the_one_announced(method, private, interval):
    x, peers = noisy(adapters(4, 2, 3, head=2, private=private)), exchange("ring", 4)
    algorithm = build_algorithm(method, {"interval": interval})
    state, learner = algorithm.start(x, peers), coupled(4, 7)
    for t in range(2):
        peers.begin(t)
        state = algorithm.round(t, state, learner, peers)
        message = algorithm.message(x, t)
        assert peers.stats.bytes_per_edge == encoded_bytes(message)
        assert isinstance(peers.stats.sent, Adapters)
    if method == "k-gt":
        heads = 0 if private else 2
        assert message["z"] == ((heads + (5 if interval is None else 2),), torch.float64)


# --- what is refused


@pytest.mark.parametrize(
    ("method", "own", "told"),
    [
        ("fedspeed", {"interval": 0}, "algorithm.interval: 0 given; expected at least 1 round"),
        ("k-gt", {"interval": -1}, "algorithm.interval: -1 given"),
        ("dfedadmm", {"penalty": 0.0}, "algorithm.penalty: 0 given; expected a number above 0"),
        ("fedspeed", {"alpha": 1.5}, "algorithm.alpha: 1.5 given; expected a number from 0 to 1"),
        ("fedspeed", {"rho": -0.1}, "algorithm.rho: -0.1 given; expected at least 0"),
        ("dfedsam", {"rho": -0.1}, "algorithm.rho: -0.1 given; expected at least 0"),
        ("fedprox", {"mu": -1.0}, "algorithm.mu: -1 given; expected at least 0"),
        ("k-gt", {"step": 0.0}, "algorithm.step: 0 given; expected a number above 0"),
        ("consensus-admm", {"rho": 0.0}, "algorithm.rho: 0 given; expected a number above 0"),
        ("dfedavg", {"interval": "5"}, "algorithm.interval: '5' given"),
        ("dfedadmm", {"rho": 0.1}, "unknown key 'algorithm.rho'"),
    ],
)
def test_settings_out_of_range_are_refused(method, own, told):
    with pytest.raises(ConfigError, match=told):
        build_algorithm(method, own)
