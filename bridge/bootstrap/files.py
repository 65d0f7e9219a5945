"""The files of a new node, composed (no file is written here)."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.x509.oid import NameOID

from bridge.bootstrap import authorities
from bridge.bootstrap.authorities import Certificates
from bridge.bootstrap.places import Places, Role, authorities_of
from bridge.pki.certificates import pem
from bridge.pki.verify import Verified
from bridge.renewal.prepare import Prepared
from bridge.specs import KUBELET_CONF, KUBELET_SERVER
from bridge.state.install import CERTIFICATE_MASK, KEY_MASK, Replacement, digest
from bridge.system.files import Attributes

_PUBLIC = 0o644
_PRIVATE = 0o600
Read = Callable[[Path], bytes | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Composer:
    """Makes a new node's files from answers; its fields are what they have in common."""

    places: Places
    role: Role
    servers: Mapping[str, str]  #: By kubeconfig.
    cluster: str  #: kubeadm's clusterName.
    authorities: Certificates
    read: Read
    now: datetime

    def certificate(self, one: Prepared, verified: Verified) -> Iterator[Replacement]:
        """Key and certificate, or a kubeconfig with them."""
        chain = b"".join(map(pem, (verified.leaf, *verified.intermediates)))
        spec, places = one.item.spec, self.places
        if spec.name == KUBELET_CONF:
            yield self._file(spec.name, self.kubelet_pem, chain + one.key_pem, _PRIVATE)
            yield self._file(spec.name, places.kubeconfigs / spec.base, self._kubelet_conf(verified.leaf), _PRIVATE)
        elif spec.kubeconfig:
            data = self._kubeconfig(spec.name, verified.leaf, _embedded(chain, one.key_pem))
            yield self._file(spec.name, places.kubeconfigs / spec.base, data, _PRIVATE)
        else:
            key, certificate = places.serving if spec.name == KUBELET_SERVER else places.pair(spec)
            yield self._file(spec.name, key, one.key_pem, _PRIVATE)
            yield self._file(spec.name, certificate, chain, _PUBLIC)

    @property
    def kubelet_pem(self) -> Path:
        """The file that `kubelet-client-current.pem` leads to, named as a kubelet names it."""
        return self.places.kubelet_pki / f"kubelet-client-{self.now:%Y-%m-%d-%H-%M-%S}.pem"

    def ca_files(self) -> Iterator[Replacement]:
        """The CA certificates of a control plane; kubeadm writes a worker's from its kubelet.conf, and refuses one that is there."""
        if self.role != "worker":
            for authority in authorities_of(self.role):
                data = authorities.text(self.authorities[authority.name])
                path = self.places.authority(authority)
                if self.read(path) is None:
                    yield self._file(authority.name, path, data, _PUBLIC)

    def service_account(self, key: bytes, public: bytes) -> Iterator[Replacement]:
        """The pair, unless it is there."""
        for path, data in ((self.places.sa_key, key), (self.places.sa_public, public)):
            if self.read(path) != data:
                yield self._file("sa", path, data, _PRIVATE)

    def configuration(self, path: Path, data: bytes) -> Iterator[Replacement]:
        """kubeadm's configuration, unless it is there. An operator's may hold a bootstrap token."""
        if self.read(path) != data:
            yield self._file("kubeadm", path, data, _PRIVATE)

    def _file(self, name: str, path: Path, data: bytes, mode: int) -> Replacement:
        there = self.read(path)
        own = Attributes.private()
        return Replacement(
            certificate=name,
            path=path,
            data=data,
            mode_mask=KEY_MASK if mode == _PRIVATE else CERTIFICATE_MASK,
            was=None if there is None else digest(there),
            attributes=Attributes(mode=mode, uid=own.uid, gid=own.gid, extended={}),
        )

    def _kubelet_conf(self, leaf: x509.Certificate) -> bytes:
        """The kubelet's, which refers to key and certificate: one place to renew, and a kubelet that starts makes no copy."""
        current = str(self.places.kubelet_current)
        return self._kubeconfig(KUBELET_CONF, leaf, {"client-certificate": current, "client-key": current})

    def _kubeconfig(self, name: str, leaf: x509.Certificate, credentials: Mapping[str, str]) -> bytes:
        """A kubeconfig in kubeadm's form; every version of kubeadm accepts the first certificate of ca.crt alone."""
        [user] = (str(one.value) for one in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME))
        ca = b64encode(pem(self.authorities["ca"][0])).decode()
        context = f"{user}@{self.cluster}"
        document = {
            "apiVersion": "v1",
            "clusters": [
                {"cluster": {"certificate-authority-data": ca, "server": self.servers[name]}, "name": self.cluster}
            ],
            "contexts": [{"context": {"cluster": self.cluster, "user": user}, "name": context}],
            "current-context": context,
            "kind": "Config",
            "users": [{"name": user, "user": dict(credentials)}],
        }
        return yaml.safe_dump(document, sort_keys=False, width=1 << 20).encode()


def _embedded(chain: bytes, key_pem: bytes) -> dict[str, str]:
    return {
        "client-certificate-data": b64encode(chain).decode(),
        "client-key-data": b64encode(key_pem).decode(),
    }
