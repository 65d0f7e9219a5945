"""What clients and members of etcd see of three control-plane nodes while something is done to them."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime

from bridge.specs import Component
from tests.kit.inotify import MOVED_FROM, Inotify
from tests.kit.looking import API_PORT, ETCD_PORT, TRAFFIC, ask, client, connection
from tests.kit.node import Node

_SLOW, _LEADERLESS, _DOWN = range(3)
#: For one look: who waits longer sees less of what comes and goes; an answer that is late counts as no other.
_SECONDS = 10
#: That the client tries all servers: one that takes the connection and is too slow is there, on a machine that stalls.
_ROUNDS = 6
STATIC = [component.value for component in Component if component is not Component.KUBELET]


@dataclass(kw_only=True)
class Seen:
    """The observations of all nodes together."""

    looks: dict[str, int] = field(default_factory=dict)  #: By node, at etcd.
    down: list[tuple[float, float, str]] = field(default_factory=list)  #: Begin, end, node: its etcd did not answer.
    leaderless: list[tuple[float, float, str]] = field(default_factory=list)  #: It did, but had no leader.
    slow: list[tuple[float, float, str]] = field(
        default_factory=list
    )  #: It took the connection, and answered too late.
    turns: int = 0  #: Of the client.
    elsewhere: int = 0  #: Times that it had to go on to another API server.
    failed: list[str] = field(default_factory=list)  #: Turns that no API server took.
    away: list[tuple[datetime, str, str]] = field(default_factory=list)  #: When, node, component: its manifest left.

    def most_down(self) -> int:
        """How many members did not answer at the same time."""
        moments = sorted([(begin, 1) for begin, _, _ in self.down] + [(end, -1) for _, end, _ in self.down])
        most = now = 0
        for _, step in moments:
            now += step
            most = max(most, now)
        return most

    def longest_without_quorum(self) -> float:
        """How long two of three members or more did not answer, or had no leader, in seconds."""
        spans = (*self.down, *self.leaderless)
        moments = sorted([(begin, 1) for begin, _, _ in spans] + [(end, -1) for _, end, _ in spans])
        now, since, longest = 0, 0.0, 0.0
        for moment, step in moments:
            if (now, step) == (2, -1):
                longest = max(longest, moment - since)
            now += step
            if (now, step) == (2, 1):
                since = moment
        return longest


@contextlib.contextmanager
def watched(nodes: Sequence[Node]) -> Iterator[Seen]:
    """Look until the end of the block."""
    seen, stop = Seen(), threading.Event()
    nodes[0].kubectl("create", "configmap", TRAFFIC)
    works: list[Callable[[], None]] = [
        *(lambda node=node: _watch_etcd(node, seen, stop) for node in nodes),
        lambda: _work(nodes, seen, stop),
        lambda: _watch_manifests(nodes, seen, stop),
    ]
    with ThreadPoolExecutor(len(works)) as pool:
        running = [pool.submit(work) for work in works]
        try:
            yield seen
        finally:
            stop.set()
    for one in running:
        one.result()
    nodes[0].kubectl("delete", "configmap", TRAFFIC)


def _watch_etcd(node: Node, seen: Seen, stop: threading.Event) -> None:
    """A member is down from its first look without an answer to the first one that finds it well."""
    since, worst, spans = None, 0, (seen.slow, seen.leaderless, seen.down)
    with connection(node, ETCD_PORT, client(node, "etcd-healthcheck-client"), seconds=_SECONDS) as kept:
        while not stop.wait(0.2):
            begin = time.monotonic()
            found = _etcd(kept)
            seen.looks[node.name] = seen.looks.get(node.name, 0) + 1
            if found is not None:
                is_worse = since is None or (worst == _SLOW < found)  # a stall is no part of what comes after it
                since, worst = begin if is_worse else since, max(worst, found)
            elif since is not None:
                spans[worst].append((since, begin, node.name))
                since, worst = None, 0
    if since is not None:
        spans[worst].append((since, time.monotonic(), node.name))


def _etcd(kept: http.client.HTTPSConnection) -> int | None:
    """None: it is well."""
    try:
        return None if ask(kept, "/health").status == http.client.OK else _LEADERLESS
    except TimeoutError:
        kept.close()
        return _SLOW
    except (OSError, http.client.HTTPException):
        kept.close()
        return _DOWN


def _work(nodes: Sequence[Node], seen: Seen, stop: threading.Event) -> None:
    """Each turn begins at another API server."""
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(connection(one, API_PORT, client(one, "admin.conf"), seconds=_SECONDS)) for one in nodes
        ]
        while not stop.wait(0.1):
            seen.turns += 1
            for _ in range(_ROUNDS):
                errors = _round(servers, seen.turns)
                seen.elsewhere += len(errors)
                if len(errors) < len(servers) or not any(isinstance(one, TimeoutError) for one in errors.values()):
                    break
            if len(errors) == len(servers):
                seen.failed.append(f"turn {seen.turns}: {errors}")


def _round(servers: Sequence[http.client.HTTPSConnection], turn: int) -> dict[str, Exception]:
    """Until a server takes it; what the others said, by their addresses."""
    errors: dict[str, Exception] = {}
    for number in range(len(servers)):
        server = servers[(turn + number) % len(servers)]
        try:
            _write_and_read(server, str(turn))
            break
        except (OSError, http.client.HTTPException, ValueError) as e:
            server.close()
            errors[server.host] = e
    return errors


def _write_and_read(server: http.client.HTTPSConnection, value: str) -> None:
    path = f"/api/v1/namespaces/default/configmaps/{TRAFFIC}"
    wrote, read = ask(server, path, patch={"data": {"turn": value}}), ask(server, path)
    if wrote.is_late or read.is_late:
        raise TimeoutError(f"{wrote.body!r}, {read.body!r}")
    if (wrote.status, read.status) != (http.client.OK, http.client.OK):
        raise ValueError(f"wanted 200 twice, got {wrote.status} {wrote.body!r}, {read.status} {read.body!r}")
    if json.loads(read.body)["data"]["turn"] != value:
        raise ValueError(f"wanted {value}, got {read.body!r}")


def _watch_manifests(nodes: Sequence[Node], seen: Seen, stop: threading.Event) -> None:
    directories = {node.kubeconfig_dir / "manifests": node.name for node in nodes}
    with contextlib.closing(Inotify()) as kernel:
        for directory in directories:
            assert kernel.add(directory, MOVED_FROM)
        is_over = False
        while not is_over:
            is_over = stop.wait(0.05)  # and what is there to be read by then
            with contextlib.suppress(BlockingIOError):
                left = [(directories[path.parent], path.stem) for path, _ in kernel.events() if path.stem in STATIC]
                seen.away += [(datetime.now(UTC), *one) for one in left]
