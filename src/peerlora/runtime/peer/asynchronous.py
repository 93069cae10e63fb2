"""A peer of a method without common rounds: it works, sends and listens when it is its turn, and waits for nobody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from peerlora.algorithms.base import AsynchronousAlgorithm
from peerlora.exchange.mailbox import Mailboxes
from peerlora.lora.diagnostics import neighbourhood
from peerlora.network.base import PeerId, Transport
from peerlora.network.protocol.event_loop import EventLoopThread
from peerlora.network.protocol.push_messages import PushFormat, PushMessage
from peerlora.network.protocol.push_service import MOST, PeerMailbox, PushOnlyProtocol, PushService
from peerlora.network.protocol.send_queue import SendQueue, SendStats
from peerlora.runs.events import Event
from peerlora.runs.store import RunStore
from peerlora.runtime.compose import Federation
from peerlora.runtime.peer.async_rounds import PeerAsyncRounds
from peerlora.runtime.peer.config_digest import section_hashes
from peerlora.runtime.peer.site import PeerParticipation, Site, expected_of
from peerlora.runtime.rounds import RoundResult, Rounds
from peerlora.runtime.trainer import Result

_BACK = 5.0  # seconds that a peer which comes back gives its neighbours to answer its greeting


class AsynchronousPeer(PeerParticipation):
    """One client at its own pace; one round is one job of its own, so every client does ``train.rounds`` jobs.

    Whoever cannot be reached gets no letters and sends none; that is told, and nothing else comes of it.  A letter
    may be on its way for ``peer.deadline`` seconds.  A restarted client goes on from its checkpoint, whatever the
    others have done meanwhile.
    """

    control: PushService

    def __init__(
        self,
        federation: Federation,
        site: Site,
        transport: Transport,
        thread: EventLoopThread,
        store: RunStore,
        listener: Callable[[Event], None] = lambda event: None,
        stop: Callable[[], bool] = lambda: False,
    ):
        config, topology, algorithm = federation.config, federation.topology, federation.algorithm
        assert isinstance(algorithm, AsynchronousAlgorithm)
        expected, x, seconds = expected_of(federation, site), federation.start, config.peer.deadline
        incoming, flaw = partial(algorithm.incoming, x), partial(algorithm.flaw, x)
        form = PushFormat(transport.me, expected, config.train.rounds, incoming, flaw)
        post = Mailboxes(topology.at(0), topology.seed, algorithm.newest_only)
        self.outbox = SendQueue(transport, seconds, 1 if algorithm.newest_only else MOST)
        self.mail = PeerMailbox(post, site.client, site.neighbours(topology), form, self._send, config.device)
        self.method = algorithm
        self.failed: dict[PeerId, str] = {}
        """Neighbours that a letter did not reach in the latest round, and why."""
        protocol = PushOnlyProtocol(transport, expected, seconds, 0, config.train.rounds)
        super().__init__(replace(federation, clock=None), site, protocol, thread, store, listener, stop)
        self.control = PushService(protocol, list(self.numbers), section_hashes(config), self.mail, self.outbox)

    def _rounds(self) -> Rounds:
        return PeerAsyncRounds(self.method, self.learner, self.mail, self.config.train.rounds, self._sent)

    def _send(self, letters: Sequence[PushMessage]) -> None:
        self.thread.loop.call_soon_threadsafe(self.outbox.put, letters)

    def _sent(self, last: bool) -> SendStats:
        if last:
            self.thread.call(self.outbox.flush(self.config.peer.deadline))
        sent = self.thread.ask(self.outbox.sent)
        self.failed = sent.failed
        return sent

    def _open(self, done: int, state: Any) -> None:
        self.thread.ask(self.control.open)
        super()._open(done, state)

    def _patience(self, done: int) -> float:
        """The others have long begun when a peer comes back, and those that are not there may never be."""
        join = self.config.peer.join
        return min(join, _BACK) if done else join

    def _ready(self, t: int, state: Any) -> tuple[int, Any]:
        self._done = t
        self.thread.ask(self.protocol.enter, t)
        self._tell()
        return t, state

    def _observed(self, t: int, state: Any, passed: RoundResult) -> dict[str, Any]:
        """How far apart clients are is not known: nobody has what others have at the same time."""
        unknown = neighbourhood(self.algorithm.model(state), None, None, np.ones((1, 1)))
        linked = self.federation.topology.at(0).neighbours(self.site.client)
        missed = {str(j): "not on the member list" for j in linked if j not in self.neighbours}
        missed |= {str(self.numbers[peer]): reason for peer, reason in sorted(self.failed.items())}
        return {**vars(unknown), "rho": float("nan"), "missed": missed}

    def _finish(self, state: Any) -> Result:
        self._done = self.config.train.rounds
        with self.mail.lock:
            self.mail.over = True
        self.thread.ask(self.protocol.enter, self._done)
        self._tell()
        return super()._finish(state)
