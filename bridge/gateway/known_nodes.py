"""The policy and the register of nodes as files, read again when they change; and who else knows a node."""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

from bridge.desk import node_inventory, policy
from bridge.desk.node_inventory import NodeEntry, Register, is_node_name
from bridge.desk.policy import Policy
from bridge.errors import BridgeError, SettingsError, SettingsProblem
from bridge.settings.gateway import GatewaySettings
from bridge.settings.load import assert_ours
from bridge.settings.reader import Reader, Source
from bridge.system import safe_read
from bridge.system.run_command import Answer, TooMuchError, run
from bridge.system.safe_read import UnreadableError
from bridge.system.shipped import how_to_begin

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
    """A file that says what is signed: nobody else may write it, and the last good one counts."""

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
            return self._value  # without the lock, which a hundred requests at once would queue for
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
        try:
            assert_ours(self._path)
            data = safe_read.read(self._path)
        except (OSError, UnreadableError) as e:
            found = e.strerror if isinstance(e, OSError) else str(e)
            raise SettingsError([SettingsProblem("", f"the {self._what}", str(found), self._path)]) from None
        if data is None:
            hint = how_to_begin(f"gateway/{self._what}.toml", self._path)
            raise SettingsError([SettingsProblem("", f"the {self._what}", "none", self._path)], hint=hint)
        try:
            return self._parse(data.decode(), self._path)
        except UnicodeDecodeError:
            raise SettingsError([SettingsProblem("", "UTF-8 text", "something else", self._path)]) from None


class Known:
    """Policy and register, and what is beside the register."""

    def __init__(self, settings: GatewaySettings) -> None:
        """
        Raises:
            SettingsError: A file can't be used.
        """
        self._policy: WatchedFile[Policy] = WatchedFile(settings.policy, "policy", policy.parse)
        self._register: WatchedFile[Register] = WatchedFile(settings.inventory, "inventory", node_inventory.parse)
        self._command = settings.inventory_command
        self._reverse_dns = settings.reverse_dns
        # whoever asks for names that nobody knows keeps half of the threads busy with it, and not all
        self._room = threading.BoundedSemaphore(max(1, settings.concurrency // 2))
        self._mutex = threading.Lock()
        self._answers: OrderedDict[str, tuple[NodeEntry | None, float]] = OrderedDict()

    @property
    def policy(self) -> Policy:
        """As its file has it now."""
        return self._policy.get()

    @property
    def register(self) -> Register:
        """As its file has it now."""
        return self._register.get()

    @property
    def trouble(self) -> str:
        """Why a file does not count as it is; empty: both do."""
        return "; ".join(filter(None, (self._policy.trouble, self._register.trouble)))

    @property
    def changes(self) -> int:
        """How often one of the files changed."""
        return self._policy.changes + self._register.changes

    def entry(self, name: str) -> NodeEntry | None:
        """
        The inventory's entry for a node, or the command's answer; None: neither knows it.

        Raises:
            BridgeError: The command failed, so that nobody knows.
        """
        found = self.register.nodes.get(name)
        if found is not None or self._command is None:
            return found
        with self._mutex:
            known = self._answers.get(name)
            if known is not None and time.monotonic() - known[1] < _REMEMBERED_SECONDS:
                return known[0]
        if not self._room.acquire(timeout=_ROOM_SECONDS):
            raise BridgeError("gateway.inventory_command: as many of it as may run at once are running")
        try:
            answer = _asked(self._command, name)
        finally:
            self._room.release()
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
        answer = Answer(_LONGEST_ANSWER)
        ended = run([str(command), name], {}, _COMMAND_LIMIT, answer)
    except (OSError, TooMuchError) as e:
        found = str(e) if isinstance(e, TooMuchError) else type(e).__name__
        raise BridgeError(f"gateway.inventory_command: {command} {name}: {found}") from None
    if ended.failure:
        raise BridgeError(f"gateway.inventory_command: {command} {name} {ended.failure}")
    text = answer.data.strip()
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
