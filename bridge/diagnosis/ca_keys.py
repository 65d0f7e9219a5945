"""The keys of the cluster's CAs: whether kube-controller-manager signs with one, and whether it can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.diagnosis.findings import Finding
from bridge.node import endpoints
from bridge.node.endpoints import Flags
from bridge.node.inventory import Node
from bridge.pki.certificates import UNREADABLE, spki
from bridge.specs import Component
from bridge.system.paths import UnreadableError, read

#: kube-controller-manager's controller that signs, and its older name.
_SIGNING = ("certificatesigningrequest-signing-controller", "csrsigning")
_PAIR = ("--cluster-signing-cert-file", "--cluster-signing-key-file")
#: For single signers; with one of these flags the pair for all of them does not count.
_KINDS = ("kubelet-serving", "kubelet-client", "kube-apiserver-client", "legacy-unknown")
_EMPTY = "`ca-bridge help gateway` says how the flags are emptied, and what signs instead"


def look(node: Node) -> Iterator[Finding]:
    """Examine what signs on this node beside the CAs of the settings."""
    manifest = node.manifests.get(Component.CONTROLLER_MANAGER)
    for flag, path in signing_files(manifest.flags).items() if manifest is not None else ():
        if not path.exists():
            text = (
                f"wanted the file of {flag} ({path}), found none: kube-controller-manager ends when it begins to sign"
            )
            yield Finding.error("controller-manager-key", Component.CONTROLLER_MANAGER.value, text, _EMPTY)
        elif flag.endswith("-key-file"):
            yield from _signs(node, flag, path)


def signing_files(flags: Flags) -> dict[str, Path]:
    """
    The files by which the built-in signer signs, by flag; none: it is off, as below an external CA.

    As in kube-controller-manager 1.37 (its app/certificates.go): a file that is not there ends the program.
    """
    if not _is_on(flags.get("--controllers", "*")):
        return {}
    pair = {flag: path for flag in _PAIR if (path := endpoints.file(flags, flag)) is not None}
    names = [f"--cluster-signing-{kind}-{part}-file" for kind in _KINDS for part in ("cert", "key")]
    single = {flag: path for flag in names if (path := endpoints.file(flags, flag)) is not None}
    return single or (pair if len(pair) == len(_PAIR) else {})


def _is_on(controllers: str) -> bool:
    """Whether `--controllers` has the signing controller: the first word about it counts, else the star."""
    words = controllers.split(",")
    for word in words:
        if word.removeprefix("-") in _SIGNING:
            return not word.startswith("-")
    return "*" in words


def _signs(node: Node, flag: str, path: Path) -> Iterator[Finding]:
    public = _public(path)
    names = [name for name, cas in _by_authority(node).items() if public in cas]
    about, text = Component.CONTROLLER_MANAGER.value, f"signs requests of the cluster with {path} ({flag})"
    if names:
        text = f"{text}, the key of {', '.join(names)}, which has to be on this disk for it"
        yield Finding.warning("controller-manager-signs", about, text, _EMPTY)
    elif public is not None:
        yield Finding.note("controller-manager-signs", about, f"{text}, which is no key of this node's CAs")


def _by_authority(node: Node) -> Mapping[str, set[bytes]]:
    """The public keys of all certificates in each CA file."""
    found: dict[str, set[bytes]] = {}
    for state in node.authorities:
        for certificate in state.certificates:
            try:
                found.setdefault(state.authority.name, set()).add(spki(certificate.public_key()))
            except UNREADABLE:
                continue
    return found


def _public(path: Path) -> bytes | None:
    """The public half of a private key in PEM; None: it can't be read."""
    try:
        return spki(load_pem_private_key(read(path) or b"", None).public_key())
    except (UnreadableError, ValueError, TypeError, UnsupportedAlgorithm):
        return None
