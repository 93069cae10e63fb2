"""Files that are written whole or not at all."""

import os
import stat
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

    After an exception ``path`` stays as it was, and the temporary file is gone.  The file has the permissions that the
    process gives new files, also where the writer replaces it by one of its own.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        settle(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk every try would leave one
        raise


def settle(temporary: Path, path: Path) -> None:
    """Move a finished temporary file to ``path``; bytes and name have reached the disk when this returns."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_tree(folder: Path) -> None:
    """Wait until all files and folders below ``folder``, and its own name, are on the disk."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))
    sync(folder.parent)
