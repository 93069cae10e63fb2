"""Lessons: what one fit's local steps learn from, made once by the policies of its beginning."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.train.online.flow import ONE_STEP, Chain, FlowPolicy
from peerlora.train.online.replay import Transitions


@dataclass(frozen=True)
class Lessons:
    """Transitions, what the policies of a round's beginning do in their states, and what they would do next."""

    seen: Transitions
    noise: Float[Tensor, "client row action"]
    """What acting began with, in both states of each transition."""
    chain: Chain
    """Of the flow in ``seen.observation``; leaves [block, client, row, action]."""
    acted: Float[Tensor, "client row action"]
    """Actions in ``seen.observation``."""
    following: Float[Tensor, "client row action"]
    """Actions in ``seen.reached``."""

    def part(self, rows: slice) -> Lessons:
        """A minibatch of them."""
        seen = Transitions(**{each.name: getattr(self.seen, each.name)[:, rows] for each in fields(Transitions)})
        inputs, velocities = self.chain.inputs[:, :, rows], self.chain.velocities[:, :, rows]
        chain = Chain(inputs, velocities, self.chain.arrival[:, rows])
        return Lessons(seen, self.noise[:, rows], chain, self.acted[:, rows], self.following[:, rows])


def make_lessons(policy: FlowPolicy, seen: Transitions, noise: Float[Tensor, "client row action"]) -> Lessons:
    """Let the policies whose adapters are bound act in the states of ``seen`` and in those that were reached.

    Both begin at the same ``noise``.
    """
    chain = stacked_chain(policy, seen.observation, noise)
    alone = policy.config.actor == ONE_STEP
    acted = stacked_actions(policy, seen.observation, noise) if alone else chain.actions
    return Lessons(seen, noise, chain, acted, stacked_actions(policy, seen.reached, noise))


@torch.no_grad()
def stacked_actions(
    policy: FlowPolicy, observation: Float[Tensor, "client row _"], noise: Float[Tensor, "client row action"]
) -> Float[Tensor, "client row action"]:
    """Actions in [-1, 1] of every client's own policy in its own states."""
    return policy(observation.flatten(0, 1), noise.flatten(0, 1)).unflatten(0, noise.shape[:2])


def stacked_chain(
    policy: FlowPolicy,
    observation: Float[Tensor, "client row _"],
    noise: Float[Tensor, "client row action"],
    differentiated: bool = False,
) -> Chain:
    """What the flow passes through for every client in its own states; leaves [..., client, row, action].

    ``differentiated``: with the graph of what the adapters make of it.
    """
    with torch.set_grad_enabled(differentiated):
        found = policy.chain(observation.flatten(0, 1), noise.flatten(0, 1))
    split = noise.shape[:2]
    inputs, velocities = found.inputs.unflatten(1, split), found.velocities.unflatten(1, split)
    return Chain(inputs, velocities, found.arrival.unflatten(0, split))
