"""A served model: a whole one or an adapter folder, loaded with all that is needed to answer rows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from peerlora.config.data import LEAST_TOKENS
from peerlora.config.task_kinds import TaskKind, task_kind
from peerlora.data.dataset import Dataset
from peerlora.data.tokens import sample_tokens
from peerlora.errors import ConfigError, ModelError, first_line
from peerlora.lora.attach import without_peft_warnings
from peerlora.lora.base_models import Base, Storage, load_base, quiet
from peerlora.lora.base_weights import within
from peerlora.lora.model_folder import ADAPTER, WHOLE, adapter_weights, base_name, is_adapter, read_settings
from peerlora.lora.peft_io import PREFIX
from peerlora.runtime.folder_kind import MOST_TOKENS, base_of, kind_of_folder, output_names, tensor_names
from peerlora.runtime.readers import load_reader
from peerlora.runtime.reading import FILE as READING
from peerlora.runtime.reading import Reading
from peerlora.train.forward_facts import find_padding_side
from peerlora.train.online.base_policy import is_base_policy

_SAMPLE = 16  # tokens of the rows that a model is looked at with
_TEMPLATE = "chat_template.jinja"  # as transformers writes it; that of the run, which its base may lack
_ASKED_IN = {
    "chat": "prompt",
    "sequence-to-sequence": "prompt",
    "token-classification": "tokens",
    "image-classification": "image",
}
"""Task whose columns have roles -> the role of a column that is named alone."""


@dataclass(frozen=True)
class Served:
    """A model with all that is needed to answer rows."""

    model: Any
    tokenizer: Any
    """Of images, the ``ImageReader``."""
    reading: Reading
    labels: tuple[str, ...]
    """Class names by id; () for other tasks."""
    longest: int | None
    """The most tokens that the model can read."""
    padding: Literal["right", "left"] | None
    """The side on which padding changes nothing of what is said of a row; None: it does on both.  Not of decoders."""

    @property
    def inner(self) -> Any:
        """The model itself, without PEFT's wrapper."""
        return getattr(self.model, "get_base_model", lambda: self.model)()


def load_served(folder: Path, text: tuple[str, ...] = (), max_length: int | None = None) -> Served:
    """Load a folder that `peerlora merge`, `export` or a run wrote, or one of PEFT or transformers.

    ``text`` and ``max_length`` replace what ``peerlora.json`` says; the former is needed where it is missing.
    Raises ModelError where the folder holds no model, ConfigError where columns of text are unknown, or more tokens
    are asked for than the model reads.
    """
    adapter = is_adapter(folder)
    settings = read_settings(folder / (ADAPTER if adapter else WHOLE))
    named = base_name(settings)
    if named is not None and is_base_policy(Path(named)):
        raise ModelError(
            f"{folder} is the adapter of a flow policy, which acts and answers no rows; give another folder"
        )
    reading = _reading(folder, settings, adapter, text)
    kind = _known_kind(folder, reading)
    if max_length is not None and kind.reads_images:
        raise ConfigError(f"--max-length {max_length} given; the model of {folder} reads images; leave it out")
    source, revision = base_of(folder, settings) if adapter else (str(folder.resolve()), None)
    tokenizer = load_reader(source, kind, revision)
    if kind.is_chat and (folder / _TEMPLATE).is_file():
        tokenizer.chat_template = _text_of(folder / _TEMPLATE)
    labels = output_names(folder, settings, adapter, kind)
    base = load_base(source, kind.name, labels, 0, tokenizer.pad_token_id, torch.float32, Storage(revision=revision))
    _require_weights(folder, base, adapter)
    reading = replace(reading, max_length=_limit(folder, max_length, reading, base.longest))
    if adapter:
        model: Any = _with_adapter(base.model, folder).eval()
    else:
        model = base.model.eval()
    side = _padding_side(base, tokenizer, kind)
    return Served(model, tokenizer, reading, labels, base.longest, side)


def _require_weights(folder: Path, base: Base, adapter: bool) -> None:
    """Refuse a folder that lacks modules which its base lacks, too: they would be drawn at random."""
    missing = list(base.initialised)
    if adapter and missing:
        held = tensor_names(folder)
        names = {name: [key for key, _ in base.model.named_parameters() if within(key, [name])] for name in missing}
        missing = [name for name, own in names.items() if not all(_holds(held, key) for key in own)]
    if missing:
        raise ModelError(
            f"{folder} has no weights for {', '.join(missing)}, nor has its base model, so answers would be random; "
            "give a folder saved with them (PEFT: modules_to_save)"
            if adapter
            else f"{folder} has no weights for {', '.join(missing)}; give a model of this task"
        )


def _holds(held: Collection[str], parameter: str) -> bool:
    """Whether an adapter has this parameter of its base in full; PEFT puts that of an adapted layer one level lower."""
    module, _, kind = parameter.rpartition(".")
    return f"{PREFIX}{parameter}" in held or f"{PREFIX}{module}.base_layer.{kind}" in held


def _padding_side(base: Base, tokenizer: Any, kind: TaskKind) -> Literal["right", "left"] | None:
    """On which side rows are padded, as it is found for training; decoders are asked with their prompts."""
    if kind.predicts_tokens:
        return None
    if kind.reads_images:  # which have no padding
        return "right"
    tokens = sample_tokens(tokenizer, min(_SAMPLE, base.longest or _SAMPLE), causal=False)
    rows = Dataset(*tokens, np.zeros(len(tokens.starts) - 1, np.int64), ())
    return find_padding_side(base.model, base.source, rows, tokenizer.pad_token_id, kind)


def _reading(folder: Path, settings: dict[str, Any], adapter: bool, text: tuple[str, ...]) -> Reading:
    """How rows are to be read: as the folder says, from the columns ``text`` where these are given."""
    reading = Reading.read(folder)
    if reading is None:
        kind = kind_of_folder(folder, settings, adapter)
        if not text and not kind.reads_images:  # whose column has a usual name
            raise ConfigError(f"{folder} does not say which columns it reads (no peerlora.json); give --text NAME")
        least = 0 if kind.reads_images else 1
        _check_texts(folder, text, range(least, 2 if kind.forms else kind.texts + 1))
        reading = Reading(kind.name, text or (kind.name,), MOST_TOKENS)
    elif text:
        reads = 1 if reading.task in _ASKED_IN else len(reading.text)
        _check_texts(folder, text, range(reads, reads + 1))
    if text and (role := _ASKED_IN.get(reading.task)):
        reading = replace(reading, columns={role: text[0]})
    return replace(reading, text=text or reading.text)


def _check_texts(folder: Path, text: tuple[str, ...], possible: range) -> None:
    """Refuse more columns than a model reads, and fewer than it was trained on."""
    if len(text) not in possible:
        raise ConfigError(
            f"--text names {len(text)} columns ({', '.join(text)}); the model of {folder} reads "
            f"{' or '.join(map(str, possible))}; give as many"
        )


def _known_kind(folder: Path, reading: Reading) -> TaskKind:
    try:
        kind = task_kind(reading.task)
    except ValueError as error:
        raise ModelError(f"{folder / READING}: task {error}; use the version of peerlora that wrote it") from None
    if kind.acts:
        raise ModelError(f"{folder / READING}: task {kind.name} answers no rows; give another folder")
    return kind


def _limit(folder: Path, asked: int | None, reading: Reading, longest: int | None) -> int:
    """The most tokens of a row; without a wish, no more than the model reads."""
    if asked is not None and asked < LEAST_TOKENS:
        raise ConfigError(f"--max-length {asked} given; rows have at least {LEAST_TOKENS} tokens, as data.max_length")
    if asked is not None and longest is not None and asked > longest:
        raise ConfigError(f"--max-length {asked} given; the model of {folder} reads at most {longest} tokens; lower it")
    return asked or min(reading.max_length, longest or reading.max_length)


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


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({first_line(error)}); give an undamaged folder") from None
