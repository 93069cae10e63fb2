"""Predictions of a served model, a whole one or an adapter folder, on rows of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
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
from peerlora.data.pair_tokens import read_pairs
from peerlora.data.tokens import tokenise
from peerlora.errors import ConfigError, DataError, ModelError, first_line
from peerlora.lora.attach import inputs_of, without_peft_warnings
from peerlora.lora.base_models import Storage, load_base, load_tokenizer, quiet
from peerlora.lora.base_weights import real_names
from peerlora.runtime.predict_roles import (
    read_asked,
    read_words,
    render_prompts,
    tell_tags,
    tokenise_words,
    warn_of_long_prompts,
)
from peerlora.runtime.reading import Reading

_TASKS = {"SEQ_CLS": "classification", "TOKEN_CLS": "token-classification", "CAUSAL_LM": "causal-lm"}
_TASKS |= {"SEQ_2_SEQ_LM": "sequence-to-sequence"}
_PROBLEMS = {"regression": "regression", "multi_label_classification": "multi-label"}
_TEMPLATE = "chat_template.jinja"  # as transformers writes it; that of the run, which its base may lack
_ASKED_IN = {"chat": "prompt", "sequence-to-sequence": "prompt", "token-classification": "tokens"}
"""Task whose columns have roles -> the role of a column that is named alone."""


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

    ``text`` and ``max_length`` replace what ``peerlora.json`` says, and are needed where it is missing.
    Raises ModelError where the folder holds no model, ConfigError where columns of text are unknown.
    """
    adapter, whole = folder / "adapter_config.json", folder / "config.json"
    if not adapter.is_file() and not whole.is_file():
        raise ModelError(
            f"{folder} holds neither config.json nor adapter_config.json; give a folder of `peerlora merge` or "
            "`peerlora export`, or one of a run's adapters/"
        )
    settings = _json(adapter if adapter.is_file() else whole)
    reading = Reading.read(folder)
    if reading is None:
        if not text:
            raise ConfigError(f"{folder} does not say which columns it reads (no peerlora.json); give --text NAME")
        reading = Reading(_kind_of(settings, adapter.is_file()), text, 512)
    reading = replace(reading, text=text or reading.text, max_length=max_length or reading.max_length)
    if text and (role := _ASKED_IN.get(reading.task)):
        reading = replace(reading, columns={role: text[0]})
    labels = real_names(_json(folder / "labels.json")) if (folder / "labels.json").is_file() else real_names(settings)
    source = str(settings.get("base_model_name_or_path")) if adapter.is_file() else str(folder.resolve())
    revision = settings.get("revision") if adapter.is_file() else None
    tokenizer = load_tokenizer(source, revision)
    kind = task_kind(reading.task)
    if kind.is_chat and (folder / _TEMPLATE).is_file():
        tokenizer.chat_template = _text_of(folder / _TEMPLATE)
    if kind.has_names and not labels:
        labels = tuple(f"LABEL_{i}" for i in range(_outputs(folder, settings)))
    base = load_base(source, kind.name, labels, 0, tokenizer.pad_token_id, torch.float32, Storage(revision=revision))
    model = _with_adapter(base.model, folder) if adapter.is_file() else base.model
    if not adapter.is_file() and base.initialised:
        raise ModelError(f"{folder} has no weights for {', '.join(base.initialised)}; give a model of this task")
    return Served(model.eval(), tokenizer, reading, labels, base.longest)


def predict(served: Served, rows: str, batch: int = 64, new_tokens: int = 64) -> Iterator[dict[str, Any]]:
    """Answer every row of a source, in its order.

    A class: ``label`` and ``probabilities`` by name; several labels: ``labels``, likewise; a number: ``value``; words:
    ``tokens`` and their ``tags``; of a language model, ``answer``: its greedy continuation of at most ``new_tokens``
    tokens.  Raises DataError where the rows cannot be read.
    """
    kind, reading = task_kind(served.reading.task), served.reading
    if kind.target == "text":
        columns = read_asked(rows, kind, reading.columns)
        prompts, _ = read_pairs(columns, np.arange(len(columns["prompt"])), rows)
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
    if kind.target == "tokens":
        yield from _answers(served, texts[0], batch, new_tokens)
        return
    tokens = tokenise(texts, served.tokenizer, reading.max_length, False, None)
    data = Dataset(*tokens, np.zeros(len(texts[0]), np.int64), served.labels)
    for some in _some(len(data), batch):
        for row, logits in zip(some.tolist(), _logits(served, data, some), strict=True):
            yield {"row": row + 1} | _told(logits, served.labels, kind.target == "labels")


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


def _with_adapter(base: Any, folder: Path) -> Any:
    from peft import PeftModel

    try:
        with quiet(), without_peft_warnings():
            return PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)
    except Exception as error:  # files from strangers bring out errors of every class
        raise ModelError(
            f"{folder} cannot be put on its base model ({first_line(error)}); give another folder"
        ) from None


def _kind_of(settings: dict[str, Any], is_adapter: bool) -> str:
    """The task of a folder without ``peerlora.json``."""
    if is_adapter:
        return _TASKS.get(str(settings.get("task_type")), "classification")
    kinds = " ".join(settings.get("architectures") or [])
    if settings.get("is_encoder_decoder") and "ConditionalGeneration" in kinds:
        return "sequence-to-sequence"
    if "TokenClassification" in kinds:
        return "token-classification"
    if settings.get("problem_type") in _PROBLEMS:
        return _PROBLEMS[settings["problem_type"]]
    return "causal-lm" if "CausalLM" in kinds or "LMHead" in kinds else "classification"


def _outputs(folder: Path, settings: dict[str, Any]) -> int:
    """The classes of a model without names: by its config.json, or by the head that an adapter holds."""
    names = settings.get("id2label")
    if isinstance(names, dict) and names:
        return len(names)
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        heads = [name for name in file.keys() if ".lora_" not in name and name.endswith((".weight",))]
        shapes = [file.get_slice(name).get_shape() for name in heads]
    return shapes[-1][0] if shapes else 2


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({first_line(error)}); give an undamaged folder") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text_of(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({first_line(error)}); give an undamaged folder") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}; expected a JSON object")
    return found
