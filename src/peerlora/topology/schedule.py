"""Which graph and which W a round has.  Pure in (seed, t), so every peer computes the same without asking."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int

from peerlora.randomness import derive, numpy_generator
from peerlora.sections import TopologyConfig
from peerlora.topology.graphs import Adjacency, build_graph, edge_draw, pair_draw
from peerlora.topology.properties import Properties
from peerlora.topology.weights import Matrix, over_permutations, pairwise_weights, remove_links, rho, weights


@dataclass(frozen=True, eq=False)
class RoundGraph:
    """The links that are really up in one round, and W [client, client] with rows = receivers.

    Static topologies hand out the same object every round: read it, never write into it.
    """

    adjacency: Adjacency
    W: Matrix

    @property
    def degrees(self) -> Int[np.ndarray, " client"]:
        """The number of neighbours of every client."""
        return self.adjacency.sum(axis=1)

    @property
    def edges(self) -> list[tuple[int, int]]:
        """The links (i, j) with i < j."""
        return [(i, j) for i, j in np.argwhere(np.triu(self.adjacency)).tolist()]

    def neighbours(self, client: int) -> list[int]:
        """Those whom ``client`` talks to this round, in order."""
        return np.flatnonzero(self.adjacency[client]).tolist()


@dataclass(frozen=True, eq=False)
class Topology:
    """A graph for every round; made by ``build_topology``."""

    config: TopologyConfig
    clients: int
    seed: int
    graph: Adjacency | None
    """The graph of the whole run; None where every round draws its own."""
    interrupted: bool = False
    """Whether rounds may have to do without clients that the topology itself does not drop: see ``at``."""

    @cached_property
    def properties(self) -> Properties:
        """What holds for every W of the run.

        ``pairwise`` draws a new order of contacts every round, so it is never static.
        """
        config, pairwise = self.config, self.config.weights == "pairwise"
        drops = config.drop_links > 0 or config.drop_clients > 0
        return Properties(
            symmetric=not pairwise,
            row_stochastic=True,
            column_stochastic=True,
            static=not (self.graph is None or drops or pairwise or self.interrupted),
            neighbours_only=not pairwise,
        )

    def at(self, t: int, absent: Sequence[int] = ()) -> RoundGraph:
        """The graph and W of round ``t``, without the links of those who are ``absent``."""
        return self._static if self.properties.static else self._round(self.seed, t, absent)

    def links(self, t: int) -> Adjacency:
        """The links that are up in round ``t``, without the cost of W."""
        full, missing = self._links(self.seed, t)
        return full & ~missing

    @property
    def draws(self) -> int | None:
        """How many rounds an estimate draws by default; None where the graph is static and nothing is estimated."""
        if self.properties.static:
            return None
        return 1000 if self.clients <= 100 else max(20, 10_000_000 // self.clients**2)

    def sample(self, rounds: int) -> Iterator[RoundGraph]:
        """Rounds drawn for estimates, independent of those of the run but as reproducible."""
        return (self._round(self._sample_seed, t) for t in range(rounds))

    def sample_links(self, rounds: int) -> Iterator[Adjacency]:
        """The links of the rounds that ``sample`` draws, without the cost of W."""
        for t in range(rounds):
            full, missing = self._links(self._sample_seed, t)
            yield full & ~missing

    def rho(self, rounds: int | None = None) -> float:
        """How much of the disagreement norm a round leaves (see ``weights.rho``).

        Exact for static topologies, else estimated from ``rounds`` draws that do not depend on the run's rounds.
        """
        if self.properties.static:
            W = self._static.W
            return rho(W.T @ W)
        rounds = rounds or self.draws or 1
        moment = np.zeros((self.clients, self.clients))
        for drawn in self.sample(rounds):
            moment += drawn.W.T @ drawn.W / rounds
        # No client is special in a graph drawn anew every round, so neither is one in the true moment;
        # imposing that removes the upward bias that the largest eigenvalue of a noisy matrix has.
        return rho(over_permutations(moment) if self.graph is None else moment)

    @property
    def _sample_seed(self) -> int:
        return derive(self.seed, "rho")

    @cached_property
    def _static(self) -> RoundGraph:
        assert self.graph is not None
        return RoundGraph(self.graph, self._full_weights)

    @cached_property
    def _full_weights(self) -> Matrix:
        """W of the fixed graph with nothing missing."""
        assert self.graph is not None
        return weights(self.graph, self.config.weights)

    def _round(self, seed: int, t: int, absent: Sequence[int] = ()) -> RoundGraph:
        full, missing = self._links(seed, t)
        gone = np.isin(np.arange(self.clients), absent)
        missing = missing | (full & np.logical_or.outer(gone, gone))
        adjacency = full & ~missing
        if self.config.weights == "pairwise":
            return RoundGraph(adjacency, pairwise_weights(adjacency, numpy_generator(seed, "pairwise", round=t)))
        W = self._full_weights if self.graph is not None else weights(full, self.config.weights)
        return RoundGraph(adjacency, remove_links(W, missing))

    def _links(self, seed: int, t: int) -> tuple[Adjacency, Adjacency]:
        """The planned links of a round, and those of them that are missing."""
        config, clients = self.config, self.clients
        full = edge_draw(config.p, clients, seed, t) if config.kind == "random" else self.graph
        assert full is not None
        missing = np.zeros_like(full)
        if config.drop_links > 0:
            missing |= pair_draw(config.drop_links, clients, numpy_generator(seed, "links", round=t))
        if config.drop_clients > 0:
            away = numpy_generator(seed, "participation", round=t).random(clients) < config.drop_clients
            missing |= np.logical_or.outer(away, away)
        return full, full & missing


def build_topology(config: TopologyConfig, clients: int, seed: int) -> Topology:
    """The topology of a run.

    Raises TopologyError where its graph does not exist, or is disconnected without ``allow_disconnected``.
    """
    graph = None if config.kind == "random" else build_graph(config, clients, seed)
    return Topology(config, clients, seed, graph)
