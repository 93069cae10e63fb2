"""What a run reads, as digests in run.json: a resumed run must find the same rows, base model and start."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from peerlora.config.run import RunConfig
from peerlora.data.dataset import Dataset
from peerlora.errors import RunError
from peerlora.lora.base_digest import config_digest, plain_digest
from peerlora.lora.peft_model import PeftAdapter
from peerlora.runs.store import RunStore, read_facts
from peerlora.runtime.compose import Federation
from peerlora.train.kernels.speed import Speed
from peerlora.train.online.episodes import Episodes

_NEWER = (("base", "config.json"), ("tokenizer", "rules"))
"""Digests that runs of older versions lack, and go on without."""
_PLAIN = "weights, however they are kept"  # for those who load a run's base in another way
_TOKENS = ("tokens", "targets")
_CHOSEN = ("fp32", "bf16", "fp64")


def describe_inputs(federation: Federation) -> dict[str, dict[str, Any]]:
    """Digests of the training and evaluation rows, their division, the base model and the adapter to start from."""
    start = {"start": {"values": _digest([federation.start.flat.cpu().numpy()])}}
    return {
        **describe_data(federation.train_data, federation.eval_data),
        "partition": {"rows of each client": _digest(federation.partition.shards)},
        **_described_base(federation),
    } | (start if federation.config.adapter.start is not None else {})


def _described_base(federation: Federation) -> dict[str, dict[str, Any]]:
    """Digests of the base model: its weights, what it does with them, and the words it reads."""
    beside = federation.beside_weights
    found = {"base": {"weights": federation.base_digest}}
    if not isinstance(federation.model, PeftAdapter) and federation.config.model.quantize == "none":
        drawn = federation.export.initialised
        found["base"][_PLAIN] = plain_digest(federation.model.base, drawn, federation.originals)
    if "model-config" in beside:
        found["base"]["config.json"] = beside["model-config"]
    return found | ({"tokenizer": {"rules": beside["tokenizer"]}} if "tokenizer" in beside else {})


def describe_data(train: Dataset | Episodes, evaluation: Dataset | Episodes) -> dict[str, dict[str, Any]]:
    """Digests of the training and evaluation rows; of a flow policy, of the episodes of evaluation."""
    if isinstance(train, Episodes) or isinstance(evaluation, Episodes):
        return {"eval": _describe(evaluation)}
    return describe_rows(train, evaluation)


def describe_rows(train: Dataset, evaluation: Dataset) -> dict[str, dict[str, Any]]:
    """Digests of the training and evaluation rows."""
    return {"train": _describe(train), "eval": _describe(evaluation)}


def facts_of(federation: Federation) -> dict[str, Any]:
    """The facts of run.json that only data and model tell."""
    return {
        "inputs": describe_inputs(federation),
        "classes": list(federation.train_data.names),
        "base": federation.export.location,
        "speed": speed_facts(federation.speed),
    } | ({"loop": True} if isinstance(federation.model, PeftAdapter) else {})


def speed_facts(speed: Speed) -> dict[str, Any]:
    """What `speed_of` reads of a run's facts."""
    return {"dtype": speed.dtype, "packed": speed.packed}


def speed_of(facts: Mapping[str, Any], config: RunConfig) -> Speed:
    """The precision and layout that a run began with, from its facts; older versions packed wherever that works.

    Raises RunError where ``train.dtype=auto`` and the facts lack what it was resolved to.
    """
    found = facts.get("speed")
    if isinstance(found, dict) and found.get("dtype") in _CHOSEN and isinstance(found.get("packed"), bool):
        return Speed(found["dtype"], found["packed"])
    if found is not None or config.train.dtype == "auto":
        raise RunError(
            f"run.json tells speed={found!r}; expected the dtype that the run began with ({', '.join(_CHOSEN)}) and "
            "whether weights were packed; put run.json back, or start a new run with another --out"
        )
    return Speed(config.train.dtype)


def check_inputs(store: RunStore, federation: Federation) -> None:
    """Raise RunError, naming what changed, unless a resumed run reads what it read when it began.

    A run of an older version, whose folder has no digests, goes on unchecked.
    """
    was = store.facts.get("inputs")
    if was is not None:
        require_same_inputs(was, describe_inputs(federation), federation.config, store.folder)


def require_same_base(
    run: Path, base: nn.Module, source: str, drawn: Collection[str], originals: Mapping[str, str] | None = None
) -> None:
    """Raise RunError unless this is the base model that a run trained its adapters on; see `plain_digest`.

    Of a quantised base config.json alone is compared, and of a run of an older version nothing.
    """
    was = (read_facts(run).get("inputs") or {}).get("base", {})
    changed = ["config.json"] if was.get("config.json") not in (None, config_digest(base)) else []
    if _PLAIN in was and was[_PLAIN] != plain_digest(base, drawn, originals):
        changed.insert(0, "weights")
    if changed:
        raise RunError(
            f"model.source={source} changed since ({', '.join(changed)}): {run} has trained adapters of what was there "
            "before, which mean nothing on another base model; put it back"
        )


def require_same_inputs(was: Mapping[str, Any], now: Mapping[str, Any], config: RunConfig, folder: Path) -> None:
    """Raise RunError, naming the sources that differ between two descriptions."""
    held_out = "" if config.data.eval else " (the rows held out of it)"
    sources = {
        "train": config.data.train,
        "eval": f"{config.data.eval or config.data.train}{held_out}",
        "base": f"model.source={config.model.source}",
        "tokenizer": f"the tokenizer of model.source={config.model.source}",
        "start": f"adapter.start={config.adapter.start}",
        "partition": "the division of rows",
    }
    if config.task.env is not None:
        sources |= {"eval": f"task.env={config.task.env}", "partition": "the clients' environments"}
    differ = {name: _differing(name, was.get(name, {}), now.get(name, {})) for name in sources}
    if differ["tokenizer"]:  # of which other tokens follow
        differ |= {name: [part for part in differ[name] if part not in _TOKENS] for name in ("train", "eval")}
    if "classes" in differ["train"]:  # they name the outputs of a head, and the labels of the evaluation
        differ |= {"eval": [part for part in differ["eval"] if part != "classes"], "base": []}
    if differ["train"]:  # other rows are divided otherwise
        differ["partition"] = []
    changed = dict.fromkeys(
        f"{sources[name]} changed since ({', '.join(parts)})" for name, parts in differ.items() if parts
    )
    if changed:
        raise RunError(
            f"{'; '.join(changed)}: {folder} was begun with what was there before; put it back, or start anew with "
            "another --out"
        )


def _differing(source: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    unknown = {part for known, part in _NEWER if known == source and part not in then}
    parts = [part for part in {**then, **now} if then.get(part) != now.get(part) and part not in {*unknown, _PLAIN}]
    return [f"{then.get(part)} rows then, {now.get(part)} now" if part == "rows" else part for part in parts]


def _describe(data: Dataset | Episodes) -> dict[str, Any]:
    if isinstance(data, Episodes):
        return data.digests()
    written = [] if data.target_starts is None else [data.target_starts]
    targets = {} if data.targets is None else {"targets": _digest([data.targets, *written])}
    columns = [np.asarray(values) for _, values in sorted(data.columns.items())]
    return {
        "rows": len(data),
        **_described_inputs(data),
        **targets,
        "labels": _digest([data.labels]),
        "classes": hashlib.sha256("\0".join(data.names).encode()).hexdigest(),
    } | ({"columns": _digest(columns)} if columns else {})


def _described_inputs(data: Dataset) -> dict[str, str]:
    if data.pixels is not None:
        return {"images": _digest([data.pixels.bytes, data.pixels.scale, data.pixels.shift])}
    types = [] if data.types is None else [data.types]
    return {"tokens": _digest([data.ids, data.starts, *types])}


def _digest(arrays: Iterable[np.ndarray]) -> str:
    """Of arrays, their shapes and types: SHA-256, hexadecimal."""
    digest = hashlib.sha256()
    for each in arrays:
        digest.update(f"{each.shape} {each.dtype}\n".encode())
        digest.update(np.ascontiguousarray(each).data if each.size else b"")
    return digest.hexdigest()
