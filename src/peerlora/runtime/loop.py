"""A run whose local steps a training loop of the user's own takes: its settings, its refusals and its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from peerlora.algorithms import build_algorithm
from peerlora.algorithms.base import Algorithm
from peerlora.algorithms.compatibility import cache_settings
from peerlora.config.run import RunConfig
from peerlora.config.task_kinds import task_kind
from peerlora.data.dataset import Dataset
from peerlora.data.partition import Partition
from peerlora.errors import CompositionError, ConfigError
from peerlora.exchange.stacked import StackedExchange
from peerlora.lora.adapters import Adapters
from peerlora.lora.peft_io import ExportContext
from peerlora.lora.peft_model import PeftAdapter
from peerlora.runs.resume import flatten
from peerlora.runtime.compose import Federation
from peerlora.runtime.exchange_stack import build_exchange
from peerlora.runtime.plan import Plan
from peerlora.runtime.trainer import CheckpointRule
from peerlora.train.kernels.speed import Speed
from peerlora.train.loop_learner import LoopLearner

_KEPT = {
    "adapter": ("rank", "alpha", "rslora", "head"),
    "train": ("rounds", "quiet", "local_steps", "optimizer", "optimizer_state", "max_seconds"),
    "eval": ("every",),
}
"""Settings that count, of sections in which others are the loop's own."""
_OWN = ("model", "task", "data", "partition", "device", "threads", "clock", "adversary", "privacy")
"""Sections and settings that are the loop's own."""
NOTE = (
    "local steps are those of a training loop of the user's own: rows, loss, optimiser and learning rate are the "
    "loop's, and what the settings say of them does not count"
)


class OwnLoop(Protocol):
    """A training loop of the user's own, as far as a peer's run depends on it."""

    checkpoints: CheckpointRule | None
    """None: as the config says."""

    @property
    def left(self) -> bool:
        """Whether the loop has ended by an error, so that its run need not wait for neighbours any more."""
        ...

    def assemble(self, planned: Plan, client: int, begun: Path | None) -> Federation:
        """Build the Federation; ``begun``: the folder of a run that goes on."""
        ...

    def keep_start(self, folder: Path) -> None:
        """Keep what the run begins with in its folder."""
        ...


def check_settings(config: RunConfig) -> None:
    """Check what can be known of a loop's run before there is a model.

    Raises ConfigError for settings that a loop has itself or cannot follow, CompositionError for a method that leaves
    no steps to one.
    """
    if task_kind(config.task.kind).acts:
        raise ConfigError(
            f"task.kind={config.task.kind} given, whose clients act in environments; a training loop of your own "
            "learns from rows: drop it, or train by `peerlora train` or `peerlora peer`"
        )
    _require_defaults(config)
    algorithm = build_algorithm(config.algorithm.name, config.algorithm.parameters)
    _check_method(config.algorithm.name, algorithm)
    cache = cache_settings(config, algorithm)
    if cache is not None and cache.weights == "rows":
        section = "exchange.relay" if config.exchange.relay else "algorithm"
        raise ConfigError(
            f"{section}.weights=rows given; only a training loop of your own knows how many rows it has, and others "
            f"are not told: use {section}.weights=uniform"
        )


def loop_config(config: RunConfig, adapter: PeftAdapter, optimizer: torch.optim.Optimizer) -> RunConfig:
    """The config, which ``check_settings`` has passed, of a run whose adapter and optimiser one client's loop has.

    Raises ConfigError for settings that the PEFT model contradicts.
    """
    if adapter.spec.head and config.adapter.head == "frozen":
        raise ConfigError(
            f"adapter.head=frozen given, the PEFT model trains {adapter.spec.head[0][0]} in full; use "
            "adapter.head=mixed or private, or leave it out of LoraConfig(modules_to_save=...)"
        )
    found: dict[str, Any] = {"alpha": float(adapter.config.lora_alpha), "rslora": bool(adapter.config.use_rslora)}
    if not isinstance(config.adapter.rank, list):  # a list is of all clients
        found["rank"] = adapter.rank
    unset = RunConfig().adapter
    for name, value in found.items():
        given = getattr(config.adapter, name)
        if given not in (getattr(unset, name), value):
            raise ConfigError(f"adapter.{name}={given} given, the PEFT model has {value}; make them equal, or drop it")
    kind = "sgd" if isinstance(optimizer, torch.optim.SGD) else "adamw"
    sections = {
        "adapter": found,
        "train": {"optimizer": kind, "dtype": "fp64" if adapter.dtype == torch.float64 else "fp32"},
        "model": {"source": adapter.source, "quantize": adapter.quantisation},
    }
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=changed)


def _check_method(name: str, algorithm: Algorithm[Any]) -> None:
    """Raise CompositionError for a method that cannot leave its local steps to a loop."""
    if reason := algorithm.traits.own_loop_refusal():
        raise CompositionError(
            f"{name} cannot leave its local steps to a training loop of your own: {reason}; use another method, "
            "such as algorithm.name=adf-lora or dec-lora"
        )


def assemble_loops(
    planned: Plan, adapter: PeftAdapter, start: Adapters, learner: LoopLearner, clients: Sequence[int], *notes: str
) -> Federation:
    """Build the Federation of these clients, whose model and rows are their loops' own.

    ``start``: what they begin with, a row each.  ``notes``: further ones for the run.
    """
    config = planned.config.model_copy(update={"threads": torch.get_num_threads()})  # of this process, to be told
    rows = dict.fromkeys(range(config.clients) if len(clients) == config.clients else clients, 1)
    exchange = StackedExchange(planned.topology, clients)
    cache = cache_settings(config, planned.algorithm)
    location = adapter.source
    return Federation(
        config=config,
        algorithm=planned.algorithm,
        topology=planned.topology,
        partition=Partition((), (), np.zeros((len(clients), 1), np.int64), ()),
        train_data=_no_rows(),
        eval_data=_no_rows(),
        model=adapter,
        learner=learner,
        exchange=build_exchange(config, exchange, start, (), cache, rows),
        start=start,
        export=ExportContext(adapter.source, adapter.task_type or "", 0.0, location=location),
        warnings=planned.warnings,
        notes=(*planned.notes, NOTE, *notes),
        speed=Speed(config.train.dtype, packed=False),
        paths={},
        originals={},
        clock=None,
    )


def start_of(adapters: Sequence[PeftAdapter]) -> Adapters:
    """The values of PEFT models as one set of adapters; their layouts are the same."""
    own = [each.adapters() for each in adapters]
    return replace(own[0], flat=torch.cat([x.flat for x in own]), ranks=torch.cat([x.ranks for x in own]))


def _no_rows() -> Dataset:
    nothing = np.zeros(0, np.int64)
    return Dataset(nothing.astype(np.int32), np.zeros(1, np.int64), None, nothing, ())


def require_rank(config: RunConfig, adapter: PeftAdapter, client: int) -> None:
    """Raise ConfigError where a client's PEFT model has another rank than the config gives it."""
    given = config.ranks[client]
    if given != adapter.rank:
        raise ConfigError(
            f"adapter.rank={given} given for client {client}, its PEFT model has rank {adapter.rank}; make them equal"
        )


def _require_defaults(config: RunConfig) -> None:
    """Raise ConfigError for the first setting of the loop's own that has another value than its default."""
    unset = {"clients": config.clients, "algorithm": config.algorithm.model_dump(), "recipe": config.recipe}
    unset |= {"topology": config.topology.model_dump()}
    default = flatten(RunConfig.model_validate(unset).model_dump(mode="json"))
    for name, value in flatten(_own(config.model_dump(mode="json"))).items():
        if name in default and default[name] == value or name not in default and value is None:
            continue
        raise ConfigError(
            f"{name}={value!r} given, which a training loop of your own decides itself; drop it, or train by "
            "`peerlora peer`"
        )


def _own(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that belong to a loop."""
    parts = {name: {key: value for key, value in tree[name].items() if key not in kept} for name, kept in _KEPT.items()}
    return {name: tree[name] for name in _OWN} | parts
