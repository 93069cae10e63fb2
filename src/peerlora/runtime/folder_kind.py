"""The task of a model folder that does not name it, and what the outputs of its head mean."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerlora.config.task_kinds import KINDS, Target, TaskKind
from peerlora.environment import quiet_bitsandbytes
from peerlora.errors import ModelError, first_line
from peerlora.lora.base_models import read_config
from peerlora.lora.base_weights import real_names
from peerlora.lora.model_folder import ADAPTER, adapter_weights, base_name, read_settings

MOST_TOKENS = 512  # of a row, where a folder says nothing
_OLD_ENDINGS = {"causal-lm": ("LMHeadModel",), "sequence-to-sequence": ("ForConditionalGeneration",)}
"""How the classes of models for a task are named beside the library's rule."""
_PROBLEMS: dict[str, Target] = {
    "regression": "number",
    "multi_label_classification": "labels",
    "single_label_classification": "class",
}
"""transformers' problem_type -> what such a model predicts."""
_UNNAMED = 2  # outputs of a config without names: the library's default, which it does not write


@dataclass(frozen=True)
class _Head:
    """What is known of a head's outputs."""

    outputs: int
    names: tuple[str, ...]
    """() where they have none, or only numbered ones."""
    problem: str | None
    """transformers' problem_type."""


def kind_of_folder(folder: Path, settings: dict[str, Any], adapter: bool) -> TaskKind:
    """Find the task of a folder without ``peerlora.json``, by what PEFT or transformers write.  Raises ModelError.

    A language model is taken for one of plain text: nothing in such a folder says that it was trained on chats.
    """
    answering = [kind for kind in KINDS.values() if not kind.acts]
    mapping = None if settings.get("task_type") else settings.get("auto_mapping")
    if adapter and not isinstance(mapping, dict):
        given = f"task_type={settings.get('task_type')!r}"
        found = [kind for kind in answering if kind.peft_type and kind.peft_type == settings.get("task_type")]
    else:
        named = [mapping.get("base_model_class")] if isinstance(mapping, dict) else settings.get("architectures")
        classes = [str(name) for name in named or ()]
        given = f"{'base_model_class' if adapter else 'architectures'}={classes}"
        found = [kind for kind in answering if any(name.endswith(_endings(kind)) for name in classes)]
    if not found:
        known = dict.fromkeys(kind.peft_type or kind.auto_model.removeprefix("Auto") for kind in answering)
        raise ModelError(f"{folder} has {given}; rows can be answered by {', '.join(known)}")
    if len({kind.target for kind in found}) > 1:
        target = _target_of(folder, _head_of(folder, settings, adapter))
        return next(kind for kind in found if kind.target == target)
    return found[0]


def _endings(kind: TaskKind) -> tuple[str, ...]:
    """How the classes of models for a task are named."""
    return kind.auto_model.removeprefix("AutoModel"), *_OLD_ENDINGS.get(kind.name, ())


def _target_of(folder: Path, head: _Head) -> Target:
    """What a classifier predicts: as its problem_type says, else by its outputs, as transformers takes them.

    One output is a number; several may be classes, or labels of which several hold, which is warned of.
    """
    if head.problem in _PROBLEMS:
        return _PROBLEMS[head.problem]
    if head.outputs == 1:
        return "number"
    logging.getLogger(__name__).warning(
        "%s does not say whether its %d outputs are classes, or labels of which several may hold; they are taken for "
        'classes: of labels, write {"task": "multi-label", "text": ["NAME"], "max_length": %d} into its peerlora.json',
        *(folder, head.outputs, MOST_TOKENS),
    )
    return "class"


def output_names(folder: Path, settings: dict[str, Any], adapter: bool, kind: TaskKind) -> tuple[str, ...]:
    """The names of the outputs of a folder's head, by id, numbered ones where it has no others; () for other tasks."""
    if not kind.has_names:  # the config of a regression may name its number
        return ()
    named = folder / "labels.json"
    if named.is_file() and (labels := real_names(read_settings(named))):
        return labels
    head = _head_of(folder, settings, adapter)
    return head.names or tuple(f"LABEL_{i}" for i in range(head.outputs))


def _head_of(folder: Path, settings: dict[str, Any], adapter: bool) -> _Head:
    """The head of a folder.

    An adapter folder does not say what the outputs of a head of its own mean, and those of its base may mean others.
    """
    own = _saved_outputs(folder) if adapter else None
    if own is not None:
        return _Head(own, (), None)
    config = read_config(*base_of(folder, settings)) if adapter else settings
    names, problem = config.get("id2label"), config.get("problem_type")
    outputs = len(names) if isinstance(names, dict) and names else _UNNAMED
    return _Head(outputs, real_names(config), problem if isinstance(problem, str) else None)


def base_of(folder: Path, settings: dict[str, Any]) -> tuple[str, str | None]:
    """The base model of an adapter folder, and its revision."""
    named, revision = base_name(settings), settings.get("revision")
    if named is None:
        raise ModelError(f"{folder / ADAPTER} does not name a base model; write it as base_model_name_or_path")
    return named, str(revision) if revision else None


def _saved_outputs(folder: Path) -> int | None:
    """The outputs of the head that an adapter folder holds; None where it holds none.

    Where PEFT does not know the head's name, it is the matrix saved in full that has the fewest outputs.
    """
    quiet_bitsandbytes()
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    tensors = [name for name in sorted(tensor_names(folder)) if ".lora_" not in name and name.endswith(".weight")]
    heads = [name for name in tensors if set(name.split(".")) & set(SEQ_CLS_HEAD_NAMES)]
    with _opened(folder) as file:
        shapes = [file.get_slice(name).get_shape() for name in heads[-1:] or tensors]
    return min((shape[0] for shape in shapes if len(shape) == 2), default=None)


def tensor_names(folder: Path) -> frozenset[str]:
    """The names of an adapter folder's tensors.  Raises ModelError where these cannot be read."""
    with _opened(folder) as file:
        return frozenset(file.keys())


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    path = adapter_weights(folder, str(folder))
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ModelError(f"{path} cannot be read ({first_line(error)}); give an undamaged folder") from None
