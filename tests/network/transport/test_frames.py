"""A call that breaks off under our hands is a peer that is down, never an error of another kind."""

import asyncio

import pytest
from grpc import aio

from peerlora.network.base import PeerDown
from peerlora.network.transport import frames


class Broken:
    """The answering side of a call whose other end was killed, as gRPC shows it."""

    def __init__(self, pieces=()):
        self.pieces = list(pieces)

    async def read(self):
        if not self.pieces:
            raise aio.InternalError("Failed execute_batch")
        return self.pieces.pop(0)

    async def write(self, data):
        raise aio.InternalError("Failed execute_batch")


def test_a_message_that_cannot_be_written_is_a_peer_that_is_down():
    call = Broken()
    saying = frames.say(b"header", memoryview(b"body"), frames.writer(call), frames.reader(call))
    with pytest.raises(PeerDown, match="without an answer"):
        asyncio.run(saying)


def test_an_answer_that_came_before_the_break_counts():
    call = Broken([frames.ACCEPTED])
    asyncio.run(frames.say(b"header", memoryview(b"body"), frames.writer(call), frames.reader(call)))


def test_a_broken_call_has_nothing_more_to_read_and_cannot_be_answered():
    call = Broken([b"last"])

    async def both():
        read = frames.reader(call)
        assert await read() == b"last" and await read() is None
        await frames.writer(call)(b"thanks")

    with pytest.raises(PeerDown, match="broke off"):
        asyncio.run(both())
