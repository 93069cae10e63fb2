"""Rows that are no texts with a label: chats, instructions, pairs to choose from, files without a header line."""

# pyright: reportAttributeAccessIssue=false
# pyarrow.compute makes its functions while it is imported, so pyright cannot see them.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from peerlora.config.task_kinds import CHAT_FORMS, TAG_FORMS, TaskKind
from peerlora.data.chat_rows import read_chats
from peerlora.data.columns import is_text
from peerlora.data.files import class_names
from peerlora.data.label_columns import is_list_of_labels, with_numbers
from peerlora.data.numerals import is_number
from peerlora.data.pair_tokens import read_pairs
from peerlora.data.roles import add_roles, check_pair, find_roles, find_roles_for, no_columns
from peerlora.data.tag_rows import read_tagged
from peerlora.errors import DataError

TOKENS_PER_WORD = 1.4  # of English in a vocabulary of 30,000 word pieces
_MARKS = 12  # tokens that a chat template puts round a turn; a default system turn is one more turn
_LOOKED_AT = 1000  # chats
_ADVICE = (
    "training on them as such is not supported; give a column of text by --text, which trains on all of its tokens; or "
    "name a label by --label"
)
_FORMS = (  # what rows are; columns of the first tuple; and one of the second, if any
    ("answers to choose from", ("chosen", "rejected"), ()),
)
_PAIRS = (  # what rows are where the second column has too many values for a label
    ("questions with answers", ("question", "query", "input"), ("answer", "answers", "response", "output")),
    ("turns of two speakers", ("user", "human"), ("assistant", "gpt")),
    ("problems with solutions", ("problem",), ("solution",)),
    ("texts with translations or targets", ("source", "input", "inputs"), ("target", "output", "targets")),
    ("texts with summaries", ("article", "document", "dialogue", "text"), ("summary", "highlights")),
)


@dataclass(frozen=True)
class RowForm:
    """What rows are that are no texts with a label."""

    kind: str
    """The ``task.kind``."""
    columns: dict[str, str]
    """By role."""
    tokens: float
    """About how many hold nine rows out of ten."""
    reason: str


def find_form(
    table: pa.Table, labels: Sequence[str], named: str | None, source: str, writes: bool = False
) -> RowForm | None:
    """Recognise words with tags, chats, instructions and questions with answers; None where rows are texts.

    ``labels``: columns with few enough values for classes; ``named``: one with a label's usual name; ``writes``:
    whether the model has an encoder and a decoder, for which answers are completions.  Raises DataError for rows of a
    form that no task reads, and for flaws in the first of those that one does.
    """
    names = {name.lower(): name for name in reversed(table.column_names)}
    for form, needed, others in _FORMS:
        found = [name for name in others if name in names]
        if all(name in names for name in needed) and (found or not others):
            _refuse(source, form, [names[name] for name in (*needed, *found[:1])])
    if tags := _find_tags(table, names, source):
        return _tagged(table, tags, source)
    _refuse_marked(table, names, source)
    roles = find_roles(table.column_names, CHAT_FORMS)
    if roles is None or not (roles.keys() & {"messages", "instruction"} or roles["prompt"].lower() == "prompt"):
        roles = _find_pair(table, names, labels, source) if named is None else None
    if roles is None:
        return None
    return _pairs(table, roles, source) if writes else _chats(table, roles, source)


def find_form_for(kind: TaskKind, table: pa.Table, source: str) -> RowForm:
    """The columns by role for a kind of task whose rows have some.

    Raises DataError where there are none by their usual names, and for flaws in rows.
    """
    names = {name.lower(): name for name in reversed(table.column_names)}
    forms = CHAT_FORMS if kind.target == "text" and "instruction" in names else kind.forms
    if kind.target == "tags":
        roles = _find_tags(table, names, source)
    else:
        roles = find_roles_for(replace(kind, forms=forms), table.column_names, source)
    if roles is None and kind.is_chat:
        roles = _find_pair(table, names, (), source)
    if roles is None:
        raise DataError(f"{source}: {no_columns(table.column_names, kind)}")
    makers = {"tags": _tagged, "tokens": _chats, "text": _pairs}
    if kind.target in makers:
        return makers[kind.target](table, roles, source)
    return RowForm(kind.name, roles, 0, f"asked for; its columns are {', '.join(roles.values())}")


def _chats(table: pa.Table, roles: dict[str, str], source: str) -> RowForm:
    looked_at = np.arange(min(table.num_rows, _LOOKED_AT))
    chats = read_chats({role: table.column(name) for role, name in roles.items()}, looked_at, source)
    words = [sum(len(turn["content"].split()) for turn in chat) * TOKENS_PER_WORD for chat in chats]
    marks = [_MARKS * (len(chat) + 1) for chat in chats]
    reason = f"rows are chats, by {', '.join(roles.values())}; the answers are learned"
    return RowForm("chat", roles, float(np.percentile(np.add(words, marks), 90)), reason)


def _tagged(table: pa.Table, roles: dict[str, str], source: str) -> RowForm:
    columns = {role: table.column(name) for role, name in roles.items()}
    rows, _ = read_tagged(columns, class_names(table, roles["tags"]), None, source)
    tokens = float(np.percentile([len(words) for words in rows.words], 90)) * TOKENS_PER_WORD
    reason = f"{roles['tags']} holds a tag for each word in {roles['tokens']}"
    return RowForm("token-classification", roles, tokens, reason)


def _pairs(table: pa.Table, roles: dict[str, str], source: str) -> RowForm:
    """Prompts with completions, for models with an encoder and a decoder; of instructions the question is the prompt.

    Raises DataError where rows are more than that.
    """
    of_chats = {"instruction": "prompt", "output": "completion"}
    found = {of_chats.get(role, role): name for role, name in roles.items()}
    roles = {role: name for role, name in found.items() if role in ("prompt", "completion")}
    check_pair(roles, [*found.values()], source)
    pairs = read_pairs({role: table.column(name) for role, name in roles.items()}, np.arange(table.num_rows), source)
    words = [max(len(text.split()) for text in pair) * TOKENS_PER_WORD for pair in zip(*pairs, strict=True)]
    reason = f"the model has an encoder and a decoder, which write {roles['completion']} for {roles['prompt']}"
    return RowForm("sequence-to-sequence", roles, float(np.percentile(words, 90)), reason)


def _find_tags(table: pa.Table, names: Mapping[str, str], source: str) -> dict[str, str] | None:
    """A column of words, and the one with a tag for each: by its usual name, or else the only list as long as these.

    Raises DataError where there are several of these.
    """
    roles = find_roles(table.column_names, TAG_FORMS)
    if roles and all(_is_list(table.schema.field(name).type) for name in roles.values()):
        return roles
    words = next((names[word] for word in TAG_FORMS[0].needed["tokens"] if word in names), None)
    if words is None or not _is_list(table.schema.field(words).type):
        return None
    as_long = [name for name in table.column_names if name != words and _is_as_long(table, name, words)]
    if len(as_long) > 1:
        raise DataError(
            f"{source}: {', '.join(as_long)} are lists with an item for each of {words}; name the tags: set "
            f"task.kind=token-classification and data.columns={{tokens: {words}, tags: {as_long[0]}}}"
        )
    return {"tokens": words, "tags": as_long[0]} if as_long else None


def _is_as_long(table: pa.Table, name: str, words: str) -> bool:
    """Whether a column holds lists of labels, each as long as that of words."""
    one, other = table.column(name), table.column(words)
    if not is_list_of_labels(one.type) or one.null_count or other.null_count:
        return False
    return bool(pc.all(pc.equal(pc.list_value_length(one), pc.list_value_length(other))).as_py())


def _find_pair(table: pa.Table, names: Mapping[str, str], labels: Sequence[str], source: str) -> dict[str, str] | None:
    """Two columns, of which the second is to be written for the first, by names that mean something else as well.

    With what stands below or before a question: its context, a history, the text of the system.
    """
    for form, firsts, seconds in _PAIRS:
        first = next((names[name] for name in firsts if name in names), None)
        second = next((names[name] for name in seconds if name in names), None)
        if not first or not second or second in labels or _is_number(table.schema.field(second).type):
            continue
        if not all(is_text(table.schema.field(name).type) for name in (first, second)):
            _refuse(source, form, [first, second])
        return add_roles({"prompt": first, "completion": second}, CHAT_FORMS[-1].optional, table.column_names)
    return None


def _refuse_marked(table: pa.Table, names: Mapping[str, str], source: str) -> None:
    """Raise DataError for completions that a label marks as wanted or unwanted: a chat would learn the unwanted too."""
    if not names.keys() >= {"prompt", "completion", "label"}:
        return
    columns = [names[word] for word in ("prompt", "completion", "label")]
    label = with_numbers(table.select(columns[2:])).column(0)
    marks = {str(mark).strip().lower() for mark in label.unique().to_pylist()} - {"none", ""}
    if marks <= {"true", "false"} or marks <= {"0", "1"}:
        _refuse(source, "answers that are marked as wanted or not", columns)


def refuse_missing_header(table: pa.Table, source: str) -> None:
    """Raise DataError where the header line of a CSV file is a row: its cells occur, or are numbers, like those below.

    ``table``: all columns as text.
    """
    names = [name for name in table.column_names if name.strip()]
    if names == [str(place) for place in range(len(names))]:  # as pandas numbers columns without names
        return
    for name, column in zip(table.column_names, table.columns, strict=True):
        cells = column.to_pylist() if name.strip() and is_text(column.type) else []
        if name in cells or (is_number(name) and cells and all(map(is_number, cells))):
            raise DataError(
                f"{source}: the first line is a row like the others ({name!r} is such a cell); expected a header line, "
                "such as text,label; add one"
            )


def _refuse(source: str, form: str, columns: Sequence[str]) -> None:
    raise DataError(f"{source}: rows are {form} (columns {', '.join(columns)}); {_ADVICE}")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)
