"""The rank-one components of adapters, component k of a layer being b_k a_k, layer by layer."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from peerlora.lora.adapters import Adapters, AdapterSpec


def components(spec: AdapterSpec) -> int:
    """How many a client has: ``rank`` of every layer."""
    return len(spec.layers) * spec.rank


def component_norms(x: Adapters) -> Float[Tensor, "client component"]:
    """``|b_k| |a_k|``: the norm of each rank-one part, whichever factor carries its size."""
    return torch.cat([x.B[layer].norm(dim=1) * A.norm(dim=2) for layer, A in x.A.items()], dim=1)


def largest(scores: Float[Tensor, "client component"], count: int) -> Bool[Tensor, "client component"]:
    """The ``count`` components of each client with the largest scores; of equal ones the first."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], True)


def coordinates(spec: AdapterSpec, held: Bool[Tensor, "client component"]) -> Bool[Tensor, "client parameter"]:
    """Which coordinates belong to held components; those of the head all do."""
    by_layer = dict(zip([layer.name for layer in spec.layers], held.split(spec.rank, dim=1), strict=True))
    parts = []
    for slot in spec.slots:
        if slot.block == "head":
            parts.append(torch.ones(len(held), slot.stop - slot.start, dtype=torch.bool, device=held.device))
        else:
            own = by_layer[slot.name][:, :, None] if slot.block == "A" else by_layer[slot.name][:, None, :]
            parts.append(own.expand(-1, *slot.shape).flatten(1))
    return torch.cat(parts, dim=1)
