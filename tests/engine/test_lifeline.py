"""The connection between the processes of a run; what happens when one ends is in test_launch.py."""

import socket
import threading

from halodet.engine.lifeline import _accept, _connect, _listener, _receive, is_network_error

import torch.distributed as dist


def test_only_the_runs_own_processes_are_let_in():
    listener = _listener()
    port = listener.getsockname()[1]
    found = {}
    server = threading.Thread(target=lambda: found.update(_accept(listener, "right", 1)))
    server.start()
    stranger = _connect("127.0.0.1", port, "wrong 1")
    short = socket.create_connection(("127.0.0.1", port))
    short.close()
    own = _connect("127.0.0.1", port, "right 1")
    server.join(timeout=20)
    assert list(found.values()) == [1]
    assert _receive(stranger) is None, "turned away"
    next(iter(found)).send_bytes(b'{"over": true}')
    assert _receive(own) == {"over": True}
    own.close()
    assert _receive(next(iter(found))) is None, "the end of a process closes its connection"


def test_a_rank_0_out_of_reach_is_a_warning(caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert _connect("127.0.0.1", port, "right 1") is None
    assert "if a process ends, that is noticed late" in caplog.text


def test_a_broken_exchange_is_told_from_a_mistake():
    assert is_network_error(dist.DistBackendError("x"))
    assert is_network_error(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [10.0.0.2]:5"))
    assert not is_network_error(RuntimeError("shape mismatch")) and not is_network_error(ValueError("gloo"))
