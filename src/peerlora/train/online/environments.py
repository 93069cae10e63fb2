"""Environments: what a policy acts in, many episodes side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from peerlora.errors import ConfigError, nearest

POINT_MASS = "point-mass"
Values = Mapping[str, Float[np.ndarray, " episode"]]
"""Attribute -> its value in every episode."""
Controller = Callable[[Float[np.ndarray, "episode observation"]], Float[np.ndarray, "episode action"]]
"""A scripted policy on the nominal environment: observations -> actions in [-1, 1]."""


@dataclass(frozen=True)
class EnvironmentFacts:
    """What is known of an environment before anybody acts in it."""

    name: str
    observation: int
    action: int
    horizon: int | None
    """Steps of an episode; None: without end."""


@dataclass(frozen=True)
class Outcome:
    """One step of all episodes."""

    reward: Float[np.ndarray, " episode"]
    reached: Float[np.ndarray, "episode observation"]
    """What is observed after the step."""
    terminal: Bool[np.ndarray, " episode"]
    """Episodes that ended with it for good."""
    truncated: Bool[np.ndarray, " episode"]
    """Episodes that the environment itself cut short: none goes on, and what was reached is still worth something."""
    observation: Float[np.ndarray, "episode observation"]
    """What the next action answers: ``reached``, or after an episode's last step the start of another one."""

    @property
    def ended(self) -> Bool[np.ndarray, " episode"]:
        """Episodes that do not go on."""
        return self.terminal | self.truncated


@runtime_checkable
class Environment(Protocol):
    """Episodes side by side, each with attributes of its own; observations are of the order of 1."""

    facts: EnvironmentFacts

    def reset(self, seeds: Sequence[int]) -> Float[np.ndarray, "episode observation"]:
        """Begin every episode, at a start that its seed alone decides."""
        ...

    def step(self, actions: Float[np.ndarray, "episode action"]) -> Outcome:
        """Let every episode take one action in [-1, 1]."""
        ...


def check_attributes(name: str, varied: Sequence[str], known: Sequence[str]) -> None:
    """Raise ConfigError for an attribute that an environment does not have."""
    for each in varied:
        if each not in known:
            raise ConfigError(
                f"partition: {name} has no attribute {each!r} that a client could have a value of its own of"
                f"{nearest(each, known)}; expected one of {', '.join(sorted(known))}"
            )
