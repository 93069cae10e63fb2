"""Scripted demonstrations on nominal environments, and the pre-training of a flow policy on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.randomness import derive, numpy_generator, torch_generator
from peerlora.train.online.environment_names import build_environment
from peerlora.train.online.environments import POINT_MASS, Controller
from peerlora.train.online.flow import ONE_STEP, FlowPolicy, draw_layers
from peerlora.train.online.point_mass import point_mass_controller

SEED = 0  # of demonstrations and pre-training: all runs of the same settings begin with the same policy
_NOISE = 0.2  # standard deviation of what is added to a scripted action
_BATCH = 256  # pairs of state and action of a step of pre-training
_RATE = 1e-3  # learning rate of pre-training


@dataclass(frozen=True)
class Demonstrations:
    """Pairs of state and action."""

    observation: Float[np.ndarray, "step observation"]
    action: Float[np.ndarray, "step action"]


def demonstrate(env: str, horizon: int, episodes: int) -> Demonstrations:
    """Let the scripted controller act on the nominal environment, its actions with noise."""
    environment, controller = build_environment(env, episodes, {}), scripted_controller(env)
    noise = numpy_generator(SEED, f"demonstrations {env}")
    observation = environment.reset([derive(SEED, f"demonstration {i} {env}") for i in range(episodes)])
    states, actions = [], []
    for _ in range(horizon):
        acted = controller(observation) if controller else noise.uniform(-1, 1, (episodes, environment.facts.action))
        acted = np.clip(acted + _NOISE * noise.standard_normal(acted.shape), -1, 1)
        states.append(observation)
        actions.append(acted)
        observation = environment.step(acted).observation
    return Demonstrations(np.concatenate(states), np.concatenate(actions))


def scripted_controller(env: str) -> Controller | None:
    """The controller that is written for an environment; None: its demonstrations are random actions."""
    made = _CONTROLLERS.get(env)
    return made() if made else None


def _swing_up() -> Controller:
    """Of Pendulum-v1: pump energy until it is upright, then hold it there by proportional-derivative control."""

    def act(observation: Float[np.ndarray, "episode 3"]) -> Float[np.ndarray, "episode 1"]:
        cosine, sine, speed = observation[:, 0], observation[:, 1], 8 * observation[:, 2]
        angle, energy = np.arctan2(sine, cosine), 0.5 * speed**2 + 15 * (cosine - 1)
        pump = np.where(energy < 0, np.sign(speed) + (speed == 0), -np.sign(speed))
        hold = np.clip(-(10 * angle + 3 * speed) / 2, -1, 1)
        return np.where((np.abs(angle) < 0.5) & (np.abs(speed) < 3), hold, pump)[:, None]

    return act


def _rock() -> Controller:
    """Of MountainCarContinuous-v0: push the way that the car moves."""
    return lambda observation: np.where(observation[:, 1:] >= 0, 1.0, -1.0)


_CONTROLLERS: dict[str, Callable[[], Controller]] = {
    POINT_MASS: point_mass_controller,
    "Pendulum-v1": _swing_up,
    "MountainCarContinuous-v0": _rock,
}


def pretrain(policy: FlowPolicy, demonstrations: Demonstrations, steps: int) -> None:
    """Draw all weights of a policy and train its blocks in place by flow matching, each on its own slice of time.

    On the path ``x_t = (1 - t) x_0 + t a`` block k regresses on ``a - x_0`` at times uniform in [k/N, (k+1)/N).  In
    float64, so that machines differ less.
    """
    generator = torch_generator(SEED, "pretraining")
    states, actions = (torch.from_numpy(each) for each in (demonstrations.observation, demonstrations.action))
    policy.double()
    draw_layers(policy.blocks, generator)
    optimizer = torch.optim.AdamW(policy.blocks.requires_grad_().parameters(), lr=_RATE, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        rows = torch.randint(len(states), (_BATCH,), generator=generator)
        flow_matching_loss(policy, states[rows], actions[rows], generator).backward()
        optimizer.step()
    policy.requires_grad_(False).float()


def prepare_net(policy: FlowPolicy, demonstrations: Demonstrations, steps: int) -> None:
    """Give the net that acts, if there is one, its first weights in place, so that it acts as the flow does.

    A steering net has a last layer of zeros: the flow's own noise, within the limit.  A one-step net is distilled from
    the trained flow, in float64: it regresses on the flow's action in demonstrated states, from the same noise.
    """
    if not len(policy.actor):
        return
    generator = torch_generator(SEED, "pretraining of the net")
    policy.double()
    draw_layers(policy.actor, generator)
    if policy.config.actor == ONE_STEP:
        _distill(policy, torch.from_numpy(demonstrations.observation), steps, generator)
    else:
        for values in policy.actor[0][-1].parameters():  # pyright: ignore[reportIndexIssue]
            values.zero_()
    policy.requires_grad_(False).float()


def _distill(policy: FlowPolicy, states: Tensor, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(policy.actor.requires_grad_().parameters(), lr=_RATE, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        seen = states[torch.randint(len(states), (_BATCH,), generator=generator)]
        noise = torch.randn(_BATCH, policy.config.action, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            wanted = policy.chain(seen, noise).actions
        (policy.net(seen, noise) - wanted).square().sum(1).mean().backward()
        optimizer.step()


def flow_matching_loss(policy: FlowPolicy, states: Tensor, actions: Tensor, generator: torch.Generator) -> Tensor:
    """Sum over blocks of ``E |v_k(s, x_t, t) - (a - x_0)|^2``, all at the same draws within their slices of time."""
    noise = torch.randn(actions.shape, generator=generator, dtype=torch.float64).to(actions)
    within = torch.rand(len(actions), 1, generator=generator, dtype=torch.float64).to(actions)
    loss = actions.new_zeros(())
    for block in range(policy.config.blocks):
        time = (block + within) / policy.config.blocks
        velocity = policy.velocity(block, states, (1 - time) * noise + time * actions, time)
        loss = loss + (velocity - (actions - noise)).square().sum(1).mean()
    return loss
