"""Statuses: which clients are absent, late, refused or catching up, from logs that are read at different speeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

LATE = {"behind", "no message", "no acknowledgement"}
ABSENT = {"absent", "down", "not on the member list"}
NO_STATUS = {"ahead", "late", "not asked", "sum given up", "too many messages waiting"}
"""Reasons that say nothing about the neighbour: this client was late itself (the neighbour's round was over), or did
not ask."""
_SEVERE = ("late", "absent or late", "absent", "refused")


def status_of(reason: str) -> str | None:
    """The word for why a link was not used: absent, late or refused; None where that is not the neighbour's doing.

    What is none of the known silences is the reason of a refusal.
    """
    word = reason.removeprefix("refused: ").partition(":")[0].strip()
    if word in NO_STATUS:
        return None
    return "late" if word in LATE else "absent" if word in ABSENT else "refused"


class Statuses:
    """What is said of clients, and the round it was said of; ``current`` has what no later round contradicts.

    Logs of several peers are read one after the other, so a log may tell of round 3 when another has told of round 9
    already: rounds decide, not the order of reading.
    """

    def __init__(self):
        self._said: dict[int, tuple[int, dict[int, str]]] = {}
        """Who tells (-1: a run of all clients) -> the latest round it told of, and its word for others."""
        self._lost: dict[int, dict[int, tuple[int, str]]] = {}
        """Who tells -> client -> since which round it cannot be reached, or was refused."""
        self._seen: dict[int, int] = {}
        """Client -> the last round in which it exchanged with anybody."""
        self._catching: dict[int, int] = {}
        self._finished: set[int] = set()

    def round_done(self, t: int, held: Sequence[int], words: Mapping[int, str], links: Iterable[Sequence[int]]) -> None:
        """Take a finished round of a run that holds these clients: its words for others, and the links used."""
        who = held[0] if held else -1
        self._said[who] = t, dict(words)
        reached = {int(client) for link in links for client in link}
        for client in reached:
            self._seen[client] = max(t, self._seen.get(client, 0))
        lost = self._lost.get(who, {})
        self._lost[who] = {each: own for each, own in lost.items() if each not in reached and own[1] != "refused"}
        for client in held:
            self._catching.pop(client, None)

    def neighbour(self, kind: str, detail: str, t: int, held: Sequence[int], client: int) -> None:
        """Take what a peer noticed of a neighbour after ``t`` finished rounds."""
        who = held[0] if held else -1
        if kind == "up":
            self._lost.get(who, {}).pop(client, None)
        elif kind == "down":
            self._lost.setdefault(who, {})[client] = t, "absent"
        elif kind == "refused":  # here, where a message that came late is the neighbour's
            word = "late" if detail.partition(":")[0] == "late" else "refused"
            self._lost.setdefault(who, {}).setdefault(client, (t, word))

    def caught_up(self, held: Sequence[int]) -> None:
        """Take that these clients left out rounds."""
        self._catching |= dict.fromkeys(held, 0)

    def finished(self, held: Sequence[int]) -> None:
        """Take that a peer's run has ended: of who is done, nobody can say that it is away."""
        self._finished |= set(held)

    def resumed(self, held: Sequence[int]) -> None:
        """Take that a peer's run goes on."""
        self._finished -= set(held)

    def current(self) -> dict[int, str]:
        """Client -> absent, late, absent or late, refused or catching up; none of them: takes part."""
        found: dict[int, str] = {}
        reports = [(t, client, word) for t, words in self._said.values() for client, word in words.items()]
        reports += [(t, client, word) for lost in self._lost.values() for client, (t, word) in lost.items()]
        for t, client, word in reports:
            if t >= self._seen.get(client, 0) and client not in self._finished:
                found[client] = max(word, found.get(client, word), key=_SEVERE.index)
        return found | dict.fromkeys(self._catching, "catching up")
