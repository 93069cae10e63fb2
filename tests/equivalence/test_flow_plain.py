"""Stacked flow policies equal clients that are computed one by one, and a loop that is written out."""

from dataclasses import replace

import pytest
import torch
from plain_flow import PlainClient

from flow_runs import tiny
from peerlora.runtime.compose import compose
from peerlora.train.base import LocalPlan


def fits(federation, plans):
    x = federation.start
    for t, plan in enumerate(plans):
        with federation.learner.round(t):
            x = federation.learner.fit(x, plan)
    return x


@pytest.mark.parametrize("turns", [(0, 1, 0), pytest.param((None, None), marks=pytest.mark.slow)])
def test_a_stack_of_clients_equals_each_of_them_written_out(cache, turns):
    config = tiny("train.optimizer_state=round", "online.replay=20")
    federation = compose(config)
    found = fits(federation, [LocalPlan("AB", turn=turn) for turn in turns])
    base = {
        layer.name: (module.base.weight, module.base.bias)
        for layer in federation.start.spec.layers
        for module in [federation.model.base.get_submodule(layer.name)]
    }
    for client in range(config.clients):
        begun = federation.start
        factors = {name: (begun.A[name][client], begun.B[name][client]) for name in begun.A}
        critic = {name: each[client] for name, each in begun.head.items()}
        plain = PlainClient(config, client, base, factors, critic)
        for t, turn in enumerate(turns):
            plain.fit(t, turn)
        for name, (A, B) in plain.factors.items():
            assert torch.allclose(found.A[name][client], A, rtol=0, atol=1e-9), (client, name)
            assert torch.allclose(found.B[name][client], B, rtol=0, atol=1e-9), (client, name)
            assert turns[0] is None or not torch.equal(B, begun.B[name][client])
        for name, each in plain.critic.items():
            assert torch.allclose(found.head[name][client], each, rtol=0, atol=1e-9), (client, name)


@pytest.mark.parametrize(
    "words",
    [
        ("online.entropy=0.05", "train.accumulate=2", "online.critic_rate=0.5"),
        ("online.policy=steered", "algorithm=dec-lora"),
        ("online.policy=one-step", "algorithm=dec-lora"),
        pytest.param((), marks=pytest.mark.slow),
    ],
)
def test_clients_together_equal_clients_alone(cache, words):
    config = tiny(*words)
    plans = [LocalPlan("AB", turn=turn) for turn in (0, 1, None)]
    together = fits(compose(config), plans)
    for client in range(config.clients):
        alone = fits(compose(config, clients=[client]), plans)
        assert torch.allclose(together.flat[client], alone.flat[0], rtol=0, atol=1e-9)


def test_weights_that_are_formed_once_change_no_fit_and_no_return(cache):
    found = []
    for fast in ("true", "false"):
        federation = compose(tiny(f"train.fast={fast}"))
        x = fits(federation, [LocalPlan("AB", turn=turn) for turn in (0, 1)])
        formed = any(layer.formed is not None for layer in federation.model._layers.values())
        assert formed == (fast == "true")
        found.append((x.flat, federation.learner.evaluate(x, federation.eval_data, 64).metric))
    assert torch.allclose(found[0][0], found[1][0], rtol=0, atol=1e-9)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-9)


def test_clients_that_are_absent_keep_everything(cache):
    federation = compose(tiny())
    learner, x = federation.learner, federation.start
    with learner.round(0):
        x = learner.fit(x, "AB")
    seen = learner.replay.seen.clone()
    with learner.round(1, clients=[0, 2]):
        after = learner.fit(x, "AB")
    assert torch.equal(after.flat[1], x.flat[1]) and not torch.equal(after.flat[0], x.flat[0])
    assert (learner.replay.seen - seen).tolist() == [10, 0, 10]


def test_the_factors_of_other_blocks_keep_every_bit(cache):
    federation = compose(tiny())
    x = replace(federation.start, flat=federation.start.flat + 0.1)
    with federation.learner.round(0) as stats:
        after = federation.learner.fit(x, LocalPlan("AB", turn=3))
    for layer in x.spec.layers:
        trained = layer.name.startswith("blocks.1.")
        for before, now in ((x.A, after.A), (x.B, after.B)):
            assert torch.equal(before[layer.name], now[layer.name]) != trained, layer.name
    assert stats.measures["drift_0"] == [0.0] * 3 and len(stats.measures["drift_1"]) == 3
    assert min(stats.measures["drift_1"]) > 0


def test_the_critic_trains_alone_in_the_first_rounds(cache):
    federation = compose(tiny("online.critic_rounds=1"))
    x = federation.start
    with federation.learner.round(0):
        after = federation.learner.fit(x, LocalPlan("AB", turn=0))
    head = x.spec.columns("head")
    assert torch.equal(after.flat[:, : head.start], x.flat[:, : head.start])
    assert (after.flat[:, head] != x.flat[:, head]).any(1).all()
