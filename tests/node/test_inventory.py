"""What is on a node, from files alone, whatever stands in their place."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bridge.node import inventory
from bridge.node.inventory import AuthorityState, Item, Node
from bridge.node.manifests import parse as parse_manifest
from bridge.node.yamltree import YamlError
from bridge.pki.certificates import load_pem_certificates, pem
from bridge.specs import SPECS, Component
from bridge.system.paths import MAX_FILE_BYTES
from tests.kit.pki import PKI_SPECS, Pki, handmade_pki

NAMES = list(PKI_SPECS)
KUBECONFIGS = [name for name, spec in SPECS.items() if spec.kubeconfig]
ETCD_NAMES = {"apiserver-etcd-client", "etcd-healthcheck-client", "etcd-peer", "etcd-server"}

MANIFEST = """\
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: kube-system}}
spec:
  containers:
  - name: {name}
    image: {image}
    command:
    - {name}
{flags}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return handmade_pki(tmp_path_factory.mktemp("made"))


@pytest.fixture
def pki(made: Pki) -> Iterator[Pki]:
    """A copy to damage, where other users may look too."""
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(made.root, directory, dirs_exist_ok=True)
        Path(directory).chmod(0o755)
        yield Pki(root=Path(directory), external=True)


def read(pki: Pki) -> Node:
    return inventory.read(pki.pki_dir, pki.kubeconfig_dir)


def item(pki: Pki, name: str) -> Item:
    (found,) = [one for one in read(pki).items if one.spec.name == name]
    return found


def authority(pki: Pki, name: str) -> AuthorityState:
    (found,) = [one for one in read(pki).authorities if one.authority.name == name]
    return found


def write_manifest(pki: Pki, component: str, *flags: str, image: str = "registry.k8s.io/x:v1.37.2") -> Path:
    path = pki.kubeconfig_dir / "manifests" / f"{component}.yaml"
    path.parent.mkdir(exist_ok=True)
    lines = "\n".join(f"    - {flag}" for flag in flags)
    path.write_text(MANIFEST.format(name=component, image=image, flags=lines))
    return path


def edit_kubeconfig(pki: Pki, name: str, certificate: str | None = None, key: str | None = None) -> None:
    """Put other lines in the place of the two data values."""
    path = pki.kubeconfig_dir / name
    lines = path.read_text().splitlines()
    for place, line in enumerate(lines):
        if certificate is not None and "client-certificate-data" in line:
            lines[place] = f"    {certificate}"
        if key is not None and "client-key-data" in line:
            lines[place] = f"    {key}"
    path.write_text("\n".join(lines) + "\n")


def test_a_complete_node(made: Pki) -> None:
    """Every certificate of the spec table is there, in its order, at kubeadm's place, under an external CA."""
    node = read(made)

    assert [one.spec.name for one in node.items] == NAMES
    assert node.troubles == ()
    assert node.local_etcd
    for one in node.items:
        base = (made.kubeconfig_dir if one.spec.kubeconfig else made.pki_dir) / one.spec.base
        certificate, key = (base, None) if one.spec.kubeconfig else (Path(f"{base}.crt"), Path(f"{base}.key"))
        assert (one.state, one.trouble, one.managed, one.authority_external) == ("present", None, True, True)
        assert (one.certificate_path, one.key_path, one.embedded) == (certificate, key, key is None)
        assert one.anchor_path == made.pki_dir / one.spec.authority.certificate_file
        assert one.listed is (one.spec.name != "kubelet.conf")
    for state in node.authorities:
        assert (state.state, state.key, state.listed, len(state.certificates)) == ("present", "external", True, 1)


def test_reads_no_key_and_writes_nothing(made: Pki) -> None:
    """No key file is opened, nothing is opened for writing, and nothing slow is imported."""
    script = """
import os, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(args) if event == "open" else None)
from datetime import UTC, datetime
from pathlib import Path
from bridge.cli.expiration_forms import look
from bridge.node import inventory
del opened[:]
node = inventory.read(Path(sys.argv[1]), Path(sys.argv[2]))
text, _, _ = look(node, datetime.now(UTC), None, "table")
assert text.count("364d") >= 11, text
for path, _, flags in opened:
    print(path, flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND), sep="\\0")
print(*sorted({"hvac", "requests", "rich", "typer", "backends"} & {name.split(".")[0] for name in sys.modules}))
"""
    command = [sys.executable, "-W", "error", "-c", script, str(made.pki_dir), str(made.kubeconfig_dir)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    *lines, modules = run.stdout.split("\n")[:-1]
    opened = dict(line.split("\0") for line in lines)

    assert (run.returncode, run.stderr) == (0, "")
    assert str(made.pki_dir / "apiserver.crt") in opened
    assert [path for path in opened if path.endswith(".key")] == []
    assert set(opened.values()) == {"0"}
    assert modules == ""


# Who holds the CA's key.


def _touch(path: Path) -> None:
    path.write_text("")


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _real_link(path: Path) -> None:
    path.symlink_to("apiserver.key")


@pytest.mark.parametrize(
    ("make", "key"),
    [
        pytest.param(lambda _: None, "external", id="no file"),
        pytest.param(_dangling, "external", id="a dangling symlink"),
        pytest.param(_touch, "local", id="an empty file"),
        pytest.param(_real_link, "local", id="a symlink to a file"),
        pytest.param(Path.mkdir, "local", id="a directory"),
    ],
)
def test_whether_a_ca_is_external(pki: Pki, make: Callable[[Path], None], key: str) -> None:
    """As kubeadm decides: external when the CA's certificate is here and its key does not exist, for each CA alone."""
    make(pki.pki_dir / "ca.key")

    assert authority(pki, "ca").key == key
    assert {one.authority_external for one in read(pki).items if one.spec.authority.name == "ca"} == {key == "external"}
    assert authority(pki, "front-proxy-ca").key == "external"
    assert item(pki, "front-proxy-client").authority_external


def test_a_missing_ca_is_not_external(pki: Pki) -> None:
    """Without its certificate nothing can be said to be managed elsewhere, and its leaves are listed all the same."""
    (pki.pki_dir / "ca.crt").unlink()

    assert (authority(pki, "ca").state, authority(pki, "ca").key) == ("missing", "missing")
    assert (item(pki, "apiserver").state, item(pki, "apiserver").authority_external) == ("present", False)


def test_a_ca_bundle_is_kept_in_order(pki: Pki) -> None:
    """All certificates of a CA file are there; the first is the one that kubeadm takes for the root."""
    path = pki.pki_dir / "ca.crt"
    second = (pki.pki_dir / "front-proxy-ca.crt").read_bytes()
    wanted = load_pem_certificates(path.read_bytes() + second)
    path.write_bytes(path.read_bytes() + b"\nthe next one\n" + second)

    assert authority(pki, "ca").certificates == tuple(wanted)


def test_a_leaf_in_the_place_of_a_ca_is_trouble(pki: Pki) -> None:
    """kubeadm refuses it as well ("certificate CA is not a CA")."""
    assert authority(pki, "ca").trouble is None
    shutil.copy(pki.pki_dir / "apiserver.crt", pki.pki_dir / "ca.crt")

    assert (authority(pki, "ca").state, authority(pki, "ca").key) == ("broken", "external")
    assert len(read(pki).troubles) == 1


# What can stand in the place of a certificate.


def _remove(path: Path) -> None:
    path.unlink()


def _dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _huge(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n" * MAX_FILE_BYTES)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes(b"\x00\xff{[" * 100)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def _crlf_and_text(path: Path) -> None:
    path.write_bytes(b"# renewed by hand\r\n" + path.read_bytes().replace(b"\n", b"\r\n"))


@pytest.mark.parametrize("name", ["apiserver", "etcd-peer", "admin.conf", "kubelet.conf"])
@pytest.mark.parametrize(
    ("damage", "state"),
    [
        (_link, "present"),
        (_crlf_and_text, "present"),
        (_remove, "missing"),
        (_dangle, "missing"),
        (_directory, "missing"),
        (_loop, "unreadable"),
        (_pipe, "unreadable"),
        (_huge, "unreadable"),
        (_empty, "broken"),
        (_garbage, "broken"),
        (_cut, "broken"),
    ],
)
def test_what_stands_in_the_place_of_a_file(
    pki: Pki, made: Pki, name: str, damage: Callable[[Path], None], state: str
) -> None:
    """It is named for what it is, with its path, and hides no other certificate."""
    path = item(pki, name).certificate_path
    damage(path)

    found = item(pki, name)
    assert found.state == state
    assert found.certificates == (item(made, name).certificates if state == "present" else ())
    assert (found.trouble is not None) is (state in ("broken", "unreadable"))
    assert found.trouble is None or str(path) in found.trouble
    assert len(read(pki).troubles) == (found.trouble is not None)
    assert {one.state for one in read(pki).items if one.spec.name != name} == {"present"}


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """Another user than root, since root can read every file."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["apiserver", "admin.conf"])
def test_what_we_may_not_read_is_not_missing(pki: Pki, name: str) -> None:
    """kubeadm calls it missing and exits with 0; we say that permission is denied."""
    for path in pki.root.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    with another_user():
        assert item(pki, name).state == "present"
    item(pki, name).certificate_path.chmod(0)
    with another_user():
        found, node = item(pki, name), read(pki)

    assert found.state == "unreadable"
    assert found.trouble is not None
    assert found.trouble.endswith("Permission denied")
    assert node.troubles == (f"{name}: {found.trouble}",)


def test_directories_that_we_may_not_enter(pki: Pki) -> None:
    """Everything in them is unreadable, nothing is missing, and the CA keys count as local, since they could not be looked for."""
    pki.kubeconfig_dir.chmod(0)
    with another_user():
        node = read(pki)
    pki.kubeconfig_dir.chmod(0o755)

    assert {one.state for one in node.items} == {"unreadable"}
    assert {(one.state, one.key) for one in node.authorities} == {("unreadable", "local")}


def test_nothing_at_all(tmp_path: Path) -> None:
    """An empty directory has all files missing; a missing directory is an error, since the path may be wrong."""
    assert len(inventory.read(tmp_path / "pki", tmp_path).troubles) == 1
    (tmp_path / "pki").mkdir()
    node = inventory.read(tmp_path / "pki", tmp_path)

    assert {one.state for one in node.items} == {"missing"}
    assert {(one.state, one.key) for one in node.authorities} == {("missing", "missing")}
    assert (node.troubles, node.manifests, node.kubernetes_version) == ((), {}, None)


def test_a_chain_is_kept_in_order(pki: Pki) -> None:
    """The leaf comes first, then what the file has after it."""
    leaf, ca = item(pki, "apiserver").certificates[0], authority(pki, "ca").certificates[0]
    (pki.pki_dir / "apiserver.crt").write_bytes(pem(leaf) + pem(ca))

    assert item(pki, "apiserver").certificates == (leaf, ca)


# Kubeconfigs.


@pytest.mark.parametrize("absolute", [False, True])
def test_a_kubeconfig_that_refers_to_files(pki: Pki, *, absolute: bool) -> None:
    """The pair that counts is then in these files, relative to the kubeconfig's directory."""
    leaf = item(pki, "scheduler.conf").certificates[0]
    (pki.kubeconfig_dir / "own").mkdir()
    (pki.kubeconfig_dir / "own/s.crt").write_bytes(pem(leaf))
    prefix = f"{pki.kubeconfig_dir}/" if absolute else ""
    edit_kubeconfig(pki, "scheduler.conf", f"client-certificate: {prefix}own/s.crt", f"client-key: {prefix}own/s.key")

    found = item(pki, "scheduler.conf")
    assert (found.state, found.certificates, found.managed, found.listed) == ("present", (leaf,), True, True)
    assert (found.certificate_path, found.key_path, found.embedded) == (
        pki.kubeconfig_dir / "own/s.crt",
        pki.kubeconfig_dir / "own/s.key",
        False,
    )


@pytest.mark.parametrize(
    ("certificate", "key"),
    [
        pytest.param("client-certificate: nowhere.crt", "client-key: nowhere.key", id="files that are not there"),
        pytest.param("client-certificate: pki/apiserver.crt", None, id="a certificate's file and a key's data"),
        pytest.param(None, "client-key: pki/apiserver.key", id="a certificate's data and a key's file"),
        pytest.param(None, "x: y", id="no key"),
        pytest.param("token: abc", "x: y", id="a token"),
        pytest.param("client-certificate-data: aGVsbG8=", None, id="no certificate in the data"),
        pytest.param("client-certificate-data: '*'", None, id="no base64"),
    ],
)
def test_a_kubeconfig_without_a_pair_that_could_be_renewed(pki: Pki, certificate: str | None, key: str | None) -> None:
    """It is broken, and the reason names the file."""
    assert item(pki, "admin.conf").trouble is None
    edit_kubeconfig(pki, "admin.conf", certificate, key)

    found = item(pki, "admin.conf")
    assert (found.state, found.certificates) == ("broken", ())
    assert found.trouble is not None
    assert str(pki.kubeconfig_dir / "admin.conf") in found.trouble


@pytest.mark.parametrize("change", ["users: &u", "user: &u", "!!str"])
def test_a_kubeconfig_that_cannot_be_edited(pki: Pki, change: str) -> None:
    """It is read as before, and the obstacle names the file, in the hint, too."""
    assert [one.spec.name for one in read(pki).items if one.obstacle] == []
    path = pki.kubeconfig_dir / "admin.conf"
    place = f"client-key-data: {change}" if "!" in change else change
    path.write_text(path.read_text().replace(f"{place.rsplit(' ', 1)[0]}", place))

    assert [one.spec.name for one in read(pki).items if one.obstacle] == ["admin.conf"]
    found = item(pki, "admin.conf")
    assert (found.state, found.trouble, len(found.certificates)) == ("present", None, 1)
    assert found.obstacle is not None
    assert str(found.obstacle).startswith(f"{path}: line ")
    assert f"--kubeconfig {path} " in found.obstacle.hint


def test_certificates_that_share_a_file(pki: Pki) -> None:
    """Both can be read; neither file can be replaced with two contents, and what has files of its own can be."""
    (pki.kubeconfig_dir / "super-admin.conf").unlink()
    (pki.kubeconfig_dir / "super-admin.conf").symlink_to("admin.conf")
    shutil.copy(pki.pki_dir / "apiserver.crt", pki.kubeconfig_dir / "both.pem")
    edit_kubeconfig(pki, "scheduler.conf", "client-certificate: both.pem", "client-key: both.pem")
    key = pki.kubeconfig_dir / "loop.key"
    key.symlink_to(key)
    shutil.copy(pki.pki_dir / "apiserver.crt", pki.kubeconfig_dir / "own.crt")
    edit_kubeconfig(pki, "controller-manager.conf", "client-certificate: own.crt", "client-key: loop.key")

    found = {one.spec.name: one for one in read(pki).items}
    assert {one.state for one in found.values()} == {"present"}
    obstacles = {name: str(one.obstacle) for name, one in found.items() if one.obstacle}
    assert set(obstacles) == {"admin.conf", "super-admin.conf", "scheduler.conf"}
    assert "super-admin.conf's" in obstacles["admin.conf"]
    assert " admin.conf's" in obstacles["super-admin.conf"]
    assert obstacles["scheduler.conf"].endswith(os.path.realpath(pki.kubeconfig_dir / "both.pem"))


def test_data_wins_over_files(pki: Pki) -> None:
    """As in client-go, embedded data counts, and paths beside it do not."""
    data = next(
        line for line in (pki.kubeconfig_dir / "admin.conf").read_text().splitlines() if "client-key-data" in line
    )
    edit_kubeconfig(pki, "admin.conf", key=f"{data.strip()}\n    client-certificate: nowhere\n    client-key: nowhere")

    assert (item(pki, "admin.conf").state, item(pki, "admin.conf").embedded) == ("present", True)


def test_a_kubelet_that_rotates_its_certificate(pki: Pki) -> None:
    """Certificate and key are one file of the kubelet's: ours to renew where the CA's key is elsewhere, else its own."""
    leaf = item(pki, "kubelet.conf").certificates[0]
    current = pki.root / "kubelet-client-current.pem"
    key = (pki.pki_dir / "apiserver.key").read_bytes()
    current.write_bytes(key + pem(leaf) + key)
    edit_kubeconfig(pki, "kubelet.conf", f"client-certificate: {current}", f"client-key: {current}")

    found = item(pki, "kubelet.conf")
    assert (found.state, found.certificates) == ("present", (leaf,))
    assert (found.managed, found.rotates, found.listed, found.embedded) == (True, True, False, False)
    assert (found.in_one_file, found.obstacle) == (True, None)
    assert found.certificate_path == found.key_path == current
    (pki.pki_dir / "ca.key").write_bytes(key)
    assert (item(pki, "kubelet.conf").managed, item(pki, "kubelet.conf").rotates) == (False, True)


def test_the_current_context_decides(pki: Pki) -> None:
    """An operator's second context in admin.conf, when current, is what counts, as for kubeadm."""
    path = pki.kubeconfig_dir / "admin.conf"
    data = base64.b64encode((pki.pki_dir / "apiserver.crt").read_bytes()).decode()
    text = path.read_text().replace("current-context: ", "current-context: x\nold-context: ")
    text = text.replace("contexts:\n", "contexts:\n- {name: x, context: {cluster: kubernetes, user: x}}\n")
    path.write_text(text + f"- {{name: x, user: {{client-certificate-data: {data}, client-key-data: eA==}}}}\n")

    assert item(pki, "admin.conf").certificates == item(pki, "apiserver").certificates


# Where etcd is.


def test_external_etcd(pki: Pki) -> None:
    """Its rows go; the API server's client certificate is where the manifest says, and its CA too."""
    mine = pki.root / "corp"
    mine.mkdir()
    for source, target in (
        ("apiserver-etcd-client.crt", "c.crt"),
        ("apiserver-etcd-client.key", "c.key"),
        ("etcd/ca.crt", "ca.crt"),
    ):
        shutil.copy(pki.pki_dir / source, mine / target)
    leaf = item(pki, "apiserver-etcd-client").certificates
    shutil.rmtree(pki.pki_dir / "etcd")
    write_manifest(
        pki,
        "kube-apiserver",
        f"--etcd-cafile={mine}/ca.crt",
        f"--etcd-certfile={mine}/c.crt",
        "--etcd-keyfile",
        f"{mine}/c.key",
    )

    node, found = read(pki), item(pki, "apiserver-etcd-client")
    assert not node.local_etcd
    assert {one.spec.name for one in node.items} == (set(NAMES) - ETCD_NAMES) | {"apiserver-etcd-client"}
    assert (found.state, found.certificates, found.managed, found.listed) == ("present", leaf, True, False)
    assert (found.certificate_path, found.key_path) == (mine / "c.crt", mine / "c.key")
    assert (found.anchor_path, found.authority_external) == (mine / "ca.crt", True)
    assert [(state.authority.name, state.listed) for state in node.authorities] == [
        ("ca", True),
        ("etcd-ca", False),
        ("front-proxy-ca", True),
    ]
    assert node.troubles == ()

    (mine / "ca.crt").unlink()
    assert (item(pki, "apiserver-etcd-client").state, item(pki, "apiserver-etcd-client").managed) == ("present", False)


def test_external_etcd_without_tls(pki: Pki) -> None:
    """There is no client certificate, and no CA of etcd's."""
    shutil.rmtree(pki.pki_dir / "etcd")
    write_manifest(pki, "kube-apiserver", "--etcd-servers=http://etcd.example.com:2379")

    node = read(pki)
    assert {one.spec.name for one in node.items} == set(NAMES) - ETCD_NAMES
    assert [state.authority.name for state in node.authorities] == ["ca", "front-proxy-ca"]


@pytest.mark.parametrize("trace", ["manifests/etcd.yaml", "pki/etcd/server.crt", "pki/etcd/peer.crt", None])
def test_traces_of_a_local_etcd(pki: Pki, trace: str | None) -> None:
    """A manifest or a serving certificate of etcd makes it local; without an API server's manifest it is, too."""
    shutil.rmtree(pki.pki_dir / "etcd")
    manifest = write_manifest(pki, "kube-apiserver")
    assert not read(pki).local_etcd
    if trace is None:
        manifest.unlink()
    elif trace.startswith("manifests"):
        write_manifest(pki, "etcd")
    else:
        (pki.kubeconfig_dir / trace).parent.mkdir()
        (pki.kubeconfig_dir / trace).touch()

    node = read(pki)
    assert node.local_etcd
    assert {one.spec.name for one in node.items} == set(NAMES)


# Manifests.


def test_manifests_tell_the_version(pki: Pki) -> None:
    """The tag of the API server's image is the version; etcd has its own numbers."""
    assert read(pki).kubernetes_version is None
    write_manifest(pki, "etcd", image="registry.k8s.io/etcd:3.7.0-0")
    write_manifest(pki, "kube-apiserver", image="registry.k8s.io/kube-apiserver:v1.37.2")

    assert read(pki).kubernetes_version == (1, 37)
    assert read(pki).manifests[Component.ETCD].version == (3, 7)


@pytest.mark.parametrize(
    ("image", "version"),
    [
        ("kube-apiserver:v1.28.15", (1, 28)),
        ("registry:5000/a/kube-apiserver:v1.37.0-rc.1", (1, 37)),
        ("registry:5000/a/kube-apiserver:1.9", (1, 9)),
        ("kube-apiserver:v1.37.2@sha256:" + "0" * 64, (1, 37)),
        ("kube-apiserver@sha256:" + "0" * 64, None),
        ("registry:5000/kube-apiserver", None),
        ("registry.v1.2:5000/kube-apiserver", None),
        ("kube-apiserver:latest", None),
        ("''", None),
    ],
)
def test_versions_of_images(image: str, version: tuple[int, int] | None) -> None:
    """The tag counts, not a registry's port, nor a digest."""
    text = MANIFEST.format(name="kube-apiserver", image=image, flags="")
    assert parse_manifest(Component.APISERVER, text.encode()).version == version


def test_flags() -> None:
    """Both spellings of a flag, one dash or two, in command and args; the last of several counts."""
    flags = '    - --a=1\n    - --b\n    - "2"\n    - -cc=3\n    - --d\n    - --e=f=g\n    - --a=4\n    - -v\n    args: [--z]'
    text = MANIFEST.format(name="etcd", image="etcd:3.7.0-0", flags=flags)
    wanted = {"--a": "4", "--b": "2", "--cc": "3", "--d": "true", "--e": "f=g", "--z": "true"}
    assert parse_manifest(Component.ETCD, text.encode()).flags == wanted


@pytest.mark.parametrize("text", ["", "[]", "kind: Pod", "spec: {containers: []}", "spec: {containers: [1]}", "a: ["])
def test_what_is_no_manifest(pki: Pki, text: str) -> None:
    """It is named, and the node is read as if it were not there."""
    path = write_manifest(pki, "kube-apiserver")
    assert read(pki).troubles == ()
    path.write_text(text)

    with pytest.raises(YamlError):
        parse_manifest(Component.APISERVER, text.encode())
    node = read(pki)
    (trouble,) = node.troubles
    assert trouble.startswith("kube-apiserver: ")
    assert str(path) in trouble
    assert node.manifests == {}
    assert {one.state for one in node.items} == {"present"}
