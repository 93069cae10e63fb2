"""K-GT: gradient tracking with local steps; with a server it is SCAFFOLD."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.algorithms.gossip import IN_TURN, Stateful
from peerlora.algorithms.traits import REPLICAS, Traits
from peerlora.errors import ConfigError
from peerlora.lora.adapters import Adapters
from peerlora.train.base import LocalPlan
from peerlora.train.local_rules import DualProx, Recorded

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.exchange.schema import Schema
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class KGTState:
    """A client's model and what its gradients lack to the average of all."""

    x: Adapters
    c: Float[Tensor, "client parameter"]
    """The correction; sums to zero over the clients."""


@dataclass(frozen=True)
class KGT(Stateful):
    """Local steps on ``g + c``, where ``c`` makes every client's steps point where the average's would.

        z_i   =   mean of g + c_i over the K local steps that lead from x_i to x_K
        c_i  <-   c_i - z_i + sum_j w_ij z_j
        x_i  <-   sum_j w_ij (x_j + step (x_K,j - x_j))

    Exact with SGD, any rate and any number of local steps, on every connected graph, with factors in turn too: c and z
    are gradients, in which no rate stands, so it may change from round to round.
    x and z travel in one message; of z only what trained.

    Source: K-GT, arXiv 2301.01313, as in the released code (its class K_GT, which starts with c = 0); with W = J it is
    SCAFFOLD, arXiv 1910.06378, option II, where c_i is its c - c_i.
    Differs: z is the mean raw corrected gradient, before clipping and optimiser, where the paper divides the
    displacement by K and the rate.  Under plain SGD that is the same; under AdamW a displacement is no gradient.
    """

    step: float = 1.0
    """How much of a round's displacement is taken over."""
    traits: ClassVar = Traits(
        source="K-GT, arXiv 2301.01313",
        trains=IN_TURN,
        mixes="A and B, and the mean corrected gradient of what trained",
        sends="models",
        refuses={
            "codec": f"x and z cross together, and {REPLICAS}",
            "robust": "its corrections sum to zero only where mixing keeps the mean, which robust rules give up",
            "secure": "its corrections sum to zero only where mixing keeps the mean, and a sum given up does not",
        },
        sends_gradients=True,
        topology_reason="its corrections must sum to zero; use dfedavg where they cannot",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.step <= 0:
            raise ConfigError(f"algorithm.step: {self.step:g} given; expected a number above 0")

    def sent(self, t: int, x: Adapters) -> Tensor:
        """The columns of z that travel: those that train, without a private head."""
        mask = self.changing(t, x)
        mask[x.spec.shared.stop :] = False
        return mask.nonzero()[:, 0]

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """x, and the part of z that trained."""
        own = {f"x.{name}": what for name, what in x.message().items()}
        return own | {"z": ((len(self.sent(t, x)),), x.flat.dtype)}

    def start(self, x: Adapters, peers: Exchange) -> KGTState:
        """No correction yet."""
        return KGTState(x, torch.zeros_like(x.flat))

    def round(self, t: int, state: KGTState, learner: Learner, peers: Exchange) -> KGTState:
        """One round."""
        x, columns = state.x, self.sent(t, state.x)
        seen = Recorded(DualProx(state.c), x.flat)
        trained = learner.fit(x, LocalPlan(self.active(t), seen))
        z = seen.mean[:, columns]
        moved = trained if self.step == 1 else replace(x, flat=x.flat.lerp(trained.flat, self.step))
        mixed = peers.mix({"x": moved, "z": z})
        return KGTState(mixed["x"], state.c.index_add(1, columns, mixed["z"] - z))
