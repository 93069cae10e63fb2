"""The adapters of each client's best evaluation, in the folder of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from peerlora.files import atomic_file, sync_tree
from peerlora.lora.adapters import Adapters

if TYPE_CHECKING:
    from peerlora.runtime.export import Exporter
    from peerlora.runtime.selection import BestRounds

EXPORTED = 64  # a run of more clients writes their adapters in one file only; `peerlora export` makes folders of it
BEST = Path("adapters/best.safetensors")
FOLDERS = Path("adapters/best")


def write_best(run: Path, best: BestRounds) -> None:
    """Write the adapters, [client], with the rounds that they are of, into a run folder."""
    assert best.x is not None, "every run is evaluated"
    tensors = {"flat": best.x.flat, "ranks": best.x.ranks, "rounds": torch.tensor(best.rounds)}
    (run / BEST).parent.mkdir(exist_ok=True)
    with atomic_file(run / BEST) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary)


def read_best(run: Path, layout: Adapters) -> Adapters | None:
    """What `write_best` wrote, with the layout of the run's adapters; None where a run selects nothing."""
    if not (run / BEST).is_file():
        return None
    saved = load_file(run / BEST)
    return replace(layout, flat=saved["flat"], ranks=saved["ranks"], merged=None)


def write_best_folders(run: Path, to: Exporter, summary: Mapping[str, Any]) -> None:
    """Write a PEFT folder per client, as of the last round; of a run of many clients none."""
    best = read_best(run, to.layout)
    if best is None or best.clients > EXPORTED:
        return
    for row, client in enumerate(to.clients):
        to.write(
            run / FOLDERS / f"client-{client:02d}", best, row, summary, client, more_facts=best_facts(summary, row)
        )
    sync_tree(run / FOLDERS)


def best_facts(summary: Mapping[str, Any], row: int) -> dict[str, str]:
    """For the card of the best adapter in this row: of which round it is, and by what."""
    best = summary["best"]
    value = best["values"][row]
    reached = "" if value is None else f", {value:.4g}"
    return {"kept": f"round {best['rounds'][row]}, by {best['metric']}{reached} on the {best['rows']} rows"}
