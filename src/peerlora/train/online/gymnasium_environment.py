"""Environments of gymnasium whose actions are a Box; needs the extra ``rl``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
from jaxtyping import Float

from peerlora.environment import need_extra
from peerlora.errors import ConfigError, RunError, first_line, nearest
from peerlora.train.online.environments import POINT_MASS, EnvironmentFacts, Outcome, Values, check_attributes

_LARGEST = 4096  # numbers of an observation or an action; a policy's layers are small


class GymnasiumEnvironment:
    """Episodes of one environment, stepped one after another.

    Actions in [-1, 1] are scaled to the Box, and observations to [-1, 1] where their Box is bounded.
    """

    def __init__(self, name: str, episodes: int, values: Values):
        self._each = [_make(name) for _ in range(episodes)]
        self.facts = _facts(name, self._each[0])
        for attribute, own in values.items():
            for environment, value in zip(self._each, own, strict=True):
                setattr(environment, attribute, float(value))
        self._of_action = BoxScale(self._each[0].action_space)
        self._of_observation = BoxScale(self._each[0].observation_space)

    def reset(self, seeds: Sequence[int]) -> Float[np.ndarray, "episode observation"]:
        """See ``Environment``."""
        with _named(self.facts.name):
            started = [each.reset(seed=seed % 2**31)[0] for each, seed in zip(self._each, seeds, strict=True)]
        return self._observed(started)

    def step(self, actions: Float[np.ndarray, "episode action"]) -> Outcome:
        """See ``Environment``."""
        reached, observed, rewards, ends = [], [], [], []
        for environment, action in zip(self._each, self._of_action.unscaled(actions), strict=True):
            with _named(self.facts.name):
                found, reward, *end, _ = environment.step(action)
                observed.append(environment.reset()[0] if any(end) else found)
            reached.append(found)
            rewards.append(float(reward))
            ends.append(end)
        terminal, truncated = np.array(ends, dtype=bool).T
        return Outcome(np.array(rewards), self._observed(reached), terminal, truncated, self._observed(observed))

    def _observed(self, found: Sequence[Any]) -> Float[np.ndarray, "episode observation"]:
        shape = self._of_observation.shape
        return self._of_observation.scaled(np.stack([np.asarray(each, np.float64).reshape(shape) for each in found]))


class BoxScale:
    """Scales between a Box of gymnasium and [-1, 1], as policies see and act; numbers without bounds stay as they are.

    ``box``: the space of an environment's observations, or of its actions.
    """

    def __init__(self, box: Any):
        self.shape: tuple[int, ...] = box.shape
        low, high = (np.asarray(each, np.float64).reshape(-1) for each in (box.low, box.high))
        bounded = np.isfinite(low) & np.isfinite(high) & (np.abs(low) < 1e6) & (np.abs(high) < 1e6)
        low, high = (np.where(bounded, each, 0.0) for each in (low, high))
        self.middle = (low + high) / 2
        self.half = np.where(high > low, (high - low) / 2, 1.0)
        self.kind = box.dtype

    def scaled(self, values: Float[np.ndarray, ...]) -> Float[np.ndarray, "*row number"]:
        """What a policy sees of observations, each of the Box's shape, as one list of numbers each."""
        rows = values.shape[: values.ndim - len(self.shape)]
        return (values.reshape(*rows, -1) - self.middle) / self.half

    def unscaled(self, values: Float[np.ndarray, "*row number"]) -> np.ndarray:
        """The actions in the Box, of its shape and type, that a policy's actions stand for."""
        found = (self.middle + self.half * values).astype(self.kind)
        return found.reshape(*values.shape[:-1], *self.shape)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Raise RunError, naming the environment, where it fails: with attributes of zero, say, by which it divides."""
    try:
        yield
    except Exception as error:  # environments of strangers bring out errors of every class
        raise RunError(
            f"{name} fails in an episode ({first_line(error)}); choose other values of its attributes (partition.vary, "
            "partition.values), or another environment"
        ) from None


def gymnasium_facts(name: str, varied: Sequence[str]) -> EnvironmentFacts:
    """See ``environments.facts_of``."""
    need_extra("rl")
    import gymnasium  # pyright: ignore[reportMissingImports]
    from gymnasium.spaces import Box  # pyright: ignore[reportMissingImports]

    if _own_id(name) not in gymnasium.registry:
        known = [POINT_MASS, *gymnasium.registry]
        raise ConfigError(
            f"task.env={name!r} is unknown{nearest(name, known)}; expected {POINT_MASS}, or an id that gymnasium knows "
            "(or package:id, which it imports) and whose actions are a Box, such as Pendulum-v1"
        )
    made = _make(name)
    for what, space in (("actions", made.action_space), ("observations", made.observation_space)):
        if not isinstance(space, Box) or not 0 < int(np.prod(space.shape)) <= _LARGEST:
            raise ConfigError(
                f"task.env={name}: its {what} are {space}; a flow policy needs a Box of at most {_LARGEST} numbers, as "
                "of Pendulum-v1 or MountainCarContinuous-v0"
            )
    numbers = [key for key, value in vars(made).items() if type(value) in (int, float) and not key.startswith("_")]
    check_attributes(name, varied, numbers)
    return _facts(name, made)


def _facts(name: str, made: Any) -> EnvironmentFacts:
    import gymnasium  # pyright: ignore[reportMissingImports]

    sizes = (int(np.prod(space.shape)) for space in (made.observation_space, made.action_space))
    return EnvironmentFacts(name, *sizes, horizon=gymnasium.spec(_own_id(name)).max_episode_steps)


def nominal_value(name: str, attribute: str) -> float:
    """What an attribute of an environment is where nobody gives it."""
    return float(getattr(_make(name), attribute))


def _own_id(name: str) -> str:
    """The id without the package that registers it: "package:Env-v0" is imported first, as by gymnasium.make.

    Raises ConfigError where that package cannot be imported.
    """
    package, colon, own = name.rpartition(":")
    if colon:
        try:
            import_module(package)
        except Exception as error:  # packages of strangers bring out errors of every class
            raise ConfigError(
                f"task.env={name}: the package {package!r} that is to register {own} cannot be imported "
                f"({first_line(error)}); install it, or name another environment"
            ) from None
    return own


def _make(name: str) -> Any:
    """One environment without wrappers: a time limit of its own would end what this package counts itself."""
    import gymnasium  # pyright: ignore[reportMissingImports]

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ids with newer versions, and of precision
            return gymnasium.make(name, disable_env_checker=True).unwrapped
    except Exception as error:  # environments of strangers bring out errors of every class
        raise ConfigError(
            f"task.env={name} cannot be made ({first_line(error)}); install what it needs, or use another one"
        ) from None
