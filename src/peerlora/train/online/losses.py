"""The losses of a local step: temporal differences of the critic, and the proximal regression of the blocks in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.config.online import OnlineConfig
from peerlora.train.online.flow import FlowPolicy, twin_values
from peerlora.train.online.lessons import Lessons
from peerlora.train.online.proximal import log_det, one_jump, proximal_losses, proximal_velocity

Head = Mapping[str, Tensor]
"""The critics of some clients: [client, ...] tensors by parameter name."""


@dataclass(frozen=True)
class StepTargets:
    """What one minibatch is regressed on: fixed while its losses are differentiated."""

    values: Float[Tensor, "client row"]
    velocities: Mapping[int, Float[Tensor, "client row action"]]
    """By block that trains."""


def step_targets(
    settings: OnlineConfig, lessons: Lessons, head: Head, target: Head, turns: Sequence[int]
) -> StepTargets:
    """The targets of a minibatch by the critic as it is now, ``head``, and by the one that follows it, ``target``.

    Values: ``r + gamma min_j Q_j(s', a')``, without what follows a terminal step.  Velocities: see ``proximal``.
    """
    seen = lessons.seen
    with torch.no_grad():
        following = twin_values(target, seen.reached, lessons.following).amin(0)
        values = settings.reward_scale * seen.reward + settings.discount * (1 - seen.terminal) * following
    return StepTargets(values, {block: _velocity(settings, lessons, head, block) for block in turns})


def _velocity(settings: OnlineConfig, lessons: Lessons, head: Head, block: int) -> Float[Tensor, "client row action"]:
    """The target of one block, guided by the critic's gradient at the action to which its input would jump."""
    old = lessons.chain.velocities[block]
    jumped = one_jump(lessons.chain.inputs[block], old, block / len(lessons.chain.inputs)).requires_grad_()
    with torch.enable_grad():
        values = twin_values({name: each.detach() for name, each in head.items()}, lessons.seen.observation, jumped)
        (gradient,) = torch.autograd.grad(values.mean(0).sum(), jumped)
    if settings.normalize:
        gradient = gradient / values.detach().abs().mean((0, 2)).clamp_min(1e-8)[:, None, None]
    return proximal_velocity(old, gradient, settings.beta)


def critic_losses(head: Head, lessons: Lessons, targets: StepTargets) -> Float[Tensor, " client"]:
    """Mean squared temporal difference of both critics together."""
    found = twin_values(head, lessons.seen.observation, lessons.seen.action)
    return (found - targets.values).square().sum(0).mean(1)


def policy_losses(
    policy: FlowPolicy, settings: OnlineConfig, lessons: Lessons, targets: StepTargets
) -> Float[Tensor, " client"]:
    """The proximal regression of every block that trains, by the adapters that are bound; summed over these blocks."""
    losses = targets.values.new_zeros(len(targets.values))
    velocity = policy.at_start(lessons.seen.observation.flatten(0, 1))
    for block, wanted in targets.velocities.items():
        action, log_dets = lessons.chain.inputs[block].flatten(0, 1), None
        if settings.entropy:
            found = log_det(lambda inputs, block=block: velocity(block, inputs), action, 1 / policy.config.blocks)
            log_dets = found.unflatten(0, wanted.shape[:2])
        moved = velocity(block, action).unflatten(0, wanted.shape[:2])
        losses = losses + proximal_losses(
            moved, wanted, settings.beta, settings.entropy, log_dets, 1 / policy.config.blocks
        )
    return losses
