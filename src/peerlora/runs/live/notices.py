"""Notices: what the event list of the page shows, numbered and bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

KEPT = 500
"""Latest warnings that are kept, and as many other notices, which are more."""
LONGEST_NOTICE = 2000
"""Characters of a notice."""
NAMED = 20
"""Clients that one notice names."""

Notice = dict[str, Any]


class Notices:
    """Numbered notices, the latest of each kind."""

    def __init__(self):
        self.numbered = 0
        self._warnings: deque[Notice] = deque(maxlen=KEPT)
        self._others: deque[Notice] = deque(maxlen=KEPT)

    def add(self, level: str, text: str, clients: Sequence[int], round: int) -> None:
        """Add a notice; ``level``: good, info, score or warning; ``clients``: those it is about."""
        notice = {"n": self.numbered, "level": level, "text": text[:LONGEST_NOTICE], "clients": list(clients)[:NAMED]}
        (self._warnings if level == "warning" else self._others).append({**notice, "round": round})
        self.numbered += 1

    def all(self) -> list[Notice]:
        """Those that are kept, in their order."""
        return sorted([*self._warnings, *self._others], key=lambda each: each["n"])
