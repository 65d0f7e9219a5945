"""
Checks that everything kubeadm needs exists and is right, beyond kubeadm's own checks.

kubeadm overlooks a missing `sa.key` or `etcd/server.key` and fails minutes later with an unrelated message, creates a
CA where a CA certificate is missing, and never compares a key with its certificate or a name with its configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from bridge.bootstrap import Certificates, Places, Role, authority_trouble, ca_keys, live, shared_key, traces_of_cluster
from bridge.bootstrap.desired import DesiredNode, LeftoversError, NotWholeError, OtherNodeDesiredError
from bridge.errors import BridgeError
from bridge.node import kubeconfig, pairs
from bridge.node.kubeadm_config import KubeadmConfig, KubeadmConfigError
from bridge.node.kubeconfig import KubeconfigError
from bridge.node.pairs import is_sa_pair
from bridge.pki.certificates import UNREADABLE, common_names, load_pem_certificates, san_entries
from bridge.pki.csr import alternative_names, names_of
from bridge.pki.kubeadm_names import NoFactError, identity_violations, naming
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES, CA, KUBELET_CONF, KUBELET_SERVER, CertificateSpec
from bridge.system.paths import Exposure, open_secret
from bridge.words import some

#: Reads a file; None: there is no such file.
Read = Callable[[Path], bytes | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLook:
    """One inspection of a node's files."""

    places: Places
    role: Role
    read: Read
    now: datetime
    node: str = ""  #: Empty: names are not checked.
    config: KubeadmConfig | None = None  #: kubeadm's configuration, if known.
    settings: Settings

    def problems(self) -> list[str]:
        """Return everything missing or wrong, each as `PATH: wanted …, found …`; empty: kubeadm may start."""
        problems = [f"{path}: wanted no CA's private key on a node, found one" for path in ca_keys(self.places)]
        anchors: dict[str, tuple[x509.Certificate, ...]] = {}
        problems += self._workers_ca(anchors) if self.role == "worker" else self._authorities(anchors)
        for spec in self.places.specs(self.role):
            problems += self.problems_of(spec, anchors.get(spec.authority.name, ()))
        if self.role != "worker":
            problems += self._service_account()
        return problems

    def missing(self) -> list[Path]:
        """Return the missing files."""
        return [path for path in self.files() if self.read(path) is None]

    def files(self) -> list[Path]:
        """Return all files of a complete node, except kubeadm's configuration."""
        places = self.places
        paths: list[Path] = []
        if self.role != "worker":
            paths += [places.authority(authority) for authority in places.authorities(self.role)]
            paths += [places.sa_key, places.sa_public]
        for spec in places.specs(self.role):
            paths += self.files_of(spec)
        return paths

    def files_of(self, spec: CertificateSpec) -> list[Path]:
        """Return the files of one certificate."""
        places = self.places
        if spec.name == KUBELET_CONF:
            return [places.kubeconfigs / spec.base, places.kubelet_current]
        return [places.kubeconfigs / spec.base] if spec.kubeconfig else list(places.pair(spec))

    # --- CAs ----------------------------------------------------------------------------------------------------------

    def _authorities(self, anchors: dict[str, tuple[x509.Certificate, ...]]) -> Iterator[str]:
        for authority in self.places.authorities(self.role):
            path = self.places.authority(authority)
            data = self.read(path)
            if data is None:
                yield f"{path}: the CA's certificate is missing (kubeadm would make a CA of its own)"
                continue
            try:
                certificates = tuple(load_pem_certificates(data))
            except ValueError as e:
                yield f"{path}: wanted the CA's certificate, found {e}"
                continue
            if (trouble := authority_trouble(certificates, self.now)) is not None:
                yield f"{path}: {trouble}"
                continue
            anchors[authority.name] = certificates
        if (twice := shared_key(anchors)) is not None:
            yield twice

    def _workers_ca(self, anchors: dict[str, tuple[x509.Certificate, ...]]) -> Iterator[str]:
        path = self.places.authority(CA)
        if self.read(path) is not None:
            yield f"{path}: wanted no file (kubeadm writes it from kubelet.conf), found one"
        data = self.read(self.places.kubeconfigs / KUBELET_CONF)
        if data is None:
            return  # the certificate's own check reports the missing file
        try:
            anchors[CA.name] = tuple(load_pem_certificates(kubeconfig.parse(data).ca_data or b""))
        except (KubeconfigError, ValueError):
            yield f"{self.places.kubeconfigs / KUBELET_CONF}: it has no certificate of the CA"

    # --- certificates -------------------------------------------------------------------------------------------------

    def problems_of(self, spec: CertificateSpec, anchors: tuple[x509.Certificate, ...]) -> Iterator[str]:
        """Yield what is missing or wrong with one certificate, in the form of `problems`."""
        missing = [path for path in self.files_of(spec) if self.read(path) is None]
        for path in missing:
            yield f"{path}: there is no such file"
        if missing or not anchors:
            return
        path, *_ = self.files_of(spec)
        try:
            certificates, key_pem = self._pair(spec)
            if spec.kubeconfig:
                yield from self._kubeconfig(spec, path, anchors[0])
            name, authority = spec.authority.certificate_file, spec.authority.name
            expected = replace(self.settings.expectation(authority, anchors, name, self.now), min_validity=timedelta())
            findings = list(pairs.findings(spec, certificates, key_pem, expected))  # as of an answer to a request now
            if any(finding.kind == "other" for finding in findings):
                yield f"{path}: wanted the key of its certificate, found another one"
                return
            for violation in identity_violations(spec, certificates, anchors, name, expected.extra_subject):
                yield f"{path}: {violation}"
            for finding in findings:
                yield f"{path}: {finding.violation.got if finding.kind == 'incomparable' else finding.violation}"
            yield from self._names(spec, path, certificates[0])
        except KubeconfigError as e:
            yield f"{path}: {e}"
        except UNREADABLE as e:
            yield f"{path}: wanted a certificate and its key, found {type(e).__name__}: one that can't be read"

    def _pair(self, spec: CertificateSpec) -> tuple[list[x509.Certificate], bytes]:
        first, *rest = self.files_of(spec)
        if spec.name == KUBELET_CONF:
            data = self.read(rest[0]) or b""
            return load_pem_certificates(data), data
        data = self.read(first) or b""
        if spec.kubeconfig:
            certificates = load_pem_certificates(kubeconfig.parse(data).certificate_data or b"")
            return certificates, kubeconfig.key_data(data) or b""
        return load_pem_certificates(self.read(rest[0]) or b""), data

    def _kubeconfig(self, spec: CertificateSpec, path: Path, anchor: x509.Certificate) -> Iterator[str]:
        parsed = kubeconfig.parse(self.read(path) or b"")
        if not parsed.ca_data or load_pem_certificates(parsed.ca_data)[0] != anchor:
            yield f"{path}: wanted the certificate of ca.crt in it, found another one or none"
        if not parsed.server:
            yield f"{path}: it has no address of the API server"
        if spec.name != KUBELET_CONF:
            return
        # embedded data would need its own renewal, and fail once it has expired
        current = str(self.places.kubelet_current)
        if parsed.certificate_data or (parsed.certificate_file, parsed.key_file) != (current, current):
            yield f"{path}: wanted {current} as client-certificate and client-key, found something else"

    def _names(self, spec: CertificateSpec, path: Path, leaf: x509.Certificate) -> Iterator[str]:
        """Check the node's name and address, which `kubeadm join` does not compare."""
        if not spec.by_node or not self.node:
            return
        if spec.name == KUBELET_CONF:
            found = common_names(leaf.subject)
            if found != [f"system:node:{self.node}"]:
                yield f"{path}: wanted CN system:node:{self.node}, found {', '.join(found)}"
            return
        wanted = {("DNS", self.node)}
        if spec.name == KUBELET_SERVER and self.settings.serving_sans:
            wanted = names_of(alternative_names(self.settings.serving_sans))
        elif self.config is not None:
            wanted |= {("IP", self.config.address)}
            try:
                wanted |= self._kubeadms(spec, self.config)
            except (KubeadmConfigError, NoFactError) as e:
                yield f"{path}: its names were not checked: {e}"
        if lacking := wanted - san_entries(leaf):
            yield f"{path}: wanted {', '.join(f'{kind}:{value}' for kind, value in sorted(lacking))} among the SANs, found none"

    def _kubeadms(self, spec: CertificateSpec, config: KubeadmConfig) -> set[tuple[str, str]]:
        """Return the SANs that kubeadm would request; with an external CA it does not check them."""
        if spec.name == KUBELET_SERVER:
            return names_of(alternative_names(config.node_ips))
        return names_of(naming(spec, config.naming_facts(self.node, config.address)).sans) if config.cluster else set()

    # --- service accounts ---------------------------------------------------------------------------------------------

    def _service_account(self) -> Iterator[str]:
        """Check the service account keys; with an external CA kubeadm prints `Using existing sa keys` without a check."""
        key, public = self.read(self.places.sa_key), self.read(self.places.sa_public)
        for path, data in ((self.places.sa_key, key), (self.places.sa_public, public)):
            if data is None:
                yield f"{path}: the service account key is missing (kubeadm does not look for it)"
        if key is not None and public is not None and not is_sa_pair(key, public):
            yield f"{self.places.sa_public}: wanted the public key of sa.key, found another one"


def check(
    settings: Settings, places: Places, role: Role, files: Sequence[Path], config: KubeadmConfig | None, now: datetime
) -> list[str]:
    """Return everything missing or wrong on a node before kubeadm runs, and change nothing."""
    problems = [f"{path}: wanted a node without a cluster, found it" for path in traces_of_cluster(places)]
    missing = [file for file in files if live(file) is None]
    problems += [f"{file}: kubeadm's configuration is missing, by which names are judged" for file in missing]
    look = look_at(settings, places, role, config, live, now)
    return [*problems, *map(str, _open_keys(look)), *look.problems()]


def look_at(
    settings: Settings, places: Places, role: Role, config: KubeadmConfig | None, read: Read, now: datetime
) -> NodeLook:
    """Inspect a node as it will be; `read` may return files that are not in place yet."""
    name = config.name if config is not None else settings.node.name
    known = config if role != "worker" else None
    return NodeLook(places=places, role=role, read=read, now=now, node=name, config=known, settings=settings)


def assert_no_cluster(desired: DesiredNode) -> None:
    """Refuse a node on which kubeadm or a kubelet has run."""
    if traces := list(traces_of_cluster(desired.places)):
        hint = "`ca-bridge renew` is for a node that runs; after `kubeadm reset`, and `rm -r /var/lib/etcd`, it is new again"
        raise BridgeError(f"wanted a node without a cluster, found {some(traces)}", hint=hint)


def assert_as_desired(desired: DesiredNode, look: NodeLook) -> None:
    """Refuse a complete node that has another configuration, or problems."""
    for path, wanted in desired.files.items():  # first, since certificates for another configuration lack its names
        if live(path) != wanted:
            raise OtherNodeDesiredError(
                f"{path}: wanted the configuration that is asked for now, found another one, or none",
                hint="the files here were made for another configuration: run this as before; or have `kubeadm reset` "
                "remove them, keys included, and run this again",
            )
    if problems := look.problems():
        raise NotWholeError(
            "\n".join(problems),
            hint="all files exist, but kubeadm would fail with them: move them away, or correct them",
        )


def _open_keys(look: NodeLook) -> Iterator[Exposure]:
    """Yield copied keys that other users can read: no run rewrites a right key, and kubeadm checks no modes."""
    brought = [look.places.sa_key, *(look.places.pair(spec)[0] for spec in look.places.brought)]
    for path in brought if look.role != "worker" else ():
        if path.exists() and (trouble := open_secret(path)) is not None:
            yield trouble


def assert_keys_closed(look: NodeLook) -> None:
    """Refuse a copied key that other users can read, before a CA is asked."""
    if (open_key := next(_open_keys(look), None)) is not None:
        raise NotWholeError(str(open_key), hint=open_key.hint)


def assert_brought(look: NodeLook, cas: Certificates) -> None:
    """Refuse a wrong client pair of an external etcd, before a CA is asked for anything else."""
    brought = look.places.brought if look.role != "worker" else []
    if problems := [text for spec in brought for text in look.problems_of(spec, cas[spec.authority.name])]:
        raise NotWholeError("\n".join(problems), hint="copy the right pair from an etcd host, or move this one away")


def assert_no_leftovers(desired: DesiredNode, look: NodeLook) -> None:
    """Refuse an incomplete node with other files than CAs, sa.key, a kubelet's serving pair and an external etcd's."""
    places = desired.places
    allowed = {places.sa_key, places.sa_public, *places.serving}
    allowed |= {places.authority(authority) for authority in AUTHORITIES.values()}
    allowed |= {path for spec in places.brought for path in places.pair(spec)}
    there = [path for path in look.files() if path not in allowed and look.read(path) is not None]
    missing = look.missing()
    if there and len(missing) < len(there):
        hint = "bring back the missing files, or move all of them away and run this again"
        raise NotWholeError("\n".join(look.problems()), hint=hint)
    if there:
        raise LeftoversError(f"wanted a node without certificates, or with all of them, found {some(there)}")
    for path, data in desired.files.items():
        if live(path) not in (None, data):
            raise LeftoversError(
                f"{path}: another configuration is there already",
                hint="move it away, or give it as --kubeadm-config",
            )
