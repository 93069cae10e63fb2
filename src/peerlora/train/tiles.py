"""Tiles: the clients that share a graph, by their numbers alone, so that a graph is the same wherever it is built.

Which clients share a graph decides the last bits of their steps.  Where ``train.block`` is set, a graph holds those of
a tile that train; without it, as many as are fast together, of those that train.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def tiles_of(clients: int, size: int) -> list[range]:
    """All clients by ``size`` consecutive ones; the last tile may be smaller."""
    return [range(start, min(start + size, clients)) for start in range(0, clients, size)]


def tiles_of_sizes(sizes: Sequence[int]) -> list[range]:
    """Tiles of these sizes, one behind the other."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def divide_by_tiles(clients: Sequence[int], tiles: Sequence[range], together: bool = True) -> Iterator[list[int]]:
    """The clients of each tile that are among these; each alone where they may not be ``together``."""
    for tile in tiles:
        here = [client for client in clients if client in tile]
        yield from ([here] if together and here else [[client] for client in here])


def evaluated_tiles(clients: int, tiles: Sequence[range], size: int) -> list[slice]:
    """Divide the models that are evaluated at once: those of the clients held here, and perhaps their average behind.

    What is behind fills the last tile up; any other number of models is divided by ``size``.
    """
    found = [slice(tile.start, tile.stop) for tile in tiles] if tiles and tiles[-1].stop <= clients else []
    last = found.pop() if found else slice(0, 0)
    ends = range(last.start + size, clients + size, size) if clients > last.start else ()
    return found + [slice(end - size, min(end, clients)) for end in ends]
