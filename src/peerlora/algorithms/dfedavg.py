"""DSGD, DFedAvg, DFedAvgM, DFedSAM and FedProx: local steps under a rule without memory, then gossip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peerlora.algorithms.gossip import IN_TURN, Scheduled
from peerlora.algorithms.traits import SGD, Traits
from peerlora.errors import ConfigError
from peerlora.train.base import LocalPlan
from peerlora.train.local_rules import Ascent, DualProx, LocalRule

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.lora.adapters import Adapters
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class DFedAvg(Scheduled):
    """``x_i <- sum_j w_ij x_j`` after K local steps (adapt, then combine); its subclasses change the local gradient.

    Source: Sun, Li, Wang 2021, arXiv 2104.11375 (recalled, not read again).
    Differs: the optimiser is that of the run; without quantisation.  With both factors training it is Dec-LoRA, with an
    ``interval`` ADF-LoRA, to the bit.
    """

    traits: ClassVar = Traits(
        source="DFedAvg, arXiv 2104.11375",
        trains=IN_TURN,
        sends="adapters",
    )

    def rule(self) -> LocalRule | None:
        """What changes the gradient of a local step."""
        return None

    def round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """One round."""
        return peers.mix(learner.fit(x, LocalPlan(self.active(t), self.rule())))


@dataclass(frozen=True)
class DSGD(DFedAvg):
    """``x+ = W (x - lr g)``: one SGD step a round.  Where curvatures differ, the clients' mean is biased too.

    Source: Lian et al. 2017, arXiv 1705.09056 (D-PSGD; the form "adapt, then combine"; recalled).
    Differs: D-PSGD takes the gradient's step after mixing, from the values before it.
    """

    traits: ClassVar = Traits(
        source="D-PSGD, arXiv 1705.09056",
        trains=IN_TURN,
        sends="adapters",
        one_step="DSGD takes one step between two exchanges; with more it is dfedavg",
        sgd_preferred="D-PSGD takes a plain SGD step",
        train_defaults=SGD | {"local_steps": 1},
    )


@dataclass(frozen=True)
class DFedAvgM(DFedAvg):
    """DFedAvg whose local SGD has heavy-ball momentum: ``train.momentum``, 0.9 unless you set it.

    ``train.optimizer_state`` says whether the momentum buffer starts afresh every round, as it does by default.

    Source: Sun, Li, Wang 2021, arXiv 2104.11375 (recalled, not read again).
    Differs: without quantisation.
    """

    traits: ClassVar = Traits(
        source="DFedAvgM, arXiv 2104.11375",
        trains=IN_TURN,
        sends="adapters",
        sgd_only="heavy-ball momentum is SGD's; AdamW has a first moment of its own",
        train_defaults=SGD | {"momentum": 0.9},
    )


@dataclass(frozen=True)
class DFedSAM(DFedAvg):
    """Local steps with the gradient at ``x + rho g / |g|``: towards flat minima, on which clients agree more easily.

    Source: Shi et al. 2023, arXiv 2302.04083 (as others re-implement it; the variant with several gossip steps a round
    is left out).
    Differs: under alternation only the active factor and the head are perturbed; momentum and a rate that decays, which
    the authors' trainer has, are settings (``train.momentum``, ``train.schedule``).
    """

    rho: float = 0.05
    """Length of the ascent step."""
    traits: ClassVar = Traits(
        source="DFedSAM, arXiv 2302.04083",
        trains=IN_TURN,
        sends="adapters",
        gradients=2,
    )

    def __post_init__(self):
        super().__post_init__()
        require_at_least_zero(rho=self.rho)

    def rule(self) -> LocalRule:
        """SAM's gradient."""
        return DualProx(oracle=Ascent(self.rho))


@dataclass(frozen=True)
class FedProx(DFedAvg):
    """Local gradient plus ``mu (x_k - x_i)``: a pull towards where the round began.

    Source: Li et al. 2020, arXiv 1812.06127, for the server; over a graph the mixing of DFedAvg takes its place (ours).
    """

    mu: float = 0.01
    """Strength of the pull."""
    traits: ClassVar = Traits(
        source="FedProx, arXiv 1812.06127",
        trains=IN_TURN,
        sends="adapters",
    )

    def __post_init__(self):
        super().__post_init__()
        require_at_least_zero(mu=self.mu)

    def rule(self) -> LocalRule:
        """The proximal term."""
        return DualProx(pull=self.mu)


def require_at_least_zero(**settings: float) -> None:
    """Raise ConfigError for a setting of a method that is negative."""
    for name, value in settings.items():
        if value < 0:
            raise ConfigError(f"algorithm.{name}: {value:g} given; expected at least 0")
