"""PeerParticipation: what all real peers have in common, whether their method has common rounds or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from peerlora.algorithms import build_algorithm
from peerlora.algorithms.base import is_asynchronous
from peerlora.config.run import RunConfig
from peerlora.display import format_now
from peerlora.errors import NotNow, QuorumMissed, RunError, Stopped
from peerlora.lora.adapters import Adapters
from peerlora.network.base import refused_for
from peerlora.network.protocol.control import HandshakeResult, PeerControl
from peerlora.network.protocol.event_loop import EventLoopThread
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.runs.events import Event, Joined, NeighbourChanged, RunStarted, Warned
from peerlora.runs.metrics import contact
from peerlora.runs.store import RunStore, read_events
from peerlora.runtime.compose import Federation
from peerlora.runtime.participation import HeldState
from peerlora.runtime.peer.site import Site


class PeerParticipation(HeldState):
    """One client of a run, whose neighbours are other processes; a context manager that holds the transport open."""

    def __init__(
        self,
        federation: Federation,
        site: Site,
        thread: EventLoopThread,
        protocol: RoundProtocol,
        control: PeerControl,
        store: RunStore,
    ):
        self.federation, self.config, self.algorithm = federation, federation.config, federation.algorithm
        self.site, self.thread, self.protocol, self.control = site, thread, protocol, control
        self.store = store
        self.neighbours = site.neighbours(federation.topology)
        self.numbers = {peer: client for client, peer in self.neighbours.items()}
        self.done = 0
        self.stop: Callable[[], bool] = lambda: False
        """Asked while neighbours are waited for before the first round; in a round, the Trainer asks."""
        self.notices: Callable[[], Sequence[str]] = lambda: ()
        """Warnings of this site that are due, asked once a round."""

    def __enter__(self) -> Self:
        self.thread.call(self.control.start(self.protocol))
        return self

    def __exit__(self, *_error: object) -> None:
        self.thread.call(self.control.close())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the block ``stop`` ends the wait for neighbours; nothing is lost, no round has begun."""
        try:
            with self.thread.interruptible(self.stop):
                yield
        except Stopped as stopped:
            command = self.resume_command(self.store.folder)
            raise Stopped(f"{stopped}, before round {self.done + 1}; go on with: {command}") from None

    def handshake(self, done: int, seconds: float) -> list[Event]:
        """Greet all neighbours for at most so long; the run goes on with those that answer.

        Raises RunError where all refuse, NotNow where all of them are in another run.
        """
        self.done = done
        self.thread.ask(self.protocol.endpoint.start_at, done)
        with self.waiting():
            found = self.thread.call(self.control.handshake(seconds))
        events = self.neighbour_events()
        self._require_some(found)
        events += [
            Warned(f"{peer} does not go along ({reason}); its link is not used")
            for peer, reason in sorted(found.refused.items())
        ]
        if away := sorted(set(self.numbers) - found.reached - set(found.refused)):
            events.append(Warned(f"not there after {seconds:g} s: {', '.join(away)}; beginning without"))
        if unlisted := sorted(set(range(self.config.clients)) - set(self.site.names)):
            events.append(Warned(f"not on the member list: clients {unlisted}; their links are not used"))
        return [*events, Joined(format_now("milliseconds"), done, sorted(self.numbers[peer] for peer in found.reached))]

    def enter_round(self, t: int) -> None:
        """Refuse messages of earlier rounds from now on."""
        self.done = t
        self.thread.ask(self.protocol.endpoint.enter, t)

    def neighbour_events(self) -> list[Event]:
        """Take what the network noted about neighbours since the last call, and warnings of this site."""
        notices, events = self.protocol.endpoint.events.waiting, []
        while notices:
            at, kind, peer, detail = notices.popleft()
            events.append(NeighbourChanged(at, self.done, self.numbers[peer], kind, detail))
        return [*events, *map(Warned, self.notices())]

    def closing_events(self) -> list[Event]:
        """Take what is left, and warn where the result is more this site's alone than the federation's."""
        found = contact(read_events(self.store.folder))
        return [*self.neighbour_events(), *([Warned(notice)] if (notice := describe_contact(found, self.done)) else [])]

    def evaluated(self, x: Adapters) -> tuple[Adapters, ...]:
        """Return the own model; nobody knows the average."""
        return (x,)

    def describe(self, started: RunStarted) -> RunStarted:
        """Add the client held here and the names of all."""
        names = {str(client): peer for client, peer in sorted(self.site.names.items())}
        return replace(started, held=[self.site.client], names=names)

    def resume_command(self, folder: Path) -> str:
        """Describe the command that resumes this peer."""
        return f"the same command with --out {folder} --resume"

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: neighbours hold the rest."""
        return {}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore nothing."""

    def _require_some(self, found: HandshakeResult) -> None:
        if not found.refused or found.reached:
            return
        reasons = "; ".join(f"{peer}: {reason}" for peer, reason in sorted(found.refused.items()))
        if all(reason.startswith(refused_for("wrong-run")) for reason in found.refused.values()):
            raise NotNow(f"all neighbours are in another run ({reasons}); try later, or compare peer.run")
        raise RunError(
            f"no neighbour of {self.site.names[self.site.client]} goes along ({reasons}); see peerlora doctor"
        )


def describe_contact(found: Mapping[str, float | int | None], rounds: int) -> str:
    """Describe how much contact a peer had, see ``metrics.contact``; nothing where there is nothing to warn of."""
    share, alone = found["share"], found["alone"]
    if share is None or not alone:
        return ""
    if not share:
        return f"no round of {rounds} had any contact: the model is this site's alone"
    return f"no contact after round {rounds - alone} of {rounds}: since then this site has trained alone"


def check_quorum(summary: Mapping[str, Any], config: RunConfig) -> None:
    """Raise QuorumMissed where a run that is over had contact in too few rounds for ``peer.quorum``."""
    share, needed = (summary.get("contact") or {}).get("share"), config.peer.quorum
    asked = not is_asynchronous(build_algorithm(config.algorithm.name, config.algorithm.parameters))
    if asked and share is not None and share < needed:
        raise QuorumMissed(
            f"contact in {share:.0%} of the rounds, peer.quorum={needed:g} asks for {needed:.0%}: the model in "
            f"{summary['run']} is more this site's alone than the federation's; start a new run with all sites, or set "
            "another peer.quorum"
        )
