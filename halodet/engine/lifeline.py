"""The processes of a run hold a connection to each other, so that none waits for one that is gone."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
import weakref
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from halodet.engine.preemption import SIGNALS

import torch.distributed as dist
from detectron2.utils import comm

logger = logging.getLogger(__name__)

EXIT_RANK_LOST = 76  # of every process that ends because another one did
_JOIN_SECONDS, _HELLO_SECONDS, _SETTLE_SECONDS, _LINGER_SECONDS = 60.0, 5.0, 5.0, 3.0
_SAME_SECONDS = 1.0  # in which processes find the same mistake
_SILENT = "it was killed, or its machine is gone"


class Lifeline:
    """A connection from each process to that of rank 0, over which an end is told; made by all processes together.

    PyTorch's own collectives wait for a process that has ended until their time-out, and then name a socket. The operating system,
    however, closes a process's connections the moment it ends, however it ends, and asks a silent machine every few seconds whether it is
    still there (TCP keep-alive: 30 seconds until it counts as lost); no work of Python's is needed for either. A process that only hangs
    keeps its connection: that is left to the time-out of the process group.

    On the end of another process this one logs ``rank R on HOST ended: WHY``, prints it to stderr, and ends with
    :data:`EXIT_RANK_LOST`, wherever it is; checkpoints are written so that this does not harm them.

    Args:
        host: address of the machine of rank 0; not used where all processes are on one.
    """

    def __init__(self, host: str) -> None:
        self.rank = comm.get_rank()
        listener = _listener() if self.rank == 0 else None
        told = comm.all_gather(
            (socket.gethostname(), listener.getsockname()[1] if listener else 0, secrets.token_hex(16))
        )
        self.hosts, token = [name for name, _, _ in told], told[0][2]
        self._lock, self._heard, self._failing, self._ending = (
            threading.Lock(),
            threading.Event(),
            threading.Event(),
            False,
        )
        self._verdict: dict[str, Any] = {}
        self._peers: dict[Connection, int] = {}
        self._connection: Connection | None
        if listener:
            self._connection, own = Pipe()
            self._peers = {
                **_accept(listener, token, len(told) - 1),
                own: 0,
            }  # itself last: it ends once all others were told
            threading.Thread(target=self._serve, name="lifeline-server", daemon=True).start()
        else:
            self._connection = _connect(
                "127.0.0.1" if comm.get_local_size() == len(told) else host, told[0][1], f"{token} {self.rank}"
            )
        if self._connection:
            _close_in_children(self)
            self._listener = threading.Thread(target=self._listen, name="lifeline", daemon=True)
            self._listener.start()

    def failed(self, text: str, *, network: bool = False) -> str | None:
        """Tell the others that this process ends, and why.

        Args:
            text: one sentence.
            network: the reason is a broken exchange, so probably that another process has ended.

        Returns:
            The message about another process whose end came first and explains this one's, or None.
        """
        if not self._connection:
            return None
        with self._lock:
            self._failing.set()
            ending = self._ending
        if ending:  # this process too, which has told why: often the very same
            self._listener.join()
        with suppress(OSError):
            self._send({"failed": " ".join(text.split())[:2000], "network": network})
        self._heard.wait(2 * _SETTLE_SECONDS)
        if self.rank == 0:
            time.sleep(1.0)  # for the others to read what they were told: they do not get it once this end is closed
        own = not self._verdict or self._verdict.get("rank") == self.rank or self._verdict.get("text") == text
        return None if own else self._message()

    def close(self, *, seconds: float | None = None) -> None:
        """Leave without alarm, when all others have come to their end too, or after ``seconds`` of waiting for that."""
        if not self._connection:
            return
        with suppress(OSError):
            self._send({"left": True})
        self._heard.wait(seconds)

    def _send(self, message: dict[str, Any]) -> None:
        self._connection.send_bytes(json.dumps(message).encode())

    def _message(self) -> str:
        rank = self._verdict["rank"]
        return f"rank {rank} on {self.hosts[rank]} ended: {self._verdict['text']}"

    def _listen(self) -> None:
        verdict = _receive(self._connection) or {"rank": 0, "text": _SILENT}
        with self._lock:
            self._verdict = {} if "over" in verdict else verdict
        self._heard.set()
        if not self._verdict:
            return
        if verdict["text"] != _SILENT:
            self._failing.wait(_SAME_SECONDS)
        with self._lock:
            if self._failing.is_set():  # the main thread tells of it, once
                return
            self._ending = True
        end(self._message())

    def _serve(self) -> None:
        """On rank 0: wait for the first end, and tell all."""
        waiting, network, deadline = dict(self._peers), None, None
        while waiting:
            for peer in wait(list(waiting), None if deadline is None else max(0.0, deadline - time.monotonic())):
                message, rank = _receive(peer), waiting.pop(peer)
                if message is None or not message.get("network", True):
                    return self._tell({"rank": rank, "text": message["failed"] if message else _SILENT})
                if (
                    "failed" in message and network is None
                ):  # broken exchanges are told first of all, and explain nothing
                    network, deadline = {"rank": rank, "text": message["failed"]}, time.monotonic() + _SETTLE_SECONDS
            if network and (time.monotonic() >= deadline or not waiting):
                return self._tell(network)
        self._tell({"over": True})

    def _tell(self, verdict: dict[str, Any]) -> None:
        for peer in self._peers:
            with suppress(OSError):
                peer.send_bytes(json.dumps(verdict).encode())


def finish_undisturbed() -> None:
    """Let this process end with its own exit code: Slurm and torchrun send SIGTERM to the others as soon as the first one has left."""
    if threading.current_thread() is threading.main_thread():  # Python has it so
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def end(message: str) -> None:
    """Log ``message`` and leave at once: the process's other threads may be waiting for something that never comes."""
    logger.error(message)
    if comm.get_rank() > 0:  # whose log goes to a file only
        print(f"[rank {comm.get_rank()}] {message}", file=sys.stderr)
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    time.sleep(
        _LINGER_SECONDS
    )  # rank 0 as in Lifeline.failed; all, so that torchrun sees the process that is the cause end first
    os._exit(EXIT_RANK_LOST)


def is_network_error(error: BaseException) -> bool:
    """Whether ``error`` is one of exchanging something with other processes."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _receive(connection: Connection) -> dict[str, Any] | None:
    """The next message; None when the other end is closed or gone."""
    try:
        return json.loads(connection.recv_bytes(65536))
    except (EOFError, OSError):
        return None


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _accept(listener: socket.socket, token: str, count: int) -> dict[Connection, int]:
    """The connections of ``count`` processes that know the token; whatever else connects is turned away."""
    peers: dict[Connection, int] = {}
    deadline = time.monotonic() + _JOIN_SECONDS
    with listener:
        while len(peers) < count and time.monotonic() < deadline:
            listener.settimeout(max(0.1, deadline - time.monotonic()))
            with suppress(OSError, EOFError):
                peer = _watched(listener.accept()[0])
                hello = peer.recv_bytes(256).decode(errors="replace").split() if peer.poll(_HELLO_SECONDS) else []
                if len(hello) == 2 and secrets.compare_digest(hello[0], token):
                    peers[peer] = int(hello[1])
    if len(peers) < count:
        logger.warning(
            f"{count - len(peers)} of {count} processes did not connect to rank 0: if they end, that is noticed late."
        )
    return peers


def _connect(host: str, port: int, hello: str) -> Connection | None:
    try:
        connection = _watched(socket.create_connection((host, port), timeout=_JOIN_SECONDS))
        connection.send_bytes(hello.encode())
    except OSError as error:
        logger.warning(
            f"Rank 0 cannot be reached at {host}:{port} ({error.strerror or error}): if a process ends, that is noticed late."
        )
        return None
    return connection


def _watched(link: socket.socket) -> Connection:
    """A connection of which the kernel notices within 30 seconds that the other machine is gone."""
    link.setblocking(True)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Linux has all of these, others some
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(link.detach())


def _close_in_children(lifeline: Lifeline) -> None:
    """Data loading's processes are copies of this one: an end they hold open would hide this one's end from the others."""
    reference = weakref.ref(lifeline)

    def close() -> None:
        line = reference()
        for connection in (line._connection, *line._peers) if line else ():
            connection.close()

    os.register_at_fork(after_in_child=close)
