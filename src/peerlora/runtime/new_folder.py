"""Folders that a command makes: whole, or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peerlora.errors import RunError
from peerlora.files import sync_tree
from peerlora.runs.write_failures import describe_write_failures


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``to`` that becomes it when the block ends, and is gone after an exception.

    What a killed process left of it is taken away by the next one.  Raises RunError where ``to`` is not free or cannot
    be written.
    """
    require_new(to)
    to = to.resolve()
    half = to.with_name(f"{to.name}.tmp")
    with describe_write_failures(to.parent, lambda: "try again"):
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        try:
            yield half
            sync_tree(half)
            os.replace(half, to)
        finally:
            shutil.rmtree(half, ignore_errors=True)


def require_new(to: Path) -> None:
    """Raise RunError unless a folder is new or empty."""
    if to.exists() and not to.is_dir():
        raise RunError(f"--to {to} is a file; choose a folder that is new or empty")
    if to.is_dir() and any(to.iterdir()):
        raise RunError(f"--to {to} is not empty; choose a folder that is new or empty")
