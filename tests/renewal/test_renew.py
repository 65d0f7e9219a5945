"""Renewal of nodes that are not as kubeadm left them."""

from __future__ import annotations

import base64
import re
import subprocess
from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from bridge import diagnosis
from bridge.cli import renew as cli_renew
from bridge.cli.options import Output
from bridge.diagnosis.examination import examine
from bridge.node import inventory, kubeconfig
from bridge.node.sample_pki import ca_certificate
from bridge.pki.certificates import load_pem_certificates, pem, san_counts
from bridge.pki.csr import CannotCarryError, generate_key, key_pem
from bridge.pki.expiry import Before
from bridge.renewal import issuance, nothing_due, renew, verify_and_install
from bridge.renewal.selection import ForeignIdentityError, RunOptions, select
from bridge.settings.load import parse
from bridge.settings.tables import Settings
from bridge.state import Store, audit
from bridge.state.install import InstallError
from tests.kit.cas import Bridge, add_openssl
from tests.kit.issuing import Signer
from tests.kit.pki import Pki, handmade_pki
from tests.kit.renewing import Quiet, settings_for


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def node(tmp_path: Path) -> Pki:
    """All its certificates are due."""
    return handmade_pki(tmp_path / "node", not_after=now() + timedelta(days=20))


def renewed(settings: Settings, *names: str, any_identity: Collection[str] = ()) -> verify_and_install.Result:
    return renew.run(settings, RunOptions(names=names, any_identity=tuple(any_identity)), now, Quiet())[0]


def leaf(path: Path) -> x509.Certificate:
    return load_pem_certificates(path.read_bytes())[0]


def assert_pair(certificate: Path, key: Path) -> None:
    assert load_pem_private_key(key.read_bytes(), None).public_key() == leaf(certificate).public_key()


APISERVER = """\
apiVersion: v1
kind: Pod
spec:
  containers:
  - command:
    - kube-apiserver
    - --etcd-servers=https://192.0.2.20:2379
    - --etcd-cafile={etcd}/ca.crt
    - --etcd-certfile={etcd}/client.crt
    - --etcd-keyfile={etcd}/client.key
    image: registry.k8s.io/kube-apiserver:v1.37.2
"""


@pytest.fixture
def external_etcd(node: Pki, tmp_path: Path) -> Path:
    """The node's etcd is elsewhere, and the API server's client certificate for it in a place of its own."""
    etcd = tmp_path / "etcd-client"
    etcd.mkdir()
    for suffix in ("crt", "key"):
        (node.pki_dir / f"apiserver-etcd-client.{suffix}").rename(etcd / f"client.{suffix}")
        for name in ("server", "peer", "healthcheck-client"):
            (node.pki_dir / f"etcd/{name}.{suffix}").unlink()
    (node.pki_dir / "etcd/ca.crt").rename(etcd / "ca.crt")
    manifests = node.kubeconfig_dir / "manifests"
    manifests.mkdir()
    (manifests / "kube-apiserver.yaml").write_text(APISERVER.format(etcd=etcd))
    return etcd


def test_the_client_certificate_of_an_external_etcd_is_renewed_where_it_lies(
    node: Pki, external_etcd: Path, tmp_path: Path
) -> None:
    """The manifest says where; no other etcd certificate is missed."""
    before = leaf(external_etcd / "client.crt")
    result = renewed(settings_for(node, tmp_path))
    assert (result.exit_code, len(result.renewed)) == (0, 9)
    after = leaf(external_etcd / "client.crt")
    assert after.not_valid_after_utc > before.not_valid_after_utc
    assert after.subject == before.subject
    assert_pair(external_etcd / "client.crt", external_etcd / "client.key")


def test_an_external_etcds_client_without_its_ca_file_is_an_error(
    node: Pki, external_etcd: Path, tmp_path: Path
) -> None:
    """Due, and nothing to prove an answer against: exit 1, the others are renewed."""
    (external_etcd / "ca.crt").unlink()
    result = renewed(settings_for(node, tmp_path))
    assert result.exit_code == 1
    assert [outcome.name for outcome in result.failed] == ["apiserver-etcd-client"]
    assert len(result.renewed) == 8


def _into_files(node: Pki, name: str) -> tuple[Path, Path]:
    """Replace a kubeconfig's embedded pair by references to files."""
    path = node.kubeconfig_dir / name
    text = path.read_text()
    files = []
    for key, file in (("client-certificate", f"{name}.crt"), ("client-key", f"{name}.key")):
        data = re.search(rf"{key}-data: (\S+)", text)
        assert data is not None
        files.append(node.kubeconfig_dir / file)
        files[-1].write_bytes(base64.b64decode(data[1]))
        text = text.replace(data[0], f"{key}: {file}")
    path.write_text(text)
    return files[0], files[1]


def test_a_kubeconfig_with_file_references_is_renewed_in_those_files(node: Pki, tmp_path: Path) -> None:
    """The kubeconfig itself stays as it is."""
    certificate, key = _into_files(node, "scheduler.conf")
    text, before = (node.kubeconfig_dir / "scheduler.conf").read_bytes(), leaf(certificate)
    result = renewed(settings_for(node, tmp_path), "scheduler.conf")
    assert result.exit_code == 0
    assert leaf(certificate).not_valid_after_utc > before.not_valid_after_utc
    assert_pair(certificate, key)
    assert (node.kubeconfig_dir / "scheduler.conf").read_bytes() == text


def test_a_kubelet_that_rotates_its_own_certificate_is_left_alone(node: Pki, tmp_path: Path) -> None:
    """With file references in kubelet.conf, and a CA in the cluster; with embedded data it is renewed."""
    settings = settings_for(node, tmp_path)
    assert [o.name for o in renewed(settings, "kubelet.conf").renewed] == ["kubelet.conf"]
    certificate, _ = _into_files(node, "kubelet.conf")
    (node.pki_dir / "ca.key").write_bytes(node.ca_pem("ca")[1])
    before = certificate.read_bytes()
    result, _, selection = renew.run(settings, RunOptions(names=("kubelet.conf",)), now, Quiet())
    assert (result.exit_code, result.outcomes) == (0, ())
    assert str(certificate) in selection.skipped[0]
    assert certificate.read_bytes() == before


def _behind_an_intermediate(node: Pki, left: timedelta = timedelta(days=800)) -> tuple[bytes, bytes, Signer]:
    """The node's `ca` becomes a root, and what signs an intermediate of it."""
    root = Signer.make("corporate root", begin=now() - timedelta(days=1), end=now() + timedelta(days=900))
    node.trust("ca", pem(root.certificate))
    middle = Signer.make("k8s", parent=root, begin=now() - timedelta(days=9), end=now() + left)
    chain = middle.certificate.public_bytes(Encoding.PEM) + root.certificate.public_bytes(Encoding.PEM)
    return chain, key_pem(middle.key), middle


def test_an_intermediate_is_kept_after_the_leaf(node: Pki, tmp_path: Path) -> None:
    """Certificate files and kubeconfigs have the intermediate after the leaf, without the root."""
    chain, key, middle = _behind_an_intermediate(node)
    result = renewed(settings_for(node, tmp_path, ca=(chain, key)))
    assert result.exit_code == 0
    in_file = load_pem_certificates((node.pki_dir / "apiserver.crt").read_bytes())
    assert in_file[1:] == [middle.certificate]
    data = kubeconfig.parse((node.kubeconfig_dir / "admin.conf").read_bytes()).certificate_data
    assert data is not None
    assert load_pem_certificates(data)[1:] == [middle.certificate]


def test_an_expired_intermediate_is_not_reported_as_another_ca(node: Pki, tmp_path: Path) -> None:
    """Its dates are, and what clock they were compared with; nothing is asked of it."""
    chain, key, _ = _behind_an_intermediate(node, timedelta(days=-1))
    [failed] = renewed(settings_for(node, tmp_path, ca=(chain, key)), "apiserver").failed
    assert failed.error is not None
    assert re.search(r"got CN=.*, valid only from \d{4}-.* to \d{4}-.*clock", failed.error.reason)
    assert "another one's" not in failed.error.hint


def test_an_intermediate_is_refused_where_kubeadm_reads_one_certificate_a_file(node: Pki, tmp_path: Path) -> None:
    """kubeadm below 1.21, set or read from the image tags: exit 5, nothing of this CA is replaced."""
    chain, key, _ = _behind_an_intermediate(node)
    before = (node.pki_dir / "apiserver.crt").read_bytes()
    settings = settings_for(node, tmp_path, 'kubernetes_version = "1.20"', ca=(chain, key))
    result = renewed(settings, "apiserver", "etcd-peer")
    assert result.exit_code == 5
    assert [outcome.name for outcome in result.failed] == ["apiserver"]
    assert [outcome.name for outcome in result.renewed] == ["etcd-peer"]
    assert (node.pki_dir / "apiserver.crt").read_bytes() == before


def test_a_missing_key_and_an_expired_certificate_are_no_obstacle(tmp_path: Path) -> None:
    """The live certificate is all that is needed, however old."""
    node = handmade_pki(tmp_path / "node", now=now() - timedelta(days=400), not_after=now() - timedelta(days=30))
    (node.pki_dir / "apiserver.key").unlink()
    before = leaf(node.pki_dir / "apiserver.crt")
    result = renewed(settings_for(node, tmp_path))
    assert (result.exit_code, len(result.renewed)) == (0, 12)
    assert san_counts(leaf(node.pki_dir / "apiserver.crt")) == san_counts(before)
    assert_pair(node.pki_dir / "apiserver.crt", node.pki_dir / "apiserver.key")


def test_a_missing_ca_file_fails_its_own_certificates_alone(node: Pki, tmp_path: Path) -> None:
    """The exit code is 1, the file is named, and the other authorities' certificates are renewed."""
    settings = settings_for(node, tmp_path)
    (node.pki_dir / "front-proxy-ca.crt").unlink()
    result = renewed(settings)
    assert result.exit_code == 1
    assert [outcome.name for outcome in result.failed] == ["front-proxy-client"]
    assert len(result.renewed) == 11


def test_another_kind_of_key_as_set(node: Pki, tmp_path: Path) -> None:
    """`renewal.key` overrules the old key's kind."""
    settings = settings_for(node, tmp_path, '[renewal]\nkey = "rsa-2048"')
    assert renewed(settings, "apiserver").exit_code == 0
    assert (node.pki_dir / "apiserver.key").read_bytes().startswith(b"-----BEGIN RSA PRIVATE KEY-----")


def test_a_file_that_changes_while_the_ca_signs_is_not_overwritten(
    node: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator renewed it by hand meanwhile: nothing is replaced, and the message says so."""
    path = node.pki_dir / "apiserver.crt"
    theirs = path.read_bytes() + b"\n"
    real = issuance.issue_all

    def meanwhile(*args: object) -> object:
        answers = real(*args)  # type: ignore[arg-type]
        path.write_bytes(theirs)
        return answers

    monkeypatch.setattr("bridge.renewal.renew.issue_all", meanwhile)
    with pytest.raises(InstallError):
        renewed(settings_for(node, tmp_path), "apiserver", "scheduler.conf")
    assert path.read_bytes() == theirs


def _with_anchor(path: Path) -> None:
    path.write_text(path.read_text().replace("user:\n    client", "user: &u\n    client"))


def doctors_code(settings: Settings) -> int:
    return diagnosis.exit_code(diagnosis.causes(examine(settings, now())))


def events(directory: Path, name: str) -> list[str]:
    return [str(event["event"]) for event in audit.events(Store(directory / "state"), None, name)]


def test_a_kubeconfig_that_cannot_be_edited_fails_alone(node: Pki, tmp_path: Path) -> None:
    """The kubeconfig is named before its CA is asked, and its CSR can still be made."""
    path = node.kubeconfig_dir / "admin.conf"
    _with_anchor(path)
    settings = settings_for(node, tmp_path)
    assert cli_renew.plan(settings, RunOptions(), now(), Output.TEXT) == 1
    assert doctors_code(settings) == 1
    result = renewed(settings)
    assert result.exit_code == 1
    [failed] = result.failed
    assert (failed.name, len(result.renewed)) == ("admin.conf", 11)
    assert str(failed.error).startswith(f"{path}: line ")
    assert events(tmp_path, "admin.conf") == ["failed"]
    assert (
        cli_renew.write_csrs(settings, tmp_path / "csrs", RunOptions(names=("admin.conf",), csrs_only=True), now()) == 0
    )


def test_a_kubeconfig_that_changes_while_the_ca_signs_fails_alone(
    node: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kubeconfig that was removed, or can't be edited any more, fails, and the other certificates are renewed."""
    real = issuance.issue_all

    def meanwhile(*args: object) -> object:
        answers = real(*args)  # type: ignore[arg-type]
        _with_anchor(node.kubeconfig_dir / "admin.conf")
        (node.kubeconfig_dir / "scheduler.conf").unlink()
        return answers

    monkeypatch.setattr("bridge.renewal.renew.issue_all", meanwhile)
    result = renewed(settings_for(node, tmp_path))
    assert [outcome.name for outcome in result.failed] == ["admin.conf", "scheduler.conf"]
    assert (result.exit_code, len(result.renewed)) == (1, 10)
    assert all(str(node.kubeconfig_dir) in str(outcome.error) for outcome in result.failed)
    assert events(tmp_path, "admin.conf")[-1] == "failed"


def test_certificates_that_share_a_file_fail_alone(node: Pki, tmp_path: Path) -> None:
    """A symlink from one kubeconfig to another; all else is renewed, and with a copy both."""
    path = node.kubeconfig_dir / "super-admin.conf"
    path.unlink()
    path.symlink_to("admin.conf")
    settings = settings_for(node, tmp_path)
    assert doctors_code(settings) == 1
    result = renewed(settings)
    assert [outcome.name for outcome in result.failed] == ["admin.conf", "super-admin.conf"]
    assert (result.exit_code, len(result.renewed)) == (1, 10)
    path.unlink()
    path.write_bytes((node.kubeconfig_dir / "admin.conf").read_bytes())
    again = renewed(settings, any_identity=("super-admin.conf",))
    assert [outcome.name for outcome in again.renewed] == ["admin.conf", "super-admin.conf"]


def test_an_external_etcds_client_in_one_file_with_its_key_fails_alone(
    node: Pki, external_etcd: Path, tmp_path: Path
) -> None:
    """It is shown when it ends; the others are renewed."""
    (external_etcd / "client.key").unlink()
    manifest = node.kubeconfig_dir / "manifests/kube-apiserver.yaml"
    manifest.write_text(manifest.read_text().replace("client.key", "client.crt"))
    result = renewed(settings_for(node, tmp_path))
    assert [outcome.name for outcome in result.failed] == ["apiserver-etcd-client"]
    assert (result.exit_code, len(result.renewed)) == (1, 8)


def test_what_is_due_is_what_ends_soon(node: Pki) -> None:
    """The setting `renewal.before` decides what is due; named certificates are renewed due or not."""
    from bridge.node import inventory

    found = inventory.read(node.pki_dir, node.kubeconfig_dir)
    for before, due in (("30d", 12), ("19d", 0)):
        settings = parse(f'[renewal]\nbefore = "{before}"')
        assert len(select(found, settings, RunOptions(), now()).items) == due
    assert [item.spec.name for item in select(found, settings, RunOptions(names=("apiserver",)), now()).items] == [
        "apiserver"
    ]
    assert len(select(found, settings, RunOptions(names=("all",)), now()).items) == 12


def test_a_live_certificate_whose_key_cannot_be_read_fails_alone(node: Pki, tmp_path: Path) -> None:
    """The others are renewed."""
    path = node.pki_dir / "apiserver.crt"
    der = leaf(path).public_bytes(Encoding.DER)
    oid = bytes.fromhex("06082a8648ce3d030107")  # P-256, in the key
    path.write_bytes(pem(x509.load_der_x509_certificate(der.replace(oid, oid[:-1] + b"\x7f"))))
    settings = settings_for(node, tmp_path)
    result = renewed(settings, "apiserver", "scheduler.conf", any_identity=("apiserver",))
    assert [outcome.name for outcome in result.renewed] == ["scheduler.conf"]
    [failed] = result.failed
    assert (failed.name, type(failed.error)) == ("apiserver", CannotCarryError)
    [failed] = renewed(settings, "apiserver").failed
    assert (failed.name, type(failed.error)) == ("apiserver", ForeignIdentityError)


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (Before(remaining=timedelta(days=400)), ["renewal.before (400d), got 364d: every run renews again"]),
        (Before(share=0.33), []),
    ],
    ids=["longer than the lifetime", "a share of it"],
)
def test_a_lifetime_that_is_due_at_once_is_warned_of(
    node: Pki, tmp_path: Path, before: Before, said: list[str]
) -> None:
    """The renewal succeeds, and a warning says that the next run will do it all again."""
    settings = settings_for(node, tmp_path)
    settings = replace(settings, renewal=replace(settings.renewal, before=before))
    looking = Quiet()
    result, _, _ = renew.run(settings, RunOptions(names=("apiserver", "admin.conf")), now, looking)
    assert (result.exit_code, len(result.renewed)) == (0, 2)
    assert len(looking.notes) == len(said)
    assert all(text in note for text, note in zip(said, looking.notes, strict=True))
    assert all(name in note for note in looking.notes for name in ("apiserver", "admin.conf"))


def test_a_certificate_whose_intermediate_ends_soon_is_due(node: Pki) -> None:
    """The certificate is of no use without it, and a run with nothing to do counts the days from there."""
    from bridge.node import inventory

    path = node.pki_dir / "apiserver.crt"
    path.write_bytes(path.read_bytes() + pem(Signer.make("mid", end=now() + timedelta(days=9)).certificate))
    found = inventory.read(node.pki_dir, node.kubeconfig_dir)
    before = {days: parse(f'[renewal]\nbefore = "{days}d"') for days in (8, 10)}
    assert [item.spec.name for item in select(found, before[10], RunOptions(), now()).items] == ["apiserver"]
    assert select(found, before[8], RunOptions(), now()).items == ()
    assert nothing_due(found, before[8], now()).startswith("nothing is due: apiserver is the first to expire, in 8d")


@pytest.mark.attack("N28")
def test_a_ca_that_is_not_valid_yet_is_reported(node: Pki, tmp_path: Path) -> None:
    """Nothing is due, and nothing works: `plan` and `renew` name what leads to a CA that begins tomorrow, and nothing else."""
    settings = settings_for(node, tmp_path, '[renewal]\nbefore = "1d"')

    def said() -> str:
        return nothing_due(inventory.read(node.pki_dir, node.kubeconfig_dir), settings, now())

    assert "not valid yet" not in said()
    key = load_pem_private_key(node.ca_pem("front-proxy-ca")[1], None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    late = ca_certificate("front-proxy-ca", key, now() + timedelta(days=1), now() + timedelta(days=3000))
    (node.pki_dir / "front-proxy-ca.crt").write_bytes(pem(late))
    assert said().endswith("see `ca-bridge doctor`: front-proxy-client")


def test_a_ca_whose_clock_is_ahead_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is installed before it is valid, and no wait is longer than the tolerated skew."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    key = generate_key("ecdsa-p256")
    for ahead in (-300, 20, 4000):
        begin = now() + timedelta(seconds=ahead)
        verify_and_install.await_validity([Signer.make(key=key, begin=begin).certificate])
    assert waits[0] == 0
    assert 15 < waits[1] <= 20
    assert waits[2] == 60


def test_renew_says_which_streams_end_once(node: Pki, tmp_path: Path) -> None:
    """Those through kubelets, where an API server is here and its client certificate is installed; other certificates end none."""
    bridge = Bridge(pki=node, directory=tmp_path / "bridge")
    add_openssl(bridge, "ca")
    manifest = node.kubeconfig_dir / "manifests/kube-apiserver.yaml"

    def says(name: str) -> int:
        run: subprocess.CompletedProcess[str] = bridge.run("renew", name, "--no-restart")
        assert run.returncode == 0, run
        return run.stderr.count("open streams through kubelets (kubectl logs -f, exec, port-forward) end once")

    assert says("apiserver-kubelet-client") == 0
    manifest.parent.mkdir(exist_ok=True)
    manifest.write_text(APISERVER.replace("{etcd}", str(node.pki_dir)))
    assert (says("apiserver-kubelet-client"), says("apiserver")) == (1, 0)
