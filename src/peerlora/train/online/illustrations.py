"""What a flow policy does, in numbers that can be drawn: moves of each block on a grid, and traces of episodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from peerlora.lora.adapters import Adapters
from peerlora.randomness import torch_generator
from peerlora.train.online.environments import POINT_MASS
from peerlora.train.online.episodes import Episodes
from peerlora.train.online.flow import ONE_STEP, FlowPolicy
from peerlora.train.online.rollout import record

if TYPE_CHECKING:
    from peerlora.train.online.learner import OnlineLearner

_SIDE, _SAMPLES = 9, 32  # places of a side of the grid, and actions over which each place's moves are averaged
_TRACED = 10  # clients whose environments are traced, at most


@dataclass(frozen=True)
class Illustration:
    """What ``runs.events.PolicyShown`` tells of a policy."""

    fields: list[list[list[float]]]
    shown: str
    traces: dict[str, list[float]]


@torch.no_grad()
def illustrate(learner: OnlineLearner, x: Adapters, episodes: Episodes) -> Illustration:
    """One policy, ``x`` of one client, on the grid of the point mass or in each client's first environment.

    ``episodes``: one of each environment.
    """
    learner.model.bind_adapters(x)
    if episodes.env == POINT_MASS and learner.policy.config.actor != ONE_STEP:
        return Illustration(block_moves(learner.policy, x.flat), "", {})
    first = np.arange(0, len(episodes), learner.environments.each)[:_TRACED]
    seen = record(learner.act, episodes.take(first), x.flat)
    if episodes.env == "Pendulum-v1":  # it observes cosine and sine of the angle, 0 upright
        shown, values = "angle in radians, 0 is upright", np.arctan2(seen[:, :, 1], seen[:, :, 0])
    else:
        shown, values = "first number of the observation", seen[:, :, 0]
    return Illustration([], shown, {str(client): own.tolist() for client, own in enumerate(values)})


def block_moves(policy: FlowPolicy, like: Tensor) -> list[list[list[float]]]:
    """[block][place] of x, y and the mean move by a block in x and y, at rest; by the adapters that are bound."""
    axis = torch.linspace(-1.0, 1.0, _SIDE, dtype=like.dtype)
    places = torch.cartesian_prod(axis, axis)
    states = torch.cat([places, torch.zeros_like(places)], dim=1).repeat_interleave(_SAMPLES, dim=0)
    noise = torch.randn(_SAMPLES, 2, generator=torch_generator(0, "illustration"), dtype=torch.float64).to(like.dtype)
    chain = policy.chain(states, noise.repeat(len(places), 1))
    moves = chain.velocities.unflatten(1, (len(places), _SAMPLES)).mean(2) / policy.config.blocks
    return [torch.cat([places, each], dim=1).tolist() for each in moves]
