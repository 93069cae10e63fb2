"""Compose: plan a run, load data and model, and assemble the parts into a Federation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from peerlora.algorithms.base import Algorithm
from peerlora.algorithms.compatibility import cache_settings, check_relayed_message
from peerlora.algorithms.merging import check_merges
from peerlora.config.run import RunConfig
from peerlora.data.batches import Shards
from peerlora.data.dataset import Dataset
from peerlora.data.holdout import set_aside_own
from peerlora.data.partition import Partition, count_labels, own_rows, partition
from peerlora.errors import DataError
from peerlora.exchange.base import MeteredExchange
from peerlora.exchange.blocks import BlockExchange, RowExchange
from peerlora.exchange.gossip_sum import NetworkSum
from peerlora.exchange.stacked import StackedExchange
from peerlora.exchange.wrapper import unwrap
from peerlora.lora.adapter_init import orthogonal_factors, with_factors
from peerlora.lora.adapter_start import read_adapter
from peerlora.lora.adapters import Adapters, initial_adapters
from peerlora.lora.attach import StackedModel
from peerlora.lora.base_digest import base_digest
from peerlora.lora.peft_io import ExportContext
from peerlora.randomness import numpy_generator, torch_generator
from peerlora.runtime.exchange_stack import build_exchange, poison_labels
from peerlora.runtime.plan import Plan, plan
from peerlora.runtime.resources import DTYPES, RunResources, build_model, load_resources
from peerlora.runtime.virtual_clock import VirtualClock
from peerlora.topology.schedule import Topology
from peerlora.train.kernels.selection import Paths, graph_size
from peerlora.train.kernels.speed import Speed
from peerlora.train.learner import StackedLearner
from peerlora.train.loss_rules import ClassWeights, LabelPrior
from peerlora.train.metrics import absent_classes
from peerlora.train.tasks import task


@dataclass(frozen=True)
class Block:
    """The clients of one worker of a cluster."""

    tiles: Sequence[Sequence[int]]
    """Clients that share a graph, see ``train.block``; their numbers rise."""
    rows: RowExchange


@dataclass(frozen=True)
class Federation:
    """Everything that a runtime needs for the clients it holds."""

    config: RunConfig
    algorithm: Algorithm[Any]
    topology: Topology
    partition: Partition
    train_data: Dataset
    eval_data: Dataset
    model: StackedModel
    learner: StackedLearner
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
        return [row for row, client in enumerate(self.exchange.clients) if client not in self.attackers]

    @cached_property
    def base_digest(self) -> str:
        """By which other sites, and this run when it is resumed, know the same base model."""
        return base_digest(self.model.base, self.config.train.dtype == "auto", self.originals)


def compose(
    config: RunConfig,
    *,
    resources: RunResources | None = None,
    partitioner: Any = None,
    clients: Sequence[int] | None = None,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    speed: Speed | None = None,
) -> Federation:
    """Plan a run, load what it needs, and assemble it; nothing is written.

    ``clients``: those to hold here (all by default), with ``gather`` to collect the others' rows.  ``partitioner``:
    an instance of a flwr-datasets partitioner to use in place of ``config.partition``.  ``speed``: that of a run which
    is resumed; None: the best on this machine.
    """
    planned = plan(config, clients)
    return assemble(planned, resources or load_resources(config), clients, gather, partitioner, speed)


def assemble(
    planned: Plan,
    resources: RunResources,
    clients: Sequence[int] | None = None,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    partitioner: Any = None,
    speed: Speed | None = None,
    block: Block | None = None,
) -> Federation:
    """Divide the rows, attach the adapters and build learner and exchange; arguments as in `compose`.

    ``block``: of a cluster's worker, in place of ``clients`` and ``gather``.
    Raises DataError, ModelError or CompositionError for what only data and model can show.
    """
    config, topology, attacking = planned.config, planned.topology, planned.attackers
    clients = clients if block is None else [client for tile in block.tiles for client in tile]
    here = list(range(config.clients) if clients is None else clients)
    divided, own = _divided(config, resources, here, partitioner)
    divided, held = _set_aside(config, resources.train_data, divided, here if own else range(config.clients))
    built = build_model(config, resources, speed)
    model, export, paths = built.model, built.export, built.paths
    start, start_warnings = start_adapters(config, model, export, here)
    check_merges(config.algorithm.name, planned.algorithm, topology, config.train.rounds, start, model.base)
    check_relayed_message(config, planned.algorithm, start.rows([0]))
    rows = divided.shards if own else [divided.shards[i] for i in here]
    learned = poison_labels(config, resources.train_data, [divided.shards[i] for i in attacking])
    batches = [config.batches[i] for i in here]
    shards = Shards(learned, rows, batches, here, config.seed, config.train.batches == "by-length")
    cache, rows_of = cache_settings(config, planned.algorithm), _rows_of(divided, own, here)
    graph = graph_size(model.base, paths)
    learner = StackedLearner(
        model, task(config.task.kind), shards, config.train, resources.tokenizer.pad_token_id, graph
    )
    learner.shares_prefix = resources.share_prefix
    if block is not None:
        learner.hold_block([len(tile) for tile in block.tiles], sum(config.batches))
    plain = StackedExchange(topology, here, gather) if block is None else BlockExchange(topology, here, block.rows)
    if config.train.label_prior != "none":
        learner.loss_rules += (LabelPrior(divided.counts if own else divided.counts[here], config.train.label_prior),)
    if config.train.class_weights != "none":
        learner.loss_rules += (class_weights(config.train.class_weights, shards),)
    return Federation(
        config=config,
        algorithm=planned.algorithm,
        topology=topology,
        partition=divided,
        train_data=resources.train_data,
        eval_data=resources.eval_data,
        model=model,
        learner=learner,
        exchange=build_exchange(config, plain, start, attacking, cache, rows_of),
        start=start,
        export=export,
        warnings=(
            *planned.warnings,
            *divided.warnings,
            *built.warnings,
            *start_warnings,
            *absent_classes(config.eval.metrics, resources.eval_data),
        ),
        notes=(*planned.notes, *built.speed.notes(config.train.dtype)),
        speed=built.speed,
        paths=paths,
        originals=built.originals,
        clock=planned.clock,
        attackers=attacking,
        own_rows=held if own or not held else tuple(held[i] for i in here),
    )


def _divided(config: RunConfig, resources: RunResources, here: list[int], partitioner: Any) -> tuple[Partition, bool]:
    """The rows of every client, and whether they are those of this site alone."""
    data, own = resources.train_data, config.partition.kind == "own" and partitioner is None
    if own:
        return own_rows(data, here[0]), True
    return partition(partitioner or config.partition, data, config.clients, config.seed), False


def _set_aside(
    config: RunConfig, train: Dataset, divided: Partition, clients: Sequence[int]
) -> tuple[Partition, tuple[np.ndarray, ...]]:
    """What clients train on, and the rows of their own that they are scored on; none without ``eval.own``."""
    if not config.eval.own:
        return divided, ()
    return set_aside_own(divided, train, config.data.holdout, config.seed, clients)


def class_weights(weights: Literal["none", "balanced"] | list[float], shards: Shards) -> ClassWeights:
    """The class weights of clients by the labels that each learns from; raises DataError where they do not fit."""
    assert weights != "none"
    names = shards.data.names
    if weights != "balanced" and len(weights) != len(names):
        raise DataError(
            f"train.class_weights lists {len(weights)} numbers, the data have {len(names)} labels "
            f"({', '.join(names)}); give one number per label, in this order"
        )
    return ClassWeights(np.stack([count_labels(shards.data, own) for own in shards.shards]), weights)


def _rows_of(divided: Partition, own: bool, here: list[int]) -> dict[int, int]:
    """Client -> training rows, of all clients; of a site with a file of its own, of that one alone."""
    return dict(zip(here if own else range(len(divided.shards)), map(len, divided.shards), strict=True))


def opening_state(federation: Federation, sum_of: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Start the method, once clients know what their losses need to know of each other.

    ``sum_of`` adds up a [client, ...] tensor over the network; by default by gossip over the federation's exchange.
    """
    sum_of = sum_of or NetworkSum(unwrap(federation.exchange), federation.topology)
    for rule in federation.learner.loss_rules:
        rule.agree(sum_of)
    return federation.algorithm.start(federation.start, federation.exchange)


def start_adapters(
    config: RunConfig, model: StackedModel, export: ExportContext, here: Sequence[int]
) -> tuple[Adapters, tuple[str, ...]]:
    """The adapters that the clients held here begin with, and warnings."""
    ranks = [config.ranks[i] for i in here]
    adapter = config.adapter
    spec = model.spec(max(config.ranks), adapter.alpha, adapter.head == "private", adapter.rslora)
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


def evaluation_rows(federation: Federation) -> Dataset:
    """The rows that clients are evaluated on during the run: a seeded sample of ``eval.rows``, or all."""
    data, wanted = federation.eval_data, federation.config.eval.rows
    if wanted is None or wanted >= len(data):
        return data
    draw = numpy_generator(federation.config.seed, "evaluation").choice(len(data), wanted, replace=False)
    return data.take(np.sort(draw))


def resolve_threads(threads: int | None) -> int:
    """The CPU threads to use: as asked, or one per core that this process may use.

    Not fewer when the machine is busy: the number decides the order of additions, and so the last bits of a result.
    """
    return threads or len(os.sched_getaffinity(0))


_COMPILED = "64"  # products that oneDNN keeps compiled, by shape; its 1,024 grow for a thousand rounds of ragged rows


def use_threads(config: RunConfig) -> None:
    """Set the threads of this process as a run asks, and bound what it keeps compiled."""
    torch.set_num_threads(resolve_threads(config.threads))
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _COMPILED)
