"""Whether a value of an environment's attribute changes anything that a policy could meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from peerlora.errors import ConfigError
from peerlora.randomness import numpy_generator
from peerlora.train.online.demonstrations import scripted_controller
from peerlora.train.online.environment_names import build_environment
from peerlora.train.online.environments import Controller, EnvironmentFacts
from peerlora.train.online.gymnasium_environment import nominal_value

_STEPS = 1000  # of each of the episodes that are compared, at most
_SHARES = np.linspace(1.0, 0.5, 9)  # of the scripted actions: one pace may pass two goals in the same step


def check_effects(facts: EnvironmentFacts, values: Mapping[str, Sequence[float]]) -> tuple[str, ...]:
    """Raise ConfigError for an attribute that changes nothing, so that clients would be alike; warn of single values.

    Environments often take a copy of what they are made with: a torque limit is one, whose Box stays as it was.
    """
    warnings = ()
    for attribute, given in values.items():
        nominal = nominal_value(facts.name, attribute)
        others = [value for value in sorted(set(map(float, given))) if value != nominal]
        idle = [value for value in others if not has_effect(facts, attribute, value)]
        if not idle:
            continue
        sentence = (
            f"partition: {attribute}={', '.join(f'{value:g}' for value in idle)} changes nothing in {facts.name} that "
            f"episodes of full, random and scripted actions show (nominal: {nominal:g})"
        )
        if idle == others:
            raise ConfigError(f"{sentence}, so clients would be alike; use other values, or another attribute")
        warnings += (f"{sentence}; clients with such values may be alike",)
    return warnings


@lru_cache(maxsize=256)
def has_effect(facts: EnvironmentFacts, attribute: str, value: float) -> bool:
    """Whether an episode with this value differs from a nominal one of the same start and actions."""
    nominal = nominal_value(facts.name, attribute)
    return any(_differ(facts, attribute, (nominal, value), act) for act in _controllers(facts))


def _differ(facts: EnvironmentFacts, attribute: str, values: tuple[float, float], act: Controller) -> bool:
    pair = build_environment(facts.name, 2, {attribute: np.array(values)})
    observed = pair.reset([0, 0])
    for _ in range(min(facts.horizon or _STEPS, _STEPS)):
        if not np.array_equal(observed[0], observed[1]):
            return True
        found = pair.step(np.repeat(act(observed[:1]), 2, axis=0))
        if found.reward[0] != found.reward[1] or found.ended[0] != found.ended[1]:
            return True
        observed = found.observation
    return False


def _controllers(facts: EnvironmentFacts) -> Iterator[Controller]:
    """Full actions either way, random ones, and those of the controller that is written for the environment."""
    drawn = numpy_generator(0, "effects")

    def constant(value: float) -> Controller:
        return lambda observed: np.full((len(observed), facts.action), value)

    def random(observed: Float[np.ndarray, "episode observation"]) -> Float[np.ndarray, "episode action"]:
        return drawn.uniform(-1, 1, (len(observed), facts.action))

    yield from (constant(1.0), constant(-1.0), random)
    if scripted := scripted_controller(facts.name):
        for share in _SHARES:
            yield lambda observed, share=share: share * scripted(observed)
