"""How the rows of a run were read, kept beside its models for those who use them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerlora.config.data import LEAST_TOKENS
from peerlora.config.run import RunConfig
from peerlora.errors import ModelError
from peerlora.lora.model_folder import read_settings

FILE = "peerlora.json"


@dataclass(frozen=True)
class Reading:
    """The task, the columns and the most tokens of a row with which a model was trained."""

    task: str
    text: tuple[str, ...]
    max_length: int
    columns: Mapping[str, str] | None = None
    """Columns by role, for tasks whose columns have roles; None: found by usual names."""

    @staticmethod
    def of(config: RunConfig) -> Reading:
        """Return that of a run."""
        return Reading(config.task.kind, tuple(config.data.text), config.data.max_length, config.data.columns)

    @staticmethod
    def read(folder: Path) -> Reading | None:
        """Return what `write` wrote; None where a folder has none.  Raises ModelError where it is damaged."""
        path = folder / FILE
        if not path.is_file():
            return None
        tree = read_settings(path)
        try:
            named = tree.get("columns")
            columns = None if named is None else {str(role): str(name) for role, name in named.items()}
            found = Reading(str(tree["task"]), tuple(map(str, tree["text"])), int(tree["max_length"]), columns)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} cannot be read ({error}); mend it, or remove it and give --text") from None
        if not 1 <= len(found.text) <= 2 or not LEAST_TOKENS <= found.max_length <= 1 << 20:
            raise ModelError(f"{path}: one or two columns of text and at least {LEAST_TOKENS} tokens expected; mend it")
        return found

    def write(self, folder: Path) -> None:
        """Write ``peerlora.json`` into a folder."""
        tree: dict[str, Any] = {"task": self.task, "text": list(self.text), "max_length": self.max_length}
        tree |= {} if self.columns is None else {"columns": dict(self.columns)}
        (folder / FILE).write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
