"""The relayed models of a run in its folder: as they are deployed, and the entries that they are averages of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from safetensors.torch import load_file, save_file
from torch import Tensor

from peerlora.config.run import RunConfig
from peerlora.errors import RunError
from peerlora.exchange.relay import RelayCaches
from peerlora.exchange.relayed_average import RelayedModels, uncut_model
from peerlora.files import atomic_file
from peerlora.lora.adapters import Adapters

MODELS, ENTRIES = Path("adapters/relayed.safetensors"), Path("adapters/entries.safetensors")


def deployed(config: RunConfig) -> Literal["own", "relayed"]:
    """Which model of a client becomes its PEFT folder: own or relayed."""
    return config.exchange.relay.deploy if config.exchange.relay else "own"


def write_relayed(run: Path, relayed: RelayedModels, caches: RelayCaches) -> None:
    """Write the relayed models and the entries behind them into a run folder."""
    x = relayed.adapters
    _write(run / MODELS, {"flat": x.flat, "ranks": x.ranks, "cut_share": relayed.cut_share})
    _write(run / ENTRIES, caches.state_dict())


def read_relayed(run: Path, layout: Adapters) -> RelayedModels | None:
    """What `write_relayed` wrote, with the layout of the run's adapters; None where nothing was relayed."""
    if not (run / MODELS).is_file():
        return None
    saved = load_file(run / MODELS)
    return RelayedModels(replace(layout, flat=saved["flat"], ranks=saved["ranks"], merged=None), saved["cut_share"])


def relayed_adapters(run: Path, layout: Adapters) -> Adapters | None:
    """The relayed models in a run folder; None where nothing was relayed."""
    found = read_relayed(run, layout)
    return found and found.adapters


def read_uncut(run: Path, config: RunConfig, clients: Sequence[int], own: Adapters, client: int) -> Adapters:
    """The average of the products that a client held at the end, with no cut; ``own``: [1], its own model.

    Raises RunError where the run averages factors, which leave nothing to cut.
    """
    assert config.exchange.relay is not None
    if config.exchange.relay.average == "factors":
        raise RunError(
            f"{run} averages factors (exchange.relay.average=factors), of which nothing is cut; leave out --exact"
        )
    caches = RelayCaches(config.exchange.relay, own.spec, dict.fromkeys(clients, 1), config.clients)
    caches.load_state_dict(load_file(run / ENTRIES))
    return uncut_model(caches, own, client)


def cut_facts(relayed: RelayedModels, row: int) -> dict[str, str]:
    """For the card of a relayed model in this row: what it is, and what its rank leaves out."""
    share = float(relayed.cut_share[row]) ** 0.5
    left_out = {"left out": f"{share:.2%} of the averaged update (Frobenius norm over all layers)"} if share else {}
    return MODEL_FACTS | left_out


MODEL_FACTS = {"model": "the relayed average: of the newest adapter of every client that this one has heard of"}
UNCUT_FACTS = MODEL_FACTS | {"holds": "all of the averaged update, with no cut; scaling 1"}
"""For the cards of relayed models."""


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(exist_ok=True)
    own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(own, temporary)
