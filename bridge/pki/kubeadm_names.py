"""
Which subject and SANs kubeadm gives each of its certificates, by version (pure).

From its sources (cmd/kubeadm/app/phases/certs/certlist.go, phases/kubeconfig/kubeconfig.go, util/pkiutil) and compared
with what `kubeadm certs generate-csr` of 1.34 to 1.37 writes (`python -m tests.measure.versions`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cryptography import x509

from bridge.errors import BridgeError
from bridge.pki.naming import Naming, general_name, subject_of
from bridge.specs import CertificateSpec

MASTERS, ADMINS = "system:masters", "kubeadm:cluster-admins"
_VERSION = re.compile(r"v?(\d{1,3})\.(\d{1,4})(?:\.(\d{1,4}))?(?:[-+].*)?")

#: From these patch releases on apiserver-kubelet-client is in no group; a binding of its user has its rights
#: (kubernetes/kubernetes#138957 and its cherry-picks; 1.34.4, 1.35.4, 1.36.3 and 1.37.2 were read).
_FIRST_PATCHES_WITHOUT_GROUP = {33: 12, 34: 8, 35: 5, 36: 1}
_FIRST_WITH_ADMINS = 29


class Release(NamedTuple):
    """A version of Kubernetes."""

    major: int
    minor: int
    patch: int | None = None  #: None: not known.

    def __str__(self) -> str:
        return f"v{self.major}.{self.minor}{'' if self.patch is None else f'.{self.patch}'}"


def parse_release(text: str) -> Release | None:
    """A version such as `v1.37.2`; None: something else, such as `stable-1` or nothing."""
    found = _VERSION.fullmatch(text.strip())
    return found and Release(int(found[1]), int(found[2]), None if found[3] is None else int(found[3]))


class NoFactError(BridgeError):
    """Something that a name is made of is not known; nothing is guessed."""

    hint = "--kubeadm-config FILE names kubeadm's configuration, which has what is missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamingFacts:
    """What kubeadm makes a certificate's subject and SANs of; an empty one is not known."""

    release: Release | None = None
    node: str = ""  #: Its name in the cluster.
    address: str = ""  #: Advertise address of this node's API server.
    service_address: str = ""
    endpoint_host: str = ""  #: Of `controlPlaneEndpoint`; empty also where there is none.
    dns_domain: str = ""
    api_sans: tuple[str, ...] = ()
    etcd_server_sans: tuple[str, ...] = ()
    etcd_peer_sans: tuple[str, ...] = ()


def naming(spec: CertificateSpec, facts: NamingFacts) -> Naming:
    """
    The subject and SANs that kubeadm of this release would ask for.

    Raises:
        NoFactError: A fact is missing, or a SAN is none.
    """
    return Naming(subject=subject(spec, facts), sans=_sans(spec, facts))


def subject(spec: CertificateSpec, facts: NamingFacts) -> x509.Name:
    """
    The subject alone.

    Raises:
        NoFactError: The release or the node's name is missing.
    """
    common_name = spec.common_names[0]
    if "{node}" in common_name:
        common_name = common_name.replace("{node}", _known(facts.node, "the node's name"))
    return subject_of(common_name, groups(spec, facts.release))


def groups(spec: CertificateSpec, release: Release | None) -> tuple[str, ...]:
    """
    The O values.

    Raises:
        NoFactError: They differ by release, and which it is is not known.
    """
    if len(spec.groups) == 1:
        return tuple(sorted(spec.groups[0]))
    if release is None:
        raise NoFactError(f"wanted Kubernetes' version, which decides the groups (O) of {spec.name}, found none")
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
    if spec.name in {"etcd-server", "etcd-peer"}:
        more = facts.etcd_server_sans if spec.name == "etcd-server" else facts.etcd_peer_sans
        address = _known(facts.address, "the advertise address")
        return _in_order([_known(facts.node, "the node's name"), "localhost", address, "127.0.0.1", "::1", *more])
    return ()


def _in_order(texts: Sequence[str]) -> tuple[x509.GeneralName, ...]:
    """SANs in kubeadm's order: names sorted by their bytes, then addresses as they come, each once."""
    try:
        found = list(dict.fromkeys(general_name(text) for text in texts))
    except ValueError as e:
        raise NoFactError(str(e)) from None
    names = sorted((one for one in found if isinstance(one, x509.DNSName)), key=lambda one: one.value.encode())
    return (*names, *(one for one in found if isinstance(one, x509.IPAddress)))


def _known(value: str, what: str) -> str:
    if not value:
        raise NoFactError(f"wanted {what}, found none")
    return value


def text_of(names: Iterable[x509.GeneralName]) -> str:
    """The names as one text, for messages."""
    return ", ".join(str(one.value) for one in names) or "none"
