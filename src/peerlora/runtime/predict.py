"""Predictions of a served model on rows of a file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from peerlora.config.task_kinds import Target, task_kind
from peerlora.data.batches import collate
from peerlora.data.chat_tokens import answer_ends
from peerlora.data.columns import Columns, is_text
from peerlora.data.dataset import Dataset
from peerlora.data.files import read_table
from peerlora.data.image_files import image_paths, read_images
from peerlora.data.pair_tokens import read_pairs
from peerlora.data.row_names import row_name, with_files
from peerlora.data.tokens import Tokens, tokenise
from peerlora.errors import ConfigError, DataError
from peerlora.lora.attach import inputs_of
from peerlora.runtime.predict_answers import answer_prompts
from peerlora.runtime.predict_roles import (
    read_asked,
    read_words,
    render_prompts,
    tell_tags,
    tokenise_words,
    warn_of_long_prompts,
)
from peerlora.runtime.serving import Served

NEW_TOKENS = 64  # of an answer, at most, where nothing is asked for


def check_answer_length(served: Served, asked: int | None) -> int:
    """The most tokens of an answer.  Raises ConfigError where some are asked of a model that writes no answers."""
    kind = task_kind(served.reading.task)
    if asked is not None and not kind.has_language_head:
        raise ConfigError(f"--new-tokens {asked} given; a model for {kind.name} writes no answers; leave it out")
    return asked or NEW_TOKENS


def predict(served: Served, rows: str, batch: int = 64, new_tokens: int = NEW_TOKENS) -> Iterator[dict[str, Any]]:
    """Answer every row of a source, in its order.

    A class, of an image too: ``label`` and ``probabilities`` by name; several labels: ``labels``, likewise; a number:
    ``value``; words: ``tokens`` and their ``tags``; of a language model, ``answer``: its greedy continuation of at most
    ``new_tokens`` tokens.  Raises DataError where the rows cannot be read.
    """
    kind, reading = task_kind(served.reading.task), served.reading
    if kind.reads_images:
        yield from _image_classes(served, rows, batch)
        return
    if kind.target == "text":
        rows, columns = read_asked(rows, kind, reading.columns)
        prompts, _ = read_pairs(columns, np.arange(len(columns["prompt"])), rows)
        yield from answer_prompts(served, rows, _split(_tokens_of(rows, served, [prompts])), batch, new_tokens)
        return
    if kind.forms:
        rows, columns = read_asked(rows, kind, reading.columns)
        chat = kind.is_chat
        yield from (
            _chat_answers(served, rows, columns, batch, new_tokens) if chat else _tags(served, rows, columns, batch)
        )
        return
    rows, texts = _texts(rows, reading.text)
    tokens = _tokens_of(rows, served, texts)
    if kind.target == "tokens":
        prompts = [_without_end(ids, served.tokenizer.eos_token_id) for ids in _split(tokens)]
        yield from answer_prompts(served, rows, prompts, batch, new_tokens)
        return
    data = Dataset(*tokens, np.zeros(len(texts[0]), np.int64), served.labels)
    yield from _classes(served, data, batch)


def _classes(served: Served, data: Dataset, batch: int) -> Iterator[dict[str, Any]]:
    target = task_kind(served.reading.task).target
    for some in _some(served, len(data), batch):
        for row, logits in zip(some.tolist(), _logits(served, data, some), strict=True):
            yield {"row": row + 1} | _answer(logits, served.labels, target)


def _image_classes(served: Served, rows: str, batch: int) -> Iterator[dict[str, Any]]:
    """Answer images; of those with a path, that too."""
    rows, columns = read_asked(rows, task_kind(served.reading.task), served.reading.columns)
    column = columns["image"]
    reader, everything = served.tokenizer, np.arange(len(column))
    pixels = reader.read(read_images(column, everything, rows), len(column), rows)
    data = reader.dataset(pixels, np.zeros(len(column), np.int64), served.labels)
    for path, answer in zip(image_paths(column), _classes(served, data, batch), strict=True):
        yield {"row": answer.pop("row")} | ({} if path is None else {"image": path}) | answer


def _split(tokens: Tokens) -> list[np.ndarray]:
    """The token ids of every row."""
    return np.split(tokens.ids, tokens.starts[1:-1])


def _without_end(ids: np.ndarray, end: int | None) -> np.ndarray:
    """A prompt without the end of text that some tokenizers put behind every text, and which nothing continues."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == end else ids


def _tokens_of(rows: str, served: Served, texts: list[list[str]]) -> Tokens:
    """The tokens of rows; refuse rows without one, tell how many rows are cut."""
    limit = served.reading.max_length
    tokens = tokenise(texts, served.tokenizer, limit, False, None)
    lengths = np.diff(tokens.starts)
    if not lengths.all():
        empty = row_name(rows, int(lengths.argmin()))
        raise DataError(f"{rows}: {empty} has no token; remove or fill the row")
    full = np.flatnonzero(lengths == limit)
    longer = [[column[i] for i in full] for column in texts]
    cut = len(full) and int((np.diff(tokenise(longer, served.tokenizer, limit + 1, False, None).starts) > limit).sum())
    if cut:
        message = "%s: %d of %d rows have more than %d tokens and are cut there, as in training"
        logging.getLogger(__name__).warning(message, rows, cut, len(lengths), limit)
    return tokens


def _some(served: Served, number: int, size: int) -> Iterator[np.ndarray]:
    """The numbers of rows, so many at a time; one, where padding would change what the model says of a row."""
    size = size if served.padding is not None else 1
    for start in range(0, number, size):
        yield np.arange(start, min(start + size, number))


def _answer(logits: Tensor, labels: tuple[str, ...], target: Target) -> dict[str, Any]:
    if target == "number":
        return {"value": float(logits[0])}
    if target == "labels":
        shares = dict(zip(labels, torch.sigmoid(logits.double()).tolist(), strict=True))
        return {"labels": [name for name, share in shares.items() if share > 0.5], "probabilities": shares}
    shares = torch.softmax(logits.double(), 0).tolist()
    return {"label": labels[int(logits.argmax())], "probabilities": dict(zip(labels, shares, strict=True))}


@torch.no_grad()
def _logits(served: Served, data: Dataset, rows: np.ndarray) -> Tensor:
    left = served.padding == "left"
    inputs = collate(data, [rows], served.tokenizer.pad_token_id, torch.float32, left).inputs
    read = inputs_of(served.inner)
    return served.model(**{name: value for name, value in inputs.items() if name in read}).logits


def _tags(served: Served, rows: str, columns: dict[str, pa.ChunkedArray], batch: int) -> Iterator[dict[str, Any]]:
    words = read_words(rows, columns)
    data, places = tokenise_words(rows, words, served.tokenizer, served.reading.max_length)
    for some in _some(served, len(data), batch):
        predicted = _logits(served, data, some).argmax(-1).cpu().numpy()
        for row, found in zip(some.tolist(), predicted, strict=True):
            length = len(places[row])
            own = found[len(found) - length :] if served.padding == "left" else found[:length]
            yield {"row": row + 1} | tell_tags(words[row], places[row], own, served.labels)


def _chat_answers(
    served: Served, rows: str, columns: dict[str, pa.ChunkedArray], batch: int, new_tokens: int
) -> Iterator[dict[str, Any]]:
    prompts, tokenizer, limit = (
        render_prompts(rows, columns, served.tokenizer),
        served.tokenizer,
        served.reading.max_length,
    )
    tokens = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    warn_of_long_prompts([len(ids) for ids in tokens], limit, rows)
    kept = [np.array(ids[-limit:]) for ids in tokens]  # an answer begins at the prompt's end
    yield from answer_prompts(served, rows, kept, batch, new_tokens, answer_ends(tokenizer))


def _texts(rows: str, names: tuple[str, ...]) -> tuple[str, list[list[str]]]:
    """What messages call a source, and its columns of texts."""
    table = read_table(rows, columns=Columns(names))
    rows, found = with_files(rows, table), []
    for name in names:
        column = table.column(name)
        if not is_text(column.type):
            raise DataError(f"{rows}: column {name} holds {column.type}; expected text")
        if column.null_count:
            first = row_name(rows, int(column.is_null().to_numpy().argmax()))
            raise DataError(f"{rows}: column {name} is missing in {first}; remove or fill the row")
        plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        found.append(plain.to_pylist())
    return rows, found
