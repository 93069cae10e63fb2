"""Greedy answers of a served language model, decoder or encoder-decoder, to rows of a file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peerlora.data.row_names import row_name
from peerlora.errors import DataError
from peerlora.lora.attach import inputs_of
from peerlora.lora.base_models import quiet
from peerlora.runtime.serving import Served
from peerlora.train.generation import greedy_settings, ignores_left_padding, padded, room_behind


def answer_prompts(
    served: Served,
    rows: str,
    prompts: Sequence[np.ndarray],
    batch: int,
    new_tokens: int,
    ends: Sequence[int] | None = None,
) -> Iterator[dict[str, Any]]:
    """Write the greedy continuation of every prompt, at most ``new_tokens`` tokens; a batch changes no answer.

    ``rows``: what a message calls their source.  ``ends``: the tokens that end an answer of a chat; None: the model's
    own.  Raises DataError, before it answers, where a prompt leaves no room.
    """
    rooms = _rooms(served, rows, prompts, new_tokens)
    together = batch if _can_pad(served, prompts[0]) else 1
    for room, some in _batches(rooms, together):
        texts = _written(served, [prompts[row] for row in some], room, ends)
        for row, answer in zip(some, texts, strict=True):
            yield {"row": row + 1, "answer": answer if ends is None else answer.strip()}


def _rooms(served: Served, rows: str, prompts: Sequence[np.ndarray], new_tokens: int) -> list[int]:
    """The most tokens of each answer: what the model can read behind its prompt, or behind a decoder's first token."""
    lengths = [1] * len(prompts) if _writes(served) else [len(prompt) for prompt in prompts]
    rooms = [room_behind(length, new_tokens, served.longest) for length in lengths]
    if min(rooms) < 1:
        row = int(np.argmin(rooms))
        raise DataError(
            f"{rows}: {row_name(rows, row)} has {lengths[row]} tokens, which leave no room for an answer, the model "
            f"reads {served.longest} in all; lower --max-length"
        )
    if short := sum(room < new_tokens for room in rooms):
        logging.getLogger(__name__).warning(
            "%s: %d of %d answers end before --new-tokens %d, the shortest after %d: the model reads %d tokens in all",
            *(rows, short, len(rooms), new_tokens, min(rooms), served.longest),
        )
    return rooms


def _writes(served: Served) -> bool:
    """Whether answers stand alone, behind a first token, and not behind the prompts."""
    return bool(served.model.config.is_encoder_decoder)


def _can_pad(served: Served, prompt: np.ndarray) -> bool:
    """Whether prompts of unlike lengths can be answered together."""
    if _writes(served):
        return served.padding is not None
    read = inputs_of(served.inner)

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        return served.model(**{name: value for name, value in inputs.items() if name in read}).logits

    return ignores_left_padding(forward, prompt, served.tokenizer.pad_token_id)


def _batches(rooms: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """Rows in their order, at most ``size`` at a time, with the room that all of a batch have."""
    for room, group in groupby(range(len(rooms)), key=rooms.__getitem__):
        own = list(group)
        for start in range(0, len(own), size):
            yield room, own[start : start + size]


@torch.no_grad()
def _written(served: Served, prompts: Sequence[np.ndarray], room: int, ends: Sequence[int] | None) -> list[str]:
    tokenizer, writes = served.tokenizer, _writes(served)
    ids, mask = padded(prompts, tokenizer.pad_token_id, left=not writes or served.padding == "left")
    settings = greedy_settings(room, tokenizer.pad_token_id, ends)
    with quiet():
        found = served.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return tokenizer.batch_decode(found[:, 1 if writes else ids.shape[1] :], skip_special_tokens=True)
