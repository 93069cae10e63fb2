"""Which graph and which W a round has.  Pure in (seed, t), so every peer computes the same without asking."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from peerlora.config.topology import TopologyConfig, WeightedGraph
from peerlora.errors import TopologyError
from peerlora.plugins import TOPOLOGIES
from peerlora.randomness import derive, numpy_generator
from peerlora.topology.equitopo import equidyn, equistatic
from peerlora.topology.finite_time import base_graph, hypercube, one_peer
from peerlora.topology.graphs import (
    GRAPHS,
    build_graph,
    check_out_degree,
    edge_draw,
    is_connected,
    keep_degrees,
    out_draw,
    pair_draw,
    plugin_graph,
)
from peerlora.topology.matcha import matcha
from peerlora.topology.properties import Properties
from peerlora.topology.spectrum import chain_gram, largest_off_mean, mean_gram, smallest_eigenvalue
from peerlora.topology.storage import (
    Adjacency,
    Matrix,
    column_counts,
    columns_of,
    dense_rows,
    entries_like,
    is_large,
    is_symmetric,
    linked_pairs,
    row_counts,
    stored,
)
from peerlora.topology.weight_sequence import WeightSequence
from peerlora.topology.weights import (
    lazy,
    long_run_rho,
    mean_over_permutations,
    metropolis_target,
    pairwise_weights,
    remove_links,
    rho,
    rho_of_eigenvalue,
    static_rho,
    weights,
)


@dataclass(frozen=True, eq=False)
class RoundGraph:
    """The links that are really up in one round, and W [client, client] with rows = receivers.

    ``adjacency[i, j]`` says that i hears from j; W_ij is then the weight of j's message.  Both are sparse where clients
    are many.  Static topologies hand out the same object every round: read it, never write into it.
    """

    adjacency: Adjacency
    W: Matrix

    @property
    def clients(self) -> int:
        """Of the run."""
        return self.adjacency.shape[0]

    @cached_property
    def degrees(self) -> Int[np.ndarray, " client"]:
        """The number of those whom a client hears from."""
        return row_counts(self.adjacency)

    @cached_property
    def out_degrees(self) -> Int[np.ndarray, " client"]:
        """The number of those whom a client sends to; the same where links go both ways."""
        return column_counts(self.adjacency)

    @cached_property
    def edges(self) -> list[tuple[int, int]]:
        """The links (i, j) with i < j; where any goes one way only, all of them as (sender, receiver)."""
        if is_symmetric(self.adjacency):
            return linked_pairs(self.adjacency, upper=True)
        return [(j, i) for i, j in linked_pairs(self.adjacency, upper=False)]

    def neighbours(self, client: int) -> list[int]:
        """Those whom ``client`` hears from this round, in order."""
        return columns_of(self.adjacency, client)

    def receivers(self, client: int) -> list[int]:
        """Those whom ``client`` sends to this round, in order."""
        return columns_of(self._heard_by, client)

    def weights(
        self, receivers: Sequence[int], senders: Sequence[int] | None = None
    ) -> Float[np.ndarray, "receiver sender"]:
        """Some rows of W, and of these some columns (all by default), as a dense array."""
        rows = dense_rows(self.W, receivers)
        return rows if senders is None else rows[:, list(senders)]

    @cached_property
    def _heard_by(self) -> Adjacency:
        turned = self.adjacency.T
        return turned if isinstance(turned, np.ndarray) else turned.tocsr()


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
        matrices = (graph.W for graph in ([self._static] if self.period == 1 else self.sample(rounds)))
        if self.config.kind == "random":
            # No client is special in a graph drawn anew every round, so neither is one in the true moment;
            # imposing that removes the upward bias that the largest eigenvalue of a noisy matrix has.
            return self._rho_of_drawn(list(matrices))
        if is_large(self.clients):
            kept = list(matrices)
            alone = kept[0].T @ kept[0] if len(kept) == 1 else None
            largest = largest_off_mean(mean_gram(kept, [1] * len(kept)), self.clients, alone)
            return rho_of_eigenvalue(largest, self.clients, alone is not None and is_connected(alone != 0))
        moment = np.zeros((self.clients, self.clients))
        for W in matrices:
            moment += W.T @ W / rounds
        return rho(moment)

    def _rho_of_drawn(self, matrices: list[Matrix]) -> float:
        """rho of a moment that is the same for all clients, from the traces and sums of ``W^T W``."""
        trace = np.mean([(W * W).sum() for W in matrices])
        total = np.mean([np.square(W.sum(axis=1)).sum() for W in matrices])
        largest = mean_over_permutations(float(trace), float(total), self.clients)
        return rho_of_eigenvalue(largest, self.clients)

    @property
    def smallest_eigenvalue(self) -> float:
        """Of the W of round 0, which is symmetric."""
        return smallest_eigenvalue(self.at(0).W)

    @property
    def averages_all(self) -> bool:
        """Whether every round gives everybody the average of all, as a server would."""
        return self.properties.static and self.rho() < 1e-12

    def left_after_period(self) -> float | None:
        """``|| W_period ... W_1 - J ||_2``: what one period leaves of the disagreement; None without a period."""
        if self.period is None or not self.properties.doubly_stochastic:
            return None
        matrices = [self.at(t).W for t in range(self.period)]
        if is_large(self.clients):
            return rho_of_eigenvalue(largest_off_mean(chain_gram(matrices), self.clients), self.clients)
        product = np.eye(self.clients)
        for W in matrices:
            product = W @ product
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
        if self.config.weights == "pairwise":
            full = self._planned_links(seed, t)
            up = full > self._missing(full, seed, t, gone)
            W = self._lazy(pairwise_weights(up, numpy_generator(seed, "pairwise", round=t)))
            return self._with_degrees(RoundGraph(up, W))
        full, W = self._planned(seed, t)
        missing = self._missing(full, seed, t, gone)
        sender_keeps = self.directed and self.config.weights != "row-average"
        W = remove_links(W, missing, sender_keeps or self.config.weights == "push-sum")
        return self._with_degrees(RoundGraph(full > missing, W))

    def _with_degrees(self, graph: RoundGraph) -> RoundGraph:
        """The graph without the links of clients that have fewer than ``least_degree``."""
        if not self.least_degree:
            return graph
        kept = keep_degrees(graph.adjacency, self.least_degree)
        return RoundGraph(kept, remove_links(graph.W, graph.adjacency > kept))

    def _planned(self, seed: int, t: int) -> tuple[Adjacency, Matrix]:
        """The links of a round and W before anything drops."""
        if self.plan is not None:
            W = self._lazy(self._own_weights(self.plan, seed, t))
            return _links(W), W
        if self.graph is not None:
            return self.graph, self._full_weights
        full = self._drawn(seed, t)
        return full, self._weighted(full)

    def _own_weights(self, plan: WeightSequence, seed: int, t: int) -> Matrix:
        """W of a topology that comes with its own, as it is kept for so many clients."""
        return stored(plan.W(seed, t), self.clients)

    def _up(self, seed: int, t: int) -> Adjacency:
        full = self._planned_links(seed, t)
        return full > self._missing(full, seed, t, np.zeros(self.clients, dtype=bool))

    def _planned_links(self, seed: int, t: int) -> Adjacency:
        """The links of a round before anything drops."""
        if self.plan is not None:
            return _links(self._own_weights(self.plan, seed, t))
        return self.graph if self.graph is not None else self._drawn(seed, t)

    def _drawn(self, seed: int, t: int) -> Adjacency:
        config = self.config
        if config.kind == "random":
            return edge_draw(config.p, self.clients, seed, t)
        assert config.kind == "random-out"
        return out_draw(config.degree, self.clients, seed, t)

    def _missing(self, full: Adjacency, seed: int, t: int, gone: Bool[np.ndarray, " client"]) -> Adjacency:
        """Which of the planned links are down; each way has its own luck where links may go one way."""
        i, j = full.nonzero()
        down = gone[i] | gone[j]
        if self.config.drop_links > 0:
            down |= self._dropped(i, j, numpy_generator(seed, "links", round=t))
        if self.config.drop_clients > 0:
            away = numpy_generator(seed, "participation", round=t).random(self.clients) < self.config.drop_clients
            down |= away[i] | away[j]
        return entries_like(full, i[down], j[down], True)

    def _dropped(
        self, i: Int[np.ndarray, " link"], j: Int[np.ndarray, " link"], generator: np.random.Generator
    ) -> Bool[np.ndarray, " link"]:
        """Which links have no luck: drawn for all pairs, of many clients for the links alone."""
        chance, clients = self.config.drop_links, self.clients
        if not is_large(clients):
            if self.directed:
                return (generator.random((clients, clients)) < chance)[i, j]
            return pair_draw(chance, clients, generator)[i, j]
        if self.directed:
            return generator.random(len(i)) < chance
        pairs, place = np.unique(np.minimum(i, j) * clients + np.maximum(i, j), return_inverse=True)
        return (generator.random(len(pairs)) < chance)[place]


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
    W: Any = made.W(seed, 0)
    sums = np.concatenate([W.sum(axis=0), W.sum(axis=1)]) if W.shape == (clients, clients) else np.zeros(1)
    if not np.allclose(sums, 1, rtol=0, atol=1e-9):
        raise TopologyError(f"{kind}: W of round 0 is not doubly stochastic for {clients} clients")
    return Topology(config, clients, seed, None, made)


def _links(W: Matrix) -> Adjacency:
    i, j = W.nonzero()
    return entries_like(W, i[i != j], j[i != j], True)


def _is_regular(adjacency: Adjacency) -> bool:
    """Whether all clients hear from and send to equally many."""
    degrees = np.concatenate([column_counts(adjacency), row_counts(adjacency)])
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
