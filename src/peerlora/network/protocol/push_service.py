"""Mailbox of a real peer without common rounds: the simulated one, plus sending and receiving."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from peerlora.exchange.mailbox import ClientMailbox, Mailboxes
from peerlora.network.base import PeerId, Refused
from peerlora.network.protocol.control import PeerControl
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.event_loop import run_off_loop
from peerlora.network.protocol.push_messages import PushFormat, PushMessage, PushStamp, SequenceNumbers
from peerlora.network.protocol.send_queue import SendQueue
from peerlora.network.protocol.wire import Header

MOST = 8
"""Messages of one neighbour that may wait to be polled, where not only the newest is used."""
_POLL = 0.05  # seconds between two looks whether there is room for one more message
_LINGER = 5.0  # seconds, at most, in which queued messages may still leave when a run ends early


class PeerMailbox:
    """One client's row of Mailboxes, whose other clients are real peers.

    Jobs run on one thread and messages arrive on another, so every access to the mailboxes, or to a state that belongs
    to them, holds ``lock``.  ``names``: client -> peer, of the neighbours.  ``send`` must not wait for anything.
    """

    def __init__(
        self,
        mailboxes: Mailboxes,
        client: int,
        names: Mapping[int, PeerId],
        format: PushFormat,
        send: Callable[[Sequence[PushMessage]], None],
        device: torch.device | str = "cpu",
    ):
        self.mailboxes, self.client, self.names, self.format, self.send = mailboxes, client, names, format, send
        self.device = device
        self.numbers = {peer: other for other, peer in names.items()}
        self.lock, self.sequence = threading.Lock(), SequenceNumbers()
        self.on_arrival: Callable[[], None] = lambda: None
        """Called, with the lock held, when a message has arrived."""
        self.closed = False
        """Whether this client does no more jobs, so that no message would be polled any more."""

    def mailbox(self) -> ClientMailbox:
        """The mailbox that the method sees."""
        return self.mailboxes.mailbox(self.client)

    @property
    def has_messages(self) -> bool:
        """Whether anything has arrived that was not polled."""
        return bool(self.mailboxes.inbox[self.client])

    def dispatch(self) -> None:
        """Send what the method has pushed; the lock is held."""
        for pushed in self.mailboxes.take_pushed():
            stamps, payload = {}, {}
            for number in pushed.numbers:
                receiver, message = self.mailboxes.in_flight.pop(number)
                if receiver in self.names:
                    payload = message.payload
                    stamps[self.names[receiver]] = self._stamp(message.version, message.seen)
            if stamps:
                self.send(self.format.encode(payload, stamps))

    def _stamp(self, version: int, seen: int) -> PushStamp:
        return PushStamp(self.sequence.started, self.sequence.next(), version, seen)

    def check(self, peer: PeerId, header: Header) -> None:
        """Raise Refused for a message that could not be taken, by its header alone."""
        if peer not in self.numbers:
            raise Refused("not-a-neighbour")
        if self.closed:
            raise Refused("late", "all jobs are done here")
        self.sequence.check(self.numbers[peer], self.format.stamp(header))

    def full(self, peer: PeerId) -> bool:
        """Whether as many messages of a neighbour wait as there may."""
        if self.mailboxes.newest_only:
            return False  # a newer one replaces the older one
        with self.lock:
            waiting = self.mailboxes.inbox[self.client]
            return sum(message.sender == self.numbers[peer] for message in waiting) >= MOST

    def take(self, peer: PeerId, header: Header, body: bytearray) -> None:
        """Put a message into the mailbox; raises Refused, and then nothing has changed."""
        client, stamp = self.numbers[peer], self.format.stamp(header)
        message = self.format.decode(client, header, body)
        for name, leaf in message.payload.items():
            message.payload[name] = leaf.to(self.device)
        with self.lock:
            self.check(peer, header)
            if self.sequence.note(client, stamp):
                self.mailboxes.began_again(self.client, client)
            self.mailboxes.arrive(self.client, message)
            self.on_arrival()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Checkpoint: counters, and messages that were not polled."""
        with self.lock:
            tensors, facts = self.mailboxes.state_dict()
            return tensors, {"post": facts, "numbering": self.sequence.state_dict()}

    def load_state_dict(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``."""
        with self.lock:
            self.mailboxes.load_state_dict(tensors, facts["post"])
            self.sequence.load_state_dict(facts["numbering"])


class PushService(PeerControl):
    """Control messages, and beside them messages that are sent and taken at any time."""

    def __init__(
        self,
        endpoint: Endpoint,
        settings: Mapping[str, str],
        deadline: float,
        mailbox: PeerMailbox,
        queue: SendQueue,
    ):
        super().__init__(endpoint, settings, deadline)
        self.mailbox, self.queue = mailbox, queue
        self._opened = asyncio.Event()

    def open(self) -> None:
        """Take messages from now on; those that came before wait with their sender's call open."""
        self._opened.set()

    async def close(self) -> None:
        """Let queued messages leave, but not for long, and end everything."""
        await self.queue.flush(min(_LINGER, self.deadline))
        await self.queue.close()
        await super().close()

    def admit(self, peer: PeerId, header: Header) -> int:
        """See Handler; a ``push`` may have what the method's messages have."""
        if header.kind != "push":
            return super().admit(peer, header)
        self.mailbox.check(peer, header)
        return self.mailbox.format.largest

    async def take(self, peer: PeerId, header: Header, body: bytearray) -> None:
        """See Handler; takes ``push`` and all control messages."""
        if header.kind != "push":
            await super().take(peer, header, body)
            return
        self.mailbox.check(peer, header)
        await self._wait_for_room(peer)
        await run_off_loop(len(body), self.mailbox.take, peer, header, body)

    async def _wait_for_room(self, peer: PeerId) -> None:
        """Wait, and with it the sender's call, until messages are taken and there is room for one more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.deadline):
                await self._opened.wait()
                while self.mailbox.full(peer):
                    await asyncio.sleep(_POLL)
                return
        raise Refused("late", f"there was no room for it within {self.deadline:g} s")
