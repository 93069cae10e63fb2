"""One site's run: a client in its folder, its neighbours somewhere else, whether all keep common rounds or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from peerlora.errors import NotNow, RunError
from peerlora.lora.adapters import Adapters
from peerlora.network.base import PeerId
from peerlora.network.protocol.control import HandshakeResult, PeerControl
from peerlora.network.protocol.event_loop import EventLoopThread
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.network.protocol.wire import Expected
from peerlora.runs.events import Event, Joined, NeighbourChanged, RunStarted, Warned
from peerlora.runs.store import RunStore
from peerlora.runtime.compose import Federation
from peerlora.runtime.peer.config_digest import base_digest, spec_digest
from peerlora.runtime.trainer import Trainer
from peerlora.topology.schedule import Topology


@dataclass(frozen=True)
class Site:
    """Who takes part, seen from one site."""

    client: int
    names: Mapping[int, PeerId]
    """Client number -> site, of everybody on the list, this one too."""
    run: str
    """The run's id."""

    def neighbours(self, topology: Topology) -> dict[int, PeerId]:
        """Those on the list that this client may meet in some round, whichever way their link goes."""
        anybody, graph = range(topology.clients), topology.graph
        linked = anybody if graph is None else (graph | graph.T)[self.client].nonzero()[0].tolist()
        return {j: self.names[j] for j in linked if j != self.client and j in self.names}


def expected_of(federation: Federation, site: Site) -> Expected:
    """What every message of the run must agree with."""
    return Expected(site.run, base_digest(federation.model.base), spec_digest(federation.start.spec))


class PeerParticipation(Trainer):
    """What all peers' runs have in common; a context manager that closes the transport."""

    control: PeerControl

    def __init__(
        self,
        federation: Federation,
        site: Site,
        protocol: RoundProtocol,
        thread: EventLoopThread,
        store: RunStore,
        listener: Callable[[Event], None],
        stop: Callable[[], bool],
    ):
        self.site, self.thread, self.protocol = site, thread, protocol
        self.neighbours = site.neighbours(federation.topology)
        self.numbers = {peer: client for client, peer in self.neighbours.items()}
        self._done = 0
        super().__init__(federation, store, listener, stop)

    def __enter__(self) -> PeerParticipation:
        self.thread.call(self.control.start())
        return self

    def __exit__(self, *_error: object) -> None:
        self.thread.call(self.control.close())

    def _open(self, done: int, state: Any) -> None:
        """Greet the neighbours; begin with those who are there."""
        self._done = done
        self.thread.ask(self.protocol.enter, done, True)
        seconds = self._patience(done)
        greeted = self.thread.call(self.control.greet(seconds))
        self._tell()
        self._check(greeted, seconds)
        self._emit(Joined(now(), done, sorted(self.numbers[peer] for peer in greeted.reached)))

    def _patience(self, done: int) -> float:
        """Seconds to wait for neighbours before the first round of this process."""
        return self.config.peer.join

    def _check(self, greeted: HandshakeResult, seconds: float) -> None:
        away = sorted(set(self.numbers) - greeted.reached - set(greeted.refused))
        if greeted.refused and not greeted.reached:
            told = "; ".join(f"{peer}: {reason}" for peer, reason in sorted(greeted.refused.items()))
            if all("wrong-run" in reason for reason in greeted.refused.values()):
                raise NotNow(f"all neighbours are in another run ({told}); try later, or compare peer.run")
            raise RunError(
                f"no neighbour of {self.site.names[self.site.client]} goes along ({told}); see peerlora doctor"
            )
        for peer, reason in sorted(greeted.refused.items()):
            self._emit(Warned(f"{peer} does not go along ({reason}); its link is not used"))
        if away:
            self._emit(Warned(f"not there after {seconds:g} s: {', '.join(away)}; beginning without"))
        unlisted = sorted(set(range(self.config.clients)) - set(self.site.names))
        if unlisted:
            self._emit(Warned(f"not on the member list: clients {unlisted}; their links are not used"))

    def _scored(self, x: Adapters) -> tuple[Adapters, ...]:
        return (x,)

    def _started(self) -> RunStarted:
        names = {str(client): peer for client, peer in sorted(self.site.names.items())}
        return replace(super()._started(), held=[self.site.client], names=names)

    def _again(self) -> str:
        return f"the same command with --out {self.store.folder} --resume"

    def _tell(self) -> None:
        """Write down what happened to neighbours."""
        notices = self.protocol.notices
        while notices:
            at, kind, peer, detail = notices.popleft()
            self._emit(NeighbourChanged(at, self._done, self.numbers[peer], kind, detail))


def now() -> str:
    """ISO 8601, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
