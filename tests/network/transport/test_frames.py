"""A call that breaks off under our hands is a peer that is down, never an error of another kind."""

import asyncio

import msgspec
import pytest
from grpc import aio

from peerlora.network.base import LONGEST, PeerDown, Refused, TransportError
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


FORGED = "\x1b]0;title\x07\x1b[2J\r\nwarning: forged\u202e\u2028" + "x" * 10_000


@pytest.mark.parametrize("make", [TransportError, PeerDown, lambda text: Refused("wrong-config", text)])
def test_what_another_site_says_is_one_short_line_of_plain_characters(make):
    error = make(FORGED)
    for text in (str(error), getattr(error, "detail", "x")):
        assert text.isprintable() and len(text) <= LONGEST


def test_what_the_other_end_says_of_a_refusal_is_cleaned_and_its_reason_cannot_be_forged():
    refusal = frames.read_refusal(frames.refusal_bytes(Refused("late", "here\x1b[31m: refused: wrong-run")))
    assert refusal.detail == "here?[31m: refused: wrong-run" and str(refusal).startswith("refused: late (")
    found = frames.read_refusal(msgspec.msgpack.encode(("wrong-run\n", FORGED)))
    assert found.reason == "unknown-reason" and found.detail.isprintable()
