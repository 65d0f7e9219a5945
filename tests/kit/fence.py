"""
No test reaches outside of this machine: in a process that holds the fence, Python connects to no other address and looks up
no other name, as on a machine without a network. It refuses at once, where a real network would let a test wait.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

#: Loopback, and the kit's nodes.
_HERE = [ip_network(one) for one in ("127.0.0.0/8", "::1/128", "198.18.0.0/15", "0.0.0.0/32", "::/128")]
_IP = (socket.AF_INET, socket.AF_INET6)


def hold() -> None:
    """From now on, and in all processes that are forked from this one."""
    sys.addaudithook(_look)


def _look(event: str, about: tuple[Any, ...]) -> None:
    if event in {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}:
        host = about[0].decode() if isinstance(about[0], bytes) else about[0] or ""
        needs_a_look = event == "socket.gethostbyaddr" or _address(host) is None
        if needs_a_look and not _is_here(host):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    elif event in {"socket.connect", "socket.sendto"} and about[0].family in _IP and not _is_here(about[1][0]):
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _is_here(host: str) -> bool:
    address = _address(host)
    if address is None:
        return host in {"", "localhost", socket.gethostname()}
    return any(address in one for one in _HERE)
