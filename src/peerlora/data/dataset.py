"""Tokenised rows, or the pixels of images."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from peerlora.data.pixels import Pixels

UNLEARNED = -100  # among targets, as in torch's cross-entropy and PEFT's examples: a token of which nothing is learned


@dataclass(frozen=True)
class Dataset:
    """Tokenised rows, or images, with their labels."""

    ids: np.ndarray
    """int32 [token], all rows' token ids one after another; [0] of images"""
    starts: np.ndarray
    """int64 [row + 1]; row i owns ids[starts[i]:starts[i + 1]], or, of images, the tokens of its patches"""
    types: np.ndarray | None
    """uint8 [token], the tokenizer's token types, which distinguish a pair's halves; None: it gives none"""
    labels: np.ndarray
    """int64 [row] class ids; float32 [row] for regression; float32 [row, label] for multi-label, 1 for each that a row
    has; int64 [row] that means nothing where something is learned of tokens"""
    names: tuple[str, ...]
    """Names by id, of the classes or of the tags of words; () for regression and language models"""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """[row] the column that ``partition: {kind: column}`` names, else empty"""
    targets: np.ndarray | None = None
    """int32 [token], what is learned of each token, UNLEARNED for nothing; None: what the task makes of all tokens"""
    target_starts: np.ndarray | None = None
    """int64 [row + 1]; row i owns targets[target_starts[i]:target_starts[i + 1]], which a decoder is to write; None: as
    ``starts``"""
    pixels: Pixels | None = None
    """Of images; None: rows are tokens"""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the rows' labels; () where rows have no class: several labels, or one for each token."""
        return self.names if self.targets is None and self.labels.ndim == 1 else ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [row], tokens of each row."""
        return np.diff(self.starts)

    @property
    def all_lengths(self) -> np.ndarray:
        """int64 [row], tokens of each row that a model computes, with those that a decoder is to write."""
        return self.lengths if self.target_starts is None else self.lengths + np.diff(self.target_starts)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Dataset":
        """The rows with these numbers, in this order."""
        rows = np.asarray(rows, dtype=np.int64)
        tokens, starts = _owned(self.starts, rows)
        written, target_starts = (tokens, None) if self.target_starts is None else _owned(self.target_starts, rows)
        return Dataset(
            ids=self.ids if self.pixels is not None else self.ids[tokens],
            starts=starts,
            types=None if self.types is None else self.types[tokens],
            labels=self.labels[rows],
            names=self.names,
            columns={name: values[rows] for name, values in self.columns.items()},
            targets=None if self.targets is None else self.targets[written],
            target_starts=target_starts,
            pixels=None if self.pixels is None else self.pixels.take(rows),
        )


def _owned(starts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of what these rows own, one row after another, and where each row begins among them."""
    lengths = np.diff(starts)[rows]
    own = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.repeat(starts[rows] - own[:-1], lengths) + np.arange(own[-1]), own
