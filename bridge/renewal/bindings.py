"""
Whether the cluster gives a certificate the rights that it does not have by a group any more.

kubeadm's newer subjects are in fewer groups: their rights come from ClusterRoleBindings that `kubeadm init` and
`kubeadm upgrade apply` make, and `kubeadm certs renew` does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

from cryptography.x509.oid import NameOID

from bridge.cluster.api import NoAnswerError
from bridge.errors import BridgeError, Exit
from bridge.pki.certificates import attributes
from bridge.pki.csr import Naming
from bridge.pki.kubeadm_names import ADMINS, MASTERS
from bridge.renewal.cluster_config import ConfigSource
from bridge.specs import CertificateSpec

_PATH = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"
_KUBELET_CLIENT = "kubeadm:apiserver-kubelet-client"
_O = NameOID.ORGANIZATION_NAME.dotted_string


class NotBoundError(BridgeError):
    """The new subject would have no rights."""

    exit_code = Exit.REFUSED


class Binding(NamedTuple):
    """A ClusterRoleBinding on which a subject's rights depend."""

    name: str
    role: str
    kind: str  #: Of its subject: `User` or `Group`.
    who: str

    @property
    def command(self) -> str:
        """The kubectl command that makes the binding."""
        return (
            f"kubectl create clusterrolebinding {self.name} --clusterrole={self.role} --{self.kind.lower()}={self.who}"
        )


def needed_by(naming: Naming, spec: CertificateSpec) -> Binding | None:
    """The binding that a certificate's rights come from; None: its rights are its own, or it needs none."""
    groups = {value for oid, value in attributes(naming.subject) if oid == _O}
    if MASTERS in groups:
        return None
    if ADMINS in groups:
        return Binding(ADMINS, "cluster-admin", "Group", ADMINS)
    if spec.name == "apiserver-kubelet-client":
        return Binding(_KUBELET_CLIENT, "system:kubelet-api-admin", "User", "kube-apiserver-kubelet-client")
    return None


def assert_bound(source: ConfigSource, naming: Naming, spec: CertificateSpec, *, strictly: bool) -> list[str]:
    """
    Look whether the binding is there; a sentence about it, or none where none is needed.

    Args:
        source: Whose cluster is asked.
        naming: Of the certificate to come.
        spec: Its spec.
        strictly: A cluster that does not answer is an error, too.

    Raises:
        NotBoundError: It is not there.
    """
    needed = needed_by(naming, spec)
    if needed is None:
        return []
    rights = f"{spec.name}: its rights come from ClusterRoleBinding {needed.name} alone"
    try:
        found = _missing(source, needed)
    except NoAnswerError as e:
        if not strictly:
            return [f"{rights}, which was not looked at: {e}"]
        raise NotBoundError(
            f"{rights}; wanted to see it, found {e}",
            hint="run it while the API server answers; until then leave the subject as it is",
        ) from None
    if found:
        raise NotBoundError(
            f"{rights}; wanted it ({needed.role} for {needed.kind} {needed.who}), found {found}",
            hint=f"`kubeadm upgrade apply` makes it; or: {needed.command}",
        )
    return [f"{rights}, which is there"]


def _missing(source: ConfigSource, needed: Binding) -> str:
    """What stands in the binding's place, in words; empty: the binding itself."""
    reply = source.api.ask("GET", f"{_PATH}/{needed.name}")
    if reply.status == HTTPStatus.OK:
        return "" if _binds(reply.document, needed) else "one of that name for another role or subject"
    return "none" if reply.status == HTTPStatus.NOT_FOUND else f"HTTP {reply.status}"


def _binds(document: Mapping[str, Any], needed: Binding) -> bool:
    ref, subjects = document.get("roleRef"), document.get("subjects")
    if not isinstance(ref, dict) or not isinstance(subjects, list):
        return False
    is_role = (ref.get("kind"), ref.get("name")) == ("ClusterRole", needed.role)
    return is_role and any((one["kind"], one["name"]) == (needed.kind, needed.who)
                           for one in subjects if isinstance(one, dict) and {"kind", "name"} <= one.keys())  # fmt: skip
