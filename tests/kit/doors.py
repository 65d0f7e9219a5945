"""A port of this machine's loopback, on a node as well: how a node or its pods reach a CA that tests run here."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from tests.kit.node import Node

#: Runs in the node's network, and hands over a socket that listens there.
_LISTEN = """\
import socket, sys
door = socket.create_server((sys.argv[1], int(sys.argv[2])))
socket.send_fds(socket.socket(fileno=0), [b"."], [door.fileno()])
"""


@dataclass(kw_only=True)
class Door:
    """What came, and whether it is let through."""

    is_open: bool = True  #: Otherwise connections are closed at once.
    connections: int = 0  #: So far, those that were closed at once among them.


@contextlib.contextmanager
def door(node: Node, port: int, address: str = "127.0.0.1") -> Iterator[Door]:
    """Connections to this address of the node and the port come to this machine's 127.0.0.1:port."""
    listener, found = _listener(node, port, address), Door()
    threading.Thread(target=_serve, args=(listener, port, found), daemon=True).start()
    try:
        yield found
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _listener(node: Node, port: int, address: str) -> socket.socket:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = ["ip", "netns", "exec", node.name, sys.executable, "-c", _LISTEN, address, str(port)]
        subprocess.run(command, stdin=theirs.fileno(), check=True, timeout=180)
        _, [descriptor], _, _ = socket.recv_fds(ours, 1, 1)
    return socket.socket(fileno=descriptor)


def _serve(listener: socket.socket, port: int, door: Door) -> None:
    with contextlib.suppress(OSError):  # it was closed
        while True:
            here, _ = listener.accept()
            door.connections += 1
            if not door.is_open:
                here.close()
                continue
            threading.Thread(target=_pass, args=(here, port), daemon=True).start()


def _pass(here: socket.socket, port: int) -> None:
    with here, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as there:
        back = threading.Thread(target=_copy, args=(there, here), daemon=True)
        back.start()
        _copy(here, there)
        back.join()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
