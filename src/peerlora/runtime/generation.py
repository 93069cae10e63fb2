"""What models answer at the end of a run of chats: ``eval.generate``."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import numpy as np

from peerlora.config.generation import GenerateConfig
from peerlora.data.chat_tokens import answer_ends
from peerlora.data.dataset import Dataset
from peerlora.lora.adapters import Adapters
from peerlora.lora.attach import StackedModel
from peerlora.lora.base_models import longest
from peerlora.runs.events import Generated
from peerlora.runtime.compose import Federation
from peerlora.train.generation import ANSWER_SCORES, drawn_rows, greedy_answers, last_answer, room_behind, whole_answers
from peerlora.train.learner import StackedLearner

_LETTERS = 4000  # of a text in an event, the last ones


def generate_answers(
    federation: Federation, wanted: GenerateConfig, models: Sequence[Adapters], done: int
) -> Generated:
    """The greedy answers of one client's model and of the averaged one, beside the expected ones.

    Rows whose answer was cut at ``data.max_length`` are not asked.  ``models``: as ``Participation.evaluated`` gives
    them: the clients held here, then their average where it is known.
    """
    data, tokenizer = federation.eval_data, federation.export.tokenizer
    model, learner = federation.model, federation.learner
    assert isinstance(model, StackedModel) and isinstance(learner, StackedLearner)  # a loop of one's own has no chats
    assert isinstance(data, Dataset) and learner.pad is not None  # nor has a policy, nor have images
    ends, config = answer_ends(tokenizer), federation.config
    whole = whole_answers(data, config.data.max_length, ends)
    rows = drawn_rows(whole, wanted.rows, config.seed)
    prompts, expected = zip(*(last_answer(data, row) for row in rows), strict=True)
    most = room_behind(max(map(len, prompts)), wanted.max_new_tokens, longest(model.base))
    held = federation.exchange.clients
    place = held.index(wanted.client) if wanted.client in held else 0
    singles = [some.rows([row]) for some in models for row in range(some.clients)]
    answering = {"own": singles[place]} | ({"averaged": singles[len(held)]} if len(singles) > len(held) else {})
    texts = {"expected": [_text(tokenizer, own) for own in expected]}
    for name, x in answering.items():
        found = greedy_answers(model, x, prompts, most, learner.pad, ends)
        texts[name] = [_text(tokenizer, own) for own in found]
    columns = {"prompt": [_text(tokenizer, own) for own in prompts], **texts}
    scores = {
        name: {each: _mean_score(each, texts[name], texts["expected"]) for each in wanted.scores} for name in answering
    }
    answers = [
        {name: own[-_LETTERS:] for name, own in zip(columns, row, strict=True)}
        for row in zip(*columns.values(), strict=True)
    ]
    return Generated(done, held[place], answers, scores if wanted.scores else {}, len(data) - len(whole))


def _text(tokenizer: object, tokens: Sequence[int] | np.ndarray) -> str:
    return tokenizer.decode(list(map(int, tokens)), skip_special_tokens=True).strip()  # pyright: ignore


def _mean_score(name: str, answers: Sequence[str], expected: Sequence[str]) -> float:
    return mean(ANSWER_SCORES[name](one, other) for one, other in zip(answers, expected, strict=True))
