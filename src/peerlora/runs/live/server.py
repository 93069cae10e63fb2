"""The server of the page: read-only, on the loopback address, behind a random token in its address."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from peerlora.environment import need_extra
from peerlora.errors import ConfigError
from peerlora.runs.events import plain
from peerlora.runs.live.source import GridSource, RunSource

_EVERY = 0.25  # seconds between two looks at the folder
_ASSETS = {
    "watch.js": "text/javascript",
    "watch.css": "text/css",
    "uPlot.iife.min.js": "text/javascript",
    "uPlot.min.css": "text/css",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PageServer:
    """Serves the page of a run or of a comparison; nothing in its folder is ever written.

    ``host``, ``port``: where; port 0 takes a free one.  Raises ExtraMissing without starlette and uvicorn, ConfigError
    where the address cannot be opened.
    """

    def __init__(self, source: RunSource | GridSource, host: str = "127.0.0.1", port: int = 0):
        need_extra("watch")
        self.source, self.token = source, secrets.token_urlsafe(16)
        self.host = host
        self.socket = _bound(host, port)
        self.port = int(self.socket.getsockname()[1])
        self.cells: dict[str, RunSource] = {}
        self.ended = asyncio.Event()

    @property
    def address(self) -> str:
        """The page's address, token included."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/{self.token}/"

    def run(self) -> None:
        """Serve until the process is interrupted."""
        import uvicorn  # pyright: ignore[reportMissingImports]

        config = uvicorn.Config(
            self.app(), log_level="warning", access_log=False, lifespan="on", ws="none", timeout_graceful_shutdown=1
        )
        uvicorn.Server(config).run(sockets=[self.socket])

    def app(self) -> Any:
        """The application, which answers GET only."""
        from starlette.applications import Starlette  # pyright: ignore[reportMissingImports]
        from starlette.routing import Route  # pyright: ignore[reportMissingImports]

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[None]:
            task = asyncio.create_task(self._follow())
            yield
            task.cancel()
            self.ended.set()

        at = "/{token}"
        routes = [
            Route(f"{at}/", self._page),
            Route(f"{at}/events", self._events),
            Route(f"{at}/client/{{number:int}}", self._client),
            Route(f"{at}/{{name:path}}", self._asset),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    async def _follow(self) -> None:
        while True:
            fresh = await asyncio.to_thread(self.source.poll)
            for cell in list(self.cells.values()):
                fresh |= await asyncio.to_thread(cell.poll)
            await asyncio.sleep(0 if fresh else _EVERY)

    def _admits(self, request: Any) -> bool:
        """Whether a request knows the token, and no other site's name leads here (DNS rebinding)."""
        name = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
        local = name.strip("[]") in ("127.0.0.1", "localhost", "::1", self.host)
        return local and secrets.compare_digest(request.path_params["token"].encode(), self.token.encode())

    async def _page(self, request: Any) -> Any:
        return self._file(request, "watch.html", "text/html")

    async def _asset(self, request: Any) -> Any:
        name = request.path_params["name"]
        return self._file(request, name, _ASSETS[name]) if name in _ASSETS else _refused()

    def _file(self, request: Any, name: str, kind: str) -> Any:
        from starlette.responses import Response  # pyright: ignore[reportMissingImports]

        if not self._admits(request):
            return _refused()
        body = files("peerlora.runs").joinpath("assets", name).read_bytes()
        return Response(body, media_type=kind, headers=_HEADERS)

    async def _client(self, request: Any) -> Any:
        from starlette.responses import Response  # pyright: ignore[reportMissingImports]

        source = self._source(request)
        if not self._admits(request) or not isinstance(source, RunSource):
            return _refused()
        number = request.path_params["number"]
        if not 0 <= number < source.live.loss.clients:
            return _refused()
        with source.lock:
            body = _dump(source.live.client(number))
        return Response(body, media_type="application/json", headers=_HEADERS)

    def _source(self, request: Any) -> RunSource | GridSource | None:
        """The run that is asked for: of a comparison, the one of ``?cell=``."""
        name = request.query_params.get("cell")
        if name is None or not isinstance(self.source, GridSource):
            return self.source
        if name not in self.source.cells:
            return None
        return self.cells.setdefault(name, RunSource(self.source.folder / name))

    async def _events(self, request: Any) -> Any:
        from starlette.responses import StreamingResponse  # pyright: ignore[reportMissingImports]

        source = self._source(request)
        if not self._admits(request) or source is None:
            return _refused()
        stream = _grid_stream(source, self.ended) if isinstance(source, GridSource) else _run_stream(source, self.ended)
        return StreamingResponse(stream, media_type="text/event-stream", headers=_HEADERS)


async def _run_stream(source: RunSource, ended: asyncio.Event) -> AsyncIterator[str]:
    """All of a run, then what changes; each reader has its own mark of what it knows."""
    version, known, standing = None, _Mark(), None
    while not ended.is_set():
        if version != source.version:
            version, known = source.version, _Mark()
            yield _message("snapshot", await asyncio.to_thread(known.changes, source))
        elif known.behind(source):
            yield _message("update", await asyncio.to_thread(known.changes, source))
        now = source.standing()
        if now != standing:
            standing = now
            yield _message("standing", now)
        await asyncio.sleep(_EVERY)


async def _grid_stream(source: GridSource, ended: asyncio.Event) -> AsyncIterator[str]:
    told = None
    while not ended.is_set():
        if (text := _message("grid", {"folder": source.folder.name, "cells": list(source.cells.values())})) != told:
            told = text
            yield text
        await asyncio.sleep(_EVERY)


class _Mark:
    """What one reader of a run knows."""

    def __init__(self):
        self.rounds = self.notices = -1
        self.seen: tuple[int, ...] = ()

    def behind(self, source: RunSource) -> bool:
        return self.seen != _counts(source)

    def changes(self, source: RunSource) -> dict[str, Any]:
        """What is new to this reader: from the last round that it knows on, which peers may add to."""
        with source.lock:
            found = source.live.since(self.rounds, self.notices)
            self.seen, self.notices = _counts(source), source.live.numbered
            self.rounds = max(source.live.rounds, default=-1)
        return found


def _counts(source: RunSource) -> tuple[int, ...]:
    live = source.live
    return live.taken, live.numbered


def _message(event: str, body: dict[str, Any]) -> str:
    return f"event: {event}\ndata: {_dump(body)}\n\n"


def _dump(body: dict[str, Any]) -> str:
    return json.dumps(plain(body), allow_nan=False, separators=(",", ":"))


def _refused() -> Any:
    from starlette.responses import PlainTextResponse  # pyright: ignore[reportMissingImports]

    return PlainTextResponse("not found\n", 404)


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen()
    except OSError as error:
        made.close()
        raise ConfigError(f"{host}:{port} cannot be opened ({error.strerror}); choose another --port") from None
    return made
