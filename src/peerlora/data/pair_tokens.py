"""Texts with an answer each -> token ids to read, and token ids to write, for models with an encoder and a decoder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from peerlora.data.dataset import Dataset
from peerlora.data.row_names import row_name
from peerlora.data.tokens import CHUNK
from peerlora.errors import DataError


def read_pairs(columns: Mapping[str, pa.ChunkedArray], chosen: np.ndarray, source: str) -> tuple[list[str], list[str]]:
    """The prompts and the completions of some rows; of completions none where there is no such column.

    Raises DataError, naming the row, for what is no text, or empty.
    """
    found: dict[str, list[str]] = {"prompt": [], "completion": []}
    for role, column in columns.items():
        for number, text in zip(chosen.tolist(), column.take(pa.array(chosen)).to_pylist(), strict=True):
            where = f"{source}: {row_name(source, number)}"
            if text is not None and not isinstance(text, str):
                raise DataError(f"{where}: {role} is a {type(text).__name__}; expected text")
            if text is None or not text.strip():
                raise DataError(f"{where}: {role} is empty; expected text; fill or remove the row")
            found[role].append(text)
    return found["prompt"], found["completion"]


def pair_dataset(
    prompts: Sequence[str], completions: Sequence[str], max_length: int, tokenizer: Any, source: str
) -> Dataset:
    """Tokenise both sides as the tokenizer does for training, each cut to ``max_length`` tokens; the cut are counted.

    A completion is tokenised as a target (``text_target``), whose last token is the one that ends it.
    """
    ids, lengths = _tokenised(prompts, "text", max_length, tokenizer, f"{source}: prompts")
    targets, answer_lengths = _tokenised(completions, "text_target", max_length, tokenizer, f"{source}: completions")
    nobody = np.zeros(len(prompts), dtype=np.int64)
    return Dataset(ids, _starts(lengths), None, nobody, (), targets=targets, target_starts=_starts(answer_lengths))


def _tokenised(
    texts: Sequence[str], side: str, max_length: int, tokenizer: Any, what: str
) -> tuple[np.ndarray, list[int]]:
    """int32 [token] of all texts, and the tokens of each."""
    ids, lengths, cut = [], [], 0
    for start in range(0, len(texts), CHUNK):
        rows = tokenizer(**{side: list(texts[start : start + CHUNK])}, truncation=False, padding=False, verbose=False)
        long = [place for place, row in enumerate(rows["input_ids"]) if len(row) > max_length]
        if long:
            cut += len(long)
            rows = tokenizer(
                **{side: list(texts[start : start + CHUNK])}, truncation=True, max_length=max_length, padding=False
            )
        ids.append(np.fromiter(chain.from_iterable(rows["input_ids"]), np.int32))
        lengths += map(len, rows["input_ids"])
    if cut:
        logging.getLogger(__name__).warning(
            "%s: %d of %d have more than data.max_length=%d tokens; their ends are cut off",
            *(what, cut, len(texts), max_length),
        )
    return np.concatenate(ids), lengths


def _starts(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
