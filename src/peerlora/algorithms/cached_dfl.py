"""Cached-DFL: the newest known model of every client, averaged into training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from peerlora.algorithms.dfedavg import require_at_least_zero
from peerlora.algorithms.gossip import IN_TURN, Scheduled
from peerlora.algorithms.traits import Traits
from peerlora.config.exchange import CacheConfig
from peerlora.errors import ConfigError
from peerlora.topology.properties import Properties
from peerlora.train.base import LocalPlan
from peerlora.train.local_rules import DualProx

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.lora.adapters import Adapters
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class CachedDFL(Scheduled):
    """K steps on ``f_i + pull/2 |x - x_i|^2``; then clients bring each other's caches up to date and average them:

        x_j(t)     =   x_j after its local steps in round t
        tau_ij     =   the newest round whose x_j has reached i, over any number of links; of itself t
        x_i(t+1)  <-   sum_j alpha_j x_j(tau_ij) / sum_j alpha_j        over all j that i holds

    In every round, contact or not, or with ``when: contacts`` in those in which a neighbour was heard.  alpha_j is 1,
    or j's training rows.  An entry is one client's A and B of one round: with an ``interval``, entries of different
    phases are averaged as they are, both factors of each.  W plays no part, the graph says who meets.

    Source: Wang et al. 2025 (AAAI), "Decentralized Federated Learning with Model Caching on Mobile Agents",
    arXiv 2408.14001 (the three steps, as others describe them).
    Differs: weights are equal unless set to ``rows``, theirs; an entry moves one link a round; of equally new entries
    those of the next higher client numbers are kept, where the authors' code draws; without sub-caches of groups.
    """

    max_age: int | None = None
    """Rounds; older entries are neither averaged nor passed on: tau_max - 1 of the paper; null: none is dropped."""
    keep: int | None = None
    """Entries of other clients that a client keeps, the newest ones: C_max of the paper; null: all."""
    weights: Literal["uniform", "rows"] = "uniform"
    """Weights of the entries: uniform, or rows (training rows of their origins)."""
    pull: float = 0.0
    """rho, strength of the pull towards the start of the round."""
    when: Literal["rounds", "contacts"] = "rounds"
    """Average in every round, or only in those with a contact."""
    traits: ClassVar = Traits(
        source="Cached-DFL, arXiv 2408.14001",
        trains=IN_TURN,
        mixes="A and B, the newest known of every client",
        sends="cached",
        sends_gradients=False,
        requires=Properties(),
    )

    def __post_init__(self):
        super().__post_init__()
        require_at_least_zero(pull=self.pull)
        if self.max_age is not None:
            require_at_least_zero(max_age=self.max_age)
        if self.keep is not None and self.keep < 1:
            raise ConfigError(f"algorithm.keep: {self.keep} given; expected at least 1 entry, or null for all")

    @property
    def cache(self) -> CacheConfig:
        """That of every client."""
        return CacheConfig(keep=self.keep, max_age=self.max_age, weights=self.weights)

    def round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """One round."""
        rule = DualProx(pull=self.pull) if self.pull else None
        trained = learner.fit(x, LocalPlan(self.active(t), rule))
        averaged = peers.mix_cached(trained)
        if self.when == "rounds":
            return averaged
        met = torch.from_numpy(peers.graph.degrees[list(peers.clients)] > 0).to(x.flat.device)
        return replace(averaged, flat=torch.where(met[:, None], averaged.flat, trained.flat))
