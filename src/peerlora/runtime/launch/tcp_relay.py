"""A TCP relay on this machine whose directions can be cut: how ``launch`` cuts links between real processes."""

from __future__ import annotations

import asyncio
from contextlib import suppress

_PIECE = 1 << 16  # bytes read at once


class Relay:
    """Accepts connections on a port of its own and forwards them to ``port``; ``cut`` stops bytes, not connections."""

    def __init__(self, port: int):
        self.port = port
        self.flows = {True: asyncio.Event(), False: asyncio.Event()}
        """Direction (True: from the dialling side) -> set while bytes pass."""
        for flow in self.flows.values():
            flow.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[None] | None] = set()

    async def start(self, listen: int) -> None:
        """Open the port ``listen``."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", listen)

    def cut(self, forward: bool, cut: bool) -> None:
        """Stop or resume the bytes of one direction."""
        (self.flows[forward].clear if cut else self.flows[forward].set)()

    async def close(self) -> None:
        """End all connections."""
        self._server.close()
        calls = [call for call in self._calls if call is not None]
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        call = asyncio.current_task()
        self._calls.add(call)
        try:
            await self._forward_both(reader, writer)
        finally:
            self._calls.discard(call)

    async def _forward_both(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            beyond_reader, beyond_writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            writer.close()
            return
        ways = ((reader, beyond_writer, True), (beyond_reader, writer, False))
        tasks = [asyncio.create_task(self._forward(*way)) for way in ways]
        self._tasks |= set(tasks)
        with suppress(asyncio.CancelledError):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        self._tasks -= set(tasks)
        for end in (writer, beyond_writer):
            end.close()
            with suppress(ConnectionError, asyncio.CancelledError):
                await end.wait_closed()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, forward: bool) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(_PIECE):
                await self.flows[forward].wait()
                writer.write(data)
                await writer.drain()
