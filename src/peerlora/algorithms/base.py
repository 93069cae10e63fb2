"""What a method is: frozen hyper-parameters, what it asks of the topology, and one round."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.exchange.wire import Schema
    from peerlora.lora.adapters import Adapters
    from peerlora.train.learner import Learner

State = TypeVar("State")


class Algorithm(Protocol[State]):
    """A method.  Its state is a tree whose every leaf has the leading client axis.

    It never loops over clients and never knows where it runs: only ``peers`` crosses clients.
    """

    requires: ClassVar[Properties]
    """Properties that the topology must have; checked when a run is composed."""
    trains: ClassVar[str]
    """For people: what a client trains in a round."""
    mixes: ClassVar[str]
    """For people: what it exchanges with its neighbours."""
    source: ClassVar[str]
    """For people: the paper."""
    unequal_ranks: ClassVar[str | None]
    """None where clients may have different ranks, else the reason why not."""

    def message(self, x: Adapters) -> Schema:
        """The named vectors that one client sends to a neighbour each round, with shapes and dtypes."""
        ...

    def start(self, x: Adapters, peers: Exchange) -> State:
        """The state before round 0, from the common initial adapters."""
        ...

    def round(self, t: int, state: State, learner: Learner, peers: Exchange) -> State:
        """One round: local steps and exchange."""
        ...

    def model(self, state: State) -> Adapters:
        """What is evaluated, checkpointed as the result and exported."""
        ...
