"""A served model: a whole one or an adapter folder, loaded with all that is needed to answer rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from peerlora.config.task_kinds import KINDS, TaskKind, task_kind
from peerlora.errors import ConfigError, ModelError, first_line
from peerlora.lora.attach import without_peft_warnings
from peerlora.lora.base_models import Storage, load_base, quiet
from peerlora.lora.base_weights import real_names
from peerlora.lora.model_folder import ADAPTER, WHOLE, adapter_weights, base_name, is_adapter, read_settings
from peerlora.runtime.readers import load_reader
from peerlora.runtime.reading import FILE as READING
from peerlora.runtime.reading import Reading
from peerlora.train.online.base_policy import SETTINGS

_MOST_TOKENS = 512  # of a row, where a folder says nothing
_OLD_ENDINGS = {"causal-lm": ("LMHeadModel",), "sequence-to-sequence": ("ForConditionalGeneration",)}
"""How the classes of models for a task are named beside the library's rule."""
_PROBLEMS = {"regression": "number", "multi_label_classification": "labels"}
"""transformers' problem_type -> what such a model predicts."""
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


def load_served(folder: Path, text: tuple[str, ...] = (), max_length: int | None = None) -> Served:
    """Load a folder that `peerlora merge`, `export` or a run wrote, or one of PEFT or transformers.

    ``text`` and ``max_length`` replace what ``peerlora.json`` says; the former is needed where it is missing.
    Raises ModelError where the folder holds no model, ConfigError where columns of text are unknown, or more tokens
    are asked for than the model reads.
    """
    adapter = is_adapter(folder)
    settings = read_settings(folder / (ADAPTER if adapter else WHOLE))
    named = base_name(settings)
    if named is not None and (Path(named) / SETTINGS).is_file():
        raise ModelError(
            f"{folder} is the adapter of a flow policy, which acts and answers no rows; give another folder"
        )
    reading = _reading(folder, settings, adapter, text)
    kind = _known_kind(folder, reading)
    source, revision = _source(folder, settings) if adapter else (str(folder.resolve()), None)
    tokenizer = load_reader(source, kind, revision)
    if kind.is_chat and (folder / _TEMPLATE).is_file():
        tokenizer.chat_template = _text_of(folder / _TEMPLATE)
    labels = _labels(folder, settings, kind)
    base = load_base(source, kind.name, labels, 0, tokenizer.pad_token_id, torch.float32, Storage(revision=revision))
    if not adapter and base.initialised:
        raise ModelError(f"{folder} has no weights for {', '.join(base.initialised)}; give a model of this task")
    model = _with_adapter(base.model, folder) if adapter else base.model
    reading = replace(reading, max_length=_limit(folder, max_length, reading, base.longest))
    return Served(model.eval(), tokenizer, reading, labels, base.longest)


def _reading(folder: Path, settings: dict[str, Any], adapter: bool, text: tuple[str, ...]) -> Reading:
    """How rows are to be read: as the folder says, from the columns ``text`` where these are given."""
    reading = Reading.read(folder)
    if reading is None:
        kind = _kind_of(folder, settings, adapter)
        if not text and not kind.reads_images:  # whose column has a usual name
            raise ConfigError(f"{folder} does not say which columns it reads (no peerlora.json); give --text NAME")
        reading = Reading(kind.name, text or (kind.name,), _MOST_TOKENS)
    if text and (role := _ASKED_IN.get(reading.task)):
        reading = replace(reading, columns={role: text[0]})
    return replace(reading, text=text or reading.text)


def _known_kind(folder: Path, reading: Reading) -> TaskKind:
    try:
        kind = task_kind(reading.task)
    except ValueError as error:
        raise ModelError(f"{folder / READING}: task {error}; use the version of peerlora that wrote it") from None
    if kind.acts:
        raise ModelError(f"{folder / READING}: task {kind.name} answers no rows; give another folder")
    return kind


def _labels(folder: Path, settings: dict[str, Any], kind: TaskKind) -> tuple[str, ...]:
    named = folder / "labels.json"
    labels = real_names(read_settings(named) if named.is_file() else settings)
    if kind.has_names and not labels:
        return tuple(f"LABEL_{i}" for i in range(_outputs(folder, settings)))
    return labels


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
    """The task of a folder without ``peerlora.json``, by what PEFT or transformers write.  Raises ModelError.

    A language model is taken for one of plain text: nothing in such a folder says that it was trained on chats.
    """
    problem = settings.get("problem_type")
    target = _PROBLEMS.get(problem) if isinstance(problem, str) else None
    answering = [kind for kind in KINDS.values() if not kind.acts]
    kinds = [kind for kind in answering if target in (None, kind.target)]
    mapping = None if settings.get("task_type") else settings.get("auto_mapping")
    if adapter and not isinstance(mapping, dict):
        told = f"task_type={settings.get('task_type')!r}"
        found = [kind for kind in kinds if kind.peft_type and kind.peft_type == settings.get("task_type")]
    else:
        named = [mapping.get("base_model_class")] if isinstance(mapping, dict) else settings.get("architectures")
        classes = [str(name) for name in named or ()]
        told = f"{'base_model_class' if adapter else 'architectures'}={classes}"
        found = [kind for kind in kinds if any(name.endswith(_endings(kind)) for name in classes)]
    if not found:
        known = dict.fromkeys(kind.peft_type or kind.auto_model.removeprefix("Auto") for kind in answering)
        raise ModelError(f"{folder} has {told}; rows can be answered by {', '.join(known)}")
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


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({first_line(error)}); give an undamaged folder") from None
