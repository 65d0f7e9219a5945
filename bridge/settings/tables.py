"""The tables of the settings file, as dataclasses: keys, defaults, and checks that types alone can't express."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

from cryptography.x509 import Certificate

from bridge.errors import SettingsError, SettingsProblem
from bridge.pki import csr
from bridge.pki.expiry import Before, duration_text
from bridge.pki.kubeadm_names import is_host_name, is_node_name
from bridge.pki.verify import Expectation
from bridge.secret import GIVEN, Secret
from bridge.settings import Source, address_of, command_words, network_of
from bridge.settings.pair_tables import PairSettings
from bridge.settings.windows import Jitter, Windows
from bridge.specs import AUTHORITIES, DEFAULT_CLUSTER, SPECS, SUPER_ADMIN, Component, KeyAlgorithm
from bridge.words import name_found

LOCALTIME = Path("/etc/localtime")
_WANTED_ZONE = 'the name of a time zone that this machine knows, such as "Europe/Berlin", or "" for the machine\'s own'


@dataclass(frozen=True, slots=True)
class Zone:
    """A time zone's name in the IANA database; empty: the machine's own zone."""

    name: str = ""

    @classmethod
    def from_setting(cls, value: object) -> Zone:
        """A time zone such as `"Europe/Berlin"`."""
        if not isinstance(value, str) or (value and _named_zone(value) is None):
            raise ValueError(_WANTED_ZONE)
        return cls(value)

    def __str__(self) -> str:
        return str(self.resolve())

    def resolve(self) -> tzinfo:
        """Return the zone, whose `str` is its name; SettingsError: the machine's own zone is not in its database."""
        zone = _named_zone(self.name) if self.name else _machines_zone()
        if zone is None:
            wanted = "the name of a time zone, since the machine's own is not in its database"
            found = f"TZ={os.environ['TZ']!r}" if "TZ" in os.environ else str(LOCALTIME)
            raise SettingsError([SettingsProblem("renewal.window_zone", wanted, found)])
        return zone


def _machines_zone() -> tzinfo | None:
    """The machine's time zone as the C library finds it: TZ, then /etc/localtime, then UTC (tzset(3))."""
    text = os.environ.get("TZ")
    if text is None:
        return _zone_of_file(LOCALTIME) if LOCALTIME.exists() else UTC
    name = text.removeprefix(":")
    if not name:
        return UTC
    return _zone_of_file(Path(name)) if name.startswith("/") else _named_zone(name)


def _zone_of_file(path: Path) -> tzinfo | None:
    try:
        real = path.resolve()
        _, found, name = str(real).partition("/zoneinfo/")
        named = _named_zone(name.removeprefix("posix/")) if found else None
        if named is not None:
            return named
        with real.open("rb") as file:
            return ZoneInfo.from_file(file, key=str(path))  # a copy, as in some containers
    except (OSError, ValueError):
        return None


def _named_zone(name: str) -> tzinfo | None:
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):  # a directory, not a zone's file, or missing
        return None


@dataclass(frozen=True, slots=True)
class Version:
    """A Kubernetes version, as far as the program depends on it."""

    major: int
    minor: int

    @classmethod
    def from_setting(cls, value: object) -> Version:
        """A version such as `"1.37"` or `"v1.37.2"`."""
        match = re.fullmatch(r"v?(\d+)\.(\d+)(\.\d+)?", value) if isinstance(value, str) else None
        if match is None:
            raise ValueError('a Kubernetes version such as "1.37"')
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """Table `[node]`."""

    pki_dir: Path = Path("/etc/kubernetes/pki")  #: kubeadm's directory of certificates and keys.
    kubeconfig_dir: Path = Path("/etc/kubernetes")  #: kubeadm's directory of kubeconfigs.
    #: Backups (with keys), journal, lock and audit log; only root can read it.
    state_dir: Path = Path("/var/lib/ca-bridge")
    #: The kubelet's directory: its configuration, and its certificates below `pki`.
    kubelet_dir: Path = Path("/var/lib/kubelet")
    #: The API server's version, if the image tags of the static pods don't show it.
    kubernetes_version: Version | None = None
    #: The node's name in the cluster. If empty, it comes from the node's certificates, or else from the host name in
    #: lower case.
    name: str = ""
    #: kubeadm's clusterName, or your own name for the cluster; people and a CA desk's policy read it.
    cluster: str = DEFAULT_CLUSTER

    #: The CA desk's certificate or public key in PEM. If set, ca-bridge accepts only answer bundles that are signed
    #: with this key.
    desk_key: Path | None = None
    #: The certificate or public key of the administrator who signs orders (`bootstrap orders --sign-with`). If set,
    #: ca-bridge accepts only orders that are signed with this key.
    order_key: Path | None = None
    pairs: tuple[PairSettings, ...] = field(default=(), metadata={GIVEN: True})

    @property
    def node_name(self) -> str:
        """The node's name from the settings, or else the host's."""
        return self.name or os.uname().nodename.strip().lower()

    @property
    def taken(self) -> list[Path]:
        """Files and directories that are kubeadm's, the kubelet's or ours, and so no pair's."""
        bases = [spec.base for spec in SPECS.values()] + [authority.base for authority in AUTHORITIES.values()]
        paths = [self.pki_dir / f"{base}.{suffix}" for base in bases for suffix in ("crt", "key")]
        paths += [self.kubeconfig_dir / spec.base for spec in SPECS.values() if spec.kubeconfig]
        paths += [self.pki_dir / "sa.key", self.pki_dir / "sa.pub", self.kubeconfig_dir / "manifests"]
        return [*paths, self.kubelet_dir / "pki", self.state_dir]

    def problems(self) -> Iterator[SettingsProblem]:
        """A name that no node can have, so that no request bundle can carry it."""
        if self.name and not is_node_name(self.name):
            wanted = "a node's name, as `kubectl get nodes` has it (a-z, 0-9, '-' and '.')"
            yield SettingsProblem("name", wanted, repr(self.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewalSettings:
    """Table `[renewal]`."""

    #: A certificate is due when less than this is left; a percentage is of its whole lifetime.
    before: Before = field(default_factory=lambda: Before(remaining=timedelta(days=30)))
    validity: timedelta = timedelta(days=365)  #: The lifetime to request; the CA may grant less.
    min_validity: timedelta = timedelta(days=7)  #: A new certificate with a shorter lifetime is refused.
    #: Whether a new certificate may end before the certificate that it replaces.
    shorter: Literal["refuse", "allow"] = "refuse"
    #: The type of each new key; `"same"` keeps the type and size of the old key.
    key: KeyAlgorithm | Literal["same"] = "same"
    #: When `renew` without names may act. It also acts outside a window if a certificate would expire before the next
    #: two windows end.
    window: Windows = field(default_factory=Windows)
    window_zone: Zone = field(default_factory=Zone)  #: The time zone of `window`; if empty, the machine's.
    #: A run without a terminal first waits for a random time below this.
    jitter: Jitter = field(default_factory=Jitter)
    #: With `"superseded"` the CA revokes each replaced certificate, if the backend supports that.
    revoke: Literal["never", "superseded"] = "never"
    #: How long after the installation a replaced certificate is revoked; until then you can still go back to it.
    revoke_after: timedelta = timedelta(days=1)
    #: Whether `renew` without names renews a super-admin.conf on this node when it is due; with `"by-name"` only
    #: `ca-bridge renew super-admin.conf` does.
    super_admin: Literal["due", "by-name"] = "due"

    @property
    def left_alone(self) -> tuple[str, ...]:
        """Names of certificates that are renewed only by name."""
        return (SUPER_ADMIN,) if self.super_admin == "by-name" else ()

    def problems(self) -> Iterator[SettingsProblem]:
        """Durations that contradict each other."""
        if self.min_validity > self.validity:
            yield SettingsProblem("min_validity", "at most renewal.validity", duration_text(self.min_validity))
        if self.before.remaining is not None and self.before.remaining >= self.validity:
            wanted = "less than renewal.validity, or each run would renew again"
            yield SettingsProblem("before", wanted, duration_text(self.before.remaining))


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings:
    """Table `[policy]`; see `bridge.renewal.prepare`."""

    #: A CA desk's policy that also applies on this node: it does not renew a certificate whose names, key or lifetime
    #: the policy does not allow. If not set, a renewal copies the names of the live certificate, whatever they are.
    file: Path | None = None


@dataclass(frozen=True, slots=True)
class Components:
    """The components that are restarted after a renewal."""

    #: needed: those that keep using an old certificate; all: every user of a new one; listed: these of them.
    which: Literal["needed", "all", "listed"]
    listed: tuple[Component, ...] = ()

    @classmethod
    def from_setting(cls, value: object) -> Components:
        """`"needed"`, `"all"`, or a list of components."""
        if value == "needed" or value == "all":  # noqa: PLR1714 (mypy narrows these)
            return cls(value)
        known = {component.value: component for component in Component}
        names = value if isinstance(value, list) else []
        if not names or not all(isinstance(name, str) and name in known for name in names):
            raise ValueError(f"'needed', 'all', or a list of {', '.join(known)}")
        return cls("listed", tuple(known[name] for name in names))

    def __str__(self) -> str:
        return ", ".join(component.value for component in self.listed) or self.which


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartSettings:
    """Table `[restart]`."""

    #: How components are restarted. `"none"`: ca-bridge only lists them; `"static-pods"`: it moves their manifests
    #: away and back; `"command"`: it runs `commands`.
    method: Literal["none", "static-pods", "command"] = "none"
    #: What to restart after a renewal: components that still run on an old certificate, every component that uses a
    #: new certificate, or those in the list.
    components: Components = Components("needed")
    #: The restart command of each component; with `"static-pods"` ca-bridge also uses the kubelet's.
    commands: dict[str, str] = field(default_factory=dict)
    #: The limit for a component to stop, for it to start again, and for a command. A kubelet may wait 5 minutes
    #: before it restarts a crashed container.
    timeout: timedelta = timedelta(minutes=6)
    min_interval: timedelta = timedelta(minutes=10)  #: The shortest time between two restarts of the same component.
    #: What to do if the control plane does not work with the new certificates.
    on_failure: Literal["rollback", "keep"] = "rollback"
    prove_for: timedelta = timedelta(minutes=1)  #: The time limit for the proof that everything works.

    def problems(self) -> Iterator[SettingsProblem]:
        """Commands for unknown components, empty commands, or none."""
        known = [component.value for component in Component]
        for name, command in self.commands.items():
            if name not in known:
                yield SettingsProblem(f"commands.{name}", f"one of {', '.join(known)}", name_found(name, known))
            elif not command_words(command):
                yield SettingsProblem(f"commands.{name}", "a command", repr(command))
        if self.method == "command" and not self.commands:
            yield SettingsProblem("commands", 'a command for each component, for method = "command"', "none")

    def command(self, component: Component) -> list[str]:
        """The words of a component's command; empty if it has none."""
        return command_words(self.commands.get(component.value, ""))


@dataclass(frozen=True, slots=True)
class Commands:
    """Programs with their arguments."""

    texts: tuple[str, ...] = ()  #: Each is split into words as a shell does it, but no shell runs it.

    @classmethod
    def from_setting(cls, value: object) -> Commands:
        """A command, or a list of commands."""
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) and command_words(text) for text in texts):
            raise ValueError("a command such as \"/usr/local/bin/tell 'control plane'\", or a list of them")
        return cls(tuple(texts))

    def __str__(self) -> str:
        return "; ".join(self.texts)

    def words(self) -> list[list[str]]:
        """The words of each command."""
        return list(map(command_words, self.texts))


@dataclass(frozen=True, slots=True, kw_only=True)
class HookSettings:
    """Table `[hooks]`; see `bridge.renewal.hooks`."""

    #: The time limit for each command; after it, ca-bridge kills the command and all its child processes.
    timeout: timedelta = timedelta(minutes=1)
    #: Runs before a CA gets a request. If it fails, the renewal stops; exit status 75 means "not now".
    before: Commands = Commands()
    after_install: Commands = Commands()  #: Runs when new files are in place.
    success: Commands = Commands()  #: Runs when everything works with the new certificates.
    failure: Commands = Commands()  #: Runs when a certificate was not renewed, or a component does not work with it.


#: A DNS label, as the API requires for names of leases.
_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_WANTED_LABEL = "at most 63 small letters, digits and hyphens, a letter or digit first and last"
#: Three renewals, of some seconds each, must fit into it, and other nodes wait that long for a dead one.
_SHORTEST_LEASE, _LONGEST_LEASE = timedelta(seconds=15), timedelta(hours=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """Table `[cluster]`: the other control-plane nodes, before a component is restarted; see `bridge.control_plane.neighbours`."""

    #: If another node's etcd member or API server is unhealthy: wait for it and then refuse, refuse at once, or don't
    #: check.
    neighbours: Literal["wait", "refuse", "ignore"] = "wait"
    neighbour_wait: timedelta = timedelta(minutes=5)  #: How long to wait for an unhealthy node.
    lease: bool = True  #: Restart one node at a time, with a lease in kube-system; on a host of etcd alone, in etcd.
    lease_name: str = "ca-bridge"  #: The name of that lease.
    #: After this time other nodes may take the lease of a node that died; it must be longer than a restart of etcd or
    #: an API server takes.
    lease_duration: timedelta = timedelta(minutes=2)
    lease_wait: timedelta = timedelta(minutes=15)  #: How long to wait for the node that holds the lease.

    def problems(self) -> Iterator[SettingsProblem]:
        """Settings that the API does not accept or that the clock does not allow."""
        if not re.fullmatch(_LABEL, self.lease_name):
            yield SettingsProblem("lease_name", _WANTED_LABEL, repr(self.lease_name))
        if not _SHORTEST_LEASE <= self.lease_duration <= _LONGEST_LEASE:
            wanted = f"{duration_text(_SHORTEST_LEASE)} to {duration_text(_LONGEST_LEASE)}"
            yield SettingsProblem("lease_duration", wanted, duration_text(self.lease_duration))


@dataclass(frozen=True, slots=True)
class Size:
    """A number of bytes."""

    count: int

    @classmethod
    def from_setting(cls, value: object) -> Size:
        """A size such as `"10MiB"`."""
        match = re.fullmatch(r"([1-9][0-9]{0,6})(KiB|MiB|GiB)", value) if isinstance(value, str) else None
        if match is None:
            raise ValueError('a size such as "512KiB" or "10MiB"')
        return cls(int(match[1]) * _SIZE_UNITS[match[2]])

    def __str__(self) -> str:
        unit = next(name for name, size in reversed(_SIZE_UNITS.items()) if self.count % size == 0)
        return f"{self.count // _SIZE_UNITS[unit]}{unit}"


_SIZE_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSettings:
    """Table `[audit]`."""

    #: When `audit.jsonl` is larger than this, it is renamed to `audit-NUMBER.jsonl`.
    rotate_at: Size = Size(10 << 20)
    #: The limit for all files of the log together; above it ca-bridge deletes the oldest. If not set, it keeps all.
    keep_total: Size | None = None
    syslog: bool = False  #: Also send each line to /dev/log, where journald reads it.

    def problems(self) -> Iterator[SettingsProblem]:
        """Limits by which a file would be deleted before it is complete."""
        if self.keep_total is not None and self.keep_total.count < 2 * self.rotate_at.count:
            yield SettingsProblem("keep_total", f"at least twice rotate_at ({self.rotate_at})", str(self.keep_total))


@dataclass(frozen=True, slots=True)
class Paths:
    """Absolute paths without duplicates."""

    paths: tuple[Path, ...] = ()

    @classmethod
    def from_setting(cls, value: object) -> Paths:
        """A list of paths."""
        texts = value if isinstance(value, list) else [None]
        paths = tuple(Path(text) for text in texts if isinstance(text, str) and text.startswith("/"))
        if len(paths) != len(texts) or len(set(paths)) != len(paths) or any(_is_odd(path) for path in paths):
            raise ValueError('a list of absolute paths without .., each once, such as ["/root/.kube/config"]')
        return cls(paths)

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths)) or "none"


def _is_odd(path: Path) -> bool:
    return ".." in path.parts or "\0" in str(path) or path == Path("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiesSettings:
    """Table `[copies]`; see `bridge.state.copies`."""

    #: Copies of this node's kubeconfigs; each is updated when the certificate in it is renewed.
    files: Paths = Paths()


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSettings:
    """Table `[metrics]`; see `bridge.monitoring`."""

    file: Path | None = None  #: A file for node_exporter's textfile collector, which reads files that end in .prom.

    def problems(self) -> Iterator[SettingsProblem]:
        """Settings with which the collector would not read the file."""
        if self.file is not None and (self.file.suffix != ".prom" or ".." in self.file.parts):
            yield SettingsProblem("file", "a path that ends with .prom, without ..", repr(str(self.file)))


@dataclass(frozen=True, slots=True, kw_only=True)
class UserSettings:
    """Table `[users]`: limits for `kubeconfig user`; see `bridge.users`."""

    #: The lifetime to request, unless the command names another.
    validity: timedelta = timedelta(hours=8)
    #: The longest lifetime that the command may request and that a CA may grant.
    max_validity: timedelta = timedelta(hours=24)
    groups: tuple[str, ...] = ("*",)  #: Groups that may be requested, with `*` and `?` as in a shell.
    #: Names and groups of Kubernetes and kubeadm (`system:…`, `kubeadm:…`) that may be requested; all others of
    #: these prefixes are refused.
    allow: tuple[str, ...] = ()

    def problems(self) -> Iterator[SettingsProblem]:
        """Durations that contradict each other."""
        if self.validity > self.max_validity:
            yield SettingsProblem("validity", "at most users.max_validity", duration_text(self.validity))


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupSettings:
    """Table `[backups]`; see `bridge.state.backups.retire`."""

    #: How many backups to keep. After an installation ca-bridge deletes the oldest above this number, but never the
    #: newest, the newest that can be restored, nor, while a CA is replaced, the backup of `rotate-ca issue`.
    keep: int = 10
    #: ca-bridge also deletes backups that are older than this; usually longer than a certificate's lifetime.
    keep_for: timedelta = timedelta(days=400)

    def problems(self) -> Iterator[SettingsProblem]:
        """A `keep` below 1, since the newest backup is always kept."""
        if self.keep < 1:
            yield SettingsProblem("keep", "at least 1", str(self.keep))


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthoritySettings:
    """Table `[authority.NAME]`; its other keys belong to the backend."""

    backend: str  #: The name of a `[backend.NAME]` table.
    #: Subject attributes that this CA adds to every certificate, such as `"OU=Platform"`; CN and O are never allowed
    #: here.
    allow_extra_subject: tuple[str, ...] = ()
    #: For `renew --rehearse`: another `backend`, another `anchor` (a file with CA certificates), or other values for
    #: the backend's keys, such as `role`.
    rehearsal: dict[str, str] = field(default_factory=dict)
    #: For `rotate-ca`: the CA that replaces this one. `anchor` is a file with its certificate; another `backend`, or
    #: other values for the backend's keys, such as `mount`, apply from the moment at which it signs. With `anchor`
    #: alone the backend already belongs to the next CA, which gets no request before `rotate-ca issue`. With `cross`
    #: (see below) no node has to trust the next CA before it signs. With `above = "allowed"` the anchor may be a CA
    #: above the one that signs; nodes then trust all certificates below it. With `not_self_signed = "allowed"` the
    #: anchor may be an intermediate CA, which programs with OpenSSL's usual rules do not trust by itself.
    next: dict[str, str] = field(default_factory=dict)
    #: A file with a certificate that an earlier CA issued for this CA (the same name and key). ca-bridge appends it to
    #: each new certificate, so that clients that trust only the earlier CA accept the certificate.
    cross: Path | None = None

    def problems(self) -> Iterator[SettingsProblem]:
        """CN and O as exceptions, relative paths, and a next CA without a certificate."""
        named = {f"next.{key}": self.next.get(key) for key in ("anchor", "cross")}
        named |= {"rehearsal.anchor": self.rehearsal.get("anchor")}
        for key, path in named.items():
            if path is not None and not path.startswith("/"):
                yield SettingsProblem(key, "an absolute path", repr(path))
        if self.next and "anchor" not in self.next:
            yield SettingsProblem("next", "the file with the next CA's certificate as `anchor`", "none")
        for text in self.allow_extra_subject:
            name = text.partition("=")[0]
            if name not in EXTRA_SUBJECT_OIDS or "=" not in text:
                wanted = f"NAME=VALUE with NAME one of {', '.join(EXTRA_SUBJECT_OIDS)} (CN and O are the identity)"
                yield SettingsProblem("allow_extra_subject", wanted, repr(text))

    @property
    def names_next_alone(self) -> bool:
        """Whether the backend belongs to the next CA, and none is named for the former CA."""
        return bool(self.next) and set(self.next) <= {"anchor", "cross", "above", "not_self_signed"}

    @property
    def extra_subject(self) -> frozenset[tuple[str, str]]:
        """The further subject attributes that are allowed, as (OID, value)."""
        pairs = (text.partition("=") for text in self.allow_extra_subject)
        return frozenset((EXTRA_SUBJECT_OIDS[name], value) for name, _, value in pairs)


#: Kubernetes reads only CN (user) and O (groups), so these attributes change no rights.
EXTRA_SUBJECT_OIDS = {
    "OU": "2.5.4.11",
    "C": "2.5.4.6",
    "ST": "2.5.4.8",
    "L": "2.5.4.7",
    "STREET": "2.5.4.9",
    "DC": "0.9.2342.19200300.100.1.25",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateSettings:
    """Table `[certificate.NAME]`: properties to request for one certificate, whatever the live one has."""

    #: The DNS names and IP addresses of the kubelet's serving certificate. If set, a renewal also replaces a serving
    #: certificate that the cluster's CA did not sign.
    sans: tuple[str, ...] = ()

    def problems(self) -> Iterator[SettingsProblem]:
        """SANs that can't be this node's."""
        for san in self.sans:
            if not is_host(san):
                yield SettingsProblem("sans", "names and addresses of this node", repr(san))
            elif is_service(san):
                yield SettingsProblem("sans", "names of this node, and of no service", repr(san))


def is_host(text: str) -> bool:
    """Whether a text is a DNS name without a wildcard, or an address."""
    is_name = is_host_name(text) and not text.rpartition(".")[2].isdigit()
    return is_name or csr.address(text) is not None


def is_service(name: str) -> bool:
    """Whether pods reach a service, such as the API server, by this name; no kubelet may have it."""
    labels = name.split(".")
    return labels[0] == "kubernetes" or "svc" in labels[1:] or name == "localhost"


_IDENTITY = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,126}[A-Za-z0-9])?"
#: Three renewals must fit into it, and another replica waits that long for a dead one.
_SHORTEST_ELECTION, _LONGEST_ELECTION = timedelta(seconds=5), timedelta(minutes=5)
_MOST_THREADS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Table `[gateway]`."""

    #: The policy, which says who may get which certificate: a desk's policy with `[signer]` tables.
    policy: Path = Path("/etc/ca-bridge/gateway-policy.toml")
    inventory: Path = Path("/etc/ca-bridge/inventory.toml")  #: The nodes, with their names and addresses.
    #: A program that looks up a node that is not in the inventory; its only argument is the node's name.
    inventory_command: Path | None = None
    #: Also accept an address if DNS maps it to the node's name, and the name back to it.
    reverse_dns: bool = False
    kubeconfig: Path | None = None  #: How to reach the API server; if not set, the pod's service account is used.
    #: The directory of the audit log and of requests that wait for a CA; if not set, `gateway` below
    #: `node.state_dir`.
    state_dir: Path | None = None
    listen: str = "127.0.0.1:9880"  #: The address and port of `/metrics`, `/healthz` and `/readyz`.
    serve_status: bool = True  #: Whether to serve these pages.
    lease: bool = True  #: Let one of several replicas work at a time. Without it, run only one.
    lease_namespace: str = "kube-system"  #: The lease's namespace.
    lease_name: str = "ca-bridge-gateway"  #: The lease's name.
    lease_duration: timedelta = timedelta(seconds=10)  #: After this time another replica takes over the lease.
    identity: str = ""  #: The replica's name in the lease, before a random part; if empty, the host name.
    concurrency: int = 32  #: How many requests are processed at the same time.
    #: New requests a minute from one user. For a node in the inventory whose request is allowed, only `node_rate`
    #: counts.
    requester_rate: int = 120
    node_rate: int = 12  #: New requests a minute from one user for one node, and also for one pod.
    pod_rate: int = 600  #: New requests a minute for the pods of one namespace on one node.
    pod_namespace_rate: int = 3000  #: New requests a minute for all pods of one namespace.
    collect_every: timedelta = timedelta(seconds=30)  #: How often the gateway asks a CA for an answer.
    pending_for: timedelta = timedelta(hours=24)  #: A request fails if the CA has not answered it after this time.
    min_validity: timedelta = timedelta(minutes=5)  #: A certificate that ends sooner than this is not issued.

    def problems(self) -> Iterator[SettingsProblem]:
        """Settings that the API or this machine does not accept, or that the clock does not allow."""
        for key in ("lease_namespace", "lease_name"):
            if not re.fullmatch(_LABEL, getattr(self, key)):
                yield SettingsProblem(key, _WANTED_LABEL, repr(getattr(self, key)))
        if self.identity and not re.fullmatch(_IDENTITY, self.identity):
            yield SettingsProblem("identity", "letters, digits, hyphens, dots", repr(self.identity))
        if not _SHORTEST_ELECTION <= self.lease_duration <= _LONGEST_ELECTION:
            wanted = f"{duration_text(_SHORTEST_ELECTION)} to {duration_text(_LONGEST_ELECTION)}"
            yield SettingsProblem("lease_duration", wanted, duration_text(self.lease_duration))
        if address_of(self.listen) is None:
            yield SettingsProblem("listen", "an address and a port such as 127.0.0.1:9880", repr(self.listen))
        for key in ("requester_rate", "node_rate", "pod_rate", "pod_namespace_rate"):
            if getattr(self, key) < 1:
                yield SettingsProblem(key, "at least 1", str(getattr(self, key)))
        if not 1 <= self.concurrency <= _MOST_THREADS:
            yield SettingsProblem("concurrency", f"1 to {_MOST_THREADS}", str(self.concurrency))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Table `[serve]`."""

    #: The address and port that nodes connect to.
    listen: str = "0.0.0.0:9443"
    certificate: Path = Path("/etc/ca-bridge/serve.crt")  #: The server certificate with its chain, in PEM.
    key: Path = Path("/etc/ca-bridge/serve.key")  #: The private key of `certificate`, not encrypted.
    #: The CA certificates (PEM) for the certificates of people who decide; without it no person can log in.
    approvers_ca: Path | None = None
    #: The URL of a PostgreSQL database, without a password in it; if empty, SQLite in the file `door.db` of `node.state_dir`.
    database: str = ""
    database_password: Secret | None = None  #: The password of the database's user.
    connections: int = 1000  #: How many connections may be open at the same time.
    connections_per_peer: int = 64  #: The same for one address.
    #: How many requests a minute one address may send; all nodes behind a load balancer that hides addresses share one.
    requests_per_minute: int = 6000
    threads: int = 32  #: How many requests are read and answered at the same time.
    exchange_for: timedelta = timedelta(seconds=20)  #: A request that takes longer, including its answer, is cut off.
    #: How many requests may wait for an answer; a tenth of them if the door has not reached their CA yet.
    waiting: int = 10000
    waiting_per_peer: int = 500  #: The same for one address.
    #: The addresses and networks that may read `/metrics`, which has the nodes' names; if empty, all.
    metrics_for: tuple[str, ...] = ()
    #: How long answered requests are kept with their answers, and certificates after their end.
    keep: timedelta = timedelta(days=90)

    def problems(self) -> Iterator[SettingsProblem]:
        """An invalid address, and numbers that let no request in."""
        if address_of(self.listen) is None:
            yield SettingsProblem("listen", "an address and a port such as 0.0.0.0:9443", repr(self.listen))
        for text in (text for text in self.metrics_for if network_of(text) is None):
            yield SettingsProblem("metrics_for", "addresses, and networks such as 10.0.0.0/8", repr(text))
        for key in ("connections", "connections_per_peer", "requests_per_minute", "waiting", "waiting_per_peer"):
            if getattr(self, key) < 1:
                yield SettingsProblem(key, "at least 1", str(getattr(self, key)))
        if not 1 <= self.threads <= _MOST_THREADS:
            yield SettingsProblem("threads", f"1 to {_MOST_THREADS}", str(self.threads))
        if self.exchange_for < timedelta(seconds=1):
            yield SettingsProblem("exchange_for", "at least 1s", duration_text(self.exchange_for))
        if self.keep < timedelta(days=1):
            yield SettingsProblem("keep", "at least 1d", duration_text(self.keep))
        if self.database and not re.match(r"postgresql(\+psycopg)?://", self.database):
            yield SettingsProblem("database", "a URL such as postgresql://USER@HOST/NAME", "another text")
        # the part of a URL that parsers take for a password, which may have any character
        if re.match(r"\w[^:]*://.*:.*@", self.database) or re.search(r"[?&][^=]*password=", self.database):
            yield SettingsProblem("database", "no password in it: `database_password_file` says where it is", "one")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApproverSettings:
    """Table `[approver]`: for a person who decides, on that person's machine."""

    url: str = ""  #: The door's URL, such as `https://ca-door.corp.example:9443`.
    ca_file: Path | None = None  #: CA certificates (PEM) for the door's server certificate.
    certificate: Path | None = None  #: The person's certificate (PEM), for TLS and for each decision.
    key: Path | None = None  #: The private key of `certificate` (PEM, not encrypted), which signs each decision.

    def problems(self) -> Iterator[SettingsProblem]:
        """A URL that can't be a door's."""
        if self.url and not re.fullmatch(r"https://[^/@\s?#]+/?", self.url):
            yield SettingsProblem("url", "https://HOST[:PORT], without a path", repr(self.url))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The complete settings file; backends' tables are raw."""

    source: Source
    node: NodeSettings = field(default_factory=NodeSettings)
    renewal: RenewalSettings = field(default_factory=RenewalSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    restart: RestartSettings = field(default_factory=RestartSettings)
    hooks: HookSettings = field(default_factory=HookSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    audit: AuditSettings = field(default_factory=AuditSettings)
    backups: BackupSettings = field(default_factory=BackupSettings)
    copies: CopiesSettings = field(default_factory=CopiesSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    serve: ServeSettings = field(default_factory=ServeSettings)
    approver: ApproverSettings = field(default_factory=ApproverSettings)
    users: UserSettings = field(default_factory=UserSettings)
    backends: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    authorities: Mapping[str, AuthoritySettings] = field(default_factory=dict)
    kubelet_server: CertificateSettings | None = None  #: Table `[certificate.kubelet-server]`; None: it is not set.
    #: By authority: the keys of its table that belong to the backend.
    authority_tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def serving_sans(self) -> tuple[str, ...]:
        """The SANs of the kubelet's serving certificate, if the settings have any."""
        return self.kubelet_server.sans if self.kubelet_server is not None else ()

    def extra_subject(self, authority: str) -> frozenset[tuple[str, str]]:
        """The subject attributes, as (OID, value), that this authority's certificates may have or lack."""
        keys = self.authorities.get(authority)
        return keys.extra_subject if keys is not None else frozenset()

    def expectation(
        self, authority: str, anchors: tuple[Certificate, ...], anchor_name: str, now: datetime
    ) -> Expectation:
        """The usual demands on an answer of this authority's CA; a caller replaces what differs in its case."""
        return Expectation(
            anchors=anchors,
            anchor_name=anchor_name,
            now=now,
            min_validity=self.renewal.min_validity,
            shorter_allowed=self.renewal.shorter == "allow",
            extra_subject=self.extra_subject(authority),
        )

    def embedded(self, authority: str, bundle: tuple[Certificate, ...]) -> tuple[Certificate, ...]:
        """The CAs for a new kubeconfig: all while the CA is replaced, else the first, which every kubeadm version accepts."""
        keys = self.authorities.get(authority)
        return bundle if keys is not None and keys.next else bundle[:1]


#: Keys of the table that do not belong to the backend.
_OURS = ("backend", "anchor", "cross", "above", "not_self_signed")


def for_rehearsal(settings: Settings) -> Settings:
    """The settings for a rehearsal (pure)."""
    return _overlaid(settings, {name: keys.rehearsal for name, keys in settings.authorities.items()})


def for_next(settings: Settings, authorities: Collection[str]) -> Settings:
    """The settings with which these authorities' next CAs sign (pure)."""
    return _overlaid(settings, {name: keys.next for name, keys in settings.authorities.items() if name in authorities})


def _overlaid(settings: Settings, tables: Mapping[str, Mapping[str, str]]) -> Settings:
    """Override authorities' values; if another backend replaces theirs, their own keys do not count."""
    authorities, own = dict(settings.authorities), dict(settings.authority_tables)
    for name, over in tables.items():
        former = authorities[name]
        backend = over.get("backend", former.backend)
        kept = own.get(name, {}) if backend == former.backend else {}
        cross = Path(over["cross"]) if "cross" in over else None
        authorities[name] = replace(former, backend=backend, cross=cross if over else former.cross)
        own[name] = {**kept, **{key: value for key, value in over.items() if key not in _OURS}}
    replaced = {authority.backend for authority in settings.authorities.values()}
    replaced -= {authority.backend for authority in authorities.values()}
    backends = {name: table for name, table in settings.backends.items() if name not in replaced}
    return replace(settings, authorities=authorities, authority_tables=own, backends=backends)
