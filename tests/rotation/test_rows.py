"""Each trap of a CA's replacement, and each place that holds a CA, has a test; the mark `rotation` names them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

#: What went wrong elsewhere, or would, and what keeps it from happening here.
TRAPS = {
    "order of the CA file": "turned in one installation with the certificates: kubeadm takes the first CA for the signer",
    "kubeconfigs behind the CA file": "both CAs in the phase “issued”, the new one alone in “new”: kubeadm compares",
    "half a file": "replaced by a rename: an API server takes a half file with one whole certificate for the whole",
    "a CA's key on a node": "refused, or moved away: `kubeadm certs renew` writes one certificate into CA data",
    "same subject without key identifiers": "refused: OpenSSL tries the first CA of the name alone",
    "recomputed key identifier": "refused: OpenSSL finds no CA for certificates that have the old one",
    "subject in another encoding": "refused: Go finds no CA for certificates with the old bytes",
    "no CA bit, or expired": "refused: a ClusterTrustBundle takes none",
    "begins in the future": "refused, and also less than an hour ago: clocks differ",
    "front-proxy CA's key is ca's": "refused: any client certificate could impersonate",
    "etcd CA's key is ca's": "refused: every kubeconfig would open etcd",
    "an anchor that signs for others": "refused, unless the settings allow it: its certificates become users",
    "a chain for an anchor": "refused: one certificate, of the CA that signs",
    "an upgrade between phases": "`doctor` says in which phase the node is, and for how long",
    "a node joins between phases": "it asks the CA that signs now, the first in the others' CA file",
    "a backup of etcd restored": "`status` says which objects have other CAs than the phase",
    "the leader moves to an old node": "`issue` and `drop` name a namespace whose kube-root-ca.crt is behind, as `status` does",
    "components that no network shows": "their node has said within the hour that they have read the CA",
    "another node's front proxy": "each API server is shown the new certificate before it is installed",
    "the next etcd too early": "an API server or member that is not well elsewhere holds a restart up",
    "an API server before /readyz": "the API server is asked for /readyz before the next step",
    "names looked at once": "servers are shown certificates, and not asked for names, which kubelets change a minute later",
    "half-done": "trust is proven by the very certificates before one is installed",
    "a server that goes on with its old certificate": "each look is a connection of its own",
    "two API servers behind one balancer": "each is asked at its own address",
}
#: What holds a CA (one that others own is listed, and left alone).
PLACES = {
    "CA files", "kubeconfigs", "copies of kubeconfigs", "a worker's CA file", "etcd/ca.crt", "kube-root-ca.crt",
    "service account tokens", "ClusterTrustBundle", "cluster-info", "extension-apiserver-authentication",
    "caBundle of webhooks, APIServices and conversions", "others' Secrets and ConfigMaps", "our backups", "our desk", "our gateway",
    "kubeconfigs for people",
}  # fmt: skip


def marked(path: Path) -> Iterator[str]:
    """The rows that a test file's marks name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.rotation":
            yield from (ast.literal_eval(argument) for argument in node.args)


def test_each_row_has_a_test_and_each_mark_a_row() -> None:
    """A row without a test is named, and so is a mark for no row."""
    tests = Path(__file__).parents[1]
    found = {row for path in tests.rglob("test_*.py") if path != Path(__file__) for row in marked(path)}
    assert found == {*TRAPS, *PLACES}


def test_a_mark_is_read_off_the_source(tmp_path: Path) -> None:
    """The twin: another mark is none."""
    path = tmp_path / "test_x.py"
    path.write_text('@pytest.mark.rotation("a", "b")\n@pytest.mark.attack("c")\ndef test_x(): ...\n')
    assert set(marked(path)) == {"a", "b"}
