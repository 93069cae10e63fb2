"""Federation: the parts of a run, assembled for the clients that are held here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peerlora.algorithms.base import Algorithm
from peerlora.config.run import RunConfig
from peerlora.config.task_kinds import task_kind
from peerlora.data.dataset import Dataset
from peerlora.data.partition import Partition
from peerlora.data.tokens import tokenizer_digest
from peerlora.exchange.base import MeteredExchange
from peerlora.lora.adapter_init import orthogonal_factors, with_factors
from peerlora.lora.adapter_start import read_adapter
from peerlora.lora.adapters import Adapters, AdapterSpec, initial_adapters
from peerlora.lora.attach import StackedModel
from peerlora.lora.base_digest import base_digest, config_digest, digest_of
from peerlora.lora.peft_io import ExportContext
from peerlora.lora.peft_model import PeftAdapter
from peerlora.randomness import torch_generator
from peerlora.runtime.resources import DTYPES
from peerlora.runtime.virtual_clock import VirtualClock
from peerlora.topology.schedule import Topology
from peerlora.train.base import Learner
from peerlora.train.kernels.selection import Paths
from peerlora.train.kernels.speed import Speed
from peerlora.train.online.episodes import ClientEnvironments, Episodes


@dataclass(frozen=True)
class Federation:
    """Everything that a runtime needs for the clients it holds."""

    config: RunConfig
    algorithm: Algorithm[Any]
    topology: Topology
    partition: Partition | ClientEnvironments
    train_data: Dataset | Episodes
    """Of which ``own_rows`` are rows.  Of a flow policy, whose clients learn from what they meet, ``eval_data``."""
    eval_data: Dataset | Episodes
    model: StackedModel | PeftAdapter
    """The latter where a training loop of the user's own has it."""
    learner: Learner
    exchange: MeteredExchange
    start: Adapters
    export: ExportContext
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    """What there is to know about the run, such as what its method chose, and speeds that were measured."""
    speed: Speed
    paths: Paths
    originals: dict[str, str]
    """Digests of weights that the base came with, by name, where the adapters' start changed them."""
    attackers: tuple[int, ...] = ()
    """Clients whose results don't count."""
    clock: VirtualClock | None = None
    own_rows: tuple[np.ndarray, ...] = ()
    """[client] of those held here, the training rows that each is scored on and does not train on; empty: none are."""

    @property
    def honest_rows(self) -> list[int]:
        """The rows, of the clients held here, whose results count."""
        attackers = set(self.attackers)
        return [row for row, client in enumerate(self.exchange.clients) if client not in attackers]

    @cached_property
    def base_digest(self) -> str:
        """By which other sites, and this run when it is resumed, know the same base model."""
        halved = self.config.train.dtype == "auto"
        if isinstance(self.model, PeftAdapter):
            return self.model.digest(halved)
        return base_digest(self.model.base, halved, self.originals)

    @cached_property
    def start_digest(self) -> str | None:
        """By which other sites know the same start, where it comes out of a PEFT model or a folder; else None."""
        spec, first = self.start.spec, self.start.flat[0]
        if isinstance(self.model, PeftAdapter):
            return None if len(set(self.config.ranks)) > 1 else digest_of({"start": first[: spec.shared.stop]})
        if self.config.adapter.start is None:
            return None
        drawn = self.model.head()  # by each site, from the seed: the last bits depend on its processor
        parts = {f"{slot.block} {slot.name}": first[slot.start : slot.stop] for slot in spec.slots}
        for name, value in drawn.items():
            if spec.private_head or torch.equal(value.flatten().to(first), parts[f"head {name}"]):
                del parts[f"head {name}"]
        return digest_of(parts)

    @cached_property
    def beside_weights(self) -> dict[str, str]:
        """Digests of what decides a score beside weights and settings: the tokenizer's rules, and config.json."""
        base = self.model.model if isinstance(self.model, PeftAdapter) else self.model.base
        kind, tokenizer = task_kind(self.config.task.kind), self.export.tokenizer
        found = {"model-config": config_digest(base)}
        if tokenizer is not None and not kind.reads_images:
            found["tokenizer"] = tokenizer_digest(tokenizer, kind.is_chat)
        return {name: digest for name, digest in found.items() if digest is not None}


def adapter_spec(config: RunConfig, model: StackedModel) -> AdapterSpec:
    """The layout of a client's adapters."""
    adapter = config.adapter
    return model.spec(max(config.ranks), adapter.alpha, adapter.head == "private", adapter.rslora)


def start_adapters(
    config: RunConfig, model: StackedModel, export: ExportContext, here: Sequence[int]
) -> tuple[Adapters, tuple[str, ...]]:
    """The adapters that the clients held here begin with, and warnings."""
    every_rank = config.ranks
    ranks = [every_rank[i] for i in here]
    adapter, spec = config.adapter, adapter_spec(config, model)
    generator = torch_generator(config.seed, "adapter")
    start = initial_adapters(spec, ranks, model.head(), generator, DTYPES[config.train.dtype])
    warnings = ()
    if export.principal is not None:
        start = with_factors(start, export.principal.factors)
    if adapter.init == "orthogonal":
        start = with_factors(start, orthogonal_factors(spec, generator))
    if adapter.start is not None:
        start, warnings = read_adapter(Path(adapter.start), start, model, export)
    return start.to(config.device), warnings
