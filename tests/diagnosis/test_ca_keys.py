"""The CAs' keys on a node: what signs with them, compared with what the real kube-controller-manager and kubeadm do."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bridge.diagnosis import ca_keys
from bridge.diagnosis.examination import examine
from bridge.diagnosis.findings import Finding
from bridge.settings.load import load
from bridge.testing import TestCA
from tests.kit import kube_api, programs
from tests.kit.cas import Bridge
from tests.kit.kube_api import ApiServer
from tests.kit.loopback import free_port
from tests.kit.pki import KubeadmPki, kubeadm_pki

pytestmark = pytest.mark.kube

MANIFEST = "manifests/kube-controller-manager.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> KubeadmPki:
    """A control plane as kubeadm leaves it, with its CA keys and the manifest of kube-controller-manager."""
    pki = kubeadm_pki(tmp_path_factory.mktemp("made"), algorithm="ECDSA-P256", external=False)
    pki.run_kubeadm("init", "phase", "control-plane", "controller-manager")
    return pki


@pytest.fixture
def pki(made: KubeadmPki, tmp_path: Path) -> KubeadmPki:
    """A copy of it."""
    shutil.copytree(made.root, tmp_path / "node", symlinks=True)
    return KubeadmPki(root=tmp_path / "node", external=False, version=made.version)


def found(pki: KubeadmPki, directory: Path) -> list[Finding]:
    """What the examination finds about CA keys; manifests name files from `/`, and are looked at as if `root` were that."""
    manifest = pki.kubeconfig_dir / MANIFEST
    text = manifest.read_text()
    manifest.write_text(text.replace("=/etc/kubernetes", f"={pki.kubeconfig_dir}"))
    try:
        looked = [*examine(load(Bridge(pki=pki, directory=directory).config), datetime.now(UTC))]
    finally:
        manifest.write_text(text)
    return [one for one in looked if one.check.startswith(("ca-key", "controller-manager"))]


def test_the_keys_leave_a_node(pki: KubeadmPki, tmp_path: Path) -> None:
    """kubeadm's own node signs; with its key gone it would end; when kubeadm has written the manifest anew, all is well."""
    before = {(one.level, one.check, one.about) for one in found(pki, tmp_path / "b")}
    assert before == {
        ("warning", "controller-manager-signs", "kube-controller-manager"),
        *(("warning", "ca-key-on-disk", f"CA {name}") for name in ("ca", "etcd-ca", "front-proxy-ca")),
    }
    for name in ("ca.key", "etcd/ca.key", "front-proxy-ca.key"):
        (pki.pki_dir / name).unlink()
    [wrong] = found(pki, tmp_path / "b")
    assert (wrong.level, wrong.check) == ("error", "controller-manager-key")
    assert f"{pki.pki_dir}/ca.key" in wrong.text
    pki.run_kubeadm("init", "phase", "control-plane", "controller-manager")
    assert found(pki, tmp_path / "b") == []
    told = pki.run_kubeadm("certs", "check-expiration").stdout
    assert "no " not in told.partition("EXTERNALLY MANAGED")[2].replace("\n", " ")


def test_a_key_of_another_ca_is_a_note(pki: KubeadmPki, tmp_path: Path) -> None:
    """A signer of its own for kubelets takes nothing from the cluster's CA."""
    shutil.copy(pki.pki_dir / "front-proxy-client.key", pki.pki_dir / "ca.key")
    assert [one.level for one in found(pki, tmp_path / "b") if one.check == "controller-manager-signs"] == ["note"]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A real API server."""
    with kube_api.serving(tmp_path_factory.mktemp("api")) as server:
        yield server


PAIR = ("--cluster-signing-cert-file={crt}", "--cluster-signing-key-file={key}")
OFF, ENDS = "Skipping CSR signer controller", "Error building controllers"
NO_WORD = "Starting CSR cleaner controller"  #: Neither off nor on; others start.

#: Flags, whether the key is there, and a line of the log by which the program says what it makes of them.
FLAGS: dict[str, tuple[tuple[str, ...], bool, str]] = {
    "with a key": (PAIR, True, 'name="csrsigning-kubelet-serving"'),
    "no key": (PAIR, False, ENDS),
    "empty": (("--cluster-signing-cert-file=", "--cluster-signing-key-file="), False, OFF),
    "no flags": ((), False, OFF),
    "half": (PAIR[1:], False, OFF),
    "a controller less": ((*PAIR, "--controllers=*,-certificatesigningrequest-signing-controller"), False, NO_WORD),
    "by its older name": ((*PAIR, "--controllers=*,-csrsigning"), False, NO_WORD),
    "others alone": ((*PAIR, "--controllers=csrcleaner,csrapproving"), False, NO_WORD),
    "named": ((*PAIR, "--controllers=csrcleaner,csrsigning"), False, ENDS),
    "a single signer": (tuple(one.replace("signing-", "signing-kubelet-serving-") for one in PAIR), False, ENDS),
}


@pytest.mark.kube("kube-apiserver", "kube-controller-manager", "etcd")
@pytest.mark.parametrize("case", FLAGS)
def test_is_said_of_the_flags_what_the_program_makes_of_them(api: ApiServer, tmp_path: Path, case: str) -> None:
    """The signer is off, or on, or ends the program: by the real kube-controller-manager's own log."""
    flags, has_key, line = FLAGS[case]
    certificate, key, ca = tmp_path / "ca.crt", tmp_path / "ca.key", TestCA.make()
    certificate.write_bytes(ca.certificate_pem)
    if has_key:
        key.write_bytes(ca.key_pem)
    words = [flag.format(crt=certificate, key=key) for flag in flags]
    found = ca_keys.signing_files(dict(word.split("=", 1) for word in words))
    lacking = [path for path in found.values() if not path.exists()]
    config = api.kubeconfig("system:kube-controller-manager")
    command: list[str | Path] = [
        programs.require("kube-controller-manager"), f"--kubeconfig={config}", "--bind-address=127.0.0.1",
        "--leader-elect=false", f"--secure-port={free_port()}", *words,
    ]  # fmt: skip
    process = api.start("kube-controller-manager", command)
    end = time.monotonic() + 30
    try:
        while line not in (log := api.log("kube-controller-manager", 1000)):
            assert time.monotonic() < end, log
            time.sleep(0.1)
        if line == ENDS:
            assert process.wait(10) != 0
        assert (OFF in log) == (line == OFF)
        assert (bool(lacking), bool(found)) == (line == ENDS, line == ENDS or has_key)
    finally:
        api.stop("kube-controller-manager")
