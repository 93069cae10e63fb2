"""Rows that are set aside for evaluation: of all training rows, or of every client's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int

from peerlora.data.dataset import Dataset
from peerlora.data.partition import Partition, count_labels
from peerlora.randomness import numpy_generator


def draw_holdout(
    classes: Int[np.ndarray, " row"], share: float, generator: np.random.Generator
) -> Int[np.ndarray, " held"]:
    """Draw ``share`` of every class, at least one row in all; ascending places.

    No class loses its last row, so none are drawn where every class has one.
    """
    members = [generator.permutation(np.flatnonzero(classes == label)) for label in np.unique(classes)]
    sizes = [min(round(share * len(own)), len(own) - 1) for own in members]
    if not any(sizes):
        largest = max(range(len(members)), key=lambda label: len(members[label]))
        sizes[largest] = min(1, len(members[largest]) - 1)
    return np.sort(np.concatenate([own[:size] for own, size in zip(members, sizes, strict=True)]))


def set_aside_own(
    divided: Partition, train: Dataset, share: float, seed: int, clients: Sequence[int]
) -> tuple[Partition, tuple[np.ndarray, ...]]:
    """Take ``share`` of every class out of each client's shard; return what is left to train on, and the rows held out.

    ``clients``: the numbers of the shards' owners, by which they draw.  A client with one row of each of its classes
    keeps all; a warning names it.
    """
    held, kept = [], []
    for client, shard in zip(clients, divided.shards, strict=True):
        classes = train.labels[shard] if train.classes else np.zeros(len(shard), dtype=np.int64)
        places = draw_holdout(classes, share, numpy_generator(seed, "own holdout", client=client))
        held.append(shard[places])
        kept.append(np.delete(shard, places))
    without = [str(client) for client, rows in zip(clients, held, strict=True) if not len(rows)]
    warning = (f"too few rows to set any aside (eval.own), so no personalised score: clients {', '.join(without)}",)
    left = replace(
        divided,
        shards=tuple(kept),
        counts=np.stack([count_labels(train, rows) for rows in kept]),
        warnings=divided.warnings + (warning if without else ()),
    )
    return left, tuple(held)
