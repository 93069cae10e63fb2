"""The server of the page: read-only, on the loopback address unless asked for another, behind a random token."""

from __future__ import annotations

import asyncio
import errno
import json
import re
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from peerlora.environment import need_extra
from peerlora.errors import ConfigError, first_line
from peerlora.runs.events import plain
from peerlora.runs.live.source import GridSource, RunSource

Answer = Callable[[Any], Awaitable[Any]]
_ALL_ADDRESSES = ("0.0.0.0", "::")
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
        """The page's address, token included; with the machine's name where all of its addresses are open."""
        host = socket.gethostname() if self.host in _ALL_ADDRESSES else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/{self.token}/"

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

        answers = {
            "": self._page,
            "events": self._events,
            "client/{number}": self._client,
            "{name:path}": self._asset,
        }
        routes = [Route(f"/{{token}}/{path}", self._admitted(answer)) for path, answer in answers.items()]
        return Starlette(routes=routes, lifespan=lifespan)

    async def _follow(self) -> None:
        """Look at the folder again and again; what fails is shown on the page, and costs one look."""
        while True:
            fresh = False
            for source in (self.source, *self.cells.values()):
                try:
                    fresh |= await asyncio.to_thread(source.poll)
                    source.trouble = ""
                except Exception as error:  # of any kind: the page must not stand still without a word
                    source.trouble = first_line(error)
            await asyncio.sleep(0 if fresh else _EVERY)

    def _admitted(self, answer: Answer) -> Answer:
        """Answer those only who are admitted; nothing is read before."""

        async def answer_admitted(request: Any) -> Any:
            return await answer(request) if self._admits(request) else _refused()

        return answer_admitted

    def _admits(self, request: Any) -> bool:
        """Whether a request knows the token, and no other site's name leads to a loopback address (DNS rebinding).

        A server that others may reach has names and addresses that it does not know; there the token has to do.
        """
        known = secrets.compare_digest(request.path_params["token"].encode(), self.token.encode())
        return known and (not _is_loopback(self.host) or _is_loopback(_named_host(request)))

    async def _page(self, request: Any) -> Any:
        return _file("watch.html", "text/html")

    async def _asset(self, request: Any) -> Any:
        name = request.path_params["name"]
        return _file(name, _ASSETS[name]) if name in _ASSETS else _refused()

    async def _client(self, request: Any) -> Any:
        from starlette.responses import Response  # pyright: ignore[reportMissingImports]

        source, number = self._source(request), request.path_params["number"]
        if not isinstance(source, RunSource) or not re.fullmatch(r"[0-9]{1,9}", number):
            return _refused()
        with source.lock:
            if int(number) >= source.live.loss.clients:
                return _refused()
            body = _dump(source.live.client(int(number)))
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
        if source is None:
            return _refused()
        stream = _grid_stream(source, self.ended) if isinstance(source, GridSource) else _run_stream(source, self.ended)
        return StreamingResponse(stream, media_type="text/event-stream", headers=_HEADERS)


async def _run_stream(source: RunSource, ended: asyncio.Event) -> AsyncIterator[str]:
    """All of a run, then what changes; each reader has its own mark of what it knows."""
    version, known, standing = None, _Mark(), None
    while not ended.is_set():
        try:
            changed = "snapshot" if version != source.version else "update" if known.behind(source) else ""
            if changed == "snapshot":
                version, known = source.version, _Mark()
            text = _message(changed, await asyncio.to_thread(known.changes, source)) if changed else ""
            now = source.standing()
        except Exception as error:  # as in `_follow`
            text, now = "", {"state": "unknown", "trouble": first_line(error)}
        if text:
            yield text
        if now != standing:
            standing = now
            yield _message("standing", now)
        await asyncio.sleep(_EVERY)


async def _grid_stream(source: GridSource, ended: asyncio.Event) -> AsyncIterator[str]:
    sent = None
    while not ended.is_set():
        grid = {
            "folder": source.folder.name,
            "cells": list(source.cells.values()),
            "trouble": source.trouble or source.lacking,
        }
        if (text := _message("grid", grid)) != sent:
            sent = text
            yield text
        await asyncio.sleep(_EVERY)


class _Mark:
    """What one reader of a run knows."""

    def __init__(self):
        self.events = self.notices = -1
        self.seen: tuple[int, ...] = ()

    def behind(self, source: RunSource) -> bool:
        return self.seen != _counts(source)

    def changes(self, source: RunSource) -> dict[str, Any]:
        """What is new to this reader: the rounds of which later events tell, which may be old ones of a slow peer."""
        with source.lock:
            found = source.live.since(self.events, self.notices)
            self.seen, self.notices = _counts(source), source.live.numbered
            self.events = source.live.taken
        return found


def _counts(source: RunSource) -> tuple[int, ...]:
    live = source.live
    return live.taken, live.numbered


def _message(event: str, body: dict[str, Any]) -> str:
    return f"event: {event}\ndata: {_dump(body)}\n\n"


def _dump(body: dict[str, Any]) -> str:
    return json.dumps(plain(body), allow_nan=False, separators=(",", ":"))


def _file(name: str, kind: str) -> Any:
    from starlette.responses import Response  # pyright: ignore[reportMissingImports]

    body = files("peerlora.runs").joinpath("assets", name).read_bytes()
    return Response(body, media_type=kind, headers=_HEADERS)


def _refused() -> Any:
    from starlette.responses import PlainTextResponse  # pyright: ignore[reportMissingImports]

    return PlainTextResponse("not found\n", 404)


def _named_host(request: Any) -> str:
    """The host that a request asks for, without the port; an empty string where it names none."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen()
    except (OSError, UnicodeError) as error:
        made.close()
        reason = error.strerror if isinstance(error, OSError) else "no name of a host"
        what = "--port" if isinstance(error, OSError) and error.errno == errno.EADDRINUSE else "--host or --port"
        raise ConfigError(f"{host}:{port} cannot be opened ({reason}); choose another {what}") from None
    return made
