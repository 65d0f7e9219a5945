"""`install DIR`: keys from `renew --csr-only` or kubeadm, certificates by any means, proven and installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key, pkcs7

from bridge.cli import renew as cli_renew
from bridge.contract import SignRequest
from bridge.desk.csr_directory import find, spec_of
from bridge.errors import Exit
from bridge.node import inventory, kubeconfig
from bridge.pki.certificates import load_pem_certificates
from bridge.renewal import airgap, install_directory, verify_and_install
from bridge.renewal.install_directory import DirectoryError
from bridge.renewal.selection import RunOptions
from bridge.renewal.verify_and_install import Result
from bridge.settings.tables import Settings
from bridge.specs import SPECS
from bridge.state import Store, audit
from bridge.state.open_requests import OpenRequests
from tests.kit.forged import validity, with_field
from tests.kit.issuing import Signer
from tests.kit.pki import PKI_SPECS, Pki, handmade_pki, kubeadm_pki
from tests.kit.renewed import Snapshot, assert_renewed
from tests.kit.renewing import Quiet, settings_for


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def node(tmp_path: Path) -> Pki:
    """Nothing of it is due."""
    return handmade_pki(tmp_path / "node")


@pytest.fixture
def settings(node: Pki, tmp_path: Path) -> Settings:
    return settings_for(node, tmp_path)


@pytest.fixture
def directory(settings: Settings, tmp_path: Path) -> Path:
    """Keys and CSRs of all, flat."""
    assert cli_renew.write_csrs(settings, tmp_path / "csrs", RunOptions(names=("all",), csrs_only=True), now()) == 0
    return tmp_path / "csrs"


def signer(node: Pki, authority: str) -> Signer:
    certificate, key = node.ca_pem(authority)
    loaded = load_pem_private_key(key, None)
    return Signer(certificate=x509.load_pem_x509_certificate(certificate), key=loaded)  # type: ignore[arg-type]


def signed(node: Pki, csr: Path, directory: Path, **wrong: object) -> x509.Certificate:
    """By the authority's own key, somewhere else."""
    spec = spec_of(csr.relative_to(directory))
    assert spec is not None
    request = SignRequest(spec=spec, csr_pem=csr.read_bytes(), validity=timedelta(days=365))
    given = {"begin": now() - timedelta(minutes=5), "end": now() + timedelta(days=365), **wrong}
    return signer(node, spec.authority.name).issue(request, **given).leaf  # type: ignore[arg-type]


def sign_all(node: Pki, directory: Path, names: Collection[str] = tuple(PKI_SPECS)) -> None:
    """`….crt` beside each CSR."""
    for csr in find(directory):
        spec = spec_of(csr.relative_to(directory))
        if spec is not None and spec.name in names:
            csr.with_suffix(".crt").write_bytes(signed(node, csr, directory).public_bytes(Encoding.PEM))


def install(settings: Settings, directory: Path, *, all_or_nothing: bool = False) -> Result:
    return install_directory.install(settings, directory, RunOptions(all_or_nothing=all_or_nothing), now, Quiet())[0]


def contents(node: Pki) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in node.kubeconfig_dir.rglob("*") if path.is_file()}


def assert_pair_is_from(node: Pki, directory: Path, name: str) -> None:
    """The key on the node is the directory's, and its certificate certifies it."""
    [item] = [i for i in inventory.read(node.pki_dir, node.kubeconfig_dir).items if i.spec.name == name]
    config = item.certificate_path.read_bytes()
    pem = item.key_path.read_bytes() if item.key_path is not None else kubeconfig.key_data(config) or b""
    key = load_pem_private_key(pem, None).public_key()
    assert key == load_pem_private_key((directory / f"{name}.key").read_bytes(), None).public_key()
    assert item.certificates[0].public_key() == key


def test_what_renew_wrote_and_another_ca_program_signed_is_installed(
    node: Pki, settings: Settings, directory: Path
) -> None:
    """All twelve; the directory stays as it is, and the record has each step."""
    sign_all(node, directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    result = install(settings, directory)
    assert (result.exit_code, len(result.renewed)) == (0, 12)
    for name in ("apiserver", "admin.conf", "etcd-peer", "front-proxy-client"):
        assert_pair_is_from(node, directory, name)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    store = Store(settings.node.state_dir)
    events = [event["event"] for event in audit.events(store, None, "apiserver")]
    assert events == [audit.ISSUED, audit.VERIFIED, audit.INSTALLED]
    assert not store.requests.exists()


def test_what_is_in_place_is_not_installed_again(node: Pki, settings: Settings, directory: Path) -> None:
    """A second run makes no backup and says why; a lost key, or a new certificate for the same key, is installed."""
    sign_all(node, directory)
    assert len(install(settings, directory).renewed) == 12
    before, backups = contents(node), list(Store(settings.node.state_dir).backups.iterdir())
    quiet = Quiet()
    result = install_directory.install(settings, directory, RunOptions(), now, quiet)[0]
    assert (result.exit_code, result.outcomes, contents(node)) == (0, (), before)
    assert [note.partition(": ")[2] for note in quiet.notes] == [
        "left out, since this key and certificate are in place already"
    ]
    assert list(Store(settings.node.state_dir).backups.iterdir()) == backups
    (node.pki_dir / "apiserver.key").write_bytes((node.pki_dir / "front-proxy-client.key").read_bytes())
    csr = directory / "etcd-peer.csr"
    younger = signed(node, csr, directory, begin=now() - timedelta(minutes=4))
    csr.with_suffix(".crt").write_bytes(younger.public_bytes(Encoding.PEM))
    result = install(settings, directory)
    assert sorted(outcome.name for outcome in result.renewed) == ["apiserver", "etcd-peer"]
    assert_pair_is_from(node, directory, "apiserver")


def test_the_nodes_own_directory_is_refused(node: Pki, settings: Settings, tmp_path: Path) -> None:
    """Its keys are in use, and an installed directory's are to be removed; a copy of it is as good as any other."""
    before = contents(node)
    result = install(settings, node.pki_dir)
    assert (result.exit_code, result.renewed, contents(node)) == (Exit.USAGE, [], before)
    assert all(isinstance(outcome.error, DirectoryError) for outcome in result.failed)
    shutil.copytree(node.pki_dir, tmp_path / "copy")
    assert install(settings, tmp_path / "copy").exit_code == 0


def test_a_date_in_year_0_is_passed_over_by_name(
    node: Pki, settings: Settings, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A certificate for one of the keys, which no program could sort by its dates; the good one is installed."""
    sign_all(node, directory, ["apiserver"])
    good = load_pem_certificates((directory / "apiserver.crt").read_bytes())[0]
    (directory / "odd.crt").write_text(with_field(good, 4, validity(b"00000101000000Z", b"20991231235959Z")))
    result = install(settings, directory)
    assert [outcome.name for outcome in result.renewed] == ["apiserver"]
    assert_pair_is_from(node, directory, "apiserver")
    assert "odd.crt: wanted a certificate with dates" in caplog.text


def _der(one: x509.Certificate) -> bytes:
    return one.public_bytes(Encoding.DER)


def _pkcs7(one: x509.Certificate) -> bytes:
    return pkcs7.serialize_certificates([one], Encoding.DER)


def _pkcs7_pem(one: x509.Certificate) -> bytes:
    return pkcs7.serialize_certificates([one], Encoding.PEM)


@pytest.mark.parametrize("form", [_der, _pkcs7, _pkcs7_pem])
def test_certificates_are_found_by_key_whatever_they_are_called(
    node: Pki, settings: Settings, directory: Path, form: Callable[[x509.Certificate], bytes]
) -> None:
    """Certificates in any form, also in a directory of their own, are found by their keys."""
    (directory / "from the CA").mkdir()
    (directory / "from the CA/0001.bin").write_bytes(form(signed(node, directory / "apiserver.csr", directory)))
    result = install(settings, directory)
    assert [outcome.name for outcome in result.renewed] == ["apiserver"]
    assert (result.exit_code, len(result.waiting)) == (Exit.WAITING, 11)  # the other keys have none yet
    assert_pair_is_from(node, directory, "apiserver")


def test_a_decoy_beside_the_right_one_changes_nothing(node: Pki, settings: Settings, directory: Path) -> None:
    """A younger certificate for the same key, by another CA; alone it is refused."""
    csr = directory / "apiserver.csr"
    foreign = Signer.make(begin=now() - timedelta(days=1), end=now() + timedelta(days=900))
    request = SignRequest(spec=SPECS["apiserver"], csr_pem=csr.read_bytes(), validity=timedelta(days=1))
    decoy = foreign.issue(request, begin=now(), end=now() + timedelta(days=365)).leaf
    (directory / "apiserver.crt").write_bytes(decoy.public_bytes(Encoding.PEM))
    old = contents(node)
    refused = install(settings, directory)
    assert (refused.exit_code, contents(node)) == (Exit.REFUSED, old)
    (directory / "z.crt").write_bytes(signed(node, csr, directory).public_bytes(Encoding.PEM))
    assert [outcome.name for outcome in install(settings, directory).renewed] == ["apiserver"]


def test_what_the_live_one_is_counts_and_not_a_csr(node: Pki, settings: Settings, directory: Path) -> None:
    """A certificate with one more SAN is refused, whatever the CSR beside it says; one and all fail together if asked."""
    sign_all(node, directory, ["scheduler.conf"])
    more = [x509.DNSName("attacker.example")]
    wrong = signed(node, directory / "apiserver.csr", directory, sans=more)
    (directory / "apiserver.crt").write_bytes(wrong.public_bytes(Encoding.PEM))
    old = contents(node)
    held = install(settings, directory, all_or_nothing=True)
    assert (held.exit_code, held.renewed, contents(node)) == (Exit.REFUSED, [], old)
    assert not Store(settings.node.state_dir).requests.exists()
    result = install(settings, directory)
    assert ([o.name for o in result.renewed], result.exit_code) == (["scheduler.conf"], Exit.REFUSED)


def test_keys_that_others_can_read_are_refused(node: Pki, settings: Settings, directory: Path) -> None:
    """Keys that others can read, two keys for one certificate, and a directory without any are refused."""
    sign_all(node, directory)
    old, key = contents(node), directory / "apiserver.key"
    key.chmod(0o640)
    with pytest.raises(DirectoryError, match="this user alone, found mode 0640"):
        install(settings, directory)
    key.chmod(0o600)
    (directory / "pki").mkdir()
    shutil.copy(key, directory / "pki/apiserver.key")
    with pytest.raises(DirectoryError, match="one key for apiserver"):
        install(settings, directory)
    with pytest.raises(DirectoryError, match="there is no such directory"):
        install(settings, node.root / "nowhere")
    (node.root / "empty").mkdir()
    with pytest.raises(DirectoryError, match="named as kubeadm names them"):
        install(settings, node.root / "empty")
    assert contents(node) == old
    (directory / "pki/apiserver.key").unlink()
    assert install(settings, directory).exit_code == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_a_key_of_another_user_is_refused(node: Pki, settings: Settings, directory: Path) -> None:
    """Its owner knows it, whatever its mode is; with a genuine certificate it would be installed."""
    sign_all(node, directory)
    old, key = contents(node), directory / "scheduler.conf.key"
    os.chown(key, 12345, 0)
    with pytest.raises(DirectoryError, match=r"conf\.key: wanted a private key .* found one of user 12345"):
        install(settings, directory)
    assert contents(node) == old


def test_a_link_in_the_directory_is_not_followed(
    node: Pki, settings: Settings, directory: Path, tmp_path: Path
) -> None:
    """A user who may write there can't make the program read another file as a key."""
    sign_all(node, directory, ["apiserver"])
    key = directory / "apiserver.key"
    key.rename(tmp_path / "elsewhere.key")
    key.symlink_to(tmp_path / "elsewhere.key")
    result = install(settings, directory)
    assert "apiserver" not in {outcome.name for outcome in (*result.renewed, *result.waiting)}


def test_a_request_that_waits_for_the_same_certificate_is_over(
    node: Pki, settings: Settings, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key and the directory's never meet, killed right before the installation or not."""
    options = RunOptions(names=("apiserver", "scheduler.conf"))
    airgap.export(settings, tmp_path / "bundle.json", options, now, Quiet())
    sign_all(node, directory, ["apiserver"])

    class KilledError(BaseException):
        pass

    def killed(*_: object) -> str:
        raise KilledError

    store = Store(settings.node.state_dir)
    with monkeypatch.context() as patch:
        patch.setattr(verify_and_install, "install", killed)
        with pytest.raises(KilledError):
            install(settings, directory)
    kept = OpenRequests(store).get("apiserver")
    assert kept is not None
    assert kept.answer is not None
    assert load_pem_private_key(kept.key_pem, None).public_key() == kept.answer.leaf.public_key()
    install(settings, directory)
    assert_pair_is_from(node, directory, "apiserver")
    assert [one.name for one in OpenRequests(store)] == ["scheduler.conf"]


@pytest.mark.kube("kubeadm")
def test_what_kubeadm_generated_is_installed(tmp_path: Path) -> None:
    """The last step of kubeadm's own walk with an external CA: nested keys, kubeconfigs with a key inside."""
    pki = kubeadm_pki(tmp_path / "pki")
    new = pki.root / "new"
    pki.run_kubeadm("certs", "generate-csr", "--kubeconfig-dir", "/new", "--cert-dir", "/new/pki")
    before = Snapshot.of(pki)
    sign_all(pki, new)
    assert (new / "pki/etcd/server.crt").is_file()
    assert load_pem_certificates((new / "admin.conf.crt").read_bytes())
    result = install(settings_for(pki, tmp_path), new)
    assert (result.exit_code, len(result.renewed)) == (0, 12), result
    assert_renewed(pki, before, tmp_path / "scratch")
