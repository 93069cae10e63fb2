"""A config as commented YAML."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from peerlora.config.run import RunConfig


def template_lines(config: RunConfig, head: str, method: Mapping[str, str]) -> Iterator[str]:
    """A config as YAML with a comment behind every setting: the description of its field.

    ``method``: comments for the settings of ``algorithm``, which are the method's and not known here.
    """
    yield "# " + "".join(letter if letter.isprintable() else "?" for letter in head)
    for name, value in config.model_dump(mode="json").items():
        section, comment = getattr(config, name), described(RunConfig, name)
        yield ""
        if not isinstance(section, BaseModel):
            yield _line("", name, value, comment)
            continue
        yield f"{name}:"
        for key in sorted(value, key=lambda key: key not in ("kind", "name")):
            yield _line("  ", key, value[key], described(type(section), key) or method.get(key, comment))


def described(model: type[BaseModel], name: str) -> str:
    """What a setting means, in one line; empty for a setting or a ``kind`` that the model does not describe."""
    field = model.model_fields.get(name)
    return " ".join((field and field.description or "").split())


def _line(indent: str, key: str, value: Any, comment: str) -> str:
    return f"{f'{indent}{key}: {_yaml(value)}':<44}  # {comment}"


def _yaml(value: Any) -> str:
    """A value on one line."""
    plain = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    text = plain.removesuffix("...\n").strip("\n")
    if text.isprintable():
        return text
    # Line breaks, say, which double quotes escape.
    return yaml.safe_dump(value, default_flow_style=True, default_style='"', width=math.inf).strip("\n")
