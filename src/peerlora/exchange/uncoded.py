"""What exchanges have in common that send every vector as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from peerlora.exchange.schema import Schema
from peerlora.randomness import torch_generator
from peerlora.topology.schedule import Topology


class Uncoded:
    """Nothing is compressed, so nothing is remembered between rounds."""

    topology: Topology
    t: int

    def on_the_wire(self, vectors: Schema) -> Schema:
        """What is sent for these named vectors: they themselves."""
        return vectors

    def state(self) -> dict[str, Tensor]:
        """What must be saved to go on: nothing."""
        return {}

    def load_state(self, saved: dict[str, Tensor]) -> None:
        """Take up what ``state`` gave."""

    def shared_random(self, purpose: str) -> torch.Generator:
        """From the seed of the topology, which is that of the run, and the round."""
        return torch_generator(self.topology.seed, f"shared {purpose}", round=self.t)
