"""Injected faults, as the command line writes them: ``3@5s``, ``2@4s:3s``, ``1-2@4s:3s``, ``1>2@4s``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from peerlora.errors import ConfigError

_SECONDS = r"(\d+(?:\.\d+)?)s?"
_ONE = re.compile(rf"(\d+)@{_SECONDS}(?::{_SECONDS})?")
_LINK = re.compile(rf"(\d+)([->])(\d+)@{_SECONDS}(?::{_SECONDS})?")


@dataclass(frozen=True)
class Fault:
    """One fault."""

    kind: Literal["kill", "stop", "cut"]
    """SIGKILL, SIGSTOP, or a link that carries nothing."""
    peer: int
    at: float
    """Seconds after round 0 began."""
    lasts: float | None = None
    """Seconds until it is undone (started again, SIGCONT, link back); None: never."""
    other: int | None = None
    """The link's other end."""
    both: bool = True
    """Whether the link is cut in both directions, or only from ``peer`` to ``other``."""

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(Dialling, dialled) peer of the link in both orders, since either end may dial; none for other kinds."""
        return () if self.other is None else ((self.peer, self.other), (self.other, self.peer))


def parse_fault(kind: Literal["kill", "stop", "cut"], word: str, peers: int) -> Fault:
    """Parse one word of the command line; raises ConfigError."""
    found = (_LINK if kind == "cut" else _ONE).fullmatch(word)
    if not found:
        forms = {
            "kill": "PEER@SECONDS or PEER@SECONDS:DOWN, such as 3@5s or 3@5s:2s",
            "stop": "PEER@SECONDS or PEER@SECONDS:HOW-LONG, such as 2@4s:3s",
            "cut": "PEER-PEER@SECONDS or PEER-PEER@SECONDS:HOW-LONG, such as 1-2@4s:3s, or 1>2@4s for one direction",
        }
        raise ConfigError(f"--{kind} {word!r} given; expected {forms[kind]}")
    parts = found.groups()
    if kind == "cut":
        ends = int(parts[0]), int(parts[2])
        fault = Fault(kind, ends[0], float(parts[3]), _optional_seconds(parts[4]), ends[1], parts[1] == "-")
    else:
        ends = (int(parts[0]),)
        fault = Fault(kind, ends[0], float(parts[1]), _optional_seconds(parts[2]))
    if max(ends) >= peers or len(set(ends)) < len(ends):
        raise ConfigError(f"--{kind} {word!r} given; peers are 0 to {peers - 1}")
    return fault


def _optional_seconds(word: str | None) -> float | None:
    return None if word is None else float(word)
