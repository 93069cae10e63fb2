"""The adapters of a finished run: written into its folder, read from there, and exported as PEFT folders."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import save_file

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
from peerlora.lora.peft_io import ExportContext, export_adapter
from peerlora.lora.peft_model import PeftAdapter
from peerlora.runs.json_files import read_json
from peerlora.runs.metrics import find_start, scores_of, worst_of
from peerlora.runs.privacy_summary import privacy_card
from peerlora.runs.store import clients_of, read_events, read_facts, resume_command
from peerlora.runtime.best_export import BEST, EXPORTED, FOLDERS, best_facts, read_best
from peerlora.runtime.compose import Federation, start_adapters
from peerlora.runtime.exchange_stack import build_exchange
from peerlora.runtime.inputs import require_same_base, speed_of
from peerlora.runtime.model_choice import ModelChoice
from peerlora.runtime.new_folder import new_folder
from peerlora.runtime.plan import plan
from peerlora.runtime.policy import build_policy, load_policy, policy_card
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
from peerlora.runtime.resources import RunResources, build_model, run_tokenizer
from peerlora.tree import leaves, rebuild


@dataclass(frozen=True)
class Exporter:
    """What makes PEFT folders of a run's adapters; no data is needed."""

    config: RunConfig
    clients: Sequence[int]
    """Those held in the run's folder."""
    layout: Adapters
    """Adapters as the run's method keeps them; their values do not count."""
    model: StackedModel | PeftAdapter
    context: ExportContext

    def write(
        self,
        folder: Path,
        x: Adapters,
        row: int,
        summary: Mapping[str, Any],
        client: int | str,
        rank: int | None = None,
        more_facts: Mapping[str, str] | None = None,
    ) -> Path:
        """Write one row of ``x`` as a PEFT folder, whose card tells the run's results, and ``more_facts``."""
        reported = {key: summary[key] for key in ("method", "clients", "rounds", "metric") if key in summary}
        scores, metric = scores_of(summary), summary.get("metric")
        shown = {"mean client": scores.get("own_mean"), "worst client": worst_of(summary)}
        shown["averaged model"] = scores.get("averaged")
        shown |= {f"{each} relayed model": scores.get(f"relayed_{each}") for each in ("mean", "worst")}
        reached = {f"{metric}, {name}": f"{value:.4g}" for name, value in shown.items() if value is not None}
        private = privacy_card(summary, None if isinstance(client, str) else list(self.clients).index(client))
        facts = reported | {"client": client} | reached | private | policy_card(self.config) | dict(more_facts or {})
        context = replace(self.context, facts=facts)
        if isinstance(self.model, PeftAdapter):  # a training loop's, which reads its rows in its own way
            return self.model.export(folder, x, row, context)
        export_adapter(folder, x, row, self.model, context, rank)
        if not task_kind(self.config.task.kind).acts:
            Reading.of(self.config).write(folder)
        return folder


def exporter(federation: Federation, layout: Adapters) -> Exporter:
    """The Exporter of a run in this process, whose method keeps adapters as ``layout``."""
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

    Raises ModelError where the base model is gone, RunError where it is another.
    """
    if read_facts(run).get("loop"):
        raise RunError(
            f"{run} was trained by a loop of your own, whose base model is not known here; its adapters are in "
            f"{run / 'adapters'}, a PEFT folder each"
        )
    config, named = config_of(run)
    held = clients_of(run)
    planned, here = plan(config, held, trains=False), list(range(config.clients)) if held is None else held
    model, context = _built(run, config)
    context = replace(context, base_source=named)
    start, _ = start_adapters(config, model, context, here)
    exchange = build_exchange(config, StackedExchange(planned.topology, here), start, planned.attackers)
    return Exporter(config, here, planned.algorithm.model(planned.algorithm.start(start, exchange)), model, context)


def _built(run: Path, config: RunConfig) -> tuple[StackedModel, ExportContext]:
    """The base model of a run, with places for adapters, and how they are exported."""
    if task_kind(config.task.kind).acts:
        model, context = build_policy(config, load_policy(config))
        require_same_base(run, model.base, config.model.source, context.initialised)
        return model, context
    tokenizer, kind, names = run_tokenizer(config), task_kind(config.task.kind), class_names(run, config)
    if kind.reads_images:
        rows = tokenizer.samples(1, names)
    else:
        tokens = sample_tokens(tokenizer, config.data.max_length, kind.predicts_tokens)
        rows = Dataset(*tokens, np.zeros(len(tokens.starts) - 1, np.int64), names)
    built = build_model(config, RunResources(rows, rows, tokenizer), speed_of(read_facts(run), config))
    require_same_base(run, built.model.base, config.model.source, built.export.initialised, built.originals)
    return built.model, built.export


def class_names(run: Path, config: RunConfig) -> tuple[str, ...]:
    """The class names of a run; () for other tasks."""
    kept = read_facts(run).get("classes")
    if kept is not None or not task_kind(config.task.kind).has_names:
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
                to.write(own, relayed.adapters.to("cpu"), row, summary, client, more_facts=cut_facts(relayed, row))
            else:
                to.write(own, x, row, summary, client)
        if x.equal_ranks and x.clients == to.config.clients:
            to.write(place / "average", x.mean(), 0, summary, "average of all")
    sync_tree(place)


def read_adapters(run: Path, to: Exporter) -> Adapters:
    """What `write_tensors` wrote."""
    with safe_open(run / "adapters" / "all.safetensors", framework="pt") as file:
        return rebuild(to.layout, {f".{name}": file.get_tensor(name) for name in file.keys()})


def export_from_run(run: Path | str, to: Path | str, choice: ModelChoice | int | None) -> Path:
    """Write one model of a finished run as a PEFT folder at ``to``: a client's (its number), or the average (None).

    Needs the run folder and, unless the run wrote this folder itself, the base model; never the data.
    Raises RunError when ``run`` is no run or unfinished, the choice impossible, or ``to`` not empty.
    """
    run, to = Path(run), Path(to)
    chosen = ModelChoice.of(choice).checked(run)
    with new_folder(to) as half:
        write_export(run, half, chosen)
    return to.resolve()


def write_export(run: Path, folder: Path, choice: ModelChoice) -> None:
    """Write a checked choice into an empty folder."""
    written = _written(run, choice)
    if written is not None:
        shutil.copytree(written, folder, dirs_exist_ok=True)
        return
    to = exporter_of(run)
    x = read_adapters(run, to)
    if choice.client is None and not x.equal_ranks:  # hetlora cuts them while it runs
        raise RunError(f"{run} ended with clients of different ranks, whose factors have no average; give --client")
    summary = read_json(run / "summary.json")
    if choice.client is None:
        to.write(folder, x.mean(), 0, summary, "average of all", choice.rank)
        return
    row = list(to.clients).index(choice.client)
    models, row_of, facts = _models(run, to, x, row, choice, summary)
    to.write(folder, models, row_of, summary, choice.client, choice.rank, facts)


def _written(run: Path, choice: ModelChoice) -> Path | None:
    """The folder of this model that the run wrote; None where it wrote none."""
    if choice.rank is not None or choice.exact:
        return None
    client = "average" if choice.client is None else f"client-{choice.client:02d}"
    if choice.model == "best":
        folder = run / FOLDERS / client
    elif choice.model in ("averaged", deployed(load_config(run / "config.yaml"))):
        folder = run / "adapters" / client
    else:
        return None
    return folder if folder.is_dir() else None


def _models(
    run: Path, to: Exporter, x: Adapters, row: int, choice: ModelChoice, summary: Mapping[str, Any]
) -> tuple[Adapters, int, dict[str, str]]:
    """The adapters that hold a client's chosen model, its row among them, and what the card tells of it."""
    if choice.model == "own":
        return x, row, {}
    if choice.model == "best":
        best = read_best(run, to.layout)
        if best is None:
            raise RunError(f"{run} has lost its best adapters ({BEST}); finish it again: {resume_command(run)}")
        return best, row, best_facts(summary, row)
    relayed, relay = read_relayed(run, to.layout), to.config.exchange.relay
    if relayed is None:
        raise RunError(f"{run} has lost its relayed models ({MODELS}); finish it again: {resume_command(run)}")
    if choice.exact or (choice.rank is not None and relay is not None and relay.average == "products"):
        assert choice.client is not None
        uncut = read_uncut(run, to.config, to.clients, x.rows([row]), choice.client)
        return uncut, 0, UNCUT_FACTS if choice.exact else MODEL_FACTS
    return relayed.adapters, row, cut_facts(relayed, row)
