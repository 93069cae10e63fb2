"""The kinds of tasks, as far as settings, rows and base models depend on them; no torch is needed to ask.

A kind's losses and metric are a ``Task`` (``train.tasks``), to which it refers by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from peerlora.plugins import TASKS

Target = Literal["class", "number", "tokens", "action"]


@dataclass(frozen=True)
class TaskKind:
    """One ``task.kind``."""

    name: str
    target: Target
    """What a model predicts of a row: a class or a number, both in the column ``data.label``, or its next tokens; or of
    an environment's state an action, without rows."""
    task: str
    """MODULE:CLASS of the Task with its losses and its metric."""
    peft_type: str
    """PEFT's task type, by which it chooses target layers and heads; empty: none."""
    auto_model: str
    """Name of the class in ``transformers`` that loads the base model; empty: none does."""
    texts: int = 2
    """Most columns of text in a row."""
    tokens: int = 1
    """Fewest tokens of a row."""

    @property
    def has_classes(self) -> bool:
        """Whether labels are classes, which have names and can be divided among clients by label."""
        return self.target == "class"

    @property
    def has_label(self) -> bool:
        """Whether a column of the data holds the label."""
        return self.target in ("class", "number")

    @property
    def acts(self) -> bool:
        """Whether clients act in environments, in place of reading rows."""
        return self.target == "action"

    def model_options(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` that shape the model's head; ``names``: those of the classes."""
        if self.target == "class":
            return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        return {"num_labels": 1, "problem_type": "regression"} if self.target == "number" else {}


_SEQUENCE = "AutoModelForSequenceClassification"
_KINDS = (
    TaskKind("classification", "class", "peerlora.train.tasks:Classification", "SEQ_CLS", _SEQUENCE),
    TaskKind("regression", "number", "peerlora.train.tasks:Regression", "SEQ_CLS", _SEQUENCE),
    TaskKind("causal-lm", "tokens", "peerlora.train.tasks:CausalLM", "CAUSAL_LM", "AutoModelForCausalLM", 1, 2),
    TaskKind("flow-policy", "action", "peerlora.train.online.task:FlowPolicyTask", "", "", 0, 0),
)
KINDS = {kind.name: kind for kind in _KINDS}


def task_kind(name: Any) -> TaskKind:
    """Find the kind with this name, here or in other packages.

    Raises ValueError for an unknown one, ConfigError for a plug-in that cannot be used.
    """
    kind = TASKS.find(name) if isinstance(name, str) else None
    if kind is None:
        *first, last = (f"{known!r}" for known in (*KINDS, *TASKS.names()))
        raise ValueError(f"{name!r} given; input should be {', '.join(first)} or {last}")
    return kind


def register_task(
    name: str, target: Target, peft_type: str, auto_model: str = _SEQUENCE, texts: int = 2, tokens: int = 1
) -> Callable[[type[Any]], type[Any]]:
    """Register the Task class that this decorates (see ``train.tasks.Task``) as ``task.kind=NAME``.

    The other arguments are the fields of its ``TaskKind``.  Raises ConfigError where the name is taken.
    """

    def register(task: type[Any]) -> type[Any]:
        where = f"{task.__module__}:{task.__qualname__}"
        TASKS.register(name, TaskKind(name, target, where, peft_type, auto_model, texts, tokens), task.__module__)
        return task

    return register


def _flaw(name: str, thing: Any) -> str | None:
    if not isinstance(thing, TaskKind):
        return f"{thing!r} given; expected a peerlora.config.task_kinds.TaskKind"
    return None if thing.name == name else f"its TaskKind is named {thing.name!r}"


TASKS.reserve(KINDS, _flaw)
