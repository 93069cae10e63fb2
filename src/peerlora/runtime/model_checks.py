"""Whether a base model can read the rows of a run, and what its head was trained on: asked before a run begins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from peerlora.config.run import RunConfig
from peerlora.data.chat_tokens import answer_ends
from peerlora.data.dataset import Dataset
from peerlora.errors import ConfigError, DataError, ModelError
from peerlora.lora.attach import Targets, inputs_of
from peerlora.lora.base_models import Base
from peerlora.lora.base_weights import check_class_order, within
from peerlora.train.generation import drawn_rows, last_answer, room_behind, whole_answers

_UNKNOWN = 0.3  # share of a data set's words; more of them unknown is told
_USED = 0.9  # share of a table's rows that a model's own tokenizer has at least; they are padded to multiples of 64
_SHOWN = 4  # names in one message


def some(names: Iterable[str]) -> str:
    """The first few names, and how many there are."""
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (f", ... ({len(listed)} in all)" if len(listed) > _SHOWN else "")


def check_lengths(config: RunConfig, base: Base) -> None:
    """Refuse rows that may be longer than a model's positions."""
    if base.longest is not None and config.data.max_length > base.longest:
        raise ConfigError(
            f"data.max_length={config.data.max_length} given; {base.source} reads at most {base.longest} tokens; "
            "lower it"
        )


def check_answers(config: RunConfig, base: Base, data: Dataset, tokenizer: Any) -> tuple[str, ...]:
    """Warnings of ``eval.generate``: rows that are not asked, and answers that end where the model reads no more.

    Raises ConfigError where every evaluation row is cut in its answer.
    """
    wanted = config.eval.generate
    if wanted is None or data.targets is None:  # an export has no rows to answer
        return ()
    whole, most = whole_answers(data, config.data.max_length, answer_ends(tokenizer)), config.data.max_length
    cut = f"eval.generate given; of {len(data) - len(whole)} of {len(data)} evaluation rows the answer is cut at"
    if not len(whole):
        raise ConfigError(f"{cut} data.max_length={most}, so none has one to compare with; raise it")
    warned = (f"{cut} data.max_length={most}; they are not asked",) if len(whole) < len(data) else ()
    asked = max(len(last_answer(data, row)[0]) for row in drawn_rows(whole, wanted.rows, config.seed))
    room = room_behind(asked, wanted.max_new_tokens, base.longest)
    if room == wanted.max_new_tokens:
        return warned
    return (
        *warned,
        f"eval.generate.max_new_tokens={wanted.max_new_tokens} given; {base.source} reads at most {base.longest} "
        f"tokens, and the longest question has {asked}: answers end after {room}",
    )


def check_norms(base: Base) -> None:
    """Refuse layers that keep running statistics of what they see: no adapter holds these, and no method mixes them."""
    found = [name for name, module in base.model.named_modules() if isinstance(module, _BatchNorm)]
    if found:
        raise ModelError(
            f"model.source={base.source!r}: {type(base.model).__name__} has batch norms ({some(found)}), whose running "
            "statistics no adapter holds; give a model with layer norms, such as a ViT or a DeiT"
        )


def check_ranks(config: RunConfig, targets: Targets) -> None:
    """Refuse ranks above every layer's width, which no update needs and no memory may hold."""
    widest = max(max(layer.d_in, layer.d_out) for layer in targets.layers)
    if max(config.ranks) > widest:
        raise ConfigError(
            f"adapter.rank={max(config.ranks)} given; the widest adapted layer has {widest} inputs or outputs, and no "
            "update of it needs a higher rank; lower it"
        )


def check_tokens(base: Base, tokenizer: Any, data: Iterable[Dataset]) -> tuple[str, ...]:
    """Compare token ids and types with the model's tables; returns warnings.

    Raises ModelError where the tokenizer belongs to another model, DataError where rows cannot be read.
    """
    model, size = base.model, _embedded(base.model)
    warnings = () if size is None else _few_tokens(base, len(tokenizer), size)
    for rows in data:
        if size is not None:
            _check_ids(base, tokenizer, rows, size)
        if rows.classes and getattr(model.config, "is_encoder_decoder", False):
            _check_ends(base, tokenizer, rows)
        warnings += (*_types(base, rows), *_unknown(base, tokenizer, rows))
    return tuple(dict.fromkeys(warnings))


def _embedded(model: Any) -> int | None:
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # how transformers says that a model reads no token ids by a table
        return None
    return getattr(table, "num_embeddings", None)


def _few_tokens(base: Base, tokens: int, size: int) -> tuple[str, ...]:
    """A warning where the table has many more tokens than the tokenizer: it may be another model's."""
    if tokens >= _USED * size:
        return ()
    return (
        f"{base.source} has embeddings for {size} tokens and a tokenizer of {tokens}; if that is another model's, "
        "every token means something else: compare it with the one that the model was trained with",
    )


def _check_ids(base: Base, tokenizer: Any, rows: Dataset, size: int) -> None:
    if 2 * len(tokenizer) < size:
        raise ModelError(
            f"model.source={base.source!r} has a tokenizer of {len(tokenizer)} tokens and embeddings for {size}; "
            "expected the tokenizer that the model was trained with; add its files to the folder"
        )
    largest = max(int(rows.ids.max(initial=0)), tokenizer.pad_token_id)
    if rows.target_starts is not None and rows.targets is not None:
        largest = max(largest, int(rows.targets.max(initial=0)))
    if largest >= size:
        what = "padding token" if largest == tokenizer.pad_token_id else "tokenizer"
        raise ModelError(
            f"model.source={base.source!r}: its {what} gives token id {largest}, but the model has embeddings for "
            f"{size} tokens (0 to {size - 1}) only; give the tokenizer that the model was trained with, or a "
            "model whose embeddings were resized to it"
        )


def _check_ends(base: Base, tokenizer: Any, rows: Dataset) -> None:
    """Classifiers with a decoder look at the last end token, and want as many in each row."""
    end = base.model.config.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
    if end == tokenizer.pad_token_id:
        raise ModelError(
            f"model.source={base.source!r}: {type(base.model).__name__} classifies at the end token {end}, which is "
            "also the tokenizer's padding; give a tokenizer with a padding token of its own"
        )
    counts = np.add.reduceat(rows.ids == end, rows.starts[:-1])
    odd = np.flatnonzero((counts != counts[0]) | (counts == 0))
    if len(odd):
        row = int(odd[0])
        raise DataError(
            f"{type(base.model).__name__} classifies at the last end token (id {end}) and needs equally many in every "
            f"row; row {row + 1} of {len(rows)} used has {counts[row]}, the first has {counts[0]}; remove end tokens "
            "from the texts, or give the tokenizer that belongs to the model"
        )


def _types(base: Base, rows: Dataset) -> tuple[str, ...]:
    """Token types beyond the model's table; a warning where it knows none and takes all tokens alike."""
    largest = 0 if rows.types is None else int(rows.types.max(initial=0))
    known = getattr(base.model.config, "type_vocab_size", None)
    if not largest:
        return ()
    if "token_type_ids" not in inputs_of(base.model):
        return (
            f"{base.source} knows no token types, so it tells the two texts of a pair apart by their separators only",
        )
    if isinstance(known, int) and largest >= known:
        raise ModelError(
            f"model.source={base.source!r}: its tokenizer numbers texts up to type {largest}, the model knows {known} "
            f"types (0 to {known - 1}); give the tokenizer that belongs to the model"
        )
    return ()


def _unknown(base: Base, tokenizer: Any, rows: Dataset) -> tuple[str, ...]:
    """A warning where much of the texts is unknown to the tokenizer; refused where all is."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or not len(rows.ids):
        return ()
    special = set(tokenizer.all_special_ids) - {unknown}
    words = ~np.isin(rows.ids, list(special))
    share = float((rows.ids[words] == unknown).mean()) if words.any() else 0.0
    if share == 1.0:
        raise ModelError(
            f"model.source={base.source!r}: its tokenizer knows no word of the data, every one becomes "
            f"{tokenizer.unk_token}; give the tokenizer that the model was trained with, or texts in its language"
        )
    if share <= _UNKNOWN:
        return ()
    return (
        f"the tokenizer of {base.source} knows {1 - share:.0%} of the words in the data; the rest is all one token",
    )


def check_head(base: Base, targets: Targets, names: tuple[str, ...]) -> tuple[str, ...]:
    """Warnings on what a base brings in its head, and on what was drawn and never trains.

    Raises ModelError where a trained head has the data's classes in another order.
    """
    drawn_heads = [name for name in base.initialised if within(name, targets.heads)]
    others = [name for name in base.initialised if not within(name, targets.heads)]
    warnings = ()
    if targets.heads and not drawn_heads:
        warnings += check_class_order(f"the head of model.source={base.source!r}", base.own_names, names)
    if others:
        warnings += (
            f"{base.source} has no weights for {some(others)}: drawn from the seed, never trained, and saved with the "
            "adapters",
        )
    return warnings


def linears_of(base: nn.Module, modules: tuple[str, ...]) -> list[str]:
    """The linear layers inside some modules of a model."""
    return [name for name, each in base.named_modules() if isinstance(each, nn.Linear) and within(name, modules)]
