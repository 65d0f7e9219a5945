"""kubeadm's own CAs, whose keys are on the node, give way to the company's, and their keys leave the node."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from bridge.cli.options import utc_now
from bridge.diagnosis import authorities
from bridge.errors import Exit, SettingsError
from bridge.node.reading import read_node
from bridge.pki.certificates import load_pem_certificates, pem, spki
from bridge.pki.csr import key_pem
from bridge.renewal import renew
from bridge.renewal.selection import RunOptions
from bridge.rotation import places, planning, steps
from bridge.rotation.planning import Verb
from bridge.rotation.readiness import RotationOptions
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES, Component
from bridge.state import Store
from tests.kit import next_cas
from tests.kit.issuing import Signer
from tests.kit.pairs import assert_pairs
from tests.kit.pki import Pki, handmade_pki, kubeadm_pki
from tests.kit.renewing import Quiet, settings_for
from tests.kit.rotating import Open, as_worker, contents, phases, run
from tests.kit.tripwire import kill

pytestmark = pytest.mark.usefixtures("no_process_here")

_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS (linux/sched.h)


def companys(pki: Pki, directory: Path) -> Settings:
    """A node whose settings name the company's CAs alone; they end before kubeadm's."""
    made = next_cas.make(directory / "next", days=1000)
    signers = {n.replace("-", "_"): (pem(one.signer.certificate), key_pem(one.signer.key)) for n, one in made.items()}
    before = settings_for(pki, directory, "", **signers)
    authorities = {
        name: dataclasses.replace(before.authorities[name], next={"anchor": made[name].table["anchor"]})
        for name in AUTHORITIES
    }
    return dataclasses.replace(before, authorities=authorities)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return handmade_pki(tmp_path / "node", external=False)


@pytest.fixture
def settings(pki: Pki, tmp_path: Path) -> Settings:
    return companys(pki, tmp_path)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk that leaves the node."""
    made = tmp_path / "disk"
    made.mkdir(mode=0o700)
    return made


def to(disk: Path) -> RotationOptions:
    return Open(keys_to=disk)


def publics(directory: Path) -> set[bytes]:
    """The public halves of all private keys below a directory."""
    found = set()
    for path in (one for one in directory.rglob("*") if one.is_file()):
        data = path.read_bytes()
        at = data.find(b"-----BEGIN ")
        if b"PRIVATE KEY-----" in data and at >= 0:
            key = data[data.rindex(b"-----BEGIN ", 0, data.index(b"PRIVATE KEY-----")) :]
            found.add(spki(load_pem_private_key(key, None).public_key()))
    return found


@pytest.mark.kube
def test_kubeadm_takes_the_node_in_each_phase_and_no_key_of_its_cas_is_left(tmp_path: Path, disk: Path) -> None:
    """No key is left in its place or in a backup; the disk has all three, for their owner alone."""
    pki = kubeadm_pki(tmp_path / "node", algorithm="ECDSA-P256", external=False)
    settings = companys(pki, tmp_path)
    cas = {spki(load_pem_certificates(pki.ca_pem(name)[0])[0].public_key()) for name in AUTHORITIES}
    assert cas <= publics(pki.root)
    for verb, phase in ((Verb.TRUST, "trusted"), (Verb.ISSUE, "issued"), (Verb.DROP, "new")):
        done = run(settings, verb, options=to(disk) if verb is Verb.ISSUE else None)
        assert done.exit_code == 0, done.result
        assert phases(settings) == dict.fromkeys(AUTHORITIES, phase)
        assert_pairs(pki)
        pki.run_kubeadm("certs", "check-expiration")
    assert not cas & (publics(pki.root) | publics(settings.node.state_dir))
    assert publics(disk) == cas
    assert {(one.name, one.stat().st_mode & 0o777) for one in disk.iterdir()} == {
        (f"{n}.key", 0o600) for n in AUTHORITIES
    }
    assert renew.run(settings, RunOptions(names=("apiserver",)), utc_now, Quiet())[0].exit_code == 0


@pytest.mark.rotation("a CA's key on a node")
def test_the_new_ca_does_not_sign_beside_the_old_ones_key(settings: Settings, pki: Pki, disk: Path) -> None:
    """Refused with the way on; a key that came back later holds up the end, until it is taken away."""
    assert run(settings, Verb.TRUST).exit_code == 0
    before = contents(pki)
    with pytest.raises(
        planning.OrderError, match=r"wanted its key away from this node, or --keys-to, found .*/ca\.key"
    ):
        run(settings, Verb.ISSUE)
    assert contents(pki) == before
    assert run(settings, Verb.ISSUE, options=to(disk)).exit_code == 0
    key = places.key_place(settings.node, places.look(settings, read_node(settings.node), ["ca"])["ca"])
    key.write_bytes((disk / "ca.key").read_bytes())
    with pytest.raises(planning.OrderError, match="--keys-to"):
        run(settings, Verb.DROP)
    assert run(settings, Verb.DROP, options=to(disk)).exit_code == 0
    assert not key.exists()


def test_an_emergency_takes_the_keys_away_too(settings: Settings, pki: Pki, disk: Path) -> None:
    """Where else would kubeadm's have leaked from."""
    with pytest.raises(planning.OrderError, match="--keys-to"):
        run(settings, Verb.DROP, options=RotationOptions(emergency=True))
    assert run(settings, Verb.DROP, options=RotationOptions(emergency=True, keys_to=disk)).exit_code == 0
    assert phases(settings) == dict.fromkeys(AUTHORITIES, "new")
    assert not list(pki.pki_dir.rglob("ca.key"))


def test_until_then_no_night_asks_the_next_ca(settings: Settings) -> None:
    """Its answer could not be proven; the certificate waits for `issue`, which asks."""
    for verb in (None, Verb.TRUST):
        if verb is not None:
            assert run(settings, verb).exit_code == 0
        night = renew.run(settings, RunOptions(names=("apiserver",)), utc_now, Quiet())[0]
        assert (night.exit_code, night.renewed) == (Exit.WAITING, [])
        assert all("kubeadm certs renew" in str(one.error.hint) for one in night.waiting if one.error)
    assert not Store(settings.node.state_dir).requests.exists()


@pytest.mark.rotation("a worker's CA file")
def test_until_then_no_night_of_a_worker_asks_the_next_ca(settings: Settings, pki: Pki) -> None:
    """The CA's key was never there; the cluster would not know a kubelet with a certificate of the next CA."""
    as_worker(settings, pki)
    before = contents(pki)
    night = renew.run(settings, RunOptions(names=("kubelet.conf",)), utc_now, Quiet())[0]
    assert ([str(one.error) for one in night.waiting], contents(pki)) == (
        ["the settings name the next CA alone (`next.anchor`), which does not sign yet on this node"],
        before,
    )
    for verb, phase in ((Verb.TRUST, "trusted"), (Verb.ISSUE, "issued")):
        run(settings, verb)  # no API server is there that could be seen to take it
        assert phases(settings)["ca"] == phase
    renewed = renew.run(settings, RunOptions(names=("kubelet.conf",)), utc_now, Quiet())[0].renewed
    assert [one.name for one in renewed] == ["kubelet.conf"]


@pytest.mark.parametrize("is_worker", [False, True])
def test_doctor_compares_a_backend_with_the_ca_whose_it_is(settings: Settings, pki: Pki, is_worker: bool) -> None:
    """The next one before `issue`, too; a backend of another CA is an error all the same."""
    if is_worker:
        as_worker(settings, pki)

    def found(ours: Settings) -> set[tuple[str, str]]:
        return {
            (one.level, one.about)
            for one in authorities.look(read_node(ours.node), ours, utc_now())
            if one.check in ("backend", "what-the-ca-would-sign")
        }

    names = ["ca"] if is_worker else list(AUTHORITIES)
    good = {("ok", f"backend of {name}") for name in names}
    for verb in (None, Verb.TRUST):
        if verb is not None:
            run(settings, verb, names)  # a worker asks an API server whether it takes it; none is there
        assert set(phases(settings).values()) == {"old" if verb is None else "trusted"}
        assert found(settings) == good
    anchor = Path(settings.authorities["ca"].next["anchor"])
    anchor.write_bytes(pem(Signer.make("stranger", key_id=True).certificate))
    assert ("ok", "backend of ca") not in found(settings)
    assert any(level == "error" for level, _ in found(settings))


def test_killed_with_the_keys_there_the_same_command_takes_them_away(settings: Settings, pki: Pki, disk: Path) -> None:
    """The files are in the phase already."""
    assert run(settings, Verb.TRUST).exit_code == 0
    child = os.fork()
    if child == 0:
        places.take_keys_away = lambda *_: kill()  # type: ignore[assignment]
        run(settings, Verb.ISSUE, options=to(disk))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (phases(settings), len(list(pki.pki_dir.rglob("*ca.key")))) == (dict.fromkeys(AUTHORITIES, "issued"), 3)
    assert run(settings, Verb.ISSUE, options=to(disk)).exit_code == 0
    assert not list(pki.pki_dir.rglob("*ca.key"))


def test_a_controller_manager_that_signs_holds_up_the_first_phase(settings: Settings, pki: Pki) -> None:
    """It takes one certificate in the file alone; with empty flags it is no obstacle."""
    place = pki.kubeconfig_dir / "manifests/kube-controller-manager.yaml"
    place.parent.mkdir(exist_ok=True)
    pod = "apiVersion: v1\nkind: Pod\nspec: {{containers: [{{name: c, image: 'c:v1.37.2', command: [c, {}]}}]}}\n"
    key = pki.pki_dir / "ca.key"
    flags = f"--cluster-signing-cert-file={pki.pki_dir}/ca.crt, --cluster-signing-key-file={key}"
    place.write_text(pod.format(flags))
    before = contents(pki)
    with pytest.raises(planning.OrderError, match=r"does not sign with .*ca\.crt, found --cluster-signing-cert-file"):
        run(settings, Verb.TRUST)
    assert contents(pki) == before
    assert run(settings, Verb.TRUST, ["etcd-ca"]).exit_code == 0
    place.write_text(pod.format("--cluster-signing-cert-file=, --cluster-signing-key-file="))
    assert Component.CONTROLLER_MANAGER in read_node(settings.node).manifests
    steps.assert_keys_can_leave(
        [planning.planned(Verb.TRUST, places.look(settings, read_node(settings.node), ["ca"])["ca"], None)],
        read_node(settings.node),
        settings,
        RotationOptions(),
    )


@pytest.mark.parametrize("case", ["relative", "missing", "open", "below pki"])
def test_a_place_that_others_read_takes_no_key(settings: Settings, pki: Pki, disk: Path, case: str) -> None:
    """A key goes neither to a place that others can read nor to one that is read here again; the disk itself is taken."""
    place = {"relative": Path("disk"), "missing": disk / "no", "open": disk, "below pki": pki.pki_dir / "kept"}[case]
    if case == "open":
        disk.chmod(0o755)
    (pki.pki_dir / "kept").mkdir(mode=0o700)
    with pytest.raises(SettingsError, match="--keys-to: wanted an absolute path of a directory for its owner alone"):
        places.assert_takes_keys(place, settings.node)
    disk.chmod(0o700)
    places.assert_takes_keys(disk, settings.node)


@pytest.mark.rotation("a CA's key on a node")
def test_a_key_that_lies_on_the_disk_already_is_not_lost(settings: Settings, pki: Pki, disk: Path) -> None:
    """Where kubeadm's place is a link to it, the link alone goes."""
    key, kept = pki.pki_dir / "ca.key", disk / "ca.key"
    data = key.read_bytes()
    key.rename(kept)
    key.symlink_to(kept)
    assert run(settings, Verb.TRUST, ["ca"]).exit_code == 0
    assert run(settings, Verb.ISSUE, ["ca"], to(disk)).exit_code == 0
    assert (kept.read_bytes(), os.path.lexists(key)) == (data, False)


def test_another_key_on_the_disk_is_not_replaced(settings: Settings, pki: Pki, disk: Path) -> None:
    """The exit code is 7, the message says so, and the key stays where it is."""
    (disk / "ca.key").write_bytes(b"another cluster's")
    assert run(settings, Verb.TRUST).exit_code == 0
    done = run(settings, Verb.ISSUE, options=to(disk))
    assert done.exit_code == Exit.NOT_LIVE
    assert [isinstance(one, places.KeyLeftError) for one in done.result.errors] == [True]
    assert (pki.pki_dir / "ca.key").exists()
    assert (disk / "ca.key").read_bytes() == b"another cluster's"


def mounted(directory: Path, place: Path) -> None:
    """Mount a directory at another place, in a mount namespace that this process alone sees from now on."""
    assert ctypes.CDLL(None, use_errno=True).unshare(_NEW_MOUNTS) == 0, os.strerror(ctypes.get_errno())
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", directory, place], check=True)


def in_child(work: Callable[[], None]) -> int:
    """Do something in a process of its own, and return its exit code: 0 if it raised no error."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 (the test must not go on in the child)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.attack("E6")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
@pytest.mark.parametrize("again", [".", "etcd"])
@pytest.mark.rotation("a CA's key on a node")
def test_a_pki_directory_that_is_mounted_twice_loses_no_key(
    settings: Settings, pki: Pki, disk: Path, again: str
) -> None:
    """The same directory by another mount takes no key; even a step that was not refused removes no key that has no copy."""
    keys = {path: path.read_bytes() for path in pki.pki_dir.rglob("*ca.key")}
    cas = list(places.look(settings, read_node(settings.node), []).values())
    (below := pki.pki_dir / again / "below").mkdir(mode=0o700)
    (pki.pki_dir / again).chmod(0o700)

    def work() -> None:
        mounted(below.parent, disk)
        for directory in (disk, disk / below.name):
            with pytest.raises(SettingsError, match="perhaps by another mount"):
                places.assert_takes_keys(directory, settings.node)
        list(places.take_keys_away(cas, settings.node, disk))

    assert in_child(work) == 0
    left = {data for path in pki.pki_dir.rglob("*.key") for data in [path.read_bytes()]}
    assert left >= {*keys.values()}


@pytest.mark.attack("E15")
def test_a_linked_directory_gives_up_its_keys_at_once(settings: Settings, pki: Pki, disk: Path, tmp_path: Path) -> None:
    """Where the directory of kubeadm's place is a link, its path and its real path are one file: removed once, without an error."""
    (pki.pki_dir / "etcd").rename(tmp_path / "etcd")
    (pki.pki_dir / "etcd").symlink_to(tmp_path / "etcd")
    assert run(settings, Verb.TRUST).exit_code == 0
    done = run(settings, Verb.ISSUE, options=to(disk))
    assert (done.exit_code, done.result.errors) == (0, ())
    assert not list(tmp_path.glob("**/etcd/ca.key"))
    assert {path.name for path in disk.iterdir()} == {f"{name}.key" for name in AUTHORITIES}
