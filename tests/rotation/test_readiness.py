"""What nodes have said of their certificates counts for an hour, until the phase has begun."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.cli.options import utc_now
from bridge.cluster import Client
from bridge.contract import SignRequest
from bridge.node.endpoints import Server
from bridge.node.reading import read_node
from bridge.pki.certificates import fingerprint, load_pem_certificates, pem
from bridge.pki.csr import generate_key, key_pem
from bridge.rotation import Change, Phase, places
from bridge.rotation.objects import LATELY, NOTHING, NodeStatement
from bridge.rotation.planning import Verb
from bridge.rotation.readiness import (
    NotReadyEverywhereError,
    RotationOptions,
    Spot,
    assert_said,
    late_statements,
    refusal,
    statements_of,
)
from bridge.settings.tables import Settings
from bridge.specs import CA, FRONT_PROXY_CA, USER
from bridge.state import Store
from bridge.system.files import write_atomically
from bridge.system.tls import HttpsError
from bridge.system.waiting import wait_until
from tests.kit import cluster_api, kube_api, next_cas, opensslca, programs
from tests.kit.issuing import NOW, Signer
from tests.kit.kube_api import user_name
from tests.kit.loopback import free_port
from tests.kit.pki import Pki, handmade_pki
from tests.kit.rotating import run, with_next

SECOND = timedelta(seconds=1)
OLD, NEW = (Signer.make(name, key_id=True).certificate for name in ("kubernetes", "kubernetes-2"))
CHANGE = Change(OLD, NEW)


def said(change: Change, phase: Phase, ago: timedelta = SECOND) -> NodeStatement:
    """What a node's run has seen in a phase, some time ago."""
    trusted = tuple(map(fingerprint, change.bundle(phase)))
    return NodeStatement(NOW - ago, phase.value, fingerprint(change.signer(phase)), trusted)


def test_a_word_counts_for_an_hour() -> None:
    """Older ones are named, and so are those from the future (a clock is wrong), and a node that has said nothing."""
    ages = {"now": LATELY, "late": LATELY + SECOND, "ahead": -LATELY - SECOND}
    words = {name: said(CHANGE, Phase.ISSUED, ago) for name, ago in ages.items()}
    assert late_statements({**words, "silent": NOTHING}, Phase.NEW, NOW) == ["late", "ahead", "silent"]


def test_a_phase_that_has_begun_goes_on() -> None:
    """A large cluster takes longer than an hour; going back from it begins another phase."""
    words = {"cp-1": said(CHANGE, Phase.NEW, 5 * LATELY), "cp-2": said(CHANGE, Phase.ISSUED, 2 * LATELY)}
    assert late_statements(words, Phase.NEW, NOW) == []
    assert late_statements(words, Phase.OLD, NOW) == ["cp-1", "cp-2"]


def refused(target: Phase, authority: str = CA.name, *, has_begun: bool = False, **words: NodeStatement) -> str:
    """Why a phase does not begin on cp1; empty: it does."""
    try:
        assert_said(authority, CHANGE, target, words, "cp1", None if has_begun else NOW)
    except NotReadyEverywhereError as e:
        return str(e)
    return ""


@pytest.mark.rotation("components that no network shows")
def test_issue_waits_for_nodes_whose_components_have_not_read_the_new_ca() -> None:
    """One that trusts another new CA, or said it two hours ago, is named; our own node is looked at by its own run."""
    there, late = said(CHANGE, Phase.TRUSTED), said(CHANGE, Phase.TRUSTED, 2 * LATELY)
    assert refused(Phase.ISSUED, cp2=there, w1=there, cp1=NOTHING) == ""
    another = Change(OLD, Signer.make("kubernetes-3", key_id=True).certificate)
    for behind in (said(another, Phase.TRUSTED), said(CHANGE, Phase.OLD), NOTHING):
        assert refused(Phase.ISSUED, cp2=there, w1=there, w2=behind).endswith("that have not said so: w2")
    assert refused(Phase.ISSUED, cp2=there, w2=late).endswith("found others: w2")
    assert refused(Phase.ISSUED, cp3=said(CHANGE, Phase.ISSUED, 2 * LATELY), w2=late) == ""


def test_drop_waits_for_nodes_whose_certificates_are_the_old_cas() -> None:
    """One that has not been issued new ones is named, and our own too, as long as its components have not read them."""
    there, behind = said(CHANGE, Phase.ISSUED), said(CHANGE, Phase.TRUSTED)
    assert refused(Phase.NEW, FRONT_PROXY_CA.name, cp1=there, cp2=there) == ""
    assert refused(Phase.NEW, FRONT_PROXY_CA.name, cp1=there, cp2=there, cp3=behind).endswith("not said so: cp3")
    assert refused(Phase.NEW, FRONT_PROXY_CA.name, cp1=behind, cp2=there).endswith("not said so: cp1")


def test_what_was_said_when_the_desk_was_asked_counts_until_it_answers() -> None:
    """The hour ends while people carry files; a node that says something else meanwhile is named all the same."""
    late, gone_back = said(CHANGE, Phase.TRUSTED, 30 * LATELY), said(CHANGE, Phase.OLD, 20 * LATELY)
    assert refused(Phase.ISSUED, cp2=late).endswith("found others: cp2")
    assert refused(Phase.ISSUED, has_begun=True, cp2=late) == ""
    assert refused(Phase.ISSUED, has_begun=True, cp2=late, w1=gone_back).endswith("not said so: w1")


def test_the_hint_says_what_to_type_where() -> None:
    """On the nodes that are named, and the verb of their phase."""
    late = {"cp2": said(CHANGE, Phase.TRUSTED, 2 * LATELY), "w1": NOTHING}
    with pytest.raises(NotReadyEverywhereError) as behind:
        assert_said(CA.name, CHANGE, Phase.NEW, late, "cp1", NOW)
    assert behind.value.hint.startswith("`ca-bridge rotate-ca issue` on cp2, w1, which changes nothing")
    with pytest.raises(NotReadyEverywhereError) as old:
        assert_said(CA.name, CHANGE, Phase.ISSUED, {"cp2": late["cp2"]}, "cp1", NOW)
    assert old.value.hint.startswith("`ca-bridge rotate-ca trust` on cp2, which")


def test_a_worker_says_nothing_of_the_front_proxys_ca() -> None:
    """No server shows an API server's certificate for aggregated ones, and a worker has none."""
    labels = {"node-role.kubernetes.io/control-plane": ""}
    nodes: list[dict[str, Any]] = [{"metadata": {"name": "cp1", "labels": labels}}, {"metadata": {"name": "w1"}}]
    assert statements_of(nodes, FRONT_PROXY_CA.name, (OLD,), NOW) == {"cp1": NOTHING}
    assert statements_of(nodes, CA.name, (OLD,), NOW) == {"cp1": NOTHING, "w1": NOTHING}


# --- servers that are shown ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_process_here")
def test_a_control_plane_looks_at_the_etcd_that_is_elsewhere(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it trusts the new CA alone, each server of `--etcd-servers` has the new CA's certificate; others have no say."""
    corp = tmp_path / "corp"
    corp.mkdir()
    for source, base in (
        ("apiserver-etcd-client.crt", "c.crt"),
        ("apiserver-etcd-client.key", "c.key"),
        ("etcd/ca.crt", "ca.crt"),
    ):
        shutil.copy(pki.pki_dir / source, corp / base)
    shown = {"etcd-1": load_pem_certificates((pki.pki_dir / "etcd/server.crt").read_bytes())[0]}
    shutil.rmtree(pki.pki_dir / "etcd")
    manifest = pki.kubeconfig_dir / "manifests/kube-apiserver.yaml"
    manifest.parent.mkdir(exist_ok=True)
    flags = [f"--etcd-cafile={corp}/ca.crt", f"--etcd-certfile={corp}/c.crt", f"--etcd-keyfile={corp}/c.key"]
    command = json.dumps(["kube-apiserver", "--etcd-servers=https://etcd-1:2379", *flags])
    manifest.write_text(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: kube-apiserver}\n"
        f"spec: {{containers: [{{name: a, image: 'a:v1.37.2', command: {command}}}]}}\n"
    )
    settings = with_next(pki, tmp_path)
    monkeypatch.setattr("bridge.rotation.readiness._nodes", lambda *_: iter(()))
    monkeypatch.setattr(Client, "served", lambda _, place: shown[place.host])
    for verb in (Verb.TRUST, Verb.ISSUE):
        assert run(settings, verb, ["etcd-ca"]).exit_code == 0
        Store(settings.node.state_dir).unproven.unlink(missing_ok=True)  # an operator restarts here
    with pytest.raises(
        NotReadyEverywhereError, match=r"etcd of etcd-1 \(https://etcd-1:2379\): it has a certificate of another CA"
    ):
        run(settings, Verb.DROP, ["etcd-ca"], RotationOptions())
    shown["etcd-1"] = load_pem_certificates((corp / "c.crt").read_bytes())[0]
    assert run(settings, Verb.DROP, ["etcd-ca"], RotationOptions()).exit_code == 0


@pytest.mark.usefixtures("no_process_here")
def test_a_server_whose_certificate_an_intermediate_signed_is_of_the_ca_above_it(
    settings: Settings, pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handshake shows us the leaf alone; the intermediate is behind this node's own. One of another CA is still refused."""
    begin, end = utc_now() - timedelta(days=1), utc_now() + timedelta(days=5000)
    above = Signer.make("corp root", key_id=True, begin=begin, end=end)
    below = Signer.make("corp issuing", parent=above, key_id=True, begin=begin, end=end)
    place = opensslca.make_ca_directory(tmp_path / "below", pem(below.certificate), key_pem(below.key))
    (tmp_path / "above.crt").write_bytes(pem(above.certificate))
    table = {**settings.authorities["etcd-ca"].next, "anchor": str(tmp_path / "above.crt"), "dir": str(place)}
    ours = dataclasses.replace(settings.authorities["etcd-ca"], next={**table, "above": "allowed"})
    settings = dataclasses.replace(settings, authorities={**settings.authorities, "etcd-ca": ours})
    server = pki.pki_dir / "etcd/server.crt"
    shown = load_pem_certificates(server.read_bytes())[:1]
    for verb in (Verb.TRUST, Verb.ISSUE):
        assert run(settings, verb, ["etcd-ca"]).exit_code == 0
    monkeypatch.setattr(
        "bridge.rotation.readiness.spots_of", lambda *_: [Spot("cp-2", "etcd", Server("https://cp-2:2379"))]
    )
    monkeypatch.setattr(Client, "served", lambda *_: shown[0])
    with pytest.raises(NotReadyEverywhereError, match="it has a certificate of another CA"):
        run(settings, Verb.DROP, ["etcd-ca"], RotationOptions())
    shown[:] = load_pem_certificates(server.read_bytes())[:1]
    assert run(settings, Verb.DROP, ["etcd-ca"], RotationOptions()).exit_code == 0


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
                (directory / "log").read_bytes, lambda text: ready in text, timedelta(minutes=3), pause_seconds=0.1
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
    change = places.look(settings, read_node(settings.node), ["etcd-ca"])["etcd-ca"].change
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
            lambda: said_by(theirs, spot), lambda text: not text, timedelta(minutes=3), pause_seconds=0.2
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
