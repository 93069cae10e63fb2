"""LiveRun: what the page shows of one federation, built from events as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from peerlora.runs.live.facts import describe_run
from peerlora.runs.live.follow import LineFacts
from peerlora.runs.live.notices import NAMED, Notice, Notices
from peerlora.runs.live.standing import Statuses, status_of
from peerlora.runs.live.table import Row, Table, known
from peerlora.runs.metrics import round_links_written

SHOWN_ROUNDS = 8
"""Latest rounds whose links the page gets."""
SHOWN_LINKS = 3000
"""Links of one round that the page gets; a browser is slow beyond."""
MOST_CLIENTS = 1_000_000
"""Clients of a run; an event that tells of more is damaged."""
MOST_NOTICES = 50
"""Latest notices of one client, and latest absences, that the page gets when it asks for the client."""
_PER_ROUND = ("consensus_A", "consensus_B", "consensus_product", "cross_term", "local_cross_term", "bytes_sent")
_PER_ROUND += ("contacts", "seconds_train", "seconds_mix", "virtual_seconds")


class LiveRun:
    """The state of one federation: a run of all clients, or the runs of its peers together.

    ``add`` takes an event; ``since`` returns what a page does not know yet.
    """

    def __init__(self):
        self.meta: dict[str, Any] = {}
        self.rounds: dict[int, dict[str, Any]] = {}
        self.noticed = Notices()
        self.loss, self.score, self.sent = Table(0), Table(0), Table(0)
        """``sent``: bytes of peers, which know their own only; those of a run of all clients follow from its links."""
        self.links: dict[int, np.ndarray] = {}
        """Finished rounds -> [link, 2] clients."""
        self.final: dict[str, Any] | None = None
        """The last evaluation, where it is on other rows than the curves."""
        self._rows: int | None = None
        self.done: dict[int, int] = {}
        """Client -> finished rounds."""
        self.statuses = Statuses()
        self.taken = 0
        """Events taken so far."""
        self._changed: dict[int, int] = {}
        """Round -> events taken when something of it last changed."""
        self._transfer: dict[int, int] = {}
        """Finished rounds -> bytes of one transfer along a link."""
        self._one_way: set[int] = set()
        """Finished rounds in which a link carries one transfer, from its first client to its second."""
        self._links_written = True
        """Whether every round so far told its links."""
        self._takes: dict[str, Callable[[LineFacts, Sequence[int]], None]] = {
            "RunStarted": self._started,
            "RoundDone": self._round,
            "Evaluated": self._evaluated,
            "RunFinished": self._finished,
            "CaughtUp": self._caught_up,
            "NeighbourChanged": self._neighbour,
            "Warned": lambda event, held: self._notice("warning", str(event.get("message", "")), held),
            "Resumed": self._resumed,
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

    @property
    def notices(self) -> list[Notice]:
        """What the event list shows."""
        return self.noticed.all()

    @property
    def numbered(self) -> int:
        """Notices so far."""
        return self.noticed.numbered

    @property
    def status(self) -> dict[int, str]:
        """Client -> absent, late, refused or catching up; none of them: takes part."""
        return self.statuses.current()

    def since(self, taken: int, notice: int) -> dict[str, Any]:
        """What a page lacks that knows the first ``taken`` events and all before notice number ``notice``; -1: all.

        Only rounds of which later events tell are in it: a peer that stopped long ago makes no update longer.
        """
        higher = self.meta.get("higher", True)
        fresh = {t for t, at in self._changed.items() if at > taken}
        found: dict[str, Any] = {"meta": self.meta}
        found["rounds"] = [self.rounds[t] for t in sorted(fresh & self.rounds.keys())]
        for name, table in (("loss", self.loss), ("score", self.score)):
            found[name] = [table.entry(t, higher and name == "score") for t in sorted(fresh.intersection(table.rounds))]
        shown = sorted(self.links)[-SHOWN_ROUNDS:]
        found["links"] = {str(t): self.links[t][:SHOWN_LINKS].tolist() for t in shown if t in fresh}
        found["final"] = self.final
        found["notices"] = [each for each in self.notices if each["n"] >= notice]
        found["clients"] = {"loss": self.loss.latest(), "score": self.score.latest(), **self._standing()}
        return found

    def client(self, number: int) -> dict[str, Any]:
        """The curves of one client, its labels, its bytes, and the notices about it, its absences among them."""
        counts = self.meta.get("counts") or []
        labels = counts[number] if number < len(counts) else None
        curves = {"loss": self.loss.column(number), "score": self.score.column(number), "bytes": self._bytes(number)}
        found = {**curves, "labels": labels, "environment": self._environment(number), "notices": self._about(number)}
        return found | self._exchanges(number)

    def _exchanges(self, client: int) -> dict[str, int | None]:
        """In how many rounds a client exchanged, and in which last; ``met`` is None where rounds do not tell."""
        if not self._links_written:
            return {"met": None, "last": None}
        met = [t for t, links in self.links.items() if (links == client).any()]
        return {"met": len(met), "last": max(met, default=None)}

    def _about(self, client: int) -> list[Notice]:
        """The notices that name a client; its absences are found in the rounds, since a notice names a few clients."""
        about = [each for each in self.notices if client in each["clients"] and each["level"] != "absence"]
        away = {t for t, entry in self.rounds.items() if client in entry["absent"]}
        begun = sorted(t for t in away if t - 1 not in away)
        facts = {"n": -1, "level": "absence", "clients": [client]}
        text = f"{self._name(client)}: {self._word()}"
        others = [{**facts, "text": text, "round": t} for t in begun[-MOST_NOTICES:]]
        return sorted([*about[-MOST_NOTICES:], *others], key=lambda each: each["round"])

    def _bytes(self, client: int) -> dict[str, Row]:
        """What a client had sent after each round: of a peer as it says, else along its links if all are told."""
        if self.meta.get("peers"):
            column = self.sent.column(client)
            rounds, each = column["x"], [value or 0.0 for value in column["y"]]
        elif not self._links_written:  # a sum over some of the rounds would stand there as that over all
            rounds, each = [], []
        else:
            rounds = [float(t) for t in sorted(self.links)]
            each = [float(self._sends(int(t), client) * self._transfer.get(int(t), 0)) for t in rounds]
        return {"x": list(rounds), "y": np.cumsum(each).tolist()}

    def _sends(self, t: int, client: int) -> int:
        """The transfers of a client along the links of a round."""
        links = self.links[t]
        return int((links[:, 0] == client).sum() if t in self._one_way else (links == client).sum())

    def _name(self, client: int) -> str:
        return self.meta.get("names", {}).get(str(client)) or f"client {client}"

    def _word(self) -> str:
        """What is known of a client that had no part in a round: with a deadline it may be away, or late."""
        clock = self.meta.get("clock")
        if not clock or not clock["deadline"]:
            return "absent"
        return "absent or late" if clock["away"] else "late"

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
            self.loss, self.score, self.sent = Table(clients), Table(clients), Table(clients)
        self.meta = describe_run(event, held, self.meta.get("counts") or [None] * clients)
        for warning in event.get("warnings") or ():
            self._notice("warning", str(warning), held)

    def _round(self, event: LineFacts, held: Sequence[int]) -> None:
        t = int(event["round"]) + 1
        clients = held or range(self.loss.clients)
        if event["loss"]:
            self.loss.put(t, clients, event["loss"])
        else:
            self.loss.put_spread(t, "loss", event.get("measures") or {}, higher=False)
        entry = self.rounds.setdefault(t, {"x": t, "absent": [], "bytes_sent": None})
        for name in _PER_ROUND:
            entry[name] = _added(name, entry.get(name), event.get(name)) if held else event.get(name)
        links = self._links(t, event, held)
        self.done |= dict.fromkeys(clients if held else (), t)
        self._changed[t] = self.taken
        entry["absent"] = absent = [int(client) for client in event.get("absent") or []]
        words = {int(client): status_of(str(reason)) for client, reason in (event.get("missed") or {}).items()}
        said = {client: word for client, word in words.items() if word} | dict.fromkeys(absent, self._word())
        self.statuses.round_done(t, held, said, links.tolist() if held else ())
        if absent and absent != self.rounds.get(t - 1, {}).get("absent"):
            self._tell_absent(absent)

    def _links(self, t: int, event: LineFacts, held: Sequence[int]) -> np.ndarray:
        """Take the links of a round, and what went along them; return those that this event tells."""
        links = np.array(event.get("edges") or [], np.int32).reshape(-1, 2)
        if event.get("edges") is None:
            self._links_written &= round_links_written(None, int(event.get("contacts") or 0))
            return links
        both = np.concatenate([self.links[t], links]) if t in self.links else links
        self.links[t] = np.unique(both, axis=0) if held else links
        each, sent = int(event.get("bytes_per_edge") or 0), int(event.get("bytes_sent") or 0)
        self._transfer[t] = each
        if held:
            self.sent.put(t, held, [sent])
        elif len(links):
            self._find_direction(t, links, sent < 2 * each * len(links))
        return links

    def _find_direction(self, t: int, links: np.ndarray, few: bool) -> None:
        """Record whether links go one way in a round; ``few``: less was sent than one transfer each way on every link.

        The opening's bytes are among those of round 1, so that these may be many although its links go one way.  Then
        links that are listed in both directions tell, or the same links in a later round.
        """
        if few or (t == 1 and _lists_both_directions(links)):
            self._one_way.add(t)
        if few and t > 1 and np.array_equal(links, self.links.get(1, ())):
            self._one_way.add(1)

    def _tell_absent(self, absent: Sequence[int]) -> None:
        more = f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
        self._notice("absence", f"{self._word()}: {', '.join(map(self._name, absent[:NAMED]))}{more}", absent)

    def _finished(self, event: LineFacts, held: Sequence[int]) -> None:
        self.statuses.finished(held)
        self._notice("good", f"finished {event.get('time', '')}", held)

    def _resumed(self, event: LineFacts, held: Sequence[int]) -> None:
        self.statuses.resumed(held)
        self._notice("info", f"resumed after round {event.get('round')}", held)

    def _evaluated(self, event: LineFacts, held: Sequence[int]) -> None:
        t, rows = int(event["round"]), int(event["rows"])
        self._tell_score(t, event, held)
        if event.get("final") and self._rows not in (None, rows):
            self._final(rows, event["own"], held)
            return
        self._rows = rows
        self.score.put(t, held or range(self.score.clients), event["own"])
        self._changed[t] = self.taken

    def _tell_score(self, t: int, event: LineFacts, held: Sequence[int]) -> None:
        """Add a notice of an evaluation, which is about its worst client."""
        own = {client: value for client, value in zip(held or range(len(event["own"])), event["own"], strict=False)}
        scored = {client: float(value) for client, value in own.items() if value is not None}
        if not scored:
            return
        worst = (min if self.meta.get("higher", True) else max)(scored, key=scored.__getitem__)
        text = f"{self.meta.get('metric', 'score')} after {t} rounds, on {event['rows']} rows: "
        mean = known(sum(scored.values()) / len(scored))
        more = f"mean {mean}, worst {known(scored[worst])} ({self._name(worst)})"
        self._notice("score", text + (more if len(scored) > 1 else str(known(scored[worst]))), [worst])

    def _final(self, rows: int, own: Sequence[float | None], held: Sequence[int]) -> None:
        """Keep an evaluation on other rows apart from the curves; that of several peers is put together."""
        all_rows: Row = self.final["own"] if self.final else [None] * self.loss.clients
        for client, value in zip(held or range(len(all_rows)), own, strict=False):
            all_rows[client] = value
        known = [each for each in all_rows if each is not None]
        worst = (min if self.meta.get("higher", True) else max)(known, default=None)
        self.final = {"rows": rows, "own": all_rows, "mean": sum(known) / len(known) if known else None, "worst": worst}

    def _caught_up(self, event: LineFacts, held: Sequence[int]) -> None:
        self.statuses.caught_up(held)
        self._notice("info", f"left out rounds {event['round']} to {event['to']}", held)

    def _neighbour(self, event: LineFacts, held: Sequence[int]) -> None:
        kind, client = str(event["kind"]), int(event["client"])
        level = "info" if kind == "up" else "warning"
        detail = str(event.get("detail", ""))
        self.statuses.neighbour(kind, detail, int(event["round"]), held, client)
        self._notice(level, f"{self._name(client)}: {kind} {detail}".strip(), [*held, client])

    def _notice(self, level: str, text: str, clients: Sequence[int]) -> None:
        """Add a notice, of the round in which the run that tells it is."""
        done = self.done.get(clients[0], 0) if self.meta.get("peers") and clients else max(self.rounds, default=0)
        self.noticed.add(level, text, clients, done)


def _lists_both_directions(links: np.ndarray) -> bool:
    """Say whether any link stands in both directions; one that goes both ways at once is listed in one of them."""
    pairs = set(map(tuple, links.tolist()))
    return any((receiver, sender) in pairs for sender, receiver in pairs)


def _added(name: str, before: float | None, now: float | None) -> float | None:
    """One number of a round from several peers: a sum for bytes, else the latest that is known."""
    if name in ("bytes_sent", "contacts"):
        return (before or 0) + (now or 0)
    return before if now is None else now
