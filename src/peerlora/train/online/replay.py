"""The replay buffers of all clients held here: one ring of transitions each, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Transitions:
    """Steps of environments; each leaf has two leading axes, [client, step]."""

    observation: Float[Tensor, "client step observation"]
    action: Float[Tensor, "client step action"]
    reward: Float[Tensor, "client step"]
    reached: Float[Tensor, "client step observation"]
    """What was observed after the step."""
    terminal: Float[Tensor, "client step"]
    """1 where the episode ended there for good, so that nothing follows; 0 also where only its time was up."""


NAMES = tuple(each.name for each in fields(Transitions))


class Replay:
    """Keeps each client's newest ``capacity`` transitions."""

    def __init__(self, clients: int, capacity: int, observation: int, action: int, dtype: torch.dtype):
        widths = {"observation": (observation,), "action": (action,), "reached": (observation,)}
        self.kept = Transitions(
            **{name: torch.zeros(clients, capacity, *widths.get(name, ()), dtype=dtype) for name in NAMES}
        )
        self.capacity, self.seen = capacity, torch.zeros(clients, dtype=torch.int64)
        """``seen``: transitions that each client has ever added."""

    def add(self, clients: Sequence[int], new: Transitions) -> None:
        """Add as many transitions of each of these clients; the oldest make room."""
        rows = torch.as_tensor(list(clients))
        steps = new.reward.shape[1]
        first = max(0, steps - self.capacity)  # of more than fit, the last
        places = (self.seen[rows, None] + torch.arange(first, steps)) % self.capacity
        for name in NAMES:
            getattr(self.kept, name)[rows[:, None], places] = getattr(new, name)[:, first:]
        self.seen[rows] += steps

    def draw(self, clients: Sequence[int], generators: Sequence[torch.Generator], count: int) -> Transitions:
        """``count`` transitions of each of these clients, drawn with replacement by its own generator."""
        rows = torch.as_tensor(list(clients))
        filled = self.seen[rows].clamp_max(self.capacity)
        drawn = [torch.rand(count, generator=each, dtype=torch.float64) for each in generators]
        places = (torch.stack(drawn) * filled[:, None]).long()
        return Transitions(**{name: getattr(self.kept, name)[rows[:, None], places] for name in NAMES})

    def largest_reward(self, clients: Sequence[int]) -> Float[Tensor, " client"]:
        """The largest size of a reward that each of these clients keeps."""
        return self.kept.reward[torch.as_tensor(list(clients))].abs().amax(1)

    def state_dict(self) -> dict[str, Tensor]:
        """All that is kept."""
        return {"seen": self.seen, **{name: getattr(self.kept, name) for name in NAMES}}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.seen = saved["seen"].clone()
        self.kept = Transitions(**{name: saved[name].clone() for name in NAMES})
