"""Which rows every client trains on, and which of its own it is scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peerlora.config.run import RunConfig
from peerlora.data.holdout import set_aside_own
from peerlora.data.partition import Partition, own_rows, partition
from peerlora.runtime.resources import RunResources


@dataclass(frozen=True)
class Division:
    """The rows that each client trains on, and those of its own that it is scored on."""

    partition: Partition
    held: tuple[np.ndarray, ...] = ()
    """Rows of each client that it is scored on and does not train on; empty: none are set aside."""
    own: bool = False
    """Whether the rows are those of this site alone."""

    @property
    def trained(self) -> int:
        """The rows that clients train on."""
        return sum(map(len, self.partition.shards))


def divide_rows(
    config: RunConfig, resources: RunResources, clients: Sequence[int] | None = None, partitioner: Any = None
) -> Division:
    """Divide the training rows among clients, and set aside those on which each is scored with ``eval.own``.

    ``clients``: those held here, all by default.  ``partitioner``: as `compose.compose` takes it.
    """
    data, here = resources.train_data, list(range(config.clients) if clients is None else clients)
    own = config.partition.kind == "own" and partitioner is None
    if own:
        divided = own_rows(data, here[0])
    else:
        divided = partition(partitioner or config.partition, data, config.clients, config.seed)
    if not config.eval.own:
        return Division(divided, own=own)
    owners = here if own else range(config.clients)
    return Division(*set_aside_own(divided, data, config.data.holdout, config.seed, owners), own=own)
