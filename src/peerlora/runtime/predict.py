"""Predictions of a served model on rows of a file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from peerlora.config.task_kinds import task_kind
from peerlora.data.batches import collate
from peerlora.data.chat_tokens import answer_ends
from peerlora.data.columns import Columns, is_text
from peerlora.data.dataset import Dataset
from peerlora.data.files import read_table
from peerlora.data.image_files import image_paths, read_images
from peerlora.data.pair_tokens import read_pairs
from peerlora.data.tokens import Tokens, tokenise
from peerlora.errors import DataError
from peerlora.lora.attach import inputs_of
from peerlora.lora.base_models import quiet
from peerlora.runtime.predict_roles import (
    read_asked,
    read_words,
    render_prompts,
    tell_tags,
    tokenise_words,
    warn_of_long_prompts,
)
from peerlora.runtime.serving import Served


def predict(served: Served, rows: str, batch: int = 64, new_tokens: int = 64) -> Iterator[dict[str, Any]]:
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
        columns = read_asked(rows, kind, reading.columns)
        prompts, _ = read_pairs(columns, np.arange(len(columns["prompt"])), rows)
        _tokens_of(rows, served, [prompts])
        yield from _answers(served, prompts, batch, new_tokens)
        return
    if kind.forms:
        columns = read_asked(rows, kind, reading.columns)
        chat = kind.is_chat
        yield from (
            _chat_answers(served, rows, columns, batch, new_tokens) if chat else _tags(served, rows, columns, batch)
        )
        return
    texts = _texts(rows, reading.text)
    tokens = _tokens_of(rows, served, texts)
    if kind.target == "tokens":
        yield from _answers(served, texts[0], batch, new_tokens)
        return
    data = Dataset(*tokens, np.zeros(len(texts[0]), np.int64), served.labels)
    yield from _classes(served, data, batch)


def _classes(served: Served, data: Dataset, batch: int) -> Iterator[dict[str, Any]]:
    several = task_kind(served.reading.task).target == "labels"
    for some in _some(len(data), batch):
        for row, logits in zip(some.tolist(), _logits(served, data, some), strict=True):
            yield {"row": row + 1} | _told(logits, served.labels, several)


def _image_classes(served: Served, rows: str, batch: int) -> Iterator[dict[str, Any]]:
    """Answer images; of those with a path, that too."""
    column = read_asked(rows, task_kind(served.reading.task), served.reading.columns)["image"]
    reader, everything = served.tokenizer, np.arange(len(column))
    pixels = reader.read(read_images(column, everything, rows), len(column), rows)
    data = reader.dataset(pixels, np.zeros(len(column), np.int64), served.labels)
    for path, told in zip(image_paths(column), _classes(served, data, batch), strict=True):
        yield {"row": told.pop("row")} | ({} if path is None else {"image": path}) | told


def _tokens_of(rows: str, served: Served, texts: list[list[str]]) -> Tokens:
    """The tokens of rows; refuse rows without one, tell how many rows are cut."""
    limit = served.reading.max_length
    tokens = tokenise(texts, served.tokenizer, limit, False, None)
    lengths = np.diff(tokens.starts)
    if not lengths.all():
        raise DataError(f"{rows}: row {int(np.flatnonzero(lengths == 0)[0]) + 1} has no token; remove or fill the row")
    full = np.flatnonzero(lengths == limit)
    longer = [[column[i] for i in full] for column in texts]
    cut = len(full) and int((np.diff(tokenise(longer, served.tokenizer, limit + 1, False, None).starts) > limit).sum())
    if cut:
        told = "%s: %d of %d rows have more than %d tokens and are cut there, as in training"
        logging.getLogger(__name__).warning(told, rows, cut, len(lengths), limit)
    return tokens


def _some(number: int, size: int) -> Iterator[np.ndarray]:
    """The numbers of rows, so many at a time."""
    for start in range(0, number, size):
        yield np.arange(start, min(start + size, number))


def _told(logits: Tensor, labels: tuple[str, ...], several: bool) -> dict[str, Any]:
    if not labels:
        return {"value": float(logits[0])}
    if several:
        shares = dict(zip(labels, torch.sigmoid(logits.double()).tolist(), strict=True))
        return {"labels": [name for name, share in shares.items() if share > 0.5], "probabilities": shares}
    shares = torch.softmax(logits.double(), 0).tolist()
    return {"label": labels[int(logits.argmax())], "probabilities": dict(zip(labels, shares, strict=True))}


@torch.no_grad()
def _logits(served: Served, data: Dataset, rows: np.ndarray) -> Tensor:
    read = inputs_of(getattr(served.model, "get_base_model", lambda: served.model)())
    inputs = collate(data, [rows], served.tokenizer.pad_token_id, torch.float32).inputs
    return served.model(**{name: value for name, value in inputs.items() if name in read}).logits


def _tags(served: Served, rows: str, columns: dict[str, pa.ChunkedArray], batch: int) -> Iterator[dict[str, Any]]:
    words = read_words(rows, columns)
    data, places = tokenise_words(rows, words, served.tokenizer, served.reading.max_length)
    for some in _some(len(data), batch):
        predicted = _logits(served, data, some).argmax(-1).cpu().numpy()
        for row, found in zip(some.tolist(), predicted, strict=True):
            yield {"row": row + 1} | tell_tags(words[row], places[row], found[: len(places[row])], served.labels)


def _chat_answers(
    served: Served, rows: str, columns: dict[str, pa.ChunkedArray], batch: int, new_tokens: int
) -> Iterator[dict[str, Any]]:
    prompts, tokenizer = render_prompts(rows, columns, served.tokenizer), served.tokenizer
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]]
    warn_of_long_prompts(lengths, served.reading.max_length, rows)
    tokenizer.truncation_side = "left"  # an answer begins at the prompt's end
    yield from _answers(served, prompts, batch, new_tokens, answer_ends(tokenizer))


@torch.no_grad()
def _answers(
    served: Served, texts: list[str], batch: int, new_tokens: int, ends: list[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Greedy continuations; ``ends``: of chats, whose texts hold all special tokens, those that end an answer."""
    tokenizer, more = served.tokenizer, {} if ends is None else {"eos_token_id": ends}
    tokenizer.padding_side = "left"
    for start in range(0, len(texts), batch):
        given = tokenizer(
            texts[start : start + batch],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=served.reading.max_length,
            return_token_type_ids=False,
            add_special_tokens=ends is None,
        )
        width = given["input_ids"].shape[1]
        writes = bool(served.model.config.is_encoder_decoder)  # whose answers stand alone, behind a first token
        width = 1 if writes else width
        room = new_tokens if served.longest is None else min(new_tokens, served.longest - width)
        if room < 1:
            raise DataError(
                f"rows of {width} tokens leave no room for an answer, the model reads {served.longest} in all; lower "
                "--max-length"
            )
        with quiet():
            found = served.model.generate(
                **given,
                max_new_tokens=room,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                **more,
            )
        answers = tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
        for row, answer in enumerate(answers, start=start + 1):
            yield {"row": row, "answer": answer if ends is None else answer.strip()}


def _texts(rows: str, names: tuple[str, ...]) -> list[list[str]]:
    table = read_table(rows, columns=Columns(names))
    found = []
    for name in names:
        column = table.column(name)
        if not is_text(column.type):
            raise DataError(f"{rows}: column {name} holds {column.type}; expected text")
        if column.null_count:
            first = int(column.is_null().to_numpy().argmax()) + 1
            raise DataError(f"{rows}: column {name} is missing in row {first}; remove or fill the row")
        plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        found.append(plain.to_pylist())
    return found
