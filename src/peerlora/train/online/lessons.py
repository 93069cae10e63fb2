"""Lessons: what one fit's local steps learn from, made once by the policies of its beginning."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.train.online.flow import Chain, FlowPolicy, euler_chain
from peerlora.train.online.replay import Transitions


@dataclass(frozen=True)
class Lessons:
    """Transitions, what the policies of a round's beginning do in their states, and what they would do next."""

    seen: Transitions
    chain: Chain
    """Of ``seen.observation``; leaves [block, client, row, action]."""
    following: Float[Tensor, "client row action"]
    """Actions in ``seen.reached``."""

    def part(self, rows: slice) -> Lessons:
        """A minibatch of them."""
        seen = Transitions(**{each.name: getattr(self.seen, each.name)[:, rows] for each in fields(Transitions)})
        inputs, velocities = self.chain.inputs[:, :, rows], self.chain.velocities[:, :, rows]
        return Lessons(seen, Chain(inputs, velocities, self.chain.actions[:, rows]), self.following[:, rows])


def make_lessons(policy: FlowPolicy, seen: Transitions, noise: Float[Tensor, "client row action"]) -> Lessons:
    """Let the policies whose adapters are bound act in the states of ``seen`` and in those that were reached.

    Both begin at the same ``noise``.
    """
    chain = stacked_chain(policy, seen.observation, noise)
    return Lessons(seen, chain, stacked_chain(policy, seen.reached, noise).actions)


@torch.no_grad()
def stacked_chain(
    policy: FlowPolicy, observation: Float[Tensor, "client row _"], noise: Float[Tensor, "client row action"]
) -> Chain:
    """Every client's own policy in its own states; leaves [..., client, row, action]."""
    found = euler_chain(policy.at_start(observation.flatten(0, 1)), noise.flatten(0, 1), policy.config.blocks)
    split = noise.shape[:2]
    return Chain(
        found.inputs.unflatten(1, split), found.velocities.unflatten(1, split), found.actions.unflatten(0, split)
    )
