"""Placement: which clients each worker holds, so that few links cross, and how many rows that leaves to send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from peerlora.topology.storage import Adjacency
from peerlora.train.tiles import tiles_of

Tile = range
Links = Adjacency


@dataclass(frozen=True)
class Placement:
    """The tiles of every worker; a worker's clients are those of its tiles, their numbers rising."""

    tiles: tuple[tuple[Tile, ...], ...]

    @property
    def blocks(self) -> list[list[int]]:
        """[worker] the clients held there."""
        return [[client for tile in own for client in tile] for own in self.tiles]

    @property
    def clients(self) -> int:
        """Of the run."""
        return sum(map(len, self.blocks))


def place(tiles: Sequence[Tile], workers: int, links: Links | None) -> Placement:
    """Divide whole tiles among at most so many workers.

    With ``links``, those that stay the same: consecutive ones of the tiles in reverse Cuthill-McKee order, which puts
    neighbours near each other; else of the tiles as they are numbered.
    """
    order = list(range(len(tiles))) if links is None else _near_each_other(tiles, links)
    parts = np.array_split(np.array(order), min(workers, len(tiles)))
    return Placement(tuple(tuple(tiles[i] for i in sorted(part.tolist())) for part in parts))


def choose_tile_size(clients: int, workers: int, most: int) -> int:
    """Choose how many clients share a graph, from half of ``most`` to ``most``, but not more than leave a worker none.

    All wait for the worker with the most clients, and whole tiles go to workers; so the size that gives that one the
    fewest, of several the largest.  Graphs are as fast per client over that range: docs/decisions/0009.
    """
    most = max(1, min(most, clients // workers))
    sizes = range(most, (most + 1) // 2 - 1, -1)
    return min(sizes, key=lambda size: max(map(len, place(tiles_of(clients, size), workers, None).blocks)))


def _near_each_other(tiles: Sequence[Tile], links: Links) -> list[int]:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    tile_of = np.repeat(np.arange(len(tiles)), [len(tile) for tile in tiles])
    receivers, senders = (links + links.T).nonzero()
    ones = np.ones(len(receivers), dtype=np.int8)
    between = csr_array((ones, (tile_of[receivers], tile_of[senders])), shape=(len(tiles), len(tiles)))
    return reverse_cuthill_mckee(between, symmetric_mode=True).tolist()


@dataclass(frozen=True)
class Transfers:
    """What one exchange moves between workers."""

    needed: Bool[np.ndarray, "worker client"]
    """Whose rows each worker needs from others."""
    gathers: bool
    """Whether every worker gets all rows, since that moves less."""
    rows: int
    """That cross between workers."""

    def describe(self) -> str:
        """Say how rows are exchanged, for the notes of a run."""
        how = "all-gather" if self.gathers else "one object per pair of workers with the rows that it needs"
        return f"rows between workers: {self.rows} of {self.needed.shape[1]} in the exchange of round 0, {how}"


def plan_transfers(links: Links, placement: Placement, nodes: int) -> Transfers:
    """Count what the workers need of each other; an object is read by all workers of a node, and sent to it once."""
    blocks = placement.blocks
    needed = np.zeros((len(blocks), placement.clients), dtype=bool)
    for worker, block in enumerate(blocks):
        needed[worker, links[block].nonzero()[1]] = True
        needed[worker, block] = False
    by_pairs, gathered = int(needed.sum()), placement.clients * max(1, nodes - 1)
    gathers = gathered < by_pairs
    return Transfers(needed, gathers, gathered if gathers else by_pairs)
