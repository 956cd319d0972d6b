"""Limits on the size and the time of HTTP requests."""

from __future__ import annotations

import asyncio

from halodet.serving.asgi import App, Message, Receive, Scope, Send, replay, send_error

__all__ = ["RequestLimits"]

_BODIES = 8  # bodies of the maximum size that may be in memory at a time
_HEADERS = (b"content-length", b"expect", b"sec-fetch-site")  # browsers send the last one
_DISCARDED = 4  # multiple of the maximum size that is read and discarded, so that a client can read the answer


class RequestLimits:
    """ASGI middleware that receives the whole body of a request before the application sees the request.

    A body that is too large is answered with 413, one that does not arrive in time with 408, one for which the server
    has no memory left with 503, and a POST request that a page of another site makes with 403. A client that does not
    read its answer in time is disconnected.

    Args:
        app: the application.
        max_bytes: maximum size of a body.
        seconds: time for a body to arrive, and for each part of an answer to be taken.
    """

    def __init__(self, app: App, max_bytes: int, seconds: float) -> None:
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds
        self._buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_in_time(message: Message) -> None:
            await asyncio.wait_for(send(message), self._seconds)

        request = _Body()
        try:
            await asyncio.wait_for(self._receive(scope, receive, request), self._seconds)
        except asyncio.TimeoutError:
            request.error = 408, f"The request did not arrive within {self._seconds:g} seconds."
        try:
            if request.error is not None:
                await send_error(send_in_time, *request.error)
            elif not request.is_disconnected:
                await self._app(scope, replay(bytes(request.data), receive), send_in_time)
        finally:
            self._buffered -= len(request.data)

    async def _receive(self, scope: Scope, receive: Receive, request: _Body) -> None:
        """Receive the body into ``request``, or discard it after an error."""
        headers = {name: value for name, value in scope["headers"] if name in _HEADERS}
        if scope["method"] == "POST" and headers.get(b"sec-fetch-site") == b"cross-site":
            request.error = 403, "The request comes from a page of another site."
        announced = int(headers.get(b"content-length", b"0"))  # the web server rejects others than digits
        if announced > self._max_bytes:
            request.error = self._too_large()
            if b"expect" in headers:  # the client waits for the answer before it sends the body
                return
        discarded = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                request.is_disconnected = True
                return
            chunk = message.get("body", b"")
            if request.error is None:
                if len(request.data) + len(chunk) > self._max_bytes:
                    request.error = self._too_large()
                elif self._buffered + len(chunk) > _BODIES * self._max_bytes:
                    request.error = 503, "The server receives too many requests. Fix: try again later."
                else:
                    request.data += chunk
                    self._buffered += len(chunk)
            else:
                discarded += len(chunk)
            if not message.get("more_body", False) or discarded > _DISCARDED * self._max_bytes:
                return

    def _too_large(self) -> tuple[int, str]:
        return 413, f"The request is too large: expected at most {self._max_bytes:,} bytes. Fix: send a smaller file."


class _Body:
    """Body of a request, and the status and message of an error."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.error: tuple[int, str] | None = None
        self.is_disconnected = False
