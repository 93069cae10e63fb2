"""Push-sum: SGP and Push-DIGing, for graphs whose links go one way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from peerlora.algorithms.gossip import IN_TURN, Scheduled
from peerlora.algorithms.traits import IN_STEP, SGD, Traits
from peerlora.lora.adapters import Adapters
from peerlora.topology.properties import Properties
from peerlora.train.base import LocalPlan
from peerlora.train.local_rules import DualProx, Recorded

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.exchange.schema import Schema
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class PushSumState:
    """A sum that is handed on, and how much of everybody's it holds; ``u / w`` is the model."""

    u: Adapters
    w: Float64[Tensor, " client"]
    """Stays above zero and sums to the number of clients; never compressed, never noised."""

    @property
    def z(self) -> Adapters:
        """``u / w``; a private head is never mixed, so it has no mass."""
        return self.u.with_shared(self.u.flat[:, self.u.spec.shared] / self.w[:, None].to(self.u.flat))


@dataclass(frozen=True)
class PushDIGingState(PushSumState):
    """Also the average gradient as far as it has come, and the own gradient in it."""

    y: Float[Tensor, "client parameter"]
    g: Float[Tensor, "client parameter"]


@dataclass(frozen=True)
class SGP(Scheduled):
    """Every client hands on shares of ``u`` and of a mass ``w``; their ratio forgets how uneven the graph is.

        z   =   u / w                                       the model, at which gradients are taken
        u  <-   P (u + z_K - z),      w  <-  P w            z_K: after K local steps from z

    P needs columns that sum to 1, nothing else; on a doubly stochastic P, w stays 1 and this is Dec-LoRA.  All blocks
    are mixed together in every round, so one w serves them all, with factors in turn too.

    Source: Assran, Loizou, Ballas, Rabbat 2019, arXiv 1811.10792 (as in the authors' code for K = 1).
    Differs: K local steps of the run's optimiser in z space in place of one SGD step; u moves by their displacement.
    """

    traits: ClassVar = Traits(
        source="SGP, arXiv 1811.10792",
        trains=IN_TURN,
        mixes="A and B as shares, and their mass",
        sends="sums",
        sends_gradients=False,
        requires=Properties(column_stochastic=True),
        topology_reason="senders must hand on all they have",
        positive_vectors=("w",),
    )

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """u, and one number."""
        return {f"u.{name}": what for name, what in x.message().items()} | {"w": ((), torch.float64)}

    def start(self, x: Adapters, peers: Exchange) -> PushSumState:
        """Everybody holds a mass of 1."""
        return PushSumState(x, unit_mass(x))

    def round(self, t: int, state: PushSumState, learner: Learner, peers: Exchange) -> PushSumState:
        """One round."""
        z = state.z
        moved = replace(z, flat=state.u.flat + learner.fit(z, self.active(t)).flat - z.flat)
        return PushSumState(**peers.mix({"u": moved, "w": state.w}))

    def model(self, state: PushSumState) -> Adapters:
        """The ratio."""
        return state.z

    def on_rejoin(self, own: PushSumState, taken: PushSumState) -> PushSumState:
        """A real peer that fell behind takes over a neighbour's model, and keeps its mass: the sum of w stays N."""
        z = taken.z
        return replace(own, u=z.with_shared(z.flat[:, z.spec.shared] * own.w[:, None].to(z.flat)))


@dataclass(frozen=True)
class PushDIGing(SGP):
    """SGP along a tracked average gradient: exact with SGD where SGP stops beside the solution.

        y   =   P y_last + g(z) - g_last                    sums to the sum of all gradients
        u  <-   P (u + z_K - z),      w  <-  P w            z_K: after K local steps along g - g_last + P y_last

    y and g of a block that does not train are held; y is mixed in every round, which keeps its sum.

    Source: Nedić, Olshevsky, Shi 2017, arXiv 1607.03218 (recalled; checked on quadratics).
    Differs: local steps, with the mean raw gradient of them as g; the paper has K = 1 and SGD.
    """

    traits: ClassVar = Traits(
        source="Push-DIGing, arXiv 1607.03218",
        trains=IN_TURN,
        mixes="A and B as shares, their mass, and the tracked gradient",
        sends="sums",
        sends_gradients=True,
        requires=Properties(column_stochastic=True),
        topology_reason="senders must hand on all they have",
        positive_vectors=("w",),
        local_only=("g",),
        training_end=IN_STEP,
        sgd_preferred="it is exact for SGD only",
        train_defaults=SGD,
    )

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """u, w and the shared part of y."""
        return super().message(x, t) | {"y": ((x.spec.shared.stop,), x.flat.dtype)}

    def start(self, x: Adapters, peers: Exchange) -> PushDIGingState:
        """No gradient seen yet."""
        return PushDIGingState(x, unit_mass(x), torch.zeros_like(x.flat), torch.zeros_like(x.flat))

    def round(self, t: int, state: PushDIGingState, learner: Learner, peers: Exchange) -> PushDIGingState:
        """One round."""
        z, trains = state.z, self.changing(t, state.u)
        lacking = state.y - state.g
        seen = Recorded(DualProx(lacking), z.flat)
        moved = replace(z, flat=state.u.flat + learner.fit(z, LocalPlan(self.active(t), seen)).flat - z.flat)
        y = torch.where(trains, seen.mean, state.y)
        g = torch.where(trains, seen.mean - lacking, state.g)
        return self._handed_on(PushDIGingState(moved, state.w, y, g), peers)

    def quiet_round(self, t: int, state: PushDIGingState, learner: Learner, peers: Exchange) -> PushDIGingState:
        """As blocks that do not train: there is no gradient to take into y."""
        return self._handed_on(state, peers)

    def _handed_on(self, state: PushDIGingState, peers: Exchange) -> PushDIGingState:
        """The state after its u, w and the shared part of y were mixed."""
        shared = state.u.spec.shared
        mixed = peers.mix({"u": state.u, "w": state.w, "y": state.y[:, shared]})
        y = torch.cat([mixed["y"], state.y[:, shared.stop :]], dim=1)
        return PushDIGingState(mixed["u"], mixed["w"], y, state.g)


def unit_mass(x: Adapters) -> Float64[Tensor, " client"]:
    """1 for every client."""
    return torch.ones(x.clients, dtype=torch.float64, device=x.flat.device)
