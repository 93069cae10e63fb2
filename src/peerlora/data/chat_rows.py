"""Rows -> chats: lists of turns, from a column of messages or from columns of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from peerlora.data.row_names import row_name
from peerlora.errors import DataError

Chat = list[dict[str, str]]
"""Turns in order, each with ``role`` and ``content``, as ``apply_chat_template`` takes them."""

ASSISTANT = "assistant"
ANSWER_ROLES = ("completion", "output")
"""The roles of columns (``task_kinds.CHAT_FORMS``) that hold answers."""
_ROLES = {name: name for name in ("system", "developer", "user", ASSISTANT, "tool")}
_ROLES |= {"human": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT}
_TURNS = 1000  # of one chat, whose prefixes are rendered one by one


def read_chats(columns: Mapping[str, pa.ChunkedArray], chosen: np.ndarray, source: str) -> list[Chat]:
    """The chats of some rows, from columns by role (``task_kinds.CHAT_FORMS``).

    Raises DataError, naming the row: no list of turns, a turn without role or text, an unknown role, an empty text.
    """
    cells = {role: column.take(pa.array(chosen)).to_pylist() for role, column in columns.items()}
    build = _of_messages if "messages" in cells else _of_texts
    rows = zip(*cells.values(), strict=True)
    return [
        build(dict(zip(cells, row, strict=True)), f"{source}: {row_name(source, number)}")
        for number, row in zip(chosen.tolist(), rows, strict=True)
    ]


def read_prompts(columns: Mapping[str, pa.ChunkedArray], chosen: np.ndarray, source: str) -> list[Chat]:
    """What is to be answered: chats as `read_chats` gives them, without an answer at their end.

    Columns of answers are not needed.  Raises DataError.
    """
    chats = read_chats({role: column for role, column in columns.items() if role not in ANSWER_ROLES}, chosen, source)
    return [chat[:-1] if chat[-1]["role"] == ASSISTANT else chat for chat in chats]


def _of_texts(row: Mapping[str, Any], where: str) -> Chat:
    """A question, perhaps with a system's text in front, and its answer, where there is a column of answers."""
    system, more = row.get("system"), row.get("input")
    asked = "instruction" if "instruction" in row else "prompt"
    question = _text(row[asked], where, asked)
    answers = [_text(row[name], where, name) for name in ANSWER_ROLES if name in row]
    if not _is_blank(more):
        question = f"{question}\n\n{_text(more, where, 'input')}"
    first = [] if _is_blank(system) else [_turn("system", _text(system, where, "system"))]
    return [*first, _turn("user", question), *(_turn(ASSISTANT, answer) for answer in answers)]


def _of_messages(row: Mapping[str, Any], where: str) -> Chat:
    messages = row["messages"]
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(f"{where}: messages is {_kind(messages)}; expected a list of turns with role and content")
    if not messages:
        raise DataError(f"{where}: messages is empty; expected turns with role and content; remove the row")
    if len(messages) > _TURNS:
        raise DataError(f"{where}: {len(messages)} turns; expected at most {_TURNS}; divide the row")
    turns = [_message(each, f"{where}, turn {place}") for place, each in enumerate(messages, 1)]
    if turns[0]["role"] == ASSISTANT:
        raise DataError(f"{where}: begins with an assistant's turn; expected a user's in front of it; remove the turn")
    return turns


def _message(message: Any, where: str) -> dict[str, str]:
    """A turn as ``{role, content}``, or as ``{from, value}`` (ShareGPT)."""
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: is {_kind(message)}; expected an object with role and content")
    role = _first_of(message, ("role", "from"), where)
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        given = "there is no role" if role is None else f"role {role!r} is unknown"
        raise DataError(f"{where}: {given}; expected one of {', '.join(_ROLES)}")
    return _turn(known, _text(_first_of(message, ("content", "value"), where), where, "content"))


def _first_of(message: Mapping[str, Any], names: tuple[str, str], where: str) -> Any:
    """The value under the first of these names that has one."""
    there = [name for name in names if name in message]
    if not there:
        keys = ", ".join(map(str, message)) or "none"
        raise DataError(
            f"{where}: there is no {names[0]}, its keys are {keys}; expected role and content, or from and value; "
            "rename the keys"
        )
    return next((message[name] for name in there if message[name] is not None), None)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _text(value: Any, where: str, name: str) -> str:
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {name} is {_kind(value)}; expected text")
    if value is None or not value.strip():
        raise DataError(f"{where}: {name} is empty; expected text; fill or remove the row")
    return value


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"
