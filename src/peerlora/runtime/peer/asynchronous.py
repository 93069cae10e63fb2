"""A peer of a method without common rounds: it trains, sends and receives on its own schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from peerlora.algorithms.base import AsynchronousAlgorithm
from peerlora.exchange.mailbox import Mailboxes
from peerlora.lora.diagnostics import neighbourhood
from peerlora.network.base import PeerId, Transport
from peerlora.network.protocol.admission import PushOnlyAdmission
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.event_loop import EventLoopThread
from peerlora.network.protocol.push_messages import PushFormat, PushMessage
from peerlora.network.protocol.push_service import MOST, PeerMailbox, PushService
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.network.protocol.send_queue import SendQueue, SendStats
from peerlora.runs.events import Event
from peerlora.runs.store import RunStore
from peerlora.runtime.compose import Federation, opening_state
from peerlora.runtime.participation import Opening
from peerlora.runtime.peer.async_rounds import PeerAsyncRounds
from peerlora.runtime.peer.participation import PeerParticipation
from peerlora.runtime.peer.site import Site, expected_of, settings_of
from peerlora.runtime.rounds import RoundResult

_RETURN = 5.0  # seconds that a peer which comes back gives its neighbours to answer its handshake

State = Any


class AsynchronousPeer(PeerParticipation):
    """One client on its own schedule; one round is one job of its own, so every client does ``train.rounds`` jobs.

    An unreachable neighbour is reported and otherwise ignored.  A message may be in flight for ``peer.deadline``
    seconds.  A restarted client goes on from its checkpoint, whatever the others have done meanwhile.
    """

    control: PushService

    def __init__(
        self, federation: Federation, site: Site, transport: Transport, thread: EventLoopThread, store: RunStore
    ):
        config, topology, algorithm = federation.config, federation.topology, federation.algorithm
        assert isinstance(algorithm, AsynchronousAlgorithm)
        expected, x, seconds = expected_of(federation, site), federation.start, config.peer.deadline
        neighbours = site.neighbours(topology)
        incoming, flaw = partial(algorithm.incoming, x), partial(algorithm.flaw, x)
        form = PushFormat(transport.me, expected, config.train.rounds, incoming, flaw)
        mailboxes = Mailboxes(topology.at(0), topology.seed, algorithm.traits.newest_only)
        self.send_queue = SendQueue(transport, seconds, 1 if algorithm.traits.newest_only else MOST)
        self.mailbox = PeerMailbox(mailboxes, site.client, neighbours, form, self._send, config.device)
        self.failed: dict[PeerId, str] = {}
        """Neighbours that no message reached in the latest round, and why."""
        endpoint = Endpoint(transport, expected, list(neighbours.values()), config.train.rounds)
        hashes = settings_of(federation)
        control = PushService(endpoint, hashes, seconds, self.mailbox, self.send_queue)
        protocol = RoundProtocol(endpoint, seconds, lambda kind: 0, control, PushOnlyAdmission(endpoint))
        super().__init__(replace(federation, clock=None), site, thread, protocol, control, store)
        jobs = config.train.rounds
        self.rounds = PeerAsyncRounds(algorithm, federation.learner, self.mailbox, jobs, self._sent)

    def start(self) -> Opening:
        """Make the state before the first job."""
        return Opening(opening_state(self.federation))

    def join(self, done: int, state: State) -> Sequence[Event]:
        """Accept messages and greet the neighbours; when a peer comes back, those that are not there may never be."""
        self.thread.ask(self.control.open)
        join = self.config.peer.join
        return self.handshake(done, min(join, _RETURN) if done else join)

    def next_round(self, t: int, state: State) -> tuple[int, State, Sequence[Event]]:
        """Return job ``t``: no client waits for another."""
        self.enter_round(t)
        return t, state, self.neighbour_events()

    def observe(self, t: int, state: State, result: RoundResult) -> dict[str, Any]:
        """Report links without contact; how far apart clients are is not known, since none has all states at once."""
        unknown = neighbourhood(self.algorithm.model(state), None, None, np.ones((1, 1)))
        linked = self.federation.topology.at(0).neighbours(self.site.client)
        missed = {str(j): "not on the member list" for j in linked if j not in self.neighbours}
        missed |= {str(self.numbers[peer]): reason for peer, reason in sorted(self.failed.items())}
        return {**vars(unknown), "rho": float("nan"), "missed": missed}

    def leave(self, done: int, state: State) -> Sequence[Event]:
        """Refuse further messages, and let those in flight arrive: no job is left."""
        with self.mailbox.lock:
            self.mailbox.closed = True
        if done < self.config.train.rounds:  # of train.max_seconds; the last of all jobs has waited for its messages
            self.thread.call(self.send_queue.flush(self.config.peer.deadline))
        self.enter_round(done)
        return self.closing_events()

    def _send(self, messages: Sequence[PushMessage]) -> None:
        self.thread.loop.call_soon_threadsafe(self.send_queue.put, messages)

    def _sent(self, last: bool) -> SendStats:
        if last:
            self.thread.call(self.send_queue.flush(self.config.peer.deadline))
        sent = self.thread.ask(self.send_queue.sent)
        self.failed = sent.failed
        return sent
