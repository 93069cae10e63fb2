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
from peerlora.data.columns import Columns, is_text
from peerlora.data.dataset import Dataset
from peerlora.data.files import read_table
from peerlora.data.tokens import tokenise
from peerlora.errors import ConfigError, DataError, ModelError, first_line
from peerlora.lora.attach import inputs_of, without_peft_warnings
from peerlora.lora.base_models import Storage, load_base, load_tokenizer, quiet
from peerlora.lora.base_weights import real_names
from peerlora.runtime.reading import Reading
from peerlora.train.online.base_policy import SETTINGS

_TASKS = {"SEQ_CLS": "classification", "CAUSAL_LM": "causal-lm"}


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
    if (Path(str(settings.get("base_model_name_or_path"))) / SETTINGS).is_file():
        raise ModelError(
            f"{folder} is the adapter of a flow policy, which acts and answers no rows; give another folder"
        )
    reading = Reading.read(folder)
    if reading is None:
        if not text:
            raise ConfigError(f"{folder} does not say which columns it reads (no peerlora.json); give --text NAME")
        reading = Reading(_kind_of(settings, adapter.is_file()), text, 512)
    reading = replace(reading, text=text or reading.text, max_length=max_length or reading.max_length)
    labels = real_names(_json(folder / "labels.json")) if (folder / "labels.json").is_file() else real_names(settings)
    source = str(settings.get("base_model_name_or_path")) if adapter.is_file() else str(folder.resolve())
    revision = settings.get("revision") if adapter.is_file() else None
    tokenizer = load_tokenizer(source, revision)
    kind = task_kind(reading.task)
    if kind.has_classes and not labels:
        labels = tuple(f"LABEL_{i}" for i in range(_outputs(folder, settings)))
    base = load_base(source, kind.name, labels, 0, tokenizer.pad_token_id, torch.float32, Storage(revision=revision))
    model = _with_adapter(base.model, folder) if adapter.is_file() else base.model
    if not adapter.is_file() and base.initialised:
        raise ModelError(f"{folder} has no weights for {', '.join(base.initialised)}; give a model of this task")
    return Served(model.eval(), tokenizer, reading, labels, base.longest)


def predict(served: Served, rows: str, batch: int = 64, new_tokens: int = 64) -> Iterator[dict[str, Any]]:
    """Answer every row of a source, in its order.

    A class: ``label`` and ``probabilities`` by name; a number: ``value``; of a language model, ``answer``: its greedy
    continuation of at most ``new_tokens`` tokens.  Raises DataError where the rows cannot be read.
    """
    kind, reading = task_kind(served.reading.task), served.reading
    texts = _texts(rows, reading.text)
    if kind.target == "tokens":
        yield from _answers(served, texts[0], batch, new_tokens)
        return
    tokens = tokenise(texts, served.tokenizer, reading.max_length, False, None)
    data = Dataset(*tokens, np.zeros(len(texts[0]), np.int64), served.labels)
    for start in range(0, len(data), batch):
        some = np.arange(start, min(start + batch, len(data)))
        for row, logits in zip(some.tolist(), _logits(served, data, some), strict=True):
            yield {"row": row + 1} | _told(logits, served.labels)


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
    if settings.get("problem_type") == "regression":
        return "regression"
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


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({first_line(error)}); give an undamaged folder") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}; expected a JSON object")
    return found
