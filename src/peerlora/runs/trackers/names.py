"""Names as a tracker takes them; one that it refuses would cost all the numbers beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar
from zlib import crc32

Value = TypeVar("Value")
PLAIN = re.compile(r"[^\w/.\- ]")
"""What MLflow refuses and wandb cannot sort by: all but letters, digits, and ``_ / . -`` and blanks."""
READABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""What is no text."""


def tidy_name(name: str, refused: re.Pattern[str], longest: int = 250) -> str:
    """Put ``_`` in place of refused characters; as a path, it has no empty part and leads nowhere else.

    A name that is too long ends with a checksum.
    """
    parts = (part.strip() for part in refused.sub("_", name).split("/"))
    tidy = "/".join(part for part in parts if part not in ("", ".", "..")) or "_"
    tidy = f"_{tidy}" if tidy.startswith("..") else tidy
    return tidy if len(tidy) <= longest else _with_checksum(tidy, name, longest)


def tidy_names(values: Mapping[str, Value], refused: re.Pattern[str], longest: int = 250) -> dict[str, Value]:
    """Return the values under tidy names, all different: where two would be the same, the later one has a checksum."""
    found: dict[str, Value] = {}
    for name, value in values.items():
        tidy = tidy_name(name, refused, longest)
        found[_with_checksum(tidy, name, longest) if tidy in found else tidy] = value
    return found


def _with_checksum(tidy: str, name: str, longest: int) -> str:
    return f"{tidy[: longest - 9]}_{crc32(name.encode(errors='replace')):08x}"
