"""Web server of an ASGI application."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from typing import Any

from halodet.errors import ConfigError
from halodet.serving.asgi import App

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["listen", "make_server"]

_CONNECTIONS = 64
_SHUTDOWN_SECONDS = 5
_STREAMS = ("/gradio_api/heartbeat/", "/gradio_api/queue/data")  # events of the page, without an end


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket.

    Raises:
        ConfigError: the port is in use, or the host and port cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # a name that is too long, or has an empty part
        reason = getattr(error, "strerror", None) or "it is no name of a host"
        raise ConfigError(f"--host {host} is invalid: {reason}. Fix: use 127.0.0.1.") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_CONNECTIONS)  # otherwise a second process could bind the port while the model is loaded
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            message = f"--port {port} is invalid: another process uses it. Fix: use another port, or stop that process."
        elif error.errno == errno.EACCES:
            message = f"--port {port} is invalid: this user may not bind it. Fix: use a port above 1023."
        else:
            message = f"--host {host} --port {port} is invalid: {error.strerror}. Fix: use --host 127.0.0.1."
        raise ConfigError(message) from error
    return bound


def make_server(app: App, seconds: float) -> uvicorn.Server:
    """Return the server of an application; ``server.run(sockets=[listen(...)])`` serves until Ctrl-C or SIGTERM.

    Args:
        app: the application.
        seconds: time for the headers of a request to arrive.
    """
    log = logging.getLogger("uvicorn.error")
    log.setLevel(logging.WARNING)
    log.addFilter(_is_no_cancellation)
    protocol = type("Protocol", (_Connection,), {"header_seconds": seconds})
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        )
    )


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Return whether a record is not the traceback of a task that the end of the server has cancelled."""
    cancelled = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cancelled and "CancelledError" not in record.getMessage()


class _Connection(H11Protocol):
    """HTTP connection that ends where uvicorn waits: for headers that do not arrive, and for streams at the end."""

    header_seconds: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.header_seconds, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.header_seconds, self.transport.close)

    def shutdown(self) -> None:
        has_stream = self.cycle is not None and not self.cycle.response_complete
        if has_stream and self.scope["path"].startswith(_STREAMS):
            self.transport.close()
        else:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
