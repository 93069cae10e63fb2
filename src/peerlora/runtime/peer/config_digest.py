"""What all peers of a run must have in common, as short hashes that a greeting can carry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from peerlora.config.run import RunConfig
from peerlora.config.sections import AdapterConfig, DataConfig, TaskConfig
from peerlora.config.train import TrainConfig
from peerlora.data.pixels import Pixels
from peerlora.lora.adapters import AdapterSpec

_SITE = ("model", "device", "threads", "privacy", "eval", "checkpoint", "track", "cluster")  # a site's own business
_NAMED = ("recipe",)  # its settings are compared, wherever they come from
_SITE_TRAIN = ("fast", "block", "max_seconds")
_NEWER_NAMES = ("schedule", "warmup", "floor", "decay", "quiet", "accumulate", "class_weights", "epochs", "head_rate")
_NEWER = {name: TrainConfig.model_fields[name].default for name in _NEWER_NAMES}
"""Settings that older versions lack, with the values by which a run is as it was before: then their hashes agree."""
_NEWER_ADAPTER = {
    name: AdapterConfig.model_fields[name].get_default() for name in ("rslora", "init", "modules_to_save")
}
_READING = ("template", "loss_on", "too_long")  # of chats, which all sites must read alike
_NEWER_DATA = {name: DataConfig.model_fields[name].default for name in (*_READING, "columns")}
_NEWER_TASK = {name: TaskConfig.model_fields[name].default for name in ("env", "blocks", "width")}
_SITE_PEER = ("join", "audit_days", "quorum")


def section_hashes(
    config: RunConfig, names: Sequence[str], start_digest: str | None = None, pixels: Pixels | None = None
) -> dict[str, str]:
    """A hash per section, and one of the class names in order of their ids, which a site may have read from its file.

    Where data lie is left out if every site has its own; the model has hashes of its own.  ``start_digest``: of the
    adapter to start from, once that was read.  ``pixels``: of images, whose image processor lies beside the model.
    """
    tree = {name: value for name, value in config.model_dump(mode="json").items() if name not in (*_SITE, *_NAMED)}
    tree["train"] = _without_defaults(_without(tree["train"], _SITE_TRAIN), _NEWER)
    tree["task"] = _without_defaults(tree["task"], _NEWER_TASK)
    if config.task.env is None:  # then no site has a use for it
        del tree["online"]
    tree["peer"] = _without(tree["peer"], _SITE_PEER)
    if tree["exchange"]["relay"] is None:  # then a site agrees with one whose version does not know the setting
        del tree["exchange"]["relay"]
    if not tree["exchange"]["secure"]:
        del tree["exchange"]["secure"]
    tree["adapter"] = _without_defaults(tree["adapter"], _NEWER_ADAPTER)
    start = tree["adapter"].pop("start")
    tree["adapter.start"] = start_digest or (start and _file(Path(start) / "adapter_model.safetensors"))
    tree["data"] = _without_defaults(tree["data"], _NEWER_DATA)
    if config.partition.kind == "own":
        read = {name: tree["data"][name] for name in _READING if name in tree["data"]}
        tree["data"] = {"max_length": config.data.max_length, "texts": len(config.data.text), **read}
    tree["labels"] = list(names)
    if pixels is not None:
        tree["image-processor"] = [pixels.shape, *_black_and_white(pixels)]
    return {name: _hash(json.dumps(value, sort_keys=True).encode()) for name, value in tree.items()}


def _black_and_white(pixels: Pixels) -> list[str]:
    """What a model reads of the darkest and the lightest byte, by channel, to where processors round alike."""
    ends = np.concatenate([pixels.shift, 255 * pixels.scale + pixels.shift])
    return [f"{round(value, 3) + 0.0:.3f}" for value in ends.tolist()]  # never -0


def spec_digest(spec: AdapterSpec) -> str:
    """Of the layout that all clients' adapters have: SHA-256, hexadecimal."""
    layout = asdict(spec)
    if not spec.rslora:  # then a site agrees with one whose version does not know it
        del layout["rslora"]
    return hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest()


def _without(section: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in names}


def _without_defaults(section: dict[str, Any], newer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in newer or value != newer[name]}


def _file(path: Path) -> str:
    return _hash(path.read_bytes()) if path.is_file() else "missing"


def _hash(data: bytes) -> str:
    return shortened(hashlib.sha256(data).hexdigest())


def shortened(digest: str) -> str:
    """A digest as short as a greeting carries it."""
    return digest[:16]
