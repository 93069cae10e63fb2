"""Turn a config into the parts of a run, and refuse parts that don't work together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peerlora.algorithms import build_algorithm
from peerlora.algorithms.base import Algorithm, is_asynchronous, prepare
from peerlora.algorithms.merging import check_merges
from peerlora.config.run import RunConfig
from peerlora.data.batches import Shards
from peerlora.data.dataset import Dataset
from peerlora.data.partition import Partition, own_rows, partition
from peerlora.exchange.attacks import attackers
from peerlora.exchange.base import MeteredExchange
from peerlora.exchange.gossip_sum import gossip_rounds, network_sum
from peerlora.exchange.stacked import StackedExchange
from peerlora.exchange.wrapper import unwrap
from peerlora.lora.adapters import Adapters, initial_adapters
from peerlora.lora.attach import StackedModel
from peerlora.lora.peft_io import ExportContext, read_adapter
from peerlora.randomness import numpy_generator, torch_generator
from peerlora.runtime.checks import check_composition, check_memory, check_own
from peerlora.runtime.exchange_stack import attack_notes, build_exchange, poison_labels
from peerlora.runtime.plan import build_clock
from peerlora.runtime.resources import DTYPES, RunResources, _model, load_resources
from peerlora.runtime.virtual_clock import VirtualClock
from peerlora.topology.schedule import Topology, build_topology
from peerlora.train.kernels.selection import Paths, graph_size
from peerlora.train.learner import Learner
from peerlora.train.loss_rules import LabelPrior
from peerlora.train.tasks import TASKS


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
    learner: Learner
    exchange: MeteredExchange
    start: Adapters
    export: ExportContext
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    """What the method has to say about the run, such as what it chose."""
    paths: Paths
    attackers: tuple[int, ...] = ()
    """Clients whose results don't count."""
    clock: VirtualClock | None = None


def compose(
    config: RunConfig,
    *,
    resources: RunResources | None = None,
    partitioner: Any = None,
    clients: Sequence[int] | None = None,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Federation:
    """Load and check everything; nothing is written.

    ``clients``: those to hold here (all by default), with ``gather`` to collect the others' rows.  ``partitioner``:
    an instance of a flwr-datasets partitioner to use in place of ``config.partition``.
    """
    check_own(config, clients)
    algorithm = build_algorithm(config.algorithm.name, config.algorithm.parameters)
    check_memory(config.clients)
    clock = build_clock(config, algorithm)
    topology = build_topology(config.topology, config.clients, config.seed)
    topology = replace(topology, interrupted=clock is not None and clock.interrupts and not is_asynchronous(algorithm))
    warnings = check_composition(config, algorithm, topology)
    attacking = attackers(config.adversary, config.clients, config.seed)
    algorithm, notes = prepare(algorithm, topology, config.train.rounds)
    resources = resources or load_resources(config)
    train_data, eval_data = resources.train_data, resources.eval_data
    here = list(range(config.clients) if clients is None else clients)
    own = config.partition.kind == "own" and partitioner is None
    divided = (
        own_rows(train_data, here[0])
        if own
        else partition(partitioner or config.partition, train_data, config.clients, config.seed)
    )
    model, export, paths = _model(config, resources)
    start = _start(config, model, here)
    check_merges(config.algorithm.name, algorithm, topology, config.train.rounds, start, model.base)
    batches, rows = [config.batches[i] for i in here], divided.shards if own else [divided.shards[i] for i in here]
    learned = poison_labels(config, train_data, [divided.shards[i] for i in attacking])
    shards = Shards(learned, rows, batches, here, config.seed, config.train.batches == "by-length")
    graph = graph_size(model.base, paths)
    learner = Learner(model, TASKS[config.task.kind], shards, config.train, resources.tokenizer.pad_token_id, graph)
    if config.train.label_prior != "none":
        learner.loss_rules += (LabelPrior(divided.counts if own else divided.counts[here], config.train.label_prior),)
    return Federation(
        config=config,
        algorithm=algorithm,
        topology=topology,
        partition=divided,
        train_data=train_data,
        eval_data=eval_data,
        model=model,
        learner=learner,
        exchange=build_exchange(config, StackedExchange(topology, here, gather), start, attacking),
        start=start,
        export=export,
        warnings=(*warnings, *divided.warnings),
        notes=(*notes, *_prior_notes(config, topology), *attack_notes(config, attacking)),
        paths=paths,
        clock=clock,
        attackers=attacking,
    )


def opening_state(federation: Federation, sum_of: Callable[[Tensor], Tensor] | None = None) -> Any:
    """The method's state before round 0, once clients know what their losses need to know of each other.

    ``sum_of`` adds up a [client, ...] tensor over the network; by default by gossip over the federation's exchange.
    """
    for rule in federation.learner.loss_rules:
        if isinstance(rule, LabelPrior):
            rule.agree(sum_of or (lambda own: network_sum(own, unwrap(federation.exchange), federation.topology)))
    return federation.algorithm.start(federation.start, federation.exchange)


def _prior_notes(config: RunConfig, topology: Topology) -> tuple[str, ...]:
    if config.train.label_prior != "pooled":
        return ()
    return (
        f"train.label_prior=pooled: clients sum their label counts in {gossip_rounds(topology)} rounds of gossip "
        "before round 0; their bytes are counted in the first round",
    )


def _start(config: RunConfig, model: StackedModel, here: list[int]) -> Adapters:
    ranks = [config.ranks[i] for i in here]
    spec = model.spec(max(config.ranks), config.adapter.alpha, config.adapter.head == "private")
    generator = torch_generator(config.seed, "adapter")
    start = initial_adapters(spec, ranks, model.head(), generator, DTYPES[config.train.dtype])
    if config.adapter.start is not None:
        start = read_adapter(Path(config.adapter.start), start, model.frozen_head())
    return start.to(config.device)


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


def composed(
    config: RunConfig, resources: RunResources | None, partitioner: Any, clients: Sequence[int] | None = None
) -> Federation:
    """The parts of a run, on the threads that it asks for."""
    torch.set_num_threads(resolve_threads(config.threads))
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _COMPILED)
    return compose(config, resources=resources, partitioner=partitioner, clients=clients)
