"""Chats -> token ids, and which of them are learned."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from peerlora.config.data import DataConfig
from peerlora.data.chat_rows import ASSISTANT, Chat
from peerlora.data.chat_template import ChatTemplate, Span
from peerlora.data.dataset import UNLEARNED, Dataset
from peerlora.data.row_names import row_name
from peerlora.data.tokens import require_places
from peerlora.errors import ConfigError, DataError

_CHUNK = 500  # chats at a time, whose letters' places are Python lists
_EFFECTS = {
    "cut-right": "their ends are cut off",
    "cut-left": "their beginnings are cut off",
    "drop": "they are left out",
}


def chat_dataset(data: DataConfig, chats: Sequence[Chat], chosen: np.ndarray, source: str, tokenizer: Any) -> Dataset:
    """Tokenise chats, of rows ``chosen``; a log line tells how many were cut, and how many left out.

    Rows that are too long for ``data.too_long=drop``, or without any token to learn, are left out.  Labels are the
    places in ``chats`` of the rows that are kept.  Raises DataError where none is; ModelError for a tokenizer that does
    not tell where its tokens lie.
    """
    require_places(tokenizer, "chat")
    template = ChatTemplate(tokenizer, data.template)
    whole = [
        row for at in range(0, len(chats), _CHUNK) for row in _tokenised(data, chats, chosen, source, template, at)
    ]
    _warn_of_ends(whole, tokenizer, source)
    rows = [_shortened(*row, data) for row in whole]
    _tell_long([len(ids) for ids, _ in whole], data, source)
    kept = np.array([(targets[1:] != UNLEARNED).any() for _, targets in rows])
    _tell_untrained(kept, [len(ids) > 0 for ids, _ in rows], chosen, data, source)
    places = np.flatnonzero(kept)
    ids, targets = (np.concatenate([rows[place][part] for place in places]) for part in (0, 1))
    starts = np.concatenate([[0], np.cumsum([len(rows[place][0]) for place in places], dtype=np.int64)])
    return Dataset(ids, starts, None, places, (), targets=targets)


def _tokenised(
    data: DataConfig, chats: Sequence[Chat], chosen: np.ndarray, source: str, template: ChatTemplate, at: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and targets, both int32 [token], of the chats from ``at`` on."""
    numbers = chosen[at : at + _CHUNK].tolist()
    texts, spans = [], []
    for chat, number in zip(chats[at : at + _CHUNK], numbers, strict=True):
        text, own = template.render(chat, f"{source}: {row_name(source, number)}")
        texts.append(text)
        spans.append(own if data.loss_on == "answers" else [(0, len(text))])
    found = template.tokenizer(
        texts, add_special_tokens=False, truncation=False, padding=False, return_offsets_mapping=True, verbose=False
    )
    rows = zip(found["input_ids"], found["offset_mapping"], spans, strict=True)
    return [_with_targets(np.array(ids, dtype=np.int32), offsets, own) for ids, offsets, own in rows]


def _with_targets(ids: np.ndarray, offsets: Sequence[Span], spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    """A token is learned where its first letter lies in one of ``spans``."""
    first = np.array([start for start, _ in offsets], dtype=np.int64)
    learned = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        learned |= (first >= start) & (first < end)
    return ids, np.where(learned, ids, UNLEARNED).astype(np.int32)


def _shortened(ids: np.ndarray, targets: np.ndarray, data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    if len(ids) > data.max_length:
        part = {"cut-right": slice(data.max_length), "cut-left": slice(-data.max_length, None), "drop": slice(0)}
        ids, targets = ids[part[data.too_long]], targets[part[data.too_long]]
    targets = targets.copy()
    targets[:1] = UNLEARNED  # nothing stands before it that it could be predicted from
    return ids, targets


def _tell_long(lengths: Sequence[int], data: DataConfig, source: str) -> None:
    long = [length for length in lengths if length > data.max_length]
    if long:
        logging.getLogger(__name__).warning(
            "%s: %d of %d chats have more than data.max_length=%d tokens, the longest %d; %s (data.too_long=%s)",
            *(source, len(long), len(lengths), data.max_length, max(long), _EFFECTS[data.too_long], data.too_long),
        )


def _tell_untrained(kept: np.ndarray, there: Sequence[bool], chosen: np.ndarray, data: DataConfig, source: str) -> None:
    """Say how many rows that were not dropped for their length have nothing to learn; refuse where none is left."""
    lost = np.flatnonzero(~kept & np.array(there, dtype=bool))
    what = "without an answer" if data.loss_on == "answers" else "of one token"
    cut = f", or whose answers lie beyond data.max_length={data.max_length}" if data.loss_on == "answers" else ""
    if not kept.any():
        raise DataError(
            f"{source}: none of {len(kept)} chats has a token to learn: they are {what}{cut}; raise data.max_length, "
            "or look at the turns' roles"
        )
    if len(lost):
        logging.getLogger(__name__).warning(
            "%s: %d of %d chats are %s%s, the first is %s; they are left out",
            *(source, len(lost), len(kept), what, cut, row_name(source, int(chosen[lost[0]]))),
        )


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """The ids of the special tokens, also of those that have no name of their own."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def answer_ends(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's end of text, and the special token that its template puts there.

    A template that refuses a plain question with an answer tells none of its own.
    """
    end = tokenizer.eos_token_id
    ends = set() if end is None else {int(end)}
    try:
        chat = [{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "a"}]
        text, spans = ChatTemplate(tokenizer, None).render(chat, "a question with an answer")
    except (ConfigError, DataError):
        return sorted(ends)
    ids = tokenizer(text[: spans[-1][1]], add_special_tokens=False)["input_ids"]
    return sorted(ends | ({ids[-1]} & special_tokens(tokenizer)))


def _warn_of_ends(rows: Sequence[tuple[np.ndarray, np.ndarray]], tokenizer: Any, source: str) -> None:
    """Warn where no learned token says that an answer ends."""
    special = list(special_tokens(tokenizer))
    if rows and not any(np.isin(targets, special).any() for _, targets in rows[:_CHUNK]):
        logging.getLogger(__name__).warning(
            "%s: the chat template puts no special token behind answers, so models do not learn where an answer ends; "
            "let it write eos_token there (data.template)",
            source,
        )
