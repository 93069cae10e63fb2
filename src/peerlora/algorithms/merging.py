"""Checks that a run has memory for the sums of products that a method keeps, and a base that takes merges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from peerlora.environment import main_memory
from peerlora.errors import CompositionError
from peerlora.lora.base_weights import quantised_form
from peerlora.topology.storage import row_counts

if TYPE_CHECKING:
    from torch import nn

    from peerlora.algorithms.base import Algorithm
    from peerlora.lora.adapters import Adapters
    from peerlora.topology.schedule import Topology

_COPIES = 3  # the sum, the longer one that replaces it, and what a checkpoint writes


def check_merges(name: str, algorithm: Algorithm[Any], topology: Topology, rounds: int, x: Adapters, base: nn.Module):
    """Raise CompositionError where a method's merges don't fit this machine, or the base cannot take any.

    ``x`` are the initial adapters of the clients held here.
    """
    into = algorithm.traits.merges_into
    if into is None:
        return
    quantised = quantised_form(base)
    if into == "base" and quantised:
        raise CompositionError(
            f"{name} merges into the base, and {quantised}; merging needs weights of full precision: load the base "
            "unquantised, or use algorithm.name=dec-lora"
        )
    senders = topology.clients if topology.graph is None else int(row_counts(topology.graph).max()) + 1
    columns = algorithm.merged_columns(x.spec.rank, senders, rounds)
    needed = _COPIES * x.clients * _scalars(x, columns) * x.flat.element_size()
    there, of_what = room(x.flat.device)
    if needed > there:
        raise CompositionError(
            f"{name} would hold up to {columns} merged columns in each of {len(x.spec.layers)} layers for each of "
            f"{x.clients} clients: {needed / 1e9:.3g} GB with the copies that a merge and a checkpoint make, "
            f"{of_what} {there / 1e9:.3g} GB; use fewer clients, adapter.targets with fewer layers, or "
            "algorithm.name=dec-lora"
        )


def room(device: torch.device) -> tuple[int, str]:
    """Bytes that adapters on this device can have at most, and how to say so."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], "and the GPU has free"
    return main_memory(), "and this machine has"


def _scalars(x: Adapters, columns: int) -> int:
    """Of one client: low-rank while that is smaller than dense."""
    layers = x.spec.layers
    return sum(min(columns * (layer.d_in + layer.d_out), layer.d_in * layer.d_out) for layer in layers)
