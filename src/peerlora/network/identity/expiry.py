"""Ends of the certificate and of the member list, told in time while a peer runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime

from peerlora.display import utc_now

SOON = 14
"""Days before an end that are worth a word."""
CURES = {
    "the certificate": "send a new request (peerlora identity request), and replace certificate.pem",
    "the member list": "ask the consortium for its next version, and replace the file",
}


class ExpiryWatch:
    """Warns of ends that are near: once a day, from ``SOON`` days before; renewed files end the warnings.

    ``ends``: by a key of ``CURES``, the end of what is in use now; None for what never ends.
    """

    def __init__(self, ends: Callable[[], Mapping[str, datetime | None]], clock: Callable[[], datetime] = utc_now):
        self.ends, self.clock = ends, clock
        self._warned: dict[tuple[str, datetime], int] = {}

    def __call__(self) -> list[str]:
        """Warnings that are due since the last call."""
        due, found = [], {what: end for what, end in self.ends().items() if end is not None}
        self._warned = {key: days for key, days in self._warned.items() if key in found.items()}
        for what, end in found.items():
            left = (end - self.clock()).days
            if left < SOON and self._warned.get((what, end)) != left:
                self._warned[what, end] = left
                when = f"ends in {left} days, on" if left >= 0 else "has ended, on"
                due.append(f"{what} {when} {end:%Y-%m-%d %H:%M} UTC: {CURES[what]}; a run that goes on takes it up")
        return due
