"""
Every certificate that kubeadm keeps on a control-plane node: pure data with its sources.

Names, files, authorities and usages are kubeadm's own (`kubeadm certs check-expiration`,
cmd/kubeadm/app/phases/certs/certlist.go and phases/kubeconfig/kubeconfig.go, the same from 1.34 to 1.37).
Subjects and SANs are not here: a renewal copies them from the certificate that it replaces.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

Usage = Literal["server", "client", "peer"]
#: kubeadm's `encryptionAlgorithm` values, in small letters.
KeyAlgorithm = Literal["rsa-2048", "rsa-3072", "rsa-4096", "ecdsa-p256", "ecdsa-p384"]
KEY_ALGORITHMS: tuple[KeyAlgorithm, ...] = get_args(KeyAlgorithm)
#: kubeadm's default clusterName.
DEFAULT_CLUSTER = "kubernetes"


class EKU(enum.Enum):
    """An extended key usage (RFC 5280 §4.2.1.12); the value is its OID in dotted form."""

    SERVER_AUTH = "1.3.6.1.5.5.7.3.1"
    CLIENT_AUTH = "1.3.6.1.5.5.7.3.2"

    @property
    def label(self) -> str:
        """RFC 5280's name: `serverAuth` or `clientAuth`."""
        return {EKU.SERVER_AUTH: "serverAuth", EKU.CLIENT_AUTH: "clientAuth"}[self]


class Component(enum.Enum):
    """A process of the control plane; the value is the name of its static pod and manifest."""

    ETCD = "etcd"
    APISERVER = "kube-apiserver"
    CONTROLLER_MANAGER = "kube-controller-manager"
    SCHEDULER = "kube-scheduler"
    KUBELET = "kubelet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """One of the three CAs below `pki_dir`; kubeadm never renews it."""

    name: str  #: As in `kubeadm certs check-expiration`.
    base: str  #: kubeadm's base name: the files are `{base}.crt` and `{base}.key` below `pki_dir`.

    @property
    def certificate_file(self) -> str:
        """The path below `pki_dir`."""
        return f"{self.base}.crt"

    @property
    def key_file(self) -> str:
        """The path below `pki_dir`; absent when the CA is managed externally."""
        return f"{self.base}.key"


CA = Authority(name="ca", base="ca")
ETCD_CA = Authority(name="etcd-ca", base="etcd/ca")
FRONT_PROXY_CA = Authority(name="front-proxy-ca", base="front-proxy-ca")

#: In kubeadm's order.
AUTHORITIES = {authority.name: authority for authority in (CA, ETCD_CA, FRONT_PROXY_CA)}


_NO_GROUP: frozenset[str] = frozenset()
#: The group whose members may do everything; no RBAC rule can take that back.
MASTERS = "system:masters"
_MASTERS = frozenset({MASTERS})
_ADMINS = frozenset({"kubeadm:cluster-admins"})


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateSpec:
    """
    One leaf certificate that kubeadm expects on a control-plane node.

    EKUs are here, since kubeadm's CSRs carry none, and a mistake in one certificate must not be
    copied into the next.
    """

    name: str  #: As in `kubeadm certs check-expiration`.
    authority: Authority
    ekus: frozenset[EKU]  #: Exactly these.
    common_names: tuple[str, ...] = ()  #: The CNs that it may have; `{node}` stands for the node's name.
    base: str = ""  #: `{base}.crt` and `{base}.key` below `pki_dir`; for a kubeconfig its name in `kubeconfig_dir`.
    groups: tuple[frozenset[str], ...] = (_NO_GROUP,)  #: Its O values, a set for each kubeadm version; fewer are fine.
    kubeconfig: bool = False  #: The pair is embedded in a kubeconfig.
    component: Component | None = None  #: The process that reads it; None: only people and kubeadm.
    flags: tuple[str, ...] = ()  #: The component's flags that name the certificate (or kubeconfig) file.
    since: tuple[int, int] = (0, 0)  #: The Kubernetes version that introduced it; (0, 0): always there.
    optional: bool = False  #: A healthy node may lack it.
    listed: bool = True  #: kubeadm lists and renews it.
    by_node: bool = False  #: Its subject or SANs differ from node to node.
    kubelets: bool = False  #: Its files are in the kubelet's own directory, not below `pki_dir`.
    by_flag: bool = False  #: Only if the component's manifest names a pair; without it the component makes its own.
    #: Its component reads it again without a restart, from the Kubernetes version that `bridge.control_plane` has.
    reloaded: bool = True

    @property
    def of_kubeadm(self) -> bool:
        """Whether kubeadm creates it for a control-plane node."""
        return not self.kubelets and not self.by_flag

    @property
    def usage(self) -> Usage:
        """Usage class, for profiles and roles that certificates with the same EKUs share."""
        if self.ekus == _PEER:
            return "peer"
        return "server" if self.ekus == _SERVER else "client"


_SERVER = frozenset({EKU.SERVER_AUTH})
_CLIENT = frozenset({EKU.CLIENT_AUTH})
# Both EKUs, since etcd also presents its serving certificate as a client:
# https://github.com/etcd-io/etcd/issues/9785
_PEER = frozenset({EKU.SERVER_AUTH, EKU.CLIENT_AUTH})
_KUBECONFIG_FLAGS = ("--kubeconfig", "--authentication-kubeconfig", "--authorization-kubeconfig")

# Fields that several specs share.
_kubeconfig = partial(CertificateSpec, authority=CA, ekus=_CLIENT, kubeconfig=True)
_api_client = partial(CertificateSpec, ekus=_CLIENT, component=Component.APISERVER)
_etcd = partial(CertificateSpec, authority=ETCD_CA, ekus=_PEER, component=Component.ETCD, by_node=True)
_nodes = partial(CertificateSpec, authority=CA, component=Component.KUBELET, groups=(frozenset({"system:nodes"}),))

#: In kubeadm's order (by name, byte-wise), then what kubeadm does not list.
SPECS = {
    spec.name: spec
    for spec in (
        _kubeconfig(
            name="admin.conf", base="admin.conf", common_names=("kubernetes-admin",), groups=(_ADMINS, _MASTERS)
        ),
        CertificateSpec(
            name="apiserver",
            authority=CA,
            ekus=_SERVER,
            common_names=("kube-apiserver",),
            base="apiserver",
            component=Component.APISERVER,
            flags=("--tls-cert-file",),
            by_node=True,
        ),
        _api_client(
            name="apiserver-etcd-client",
            authority=ETCD_CA,
            common_names=("kube-apiserver-etcd-client",),
            groups=(_NO_GROUP, _MASTERS),
            base="apiserver-etcd-client",
            flags=("--etcd-certfile",),
        ),
        _api_client(
            name="apiserver-kubelet-client",
            authority=CA,
            common_names=("kube-apiserver-kubelet-client",),
            groups=(_NO_GROUP, _ADMINS | _MASTERS),
            base="apiserver-kubelet-client",
            flags=("--kubelet-client-certificate",),
        ),
        _kubeconfig(
            name="controller-manager.conf",
            common_names=("system:kube-controller-manager",),
            base="controller-manager.conf",
            component=Component.CONTROLLER_MANAGER,
            flags=_KUBECONFIG_FLAGS,
            reloaded=False,
        ),
        CertificateSpec(
            name="etcd-healthcheck-client",
            authority=ETCD_CA,
            ekus=_CLIENT,
            common_names=("kube-etcd-healthcheck-client",),
            groups=(_NO_GROUP, _MASTERS),
            base="etcd/healthcheck-client",
        ),
        _etcd(
            name="etcd-peer", common_names=("{node}", "kube-etcd-peer"), base="etcd/peer", flags=("--peer-cert-file",)
        ),
        _etcd(name="etcd-server", common_names=("{node}", "kube-etcd"), base="etcd/server", flags=("--cert-file",)),
        _api_client(
            name="front-proxy-client",
            authority=FRONT_PROXY_CA,
            common_names=("front-proxy-client",),
            base="front-proxy-client",
            flags=("--proxy-client-cert-file",),
        ),
        _kubeconfig(
            name="scheduler.conf",
            common_names=("system:kube-scheduler",),
            base="scheduler.conf",
            component=Component.SCHEDULER,
            flags=_KUBECONFIG_FLAGS,
            reloaded=False,
        ),
        # Only on the node where `kubeadm init` ran, and Kubernetes' page tells users to move it away:
        # https://kubernetes.io/docs/setup/best-practices/certificates/
        _kubeconfig(
            name="super-admin.conf",
            common_names=("kubernetes-super-admin",),
            groups=(_MASTERS,),
            base="super-admin.conf",
            since=(1, 29),
            optional=True,
        ),
        # kubeadm leaves it to the kubelet's own rotation, which never completes without a CA key in the
        # cluster: with embedded data we renew it.
        _nodes(
            name="kubelet.conf",
            ekus=_CLIENT,
            common_names=("system:node:{node}",),
            base="kubelet.conf",
            kubeconfig=True,
            flags=("--kubeconfig",),
            optional=True,
            listed=False,
            reloaded=False,
            by_node=True,
        ),
        # A kubelet serves logs, exec and metrics with it; its default is self-signed. The API's signer for kubelets
        # demands this subject; certificates made by hand often have only the node's name.
        _nodes(
            name="kubelet-server",
            ekus=_SERVER,
            common_names=("system:node:{node}", "{node}"),
            base="kubelet-server",
            flags=("--tls-cert-file",),
            optional=True,
            listed=False,
            by_node=True,
            kubelets=True,
        ),
        # These two serve health checks and metrics with a certificate that they make when they start
        # (kubernetes/kubeadm#2244), unless the manifest names a pair. Each has a directory: kube-scheduler sees nothing
        # else of `pki_dir`, and a mount of a single file would keep showing the old file.
        *(
            CertificateSpec(
                name=f"{name}-server",
                authority=CA,
                ekus=_SERVER,
                common_names=(component.value, "{node}"),
                base=f"{name}/server",
                component=component,
                flags=("--tls-cert-file",),
                optional=True,
                listed=False,
                by_node=True,
                by_flag=True,
            )
            for name, component in (
                ("controller-manager", Component.CONTROLLER_MANAGER),
                ("scheduler", Component.SCHEDULER),
            )
        ),
    )
}


#: Once it has expired, a rebooted node stays down: so it is first in every list.
KUBELET_CONF = "kubelet.conf"
KUBELET_SERVER = "kubelet-server"
#: By component, the serving certificate that its manifest may name.
SERVERS = {spec.component: spec for spec in SPECS.values() if spec.by_flag and spec.component is not None}
#: No RBAC rule limits it, and only `kubeadm init` needs it.
SUPER_ADMIN = "super-admin.conf"


#: Our names for certificates that others request from the gateway: the certificates API's signers of the cluster's CA
#: (https://kubernetes.io/docs/reference/access-authn-authz/certificate-signing-requests/#kubernetes-signers).
KUBELET_CLIENT = _nodes(name="kubelet-client", ekus=_CLIENT, common_names=("system:node:{node}",))
KUBELET_SERVING = _nodes(name="kubelet-serving", ekus=_SERVER, common_names=("system:node:{node}",))
#: A client certificate for a person or a machine, in its own kubeconfig; on no node, and not kubeadm's.
USER = CertificateSpec(name="user", authority=CA, ekus=_CLIENT)
#: The CA of pods' certificates, which is none of kubeadm's three.
PODS = Authority(name="pods", base="pods")
#: Pods' certificates by usage; their names travel beside the CSR.
POD_SPECS: dict[Usage, CertificateSpec] = {
    "peer": CertificateSpec(name="pod", authority=PODS, ekus=_PEER),
    "client": CertificateSpec(name="pod-client", authority=PODS, ekus=_CLIENT),
    "server": CertificateSpec(name="pod-server", authority=PODS, ekus=_SERVER),
}
GATEWAY_SPECS = {spec.name: spec for spec in (KUBELET_CLIENT, KUBELET_SERVING, USER, *POD_SPECS.values())}
#: All CAs that the settings may name.
SIGNING_AUTHORITIES = {**AUTHORITIES, PODS.name: PODS}


# --- further pairs: certificates that a node's settings name ----------------------------------------------------------

#: Without a dot, so that no pair is named like a kubeconfig.
_PAIR_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
WANTED_PAIR_NAME = (
    "small letters, digits and hyphens, at most 63, and no name of kubeadm's certificates, CAs or components"
)
_TAKEN = frozenset(
    {
        *SPECS,
        *GATEWAY_SPECS,
        *SIGNING_AUTHORITIES,
        *(component.value for component in Component),
        "all",
        "server",
        "client",
        "peer",
    }
)


def is_pair_name(name: str) -> bool:
    """Whether a further pair may have this name, which kubeadm, the gateway and our commands must not use otherwise."""
    return _PAIR_NAME.fullmatch(name) is not None and name not in _TAKEN


def pair_spec(name: str, authority: str, ekus: Iterable[EKU], reader: Component | None = None) -> CertificateSpec:
    """The spec of a further pair (ValueError: its name is taken, its CA unknown, or it has no usage)."""
    usages = frozenset(ekus)
    if not is_pair_name(name) or authority not in AUTHORITIES or not usages:
        raise ValueError(f"wanted a pair's name, CA and usages, found {name[:64]!r} of {authority[:64]!r}")
    return CertificateSpec(
        name=name,
        authority=AUTHORITIES[authority],
        ekus=usages,
        component=reader,
        listed=False,
        by_node=True,
    )
