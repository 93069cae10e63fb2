"""Files of keys and lists: written atomically, private where they must be, keys never overwritten."""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peerlora.errors import IdentityError
from peerlora.files import sync

PRIVATE, PUBLIC = 0o600, 0o644


def write_new(path: Path, data: bytes, mode: int = PUBLIC) -> None:
    """Write a file that must not exist yet; raises IdentityError where it does, or cannot be written."""
    with _failures_reported(path):
        temporary = _temporary(path, data, mode)
        try:
            os.link(temporary, path)  # unlike a rename, it fails where the name is taken
        except FileExistsError:
            raise IdentityError(
                f"{path} exists already and is never overwritten; give another place or move it"
            ) from None
        finally:
            os.unlink(temporary)
        sync(path.parent)


def write_over(path: Path, data: bytes, mode: int = PUBLIC) -> None:
    """Replace a file atomically: a reader finds the old or the new one.  Raises IdentityError where it cannot."""
    with _failures_reported(path):
        temporary = _temporary(path, data, mode)
        try:
            os.replace(temporary, path)
            sync(path.parent)
        except OSError:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def read_private(path: Path) -> bytes:
    """Read a key; raises IdentityError where other users may read or change the file."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise IdentityError(f"{path} can be opened by other users; make it yours alone: chmod 600 {path}")
            return file.read()
    except OSError as error:
        raise IdentityError(f"{path} cannot be read: {error.strerror}; expected a private key") from None


def read_public(path: Path, what: str, most: int = 1 << 22) -> bytes:
    """Read a file of at most ``most`` bytes; raises IdentityError that names ``what`` was expected."""
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise IdentityError(f"{path} cannot be read: {error.strerror}; expected {what}") from None
    if len(data) > most:
        raise IdentityError(f"{path} is larger than {most} bytes; expected {what}")
    return data


@contextmanager
def _failures_reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "a part of its folder is a file" if any(map(Path.is_file, path.parents)) else error.strerror
        raise IdentityError(
            f"{path} cannot be written: {reason}; make room, make its folder writable, or give another place"
        ) from error


def _temporary(path: Path, data: bytes, mode: int) -> str:
    """Write a temporary file beside ``path``, private from its creation; its name.  A failure leaves nothing."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            os.fchmod(number, mode)
            file.write(data)
            file.flush()
            os.fsync(number)
    except OSError:
        os.unlink(name)
        raise
    return name
