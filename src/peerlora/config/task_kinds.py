"""The kinds of tasks, as far as settings, rows and base models depend on them; no torch is needed to ask.

A kind's losses and metric are a ``Task`` (``train.tasks``), to which it refers by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

from peerlora.plugins import TASKS

Target = Literal["class", "number", "labels", "tokens", "tags", "text", "action"]
Names = Mapping[str, tuple[str, ...]]
"""Role of a column -> the names that it usually has, in lower case."""


@dataclass(frozen=True)
class Form:
    """One way to spell rows that are no texts with a label: the roles of their columns."""

    needed: Names
    optional: Names = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    """Names, in lower case, of columns that hold more of such rows; a model would not read them."""

    def fits(self, roles: Collection[str]) -> bool:
        """Whether these are the roles of this form's columns."""
        return set(self.needed) <= set(roles) <= {*self.needed, *self.optional}

    def __str__(self) -> str:
        more = f" (and perhaps {', '.join(self.optional)})" if self.optional else ""
        return f"{' and '.join(self.needed)}{more}"


@dataclass(frozen=True)
class TaskKind:
    """One ``task.kind``."""

    name: str
    target: Target
    """What a model predicts of a row: a class, a number or several labels, all in the column ``data.label``; its next
    tokens; a class of each word; a text, which a decoder writes for what an encoder has read; or, without rows, an
    action in the state of an environment."""
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
    forms: tuple[Form, ...] = ()
    """The ways in which rows may be spelled, the preferred one first; (): texts, with a label where there is one."""

    @property
    def has_classes(self) -> bool:
        """Whether labels are classes, which have names and can be divided among clients by label."""
        return self.target == "class"

    @property
    def has_names(self) -> bool:
        """Whether the outputs of a model's head have names: those of classes, or of the tags of words."""
        return self.target in ("class", "labels", "tags")

    @property
    def has_label(self) -> bool:
        """Whether a column of the data holds the label."""
        return self.target in ("class", "number", "labels")

    @property
    def acts(self) -> bool:
        """Whether clients act in environments, in place of reading rows."""
        return self.target == "action"

    @property
    def reads_images(self) -> bool:
        """Whether rows are images, in place of texts."""
        return any("image" in form.needed for form in self.forms)

    @property
    def is_chat(self) -> bool:
        """Whether rows are chats, of which the answers are learned."""
        return self.target == "tokens" and bool(self.forms)

    @property
    def has_language_head(self) -> bool:
        """Whether a model's own head, over its vocabulary, says what is predicted, so that none is drawn or trained."""
        return self.target in ("tokens", "text")

    @property
    def predicts_tokens(self) -> bool:
        """Whether a model predicts the next token at every place of a row."""
        return self.target == "tokens"

    def model_options(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` that shape the model's head; ``names``: those of the classes."""
        if self.has_names:
            kind = {"problem_type": "multi_label_classification"} if self.target == "labels" else {}
            return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}, **kind}
        return {"num_labels": 1, "problem_type": "regression"} if self.target == "number" else {}


_SEQUENCE = "AutoModelForSequenceClassification"
_SYSTEM = {"system": ("system", "system_prompt")}
_ASKED_WITH = {"input": ("input", "context"), **_SYSTEM, "history": ("history",)}  # below or before a question
CHAT_FORMS = (
    Form({"messages": ("messages", "conversations", "conversation")}, _SYSTEM),
    Form(
        {"instruction": ("instruction",), "output": ("output", "response", "answer", "completion")},
        _ASKED_WITH,
    ),
    Form(
        {"prompt": ("prompt", "question", "query"), "completion": ("completion", "response", "answer", "output")},
        _ASKED_WITH,
    ),
)
TAG_FORMS = (Form({"tokens": ("tokens", "words"), "tags": ("ner_tags", "tags", "labels", "pos_tags", "chunk_tags")}),)
IMAGE_FORMS = (Form({"image": ("image", "images", "img", "picture", "photo")}),)
PAIR_FORMS = (
    Form(
        {
            "prompt": ("prompt", "source", "input", "question", "query", "document", "article", "dialogue", "text"),
            "completion": ("completion", "target", "output", "answer", "response", "summary", "highlights"),
        },
        unread=("instruction", *chain(*_ASKED_WITH.values())),
    ),
)
_KINDS = (
    TaskKind("classification", "class", "peerlora.train.tasks:Classification", "SEQ_CLS", _SEQUENCE),
    TaskKind("regression", "number", "peerlora.train.tasks:Regression", "SEQ_CLS", _SEQUENCE),
    TaskKind("multi-label", "labels", "peerlora.train.tasks:MultiLabel", "SEQ_CLS", _SEQUENCE),
    TaskKind("causal-lm", "tokens", "peerlora.train.tasks:CausalLM", "CAUSAL_LM", "AutoModelForCausalLM", 1, 2),
    TaskKind(
        "token-classification",
        "tags",
        "peerlora.train.tasks:TokenClassification",
        "TOKEN_CLS",
        "AutoModelForTokenClassification",
        forms=TAG_FORMS,
    ),
    TaskKind(
        "sequence-to-sequence",
        "text",
        "peerlora.train.tasks:SequenceToSequence",
        "SEQ_2_SEQ_LM",
        "AutoModelForSeq2SeqLM",
        forms=PAIR_FORMS,
    ),
    TaskKind(
        "image-classification",
        "class",
        "peerlora.train.tasks:ImageClassification",
        "",  # PEFT has no type for it
        "AutoModelForImageClassification",
        0,
        forms=IMAGE_FORMS,
    ),
    TaskKind("chat", "tokens", "peerlora.train.tasks:Chat", "CAUSAL_LM", "AutoModelForCausalLM", 0, 2, CHAT_FORMS),
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
    name: str,
    target: Target,
    peft_type: str,
    auto_model: str = _SEQUENCE,
    texts: int = 2,
    tokens: int = 1,
    forms: tuple[Form, ...] = (),
) -> Callable[[type[Any]], type[Any]]:
    """Register the Task class that this decorates (see ``train.tasks.Task``) as ``task.kind=NAME``.

    The other arguments are the fields of its ``TaskKind``.  Raises ConfigError where the name is taken.
    """

    def register(task: type[Any]) -> type[Any]:
        where = f"{task.__module__}:{task.__qualname__}"
        kind = TaskKind(name, target, where, peft_type, auto_model, texts, tokens, forms)
        TASKS.register(name, kind, task.__module__)
        return task

    return register


def _flaw(name: str, thing: Any) -> str | None:
    if not isinstance(thing, TaskKind):
        return f"{thing!r} given; expected a peerlora.config.task_kinds.TaskKind"
    return None if thing.name == name else f"its TaskKind is named {thing.name!r}"


TASKS.reserve(KINDS, _flaw)
