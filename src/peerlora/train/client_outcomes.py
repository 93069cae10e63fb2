"""What evaluations hold of every client and row, for as many clients at once as memory is meant to bear -> scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from torch import Tensor

from peerlora.data.batches import Batch, in_order_of_length
from peerlora.data.dataset import Dataset
from peerlora.train.base import Scores
from peerlora.train.metrics import NEEDS_MARGINS, Predictions, compute_metric, counts_by_name, margins_of
from peerlora.train.tasks import Task, outcomes_width
from peerlora.train.tiles import tiles_of

_HELD = 1 << 27  # numbers in float64 that an evaluation holds at once: 1 GiB
RowsOfGraph = tuple[np.ndarray, int]
"""Rows that are evaluated together, and how many clients share a graph of them."""
Forward = tuple[slice, slice, np.ndarray, Tensor, Batch]
"""Where clients stand among those that are held, and where in a graph; its rows; their logits and their batch."""


def clients_at_once(task: Task, data: Dataset, metrics: Sequence[str]) -> int:
    """Of how many clients the outcomes on all rows may be held; one client's always."""
    width = outcomes_width(task, data) + (len(data.names) if _needs_margins(metrics) else 0)
    return max(1, _HELD // (len(data) * width))


def rows_of_graphs(data: Dataset, batch: int, tokens: int, most: int) -> list[RowsOfGraph]:
    """All rows in batches, each with as many clients, at most ``most``, as make a graph of ``tokens``."""
    batches = list(in_order_of_length(data, batch))
    fitting = [tokens // (len(rows) * int(data.all_lengths[rows].max())) for rows in batches]
    return [(rows, min(max(1, size), most)) for rows, size in zip(batches, fitting, strict=True)]


def parts_of_clients(clients: int, graphs: Sequence[RowsOfGraph], most: int) -> list[range]:
    """Divide clients by as many as are held at once, at most ``most``; the largest graphs lie in one part each."""
    largest = max(size for _, size in graphs)
    return tiles_of(clients, most // largest * largest)


def graphs_of_part(part: range, size: int) -> Iterator[tuple[int, slice, slice]]:
    """The first client of each graph that has clients of a part: where these stand in the part, and in the graph.

    Graphs are those of all clients, by ``size``, since the last bits depend on which of them share one.
    """
    for start in range(part.start // size * size, part.stop, size):
        first, last = max(start, part.start), min(start + size, part.stop)
        yield start, slice(first - part.start, last - part.start), slice(first - start, last - start)


def scores_of(task: Task, data: Dataset, clients: int, forwards: Iterable[Forward], metrics: Sequence[str]) -> Scores:
    """The scores of so many clients, from forward passes until each has seen all of ``data``."""
    width, margins, target = outcomes_width(task, data), None, task.kind.target
    outcomes = np.zeros((clients, len(data), width))
    for held, own, rows, logits, batch in forwards:
        outcomes[held, rows] = by_client(task.outcomes(logits, batch), rows)[own]
        if _needs_margins(metrics):
            found = by_client(margins_of(target, logits), rows)
            margins = np.zeros((clients, len(data), found.shape[2])) if margins is None else margins
            margins[held, rows] = found[own]
    scores = np.array([task.score(own, data.labels) for own in outcomes])
    predictions = [
        Predictions(own, data.labels, loss, None if margins is None else margins[i])
        for i, (own, loss) in enumerate(zip(outcomes, scores[:, 1].tolist(), strict=True))
    ]
    more = {name: np.array([compute_metric(name, target, each) for each in predictions]) for name in metrics}
    counts = [found for each in predictions if (found := counts_by_name(target, each)) is not None]
    return Scores(scores[:, 0], scores[:, 1], len(data), more, np.stack(counts) if counts else None)


def by_client(values: Tensor, rows: np.ndarray) -> np.ndarray:
    """[client, row, number] of what a graph gives for each of its rows, client by client."""
    return values.view(-1, len(rows), values.shape[1]).cpu().numpy()


def _needs_margins(metrics: Sequence[str]) -> bool:
    return any(name in NEEDS_MARGINS for name in metrics)
