"""Messages of methods without common rounds, as they cross between real peers.

A letter's header has the kind ``push``.  Its round is the sender's version, the number of jobs it has done.  Its step
is the letter's number, which grows within one process of the sender; ``born``, the moment (microseconds) in which that
process began, grows from process to process.  So nothing that was taken once is taken again, and a sender that went
back to a checkpoint is told from an old letter.  ``seen`` is the newest version of the receiver that the sender knew
when its latest job began.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from peerlora.exchange.base import Message, Vectors
from peerlora.exchange.payload import Shapes
from peerlora.exchange.schema import Schema
from peerlora.network.base import PeerId, Refused
from peerlora.network.protocol.wire import (
    Expected,
    Header,
    encode_body,
    encode_header,
    largest_body,
    read_claimed,
    with_checksum,
)

_LARGEST = 2**53  # what a header's numbers may be


class PushMessage(NamedTuple):
    """One message to one neighbour, ready to be sent."""

    to: PeerId
    header: bytes
    body: bytes


class PushStamp(NamedTuple):
    """What a letter's header says beside what all headers say."""

    born: int
    number: int
    version: int
    seen: int


class PushFormat:
    """What letters look like, going out and coming in.

    ``versions``: the most jobs that a client does.  ``incoming``: from the shapes that a letter claims to what it must
    hold.  ``flaw``: what is wrong with one of that form.
    """

    def __init__(
        self,
        me: PeerId,
        expected: Expected,
        versions: int,
        incoming: Callable[[Shapes], Schema],
        flaw: Callable[[Vectors], str | None] = lambda payload: None,
    ):
        self.me, self.expected, self.versions, self.incoming, self.flaw = me, expected, versions, incoming, flaw
        self.largest = largest_body(incoming({}))
        """Bytes of the largest body."""

    def written(self, payload: Vectors, to: Mapping[PeerId, PushStamp]) -> list[PushMessage]:
        """The same vectors to some neighbours."""
        body = encode_body(payload)
        common = with_checksum(Header(kind="push", sender=self.me, **vars(self.expected)), body)
        letters = []
        for peer, stamp in to.items():
            facts: dict[str, int | str] = {"born": stamp.born, "seen": stamp.seen}
            own = msgspec.structs.replace(common, round=stamp.version, step=stamp.number, facts=facts)
            letters.append(PushMessage(peer, encode_header(own), body))
        return letters

    def stamp(self, header: Header) -> PushStamp:
        """What a header says; raises Refused for numbers that no honest peer gives."""
        facts = {name: header.facts.get(name) for name in ("born", "seen")}
        for name, value in facts.items():
            if type(value) is not int or not 0 <= value <= _LARGEST:
                raise Refused("bad-header", f"{name} is {value!r:.40}, expected a whole number of at least 0")
        stamp = PushStamp(number=header.step, version=header.round, **facts)  # pyright: ignore[reportArgumentType]
        for name, value in (("round", stamp.version), ("seen", stamp.seen)):
            if value > self.versions:
                raise Refused("bad-header", f"{name} is {value}, but clients of this run do {self.versions} jobs")
        return stamp

    def read(self, client: int, header: Header, body: bytearray) -> Message:
        """The message of the client that sent this; raises Refused."""
        payload = read_claimed(header, body, self.incoming({}), self.incoming)
        flaw = self.flaw(payload)
        if flaw:
            raise Refused("bad-body", flaw)
        stamp = self.stamp(header)
        return Message(client, payload, stamp.version, stamp.seen)


class SequenceNumbers:
    """The own letters' numbers, and the newest that came from each neighbour."""

    def __init__(self):
        self.born, self.count = time.time_ns() // 1000, 0
        self.newest: dict[int, tuple[int, int]] = {}
        """Client -> (born, number) of the newest letter that was taken."""

    def next(self) -> int:
        """The number of one more letter."""
        self.count += 1
        return self.count

    def check(self, client: int, stamp: PushStamp) -> None:
        """Raise Refused for a letter that is not newer than all that were taken from this client."""
        if (stamp.born, stamp.number) <= self.newest.get(client, (-1, -1)):
            raise Refused("replay", f"letter {stamp.number}")

    def note(self, client: int, stamp: PushStamp) -> bool:
        """A letter is taken; whether it is the first of a sender's later process."""
        before = self.newest.get(client)
        self.newest[client] = stamp.born, stamp.number
        return before is not None and before[0] < stamp.born

    def saved(self) -> dict[str, Any]:
        """Everything, as JSON knows it."""
        return {"born": self.born, "newest": sorted((client, *each) for client, each in self.newest.items())}

    def load_state_dict(self, facts: Mapping[str, Any]) -> None:
        """Go on in a later process, also where the clock was set back meanwhile."""
        self.born = max(self.born, facts["born"] + 1)
        self.newest = {client: (born, number) for client, born, number in facts["newest"]}
