"""D2 (Exact Diffusion): one step a round, corrected by what the last mixing undid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.algorithms.gossip import IN_TURN, Stateful
from peerlora.algorithms.traits import SGD, Traits
from peerlora.lora.adapters import Adapters
from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class D2State:
    """A client's model and its last step's end."""

    x: Adapters
    psi: Float[Tensor, "client parameter"]
    """Where the last local step of each block led, before it was corrected and mixed."""


@dataclass(frozen=True)
class D2(Stateful):
    """``psi = x - lr g,   phi = psi + x - psi_last,   x <- (I + W)/2 phi``.

    Exact with a constant rate on a fixed undirected graph, for SGD and one local step.  A block that does not train
    keeps its psi and is mixed as it is.

    Together: ``x+ = (I + W)/2 (2 x - x_last - lr g + lr_last g_last)``, each gradient with the rate of its own round.
    Where the rate changes, the correction is off by that change times the gradient; it is exact again where it stays.

    Source: D2, arXiv 1803.07068, in the form of Exact Diffusion, arXiv 1702.05122 (adapt, correct, combine; recalled,
    and as BlueFog's example has it).
    Differs: (I + W)/2 in place of W, whose smallest eigenvalue would have to be above -1/3: Metropolis weights on a
    ring of 4 sit exactly there.  The first step of a block is not corrected.
    """

    traits: ClassVar = Traits(
        source="D2, arXiv 1803.07068",
        trains=IN_TURN,
        sends="models",
        sends_gradients=False,
        refuses={
            "codec": "it adds up what every mixing moved, and what a codec leaves out can make that grow without bound",
            "robust": "it undoes what the last mixing did, which has to be linear",
            "secure": "it undoes what the last mixing did, over all links, and secure sums may be given up",
        },
        requires=Properties(symmetric=True, row_stochastic=True, column_stochastic=True, static=True),
        topology_reason="it undoes what the last mixing did; k-gt is exact on graphs that change too",
        one_step="its correction undoes exactly one step; k-gt takes any number",
        sgd_preferred="it is exact for SGD only",
        train_defaults=SGD | {"local_steps": 1},
    )

    def start(self, x: Adapters, peers: Exchange) -> D2State:
        """As if the last step had led here."""
        return D2State(x, x.flat.clone())

    def round(self, t: int, state: D2State, learner: Learner, peers: Exchange) -> D2State:
        """One round."""
        x, trains = state.x, self.changing(t, state.x)
        psi = learner.fit(x, self.active(t)).flat
        phi = torch.where(trains, psi + x.flat - state.psi, x.flat)
        return D2State(half_mixed(replace(x, flat=phi), peers), torch.where(trains, psi, state.psi))

    def quiet_round(self, t: int, state: D2State, learner: Learner, peers: Exchange) -> D2State:
        """As blocks that do not train: to correct the last step once more would pull clients apart."""
        return replace(state, x=half_mixed(state.x, peers))


def half_mixed(x: Adapters, peers: Exchange) -> Adapters:
    """``(I + W)/2 x``."""
    return replace(x, flat=(x.flat + peers.mix(x).flat) / 2)
