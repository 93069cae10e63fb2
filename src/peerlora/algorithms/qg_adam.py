"""QG-Adam: Adam whose moments follow the client's normalised moves, mixing included."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from peerlora.algorithms.gossip import IN_TURN, Stateful
from peerlora.algorithms.traits import Traits
from peerlora.errors import ConfigError
from peerlora.lora.adapters import Adapters
from peerlora.train.base import LocalPlan

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.train.base import Learner
    from peerlora.train.local_rules import Gradients, LocalStep

_EPS = 1e-8  # beside the root of v, and beside the norm of a move


@dataclass(frozen=True)
class QGAdamState:
    """A client's model, and averages of where it has been going."""

    x: Adapters
    m: Float[Tensor, "client parameter"]
    """Of its rounds' normalised moves; zero at the start."""
    v: Float[Tensor, "client parameter"]
    """Of their squares."""
    rounds: Int[Tensor, "client block"]
    """Moves in them so far, by block in the order of the flat buffer."""


class AdamDirection:
    """A rule whose gradient is Adam's direction; its moments begin a ``fit`` as copies of the method's."""

    gathers = True
    """See ``gathers_steps``."""

    def __init__(self, method: QGAdam, state: QGAdamState):
        self.method, self.spec, self.m, self.v = method, state.x.spec, state.m.clone(), state.v.clone()
        self.steps = state.rounds.clone()

    def gradient(self, step: LocalStep) -> Gradients:
        """``(m / (1 - beta1^n)) / (sqrt(v / (1 - beta2^n)) + 1e-8)`` after the minibatch's gradient went into both."""
        found, clients = step.gradient(), step.clients
        for block, columns in step.active.items():
            place = self.spec.blocks.index(block.partition(":")[0])  # "A:2", a part of a block, counts with it
            self.steps[clients, place] += 1
            g, n = found[block], self.steps[clients, place][:, None].to(torch.float64)
            m = self.method.first(self.m[clients, columns], g)
            v = self.method.second(self.v[clients, columns], g)
            self.m[clients, columns], self.v[clients, columns] = m, v
            m = m / (1 - self.method.beta1**n).to(g)
            found[block] = m / ((v / (1 - self.method.beta2**n).to(g)).sqrt() + _EPS)
        return found


@dataclass(frozen=True)
class QGAdam(Stateful):
    """K steps of Adam that begin from quasi-global moments m and v; these follow the round's normalised move:

        m_k  =  beta1 m_k-1 + (1 - beta1) g,     v_k  =  beta2 v_k-1 + (1 - beta2) g^2        from m_0 = m_i, v_0 = v_i
        x_k  =  x_k-1 - lr m_k / (sqrt(v_k) + eps),  both without their bias towards zero         K times from x_i
        x_i' =  sum_j w_ij x_j,K,     d = (x_i - x_i') / |x_i - x_i'|
        m_i  <- beta1 m_i + (1 - beta1) d,       v_i  <- beta2 v_i + (1 - beta2) d^2

    A gradient and a move of norm 1 meet in one average, so how much the past counts depends on the scale of the loss.
    The norm runs over what trains; a block that does not keeps its m and v.

    Source: Lin, Karimireddy, Stich, Jaggi 2021, arXiv 2102.04761 (after the authors' code, epfml/quasi-global-momentum,
    which adds g to m whole; the factor 1 - beta1 is Adam's).
    Differs: K local steps; the bias is that of as many terms as the averages have; ``train.weight_decay`` is decoupled,
    and ``train.clip`` bounds the direction.
    """

    beta1: float = 0.9
    """Weight of the past in m."""
    beta2: float = 0.999
    """Weight of the past in v."""
    traits: ClassVar = Traits(
        source="QG-DAdam, arXiv 2102.04761",
        trains=IN_TURN,
        sends="adapters",
        local_only=("m", "v", "rounds"),
        sgd_only="its own moments make Adam's direction, along which SGD takes the step",
        train_defaults={"optimizer": "sgd", "lr": 1e-3},
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"algorithm.{name}: {getattr(self, name):g} given; expected at least 0 and below 1")

    def first(self, m: Tensor, term: Tensor) -> Tensor:
        """m with one term more."""
        return self.beta1 * m + (1 - self.beta1) * term

    def second(self, v: Tensor, term: Tensor) -> Tensor:
        """v with the square of one term more."""
        return self.beta2 * v + (1 - self.beta2) * term.square()

    def start(self, x: Adapters, peers: Exchange) -> QGAdamState:
        """Nobody has moved yet."""
        counts = torch.zeros(x.clients, len(x.spec.blocks), dtype=torch.int64, device=x.flat.device)
        return QGAdamState(x, torch.zeros_like(x.flat), torch.zeros_like(x.flat), counts)

    def round(self, t: int, state: QGAdamState, learner: Learner, peers: Exchange) -> QGAdamState:
        """One round."""
        x, trains, active = state.x, self.changing(t, state.x), self.active(t)
        mixed = peers.mix(learner.fit(x, LocalPlan(active, AdamDirection(self, state))))
        moved = (x.flat - mixed.flat) * trains
        d = moved / (moved.norm(dim=1, keepdim=True) + _EPS)
        m = torch.where(trains, self.first(state.m, d), state.m)
        v = torch.where(trains, self.second(state.v, d), state.v)
        trained = LocalPlan(active).trained(x.spec)
        counted = torch.tensor([block in trained for block in x.spec.blocks], device=x.flat.device)
        return QGAdamState(mixed, m, v, state.rounds + counted)

    def quiet_round(self, t: int, state: QGAdamState, learner: Learner, peers: Exchange) -> QGAdamState:
        """As blocks that do not train: no step leads along m."""
        return replace(state, x=peers.mix(state.x))
