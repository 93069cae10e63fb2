"""Messages of methods without common rounds, as real peers send them.

The header of such a message has the kind ``push``.  Its round is the sender's version, the number of jobs it has done.
Its step is a sequence number, which grows within one process of the sender; the fact ``born``, the moment
(microseconds) in which that process started, is another one for each.  So no message is taken twice, and a sender that
went back to a checkpoint is told apart from an old message, whatever its clock says.  The fact ``seen`` is the newest
version of the receiver that the sender knew when its latest job began.
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
from peerlora.network.protocol.value_bounds import allowed, check_largest, largest
from peerlora.network.protocol.wire import (
    Expected,
    Header,
    encode_body,
    encode_header,
    largest_body,
    read_claimed,
    with_checksum,
)

_LARGEST = 2**53  # the largest number that a header can hold
_PROCESSES = 16  # processes of one neighbour whose newest message is remembered


class PushMessage(NamedTuple):
    """One message to one neighbour, ready to be sent."""

    to: PeerId
    header: bytes
    body: bytes


class PushStamp(NamedTuple):
    """The fields of a header that only a ``push`` has."""

    started: int
    """Microseconds since 1970 in which the sender's process started; the fact ``born``."""
    number: int
    version: int
    seen: int


class PushFormat:
    """Encoder and decoder of messages.

    ``versions``: the most jobs that a client does.  ``incoming``: from the shapes that a message claims to its schema.
    ``flaw``: why a message of that schema is invalid; None for a valid one.
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
        self._own = 0.0
        """The largest size of a value that this site has sent."""

    def encode(self, payload: Vectors, to: Mapping[PeerId, PushStamp]) -> list[PushMessage]:
        """Encode the same vectors for some neighbours."""
        body, self._own = encode_body(payload), max(self._own, largest(payload.values()))
        common = with_checksum(Header(kind="push", sender=self.me, **vars(self.expected)), body)
        messages = []
        for peer, stamp in to.items():
            facts: dict[str, int | str] = {"born": stamp.started, "seen": stamp.seen}
            header = msgspec.structs.replace(common, round=stamp.version, step=stamp.number, facts=facts)
            messages.append(PushMessage(peer, encode_header(header), body))
        return messages

    def stamp(self, header: Header) -> PushStamp:
        """Decode the stamp of a header; raises Refused for numbers that no honest peer gives."""
        facts = {name: header.facts.get(name) for name in ("born", "seen")}
        for name, value in facts.items():
            if type(value) is not int or not 0 <= value <= _LARGEST:
                raise Refused("bad-header", f"{name} is {value!r:.40}, expected a whole number of at least 0")
        stamp = PushStamp(facts["born"], header.step, header.round, facts["seen"])  # pyright: ignore[reportArgumentType]
        for name, value in (("round", stamp.version), ("seen", stamp.seen)):
            if value > self.versions:
                raise Refused("bad-header", f"{name} is {value}, but clients of this run do {self.versions} jobs")
        return stamp

    def decode(self, client: int, header: Header, body: bytearray) -> Message:
        """Decode a message of ``client``; raises Refused."""
        payload = read_claimed(header, body, self.incoming({}), self.incoming)
        flaw = self.flaw(payload)
        if flaw:
            raise Refused("bad-body", flaw)
        check_largest(payload, allowed(self._own))
        stamp = self.stamp(header)
        return Message(client, payload, stamp.version, stamp.seen)


class SequenceNumbers:
    """Sequence numbers of the own messages, and the newest received from each neighbour's processes."""

    def __init__(self):
        self.started, self.count = time.time_ns() // 1000, 0
        self.newest: dict[int, dict[int, int]] = {}
        """Client -> start of its process -> number of the newest message taken, the latest process last."""

    def next(self) -> int:
        """The number of one more message."""
        self.count += 1
        return self.count

    def check(self, client: int, stamp: PushStamp) -> None:
        """Raise Refused for a message that is not newer than all that were taken from this process of the client.

        A process that begins later may say an earlier moment: a clock that was ahead has been set right meanwhile.
        """
        if stamp.number <= self.newest.get(client, {}).get(stamp.started, -1):
            raise Refused("replay", f"message {stamp.number}")

    def note(self, client: int, stamp: PushStamp) -> bool:
        """Record a message that is taken; whether it is the first of another process of its sender."""
        processes = self.newest.setdefault(client, {})
        again = bool(processes) and stamp.started != next(reversed(processes))
        processes.pop(stamp.started, None)
        processes[stamp.started] = stamp.number
        while len(processes) > _PROCESSES:
            del processes[next(iter(processes))]
        return again

    def state_dict(self) -> dict[str, Any]:
        """All numbers, as JSON holds them."""
        newest = [(client, *each) for client in sorted(self.newest) for each in self.newest[client].items()]
        return {"born": self.started, "newest": newest}

    def load_state_dict(self, facts: Mapping[str, Any]) -> None:
        """Continue in a later process, also where the clock was set back meanwhile."""
        self.started, self.newest = max(self.started, facts["born"] + 1), {}
        for client, started, number in facts["newest"]:
            self.newest.setdefault(client, {})[started] = number
