"""
The service account key, `sa.key` and `sa.pub`: made by us on the first node, carried to all others.

kubeadm in external-CA mode says that it uses the existing ones without a look.
"""

from __future__ import annotations

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from bridge.bootstrap.places import Places, live
from bridge.bootstrap.wish import NodeWish
from bridge.errors import BridgeError, Exit
from bridge.pki import csr
from bridge.pki.csr import PrivateKey
from bridge.specs import KeyAlgorithm

_SPKI = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
_NO_KEY = (ValueError, TypeError, UnsupportedAlgorithm)


class ForeignSaError(BridgeError):
    """`sa.key` and `sa.pub` are not what kube-apiserver could start with."""

    exit_code = Exit.USAGE
    hint = "copy both from another control-plane node: tokens that it has signed count only with the same pair"


def new_pair(algorithm: KeyAlgorithm) -> tuple[bytes, bytes]:
    """`sa.key` and `sa.pub`, as kubeadm would write them."""
    key = csr.generate_key(algorithm)
    return csr.key_pem(key), public_pem(key)


def public_pem(key: csr.PrivateKey) -> bytes:
    """The public key as `sa.pub` has it."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def is_sa_pair(key: bytes, public: bytes) -> bool:
    """Whether kube-apiserver can sign tokens with the one and check them with the other."""
    try:
        loaded = load_pem_private_key(key, None)
        there = load_pem_public_key(public)
    except _NO_KEY:
        return False
    return isinstance(loaded, PrivateKey) and loaded.public_key().public_bytes(*_SPKI) == there.public_bytes(*_SPKI)


def in_place(wish: NodeWish) -> tuple[bytes, bytes] | None:
    """
    Read the pair that is on the node already; None: neither of the two is.

    Raises:
        ForeignSaError: It is half a pair, or not the other nodes'.
    """
    places = wish.places
    key, public = live(places.sa_key), live(places.sa_public)
    if key is None and public is None:
        return None
    if key is None or public is None:
        raise ForeignSaError(f"{places.sa_key}: wanted sa.key and sa.pub, or none of them, found one of the two")
    if not is_sa_pair(key, public):
        raise ForeignSaError(f"{places.sa_public}: wanted the public key of sa.key, found another one")
    if wish.sa is not None and key != wish.sa[0]:
        raise ForeignSaError(f"{places.sa_key}: wanted the other nodes' service account key, found another one")
    return key, public


def assert_at_hand(wish: NodeWish) -> None:
    """
    Look before anybody is asked: a further control-plane node can't make the key.

    Raises:
        ForeignSaError: Nobody has brought it, or what is there is wrong.
    """
    if wish.role == "worker" or in_place(wish) is not None:
        return
    if wish.role == "control-plane" and wish.sa is None:
        raise ForeignSaError(
            "wanted the service account key of another control-plane node, found none",
            hint="--shared - with what `ca-bridge bootstrap share` prints there, or sa.key and sa.pub copied to "
            f"{wish.places.pki} (mode 0600) over a safe channel",
        )


def pair_if_new(places: Places, algorithm: KeyAlgorithm) -> tuple[str, str]:
    """A new pair as text, both empty where there is one."""
    if live(places.sa_key) is not None:
        return "", ""
    key, public = new_pair(algorithm)
    return key.decode(), public.decode()
