"""Cache of the hidden states below the lowest adapted block: they never change, so each row is computed once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from peerlora.data.batches import Origin, collate
from peerlora.data.dataset import Dataset
from peerlora.environment import main_memory

_SHARE = 4  # 1 / share of the machine's memory that one data set may take


class PrefixCache:
    """Hidden states by row of one or more data sets.

    Each row is computed alone, so that what is kept doesn't depend on which rows were asked for together: a resumed run
    then finds the same bits.
    """

    def __init__(self, compute: Callable[[dict[str, Tensor]], Float[Tensor, "token width"]], bytes_per_token: int):
        self.compute, self.bytes_per_token = compute, bytes_per_token
        self._kept: dict[int, tuple[Dataset, Tensor, np.ndarray]] = {}

    def holds(self, data: Dataset) -> bool:
        """Whether these rows' hidden states may be kept: they take at most a quarter of the machine's memory."""
        return len(data.ids) * self.bytes_per_token <= main_memory() // _SHARE

    def __call__(self, origin: Origin) -> Float[Tensor, "token width"]:
        """The real tokens of these rows, one row after another."""
        data, numbers = origin.data, origin.numbers
        for row in np.unique(numbers):
            if id(data) not in self._kept or not self._kept[id(data)][2][row]:
                self._compute(data, row)
        _, hidden, _ = self._kept[id(data)]
        positions = [np.arange(*data.starts[row : row + 2].tolist()) for row in numbers]
        return hidden.index_select(0, torch.from_numpy(np.concatenate(positions)))

    @torch.no_grad()
    def _compute(self, data: Dataset, row: np.integer) -> None:
        found = self.compute(collate(data, [np.array([row])], 0, torch.float32).inputs)
        if id(data) not in self._kept:  # holds the data set itself too: an id is only unique while its owner lives
            self._kept[id(data)] = data, found.new_empty(len(data.ids), found.shape[1]), np.zeros(len(data), dtype=bool)
        _, hidden, known = self._kept[id(data)]
        hidden[data.starts[row] : data.starts[row + 1]] = found
        known[row] = True
