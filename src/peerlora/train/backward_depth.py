"""Backward passes cut short, client by client: layers below the cut are not in the graph, so their time is saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from peerlora.lora.adapters import AdapterSpec, Block
from peerlora.lora.layer_order import by_column, columns_reached, depth_of


@dataclass(frozen=True)
class BackwardDepth:
    """Depth of each client's backward pass.  Layers below it do not train, and their optimiser memory is held."""

    depth: Int[Tensor, " client"]
    """Layers reached, counted from the head down (``lora.depth``); 0: none."""
    factor: Float[Tensor, "client layer"]
    """Multiplies what the cut steps have moved a layer by."""
    last_only: bool = False
    """True: only a round's last local step is cut; False: every one."""


@dataclass(frozen=True)
class TrainableColumns:
    """Which columns train in which local step, for clients whose backward passes get equally deep."""

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


def moment_groups(spec: AdapterSpec, blocks: tuple[Block, ...], per_layer_moments: bool) -> tuple[str, ...]:
    """The names by which an optimiser counts steps: blocks, or parts of them where layers may train unequally often."""
    return tuple(columns_reached(spec, blocks, depth_of(spec), True)) if per_layer_moments else blocks


def all_columns(spec: AdapterSpec, blocks: tuple[Block, ...]) -> TrainableColumns:
    """All columns of these blocks in every step."""
    active = {block: spec.columns(block) for block in blocks if spec.columns(block).stop}
    return TrainableColumns(active, active)


def truncated_columns(
    spec: AdapterSpec,
    blocks: tuple[Block, ...],
    depth: BackwardDepth,
    clients: list[int],
    steps: int,
    per_layer_moments: bool,
) -> TrainableColumns:
    """The columns of these blocks for clients of one depth."""
    factor = by_column(spec, depth.factor[clients])
    return TrainableColumns(
        columns_reached(spec, blocks, depth_of(spec), per_layer_moments),
        columns_reached(spec, blocks, int(depth.depth[clients[0]]), per_layer_moments),
        steps - 1 if depth.last_only else 0,
        None if bool((factor == 1).all()) else factor,
    )
