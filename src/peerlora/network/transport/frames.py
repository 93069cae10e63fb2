"""Framing of messages in gRPC: chunks, encoded refusals, and the settings that both ends share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec
from grpc import aio

from peerlora.network.base import HEADER_BYTES, REASONS, PeerDown, PeerId, Refused, printable
from peerlora.network.transport.heartbeat import Timing, give_up
from peerlora.network.transport.links import CHUNK, LinkTable, Read

SERVICE = "peerlora.Peer"
SEND, TAKE, SESSION = "Send", "Take", "Session"
NONCE_KEY, TOKEN_KEY, ANSWER_KEY = "nonce2-bin", "session-bin", "refusal-bin"
"""Metadata: the dialler's nonce (its name holds the version of these frames), the session's token, a refusal."""
BEAT, ANEW = b".", b"!"
"""Heartbeats; ``ANEW`` asks the dialler to open the session anew, and see a renewed certificate."""
ACCEPTED = b""
OVERRUN = 16
"""Chunks, at most, that an honest sender has in flight when its message is answered early."""


def chunks(header: bytes, body: memoryview) -> Iterator[bytes]:
    """Split a message into gRPC messages: the body's length (8 bytes) and the header, then the body in chunks."""
    yield len(body).to_bytes(8, "big") + header
    for start in range(0, len(body), CHUNK):
        yield bytes(body[start : start + CHUNK])


def opening(first: bytes | None) -> tuple[int, bytes]:
    """Decode the first chunk: length of the body, and header; raises Refused."""
    if first is None or not 8 < len(first) <= 8 + HEADER_BYTES:
        raise Refused("bad-frame", "a message starts with its length and header")
    return int.from_bytes(first[:8], "big"), first[8:]


async def say(header: bytes, body: memoryview, write: Callable[[bytes], Awaitable[Any]], read: Read) -> None:
    """Write a message and read the answer; stop writing when the answer comes early.  Raises Refused or PeerDown."""
    answer = asyncio.ensure_future(read())
    try:
        try:
            for chunk in chunks(header, body):
                if answer.done():
                    break
                await write(chunk)
        except (aio.AioRpcError, asyncio.InvalidStateError, PeerDown):
            pass  # the call is over; the answer, if there is one, gives the reason
        data = await answer
    finally:
        await give_up(answer)
    if data is None:
        raise PeerDown("the call ended without an answer")
    if data != ACCEPTED:
        raise read_refusal(data)


async def hear(ends: LinkTable, peer: PeerId, write: Callable[[bytes], Awaitable[Any]], read: Read) -> None:
    """Read a message, have it taken, write the answer; chunks that are still in flight are discarded."""
    first = await read()
    if first is None:
        raise PeerDown("the call ended without a message")
    try:
        length, header = opening(first)
        await ends.take(peer, header, length, read)
    except Refused as refusal:
        await write(refusal_bytes(refusal))
    else:
        await write(ACCEPTED)
    await throw_away(read)


async def throw_away(read: Read) -> None:
    """Discard the chunks that an honest sender may still have in flight, and no more."""
    for _ in range(OVERRUN):
        if await read() is None:
            return


def reader(call: Any) -> Read:
    """Wrap ``call.read``: None at the end of the call."""

    async def read() -> bytes | None:
        try:
            chunk = await call.read()
        except aio.InternalError:  # an answering side's call that is over
            return None
        return chunk if isinstance(chunk, bytes) else None

    return read


def writer(context: Any) -> Callable[[bytes], Awaitable[None]]:
    """Wrap ``context.write`` of an answering side: PeerDown where the call is over."""

    async def write(data: bytes) -> None:
        try:
            await context.write(data)
        except aio.InternalError:
            raise PeerDown("the call broke off") from None

    return write


def refusal_bytes(refusal: Refused) -> bytes:
    """Encode a refusal for the other side; at most about 300 bytes."""
    return msgspec.msgpack.encode((refusal.reason, refusal.detail[:200]))


def read_refusal(data: bytes) -> Refused:
    """Decode a refusal of the other side, which may use unknown reasons or be too long."""
    try:
        reason, detail = msgspec.msgpack.decode(data[:4096], type=tuple[str, str])
    except (msgspec.MsgspecError, ValueError):
        return Refused("unknown-reason")
    detail = printable(detail, 200)
    return Refused(reason, detail) if reason in REASONS else Refused("unknown-reason", detail)


def options(timing: Timing) -> list[tuple[str, int]]:
    """Settings of gRPC at both ends."""
    return [
        ("grpc.so_reuseport", 0),  # else two processes may share a port unnoticed
        ("grpc.max_receive_message_length", CHUNK + HEADER_BYTES),
        ("grpc.max_send_message_length", CHUNK + HEADER_BYTES),
        ("grpc.max_metadata_size", 8192),
        ("grpc.max_concurrent_streams", 8),
        ("grpc.initial_reconnect_backoff_ms", round(1000 * timing.backoff[0])),
        ("grpc.max_reconnect_backoff_ms", round(1000 * timing.backoff[1])),
        ("grpc.min_reconnect_backoff_ms", round(1000 * timing.handshake)),  # also the time a connection may take
        ("grpc.keepalive_time_ms", 5000),
        ("grpc.keepalive_timeout_ms", 3000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 4000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.enable_http_proxy", 0),  # else an environment variable could redirect the connection
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),  # one channel, one connection, for one edge
    ]
