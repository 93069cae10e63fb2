"""Versions of clients' exchanged adapters, each stored once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

UNKNOWN = -1  # in place of a place in the pool


@dataclass(frozen=True)
class Entry:
    """One version of one client's exchanged adapter."""

    origin: int
    version: int
    """Rounds that were finished with the one that it is of: t + 1 for round t."""
    rank: int
    rows: int
    """Training rows of the origin."""
    values: Float[Tensor, " scalar"]
    """The exchanged columns, as in the buffer of ``Adapters.exchanged``: padded to the layout's rank."""


class EntryPool:
    """Entries by place; the same version of the same origin is stored once, however many clients hold it."""

    def __init__(self):
        self.facts: Int[np.ndarray, "place 4"] = np.zeros((0, 4), dtype=np.int64)
        """Origin, version, rank and training rows."""
        self.values: Float[Tensor, "place scalar"] | None = None
        self._places: dict[tuple[int, int], int] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._places)

    @property
    def used(self) -> list[int]:
        """The places that hold an entry, by origin and version."""
        return [self._places[key] for key in sorted(self._places)]

    @property
    def numbers(self) -> dict[int, int]:
        """Place -> its number among those in ``used``."""
        return {place: number for number, place in enumerate(self.used)}

    def versions(self, places: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """The versions of the entries at these places, 0 where there is none."""
        if not len(self.facts):
            return np.zeros_like(places)
        return np.where(places == UNKNOWN, 0, self.facts[places, 1])

    def entry(self, place: int) -> Entry:
        """The entry at a place; its values are a view."""
        assert self.values is not None
        return Entry(*self.facts[place].tolist(), values=self.values[place])

    def put(self, entries: Iterable[Entry]) -> Int[np.ndarray, " entry"]:
        """Store entries and return their places; one that is stored already stays as it is."""
        return np.array([self._put(entry) for entry in entries], dtype=np.int64)

    def keep_only(self, places: Int[np.ndarray, " each"]) -> None:
        """Drop the entries at all other places."""
        kept = set(places.tolist())
        self._places = {key: place for key, place in self._places.items() if place in kept}
        self._free = [place for place in range(len(self.facts) - 1, -1, -1) if place not in kept]

    def _put(self, entry: Entry) -> int:
        key = (entry.origin, entry.version)
        if key not in self._places:
            place = self._free_place(entry.values)
            assert self.values is not None
            self.facts[place] = entry.origin, entry.version, entry.rank, entry.rows
            self.values[place] = entry.values
            self._places[key] = place
        return self._places[key]

    def _free_place(self, like: Float[Tensor, " scalar"]) -> int:
        if self.values is None:
            self.values = like.new_zeros(0, len(like))
        if not self._free:
            size, more = len(self.facts), max(4, len(self.facts) // 2)
            self.facts = np.concatenate([self.facts, np.zeros((more, 4), dtype=np.int64)])
            self.values = torch.cat([self.values, self.values.new_zeros(more, self.values.shape[1])])
            self._free = list(range(size + more - 1, size - 1, -1))
        return self._free.pop()
