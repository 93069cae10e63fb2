"""CHOCO-SGD: local steps, then compressed gossip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ValidationError

from peerlora.algorithms.gossip import IN_TURN, Stateful
from peerlora.algorithms.traits import Traits
from peerlora.config.exchange import CODEC
from peerlora.errors import ConfigError
from peerlora.exchange.compressed_gossip import Replicas, compressed_gossip, compressed_message
from peerlora.lora.adapters import Adapters
from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from peerlora.exchange.base import DifferenceExchange, Exchange
    from peerlora.exchange.codec import Codec
    from peerlora.exchange.schema import Schema
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class ChocoState:
    """A client's model, and the replicas behind its compressed messages."""

    x: Adapters
    known: Replicas


@dataclass(frozen=True)
class Choco(Stateful):
    """K local steps, then neighbours learn of each other by compressed differences.

        x    <-   K local steps from x
        q     =   Q(x - xhat);      xhat <- xhat + q;      s <- s + sum_j w_ij q_j
        x    <-   x + gamma (s - xhat)

    ``exchange.codec`` puts the same gossip under any method that mixes adapters; then without ``choco``.

    Source: Koloskova, Stich, Jaggi 2019, arXiv 1902.00340; K local steps and any optimiser: ours.
    Differs: see ``compressed_gossip``.
    """

    codec: Literal["identity", "cast", "top-k", "random-k", "sign", "qsgd"] = "top-k"
    """How differences are compressed, tensor by tensor."""
    share: float | None = None
    """Of the entries, for top-k and random-k; null: 0.1."""
    levels: int | None = None
    """Of qsgd; null: 7."""
    gamma: float | None = None
    """Step towards the neighbours; null: 1 for identity and cast, 0.1 for random-k, 0.3 for the rest."""
    traits: ClassVar = Traits(
        source="CHOCO-SGD, arXiv 1902.00340",
        trains=IN_TURN,
        mixes="A and B, compressed",
        sends="replicas",
        sends_gradients=False,
        requires=Properties(
            symmetric=True, row_stochastic=True, column_stochastic=True, static=True, neighbours_only=True
        ),
        topology_reason="receivers keep one weighted sum of what all neighbours last sent, which fits one W only",
    )

    def __post_init__(self):
        super().__post_init__()
        self.settings()

    def settings(self) -> Any:
        """The codec's section of a config, checked."""
        given = {"share": self.share, "levels": self.levels, "gamma": self.gamma}
        try:
            return CODEC.validate_python({"kind": self.codec} | {k: v for k, v in given.items() if v is not None})
        except ValidationError as report:
            error = report.errors()[0]
            name = str(error["loc"][-1])
            raise ConfigError(
                f"algorithm.{name}: {given.get(name)!r} given with codec={self.codec}; {error['msg'].lower()}"
            ) from None

    def built(self, x: Adapters) -> Codec:
        """The codec for these adapters."""
        from peerlora.exchange.codec import build_codec

        return build_codec(self.settings(), x.flat.dtype)

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """What the codec makes of the difference."""
        return compressed_message(x.message(), self.built(x))

    def start(self, x: Adapters, peers: Exchange) -> ChocoState:
        """Everybody knows the common start."""
        return ChocoState(x, Replicas.of_start(x))

    def round(self, t: int, state: ChocoState, learner: Learner, peers: DifferenceExchange) -> ChocoState:
        """One round."""
        x = learner.fit(state.x, self.active(t))
        return ChocoState(*compressed_gossip(x, state.known, x.spec, self.built(x), self.settings().step, peers))
