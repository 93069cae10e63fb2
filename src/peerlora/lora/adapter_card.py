"""The README.md of an adapter folder, a model card: what it holds, how it is loaded, what the run reached."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_card(source: str, location: str, holds: str, facts: Mapping[str, Any]) -> str:
    """Return the text of a card.

    ``source`` and ``location``: how the run, and PEFT, name the base model; ``holds``: rank, alpha and layers.
    """
    head = {"base_model": source, "library_name": "peft", "tags": ["lora", "peerlora"]}
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return (
        f"---\n{json.dumps(head, indent=2)}\n---\n\n# LoRA adapter trained without a server\n\n"
        f"{holds} of `{source}`.  "
        "Trained with peerlora: every client keeps its data and averages adapters with its neighbours.\n\n"
        "```python\nfrom peft import PeftModel\n"
        "model = PeftModel.from_pretrained(base_model, this_folder)\n```\n\n"
        f"| run | |\n| --- | --- |\n{rows}\n{_whereabouts(source, location)}"
    )


def card_of_base(card: str, location: str, base: str) -> str:
    """Return a card that names another base; ``location``: how the settings beside it named the one before."""
    line = re.search(r'^  "base_model": (".*")', card, re.M)
    source = json.loads(line[1]) if line else location
    card = card.replace(_whereabouts(source, location) or "\0", "").replace(f"`{source}`", f"`{base}`")
    return card if line is None else card.replace(line[0], f'  "base_model": {json.dumps(base)}', 1)


def _as_a_file(location: str) -> str:
    """What to do where PEFT cannot find the base by its name, which is that of a package with a GGUF file."""
    if not location.startswith("packaged:"):
        return ""
    return (
        "It is a GGUF file, which `AutoPeftModel...` and pipelines do not find by this name: for them use "
        "`peerlora export --with-base` or `peerlora merge`.\n"
    )


def _whereabouts(source: str, location: str) -> str:
    """How to find a base model that is no hub id."""
    if source.startswith("packaged:"):
        name = source.removeprefix("packaged:")
        return (
            f"\nThe base model is in the installed package `{name}`; its folder or file:\n"
            f"`python -c \"from peerlora.environment import package_model; print(package_model('{name}'))\"`\n"
            f"{_as_a_file(location)}"
        )
    if Path(location).is_absolute():
        return (
            "\n`adapter_config.json` names the base model's folder on the machine that wrote it, as "
            "`base_model_name_or_path`; change it where the folder lies elsewhere.\n"
        )
    return ""
