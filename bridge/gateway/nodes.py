"""The sources of what the gateway knows about nodes: policy, inventory, `inventory_command`, DNS, Node objects."""

from __future__ import annotations

import dataclasses
import logging
import math
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from bridge.cluster import items
from bridge.cluster.api import JSON, METADATA, Api, NoAnswerError, request_of
from bridge.desk import node_inventory
from bridge.desk.node_inventory import Inventory, NodeEntry
from bridge.errors import BridgeError
from bridge.gateway import policy
from bridge.gateway.policy import GatewayPolicy, NodeState
from bridge.pki.budget import json_of
from bridge.pki.kubeadm_names import is_node_name
from bridge.settings import Reader, Source
from bridge.settings.tables import GatewaySettings
from bridge.system.files import how_to_begin, version
from bridge.system.paths import assert_ours, own_text
from bridge.system.run_command import Command, passed_on, run
from bridge.system.waiting import remember

log = logging.getLogger("ca-bridge")

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")

#: An unusable file is read again after this, changed or not.
_AGAIN_SECONDS = 5.0
_COMMAND_LIMIT = timedelta(seconds=10)
_ROOM_SECONDS = 0.25
_REMEMBERED_SECONDS = 60.0
_MOST_REMEMBERED = 10_000
_LONGEST_ANSWER = 64 << 10
_MOST_LOOKUPS = 4
#: For all lookups of a request; a later answer counts when the request is judged again.
_DNS_SECONDS = 3.0


class WatchedFile(Generic[T]):
    """A file that decides what we sign: only its owner may write it, and its last valid content counts."""

    def __init__(self, path: Path, what: str, parse: Callable[[str, Path], T]) -> None:
        """Read the file; SettingsError if it can't be used."""
        self._path = path
        self._what = what
        self._parse = parse
        self._mutex = threading.Lock()
        self._stamp = self._look()
        self._tried = time.monotonic()
        self._value = self._read()
        self.trouble = ""  #: Why the current content of the file does not count.
        self.changes = 0

    def get(self) -> T:
        """Return the newest valid content."""
        with self._mutex:
            now, stamp = time.monotonic(), self._look()
            # the file's stamp does not change when its directory is repaired
            if stamp != self._stamp or (self.trouble and now - self._tried >= _AGAIN_SECONDS):
                self._stamp, self._tried = stamp, now
                self._again()
            return self._value

    def _again(self) -> None:
        try:
            self._value = self._read()
        except BridgeError as e:
            before, self.trouble = self.trouble, str(e)
            found = "; ".join(self.trouble.splitlines())  # a line of the log is one line
            if self.trouble != before:
                log.error("%s; the %s that was read before still counts", found, self._what)  # noqa: TRY400
        else:
            self.trouble = ""
            self.changes += 1
            log.info("read %s again", self._path)

    def _look(self) -> tuple[int, ...] | None:
        try:
            return version(self._path.stat())
        except OSError:
            return None

    def _read(self) -> T:
        hint = how_to_begin(f"gateway/{self._what}.toml", self._path)
        return self._parse(own_text(self._path, f"the {self._what}", hint), self._path)


class Remembered(Generic[K, V]):
    """A cache of answers with a lifetime; when it is full, the oldest answer goes first."""

    def __init__(self, seconds: float = _REMEMBERED_SECONDS) -> None:
        self._seconds = seconds
        self._mutex = threading.Lock()
        self._answers: OrderedDict[K, tuple[V, float]] = OrderedDict()

    def of(self, key: K, ask: Callable[[], V], since: float = -math.inf) -> V:
        """Return the answer, and ask if it is not cached."""
        if (known := self.get(key, since)) is not None:
            return known[0]
        now, value = time.monotonic(), ask()
        self.put(key, value, now)
        return value

    def get(self, key: K, since: float = -math.inf) -> tuple[V] | None:
        """Return the answer to a question asked no earlier than `since` (monotonic); None: it is not cached."""
        with self._mutex:
            answer = self._answers.get(key)
        oldest = max(since, time.monotonic() - self._seconds)
        return (answer[0],) if answer is not None and answer[1] >= oldest else None

    def put(self, key: K, value: V, since: float) -> None:
        """Store the answer to a question that was asked at `since` (monotonic)."""
        now = time.monotonic()
        with self._mutex:
            remember(self._answers, key, (value, since), _MOST_REMEMBERED)
            while self._answers and now - next(iter(self._answers.values()))[1] >= self._seconds:
                self._answers.popitem(last=False)


class Nodes:
    """Policy, inventory, and the other sources on nodes."""

    def __init__(self, settings: GatewaySettings) -> None:
        """Read the files; SettingsError if one can't be used."""
        self._policy: WatchedFile[GatewayPolicy] = WatchedFile(settings.policy, "policy", policy.parse)
        self._inventory: WatchedFile[Inventory] = WatchedFile(settings.inventory, "inventory", node_inventory.parse)
        self._command = settings.inventory_command
        # so that requests for unknown names keep only half of the threads busy
        self._commands = threading.BoundedSemaphore(max(1, settings.concurrency // 2))
        self._entries: Remembered[str, NodeEntry | None] = Remembered()
        self._resolver = Resolver(max(1, settings.concurrency // 2)) if settings.reverse_dns else None

    def files(self) -> tuple[GatewayPolicy, Inventory]:
        """Return policy and inventory as they are now."""
        return self._policy.get(), self._inventory.get()

    @property
    def trouble(self) -> str:
        """Why the current content of a file does not count; empty: both count."""
        return "; ".join(filter(None, (self._policy.trouble, self._inventory.trouble)))

    @property
    def changes(self) -> int:
        """How often one of the files changed."""
        return self._policy.changes + self._inventory.changes

    def entry(self, name: str, inventory: Inventory) -> NodeEntry | None:
        """Return the inventory's entry for a node, or else the command's answer; None: neither knows it."""
        node = inventory.nodes.get(name)
        if node is not None or self._command is None:
            return node
        return self._entries.of(name, partial(self._by_command, self._command, name))

    def _by_command(self, command: Path, name: str) -> NodeEntry | None:
        if not self._commands.acquire(timeout=_ROOM_SECONDS):
            raise BridgeError("gateway.inventory_command: too many of them are running")
        try:
            return _ask_command(command, name)
        finally:
            self._commands.release()

    def with_dns(self, name: str, entry: NodeEntry, addresses: list[str]) -> NodeEntry:
        """Return the entry, plus the addresses that DNS proves to be the node's if `gateway.reverse_dns` is on."""
        if self._resolver is None:
            return entry
        unknown = [address for address in addresses if address not in entry.addresses][:_MOST_LOOKUPS]
        hosts = self._resolver.hosts(unknown)
        proven = [address for address in unknown if hosts.get(address) in {name, *entry.names}]
        return dataclasses.replace(entry, addresses=(*entry.addresses, *proven)) if proven else entry


class Resolver:
    """Looks up the names of addresses in threads of its own, since a resolver may never answer."""

    def __init__(self, most: int) -> None:
        self._room = threading.BoundedSemaphore(most)
        self._known: Remembered[str, str | None] = Remembered()
        self._mutex = threading.Lock()
        self._asking: dict[str, threading.Thread] = {}

    def hosts(self, addresses: Sequence[str]) -> dict[str, str | None]:
        """Return each address's name if it resolves back to the address; None: it does not, or no answer in time."""
        asking = {address: thread for address in addresses if (thread := self._begin(address)) is not None}
        deadline = time.monotonic() + _DNS_SECONDS
        for thread in asking.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        return {address: (self._known.get(address) or (None,))[0] for address in addresses}

    def _begin(self, address: str) -> threading.Thread | None:
        """Return the thread that looks it up; None: the answer is cached, or no further thread is allowed now."""
        with self._mutex:
            if self._known.get(address) is not None:
                return None
            if (thread := self._asking.get(address)) is not None or not self._room.acquire(blocking=False):
                return thread
            thread = self._asking[address] = threading.Thread(target=self._look_up, args=(address,), daemon=True)
            thread.start()
            return thread

    def _look_up(self, address: str) -> None:
        host = None
        try:
            host = host_of(address)
        finally:  # others chose the name, so the resolver may fail in any way
            with self._mutex:
                self._known.put(address, host, time.monotonic())
                del self._asking[address]
            self._room.release()


def host_of(address: str) -> str | None:
    """Return the name of an address, if it resolves back to the address."""
    try:
        host = socket.gethostbyaddr(address)[0].lower().rstrip(".")
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return None
    return host if address in addresses else None


def _ask_command(command: Path, name: str) -> NodeEntry | None:
    if not is_node_name(name):
        return None
    try:
        assert_ours(command)
    except OSError as e:
        raise BridgeError(f"gateway.inventory_command: {command} {name}: {type(e).__name__}") from None
    answer = bytearray()
    words, environment = [str(command), name], passed_on({})
    program = Command(words=words, environment=environment, limit=_COMMAND_LIMIT, most_output=_LONGEST_ANSWER)
    ended = run(program, answer.extend)
    if ended.failure:
        raise BridgeError(f"gateway.inventory_command: {command} {name} {ended.failure}")
    text = bytes(answer.strip())
    if not text:
        return None
    try:
        document = json_of(text)
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("control_plane"):
        wanted = "wanted an object in JSON that makes no control-plane node, found something else"
        raise BridgeError(f"gateway.inventory_command: {command} {name}: {wanted}")
    reader = Reader(Source(None, ""))
    entry = reader.read(NodeEntry, document, ("node", name))
    reader.raise_problems()
    return entry


def state_of(api: Api, name: str, *, with_readiness: bool) -> NodeState:
    """Return the state of a Node object (NoAnswerError); without `with_readiness` a node that exists counts as ready."""
    accept = JSON if with_readiness else METADATA  # a whole Node object lists dozens of images
    reply = api.answer(request_of("GET", f"/api/v1/nodes/{quote(name, safe='')}", accept=accept))
    if reply.status == HTTPStatus.OK:
        return NodeState(exists=True, ready=not with_readiness or is_ready(reply.document))
    if reply.status == HTTPStatus.NOT_FOUND:
        return NodeState(exists=False)
    raise NoAnswerError(f"can't look at node {name}: HTTP {reply.status} {reply.message}")


def is_ready(node: Mapping[str, Any]) -> bool:
    """Whether a Node object is Ready; True if it has no such condition."""
    ready = [condition for condition in items(node, "status", "conditions") if condition.get("type") == "Ready"]
    return not ready or any(condition.get("status") == "True" for condition in ready)
