"""In-memory twin of the real transport, for tests of network failures.

All peers live on one event loop.  Under ``virtual_loop.virtual_run`` nothing sleeps and everything is reproducible.  A
session between two sites is open once each receives the other's heartbeats; it ends as a real one does: at once when a
process dies (the other side's kernel says so), after missed heartbeats when a link is cut or a process hangs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

from peerlora.network.base import KeyAgreement, PeerDown, PeerId, Receiver, Refused, Signatures
from peerlora.network.transport.audit_log import AuditLog
from peerlora.network.transport.heartbeat import Heartbeat, Timing, give_up, watch
from peerlora.network.transport.links import CHUNK, Link, LinkTable, LinkTransport, Read
from peerlora.network.transport.memory_faults import FaultyLinks


class MemoryNetwork(FaultyLinks):
    """Network of ``sites``, by default a complete graph, with faults that tests inject."""

    def __init__(
        self,
        sites: Iterable[PeerId],
        edges: Iterable[tuple[PeerId, PeerId]] | None = None,
        timing: Timing | None = None,
        seed: int = 0,
    ):
        super().__init__(seed)
        self.sites, self.timing = set(sites), timing or Timing()
        self.edges = None if edges is None else {frozenset(edge) for edge in edges}
        self.live: dict[PeerId, MemoryTransport] = {}
        self._tasks: set[asyncio.Task] = set()

    def transport(
        self,
        site: PeerId,
        audit: AuditLog | None = None,
        signatures: Signatures | None = None,
        agreement: KeyAgreement | None = None,
    ) -> MemoryTransport:
        """Create a transport for ``site``: of its first process, or of the one after a crash."""
        return MemoryTransport(self, site, audit, signatures, agreement)

    def split(self, group: Iterable[PeerId]) -> None:
        """Cut every link between ``group`` and the other sites."""
        group = set(group)
        for one in group:
            for other in self.sites - group:
                self.cut(one, other)

    def crash(self, site: PeerId) -> None:
        """Kill the process of ``site``, as SIGKILL does."""
        transport = self.live.pop(site, None)
        if transport is not None:
            self.wake(site)
            transport.die("the process died")
            self.reset(transport, "the connection was reset")

    def expel(self, site: PeerId) -> None:
        """Take ``site`` off everybody's member list."""
        self.sites.discard(site)
        for transport in [live for live in self.live.values() if live.me != site]:
            if (link := transport.ends.edge(site).link) is not None:
                transport.ends.lost(site, link, "not-a-member")
                self.later(transport.me, site, _resetter(transport, "refused: not-a-member"))

    def check(self, one: PeerId, other: PeerId) -> None:
        """Raise Refused unless both may talk."""
        for site in (one, other):
            if site not in self.sites:
                raise Refused("not-a-member", site)
        if self.edges is not None and frozenset((one, other)) not in self.edges:
            raise Refused("not-a-neighbour", other)

    def linked(self, one: PeerId, other: PeerId) -> bool:
        """Whether both may talk."""
        try:
            self.check(one, other)
        except Refused:
            return False
        return one != other

    def later(self, source: PeerId, target: PeerId, do: Callable[[MemoryTransport], None]) -> None:
        """Call ``do`` with the process of ``target`` when something sent now arrives there."""

        async def go() -> None:
            await self.carry(source, target)
            if target in self.live:
                do(self.live[target])

        task = asyncio.get_running_loop().create_task(go())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Close all transports and drop what is in flight."""
        for transport in list(self.live.values()):
            await transport.close()
        await give_up(*self._tasks)

    def reset(self, dead: MemoryTransport, why: str) -> None:
        """Notify all neighbours of a process that it has ended, as its machine would."""
        for peer in list(dead.ends.edges):
            self.later(dead.me, peer, _resetter(dead, why))


def _resetter(theirs: MemoryTransport, why: str) -> Callable[[MemoryTransport], None]:
    return lambda live: live.reset(theirs, why)


class _MemoryLink(Link):
    """Session between two processes."""

    def __init__(self, network: MemoryNetwork, mine: MemoryTransport, theirs: MemoryTransport):
        super().__init__()
        self.network, self.mine, self.theirs = network, mine, theirs
        self.heartbeat = Heartbeat(network.timing, asyncio.get_running_loop().time())

    async def push(self, header: bytes, body: memoryview) -> None:
        """Carry one message, and its answer back."""
        source, target = self.mine.me, self.theirs.me
        await self.network.message(source, target, "message")
        if self.network.live.get(target) is not self.theirs:
            raise PeerDown(f"{target} died")
        try:
            for _ in range(self.network.copies(source, target)):
                pieces = iter([bytes(body[start : start + CHUNK]) for start in range(0, len(body), CHUNK)])
                await self.theirs.ends.take(source, header, len(body), _reader(pieces))
        except Refused:
            await self.network.message(source, target, "ack")
            raise
        await self.network.message(source, target, "ack")


def _refuser(peer: PeerId, refusal: Refused) -> Callable[[MemoryTransport], None]:
    return lambda live: live.ends.refused(peer, refusal, "there")


def _reader(pieces: Iterator[bytes]) -> Read:
    async def read() -> bytes | None:
        return next(pieces, None)

    return read


class MemoryTransport(LinkTransport):
    """Transport of one process on a MemoryNetwork; see Transport."""

    def __init__(
        self,
        network: MemoryNetwork,
        me: PeerId,
        audit: AuditLog | None = None,
        signatures: Signatures | None = None,
        agreement: KeyAgreement | None = None,
    ):
        self.network, self.me, self.signatures, self.agreement = network, me, signatures, agreement
        self.ends = LinkTable(me, self, audit)
        self._tasks: dict[PeerId, asyncio.Task] = {}
        self._watches: set[asyncio.Task] = set()
        self._hears: dict[PeerId, MemoryTransport] = {}

    def check(self, site: PeerId) -> None:
        """Raise Refused unless ``site`` may talk to this one."""
        self.network.check(self.me, site)

    async def start(self, receiver: Receiver) -> None:
        """Join the network; another living process of the same site is replaced."""
        if self.me in self.network.live:
            self.network.crash(self.me)
        self.ends.receiver = receiver
        self.network.live[self.me] = self
        for peer in sorted(self.network.sites):
            if self.network.linked(self.me, peer):
                self._tasks[peer] = asyncio.get_running_loop().create_task(self._beats(peer))

    async def close(self) -> None:
        """See Transport."""
        if self.network.live.get(self.me) is self:
            del self.network.live[self.me]
            self.network.reset(self, f"{self.me} is closing")
        self.die(f"{self.me} is closing")
        await give_up(*self._tasks.values(), *self._watches)

    def die(self, why: str) -> None:
        """End all sessions and tasks without notifying anybody."""
        for edge in self.ends.edges.values():
            if edge.link is not None:
                edge.link.end(why)
        self.ends.shut()
        for task in [*self._tasks.values(), *self._watches]:
            task.cancel()

    def reset(self, theirs: MemoryTransport, why: str) -> None:
        """End a session because the other side's process has ended."""
        link = self._link(theirs.me)
        if link is not None and link.theirs is theirs:
            self.ends.lost(theirs.me, link, why)

    async def _beats(self, peer: PeerId) -> None:
        while True:
            await self.network.awake(self.me)
            self._beat(peer)
            await asyncio.sleep(self.network.timing.beat)

    def _beat(self, peer: PeerId) -> None:
        """Send a heartbeat, which names the process whose heartbeats arrive here."""
        hears = self._hears.get(peer)
        self.network.later(self.me, peer, lambda live: live.heard(self, hears))

    def heard(self, theirs: MemoryTransport, hears: MemoryTransport | None) -> None:
        """Take a heartbeat of the process ``theirs``, which receives those of ``hears``."""
        peer, link = theirs.me, self._link(theirs.me)
        try:
            self.check(peer)
        except Refused as refusal:
            self.ends.refused(peer, refusal, "here")
            self.network.later(self.me, peer, _refuser(self.me, refusal))
            return
        if self.network.live.get(peer) is not theirs:
            return  # its sender has died since
        if self._hears.get(peer) is not theirs:
            self._hears[peer] = theirs
            self._beat(peer)
        if link is not None and link.theirs is theirs:
            link.heartbeat.heard(asyncio.get_running_loop().time())
            if hears is not self:
                self.ends.lost(peer, link, "ended by the other side")
        elif hears is self:
            self._open(peer, theirs)

    def _open(self, peer: PeerId, theirs: MemoryTransport) -> None:
        link = _MemoryLink(self.network, self, theirs)
        self.ends.opened(peer, link)
        task = asyncio.get_running_loop().create_task(self._watch(peer, link))
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)

    async def _watch(self, peer: PeerId, link: _MemoryLink) -> None:
        watching = asyncio.ensure_future(
            watch(link.heartbeat, lambda health: self.ends.health(peer, health), lambda: self.network.awake(self.me))
        )
        await asyncio.wait({watching, link.ended}, return_when=asyncio.FIRST_COMPLETED)
        await give_up(watching)
        if link.open:
            self._hears.pop(peer, None)
            self.ends.lost(peer, link, "no heartbeat")
            self._beat(peer)

    def _link(self, peer: PeerId) -> _MemoryLink | None:
        link = self.ends.edge(peer).link
        assert link is None or isinstance(link, _MemoryLink)
        return link
