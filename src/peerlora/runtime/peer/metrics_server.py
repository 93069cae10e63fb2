"""Metrics server: /metrics, /healthz and /readyz of one peer over plain HTTP, read-only."""

from __future__ import annotations

import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from peerlora.errors import ConfigError
from peerlora.runtime.peer.open_metrics import PeerMetrics

_PLAIN = "text/plain; charset=utf-8"


class MetricsServer:
    """Serves a peer's metrics until the block ends; a context manager.

    ``address``: host:port, or [v6]:port.  /metrics in the format that is asked for, OpenMetrics or Prometheus's own.
    /healthz says 200 while the process lives, /readyz 200 while it is in its rounds, else 503 and why.  Raises
    ConfigError where the address is none or cannot be opened.
    """

    def __init__(self, address: str, metrics: PeerMetrics):
        found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})", address)
        if not found or int(found[2]) > 65535:
            raise ConfigError(f"--metrics {address} given; expected HOST:PORT, such as 127.0.0.1:9464 or [::1]:9464")
        try:
            self._server = _Server((found[1].strip("[]"), int(found[2])), metrics)
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"--metrics {address} cannot be opened ({error}); choose another port") from None
        self.port = int(self._server.server_address[1])

    def __enter__(self) -> MetricsServer:
        threading.Thread(target=self._server.serve_forever, args=(0.2,), name="metrics", daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], metrics: PeerMetrics):
        self.metrics = metrics
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind without HTTPServer's reverse look-up of the own name, for which a resolver may take long."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds for a request's bytes
    server: _Server

    def do_GET(self) -> None:
        status, kind, body = self._answer(self.path.partition("?")[0])
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer(self, path: str) -> tuple[int, str, bytes]:
        metrics = self.server.metrics
        if path == "/metrics":
            from prometheus_client.exposition import choose_encoder  # pyright: ignore[reportMissingImports]

            encode, kind = choose_encoder(self.headers.get("Accept", ""))
            return 200, kind, encode(metrics.registry)
        if path == "/healthz":
            return 200, _PLAIN, b"ok\n"
        if path == "/readyz":
            return (200 if metrics.state == "running" else 503), _PLAIN, f"{metrics.state}\n".encode()
        return 404, _PLAIN, b"not found: /metrics, /healthz and /readyz are here\n"

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: every scrape would be a line."""
