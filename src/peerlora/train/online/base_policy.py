"""Base policies as folders of ``flow.json`` and ``model.safetensors``: read, or pre-trained and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peerlora.errors import ModelError, first_line
from peerlora.files import sync_tree
from peerlora.randomness import torch_generator
from peerlora.train.online.demonstrations import demonstrate, prepare_net, pretrain
from peerlora.train.online.flow import CRITIC, FLOW, FlowPolicy, FlowShape, draw_layers

_FORMAT = 1  # of a folder; raise it whenever the same settings would give other weights
_LARGEST = 1 << 20  # bytes of flow.json
SETTINGS, WEIGHTS = "flow.json", "model.safetensors"


@dataclass(frozen=True)
class PretrainingSettings:
    """What the weights of a pre-trained policy depend on."""

    env: str
    horizon: int
    demonstrations: int
    steps: int
    shape: FlowShape

    def digest(self) -> str:
        """A name that no other settings have: hexadecimal."""
        settings = {**asdict(self), "shape": self.shape.to_dict()}
        return hashlib.sha256(json.dumps([_FORMAT, settings], sort_keys=True).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class BasePolicy:
    """A frozen policy, and the folder that it lies in."""

    policy: FlowPolicy
    folder: Path


def is_base_policy(folder: Path) -> bool:
    """Whether a folder is that of a base policy."""
    return (folder / SETTINGS).is_file()


def scripted_policy(settings: PretrainingSettings, cache: Path) -> BasePolicy:
    """The policy that is pre-trained on scripted demonstrations: from the cache, or made and kept there.

    A folder of the cache that is not whole is made anew: its weights follow from the settings.  Raises ModelError where
    the cache cannot be written to: adapters need a base that can be found again.
    """
    folder = cache / f"{settings.env.replace('/', '_')}-{settings.digest()}"
    try:
        return read_policy(folder, settings.env, settings.shape)
    except ModelError:  # it is not there, or damaged
        pass
    try:
        _remove(folder)  # before the long work, since another process may have made it by then
        policy = FlowPolicy(settings.shape)
        demonstrations = demonstrate(settings.env, settings.horizon, settings.demonstrations)
        pretrain(policy, demonstrations, settings.steps)
        prepare_net(policy, demonstrations, settings.steps)
        write_policy(policy, settings.env, folder)
    except OSError as error:
        raise ModelError(
            f"the pre-trained policy cannot be kept in {folder} ({first_line(error)}); make room, or set "
            "XDG_CACHE_HOME to a folder that can be written to"
        ) from None
    return read_policy(folder, settings.env, settings.shape)


def _remove(folder: Path) -> None:
    """Take a folder away, if it is there, in one step; raises OSError where it may not."""
    away = folder.with_name(f"{folder.name}.{os.getpid()}.old")
    with suppress(FileNotFoundError):  # also where another process was faster
        os.replace(folder, away)
    shutil.rmtree(away, ignore_errors=True)


def write_policy(policy: FlowPolicy, env: str, folder: Path) -> None:
    """Write a policy's blocks and net as a folder that is whole or not there; a critic belongs to a run."""
    half = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    tree = {"format": _FORMAT, "env": env, **policy.config.to_dict()}
    (half / SETTINGS).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    save_file({name: value.contiguous() for name, value in _weights(policy).items()}, half / WEIGHTS)
    sync_tree(half)
    try:
        os.replace(half, folder)
    except OSError:
        shutil.rmtree(half, ignore_errors=True)
        if not (folder / WEIGHTS).is_file():  # else another process was faster
            raise


def read_policy(folder: Path, env: str, shape: FlowShape) -> BasePolicy:
    """The policy in a folder, in float32, for an environment and of a shape.

    Raises ModelError where it is missing, damaged, or made for another environment or of another shape.
    """
    tree = _read_settings(folder)
    wanted = {"format": _FORMAT, "env": env, **asdict(shape)}
    tree = {"actor": FLOW, **tree}
    for name, value in wanted.items():
        if tree.get(name) != value:
            raise ModelError(
                f"model.source={folder}: {SETTINGS} has {name}={tree.get(name)!r}, the run {value!r}; give a folder "
                "for this environment and these task settings, or leave model.source out"
            )
    policy = FlowPolicy(shape)
    try:
        found = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model.source={folder}: {WEIGHTS} cannot be read ({first_line(error)}); restore it") from None
    own = _weights(policy)
    fits = found.keys() == own.keys() and all(
        value.shape == own[name].shape and value.dtype == own[name].dtype and bool(value.isfinite().all())
        for name, value in found.items()
    )
    if not fits:
        raise ModelError(f"model.source={folder}: {WEIGHTS} does not hold the finite weights of {SETTINGS}; restore it")
    policy.load_state_dict({**_named(found), **policy.critic.state_dict(prefix=f"{CRITIC}.")})
    return BasePolicy(policy.requires_grad_(False), folder)


def with_critic(policy: FlowPolicy, seed: int, dtype: torch.dtype) -> FlowPolicy:
    """A copy in this precision, whose critic is drawn from a run's seed."""
    made = FlowPolicy(policy.config)
    made.load_state_dict(policy.state_dict())
    made = made.to(dtype).requires_grad_(False)
    draw_layers(made.critic, torch_generator(seed, "head"))
    return made


def _weights(policy: FlowPolicy) -> dict[str, Tensor]:
    """What a folder holds: the blocks' weights by their names below ``blocks``, and those of a net by its own."""
    return {**policy.blocks.state_dict(), **policy.actor.state_dict(prefix="actor.")}


def _named(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a folder by their names in the policy."""
    return {name if name.startswith("actor.") else f"blocks.{name}": value for name, value in weights.items()}


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    if not is_base_policy(folder):
        raise ModelError(
            f"model.source={folder}: no {SETTINGS} there; give the folder of a pre-trained flow policy, or leave "
            "model.source out, which pre-trains one"
        )
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes")
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("no mapping")
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({first_line(error)}); restore it") from None
    return tree
