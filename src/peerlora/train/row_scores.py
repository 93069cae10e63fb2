"""Out-of-distribution scores of a client's own rows under its model, without a gradient, and weights from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.data.batches import Batch, Shards
from peerlora.train.tasks import Task

Measure = Callable[[Tensor, Batch], Tensor]
"""Logits and batch -> one number [client*row], larger for rows that look more out of distribution."""


def energy(logits: Float[Tensor, "row label"], temperature: float = 1.0) -> Float[Tensor, " row"]:
    """``-T logsumexp(z / T)``.

    Source: Liu et al. 2020, arXiv 2010.03759 (recalled).
    """
    return -temperature * torch.logsumexp(logits / temperature, 1)


def measure(score: str, task: Task, temperature: float = 1.0) -> Measure:
    """``energy``, ``max-softmax`` (1 - largest share), ``entropy`` of class logits, or ``nll``: the row's own loss."""
    if score == "energy":
        return lambda logits, batch: energy(logits, temperature)
    if score == "max-softmax":
        return lambda logits, batch: 1 - logits.softmax(1).amax(1)
    if score == "entropy":
        return lambda logits, batch: torch.special.entr(logits.softmax(1)).sum(1)
    assert score == "nll"
    return task.row_losses


def score_shards(
    shards: Shards,
    rows_per_batch: int,
    tokens: int,
    forward: Callable[[list[int], list[np.ndarray]], Tensor],
    tiles: Sequence[Sequence[int]] | None = None,
) -> Float[Tensor, "client row"]:
    """Scores by ``forward`` of every row of every client's shard, by its place there; NaN where a shard has ended.

    ``forward``: clients and rows of each -> [client, row], filled up for clients with fewer rows.  ``tiles``: clients
    that may be computed together, all by default.
    """
    lengths = shards.data.lengths
    orders = [np.argsort(lengths[own], kind="stable") for own in shards.shards]
    longest = max(len(order) for order in orders)
    found = torch.full((len(orders), longest), float("nan"), dtype=torch.float64)
    for start, tile in product(range(0, longest, rows_per_batch), tiles or [range(len(orders))]):
        places = {i: orders[i][start : start + rows_per_batch] for i in tile if start < len(orders[i])}
        if not places:
            continue
        rows = {i: shards.shards[i][own] for i, own in places.items()}
        widest = max(len(own) * int(lengths[own].max()) for own in rows.values())
        for clients in _parts(list(places), max(1, tokens // widest)):
            values = forward(clients, [rows[i] for i in clients])
            for i, own in zip(clients, values, strict=True):
                found[i, places[i]] = own[: len(places[i])].double().cpu()
    return found


def _parts(clients: Sequence[int], size: int) -> list[list[int]]:
    return [list(clients[start : start + size]) for start in range(0, len(clients), size)]


def ranks(scores: Float[Tensor, "client row"]) -> Float[Tensor, "client row"]:
    """Each row's rank among its client's, between 0 and 1; equal scores share the middle of their ranks."""
    order = scores.nan_to_num(float("inf")).contiguous()
    ascending = order.sort(1).values
    below = torch.searchsorted(ascending, order, side="left")
    upto = torch.searchsorted(ascending, order, side="right")
    rows = (~scores.isnan()).sum(1, keepdim=True)
    return torch.where(scores.isnan(), scores, (below + upto) / (2 * rows))


def row_weights(
    scores: Float[Tensor, "client row"], alpha: float, q: float, tau: float, hard: bool
) -> Float[Tensor, "client row"]:
    """``v = 1 + alpha sigmoid((r - q) / tau)`` with the rank r of a row's score; hard: ``1 + alpha`` where r > q."""
    r = ranks(scores)
    return 1 + alpha * ((r > q).to(r.dtype) if hard else torch.sigmoid((r - q) / tau))
