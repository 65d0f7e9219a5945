"""The CAs' keys on a node: what signs with them, compared with what the real kube-controller-manager and kubeadm do."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from bridge.diagnosis import Finding, ca_keys, examination
from bridge.diagnosis.ca_keys import Held
from bridge.diagnosis.examination import examine
from bridge.node import endpoints
from bridge.node.reading import read_node
from bridge.pki.certificates import spki
from bridge.settings.load import load
from bridge.system import paths
from bridge.testing import TestCA
from tests.kit import apiserver, kube_api, programs
from tests.kit.cas import Bridge
from tests.kit.kube_api import ApiServer
from tests.kit.loopback import free_port
from tests.kit.members import Place
from tests.kit.pki import ADDRESS, NODE, KubeadmPki, kubeadm_pki

pytestmark = pytest.mark.kube

MANIFEST = "manifests/kube-controller-manager.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> KubeadmPki:
    """A control plane as kubeadm leaves it, with its CA keys and the manifest of kube-controller-manager."""
    pki = kubeadm_pki(
        tmp_path_factory.mktemp("made"), algorithm="ECDSA-P256", external=False, extra_sans=("127.0.0.1",)
    )
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
    reported = pki.run_kubeadm("certs", "check-expiration").stdout
    assert "no " not in reported.partition("EXTERNALLY MANAGED")[2].replace("\n", " ")


# --- copies -----------------------------------------------------------------------------------------------------------


def tar_gz(path: Path, key: bytes) -> None:
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo("etc/kubernetes/pki/ca.key")
        entry.size = len(key)
        archive.addfile(entry, io.BytesIO(key))


def another_form(path: Path, key: bytes, encoding: Encoding, password: bytes = b"") -> None:
    algorithm = BestAvailableEncryption(password) if password else NoEncryption()
    path.write_bytes(load_pem_private_key(key, None).private_bytes(encoding, PrivateFormat.PKCS8, algorithm))


def der_of(key: bytes) -> bytes:
    form = PrivateFormat.PKCS8 if b"BEGIN PRIVATE" in key else PrivateFormat.TraditionalOpenSSL
    return load_pem_private_key(key, None).private_bytes(Encoding.DER, form, NoEncryption())


_CA = TestCA.make("other", "ecdsa-p256")
CERTIFICATE, OTHER_KEY = _CA.certificate_pem, _CA.key_pem
#: How a key is written to a file.
FORMS: dict[str, Callable[[Path, bytes], object]] = {
    "by another name": Path.write_bytes,
    "behind others": lambda path, key: path.write_bytes(CERTIFICATE * 300 + OTHER_KEY + key),
    "in PKCS #8": lambda path, key: another_form(path, key, Encoding.PEM),
    "in DER": lambda path, key: another_form(path, key, Encoding.DER),
    "in a Secret": lambda path, key: path.write_text(f"data:\n  ca.key: {base64.b64encode(key).decode()}\n"),
    "in a JSON file": lambda path, key: path.write_text(json.dumps({"key": key.decode()})),
    "in a YAML file": lambda path, key: path.write_text("key: |\n" + textwrap.indent(key.decode(), "    ")),
    "in lines of base64": lambda path, key: path.write_bytes(base64.encodebytes(key)),
    "behind a megabyte": lambda path, key: path.write_bytes(b"x" * ((1 << 20) - 60) + key),
    "in an archive": tar_gz,
    "behind gzip's first bytes": lambda path, key: path.write_bytes(b"\x1f\x8b" + key),
    "in lines of base64 in a JSON file": lambda path, key: path.write_text(
        json.dumps({"key": base64.encodebytes(key).decode()})
    ),
    "in DER in base64": lambda path, key: path.write_text(f"key={base64.b64encode(der_of(key)).decode()} and more"),
    "in DER in lines of base64": lambda path, key: path.write_bytes(b"x" + base64.encodebytes(der_of(key))),
    "with header lines": lambda path, key: path.write_bytes(
        key.replace(b"PRIVATE KEY-----\n", b"PRIVATE KEY-----\nOwner: a company\nUse: CA\n\n", 1)
    ),
    "cut off in an archive": lambda path, key: path.write_bytes(gzip.compress(key + os.urandom(9999))[:-999]),
    "before a wrong byte in an archive": lambda path, key: path.write_bytes(
        gzip.compress(key + b"x" * 99)[:-9] + b"y" * 9
    ),
    "before something else in an archive": lambda path, key: path.write_bytes(gzip.compress(key) + b"more"),
    "in the second part of an archive": lambda path, key: path.write_bytes(gzip.compress(b"x") + gzip.compress(key)),
    "compressed": lambda path, key: path.write_bytes(gzip.compress(b"data:\n  k: " + base64.b64encode(key))),
}


@pytest.mark.attack("E10")
@pytest.mark.parametrize("form", FORMS)
def test_a_copy_is_known_by_its_key(tmp_path: Path, form: str) -> None:
    """A copy is known in any form; the same file with another key counts as that one's."""
    copy = tmp_path / "notes"
    for ca in (TestCA.make("one", "ecdsa-p256"), TestCA.make("two", "rsa-2048")):
        FORMS[form](copy, ca.key_pem)
        own = spki(load_pem_private_key(OTHER_KEY, None).public_key()) if form == "behind others" else None
        assert Held.by_file(copy).public - {own} == {spki(load_pem_private_key(ca.key_pem, None).public_key())}


def site(pki: KubeadmPki, tmp_path: Path) -> Bridge:
    """A node whose CA keys are elsewhere, as kubeadm takes it."""
    elsewhere = tmp_path / "ca-keys/etcd"
    elsewhere.mkdir(parents=True)
    for name in ("ca.key", "etcd/ca.key", "front-proxy-ca.key"):
        shutil.move(pki.pki_dir / name, tmp_path / "ca-keys" / name)
    pki.run_kubeadm("init", "phase", "control-plane", "controller-manager")
    return Bridge(pki=pki, directory=tmp_path / "bridge")


def reported(bridge: Bridge, root: Path, code: int) -> list[dict[str, Any]]:
    """What `doctor --ca-keys` says."""
    run = bridge.run("doctor", "--ca-keys", str(root), "-o", "json")
    assert run.returncode == code, run.stdout + run.stderr
    findings: list[dict[str, Any]] = json.loads(run.stdout)["findings"]
    return findings


def copies(bridge: Bridge, root: Path) -> dict[str, str]:
    """The files with a CA's key, and whose it is."""
    looked = [*examination.for_ca_keys(root, load(bridge.config), datetime.now(UTC))]
    return {one.about: one.text.rpartition("key of ")[2] for one in looked if one.check == "ca-key-copy"}


def test_the_keys_are_proven_gone(pki: KubeadmPki, tmp_path: Path) -> None:
    """Copies in every place, the Secret in the cluster, encrypted keys and large files: each is reported, and after their removal none."""
    bridge, state = site(pki, tmp_path), apiserver.State()
    key, left = (tmp_path / "ca-keys/ca.key").read_bytes(), pki.root / "left"
    state.secrets = [
        secret("kube-system", "kubeadm-certs", b"x"),
        secret("a", "other", OTHER_KEY),
        secret("a", "b", key),
    ]
    places = [pki.kubeconfig_dir / "pki.bak/ca.key", bridge.directory / "state/backups/ca.key", left / "a/b"]
    for place in places:
        place.parent.mkdir(parents=True)
        place.write_bytes(key)
    another_form(left / "locked", key, Encoding.PEM, b"secret")
    with (left / "large").open("wb") as file:
        file.truncate(65 << 20)
    (left / "link").symlink_to(places[-1])
    assert {(one.level, one.check, one.about) for one in found(pki, tmp_path / "bridge")} == {
        ("warning", "ca-key-copy", str(place)) for place in places[:2]
    }
    with apiserver.serving(Place(name=NODE, address="127.0.0.1", directory=pki.root / "etc", cas={}), state):
        pki.run_kubeadm("init", "phase", "control-plane", "apiserver")
        manifest = pki.kubeconfig_dir / "manifests/kube-apiserver.yaml"
        text = re.sub("--secure-port=.*", f"--secure-port={state.port}", manifest.read_text())
        manifest.write_text(text.replace(ADDRESS, "127.0.0.1").replace("=/etc/kubernetes", f"={pki.kubeconfig_dir}"))
        wrong = reported(bridge, tmp_path, 1)
        assert {(one["level"], one["check"]) for one in wrong if one["level"] == "error"} == {
            *(("error", check) for check in ("ca-key-copy", "ca-keys-in-cluster")),
        }
        said = {about for one in wrong if one["check"] == "ca-key-copy" for about in one["about"]}
        keys = {str(tmp_path / f"ca-keys/{name}") for name in ("ca.key", "etcd/ca.key", "front-proxy-ca.key")}
        assert said == {*map(str, places), *keys}
        [encrypted] = [one for one in wrong if one["level"] == "warning"]
        assert encrypted["about"] == [f"{left}/locked"]
        assert "the rest of 1 files behind 64 MiB" in str(wrong)
        in_cluster = [one for one in wrong if one["check"] == "ca-keys-in-cluster"]
        assert {about for one in in_cluster for about in one["about"]} == {
            "Secret kube-system/kubeadm-certs",
            "Secret a/b",
        }
        for path in (*places, left / "locked"):
            path.unlink()
        state.secrets = state.secrets[1:2]
        right = reported(bridge, pki.root, 0)
    assert {one["check"] for one in right} == {"ca-key-search"}
    assert "and 1 Secrets: 0 have such a key" in str(right)


def secret(namespace: str, name: str, value: bytes) -> dict[str, Any]:
    """A Secret as the API has it."""
    data = {"tls.key": base64.b64encode(value).decode()}
    return {"metadata": {"namespace": namespace, "name": name}, "data": data}


def test_no_proof_without_an_answer_or_a_directory(pki: KubeadmPki, tmp_path: Path) -> None:
    """A cluster that does not answer is a warning; what is no directory, and a machine that is no node, are errors."""
    bridge = site(pki, tmp_path)
    [silent] = [one for one in reported(bridge, pki.root, 3) if one["level"] == "warning"]
    assert silent["check"] == "ca-keys-in-cluster"
    assert [one["about"] for one in reported(bridge, tmp_path / "nowhere", 1)] == [[str(tmp_path / "nowhere")]]
    assert bridge.run("doctor", "--ca-keys", "/", "--before-upgrade").returncode == 2
    shutil.rmtree(pki.kubeconfig_dir)
    assert bridge.run("doctor", "--ca-keys", str(tmp_path)).returncode == 1


def test_a_worker_is_searched_without_its_cluster(pki: KubeadmPki, tmp_path: Path) -> None:
    """It has no rights to Secrets; a control-plane node looks for them."""
    bridge = site(pki, tmp_path)
    for path in (*pki.kubeconfig_dir.glob("pki/*"), *pki.kubeconfig_dir.iterdir()):
        if path.name not in {"pki", "ca.crt", "kubelet.conf"}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert {one["check"] for one in reported(bridge, pki.root, 0)} == {"ca-key-search"}
    (pki.root / "copy").write_bytes((tmp_path / "ca-keys/ca.key").read_bytes())
    assert {one["check"] for one in reported(bridge, pki.root, 1)} == {"ca-key-search", "ca-key-copy"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user; run the tests as root")
def test_a_directory_that_can_not_be_read_is_no_proof(pki: KubeadmPki, tmp_path: Path) -> None:
    """A run by another user reports each directory that it could not read."""
    bridge = site(pki, tmp_path)
    settings = load(bridge.config)
    node = read_node(settings.node)
    with tempfile.TemporaryDirectory() as place:  # pytest's own is closed to others
        Path(place).chmod(0o755)
        Path(place, "closed").mkdir(mode=0o700)
        os.seteuid(65534)
        try:
            looked = [*ca_keys.search(node, settings, Path(place))]
        finally:
            os.seteuid(0)
    assert [one.level for one in looked if one.about.endswith("closed")] == ["warning"]


def test_no_proof_without_the_cas_certificate(pki: KubeadmPki, tmp_path: Path) -> None:
    """A key is known by the CA's certificate alone, so that a search without it proves nothing."""
    bridge = site(pki, tmp_path)
    (pki.pki_dir / "front-proxy-ca.crt").unlink()
    [wrong] = [one for one in reported(bridge, pki.root / "etc", 1) if one["level"] == "error"]
    assert (wrong["check"], wrong["about"]) == ("ca-key-search", ["front-proxy-ca"])


def test_a_key_far_below_is_found_or_what_is_left_out_is_counted(pki: KubeadmPki, tmp_path: Path) -> None:
    """Directories as deep as the system allows; below a name that is too long for it nothing can be read, and the report says so."""
    bridge = site(pki, tmp_path)
    settings = load(bridge.config)
    deep, key = tmp_path / "deep", (tmp_path / "ca-keys/ca.key").read_bytes()
    here = os.open(tmp_path, os.O_DIRECTORY)
    for depth, name in enumerate(["deep", *["d"] * 2500]):
        os.mkdir(name, dir_fd=here)
        here, above = os.open(name, os.O_DIRECTORY, dir_fd=here), here
        os.close(above)
        if depth in {1500, 2500}:
            descriptor = os.open("k", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=here)
            os.write(descriptor, key)
            os.close(descriptor)
    os.close(here)
    looked = [*ca_keys.search(read_node(settings.node), settings, deep)]
    assert [one.about.count("/d") > 1500 for one in looked if one.check == "ca-key-copy"] == [True]
    assert [one.level for one in looked if one.about.endswith("closed")] == ["warning"]
    subprocess.run(["rm", "-rf", deep], check=True)


def test_what_other_machines_hold_is_left_out(pki: KubeadmPki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods' network volumes are not read, and are named; the kernel's files are not read either."""
    bridge = site(pki, tmp_path)
    key = (tmp_path / "ca-keys/ca.key").read_bytes()
    line = "36 35 98:0 / {} rw shared:1 - {} source rw\n"
    kinds = {"far away": "nfs4", "other": "fuse.sshfs", "made up": "proc", "here": "ext4"}
    for place in kinds:
        (tmp_path / "top" / place).mkdir(parents=True)
        (tmp_path / "top" / place / "k").write_bytes(key)
    table = "".join(
        line.format(str(tmp_path / "top" / place).replace(" ", "\\040"), kind) for place, kind in kinds.items()
    )
    (tmp_path / "mounts").write_text(table)
    monkeypatch.setattr(paths, "MOUNTS", tmp_path / "mounts")
    assert copies(bridge, tmp_path / "top") == {str(tmp_path / "top/here/k"): "ca"}
    looked = [*examination.for_ca_keys(tmp_path / "top", load(bridge.config), datetime.now(UTC))]
    assert [one.about for one in looked if "another machine's" in one.text] == [
        f"{tmp_path}/top/far away",
        f"{tmp_path}/top/other",
    ]
    assert copies(bridge, tmp_path / "top/far away") == {str(tmp_path / "top/far away/k"): "ca"}


def test_files_of_nothing_but_beginnings_are_read_to_an_end(tmp_path: Path) -> None:
    """A user who can write to a node's disk can't keep the search busy, and the report names what was not read."""
    for name, text in (("a", b"-----BEGIN PRIVATE KEY-----"), ("b", b"LS0tLS1CRUdJTi"), ("c", b"-----BEGIN ")):
        (tmp_path / name).write_bytes(text * ((1 << 20) // len(text)))
        assert Held.by_file(tmp_path / name) == Held()
    (tmp_path / "d").write_bytes(gzip.compress(bytes(1 << 28)))
    assert Held.by_file(tmp_path / "d").is_cut
    (tmp_path / "f").write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\0-----END ENCRYPTED PRIVATE KEY-----"
    )  # a library
    assert Held.by_file(tmp_path / "f") == Held()
    old = load_pem_private_key(OTHER_KEY, None).private_bytes(
        Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"secret")
    )
    (tmp_path / "g").write_bytes(old)
    assert Held.by_file(tmp_path / "g") == Held(is_encrypted=True)
    (tmp_path / "e").write_bytes(gzip.compress(b"x" * 999)[:-9])
    assert Held.by_file(tmp_path / "e") == Held()
    packed = bytearray(gzip.compress(os.urandom(1 << 20) + old))
    packed[1 << 19 :] = bytes(len(packed) - (1 << 19))
    (tmp_path / "h").write_bytes(packed)
    assert Held.by_file(tmp_path / "h") == Held(is_broken=True)
    (tmp_path / "i").write_bytes(gzip.compress(b"") * (1 << 17))
    assert Held.by_file(tmp_path / "i") == Held(is_cut=True)


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
def test_the_flags_mean_what_the_program_makes_of_them(api: ApiServer, tmp_path: Path, case: str) -> None:
    """The signer is off, or on, or ends the program: by the real kube-controller-manager's own log."""
    flags, has_key, line = FLAGS[case]
    certificate, key, ca = tmp_path / "ca.crt", tmp_path / "ca.key", TestCA.make()
    certificate.write_bytes(ca.certificate_pem)
    if has_key:
        key.write_bytes(ca.key_pem)
    words = [flag.format(crt=certificate, key=key) for flag in flags]
    found = endpoints.signing_files(dict(word.split("=", 1) for word in words))
    lacking = [path for path in found.values() if not path.exists()]
    config = api.kubeconfig("system:kube-controller-manager")
    command: list[str | Path] = [
        programs.require("kube-controller-manager"), f"--kubeconfig={config}", "--bind-address=127.0.0.1",
        "--leader-elect=false", f"--secure-port={free_port()}", *words,
    ]  # fmt: skip
    process = api.start("kube-controller-manager", command)
    end = time.monotonic() + 300
    try:
        while line not in (log := api.log("kube-controller-manager", 1000)):
            assert time.monotonic() < end, log
            time.sleep(0.1)
        if line == ENDS:
            assert process.wait(180) != 0
        assert (OFF in log) == (line == OFF)
        assert (bool(lacking), bool(found)) == (line == ENDS, line == ENDS or has_key)
    finally:
        api.stop("kube-controller-manager")
