"""What a run leaves in its folder beside events: configs compared on resume, facts, adapters."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from peerlora.config.loading import load_config
from peerlora.errors import RunError
from peerlora.files import atomic_file
from peerlora.lora.adapters import Adapters
from peerlora.lora.peft_io import export_adapter
from peerlora.runs.store import clients_of, resume_command
from peerlora.runtime.compose import Federation, compose
from peerlora.tree import leaves, rebuild

EXPORTED = 64  # a run of more clients writes their adapters in one file only; `peerlora export` makes folders of it


def write_adapters(folder: Path, x: Adapters, federation: Federation, summary: dict[str, Any]) -> None:
    """``adapters/all.safetensors`` with every client, and a PEFT folder per client and for the average."""
    place = folder / "adapters"
    place.mkdir(exist_ok=True)
    tensors = {name.removeprefix("."): leaf.contiguous() for name, leaf in leaves(x).items()}
    with atomic_file(place / "all.safetensors") as temporary:
        save_file(tensors, temporary)
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
        raise RunError(f"{run} is not finished; finish it first: {resume_command(run)}")
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
