"""The settings of every kind of topology.

Importing this module is cheap (no torch), so the command line can check a config before it loads anything heavy.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from peerlora.config.base import Builder, Positive, Rate, Section, kind_decorator, plugin_kinds
from peerlora.plugins import TOPOLOGIES, kind_flaw

Client = Annotated[int, Field(ge=0)]
Link = tuple[Client, Client]
Chance = Annotated[float, Field(gt=0, le=1)]
DirectedWeights = Literal["push-sum", "row-average"]


class Links(Section):
    """What all topologies have in common."""

    lazy: bool = False
    """Mix with (I + W) / 2: half as fast, no negative eigenvalues where W is symmetric."""
    drop_links: Rate = 0.0
    """Probability per round that a link is down."""
    drop_clients: Rate = 0.0
    """Probability per round that a client takes no part in the exchange; it still trains."""


class Graph(Links):
    """An undirected graph, from which W follows by a rule."""

    weights: Literal["metropolis", "laplacian", "uniform", "pairwise", "push-sum", "row-average"] = "metropolis"
    """How W follows from the graph: metropolis, laplacian, uniform, pairwise, push-sum or row-average."""
    allow_disconnected: bool = False
    """Accept a fixed graph in which some clients never hear from others."""


class DirectedGraph(Links):
    """A graph whose links go one way."""

    weights: DirectedWeights = "push-sum"
    """How W follows from the graph: push-sum keeps column sums, row-average row sums."""
    allow_disconnected: bool = False
    """Accept a fixed graph in which some clients never hear from others."""


class WeightedGraph(Links):
    """A graph that comes with its own W."""

    weights: Literal["own"] = "own"
    """The graph brings its own W."""


class RingGraph(Graph):
    """Each client with two neighbours; at least 3 clients."""

    kind: Literal["ring"]


class TorusGraph(Graph):
    """A grid with wrapped edges, rows x columns clients, both at least 3."""

    kind: Literal["torus"]
    rows: Positive | None = None
    """Rows of the grid; null: as square as it gets."""


class PathGraph(Graph):
    """A line."""

    kind: Literal["path"]


class StarGraph(Graph):
    """Client 0 with everybody else."""

    kind: Literal["star"]


class CompleteGraph(Graph):
    """Everybody with everybody."""

    kind: Literal["complete"]


class ExponentialGraph(Graph):
    """Client i with i ± 1, 2, 4, 8, ..."""

    kind: Literal["exponential"]


class RandomRegularGraph(Graph):
    """One random graph, fixed for the run, in which everybody has `degree` neighbours."""

    kind: Literal["random-regular"]
    degree: Positive = 3
    """Neighbours of each client."""


class ErdosRenyiGraph(Graph):
    """One random graph, fixed for the run, in which each pair is linked with probability `p`."""

    kind: Literal["erdos-renyi"]
    p: Chance = 0.3
    """Probability that two clients are linked."""


class RandomGraph(Graph):
    """A new random graph every round, each pair linked with probability `p`."""

    kind: Literal["random"]
    p: Chance = 0.1
    """Probability that two clients are linked in a round."""


class EdgesGraph(Graph):
    """The links written out."""

    kind: Literal["edges"]
    edges: list[Link]
    """Pairs of clients, e.g. [[0, 1], [1, 2]]; when directed, as [sender, receiver]."""
    directed: bool = False
    """Links go one way; the weights are then push-sum or row-average."""

    @model_validator(mode="before")
    @classmethod
    def _directed_means_push_sum(cls, value: Any) -> Any:
        directed = isinstance(value, dict) and value.get("directed") is True
        return {"weights": "push-sum", **value} if directed else value

    @model_validator(mode="after")
    def _directed_weights(self):
        if self.directed and self.weights not in ("push-sum", "row-average"):
            raise ValueError(
                f"weights={self.weights} needs links both ways; directed ones take push-sum or row-average"
            )
        return self


class DirectedRingGraph(DirectedGraph):
    """Client i sends to i + 1, and along the chords."""

    kind: Literal["directed-ring"]
    chords: list[Link] = []
    """More links, each [sender, receiver]."""


class DirectedExponentialGraph(DirectedGraph):
    """Client i sends to i + 1, 2, 4, 8, ... (doubly stochastic)."""

    kind: Literal["directed-exponential"]


class RandomOutGraph(DirectedGraph):
    """A new directed graph every round: each client sends to `degree` others, drawn at random."""

    kind: Literal["random-out"]
    degree: Positive = 2
    """Receivers of each client in a round."""


class OnePeerGraph(WeightedGraph):
    """In round m client i sends to i + 2^m alone, and keeps half."""

    kind: Literal["one-peer"]


class HypercubeGraph(WeightedGraph):
    """In round m client i averages with i xor 2^m; the number of clients must be a power of two."""

    kind: Literal["hypercube"]


class BaseGraph(WeightedGraph):
    """The Base-(degree + 1) graph: agreement in a few rounds for every number of clients."""

    kind: Literal["base-k"]
    degree: Positive = 1
    """k, the most neighbours of a client in one round."""


class EquiStaticGraph(WeightedGraph):
    """That many random cyclic shifts, drawn once: directed (d) or with their reverses (u)."""

    kind: Literal["d-equistatic", "u-equistatic"]
    degree: Positive | None = None
    """M, the number of shifts; null: log2(clients), rounded up."""


class EquiDynGraph(WeightedGraph):
    """One random cyclic shift every round: directed (od), or undirected pairs of it (ou)."""

    kind: Literal["od-equidyn", "ou-equidyn"]
    eta: Chance = 0.5
    """Weight of the shift against the identity; 1 mixes badly."""


FixedGraph = (
    RingGraph
    | TorusGraph
    | PathGraph
    | StarGraph
    | CompleteGraph
    | ExponentialGraph
    | RandomRegularGraph
    | ErdosRenyiGraph
    | EdgesGraph
)
BaseOfMatchings = Annotated[FixedGraph, Field(discriminator="kind")]


class MatchaGraph(WeightedGraph):
    """Some of the matchings of a fixed graph every round, the more important ones more often."""

    kind: Literal["matcha"]
    base: BaseOfMatchings = RingGraph(kind="ring")
    """The fixed graph: a kind, or a mapping with its settings; of its weights nothing is used."""
    budget: Chance = 0.5
    """Share of the base graph's matchings that a round uses on average."""

    @field_validator("base", mode="before")
    @classmethod
    def _word_is_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("base")
    @classmethod
    def _graph_alone(cls, base: Graph) -> Graph:
        idle = {name: getattr(base, name) for name in ("weights", "lazy", "drop_links", "drop_clients")}
        set_ = [name for name, value in idle.items() if value != type(base).model_fields[name].default]
        if set_:
            raise ValueError(f"{', '.join(set_)} of the base graph given; set what drops on the topology itself")
        return base


TopologyConfig = SerializeAsAny[
    Annotated[
        FixedGraph
        | RandomGraph
        | DirectedRingGraph
        | DirectedExponentialGraph
        | RandomOutGraph
        | OnePeerGraph
        | HypercubeGraph
        | BaseGraph
        | EquiStaticGraph
        | EquiDynGraph
        | MatchaGraph,
        Field(discriminator="kind"),
        plugin_kinds(TOPOLOGIES),
    ]
]


def register_topology(name: str, settings: type[Links]) -> Callable[[Builder], Builder]:
    """Make a topology of your own known under a name, as a decorator of the function that builds it.

    ``function(settings, clients, seed)`` returns a graph (bool [client, client], ``[i, j]``: i hears from j) where the
    settings derive from ``Graph`` or ``DirectedGraph``, or a ``WeightSequence`` where they derive from
    ``WeightedGraph``.  Raises ConfigError where another package has the name.
    """
    return kind_decorator(TOPOLOGIES, name, settings)


TOPOLOGIES.reserve(
    [
        kind
        for section in get_args(get_args(TopologyConfig)[0])
        for kind in get_args(section.model_fields["kind"].annotation)
    ],
    lambda name, thing: kind_flaw(name, thing, Links),
)
