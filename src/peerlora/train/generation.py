"""Greedy answers of one client's model, and how near they come to the expected ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from peerlora.data.dataset import UNLEARNED, Dataset
from peerlora.lora.adapters import Adapters
from peerlora.lora.attach import StackedModel

_TOGETHER = 16  # prompts


def last_answer(data: Dataset, row: int) -> tuple[np.ndarray, np.ndarray]:
    """A row's tokens before its last answer, and those of the answer; both [token]."""
    assert data.targets is not None
    span = slice(*data.starts[row : row + 2].tolist())
    ids, learned = data.ids[span], data.targets[span] != UNLEARNED
    end = len(ids) - int(learned[::-1].argmax())
    others = np.flatnonzero(~learned[:end])  # the first token is one of them
    first = int(others[-1]) + 1
    return ids[:first], ids[first:end]


@torch.no_grad()
def greedy_answers(
    model: StackedModel, x: Adapters, prompts: Sequence[np.ndarray], most: int, pad: int, ends: Sequence[int]
) -> list[list[int]]:
    """The tokens that one client's model writes behind each prompt, at most ``most``, without the end of its turn.

    ``ends``: the tokens, any of which ends an answer.
    """
    from transformers import GenerationConfig

    assert x.clients == 1
    model.bind_adapters(x)
    settings = GenerationConfig(
        max_new_tokens=most, do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad, eos_token_id=list(ends)
    )
    found = []
    for start in range(0, len(prompts), _TOGETHER):
        ids, mask = _left_padded(prompts[start : start + _TOGETHER], pad, x.flat.device)
        model.step.shape = (ids.shape[0], ids.shape[1])
        written = model.base.generate(input_ids=ids, attention_mask=mask, generation_config=settings)  # pyright: ignore
        found += [_until(own, ends) for own in written[:, ids.shape[1] :].tolist()]
    return found


def _left_padded(prompts: Sequence[np.ndarray], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), longest), pad), torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def exact_match(answer: str, expected: str) -> float:
    """1 where both are the same but for white space around them, else 0."""
    return float(answer.strip() == expected.strip())


def rouge_l(answer: str, expected: str) -> float:
    """F1 of the longest common subsequence of words, in lower case; 0 where either has no word.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3, with beta = 1.
    Differs: words are runs of letters and digits of any script; rouge-score knows those of ASCII only.
    """
    one, other = (re.findall(r"\w+", text.lower()) for text in (answer, expected))
    if not (Counter(one) & Counter(other)):
        return 0.0
    lengths = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for place, its in enumerate(other, 1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == its else max(above, lengths[place - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(one) + len(other))


ANSWER_SCORES: dict[str, Callable[[str, str], float]] = {"exact-match": exact_match, "rouge-l": rouge_l}
"""Names of ``eval.generate.scores`` -> score of (answer, expected answer), between 0 and 1."""
