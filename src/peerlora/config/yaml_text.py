"""YAML text -> values, without what YAML would drop or repeat in silence."""

from __future__ import annotations

from typing import Any

import yaml

from peerlora.errors import ConfigError

_LARGEST = 100_000  # values, each alias counted as all that it stands for


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document.

    Raises ConfigError, beginning with ``where``, for what is no YAML, a key that is given twice, an alias inside of
    itself, and aliases that stand for too much.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except _Refused as refused:
        raise ConfigError(f"{where}: {refused}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply; expected sections of settings") from None
    except ValueError as error:  # a date or a number that cannot be, such as 2024-13-45
        raise ConfigError(f"{where} is not valid YAML: {error}; write text in quotation marks") from None


class _Refused(Exception):
    """What is wrong with a document."""


class _Loader(yaml.SafeLoader):
    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _size(node, "", {}, set())
        return node


def _size(node: yaml.Node, path: str, known: dict[int, int], above: set[int]) -> int:
    """How many values a node stands for; raises _Refused.  ``known``: by node; ``above``: the nodes around it."""
    if id(node) in above:
        raise _Refused(f"the alias in line {node.start_mark.line + 1} stands for something that it is part of")
    if id(node) in known:
        return known[id(node)]
    above.add(id(node))
    below: list[tuple[str, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        _refuse_twice(node, path)
        below = [(_joined(path, key), each) for key, value in node.value for each in (key, value)]
    elif isinstance(node, yaml.SequenceNode):
        below = [(path, each) for each in node.value]
    size = 1 + sum(_size(each, inside, known, above) for inside, each in below)
    if size > _LARGEST:
        raise _Refused(f"line {node.start_mark.line + 1} stands for more than {_LARGEST:,} values; use fewer aliases")
    above.discard(id(node))
    known[id(node)] = size
    return size


def _refuse_twice(node: yaml.MappingNode, path: str) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        line, word = key.start_mark.line + 1, (key.tag, key.value)
        if word in lines:
            place = f"in lines {lines[word]} and {line}" if line != lines[word] else f"in line {line}"
            raise _Refused(f"key {_joined(path, key)!r} is given twice, {place}; keep one")
        lines[word] = line


def _joined(path: str, key: yaml.Node) -> str:
    return ".".join(filter(None, (path, str(key.value)))) if isinstance(key, yaml.ScalarNode) else path
