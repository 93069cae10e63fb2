"""The folder of a whole model, or of a PEFT adapter: which of them it is, its settings, and its base's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peerlora.errors import ModelError, first_line
from peerlora.lora.adapter_card import card_of_base

ADAPTER, WHOLE = "adapter_config.json", "config.json"
"""The files of settings by which both are known."""
_BASE = "base_model_name_or_path"


def read_settings(path: Path) -> dict[str, Any]:
    """Read a file with a JSON object.  Raises ModelError where it is missing, damaged, or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({first_line(error)}); give an undamaged folder") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}; expected a JSON object; give an undamaged folder")
    return found


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter; else it is a whole model.  Raises ModelError where it is neither."""
    if (folder / ADAPTER).is_file():
        return True
    if (folder / WHOLE).is_file():
        return False
    raise ModelError(
        f"{folder} holds neither {WHOLE} nor {ADAPTER}; give a folder of `peerlora merge` or `peerlora export`, or one "
        "of a run's adapters/"
    )


def adapter_weights(folder: Path, subject: str) -> Path:
    """The file of an adapter folder's tensors; ``subject``: what a message calls the folder.

    Raises ModelError where there is none, and for a pickle.
    """
    path = folder / "adapter_model.safetensors"
    if (folder / "adapter_model.bin").is_file() and not path.is_file():
        raise ModelError(
            f"{subject} holds adapter_model.bin, a pickle, which can run code and is never read; load it with PEFT and "
            "save it again, which writes adapter_model.safetensors"
        )
    if not path.is_file() or not (folder / ADAPTER).is_file():
        raise ModelError(f"{subject} has no adapter_model.safetensors and {ADAPTER}; give the folder of a PEFT adapter")
    return path


def base_name(settings: dict[str, Any]) -> str | None:
    """How an adapter's settings name its base model."""
    named = settings.get(_BASE)
    return named if isinstance(named, str) and named else None


def with_base(folder: Path, base: str) -> dict[str, str]:
    """The texts, by file name, of an adapter folder whose base is to be named ``base``.

    The revision goes: it was that of another repository.  Raises ModelError where the settings cannot be read.
    """
    settings = read_settings(folder / ADAPTER)
    before = base_name(settings)
    if before != base:
        settings["revision"] = None
    texts = {ADAPTER: json.dumps(settings | {_BASE: base}, indent=2, sort_keys=True) + "\n"}
    card = folder / "README.md"
    if card.is_file():
        texts[card.name] = card_of_base(card.read_text(encoding="utf-8"), before or "", base)
    return texts
