"""Files that are written whole or not at all."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    _settle(temporary, path)


def _settle(temporary: Path, path: Path) -> None:
    """Put a finished temporary file in its place, so that after a kill ``path`` is whole or absent."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
