"""Graphs that stay the same for a whole run, and the draw of one that changes every round.

A graph is a boolean array [client, client] with an empty diagonal: ``adjacency[i, j]`` says that i hears from j.  It is
symmetric but for the kinds that are called directed, and sparse where clients are many (see ``storage``).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from peerlora.config.topology import DirectedGraph, Graph, TopologyConfig
from peerlora.errors import TopologyError
from peerlora.randomness import numpy_generator
from peerlora.topology.storage import Adjacency, entries_like, from_entries, is_large, is_symmetric, stored

TRIES = 200
OVERRIDE = "or set topology.allow_disconnected=true"


def build_graph(config: TopologyConfig, clients: int, seed: int) -> Adjacency:
    """The fixed graph of a run, for the kinds in ``GRAPHS``.

    Raises TopologyError where the graph does not exist, or is disconnected without ``allow_disconnected``.
    """
    assert config.kind in GRAPHS and isinstance(config, Graph | DirectedGraph), f"{config.kind} has no fixed graph"
    if clients == 1 and config.kind != "edges":
        return _empty(1)
    return _connected(config, GRAPHS[config.kind](config, clients, seed))


def plugin_graph(config: Any, made: Any, clients: int) -> Adjacency:
    """The graph that another package's function gave, checked; raises TopologyError for anything but a graph."""
    kind, directed = config.kind, isinstance(config, DirectedGraph)
    if not (directed or isinstance(config, Graph)):
        raise TopologyError(f"{kind}: a graph given; its settings must derive from Graph or DirectedGraph")
    if not (isinstance(made, np.ndarray) and made.dtype == bool and made.shape == (clients, clients)):
        shape = f"{made.dtype} {list(made.shape)}" if isinstance(made, np.ndarray) else type(made).__name__
        raise TopologyError(f"{kind}: {shape} given; expected a bool array of {clients} x {clients} clients")
    if made.diagonal().any() or not (directed or is_symmetric(made)):
        raise TopologyError(f"{kind}: links of clients with themselves, or one-way links in an undirected graph")
    return _connected(config, stored(made, clients))


def keep_degrees(adjacency: Adjacency, least: int) -> Adjacency:
    """The links that are left where every client has ``least`` neighbours or none: the graph's ``least``-core.

    Links must go both ways.
    """
    i, j = adjacency.nonzero()
    while True:
        few = np.bincount(i, minlength=adjacency.shape[0]) < least
        kept = ~(few[i] | few[j])
        if kept.all():
            return entries_like(adjacency, i, j, True)
        i, j = i[kept], j[kept]


def _connected(config: Any, adjacency: Adjacency) -> Adjacency:
    """The graph itself; raises TopologyError where it is disconnected without ``allow_disconnected``."""
    clients = adjacency.shape[0]
    if not (config.allow_disconnected or is_connected(adjacency)):
        labels = components(adjacency)
        unreachable = ", ".join(map(str, np.flatnonzero(labels != labels[0])[:5]))
        raise TopologyError(
            f"{config.kind} graph of {clients} clients is disconnected: client 0 never hears from {unreachable}; "
            f"add links, {OVERRIDE}"
        )
    return adjacency


def edge_draw(p: float, clients: int, seed: int, t: int) -> Adjacency:
    """The random graph of round ``t``: each pair is linked with probability ``p``; pure in (seed, t)."""
    return pair_draw(p, clients, numpy_generator(seed, "graph", round=t))


def out_draw(degree: int, clients: int, seed: int, t: int) -> Adjacency:
    """The directed graph of round ``t``: each client sends to ``degree`` others; pure in (seed, t)."""
    generator, senders = numpy_generator(seed, "graph", round=t), np.repeat(np.arange(clients), degree)
    if is_large(clients):
        return _arrows(clients, senders, _distinct_others(clients, degree, generator).ravel())
    draw = generator.random((clients, clients))
    np.fill_diagonal(draw, np.inf)
    return _arrows(clients, senders, np.argsort(draw, axis=1)[:, :degree].ravel())


def _distinct_others(clients: int, degree: int, generator: np.random.Generator) -> Int[np.ndarray, "client degree"]:
    """For each client so many different others, all sets alike likely; rows that name one twice are drawn again."""
    found = np.empty((clients, degree), dtype=np.int64)
    again = np.arange(clients)
    for _ in range(TRIES):
        drawn = generator.integers(0, clients - 1, (len(again), degree))
        found[again] = drawn + (drawn >= again[:, None])  # everybody but the client itself
        ordered = np.sort(found[again], axis=1)
        again = again[(ordered[:, 1:] == ordered[:, :-1]).any(axis=1)]
        if not len(again):
            return found
    raise TopologyError(
        f"random-out graph with degree {degree} and {clients} clients: no different receivers in {TRIES} draws; lower "
        "topology.degree"
    )


def check_out_degree(clients: int, degree: int) -> None:
    """Raises TopologyError where nobody has so many others to send to."""
    if degree >= clients > 1:
        raise TopologyError(
            f"random-out graph with degree {degree} and {clients} clients; a client has at most {clients - 1} others; "
            "lower topology.degree"
        )


def pair_draw(p: float, clients: int, generator: np.random.Generator) -> Adjacency:
    """Each pair of clients independently with probability ``p``."""
    if is_large(clients):
        return _linked(clients, *_drawn_pairs(p, clients, generator))
    upper = np.triu(generator.random((clients, clients)) < p, 1)
    return upper | upper.T


def _drawn_pairs(
    p: float, clients: int, generator: np.random.Generator
) -> tuple[Int[np.ndarray, " pair"], Int[np.ndarray, " pair"]]:
    """The pairs (i, j), i < j, that are linked: from one to the next it is a geometric number of pairs further."""
    pairs, last, found = clients * (clients - 1) // 2, -1, []
    while last < pairs:
        expected = int((pairs - last) * p)
        places = last + np.cumsum(generator.geometric(p, expected + 100))
        found.append(places)
        last = int(places[-1])
    places = np.concatenate(found)
    places = places[places < pairs]
    ends = np.cumsum(np.arange(clients - 1, 0, -1))  # of each i, the number of pairs up to its last one
    i = np.searchsorted(ends, places, side="right")
    return i, places - (ends[i] - (clients - 1 - i)) + i + 1


def components(adjacency: Adjacency) -> Int[np.ndarray, " client"]:
    """For every client the number of the connected part it belongs to; within one, all reach each other."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    directed = not is_symmetric(adjacency)
    return connected_components(csr_matrix(adjacency), directed=directed, connection="strong")[1]


def is_connected(adjacency: Adjacency) -> bool:
    """Whether every client can reach every other one."""
    return bool((components(adjacency) == 0).all())


def ring(clients: int) -> Adjacency:
    """Each client with the one before and the one after."""
    if clients < 3:
        raise TopologyError(
            f"ring of {clients} clients has a double edge; use at least 3 clients or topology.kind=complete"
        )
    i = np.arange(clients)
    return _linked(clients, i, (i + 1) % clients)


def torus(clients: int, rows: int | None) -> Adjacency:
    """A rows x columns grid with wrapped edges, numbered row by row; without ``rows`` as square as it gets."""
    given = f"torus of {clients} clients" + (f" in {rows} rows" if rows else "")
    rows = rows or max(side for side in range(1, math.isqrt(clients) + 1) if clients % side == 0)
    columns, rest = divmod(clients, rows)
    if rest or min(rows, columns) < 3:
        raise TopologyError(
            f"{given} does not exist; rows x columns must equal clients and both be at least 3, e.g. 12 = 3 x 4; "
            "change clients or topology.rows, or use topology.kind=ring"
        )
    i = np.arange(clients)
    row, column = divmod(i, columns)
    right = row * columns + (column + 1) % columns
    below = (row + 1) % rows * columns + column
    return _linked(clients, np.concatenate([i, i]), np.concatenate([right, below]))


def path(clients: int) -> Adjacency:
    """A ring without the link between the last client and the first."""
    i = np.arange(clients - 1)
    return _linked(clients, i, i + 1)


def star(clients: int) -> Adjacency:
    """Client 0 with everybody else."""
    return _linked(clients, np.zeros(clients - 1, dtype=int), np.arange(1, clients))


def complete(clients: int) -> Adjacency:
    """Everybody with everybody."""
    i, j = np.divmod(np.arange(clients * clients), clients)
    return _arrows(clients, i[i != j], j[i != j])


def exponential(clients: int) -> Adjacency:
    """Client i with i ± 2^k (mod clients), for all 2^k < clients."""
    return _linked(clients, *_power_shifts(clients))


def random_regular(clients: int, degree: int, seed: int, any_draw: bool = False) -> Adjacency:
    """A random graph in which everybody has ``degree`` neighbours; drawn until connected unless ``any_draw``."""
    if degree >= clients:
        raise TopologyError(
            f"random-regular graph with degree {degree} and {clients} clients; a client has at most {clients - 1} "
            "neighbours; lower topology.degree or use topology.kind=complete"
        )
    if degree * clients % 2:
        raise TopologyError(
            f"random-regular graph with degree {degree} and {clients} clients; degree x clients must be even; "
            f"use topology.degree={degree + 1 if degree + 1 < clients else degree - 1} or an even number of clients"
        )
    from networkx import random_regular_graph

    def draw(generator: np.random.Generator) -> Adjacency:
        graph = random_regular_graph(degree, clients, seed=int(generator.integers(2**32)))
        ends = np.array(graph.edges, dtype=int).reshape(-1, 2)
        return _linked(clients, ends[:, 0], ends[:, 1])

    given = f"random-regular graph with degree {degree} and {clients} clients"
    return _first_connected(draw, seed, any_draw, given, "use topology.degree=2 or more")


def erdos_renyi(clients: int, p: float, seed: int, any_draw: bool = False) -> Adjacency:
    """Each pair linked with probability ``p``, once for the run; drawn until connected unless ``any_draw``."""
    given = f"erdos-renyi graph with p={p:g} and {clients} clients"
    remedy = f"raise topology.p (about ln(N)/N = {math.log(clients) / clients:.2g} is needed)"
    return _first_connected(lambda generator: pair_draw(p, clients, generator), seed, any_draw, given, remedy)


def directed_ring(clients: int, chords: list[tuple[int, int]]) -> Adjacency:
    """Client i sends to i + 1, and along the ``chords`` [sender, receiver].

    With a chord in- and out-degrees differ; a directed ring alone is as balanced as an undirected one.
    """
    i = np.arange(clients)
    senders, receivers = _checked_ends(clients, chords, "chords")
    return _arrows(clients, np.concatenate([i, senders]), np.concatenate([(i + 1) % clients, receivers]))


def directed_exponential(clients: int) -> Adjacency:
    """Client i sends to i + 2^k (mod clients), for all 2^k < clients."""
    return _arrows(clients, *_power_shifts(clients))


def _power_shifts(clients: int) -> tuple[Int[np.ndarray, " edge"], Int[np.ndarray, " edge"]]:
    """Ends (i, i + 2^k mod clients) for all 2^k < clients."""
    i, shifts = np.arange(clients), 2 ** np.arange((clients - 1).bit_length())
    return np.tile(i, len(shifts)), ((i + shifts[:, None]) % clients).ravel()


def from_edges(clients: int, edges: list[tuple[int, int]], directed: bool = False) -> Adjacency:
    """The links written out, directed ones as (sender, receiver); naming one twice is the same as once."""
    return (_arrows if directed else _linked)(clients, *_checked_ends(clients, edges, "edges"))


def _checked_ends(
    clients: int, edges: list[tuple[int, int]], name: str
) -> tuple[Int[np.ndarray, " edge"], Int[np.ndarray, " edge"]]:
    """The ends of links that are written out; raises TopologyError for one that no graph of these clients has."""
    for i, j in edges:
        if i == j:
            raise TopologyError(f"topology.{name} links client {i} to itself; remove [{i}, {j}]")
        if max(i, j) >= clients:
            raise TopologyError(
                f"topology.{name} names client {max(i, j)} in [{i}, {j}], but {clients} clients are numbered 0 to "
                f"{clients - 1}; remove it or raise clients"
            )
    ends = np.array(edges, dtype=int).reshape(-1, 2)
    return ends[:, 0], ends[:, 1]


GRAPHS: dict[str, Callable[[Any, int, int], Adjacency]] = {
    "ring": lambda config, clients, seed: ring(clients),
    "torus": lambda config, clients, seed: torus(clients, config.rows),
    "path": lambda config, clients, seed: path(clients),
    "star": lambda config, clients, seed: star(clients),
    "complete": lambda config, clients, seed: complete(clients),
    "exponential": lambda config, clients, seed: exponential(clients),
    "random-regular": lambda config, clients, seed: random_regular(
        clients, config.degree, seed, config.allow_disconnected
    ),
    "erdos-renyi": lambda config, clients, seed: erdos_renyi(clients, config.p, seed, config.allow_disconnected),
    "edges": lambda config, clients, seed: from_edges(clients, config.edges, config.directed),
    "directed-ring": lambda config, clients, seed: directed_ring(clients, config.chords),
    "directed-exponential": lambda config, clients, seed: directed_exponential(clients),
}


def _first_connected(
    draw: Callable[[np.random.Generator], Adjacency], seed: int, any_draw: bool, given: str, remedy: str
) -> Adjacency:
    """The first connected draw, or just the first one; the same for everybody who knows the seed."""
    generator = numpy_generator(seed, "graph")
    for _ in range(TRIES):
        adjacency = draw(generator)
        if any_draw or is_connected(adjacency):
            return adjacency
    raise TopologyError(f"{given} was disconnected in {TRIES} of {TRIES} draws; {remedy}, {OVERRIDE}")


def _empty(clients: int) -> Adjacency:
    nobody = np.zeros(0, dtype=int)
    return _arrows(clients, nobody, nobody)


def _linked(clients: int, i: Int[np.ndarray, " edge"], j: Int[np.ndarray, " edge"]) -> Adjacency:
    return _arrows(clients, np.concatenate([i, j]), np.concatenate([j, i]))


def _arrows(clients: int, senders: Int[np.ndarray, " edge"], receivers: Int[np.ndarray, " edge"]) -> Adjacency:
    return from_entries(clients, receivers, senders, True)
