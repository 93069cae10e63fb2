"""How many layers each client's backward pass reaches in a round: drawn, or what a deadline allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from peerlora.algorithms.gossip import Scheduled
from peerlora.errors import ConfigError

if TYPE_CHECKING:
    from peerlora.exchange.base import Exchange
    from peerlora.train.base import Learner


@dataclass(frozen=True)
class DepthGossip(Scheduled):
    """A method whose clients do not all reach every layer; layers count from the head (1) down (``lora.depth``)."""

    depth: Literal["uniform", "poisson", "deadline"] = "uniform"
    """uniform: stragglers reach 1 to L layers, all equally likely; poisson: a Poisson number of layers; deadline: what
    ``deadline`` and the client's speed on the virtual clock allow."""
    stragglers: float = 0.9
    """Chance that a client is a straggler in a round (uniform); the others reach everything."""
    rate: float = 4.0
    """Mean number of layers (poisson)."""
    deadline: float | None = None
    """Virtual seconds for the local steps of a round (deadline); null: no end."""
    forward: float = 0.5
    """Share of a step's time that its forward pass takes (deadline); the layers share the rest equally."""

    def __post_init__(self):
        super().__post_init__()
        if not (0 <= self.stragglers <= 1 and 0 < self.forward < 1 and self.rate > 0):
            raise ConfigError(
                f"algorithm.stragglers={self.stragglers:g}, forward={self.forward:g}, rate={self.rate:g} given; "
                "expected 0 to 1, between 0 and 1, above 0"
            )
        if self.deadline is not None and (self.depth != "deadline" or self.deadline <= 0):
            raise ConfigError(
                f"algorithm.deadline={self.deadline:g}: expected seconds above 0 together with depth=deadline "
                f"(depth={self.depth} given)"
            )

    @property
    def time_limit(self) -> float | None:
        """``deadline``."""
        return self.deadline

    @property
    def needs_clock(self) -> str | None:
        """Why there has to be a virtual clock, or None."""
        return "algorithm.deadline asks for the clients' speeds" if self.deadline is not None else None

    def deadline_warning(self, seconds: float) -> str | None:
        """A deadline within the forward passes, by which no layer is reached."""
        forward = self.forward * seconds
        if self.deadline is None or self.deadline > forward:
            return None
        return (
            f"algorithm.deadline={self.deadline:g}: the forward passes of a round's local steps alone take the fastest "
            f"client {forward:g} virtual seconds (all of these steps {seconds:g}), so no client trains; give more than "
            f"{forward:g}"
        )

    def depths(self, layers: int, learner: Learner, peers: Exchange) -> Int[Tensor, " client"] | None:
        """Layers that each client reaches in this round; None where all reach everything by the settings."""
        clients, draw = torch.as_tensor(peers.clients), peers.shared_random("depth")
        total = peers.graph.clients
        if self.depth == "uniform":
            cut_short = torch.rand(total, generator=draw) < self.stragglers
            depth = torch.where(cut_short, torch.randint(1, layers + 1, (total,), generator=draw), layers)
            return depth[clients] if self.stragglers else None
        if self.depth == "poisson":
            drawn = torch.poisson(torch.full((total,), self.rate), generator=draw)
            return drawn.clamp_max(layers).long()[clients]
        if self.deadline is None:
            return None
        assert learner.step_seconds is not None, "a deadline needs a clock"
        return self.in_time(self.deadline, layers, learner.step_seconds, learner.settings.local_steps)

    def in_time(
        self, deadline: float, layers: int, step_seconds: Float[Tensor, " client"], steps: int
    ) -> Int[Tensor, " client"]:
        """Layers that each client reaches in ``steps`` local steps that end at the deadline."""
        of_step = deadline / steps / step_seconds
        share = (of_step.nan_to_num(0.0) - self.forward) / (1 - self.forward)  # NaN: absent
        return (share * layers + 1e-9).floor().clamp(0, layers).long()

    def chances(self, layers: int) -> Float[Tensor, " layer"]:
        """q_l, the chance that a client reaches layer l; 1 for every layer that a deadline lets it reach."""
        l = torch.arange(1, layers + 1, dtype=torch.float64)  # noqa: E741 (the paper's letter)
        if self.depth == "uniform":
            return 1 - self.stragglers * (l - 1) / layers
        if self.depth == "poisson":
            return torch.special.gammainc(l, torch.full_like(l, self.rate))
        return torch.ones_like(l)
