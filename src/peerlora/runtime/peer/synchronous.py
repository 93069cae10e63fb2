"""One peer's run: the loop of a simulation, for one client whose neighbours are somewhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from peerlora.algorithms.base import is_asynchronous
from peerlora.config.run import RunConfig
from peerlora.errors import NotNow
from peerlora.exchange.gossip_sum import gossip_rounds
from peerlora.exchange.payload import Shapes
from peerlora.exchange.schema import Schema
from peerlora.lora.diagnostics import neighbourhood
from peerlora.network.base import PeerId, Refused, Transport
from peerlora.network.protocol.control import PeerControl
from peerlora.network.protocol.event_loop import EventLoopThread
from peerlora.network.protocol.neighbour_exchange import NeighbourExchange
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.network.protocol.state_transfer import adopt, exportable, largest_state, state_schema
from peerlora.network.protocol.wire import read_claimed
from peerlora.runs.events import CaughtUp, Event, Warned
from peerlora.runs.resume import check_same, default_folder, run_facts, stored_config
from peerlora.runs.store import RunStore, require_free
from peerlora.runtime.compose import Federation, composed, opening_state, resolve_threads
from peerlora.runtime.exchange_stack import build_exchange
from peerlora.runtime.export import read_adapters
from peerlora.runtime.peer import label_counts as counts
from peerlora.runtime.peer.asynchronous import AsynchronousPeer
from peerlora.runtime.peer.checks import check_site, counted, not_in_run
from peerlora.runtime.peer.config_digest import section_hashes
from peerlora.runtime.peer.message_bounds import exchanged_blocks, largest_message
from peerlora.runtime.peer.site import PeerParticipation, Site, expected_of, now
from peerlora.runtime.resources import RunResources
from peerlora.runtime.rounds import RoundResult
from peerlora.runtime.trainer import Result

_LOOKED_AT = 64  # rounds in which every block that a method exchanges has its turn


def train_peer(
    config: RunConfig,
    site: Site,
    transport: Transport,
    thread: EventLoopThread,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    resources: RunResources | None = None,
    listener: Callable[[Event], None] = lambda event: None,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train as one client of a federation, over a transport whose event loop is ``thread``.

    With ``resume``, go on from the newest checkpoint in ``out``; a finished run is not touched.  Raises RunError when
    every neighbour refuses.
    """
    begun = Path(out) if resume and out is not None else None
    check_site(config, site, counted(begun))
    for warning in not_in_run(config, site):
        listener(Warned(warning))
    if resume:
        assert begun is not None, "a resumed run has a folder"
        done = finished(config, begun, resources)
        if done is not None:
            return done
        with RunStore.open(begun) as store:
            stored = stored_config(store)
            check_same(stored, config, store, None)
            config = config.model_copy(update={"threads": stored.threads})
            federation = composed(config, resources, None, [site.client])
            with running(federation, site, transport, thread, store, listener, stop) as run:
                return run.run(resumed=True)
    folder = Path(out) if out is not None else default_folder(config)
    require_free(folder)
    config = config.model_copy(update={"threads": resolve_threads(config.threads)})
    federation = composed(config, resources, None, [site.client])
    with RunStore.create(folder, config.to_yaml(), run_facts(config, held=[site.client])) as store:
        with running(federation, site, transport, thread, store, listener, stop) as run:
            return run.run()


def finished(config: RunConfig, folder: Path, resources: RunResources | None = None) -> Result | None:
    """The result of a run that has reached its end; None where rounds are left.  Nothing in the folder changes.

    Raises RunError where ``config`` is not the run's.
    """
    with RunStore.open(folder) as store:
        stored = stored_config(store)
        check_same(stored, config, store, None)
        summary, held = store.read("summary.json"), store.facts.get("held")
    if summary is None:
        return None
    if not (folder / "report.html").is_file():  # the end came between the two
        from peerlora.runs.report import write_report

        write_report(folder)
    return Result(summary, folder, lambda: read_adapters(folder, composed(stored, resources, None, held)))


def running(federation: Federation, *rest: Any) -> PeerParticipation:
    """The run of a peer, of a method with common rounds or without."""
    return (AsynchronousPeer if is_asynchronous(federation.algorithm) else SynchronousPeer)(federation, *rest)


class SynchronousPeer(PeerParticipation):
    """One client that trains and exchanges in the rounds that all have in common."""

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
        self.sends = _everything_sent(federation)
        self.blocks = exchanged_blocks(self.sends, federation.start.spec)
        self.at_home = getattr(federation.algorithm, "at_home", ())
        self.largest = largest_message(federation, self.sends)
        config = federation.config
        protocol = RoundProtocol(
            transport, expected_of(federation, site), config.peer.deadline, self.largest, config.train.rounds
        )
        exchange = NeighbourExchange(
            federation.topology,
            site.client,
            site.neighbours(federation.topology),
            protocol,
            thread,
            federation.start,
            getattr(federation.algorithm, "positive", ()),
        )
        peers = build_exchange(config, exchange, federation.start, federation.attackers)
        super().__init__(replace(federation, exchange=peers), site, protocol, thread, store, listener, stop)
        self.met = exchange
        self.control = PeerControl(
            protocol, list(self.numbers), section_hashes(self.config), snapshot=lambda: self._snapshot
        )
        self._snapshot: dict[str, Tensor] | None = None
        self._counts: Tensor | None = None
        """[1, label] rows of the whole network, where the loss needs to know them."""

    def __enter__(self) -> SynchronousPeer:
        if self.config.train.label_prior == "pooled" and counts.kept(self.store) is None:
            self.protocol.enter(-gossip_rounds(self.met.topology), True)  # what neighbours hear from the first on
        super().__enter__()
        return self

    # --- the places where a peer differs from a simulation

    def _opening(self) -> Any:
        """The state before round 0; label counts are summed over the network, once in the life of a run folder."""
        return opening_state(self.federation, self._counted)

    def _counted(self, own: Tensor) -> Tensor:
        self._counts = counts.kept(self.store)
        if self._counts is None:
            ahead = counts.meet_everybody(self.control, self.thread, self.config.peer.join)
            if ahead:  # the gossip is over, and they know its end
                self._counts = counts.check_told(self._told_counts(ahead[0], own), own, ahead[0])
            else:
                self._counts = counts.gossiped(own, self.met, self.thread, self.config.peer.join)
            counts.keep(self.store, self._counts)
        return self._counts

    def _told_counts(self, peer: PeerId, own: Tensor) -> Tensor:
        state = self.algorithm.start(self.federation.start, self.exchange)
        self._counts = own  # so that the state is expected to come with counts
        found = self._asked(peer, state)
        if found is None:
            raise NotNow(f"{peer} has begun its rounds and does not tell the network's label counts; try again")
        return found[counts.COUNTS]

    def _open(self, done: int, state: Any) -> None:
        self._show(done, state)
        super()._open(done, state)

    def _ready(self, t: int, state: Any) -> tuple[int, Any]:
        """The next round; for a peer that fell behind, the one in which its neighbours are."""
        self._show(t, state)
        self._tell()
        called = self.thread.ask(self.protocol.called, t) if self.sends else None
        return (t, state) if called is None else self._catch_up(t, state, *called)

    def _catch_up(self, t: int, state: Any, round: int, peer: PeerId) -> tuple[int, Any]:
        """Leave out rounds; who was away for many of them goes on with the state of the neighbour that it follows.

        How far is what the neighbours' messages say, not what comes with the state.
        """
        pulled = None
        if round - t >= self.config.peer.pull and self.thread.ask(lambda: self.protocol.apart):
            pulled = self._pulled(peer, state)
        if pulled is None:  # without a state of the end, the end is still to be done
            to = min(round, self.config.train.rounds - 1)
        else:  # which took its time
            again = self.thread.ask(self.protocol.called, t)
            to, state = max(round, again[0]) if again else round, pulled
        self._emit(CaughtUp(now(), t, to, self.numbers[peer], pulled is not None))
        self._save(to, state)
        self._show(to, state)
        return to, state

    def _pulled(self, peer: PeerId, state: Any) -> Any | None:
        """The state of a neighbour, checked; None where none came that could be used."""
        vectors = self._asked(peer, state)
        if vectors is None:
            return None
        taken = adopt(state, vectors, self.blocks, self.at_home)
        if taken is None:
            return None
        rejoined = getattr(self.algorithm, "rejoined", lambda own, taken: taken)
        return rejoined(state, taken)

    def _asked(self, peer: PeerId, state: Any) -> dict[str, Tensor] | None:
        """The vectors of a neighbour's state that looks like ``state``."""
        self.control.largest_state = self._state_bytes(state)
        came = self.thread.call(self.control.pull(peer, self.config.peer.deadline))
        if came is None:
            return None
        try:
            return read_claimed(came.header, came.body, self._state(state, {}), partial(self._state, state))
        except Refused as refusal:
            self._emit(Warned(f"the state of {peer} was not taken over ({refusal})"))
            return None

    def _state(self, state: Any, claimed: Shapes) -> Schema:
        """What a neighbour's answer must hold; where the method sends nothing, label counts at most."""
        extra = {} if self._counts is None else counts.counts_schema(self._counts.shape[1])
        return (state_schema(state, claimed, self.at_home) if self.sends else {}) | extra

    def _state_bytes(self, state: Any) -> int:
        """The most bytes that a neighbour's state may have."""
        return largest_state(state) + (0 if self._counts is None else largest_state(self._counts))

    def _observed(self, t: int, state: Any, passed: RoundResult) -> dict[str, Any]:
        """What the neighbourhood knows: how far apart those were who met."""
        exchange, (me,) = self.met, self.met.clients
        after = self.algorithm.model(state).to("cpu")
        sent, met = (x.to("cpu") if x is not None else None for x in (exchange.mixed, exchange.met))
        senders = sorted({me} | set(exchange.graph.neighbours(me)))
        found = neighbourhood(after, sent, met, exchange.graph.W[[me]][:, senders])
        missed = {str(client): reason for client, reason in sorted(exchange.missed.items())}
        return {**vars(found), "rho": float("nan"), "missed": missed}

    def _edges(self, passed: RoundResult) -> list[tuple[int, int]]:
        (me,) = self.met.clients
        return [edge for edge in passed.edges if me in edge]

    def _finish(self, state: Any) -> Result:
        """The end, while neighbours may still ask."""
        rounds = self.config.train.rounds
        self._show(rounds, state)
        self.thread.ask(self.protocol.enter, rounds)
        self._tell()
        return super()._finish(state)

    def _show(self, done: int, state: Any) -> None:
        """Keep what neighbours may have of the state, for when they ask; no tensor of it is ever changed in place."""
        known = {} if self._counts is None else {counts.COUNTS: self._counts}
        found = (exportable(state, self.blocks, self.at_home) if self.sends else {}) | known
        self._snapshot = found or None
        self.protocol.largest = max(self.largest, self._state_bytes(state) if self.sends else 0)
        self._done = done


def _everything_sent(federation: Federation) -> Schema:
    """All vectors that the method ever sends."""
    rounds = range(min(_LOOKED_AT, federation.config.train.rounds))
    algorithm, x = federation.algorithm, federation.start
    whole = replace(x, ranks=x.ranks * 0 + x.spec.rank)
    return {name: what for t in rounds for name, what in algorithm.message(whole, t).items()}
