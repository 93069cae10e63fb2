"""Environments by their names: the point mass, and those of gymnasium."""

from __future__ import annotations

from collections.abc import Sequence

from peerlora.train.online.environments import POINT_MASS, Environment, EnvironmentFacts, Values, check_attributes
from peerlora.train.online.gymnasium_environment import GymnasiumEnvironment, gymnasium_facts
from peerlora.train.online.point_mass import ATTRIBUTES, FACTS, PointMass


def facts_of(name: str, varied: Sequence[str] = ()) -> EnvironmentFacts:
    """What is known of an environment, whose attributes ``varied`` clients are to have values of their own of.

    Raises ConfigError for an unknown environment, one whose actions are no Box, and one without such an attribute;
    ExtraMissing where gymnasium is needed and not installed.
    """
    if name == POINT_MASS:
        check_attributes(name, varied, list(ATTRIBUTES))
        return FACTS
    return gymnasium_facts(name, varied)


def build_environment(name: str, episodes: int, values: Values) -> Environment:
    """So many episodes of an environment side by side; attributes that ``values`` does not name are nominal."""
    if name == POINT_MASS:
        return PointMass(episodes, values)
    return GymnasiumEnvironment(name, episodes, values)
