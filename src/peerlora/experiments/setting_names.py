"""Dotted names of settings, checked against all kinds that the sections of a config can be of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from peerlora.algorithms import REGISTRY
from peerlora.config.loading import PLUGINS, models_of
from peerlora.config.run import RunConfig
from peerlora.config.sections import AlgorithmConfig
from peerlora.errors import ConfigError, nearest
from peerlora.plugins import METHODS

Model = type[Any]
"""A section of a config, as a class."""


def require_setting(key: str, option: str) -> None:
    """Raise ConfigError where no config can have a setting of this dotted name; ``option`` asked for it.

    A setting of some kinds only, as the ``p`` of random topologies is, passes for all.  Other packages are imported
    only for names that this one does not know.
    """
    if _flaw(key, others=False) and (flaw := _flaw(key, others=True)):
        raise ConfigError(f"{option}: no setting {key!r}{flaw}")


def _flaw(key: str, others: bool) -> str | None:
    """What is wrong with a name, and what is expected; ``others``: whether other packages' kinds count, too."""
    models, place = [RunConfig], ""
    for part in key.split("."):
        known = _names(models, others)
        if part not in known:
            expected = f"expected one of {', '.join(known)}" if known else f"{place} has nothing below it"
            return f"{nearest(part, known)}; {expected}"
        models = _below(models, part, others)
        place = f"{place}.{part}".lstrip(".")
    return None


def _names(models: Sequence[Model], others: bool) -> list[str]:
    found: dict[str, None] = {}
    for model in models:
        found |= dict.fromkeys(model.model_fields)
        if model is AlgorithmConfig:
            methods = [*REGISTRY.values(), *(METHODS.find(name) for name in (METHODS.names() if others else ()))]
            found |= dict.fromkeys(field.name for method in methods for field in fields(method))
    return list(found)


def _below(models: Sequence[Model], part: str, others: bool) -> list[Model]:
    """The sections that a setting of these sections can be."""
    annotations = [model.model_fields[part].annotation for model in models if part in model.model_fields]
    found = [each for annotation in annotations for each in models_of(annotation)]
    if others and models == [RunConfig] and part in PLUGINS:
        kinds = [PLUGINS[part].find(name) for name in PLUGINS[part].names()]
        found += [kind.settings for kind in kinds if kind is not None]
    return found
