"""What nodes have said of their certificates counts for an hour, until the phase has begun."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.cluster.access import Client
from bridge.contract import SignRequest
from bridge.node import inventory
from bridge.node.endpoints import Server
from bridge.pki.certificates import load_pem_certificates, pem
from bridge.pki.csr import generate_key, key_pem
from bridge.pki.expiry import rfc3339
from bridge.rotation import places
from bridge.rotation.gate import LATELY, Spot, Word, late_words, refusal
from bridge.rotation.objects import SEEN_AT, SIGNED_BY
from bridge.rotation.phases import Phase
from bridge.rotation.steps import Verb
from bridge.specs import USER
from bridge.system.http import HttpsError
from bridge.system.waiting import wait_until
from tests.kit import kube_api, next_cas, programs
from tests.kit.issuing import NOW, Signer
from tests.kit.kube_api import user_name
from tests.kit.loopback import free_port
from tests.kit.pki import Pki, handmade_pki
from tests.kit.rotating import run, with_next

SECOND = timedelta(seconds=1)


def said(ago: timedelta, phase: Phase = Phase.ISSUED) -> Word:
    """A node's word of some time ago, read off its object."""
    return word({SIGNED_BY: "ab", SEEN_AT: f"{rfc3339(NOW - ago)} {phase.value}"})


def word(annotations: Mapping[str, object]) -> Word:
    return Word.of({"metadata": {"annotations": annotations}})


def test_a_word_counts_for_an_hour() -> None:
    """Older ones are named, and so are those from the future: a clock is wrong."""
    words = {"now": said(LATELY), "late": said(LATELY + SECOND), "ahead": said(-LATELY - SECOND)}
    assert late_words(words, Phase.NEW, NOW) == ["late", "ahead"]


@pytest.mark.parametrize(
    "annotations",
    [{}, {SEEN_AT: ""}, {SEEN_AT: "yesterday issued"}, {SEEN_AT: "2026-11-24T12:00:00 issued"}, {SEEN_AT: ["2026"]}],
)
def test_a_word_without_a_time_is_late(annotations: Mapping[str, object]) -> None:
    """Whatever somebody has written into the object."""
    assert late_words({"cp-2": word(annotations)}, Phase.NEW, NOW) == ["cp-2"]


def test_a_phase_that_has_begun_goes_on() -> None:
    """A large cluster takes longer than an hour; going back from it begins another phase."""
    words = {"cp-1": said(5 * LATELY, Phase.NEW), "cp-2": said(2 * LATELY)}
    assert late_words(words, Phase.NEW, NOW) == []
    assert late_words(words, Phase.OLD, NOW) == ["cp-1", "cp-2"]


# --- a real etcd ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def etcd(directory: Path, pki: Pki, trusted: Sequence[x509.Certificate]) -> Iterator[Spot]:
    """A member with the node's pair, which trusts these CAs of clients."""
    directory.mkdir()
    (directory / "trusted.crt").write_bytes(pem(*trusted))
    client, peer = (f"127.0.0.1:{free_port()}" for _ in range(2))
    command = [
        str(programs.require("etcd")), f"--data-dir={directory}/data", "--client-cert-auth",
        f"--listen-client-urls=https://{client}", f"--advertise-client-urls=https://{client}",
        f"--listen-peer-urls=http://{peer}", f"--cert-file={pki.pki_dir}/etcd/server.crt",
        f"--key-file={pki.pki_dir}/etcd/server.key", f"--trusted-ca-file={directory}/trusted.crt",
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
            yield Spot("cp-2", "etcd", Server(f"https://{client}"))
        finally:
            process.kill()


@pytest.mark.kube("etcd")
@pytest.mark.rotation("half-done", "names looked at once", "etcd/ca.crt")
def test_an_etcd_is_shown_the_new_certificate_before_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that trusts the old CA alone refuses it, unless it has a cross certificate behind it; one that trusts both takes it."""
    monkeypatch.setattr("bridge.node.processes.running", lambda *_: [])
    pki = handmade_pki(tmp_path / "node")
    settings = with_next(pki, tmp_path, cross=True)
    change = places.look(settings, inventory.of(settings.node), ["etcd-ca"])["etcd-ca"].change
    with (
        etcd(tmp_path / "old", pki, [change.old]) as old,
        etcd(tmp_path / "both", pki, [change.old, change.new]) as both,
    ):
        assert run(settings, Verb.ISSUE, ["etcd-ca"]).exit_code == 0
        certificate, key = (pki.pki_dir / f"apiserver-etcd-client.{end}" for end in ("crt", "key"))
        whole = certificate.read_bytes()
        alone = pem(load_pem_certificates(whole)[0])
        for spot, data, is_taken in ((old, whole, True), (old, alone, False), (both, whole, True), (both, alone, True)):
            client = Client(
                name="apiserver-etcd-client", certificate_pem=data, key_pem=key.read_bytes(), trust_pem=None
            )
            assert (said_by(client, spot) == "") is is_taken, spot


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
