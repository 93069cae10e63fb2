"""What a real peer's events say about its neighbours."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from peerlora.runs.events import CaughtUp, Event, NeighbourChanged, RoundDone
from peerlora.runs.metrics import find_start, link_uses, select_events


@dataclass
class Neighbour:
    """One neighbour, over a whole run."""

    client: int
    site: str
    met: int = 0
    """Rounds in which the link was used."""
    missed: Counter[str] = field(default_factory=Counter)
    """Reason -> rounds in which it was planned and not used."""
    half_used: int = 0
    """Exchanges that one end used and the other did not, as far as they were found."""
    changes: list[NeighbourChanged] = field(default_factory=list)


def neighbours(events: Sequence[Event]) -> list[Neighbour]:
    """All neighbours of a real peer by client number; none in a simulation."""
    start = find_start(events)
    if start is None or not start.held:
        return []
    (me,), found = start.held, dict[int, Neighbour]()

    def about(client: int) -> Neighbour:
        return found.setdefault(client, Neighbour(client, start.names.get(str(client), f"client {client}")))

    for edge, rounds in (link_uses(events) or {}).items():
        about(edge[0] if edge[1] == me else edge[1]).met += rounds
    for done in select_events(events, RoundDone):
        for client, reason in done.missed.items():
            about(int(client)).missed[reason] += 1
    for change in select_events(events, NeighbourChanged):
        about(change.client).half_used += change.kind == "half-used"
        about(change.client).changes.append(change)
    return [found[client] for client in sorted(found)]


def left_out(events: Sequence[Event]) -> int:
    """Rounds that a peer left out because it had fallen behind."""
    return sum(each.to - each.round for each in select_events(events, CaughtUp))
