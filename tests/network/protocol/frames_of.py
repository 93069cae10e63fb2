"""One message, and the whole way that it takes in a run's receiver, from its pieces to its vectors."""

import hashlib

import msgspec
import torch

from peerlora.network.base import PeerDown, Refused
from peerlora.network.protocol.control import PeerControl
from peerlora.network.protocol.endpoint import Endpoint
from peerlora.network.protocol.link_history import ExchangeStep
from peerlora.network.protocol.pending_exchange import PendingExchange
from peerlora.network.protocol.round_protocol import RoundProtocol
from peerlora.network.protocol.wire import Expected, Header, largest_body, pack, read_body
from peerlora.network.transport.frames import opening
from peerlora.network.transport.links import LinkTable
from peerlora.network.transport.memory import MemoryNetwork
from peerlora.network.transport.virtual_loop import virtual_run

SCHEMA = {
    "q.A": ((3, 8), torch.float32),
    "q.B": ((8, 3), torch.float32),
    "head": ((5,), torch.float64),
    "half": ((7,), torch.bfloat16),
}
ABOUT = Header(run="run-1", kind="mix", round=3, step=1, sender="a", base="ab" * 32, spec="cd" * 32)
EXPECTED = Expected("run-1", "ab" * 32, "cd" * 32)
PIECE = 96


def vectors(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, (shape, dtype) in SCHEMA.items()}


def message(tensors=None, **changes):
    """Header and body bytes."""
    return pack(msgspec.structs.replace(ABOUT, **changes), vectors() if tensors is None else tensors)


def with_checksum(body, **changes):
    """A header whose length and hash fit ``body``, whatever that is: by a sender that knows what it does."""
    header = msgspec.structs.replace(
        ABOUT, **({"length": len(body), "sha256": hashlib.sha256(body).hexdigest()} | changes)
    )
    return msgspec.msgpack.encode(header)


def in_pieces(header, body):
    """As they travel, in small pieces."""
    first = len(body).to_bytes(8, "big") + header
    return [first, *(body[start : start + PIECE] for start in range(0, len(body), PIECE))]


class Anybody:
    """A guard that lets everybody talk."""

    def check(self, site):
        pass


class Site:
    """A receiver as a run has it, which waits for ABOUT: the end of an edge, and behind it a round protocol."""

    def __init__(self):
        self.ends = LinkTable("b", Anybody())
        transport = MemoryNetwork(["a", "b"]).transport("b")
        self.endpoint = Endpoint(transport, EXPECTED, ["a"], ABOUT.round + 1)
        control = PeerControl(self.endpoint, {}, 1.0)
        self.protocol = RoundProtocol(self.endpoint, 1.0, lambda kind: largest_body(SCHEMA), control)
        self.ends.receiver = self.protocol

    def _check(self, header, body):
        if header.codec != "identity":
            raise Refused("bad-header", "codec")
        return read_body(header, body, SCHEMA)

    def _begin(self):
        own = self.endpoint
        own.at = ExchangeStep(ABOUT.round, ABOUT.step)
        self.pending = self.protocol._open = PendingExchange(["a"], ["a"], self._check, False, 1.0)
        for memory in (own.peers.last_step, own.history._claims, own.events.waiting, self.ends._events):
            memory.clear()

    async def take(self, pieces):
        """The vectors of a message; one that is refused or breaks off leaves no trace but its sender's round."""
        self._begin()
        try:
            return await self._take(pieces)
        except (Refused, PeerDown):
            peers, history = self.endpoint.peers, self.endpoint.history
            assert not self.pending.received and not history.one_sided and not peers.mismatched
            assert max((step.round for step in peers.last_step.values()), default=0) <= self.endpoint.rounds
            raise

    async def _take(self, pieces):
        left = iter(pieces)
        length, header = opening(next(left, None))

        async def read():
            return next(left, None)

        await self.ends.take("a", header, length, read)
        return self.pending.received["a"]


def take(pieces):
    """The same for one message alone."""
    return virtual_run(Site().take(pieces))
