"""Methods whose formulas contain a step, while the learning rate changes from round to round."""

from dataclasses import replace
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from quadratics import Quadratics, adapters, coupled, end, exchange

from cases import ROW_METHODS, others_slow
from peerlora.algorithms import REGISTRY, build_algorithm
from peerlora.algorithms.base import is_asynchronous
from peerlora.algorithms.hetlora import shrink_tail
from peerlora.config.sections import TrainConfig
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.runtime.compose import compose
from peerlora.runtime.simulate import build_rounds
from peerlora.train.schedule import rate


class Changing(Quadratics):
    """Quadratics whose rate is another one in every round."""

    def __init__(self, like, rates):
        super().__init__(like.H, like.r, local_steps=like.settings.local_steps)
        self.rates = cycle(rates)

    def fit(self, x, plan):
        self.rate = next(self.rates)
        return super().fit(x, plan)


EXACT = [("k-gt", {}, 3), ("consensus-admm", {"rho": 0.3}, 5), ("push-diging", {}, 1)]


@pytest.mark.parametrize(("method", "own", "steps"), EXACT)
def test_methods_that_remember_gradients_stay_exact(method, own, steps):
    learner, x = coupled(5, 3, local_steps=steps), adapters(5, 1, 1, head=1)
    u = end(method, own, Changing(learner, [0.05, 0.01]), exchange("ring", 5), x, period=2)
    assert (u - learner.solution).abs().max() < 1e-8


@pytest.mark.parametrize("method", ["dfedadmm", "fedspeed"])
def test_where_a_dual_method_ends_does_not_depend_on_the_rate(method):
    learner, x = coupled(5, 3, local_steps=3), adapters(5, 1, 1, head=1)
    own = {"rho": 0.0} if method == "fedspeed" else {}
    ends = [
        end(method, own, Changing(learner, rates), exchange("ring", 5), x, period=2)
        for rates in ([0.05, 0.05], [0.1, 0.02])
    ]
    assert (ends[0] - ends[1]).abs().max() < 1e-8
    assert (ends[0].mean(0) - learner.solution).abs().max() > 1e-4, "biased, as on every sparse graph"


def test_d2_takes_each_gradient_with_the_rate_of_its_own_round():
    learner, peers, x = coupled(5, 3), exchange("ring", 5), adapters(5, 1, 1, head=1)
    rates = [0.01, 0.05, 0.1, 0.07, 0.02, 0.001]
    changing, algorithm = Changing(learner, rates), build_algorithm("d2", {})
    H, r = learner.H.numpy(), learner.r.numpy()
    W = (np.eye(5) + peers.topology.at(0).W) / 2
    state, before, last = algorithm.start(x, peers), None, None
    u = x.flat.numpy()
    for t, lr in enumerate(rates):
        peers.begin(t)
        state = algorithm.round(t, state, changing, peers)
        step = lr * (np.einsum("cij,cj->ci", H, u) - r)
        moved = u - step if last is None else 2 * u - before - step + last
        before, last, u = u, step, W @ moved
        assert np.abs(state.x.flat.numpy() - u).max() < 1e-13


@pytest.mark.slow
def test_d2_ends_at_the_solution_with_a_rate_that_falls_slowly_and_dsgd_beside_it():
    learner, x, errors = coupled(5, 3), adapters(5, 1, 1, head=1), {}
    train = TrainConfig(lr=0.1, schedule="cosine", floor=0.5, rounds=2000)
    rates = [rate(train, t) for t in range(2000)]
    for method in ("d2", "dsgd"):
        algorithm, peers, changing = build_algorithm(method, {}), exchange("ring", 5), Changing(learner, rates)
        state = algorithm.start(x, peers)
        for t in range(2000):
            peers.begin(t)
            state = algorithm.round(t, state, changing, peers)
        errors[method] = float((algorithm.model(state).flat - learner.solution).abs().max())
    assert errors["d2"] < 1e-5 < 1e-2 < errors["dsgd"]


def test_the_penalty_of_hetlora_falls_with_the_rate():
    """Of clients without neighbours, whose training makes the tail larger, so that nothing is cut."""
    spec = AdapterSpec((LayerSpec("q", 3, 2),), rank=4, alpha=4.0)
    x = Adapters(spec, torch.arange(60, dtype=torch.float64).view(3, 20) / 60 + 0.1, torch.full((3,), 4))
    method = build_algorithm("hetlora", {"gamma": 0.5, "penalty": 0.02})
    peers = exchange({"kind": "edges", "edges": [], "allow_disconnected": True}, 3)
    larger = replace(x, flat=1.5 * x.flat)
    train = TrainConfig(schedule="linear", rounds=4)
    learner: Any = SimpleNamespace(settings=train, fit=lambda x, plan: larger)
    for t, factor in enumerate((1, 0.75, 0.5, 0.25)):
        peers.begin(t)
        found = method.round(t, x, learner, peers)
        assert torch.equal(found.flat, shrink_tail(larger, torch.full((3,), 2), 0.02 * factor).flat)
        assert torch.equal(found.ranks, x.ranks) and not torch.equal(found.flat, larger.flat)
    assert torch.equal(method.quiet_round(4, x, learner, peers).flat, x.flat), "no penalty, and nothing is cut"


@pytest.mark.parametrize(
    "method",
    others_slow(
        [name for name, kind in ROW_METHODS.items() if not is_asynchronous(kind)], ["d2", "adf-lora", "hetlora"]
    ),
)
def test_every_method_learns_under_a_schedule(config, method):
    own = REGISTRY[method].traits.train_defaults
    rates = ["train.lr=1.0" if own.get("optimizer") == "sgd" else "train.lr=0.02"]
    steps = [f"train.local_steps={own.get('local_steps', 2)}", "train.rounds=8"]
    words = [f"algorithm.name={method}", *rates, *steps]
    ends = {}
    for schedule in ("constant", "cosine"):
        federation = compose(config("bert", *words, f"train.schedule={schedule}", "train.warmup=0.2"))
        rounds, state = build_rounds(federation), federation.algorithm.start(federation.start, federation.exchange)
        losses = []
        for t in range(8):
            state, told = rounds.advance(t, state)
            losses.append(np.nanmean(told.losses) if np.isfinite(told.losses).any() else np.nan)
        assert np.nanmin(losses[1:]) < losses[0] and federation.algorithm.model(state).flat.isfinite().all()
        ends[schedule] = federation.algorithm.model(state).flat
    assert not torch.equal(ends["constant"], ends["cosine"])
