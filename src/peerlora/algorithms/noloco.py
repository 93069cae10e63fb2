"""NoLoCo: an outer momentum step from the neighbours' average, without a collective exchange."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.algorithms.gossip import IN_TURN, Stateful
from peerlora.algorithms.traits import Traits
from peerlora.errors import ConfigError
from peerlora.lora.adapters import Adapters

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class NoLoCoState:
    """A client's outer model and its outer velocity."""

    x: Adapters
    velocity: Float[Tensor, "client parameter"]
    """In units of the parameters; zero at the start."""


@dataclass(frozen=True)
class NoLoCo(Stateful):
    """K inner steps from the outer model phi, then one outer step towards what the neighbours came to:

        x_i          =   K local steps from phi_i
        velocity_i  <-   outer_momentum velocity_i + outer_lr (sum_j w_ij x_j - phi_i)
        phi_i       <-   phi_i + velocity_i

    The paper's two terms, the mean displacement and the pull to the mean of phi, have one factor in its code, so they
    add up to the mean of x, which alone has to cross.  With outer_lr 1 and no momentum it is dfedavg.  Blocks that did
    not train are mixed as they are, and keep their velocity.

    Source: Kolehmainen et al. 2025, "NoLoCo", arXiv 2506.10911 (outer step and its 0.7 and 0.5 as in the released code
    and configs).
    Differs: W in place of random pairs; who meets nobody makes the outer step alone.
    """

    outer_lr: float = 0.7
    """Share of the way to the neighbours' average."""
    outer_momentum: float = 0.5
    """Weight of the last velocity."""
    traits: ClassVar = Traits(
        source="NoLoCo, arXiv 2506.10911",
        trains=IN_TURN,
        sends="adapters",
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.outer_lr <= 1 or not 0 <= self.outer_momentum < 1:
            raise ConfigError(
                f"algorithm.outer_lr={self.outer_lr:g}, outer_momentum={self.outer_momentum:g} given; expected above 0 "
                "and at most 1, at least 0 and below 1"
            )

    def start(self, x: Adapters, peers: Exchange) -> NoLoCoState:
        """At rest."""
        return NoLoCoState(x, torch.zeros_like(x.flat))

    def round(self, t: int, state: NoLoCoState, learner: Learner, peers: Exchange) -> NoLoCoState:
        """One round."""
        phi, trains = state.x.flat, self.changing(t, state.x)
        mixed = peers.mix(learner.fit(state.x, self.active(t)))
        velocity = self.outer_momentum * state.velocity + self.outer_lr * (mixed.flat - phi)
        flat = torch.where(trains, phi + velocity, mixed.flat)
        return NoLoCoState(replace(mixed, flat=flat), torch.where(trains, velocity, state.velocity))

    def quiet_round(self, t: int, state: NoLoCoState, learner: Learner, peers: Exchange) -> NoLoCoState:
        """As blocks that do not train: velocity would carry on without them."""
        return replace(state, x=peers.mix(state.x))
