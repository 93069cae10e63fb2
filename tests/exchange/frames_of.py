"""One message, and a receiver's whole path from its pieces to its vectors."""

import hashlib

import msgspec
import torch

from peerlora.exchange.wire import Expected, Header, largest_body, pack, read_body, read_header
from peerlora.transport.base import Refused
from peerlora.transport.edge import _assemble
from peerlora.transport.frames import opening

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


def sealed(body, **changes):
    """A header whose length and hash fit ``body``, whatever that is: by a sender that knows what it does."""
    header = msgspec.structs.replace(
        ABOUT, **({"length": len(body), "sha256": hashlib.sha256(body).hexdigest()} | changes)
    )
    return msgspec.msgpack.encode(header)


def in_pieces(header, body):
    """As they travel, in small pieces."""
    first = len(body).to_bytes(8, "big") + header
    return [first, *(body[start : start + PIECE] for start in range(0, len(body), PIECE))]


def take(pieces):
    """The vectors of a message, or Refused: every check of a receiver that waits for ABOUT."""
    left = iter(pieces)
    length, data = opening(next(left, None))
    header = read_header(data, largest_body(SCHEMA))
    EXPECTED.check(header, "a")
    if (header.kind, header.round, header.step, header.facts) != ("mix", 3, 1, {}):
        raise Refused("unexpected")
    if length > header.length:
        raise Refused("oversize")

    async def read():
        return next(left, None)

    return read_body(header, at_once(_assemble(length, read)), SCHEMA)


def at_once(coroutine):
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waited")
