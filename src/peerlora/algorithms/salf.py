"""SALF: a client whose time runs out keeps what its backward pass has reached, from the head down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from peerlora.algorithms.depth_schedule import DepthGossip
from peerlora.algorithms.traits import IN_STEP, Traits
from peerlora.errors import ConfigError
from peerlora.lora.adapters import Adapters
from peerlora.lora.layer_order import by_column, depth_of, reached_layers
from peerlora.lora.partial import REACHED, PartialAdapters
from peerlora.topology.properties import Properties
from peerlora.train.backward_depth import BackwardDepth
from peerlora.train.base import LocalPlan

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.exchange.schema import Schema
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class SALF(DepthGossip):
    """Layer l = 1 is the head, l = 2, 3, ... the transformer blocks' A and B from the last one down.  With depth d_i:

    local:  ``x_i,l <- x_i,l + min(1/q_l, cap) (local update)`` where l <= d_i, else ``x_i,l`` stays;
    mixing: ``x_i,l <- x_i,l + sum_j w_ij m_il m_jl (x_j,l - x_i,l)`` with ``m_il = [l <= d_i]``.

    With ``steps: every`` a layer below d_i is where the round began, to the bit.  With ``steps: last`` the update of
    the first line is that of a round's last local step alone: those before it have moved every layer, also those below
    d_i, which are then not mixed but stay at home until a round reaches them.

    q_l = P(d >= l) makes the expected update that of a full pass, and the mask on both ends of a link keeps the W of
    each layer doubly stochastic.  ``correction: neighbourhood`` takes SALF's server rule over the closed neighbourhood:
    ``x_i,l <- (mean of x_j,l over those that reached l - p x_i,l) / (1 - p)``, p = prod_j (1 - q_l), the mean by w_ij;
    it is unbiased where these are equal, and does not keep the mean over clients.

    Source: Lang, Cohen, Shlezinger 2024, arXiv 2403.18375: truncation and the depths ``uniform`` as in the authors'
    code; ``poisson`` as in their follow-up's.  Reconstruction: p and the correction are recalled and checked to be
    unbiased; the released code adds the old layer for those that did not reach it, which shrinks the update by q.
    Differs (ours): no server; a block is one layer, where the code counts weights and biases; stragglers are drawn
    anew in every round, so that all clients have the same q, where the released code draws 90 % of its users once for
    the run; 1/q with a cap; the deadline.  What a deadline lets no client reach cannot be corrected.
    """

    steps: Literal["every", "last"] = "every"
    """Which local steps of a round are cut short: all, each in the same layer, or the last one only."""
    correction: Literal["ipw", "neighbourhood", "none"] = "ipw"
    cap: float = 10.0
    """Largest 1/q."""
    send: Literal["reached", "all"] = "reached"
    """Whether layers that were not reached are sent too: with ``steps: every`` they are as the round began."""
    traits: ClassVar = Traits(
        source="SALF, arXiv 2403.18375",
        trains="A and B of the layers that backward reaches; with `interval` in turn",
        mixes="A and B of the layers that both ends reached",
        sends="layers",
        sends_gradients=False,
        requires=Properties(symmetric=True, row_stochastic=True, column_stochastic=True),
        training_end=IN_STEP,
        own_loop="it cuts backward passes short, and a loop has its own",
        topology_reason="a mask on both ends of a link keeps the sums of a symmetric W only",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.cap < 1:
            raise ConfigError(f"algorithm.cap={self.cap:g} given; expected at least 1")
        if self.deadline is not None and self.steps == "last":
            raise ConfigError("algorithm.deadline cuts every local step short, steps=last given; use steps=every")
        if self.correction == "neighbourhood" and self.send == "all":
            raise ConfigError("algorithm.correction=neighbourhood takes only what was reached; use send=reached")
        if self.correction == "neighbourhood" and self.steps == "last":
            raise ConfigError(
                "algorithm.correction=neighbourhood starts again from the round's start where a layer was not reached, "
                "which would throw away the steps before the last; use steps=every, or correction=ipw"
            )

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """A, B and a mixed head, of which a client may send less, and which layers it sends."""
        return x.message() if self.send == "all" else _message(x)

    def round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """One round."""
        layers = depth_of(x.spec)
        depth = self.depths(layers, learner, peers)
        if depth is None:
            return peers.mix(learner.fit(x, self.active(t)))
        q = self.chances(layers)
        factor = (1 / q).clamp_max(self.cap) if self.correction == "ipw" else torch.ones_like(q)
        cut = BackwardDepth(depth, factor.to(x.flat).expand(x.clients, -1), self.steps == "last")
        trained = learner.fit(x, LocalPlan(self.active(t), depth=cut))
        if self.send == "all":
            return peers.mix(trained)
        reached = reached_layers(depth, layers)
        if self.correction == "neighbourhood":
            return neighbourhood_mean(x, trained, reached, q, peers)
        return mix_reached(trained, reached, peers)

    def quiet_round(self, t: int, x: Adapters, learner: Learner, peers: Exchange) -> Adapters:
        """Every layer is mixed: no backward pass is cut short."""
        layers = depth_of(x.spec)
        return peers.mix(x) if self.send == "all" else mix_reached(x, torch.ones(x.clients, layers).bool(), peers)

    def message_in_time(self, x: Adapters, t: int, step_seconds: Float[Tensor, " client"], steps: int) -> Schema:
        """Fewer layers from a client that is slower.

        Where depths are drawn, that of the round in which it takes part is not known when its job begins: all layers.
        """
        if self.deadline is None or self.send == "all":
            return self.message(x, t)
        layers = depth_of(x.spec)
        reached = reached_layers(self.in_time(self.deadline, layers, step_seconds, steps), layers)
        return _message(PartialAdapters.of(x, reached))


def _message(x: Adapters) -> Schema:
    """The vectors of ``_gathered``, of the layers that ``x`` sends."""
    own = {f"layers.{name}": what for name, what in x.message().items()}
    return own | {REACHED: ((depth_of(x.spec),), x.flat.dtype)}


def _gathered(
    x: Adapters, reached: Bool[Tensor, "client layer"], peers: Exchange
) -> tuple[Float[Tensor, "client parameter"], Float[Tensor, "client parameter"]]:
    """``sum_j w_ij m_jl x_j,l`` and ``sum_j w_ij m_jl``, by column."""
    message: Any = {"layers": PartialAdapters.of(x, reached), REACHED: reached.to(x.flat)}
    found = peers.mix(message)
    return found["layers"].flat, by_column(x.spec, found[REACHED])


def mix_reached(x: Adapters, reached: Bool[Tensor, "client layer"], peers: Exchange) -> Adapters:
    """``x_i,l + sum_j w_ij m_il m_jl (x_j,l - x_i,l)``; a private head stays."""
    total, weight = _gathered(x, reached, peers)
    keep = by_column(x.spec, reached.to(x.flat.device))
    flat = torch.where(keep, x.flat + (total - weight * x.flat), x.flat)
    return x.with_shared(flat[:, x.spec.shared])


def neighbourhood_mean(
    before: Adapters,
    after: Adapters,
    reached: Bool[Tensor, "client layer"],
    q: Float[Tensor, " layer"],
    peers: Exchange,
) -> Adapters:
    """SALF's server rule over the closed neighbourhood; a layer that nobody there has reached keeps its old value."""
    total, weight = _gathered(after, reached, peers)
    degrees = torch.as_tensor(peers.graph.degrees)[torch.as_tensor(peers.clients)]
    p = by_column(after.spec, ((1 - q) ** (1 + degrees[:, None])).to(after.flat))
    some = weight > 0
    mean = total / torch.where(some, weight, 1.0)
    flat = torch.where(some, (mean - p * before.flat) / torch.where(some, 1 - p, 1.0), before.flat)
    return after.with_shared(flat[:, after.spec.shared])
