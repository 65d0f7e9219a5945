"""
The subject and SANs that kubeadm gives each certificate, by version (pure), from its certlist.go, kubeconfig.go and
pkiutil, and compared with `kubeadm certs generate-csr` of 1.34 to 1.37 (`python -m tests.measure.versions`); and whether
a live certificate has the identity of its name, so that no renewal copies an intruder's.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import NameOID

from bridge.errors import BridgeError, Violation
from bridge.pki.certificates import O_OID, UNREADABLE, attributes, common_names, extension, leads_to, san_entries
from bridge.pki.csr import Naming, alternative_names, common_name_of, issuer_line, subject_of
from bridge.specs import MASTERS, CertificateSpec
from bridge.words import one_line

ADMINS = "kubeadm:cluster-admins"
_VERSION = re.compile(r"v?(\d{1,3})\.(\d{1,4})(?:\.(\d{1,4}))?(?:[-+].*)?")

#: From these patch releases on, apiserver-kubelet-client is in no group; a binding gives its user the rights
#: (kubernetes/kubernetes#138957 and its cherry-picks; 1.34.4, 1.35.4, 1.36.3 and 1.37.2 were read).
_FIRST_PATCHES_WITHOUT_GROUP = {33: 12, 34: 8, 35: 5, 36: 1}
_FIRST_WITH_ADMINS = 29


class Release(NamedTuple):
    """A Kubernetes version."""

    major: int
    minor: int
    patch: int | None = None  #: None: unknown.

    def __str__(self) -> str:
        return f"v{self.major}.{self.minor}{'' if self.patch is None else f'.{self.patch}'}"


def parse_release(text: str) -> Release | None:
    """Parse a version such as `v1.37.2`; None: other text, such as `stable-1`, or no text."""
    match = _VERSION.fullmatch(text.strip())
    return match and Release(int(match[1]), int(match[2]), None if match[3] is None else int(match[3]))


class NoFactError(BridgeError):
    """A fact that a name needs is unknown."""

    hint = "--kubeadm-config FILE names kubeadm's configuration, which has what is missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamingFacts:
    """The facts for kubeadm's subjects and SANs; an empty fact is unknown."""

    release: Release | None = None
    node: str = ""  #: The node's name in the cluster.
    address: str = ""  #: The advertise address of this node's API server.
    service_address: str = ""
    endpoint_host: str = ""  #: Host of `controlPlaneEndpoint`; also empty if it is not set.
    dns_domain: str = ""
    api_sans: tuple[str, ...] = ()
    etcd_server_sans: tuple[str, ...] = ()
    etcd_peer_sans: tuple[str, ...] = ()


def naming(spec: CertificateSpec, facts: NamingFacts) -> Naming:
    """The subject and SANs that this release of kubeadm would request."""
    return Naming(subject=subject(spec, facts), sans=_sans(spec, facts))


def subject(spec: CertificateSpec, facts: NamingFacts) -> x509.Name:
    """The subject of `naming`."""
    common_name = spec.common_names[0]
    if "{node}" in common_name:
        common_name = common_name.replace("{node}", _known(facts.node, "the node's name"))
    return subject_of(common_name, groups(spec, facts.release))


def groups(spec: CertificateSpec, release: Release | None) -> tuple[str, ...]:
    """The O values, which differ by release."""
    if len(spec.groups) == 1:
        return tuple(sorted(spec.groups[0]))
    if release is None:
        raise NoFactError(f"Kubernetes' version is unknown, which decides the groups (O) of {spec.name}")
    if (release.major, release.minor) < (1, _FIRST_WITH_ADMINS):
        return (MASTERS,)
    if spec.name == "admin.conf":
        return (ADMINS,)
    return (ADMINS,) if spec.name == "apiserver-kubelet-client" and _has_group(release) else ()


def _has_group(release: Release) -> bool:
    first = _FIRST_PATCHES_WITHOUT_GROUP.get(release.minor)
    if first is None:
        return release.minor < min(_FIRST_PATCHES_WITHOUT_GROUP)
    if release.patch is None:
        raise NoFactError(
            f"wanted Kubernetes' patch release, which decides the groups (O) of apiserver-kubelet-client, found {release}"
        )
    return release.patch < first


def _sans(spec: CertificateSpec, facts: NamingFacts) -> tuple[x509.GeneralName, ...]:
    if spec.name == "apiserver":
        node = _known(facts.node, "the node's name")
        domain = _known(facts.dns_domain, "the cluster's DNS domain")
        service = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", f"kubernetes.default.svc.{domain}")
        own = [_known(facts.service_address, "the service subnet"), _known(facts.address, "the advertise address")]
        endpoint = [facts.endpoint_host] if facts.endpoint_host else []
        return _in_order([node, *service, *own, *endpoint, *facts.api_sans])
    more = {"etcd-server": facts.etcd_server_sans, "etcd-peer": facts.etcd_peer_sans}.get(spec.name)
    if more is None and not spec.by_flag:
        return ()
    # probes, scanners on the node and readers of metrics use `localhost` and the loopback addresses
    own = [_known(facts.node, "the node's name"), "localhost", _known(facts.address, "the advertise address")]
    return _in_order([*own, "127.0.0.1", "::1", *(more or ())])


def _in_order(texts: Sequence[str]) -> tuple[x509.GeneralName, ...]:
    """SANs in kubeadm's order, lower-case and without duplicates: names sorted by bytes, then addresses as given."""
    try:
        sans = alternative_names(text.lower() for text in texts)
    except ValueError as e:
        raise NoFactError(str(e), hint="correct the node's name, or the SANs in kubeadm's configuration") from None
    names = sorted((san for san in sans if isinstance(san, x509.DNSName)), key=lambda san: san.value.encode())
    return (*names, *(san for san in sans if isinstance(san, x509.IPAddress)))


def _known(value: str, what: str) -> str:
    if not value:
        raise NoFactError(f"{what} is unknown")
    return value


def text_of(names: Iterable[x509.GeneralName]) -> str:
    """The names in one text, for messages."""
    return ", ".join(str(name.value) for name in names) or "none"


#: The prefix of a kubelet's CN, before the node's name (kubeadm, kubeconfig.go).
_NODE_USER = "system:node:"
_LONGEST_NAME = 253
#: An RFC 1123 subdomain, which the API requires for names of Node objects.
_NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


def is_node_name(text: str) -> bool:
    """Whether a text is a valid name of a Node object."""
    return len(text) <= _LONGEST_NAME and _NODE_NAME.fullmatch(text) is not None


_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def is_host_name(name: str) -> bool:
    """Whether a text is labels of letters, digits and hyphens, separated by dots (RFC 1123 §2.1, RFC 1035 §2.3.4)."""
    return len(name) <= _LONGEST_NAME and all(map(_LABEL.fullmatch, name.split(".")))


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedNode:
    """One line of a node list."""

    line: int
    role: str  #: Empty in a list without roles.
    name: str
    addresses: tuple[str, ...]


def parse_nodes(text: str, *, with_roles: bool = False) -> list[ListedNode]:
    """Parse a node list: `NAME ADDRESS …` a line, after `ROLE` in a list with roles; `#` begins a comment."""
    nodes: list[ListedNode] = []
    names, known = set[str](), set[str]()
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        role = fields.pop(0) if with_roles else ""
        name = fields.pop(0) if fields else ""
        try:
            canonical = tuple(str(ipaddress.ip_address(address)) for address in fields)
        except ValueError as e:
            raise ValueError(f"line {number}: wanted a name and addresses, found {e}") from None
        if not canonical or name in names or known & set(canonical):
            raise ValueError(f"line {number}: wanted a name and addresses of its own, found {line.strip()[:60]!r}")
        names.add(name)
        known |= set(canonical)
        nodes.append(ListedNode(line=number, role=role, name=name, addresses=canonical))
    return nodes


def renamed(certificate: x509.Certificate, names: Mapping[str, str]) -> x509.Certificate:
    """A copy of the certificate with another node's names and a throwaway signature, only for reading."""
    sans = extension(certificate, x509.SubjectAlternativeName) or ()
    theirs = Naming(subject=_subject(certificate.subject, names), sans=tuple(_san(san, names) for san in sans))
    return named(certificate, theirs)


def named(certificate: x509.Certificate, naming: Naming) -> x509.Certificate:
    """A certificate with these names and a throwaway signature, only for reading."""
    return _unsigned(naming, certificate.issuer, certificate.public_key(), certificate.not_valid_before_utc)


def sample(naming: Naming, begin: datetime) -> x509.Certificate:
    """A certificate with these names, from no CA, only for reading."""
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return _unsigned(naming, subject_of("no issuer"), key, begin)


def builder_of(
    subject: x509.Name, issuer: x509.Name, key: CertificatePublicKeyTypes, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    """Begin building a certificate, with a 63-bit serial number like kubeadm's."""
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number() >> 96)  # 63 of 159 bits
    return builder.not_valid_before(begin).not_valid_after(end)


def _unsigned(naming: Naming, issuer: x509.Name, key: CertificatePublicKeyTypes, begin: datetime) -> x509.Certificate:
    builder = builder_of(naming.subject, issuer, key, begin, begin + timedelta(days=1))
    if naming.sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(naming.sans), critical=False)
    return builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())


def _subject(subject: x509.Name, names: Mapping[str, str]) -> x509.Name:
    return x509.Name([x509.RelativeDistinguishedName([_attribute(a, names) for a in rdn]) for rdn in subject.rdns])


def _attribute(attribute: x509.NameAttribute[str | bytes], names: Mapping[str, str]) -> x509.NameAttribute[str | bytes]:
    if attribute.oid != NameOID.COMMON_NAME or not isinstance(attribute.value, str):
        return attribute
    prefix = _NODE_USER if attribute.value.startswith(_NODE_USER) else ""
    name = attribute.value.removeprefix(prefix)
    return common_name_of(prefix + names.get(name, name))


def _san(san: x509.GeneralName, names: Mapping[str, str]) -> x509.GeneralName:
    other = names.get(str(san.value))
    if other is None:
        return san
    if isinstance(san, x509.IPAddress):
        return x509.IPAddress(ipaddress.ip_address(other))
    return x509.DNSName(other) if isinstance(san, x509.DNSName) else san


# --- whether a live certificate has the identity of its name; dates do not count ---------------------------------------


def identity_violations(
    spec: CertificateSpec,
    certificates: Sequence[x509.Certificate],
    anchors: Sequence[x509.Certificate],
    anchor_name: str,
    extra: frozenset[tuple[str, str]] = frozenset(),
) -> list[Violation]:
    """A live certificate's deviations: another CA, another user, or other groups."""
    leaf = certificates[0]
    try:
        issuers = _foreign_issuer(certificates, anchors, anchor_name)
        return [*issuers, *_foreign_user(spec, leaf), *_foreign_groups(spec, leaf, extra)]
    except UNREADABLE as e:
        return [Violation("subject", want="one that can be read", got=one_line(e))]


def _foreign_issuer(
    certificates: Sequence[x509.Certificate], anchors: Sequence[x509.Certificate], anchor_name: str
) -> Iterator[Violation]:
    leaf = certificates[0]
    if not leads_to(certificates, anchors):
        got = f"one of {issuer_line(leaf)}" if leaf.issuer != leaf.subject else "a self-signed certificate"
        yield Violation("issuer", want=f"a signature of a CA in {anchor_name}, expired or not", got=got)


def _foreign_user(spec: CertificateSpec, leaf: x509.Certificate) -> Iterator[Violation]:
    """Kubernetes uses the CN as the user, and so does etcd with users."""
    names = common_names(leaf.subject)
    if len(names) != 1 or not any(_is_user(names[0], common_name, leaf) for common_name in spec.common_names):
        want = " or ".join(spec.common_names).replace("{node}", "the node's name")
        yield Violation("CN", want=want, got=one_line(", ".join(names)) or "none")


def _is_user(found: str, wanted: str, leaf: x509.Certificate) -> bool:
    """Whether a CN is the wanted one; a bare node name must also be a DNS SAN, so that `root` does not count."""
    begin, placeholder, end = wanted.partition("{node}")
    if not placeholder:
        return found == wanted
    node = found.removeprefix(begin).removesuffix(end)
    is_named = bool(begin) or ("DNS", node) in san_entries(leaf)
    return found == f"{begin}{node}{end}" and is_node_name(node) and is_named


def _foreign_groups(
    spec: CertificateSpec, leaf: x509.Certificate, extra: frozenset[tuple[str, str]]
) -> Iterator[Violation]:
    """Kubernetes uses each O as a group; kubeadm's versions differ in the groups."""
    found = frozenset(value for oid, value in attributes(leaf.subject) if oid == O_OID and (oid, value) not in extra)
    if not any(found <= allowed for allowed in spec.groups):
        want = " or ".join(", ".join(sorted(allowed)) or "none" for allowed in spec.groups)
        yield Violation("O", want=want, got=one_line(", ".join(sorted(found))))
