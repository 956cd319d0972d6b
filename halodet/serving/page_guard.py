"""Filter in front of Gradio's routes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halodet.serving.asgi import App, Message, Receive, Scope, Send, replay, send_error

__all__ = ["PageGuard"]

_PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
_PREFIXES = ("/assets/", "/static/", "/gradio_api/heartbeat/")
_GET = ("/gradio_api/queue/data", "/gradio_api/upload_progress", "/gradio_api/startup-events", "/gradio_api/app_id")
_POST = ("/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/cancel", "/gradio_api/reset")
_RUN = "/gradio_api/run/"  # of functions that Gradio does not queue; it refuses the others
_FILE = "/gradio_api/file="
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'; object-src 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class PageGuard:
    """ASGI middleware that passes only the requests of the page to Gradio.

    Gradio also has routes that fetch other hosts and edit the program. A file of a
    request must have been uploaded: Gradio, when it is mounted into another application, also takes names of other
    files of the server, and addresses of other hosts. Answers forbid the browser to load anything from other hosts.

    Args:
        app: Gradio's application.
        folder: folder of the uploads and of the files for download.
        max_bytes: maximum size of this folder, above which the oldest files are deleted, but those of the start.
    """

    def __init__(self, app: App, folder: str | os.PathLike[str], max_bytes: int) -> None:
        self._app, self._folder, self._max_bytes = app, Path(folder).resolve(), max_bytes
        self._kept = frozenset(self._files())  # examples

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = [name for name, _ in _HEADERS]
                kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in names]
                message = {**message, "headers": [*kept, *_HEADERS]}
            await send(message)

        # A mounted application has the path of its mount in front.
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if not self._is_allowed(scope["method"], path):
            await send_error(send_with_headers, 404, "Not Found: expected a route of /docs.")
            return
        if scope["method"] == "POST":
            self._make_room()
        if path == "/gradio_api/queue/join" or path.startswith(_RUN):
            body = await _read_body(receive)
            if not self._has_only_uploads(body):
                await send_error(send_with_headers, 403, "The request names a file that was not uploaded.")
                return
            receive = replay(body, receive)
        await self._app(scope, receive, send_with_headers)

    def _is_allowed(self, method: str, path: str) -> bool:
        if method == "POST":
            return path in _POST or path.startswith(_RUN)
        if method not in ("GET", "HEAD"):
            return False
        if path.startswith(_FILE):
            return self._is_upload(path.removeprefix(_FILE))
        return path in _PAGES or path in _GET or path.startswith(_PREFIXES)

    def _make_room(self) -> None:
        """Delete the oldest files above the maximum size."""
        deletable = (file for file in self._files() if file not in self._kept)
        files = sorted((found for file in deletable if (found := _age(file))), reverse=True)
        size = 0
        for _, file, bytes_ in files:
            size += bytes_
            if size > self._max_bytes:
                with contextlib.suppress(OSError):
                    os.unlink(file)

    def _files(self) -> Iterator[str]:
        for root, _, names in os.walk(self._folder):
            for name in names:
                yield os.path.join(root, name)

    def _is_upload(self, name: str) -> bool:
        try:
            file = Path(os.path.realpath(name))
        except (OSError, ValueError):  # a null character, a name that is too long
            return False
        return os.path.isabs(name) and file != self._folder and file.is_relative_to(self._folder)

    def _has_only_uploads(self, body: bytes) -> bool:
        try:
            pending: list[Any] = [json.loads(body)]
        except (ValueError, RecursionError):
            return False
        while pending:
            value = pending.pop()
            if isinstance(value, dict):
                name = value.get("path")
                if name is not None and not (isinstance(name, str) and self._is_upload(name)):
                    return False
                pending += value.values()
            elif isinstance(value, list):
                pending += value
        return True


def _age(file: str) -> tuple[float, str, int] | None:
    """Return when a file was written, its name and its size; None if it is deleted meanwhile."""
    with contextlib.suppress(OSError):
        status = os.lstat(file)
        return status.st_mtime, file, status.st_size
    return None


async def _read_body(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return bytes(body)
