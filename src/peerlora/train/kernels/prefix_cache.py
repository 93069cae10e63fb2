"""Cache of the hidden states below the lowest adapted block: they never change, so each row is computed once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from peerlora.data.batches import Origin, collate
from peerlora.data.dataset import Dataset
from peerlora.environment import main_memory

_SHARE = 4  # 1 / share of the machine's memory that one data set may take
_CHUNK = 32  # rows computed together: one alone takes a third of the time of 32


@dataclass
class _Kept:
    """The hidden states of one data set, which it holds too: an id is only unique while its owner lives."""

    data: Dataset
    chunks: list[np.ndarray]
    """Rows computed together, of similar length."""
    chunk_of: Int[np.ndarray, " row"]
    known: Bool[np.ndarray, " chunk"]
    hidden: Float[Tensor, "token width"] | None = None

    @staticmethod
    def nothing(data: Dataset, parts: Sequence[np.ndarray]) -> _Kept:
        """Divide the rows of each part, and those of none, into chunks by length."""
        of_none = np.setdiff1d(np.arange(len(data)), np.concatenate(parts)) if parts else np.arange(len(data))
        chunks = []
        for part in (*parts, of_none):
            order = part[data.lengths[part].argsort(kind="stable")]
            chunks += np.array_split(order, -(-len(order) // _CHUNK)) if len(order) else []
        chunk_of = np.empty(len(data), dtype=np.int64)
        for number, rows in enumerate(chunks):
            chunk_of[rows] = number
        return _Kept(data, chunks, chunk_of, np.zeros(len(chunks), dtype=bool))


class HiddenStates:
    """What runs on the same frozen blocks, one after another, have computed of their data sets."""

    def __init__(self):
        self.kept: dict[int, _Kept] = {}

    def keep_only(self, data: Collection[Dataset]) -> None:
        """Drop what belongs to other data sets."""
        wanted = set(map(id, data))
        for each in self.kept.keys() - wanted:
            del self.kept[each]


class PrefixCache:
    """Hidden states by row of one or more data sets.

    Rows are computed in chunks that depend on the data set and its parts alone, not on which rows were asked for
    together: a resumed run, and one that holds some of the parts, then finds the same bits.  ``shared``: where they are
    kept; by default for this run alone.  ``dtype``: of the pixels of images.
    """

    def __init__(
        self,
        compute: Callable[[dict[str, Tensor]], Float[Tensor, "token width"]],
        bytes_per_token: int,
        shared: HiddenStates | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.compute, self.bytes_per_token, self.dtype = compute, bytes_per_token, dtype
        self._kept = {} if shared is None else shared.kept

    def holds(self, data: Dataset) -> bool:
        """Whether these rows' hidden states may be kept: they take at most a quarter of the machine's memory."""
        return int(data.starts[-1]) * self.bytes_per_token <= main_memory() // _SHARE

    def __call__(self, origin: Origin) -> Float[Tensor, "token width"]:
        """The real tokens of these rows, one row after another."""
        data, numbers = origin.data, origin.numbers
        if id(data) not in self._kept:
            self._kept[id(data)] = _Kept.nothing(data, origin.parts)
        kept = self._kept[id(data)]
        for chunk in np.unique(kept.chunk_of[numbers]):
            if not kept.known[chunk]:
                self._compute(kept, chunk)
        assert kept.hidden is not None
        return kept.hidden.index_select(0, torch.from_numpy(_tokens(data, numbers)))

    @torch.no_grad()
    def _compute(self, kept: _Kept, chunk: np.integer) -> None:
        rows = kept.chunks[chunk]
        found = self.compute(collate(kept.data, [rows], 0, self.dtype).inputs)
        if kept.hidden is None:
            kept.hidden = found.new_empty(int(kept.data.starts[-1]), found.shape[1])
        kept.hidden[torch.from_numpy(_tokens(kept.data, rows))] = found
        kept.known[chunk] = True


def _tokens(data: Dataset, rows: np.ndarray) -> Int[np.ndarray, " token"]:
    """The places of these rows' tokens among those of the data set."""
    return np.concatenate([np.arange(*data.starts[row : row + 2].tolist()) for row in rows])
