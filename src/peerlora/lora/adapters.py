"""Adapters: the LoRA factors and heads of all clients held here, in one flat [client, parameter] buffer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from peerlora.lora.merged import Merged, client_mean

Block = Literal["A", "B", "head"]
"""A part of an adapter that trains and travels as one: the factors A of all layers, their factors B, or the head."""
BLOCKS: tuple[Block, ...] = get_args(Block)


def parse_blocks(blocks: str | tuple[Block, ...]) -> tuple[Block, ...]:
    """The factors in a word such as "AB", or the blocks as given.  Raises ValueError for a word of other letters."""
    if not isinstance(blocks, str):
        return blocks
    found: tuple[Block, ...] = tuple(block for block in BLOCKS if block in blocks)
    if "".join(found) != blocks:
        raise ValueError(f"blocks {blocks!r} given; expected A, B or AB")
    return found


MANY = 2000
"""Clients from which equal starts share their memory."""


@dataclass(frozen=True)
class LayerSpec:
    """One adapted linear layer of the base model."""

    name: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in the flat buffer: columns ``start:stop``, to be seen as ``shape`` per client."""

    block: Block
    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        """The column after the last one."""
        return self.start + prod(self.shape)


@dataclass(frozen=True)
class AdapterSpec:
    """The layout common to all clients: first every A, then every B, then the head.

    ``rank`` is the largest of all clients; a smaller client's factors are padded with zeros.  Padding stays zero in
    training, since a zero row of A and a zero column of B give each other zero gradient.
    """

    layers: tuple[LayerSpec, ...]
    rank: int
    alpha: float
    head: tuple[tuple[str, tuple[int, ...]], ...] = ()
    private_head: bool = False
    blocks: tuple[Block, ...] = BLOCKS
    rslora: bool = False
    """Whether the scaling is alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732) in place of alpha / rank."""

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """All tensors in the order of the buffer."""
        shapes: list[tuple[Block, str, tuple[int, ...]]]
        shapes = [("A", layer.name, (self.rank, layer.d_in)) for layer in self.layers]
        shapes.extend(("B", layer.name, (layer.d_out, self.rank)) for layer in self.layers)
        shapes.extend(("head", name, shape) for name, shape in self.head)
        slots, start = [], 0
        for block, name, shape in shapes:
            if block in self.blocks:
                slots.append(Slot(block, name, shape, start))
                start = slots[-1].stop
        return tuple(slots)

    @cached_property
    def parameters(self) -> int:
        """Scalars per client, padding included."""
        return self.slots[-1].stop if self.slots else 0

    def scaling(self, rank: Any) -> Any:
        """What stands before B A in the update of a client of this rank; a number, or a tensor of them."""
        return self.alpha / (rank**0.5 if self.rslora else rank)

    def columns(self, block: Block) -> slice:
        """The contiguous columns of one block."""
        return self._columns.get(block, slice(0, 0))

    @cached_property
    def _columns(self) -> dict[Block, slice]:
        """By block that has any; rules of local steps ask in every step."""
        found: dict[Block, slice] = {}
        for slot in self.slots:
            start = found[slot.block].start if slot.block in found else slot.start
            found[slot.block] = slice(start, slot.stop)
        return found

    def trained(self, factors: tuple[Block, ...]) -> tuple[Block, ...]:
        """The blocks that change when these factors are trained: a head always does."""
        return tuple(block for block in self.blocks if block in factors or block == "head")

    @cached_property
    def shared(self) -> slice:
        """The columns that are exchanged: everything but a private head."""
        holds_private = self.private_head and self.columns("head").stop
        return slice(0, self.columns("head").start if holds_private else self.parameters)

    def select(self, *blocks: Block) -> AdapterSpec:
        """The layout of some blocks alone."""
        return replace(self, blocks=tuple(block for block in self.blocks if block in blocks))

    def exchanged(self) -> AdapterSpec:
        """The layout without a private head."""
        return self.select("A", "B") if self.private_head else self

    def columns_of(self, part: AdapterSpec) -> Int[Tensor, " column"]:
        """The columns of this buffer that hold the exchanged columns of ``part``, a layout of some of these blocks."""
        columns = [self.columns(block) for block in part.blocks]
        return torch.cat([torch.arange(each.start, each.stop) for each in columns])[part.shared]

    def view(self, slot: Slot, flat: Float[Tensor, "client parameter"]) -> Float[Tensor, "client ..."]:
        """One tensor of all clients as a view into the buffer."""
        return flat[:, slot.start : slot.stop].view(-1, *slot.shape)

    def row_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what one client of this rank exchanges: the real rank, no padding."""
        shapes = {}
        for slot in self.slots:
            if slot.start < self.shared.stop:
                shapes[f"{slot.block}:{slot.name}"] = shape_at_rank(slot, rank)
        return shapes


def shape_at_rank(slot: Slot, rank: int) -> tuple[int, ...]:
    """The shape that a slot has for a client of this rank."""
    if slot.block == "A":
        return (rank, slot.shape[1])
    return (slot.shape[0], rank) if slot.block == "B" else slot.shape


@dataclass(frozen=True)
class Adapters:
    """A value: N clients' adapters.  Views share the buffer's memory; no method changes it."""

    spec: AdapterSpec
    flat: Float[Tensor, "client parameter"]
    ranks: Int[Tensor, " client"]
    merged: Merged | None = None
    """What each client has folded into its base; None where the method never merges."""

    @property
    def clients(self) -> int:
        """How many clients are held here."""
        return self.flat.shape[0]

    @property
    def A(self) -> dict[str, Float[Tensor, "client rank d_in"]]:
        """The factors that touch the input, by layer."""
        return self._views("A")

    @property
    def B(self) -> dict[str, Float[Tensor, "client d_out rank"]]:
        """The factors that touch the output, by layer."""
        return self._views("B")

    @property
    def head(self) -> dict[str, Float[Tensor, "client ..."]]:
        """The trained head's tensors, by parameter name."""
        return self._views("head")

    def _views(self, block: Block) -> dict[str, Tensor]:
        return {slot.name: self.spec.view(slot, self.flat) for slot in self.spec.slots if slot.block == block}

    @property
    def scaling(self) -> Float[Tensor, " client"]:
        """Of every client: the update of a layer is ``scaling * B @ A``."""
        return self.spec.scaling(self.ranks.to(self.flat))

    @property
    def equal_ranks(self) -> bool:
        """Whether all clients here have the largest rank."""
        return bool((self.ranks == self.spec.rank).all())

    def select(self, *blocks: Block) -> Adapters:
        """Some blocks alone, as a copy."""
        spec = self.spec.select(*blocks)
        parts = [self.flat[:, self.spec.columns(name)] for name in spec.blocks]
        return replace(self, spec=spec, flat=torch.cat(parts, dim=1) if parts else self.flat[:, :0])

    def exchanged(self) -> Adapters:
        """These adapters without a private head."""
        return self.select("A", "B") if self.spec.private_head else self

    def with_blocks(self, part: Adapters) -> Adapters:
        """These adapters with the blocks of ``part`` in place of their own."""
        flat = self.flat.clone()
        for block in part.spec.blocks:
            flat[:, self.spec.columns(block)] = part.flat[:, part.spec.columns(block)]
        return replace(self, flat=flat)

    def with_shared(self, values: Float[Tensor, "client shared"]) -> Adapters:
        """These values in the columns that are exchanged; a private head stays."""
        if self.spec.shared.stop == self.flat.shape[1]:  # all there is: no copy of it
            return replace(self, flat=values)
        return replace(self, flat=torch.cat([values, self.flat[:, self.spec.shared.stop :]], dim=1))

    def message(self, client: int = 0) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What one client sends when it mixes these: name -> (shape at its real rank, dtype)."""
        shapes = self.spec.row_shapes(int(self.ranks[client]))
        return {name: (shape, self.flat.dtype) for name, shape in shapes.items()}

    def expected_shapes(self, rank: int, names: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what another client of this rank may send in a message with these names."""
        return self.spec.row_shapes(rank)

    def rows(self, clients: slice | Sequence[int]) -> Adapters:
        """Some of the clients held here."""
        merged = self.merged and self.merged.rows(clients)
        return replace(self, flat=self.flat[clients], ranks=self.ranks[clients], merged=merged)

    def to(self, device: torch.device | str) -> Adapters:
        """The same values on a device; ranks stay on the CPU."""
        return replace(self, flat=self.flat.to(device), merged=self.merged and self.merged.to(device))

    def mean(self) -> Adapters:
        """One client that holds the average of every factor and head (needs equal ranks) and of all merged products."""
        assert self.equal_ranks, "factors of different ranks have no mean"
        return replace(
            self, flat=client_mean(self.flat), ranks=self.ranks[:1], merged=self.merged and self.merged.mean()
        )

    def with_empty_merges(self) -> Adapters:
        """The same with an empty ``merged``: the start of a method that merges."""
        shapes = {layer.name: (layer.d_out, layer.d_in) for layer in self.spec.layers}
        return replace(self, merged=Merged.nothing(shapes, self.flat))

    def fold(self) -> Adapters:
        """The same models with every ``scaling * B A`` moved into ``merged``; B becomes zero."""
        assert self.merged is not None, "begin with with_empty_merges()"
        B = {name: self.scaling[:, None, None] * factor for name, factor in self.B.items()}
        merged = self.merged.plus({name: (B[name], A) for name, A in self.A.items()})
        flat = self.flat.clone()
        flat[:, self.spec.columns("B")] = 0.0
        return replace(self, flat=flat, merged=merged)


def initial_adapters(
    spec: AdapterSpec,
    ranks: Sequence[int],
    head: dict[str, Tensor],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Adapters:
    """A equal on all clients (Kaiming-uniform as in PEFT), B zero, the head as given.

    With independent A the first mixing would shrink A by 1/sqrt(N) and the product would no longer start at zero
    for all alike.  A client of smaller rank takes the first rows of the common A.
    """
    row = torch.zeros(spec.parameters, dtype=dtype)
    for slot in spec.slots:
        part = row[slot.start : slot.stop]
        if slot.block == "A":
            part.copy_(draw_factor(slot, generator))
        elif slot.block == "head":
            part.copy_(head[slot.name].reshape(-1))
    # Of many clients, one row that stands for all: training and mixing make rows of their own.
    rows = row.expand(len(ranks), -1) if len(ranks) >= MANY else row.repeat(len(ranks), 1)
    adapters = Adapters(spec, rows, torch.tensor(ranks))
    return mask_ranks(adapters)


def draw_factor(slot: Slot, generator: torch.Generator) -> Float[Tensor, " scalar"]:
    """Draw one factor, Kaiming-uniform as in PEFT, in float64."""
    bound = slot.shape[1 if slot.block == "A" else 0] ** -0.5  # kaiming_uniform_(a=sqrt(5)) in closed form
    return (torch.rand(prod(slot.shape), generator=generator, dtype=torch.float64) * 2 - 1) * bound


def mask_ranks(x: Adapters) -> Adapters:
    """Zero what lies beyond each client's own rank."""
    if x.equal_ranks:
        return x
    x = replace(x, flat=x.flat.clone())
    beyond = torch.arange(x.spec.rank) >= x.ranks[:, None]  # [client, rank]
    for A in x.A.values():
        A.masked_fill_(beyond[:, :, None], 0.0)
    for B in x.B.values():
        B.masked_fill_(beyond[:, None, :], 0.0)
    return x
