"""PKIs that the real kubeadm made, renewed by EST: through `estserver` as far as its mock CA goes, and whole through a double."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.contract import SignRequest
from bridge.specs import AUTHORITIES, SPECS
from tests.kit import est
from tests.kit.cas import Bridge, live_certificates
from tests.kit.est import Answer
from tests.kit.issuing import Signer
from tests.kit.pki import KubeadmPki, kubeadm_pki
from tests.kit.renewed import Snapshot, assert_renewed

PASSWORD = "correct horse battery staple"
VALIDITY = timedelta(days=365)


@pytest.fixture
def pki(tmp_path: Path) -> KubeadmPki:
    """A control plane's PKI with elliptic keys, its CA keys elsewhere."""
    return kubeadm_pki(tmp_path / "node", algorithm="ECDSA-P256")


@pytest.fixture
def tls(tmp_path: Path) -> est.Tls:
    """The servers' certificate, and the CA of agents."""
    return est.make_tls(tmp_path / "tls")


@contextmanager
def est_double(pki: KubeadmPki, tls: est.Tls) -> Iterator[est.Double]:
    """A server of all three CAs: a label an authority and usage class, of two segments, for one agent and one user."""
    labels = est.labels_of(pki, {name: name for name in AUTHORITIES})
    with est.double(labels, tls, validity=VALIDITY, users={"cp-1": PASSWORD}, client_cn="agent") as played:
        yield played


def bridge_with(pki: KubeadmPki, directory: Path, tls: est.Tls, urls: dict[str, str], **more: str) -> Bridge:
    """Settings with an EST server for each authority, and an agent's certificate."""
    bridge = Bridge(pki=pki, directory=directory)
    files = {key: str(path) for key, path in tls.agent("agent").items()}
    shared = {"type": "est", "url": "https://127.0.0.1", "ca_file": str(tls.ca), "timeout": "2m", "retry_for": "1s"}
    bridge.add("backend.enrol", {**shared, **files, **more})
    for authority, url in urls.items():
        label = {} if "label" in more else {"label": f"{authority}/{{usage}}"}
        bridge.add(f"authority.{authority}", {"backend": "enrol", "url": url, **label})
    return bridge


def with_user(bridge_directory: Path) -> dict[str, str]:
    """Settings for the double's user."""
    bridge_directory.mkdir(exist_ok=True)
    password = bridge_directory / "password"
    password.touch(mode=0o600)
    password.write_text(PASSWORD)
    return {"username": "cp-1", "password_file": str(password)}


@pytest.mark.kube("kubeadm", "estserver")
def test_renews_everything(tls: est.Tls, tmp_path: Path) -> None:
    """Etcd's own certificates by `estserver`, all others by the double; what the first can't give is refused by name."""
    # less than the 90 days of the mock CA: a renewal never shortens
    pki = kubeadm_pki(tmp_path / "node", algorithm="ECDSA-P256", validity=timedelta(days=60))
    before = Snapshot.of(pki)
    with est.estserver(tmp_path / "est", pki.ca_pem("etcd-ca"), tls) as url:
        bridge = bridge_with(pki, tmp_path / "real", tls, dict.fromkeys(AUTHORITIES, url), label="{usage}")
        members = bridge.run("renew", "etcd-server", "etcd-peer")
        assert members.returncode == 0, members.stderr
        client = bridge.run("renew", "etcd-healthcheck-client")
        assert client.returncode == 5
        assert "EKU: wanted clientAuth, got clientAuth, serverAuth" in client.stderr
    changed = {name for name, one in live_certificates(pki).items() if one != before.certificates[name]}
    assert changed == {"etcd-server", "etcd-peer"}
    assert Snapshot.of(pki) == before

    with est_double(pki, tls) as played:
        bridge = bridge_with(
            pki, tmp_path / "double", tls, dict.fromkeys(AUTHORITIES, played.url), **with_user(tmp_path / "double")
        )
        doctor = bridge.run("doctor")
        assert "enrol (est)" in doctor.stdout + doctor.stderr
        assert played.csrs == []
        rest = bridge.run("renew", *(name for name in before.certificates if name not in changed))
        assert rest.returncode == 0, rest.stderr
    assert_renewed(pki, before, tmp_path / "scratch")


@pytest.mark.kube
def test_renews_everything_in_one_run(tls: est.Tls, tmp_path: Path) -> None:
    """All certificates with RSA keys, as kubeadm makes them, in one run, by an agent's certificate and a password."""
    pki = kubeadm_pki(tmp_path / "rsa")
    before = Snapshot.of(pki)
    with est_double(pki, tls) as played:
        urls = dict.fromkeys(AUTHORITIES, played.url)
        run = bridge_with(pki, tmp_path / "double", tls, urls, **with_user(tmp_path / "double")).run("renew", "all")
    assert run.returncode == 0, run.stderr
    assert len(played.csrs) == len(before.certificates)
    assert_renewed(pki, before, tmp_path / "scratch")


@pytest.mark.kube
def test_a_ca_that_answers_later(pki: KubeadmPki, tls: est.Tls, tmp_path: Path) -> None:
    """Exit 4 and nothing moved while the server waits for a person; then the same CSRs are signed and installed."""
    before = Snapshot.of(pki)
    with est_double(pki, tls) as played:
        urls = dict.fromkeys(AUTHORITIES, played.url)
        bridge = bridge_with(pki, tmp_path / "double", tls, urls, **with_user(tmp_path / "double"))
        later = Answer.text(202, "waits for approval", Retry_After="0")
        for _ in range(2):
            asked = len(played.csrs)
            played.answers += [later] * len(before.certificates)
            run = bridge.run("renew", *(["all"] if not asked else []))
            assert run.returncode == 4
            assert "waits for approval" in run.stdout
            assert live_certificates(pki) == before.certificates
        waiting = set(played.csrs)
        assert len(waiting) == len(before.certificates)
        assert len(played.csrs) == 2 * len(waiting)
        run = bridge.run("renew")
        assert run.returncode == 0, run.stderr
        assert set(played.csrs) == waiting
    assert_renewed(pki, before, tmp_path / "scratch")


Hostile = Callable[[Signer, x509.CertificateSigningRequest], Answer]


def _issued(ca: Signer, csr: x509.CertificateSigningRequest, **differences: object) -> x509.Certificate:
    request = SignRequest(spec=SPECS["apiserver"], csr_pem=csr.public_bytes(Encoding.PEM), validity=VALIDITY)
    now = datetime.now(UTC)
    dates = {"begin": now - timedelta(minutes=5), "end": now + VALIDITY}
    return ca.issue(request, **{**dates, **differences}).leaf  # type: ignore[arg-type]


def _other_key(ca: Signer, csr: x509.CertificateSigningRequest) -> Answer:
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    return Answer.certificates(_issued(ca, csr, public_key=other))


#: What a hostile server answers, the exit code, and what the operator reads.
HOSTILE: dict[str, tuple[Hostile, int, str]] = {
    "more usages": (
        lambda ca, csr: Answer.certificates(_issued(ca, csr, ekus=["1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"])),
        5,
        "EKU: wanted serverAuth",
    ),
    "no SANs": (lambda ca, csr: Answer.certificates(_issued(ca, csr, sans=[])), 5, "SAN"),
    "another CA": (
        lambda _, csr: Answer.certificates(_issued(Signer.make("kubernetes"), csr)),
        5,
        "issuer: wanted a path to",
    ),
    "another key": (_other_key, 5, "wanted a certificate for the CSR's key"),
    "the CA itself": (lambda ca, _: Answer.certificates(ca.certificate), 5, "wanted a certificate for the CSR's key"),
    "cut off": (lambda ca, csr: Answer(body=est.bag(_issued(ca, csr)), promised=5000), 6, "est: https://127.0.0.1"),
    "half a PKCS#7": (lambda ca, csr: Answer(body=est.bag(_issued(ca, csr))[:-20]), 5, "wanted certificates in PKCS#7"),
    "without end": (lambda *_: Answer(body=b"A" * (1 << 20), times=100), 5, "a longer one"),
    "later, for ever": (lambda *_: Answer(status=202, headers={"Retry-After": "99999999999"}), 4, "answers later"),
}


@pytest.mark.kube
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_server_moves_nothing(pki: KubeadmPki, tls: est.Tls, tmp_path: Path, case: str) -> None:
    """The error names the answer and has its exit code, and no file is touched; the right answer then is installed."""
    answer, code, says = HOSTILE[case]
    ca, before = Signer.load(*pki.ca_pem("ca")), live_certificates(pki)
    with est_double(pki, tls) as played:
        bridge = bridge_with(pki, tmp_path / "double", tls, {"ca": played.url}, **with_user(tmp_path / "double"))
        played.always = functools.partial(answer, ca)
        run = bridge.run("renew", "apiserver")
        assert run.returncode == code, run.stderr
        assert says in run.stdout + run.stderr
        assert "Traceback" not in run.stderr
        assert live_certificates(pki) == before
        if code == 4:
            assert bridge.run("pending", "cancel", "apiserver").returncode == 0
        played.always = None
        assert bridge.run("renew", "apiserver").returncode == 0
    assert live_certificates(pki)["apiserver"] != before["apiserver"]


@pytest.mark.kube
def test_no_secret_is_seen(pki: KubeadmPki, tls: est.Tls, tmp_path: Path) -> None:
    """A server that repeats the password, at the highest verbosity: it is in no output and in no file of the state."""
    with est_double(pki, tls) as played:
        bridge = bridge_with(pki, tmp_path / "double", tls, {"ca": played.url}, **with_user(tmp_path / "double"))
        played.answers.append(Answer.text(403, f"{PASSWORD} may not"))
        run = bridge.run("renew", "apiserver", "-v")
    assert run.returncode == 5
    assert "HTTP 403, … may not" in run.stderr
    assert PASSWORD not in run.stdout + run.stderr
    state = [path.read_bytes() for path in (tmp_path / "double" / "state").rglob("*") if path.is_file()]
    assert state
    assert not any(PASSWORD.encode() in content for content in state)


@pytest.mark.kube
def test_setup_prints_what_the_server_needs(pki: KubeadmPki, tls: est.Tls, tmp_path: Path) -> None:
    """The command prints the labels of the settings for all three authorities."""
    urls = dict.fromkeys(AUTHORITIES, "https://est.corp.example:8443")
    run = bridge_with(pki, tmp_path / "double", tls, urls).run("setup", "est")
    assert run.returncode == 0, run.stderr
    for label in ("ca/server", "ca/client", "etcd-ca/peer", "etcd-ca/client", "front-proxy-ca/client"):
        assert f"Label {label}\n" in run.stdout
    for name in live_certificates(pki):
        assert f"\n  {name}\n" in run.stdout


@pytest.mark.kube
def test_the_suite_passes_as_it_is_configured(pki: KubeadmPki, tls: est.Tls, tmp_path: Path) -> None:
    """`backend test` finds nothing wrong with an authority of the double."""
    with est_double(pki, tls) as played:
        bridge = bridge_with(pki, tmp_path / "double", tls, {"ca": played.url}, **with_user(tmp_path / "double"))
        run = bridge.run("backend", "test", "ca")
    assert run.returncode == 0, run.stdout + run.stderr
    assert played.csrs
