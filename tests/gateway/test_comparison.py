"""The comparison with other signers: its page is whole, and the rules that it plays are kubelet-csr-approver's."""

from __future__ import annotations

import re
from typing import Any

import pytest
from cryptography import x509

from tests.kit import csr_approver, hostile_csrs
from tests.kit.gateways import csr_pem, node_subject
from tests.measure import comparison

RESOLVED = {"w1": ["192.0.2.1"], "w1.example.com": ["192.0.2.1"], "w1.evil.example": ["203.0.113.66"]}


@pytest.mark.parametrize(
    ("names", "user", "more", "why"),
    [
        (["w1"], "system:node:w1", {}, None),
        (["w1.evil.example"], "system:node:w1", {}, None),  # a name that begins like the node's
        (["w2"], "system:node:w1", {}, "the name does not begin with the node's"),
        (["w1x"], "system:node:w1", {}, "the name can't be looked up"),
        (["w1", "w1.example.com"], "system:node:w1", {}, "more than one DNS name"),
        ([], "system:node:w1", {}, "no SAN"),
        (["w1"], "system:node:w2", {}, "the CN is not the username"),
        (["w1"], "w1", {}, "no node asks"),
        (["w1"], "system:node:w1", {"expirationSeconds": 368 * 86400}, "for too long"),
    ],
)
def test_the_rules_of_kubelet_csr_approver(names: list[str], user: str, more: dict[str, Any], why: str | None) -> None:
    """Each rule of its README, with its twin."""
    pem = csr_pem(node_subject("w1"), [x509.DNSName(name) for name in names])
    assert csr_approver.verdict({"username": user, **more}, pem, RESOLVED) == why


def test_the_page_tells_what_was_seen() -> None:
    """The committed page has none signed by ours, and some by each other one; a signed request is shown as signed."""
    text = comparison.PAGE.read_text(encoding="utf-8")
    [counts] = re.findall(r"^\| \*\*hostile requests signed\*\* \| (.*) \|$", text, re.MULTILINE)
    ours, *others = [int(count.strip("*")) for count in counts.split(" | ")]
    assert ours == 0
    assert min(others) > 0

    cases = hostile_csrs.cases()[:3]
    columns = [comparison.Column(name="one", note="x", states={0: "denied", 2: "signed"}, twins={})]
    lines = comparison.page(cases, columns).splitlines()
    assert [line.split(" | ")[-1] for line in lines[-3:]] == ["no |", "- |", "**signed** |"]
    assert "| **hostile requests signed** | **1** |" in lines
