"""One peer of bench/transport.py: a process that sends and receives, over TCP or over our transport.

It prints one JSON object a line, each with the time of the system's monotonic clock, and waits for lines of its parent.
"""

import argparse
import asyncio
import json
import os
import socket
import sys
import time
from pathlib import Path

MB = 1 << 20


def site(number: int) -> str:
    return f"peer-{number}"


def neighbours(number: int, peers: int) -> list[int]:
    return sorted({(number - 1) % peers, (number + 1) % peers} - {number})


def say(**facts: object) -> None:
    print(json.dumps(facts | {"at": time.monotonic()}), flush=True)


async def told() -> None:
    """Wait for the parent's next line."""
    if not await asyncio.to_thread(sys.stdin.readline):
        raise SystemExit


class Tcp:
    """Sockets without encryption; an ack of one byte a message."""

    def __init__(self, folder: Path, number: int, size: int):
        self.ports = json.loads((folder / "ports.json").read_text())
        self.number, self.size, self.got, self.news = number, size, 0, asyncio.Event()
        self.ways: dict[int, socket.socket] = {}
        self.tasks: list[asyncio.Task] = []

    async def open(self) -> None:
        """Be ready to send and to be sent to."""
        loop, server = asyncio.get_running_loop(), socket.create_server(("127.0.0.1", self.ports[self.number]))
        server.setblocking(False)
        self.tasks.append(asyncio.create_task(self._accept(server)))
        for other in neighbours(self.number, len(self.ports)):
            while other not in self.ways:
                way = socket.socket()
                way.setblocking(False)
                way.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    await loop.sock_connect(way, ("127.0.0.1", self.ports[other]))
                    self.ways[other] = way
                except OSError:
                    way.close()
                    await asyncio.sleep(0.05)

    async def _accept(self, server: socket.socket) -> None:
        while True:
            way, _ = await asyncio.get_running_loop().sock_accept(server)
            way.setblocking(False)
            self.tasks.append(asyncio.create_task(self._receive(way)))

    async def _receive(self, way: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            body, filled = bytearray(self.size), 0
            view = memoryview(body)
            while filled < self.size:
                came = await loop.sock_recv_into(way, view[filled:])
                if not came:
                    return
                filled += came
            await loop.sock_sendall(way, b"\1")
            self.got += 1
            self.news.set()

    async def send(self, other: int, body: bytes) -> None:
        """Send one message and wait for its ack."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.ways[other], body)
        await loop.sock_recv(self.ways[other], 1)

    async def close(self) -> None:
        """End what runs."""
        for task in self.tasks:
            task.cancel()


class Grpc:
    """Our transport."""

    def __init__(self, folder: Path, number: int, size: int):
        from peerlora.network.identity.identity import load_identity
        from peerlora.network.identity.members import load_members
        from peerlora.network.identity.roster import Roster
        from peerlora.network.transport.grpc import GrpcTransport

        identity = load_identity(folder / site(number))
        members = load_members(folder / "members.json", identity.signers)
        self.transport = GrpcTransport(identity, Roster(identity.site, identity.fingerprint, members))
        self.size, self.got, self.news = size, 0, asyncio.Event()
        self.wanted = {site(other) for other in neighbours(number, len(members.members))}
        self.up: set[str] = set()
        self.first: set[str] = set()
        self.tasks: list[asyncio.Task] = []

    async def open(self) -> None:
        """Be ready to send and to be sent to."""
        say(event="start")
        await self.transport.start(self)
        self.tasks.append(asyncio.create_task(self._listen()))
        while self.up != self.wanted:
            await asyncio.sleep(0.01)

    async def _listen(self) -> None:
        async for event in self.transport.events():
            if event.kind in ("up", "down"):
                (self.up.add if event.kind == "up" else self.up.discard)(event.peer)
                say(event=event.kind, peer=event.peer)

    def admit(self, peer: str, header: bytes) -> int:
        """As many bytes as every message has."""
        return self.size

    async def deliver(self, peer: str, header: bytes, body: bytearray) -> None:
        """Count it."""
        self.got += 1
        self.news.set()
        if peer not in self.first:
            self.first.add(peer)
            say(event="first", peer=peer)

    async def send(self, other: int, body: bytes) -> None:
        """Send one message and wait for its ack."""
        await self.transport.send(site(other), b"header", body, deadline=300)

    async def close(self) -> None:
        """End what runs."""
        await self.transport.close()
        for task in self.tasks:
            task.cancel()


async def rounds(way: Tcp | Grpc, number: int, peers: int, size: int, count: int) -> None:
    """Exchange ``count`` rounds after the parent's word, and say when they began and ended."""
    others, body = neighbours(number, peers), os.urandom(size)
    say(event="ready")
    await told()
    start = time.monotonic()
    for done in range(1, count + 1):
        await asyncio.gather(*(way.send(other, body) for other in others))
        while way.got < done * len(others):
            way.news.clear()
            await way.news.wait()
    say(event="rounds", began=start, ended=time.monotonic())
    await told()


async def talk(way: Grpc, number: int, peers: int, size: int) -> None:
    """Send to both neighbours without pause, whatever happens to them, until the parent has heard enough."""
    from peerlora.network.base import TransportError

    async def forever(other: int) -> None:
        body = os.urandom(size)
        while True:
            try:
                await way.send(other, body)
            except TransportError:
                pass
            await asyncio.sleep(0.05)

    way.tasks += [asyncio.create_task(forever(other)) for other in neighbours(number, peers)]
    say(event="ready")
    await told()


async def peer(options: argparse.Namespace) -> None:
    size = round(options.size * MB)
    way = (Tcp if options.role == "tcp" else Grpc)(options.folder, options.number, size)
    await way.open()
    if options.role == "talk":
        assert isinstance(way, Grpc)
        await talk(way, options.number, options.peers, size)
    else:
        await rounds(way, options.number, options.peers, size, options.rounds)
    await way.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in (("role", str), ("number", int), ("peers", int), ("size", float), ("rounds", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    asyncio.run(peer(parser.parse_args()))


if __name__ == "__main__":
    main()
