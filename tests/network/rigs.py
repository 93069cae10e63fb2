"""The same federation of three sites on every transport: what the shared suite is run on.

a and b have addresses, c has none: it only dials.  On a real transport times are short, in memory they are virtual.
"""

import asyncio
import socket

from peerlora.network.base import Refused
from peerlora.network.transport.heartbeat import Timing
from peerlora.network.transport.memory import MemoryNetwork
from peerlora.network.transport.virtual_loop import virtual_run

SITES = ("a", "b", "c")
LIMIT = 600  # seconds after which something hangs, however busy a machine is


class Box:
    """A receiver that keeps what it gets, and can be told to refuse, or to wait."""

    def __init__(self, most=1 << 26):
        self.most, self.got, self.inside, self.largest_inside = most, [], 0, 0
        self.refuse_header, self.refuse_body = {}, {}
        self.gate = asyncio.Event()
        self.gate.set()

    def admit(self, peer, header):
        if header in self.refuse_header:
            raise Refused(self.refuse_header[header], "by its header")
        return self.most

    async def deliver(self, peer, header, body):
        self.inside += 1
        self.largest_inside = max(self.largest_inside, self.inside)
        try:
            await self.gate.wait()
        finally:
            self.inside -= 1
        if header in self.refuse_body:
            raise Refused(self.refuse_body[header], "by its body")
        self.got.append((peer, header, bytes(body)))


class Rig:
    """Transports by site, their receivers and what they told."""

    def __init__(self):
        self.transports, self.boxes, self.told, self._listening = {}, {}, {}, []

    async def start(self, *sites):
        for site in sites:
            self.boxes[site] = Box()
            self.told[site] = []
            transport = self.transports[site] = self.make(site)
            await transport.start(self.boxes[site])
            self._listening.append(asyncio.ensure_future(self._listen(transport, self.told[site])))

    async def all_up(self, *sites):
        await self.start(*(sites or SITES))
        names = sites or SITES
        await self.until(lambda: all(self.edge(x, y) is not None for x in names for y in names if x != y))

    def edge(self, one, other):
        return self.transports[one].ends.edge(other).link

    async def _listen(self, transport, told):
        async for event in transport.events():
            told.append((event.kind, event.peer, event.detail))

    def kinds(self, site, peer):
        return [kind for kind, who, _ in self.told[site] if who == peer]

    async def until(self, true):
        """Wait until a condition holds."""
        async with asyncio.timeout(LIMIT):
            while not true():
                await asyncio.sleep(0.01)

    async def stop(self):
        for transport in self.transports.values():
            await transport.close()
        async with asyncio.timeout(LIMIT):
            await asyncio.gather(*self._listening)

    def run(self, scenario):
        async def main():
            self.prepare()
            try:
                return await scenario(self)
            finally:
                await self.stop()

        return self.runner(main())


class MemoryRig(Rig):
    timing = Timing(refused=60)
    runner = staticmethod(virtual_run)

    def prepare(self):
        self.network = MemoryNetwork(SITES, timing=self.timing, seed=1)
        for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
            self.network.delay(one, other, 0.02)

    def make(self, site):
        return self.network.transport(site)

    async def crash(self, site):
        self.network.crash(site)

    async def expel(self, site):
        self.network.expel(site)

    async def stop(self):
        await super().stop()
        await self.network.close()


def free_port():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return holder.getsockname()[1]


class GrpcRig(Rig):
    timing = Timing(beat=0.1, backoff=(0.05, 0.2), refused=60, handshake=1.0)
    runner = staticmethod(asyncio.run)

    def __init__(self, folder):
        from peerlora.network.identity.members import load_members

        super().__init__()
        self.folder = folder
        self.members = load_members(folder / "members.json", self.identity("a").signers)

    def prepare(self):
        self.rosters = {}

    def identity(self, site):
        from peerlora.network.identity.identity import load_identity

        return load_identity(self.folder / site)

    def make(self, site, **settings):
        from peerlora.network.identity.roster import Roster
        from peerlora.network.transport.grpc import GrpcTransport

        identity = self.identity(site)
        self.rosters[site] = Roster(site, identity.fingerprint, self.members)
        return GrpcTransport(identity, self.rosters[site], timing=self.timing, **settings)

    async def crash(self, site):
        await self.transports[
            site
        ].close()  # its sockets close as the kernel would close them; signals: test_signals.py

    async def expel(self, site):
        import msgspec

        from peerlora.network.identity.members import remove_member

        shorter = msgspec.structs.replace(remove_member(self.members, site), version=self.members.version + 1)
        for other in SITES:
            if other != site:
                await self.transports[other].update(shorter)
