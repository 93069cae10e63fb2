"""Consensus ADMM in node form: exact on every connected undirected graph, without a mixing matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.algorithms.gossip import IN_TURN, Stateful
from peerlora.algorithms.traits import SGD, Traits
from peerlora.errors import ConfigError
from peerlora.exchange.combine import Combined, Received
from peerlora.lora.adapters import Adapters
from peerlora.topology.properties import Properties
from peerlora.train.base import LocalPlan
from peerlora.train.local_rules import DualProx

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class ConsensusADMMState:
    """A client's model, the price of disagreeing with its neighbours, and how they stood after the last exchange."""

    x: Adapters
    alpha: Float[Tensor, "client parameter"]
    """The dual; sums to zero over the clients."""
    gap: Float[Tensor, "client parameter"]
    """``sum over the neighbours of x_i - x_j``."""
    degree: Float[Tensor, " client"]
    """How many neighbours that sum ran over."""


@dataclass(frozen=True)
class ConsensusADMM(Stateful):
    """K local steps on an augmented Lagrangian, then the dual moves along the disagreement with the neighbours.

        x_i      <-   K steps on  f_i(x) + alpha_i x + rho sum_j |x - (x_i + x_j)/2|^2       j over the neighbours
        alpha_i  <-   alpha_i + rho sum_j (x_i - x_j)

    The steps' gradient is ``g + alpha_i + rho sum_j (x_i - x_j) + 2 rho degree (x - x_i)``.  Neighbours count alike: no
    weights, adjacency only.  Exact for SGD, where DSGD is biased.  A block that does not train keeps alpha, and as
    nothing is averaged it stays where it is.  A private head has no dual but feels the pull to where the round began.

    Source: decentralised consensus ADMM, e.g. Shi et al. 2014, arXiv 1307.5561 (recalled; checked on quadratics).
    Differs: K gradient steps for the exact minimisation.
    """

    rho: float = 0.1
    """Penalty per link."""
    traits: ClassVar = Traits(
        source="consensus ADMM, arXiv 1307.5561",
        trains=IN_TURN,
        mixes="A and B, as sums over the neighbours",
        sends="models",
        sends_gradients=False,
        refuses={
            "attack": "it takes from its neighbours how far they are, and an attacker goes on from their average",
        },
        requires=Properties(symmetric=True, neighbours_only=True),
        quiet="its clients take each other in by their local steps alone, so without training nothing would be mixed",
        sgd_preferred="it is exact for SGD only",
        train_defaults=SGD,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.rho <= 0:
            raise ConfigError(f"algorithm.rho: {self.rho:g} given; expected a number above 0")

    def start(self, x: Adapters, peers: Exchange) -> ConsensusADMMState:
        """No price yet; all start at the same point, so there is no gap."""
        return ConsensusADMMState(x, torch.zeros_like(x.flat), torch.zeros_like(x.flat), degrees(peers, x))

    def round(self, t: int, state: ConsensusADMMState, learner: Learner, peers: Exchange) -> ConsensusADMMState:
        """One round."""
        rule = DualProx(state.alpha + self.rho * state.gap, 2 * self.rho * state.degree[:, None])
        x = learner.fit(state.x, LocalPlan(self.active(t), rule))
        gap = x.flat - peers.combine(x, less_its_gap).flat
        alpha = state.alpha + self.rho * gap * self.changing(t, x)
        return ConsensusADMMState(x, alpha, gap, degrees(peers, x))


def less_its_gap(received: Received) -> Combined:
    """``x_i - sum_j (x_i - x_j)``, so that nothing is left to subtract for a client that nobody reached."""
    count = received.senders.shape[1]
    alike = replace(received, weights=torch.full_like(received.weights, 1 / count))
    own = received.own.flat
    return Combined(replace(received.own, flat=own - count * (own - alike.average().flat)))


def degrees(peers: Exchange, x: Adapters) -> Float[Tensor, " client"]:
    """How many neighbours the clients held here have in this round."""
    return torch.from_numpy(peers.graph.degrees[list(peers.clients)]).to(x.flat)
