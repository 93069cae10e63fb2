"""Greedy answers of one client's model, and how near they come to the expected ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peerlora.data.dataset import UNLEARNED, Dataset
from peerlora.lora.adapters import Adapters
from peerlora.lora.attach import StackedModel, inputs_of
from peerlora.lora.base_models import quiet
from peerlora.randomness import numpy_generator

_PROMPTS, _TOKENS = 16, 1 << 14  # of one batch at most; its keys and values are kept for every token
_FILLER = 3  # tokens of padding that a prompt is looked at with, at most
_NOISE, _ROUNDINGS = 1e-3, 8  # of the largest logit; a difference above both, the latter in its eps, is no rounding

_PLAIN: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "guidance_scale": 1.0,
    "min_new_tokens": 0,  # which the library takes before min_length
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
"""Settings without effect: what is left out, the library takes from the model's own generation_config.json."""


def whole_answers(data: Dataset, max_length: int, ends: Sequence[int]) -> np.ndarray:
    """The rows whose last answer was not cut at ``max_length`` tokens: what is left of it is no answer to compare with.

    A row of so many tokens is one of them if one of ``ends`` ends the answer, and something stands before it.
    """
    full = data.lengths >= max_length
    parts = {int(row): last_answer(data, int(row)) for row in np.flatnonzero(full)}
    cut = [row for row, (asked, answer) in parts.items() if int(answer[-1]) not in ends or len(asked) == 1]
    return np.setdiff1d(np.arange(len(data)), cut)


def drawn_rows(rows: np.ndarray, wanted: int, seed: int) -> list[int]:
    """Those of ``rows`` that are answered: a sample drawn once from the seed, ascending."""
    draw = numpy_generator(seed, "generation").choice(len(rows), min(wanted, len(rows)), replace=False)
    return np.sort(rows[draw]).tolist()


def last_answer(data: Dataset, row: int) -> tuple[np.ndarray, np.ndarray]:
    """A row's tokens before its last answer, and those of the answer; both [token]."""
    assert data.targets is not None
    span = slice(*data.starts[row : row + 2].tolist())
    ids, learned = data.ids[span], data.targets[span] != UNLEARNED
    end = len(ids) - int(learned[::-1].argmax())
    others = np.flatnonzero(~learned[:end])  # the first token is one of them
    first = int(others[-1]) + 1
    return ids[:first], ids[first:end]


def room_behind(tokens: int, most: int, longest: int | None) -> int:
    """How many tokens, at most ``most``, can be written behind so many by a model that reads ``longest`` in all."""
    return most if longest is None else min(most, longest - tokens)


@torch.no_grad()
def greedy_answers(
    model: StackedModel, x: Adapters, prompts: Sequence[np.ndarray], most: int, pad: int, ends: Sequence[int]
) -> list[list[int]]:
    """The tokens that one client's model writes behind each prompt, at most ``most``, without the end of its turn.

    ``ends``: the tokens, any of which ends an answer.
    """
    assert x.clients == 1
    model.bind_adapters(x)
    read, device, settings = inputs_of(model.base), x.flat.device, greedy_settings(most, pad, ends)

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        model.step.shape = (inputs["input_ids"].shape[0], inputs["input_ids"].shape[1])
        return model.base(**{name: value.to(device) for name, value in inputs.items() if name in read}).logits

    together = _PROMPTS if ignores_left_padding(forward, prompts[0], pad) else 1
    together = max(1, min(together, _TOKENS // (max(map(len, prompts)) + most)))
    found = []
    for start in range(0, len(prompts), together):
        ids, mask = (each.to(device) for each in padded(prompts[start : start + together], pad, left=True))
        model.step.shape = (ids.shape[0], ids.shape[1])
        with quiet():
            written = model.base.generate(input_ids=ids, attention_mask=mask, generation_config=settings)  # pyright: ignore
        found += [_until(own, ends) for own in written[:, ids.shape[1] :].tolist()]
    return found


def greedy_settings(most: int, pad: int, ends: Sequence[int] | None) -> Any:
    """The library's settings by which a model writes the likeliest token, one by one; ``ends`` None: its own ones."""
    from transformers import GenerationConfig

    more = {} if ends is None else {"eos_token_id": list(ends)}
    return GenerationConfig(max_new_tokens=most, use_cache=True, pad_token_id=pad, **_PLAIN, **more)


@torch.no_grad()
def ignores_left_padding(forward: Callable[[dict[str, Tensor]], Tensor], prompt: np.ndarray, pad: int) -> bool:
    """Whether a decoder's next token is the same with padding before its prompt: it need not be where it counts places.

    ``forward``: the logits of rows, from ``input_ids``, ``attention_mask`` and ``position_ids``, as far as it reads
    these.
    """
    filler = min(_FILLER, max(1, len(prompt) - 1))
    short = prompt[-max(1, len(prompt) - filler) :]  # padded as long as the prompt, which may fill the model
    longer = np.concatenate([short, np.full(filler, short[-1])])
    logits = []
    for rows in ([short], [short, longer]):
        ids, mask = padded(rows, pad, left=True)
        places = (mask.cumsum(1) - 1).clamp_min(0)
        logits.append(forward({"input_ids": ids, "attention_mask": mask, "position_ids": places})[0, -1])
    alone, beside = logits
    noise = max(_NOISE, _ROUNDINGS * torch.finfo(alone.dtype).eps)
    return bool((alone - beside).abs().max() <= noise * alone.abs().max().clamp_min(1e-6))


def padded(rows: Sequence[np.ndarray], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one rectangle, and the mask of what is no padding; both [row, token]."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.int64)
    for row, own in enumerate(rows):
        inside = slice(longest - len(own), None) if left else slice(len(own))
        ids[row, inside] = torch.from_numpy(own.astype(np.int64))
        mask[row, inside] = 1
    return ids, mask


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
