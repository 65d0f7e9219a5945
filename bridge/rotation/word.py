"""
What a node's own run has seen of one CA there, as its Node object says it to the other nodes (pure).

Each user who may write Node objects can write a word there.
It counts if the key of a kubelet's client certificate has signed it, which the cluster's CA has issued to exactly this node:
on the node root alone reads that key. The Node object's UID, which no two clusters have, is signed as well.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from bridge.cluster.access import text_of
from bridge.pki import identity, signatures
from bridge.pki.bundle_format import TIME
from bridge.pki.certificates import UNREADABLE, attributes, extended_key_usages
from bridge.pki.expiry import rfc3339
from bridge.specs import CA, EKU, FRONT_PROXY_CA

#: Annotations of a Node, by authority: no server shows a kubelet's client certificate, the front proxy's, or what a
#: controller manager trusts.
KEYS = {CA.name: "ca-bridge.io/ca-seen", FRONT_PROXY_CA.name: "ca-bridge.io/front-proxy-ca-seen"}
#: What was proven counts for so long: a phase begins by what is there now.
LATELY = timedelta(hours=1)
_CONTEXT = b"ca-bridge node's word about a CA 1"
#: Nine certificates have a quarter of it.
_LONGEST = 1 << 16
_CN, _O = NameOID.COMMON_NAME.dotted_string, NameOID.ORGANIZATION_NAME.dotted_string


class Word(NamedTuple):
    """What a node's own run has seen of one CA."""

    at: datetime  #: When it was seen; whole seconds.
    phase: str  #: In which phase.
    signer: str  #: The SHA-256 of the CA that signed its certificates.
    trusted: tuple[str, ...]  #: The SHA-256 of each CA that its components have read.
    trouble: str = ""  #: Why what stands in the Node object does not count; the rest says nothing then.

    def is_late(self, now: datetime) -> bool:
        """Whether it is older than what was proven may be, or from the future: a clock is wrong."""
        return abs(now - self.at) > LATELY


#: Of a node that has said nothing.
NOTHING = Word(datetime.min.replace(tzinfo=UTC), "", "", ())


def signed(
    word: Word, authority: str, node: Mapping[str, Any], chain: Sequence[x509.Certificate], key: PrivateKeyTypes
) -> str:
    """The annotation of this Node object, by the key of a kubelet's certificate (ValueError: a key that can't sign)."""
    signature = signatures.sign(key, _message(word, authority, node))
    certificates = ",".join(b64encode(one.public_bytes(Encoding.DER)).decode() for one in chain)
    return " ".join([*_texts(word), b64encode(signature).decode(), certificates])


def of(node: Mapping[str, Any], authority: str, anchors: Sequence[x509.Certificate], now: datetime) -> Word:
    """The word in a Node object, which counts by these CAs of the cluster; one that does not says nothing, and why."""
    text = text_of(node, "metadata", "annotations", KEYS[authority])
    if not text:
        return NOTHING
    try:
        word, signature, chain = _parsed(text)
        trouble = _not_this_node(node, chain, anchors, now)
        if not trouble and not signatures.is_by(chain[0].public_key(), signature, _message(word, authority, node)):
            trouble = "its kubelet's key has not signed what its Node object says"
    except UNREADABLE:
        trouble = "what its Node object says can't be read"
    return NOTHING._replace(trouble=trouble) if trouble else word


def _parsed(text: str) -> tuple[Word, bytes, list[x509.Certificate]]:
    """A word, its signature, and the chain of the key that made it (UNREADABLE)."""
    if len(text) > _LONGEST:
        raise ValueError
    at, phase, signer, trusted, signature, certificates = text.split(" ")
    chain = [x509.load_der_x509_certificate(b64decode(one, validate=True)) for one in certificates.split(",")]
    seen_at = datetime.strptime(at, TIME).replace(tzinfo=UTC)
    word = Word(seen_at, phase, signer, tuple(trusted.split(",")))
    return word, b64decode(signature, validate=True), chain


def _not_this_node(
    node: Mapping[str, Any], chain: Sequence[x509.Certificate], anchors: Sequence[x509.Certificate], now: datetime
) -> str:
    """Why a chain is not that of the node's kubelet; empty: it is (UNREADABLE)."""
    leaf, names = chain[0], attributes(chain[0].subject)
    users = [value for oid, value in names if oid == _CN]
    is_its_kubelet = users == [f"system:node:{_name(node)}"] and (_O, "system:nodes") in names
    if not is_its_kubelet or EKU.CLIENT_AUTH.value not in (extended_key_usages(leaf) or ()):
        return "what its Node object says is signed with another certificate than its kubelet's"
    if not identity.leads_to(chain, anchors) or leaf.not_valid_after_utc < now:
        return "what its Node object says is signed with a certificate of another CA, or one that has ended"
    return ""


def _message(word: Word, authority: str, node: Mapping[str, Any]) -> bytes:
    uid = text_of(node, "metadata", "uid")
    if not uid:
        raise ValueError("wanted the UID of a Node object, found none")
    texts = (authority, _name(node), uid, *_texts(word))
    return signatures.framed([_CONTEXT, *(text.encode() for text in texts)])


def _name(node: Mapping[str, Any]) -> str:
    return text_of(node, "metadata", "name")


def _texts(word: Word) -> tuple[str, ...]:
    return rfc3339(word.at), word.phase, word.signer, ",".join(word.trusted)
