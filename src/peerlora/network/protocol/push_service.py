"""The mailbox of a client whose neighbours are elsewhere: a simulation's post, and the way to and from the wire."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from peerlora.exchange.mailbox import ClientMailbox, Mailboxes
from peerlora.network.base import PeerId, Refused
from peerlora.network.protocol.control import PeerControl
from peerlora.network.protocol.event_loop import run_off_loop
from peerlora.network.protocol.push_messages import PushFormat, PushMessage, PushStamp, SequenceNumbers
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.network.protocol.send_queue import SendQueue
from peerlora.network.protocol.wire import Header

MOST = 8
"""Letters of one neighbour that may wait, where not only the newest counts."""
_LOOK = 0.05  # seconds between two looks whether there is room for one more
_LINGER = 5.0  # seconds that letters get when a run ends early


class PeerMailbox:
    """One client's part of a Post, whose other clients are reached by letters.

    Jobs are done on one thread and letters come on another, so whoever touches the post, or a state that belongs to
    it, holds ``lock``.  ``names``: client -> peer, of the neighbours.  ``send`` must not wait for anything.
    """

    def __init__(
        self,
        post: Mailboxes,
        client: int,
        names: Mapping[int, PeerId],
        form: PushFormat,
        send: Callable[[Sequence[PushMessage]], None],
        device: torch.device | str = "cpu",
    ):
        self.post, self.client, self.names, self.form, self.send = post, client, names, form, send
        self.device = device
        self.numbers = {peer: other for other, peer in names.items()}
        self.lock, self.numbering = threading.Lock(), SequenceNumbers()
        self.arrived: Callable[[], None] = lambda: None
        """Called, with the lock held, when a letter has come in."""
        self.over = False
        """Whether this client does no more jobs; nobody would open a letter any more."""

    def box(self) -> ClientMailbox:
        """The mailbox that the method sees."""
        return self.post.box(self.client)

    @property
    def waiting(self) -> bool:
        """Whether anything has arrived that was not polled."""
        return bool(self.post.waiting[self.client])

    def dispatch(self) -> None:
        """Send what the method has pushed; the lock is held."""
        for pushed in self.post.taken():
            stamps, payload = {}, {}
            for number in pushed.numbers:
                receiver, message = self.post.in_flight.pop(number)
                if receiver in self.names:
                    payload = message.payload
                    stamps[self.names[receiver]] = self._stamp(message.version, message.seen)
            if stamps:
                self.send(self.form.written(payload, stamps))

    def _stamp(self, version: int, seen: int) -> PushStamp:
        return PushStamp(self.numbering.born, self.numbering.next(), version, seen)

    def check(self, peer: PeerId, header: Header) -> None:
        """Raise Refused for a letter that could not be taken, by its header alone."""
        if peer not in self.numbers:
            raise Refused("not-a-neighbour")
        if self.over:
            raise Refused("late", "all jobs are done here")
        self.numbering.check(self.numbers[peer], self.form.stamp(header))

    def full(self, peer: PeerId) -> bool:
        """Whether as many letters of a neighbour wait as there may."""
        if self.post.newest_only:
            return False  # a newer one takes the older one's place
        with self.lock:
            return sum(each.sender == self.numbers[peer] for each in self.post.waiting[self.client]) >= MOST

    def take(self, peer: PeerId, header: Header, body: bytearray) -> None:
        """Take a letter in; raises Refused, and then nothing has changed."""
        client, stamp = self.numbers[peer], self.form.stamp(header)
        message = self.form.read(client, header, body)
        for name, leaf in message.payload.items():
            message.payload[name] = leaf.to(self.device)
        with self.lock:
            self.check(peer, header)
            if self.numbering.note(client, stamp):
                self.post.began_again(self.client, client)
            self.post.arrive(self.client, message)
            self.arrived()

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What must be saved to go on: counters, and letters that nobody has opened."""
        with self.lock:
            tensors, facts = self.post.saved()
            return tensors, {"post": facts, "numbering": self.numbering.saved()}

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from what ``saved`` gave."""
        with self.lock:
            self.post.load_state_dict(tensors, facts["post"])
            self.numbering.load_state_dict(facts["numbering"])


class PushOnlyProtocol(RoundProtocol):
    """The receiver of a peer that never meets anybody in a round: it takes greetings and letters."""

    def _read(self, peer: PeerId, header: bytes) -> Header:
        found = super()._read(peer, header)
        if found.kind == "mix":
            raise Refused("unexpected", "the method of this run has no common rounds")
        return found


class PushService(PeerControl):
    """A neighbourhood in which letters come and go at any time."""

    def __init__(
        self,
        protocol: RoundProtocol,
        peers: Collection[PeerId],
        settings: Mapping[str, str],
        mail: PeerMailbox,
        outbox: SendQueue,
    ):
        super().__init__(protocol, peers, settings)
        self.mail, self.outbox = mail, outbox
        self._opened = asyncio.Event()

    def open(self) -> None:
        """Take letters from now on; those that came before wait with their sender's call open."""
        self._opened.set()

    async def close(self) -> None:
        """Let what is on its way arrive, but not for long, and end everything."""
        await self.outbox.flush(min(_LINGER, self.protocol.deadline))
        await self.outbox.close()
        await super().close()

    def largest(self, peer: PeerId, header: Header) -> int:
        """A letter may have what the method's messages have."""
        if header.kind != "push":
            return super().largest(peer, header)
        self.mail.check(peer, header)
        return self.mail.form.largest

    async def take(self, peer: PeerId, header: Header, body: bytearray) -> None:
        """A letter, or what every neighbourhood takes."""
        if header.kind != "push":
            await super().take(peer, header, body)
            return
        self.mail.check(peer, header)
        await self._room(peer)
        await run_off_loop(len(body), self.mail.take, peer, header, body)

    async def _room(self, peer: PeerId) -> None:
        """Wait, and with it the sender's call, until letters are taken and there is room for one more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.protocol.deadline):
                await self._opened.wait()
                while self.mail.full(peer):
                    await asyncio.sleep(_LOOK)
                return
        raise Refused("late", f"there was no room for it within {self.protocol.deadline:g} s")
