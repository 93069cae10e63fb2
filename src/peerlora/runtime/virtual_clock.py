"""Virtual time: how long each client computes and sends, when it is absent, and the order of events.

Moments and durations are whole nanoseconds, so that two ways to the same moment (ten jobs of one second, one of ten)
meet exactly and the order of events is the same on every machine.
"""

from __future__ import annotations

import csv
import heapq
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from peerlora.config.sections import Absence, ClockConfig
from peerlora.errors import ConfigError
from peerlora.randomness import numpy_generator

SECOND = 10**9
_TRACE_BYTES = 50_000_000
_LONGEST = 2**62  # nanoseconds, 146 years: beyond, a sum might not fit where it is saved


class VirtualClock:
    """The speeds, bandwidths, delay, deadline and absences of a run.

    Raises ConfigError where the trace cannot be read or names what does not exist.
    """

    def __init__(self, config: ClockConfig, clients: int, seed: int):
        self.config, self.clients = config, clients
        self.speeds = _draw(config.speed, config.speed_spread, clients, seed, "speed")
        self.bandwidths = _draw(config.bandwidth, config.bandwidth_spread, clients, seed, "bandwidth")
        self.delay = ticks(config.delay)
        self.deadline = None if config.deadline is None else ticks(config.deadline)
        self._trace = read_trace(config.trace, clients) if config.trace else {}

    @property
    def interrupts(self) -> bool:
        """Whether some clients may be missing from a synchronous round."""
        return self.deadline is not None or bool(self.config.away)

    def compute(self, client: int, steps: int, now: int) -> int:
        """Return the nanoseconds of so many local steps from now; the speed at the beginning holds throughout.

        At least one, but for no step at all.
        """
        return max(min(1, steps), ticks(steps * self.config.step / self._at(client, now, "speed", self.speeds[client])))

    def upload(self, client: int, count: int, now: int) -> int:
        """Return the nanoseconds until the uplink has sent ``count`` bytes; all messages of a push end together."""
        bandwidth = self._at(client, now, "bandwidth", self.bandwidths[client])
        return ticks(count / bandwidth) if np.isfinite(bandwidth) else 0

    def away(self, client: int, now: int, t: int) -> bool:
        """Whether the client is absent now, in round ``t``, and begins no job."""
        return any(_covers(each, now, t) for each in self._absences(client))

    def back(self, client: int, now: int) -> int | None:
        """Return when the client is present, now or later; None: never.  Only absences in seconds count."""
        moment = now
        while any(_covers(each, moment, -1) for each in self._absences(client)):
            ends = [each.back for each in self._absences(client) if _covers(each, moment, -1)]
            if None in ends:
                return None
            moment = max(ticks(end) for end in ends if end is not None)
        return moment

    def describe(self) -> dict[str, Any]:
        """Return the settings, speeds and bandwidths for the first event of a run."""
        finite = [each if np.isfinite(each) else None for each in self.bandwidths.tolist()]
        return self.config.model_dump(mode="json") | {"speed": self.speeds.tolist(), "bandwidth": finite}

    def _absences(self, client: int) -> list[Absence]:
        return [each for each in self.config.away if each.client == client]

    def _at(self, client: int, now: int, column: str, otherwise: float) -> float:
        """The trace's value at this moment; the configured one where the trace has none."""
        lines = self._trace.get(client, [])
        line = bisect_right(lines, now, key=lambda each: each["at"]) - 1
        return lines[line].get(column, float(otherwise)) if line >= 0 else float(otherwise)


def ticks(seconds: float) -> int:
    """Convert seconds to whole nanoseconds; raises ConfigError beyond 146 years."""
    if not seconds * SECOND < _LONGEST:
        raise ConfigError(
            f"clock: {seconds:.3g} virtual seconds at once; expected less than 146 years, check the units"
        )
    return round(seconds * SECOND)


def seconds(moment: int) -> float:
    """Convert nanoseconds to seconds, for events and output."""
    return moment / SECOND


def _draw(
    given: float | list[float] | None, spread: float, clients: int, seed: int, purpose: str
) -> Float[np.ndarray, " client"]:
    base = np.full(clients, np.inf) if given is None else np.broadcast_to(np.asarray(given, float), (clients,)).copy()
    if spread:
        draws = [numpy_generator(seed, purpose, client=client).standard_normal() for client in range(clients)]
        base *= np.exp(spread * np.array(draws))
    return base


def _covers(absence: Absence, now: int, t: int) -> bool:
    at = t if absence.unit == "rounds" else now
    scale = 1 if absence.unit == "rounds" else SECOND
    return at >= absence.leave * scale and (absence.back is None or at < absence.back * scale)


def read_trace(path: str, clients: int) -> dict[int, list[dict[str, Any]]]:
    """Read a trace file: per client, in order of time, the moment ``at`` (nanoseconds), speed and bandwidth from then.

    Raises ConfigError for a file that is missing, too large, or holds anything but positive numbers.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"clock.trace {path!r} is no file; expected a CSV with the columns {', '.join(_COLUMNS)}")
    if file.stat().st_size > _TRACE_BYTES:
        raise ConfigError(f"clock.trace {path!r} has more than {_TRACE_BYTES // 10**6} MB; give fewer lines")
    found: dict[int, list[dict[str, Any]]] = {}
    with open(file, newline="", encoding="utf-8", errors="replace") as lines:
        reader = csv.DictReader(lines)
        if not {"client"} < set(reader.fieldnames or ()) <= set(_COLUMNS):
            raise ConfigError(
                f"clock.trace {path!r} has the columns {', '.join(reader.fieldnames or ()) or 'none'}; expected client "
                "and any of seconds, speed, bandwidth"
            )
        for number, row in enumerate(reader, start=2):
            client, line = _trace_line(f"clock.trace {path!r}, line {number}", row, clients)
            found.setdefault(client, []).append(line)
    in_order = {client: sorted(own, key=lambda line: line["at"]) for client, own in found.items()}
    return {client: list(accumulate(own, lambda before, line: before | line)) for client, own in in_order.items()}


_COLUMNS = ("client", "seconds", "speed", "bandwidth")


def _trace_line(where: str, row: dict[str, str | None], clients: int) -> tuple[int, dict[str, Any]]:
    try:
        client = int(row["client"] or "")
        if None in row:
            raise ValueError("more fields than columns")
        values = {name: float(text) for name in _COLUMNS[1:] if (text := row.get(name))}
    except ValueError:
        raise ConfigError(f"{where}: {row} given; expected numbers, a field may be empty") from None
    at = values.pop("seconds", 0.0)
    if not 0 <= client < clients:
        raise ConfigError(f"{where}: client {client} given; clients are numbered 0 to {clients - 1}")
    if not (np.isfinite([at, *values.values()]).all() and at >= 0 and min(values.values(), default=1.0) > 0):
        raise ConfigError(f"{where}: {row} given; expected seconds of at least 0, speed and bandwidth above 0")
    return client, {"at": ticks(at)} | values


class ScheduledEvent(NamedTuple):
    """One event.  Events sort by their fields: at one moment first ends, then arrivals, then beginnings."""

    moment: int
    kind: int
    client: int
    """The client that trains or receives."""
    number: int
    """Distinguishes events of one client and moment: the number of a message, 0 for a job."""


DONE, ARRIVED, BEGINS = range(3)


class EventQueue:
    """Scheduled events in a total order, the same on every machine."""

    def __init__(self, events: Sequence[ScheduledEvent] = ()):
        self._heap = list(events)
        heapq.heapify(self._heap)

    def add(self, moment: int, kind: int, client: int, number: int = 0) -> None:
        """Schedule one event."""
        heapq.heappush(self._heap, ScheduledEvent(moment, kind, client, number))

    def next(self) -> ScheduledEvent:
        """Remove and return the first event."""
        return heapq.heappop(self._heap)

    @property
    def moment(self) -> int | None:
        """The moment of the first event; None for an empty queue."""
        return self._heap[0].moment if self._heap else None

    def to_list(self) -> list[ScheduledEvent]:
        """Return all events, in order."""
        return sorted(self._heap)
