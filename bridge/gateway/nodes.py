"""
What the gateway knows of nodes: policy and inventory (read again when they change), a command, the DNS, Node objects.

Node objects are asked for one by one, or in a burst with one list of names for many: for a burst of nodes that join that
is one request in the place of hundreds. The list needs the right to `list`; without it each is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from bridge.cluster.api import Api, NoAnswerError
from bridge.desk import node_inventory
from bridge.desk.node_inventory import Inventory, NodeEntry
from bridge.errors import BridgeError
from bridge.gateway import policy
from bridge.gateway.policy import GatewayPolicy, NodeState
from bridge.pki.kubeadm_names import is_node_name
from bridge.settings.gateway import GatewaySettings
from bridge.settings.reader import Reader, Source
from bridge.system.files import how_to_begin
from bridge.system.many import Combined
from bridge.system.paths import assert_ours, own_text
from bridge.system.run_command import Command, passed_on, run

log = logging.getLogger("ca-bridge")

T = TypeVar("T")

_LOOK_SECONDS = 1.0
_COMMAND_LIMIT = timedelta(seconds=10)
_ROOM_SECONDS = 0.25
_REMEMBERED_SECONDS = 60.0
_MOST_REMEMBERED = 10_000
_LONGEST_ANSWER = 64 << 10
#: A resolver that does not answer takes its time for each.
_MOST_LOOKUPS = 4


class WatchedFile(Generic[T]):
    """A file that says what is signed: only its owner may write it, and the last good text counts."""

    def __init__(self, path: Path, what: str, parse: Callable[[str, Path], T]) -> None:
        """
        Raises:
            SettingsError: It can't be used.
        """
        self._path = path
        self._what = what
        self._parse = parse
        self._mutex = threading.Lock()
        self._stamp = self._look()
        self._looked = time.monotonic()
        self._value = self._read()
        self.trouble = ""  #: Why the file as it is now does not count.
        self.changes = 0

    def get(self) -> T:
        """The newest that can be used."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return self._value  # without the lock: a hundred requests at once would queue for it
        with self._mutex:
            if time.monotonic() - self._looked >= _LOOK_SECONDS:
                self._looked = time.monotonic()
                stamp = self._look()
                if stamp != self._stamp:
                    self._stamp = stamp
                    self._again()
            return self._value

    def _again(self) -> None:
        try:
            self._value = self._read()
        except BridgeError as e:
            self.trouble = str(e)
            found = "; ".join(self.trouble.splitlines())  # a line of the log is one line
            log.error("%s; the %s that was read before goes on counting", found, self._what)  # noqa: TRY400
        else:
            self.trouble = ""
            self.changes += 1
            log.info("read %s again", self._path)

    def _look(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> T:
        hint = how_to_begin(f"gateway/{self._what}.toml", self._path)
        return self._parse(own_text(self._path, f"the {self._what}", hint), self._path)


class Nodes:
    """Policy and inventory, and what else knows nodes."""

    def __init__(self, settings: GatewaySettings) -> None:
        """
        Raises:
            SettingsError: A file can't be used.
        """
        self._policy: WatchedFile[GatewayPolicy] = WatchedFile(settings.policy, "policy", policy.parse)
        self._inventory: WatchedFile[Inventory] = WatchedFile(settings.inventory, "inventory", node_inventory.parse)
        self._command = settings.inventory_command
        self._reverse_dns = settings.reverse_dns
        # requests for unknown names keep half of the threads busy, and not all
        self._commands = threading.BoundedSemaphore(max(1, settings.concurrency // 2))
        self._mutex = threading.Lock()
        self._answers: OrderedDict[str, tuple[NodeEntry | None, float]] = OrderedDict()

    @property
    def policy(self) -> GatewayPolicy:
        """As its file has it now."""
        return self._policy.get()

    @property
    def inventory(self) -> Inventory:
        """As its file has it now."""
        return self._inventory.get()

    @property
    def trouble(self) -> str:
        """Why a file does not count as it is; empty: both count."""
        return "; ".join(filter(None, (self._policy.trouble, self._inventory.trouble)))

    @property
    def changes(self) -> int:
        """How often one of the files changed."""
        return self._policy.changes + self._inventory.changes

    def entry(self, name: str) -> NodeEntry | None:
        """
        The inventory's entry for a node, or the command's answer; None: neither knows it.

        Raises:
            BridgeError: The command failed.
        """
        found = self.inventory.nodes.get(name)
        if found is not None or self._command is None:
            return found
        with self._mutex:
            known = self._answers.get(name)
            if known is not None and time.monotonic() - known[1] < _REMEMBERED_SECONDS:
                return known[0]
        if not self._commands.acquire(timeout=_ROOM_SECONDS):
            raise BridgeError("gateway.inventory_command: as many of it as may run at once are running")
        try:
            answer = _asked(self._command, name)
        finally:
            self._commands.release()
        with self._mutex:
            self._answers[name] = (answer, time.monotonic())
            self._answers.move_to_end(name)
            if len(self._answers) > _MOST_REMEMBERED:
                self._answers.popitem(last=False)
        return answer

    def with_dns(self, name: str, entry: NodeEntry, addresses: list[str]) -> NodeEntry:
        """The entry with those of the addresses that the DNS proves to be the node's, if the settings let it."""
        if not self._reverse_dns:
            return entry
        names = {name, *entry.names}
        unknown = [one for one in addresses if one not in entry.addresses][:_MOST_LOOKUPS]
        proven = [one for one in unknown if _leads_both_ways(one, names)]
        return dataclasses.replace(entry, addresses=(*entry.addresses, *proven)) if proven else entry


def _asked(command: Path, name: str) -> NodeEntry | None:
    if not is_node_name(name):
        return None
    try:
        assert_ours(command)
    except OSError as e:
        raise BridgeError(f"gateway.inventory_command: {command} {name}: {type(e).__name__}") from None
    answer = bytearray()
    program = Command(
        words=[str(command), name], environment=passed_on({}), limit=_COMMAND_LIMIT, most_output=_LONGEST_ANSWER
    )
    ended = run(program, answer.extend)
    if ended.failure:
        raise BridgeError(f"gateway.inventory_command: {command} {name} {ended.failure}")
    text = bytes(answer.strip())
    if not text:
        return None
    document = _object(text)
    if document is None or document.get("control_plane"):
        wanted = "wanted an object in JSON that makes no control-plane node, found something else"
        raise BridgeError(f"gateway.inventory_command: {command} {name}: {wanted}")
    reader = Reader(Source(None, ""))
    entry = reader.read(NodeEntry, document, ("node", name))
    reader.raise_problems()
    return entry


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _leads_both_ways(address: str, names: set[str]) -> bool:
    """The address leads to one of the names, and that name to the address."""
    try:
        host = socket.gethostbyaddr(address)[0].lower().rstrip(".")
        if host not in names:
            return False
        return address in {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False


# --- Node objects -----------------------------------------------------------------------------------------------------

#: A Node object that was looked at so long ago is as good as one of now.
_STATE_SECONDS = 1.0
_MOST_NODES = 5_000
_MOST_TOGETHER = 256
_NODES = "/api/v1/nodes"
#: Names without what else is in the objects: a Node has dozens of images in it.
_NAMES_ALONE = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_MOST_LISTED = 1_000
#: One request costs the API server as much as so many names in a list.
_NAMES_A_REQUEST = 20
_NO_LIST_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class _Wanted:
    name: str
    with_readiness: bool


class NodeStates:
    """May be used by any thread."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._mutex = threading.Lock()
        self._known: dict[str, tuple[NodeState, float]] = {}
        self._together: Combined[_Wanted, NodeState | NoAnswerError] = Combined(self._looked_at, _MOST_TOGETHER)
        self._count = 0  # that the latest list had
        self._lists_from = 0.0

    def state(self, name: str, *, newer: bool, with_readiness: bool) -> NodeState:
        """
        The node's state as it is now, or was a second ago.

        Args:
            name: The node's.
            newer: That it was not there a second ago does not count.
            with_readiness: It counts whether it is ready; else it may be said to be so.

        Raises:
            NoAnswerError: It can't be looked at.
        """
        now = time.monotonic()
        with self._mutex:
            known = self._known.get(name)
        if known is not None and now - known[1] < _STATE_SECONDS and (known[0].exists or not newer):
            return known[0]
        found = self._together(_Wanted(name, with_readiness))
        if isinstance(found, NoAnswerError):
            raise found
        with self._mutex:
            if len(self._known) >= _MOST_NODES:
                self._known.clear()
            self._known[name] = (found, now)
        return found

    def _looked_at(self, wanted: Sequence[_Wanted]) -> list[NodeState | NoAnswerError]:
        there = self._listed(len(wanted))
        found: list[NodeState | NoAnswerError] = []
        for one in wanted:
            if there is not None and not (one.with_readiness and one.name in there):
                found.append(NodeState(exists=one.name in there, ready=one.name in there))
                continue
            try:
                found.append(self._asked(one.name))
            except NoAnswerError as e:
                found.append(e)
        return found

    def _asked(self, name: str) -> NodeState:
        reply = self._api.ask("GET", f"{_NODES}/{quote(name, safe='')}")
        if reply.status == HTTPStatus.OK:
            return NodeState(exists=True, ready=is_ready(reply.document))
        if reply.status == HTTPStatus.NOT_FOUND:
            return NodeState(exists=False)
        raise NoAnswerError(f"wanted to look at node {name}, found HTTP {reply.status} {reply.message}")

    def _listed(self, wanted: int) -> frozenset[str] | None:
        """The names of all nodes; None: to ask for each is less work, or there is no list."""
        if wanted * _NAMES_A_REQUEST < max(self._count, 3 * _NAMES_A_REQUEST) or time.monotonic() < self._lists_from:
            return None
        try:
            reply = self._api.ask("GET", f"{_NODES}?limit={_MOST_LISTED}", accept=_NAMES_ALONE)
            names = _names(reply.document) if reply.status == HTTPStatus.OK else None
        except NoAnswerError:
            names = None  # who asks for each finds out why
        if names is None:  # no right to, or too many
            self._lists_from = time.monotonic() + _NO_LIST_SECONDS
            return None
        self._count = len(names)
        return names


def _names(document: Mapping[str, Any]) -> frozenset[str] | None:
    """The names in a whole list of objects; None: it is none."""
    try:
        if document["kind"] != "PartialObjectMetadataList" or document["metadata"].get("continue"):
            return None
        return frozenset(str(item["metadata"]["name"]) for item in document["items"] or ())
    except (KeyError, TypeError, AttributeError):
        return None


def is_ready(node: Mapping[str, Any]) -> bool:
    """Whether a Node object has the condition `Ready`; when in doubt it has."""
    status = node.get("status")
    conditions = status.get("conditions") if isinstance(status, dict) else None
    ready = [one for one in conditions or () if isinstance(one, dict) and one.get("type") == "Ready"]
    return not ready or any(one.get("status") == "True" for one in ready)
