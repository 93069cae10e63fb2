"""One file per method.  To add one: a file, a line in ``REGISTRY``, a test, a paragraph in docs/methods.md."""

from dataclasses import MISSING, fields
from typing import Any

from peerlora.algorithms.adf_lora import ADFLoRA
from peerlora.algorithms.base import Algorithm
from peerlora.algorithms.dec_lora import DecLoRA
from peerlora.algorithms.local import Local
from peerlora.errors import ConfigError, nearest

REGISTRY: dict[str, type[Any]] = {  # frozen dataclasses that satisfy Algorithm
    "local": Local,
    "dec-lora": DecLoRA,
    "adf-lora": ADFLoRA,
}


def build_algorithm(name: str, parameters: dict[str, Any]) -> Algorithm[Any]:
    """The method registered under ``name``, with its hyper-parameters checked."""
    if name not in REGISTRY:
        raise ConfigError(
            f"algorithm.name {name!r} is unknown{nearest(name, REGISTRY)}; expected one of {', '.join(REGISTRY)}"
        )
    known = {field.name: field for field in fields(REGISTRY[name])}
    for key, value in parameters.items():
        if key not in known:
            takes = f"takes {', '.join(known)}" if known else "has no settings"
            raise ConfigError(f"unknown key 'algorithm.{key}'{nearest(key, known)}; {name} {takes}")
        default = known[key].default
        if default is not MISSING and type(value) is not type(default):
            raise ConfigError(
                f"algorithm.{key}: {value!r} given; expected a {type(default).__name__} such as {default!r}"
            )
    return REGISTRY[name](**parameters)


def describe_algorithms() -> dict[str, dict[str, Any]]:
    """For each registered name: source, trains, mixes, requires, settings with their defaults."""
    described = {}
    for name, kind in REGISTRY.items():
        needs = [field.name.replace("_", " ") for field in fields(kind.requires) if getattr(kind.requires, field.name)]
        described[name] = {
            "source": kind.source,
            "trains": kind.trains,
            "mixes": kind.mixes,
            "requires": ", ".join(needs),
            "unequal_ranks": kind.unequal_ranks is None,
            "settings": {field.name: field.default for field in fields(kind)},  # pyright: ignore[reportArgumentType]
        }
    return described
