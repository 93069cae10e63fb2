"""Who meets whom in an exchange between real peers.  Lives on one event loop; knows messages, not what they are for.

An edge counts in an exchange for the end that got the other's message and whose own message the other acknowledged;
where links go one way, it counts for the sender by the acknowledgement, for the receiver by the message.
A message is acknowledged only while it would still be used: one that comes early waits, with the sender's call open,
until its exchange begins here; one that comes after the exchange was closed is refused as ``late``.  So both ends
agree, except where the very last acknowledgement is lost.  Then one end used an edge that the other did not: every
message says what became of the last exchange on its edge, and the end that knows otherwise tells it as ``half-used``.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import msgspec

from peerlora.network.base import DeadlineMissed, PeerDown, PeerId, Refused, Transport
from peerlora.network.protocol.event_limiter import EventLimiter, NeighbourEvent
from peerlora.network.protocol.event_loop import run_off_loop
from peerlora.network.protocol.link_history import LAST, ExchangeStep, LinkHistory
from peerlora.network.protocol.pending_exchange import Decoder, ExchangeResult, OutgoingMessage, PendingExchange
from peerlora.network.protocol.wire import Expected, Header, encode_header, read_header, with_checksum

_ANY_ROUND = 2**53  # what a header's numbers may be
_AHEAD = 1  # rounds that a neighbour may be ahead and be waited for; a message from further ahead is refused
_BEHIND = 2  # rounds behind from which a peer leaves rounds out; one round behind, it is waited for
_LOST = 0.8  # of the deadline, after which what is still missing of an edge whose other half came is given up,
_SURE = 0.1  # and how much of the deadline the other half must have been there: the two don't come at one moment
_AGAIN = 0.1  # seconds before a message to a peer that went away is tried once more
_SLOWEST = 1.0  # seconds between two tries of a message to a peer that is behind


class RoundProtocol:
    """One peer's exchanges over a transport; it is the transport's receiver.

    ``deadline``: seconds that an exchange waits for neighbours.  ``largest``: bytes of body that a ``mix`` may have.
    ``rounds``: of the run; no message may be of a later one.  ``service``: takes every kind of message but ``mix``; it
    also says who the neighbours are.
    """

    def __init__(
        self, transport: Transport, expected: Expected, deadline: float, largest: int, rounds: int = _ANY_ROUND
    ):
        self.transport, self.expected, self.deadline, self.largest = transport, expected, deadline, largest
        self.rounds = rounds
        self.service: Service = Service()
        self.neighbours: frozenset[PeerId] = frozenset()
        """Whom this peer may meet in some round; of anybody else nothing is taken, and nothing remembered."""
        self.at = ExchangeStep(0)
        """The exchange that is going on, or comes next."""
        self.heard: dict[PeerId, int] = {}
        """The round that each neighbour was in when it last said something."""
        self.absent: set[PeerId] = set()
        """Not waited for: they are down, or missed a deadline and were not heard of since."""
        self.disagreeing: dict[PeerId, str] = {}
        """Who has other settings, and which: until a greeting agrees, no message of theirs is taken and none sent."""
        self.together = False
        """Whether any edge counted in the latest exchange."""
        self.apart = True
        """Whether the others may have gone on without this peer: it has only just started, or was cut off from all of
        them, and no edge has counted since."""
        self._notices = EventLimiter()
        self._edges = LinkHistory(self._told_otherwise)
        self._open: PendingExchange | None = None
        self._seen: dict[PeerId, ExchangeStep] = {}
        """The exchange that each neighbour was in, or before, then."""
        self._changed = asyncio.Event()

    # --- what the transport calls

    def admit(self, peer: PeerId, header: bytes) -> int:
        """The bytes of body that a message may have; raises Refused for one that could not be used."""
        found = self._read(peer, header)
        most = self.largest if found.kind == "mix" else self.service.largest(peer, found)
        read_header(header, most)
        if found.kind == "mix":
            self._note(peer, found)  # before it may prove late or early: so who is behind learns where the others are
            self._timely(peer, ExchangeStep(found.round, found.step))
        return most

    async def deliver(self, peer: PeerId, header: bytes, body: bytearray) -> None:
        """Take a message, once it can be used."""
        found = self._read(peer, header)
        if found.kind == "mix":
            await self._take(peer, found, body)
        else:
            await self.service.take(peer, found, body)
            self._note(peer, found)

    def _read(self, peer: PeerId, header: bytes) -> Header:
        """The header of a message that could be a neighbour's; nothing of it is remembered yet.  Raises Refused."""
        if peer not in self.neighbours:  # a member list without edges lets everybody on it through to here
            raise Refused("not-a-neighbour", "this run links the two in no round")
        found = read_header(header)
        try:
            self.expected.check(found, peer)
        except Refused as refusal:
            self.service.disagrees(peer, refusal)
            raise
        if found.round > self.rounds:
            raise Refused("from-the-future", f"round {found.round} given, the run has {self.rounds}")
        if found.kind != "hello" and peer in self.disagreeing:
            raise Refused("wrong-config", self.disagreeing[peer])
        if not LAST.fullmatch(_last_told(found)):
            raise Refused("bad-header", "last")
        return found

    def _note(self, peer: PeerId, found: Header) -> None:
        """Remember what a message says of its sender.

        Only of one that is taken, or that would have been at another time: whatever else is refused leaves no trace.
        """
        self.heard[peer], self._seen[peer] = found.round, ExchangeStep(found.round, found.step)
        if self._open is not None and self._open.one_way:
            self._tell()
        self._edges.claimed(peer, _last_told(found), self.at)
        self.back(peer)

    def _timely(self, peer: PeerId, step: ExchangeStep) -> None:
        """Raise Refused for a message whose time is over or far away."""
        if step < self.at:
            taken = self._edges.used(peer, step)
            raise Refused("replay" if taken else "late", f"round {step.round} given, now in round {self.at.round}")
        if step.round > self.at.round + _AHEAD:
            raise Refused("from-the-future", f"round {step.round} given, now in round {self.at.round}")

    async def _take(self, peer: PeerId, header: Header, body: bytearray) -> None:
        step = ExchangeStep(header.round, header.step)
        meeting = await self._until(peer, step)
        if peer not in meeting.senders:
            raise Refused("not-a-neighbour", f"in round {step.round}")
        made = await run_off_loop(len(body), meeting.check, header, body)
        self._timely(peer, step)
        if peer in meeting.got:
            raise Refused("replay", f"round {step.round}, exchange {step.number}")
        meeting.got[peer] = made
        self._tell()

    async def _until(self, peer: PeerId, step: ExchangeStep) -> PendingExchange:
        """The meeting of ``step``, once it has begun; the transport lets one message per peer wait."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.deadline):
                while step != self.at or self._open is None:
                    self._timely(peer, step)
                    await self._changed.wait()
                return self._open
        raise Refused("late", f"it waited for {self.deadline:g} s")

    # --- what the exchange calls

    def called(self, round: int) -> tuple[int, PeerId] | None:
        """The neighbour to follow and its round, where a client that would begin ``round`` should leave rounds out.

        That is where most neighbours are ahead: one that was cut off has nobody to wait for and runs ahead alone, and
        then it is the one to wait.  Where more than two are there, the middle one of those ahead is followed: what a
        single one says of itself, true or not, moves nobody who has others to hear.
        """
        away = self.absent | self.disagreeing.keys()
        present = {peer: there for peer, there in self.heard.items() if peer not in away}
        ahead = sorted((there, peer) for peer, there in present.items() if there >= round + _BEHIND)
        if 2 * len(ahead) <= len(present):
            return None
        return ahead[(len(ahead) - 1) // 2] if len(present) > 2 else ahead[-1]

    def enter(self, round: int, first: bool = False) -> None:
        """Say that this client is in a round; everything of earlier rounds is late from now on."""
        if round != self.at.round:
            self._notices.next_round(self.at.round)
        self.at = ExchangeStep(round)
        if first:
            self._edges.born = self.at
        self._tell()

    async def meet(
        self,
        neighbours: Collection[PeerId],
        letter: OutgoingMessage | bytes,
        check: Decoder,
        senders: Collection[PeerId] | None = None,
    ) -> ExchangeResult:
        """Send to all neighbours and take their messages, until all have answered or the deadline has come.

        With ``senders`` links go one way: their messages are taken, the own one goes to ``neighbours``.
        """
        letter = letter if isinstance(letter, OutgoingMessage) else OutgoingMessage(letter)
        one_way, senders = senders is not None, neighbours if senders is None else senders
        step, meeting = self.at, PendingExchange(neighbours, senders, check, one_way)
        if one_way:  # what is cut short when nobody waits for its answer may arrive all the same, and count there alone
            meeting.failed |= {peer: "absent" for peer in neighbours if peer in self.absent}
        meeting.failed |= {peer: "wrong-config" for peer in meeting.peers if peer in self.disagreeing}
        self._open = meeting
        self._tell()
        header = msgspec.structs.replace(self.header("mix", **letter.facts), codec=letter.codec)
        seal = with_checksum(header, letter.body)
        receivers = [peer for peer in neighbours if peer not in meeting.failed]
        calls = [asyncio.create_task(self._send(meeting, peer, seal, letter)) for peer in receivers]
        try:
            await self._wait(meeting, step)
            return self._close(step, meeting)
        finally:
            self._open, self.at = None, ExchangeStep(step.round, step.number + 1)
            self._tell()
            for call in calls:
                call.cancel()
            ends = await asyncio.gather(*calls, return_exceptions=True)
            for end in ends:
                if isinstance(end, Exception):
                    raise end

    async def _wait(self, meeting: PendingExchange, step: ExchangeStep) -> None:
        """Until all edges are settled or the deadline has come.

        An edge of which half came, a message or an acknowledgement, is given up some time before: the neighbour is in
        this exchange, so the rest is lost.  Those who wait for us in their next exchange began to wait when we did, and
        would lose patience at the same moment, and those who wait for them.
        """
        clock = asyncio.get_running_loop().time
        begun = clock()
        end = begun + self.deadline
        until: dict[PeerId, float] = {}
        while True:
            now = clock()
            for peer in meeting.peers:
                if meeting.half(peer) and peer not in until:
                    until[peer] = min(end, max(begun + _LOST * self.deadline, now + _SURE * self.deadline))
            waits = [until.get(peer, end) for peer in meeting.peers if not self._settled(meeting, peer, step)]
            if max(waits, default=now) <= now:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout_at(max(waits)):
                    await self._changed.wait()

    def _settled(self, meeting: PendingExchange, peer: PeerId, step: ExchangeStep) -> bool:
        return (
            peer in self.absent or peer in self.disagreeing or meeting.settled(peer, self._passed(meeting, peer, step))
        )

    def _passed(self, meeting: PendingExchange, peer: PeerId, step: ExchangeStep) -> bool:
        """Whether a peer that sends one way is known to have closed this exchange."""
        return meeting.one_way and self._seen.get(peer, step) > step

    async def _send(self, meeting: PendingExchange, peer: PeerId, seal: Header, letter: OutgoingMessage) -> None:
        body, facts = letter.body, {**seal.facts, **self.last(peer)}
        header = encode_header(msgspec.structs.replace(seal, facts=facts))
        down, pause = 0, _AGAIN
        while True:  # until the deadline, which ends this call
            try:
                await self.transport.send(peer, header, body, deadline=self.deadline)
                meeting.acknowledged.add(peer)
            except Refused as refusal:
                if refusal.reason == "from-the-future":
                    meeting.behind.add(peer)
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _SLOWEST)
                    continue
                if refusal.reason == "no-replica" and letter.whole and peer not in meeting.whole:
                    seal, body = await asyncio.to_thread(_whole, seal, letter.whole)
                    header = encode_header(msgspec.structs.replace(seal, facts=self.last(peer)))
                    meeting.whole[peer] = len(body)
                    continue
                if refusal.reason == "replay":  # an earlier attempt got through
                    meeting.acknowledged.add(peer)
                else:
                    meeting.failed[peer] = refusal.reason
            except DeadlineMissed:
                meeting.failed[peer] = "no acknowledgement"
            except PeerDown:
                down += 1
                if down == 1:
                    await asyncio.sleep(_AGAIN)
                    continue
                meeting.failed[peer] = "down"
            break
        self._tell()

    def _close(self, step: ExchangeStep, meeting: PendingExchange) -> ExchangeResult:
        """Decide which edges count, and remember it."""
        missing = {}
        for peer in meeting.peers:
            counts = meeting.counts(peer)
            if not counts:
                missing[peer] = meeting.reason(peer, peer in self.absent, self._passed(meeting, peer, step))
                if meeting.quiet(peer) and missing[peer] in ("no acknowledgement", "no message", "down"):
                    self.absent.add(peer)
            self._edges.close(peer, step, counts, self.at)
        got, taken = meeting.used()
        if meeting.peers:
            self.together = bool(got or taken)
            self.apart = not self.together
        return ExchangeResult(got, taken, missing, meeting.whole)

    # --- both

    def header(self, kind: Any, **facts: int | str) -> Header:
        """The header of a message of this moment."""
        (round, step), me = self.at, self.transport.me
        return Header(kind=kind, round=round, step=step, sender=me, facts=facts, **vars(self.expected))

    def last(self, peer: PeerId) -> dict[str, int | str]:
        """What became of the last exchanges with a neighbour, for a header."""
        told = self._edges.told(peer)
        return {"last": told} if told else {}

    def leave(self, peer: PeerId) -> None:
        """Don't wait for a neighbour until it is heard of again."""
        self.absent.add(peer)
        if self.together and self.neighbours <= self.absent:  # as after a time in which this process stood still
            self.apart = True
        self._tell()

    def back(self, peer: PeerId) -> None:
        """A neighbour was heard of."""
        if peer in self.absent:
            self.absent.discard(peer)
            self._tell()

    def notice(self, kind: str, peer: PeerId, detail: str = "") -> None:
        """Note something for the user; see Notices for what is only counted."""
        self._notices.add(kind, peer, detail)

    def _told_otherwise(self, peer: PeerId, step: ExchangeStep, used: bool) -> None:
        self.notice("half-used", peer, f"round {step.round}: used {'there' if used else 'here'} only")

    @property
    def half_used(self) -> int:
        """Edges so far that one end used and the other did not."""
        return self._edges.half_used

    @property
    def notices(self) -> deque[NeighbourEvent]:
        """What waits to be told; whoever tells it takes it out."""
        return self._notices.waiting

    def _tell(self) -> None:
        """Wake everybody who waits for something to change."""
        self._changed.set()
        self._changed = asyncio.Event()


def _last_told(header: Header) -> str:
    return str(header.facts.get("last", ""))


def _whole(seal: Header, make: Callable[[], bytes]) -> tuple[Header, bytes]:
    """The header and body that take the place of a difference."""
    body = make()
    return with_checksum(msgspec.structs.replace(seal, codec="identity", facts={}), body), body


class Service:
    """What a rendezvous does with messages that are not part of an exchange: by default, nothing."""

    def largest(self, peer: PeerId, header: Header) -> int:
        """The bytes of body that a message may have."""
        raise Refused("unexpected", header.kind)

    def disagrees(self, peer: PeerId, refusal: Refused) -> None:
        """A peer belongs to another run, or has another model."""

    async def take(self, peer: PeerId, header: Header, body: bytearray) -> None:
        """Take a message."""
        raise Refused("unexpected", header.kind)
