"""Injected faults, as the command line writes them: ``3@5s``, ``2@4s:3s``, ``1-2@4s:3s``, ``1>2@4s``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
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

    @property
    def touched(self) -> frozenset[tuple[int, ...]]:
        """What it changes: a peer, or a link's directions."""
        if self.other is None:
            return frozenset({(self.peer,)})
        return frozenset(self.pairs if self.both else self.pairs[:1])

    @property
    def end(self) -> float:
        """When it is undone; infinite: never."""
        return math.inf if self.lasts is None else self.at + self.lasts

    def __str__(self) -> str:
        """As the command line has it."""
        target = str(self.peer) if self.other is None else f"{self.peer}{'-' if self.both else '>'}{self.other}"
        return f"--{self.kind} {target}@{self.at:g}s" + ("" if self.lasts is None else f":{self.lasts:g}s")


def check_faults(faults: Sequence[Fault]) -> None:
    """Raise ConfigError where two faults would undo each other: both change a peer or a link at the same time."""
    for place, one in enumerate(faults):
        for other in faults[:place]:
            if one.touched & other.touched and one.at < other.end and other.at < one.end:
                raise ConfigError(
                    f"{other} and {one} given, which overlap in time, so the end of one would undo the other; give "
                    "one of them, or let one end before the other begins"
                )


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
