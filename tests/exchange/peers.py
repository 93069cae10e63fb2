"""Real peers in one process, for tests: every peer a thread, their transports on one event loop."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from peerlora.exchange.contact import Neighbourhood
from peerlora.exchange.loop import LoopThread
from peerlora.exchange.neighbours import NeighbourExchange
from peerlora.exchange.rendezvous import Rendezvous
from peerlora.exchange.wire import Expected
from peerlora.transport.base import DeadlineMissed, PeerDown, PeerEvent


class Wire:
    """Calls receivers directly; ``cut`` holds the directed links that lose everything."""

    def __init__(self):
        self.receivers, self.cut, self.transports = {}, set(), {}

    def transport(self, me):
        self.transports[me] = Direct(self, me)
        return self.transports[me]


class Direct:
    def __init__(self, wire, me):
        self.wire, self.me, self.queue = wire, me, asyncio.Queue()

    async def start(self, receiver):
        self.wire.receivers[self.me] = receiver

    async def send(self, to, header, body, *, deadline):
        receiver = self.wire.receivers.get(to)
        if receiver is None:
            raise PeerDown(to)
        try:
            async with asyncio.timeout(deadline):
                if (self.me, to) in self.wire.cut:
                    await asyncio.sleep(deadline + 1)
                receiver.admit(self.me, header)
                await receiver.deliver(self.me, header, bytearray(body))
                if (to, self.me) in self.wire.cut:
                    await asyncio.sleep(deadline + 1)
        except TimeoutError:
            raise DeadlineMissed(to) from None

    async def events(self):
        while True:
            yield await self.queue.get()

    async def close(self):
        self.wire.receivers.pop(self.me, None)
        for other in self.wire.transports.values():
            other.queue.put_nowait(PeerEvent("down", self.me))


def name(client):
    return f"site-{client}"


@contextmanager
def exchanges(topology, deadline=5.0, largest=1 << 20, wire=None):
    """One NeighbourExchange per client, greeted."""
    with LoopThread() as thread:
        wire = wire or Wire()
        names = {client: name(client) for client in range(topology.clients)}
        made, hoods = [], []
        for client in range(topology.clients):
            rendezvous = Rendezvous(wire.transport(name(client)), Expected("run", "ba5e", "5bec"), deadline, largest)
            others = [names[j] for j in names if j != client]
            hoods.append(Neighbourhood(rendezvous, others, {"train": "same"}))
            thread.call(hoods[-1].start())
            made.append(NeighbourExchange(topology, client, names, rendezvous, thread))
        yield made
        for hood in hoods:
            thread.call(hood.close())


def together(calls):
    """The results of synchronous calls that need each other."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]
