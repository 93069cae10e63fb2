"""Failures of writing into a folder, as one message that says what to do."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peerlora.errors import RunError, TooManyFiles

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_FILES = (errno.EMFILE, errno.ENFILE)


@contextmanager
def describe_write_failures(folder: Path, then: Callable[[], str]) -> Iterator[None]:
    """Turn the failure of a write in a folder into a RunError; ``then``: what to do once it can be written again."""
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number is None:
            raise
        if number in _NO_FILES:
            raise TooManyFiles(f"{folder} cannot be written ({os.strerror(number)}); {then()}") from error
        if number in _NO_ROOM:
            raise RunError(f"no room left in {folder} ({os.strerror(number)}); make room, then {then()}") from error
        raise RunError(f"{folder} cannot be written ({os.strerror(number)}); {then()}") from error


def _errno(error: Exception) -> int | None:
    """The operating system's number of a failed write; None for another error."""
    if isinstance(error, OSError):
        return error.errno
    if type(error).__name__ == "SafetensorError":  # has no number of its own
        found = re.search(r"os error (\d+)", str(error))
        return int(found.group(1)) if found else None
    return None
