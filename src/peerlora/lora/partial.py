"""Adapters of which a client sends some layers only."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from peerlora.lora.adapters import Adapters, Slot, shape_at_rank
from peerlora.lora.layer_order import by_column, layer_numbers

REACHED = "reached"
"""The name under which a message says which layers it holds, beside them: 1 where it does, else 0."""


@dataclass(frozen=True)
class PartialAdapters(Adapters):
    """Adapters of which each client sends some layers only; the others hold zeros."""

    sent: Bool[Tensor, "client layer"] | None = None

    @classmethod
    def of(cls, x: Adapters, sent: Bool[Tensor, "client layer"]) -> PartialAdapters:
        """The layers that are sent."""
        flat = torch.where(by_column(x.spec, sent.to(x.flat.device)), x.flat, 0.0)
        return cls(x.spec, flat, x.ranks, x.merged, sent)

    def message(self, client: int = 0) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What one client sends."""
        assert self.sent is not None
        layers = (self.sent[client].nonzero().flatten() + 1).tolist()
        return {name: (shape, self.flat.dtype) for name, shape in self._of(layers, int(self.ranks[client])).items()}

    def expected_shapes(self, rank: int, names: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Whole layers: those of which a client names anything."""
        return self._of(self._named(names), rank)

    def fault(self, names: Collection[str], reached: Tensor | None) -> str | None:
        """Why a message with these names says of itself that it holds other layers; None where it does not."""
        if reached is None:
            return "it does not say which layers it holds"
        shared = {number for number, slot in self._numbered() if slot.start < self.spec.shared.stop}
        said = {number for number, value in enumerate(reached.tolist(), start=1) if value != 0}
        if not bool(((reached == 0) | (reached == 1)).all()):
            return "which layers it holds is not told by zeros and ones"
        return "it holds other layers than it says" if said & shared != self._named(names) else None

    def _of(self, layers: Collection[int], rank: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{slot.block}:{slot.name}": shape_at_rank(slot, rank)
            for number, slot in self._numbered()
            if slot.start < self.spec.shared.stop and number in layers
        }

    def _named(self, names: Collection[str]) -> set[int]:
        return {number for number, slot in self._numbered() if f"{slot.block}:{slot.name}" in names}

    def _numbered(self) -> list[tuple[int, Slot]]:
        return list(zip(layer_numbers(self.spec), self.spec.slots, strict=True))


def fault(leaf: PartialAdapters, prefix: str, sent: Mapping[str, Tensor]) -> str | None:
    """The same of the vectors of a whole message, in which the names of these adapters begin with ``prefix``."""
    names = {name.removeprefix(prefix) for name in sent if name.startswith(prefix)}
    return leaf.fault(names, sent.get(REACHED))
