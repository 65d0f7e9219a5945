"""Who may have what revoked: the rules, without a door around them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509

from bridge.desk.policy import parse
from bridge.desk.revocations import NotRevokedError, Signed, assert_may
from bridge.errors import BackendUnavailableError
from bridge.pki import csr, node_proofs
from bridge.pki.bundle import BundledRequest, RequestBundle, sign_request
from tests.kit.bundles import make_bundle, old_pairs
from tests.kit.desks import POLICY
from tests.kit.issuing import Signer
from tests.kit.pki import handmade_pki

_NAME = "front-proxy-client"


def test_who_may_have_what_revoked(tmp_path: Path) -> None:
    """The successor's holder, while the request for it is kept; a CA that was not reached yet refuses nothing for good."""
    pki, key = handmade_pki(tmp_path), csr.generate_key("ecdsa-p256")
    signer = Signer.load(*pki.ca_pem("front-proxy-ca"))
    old = old_pairs(pki, [_NAME])
    bundle = make_bundle(old, build=lambda live: x509.load_pem_x509_csr(csr.build(live, key)))
    [request] = bundle.requests
    now = datetime.now(UTC)
    leaf = signer.issue(sign_request(request, bundle)).leaf
    who = {"name": _NAME, "node": bundle.node, "cluster": bundle.cluster}
    asked = node_proofs.revocation(key, old=old[_NAME][0], successor=leaf, **who)
    looks: list[str] = []

    def read() -> tuple[BundledRequest, RequestBundle]:
        looks.append(bundle.node)
        return request, bundle

    kept = Signed(authority="front-proxy-ca", is_proven=True, asked=read, **who)
    forgotten = Signed(authority="front-proxy-ca", is_proven=True, asked=lambda: None, **who)
    policy, cas = parse(f'{POLICY}revoke = "superseded"\n'), {"front-proxy-ca": [signer.certificate]}

    with pytest.raises(NotRevokedError, match="another signature"):
        assert_may(replace(asked, proof=b"x"), {leaf: kept}.get, policy, cas, now)
    assert looks == []  # a request of a megabyte takes its time
    assert assert_may(asked, {leaf: kept}.get, policy, cas, now) == kept
    assert looks
    assert node_proofs.revocation_of(node_proofs.revocation_json(asked)) == asked
    with pytest.raises(BackendUnavailableError, match="not reached yet"):
        assert_may(asked, {leaf: kept}.get, policy, {}, now)
    with pytest.raises(NotRevokedError, match="as far as requests are kept"):
        assert_may(asked, {leaf: forgotten}.get, policy, cas, now)
    with pytest.raises(NotRevokedError, match="a successor that is valid"):
        assert_may(asked, {leaf: kept}.get, policy, cas, leaf.not_valid_after_utc)
