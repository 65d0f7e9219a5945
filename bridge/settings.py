"""
The settings file: strict, typed, all problems at once, each with its line.

A dataclass is the schema: its fields are the keys, their types say what is taken (see `contract.BackendSettings`).
Backends' tables are kept raw here and read by `bridge.plugins` into the backend's own dataclass, so that a command
that asks no CA loads no backend.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import stat
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

from bridge.errors import SettingsError, SettingsProblem
from bridge.expiry import Before, duration_text, parse_duration
from bridge.secret import Secret
from bridge.specs import AUTHORITIES, Component, KeyAlgorithm
from bridge.windows import Jitter, Windows
from bridge.zones import Zone

DEFAULT_FILE = Path("/etc/ca-bridge/config.toml")
MAX_BYTES = 1 << 20

T = TypeVar("T")
Key = tuple[str, ...]

_LONGEST_FOUND = 60
_SECRET_KINDS = ("file", "env", "credential")


@dataclass(frozen=True, slots=True)
class Version:
    """A Kubernetes version, as far as the program's behaviour depends on it."""

    major: int
    minor: int

    @classmethod
    def from_setting(cls, value: object) -> Version:
        """Such as `"1.37"` or `"v1.37.2"`."""
        match = re.fullmatch(r"v?(\d+)\.(\d+)(\.\d+)?", value) if isinstance(value, str) else None
        if match is None:
            raise ValueError('a Kubernetes version such as "1.37"')
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """Table `[node]`."""

    pki_dir: Path = Path("/etc/kubernetes/pki")
    kubeconfig_dir: Path = Path("/etc/kubernetes")
    state_dir: Path = Path("/var/lib/ca-bridge")
    #: Of the kubeadm that manages the node; without it the image tags of the static pods tell.
    kubernetes_version: Version | None = None
    name: str = ""  #: As in the cluster; empty: the host's name in small letters, as kubeadm takes it.
    cluster: str = "kubernetes"  #: For people and the policy of a CA desk; kubeadm's clusterName.

    @property
    def node_name(self) -> str:
        """As set, or the host's."""
        return self.name or os.uname().nodename.strip().lower()


@dataclass(frozen=True, kw_only=True)
class RenewalSettings:
    """Table `[renewal]`."""

    before: Before = Before(remaining=timedelta(days=30))  # noqa: RUF009 (frozen)
    validity: timedelta = timedelta(days=365)
    min_validity: timedelta = timedelta(days=7)
    key: KeyAlgorithm | Literal["same"] = "same"
    window: Windows = field(default_factory=Windows)  #: When what is due may be renewed; see `windows.may_act`.
    window_zone: Zone = field(default_factory=Zone)
    jitter: Jitter = field(default_factory=Jitter)  #: See `schedule.delay`.

    def problems(self) -> Iterator[SettingsProblem]:
        """Durations that contradict each other."""
        if self.min_validity > self.validity:
            yield SettingsProblem("min_validity", "at most renewal.validity", duration_text(self.min_validity))
        if self.before.remaining is not None and self.before.remaining >= self.validity:
            wanted = "less than renewal.validity, or each run would renew again"
            yield SettingsProblem("before", wanted, duration_text(self.before.remaining))


@dataclass(frozen=True, slots=True)
class Components:
    """Which components are restarted after a renewal."""

    #: needed: those that go on with an old certificate; all: every user of a new one; listed: these of them.
    which: Literal["needed", "all", "listed"]
    listed: tuple[Component, ...] = ()

    @classmethod
    def from_setting(cls, value: object) -> Components:
        """`"needed"`, `"all"`, or a list of components."""
        if value == "needed" or value == "all":  # noqa: PLR1714 (mypy narrows these)
            return cls(value)
        known = {component.value: component for component in Component}
        if not isinstance(value, list) or not value or not all(isinstance(one, str) and one in known for one in value):
            raise ValueError(f"'needed', 'all', or a list of {', '.join(known)}")
        return cls("listed", tuple(known[one] for one in value))

    def __str__(self) -> str:
        return ", ".join(component.value for component in self.listed) or self.which


@dataclass(frozen=True, kw_only=True)
class RestartSettings:
    """Table `[restart]`."""

    #: none: whoever reads the message restarts; static-pods: manifests are moved away and back; command: see below.
    method: Literal["none", "static-pods", "command"] = "none"
    components: Components = Components("needed")
    #: By component, split into words as a shell does it; the kubelet's counts with static-pods, too.
    commands: dict[str, str] = field(default_factory=dict)
    #: For a component to end, for it to come back, and for a command. A kubelet may hold back for 5 minutes what has
    #: crashed, as those do that lose the API server for long.
    timeout: timedelta = timedelta(minutes=6)
    min_interval: timedelta = timedelta(minutes=10)  #: Between two restarts of the same component.
    on_failure: Literal["rollback", "keep"] = "rollback"
    prove_for: timedelta = timedelta(minutes=1)  #: How long proof of a renewal may take.

    def problems(self) -> Iterator[SettingsProblem]:
        """Commands of nobody, without words, or missing."""
        known = [component.value for component in Component]
        for name, command in self.commands.items():
            if name not in known:
                yield SettingsProblem(f"commands.{name}", f"one of {', '.join(known)}", _name_found(name, known))
            elif not _words(command):
                yield SettingsProblem(f"commands.{name}", "a command", repr(command))
        if self.method == "command" and not self.commands:
            yield SettingsProblem("commands", 'a command for each component, for method = "command"', "none")

    def command(self, component: Component) -> list[str]:
        """The words of a component's command; none if it has none."""
        return _words(self.commands.get(component.value, ""))


@dataclass(frozen=True, slots=True)
class Commands:
    """Programs with their arguments."""

    texts: tuple[str, ...] = ()  #: Each split into words as a shell does it; no shell runs it.

    @classmethod
    def from_setting(cls, value: object) -> Commands:
        """A command, or a list of them."""
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) and _words(text) for text in texts):
            raise ValueError("a command such as \"/usr/local/bin/tell 'control plane'\", or a list of them")
        return cls(tuple(texts))

    def __str__(self) -> str:
        return "; ".join(self.texts)

    def words(self) -> list[list[str]]:
        """Of each command."""
        return list(map(_words, self.texts))


@dataclass(frozen=True, kw_only=True)
class HookSettings:
    """Table `[hooks]`; see `hooks`."""

    timeout: timedelta = timedelta(minutes=1)  #: For each command.
    before: Commands = Commands()
    after_install: Commands = Commands()
    success: Commands = Commands()
    failure: Commands = Commands()


def _words(command: str) -> list[str]:
    """None for what a shell would not take, either."""
    try:
        return shlex.split(command)
    except ValueError:
        return []


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """Table `[cluster]`: the other control-plane nodes, before a component is restarted; see `bridge.cluster`."""

    #: When another's etcd member or API server is not well: wait for it, then refuse; refuse at once; don't look.
    neighbours: Literal["wait", "refuse", "ignore"] = "wait"
    neighbour_wait: timedelta = timedelta(minutes=5)
    lease: bool = True  #: One node after the other; see `bridge.lease`.
    lease_name: str = "ca-bridge"  #: In kube-system.
    lease_duration: timedelta = timedelta(minutes=2)  #: More than a restart of etcd or an API server takes.
    lease_wait: timedelta = timedelta(minutes=15)

    def problems(self) -> Iterator[SettingsProblem]:
        """What the API or the clock would not take."""
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", self.lease_name):
            wanted = "at most 63 small letters, digits and hyphens, a letter or digit first and last"
            yield SettingsProblem("lease_name", wanted, repr(self.lease_name))
        if not _SHORTEST_LEASE <= self.lease_duration <= _LONGEST_LEASE:
            wanted = f"{duration_text(_SHORTEST_LEASE)} to {duration_text(_LONGEST_LEASE)}"
            yield SettingsProblem("lease_duration", wanted, duration_text(self.lease_duration))


#: It is renewed three times in that, each of which may take some seconds; and others wait that long for a dead node.
_SHORTEST_LEASE, _LONGEST_LEASE = timedelta(seconds=15), timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Size:
    """A number of bytes."""

    count: int

    @classmethod
    def from_setting(cls, value: object) -> Size:
        """Such as `"10MiB"`."""
        match = re.fullmatch(r"([1-9][0-9]{0,6})(KiB|MiB|GiB)", value) if isinstance(value, str) else None
        if match is None:
            raise ValueError('a size such as "512KiB" or "10MiB"')
        return cls(int(match[1]) * _SIZE_UNITS[match[2]])

    def __str__(self) -> str:
        unit = next(name for name, size in reversed(_SIZE_UNITS.items()) if self.count % size == 0)
        return f"{self.count // _SIZE_UNITS[unit]}{unit}"


_SIZE_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """Table `[audit]`."""

    rotate_at: Size = Size(10 << 20)
    syslog: bool = False  #: A copy of each line to /dev/log, which journald reads, too.


@dataclass(frozen=True, kw_only=True)
class BackupSettings:
    """Table `[backups]`; see `backups.retire`."""

    keep: int = 10
    keep_for: timedelta = timedelta(days=400)  #: Longer than a certificate lives, usually.

    def problems(self) -> Iterator[SettingsProblem]:
        """The newest is always kept."""
        if self.keep < 1:
            yield SettingsProblem("keep", "at least 1", str(self.keep))


@dataclass(frozen=True, kw_only=True)
class AuthoritySettings:
    """Table `[authority.NAME]`; its other keys go to the backend."""

    backend: str
    #: Subject attributes that this CA adds to every certificate, such as `OU=Platform`; a named exception.
    allow_extra_subject: tuple[str, ...] = ()

    def problems(self) -> Iterator[SettingsProblem]:
        """Identities can't be excepted."""
        for text in self.allow_extra_subject:
            name = text.partition("=")[0]
            if name not in EXTRA_SUBJECT_OIDS or "=" not in text:
                wanted = f"NAME=VALUE with NAME one of {', '.join(EXTRA_SUBJECT_OIDS)} (CN and O say who somebody is)"
                yield SettingsProblem("allow_extra_subject", wanted, repr(text))

    @property
    def extra_subject(self) -> frozenset[tuple[str, str]]:
        """As (OID, value)."""
        pairs = (text.partition("=") for text in self.allow_extra_subject)
        return frozenset((EXTRA_SUBJECT_OIDS[name], value) for name, _, value in pairs)


#: Kubernetes reads CN (user) and O (groups) only, so that these attributes can't change what somebody may do.
EXTRA_SUBJECT_OIDS = {
    "OU": "2.5.4.11",
    "C": "2.5.4.6",
    "ST": "2.5.4.8",
    "L": "2.5.4.7",
    "STREET": "2.5.4.9",
    "DC": "0.9.2342.19200300.100.1.25",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of the file; backends' tables are raw."""

    source: Source
    node: NodeSettings = field(default_factory=NodeSettings)
    renewal: RenewalSettings = field(default_factory=RenewalSettings)
    restart: RestartSettings = field(default_factory=RestartSettings)
    hooks: HookSettings = field(default_factory=HookSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    audit: AuditSettings = field(default_factory=AuditSettings)
    backups: BackupSettings = field(default_factory=BackupSettings)
    backends: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    authorities: Mapping[str, AuthoritySettings] = field(default_factory=dict)
    #: By authority: the keys of its table that are the backend's.
    authority_tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def extra_subject(self, authority: str) -> frozenset[tuple[str, str]]:
        """The subject attributes, as (OID, value), that this authority's certificates may have or lack."""
        ours = self.authorities.get(authority)
        return ours.extra_subject if ours is not None else frozenset()


class Source:
    """A TOML text that can tell the line of a key."""

    def __init__(self, file: Path | None, text: str) -> None:
        self.file = file
        self._lines = text.splitlines(keepends=True)

    def line(self, key: Key) -> int | None:
        """
        The line (from 1) where a key or table is defined, or that of the nearest table above it.

        TOML's parser keeps no positions: this is the first line with which the text begins to hold the key.
        """
        while key:
            line = self._first_line_with(key)
            if line is not None:
                return line
            key = key[:-1]
        return None

    def _first_line_with(self, key: Key) -> int | None:
        start = 0  # where the statement that is being read began
        for number in range(len(self._lines)):
            try:
                document: Any = tomllib.loads("".join(self._lines[: number + 1]))
            except tomllib.TOMLDecodeError:
                continue  # within a value of several lines
            if _holds(document, key):
                blank = (
                    i for i in range(start, number + 1) if self._lines[i].strip() and self._lines[i].strip()[0] != "#"
                )
                return next(blank, number) + 1
            start = number + 1
        return None

    def problem(self, key: Key, wanted: str, found: str) -> SettingsProblem:
        """A problem with the file's name and the key's line in it."""
        return SettingsProblem(".".join(key), wanted, found, self.file, self.line(key))


def _holds(document: Any, key: Key) -> bool:
    for part in key:
        if not isinstance(document, dict) or part not in document:
            return False
        document = document[part]
    return True


def load(file: Path | None) -> Settings:
    """
    Read the settings.

    Args:
        file: None: the default file if it is there, else the defaults.

    Raises:
        SettingsError: With every problem of the tables that are not a backend's.
    """
    if file is None and not DEFAULT_FILE.exists():
        return Settings(source=Source(None, ""))
    path = file or DEFAULT_FILE
    return parse(_read(path), path)


def overridden(
    settings: Settings, pki_dir: Path | None, kubeconfig_dir: Path | None, state_dir: Path | None
) -> Settings:
    """The settings with the command line's places over them; relative ones are below the working directory."""
    node = dataclasses.replace(
        settings.node,
        pki_dir=(pki_dir or settings.node.pki_dir).absolute(),
        kubeconfig_dir=(kubeconfig_dir or settings.node.kubeconfig_dir).absolute(),
        state_dir=(state_dir or settings.node.state_dir).absolute(),
    )
    return dataclasses.replace(settings, node=node)


def _read(path: Path) -> str:
    """The text of the settings file, which nobody but its owner may write: it names programs that root runs."""
    try:
        with path.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            data = opened.read(MAX_BYTES + 1)
    except OSError as e:
        hint = "`ca-bridge settings init` writes a commented one"
        problem = SettingsProblem("", "a settings file", f"{e.strerror}", path)
        raise SettingsError([problem], hint=hint) from None
    if stat.S_IMODE(mode) & 0o022 and os.geteuid() == 0:
        found = f"mode {stat.S_IMODE(mode):04o}"
        problem = SettingsProblem("", "a file that only its owner can write", found, path)
        raise SettingsError([problem], hint=f"chmod go-w {path}")
    if len(data) > MAX_BYTES:
        raise SettingsError([SettingsProblem("", f"at most {MAX_BYTES} bytes", "more", path)])
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise SettingsError([SettingsProblem("", "UTF-8 text", f"byte {e.start} is not", path)]) from None


def parse(text: str, file: Path | None = None) -> Settings:
    """
    Settings from TOML text.

    Raises:
        SettingsError: With every problem of the tables that are not a backend's.
    """
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise SettingsError([SettingsProblem("", "TOML", _without_value(e), file)]) from None
    source = Source(file, text)
    reader = Reader(source)
    tables = reader.tables(
        document, ("node", "renewal", "restart", "hooks", "cluster", "audit", "backups", "backend", "authority")
    )
    authorities, authority_tables = _authorities(reader, tables["authority"], tables["backend"])
    settings = Settings(
        source=source,
        node=reader.read(NodeSettings, tables["node"], ("node",)) or NodeSettings(),
        renewal=reader.read(RenewalSettings, tables["renewal"], ("renewal",)) or RenewalSettings(),
        restart=reader.read(RestartSettings, tables["restart"], ("restart",)) or RestartSettings(),
        hooks=reader.read(HookSettings, tables["hooks"], ("hooks",)) or HookSettings(),
        cluster=reader.read(ClusterSettings, tables["cluster"], ("cluster",)) or ClusterSettings(),
        audit=reader.read(AuditSettings, tables["audit"], ("audit",)) or AuditSettings(),
        backups=reader.read(BackupSettings, tables["backups"], ("backups",)) or BackupSettings(),
        backends=_backends(reader, tables["backend"]),
        authorities=authorities,
        authority_tables=authority_tables,
    )
    reader.raise_problems()
    return settings


def _without_value(error: Exception) -> str:
    """The parser's reason; it quotes single characters at most, never a value."""
    return "nesting without end" if isinstance(error, RecursionError) else str(error)


def _backends(reader: Reader, table: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    for name, backend in table.items():
        if not isinstance(backend, dict):
            reader.add(("backend", name), "a table", _found(backend))
        elif not isinstance(backend.get("type"), str):
            reader.add(("backend", name, "type"), 'a text such as "vault"', _found(backend.get("type")))
    return {name: backend for name, backend in table.items() if isinstance(backend, dict)}


def _authorities(
    reader: Reader, table: Mapping[str, Any], backends: Mapping[str, Any]
) -> tuple[dict[str, AuthoritySettings], dict[str, Mapping[str, Any]]]:
    ours = {f.name for f in dataclasses.fields(AuthoritySettings)}
    read: dict[str, AuthoritySettings] = {}
    rest: dict[str, Mapping[str, Any]] = {}
    for name, authority in table.items():
        key = ("authority", name)
        if name not in AUTHORITIES:
            reader.add(key, f"one of {', '.join(AUTHORITIES)}", repr(name))
        elif not isinstance(authority, dict):
            reader.add(key, "a table", _found(authority))
        else:
            own = {k: v for k, v in authority.items() if k in ours}
            settings = reader.read(AuthoritySettings, own, key)
            if settings is not None and settings.backend not in backends:
                known = ", ".join(backends) or "a backend, but there is no [backend.NAME] table"
                reader.add((*key, "backend"), f"the name of a backend: {known}", repr(settings.backend))
            if settings is not None:
                read[name], rest[name] = settings, {k: v for k, v in authority.items() if k not in ours}
    return read, rest


class Reader:
    """Reads tables into dataclasses and collects all problems."""

    def __init__(self, source: Source, locate: Callable[[Key], Key] = lambda key: key) -> None:
        """
        Args:
            source: For file and line.
            locate: From a key as it is read to the key as it is in the file (they differ in merged tables).
        """
        self._source = source
        self._locate = locate
        self.problems: list[SettingsProblem] = []

    def add(self, key: Key, wanted: str, found: str) -> None:
        """Note one problem, once."""
        problem = self._source.problem(self._locate(key), wanted, found)
        if problem not in self.problems:
            self.problems.append(problem)

    def raise_problems(self) -> None:
        """
        Raises:
            SettingsError: If there is any.
        """
        if self.problems:
            raise SettingsError(self.problems)

    def tables(self, document: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Mapping[str, Any]]:
        """The top-level tables; a missing one is empty, an unknown one a problem."""
        for name, value in document.items():
            if name not in names:
                self.add((name,), f"one of {', '.join(names)}", _name_found(name, names))
            elif not isinstance(value, dict):
                self.add((name,), "a table", _found(value))
        return {name: value if isinstance(value := document.get(name), dict) else {} for name in names}

    def read(self, schema: type[T], table: Mapping[str, Any], prefix: Key, *, partial: bool = False) -> T | None:
        """
        An instance of the dataclass `schema`, or None when something was wrong.

        Args:
            schema: Its fields without a default are required.
            table: As TOML gave it.
            prefix: Where the table is.
            partial: Required keys may be missing (then the result is None); what is there is still checked.
        """
        before = len(self.problems)
        hints, values, known, missing = typing.get_type_hints(schema), {}, set(), False
        for f in dataclasses.fields(typing.cast(Any, schema)):
            keys = _keys_of(f.name, hints[f.name])
            known |= set(keys)
            present = [key for key in keys if key in table]
            if _bare(hints[f.name]) is Secret and f.name in table:
                known.add(f.name)
                self.add((*prefix, f.name), f"{' or '.join(keys)}: secrets are never written here", "a value")
            elif len(present) > 1:
                self.add((*prefix, present[1]), f"one of {', '.join(keys)}", f"{' and '.join(present)}")
            elif present:
                values[f.name] = self._value(hints[f.name], table[present[0]], (*prefix, present[0]))
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                missing = True
                if not partial:
                    self.add((*prefix, keys[0]), _wanted(hints[f.name]), "nothing")
        for name in table:
            if name not in known:
                self.add((*prefix, name), f"one of {', '.join(sorted(known))}", _name_found(name, known))
        if missing or len(self.problems) > before:
            return None
        return self._made(schema, values, prefix)

    def _made(self, schema: type[T], values: Mapping[str, Any], prefix: Key) -> T | None:
        instance = schema(**values)
        found = list(getattr(instance, "problems", lambda: ())())
        for problem in found:
            self.add((*prefix, *problem.key.split(".")) if problem.key else prefix, problem.wanted, problem.found)
        return None if found else instance

    def _value(self, hint: Any, value: Any, key: Key) -> Any:
        hint = _bare(hint)
        if dataclasses.is_dataclass(hint) and not hasattr(hint, "from_setting") and hint is not Secret:
            if isinstance(value, dict):
                return self.read(typing.cast(type[Any], hint), value, key)
            self.add(key, "a table", _found(value))
            return None
        if typing.get_origin(hint) is dict:
            return self._texts(value, key)
        try:
            return _scalar(hint, value, key)
        except ValueError as e:
            # in the place of a secret's place the secret itself may stand
            self.add(key, str(e), "something else" if hint is Secret else _found(value))
            return None

    def _texts(self, value: Any, key: Key) -> dict[str, str]:
        if not isinstance(value, dict):
            self.add(key, "a table of texts", _found(value))
            return {}
        for name, text in value.items():
            if not isinstance(text, str):
                self.add((*key, name), "a text", _found(text))
        return value


def _bare(hint: Any) -> Any:
    """The type of a field without its `| None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [part for part in typing.get_args(hint) if part is not type(None)]
        return rest[0] if len(rest) == 1 else _merged_literal(rest)
    return hint


def _merged_literal(parts: list[Any]) -> Any:
    return Literal[tuple(choice for part in parts for choice in typing.get_args(part))]


def _keys_of(name: str, hint: Any) -> list[str]:
    return [f"{name}_{kind}" for kind in _SECRET_KINDS] if _bare(hint) is Secret else [name]


def _wanted(hint: Any) -> str:
    """What a missing key should be, in words."""
    bare = _bare(hint)
    if typing.get_origin(bare) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(bare)))}"
    return {Path: "an absolute path", timedelta: "a duration", Secret: "where the secret is"}.get(bare, "a value")


def _scalar(hint: Any, value: Any, key: Key) -> Any:
    """
    A value of this type.

    Raises:
        ValueError: Its text is what was wanted.
    """
    if hasattr(hint, "from_setting"):
        return hint.from_setting(value)
    if hint is timedelta:
        return parse_duration(value)
    if hint is bool or hint is int:
        return _of_type(hint, value)
    if typing.get_origin(hint) is tuple:
        return _texts_tuple(value)
    if typing.get_origin(hint) is Literal:
        return _choice(hint, value)
    return _text(hint, value, key)


def _of_type(hint: type, value: Any) -> Any:
    if type(value) is not hint:  # True is an int, too
        raise ValueError("true or false" if hint is bool else "a whole number")
    return value


def _texts_tuple(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("a list of texts")
    return tuple(value)


def _choice(hint: Any, value: Any) -> Any:
    if value not in typing.get_args(hint):
        raise ValueError(_wanted(hint))
    return value


def _text(hint: Any, value: Any, key: Key) -> Any:
    """A text, a path, or where a secret is."""
    if not isinstance(value, str) or not value:
        raise ValueError("a text")
    if hint is Secret:
        kind = key[-1].rpartition("_")[2]
        if kind == "env" and not re.fullmatch(r"[A-Za-z_{][A-Za-z0-9_{}]*", value):  # it may be a pattern with {usage}
            raise ValueError("the name of an environment variable")
        return Secret(kind, str(_absolute(value)) if kind == "file" else value)
    return _absolute(value) if hint is Path else value


def _absolute(value: str) -> Path:
    if not value.startswith("/") or "\0" in value:
        raise ValueError("an absolute path")
    return Path(value)


def _found(value: object) -> str:
    """What was found, short; `nothing` for a missing key."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a table"
    text = repr(value)
    return text if len(text) <= _LONGEST_FOUND else f"{text[:_LONGEST_FOUND]}…"


def _name_found(name: str, known: typing.Iterable[str]) -> str:
    import difflib  # noqa: PLC0415 (5 ms, for a wrong name alone)

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"{name!r} (did you mean {close[0]!r}?)" if close else repr(name)
