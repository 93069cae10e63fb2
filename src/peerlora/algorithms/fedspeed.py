"""FedSpeed, FedDyn, DFedADMM and DFedADMM-SAM: one dual per client, four ways to make the gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.algorithms.dfedavg import require_at_least_zero
from peerlora.algorithms.gossip import IN_TURN, Stateful
from peerlora.algorithms.traits import SGD, Traits
from peerlora.errors import ConfigError
from peerlora.lora.adapters import Adapters
from peerlora.train.base import LocalPlan
from peerlora.train.local_rules import Ascent, DualProx, Oracle, plain

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class DualState:
    """A client's model and its memory of local gradients."""

    x: Adapters
    dual: Float[Tensor, "client parameter"]
    """g^, an exponential average of local gradients under SGD; zero at the start."""


@dataclass(frozen=True)
class DFedADMM(Stateful):
    """Local steps on ``g - g^ + (x_k - x_i) / lambda``, then gossip of ``z = x_K - lambda g^``.

        1.  x_k+1  =   x_k - lr [g(x_k) - g^ + (x_k - x_i) / lambda]        K times from x_0 = x_i
        2.  g^    <-   g^ - (x_K - x_i) / lambda
        3.  z      =   x_K - lambda g^
        4.  x_i   <-   sum_j w_ij z_j

    It removes the clients' drift, not the bias of a sparse graph: the fixed point is that of DSGD with the step lambda,
    whatever K and lr are.  Exact where W = J.  With L the largest curvature and -v the smallest eigenvalue of W, lambda
    has to stay below (1 + 1/v) / L, else disagreement grows; without negative ones any lambda will do.  Blocks that did
    not train keep g^ and are mixed as they are: step 3 would move them.

    Source: DFedADMM, arXiv 2308.08290: a reconstruction from the algorithm as recalled, to be confirmed before
    comparisons are published; FedDyn (arXiv 2111.04263), whose decentralised form is the same arithmetic.
    Differs: lambda = 1 is our choice.  Under AdamW the terms join the gradient before the moments; steps 2 and 3 stay.
    """

    penalty: float = 1.0
    """1 / lambda."""
    traits: ClassVar = Traits(
        source="DFedADMM, arXiv 2308.08290; our reconstruction",
        trains=IN_TURN,
        sends="adapters",
        sgd_preferred="its dual adds up displacements, which AdamW rescales, so it can break down",
        train_defaults=SGD | {"clip": 10.0},  # as in FedSpeed's code
    )

    def __post_init__(self):
        super().__post_init__()
        if self.penalty <= 0:
            raise ConfigError(f"algorithm.penalty: {self.penalty:g} given; expected a number above 0")

    @property
    def oracle(self) -> Oracle:
        """How a local gradient is made."""
        return plain

    def start(self, x: Adapters, peers: Exchange) -> DualState:
        """No dual yet."""
        return DualState(x, torch.zeros_like(x.flat))

    def round(self, t: int, state: DualState, learner: Learner, peers: Exchange) -> DualState:
        """One round."""
        x = state.x
        rule = DualProx(-state.dual, self.penalty, self.oracle)
        trained = learner.fit(x, LocalPlan(self.active(t), rule))
        dual = state.dual - self.penalty * (trained.flat - x.flat)  # a block that did not train did not move
        z = torch.where(self.changing(t, x), trained.flat - dual / self.penalty, trained.flat)
        return DualState(peers.mix(replace(x, flat=z)), dual)

    def quiet_round(self, t: int, state: DualState, learner: Learner, peers: Exchange) -> DualState:
        """As blocks that do not train: step 3 would move the mean by the duals."""
        return DualState(peers.mix(state.x), state.dual)


@dataclass(frozen=True)
class DFedADMMSAM(DFedADMM):
    """DFedADMM with SAM's gradient: that of the same minibatch at ``x + rho g / |g|``.

    Source: arXiv 2308.08290, reconstruction, as DFedADMM.
    """

    rho: float = 0.1
    """Length of the ascent step."""
    traits: ClassVar = replace(
        DFedADMM.traits, source="DFedADMM-SAM, arXiv 2308.08290; our reconstruction", gradients=2
    )

    def __post_init__(self):
        super().__post_init__()
        require_at_least_zero(rho=self.rho)

    @property
    def oracle(self) -> Oracle:
        """SAM's."""
        return Ascent(self.rho)


@dataclass(frozen=True)
class FedSpeed(DFedADMMSAM):
    """DFedADMM on the mixture ``(1 - alpha) g1 + alpha g2`` of the plain and the perturbed gradient.

    Source: Sun et al. 2023, arXiv 2302.10429.  The client follows the authors' code: their h is -lambda g^, alpha is 1
    there, rho 0.1, gradients are clipped at 10 (``train.clip``).
    Differs: the server's average is replaced by gossip; on the complete graph it is the server's round with everybody.
    All terms join the gradient before it is clipped; there the optimiser adds the proximal term's share of x, and
    weight decay, after clipping, so states differ where clipping acts.  The penalty, 0.1 there, is 1: over a
    sparse graph lambda = 10 leaves clients near their own optima, or diverges.  Their rate decays: ``train.schedule``.
    """

    alpha: float = 1.0
    """Share of the perturbed gradient."""
    traits: ClassVar = replace(DFedADMMSAM.traits, source="FedSpeed, arXiv 2302.10429")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"algorithm.alpha: {self.alpha:g} given; expected a number from 0 to 1")

    @property
    def oracle(self) -> Oracle:
        """FedSpeed's."""
        return Ascent(self.rho, self.alpha)
