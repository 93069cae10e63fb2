"""LiveRun: what the page shows of one federation, built from events as they come."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from peerlora.runs.live.follow import LineFacts

NOTICES = 500
"""Latest notices that are kept."""
SHOWN_ROUNDS = 8
"""Latest rounds whose links the page gets."""
SHOWN_LINKS = 3000
"""Links of one round that the page gets; a browser is slow beyond."""
FEW_CLIENTS = 60
"""Clients; above, the page gets quantiles over clients, and the curves of one client when it asks for them."""
LONGEST_NOTICE = 2000
"""Characters of a notice."""
MOST_CLIENTS = 1_000_000
"""Clients of a run; an event that tells of more is damaged."""
_PER_ROUND = ("consensus_A", "consensus_B", "consensus_product", "cross_term", "local_cross_term", "bytes_sent")
_PER_ROUND += ("contacts", "seconds_train", "seconds_mix", "virtual_seconds")
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Row = list[float | None]


class Table:
    """One quantity of every client over the rounds: round -> [client]."""

    def __init__(self, clients: int):
        self.clients = clients
        self.rows: dict[int, np.ndarray] = {}
        self._entries: dict[int, dict[str, Any]] = {}

    def put(self, round: int, held: Sequence[int], values: Sequence[float | None]) -> None:
        """Enter the values of some clients; what is none of them is left out."""
        row = self.rows.setdefault(round, np.full(self.clients, np.nan, np.float32))
        self._entries.pop(round, None)
        found = np.array(values, np.float32)  # None becomes NaN
        places = np.array(held, np.int64)[: len(found)]
        inside = places < self.clients
        row[places[inside]] = found[: len(places)][inside]

    def column(self, client: int) -> dict[str, Row]:
        """The curve of one client."""
        rounds = sorted(self.rows)
        return {"x": list(map(float, rounds)), "y": [_known(self.rows[each][client]) for each in rounds]}

    def entry(self, round: int, higher: bool) -> dict[str, Any]:
        """Mean, worst client and spread of one round, and every client's value where they are few."""
        if round not in self._entries:
            self._entries[round] = self._entry(round, higher)
        return self._entries[round]

    def _entry(self, round: int, higher: bool) -> dict[str, Any]:
        row = self.rows[round]
        known = row[np.isfinite(row)]
        found: dict[str, Any] = {"x": round, "mean": None, "worst": None, "who": None}
        if known.size:
            worst = int(np.nanargmin(row) if higher else np.nanargmax(row))
            found |= {"mean": _known(known.mean()), "worst": _known(row[worst]), "who": worst}
        if self.clients <= FEW_CLIENTS:
            return found | {"all": [_known(each) for each in row]}
        return found | {"band": [_known(each) for each in np.quantile(known, _QUANTILES)] if known.size else None}

    def latest(self) -> Row:
        """Every client's latest value."""
        last = np.full(self.clients, np.nan, np.float32)
        for round in sorted(self.rows)[-3:]:  # a client may be absent, or report later than others
            row = self.rows[round]
            last = np.where(np.isfinite(row), row, last)
        return [_known(each) for each in last]


class LiveRun:
    """The state of one federation: a run of all clients, or the runs of its peers together.

    ``add`` takes an event; ``since`` returns what a page does not know yet.
    """

    def __init__(self):
        self.meta: dict[str, Any] = {}
        self.rounds: dict[int, dict[str, Any]] = {}
        self.notices: deque[dict[str, Any]] = deque(maxlen=NOTICES)
        self.numbered = 0
        self.loss, self.score = Table(0), Table(0)
        self.links: dict[int, np.ndarray] = {}
        """Finished rounds -> [link, 2] clients."""
        self.final: dict[str, Any] | None = None
        """The last evaluation, where it is on other rows than the curves."""
        self._rows: int | None = None
        self.done: dict[int, int] = {}
        """Client -> finished rounds."""
        self.status: dict[int, str] = {}
        """Client -> absent, late, refused or catching up; none of them: takes part."""
        self.taken = 0
        """Events taken so far."""
        self._takes: dict[str, Callable[[LineFacts, Sequence[int]], None]] = {
            "RunStarted": self._started,
            "RoundDone": self._round,
            "Evaluated": self._evaluated,
            "RunFinished": lambda event, held: self._notice("good", f"finished {event.get('time', '')}", held),
            "CaughtUp": self._caught_up,
            "NeighbourChanged": self._neighbour,
            "Warned": lambda event, held: self._notice("warning", str(event.get("message", "")), held),
            "Resumed": lambda event, held: self._notice("info", f"resumed after round {event.get('round')}", held),
            "Joined": lambda event, held: self._notice("info", f"began with {len(event['reached'])} neighbours", held),
            "CheckpointSaved": lambda event, held: self._notice("info", f"checkpoint after {event.get('round')}", held),
        }

    def add(self, event: LineFacts, held: Sequence[int]) -> None:
        """Take one event of a run that holds these clients; one that is damaged is left out."""
        self.taken += 1
        take = self._takes.get(event["type"])
        try:
            if take is not None:
                take(event, held)
        except Exception:  # whatever the file says, the page goes on
            self._notice("warning", f"a damaged event of type {event['type'][:30]} was left out", held)

    def since(self, round: int, notice: int) -> dict[str, Any]:
        """What a page lacks that knows all before ``round`` and before notice number ``notice``; -1: all.

        The round itself is in it, and in a federation of peers those that some of them are still in.
        """
        higher = self.meta.get("higher", True)
        first = min([round, *self.done.values()])
        found: dict[str, Any] = {"meta": self.meta}
        found["rounds"] = [entry for t, entry in sorted(self.rounds.items()) if t >= first]
        for name, table in (("loss", self.loss), ("score", self.score)):
            found[name] = [table.entry(t, higher and name == "score") for t in sorted(table.rows) if t >= first]
        shown = sorted(self.links)[-SHOWN_ROUNDS:]
        found["links"] = {str(t): self.links[t][:SHOWN_LINKS].tolist() for t in shown if t >= first}
        found["final"] = self.final
        found["notices"] = [each for each in self.notices if each["n"] >= notice]
        found["clients"] = {"loss": self.loss.latest(), "score": self.score.latest(), **self._standing()}
        return found

    def client(self, number: int) -> dict[str, Any]:
        """The curves of one client, its labels, and the notices about it."""
        counts = self.meta.get("counts") or []
        about = [each for each in self.notices if number in each["clients"]]
        labels = counts[number] if number < len(counts) else None
        curves = {"loss": self.loss.column(number), "score": self.score.column(number)}
        met = [t for t, links in self.links.items() if (links == number).any()]
        found = {**curves, "labels": labels, "environment": self._environment(number), "notices": about[-50:]}
        return found | {"met": len(met), "last": max(met, default=None)}

    def _environment(self, client: int) -> str:
        """What one client acts in, in words; nothing where it has rows."""
        values = self.meta["values"].items() if "environment" in self.meta else ()
        constants = ", ".join(f"{name} {own[client]:.4g}" for name, own in values if client < len(own))
        return " with ".join(filter(None, [self.meta.get("environment"), constants]))

    def _standing(self) -> dict[str, Any]:
        named = {"done": self.done, "status": self.status}
        return {name: {str(client): each for client, each in of.items()} for name, of in named.items()}

    def _started(self, event: LineFacts, held: Sequence[int]) -> None:
        clients = int(event["clients"])
        if not 0 < clients <= MOST_CLIENTS:
            raise ValueError(clients)
        if clients != self.loss.clients:
            self.loss, self.score = Table(clients), Table(clients)
        counts = self.meta.get("counts") or [None] * clients
        own = (event.get("partition") or {}).get("counts") or []
        for client, row in zip(held or range(clients), own, strict=False):
            counts[client] = row
        self.meta = {
            "method": event["method"],
            "clients": clients,
            "rounds": int(event["rounds"]),
            "metric": event["metric"],
            "higher": bool(event["higher_is_better"]),
            "seed": event.get("seed"),
            "started": event.get("time"),
            "topology": (event.get("topology") or {}).get("kind"),
            "names": dict(event.get("names") or {}),
            "labels": (event.get("partition") or {}).get("names"),
            "counts": counts,
            "peers": bool(event.get("held")),
        }
        self.meta |= _environments(event.get("partition") or {})
        for warning in event.get("warnings") or ():
            self._notice("warning", str(warning), held)

    def _round(self, event: LineFacts, held: Sequence[int]) -> None:
        t = int(event["round"]) + 1
        clients = held or range(self.loss.clients)
        self.loss.put(t, clients, event["loss"])
        entry = self.rounds.setdefault(t, {"x": t, "absent": [], "bytes_sent": None})
        for name in _PER_ROUND:
            entry[name] = _added(name, entry.get(name), event.get(name)) if held else event.get(name)
        if event.get("edges") is not None:
            links = np.array(event["edges"], np.int32).reshape(-1, 2)
            both = np.concatenate([self.links[t], links]) if t in self.links else links
            self.links[t] = np.unique(both, axis=0) if held else links
        entry["absent"] = event.get("absent") or []
        for client in clients if held else ():
            self.done[client] = t
        for client in held:
            self.status.pop(client, None)
        if not held:
            self.status = dict.fromkeys(entry["absent"], "absent")
        for client, reason in (event.get("missed") or {}).items():
            self.status[int(client)] = "refused" if "refused" in str(reason) else "late"

    def _evaluated(self, event: LineFacts, held: Sequence[int]) -> None:
        t, rows = int(event["round"]), int(event["rows"])
        if event.get("final") and self._rows not in (None, rows):
            self._final(rows, event["own"], held)
            return
        self._rows = rows
        self.score.put(t, held or range(self.score.clients), event["own"])

    def _final(self, rows: int, own: Sequence[float | None], held: Sequence[int]) -> None:
        """Keep an evaluation on other rows apart from the curves; that of several peers is put together."""
        all_rows: Row = self.final["own"] if self.final else [None] * self.loss.clients
        for client, value in zip(held or range(len(all_rows)), own, strict=False):
            all_rows[client] = value
        known = [each for each in all_rows if each is not None]
        worst = (min if self.meta.get("higher", True) else max)(known, default=None)
        self.final = {"rows": rows, "own": all_rows, "mean": sum(known) / len(known) if known else None, "worst": worst}

    def _caught_up(self, event: LineFacts, held: Sequence[int]) -> None:
        for client in held:
            self.status[client] = "catching up"
        self._notice("info", f"left out rounds {event['round']} to {event['to']}", held)

    def _neighbour(self, event: LineFacts, held: Sequence[int]) -> None:
        kind, client = str(event["kind"]), int(event["client"])
        level = "info" if kind == "up" else "warning"
        name = self.meta.get("names", {}).get(str(client), f"client {client}")
        self._notice(level, f"{name}: {kind} {event.get('detail', '')}".strip(), [*held, client])

    def _notice(self, level: str, text: str, clients: Sequence[int]) -> None:
        notice = {"n": self.numbered, "level": level, "text": text[:LONGEST_NOTICE], "clients": list(clients)}
        self.notices.append({**notice, "round": max(self.rounds, default=0)})
        self.numbered += 1


def _environments(partition: dict[str, Any]) -> dict[str, Any]:
    """The environment of flow policies, and the values in which those of clients differ; nothing where they have rows.

    Raises ValueError or TypeError for values that are no numbers.
    """
    if "environment" not in partition:
        return {}
    values = {str(name): [float(each) for each in own] for name, own in partition["values"].items()}
    return {"environment": str(partition["environment"]), "values": values}


def _added(name: str, before: float | None, now: float | None) -> float | None:
    """One number of a round from several peers: a sum for bytes, else the latest that is known."""
    if name in ("bytes_sent", "contacts"):
        return (before or 0) + (now or 0)
    return before if now is None else now


def _known(value: float | np.floating) -> float | None:
    """Four digits of a number; None where there is none."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
