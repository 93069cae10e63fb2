"""What a method is: frozen hyper-parameters, what it asks of the topology, and one round."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange, Mailbox, Vectors
    from peerlora.exchange.payload import Shapes
    from peerlora.exchange.schema import Schema
    from peerlora.lora.adapters import Adapters
    from peerlora.topology.schedule import Topology
    from peerlora.train.learner import Learner

State = TypeVar("State")
Operator = Literal["none", "product-sum", "sum-product", "both"]
"""How a method averages adapters, in the words of arXiv 2508.01348.

product-sum (PS) averages the factors and multiplies the averages.  sum-product (SP) averages the products and, where it
sends factors on, factors the average again.  Both: one factor is common to all clients, so the two are the same.
"""


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
    operator: ClassVar[Operator]
    """What its exchange averages: factors, products, or nothing."""
    unequal_ranks: ClassVar[str | None]
    """None where clients may have different ranks, else the reason why not."""

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """The named vectors that one client sends to a neighbour in round ``t``, with shapes and dtypes."""
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


@runtime_checkable
class AsynchronousAlgorithm(Protocol[State]):
    """A method whose clients keep no common step: each works, sends and listens when it is its turn.

    It has what Algorithm has but ``round``.  Instead a client calls, with the state of itself alone (a leading axis of
    one) and its mailbox, ``on_job`` when a job of K local steps is done, ``on_message`` when something has arrived,
    and ``before_job`` before it begins the next.  Each returns the new state and changes neither the old nor payloads.
    """

    newest_only: ClassVar[bool]
    """Whether of several messages of one sender that wait, the newest alone counts."""

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """The named vectors of one message after ``t`` jobs."""
        ...

    def incoming(self, x: Adapters, claimed: Shapes) -> Schema:
        """What a message must hold that claims these shapes, as far as they are possible; the largest for no claim."""
        ...

    def flaw(self, x: Adapters, payload: Vectors) -> str | None:
        """What makes a message of that form useless all the same; None for a good one."""
        ...

    def start(self, x: Adapters, peers: Exchange) -> State:
        """The state before the first job."""
        ...

    def model(self, state: State) -> Adapters:
        """What is trained, evaluated and exported."""
        ...

    def active(self, job: int) -> str:
        """The blocks that a client's job of this number trains: "A", "B" or "AB"."""
        ...

    def coordinates(self, state: State) -> Bool[Tensor, "client parameter"] | None:
        """What may change in local training; None: everything."""
        ...

    def on_job(self, state: State, before: Adapters, trained: Adapters, mail: Mailbox) -> State:
        """A job that began at ``before`` came to ``trained``."""
        ...

    def on_message(self, state: State, mail: Mailbox) -> State:
        """Something has arrived."""
        ...

    def before_job(self, state: State, mail: Mailbox) -> State:
        """The next job is about to begin, from the model of what this returns."""
        ...


def is_asynchronous(algorithm: object) -> bool:
    """Whether the method's clients keep no common step."""
    return isinstance(algorithm, AsynchronousAlgorithm)


@runtime_checkable
class Configurable(Protocol):
    """A method with something to choose or to say once the topology and the length of the run are known."""

    def prepared(self, topology: Topology, rounds: int) -> tuple[Algorithm[Any], tuple[str, ...]]:
        """The method that runs, and notes for the run.

        Only what every client can work out alone may be used: they must all come to the same method.
        """
        ...


@runtime_checkable
class DeadlineAware(Protocol):
    """A method that may give clients a time for a round's local steps, on the virtual clock; null: no end."""

    deadline: float | None
    """Seconds."""

    def message_in_time(self, x: Adapters, step_seconds: Float[Tensor, " client"], steps: int) -> Schema:
        """The named vectors that one client sends whose local steps take so long; ``x`` has its row only."""
        ...


def requirement(algorithm: Algorithm[Any]) -> Properties:
    """What the topology must have: ``requires``, or the less that a method with these settings can do with."""
    return getattr(algorithm, "eased", None) or algorithm.requires


def prepare(algorithm: Algorithm[Any], topology: Topology, rounds: int) -> tuple[Algorithm[Any], tuple[str, ...]]:
    """The method that runs, with its notes; most methods are ready as they are."""
    return algorithm.prepared(topology, rounds) if isinstance(algorithm, Configurable) else (algorithm, ())


def part(x: Adapters, *blocks: str) -> Adapters:
    """Some blocks alone ("A", "B", "head"), as a copy: what a method mixes that keeps a factor at home."""
    spec = replace(x.spec, blocks=blocks)
    return replace(x, spec=spec, flat=torch.cat([x.flat[:, x.spec.columns(block)] for block in blocks], dim=1))
