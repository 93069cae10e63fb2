"""How far down each client's backward pass gets: what lies below is not in the graph, so its time is really saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from peerlora.lora.adapters import AdapterSpec
from peerlora.lora.layer_order import by_column, columns_reached, depth_of


@dataclass(frozen=True)
class BackwardDepth:
    """Of each client held here.  Parts of layers below ``depth`` do not train, and their optimiser memory is held."""

    depth: Int[Tensor, " client"]
    """Layers reached, counted from the head down (``lora.depth``); 0: none."""
    factor: Float[Tensor, "client layer"]
    """What the cut steps have moved a layer by is multiplied by this."""
    last_only: bool = False
    """Whether only a round's last local step is cut, or every one."""


@dataclass(frozen=True)
class TrainableColumns:
    """The same for a group of clients that get equally deep: which columns train in which local step."""

    full: Mapping[str, slice]
    reached: Mapping[str, slice]
    first: int = 0
    """The local step from which on backward is cut."""
    factor: Float[Tensor, "client parameter"] | None = None

    def active(self, k: int) -> Mapping[str, slice]:
        """The parts that train in local step ``k``, and their columns."""
        return self.reached if k >= self.first else self.full

    def corrected(
        self, before: Float[Tensor, "client parameter"], after: Float[Tensor, "client parameter"]
    ) -> Float[Tensor, "client parameter"]:
        """``before + factor (after - before)``; to the bit ``after`` where the factor is 1."""
        if self.factor is None:
            return after
        return torch.where(self.factor == 1, after, before + self.factor * (after - before))


def moment_groups(spec: AdapterSpec, blocks: tuple[str, ...], by_layer: bool) -> tuple[str, ...]:
    """The names by which an optimiser counts steps: blocks, or parts of them where layers may train unequally often."""
    return tuple(columns_reached(spec, blocks, depth_of(spec), True)) if by_layer else blocks


def all_columns(spec: AdapterSpec, blocks: tuple[str, ...]) -> TrainableColumns:
    """Nothing is cut."""
    active = {block: spec.columns(block) for block in blocks if spec.columns(block).stop}
    return TrainableColumns(active, active)


def cut(
    spec: AdapterSpec, blocks: tuple[str, ...], reach: BackwardDepth, clients: list[int], steps: int, by_layer: bool
) -> TrainableColumns:
    """For clients of one depth."""
    depth = int(reach.depth[clients[0]])
    factor = by_column(spec, reach.factor[clients])
    return TrainableColumns(
        columns_reached(spec, blocks, depth_of(spec), by_layer),
        columns_reached(spec, blocks, depth, by_layer),
        steps - 1 if reach.last_only else 0,
        None if bool((factor == 1).all()) else factor,
    )
