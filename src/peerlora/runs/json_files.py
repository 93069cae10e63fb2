"""JSON files of a run folder: written in one step, and refused where they are damaged."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peerlora.errors import RunError
from peerlora.files import write_atomically
from peerlora.runs.events import plain


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write an object in one step; what is not finite becomes null."""
    write_atomically(path, json.dumps(plain(tree), indent=2, allow_nan=False).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read an object; raises RunError where the file holds none."""
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        tree = None
    if isinstance(tree, dict):
        return tree
    raise RunError(f"{path} is not valid JSON (an object); the run folder is damaged, start again with another --out")
