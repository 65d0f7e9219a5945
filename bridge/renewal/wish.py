"""An operator's wishes for what a certificate says, and what comes of them: values alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509

from bridge.errors import BridgeError
from bridge.node.fresh_kubeconfig import FreshKubeconfig
from bridge.pki.csr import Naming
from bridge.specs import KeyAlgorithm


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Changes that an operator wants in the next certificates."""

    add: Mapping[str, tuple[x509.GeneralName, ...]] = field(default_factory=dict)  #: SANs by certificate name.
    drop: Mapping[str, tuple[x509.GeneralName, ...]] = field(default_factory=dict)
    adopt_defaults: bool = False  #: Subjects as kubeadm of this cluster's version would make them.
    kubeadm_config: Path | None = None  #: kubeadm's configuration file; None: the cluster's ConfigMap.

    @property
    def is_any(self) -> bool:
        """Whether a live certificate's names are to change."""
        return bool(self.add or self.drop or self.adopt_defaults)


NO_CHANGES = Changes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One certificate as it is to be."""

    naming: Naming
    told: tuple[str, ...]  #: What is different, and where it comes from; sentences.
    key: KeyAlgorithm | None = None  #: Of the new key, where there is no live certificate to look at.
    kubeconfig: FreshKubeconfig | None = None  #: The whole file, where there is none.


#: By certificate name; an error: it can't be had.
Wishes = Mapping[str, Wish | BridgeError]
