"""Predictions of a served model, a whole one or an adapter folder, on rows of a file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from peerlora.config.task_kinds import KINDS, TaskKind, task_kind
from peerlora.data.batches import collate
from peerlora.data.columns import Columns, is_text
from peerlora.data.dataset import Dataset
from peerlora.data.files import read_table
from peerlora.data.tokens import tokenise
from peerlora.errors import ConfigError, DataError, ModelError, first_line
from peerlora.lora.attach import inputs_of, without_peft_warnings
from peerlora.lora.base_models import Storage, load_base, load_tokenizer, quiet
from peerlora.lora.base_weights import real_names
from peerlora.lora.model_folder import ADAPTER, WHOLE, adapter_weights, base_name, is_adapter, read_settings
from peerlora.runtime.reading import FILE as READING
from peerlora.runtime.reading import Reading

_MOST_TOKENS = 512  # of a row, where a folder says nothing
_OLD_ENDINGS = {"causal-lm": ("LMHeadModel",)}  # of class names in config.json that are older than the library's rule


@dataclass(frozen=True)
class Served:
    """A model with all that is needed to answer rows."""

    model: Any
    tokenizer: Any
    reading: Reading
    labels: tuple[str, ...]
    """Class names by id; () for other tasks."""
    longest: int | None
    """The most tokens that the model can read."""


def load_served(folder: Path, text: tuple[str, ...] = (), max_length: int | None = None) -> Served:
    """Load a folder that `peerlora merge`, `export` or a run wrote, or one of PEFT or transformers.

    ``text`` and ``max_length`` replace what ``peerlora.json`` says; the former is needed where it is missing.
    Raises ModelError where the folder holds no model, ConfigError where columns of text are unknown, or more tokens
    are asked for than the model reads.
    """
    adapter = is_adapter(folder)
    settings = read_settings(folder / (ADAPTER if adapter else WHOLE))
    reading = Reading.read(folder)
    if reading is None:
        if not text:
            raise ConfigError(f"{folder} does not say which columns it reads (no peerlora.json); give --text NAME")
        reading = Reading(_kind_of(folder, settings, adapter).name, text, _MOST_TOKENS)
    kind = _known_kind(folder, reading)
    named = folder / "labels.json"
    labels = real_names(read_settings(named) if named.is_file() else settings)
    if kind.has_classes and not labels:
        labels = tuple(f"LABEL_{i}" for i in range(_outputs(folder, settings)))
    source, revision = _source(folder, settings) if adapter else (str(folder.resolve()), None)
    tokenizer = load_tokenizer(source, revision)
    base = load_base(source, kind.name, labels, 0, tokenizer.pad_token_id, torch.float32, Storage(revision=revision))
    if not adapter and base.initialised:
        raise ModelError(f"{folder} has no weights for {', '.join(base.initialised)}; give a model of this task")
    model = _with_adapter(base.model, folder) if adapter else base.model
    limit = _limit(folder, max_length, reading, base.longest)
    reading = replace(reading, text=text or reading.text, max_length=limit)
    return Served(model.eval(), tokenizer, reading, labels, base.longest)


def _known_kind(folder: Path, reading: Reading) -> TaskKind:
    try:
        return task_kind(reading.task)
    except ValueError as error:
        raise ModelError(f"{folder / READING}: task {error}; use the version of peerlora that wrote it") from None


def _source(folder: Path, settings: dict[str, Any]) -> tuple[str, str | None]:
    """The base model of an adapter folder, and its revision."""
    named, revision = base_name(settings), settings.get("revision")
    if named is None:
        raise ModelError(f"{folder / ADAPTER} does not name a base model; write it as base_model_name_or_path")
    return named, str(revision) if revision else None


def _limit(folder: Path, asked: int | None, reading: Reading, longest: int | None) -> int:
    """The most tokens of a row; without a wish, no more than the model reads."""
    if asked is not None and longest is not None and asked > longest:
        raise ConfigError(f"--max-length {asked} given; the model of {folder} reads at most {longest} tokens; lower it")
    return asked or min(reading.max_length, longest or reading.max_length)


def predict(served: Served, rows: str, batch: int = 64, new_tokens: int = 64) -> Iterator[dict[str, Any]]:
    """Answer every row of a source, in its order.

    A class: ``label`` and ``probabilities`` by name; a number: ``value``; of a language model, ``answer``: its greedy
    continuation of at most ``new_tokens`` tokens.  Raises DataError where the rows cannot be read.
    """
    kind, reading = task_kind(served.reading.task), served.reading
    texts = _texts(rows, reading.text)
    if kind.target == "tokens":
        lengths = np.diff(tokenise(texts, served.tokenizer, reading.max_length, False, None).starts)
        _check_lengths(rows, served, texts, lengths)
        yield from _answers(served, texts[0], batch, new_tokens)
        return
    tokens = tokenise(texts, served.tokenizer, reading.max_length, False, None)
    _check_lengths(rows, served, texts, np.diff(tokens.starts))
    data = Dataset(*tokens, np.zeros(len(texts[0]), np.int64), served.labels)
    for start in range(0, len(data), batch):
        some = np.arange(start, min(start + batch, len(data)))
        for row, logits in zip(some.tolist(), _logits(served, data, some), strict=True):
            yield {"row": row + 1} | _told(logits, served.labels)


def _check_lengths(rows: str, served: Served, texts: list[list[str]], lengths: np.ndarray) -> None:
    """Refuse rows without a token; tell how many are cut."""
    limit = served.reading.max_length
    if not lengths.all():
        raise DataError(f"{rows}: row {int(np.flatnonzero(lengths == 0)[0]) + 1} has no token; remove or fill the row")
    full = np.flatnonzero(lengths == limit)
    if not len(full):
        return
    longer = tokenise([[column[i] for i in full] for column in texts], served.tokenizer, limit + 1, False, None)
    cut = int((np.diff(longer.starts) > limit).sum())
    if cut:
        told = "%s: %d of %d rows have more than %d tokens and are cut there, as in training"
        logging.getLogger(__name__).warning(told, rows, cut, len(lengths), limit)


def _told(logits: Tensor, labels: tuple[str, ...]) -> dict[str, Any]:
    if not labels:
        return {"value": float(logits[0])}
    shares = torch.softmax(logits.double(), 0).tolist()
    return {"label": labels[int(logits.argmax())], "probabilities": dict(zip(labels, shares, strict=True))}


@torch.no_grad()
def _logits(served: Served, data: Dataset, rows: np.ndarray) -> Tensor:
    read = inputs_of(getattr(served.model, "get_base_model", lambda: served.model)())
    inputs = collate(data, [rows], served.tokenizer.pad_token_id, torch.float32).inputs
    return served.model(**{name: value for name, value in inputs.items() if name in read}).logits


@torch.no_grad()
def _answers(served: Served, texts: list[str], batch: int, new_tokens: int) -> Iterator[dict[str, Any]]:
    tokenizer = served.tokenizer
    tokenizer.padding_side = "left"
    for start in range(0, len(texts), batch):
        given = tokenizer(
            texts[start : start + batch],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=served.reading.max_length,
            return_token_type_ids=False,
        )
        width = given["input_ids"].shape[1]
        room = new_tokens if served.longest is None else min(new_tokens, served.longest - width)
        if room < 1:
            raise DataError(
                f"rows of {width} tokens leave no room for an answer, the model reads {served.longest} in all; lower "
                "--max-length"
            )
        with quiet():
            found = served.model.generate(
                **given, max_new_tokens=room, do_sample=False, use_cache=True, pad_token_id=tokenizer.pad_token_id
            )
        answers = tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
        for row, answer in enumerate(answers, start=start + 1):
            yield {"row": row, "answer": answer}


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


def _with_adapter(base: Any, folder: Path) -> Any:
    from peft import PeftModel

    adapter_weights(folder, str(folder))
    try:
        with quiet(), without_peft_warnings():
            return PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)
    except Exception as error:  # files from strangers bring out errors of every class
        raise ModelError(
            f"{folder} cannot be put on its base model ({first_line(error)}); give another folder"
        ) from None


def _kind_of(folder: Path, settings: dict[str, Any], adapter: bool) -> TaskKind:
    """The task of a folder without ``peerlora.json``, by what PEFT or transformers write.  Raises ModelError."""
    number = settings.get("problem_type") == "regression"
    kinds = [kind for kind in KINDS.values() if (kind.target == "number") == number]
    if adapter:
        told = f"task_type={settings.get('task_type')!r}"
        found = [kind for kind in kinds if kind.peft_type == settings.get("task_type")]
    else:
        classes = [str(name) for name in settings.get("architectures") or ()]
        told = f"architectures={classes}"
        found = [kind for kind in kinds if any(name.endswith(_endings(kind)) for name in classes)]
    if not found:
        raise ModelError(
            f"{folder} has {told}; rows can be answered by {', '.join(kind.peft_type for kind in KINDS.values())}"
        )
    return found[0]


def _endings(kind: TaskKind) -> tuple[str, ...]:
    """How the classes of models for a task are named."""
    return kind.auto_model.removeprefix("AutoModel"), *_OLD_ENDINGS.get(kind.name, ())


def _outputs(folder: Path, settings: dict[str, Any]) -> int:
    """The classes of a model without names: by its config.json, or by the head that an adapter holds."""
    names = settings.get("id2label")
    if isinstance(names, dict) and names:
        return len(names)
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES
    from safetensors import SafetensorError, safe_open

    path = adapter_weights(folder, str(folder))
    try:
        with safe_open(path, framework="pt") as file:
            tensors = [name for name in sorted(file.keys()) if ".lora_" not in name and name.endswith(".weight")]
            heads = [name for name in tensors if set(name.split(".")) & set(SEQ_CLS_HEAD_NAMES)]
            return file.get_slice(heads[-1]).get_shape()[0] if heads else 2
    except SafetensorError as error:
        raise ModelError(f"{path} cannot be read ({first_line(error)}); give an undamaged folder") from None
