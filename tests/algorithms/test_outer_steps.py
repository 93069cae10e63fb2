"""QG-DSGDm, QG-Adam and NoLoCo against plain numpy, their limit cases and their ends."""

import numpy as np
import pytest
import torch
from quadratics import adapters, coupled, end, exchange

from peerlora.algorithms import build_algorithm
from peerlora.config.sections import TrainConfig
from peerlora.errors import CompositionError, ConfigError
from peerlora.network.protocol.state_transfer import adopt, exportable
from peerlora.runtime.plan import plan
from peerlora.train.schedule import rate
from peerlora.tree import rows_of

CLIENTS, STEPS, ROUNDS = 5, 3, 8
SCHEDULE = {"lr": 0.05, "schedule": "linear", "warmup": 0.25, "rounds": ROUNDS, "local_steps": STEPS}
COLUMNS = {"AB": [0, 1, 2, 3], "A": [0, 2, 3], "B": [1, 2, 3]}
"""Of one entry of A, one of B and a head of two, which trains in every round."""


def qg_dsgdm(beta=0.9):
    def move(mix, u, memory, gradient, lr, columns):
        m = memory.setdefault("m", np.zeros_like(u))
        x = u.copy()
        for _ in range(STEPS):
            x[:, columns] -= lr * (gradient(x) + beta * m)[:, columns]
        after = mix @ x
        m[:, columns] = (beta * m + (1 - beta) * (u - after) / (STEPS * lr))[:, columns]
        return after

    return move


def qg_adam(beta1=0.9, beta2=0.999):
    def move(mix, u, memory, gradient, lr, columns):
        m, v = memory.setdefault("m", np.zeros_like(u)), memory.setdefault("v", np.zeros_like(u))
        count = memory.setdefault("count", np.zeros_like(u))
        x, first, second, n = u.copy(), m.copy(), v.copy(), count.copy()
        for _ in range(STEPS):
            g = gradient(x)
            first, second, n = beta1 * first + (1 - beta1) * g, beta2 * second + (1 - beta2) * g**2, n + 1
            direction = first / (1 - beta1**n) / (np.sqrt(second / (1 - beta2**n)) + 1e-8)
            x[:, columns] -= lr * direction[:, columns]
        after = mix @ x
        d = np.zeros_like(u)
        d[:, columns] = (u - after)[:, columns]
        d /= np.sqrt((d**2).sum(1, keepdims=True)) + 1e-8
        m[:, columns] = (beta1 * m + (1 - beta1) * d)[:, columns]
        v[:, columns] = (beta2 * v + (1 - beta2) * d**2)[:, columns]
        count[:, columns] += 1
        return after

    return move


def noloco(outer_lr=0.7, outer_momentum=0.5):
    """As the paper has it: the mean displacement of the neighbours, and a pull to the mean of their outer models."""

    def move(mix, u, memory, gradient, lr, columns):
        velocity = memory.setdefault("velocity", np.zeros_like(u))
        x = u.copy()
        for _ in range(STEPS):
            x[:, columns] -= lr * gradient(x)[:, columns]
        step = outer_momentum * velocity + outer_lr * (mix @ (x - u)) + outer_lr * (mix @ u - u)
        velocity[:, columns] = step[:, columns]
        after = mix @ x
        after[:, columns] = (u + velocity)[:, columns]
        return after

    return move


CASES = [
    ("qg-dsgdm", {}, qg_dsgdm()),
    ("qg-dsgdm", {"beta": 0.5, "interval": 2}, qg_dsgdm(0.5)),
    ("qg-adam", {}, qg_adam()),
    ("qg-adam", {"beta1": 0.8, "beta2": 0.9, "interval": 1}, qg_adam(0.8, 0.9)),
    ("noloco", {}, noloco()),
    ("noloco", {"outer_lr": 0.4, "outer_momentum": 0.8, "interval": 2}, noloco(0.4, 0.8)),
]


@pytest.mark.parametrize("graph", ["ring", "star", {"kind": "random", "p": 0.4}])
@pytest.mark.parametrize(("method", "own", "move"), CASES)
def test_rounds_equal_plain_numpy(method, own, move, graph):
    learner, peers, x = coupled(CLIENTS, 4, **SCHEDULE), exchange(graph, CLIENTS), adapters(CLIENTS, 1, 1, head=2)
    algorithm = build_algorithm(method, own)
    H, r = learner.H.numpy(), learner.r.numpy()
    state, u, memory = algorithm.start(x, peers), x.flat.numpy().copy(), {}
    for t in range(ROUNDS):
        peers.begin(t)
        learner.rate = rate(learner.settings, t)
        state = algorithm.round(t, state, learner, peers)
        columns = COLUMNS[algorithm.active(t)]
        u = move(peers.graph.W, u, memory, lambda at: np.einsum("cij,cj->ci", H, at) - r, learner.rate, columns)
        assert np.abs(algorithm.model(state).flat.numpy() - u).max() < 1e-12, t
    assert np.abs(u).max() > 0.05


@pytest.mark.parametrize("interval", [None, 2])
@pytest.mark.parametrize(
    ("method", "own"), [("qg-dsgdm", {"beta": 0.0}), ("noloco", {"outer_lr": 1.0, "outer_momentum": 0.0})]
)
def test_without_memory_they_are_dfedavg(method, own, interval):
    learner, peers, x = coupled(CLIENTS, 4, **SCHEDULE), exchange("ring", CLIENTS), adapters(CLIENTS, 1, 1, head=2)
    ours, theirs = (
        build_algorithm(method, own | {"interval": interval}),
        build_algorithm("dfedavg", {"interval": interval}),
    )
    state, plain = ours.start(x, peers), theirs.start(x, peers)
    for t in range(ROUNDS):
        peers.begin(t)
        state = ours.round(t, state, learner, peers)
        peers.begin(t)
        plain = theirs.round(t, plain, learner, peers)
        assert (ours.model(state).flat - plain.flat).abs().max() < 1e-14


@pytest.mark.parametrize("method", ["qg-dsgdm", "noloco"])
def test_they_end_where_dsgd_ends(method):
    learner, x = coupled(CLIENTS, 4), adapters(CLIENTS, 1, 1, head=2)
    ends = [end(name, {}, learner, exchange("ring", CLIENTS), x) for name in (method, "dsgd")]
    assert (ends[0] - ends[1]).abs().max() < 1e-9
    assert (ends[1].mean(0) - learner.solution).abs().max() > 1e-4


def test_the_first_step_of_qg_adam_is_adams():
    learner, peers, x = coupled(1, 4, local_steps=1, lr=0.05), exchange("complete", 1), adapters(1, 1, 1, head=2)
    parameter = torch.nn.Parameter(x.flat.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.05)
    (0.5 * parameter @ learner.H[0] @ parameter.T - learner.r @ parameter.T).sum().backward()
    optimizer.step()
    peers.begin(0)
    algorithm = build_algorithm("qg-adam", {})
    found = algorithm.round(0, algorithm.start(x, peers), learner, peers)
    assert torch.allclose(found.x.flat, parameter.detach(), rtol=0, atol=1e-12)
    assert float(found.m.norm()) == pytest.approx(0.1, rel=1e-6), "a tenth of a move of norm 1"


@pytest.mark.parametrize("method", ["qg-dsgdm", "qg-adam"])
def test_m_forgets_where_clients_differ_as_they_mix(method):
    """On the complete graph everybody has made the same move, whatever its own gradients were."""
    learner, peers, x = coupled(CLIENTS, 4, **SCHEDULE), exchange("complete", CLIENTS), adapters(CLIENTS, 1, 1, head=2)
    algorithm = build_algorithm(method, {})
    state = algorithm.start(x, peers)
    for t in range(3):
        peers.begin(t)
        state = algorithm.round(t, state, learner, peers)
    assert (state.m - state.m[0]).abs().max() < 1e-15 < state.m.abs().max()


@pytest.mark.parametrize("method", ["qg-dsgdm", "qg-adam"])
def test_a_returning_peer_takes_a_model_and_keeps_its_own_moments(method):
    """What a client's gradients led to leaves no site but in its model."""
    learner, peers, x = coupled(2, 4, **SCHEDULE), exchange("path", 2), adapters(2, 1, 1, head=2)
    algorithm = build_algorithm(method, {})
    peers.begin(0)
    state = algorithm.round(0, algorithm.start(x, peers), learner, peers)
    own, other = rows_of(state, 0), rows_of(state, 1)
    kept = algorithm.traits.local_only
    sent = exportable(other, x.spec.blocks, kept)
    assert set(sent) == {".x.flat", ".x.ranks"}
    taken = algorithm.on_rejoin(own, adopt(own, sent, x.spec.blocks, kept))
    assert torch.equal(taken.x.flat, other.x.flat) and torch.equal(taken.m, own.m) and own.m.any()


@pytest.mark.parametrize(
    ("method", "own", "told"),
    [
        ("qg-dsgdm", {"beta": 1.0}, "algorithm.beta: 1 given; expected at least 0 and below 1"),
        ("qg-adam", {"beta2": -0.1}, "algorithm.beta2: -0.1 given"),
        ("noloco", {"outer_lr": 0.0}, "algorithm.outer_lr=0, outer_momentum=0.5 given"),
        ("noloco", {"outer_momentum": 1.0}, "outer_momentum=1 given"),
    ],
)
def test_settings_out_of_range_are_refused(method, own, told):
    with pytest.raises(ConfigError, match=told):
        build_algorithm(method, own)


@pytest.mark.parametrize(("method", "reason"), [("qg-dsgdm", "joins an SGD step"), ("qg-adam", "Adam's direction")])
def test_methods_with_a_step_of_their_own_refuse_adamw(config, method, reason):
    assert plan(config("bert", f"algorithm.name={method}")).config.train.optimizer == "sgd"
    with pytest.raises(CompositionError, match=f"{method} cannot use train.optimizer=adamw: .*{reason}"):
        plan(config("bert", f"algorithm.name={method}", "train.optimizer=adamw"))
    assert TrainConfig().optimizer == "adamw"
