"""Tables `[certificate.NAME]` of further pairs: files on this node that kubeadm does not know, and what they must be."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bridge.errors import SettingsProblem
from bridge.pki.csr import Naming, alternative_names, general_name, subject_of
from bridge.secret import GIVEN
from bridge.settings import address_of, command_words
from bridge.specs import EKU, MASTERS, CertificateSpec, Component, KeyAlgorithm, pair_spec

_ACCOUNT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\$?(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
#: The most permissive mode of a key: programs that read it run with a group of their own.
MOST_OF_A_KEY = 0o640


@dataclass(frozen=True, slots=True)
class Mode:
    """The permissions of a key's file: for its owner, and at most for a group that may read it."""

    bits: int

    @classmethod
    def from_setting(cls, value: object) -> Mode:
        """A mode such as `"0640"`."""
        bits = int(value, 8) if isinstance(value, str) and re.fullmatch(r"0?[0-7]{3}", value) else 0
        if not bits & 0o400 or bits & ~MOST_OF_A_KEY:
            raise ValueError('"0600", "0640", "0400" or "0440": a key is for its owner, and perhaps for a group')
        return cls(bits)

    def __str__(self) -> str:
        return f"{self.bits:04o}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFiles:
    """The files of a pair at one place."""

    certificate_file: Path  #: The certificate, then its intermediates.
    key_file: Path  #: Its private key; the same file as `certificate_file` if the program reads both from one file.
    #: A file for programs that verify the certificate: its intermediates, then the certificates of the CA. ca-bridge
    #: writes it, so each pair needs a file of its own.
    ca_file: Path | None = None
    #: The owner of the files, such as `"haproxy"` or `"root:haproxy"`. If empty, files keep their owner, and new files
    #: belong to root.
    owner: str = ""
    #: The mode of `key_file`. If not set, the file keeps its mode as far as a key may have it, and a new file gets
    #: `"0600"`.
    key_mode: Mode | None = None

    def problems(self) -> Iterator[SettingsProblem]:
        """Paths and owners that can't be used."""
        for key, path in self.paths():
            if ".." in path.parts or path == Path("/"):
                yield SettingsProblem(key, "the absolute path of a file, without ..", repr(str(path)))
        if self.ca_file is not None and self.ca_file in (self.certificate_file, self.key_file):
            yield SettingsProblem("ca_file", "a file of its own", repr(str(self.ca_file)))
        if self.owner and not _ACCOUNT.fullmatch(self.owner):
            yield SettingsProblem("owner", 'a user, or a user and a group such as "root:haproxy"', repr(self.owner))

    def paths(self) -> list[tuple[str, Path]]:
        """Each file with its settings key."""
        paths = [("certificate_file", self.certificate_file), ("key_file", self.key_file)]
        paths += [("ca_file", self.ca_file)] if self.ca_file is not None else []
        return paths if self.key_file != self.certificate_file else paths[:1] + paths[2:]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSettings(PairFiles):
    """Table `[certificate.NAME]` of a further pair; its tables `[certificate.NAME.copies.NAME]` are `PairFiles`."""

    name: str = field(default="", metadata={GIVEN: True})
    node: str = field(default="node", metadata={GIVEN: True})
    copies: tuple[PairFiles, ...] = field(default=(), metadata={GIVEN: True})
    authority: Literal["ca", "etcd-ca", "front-proxy-ca"]  #: The CA that signs it.
    common_name: str  #: The CN of its subject; here and in `sans`, `{node}` stands for the node's name.
    organizations: tuple[str, ...] = ()  #: The O values of its subject; for a Kubernetes client, its groups.
    sans: tuple[str, ...] = ()  #: Its DNS names and IP addresses.
    usages: tuple[str, ...] = ("server",)  #: `"server"`, `"client"`, or both.
    #: The type of its next key; `"same"` keeps the type and size of the old key. If not set, as in `[renewal]`.
    key: KeyAlgorithm | Literal["same"] | None = None
    #: The command that makes its program read it again, such as `"systemctl reload haproxy"`. It runs as root after
    #: each installation, and after a rollback.
    reload: str = ""
    #: The manifest of the static pod that reads it when it starts, such as a load balancer's or a KMS plug-in's: ca-bridge
    #: moves it out of its directory and back, like a component's.
    static_pod: Path | None = None
    #: The component that reads it, such as an API server with `--tls-sni-cert-key`; it is restarted as after a renewal
    #: of its other certificates.
    component: Literal["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet"] | None = None
    #: An address and port that serves the pair. After an installation a TLS handshake there has to show the new
    #: certificate, or ca-bridge restores the old pair.
    prove: str = ""
    #: The name that the handshake requests, and that has to be in the certificate. If empty, the first of `sans`.
    server_name: str = ""

    def problems(self) -> Iterator[SettingsProblem]:
        """Check what types can't express."""
        yield from PairFiles.problems(self)
        yield from self._name_problems()
        if not self.usages or set(self.usages) - {"server", "client"} or len(set(self.usages)) != len(self.usages):
            yield SettingsProblem("usages", '["server"], ["client"] or both', repr(list(self.usages)))
        if len(ways := [key for key in ("reload", "static_pod", "component") if getattr(self, key)]) > 1:
            yield SettingsProblem(ways[-1], "one of reload, static_pod and component", " and ".join(ways))
        if self.static_pod is not None and self.static_pod.stem in {component.value for component in Component}:
            yield SettingsProblem("static_pod", "component for one of kubeadm's", repr(str(self.static_pod)))
        if self.reload and not command_words(self.reload):
            yield SettingsProblem("reload", "a command", repr(self.reload))
        if self.prove and self.place is None:
            yield SettingsProblem("prove", "an address and a port such as 127.0.0.1:8443", repr(self.prove))
        if self.prove and "server" not in self.usages:
            yield SettingsProblem("prove", 'usages with "server", since a server shows it', repr(list(self.usages)))
        if self.prove and not self.shown_name:
            yield SettingsProblem("prove", "sans or a server_name to look for", "neither")

    def _name_problems(self) -> Iterator[SettingsProblem]:
        if MASTERS in self.organizations:
            yield SettingsProblem("organizations", "no group that no RBAC rule can hold back", MASTERS)
        for key, texts in (("common_name", [self.common_name]), ("organizations", self.organizations)):
            if odd := [text for text in texts if not text.strip() or not text.isprintable()]:
                yield SettingsProblem(key, "a text of printable characters", repr(odd[0]))
        if "server" in self.usages and not self.sans:
            yield SettingsProblem("sans", "the names and addresses of the server: no client looks at a CN", "none")
        for san in self.named_sans:
            try:
                general_name(san)
            except ValueError:
                yield SettingsProblem("sans", "DNS names and IP addresses", repr(san))
        if again := [san for san, count in Counter(self.named_sans).items() if count > 1]:
            yield SettingsProblem("sans", "each once", f"{again[0]!r} again")

    @property
    def places(self) -> tuple[PairFiles, ...]:
        """Its own files, then its copies' files."""
        return (self, *self.copies)

    @property
    def named_sans(self) -> tuple[str, ...]:
        """Its SANs on this node."""
        return tuple(san.replace("{node}", self.node) for san in self.sans)

    @property
    def naming(self) -> Naming:
        """Its subject and SANs."""
        common_name = self.common_name.replace("{node}", self.node)
        return Naming(subject=subject_of(common_name, self.organizations), sans=alternative_names(self.named_sans))

    @property
    def spec(self) -> CertificateSpec:
        """The spec of the pair's certificate, for its CA and for the node."""
        return pair_spec(self.name, self.authority, (_EKUS[usage] for usage in self.usages), self.reader)

    @property
    def reader(self) -> Component | None:
        """The component that reads it."""
        return None if self.component is None else Component(self.component)

    @property
    def place(self) -> tuple[str, int] | None:
        """Host and port of `prove`."""
        place = address_of(self.prove)
        return place if place and place[1] else None  # no server listens at port 0

    @property
    def shown_name(self) -> str:
        """The name that a handshake requests."""
        return self.server_name or next((san for san in self.named_sans if not san.startswith("*")), "")

    @property
    def is_read_again(self) -> bool:
        """Whether the settings say how its own program reads it again."""
        return bool(self.reload) or self.static_pod is not None


_EKUS = {"server": EKU.SERVER_AUTH, "client": EKU.CLIENT_AUTH}


def collisions(pairs: Sequence[PairSettings], taken: Sequence[Path]) -> Iterator[tuple[str, str, str]]:
    """Pairs that share a file with another pair, or with `taken`: pair, wanted, found. Links are resolved later."""
    users: dict[Path, str] = {}
    others = frozenset(taken)
    for pair in pairs:
        for number, files in enumerate(pair.places):
            for _, path in files.paths():
                if path in users:
                    found = f"{path}, which {users[path]} names as well"
                    yield pair.name, "files of its own, since ca-bridge writes them", found
                elif not others.isdisjoint((path, *path.parents)):
                    yield pair.name, "a file that is not kubeadm's, the kubelet's or ca-bridge's", str(path)
                users[path] = pair.name if not number else f"a copy of {pair.name}"
