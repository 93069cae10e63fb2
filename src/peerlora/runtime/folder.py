"""What a run leaves in its folder beside events: configs compared on resume, facts, adapters."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from peerlora.config import RunConfig, load_config
from peerlora.errors import RunError
from peerlora.lora.adapters import Adapters
from peerlora.lora.peft_io import export_adapter
from peerlora.runs.store import RunStore, clients_of, going_on
from peerlora.runtime.compose import Federation, compose
from peerlora.tree import leaves, rebuild

_MAY_CHANGE = ("peer.deadline", "peer.join", "peer.pull")  # they decide when peers meet, not what is run
EXPORTED = 64  # a run of more clients writes their adapters in one file only; `peerlora export` makes folders of it


def default_folder(config: RunConfig) -> Path:
    """A new folder under runs/, named by method and time."""
    return Path("runs") / f"{config.algorithm.name}-{datetime.now():%Y%m%d-%H%M%S}"


def run_facts(config: RunConfig, partitioner: Any = None, held: Sequence[int] | None = None) -> dict[str, Any]:
    """Versions, seed and machine facts that decide a result beside the config; ``held``: the clients, if not all."""
    packages = ("peerlora", "torch", "transformers", "peft", "numpy", "safetensors")
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "machine": platform.machine(),
        "seed": config.seed,
        "threads": config.threads,
        "partitioner": type(partitioner).__name__ if partitioner is not None else None,
    } | ({} if held is None else {"held": list(held)})


def stored_config(store: RunStore) -> RunConfig:
    """The resolved config of a run folder."""
    return load_config(yaml.safe_load(store.config_yaml))


def check_same(stored: RunConfig, expected: RunConfig, store: RunStore, partitioner: Any) -> None:
    """Raise RunError, listing the differences, unless a resumed run is the run that was started."""
    was, now = _flat(stored.model_dump(mode="json")), _flat(expected.model_dump(mode="json"))
    if now.get("threads") is None:
        now["threads"] = was.get("threads")
    differences = [
        f"{key}: {was.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted(was | now)
        if was.get(key) != now.get(key) and key not in _MAY_CHANGE
    ]
    then, given = store.facts.get("partitioner"), type(partitioner).__name__ if partitioner is not None else None
    if then != given:
        differences.append(f"partitioner: {then} then, {given} now")
    if differences:
        raise RunError(
            f"{store.folder} was started with another config ({'; '.join(differences)}); "
            "resume with the same settings, or start a new run with another --out"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {name: leaf for key, value in tree.items() for name, leaf in _flat(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): tree}


def write_adapters(folder: Path, x: Adapters, federation: Federation, summary: dict[str, Any]) -> None:
    """``adapters/all.safetensors`` with every client, and a PEFT folder per client and for the average."""
    place = folder / "adapters"
    place.mkdir(exist_ok=True)
    tensors = {name.removeprefix("."): leaf.contiguous() for name, leaf in leaves(x).items()}
    save_file(tensors, place / "all.safetensors.tmp")
    os.replace(place / "all.safetensors.tmp", place / "all.safetensors")
    if x.clients > EXPORTED:
        return
    for row, client in enumerate(federation.exchange.clients):
        _export(place / f"client-{client:02d}", x, row, federation, summary | {"client": client})
    if x.equal_ranks and x.clients == federation.config.clients:
        _export(place / "average", x.mean(), 0, federation, summary | {"client": "average of all"})


def read_adapters(run: Path, federation: Federation) -> Adapters:
    """What `write_adapters` wrote of all clients of ``federation``."""
    start = federation.algorithm.model(federation.algorithm.start(federation.start, federation.exchange))
    with safe_open(run / "adapters" / "all.safetensors", framework="pt") as file:
        return rebuild(start, {f".{name}": file.get_tensor(name) for name in file.keys()})


def _export(
    folder: Path, x: Adapters, client: int, federation: Federation, summary: dict[str, Any], rank: int | None = None
) -> Path:
    told = ("method", "client", "clients", "rounds", "metric")
    facts = {key: summary[key] for key in told if key in summary} | {"accuracy": json.dumps(summary["accuracy"])}
    return export_adapter(folder, x, client, federation.model, replace(federation.export, facts=facts), rank)


def export_from_run(run: Path, to: Path, client: int | None, rank: int | None = None) -> Path:
    """Write one client's adapter (None: the average) of a finished run as a PEFT folder at ``to``.

    ``rank``: its best approximation of at most this rank, since merges make a rank grow.
    Raises RunError when ``run`` is no run or unfinished, the client or rank impossible, or ``to`` in use.
    """
    if not (run / "run.json").is_file():
        raise RunError(f"{run} is not a run folder (no run.json); give the --out of an earlier run")
    if not (run / "summary.json").is_file():
        raise RunError(f"{run} is not finished; finish it first: {going_on(run)}")
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise RunError(f"--to {to} is in use; choose a folder that is new or empty")
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
    written = run / "adapters" / ("average" if client is None else f"client-{client:02d}")
    if rank is None and written.is_dir():
        shutil.copytree(written, to, dirs_exist_ok=True)
        return to
    federation = compose(config, clients=here)
    x = read_adapters(run, federation)
    if client is None and not x.equal_ranks:  # hetlora cuts them while it runs
        raise RunError(f"{run} ended with clients of different ranks, whose factors have no average; give --client")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    row, number = (x.mean(), 0) if client is None else (x, list(federation.exchange.clients).index(client))
    named = summary | {"client": "average of all" if client is None else client}
    return _export(to, row, number, federation, named, rank)
