"""QG-DSGDm: local momentum from the steps that mixing left, in place of the client's own gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.algorithms.gossip import IN_TURN, Stateful
from peerlora.algorithms.traits import SGD, Traits
from peerlora.errors import ConfigError
from peerlora.lora.adapters import Adapters
from peerlora.train.base import LocalPlan
from peerlora.train.local_rules import DualProx
from peerlora.train.optim import block_rate
from peerlora.train.schedule import rate

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class QuasiGlobalState:
    """A client's model and where it has been going, mixing included."""

    x: Adapters
    m: Float[Tensor, "client parameter"]
    """Average of its rounds' moves, per step and rate: in units of a gradient; zero at the start."""


@dataclass(frozen=True)
class QGDSGDm(Stateful):
    """K steps along ``g + beta m``; then m follows the client's move through the whole round, mixing included:

        x_k+1  =   x_k - lr (g(x_k) + beta m_i)                           K times from x_i
        x_i'   =   sum_j w_ij x_j,K
        m_i   <-   beta m_i + (1 - beta) (x_i - x_i') / (K lr)

    A client's own momentum would carry on its own bias; mixing takes that out of m.  It ends where DSGD ends, since m
    is zero there.  lr is the round's, and the block's own.  A block that does not train keeps its m.

    Source: Lin, Karimireddy, Stich, Jaggi 2021, arXiv 2102.04761 (update as in the authors' code,
    epfml/quasi-global-momentum, without Nesterov's form).
    Differs: K local steps between two exchanges, along one m; ``train.clip`` bounds ``g + beta m``.
    """

    beta: float = 0.9
    """Weight of the past in m, and of m in a step; 0 is dfedavg."""
    traits: ClassVar = Traits(
        source="QG-DSGDm, arXiv 2102.04761",
        trains=IN_TURN,
        sends="adapters",
        local_only=("m",),
        sgd_only="its momentum joins an SGD step; qg-adam is its form for Adam",
        train_defaults=SGD,
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.beta < 1:
            raise ConfigError(f"algorithm.beta: {self.beta:g} given; expected at least 0 and below 1")

    def start(self, x: Adapters, peers: Exchange) -> QuasiGlobalState:
        """Nobody has moved yet."""
        return QuasiGlobalState(x, torch.zeros_like(x.flat))

    def round(self, t: int, state: QuasiGlobalState, learner: Learner, peers: Exchange) -> QuasiGlobalState:
        """One round."""
        x = state.x
        rule = DualProx(self.beta * state.m) if self.beta else None
        mixed = peers.mix(learner.fit(x, LocalPlan(self.active(t), rule)))
        moved = (x.flat - mixed.flat) / learner.settings.local_steps
        for block in x.spec.blocks:
            columns, step = x.spec.columns(block), block_rate(learner.settings, rate(learner.settings, t), block)
            # A loop's rate may be 0 in all of a round, whose move is of the mixing alone: m stays.
            moved[:, columns] = moved[:, columns] / step if step else state.m[:, columns]
        m = self.beta * state.m + (1 - self.beta) * moved
        return QuasiGlobalState(mixed, torch.where(self.changing(t, x), m, state.m))

    def quiet_round(self, t: int, state: QuasiGlobalState, learner: Learner, peers: Exchange) -> QuasiGlobalState:
        """As blocks that do not train: no step leads along m."""
        return replace(state, x=peers.mix(state.x))
