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
from peerlora.algorithms.merging import Merging, check_merges
from peerlora.config import RunConfig
from peerlora.data.batches import Shards
from peerlora.data.partition import Partition, own_rows, partition
from peerlora.data.sources import Dataset, load_datasets
from peerlora.errors import CompositionError, ConfigError
from peerlora.exchange.adversary import attackers
from peerlora.exchange.base import Counted
from peerlora.exchange.stacked import StackedExchange
from peerlora.exchange.sums import gossip_rounds, network_sum
from peerlora.exchange.wrapped import innermost
from peerlora.lora.adapters import Adapters, initial_adapters
from peerlora.lora.attach import StackedModel, find_targets
from peerlora.lora.peft_io import ExportContext, read_adapter
from peerlora.models import PEFT_TASKS, load_base, load_tokenizer
from peerlora.randomness import numpy_generator, torch_generator
from peerlora.runtime.bases import Bases, PreparedBase
from peerlora.runtime.checks import check_composition, check_memory, check_own
from peerlora.runtime.clock import Clock
from peerlora.runtime.wrappers import attack_notes, learned_from, wrap
from peerlora.sections import ClockConfig
from peerlora.topology.schedule import Topology, build_topology
from peerlora.train.fast import Paths, graph_size, prepare_base, use_encoder
from peerlora.train.learner import Learner
from peerlora.train.prior import LabelPrior
from peerlora.train.tasks import TASKS

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}  # of adapters, optimiser, loss


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
    exchange: Counted
    start: Adapters
    export: ExportContext
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    """What the method has to say about the run, such as what it chose."""
    paths: Paths
    attackers: tuple[int, ...] = ()
    """Clients whose results don't count."""
    clock: Clock | None = None


@dataclass(frozen=True)
class Materials:
    """What many runs can share: the tokenised data and, for runs one after another, the base model."""

    train_data: Dataset
    eval_data: Dataset
    tokenizer: Any
    bases: Bases | None = None
    """None: every run loads its own."""


def load_materials(config: RunConfig) -> Materials:
    """Read and tokenise the data of a config."""
    tokenizer = load_tokenizer(config.model.source)
    return Materials(*load_datasets(config, tokenizer), tokenizer)


def build_clock(config: RunConfig, algorithm: Algorithm[Any]) -> Clock | None:
    """The virtual clock of a run; an asynchronous method without one gets equal speeds.

    Raises CompositionError for a clock that the method cannot keep.
    """
    name, settings = config.algorithm.name, config.clock
    if not is_asynchronous(algorithm):
        if settings and (settings.deadline or settings.away) and isinstance(algorithm, Merging):
            raise CompositionError(
                f"{name} cannot do without a client in a round (clock.deadline, clock.away): what others merge must "
                "reach everybody; drop these settings, or use algorithm.name=dec-lora"
            )
        reason = getattr(algorithm, "needs_clock", None)
        if reason and not settings:
            raise CompositionError(f"{name}: {reason}; give the section clock, such as clock.speed=1.0")
        return Clock(settings, config.clients, config.seed) if settings else None
    if settings and settings.deadline:
        raise CompositionError(
            f"{name} waits for nobody, so clock.deadline={settings.deadline:g} has no round to cut short; drop "
            "clock.deadline, or use a synchronous method such as algorithm.name=dec-lora"
        )
    if settings and any(absence.unit == "rounds" for absence in settings.away):
        raise CompositionError(
            f"the clients of {name} have no rounds in common, and clock.away counts in rounds; use unit: seconds"
        )
    if config.train.optimizer_state == "phase":
        raise CompositionError(
            f"the clients of {name} switch factors at moments of their own, so the optimiser's memory has no common "
            "phase (train.optimizer_state=phase); use train.optimizer_state=round or keep"
        )
    clock = Clock(settings or ClockConfig(), config.clients, config.seed)
    if all(clock.back(client, 0) is None for client in range(config.clients)):
        raise CompositionError("clock.away leaves no client that ever begins; let at least one of them stay")
    return clock


def compose(
    config: RunConfig,
    *,
    materials: Materials | None = None,
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
    materials = materials or load_materials(config)
    train_data, eval_data = materials.train_data, materials.eval_data
    here = list(range(config.clients) if clients is None else clients)
    own = config.partition.kind == "own" and partitioner is None
    divided = (
        own_rows(train_data, here[0])
        if own
        else partition(partitioner or config.partition, train_data, config.clients, config.seed)
    )
    model, export, paths = _model(config, materials)
    start = _start(config, model, here)
    check_merges(config.algorithm.name, algorithm, topology, config.train.rounds, start, model.base)
    batches, rows = [config.batches[i] for i in here], divided.shards if own else [divided.shards[i] for i in here]
    learned = learned_from(config, train_data, [divided.shards[i] for i in attacking])
    shards = Shards(learned, rows, batches, here, config.seed, config.train.batches == "by-length")
    graph = graph_size(model.base, paths)
    learner = Learner(model, TASKS[config.task.kind], shards, config.train, materials.tokenizer.pad_token_id, graph)
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
        exchange=wrap(config, StackedExchange(topology, here, gather), start, attacking),
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
            rule.agree(sum_of or (lambda own: network_sum(own, innermost(federation.exchange), federation.topology)))
    return federation.algorithm.start(federation.start, federation.exchange)


def _prior_notes(config: RunConfig, topology: Topology) -> tuple[str, ...]:
    if config.train.label_prior != "pooled":
        return ()
    return (
        f"train.label_prior=pooled: clients sum their label counts in {gossip_rounds(topology)} rounds of gossip "
        "before round 0; their bytes are counted in the first round",
    )


def _model(config: RunConfig, materials: Materials) -> tuple[StackedModel, ExportContext, Paths]:
    kind, source, tokenizer, names = (
        config.task.kind,
        config.model.source,
        materials.tokenizer,
        materials.train_data.names,
    )
    bases = materials.bases or Bases()
    prepared = bases.get(
        (
            source,
            kind,
            names,
            config.train.dtype,
            config.train.fast,
            config.device,
            config.adapter.targets,
        ),
        config.seed,
        lambda: _prepared(config, names, tokenizer.pad_token_id),
    )
    base, targets = prepared.base, prepared.targets
    if base.longest is not None and config.data.max_length > base.longest:
        raise ConfigError(
            f"data.max_length={config.data.max_length} given; {source} reads at most {base.longest} tokens; lower it"
        )
    model = StackedModel(
        base.model,
        targets,
        train_head=config.adapter.head != "frozen",
        dropout=config.adapter.dropout,
        base_dropout=config.model.dropout,
    )
    bases.used_by(model)
    extra = tuple(name for name in base.initialised if not name.startswith(targets.heads)) if targets.heads else ()
    export = ExportContext(source, PEFT_TASKS[kind], config.adapter.dropout, extra, tokenizer, names)
    return model, export, prepared.paths | use_encoder(model, config.train.fast)


def _prepared(config: RunConfig, names: tuple[str, ...], pad_token: int) -> PreparedBase:
    kind, dtype = config.task.kind, DTYPES[config.train.dtype]
    base = load_base(config.model.source, kind, names, config.seed, pad_token, dtype)
    targets = find_targets(base.model, PEFT_TASKS[kind], config.adapter.targets)
    base.model.to(_device(config))
    return PreparedBase(base, targets, prepare_base(base.model, targets.heads, config.train.dtype, config.train.fast))


def _device(config: RunConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device=cuda given, but this torch sees no NVIDIA GPU; use device=cpu, or install a CUDA build"
        )
    return torch.device(config.device)


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
