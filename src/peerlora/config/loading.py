"""How a YAML file, a mapping or words of the command line become a checked config."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from peerlora.config.exchange import CodecConfig, RobustConfig
from peerlora.config.run import RunConfig
from peerlora.config.sections import (
    PartitionConfig,
    TopologyConfig,
)
from peerlora.config.yaml_text import parse_yaml
from peerlora.errors import ConfigError, nearest
from peerlora.plugins import PARTITIONS, TOPOLOGIES

_SHOWN = 200  # letters of a wrong value in a message


def load_config(
    source: Path | str | dict[str, Any] | None = None, overrides: Sequence[str] = (), *, train_defaults: bool = True
) -> RunConfig:
    """Read a YAML file (or a mapping), apply dotted ``key=value`` words, check everything.

    Of two words for one setting the later one counts.  Without ``train_defaults`` the method's own defaults of
    ``train`` are left out, and it is imported for a recipe only.
    Raises ConfigError with what was given, what was expected and the nearest valid key.
    """
    tree = read_tree(source)
    for word in overrides:
        override(tree, word)
    return parse(RunConfig, tree, {"train_defaults": train_defaults})


def parse(model: type[BaseModel], tree: dict[str, Any], context: dict[str, Any] | None = None) -> Any:
    """Validate a mapping, turning pydantic's report into one ConfigError."""
    try:
        return model.model_validate(tree, context=context)
    except ValidationError as report:
        errors = report.errors(include_url=False)
        raise ConfigError("; ".join(_explain(model, error, tree) for error in errors)) from None


def schema() -> dict[str, Any]:
    """The JSON schema of a config, for editors."""
    return RunConfig.model_json_schema()


def parse_spec(words: str | Sequence[str]) -> TopologyConfig | Any:
    """Read a topology written as a kind and its settings: ``random p=0.1``, in one string or in several.

    Raises ConfigError with the nearest valid word.
    """
    text = (words if isinstance(words, str) else " ".join(words)).strip()
    # Only a blank before `key=` separates, so that `edges=[[0, 1], [1, 2]]` may hold blanks.
    kind, *settings = re.split(r"\s+(?=\w+=)", text)
    if not kind or "=" in kind:
        raise ConfigError(f"topology {text!r} names no kind; start with one, e.g. 'ring' or 'random p=0.1'")
    overrides = [f"topology.{setting}" for setting in settings]
    return load_config({"topology": kind}, overrides, train_defaults=False).topology


def read_tree(source: Path | str | dict[str, Any] | None) -> dict[str, Any]:
    """Read a YAML file, or copy a mapping, into a tree that may be changed; empty for None."""
    if source is None:
        return {}
    if isinstance(source, dict):
        return _copy(source)
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"config file {str(path)!r} does not exist; `peerlora init --train FILE` writes one")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ConfigError(f"{path} is not encoded as UTF-8 ({where}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read ({error.strerror})") from None
    return parse_tree(text, str(path))


def parse_tree(text: str, where: str) -> dict[str, Any]:
    """Parse YAML that holds settings; empty for an empty text.  Raises ConfigError, which begins with ``where``."""
    tree = parse_yaml(text, where)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} holds a {type(tree).__name__}; expected keys such as model:, data:, train:")
    return tree


def _copy(tree: Any) -> Any:
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def in_order(words: Sequence[str]) -> list[str]:
    """Sort ``key=value`` words such that none undoes another: sections and kinds come before their settings.

    Raises ConfigError for a key that is given two values.
    """
    given: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        if given.setdefault(key, value) != value:
            raise ConfigError(f"{key} is given twice, as {given[key]!r} and {value!r}; keep one")
    return sorted(words, key=lambda word: _depth_and_kind(word.partition("=")[0]))


def _depth_and_kind(key: str) -> tuple[int, bool]:
    return key.count("."), key.rpartition(".")[2] not in ("kind", "name")


def override(tree: dict[str, Any], word: str) -> None:
    """Apply one ``key=value`` word to ``tree``; raises ConfigError where it is none."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"{word!r} is not an override; expected key=value, e.g. train.rounds=50")
    value = parse_yaml(text, repr(_short(word)))
    if isinstance(value, str):
        value = _parse_number(value)
    *parents, last = key.split(".")
    for name in parents:
        below = tree.get(name)
        if isinstance(below, str):  # `topology: ring` is short for `topology: {kind: ring}`
            below = {"name" if name == "algorithm" else "kind": below}
        tree[name] = below if isinstance(below, dict) else {}
        tree = tree[name]
    # Another kind has other settings: those of the old one must not linger.
    if last in ("kind", "name") and tree.get(last) not in (None, value):
        tree.clear()
    tree[last] = value


def _parse_number(text: str) -> Any:
    """YAML 1.1 reads 1e-3 as a string; people mean a number."""
    try:
        return float(text)
    except ValueError:
        return text


def _explain(model: type[BaseModel], error: Any, tree: dict[str, Any]) -> str:
    """One pydantic error as 'where: what was given; what was expected'."""
    where = [str(part) for part in error["loc"]]
    path = ".".join(part for part in where if not _is_tag(part))
    given = error.get("input")
    if error["type"] == "extra_forbidden":
        known = _siblings(model, where, tree)
        return f"unknown key {path!r}{nearest(where[-1], known)}; expected one of {', '.join(known)}"
    if error["type"] == "union_tag_invalid":
        kind = error["ctx"]["tag"]
        known = [word.strip(" '") for word in error["ctx"]["expected_tags"].split(",")]
        known += PLUGINS[path].names() if path in PLUGINS else []
        return f"{path}.kind {kind!r} is unknown{nearest(kind, known)}; expected one of {', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}: {message}" if path else message
    quote = ", in quotation marks" if error["type"] == "string_type" and not isinstance(given, (dict, list)) else ""
    return f"{path or 'config'}: {_short(repr(given))} given; {message[0].lower()}{message[1:]}{quote}"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation, a union or an optional one say, names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_of(part)]


def _by_tag(kinds: Sequence[type[BaseModel]]) -> dict[str, type[BaseModel]]:
    """The models of a union that a ``kind`` tells apart, by kind."""
    return {tag: model for model in kinds for tag in get_args(model.model_fields["kind"].annotation)}


_UNIONS = (PartitionConfig, TopologyConfig, CodecConfig, RobustConfig)


_TAGS = {tag for union in _UNIONS for tag in _by_tag(models_of(union))}


def _is_tag(part: str) -> bool:
    """Pydantic puts a discriminated union's tag, and a plain union's type, into the location."""
    return part in _TAGS or part.startswith(("list[", "constrained-", "literal[")) or part in ("int", "str", "float")


PLUGINS = {"topology": TOPOLOGIES, "partition": PARTITIONS}
"""Sections of which other packages may have kinds of their own."""


def _siblings(model: type[BaseModel], where: list[str], tree: dict[str, Any]) -> list[str]:
    """The keys that would have been valid where an unknown one was found."""
    node: Any = model
    if where[0] in PLUGINS and (plugin := PLUGINS[where[0]].find(tree[where[0]].get("kind", ""))) is not None:
        node, where = plugin.settings, where[1:]
    for part in where[:-1]:
        if isinstance(node, dict):
            node = node.get(part, model)
        elif part in node.model_fields:
            kinds = models_of(node.model_fields[part].annotation)
            node = kinds[0] if len(kinds) == 1 else _by_tag(kinds)
    return list(node.model_fields) if hasattr(node, "model_fields") else list(node)
