"""The adapters of a finished run: written into its folder, read from there, and exported as PEFT folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import save_file

from peerlora.config.exchange import ExportedModel
from peerlora.config.loading import load_config
from peerlora.config.run import RunConfig
from peerlora.config.task_kinds import task_kind
from peerlora.data.dataset import Dataset
from peerlora.data.tokens import sample_tokens
from peerlora.errors import RunError
from peerlora.exchange.relayed_average import RelayedModels
from peerlora.exchange.stacked import StackedExchange
from peerlora.files import atomic_file, sync_tree
from peerlora.lora.adapters import Adapters
from peerlora.lora.attach import StackedModel
from peerlora.lora.base_models import load_tokenizer
from peerlora.lora.peft_io import ExportContext, export_adapter
from peerlora.runs.metrics import find_start, scores_of, worst_of
from peerlora.runs.store import clients_of, read_events, read_facts, resume_command
from peerlora.runs.write_failures import write_failures_told
from peerlora.runtime.best_export import BEST, EXPORTED, best_facts, read_best
from peerlora.runtime.compose import Federation, start_adapters
from peerlora.runtime.exchange_stack import build_exchange
from peerlora.runtime.inputs import speed_of
from peerlora.runtime.plan import plan
from peerlora.runtime.policy import build_policy, load_policy
from peerlora.runtime.reading import Reading
from peerlora.runtime.relayed_export import (
    MODEL_FACTS,
    MODELS,
    UNCUT_FACTS,
    cut_facts,
    deployed,
    read_relayed,
    read_uncut,
)
from peerlora.runtime.resources import RunResources, build_model
from peerlora.tree import leaves, rebuild


@dataclass(frozen=True)
class Exporter:
    """What makes PEFT folders of a run's adapters; no data is needed."""

    config: RunConfig
    clients: Sequence[int]
    """Those held in the run's folder."""
    layout: Adapters
    """Adapters as the run's method keeps them; their values do not count."""
    model: StackedModel
    context: ExportContext

    def write(
        self,
        folder: Path,
        x: Adapters,
        row: int,
        summary: Mapping[str, Any],
        client: int | str,
        rank: int | None = None,
        told_too: Mapping[str, str] | None = None,
    ) -> Path:
        """Write one row of ``x`` as a PEFT folder, whose card tells the run's results, and ``told_too``."""
        told = {key: summary[key] for key in ("method", "clients", "rounds", "metric") if key in summary}
        scores, metric = scores_of(summary), summary.get("metric")
        shown = {"mean client": scores.get("own_mean"), "worst client": worst_of(summary)}
        shown["averaged model"] = scores.get("averaged")
        shown |= {f"{each} relayed model": scores.get(f"relayed_{each}") for each in ("mean", "worst")}
        reached = {f"{metric}, {name}": f"{value:.4g}" for name, value in shown.items() if value is not None}
        facts = told | {"client": client} | reached | dict(told_too or {})
        export_adapter(folder, x, row, self.model, replace(self.context, facts=facts), rank)
        if not task_kind(self.config.task.kind).acts:
            Reading.of(self.config).write(folder)
        return folder


def exporter(federation: Federation) -> Exporter:
    """The Exporter of a run in this process."""
    layout = federation.algorithm.model(federation.algorithm.start(federation.start, federation.exchange))
    return Exporter(federation.config, federation.exchange.clients, layout, federation.model, federation.export)


def config_of(run: Path) -> tuple[RunConfig, str]:
    """The config of a run folder, with its base model where it lies now, and how the run named that."""
    config, base = load_config(run / "config.yaml"), read_facts(run).get("base")
    named = config.model.source
    if base and Path(base).is_dir():  # a relative source is one of the folder in which the run was begun
        config = config.model_copy(update={"model": config.model.model_copy(update={"source": base})})
    adapter = config.adapter.model_copy(update={"start": None})  # long since read
    return config.model_copy(update={"adapter": adapter}), named


def exporter_of(run: Path) -> Exporter:
    """The Exporter of a run folder; it loads the base model, and no data.

    Raises ModelError where the base model is gone.
    """
    config, named = config_of(run)
    held = clients_of(run)
    planned, here = plan(config, held), list(range(config.clients)) if held is None else held
    model, context = _built(run, config)
    context = replace(context, base_source=named)
    start, _ = start_adapters(config, model, context, here)
    exchange = build_exchange(config, StackedExchange(planned.topology, here), start, planned.attackers)
    return Exporter(config, here, planned.algorithm.model(planned.algorithm.start(start, exchange)), model, context)


def _built(run: Path, config: RunConfig) -> tuple[StackedModel, ExportContext]:
    """The base model of a run, with places for adapters, and how they are exported."""
    if task_kind(config.task.kind).acts:
        return build_policy(config, load_policy(config))
    tokenizer, causal = (
        load_tokenizer(config.model.source, config.model.revision),
        task_kind(config.task.kind).target == "tokens",
    )
    tokens = sample_tokens(tokenizer, config.data.max_length, causal)
    rows = Dataset(*tokens, np.zeros(len(tokens.starts) - 1, np.int64), class_names(run, config))
    built = build_model(config, RunResources(rows, rows, tokenizer), speed_of(read_facts(run), config))
    return built.model, built.export


def class_names(run: Path, config: RunConfig) -> tuple[str, ...]:
    """The class names of a run; () for other tasks."""
    kept = read_facts(run).get("classes")
    if kept is not None or not task_kind(config.task.kind).has_classes:
        return tuple(kept or ())
    start = find_start(read_events(run))  # a run of an older version: its first event knows them, too
    if start is None:
        raise RunError(f"{run} does not tell its class names (no RunStarted in events.jsonl); it cannot be exported")
    return tuple(start.partition["names"])


def write_tensors(folder: Path, x: Adapters) -> None:
    """Write ``adapters/all.safetensors`` with every client into a run folder."""
    place = folder / "adapters"
    place.mkdir(exist_ok=True)
    tensors = {name.removeprefix("."): leaf.contiguous() for name, leaf in leaves(x).items()}
    with atomic_file(place / "all.safetensors") as temporary:
        save_file(tensors, temporary)


def write_peft_folders(
    folder: Path, x: Adapters, to: Exporter, summary: Mapping[str, Any], relayed: RelayedModels | None = None
) -> None:
    """Write a PEFT folder per client and for the average; all under ``adapters`` is on the disk when this returns.

    ``relayed``: the clients' relayed models, which are theirs if the config says so.
    """
    place = folder / "adapters"
    if x.clients <= EXPORTED:
        for row, client in enumerate(to.clients):
            own = place / f"client-{client:02d}"
            if relayed and deployed(to.config) == "relayed":
                to.write(own, relayed.adapters.to("cpu"), row, summary, client, told_too=cut_facts(relayed, row))
            else:
                to.write(own, x, row, summary, client)
        if x.equal_ranks and x.clients == to.config.clients:
            to.write(place / "average", x.mean(), 0, summary, "average of all")
    sync_tree(place)


def read_adapters(run: Path, to: Exporter) -> Adapters:
    """What `write_tensors` wrote."""
    with safe_open(run / "adapters" / "all.safetensors", framework="pt") as file:
        return rebuild(to.layout, {f".{name}": file.get_tensor(name) for name in file.keys()})


def export_from_run(
    run: Path,
    to: Path,
    client: int | None,
    rank: int | None = None,
    model: ExportedModel | None = None,
    exact: bool = False,
) -> Path:
    """Write one client's adapter (None: the average of all) of a finished run as a PEFT folder at ``to``.

    Needs the run folder and, unless the run wrote this folder itself, the base model; never the data.
    ``rank``: its best approximation of at most this rank, since merges make a rank grow.  ``model``: the client's own,
    its relayed average or its best round's, by default the one that the run deploys.  ``exact``: a relayed average with
    no cut, whose rank is the sum of the ranks of all that is averaged.
    Raises RunError when ``run`` is no run or unfinished, the client, rank or model impossible, or ``to`` not empty.
    """
    if not (run / "run.json").is_file():
        raise RunError(f"{run} is not a run folder (no run.json); give the --out of an earlier run")
    if not (run / "summary.json").is_file():
        raise RunError(f"{run} is not finished; finish it first: {resume_command(run)}")
    if to.exists() and not to.is_dir():
        raise RunError(f"--to {to} is a file; choose a folder that is new or empty")
    if to.is_dir() and any(to.iterdir()):
        raise RunError(f"--to {to} is not empty; choose a folder that is new or empty")
    config = load_config(run / "config.yaml")
    if client is not None and not 0 <= client < config.clients:
        raise RunError(f"--client {client} given; {run} has clients 0 to {config.clients - 1}")
    if client is None and len(set(config.ranks)) > 1:
        raise RunError(f"{run} has clients of different ranks, whose factors have no average; give --client")
    if rank is not None and rank < 1:
        raise RunError(f"--rank {rank} given; expected at least 1")
    here = clients_of(run)
    if here is not None and client not in here:
        raise RunError(f"{run} is the run of a peer and has client {here[0]} only; give --client {here[0]}")
    chosen = _chosen(run, config, client, rank, model, exact)
    to = to.resolve()
    with write_failures_told(to.parent, lambda: "export again"):
        to.parent.mkdir(parents=True, exist_ok=True)
        half = to.with_name(f"{to.name}.tmp")  # a folder at ``to`` is whole
        shutil.rmtree(half, ignore_errors=True)
        try:
            _export(run, half, client, rank, chosen, exact)
            sync_tree(half)
            os.replace(half, to)
        finally:
            shutil.rmtree(half, ignore_errors=True)
    return to


def _chosen(
    run: Path, config: RunConfig, client: int | None, rank: int | None, model: ExportedModel | None, exact: bool
) -> ExportedModel:
    """The model to export; raises RunError for one that the run lacks, and for choices that contradict each other."""
    chosen = model or ("averaged" if client is None else deployed(config))
    if (chosen == "averaged") != (client is None):
        needed = "leave out --client" if client is not None else "give --client"
        raise RunError(f"--model {chosen} given; {needed}, since the averaged model is that of all clients")
    if chosen == "relayed" and config.exchange.relay is None:
        raise RunError(f"--model relayed given; {run} has no relayed models (exchange.relay is null); use --model own")
    if chosen == "best" and config.eval.select is None:
        raise RunError(f"--model best given; {run} has kept no best adapters (eval.select is null); use --model own")
    if exact and chosen != "relayed":
        raise RunError("--exact is for relayed models, which are cut to a client's rank; leave it out")
    if exact and rank is not None:
        raise RunError(f"--exact and --rank {rank} given; one asks for no cut, the other for one: drop one of them")
    return chosen


def _export(run: Path, folder: Path, client: int | None, rank: int | None, model: ExportedModel, exact: bool) -> None:
    written = run / "adapters" / ("average" if client is None else f"client-{client:02d}")
    as_written = model in ("averaged", deployed(load_config(run / "config.yaml")))
    if rank is None and not exact and as_written and written.is_dir():
        shutil.copytree(written, folder)
        return
    to = exporter_of(run)
    x = read_adapters(run, to)
    if client is None and not x.equal_ranks:  # hetlora cuts them while it runs
        raise RunError(f"{run} ended with clients of different ranks, whose factors have no average; give --client")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    if client is None:
        to.write(folder, x.mean(), 0, summary, "average of all", rank)
        return
    row = list(to.clients).index(client)
    if model == "own":
        to.write(folder, x, row, summary, client, rank)
        return
    if model == "best":
        best = read_best(run, to.layout)
        if best is None:
            raise RunError(f"{run} has lost its best adapters ({BEST}); finish it again: {resume_command(run)}")
        to.write(folder, best, row, summary, client, rank, best_facts(summary, row))
        return
    relayed = read_relayed(run, to.layout)
    if relayed is None:
        raise RunError(f"{run} has lost its relayed models ({MODELS}); finish it again: {resume_command(run)}")
    averages_products = to.config.exchange.relay is not None and to.config.exchange.relay.average == "products"
    if exact or (rank is not None and averages_products):
        uncut = read_uncut(run, to.config, to.clients, x.rows([row]), client)
        to.write(folder, uncut, 0, summary, client, rank, UNCUT_FACTS if exact else MODEL_FACTS)
    else:
        to.write(folder, relayed.adapters, row, summary, client, rank, cut_facts(relayed, row))
