"""The losses of a local step: temporal differences of the critic, and those of the policy, by what acts.

The flow's blocks in turn take proximal steps, a net in front of the frozen flow climbs the critic, and a one-step net
does both: it climbs, and stays near the flow's action.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.config.online import OnlineConfig
from peerlora.train.online.flow import FLOW, STEERED, FlowPolicy, twin_values
from peerlora.train.online.lessons import Lessons, stacked_chain
from peerlora.train.online.proximal import anchored_losses, log_det, one_jump, proximal_losses, proximal_velocity

Head = Mapping[str, Tensor]
"""The critics of some clients: [client, ...] tensors by parameter name."""


@dataclass(frozen=True)
class StepTargets:
    """What one minibatch is regressed on: fixed while its losses are differentiated."""

    values: Float[Tensor, "client row"]
    velocities: Mapping[int, Float[Tensor, "client row action"]]
    """By block that trains."""
    critic: Head
    """The critic as it is now, which guides a net."""


def step_targets(
    settings: OnlineConfig, lessons: Lessons, head: Head, target: Head, turns: Sequence[int], actor: str = FLOW
) -> StepTargets:
    """The targets of a minibatch by the critic as it is now, ``head``, and by the one that follows it, ``target``.

    Values: ``r + gamma min_j Q_j(s', a')``, without what follows a terminal step.  Velocities: see ``proximal``.
    """
    seen = lessons.seen
    with torch.no_grad():
        following = twin_values(target, seen.reached, lessons.following).amin(0)
        values = settings.reward_scale * seen.reward + settings.discount * (1 - seen.terminal) * following
    if actor != FLOW:
        return StepTargets(values, {}, {name: each.detach().clone() for name, each in head.items()} if turns else {})
    return StepTargets(values, {block: _velocity(settings, lessons, head, block) for block in turns}, {})


def _velocity(settings: OnlineConfig, lessons: Lessons, head: Head, block: int) -> Float[Tensor, "client row action"]:
    """The target of one block, guided by the critic's gradient at the action to which its input would jump."""
    old = lessons.chain.velocities[block]
    jumped = one_jump(lessons.chain.inputs[block], old, block / len(lessons.chain.inputs)).requires_grad_()
    with torch.enable_grad():
        values = twin_values({name: each.detach() for name, each in head.items()}, lessons.seen.observation, jumped)
        (gradient,) = torch.autograd.grad(values.mean(0).sum(), jumped)
    return proximal_velocity(old, gradient / _unit(settings, values)[:, None, None], settings.beta)


def _unit(settings: OnlineConfig, values: Float[Tensor, "twin client row"]) -> Float[Tensor, " client"]:
    """What the critic's gradient is divided by: the mean size of its values, where it is normalised."""
    sizes = values.detach().abs().mean((0, 2)).clamp_min(1e-8)
    return sizes if settings.normalize else torch.ones_like(sizes)


def critic_losses(head: Head, lessons: Lessons, targets: StepTargets) -> Float[Tensor, " client"]:
    """Mean squared temporal difference of both critics together."""
    found = twin_values(head, lessons.seen.observation, lessons.seen.action)
    return (found - targets.values).square().sum(0).mean(1)


def policy_losses(
    policy: FlowPolicy, settings: OnlineConfig, lessons: Lessons, targets: StepTargets
) -> Float[Tensor, " client"]:
    """What the policy that acts is trained by, by the adapters that are bound; zero while the critic trains alone."""
    if policy.config.actor == FLOW:
        return _flow_losses(policy, settings, lessons, targets)
    return _net_losses(policy, settings, lessons, targets) if targets.critic else torch.zeros_like(targets.values[:, 0])


def _net_losses(
    policy: FlowPolicy, settings: OnlineConfig, lessons: Lessons, targets: StepTargets
) -> Float[Tensor, " client"]:
    """Of steered noise ``-Q`` where the flow arrives; of a one-step net its distance from the flow's action as well.

    The critic sees actions in bounds; its gradient passes the bounds, or an action beyond them would never come back.
    """
    if steered := policy.config.actor == STEERED:
        action = stacked_chain(policy, lessons.seen.observation, lessons.noise, differentiated=True).arrival
    else:
        rows = (each.flatten(0, 1) for each in (lessons.seen.observation, lessons.noise))
        action = policy.net(*rows).unflatten(0, lessons.noise.shape[:2])
    bounded = action + (action.clamp(-1.0, 1.0) - action).detach()
    values = twin_values(targets.critic, lessons.seen.observation, bounded)
    value = values.mean((0, 2)) / _unit(settings, values)
    return -value if steered else anchored_losses(action, lessons.chain.actions, value, settings.beta)


def _flow_losses(
    policy: FlowPolicy, settings: OnlineConfig, lessons: Lessons, targets: StepTargets
) -> Float[Tensor, " client"]:
    """The proximal regression of every block that trains, summed over these blocks."""
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
