"""Which graph and which W a round has.  Pure in (seed, t), so every peer computes the same without asking."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from peerlora.config.topology import TopologyConfig, WeightedGraph
from peerlora.errors import TopologyError
from peerlora.plugins import TOPOLOGIES
from peerlora.randomness import derive, numpy_generator
from peerlora.topology.equitopo import equidyn, equistatic
from peerlora.topology.finite_time import base_graph, hypercube, one_peer
from peerlora.topology.graphs import (
    GRAPHS,
    Adjacency,
    build_graph,
    check_out_degree,
    edge_draw,
    is_symmetric,
    keep_degrees,
    out_draw,
    pair_draw,
    plugin_graph,
)
from peerlora.topology.matcha import matcha
from peerlora.topology.properties import Properties
from peerlora.topology.weight_sequence import WeightSequence
from peerlora.topology.weights import (
    Matrix,
    lazy,
    long_run_rho,
    metropolis_target,
    over_permutations,
    pairwise_weights,
    remove_links,
    rho,
    static_rho,
    weights,
)


@dataclass(frozen=True, eq=False)
class RoundGraph:
    """The links that are really up in one round, and W [client, client] with rows = receivers.

    ``adjacency[i, j]`` says that i hears from j; W_ij is then the weight of j's message.
    Static topologies hand out the same object every round: read it, never write into it.
    """

    adjacency: Adjacency
    W: Matrix

    @property
    def degrees(self) -> Int[np.ndarray, " client"]:
        """The number of those whom a client hears from."""
        return self.adjacency.sum(axis=1)

    @property
    def out_degrees(self) -> Int[np.ndarray, " client"]:
        """The number of those whom a client sends to; the same where links go both ways."""
        return self.adjacency.sum(axis=0)

    @property
    def edges(self) -> list[tuple[int, int]]:
        """The links (i, j) with i < j; where any goes one way only, all of them as (sender, receiver)."""
        if is_symmetric(self.adjacency):
            return [(i, j) for i, j in np.argwhere(np.triu(self.adjacency)).tolist()]
        return [(j, i) for i, j in np.argwhere(self.adjacency).tolist()]

    def neighbours(self, client: int) -> list[int]:
        """Those whom ``client`` hears from this round, in order."""
        return np.flatnonzero(self.adjacency[client]).tolist()

    def receivers(self, client: int) -> list[int]:
        """Those whom ``client`` sends to this round, in order."""
        return np.flatnonzero(self.adjacency[:, client]).tolist()


@dataclass(frozen=True, eq=False)
class Topology:
    """A graph for every round; made by ``build_topology``."""

    config: TopologyConfig | Any
    clients: int
    seed: int
    graph: Adjacency | None
    """The graph of the whole run; None where every round has its own."""
    plan: WeightSequence | None = None
    """Where the topology comes with its own W."""
    interrupted: bool = False
    """Whether rounds may have to do without clients that the topology itself does not drop: see ``at``."""
    least_degree: int = 0
    """Neighbours without which a client has no links in a round, whose weight goes to the diagonals of both ends."""

    @cached_property
    def properties(self) -> Properties:
        """What holds for every W of the run.

        ``pairwise`` draws a new order of contacts every round, so it is never static.
        """
        rule = self.config.weights
        one_way = self.directed and self._drops  # the sender keeps what it could not send, so rows lose their sum
        if rule in ("push-sum", "row-average"):
            balanced = not one_way and self.graph is not None and _is_regular(self.graph)
            symmetric = balanced and not self.directed
            rows, columns = balanced or rule == "row-average", balanced or rule == "push-sum"
        else:
            symmetric = self.plan.symmetric if self.plan else rule != "pairwise"
            rows, columns = not one_way, True
        return Properties(
            symmetric=bool(symmetric),
            row_stochastic=bool(rows),
            column_stochastic=bool(columns),
            static=self.period == 1,
            neighbours_only=rule != "pairwise",
            period=self.period,
        )

    @cached_property
    def period(self) -> int | None:
        """Rounds after which the same matrices come again, 1 where they never change; None where rounds are drawn."""
        if self._drops or self.config.weights == "pairwise":
            return None
        return self.plan.period if self.plan else 1 if self.graph is not None else None

    @cached_property
    def directed(self) -> bool:
        """Whether links may go one way."""
        if self.plan is not None:
            return not self.plan.symmetric
        return self.config.kind == "random-out" or (self.graph is not None and not is_symmetric(self.graph))

    def at(self, t: int, absent: Sequence[int] = ()) -> RoundGraph:
        """The graph and W of round ``t``, without the links of those who are ``absent``."""
        return self._static if self.period == 1 else self._round(self.seed, t, absent)

    def aimed(self, adjacency: Adjacency, c: Float[np.ndarray, " client"]) -> Matrix:
        """Metropolis-Hastings weights for the target c on these links; lazy where the topology is."""
        return self._lazy(metropolis_target(adjacency, c))

    def links(self, t: int) -> Adjacency:
        """The links that are up in round ``t``, without the cost of W where it follows from them."""
        return self._up(self.seed, t)

    @property
    def draws(self) -> int | None:
        """How many rounds an estimate draws by default; None where rounds repeat and nothing is estimated."""
        if self.period is not None:
            return None
        return 1000 if self.clients <= 100 else max(20, 10_000_000 // self.clients**2)

    def sample(self, rounds: int) -> Iterator[RoundGraph]:
        """Rounds drawn for estimates, independent of those of the run but as reproducible."""
        return (self._round(self._sample_seed, t) for t in range(rounds))

    def sample_links(self, rounds: int) -> Iterator[Adjacency]:
        """The links of the rounds that ``sample`` draws, without the cost of W where it follows from them."""
        return (self._up(self._sample_seed, t) for t in range(rounds))

    def rho(self, rounds: int | None = None) -> float:
        """How much of the disagreement norm a round leaves, in the mean over rounds (see ``weights.rho``).

        Exact for topologies with a period, else estimated from ``rounds`` draws that do not depend on the run's
        rounds.  Where W is not doubly stochastic it is the factor in the long run (``weights.long_run_rho``).
        """
        rounds = self.period or rounds or self.draws or 1
        if not self.properties.doubly_stochastic:
            if self.period == 1:
                return static_rho(self._static.W)
            drawn = (graph.W for graph in self.sample(rounds))
            return long_run_rho(drawn, self.properties.column_stochastic, numpy_generator(self.seed, "rho"))
        moment = np.zeros((self.clients, self.clients))
        for drawn in [self._static] if self.period == 1 else self.sample(rounds):
            moment += drawn.W.T @ drawn.W / rounds
        # No client is special in a graph drawn anew every round, so neither is one in the true moment;
        # imposing that removes the upward bias that the largest eigenvalue of a noisy matrix has.
        return rho(over_permutations(moment) if self.config.kind == "random" else moment)

    @property
    def averages_all(self) -> bool:
        """Whether every round gives everybody the average of all, as a server would."""
        return self.properties.static and self.rho() < 1e-12

    def left_after_period(self) -> float | None:
        """``|| W_period ... W_1 - J ||_2``: what one period leaves of the disagreement; None without a period."""
        if self.period is None or not self.properties.doubly_stochastic:
            return None
        product = np.eye(self.clients)
        for t in range(self.period):
            product = self.at(t).W @ product
        return rho(product.T @ product)

    @property
    def _drops(self) -> bool:
        return self.config.drop_links > 0 or self.config.drop_clients > 0 or self.interrupted

    @property
    def _sample_seed(self) -> int:
        return derive(self.seed, "rho")

    @cached_property
    def _static(self) -> RoundGraph:
        return self._with_degrees(RoundGraph(*self._planned(self.seed, 0)))

    @cached_property
    def _full_weights(self) -> Matrix:
        """W of the fixed graph with nothing missing."""
        assert self.graph is not None
        return self._weighted(self.graph)

    def _weighted(self, adjacency: Adjacency) -> Matrix:
        return self._lazy(weights(adjacency, self.config.weights))

    def _lazy(self, W: Matrix) -> Matrix:
        return lazy(W) if self.config.lazy else W

    def _round(self, seed: int, t: int, absent: Sequence[int] = ()) -> RoundGraph:
        gone = np.isin(np.arange(self.clients), absent)
        apart = np.logical_or.outer(gone, gone)
        if self.config.weights == "pairwise":
            up = self._up(seed, t) & ~apart
            W = self._lazy(pairwise_weights(up, numpy_generator(seed, "pairwise", round=t)))
            return self._with_degrees(RoundGraph(up, W))
        full, W = self._planned(seed, t)
        missing = full & (self._missing(seed, t) | apart)
        sender_keeps = self.directed and self.config.weights != "row-average"
        W = remove_links(W, missing, sender_keeps or self.config.weights == "push-sum")
        return self._with_degrees(RoundGraph(full & ~missing, W))

    def _with_degrees(self, graph: RoundGraph) -> RoundGraph:
        """The graph without the links of clients that have fewer than ``least_degree``."""
        if not self.least_degree:
            return graph
        kept = keep_degrees(graph.adjacency, self.least_degree)
        return RoundGraph(kept, remove_links(graph.W, graph.adjacency & ~kept))

    def _planned(self, seed: int, t: int) -> tuple[Adjacency, Matrix]:
        """The links of a round and W before anything drops."""
        if self.plan is not None:
            W = self._lazy(self.plan.W(seed, t))
            return _links(W), W
        if self.graph is not None:
            return self.graph, self._full_weights
        full = self._drawn(seed, t)
        return full, self._weighted(full)

    def _up(self, seed: int, t: int) -> Adjacency:
        if self.plan is not None:
            full = _links(self.plan.W(seed, t))
        else:
            full = self.graph if self.graph is not None else self._drawn(seed, t)
        return full & ~self._missing(seed, t)

    def _drawn(self, seed: int, t: int) -> Adjacency:
        config = self.config
        if config.kind == "random":
            return edge_draw(config.p, self.clients, seed, t)
        assert config.kind == "random-out"
        return out_draw(config.degree, self.clients, seed, t)

    def _missing(self, seed: int, t: int) -> Adjacency:
        """Which links are down if they are planned; each way has its own luck where links may go one way."""
        config, clients = self.config, self.clients
        missing = np.zeros((clients, clients), dtype=bool)
        if config.drop_links > 0:
            generator = numpy_generator(seed, "links", round=t)
            if self.directed:
                missing |= generator.random((clients, clients)) < config.drop_links
            else:
                missing |= pair_draw(config.drop_links, clients, generator)
        if config.drop_clients > 0:
            away = numpy_generator(seed, "participation", round=t).random(clients) < config.drop_clients
            missing |= np.logical_or.outer(away, away)
        return missing


def build_topology(config: TopologyConfig | Any, clients: int, seed: int) -> Topology:
    """The topology of a run.

    Raises TopologyError where its graph does not exist, or is disconnected without ``allow_disconnected``.
    """
    if config.kind in PLANS:
        return Topology(config, clients, seed, None, PLANS[config.kind](config, clients, seed))
    if config.kind == "random-out":
        check_out_degree(clients, config.degree)
    plugin = TOPOLOGIES.find(config.kind)
    if plugin is not None:
        return _of_plugin(config, plugin.build(config, clients, seed), clients, seed)
    return Topology(config, clients, seed, build_graph(config, clients, seed) if config.kind in GRAPHS else None)


def _of_plugin(config: Any, made: Any, clients: int, seed: int) -> Topology:
    """A topology from what another package's function gave; raises TopologyError where that is none."""
    kind = config.kind
    if not isinstance(made, WeightSequence):
        return Topology(config, clients, seed, plugin_graph(config, made, clients))
    if not isinstance(config, WeightedGraph):
        raise TopologyError(f"{kind}: a WeightSequence given; its settings must derive from WeightedGraph")
    W = made.W(seed, 0)
    sums = np.concatenate([W.sum(axis=0), W.sum(axis=1)]) if W.shape == (clients, clients) else np.zeros(1)
    if not np.allclose(sums, 1, rtol=0, atol=1e-9):
        raise TopologyError(f"{kind}: W of round 0 is not doubly stochastic for {clients} clients")
    return Topology(config, clients, seed, None, made)


def _links(W: Matrix) -> Adjacency:
    return (W != 0) & ~np.eye(len(W), dtype=bool)


def _is_regular(adjacency: Adjacency) -> bool:
    """Whether all clients hear from and send to equally many."""
    degrees = np.concatenate([adjacency.sum(axis=0), adjacency.sum(axis=1)])
    return bool((degrees == degrees[0]).all())


PLANS: dict[str, Callable[[Any, int, int], WeightSequence]] = {
    "one-peer": lambda config, clients, seed: one_peer(clients),
    "hypercube": lambda config, clients, seed: hypercube(clients),
    "base-k": lambda config, clients, seed: base_graph(clients, config.degree),
    "d-equistatic": lambda config, clients, seed: equistatic(config.kind, clients, config.degree, seed),
    "u-equistatic": lambda config, clients, seed: equistatic(config.kind, clients, config.degree, seed),
    "od-equidyn": lambda config, clients, seed: equidyn(config.kind, clients, config.eta),
    "ou-equidyn": lambda config, clients, seed: equidyn(config.kind, clients, config.eta),
    "matcha": lambda config, clients, seed: matcha(build_graph(config.base, clients, seed), config.budget).plan,
}
