"""Sender sets: whose messages a secure sum holds, asked for by its receiver before anything is masked.

A receiver names the senders that are there when a round begins, with the session keys that it knows of them; each masks
its message towards the others of that set, so that only the sum over the whole set can be read.  Where one of them goes
away before the sum begins, the receiver asks for a set without it.  A sender answers one set per sum, and none of fewer
than two senders.  So nothing that a receiver claims afterwards takes a mask off again: see docs/decisions/0024.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import msgspec

from peerlora.exchange.fixed_point import LEAST_SENDERS
from peerlora.network.base import DeadlineMissed, KeyAgreement, PeerDown, PeerId, Refused
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.link_history import ExchangeStep
from peerlora.network.protocol.wire import (
    KEY_BYTES,
    WORD_LENGTH,
    Fact,
    Header,
    encode_header,
    encode_table,
    read_table,
    with_checksum,
)

_DOMAIN = b"peerlora sender set 1\n"
_KEPT = 4  # sets of one receiver that are remembered: of this round's sums and the next round's
_AHEAD = 1  # rounds that a receiver may be ahead
_RETRY = 0.2  # seconds before a set is sent again to a neighbour that is behind or cannot be reached
_FACT = "session"  # in a hello: the session key of its sender, hexadecimal


@dataclass(frozen=True)
class SenderSet:
    """Those whose messages one sum holds."""

    receiver: PeerId
    step: ExchangeStep
    keys: Mapping[PeerId, bytes]
    """Session key of every sender."""

    def context(self, run: str) -> bytes:
        """Encode all that a mask belongs to: no other sum, of any receiver, set, round or run, has the same masks."""
        table = sorted(self.keys.items())
        return _DOMAIN + hashlib.sha256(msgspec.msgpack.encode([run, self.receiver, *self.step, table])).digest()

    def digest(self, run: str) -> str:
        """Name of the set in the header of a message that is masked for it."""
        return hashlib.sha256(self.context(run)).hexdigest()


class SenderSets:
    """One peer's sender sets: that of its own next sum, and those of the receivers that it sends to.

    ``planned``: from a round and a receiver to the senders that the graph of the round gives it.  Lives on the event
    loop of ``endpoint``.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        agreement: KeyAgreement,
        planned: Callable[[int, PeerId], Collection[PeerId]],
        deadline: float,
    ):
        self.endpoint, self.agreement, self.planned, self.deadline = endpoint, agreement, planned, deadline
        self.me = endpoint.transport.me
        self.session_keys: dict[PeerId, bytes] = {}
        """Of the neighbours, from their latest handshakes."""
        self.own: SenderSet | None = None
        """Of the sum to come or in progress; None after it."""
        self._summing = False
        self._asked: dict[PeerId, dict[ExchangeStep, SenderSet]] = {}
        self._answered: dict[PeerId, SenderSet] = {}
        self._sent_to: set[PeerId] = set()
        self._tasks: dict[PeerId, asyncio.Task[None]] = {}

    # --- as a receiver

    def ask(self, step: ExchangeStep) -> None:
        """Ask those who are there for the sum of an exchange to come."""
        self._summing = False
        self._set_own(self._present(step))

    def begin_sum(self) -> SenderSet:
        """Return the set of the sum that begins now; it stays as it is until ``end_sum``."""
        if self.own is None or self.own.step != self.endpoint.at:
            self._set_own(self._present(self.endpoint.at))
        self._summing = True
        assert self.own is not None
        return self.own

    def end_sum(self) -> None:
        """Forget the own set."""
        self._summing, self.own = False, None

    async def keep_sending(self) -> None:
        """Send the own set to the neighbours of its round for ever, anew where it has changed."""
        try:
            while True:
                self._renew()
                for peer in self._not_sent_to():
                    if peer not in self._tasks:
                        self._tasks[peer] = asyncio.create_task(self._send(peer))
                await self.endpoint.changed.wait()
        finally:
            for task in self._tasks.values():
                task.cancel()

    def _present(self, step: ExchangeStep) -> SenderSet:
        """The senders of an exchange that are there; none where they are too few for a sum."""
        there = {
            peer: self.session_keys[peer]
            for peer in self.planned(step.round, self.me)
            if peer in self.session_keys and not self.endpoint.peers.excluded(peer)
        }
        return SenderSet(self.me, step, there if len(there) >= LEAST_SENDERS else {})

    def _renew(self) -> None:
        """Replace a set that cannot come together any more; who comes back takes part in a later sum."""
        if self.own is None or self._summing:
            return
        present = self._present(self.own.step)
        if any(present.keys.get(peer) != key for peer, key in self.own.keys.items()):
            self._set_own(present)

    def _set_own(self, own: SenderSet) -> None:
        self.own = own
        self._sent_to.clear()
        self.endpoint.changed.notify()

    def _not_sent_to(self) -> list[PeerId]:
        if self.own is None:
            return []
        planned = self.planned(self.own.step.round, self.me)
        known = [peer for peer in planned if peer in self.endpoint.peers.neighbours]
        return [peer for peer in known if peer not in self._sent_to and not self.endpoint.peers.excluded(peer)]

    async def _send(self, peer: PeerId) -> None:
        """Send the own set until the neighbour has taken or refused it; also one that it is not in, so it can go on."""
        try:
            while (own := self.own) is not None and peer in self._not_sent_to():
                body = encode_table(own.keys)
                facts: dict[str, Fact] = self.endpoint.last_outcomes(peer)
                header = msgspec.structs.replace(
                    self.endpoint.header("senders", **facts), round=own.step.round, step=own.step.number
                )
                header = encode_header(with_checksum(header, body))
                try:
                    await self.endpoint.transport.send(peer, header, body, deadline=self.deadline)
                except (PeerDown, DeadlineMissed):
                    await asyncio.sleep(_RETRY)
                    continue
                except Refused as refusal:
                    if refusal.reason == "from-the-future":
                        await asyncio.sleep(_RETRY)
                        continue
                if own is self.own:
                    self._sent_to.add(peer)
        finally:
            del self._tasks[peer]
            self.endpoint.changed.notify()

    # --- as a sender

    @property
    def hello_facts(self) -> dict[str, Fact]:
        """The session key, for a handshake."""
        return {_FACT: self.agreement.session_key.hex()}

    def take_hello(self, peer: PeerId, header: Header) -> None:
        """Note the session key of a neighbour, if it gives one: a check before a run has none.

        Raises Refused for what is no key.
        """
        if _FACT not in header.facts:
            return
        try:
            key = bytes.fromhex(str(header.facts[_FACT]))
        except ValueError:
            key = b""
        if len(key) != KEY_BYTES:
            raise Refused("bad-header", "a session key has 32 bytes, in hexadecimal")
        if self.session_keys.get(peer) != key:
            self.session_keys[peer] = key
            self.endpoint.changed.notify()

    def admit(self, peer: PeerId, header: Header) -> int:
        """The bytes that a neighbour's sender set may have; raises Refused for one that nobody could answer."""
        step, at = ExchangeStep(header.round, header.step), self.endpoint.at
        if step < at:
            raise Refused("late", f"round {step.round} given, now in round {at.round}")
        if step.round > at.round + _AHEAD:
            raise Refused("from-the-future", f"round {step.round} given, now in round {at.round}")
        senders = self.planned(step.round, peer)
        if self.me not in senders:
            raise Refused("not-a-neighbour", f"in round {step.round}")
        return len(senders) * (KEY_BYTES + WORD_LENGTH + 8) + 8

    def take(self, peer: PeerId, header: Header, body: bytearray) -> None:
        """Note whose sum a receiver asks for; raises Refused for a set that must not be answered."""
        self.admit(peer, header)
        step, senders = ExchangeStep(header.round, header.step), self.planned(header.round, peer)
        asked = SenderSet(peer, step, read_table(header, body, len(senders)))
        if not asked.keys.keys() <= set(senders):
            raise Refused("not-a-neighbour", f"a sender set with others than those of {peer}")
        if 0 < len(asked.keys) < LEAST_SENDERS:
            raise Refused("few-senders", f"{len(asked.keys)}")
        answered = self._answered.get(peer)
        if answered is not None and answered.step == step and answered != asked:
            raise Refused("second-set", f"round {step.round}, exchange {step.number}")
        known = self._asked.setdefault(peer, {})
        known[step] = asked
        for old in sorted(known)[:-_KEPT]:
            del known[old]
        self.endpoint.changed.notify()

    async def answer(self, receiver: PeerId, step: ExchangeStep) -> SenderSet | None:
        """Wait for the set that a receiver asks for, and settle on it: no other one of this sum is answered any more.

        None where the receiver does not ask this peer, or has gone on.
        """
        while True:
            known = self._asked.get(receiver, {})
            if step in known:
                break
            if any(later > step for later in known):
                return None
            await self.endpoint.changed.wait()
        chosen = known[step]
        if self.me not in chosen.keys:
            return None
        if chosen.keys[self.me] != self.agreement.session_key:
            raise Refused("other-set", f"{receiver} knows another session key of this site")
        self._answered[receiver] = chosen
        return chosen

    def pair_keys(self, chosen: SenderSet) -> dict[PeerId, bytes]:
        """Keys of the masks towards the other senders of a set; raises Refused where one has no usable key."""
        context = chosen.context(self.endpoint.expected.run)
        others = [peer for peer in chosen.keys if peer != self.me]
        return {peer: self.agreement.pair_key(peer, chosen.keys[peer], context) for peer in others}
