"""A peer of a method with common rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from peerlora.algorithms.compatibility import cache_settings
from peerlora.display import format_now
from peerlora.exchange.fixed_point import LEAST_SENDERS
from peerlora.exchange.gossip_sum import gossip_rounds
from peerlora.exchange.payload import Shapes
from peerlora.exchange.schema import Schema
from peerlora.lora.diagnostics import neighbourhood
from peerlora.network.base import PeerId, Refused, Transport
from peerlora.network.protocol.control import PeerControl
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.event_loop import EventLoopThread
from peerlora.network.protocol.neighbour_exchange import NeighbourExchange
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.network.protocol.secure_exchange import SecureExchange
from peerlora.network.protocol.state_transfer import adopt, exportable, largest_state, state_schema
from peerlora.network.protocol.value_bounds import check_state
from peerlora.network.protocol.wire import Kind, read_claimed
from peerlora.runs.events import CaughtUp, Event, Warned
from peerlora.runs.store import RunStore
from peerlora.runtime.compose import Federation, opening_state
from peerlora.runtime.exchange_stack import build_exchange
from peerlora.runtime.participation import WITHOUT_W, Opening
from peerlora.runtime.peer.label_counts import StartupSum
from peerlora.runtime.peer.message_bounds import exchanged_blocks, largest_message
from peerlora.runtime.peer.participation import PeerParticipation
from peerlora.runtime.peer.secure import sender_sets
from peerlora.runtime.peer.site import Site, expected_of, settings_of
from peerlora.runtime.rounds import RoundResult
from peerlora.runtime.synchronous import SynchronousRounds
from peerlora.tree import leaves

_BLOCK_ROUNDS = 64  # rounds within which a method exchanges each of its blocks at least once

State = Any


class SynchronousPeer(PeerParticipation):
    """One client that trains and exchanges in the rounds that all have in common.

    A client that falls behind leaves rounds out; one that was away for ``peer.pull`` rounds adopts the state of a
    neighbour.
    """

    def __init__(
        self, federation: Federation, site: Site, transport: Transport, thread: EventLoopThread, store: RunStore
    ):
        config = federation.config
        self.sends = _everything_sent(federation)
        self.blocks = exchanged_blocks(self.sends, federation.start.spec)
        self.local_only = federation.algorithm.traits.local_only
        self.largest = largest_message(federation, self.sends)
        self._bounds: dict[Kind, int] = {"mix": self.largest, "relay": 0, "state": 0}
        self._shared: dict[str, Tensor] | None = None
        neighbours, deadline = site.neighbours(federation.topology), config.peer.deadline
        endpoint = Endpoint(transport, expected_of(federation, site), list(neighbours.values()), config.train.rounds)
        hashes = settings_of(federation)
        sets = sender_sets(federation.topology, site, endpoint, deadline) if config.exchange.secure else None
        control = PeerControl(endpoint, hashes, deadline, lambda: self._shared, lambda kind: self._bounds[kind], sets)
        protocol = RoundProtocol(endpoint, deadline, lambda kind: self._bounds[kind], control)
        parts = (
            federation.topology,
            site.client,
            neighbours,
            protocol,
            thread,
            federation.start,
            federation.algorithm.traits.positive_vectors,
            site.names,
        )
        self.exchange = SecureExchange(sets, *parts) if sets else NeighbourExchange(*parts)
        cache, rows = cache_settings(config, federation.algorithm), _relayed_rows(federation, site)
        peers = build_exchange(config, self.exchange, federation.start, federation.attackers, cache, rows)
        if cache:
            self._bounds["relay"] = self.exchange.relay_format.largest(federation.start)
        super().__init__(replace(federation, exchange=peers), site, thread, protocol, control, store)
        self.rounds = SynchronousRounds(self.algorithm, federation.learner, peers, federation.clock)
        self.label_counts = StartupSum(store, control, thread, self.exchange, config.peer.join, self._request_counts)
        self._events: list[Event] = []

    def __enter__(self) -> Self:
        if self.config.train.pooled and self.label_counts.total is None:
            first = -gossip_rounds(self.exchange.topology)
            self.protocol.endpoint.start_at(first)  # neighbours hear from the first handshake on which round this is
        return super().__enter__()

    def start(self) -> Opening:
        """Make the state before round 0; label counts are summed over the network first."""
        with self.waiting():
            state = opening_state(self.federation, self.label_counts)
        return Opening(state, self.label_counts.bytes_sent, self._take_events())

    def join(self, done: int, state: State) -> Sequence[Event]:
        """Greet the neighbours; begin with those that answer."""
        self.publish_state(done, state)
        return self.handshake(done, self.config.peer.join)

    def next_round(self, t: int, state: State) -> tuple[int, State, Sequence[Event]]:
        """Return the next round; of a peer that fell behind, the one in which its neighbours are."""
        self.publish_state(t, state)
        self._events += self.neighbour_events()
        ahead = self.thread.ask(self.protocol.endpoint.peers.round_to_follow, t) if self.sends else None
        if ahead is not None:
            t, state = self._catch_up(t, state, *ahead)
        return t, state, self._take_events()

    def observe(self, t: int, state: State, result: RoundResult) -> dict[str, Any]:
        """Measure how far apart those are whose links counted."""
        graph, (me,) = self.exchange.graph, self.exchange.clients
        after = self.algorithm.model(state).to("cpu")
        sent, received = (x.to("cpu") if x is not None else None for x in (result.sent, result.received))
        senders = sorted({me} | set(graph.neighbours(me)))
        found = neighbourhood(after, sent, received, graph.weights([me], senders))
        missed = {str(client): reason for client, reason in sorted(result.missing.items())}
        unknown = {} if result.W is not None else dict.fromkeys(WITHOUT_W, float("nan"))
        behind = max(0, self.thread.ask(self.protocol.endpoint.peers.rounds_behind, t + 1))
        return {**vars(found), "rho": float("nan"), **unknown, "missed": missed, "behind": behind}

    def leave(self, done: int, state: State) -> Sequence[Event]:
        """Share the final state while neighbours may still ask for it."""
        self.publish_state(done, state)
        self.enter_round(done)
        return [*self.closing_events(), *self._sums_given_up()]

    def publish_state(self, done: int, state: State) -> None:
        """Hold what neighbours may have of the state for when they ask; no tensor of it is ever changed in place."""
        shared = exportable(state, self.blocks, self.local_only) if self._shares_state else {}
        self._shared = (shared | self.label_counts.vectors) or None
        self._bounds["mix"] = max(self.largest, self._state_bytes(state) if self._shares_state else 0)
        self.done = done

    def _sums_given_up(self) -> list[Event]:
        """Warn of secure sums that did not come together."""
        count = self.exchange.given_up if isinstance(self.exchange, SecureExchange) else 0
        warning = (
            f"{count} secure sums were given up, since a neighbour went away meanwhile or fewer than {LEAST_SENDERS} "
            "were there; this site kept its own values in these rounds"
        )
        return [Warned(warning)] if count else []

    def _catch_up(self, t: int, state: State, round: int, peer: PeerId) -> tuple[int, State]:
        """Leave out rounds; after a long absence adopt the state of the neighbour that is followed.

        How many follows from the neighbours' messages, not from what comes with the state.
        """
        adopted = None
        if (
            self._shares_state
            and round - t >= self.config.peer.pull
            and self.thread.ask(lambda: self.protocol.endpoint.peers.isolated)
        ):
            adopted = self._adopted(peer, state)
        if adopted is None:  # without a state of the end, the last round must still be trained
            to = min(round, self.config.train.rounds - 1)
        else:  # the request took time, so ask again which round it is
            again = self.thread.ask(self.protocol.endpoint.peers.round_to_follow, t)
            to, state = max(round, again[0]) if again else round, adopted
        self._events.append(CaughtUp(format_now("milliseconds"), t, to, self.numbers[peer], adopted is not None))
        self.publish_state(to, state)
        return to, state

    def _adopted(self, peer: PeerId, state: State) -> State | None:
        """The own state with a neighbour's in its place, checked; None where none came that could be used."""
        vectors = self._request_state(peer, state, self.label_counts.schema)
        if vectors is None:
            return None
        adopted = adopt(state, vectors, self.blocks, self.local_only)
        if adopted is None:
            return None
        return self.algorithm.on_rejoin(state, adopted)

    def _request_counts(self, peer: PeerId, counts: Schema) -> dict[str, Tensor] | None:
        return self._request_state(peer, self.algorithm.start(self.federation.start, self.federation.exchange), counts)

    def _request_state(self, peer: PeerId, like: State, counts: Schema) -> dict[str, Tensor] | None:
        """The vectors of a neighbour's state that looks like ``like`` and comes with label counts."""
        self._bounds["state"] = self._state_bytes(like, counts)
        reply = self.thread.call(self.control.request_state(peer, self.config.peer.deadline))
        if reply is None:
            return None

        def expected(claimed: Shapes) -> Schema:
            return (state_schema(like, claimed, self.local_only) if self.sends else {}) | counts

        try:
            found = read_claimed(reply.header, reply.body, expected({}), expected)
            check_state(leaves(like).values(), {name: each for name, each in found.items() if name not in counts})
            return found
        except Refused as refusal:
            self._events.append(Warned(f"the state of {peer} was not taken over ({refusal})"))
            return None

    def _state_bytes(self, state: State, counts: Schema | None = None) -> int:
        """The most bytes that a neighbour's state may have."""
        counts = self.label_counts.schema if counts is None else counts
        return largest_state(state) + sum(
            largest_state(torch.zeros(shape, dtype=kind)) for shape, kind in counts.values()
        )

    @property
    def _shares_state(self) -> bool:
        """Whether neighbours may have this client's state and it theirs: with secure sums nobody sees any adapter."""
        return bool(self.sends) and not self.config.exchange.secure

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def _relayed_rows(federation: Federation, site: Site) -> dict[int, int]:
    """This client's training rows, as relayed adapters tell all sites: 1 where their weights do not depend on them."""
    relayed = federation.exchange.relayed
    return {site.client: relayed.rows[site.client] if relayed and relayed.settings.weights == "rows" else 1}


def _everything_sent(federation: Federation) -> Schema:
    """All vectors that the method ever sends."""
    rounds = range(min(_BLOCK_ROUNDS, federation.config.train.rounds))
    algorithm, x = federation.algorithm, federation.start
    whole = replace(x, ranks=x.ranks * 0 + x.spec.rank)
    return {name: what for t in rounds for name, what in algorithm.message(whole, t).items()}
