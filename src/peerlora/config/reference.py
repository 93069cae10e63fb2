"""The page of all settings, docs/configuration.md, from the JSON schema: ``python -m peerlora.config.reference``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peerlora.config.loading import schema

Schema = Mapping[str, Any]

HEAD = """\
# Configuration

Written by `make docs` from the models in `src/peerlora/config`; nothing here is typed by hand.

A run is one config: a YAML file, or a mapping in Python. A config that names a few settings is enough, the rest has
the defaults below:

```yaml
data: {train: "csv:reviews.csv", eval: null, text: [text], label: label}
clients: 4
partition: {kind: dirichlet, concentration: 0.5}
topology: {kind: random, p: 0.3}
algorithm: {name: adf-lora, interval: 5}
train: {rounds: 30}
```

- Single settings are changed by words with dots, `peerlora train peerlora.yaml train.rounds=50`; in Python by
  `load_config(source, ["train.rounds=50"])`.
- `partition`, `topology`, `algorithm`, `exchange.codec` and `exchange.robust` may be one word: `topology=ring` means
  `{kind: ring}`. A word that changes a kind or a name drops the settings of the old one.
- An unknown key is an error that names the nearest valid one.
- `peerlora init --train FILE` writes a commented config for your own rows, `peerlora schema` prints the JSON schema,
  and a run's folder holds its config with all defaults written out.
"""
SEE = {
    "adapter": "[heads](training.md#heads), [dropout](training.md#dropout), [PEFT folders](runs.md#adapters-and-peft)",
    "data": "[data sources](data.md#data-sources)",
    "partition": "[partitions](data.md#partitions)",
    "topology": "[topologies](topologies.md)",
    "algorithm": "[methods](methods.md); some bring [their own defaults](training.md#local-rules) of `train`",
    "exchange": "[codecs and robust rules](methods/compressed-and-robust.md), [relayed adapters](relay.md)",
    "adversary": "[attackers](methods/compressed-and-robust.md#attackers)",
    "online": "[flow policies](flow-policies.md)",
    "train": "[training](training.md), [the rate over the rounds](training.md#the-rate-over-the-rounds)",
    "eval": "[evaluation](runs.md#evaluation)",
    "checkpoint": "[checkpoints and resume](runs.md#checkpoints-and-resume)",
    "clock": "[virtual time](virtual-time.md)",
    "peer": "[real peers](real-peers.md)",
    "cluster": "[clusters](cluster.md)",
    "privacy": "[privacy](privacy.md)",
    "track": "[trackers](watching.md#trackers)",
}
"""Section -> pages that say more."""


def page() -> str:
    """The whole page."""
    whole = schema()
    return HEAD + "".join(f"{line}\n" for line in Page(whole["$defs"]).sections(whole["properties"]))


class Page:
    """Tables of settings, from the parts of a JSON schema.

    ``parts``: the ``$defs`` of the schema, by name.
    """

    def __init__(self, parts: Mapping[str, Schema]):
        self.parts = parts

    def sections(self, settings: Mapping[str, Schema]) -> Iterator[str]:
        """A part of the page for each section, then one for the settings without a section."""
        alone = {name: setting for name, setting in settings.items() if not self._below(setting)}
        for name, setting in settings.items():
            if name in alone:
                continue
            yield from ("", f"## {name}", "", self._meaning(setting))
            if name in SEE:
                yield f"More: {SEE[name]}."
            yield from self._section(name, setting)
        yield from ("", "## Settings without a section", "", *self._table("", alone))

    def _section(self, name: str, setting: Schema) -> Iterator[str]:
        if kinds := self._kinds(setting):
            yield from ("", f"Default: {_value(setting['default'])}.", "", *self._union(kinds))
            return
        own = self.part(self._below(setting)[0])["properties"]
        yield from ("", *self._table(f"{name}.", own))
        for key, each in own.items():
            if below := self._below(each):
                kinds = self._kinds(each)
                yield from ("", f"### {name}.{key}", "")
                yield from self._union(kinds) if kinds else self._table("", self.part(below[0])["properties"])

    def part(self, reference: str) -> Schema:
        """The part of the schema that ``#/$defs/NAME`` names."""
        return self.parts[reference.rpartition("/")[2]]

    def _below(self, setting: Schema) -> list[str]:
        """The parts that a setting's value may be, as references."""
        if "$ref" in setting:
            return [setting["$ref"]]
        nested = [*setting.get("oneOf", ()), *setting.get("anyOf", ()), *filter(None, [setting.get("items")])]
        return [reference for each in nested for reference in self._below(each)]

    def _kinds(self, setting: Schema) -> list[Schema]:
        """The parts of a union that its ``kind`` tells apart; none where a setting is no such union."""
        found = [self.part(reference) for reference in self._below(setting)]
        return found if all("kind" in kind.get("required", ()) for kind in found) else []

    def _union(self, kinds: list[Schema]) -> Iterator[str]:
        """One row per kind, then one per setting with the kinds that have it, those of few kinds first."""
        yield from _head("kind", "what it is")
        rows: dict[tuple[str, ...], list[str]] = {}
        for kind in kinds:
            names = _words(kind["properties"]["kind"])
            yield _row(names, kind["description"])
            for key, setting in kind["properties"].items():
                if key != "kind":
                    rows.setdefault((f"`{key}`", *self._cells(setting)), []).append(names)
        yield from ("", *_head("kinds", "key", "type", "default", "meaning"))
        for cells, having in sorted(rows.items(), key=lambda row: len(row[1])):
            yield _row("all" if len(having) == len(kinds) else ", ".join(having), *cells)

    def _table(self, prefix: str, settings: Mapping[str, Schema]) -> Iterator[str]:
        yield from _head("key", "type", "default", "meaning")
        for name, setting in settings.items():
            yield _row(f"`{prefix}{name}`", *self._cells(setting))

    def _cells(self, setting: Schema) -> tuple[str, str, str]:
        """Type, default and meaning."""
        default = _value(setting["default"]) if "default" in setting else "required"
        return self._type(setting), default, self._meaning(setting)

    def _meaning(self, setting: Schema) -> str:
        """The field's description, or that of the section which it is."""
        return setting.get("description") or self.part(setting["$ref"])["description"]

    def _type(self, setting: Schema) -> str:
        if "anyOf" in setting:
            return " or ".join(self._type(each) for each in setting["anyOf"])
        if "oneOf" in setting:
            return "kind, or mapping"
        if "$ref" in setting:
            return "mapping"
        if "enum" in setting or "const" in setting:
            return _words(setting)
        if setting["type"] == "array":
            return "pair" if "prefixItems" in setting else f"list of {self._type(setting['items'])}"
        if setting["type"] == "object":
            return f"mapping to {self._type(setting['additionalProperties'])}"
        return {"string": "text", "boolean": "true or false", "null": "null"}.get(setting["type"]) or _number(setting)


def _number(setting: Schema) -> str:
    """A number and its range."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {setting[key]:g}" for key, sign in signs.items() if setting.get(key, 2**63) < 2**63]
    word = "whole number" if setting["type"] == "integer" else "number"
    return " ".join([word, ", ".join(limits)]).strip()


def _words(setting: Schema) -> str:
    """The words that a setting may be."""
    return ", ".join(f"`{word}`" for word in setting.get("enum") or [setting["const"]])


def _value(value: Any) -> str:
    """A default as YAML has it."""
    word = value.get("kind", value) if isinstance(value, dict) else value
    return f"`{word if isinstance(word, str) else json.dumps(word)}`"


def _head(*names: str) -> list[str]:
    return [_row(*names), _row(*["---"] * len(names))]


def _row(*cells: str) -> str:
    return f"| {' | '.join(' '.join(cell.replace('``', '`').split()) for cell in cells)} |"


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/configuration.md").write_text(page(), encoding="utf-8")
