"""gRPC server of one port, whose certificate can be renewed while it runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc
from grpc import aio

from peerlora.network.base import TransportError
from peerlora.network.identity.identity import Identity
from peerlora.network.transport import frames
from peerlora.network.transport.heartbeat import Timing, give_up

_GRACE = 4  # times Timing.handshake: until then every session of the server before has been opened anew
_BUSY = 0.02  # seconds between two tries to open a port that the server before is about to close
_BUSY_LONG = 1.0  # seconds, the same, once it has taken longer than the grace


class TlsServer:
    """Server with mutual TLS; a renewed certificate is shown by a new server, which takes the port over.

    A running server's certificate must not be changed: gRPC then frees what handshakes in progress still use, and the
    process dies (bench/handshakes.py: 1 of 3 runs with 400 renewals each, and all runs when every handshake changed
    it).  The server before keeps its connections until their sessions were opened anew, and takes no more of them.

    ``calls``: the most at once.  ``connections``: the most at once, of each server.  ``began`` is called at every new
    connection, from gRPC's own threads.
    """

    def __init__(
        self,
        handlers: dict[str, grpc.RpcMethodHandler],
        timing: Timing,
        calls: int,
        connections: int,
        began: Callable[[], None],
    ):
        self.handlers, self.timing, self.calls, self.began = handlers, timing, calls, began
        self.connections = connections
        self.port = 0
        self._host = ""
        self._server: aio.Server | None = None
        self._before: set[asyncio.Future[None]] = set()

    async def start(self, address: str, identity: Identity) -> None:
        """Open the port; raises TransportError where that fails."""
        server = self._new()
        try:
            self.port = server.add_secure_port(address, self._credentials(identity))
        except RuntimeError:
            raise TransportError(
                f"cannot listen at {address}; is the address of this machine, and the port free and allowed?"
            ) from None
        self._host = address.rpartition(":")[0]
        await server.start()
        self._server = server

    async def renew(self, identity: Identity) -> None:
        """Show another certificate to whoever connects from now on; calls in progress go on."""
        if self._server is None:
            return
        grace = _GRACE * self.timing.handshake
        stopping = asyncio.ensure_future(self._server.stop(grace))
        self._before.add(stopping)
        stopping.add_done_callback(self._before.discard)
        self._server = server = self._new()
        loop = asyncio.get_running_loop()
        late, warned = loop.time() + grace, False
        await asyncio.sleep(_BUSY)
        while not self._opened(server, identity):
            long = loop.time() > late
            if long and not warned:
                logging.getLogger(__name__).warning("port %s is taken by another program; trying again", self.port)
            warned = long
            await asyncio.sleep(_BUSY_LONG if long else _BUSY)
        await server.start()

    async def close(self) -> None:
        """Close the port and every call."""
        if self._server is not None:
            await self._server.stop(0)
        await give_up(*self._before)

    def _opened(self, server: aio.Server, identity: Identity) -> bool:
        try:
            return server.add_secure_port(f"{self._host}:{self.port}", self._credentials(identity)) == self.port
        except RuntimeError:
            return False

    def _new(self) -> aio.Server:
        settings = [*frames.options(self.timing), *self._limits()]
        server = aio.server(options=settings, maximum_concurrent_rpcs=self.calls)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(frames.SERVICE, self.handlers),))
        return server

    def _limits(self) -> list[tuple[str, int]]:
        """What a stranger may use up."""
        return [
            ("grpc.server_handshake_timeout_ms", round(1000 * self.timing.handshake)),  # gRPC's own is 120 s
            ("grpc.max_allowed_incoming_connections", self.connections),
        ]

    def _credentials(self, identity: Identity) -> grpc.ServerCredentials:
        shown = grpc.ssl_server_certificate_configuration([(identity.key, identity.certificate)], identity.roots)
        return grpc.dynamic_ssl_server_credentials(shown, self._shake, True)

    def _shake(self) -> Any:
        """Count a connection.  None keeps the certificate: gRPC must never be given another one here."""
        self.began()
        return None
