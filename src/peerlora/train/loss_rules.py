"""What may stand between the logits of a training step and its losses.  Evaluation never sees it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from peerlora.data.batches import Batch
from peerlora.train.rules import Rows


class LossRule(Protocol):
    """Changes logits, or how much each row counts, for the clients of one graph."""

    def __call__(self, logits: Tensor, batch: Batch, clients: Rows) -> tuple[Tensor, Batch]:
        """The logits [client*row, ...] and the batch that the task's loss is computed from.

        ``clients``: which of the clients held here the rows belong to.
        """
        ...
