"""What nodes have said of their certificates counts for an hour, until the phase has begun."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.cluster.access import Client
from bridge.contract import SignRequest
from bridge.node import inventory
from bridge.node.endpoints import Server
from bridge.pki.certificates import fingerprint, load_pem_certificates, pem
from bridge.pki.csr import generate_key, key_pem
from bridge.pki.expiry import rfc3339
from bridge.rotation import places
from bridge.rotation.gate import LATELY, NotReadyEverywhereError, Spot, Word, assert_said, late_words, refusal
from bridge.rotation.objects import KEYS
from bridge.rotation.phases import Change, Phase
from bridge.rotation.steps import Verb
from bridge.specs import CA, FRONT_PROXY_CA, USER
from bridge.system.files import write_atomically
from bridge.system.http import HttpsError
from bridge.system.waiting import wait_until
from tests.kit import cluster_api, kube_api, next_cas, programs
from tests.kit.issuing import NOW, Signer
from tests.kit.kube_api import user_name
from tests.kit.loopback import free_port
from tests.kit.pki import Pki, handmade_pki
from tests.kit.rotating import run, with_next

SECOND = timedelta(seconds=1)
SIGNED_BY, SEEN_AT, TRUSTS = KEYS[CA.name]
OLD, NEW = (Signer.make(name, key_id=True).certificate for name in ("kubernetes", "kubernetes-2"))
CHANGE = Change(OLD, NEW)


def said(ago: timedelta, phase: Phase = Phase.ISSUED) -> Word:
    """A node's word of some time ago, read off its object."""
    return word({SIGNED_BY: "ab", SEEN_AT: f"{rfc3339(NOW - ago)} {phase.value}"})


def word(annotations: Mapping[str, object]) -> Word:
    return Word.of({"metadata": {"annotations": annotations}}, CA.name)


def test_a_word_counts_for_an_hour() -> None:
    """Older reports are named, and so are those from the future, since a clock is wrong."""
    words = {"now": said(LATELY), "late": said(LATELY + SECOND), "ahead": said(-LATELY - SECOND)}
    assert late_words(words, Phase.NEW, NOW) == ["late", "ahead"]


@pytest.mark.parametrize(
    "annotations",
    [{}, {SEEN_AT: ""}, {SEEN_AT: "yesterday issued"}, {SEEN_AT: "2026-11-24T12:00:00 issued"}, {SEEN_AT: ["2026"]}],
)
def test_a_word_without_a_time_is_late(annotations: Mapping[str, object]) -> None:
    """Any other text in the annotation counts as no report."""
    assert late_words({"cp-2": word(annotations)}, Phase.NEW, NOW) == ["cp-2"]


def test_a_phase_that_has_begun_goes_on() -> None:
    """A large cluster takes longer than an hour; going back from it begins another phase."""
    words = {"cp-1": said(5 * LATELY, Phase.NEW), "cp-2": said(2 * LATELY)}
    assert late_words(words, Phase.NEW, NOW) == []
    assert late_words(words, Phase.OLD, NOW) == ["cp-1", "cp-2"]


def node(
    name: str,
    change: Change,
    phase: Phase,
    ago: timedelta = SECOND,
    authority: str = CA.name,
    *,
    is_worker: bool = False,
) -> dict[str, Any]:
    """A Node object that says what `rotate-ca` writes in a phase."""
    keys = KEYS[authority]
    said = {
        keys.signed_by: fingerprint(change.signer(phase)),
        keys.seen: f"{rfc3339(NOW - ago)} {phase.value}",
        keys.trusts: ",".join(map(fingerprint, change.bundle(phase))),
    }
    labels = {} if is_worker else {"node-role.kubernetes.io/control-plane": ""}
    return {"metadata": {"name": name, "labels": labels, "annotations": said}}


def refused(target: Phase, *nodes: dict[str, Any], authority: str = CA.name) -> str:
    """Why a phase does not begin on cp-1; empty: it does."""
    try:
        assert_said(authority, CHANGE, target, nodes, "cp-1", NOW)
    except NotReadyEverywhereError as e:
        return str(e)
    return ""


@pytest.mark.rotation("components that no network shows")
def test_issue_waits_for_nodes_whose_components_have_not_read_the_new_ca() -> None:
    """One that trusts another new CA, or said it two hours ago, is named; our own node is looked at by its own run."""
    there = node("cp-2", CHANGE, Phase.TRUSTED), node("w-1", CHANGE, Phase.TRUSTED, is_worker=True)
    assert refused(Phase.ISSUED, *there, {"metadata": {"name": "cp-1"}}) == ""
    another = Change(OLD, Signer.make("kubernetes-3", key_id=True).certificate)
    for behind in (node("w-2", another, Phase.TRUSTED), node("w-2", CHANGE, Phase.OLD), {"metadata": {"name": "w-2"}}):
        assert refused(Phase.ISSUED, *there, behind).endswith("that have not said so: w-2")
    assert refused(Phase.ISSUED, *there, node("w-2", CHANGE, Phase.TRUSTED, 2 * LATELY)).endswith("found others: w-2")
    begun = node("cp-3", CHANGE, Phase.ISSUED, 2 * LATELY)
    assert refused(Phase.ISSUED, begun, node("w-2", CHANGE, Phase.TRUSTED, 2 * LATELY)) == ""


def test_drop_of_the_front_proxys_ca_waits_for_control_planes_alone() -> None:
    """No server shows an API server's certificate for aggregated ones; a worker has none, and says nothing of it."""
    worker, name = {"metadata": {"name": "w-1"}}, FRONT_PROXY_CA.name
    issued = [node(each, CHANGE, Phase.ISSUED, authority=name) for each in ("cp-1", "cp-2")]
    assert refused(Phase.NEW, *issued, worker, authority=name) == ""
    behind = node("cp-3", CHANGE, Phase.TRUSTED, authority=name)
    assert refused(Phase.NEW, *issued, worker, behind, authority=name).endswith("that have not said so: cp-3")
    assert refused(Phase.NEW, *issued, node("cp-3", CHANGE, Phase.ISSUED), authority=name).endswith(": cp-3")


# --- a real etcd ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def etcd(directory: Path, pki: Pki, trusted: Sequence[x509.Certificate]) -> Iterator[tuple[Spot, Spot]]:
    """A member with the node's pairs, which trusts these CAs: for clients, and for peers."""
    directory.mkdir()
    (directory / "trusted.crt").write_bytes(pem(*trusted))
    client, peer = (f"https://127.0.0.1:{free_port()}" for _ in range(2))
    command = [
        str(programs.require("etcd")), f"--data-dir={directory}/data", "--client-cert-auth",
        f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
        f"--cert-file={pki.pki_dir}/etcd/server.crt", f"--key-file={pki.pki_dir}/etcd/server.key",
        f"--trusted-ca-file={directory}/trusted.crt", "--peer-client-cert-auth",
        f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}",
        f"--peer-cert-file={pki.pki_dir}/etcd/peer.crt", f"--peer-key-file={pki.pki_dir}/etcd/peer.key",
        f"--peer-trusted-ca-file={directory}/trusted.crt",
    ]  # fmt: skip
    with (
        (directory / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            ready = b"ready to serve client requests"
            wait_until(
                (directory / "log").read_bytes, lambda text: ready in text, timedelta(seconds=60), pause_seconds=0.1
            )
            yield Spot("cp-2", "etcd", Server(client)), Spot("cp-2", "peer", Server(peer))
        finally:
            process.kill()


@pytest.mark.kube("etcd")
@pytest.mark.rotation("half-done", "names looked at once", "etcd/ca.crt")
def test_an_etcd_is_shown_the_new_certificates_before_they_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A member that trusts the old CA alone refuses a client's and a peer's, unless a cross certificate is behind it; one
    that trusts both takes it.
    """
    monkeypatch.setattr("bridge.node.processes.running", lambda *_: [])
    pki = handmade_pki(tmp_path / "node")
    settings = with_next(pki, tmp_path, cross=True)
    change = places.look(settings, inventory.of(settings.node), ["etcd-ca"])["etcd-ca"].change
    with (
        etcd(tmp_path / "old", pki, [change.old]) as old,
        etcd(tmp_path / "both", pki, [change.old, change.new]) as both,
    ):
        assert run(settings, Verb.ISSUE, ["etcd-ca"]).exit_code == 0
        for number, base in enumerate(("apiserver-etcd-client", "etcd/peer")):
            certificate, key = (pki.pki_dir / f"{base}.{end}" for end in ("crt", "key"))
            whole = certificate.read_bytes()
            alone = pem(load_pem_certificates(whole)[0])
            for spots, data, is_taken in (
                (old, whole, True),
                (old, alone, False),
                (both, whole, True),
                (both, alone, True),
            ):
                client = Client(name=base, certificate_pem=data, key_pem=key.read_bytes(), trust_pem=None)
                assert (said_by(client, spots[number]) == "") is is_taken, spots[number]


def said_by(client: Client, spot: Spot) -> str:
    """Why it is not taken; a connection that ends says so, too."""
    try:
        return refusal(client, spot)
    except HttpsError as e:
        return str(e)


@pytest.mark.kube("kube-apiserver", "etcd")
def test_an_api_server_that_trusts_the_old_ca_alone_knows_a_user_by_the_cross_certificate(tmp_path: Path) -> None:
    """The real one answers; without the cross certificate it says that it does not know the user (HTTP 401)."""
    key, now = generate_key("ecdsa-p256"), datetime.now(UTC)
    new = Signer.make("kubernetes-2", key_id=True, begin=now - timedelta(days=1), end=now + timedelta(days=900))
    csr = x509.CertificateSigningRequestBuilder().subject_name(user_name("bob", ["dev"])).sign(key, hashes.SHA256())
    request = SignRequest(spec=USER, csr_pem=csr.public_bytes(Encoding.PEM), validity=timedelta(days=1))
    leaf = new.issue(request, begin=now - timedelta(minutes=5), end=now + timedelta(days=1)).leaf
    with kube_api.serving(tmp_path / "api") as server:
        old = pem(server.cluster.ca.certificate), key_pem(server.cluster.ca.key)
        path = next_cas.cross(old, pem(new.certificate), tmp_path / "cross", days=30)
        spot = Spot("cp-2", "api", Server(server.url))
        for data, found in ((pem(leaf) + path.read_bytes(), ""), (pem(leaf), "HTTP 401")):
            client = Client(name="bob", certificate_pem=data, key_pem=key_pem(key), trust_pem=None)
            said = said_by(client, spot)
            assert said == found if not found else found in said


@pytest.mark.kube("kube-apiserver", "etcd")
@pytest.mark.rotation("another node's front proxy")
def test_an_api_server_is_shown_the_front_proxys_new_certificate(tmp_path: Path) -> None:
    """One that trusts the old CA alone does not know it (HTTP 401); with both CAs in its file it takes both certificates."""
    now = datetime.now(UTC)
    old, new = (
        Signer.make(name, key_id=True, begin=now - timedelta(days=1), end=now + timedelta(days=900))
        for name in ("front-proxy-ca", "front-proxy-ca-2")
    )
    trusted = tmp_path / "front-proxy-ca.crt"
    trusted.write_bytes(pem(old.certificate))
    flags = {
        "requestheader-client-ca-file": str(trusted),
        "requestheader-allowed-names": "front-proxy-client",
        "requestheader-username-headers": "X-Remote-User",
    }
    with cluster_api.running(tmp_path / "api", flags=flags) as cluster:
        spot = Spot("cp-2", "front-proxy", Server(cluster.url), "X-Remote-User")
        ours, theirs = front_proxy_client(old, now), front_proxy_client(new, now)
        assert said_by(ours, spot) == ""
        assert "HTTP 401" in said_by(theirs, spot)
        write_atomically(trusted, pem(old.certificate, new.certificate))
        found = wait_until(
            lambda: said_by(theirs, spot), lambda text: not text, timedelta(seconds=90), pause_seconds=0.2
        )
        assert found == ""
        assert said_by(ours, spot) == ""


def front_proxy_client(signer: Signer, now: datetime) -> Client:
    """An API server as aggregated ones see it."""
    key = generate_key("ecdsa-p256")
    subject = user_name("front-proxy-client", [])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    request = SignRequest(spec=USER, csr_pem=csr.public_bytes(Encoding.PEM), validity=timedelta(days=1))
    leaf = signer.issue(request, begin=now - timedelta(minutes=5), end=now + timedelta(days=1)).leaf
    return Client(name="front-proxy-client", certificate_pem=pem(leaf), key_pem=key_pem(key), trust_pem=None)
