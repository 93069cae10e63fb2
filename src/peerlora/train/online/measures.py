"""What a round changed in the policies of clients: drift of each block, and how spread their actions are."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.train.online.flow import FLOW, FlowPolicy
from peerlora.train.online.lessons import Lessons, stacked_actions

_STATES, _SAMPLES = 16, 8  # of a minibatch, and actions drawn in each
_SMALLEST = 1e-6  # standard deviation of an action that still has a logarithm


@torch.no_grad()
def measure_policies(
    policy: FlowPolicy, lessons: Lessons, noise: Float[Tensor, "client row action"]
) -> dict[str, Float[Tensor, " client"]]:
    """Measures of each client by name, of the adapters that are bound, against the policies that made the lessons.

    ``drift_K``: how far block K moves the same inputs now and before, mean |difference|; where a net acts, ``drift``:
    how far its actions are from those before.  ``log_spread``: mean over states and dimensions of the log standard
    deviation of actions, up to a constant their entropy if they were normal.
    ``noise``: standard normal, for the samples.
    """
    if policy.config.actor == FLOW:
        found = _drifts(policy, lessons)
    else:
        now = stacked_actions(policy, lessons.seen.observation, lessons.noise)
        found = {"drift": (now - lessons.acted).abs().mean((1, 2))}
    states = min(_STATES, lessons.seen.reward.shape[1])
    observation = lessons.seen.observation[:, :states].repeat_interleave(_SAMPLES, dim=1)
    actions = stacked_actions(policy, observation, noise[:, : states * _SAMPLES])
    spread = actions.unflatten(1, (states, _SAMPLES)).std(2)
    return found | {"log_spread": (spread + _SMALLEST).log().mean((1, 2))}


def _drifts(policy: FlowPolicy, lessons: Lessons) -> dict[str, Float[Tensor, " client"]]:
    blocks, rows = policy.config.blocks, lessons.seen.reward.shape
    velocity = policy.at_start(lessons.seen.observation.flatten(0, 1))
    found = {}
    for block in range(blocks):
        now = velocity(block, lessons.chain.inputs[block].flatten(0, 1)).unflatten(0, rows)
        found[f"drift_{block}"] = (now - lessons.chain.velocities[block]).abs().mean((1, 2)) / blocks
    return found


SAMPLES = _STATES * _SAMPLES
"""Rows of noise that ``measure_policies`` reads at most."""
