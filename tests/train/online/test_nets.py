"""Nets that act in front of a frozen flow or in its place: closed forms, what they begin as, and what is exchanged."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flow_runs import tiny
from peerlora.config.online import OnlineConfig
from peerlora.runs.events import Evaluated, PolicyShown, RoundDone
from peerlora.runs.metrics import find_start
from peerlora.runs.policy_pictures import environment_rows
from peerlora.runs.store import read_events
from peerlora.runtime.compose import compose
from peerlora.runtime.export import export_from_run
from peerlora.runtime.simulate import simulate
from peerlora.train.online import losses
from peerlora.train.online.demonstrations import Demonstrations, prepare_net, pretrain
from peerlora.train.online.flow import NOISE_LIMIT, FlowPolicy, FlowShape
from peerlora.train.online.lessons import make_lessons
from peerlora.train.online.losses import StepTargets, policy_losses
from peerlora.train.online.proximal import anchored_losses
from peerlora.train.online.replay import Transitions

pytestmark = pytest.mark.usefixtures("cache")
KAPPA, SHIFT = 2.0, 0.25  # curvature of the critic; what the flow adds to its noise


def quadratic(goal):
    """Twin critics of one action dimension, ``-KAPPA/2 (a - goal)^2``."""

    def values(head, observation, action):
        return (-KAPPA / 2 * (action[..., 0] - goal).square()).expand(2, *action.shape[:2])

    return values


def shifting_policy(actor):
    """A policy of one action dimension whose flow adds SHIFT to the noise, in float64."""
    torch.manual_seed(0)
    policy = FlowPolicy(FlowShape(observation=1, action=1, blocks=4, width=16, actor=actor)).double()
    for values in policy.blocks.parameters():
        values.data.zero_()
    for block in policy.blocks:
        block[-1].bias.data.fill_(SHIFT)
    return policy


def train_net(policy, goal, monkeypatch, noise, **settings):
    """Train the net alone by the losses of local steps, against a critic that is known."""
    monkeypatch.setattr(losses, "twin_values", quadratic(goal))
    states = torch.zeros(1, noise.shape[1], 1, dtype=torch.float64)
    reward = torch.zeros(1, noise.shape[1], dtype=torch.float64)
    lessons = make_lessons(policy, Transitions(states, noise, reward, states, reward), noise)
    optimizer = torch.optim.Adam(policy.actor.parameters(), lr=0.01)
    for _ in range(600):
        optimizer.zero_grad()
        targets = StepTargets(reward, {}, {"critic": states})
        policy_losses(policy, OnlineConfig(normalize=False, **settings), lessons, targets).sum().backward()
        optimizer.step()
    return policy(states[0], noise[0]).detach()


@pytest.mark.parametrize("goal", [-0.6, 0.2, 0.9])
def test_steering_reaches_the_best_action_that_the_flow_can_be_led_to(goal, monkeypatch):
    noise = torch.linspace(-1, 1, 32, dtype=torch.float64)[None, :, None]
    found = train_net(shifting_policy("steered"), goal, monkeypatch, noise)
    assert torch.allclose(found, torch.full_like(found, goal), atol=0.02)


def test_steering_stops_at_the_limit_of_its_noise(monkeypatch):
    """The best action, -0.9, needs noise of -2.9 where the flow adds 2."""
    policy = shifting_policy("steered")
    for block in policy.blocks:
        block[-1].bias.data.fill_(2.0)
    noise = torch.linspace(-1, 1, 32, dtype=torch.float64)[None, :, None]
    found = train_net(policy, -0.9, monkeypatch, noise)
    assert torch.allclose(found, torch.full_like(found, 2.0 - NOISE_LIMIT), atol=0.02)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_a_one_step_net_ends_between_the_flow_and_the_critic(beta, monkeypatch):
    goal, noise = 0.5, torch.linspace(-0.9, 0.6, 32, dtype=torch.float64)[None, :, None]
    found = train_net(shifting_policy("one-step"), goal, monkeypatch, noise, beta=beta)
    expected = (noise[0] + SHIFT + beta * KAPPA * goal) / (1 + beta * KAPPA)
    assert torch.allclose(found, expected, atol=0.02)


def test_the_anchored_loss_has_the_minimum_of_its_docstring():
    anchor, goal, beta = torch.tensor([[[0.3]]], dtype=torch.float64), -0.4, 0.7
    action = ((anchor + beta * KAPPA * goal) / (1 + beta * KAPPA)).requires_grad_()
    value = -KAPPA / 2 * (action - goal).square().sum(2).mean(1)
    (slope,) = torch.autograd.grad(anchored_losses(action, anchor, value, beta).sum(), action)
    assert slope.abs().max() < 1e-12


def demonstrated():
    generator = torch.Generator().manual_seed(3)
    states = torch.rand(64, 1, generator=generator, dtype=torch.float64) * 2 - 1
    return Demonstrations(states.numpy(), np.sign(states.numpy()) * 0.5)


@pytest.mark.parametrize("actor", ["flow", "steered", "one-step"])
def test_a_net_leaves_the_flow_that_is_pre_trained_as_it_is(actor):
    flow, policy = (FlowPolicy(FlowShape(1, 1, 2, 8, kind)) for kind in ("flow", actor))
    for each in (flow, policy):
        pretrain(each, demonstrated(), 20)
        prepare_net(each, demonstrated(), 20)
    found = policy.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in flow.blocks.state_dict(prefix="blocks.").items())
    assert len(policy.actor) == (actor != "flow")


def test_a_steered_flow_begins_as_the_flow_from_bounded_noise():
    policy = FlowPolicy(FlowShape(1, 1, 2, 8, "steered"))
    pretrain(policy, demonstrated(), 20)
    prepare_net(policy, demonstrated(), 20)
    states, noise = torch.rand(50, 1), 3 * torch.randn(50, 1)
    begun = policy.begin(states, noise)
    assert torch.allclose(begun, NOISE_LIMIT * torch.tanh(noise / NOISE_LIMIT)) and begun.abs().max() <= NOISE_LIMIT


def test_a_one_step_net_is_distilled_from_the_flow():
    policy = FlowPolicy(FlowShape(1, 1, 2, 32, "one-step"))
    pretrain(policy, demonstrated(), 300)
    states, noise = torch.rand(200, 1) * 2 - 1, torch.randn(200, 1)
    distances = []
    for steps in (0, 300):
        prepare_net(policy, demonstrated(), steps)
        distances.append((policy(states, noise) - policy.chain(states, noise).actions).abs().mean().item())
    assert distances[1] < 0.1 < distances[0]


@pytest.mark.parametrize("kind", ["steered", "one-step"])
def test_only_the_net_is_adapted_and_exchanged(kind, tmp_path, no_reports):
    config = tiny(f"online.policy={kind}", "algorithm=dec-lora", "topology=complete", "train.rounds=2")
    result = simulate(config, tmp_path / "run")
    names = {layer.name for layer in result.adapters.spec.layers}
    assert names == {"actor.0.0", "actor.0.1", "actor.0.2"}
    factors = result.adapters.flat[:, : result.adapters.spec.columns("head").start]
    assert torch.allclose(factors[0], factors[1], atol=1e-12) and not torch.equal(
        factors, compose(config).start.flat[:, : factors.shape[1]]
    )
    rounds = [event for event in read_events(result.run) if isinstance(event, RoundDone)]
    assert all(each.measures["drift"] > 0 and "drift_0" not in each.measures for each in rounds)
    (shown,) = (event for event in read_events(result.run) if isinstance(event, PolicyShown))
    assert (np.shape(shown.fields) == (2, 81, 4)) == (kind == "steered"), "a one-step net has no blocks to draw"
    assert (len(shown.traces) == 3) == (kind == "one-step")


@pytest.mark.parametrize("kind", ["steered", "one-step"])
def test_peft_puts_the_adapter_of_a_net_on_its_base(kind, tmp_path, no_reports):
    from peft import PeftModel

    from peerlora.train.online.base_policy import read_policy

    words = (f"online.policy={kind}", "algorithm=dec-lora", "train.rounds=1")
    result = simulate(tiny(*words), tmp_path / "run")
    folder = export_from_run(result.run, tmp_path / "out", 1)
    federation = compose(tiny(*words))
    base = read_policy(Path(federation.export.location), "point-mass", FlowShape(4, 2, 2, 8, kind)).policy.double()
    model = PeftModel.from_pretrained(base, str(folder))
    state, noise = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    federation.model.bind_adapters(result.adapters.rows([1]))
    assert torch.allclose(model(state, noise), federation.model.base(state, noise), atol=1e-6)


def test_a_cloned_policy_stays_as_demonstrations_made_it(tmp_path, no_reports):
    config = tiny("online.policy=cloned", "algorithm=local", "train.rounds=2")
    begun = compose(config)
    expected = begun.learner.evaluate(begun.start, begun.eval_data, 64).metric
    result = simulate(config, tmp_path / "run")
    last = [event for event in read_events(result.run) if isinstance(event, Evaluated)][-1]
    assert last.own == pytest.approx(expected, rel=1e-9)
    head = result.adapters.spec.columns("head")
    assert not torch.equal(result.adapters.flat[:, head], begun.start.flat[:, head]), "the critic has learned"


def test_one_client_in_all_environments_meets_those_of_many():
    """Environments and evaluations do not depend on whose they are; the starts of training do."""
    words = ("partition.values={}", "partition.vary={goal_x: [0, 1], mass: [1, 2]}")
    many, one = compose(tiny(*words)), compose(tiny(*words, "clients=1", "partition.each=3", "topology=complete"))
    assert one.partition.values.keys() == many.partition.values.keys()
    assert all(np.array_equal(one.partition.values[name], own) for name, own in many.partition.values.items())
    assert one.eval_data.digests() == many.eval_data.digests()
    assert [len(rows) for rows in one.own_rows] == [6] and one.partition.report()["each"] == 3
    shards = one.partition.shards
    assert len(shards) == 1 and np.array_equal(shards[0], np.concatenate(many.partition.shards))
    with one.learner.round(0):
        one.learner.fit(one.start, "AB")
    assert one.learner.replay.seen.tolist() == [3 * 2 * 5], "episodes in each of its environments"


def test_a_report_says_how_many_environments_a_client_has(tmp_path, no_reports):
    words = ("clients=1", "partition.each=3", "topology=complete", "train.rounds=1")
    result = simulate(tiny(*words), tmp_path / "run")
    ((_, told),) = environment_rows(find_start(read_events(result.run)))
    assert told == "point-mass, by environment, 3 of each client: goal_x 0.2, 0.5, 0.8"
