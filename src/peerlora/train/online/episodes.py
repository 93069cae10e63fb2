"""Episodes: what policies are evaluated on, in place of rows; and the environments that clients act in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from peerlora.config.sections import EnvironmentPartition
from peerlora.randomness import derive, numpy_generator
from peerlora.train.online.environment_names import build_environment
from peerlora.train.online.environments import POINT_MASS, Environment
from peerlora.train.online.point_mass import PointMass


@dataclass(frozen=True)
class Episodes:
    """Episodes that are the same whoever acts in them: starts, attributes and the policy's noise are given by seeds."""

    env: str
    horizon: int
    seeds: Sequence[int]
    """[episode]"""
    values: Mapping[str, Float[np.ndarray, " episode"]]
    """Attributes that are not nominal."""
    names: ClassVar[tuple[str, ...]] = ()
    """There are no classes."""

    def __len__(self) -> int:
        return len(self.seeds)

    def take(self, numbers: np.ndarray) -> Episodes:
        """Some of them."""
        values = {name: own[numbers] for name, own in self.values.items()}
        return Episodes(self.env, self.horizon, [self.seeds[i] for i in numbers.tolist()], values)

    def environment(self, policies: int) -> Environment:
        """All of them side by side, once for each policy, one policy after another."""
        values = {name: np.tile(own, policies) for name, own in self.values.items()}
        return build_environment(self.env, policies * len(self), values)

    def optimal_returns(self) -> Float[np.ndarray, " episode"]:
        """The largest return of each, where a closed form is known: of the point mass."""
        assert self.env == POINT_MASS
        return PointMass(len(self), self.values).optimal_returns(self.seeds, self.horizon)

    def digests(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        drawn = repr(
            (self.env, self.horizon, list(self.seeds), {name: own.tolist() for name, own in self.values.items()})
        )
        return {"rows": len(self), "episodes": hashlib.sha256(drawn.encode()).hexdigest()}


@dataclass(frozen=True)
class ClientEnvironments:
    """The environments of all clients: what takes the place of a division of rows."""

    env: str
    values: Mapping[str, Float[np.ndarray, " environment"]]
    """Attributes in which environments differ, those of client 0 first."""
    clients: int
    each: int = 1
    """Environments of a client."""
    warnings: tuple[str, ...] = ()

    @property
    def shards(self) -> tuple[np.ndarray, ...]:
        """[client] the values of its environments' attributes, one environment after another."""
        return tuple(
            np.array([own[i] for i in self.numbers([client]) for own in self.values.values()])
            for client in range(self.clients)
        )

    def numbers(self, clients: Sequence[int]) -> list[int]:
        """The environments of these clients, one client after another."""
        return [client * self.each + i for client in clients for i in range(self.each)]

    def report(self) -> dict[str, Any]:
        """The attributes of every environment, in plain lists."""
        values = {name: own.tolist() for name, own in self.values.items()}
        return {"environment": self.env, "values": values, "each": self.each}

    def of(self, clients: Sequence[int], episodes: int) -> dict[str, Float[np.ndarray, " episode"]]:
        """The attributes of so many episodes in each environment of these clients, one client after another."""
        return {name: np.repeat(own[self.numbers(clients)], episodes) for name, own in self.values.items()}

    def episodes(self, each: int, horizon: int, seed: int) -> Episodes:
        """So many episodes for evaluation in every environment, which do not depend on whose environment it is."""
        numbers = self.numbers(range(self.clients))
        seeds = [derive(seed, f"evaluated {i}", client=number) for number in numbers for i in range(each)]
        return Episodes(self.env, horizon, seeds, self.of(range(self.clients), each))


def client_environments(env: str, settings: EnvironmentPartition, clients: int, seed: int) -> ClientEnvironments:
    """The environments of every client: given, or each drawn by a generator of its own."""
    values = {name: np.array(own, dtype=float) for name, own in settings.values.items()}
    for name, (low, high) in settings.vary.items():
        numbers = range(clients * settings.each)
        draws = [numpy_generator(seed, f"environment {name}", client=i).uniform() for i in numbers]
        values[name] = low + (high - low) * np.array(draws)
    return ClientEnvironments(env, dict(sorted(values.items())), clients, settings.each)
