"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file, text as UTF-8, so that after a kill ``path`` holds the new contents, the old ones, or nothing."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` for a writer that wants a name; move it to ``path`` when the block ends.

    After an exception ``path`` stays as it was, and the temporary file stays too.
    """
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    settle(temporary, path)


def settle(temporary: Path, path: Path) -> None:
    """Move a finished temporary file to ``path``, after its bytes have reached the disk."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
