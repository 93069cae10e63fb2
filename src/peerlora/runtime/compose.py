"""Compose: plan a run, load data and model, and assemble the parts into a Federation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from peerlora.algorithms.compatibility import cache_settings, check_relayed_message
from peerlora.algorithms.merging import check_merges
from peerlora.config.run import RunConfig
from peerlora.config.task_kinds import task_kind
from peerlora.data.batches import Shards
from peerlora.data.dataset import Dataset
from peerlora.data.partition import Partition, count_labels
from peerlora.errors import CompositionError, DataError
from peerlora.exchange.blocks import BlockExchange, RowExchange
from peerlora.exchange.gossip_sum import NetworkSum
from peerlora.exchange.stacked import StackedExchange
from peerlora.exchange.wrapper import unwrap
from peerlora.randomness import numpy_generator
from peerlora.runtime.checks import check_head_rate, check_rows
from peerlora.runtime.division import Division, divide_rows
from peerlora.runtime.epochs import plan_rounds
from peerlora.runtime.exchange_stack import build_exchange, poison_labels
from peerlora.runtime.federation import Federation, adapter_spec, start_adapters
from peerlora.runtime.plan import Plan, plan
from peerlora.runtime.policy import PolicyResources, assemble_policy, load_policy
from peerlora.runtime.privacy import build_privacy
from peerlora.runtime.resources import RunResources, build_model, load_resources
from peerlora.train.kernels.selection import graph_size
from peerlora.train.kernels.speed import Speed
from peerlora.train.learner import StackedLearner
from peerlora.train.loss_rules import ClassWeights, LabelPrior
from peerlora.train.metrics import absent_classes
from peerlora.train.online.episodes import Episodes
from peerlora.train.tasks import task


@dataclass(frozen=True)
class Block:
    """The clients of one worker of a cluster."""

    tiles: Sequence[Sequence[int]]
    """Clients that share a graph, see ``train.block``; their numbers rise."""
    rows: RowExchange


def compose(
    config: RunConfig,
    *,
    resources: RunResources | PolicyResources | None = None,
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
    resources = resources or load_run(config)
    if not isinstance(resources, RunResources):
        return assemble(planned, resources, clients, gather, partitioner, speed)
    division = divide_rows(config, resources, clients, partitioner)
    planned = plan_rounds(planned, division.trained, clients)
    return assemble(planned, resources, clients, gather, speed=speed, division=division)


def load_run(config: RunConfig) -> RunResources | PolicyResources:
    """Read and tokenise the data of a config; of a flow policy read the base, or pre-train it."""
    return load_policy(config) if task_kind(config.task.kind).acts else load_resources(config)


def assemble(
    planned: Plan,
    resources: RunResources | PolicyResources,
    clients: Sequence[int] | None = None,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    partitioner: Any = None,
    speed: Speed | None = None,
    block: Block | None = None,
    division: Division | None = None,
) -> Federation:
    """Divide the rows, attach the adapters and build learner and exchange; arguments as in `compose`.

    ``block``: of a cluster's worker, in place of ``clients`` and ``gather``.  ``division``: what `divide_rows` gave.
    Of a flow policy there are environments in place of rows, see `policy.assemble_policy`.

    Raises DataError, ModelError or CompositionError for what only data and model can show.
    """
    config, topology, attacking = planned.config, planned.topology, planned.attackers
    clients = clients if block is None else [client for tile in block.tiles for client in tile]
    here = list(range(config.clients) if clients is None else clients)
    if isinstance(resources, PolicyResources):
        if partitioner is not None:
            raise CompositionError("a partitioner divides rows, and flow policies have none; leave it out")
        return assemble_policy(planned, resources, here, gather)
    division = division or divide_rows(config, resources, here, partitioner)
    divided, own, held = division.partition, division.own, division.held
    built = build_model(config, resources, speed)
    model, export, paths = built.model, built.export, built.paths
    spec = adapter_spec(config, model)
    check_rows(config, spec, len(here))
    check_head_rate(config, spec)
    start, start_warnings = start_adapters(config, model, export, here)
    check_merges(config.algorithm.name, planned.algorithm, topology, config.train.rounds, start, model.base)
    check_relayed_message(config, planned.algorithm, start.rows([0]))
    rows = divided.shards if own else [divided.shards[i] for i in here]
    learned = poison_labels(config, resources.train_data, [divided.shards[i] for i in attacking])
    every_batch = config.batches
    batches = [every_batch[i] for i in here]
    shards = Shards(learned, rows, batches, here, config.seed, config.train.batches == "by-length")
    cache, rows_of = cache_settings(config, planned.algorithm), _rows_of(divided, own, here)
    graph = graph_size(model.base, paths)
    learner = StackedLearner(
        model, task(config.task.kind), shards, config.train, resources.tokenizer.pad_token_id, graph
    )
    learner.shares_prefix = resources.share_prefix
    if block is not None:
        learner.hold_block([len(tile) for tile in block.tiles], sum(config.batches), sum(map(len, divided.shards)))
    plain = StackedExchange(topology, here, gather) if block is None else BlockExchange(topology, here, block.rows)
    learner.privacy, of_privacy = build_privacy(
        config, planned.algorithm, shards, model, learner.task, start.spec.parameters, clients is not None
    )
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
            *of_privacy,
            *_absent_classes(config, resources.eval_data),
        ),
        notes=(*planned.notes, *built.speed.notes(config.train.dtype)),
        speed=built.speed,
        paths=paths,
        originals=built.originals,
        clock=planned.clock,
        attackers=attacking,
        own_rows=held if own or not held else tuple(held[i] for i in here),
    )


def class_weights(weights: Literal["none", "balanced", "pooled"] | list[float], shards: Shards) -> ClassWeights:
    """The class weights of clients by the labels that each learns from; raises DataError where they do not fit."""
    assert weights != "none"
    names = shards.data.classes
    if isinstance(weights, list) and len(weights) != len(names):
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


def evaluation_rows(config: RunConfig, data: Dataset | Episodes) -> Dataset | Episodes:
    """The rows that clients are evaluated on during the run: a seeded sample of ``eval.rows``, or all."""
    wanted = config.eval.rows
    if wanted is None or wanted >= len(data):
        return data
    draw = numpy_generator(config.seed, "evaluation").choice(len(data), wanted, replace=False)
    return data.take(np.sort(draw))


def _absent_classes(config: RunConfig, data: Dataset) -> tuple[str, ...]:
    """Warnings on classes that the evaluation rows lack, or only the sample of them."""
    sample = evaluation_rows(config, data)
    assert isinstance(sample, Dataset)  # as the rows are that it is of
    warnings = absent_classes(config.eval.computed, data)
    return warnings or absent_classes(config.eval.computed, sample, f"row of the sample (eval.rows={config.eval.rows})")


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
