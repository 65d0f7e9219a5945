"""A node's word counts if its kubelet's key has signed it for this node; what others write into its object does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import NameOID

from bridge.contract import SignRequest
from bridge.pki.certificates import fingerprint
from bridge.pki.csr import build, generate_key
from bridge.rotation import Change, Phase, objects
from bridge.rotation.objects import KEYS, LATELY, NOTHING, NodeStatement
from bridge.rotation.readiness import NotReadyEverywhereError, assert_said
from bridge.specs import CA, FRONT_PROXY_CA, KUBELET_CONF, SPECS
from tests.kit.issuing import NOW, Signer

OLD, NEW, OTHER = (Signer.make(name, key_id=True) for name in ("kubernetes", "kubernetes-2", "kubernetes"))
BELOW = Signer.make("kubernetes issuing", parent=OLD, key_id=True)
CHANGE = Change(OLD.certificate, NEW.certificate)
ANCHORS = CHANGE.bundle(Phase.TRUSTED)
SAID = NodeStatement(NOW, Phase.TRUSTED.value, fingerprint(OLD.certificate), tuple(map(fingerprint, ANCHORS)))
CLIENT, SERVER = "1.3.6.1.5.5.7.3.2", "1.3.6.1.5.5.7.3.1"


@dataclass(frozen=True)
class Pair:
    """A certificate with what is above it, and its key."""

    chain: tuple[x509.Certificate, ...]
    key: PrivateKeyTypes


def pair(
    ca: Signer = OLD,
    user: str = "system:node:w-1",
    group: str = "system:nodes",
    eku: str = CLIENT,
    end: datetime = NOW + timedelta(days=1),
) -> Pair:
    """A kubelet's client certificate, or with one thing different."""
    key = generate_key("ecdsa-p256")
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group), x509.NameAttribute(NameOID.COMMON_NAME, user)]
    )
    request = SignRequest(spec=SPECS[KUBELET_CONF], csr_pem=build(ca.certificate, key), validity=timedelta(days=1))
    leaf = ca.issue(request, subject=subject, ekus=[eku], begin=NOW - 2 * timedelta(days=1), end=end).leaf
    return Pair((leaf, ca.certificate) if ca is BELOW else (leaf,), key)


def node(name: str = "w-1", uid: str = "7d1f", **annotations: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "uid": uid, "annotations": annotations}}


def saying(text: str, authority: str = CA.name, name: str = "w-1", uid: str = "7d1f") -> dict[str, Any]:
    """A Node object with this annotation."""
    return node(name, uid, **{KEYS[authority]: text})


def signed(by: Pair, said: NodeStatement = SAID, authority: str = CA.name, of: Mapping[str, Any] | None = None) -> str:
    """As the run on w-1 writes it, with this pair."""
    return objects.signed_statement(said, authority, of or node(), by.chain, by.key)


def read(object_: Mapping[str, Any], authority: str = CA.name) -> NodeStatement:
    return objects.statement_of(object_, authority, ANCHORS, NOW)


@pytest.mark.parametrize("ca", [OLD, NEW, BELOW])
@pytest.mark.parametrize("authority", [CA.name, FRONT_PROXY_CA.name])
def test_a_kubelets_key_signs_for_its_node(ca: Signer, authority: str) -> None:
    """Its certificate is of either CA of the cluster, or of one below it."""
    assert read(saying(signed(pair(ca), authority=authority), authority), authority) == SAID


FORGERS = {
    "another CA's, of the same name": (pair(OTHER), "another CA"),
    "another node's": (pair(user="system:node:w-2"), "another certificate than its kubelet's"),
    "an administrator's": (pair(user="kubernetes-admin", group="system:masters"), "than its kubelet's"),
    "a user's who is called like the node": (pair(group="people"), "than its kubelet's"),
    "the kubelet's serving certificate": (pair(eku=SERVER), "than its kubelet's"),
    "one that has ended": (pair(end=NOW - timedelta(seconds=1)), "has ended"),
    "another key": (replace(pair(), key=generate_key("ecdsa-p256")), "has not signed"),
}


@pytest.mark.parametrize(("by", "trouble"), FORGERS.values(), ids=FORGERS)
def test_who_may_write_to_a_node_object_can_not_make_its_word(by: Pair, trouble: str) -> None:
    """With no key but the node's own; what was written is named as the reason."""
    found = read(saying(signed(by)))
    assert trouble in found.trouble
    assert found._replace(trouble="") == NOTHING


def test_a_word_is_good_for_one_node_one_cluster_and_one_ca() -> None:
    """Copied to another object, to the same name in another cluster, or to another CA's annotation it says nothing."""
    w1, w2, text = pair(), pair(user="system:node:w-2"), signed(pair())
    assert read(saying(text)) == SAID
    assert "another certificate than its kubelet's" in read(saying(text, name="w-2")).trouble
    assert "has not signed" in read(saying(text, uid="another cluster's")).trouble
    assert "has not signed" in read(saying(text, FRONT_PROXY_CA.name), FRONT_PROXY_CA.name).trouble
    other = text.rpartition(" ")[0] + " " + signed(w2).rpartition(" ")[2]
    assert "has not signed" in read(saying(other, name="w-2")).trouble
    assert read(saying(signed(w2, of=node("w-2")), name="w-2")) == SAID
    assert "can't be read" in read({"metadata": {"name": "w-1", "annotations": {KEYS[CA.name]: signed(w1)}}}).trouble


def test_a_word_that_was_changed_or_cut_counts_for_nothing() -> None:
    """Each part of it is signed, and none is missing; the honest one, signed anew with the other time, counts."""
    by, later = pair(), SAID._replace(at=NOW + timedelta(hours=5))
    text, of_later = signed(by), signed(by, later)
    parts, others = text.split(" "), signed(by, NodeStatement(later.at, Phase.NEW.value, "ab", ("cd",))).split(" ")
    for place in range(4):
        forged = " ".join([*parts[:place], others[place], *parts[place + 1 :]])
        assert "has not signed" in read(saying(forged)).trouble
    for end in range(1, len(text), 7):
        assert read(saying(text[:end])).trouble
        assert read(saying(text[end:])).trouble
    assert read(saying(of_later)) == later


@pytest.mark.parametrize(
    "text",
    [
        "yesterday trusted ab ab c2ln Y2VydA==",
        "0001-01-01T00:00:00+14:00 trusted ab ab c2ln Y2VydA==",
        "x" * 100_000,
        " " * 5,
        "\ud800 trusted ab ab c2ln Y2VydA==",
    ],
)
def test_any_text_is_read(text: str) -> None:
    """It ends no run, and says nothing."""
    assert "can't be read" in read(saying(text)).trouble


def test_a_forged_word_leads_no_phase_on() -> None:
    """It is named with the reason, an old one with the hour; the honest one of the hour leads on."""

    def refused(text: str) -> str:
        try:
            assert_said(CA.name, CHANGE, Phase.ISSUED, {"w-1": read(saying(text))}, "cp-1", NOW)
        except NotReadyEverywhereError as e:
            return str(e)
        return ""

    by, admin = pair(), pair(user="kubernetes-admin", group="system:masters")
    assert refused(signed(by)) == ""
    assert "w-1 (what its Node object says is signed with another certificate" in refused(signed(admin))
    assert "within 1h" in refused(signed(by, SAID._replace(at=NOW - LATELY - timedelta(seconds=1))))
