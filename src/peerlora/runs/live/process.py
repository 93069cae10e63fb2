"""Processes: the one that holds a run folder, and what it uses, from the kernel's files; the one to end with."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_LOCKS = Path("/proc/locks")
_LOOK = 0.25  # seconds between two looks for the parent
_GRACE = 5.0  # seconds for an orderly end


@dataclass(frozen=True)
class Usage:
    """What a process has used so far."""

    memory: int
    """Bytes resident now."""
    cpu_seconds: float


def holder_of(folder: Path) -> int | None:
    """Return the process that runs in a folder; None where there is none, or the system does not say.

    Its lock is not touched.
    """
    try:
        status = (folder / "lock").stat()
        held = _LOCKS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in held:
        words = line.split()
        if "FLOCK" in words and "->" not in words and words[5].rpartition(":")[2] == str(status.st_ino):
            return int(words[4])
    return None


def usage_of(pid: int) -> Usage | None:
    """Read what a process uses; None where it is gone or another user's."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (OSError, IndexError, ValueError):
        return None
    ticks = int(fields[11]) + int(fields[12])
    return Usage(pages * os.sysconf("SC_PAGE_SIZE"), ticks / os.sysconf("SC_CLK_TCK"))


def end_with(parent: int) -> None:
    """End this process when its parent has ended, however that ended."""

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE)
        os._exit(1)

    threading.Thread(target=follow, name="parent", daemon=True).start()
