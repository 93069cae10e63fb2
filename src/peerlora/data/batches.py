"""Seeded batches per client, put together client-major for one stacked graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from peerlora.data.dataset import UNLEARNED, Dataset
from peerlora.randomness import numpy_generator


@dataclass(frozen=True)
class Origin:
    """Where the rows of a batch come from."""

    data: Dataset
    numbers: Int[np.ndarray, " row"]
    parts: Sequence[np.ndarray] = ()
    """Rows that one holder has of the data, of each holder: what is computed of several rows at once is of one part."""


@dataclass(frozen=True)
class Batch:
    """One step's rows of several clients, client 0's first, padded to one rectangle."""

    inputs: dict[str, Tensor]
    """input_ids, attention_mask and perhaps token_type_ids, each [client*row, token]; of images pixel_values
    [client*row, channel, height, width]."""
    labels: Tensor
    """[client*row], or [client*row, label]"""
    weights: Float[Tensor, "client row"]
    """1/rows on a client's own rows, 0 on filler rows of clients with a smaller batch."""
    extents: list[tuple[int, int]]
    """Each client's own (rows, longest row in tokens)."""
    origin: Origin | None = None
    targets: Tensor | None = None
    """[client*row, token], where the data set has some; UNLEARNED on padding."""
    written: list[int] | None = None
    """Each client's longest row of targets, where a decoder writes them; their padding is on the right."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        labels, weights = (value.to(device, non_blocking=True) for value in (self.labels, self.weights))
        targets = None if self.targets is None else self.targets.to(device, non_blocking=True)
        return replace(self, inputs=inputs, labels=labels, weights=weights, targets=targets)


def collate(
    data: Dataset, rows: Sequence[np.ndarray], pad: int | None, dtype: torch.dtype, pad_left: bool = False
) -> Batch:
    """The rows of every client as one batch, padded to the longest row and the largest client.

    ``pad``: the id of padding; None for images, which need none.  Filler rows repeat the client's first row (an empty
    one would make attention undefined) and weigh nothing.
    """
    width = max(len(own) for own in rows)
    numbers = np.concatenate([np.concatenate([own, np.full(width - len(own), own[0])]) for own in rows])
    weights = torch.zeros(len(rows), width, dtype=dtype)
    for own, weight in zip(rows, weights, strict=True):
        weight[: len(own)] = 1 / len(own)
    labels = torch.from_numpy(data.labels[numbers])
    inputs, targets = _inputs_and_targets(data, numbers, pad, dtype, pad_left)
    return Batch(
        inputs=inputs,
        labels=labels.to(dtype) if labels.is_floating_point() else labels,
        weights=weights,
        extents=[(len(own), int(data.lengths[own].max())) for own in rows],
        origin=Origin(data, numbers),
        targets=targets,
        written=_written(data, rows),
    )


def _inputs_and_targets(
    data: Dataset, numbers: np.ndarray, pad: int | None, dtype: torch.dtype, pad_left: bool
) -> tuple[dict[str, Tensor], Int[Tensor, "row token"] | None]:
    """What a model reads of these rows, and what it is to say of their tokens."""
    if data.pixels is not None:
        return {"pixel_values": data.pixels.values(numbers, dtype)}, None
    assert pad is not None, "rows of tokens are padded"
    longest = int(data.lengths[numbers].max())
    inside, source = _places(data.starts, numbers, longest, pad_left)
    return _padded(data, inside, source, pad), _targets(data, numbers, longest, inside, source)


def _targets(
    data: Dataset, numbers: np.ndarray, longest: int, inside: np.ndarray, source: np.ndarray
) -> Int[Tensor, "row token"] | None:
    """Targets by the places of the tokens, or of a decoder in a rectangle of their own."""
    if data.targets is not None and data.target_starts is not None:
        most = int(np.diff(data.target_starts)[numbers].max())
        width = most + (most == longest)  # by their widths, layers tell activations of the decoder from others
        inside, source = _places(data.target_starts, numbers, width, False)
    return None if data.targets is None else _laid_out(data.targets, inside, source, UNLEARNED)


def _written(data: Dataset, rows: Sequence[np.ndarray]) -> list[int] | None:
    if data.target_starts is None:
        return None
    lengths = np.diff(data.target_starts)
    return [int(lengths[own].max()) for own in rows]


def _places(
    starts: np.ndarray, numbers: np.ndarray, longest: int, pad_left: bool
) -> tuple[Bool[np.ndarray, "row token"], Int[np.ndarray, " real"]]:
    """Which places of the rectangle hold tokens, and where these lie in the data set."""
    lengths = np.diff(starts)[numbers]
    place = np.arange(longest) - (longest - lengths[:, None] if pad_left else 0)  # [row, token]
    inside = (place >= 0) & (place < lengths[:, None])
    return inside, (starts[numbers][:, None] + place)[inside]


def _padded(data: Dataset, inside: np.ndarray, source: np.ndarray, pad: int) -> dict[str, Tensor]:
    mask = torch.from_numpy(inside.astype(np.int64))
    inputs = {"input_ids": _laid_out(data.ids, inside, source, pad), "attention_mask": mask}
    if data.types is not None:
        inputs["token_type_ids"] = _laid_out(data.types, inside, source, 0)
    return inputs


def _laid_out(values: np.ndarray, inside: np.ndarray, source: np.ndarray, filler: int) -> Int[Tensor, "row token"]:
    """Values by token as a rectangle, ``filler`` on padding."""
    found = np.full(inside.shape, filler, dtype=np.int64)
    found[inside] = values[source]
    return torch.from_numpy(found)


class Shards:
    """The rows that each client holds, and the endless shuffled stream that each draws its batches from.

    What client i sees in local step k of round t is a pure function of (seed, i, t, k): nothing has to be saved to
    take a run up again, and no client's draws depend on another's.
    """

    def __init__(
        self,
        data: Dataset,
        shards: Sequence[np.ndarray],
        batches: Sequence[int],
        clients: Sequence[int],
        seed: int,
        by_length: bool = False,
    ):
        self.data, self.shards, self.batches, self.clients, self.seed = data, shards, batches, clients, seed
        self.by_length = by_length
        self._order = lru_cache(maxsize=4 * len(clients))(self._shuffled)

    def rows(self, client: int, t: int, steps: int) -> list[np.ndarray]:
        """Row numbers of local steps 0..steps-1 of round ``t`` for the client at this place of the leading axis.

        A shard smaller than a batch goes round, freshly shuffled each time.  ``by_length`` regroups the rows of the
        round, never changes which they are.
        """
        shard, size = self.shards[client], self.batches[client]
        first = t * steps * size
        places = np.arange(first, first + steps * size)
        order = [self._order(client, epoch) for epoch in range(places[0] // len(shard), places[-1] // len(shard) + 1)]
        drawn = shard[np.concatenate(order)[places - (places[0] // len(shard)) * len(shard)]]
        if self.by_length:
            drawn = drawn[np.argsort(self.data.lengths[drawn], kind="stable")]
            turn = numpy_generator(self.seed, "order of lengths", round=t).permutation(
                steps
            )  # the same for all clients:
            return list(drawn.reshape(steps, size)[turn])  # their rows of a step share one rectangle
        return list(drawn.reshape(steps, size))

    def _shuffled(self, client: int, epoch: int) -> np.ndarray:
        generator = numpy_generator(self.seed, f"shuffle {epoch}", client=self.clients[client])
        return generator.permutation(len(self.shards[client]))


def in_order_of_length(data: Dataset, size: int) -> Iterator[np.ndarray]:
    """All rows in batches of similar length, so that evaluation pads little; yields row numbers."""
    order = np.argsort(data.lengths, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]
