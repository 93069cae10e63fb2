"""Chats -> the texts that a model reads, and where in them the answers are."""

from __future__ import annotations

from typing import Any

from peerlora.config.chat import TEMPLATES, resolve_template
from peerlora.data.chat_rows import ASSISTANT, Chat
from peerlora.errors import ConfigError, DataError, first_line

_DATE = (
    "26 Jul 2024"  # instead of today, in templates that write it: a run must read the same tokens when it is resumed
)
_FIXED_DATE = f"{{%- macro strftime_now(form) -%}}{_DATE}{{%- endmacro -%}}"

Span = tuple[int, int]
"""First letter of an answer, and the one behind its last."""


class ChatTemplate:
    """A chat template with the tokenizer whose special tokens it writes.

    ``given``: ``data.template``; None takes the tokenizer's own.  Templates run in the sandbox of transformers.
    Raises ConfigError where there is none, or its text is no Jinja.
    """

    def __init__(self, tokenizer: Any, given: str | None):
        self.tokenizer = tokenizer
        try:
            self.text = resolve_template(given) if given is not None else str(tokenizer.get_chat_template())
        except ValueError:
            raise ConfigError(
                "the base model's tokenizer has no chat template; give one as data.template: "
                f"{', '.join(TEMPLATES)}, or a Jinja text"
            ) from None
        if "strftime_now" in self.text:
            self.text = _FIXED_DATE + self.text
        self._check()

    def _check(self) -> None:
        from jinja2 import TemplateSyntaxError

        try:
            self._render([{"role": "user", "content": "a"}], False)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"data.template: line {error.lineno} is no Jinja: {error.message}; correct it, or use one of "
                f"{', '.join(TEMPLATES)}"
            ) from None
        except Exception:  # noqa: S110 (what it makes of rows is told with the row)
            return

    def _render(self, chat: Chat, prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            chat, chat_template=self.text, tokenize=False, add_generation_prompt=prompt, date_string=_DATE
        )

    def render(self, chat: Chat, where: str) -> tuple[str, list[Span]]:
        """The text of a whole chat, and the spans of its answers, each with its end-of-turn token.

        An answer is the difference of two rendered prefixes: the turns before it with the prompt to answer
        (``add_generation_prompt``), and these turns with the answer; white space behind the end of the turn, which no
        model is asked to write, is none of it.
        Raises DataError, naming the row ``where``: the template refuses the chat, or renders a prefix of it otherwise.
        """
        whole = self._rendered(chat, False, where)
        spans = []
        for place, turn in enumerate(chat):
            if turn["role"] != ASSISTANT:
                continue
            before = self._rendered(chat[:place], True, where)
            upto = whole if place + 1 == len(chat) else self._rendered(chat[: place + 1], False, where)
            if not (upto.startswith(before) and whole.startswith(upto)):
                raise DataError(
                    f"{where}: the chat template writes the turns before turn {place + 1} otherwise when others "
                    "follow, so where its answer begins or ends cannot be told; give another data.template"
                )
            spans.append((len(before), max(len(before), len(upto.rstrip()))))
        return whole, spans

    def render_prompt(self, chat: Chat, where: str) -> str:
        """The text behind which a model is to write its answer.  Raises DataError where the template refuses."""
        return self._rendered(chat, True, where)

    def _rendered(self, chat: Chat, prompt: bool, where: str) -> str:
        try:
            return self._render(chat, prompt)
        except Exception as error:  # a template is a stranger's program
            raise DataError(
                f"{where}: the chat template refuses the chat: {first_line(error)}; correct the row, or give another "
                "data.template"
            ) from None
