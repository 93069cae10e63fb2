"""What a method is: frozen hyper-parameters, what it asks of the topology, and one round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from peerlora.algorithms.traits import IN_STEP, Traits
from peerlora.topology.properties import Properties

if TYPE_CHECKING:
    from peerlora.config.exchange import CacheConfig
    from peerlora.exchange.base import Exchange, Mailbox, Vectors
    from peerlora.exchange.payload import Shapes
    from peerlora.exchange.schema import Schema
    from peerlora.lora.adapters import Adapters
    from peerlora.topology.schedule import Topology
    from peerlora.train.base import Learner

State = TypeVar("State")


class Method(Protocol):
    """What every method declares, with defaults for all that depends on a method's settings.

    A method inherits from it and overrides what its own settings change.
    """

    traits: ClassVar[Traits]
    """Each class declares its own: a subclass that changes what is sent must not inherit what goes with it."""

    @property
    def relaxed_requires(self) -> Properties | None:
        """The properties of the topology that suffice with these settings; None: ``traits.requires``."""
        return None

    @property
    def fresh_optimizer(self) -> str | None:
        """Why the optimiser's memory cannot outlast a round; None where it can."""
        return self.traits.fresh_optimizer

    @property
    def needs_clock(self) -> str | None:
        """Why the run must have a virtual clock, or None."""
        return None

    @property
    def time_limit(self) -> float | None:
        """Virtual seconds that a client has for the local steps of a round; None: no limit."""
        return None

    def deadline_warning(self, seconds: float) -> str | None:
        """Say what a client whose whole local steps take so many virtual seconds cannot do in time, or None."""
        return None

    @property
    def switches_every(self) -> int | None:
        """Rounds between two switches of the active factor; None where both train in every round."""
        return None

    def rounds_of_phase(self, blocks: int) -> int | None:
        """Rounds between two switches in a run, of a flow policy with so many blocks; None where both train in all."""
        return self.switches_every

    @property
    def alternates(self) -> bool:
        """Whether A and B train in turn."""
        return self.switches_every is not None

    @property
    def training_end_refusal(self) -> str | None:
        """Why one client alone cannot end its training and go on mixing; None where it can."""
        return self.traits.quiet_refusal() or IN_STEP

    @property
    def settles(self) -> bool:
        """Whether there are rounds without training."""
        return False

    def trained_rounds(self, rounds: int) -> int:
        """In how many of a run's first so many rounds clients take local steps, ``train.quiet`` aside."""
        return rounds

    @property
    def cache(self) -> CacheConfig | None:
        """Settings of the cache that ``peers.mix_cached`` averages, where ``traits.sends`` is "cached"; else None."""
        return None

    def check_task(self, kind: str) -> None:
        """Raise CompositionError for a kind of task that the method cannot learn with these settings."""

    def message(self, x: Adapters, t: int = 0) -> Schema:
        """The named vectors that one client sends to a neighbour in round ``t``, with shapes and dtypes."""
        ...

    def message_in_time(self, x: Adapters, t: int, step_seconds: Float[Tensor, " client"], steps: int) -> Schema:
        """The message of one client whose local steps take so long on the virtual clock; ``x`` has its row only."""
        return self.message(x, t)

    def merged_columns(self, rank: int, senders: int, rounds: int) -> int:
        """Columns that a client's sum of products has at the end of the run, where ``traits.merges_into`` names one.

        ``senders``: the most clients whose messages reach one client in a round, itself too.
        """
        return 0

    def quiet_round(self: Algorithm[Any], t: int, state: Any, learner: Learner, peers: Exchange) -> Any:
        """One round of exchange without training, where ``traits.quiet`` does not refuse it.

        ``learner.fit`` returns what it is given.  A method overrides it whose round does more than train and mix.
        """
        return self.round(t, state, learner, peers)

    def on_rejoin(self, own: Any, received: Any) -> Any:
        """The state of a real peer that fell behind and received a neighbour's state."""
        return received


class Algorithm(Method, Protocol[State]):
    """A method with rounds.  Its state is a tree whose every leaf has the leading client axis.

    It never loops over clients and never knows where it runs: only ``peers`` crosses clients.

    A method, and one round of it on 3 clients whose A and B are one number each:

    >>> from dataclasses import dataclass, replace
    >>> from types import SimpleNamespace
    >>> import torch
    >>> from peerlora.algorithms.gossip import FactorGossip
    >>> from peerlora.exchange.stacked import StackedExchange
    >>> from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
    >>> from peerlora.config.loading import parse_spec
    >>> from peerlora.topology.schedule import build_topology

    >>> @dataclass(frozen=True)
    ... class Averaging(FactorGossip):
    ...     traits: ClassVar = Traits(source="an example", sends="adapters")
    ...
    ...     def round(self, t, x, learner, peers):
    ...         return peers.mix(learner.fit(x, "AB"))

    >>> spec = AdapterSpec((LayerSpec("query", d_in=1, d_out=1),), rank=1, alpha=1.0)
    >>> x = Adapters(spec, torch.zeros(3, 2), torch.ones(3, dtype=torch.int64))
    >>> learner = SimpleNamespace(fit=lambda x, train: replace(x, flat=torch.tensor([[0.0, 1], [3, 1], [6, 1]])))
    >>> peers = StackedExchange(build_topology(parse_spec("complete"), clients=3, seed=0), range(3))
    >>> method = Averaging()
    >>> method.model(method.round(0, method.start(x, peers), learner, peers)).flat.round().tolist()
    [[3.0, 1.0], [3.0, 1.0], [3.0, 1.0]]
    """

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
class AsynchronousAlgorithm(Method, Protocol[State]):
    """A method whose clients keep no common step: each trains, sends and receives on its own schedule.

    It has what Algorithm has but ``round``.  Instead a client calls, with the state of itself alone (a leading axis of
    one) and its mailbox, ``on_job`` when a job of K local steps is done, ``on_message`` when something has arrived,
    and ``before_job`` before it begins the next.  Each returns the new state and changes neither the old nor payloads.
    """

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

    def on_job(self, state: State, before: Adapters, trained: Adapters, mailbox: Mailbox) -> State:
        """A job that began at ``before`` came to ``trained``."""
        ...

    def on_message(self, state: State, mailbox: Mailbox) -> State:
        """Something has arrived."""
        ...

    def before_job(self, state: State, mailbox: Mailbox) -> State:
        """The next job is about to begin, from the model of what this returns."""
        ...


def is_asynchronous(algorithm: object) -> bool:
    """Whether the method's clients keep no common step."""
    return isinstance(algorithm, AsynchronousAlgorithm)


@runtime_checkable
class Configurable(Protocol):
    """A method with something to choose or to say once the topology and the length of the run are known."""

    def prepared(self, topology: Topology, rounds: int) -> tuple[Algorithm[Any], tuple[str, ...]]:
        """The method that runs, and notes for the run; ``rounds``: those that train.

        Only what every client can work out alone may be used: they must all come to the same method.
        """
        ...


def requirement(algorithm: Algorithm[Any]) -> Properties:
    """The properties that the topology must have for a method with these settings."""
    return algorithm.relaxed_requires or algorithm.traits.requires


def prepare(algorithm: Algorithm[Any], topology: Topology, rounds: int) -> tuple[Algorithm[Any], tuple[str, ...]]:
    """The method that runs, with its notes; most methods are ready as they are."""
    return algorithm.prepared(topology, rounds) if isinstance(algorithm, Configurable) else (algorithm, ())
