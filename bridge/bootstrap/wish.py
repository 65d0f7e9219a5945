"""What is to be made for a new node, what comes of it, and what may stand in the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bridge.bootstrap.authorities import Certificates
from bridge.bootstrap.configuration import Configuration
from bridge.bootstrap.places import Places, Role
from bridge.errors import BridgeError, Exit
from bridge.specs import KeyAlgorithm
from bridge.state.outcome import Outcome


class ClusterExistsError(BridgeError):
    """The node is, or was, part of a cluster."""

    hint = (
        "`ca-bridge renew` is for a node that runs; after `kubeadm reset`, and `rm -r /var/lib/etcd`, it is new again"
    )


class LeftoversError(BridgeError):
    """Some of the files are there, and nobody knows whose."""

    exit_code = Exit.USAGE
    hint = "move them away; kubeadm would take a mixture, and fail minutes later"


class NotWholeError(BridgeError):
    """The set is not what kubeadm needs."""

    exit_code = Exit.REFUSED
    hint = "nothing was changed; kubeadm itself does not look at all of this"


class NobodySignsError(BridgeError):
    """The settings name no CA, and nobody carries the requests to one."""

    exit_code = Exit.USAGE
    hint = "an [authority.NAME] table in the settings, or --request BUNDLE for a CA desk"


class OtherWishError(BridgeError):
    """An earlier run has begun something else."""

    exit_code = Exit.USAGE
    hint = "run it again as before, or with --anew: that forgets its keys, and answers to them are refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeWish:
    """A new node as it is to be made."""

    role: Role
    places: Places
    config: Configuration  #: Of the node: InitConfiguration and ClusterConfiguration; a worker's has the names alone.
    text: bytes  #: The same as kubeadm is to read it.
    kubeadm: str = "kubeadm"  #: The program; a worker needs none.
    #: For kubeadm's own use, by path.
    files: Mapping[Path, bytes] = field(default_factory=dict)
    addresses: tuple[str, ...] = ()  #: Of the kubelet's serving certificate.
    server: str = ""  #: Of a worker's kubelet.conf.
    ca_dir: Path | None = None
    carried: Certificates = field(default_factory=dict)  #: CA certificates that came with an order.
    sa: tuple[bytes, bytes] | None = field(default=None, repr=False)  #: Another node's sa.key and sa.pub.
    algorithm: KeyAlgorithm = "rsa-2048"  #: Of a worker's keys.
    keep: Path | None = None
    request: Path | None = None  #: A bundle for a desk is written here.
    answers: tuple[Path, ...] = ()  #: What a desk has answered.
    anew: bool = False

    @property
    def node(self) -> str:
        """Its name in the cluster."""
        return self.config.name

    @property
    def mark(self) -> str:
        """The wish as one text, to be compared with an earlier run's."""
        return "\n".join([self.text.decode(), *self.addresses, self.server])


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrapped:
    """The result of `bootstrap init` or `bootstrap join`."""

    role: Role
    node: str
    outcomes: tuple[Outcome, ...] = ()
    files: int = 0  #: How many were put in place.
    is_complete: bool = False
    from_kept: bool = False
    strange: tuple[BridgeError, ...] = ()  #: Answers to something else.

    @property
    def exit_code(self) -> int:
        """The worst outcome's."""
        return Exit.worst([*(o.exit_code for o in self.outcomes), *(e.exit_code for e in self.strange)])
