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
_CALLS = ("function_call", "observation", "function_response")  # of ShareGPT, with arguments and results in JSON
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
    """Earlier questions with their answers, where there is a history; a question, and its answer, if there is one."""
    asked = "instruction" if "instruction" in row else "prompt"
    turns = [*_history(row.get("history"), where), *_part(row[asked], "user", where, asked)]
    if not _is_blank(more := row.get("input")):
        asked_before = [turns.pop()["content"]] if turns[-1]["role"] == "user" else []
        turns.append(_turn("user", "\n\n".join([*asked_before, _text(more, where, "input")])))
    for name in ANSWER_ROLES:
        turns += _part(row[name], ASSISTANT, where, name) if name in row else []
    return _with_system(turns, row.get("system"), where)


def _of_messages(row: Mapping[str, Any], where: str) -> Chat:
    messages = row["messages"]
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(f"{where}: messages is {_kind(messages)}; expected a list of turns with role and content")
    return _with_system(_messages(messages, where, "messages"), row.get("system"), where)


def _part(value: Any, role: str, where: str, name: str) -> Chat:
    """A question or an answer: one turn of text, or, of prompts and completions, a list of turns, as TRL has them."""
    if isinstance(value, list) and name in ("prompt", "completion"):
        return _messages(value, f"{where}, {name}", name)
    return [_turn(role, _text(value, where, name))]


def _history(rounds: Any, where: str) -> Chat:
    """The turns of earlier questions and answers: a list of pairs, as LLaMA-Factory has them."""
    if _is_blank(rounds):
        return []
    if not isinstance(rounds, list) or not all(isinstance(each, list) and len(each) == 2 for each in rounds):
        raise DataError(f"{where}: history is no list of pairs; expected [[question, answer], ...], or [] for none")
    _check_number(2 * len(rounds), where)
    words = (("user", "question"), (ASSISTANT, "answer"))
    return [
        _turn(role, _text(text, where, f"{word} {number} of history"))
        for number, pair in enumerate(rounds, 1)
        for (role, word), text in zip(words, pair, strict=True)
    ]


def _messages(messages: Sequence[Any], where: str, name: str) -> Chat:
    if not messages:
        raise DataError(f"{where}: {name} is empty; expected turns with role and content; remove the row")
    _check_number(len(messages), where)
    return [_message(each, f"{where}, turn {place}") for place, each in enumerate(messages, 1)]


def _check_number(turns: int, where: str) -> None:
    if turns > _TURNS:
        raise DataError(f"{where}: {turns} turns; expected at most {_TURNS}; divide the row")


def _with_system(turns: Chat, system: Any, where: str) -> Chat:
    """A chat with the text of its system column in front, unless it begins with one of its own."""
    if turns[0]["role"] == ASSISTANT:
        raise DataError(f"{where}: begins with an assistant's turn; expected a user's in front of it; remove the turn")
    if _is_blank(system) or turns[0]["role"] in ("system", "developer"):
        return turns
    return [_turn("system", _text(system, where, "system")), *turns]


def _message(message: Any, where: str) -> dict[str, str]:
    """A turn as ``{role, content}``, or as ``{from, value}`` (ShareGPT)."""
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: is {_kind(message)}; expected an object with role and content")
    role = _first_of(message, ("role", "from"), where)
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise DataError(f"{where}: {_about_role(role)}; expected one of {', '.join(_ROLES)}")
    return _turn(known, _content(_first_of(message, ("content", "value"), where), where))


def _about_role(role: Any) -> str:
    if role in _CALLS:
        return (
            f"role {role!r} is of calls of functions, which each model spells otherwise; write a call as an "
            "assistant's text and its result as a turn of tool, as the model's template does, or remove the row"
        )
    return "there is no role" if role is None else f"role {role!r} is unknown"


def _content(content: Any, where: str) -> str:
    """The text of a turn; of a list of parts, as OpenAI has it, their texts one after another."""
    if not isinstance(content, list):
        return _text(content, where, "content")
    for place, part in enumerate(content, 1):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            given = _kind(part) if kind is None else f"of type {kind!r}"
            raise DataError(f"{where}: part {place} of content is {given}; only parts of type 'text' are read")
    return _text("".join(_text(part.get("text"), where, "text of content") for part in content), where, "content")


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
