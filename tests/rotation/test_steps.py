"""A node passes all phases with real CAs, killed or not, and comes back from each."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from bridge import monitoring
from bridge.cli import renew as cli_renew
from bridge.cli import rotate_ca
from bridge.cli.options import Output, utc_now
from bridge.control_plane.probes import ProofState
from bridge.control_plane.proof import ProofFinding, ProofReport
from bridge.diagnosis import Finding
from bridge.diagnosis.examination import examine
from bridge.errors import BridgeError, Exit, SettingsError
from bridge.node import kubeconfig
from bridge.node.reading import read_node
from bridge.pki.certificates import load_pem_certificates, pem
from bridge.pki.csr import key_pem
from bridge.renewal import renew
from bridge.renewal.gate import Attempts
from bridge.renewal.selection import Changes, RunOptions
from bridge.renewal.transaction import put_back_and_retire
from bridge.rotation import Phase, places, planning, steps
from bridge.rotation.planning import Verb
from bridge.rotation.readiness import NotReadyEverywhereError, RotationOptions, SplitError, has_asked
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES, CA, Component
from bridge.state import Store, audit, backups, install
from bridge.state.obligations import unproven_file
from bridge.state.session import begun
from bridge.system.waiting import wait_until
from tests.kit import next_cas, opensslca
from tests.kit.cas import Bridge, add_openssl
from tests.kit.desks import POLICY, Desk, make_desk
from tests.kit.issuing import Signer
from tests.kit.pairs import assert_pairs
from tests.kit.pki import Pki, finalize, handmade_pki, kubeadm_pki
from tests.kit.renewing import Quiet, settings_for
from tests.kit.rotating import BACK, FORWARD, Open, as_worker, contents, phases, reach, run, with_next
from tests.kit.serving import add_door, running
from tests.kit.static_pod import attempt
from tests.kit.tripwire import kill

pytestmark = pytest.mark.usefixtures("no_process_here")

#: What a desk's policy grants beside kubeadm's names: those of the node here.
_ADDRESSES = "".join(
    f'\n[certificate.{name}]\nsans = ["{{node}}", "localhost", "kubernetes", ".default.svc", "kubernetes.default", '
    '"kubernetes.default.svc", ".svc.cluster.local", ".example.com", "*.wild.example.com", "0.0.0.0/0", "::/0"]\n'
    for name in ("apiserver", "etcd-server", "etcd-peer")
)


@pytest.mark.kube
@pytest.mark.rotation("order of the CA file", "kubeconfigs behind the CA file", "CA files", "kubeconfigs")
def test_kubeadm_takes_the_node_in_each_phase_and_back(tmp_path: Path) -> None:
    """All three CAs at once: each certificate has its key and its CA, and each verb, said again, has nothing to do."""
    pki = kubeadm_pki(tmp_path / "node", algorithm="ECDSA-P256")
    settings = with_next(pki, tmp_path)
    assert phases(settings) == dict.fromkeys(AUTHORITIES, "old")
    for verb, phase in (*FORWARD, *BACK):
        done = run(settings, verb)
        assert done.exit_code == 0, done.result
        assert phases(settings) == dict.fromkeys(AUTHORITIES, phase)
        assert_pairs(pki)
        pki.run_kubeadm("certs", "check-expiration")
        pki.run_kubeadm("init", "phase", "kubeconfig", "all")
        if verb is not Verb.BACK:
            assert all(step.is_there for step in run(settings, verb).steps)


@pytest.mark.parametrize(
    ("what", "state", "is_held_back"),
    [
        ("has read /etc/kubernetes/scheduler.conf", "stale", True),
        ("has read the CAs of /etc/kubernetes/kubelet.conf", "stale", True),
        ("has read /etc/kubernetes/scheduler.conf", "current", False),
        ("has read /var/lib/kubelet/pki/kubelet-client-current.pem", "stale", False),
    ],
)
def test_a_node_does_not_say_that_it_trusts_a_ca_that_a_component_has_not_read(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, what: str, state: ProofState, is_held_back: bool
) -> None:
    """Where an operator restarts, other nodes wait for that; a certificate that a kubelet has rotated itself is no CA."""
    finding = ProofFinding(component=None, certificate="", what=what, state=state, detail="")
    monkeypatch.setattr("bridge.control_plane.proof.by_files", lambda *_: ProofReport(findings=(finding,)))
    said: list[str] = []
    monkeypatch.setattr(Quiet, "note", lambda _, text: said.append(text))
    assert run(settings, Verb.TRUST, ["ca"]).exit_code == 0
    assert any(text.startswith("not said to other nodes") for text in said) is is_held_back
    said.clear()
    assert run(settings, Verb.TRUST, ["front-proxy-ca"]).exit_code == 0
    assert not any(text.startswith("not said to other nodes") for text in said)


def verifying(pki: Pki, version: str) -> None:
    """An API server of this node that verifies kubelets by the cluster's CA."""
    path = pki.kubeconfig_dir / "manifests/kube-apiserver.yaml"
    path.parent.mkdir()
    command = json.dumps(["kube-apiserver", f"--kubelet-certificate-authority={pki.pki_dir}/ca.crt"])
    container = f"{{name: kube-apiserver, image: 'registry.k8s.io/kube-apiserver:{version}', command: {command}}}"
    path.write_text(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: kube-apiserver}\n" + f"spec: {{containers: [{container}]}}\n"
    )


def see_as_unread(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its age, the API server has not read the cluster's CA file."""
    read = ProofFinding(
        component=Component.APISERVER,
        certificate="apiserver-kubelet-client",
        what=f"has read the CAs of {pki.pki_dir}/ca.crt",
        state="stale",
        detail="",
    )
    monkeypatch.setattr("bridge.control_plane.proof.by_files", lambda *_: ProofReport(findings=(read,)))


@pytest.mark.parametrize(("version", "reads_once"), [("v1.34.4", True), ("v1.36.0", False), ("v1.37.2", False)])
def test_an_api_server_that_verifies_kubelets_and_reads_their_ca_once_is_restarted(
    settings: Settings, pki: Pki, monkeypatch: pytest.MonkeyPatch, version: str, reads_once: bool
) -> None:
    """Before 1.36, for each change of the CAs in the file; other nodes wait until it has read them."""
    verifying(pki, version)
    by_hand = dataclasses.replace(settings, restart=dataclasses.replace(settings.restart, method="none"))
    see_as_unread(pki, monkeypatch)
    said: list[str] = []
    monkeypatch.setattr(Quiet, "note", lambda _, text: said.append(text))
    for verb in (Verb.TRUST, Verb.ISSUE, Verb.DROP):
        Store(settings.node.state_dir).unproven.unlink(missing_ok=True)
        said.clear()
        done = run(by_hand, verb, ["ca"])
        assert phases(settings)["ca"] == dict(FORWARD)[verb]
        assert any(text.startswith("not said to other nodes") for text in said) is reads_once
        if verb is not Verb.ISSUE:  # whose certificates any restart reads
            assert (Component.APISERVER in done.to_restart) is reads_once
    Store(settings.node.state_dir).unproven.unlink(missing_ok=True)
    assert Component.APISERVER not in run(by_hand, Verb.TRUST, ["front-proxy-ca"]).to_restart


def test_cas_that_could_not_be_installed_leave_nothing_to_restart(
    settings: Settings, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was owed before stays owed, and nothing else; the audit log has the failure. Without one, restarts are owed."""
    verifying(pki, "v1.34.4")
    see_as_unread(pki, monkeypatch)
    store = Store(settings.node.state_dir)

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(pki.pki_dir))

    def fails(verb: Verb) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(install, "_stage", read_only)
            with pytest.raises(install.InstallError, match="nothing was replaced"):
                run(settings, verb, ["ca"])
        newest = list(audit.events(store, None, "ca"))[-1]
        assert (newest["event"], "nothing was replaced" in newest["result"]) == (audit.FAILED, True)

    fails(Verb.TRUST)
    assert not store.unproven.exists()
    assert run(settings, Verb.TRUST, ["ca"]).to_restart == [Component.APISERVER]
    owed = unproven_file(store).read()
    assert owed is not None
    fails(Verb.BACK)
    assert unproven_file(store).read() == owed


def test_new_certificates_that_a_gate_refuses_leave_nothing_to_restart(settings: Settings, pki: Pki) -> None:
    """An emergency writes down what has to read the CAs before it shows the certificates to other servers."""
    verifying(pki, "v1.34.4")
    store = Store(settings.node.state_dir)

    class Refusing(Open):
        def assert_accepted(self, *_: object) -> None:
            assert store.unproven.exists()
            raise SplitError("refused")

    with pytest.raises(SplitError):
        run(settings, Verb.DROP, ["ca"], Refusing(emergency=True))
    assert not store.unproven.exists()
    run(settings, Verb.DROP, ["ca"], Open(emergency=True))
    assert store.unproven.exists()


@pytest.mark.parametrize(
    ("error", "is_counted"),
    [(NotReadyEverywhereError("cp-2 is down"), False), (planning.NewCaError("another CA"), True)],
)
def test_another_node_that_is_not_ready_is_no_failure_of_the_ca(
    settings: Settings, error: BridgeError, is_counted: bool
) -> None:
    """Renewals by a CA that answers make no pause, however often `issue` was tried; an unfit answer is the CA's."""
    reach(settings, Verb.TRUST)

    class Refusing(Open):
        def assert_accepted(self, *_: object) -> None:
            raise error

    with pytest.raises(type(error)):
        run(settings, Verb.ISSUE, options=Refusing())
    assert bool(Attempts(Store(settings.node.state_dir)).authorities) is is_counted


@pytest.mark.kube
@pytest.mark.parametrize(("reached", "count"), [(None, 1), (Verb.TRUST, 2)])
def test_a_kubeconfig_that_is_made_anew_trusts_the_cas_of_the_phase(
    tmp_path: Path, reached: Verb | None, count: int
) -> None:
    """With one of two the API server of a node that is further would be refused; the phase stays what it is."""
    pki = kubeadm_pki(tmp_path / "node", algorithm="ECDSA-P256")
    settings = with_next(pki, tmp_path)
    reach(settings, reached)
    before, conf = phases(settings), pki.kubeconfig_dir / "admin.conf"
    conf.unlink()
    options = RunOptions(names=("admin.conf",), changes=Changes(kubeadm_config=pki.config_file))
    assert renew.run(settings, options, utc_now, Quiet())[0].exit_code == 0
    assert len(load_pem_certificates(kubeconfig.parse(conf.read_bytes()).ca_data or b"")) == count
    assert phases(settings) == before


@pytest.mark.kube
def test_a_back_is_not_done_while_a_certificate_that_no_backup_has_is_the_new_cas(tmp_path: Path) -> None:
    """It was made after `issue`; no word goes to other nodes, and the command in the hint completes the phase."""
    pki = kubeadm_pki(tmp_path / "node", algorithm="ECDSA-P256")
    settings, conf = with_next(pki, tmp_path), pki.kubeconfig_dir / "admin.conf"
    reach(settings, Verb.TRUST)
    conf.unlink()
    assert run(settings, Verb.ISSUE).exit_code == 0
    options = RunOptions(names=("admin.conf",), changes=Changes(kubeadm_config=pki.config_file))
    assert renew.run(settings, options, utc_now, Quiet())[0].exit_code == 0
    done = run(settings, Verb.BACK)
    assert (done.exit_code, done.phases["ca"]) == (Exit.FAILED, "trusted → issued")
    [error] = done.result.errors
    assert str(error).startswith("admin.conf: wanted certificates of the CA before")
    assert "`ca-bridge renew admin.conf`" in error.hint
    assert renew.run(settings, RunOptions(names=("admin.conf",)), utc_now, Quiet())[0].exit_code == 0
    assert phases(settings) == dict.fromkeys(AUTHORITIES, "trusted")
    assert all(step.is_there for step in run(settings, Verb.TRUST).steps)


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_kubelet_whose_pair_is_lost_trusts_the_new_ca(settings: Settings, pki: Pki, is_lost: bool) -> None:
    """Its kubeconfig has the CAs of the phase, whatever has become of the files that it refers to."""
    current = finalize(pki)
    if is_lost:
        current.unlink()
    assert run(settings, Verb.TRUST, ["ca"]).exit_code == 0
    assert phases(settings)["ca"] == "trusted"
    found = kubeconfig.parse((pki.kubeconfig_dir / "kubelet.conf").read_bytes()).ca_data
    assert len(load_pem_certificates(found or b"")) == 2


@pytest.mark.parametrize(("version", "reads_once"), [("v1.35.4", True), ("v1.36.0", False)])
def test_the_plan_says_that_an_api_server_is_restarted_which_verifies_kubelets(
    pki: Pki, tmp_path: Path, version: str, reads_once: bool
) -> None:
    """In both phases that change the CAs in the file; a later version reads them again."""
    verifying(pki, version)
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    add_openssl(bridge, "ca")
    bridge.add("authority.ca.next", next_cas.make(tmp_path / "next")["ca"].table)
    planned = " ".join(bridge.run("rotate-ca", "plan").stdout.split())
    assert planned.count("and the API server, which verifies kubelets") == (2 if reads_once else 0)


def test_one_ca_alone(settings: Settings) -> None:
    """Its files and no others."""
    done = run(settings, Verb.TRUST, ["etcd-ca"])
    assert [step.ca.name for step in done.steps] == ["etcd-ca"]
    assert phases(settings) == {"ca": "old", "etcd-ca": "trusted", "front-proxy-ca": "old"}
    assert run(settings, Verb.BACK, ["etcd-ca"]).exit_code == 0
    assert phases(settings) == dict.fromkeys(AUTHORITIES, "old")


def test_a_further_pair_goes_with_its_ca(pki: Pki, tmp_path: Path) -> None:
    """The new CA signs it with all others of the node, and its program reads it again, on the way back, too."""
    place, reads, program = tmp_path / "registry", tmp_path / "reads", tmp_path / "reload"
    place.mkdir()
    program.write_text(f"#!/bin/sh\necho >> {reads}\n")
    program.chmod(0o755)
    pair = (
        f'[certificate.registry]\ncertificate_file = "{place}/tls.crt"\nkey_file = "{place}/tls.key"\nauthority = "ca"\n'
        f'common_name = "r.example.com"\nsans = ["r.example.com"]\nreload = "{program}"\n'
    )
    settings = with_next(pki, tmp_path, pair)
    result, _, _ = renew.run(settings, RunOptions(names=("registry",)), utc_now, Quiet())
    assert result.exit_code == 0, result
    first, seen = (place / "tls.crt").read_bytes(), []
    for verb, phase in (*FORWARD, *BACK):
        done = run(settings, verb, ["ca"])
        assert done.exit_code == 0, done.result
        assert phases(settings)["ca"] == phase
        seen.append((phase, (place / "tls.crt").read_bytes() == first, len(reads.read_text())))
    assert seen == [
        *(("trusted", True, 1), ("issued", False, 2), ("new", False, 2)),
        *(("issued", False, 2), ("trusted", True, 3), ("old", True, 3)),
    ]


@pytest.mark.parametrize(
    ("reached", "verb", "wanted"),
    [
        (None, Verb.ISSUE, "wanted the phase “trusted” on this node before `issue`, found “old”"),
        (None, Verb.DROP, "wanted the phase “issued” on this node before `drop`, found “old”"),
        (Verb.TRUST, Verb.DROP, "wanted the phase “issued” on this node before `drop`, found “trusted”"),
        (Verb.ISSUE, Verb.TRUST, "wanted a node that is not further than “trusted”, found “issued”"),
        (Verb.DROP, Verb.ISSUE, "wanted a node that is not further than “issued”, found “new”"),
    ],
)
def test_a_verb_out_of_order_changes_nothing(
    settings: Settings, pki: Pki, reached: Verb | None, verb: Verb, wanted: str
) -> None:
    """It says which comes first."""
    reach(settings, reached)
    before = contents(pki)
    with pytest.raises(planning.OrderError, match=wanted):
        run(settings, verb)
    assert contents(pki) == before


@pytest.mark.rotation("a chain for an anchor")
def test_a_new_ca_that_can_not_work_is_refused_before_anything_moves(settings: Settings, pki: Pki) -> None:
    """Two CAs with one key; a file with two certificates."""
    before, anchors = contents(pki), {n: Path(settings.authorities[n].next["anchor"]) for n in AUTHORITIES}
    good = anchors["etcd-ca"].read_bytes()
    anchors["etcd-ca"].write_bytes(anchors["ca"].read_bytes())
    with pytest.raises(planning.NewCaError, match="key: wanted another than"):
        run(settings, Verb.TRUST)
    anchors["etcd-ca"].write_bytes(good + good)
    with pytest.raises(places.UnreadableCaError, match="wanted one certificate, of the CA that signs, found 2"):
        run(settings, Verb.TRUST)
    anchors["etcd-ca"].write_bytes(good)
    assert contents(pki) == before
    assert run(settings, Verb.TRUST).exit_code == 0


def test_a_verb_without_a_next_ca_has_not_done_its_work(
    pki: Pki, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table was forgotten on this node; a worker that has none of the CAs with a next one has no work."""
    with pytest.raises(BridgeError, match="the settings have no authority with a next CA"):
        run(settings_for(pki, tmp_path), Verb.TRUST)
    settings = with_next(pki, tmp_path / "next")
    as_worker(settings, pki)
    done = run(settings, Verb.TRUST, ["etcd-ca"])
    assert done.exit_code == 0
    rotate_ca._say_done(done, settings)
    assert capsys.readouterr().out.startswith("nothing to do on this node")


@pytest.mark.parametrize(("verb", "is_done"), [(Verb.BACK, True), (Verb.TRUST, False)])
def test_a_new_ca_that_has_ended_holds_up_no_way_back(settings: Settings, verb: Verb, is_done: bool) -> None:
    """The node trusts the old CA alone again; each other verb refuses the new one."""
    reach(settings, Verb.TRUST)
    new = places.look(settings, read_node(settings.node), ["ca"])["ca"].change.new

    def after() -> datetime:
        return new.not_valid_after_utc + timedelta(minutes=1)

    with contextlib.nullcontext() if is_done else pytest.raises(planning.NewCaError, match="notAfter"):
        assert steps.run(settings, verb, ["ca"], after, Quiet(), Open()).exit_code == 0
    assert phases(settings)["ca"] == ("old" if is_done else "trusted")


def test_a_cross_certificate_that_has_ended_holds_up_no_drop(pki: Pki, tmp_path: Path) -> None:
    """It ends with the old CA at the latest, which certifies no other one then; `issue` needs one that lasts."""
    settings = with_next(pki, tmp_path, cross=True)
    reach(settings, Verb.ISSUE)
    cross = places.look(settings, read_node(settings.node), ["ca"])["ca"].change.cross
    assert cross is not None
    end = cross.not_valid_after_utc

    def after() -> datetime:
        return end + timedelta(minutes=1)

    with pytest.raises(planning.NewCaError, match="cross certificate's notAfter"):
        steps.run(settings, Verb.ISSUE, ["ca"], after, Quiet(), Open())
    assert steps.run(settings, Verb.DROP, ["ca"], after, Quiet(), Open()).exit_code == 0
    assert phases(settings)["ca"] == "new"


def test_a_back_to_a_ca_that_no_backup_has_changes_nothing_and_says_the_way(settings: Settings, pki: Pki) -> None:
    """Old backups are deleted; with the old CA's certificate in the file again the same command goes on."""
    old = (pki.pki_dir / "ca.crt").read_bytes()
    reach(settings, Verb.DROP)
    shutil.rmtree(settings.node.state_dir / "backups")
    before = contents(pki)
    with pytest.raises(planning.NoWayBackError, match="no backup has the CA before") as refused:
        run(settings, Verb.BACK, ["ca"])
    assert contents(pki) == before
    assert f"append its certificate to {pki.pki_dir}/ca.crt" in refused.value.hint
    with (pki.pki_dir / "ca.crt").open("ab") as file:
        file.write(old)
    assert run(settings, Verb.BACK, ["ca"]).exit_code == 0
    assert phases(settings)["ca"] == "issued"


def test_the_way_back_outlives_many_renewals(settings: Settings, pki: Pki) -> None:
    """While the settings have a next CA, the backup of `issue` is deleted neither for its number nor for its age; others are."""
    reach(settings, Verb.TRUST)
    trusted = contents(pki)
    kept = dataclasses.replace(settings.backups, keep=1, keep_for=timedelta())
    settings = dataclasses.replace(settings, backups=kept)
    assert run(settings, Verb.ISSUE).exit_code == 0
    for _ in range(3):
        assert renew.run(settings, RunOptions(names=("front-proxy-client",)), utc_now, Quiet())[0].exit_code == 0
    assert len(backups.read_all(Store(settings.node.state_dir))[0]) == 2
    assert run(settings, Verb.BACK).exit_code == 0
    assert contents(pki) == trusted


def test_cas_that_were_issued_one_by_one_go_back_one_by_one(settings: Settings) -> None:
    """No backup has the certificates of all; the hint names the option."""
    reach(settings, Verb.TRUST)
    for name in ("ca", "etcd-ca"):
        assert run(settings, Verb.ISSUE, [name]).exit_code == 0
    with pytest.raises(planning.NoWayBackError) as refused:
        run(settings, Verb.BACK, ["ca", "etcd-ca"])
    assert "one by one go back so: --ca ca" in refused.value.hint
    for name in ("ca", "etcd-ca"):
        assert run(settings, Verb.BACK, [name]).exit_code == 0
    assert set(phases(settings).values()) == {"trusted"}


def test_a_back_that_was_killed_stays_the_same_one_while_another_ca_goes_back(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed behind its installation: repeated, it goes back no further; the next one does."""
    reach(settings, Verb.ISSUE)
    with monkeypatch.context() as killed:
        killed.setattr(steps, "_with_objects", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(settings, Verb.BACK, ["ca"])
    assert run(settings, Verb.BACK, ["etcd-ca"]).exit_code == 0
    for phase in ("trusted", "old"):
        assert run(settings, Verb.BACK, ["ca"]).exit_code == 0
        assert phases(settings) == {"ca": phase, "etcd-ca": "trusted", "front-proxy-ca": "issued"}
    assert not Store(settings.node.state_dir).going_back.exists()


def test_a_back_that_a_gate_refuses_leaves_no_trace(settings: Settings) -> None:
    """Another node is away: the next `back` may have another target."""
    reach(settings, Verb.ISSUE)

    class Refusing(Open):
        def assert_accepted(self, *_: object) -> None:
            raise NotReadyEverywhereError("cp-2 is down")

    with pytest.raises(NotReadyEverywhereError):
        run(settings, Verb.BACK, options=Refusing())
    assert not Store(settings.node.state_dir).going_back.exists()


def raising(error: BaseException) -> Callable[..., None]:
    """Raise it, whatever the arguments."""

    def work(*_: object, **__: object) -> None:
        raise error

    return work


def test_each_entry_of_this_cluster_in_a_kubeconfig_follows(settings: Settings, pki: Pki) -> None:
    """Another cluster's entry stays as it is."""
    path = pki.kubeconfig_dir / "admin.conf"
    other, strange = yaml.safe_load(path.read_text()), pem(Signer.make("another cluster").certificate)
    first = other["clusters"][0]["cluster"]
    other["clusters"] += [
        {"name": "local", "cluster": {**first, "server": "https://127.0.0.1:6443"}},
        {"name": "other", "cluster": {**first, "certificate-authority-data": base64.b64encode(strange).decode()}},
    ]
    path.write_text(yaml.safe_dump(other))
    for verb, phase in (*FORWARD, *BACK):
        assert run(settings, verb, ["ca"]).exit_code == 0
        assert phases(settings)["ca"] == phase
        data = [one["cluster"]["certificate-authority-data"] for one in yaml.safe_load(path.read_text())["clusters"]]
        mine, local, strangers = (set(load_pem_certificates(base64.b64decode(one))) for one in data)
        assert mine == local
        assert pem(*strangers) == strange


@pytest.mark.parametrize("name", ["apiserver", "front-proxy-client"])
def test_a_certificate_that_can_not_be_read_is_not_taken_for_one_of_the_new_ca(
    settings: Settings, pki: Pki, name: str
) -> None:
    """Its component goes on with what it has in memory; one that is not there at all holds up nothing."""
    reach(settings, Verb.TRUST)
    path = pki.pki_dir / f"{name}.crt"
    good = path.read_bytes()
    path.write_bytes(b"cut off")
    before = contents(pki)
    with pytest.raises(places.UnreadableCaError, match=f"{name}: wanted a certificate in {path}"):
        run(settings, Verb.ISSUE)
    assert contents(pki) == before
    path.write_bytes(good)
    assert run(settings, Verb.ISSUE).exit_code == 0
    path.write_bytes(b"cut off")
    with pytest.raises(places.UnreadableCaError, match=name):
        run(settings, Verb.DROP)
    path.unlink()
    assert run(settings, Verb.DROP).exit_code == 0


@pytest.mark.rotation("an anchor that signs for others")
def test_a_ca_above_the_one_that_signs_is_not_trusted_unless_the_settings_say_so(
    settings: Settings, pki: Pki, tmp_path: Path
) -> None:
    """Holders of its other certificates would be users of this cluster; the backend says which certificate signs."""
    before, ca = contents(pki), settings.authorities["ca"]
    signing = Signer.load(*(Path(ca.next["dir"], name).read_bytes() for name in ("ca.crt", "ca.key")))
    above = Signer.make(
        "corp root", key_id=True, begin=utc_now() - timedelta(days=1), end=utc_now() + timedelta(days=5000)
    )
    (tmp_path / "above.crt").write_bytes(pem(above.certificate))
    table = {**ca.next, "anchor": str(tmp_path / "above.crt")}

    def named(**more: str) -> Settings:
        ours = dataclasses.replace(ca, next={**table, **more})
        return dataclasses.replace(settings, authorities={**settings.authorities, "ca": ours})

    with pytest.raises(
        planning.NewCaError, match=r"wanted the certificate of the CA that signs \(CN=ca-2 .*found CN=corp root"
    ):
        run(named(), Verb.TRUST, ["ca"])
    assert contents(pki) == before
    assert pem(signing.certificate) != (tmp_path / "above.crt").read_bytes()
    assert run(named(above="allowed"), Verb.TRUST, ["ca"]).exit_code == 0
    assert run(named(above="allowed"), Verb.BACK, ["ca"]).exit_code == 0
    assert run(settings, Verb.TRUST, ["ca"]).exit_code == 0


def test_answers_of_a_ca_below_the_anchor_are_refused_where_the_backend_could_not_be_asked(
    settings: Settings, pki: Pki, tmp_path: Path
) -> None:
    """The files stay as they are; with `next.above` the certificates are installed."""
    ca, begin, end = (
        settings.authorities["front-proxy-ca"],
        utc_now() - timedelta(days=1),
        utc_now() + timedelta(days=5000),
    )
    above = Signer.make("corp root", key_id=True, begin=begin, end=end)
    below = Signer.make("corp issuing", parent=above, key_id=True, begin=begin, end=end)
    place = opensslca.make_ca_directory(tmp_path / "below", pem(below.certificate), key_pem(below.key))
    (tmp_path / "above.crt").write_bytes(pem(above.certificate))
    table = {**ca.next, "anchor": str(tmp_path / "above.crt"), "dir": str(place)}

    def named(**more: str) -> Settings:
        ours = dataclasses.replace(ca, next={**table, **more})
        return dataclasses.replace(settings, authorities={**settings.authorities, "front-proxy-ca": ours})

    assert run(named(above="allowed"), Verb.TRUST, ["front-proxy-ca"]).exit_code == 0
    before = contents(pki)
    with pytest.raises(
        planning.NewCaError, match=r"wanted a signature of CN=corp root .*found one of CN=corp issuing below"
    ):
        run(named(), Verb.ISSUE, ["front-proxy-ca"])
    assert contents(pki) == before
    assert run(named(above="allowed"), Verb.ISSUE, ["front-proxy-ca"]).exit_code == 0


@pytest.mark.parametrize(("kind", "is_silent"), [("cmp", True), ("openssl", False)])
def test_the_plan_says_which_backend_does_not_tell_the_certificate_that_signs(
    pki: Pki, tmp_path: Path, kind: str, is_silent: bool
) -> None:
    """A CMP server has no such message; an `openssl ca` directory has the certificate."""
    bridge, made = Bridge(pki=pki, directory=tmp_path / "bridge"), next_cas.make(tmp_path / "next")["ca"]
    add_openssl(bridge, "ca")
    secret = {"reference": "r", "secret_file": bridge.secret("cmp.secret", "s")}
    bridge.add(
        "backend.next", {"type": "cmp", "url": "http://127.0.0.1:1", **secret} if kind == "cmp" else {"type": kind}
    )
    own = {} if kind == "cmp" else {"dir": made.table["dir"]}
    bridge.add("authority.ca.next", {"anchor": made.table["anchor"], "backend": "next", **own})
    planned = bridge.run("rotate-ca", "plan")
    assert planned.returncode == 0, planned.stderr
    assert ("next (cmp) does not say which certificate signs" in " ".join(planned.stdout.split())) is is_silent
    columns = bridge.run("rotate-ca", "status").stdout.splitlines()[0]
    assert columns.split() == ["CA", "PHASE", "SINCE", "OLD", "NEW"]


def test_a_new_ca_that_others_can_change_is_not_trusted(settings: Settings, pki: Pki) -> None:
    """The whole cluster would trust what they put there."""
    before, anchor = contents(pki), Path(settings.authorities["ca"].next["anchor"])
    anchor.chmod(0o666)
    with pytest.raises(SettingsError, match="wanted a file that only its owner can write to"):
        run(settings, Verb.TRUST)
    anchor.unlink()
    with pytest.raises(SettingsError, match="there is no such file, and the certificate of ca's next CA is needed"):
        run(settings, Verb.TRUST)
    assert contents(pki) == before


def test_a_kubeconfig_that_names_a_ca_file_gets_its_certificate_alone(settings: Settings, pki: Pki) -> None:
    """It trusts what the file says, whose content follows the phases."""
    conf = pki.kubeconfig_dir / "admin.conf"
    data = kubeconfig.ca_data(conf.read_bytes()) or b""
    embedded = f"certificate-authority-data: {base64.b64encode(data).decode()}"
    assert embedded in conf.read_text()
    conf.write_text(conf.read_text().replace(embedded, f"certificate-authority: {pki.pki_dir}/ca.crt"))
    for verb, phase in (*FORWARD, *BACK):
        done = run(settings, verb)
        assert (done.exit_code, done.phases) == (0, dict.fromkeys(AUTHORITIES, phase)), done.result
        assert kubeconfig.parse(conf.read_bytes()).ca_file == f"{pki.pki_dir}/ca.crt"


def test_a_rotation_by_other_means_is_left_alone(settings: Settings, pki: Pki) -> None:
    """A file with three CAs fits no phase."""
    path = pki.pki_dir / CA.certificate_file
    path.write_bytes(path.read_bytes() * 1 + pem(Signer.make("another").certificate))
    with pytest.raises(planning.OrderError, match="wanted the files of a phase"):
        run(settings, Verb.TRUST, ["ca"])


def test_the_night_asks_the_ca_that_signs(settings: Settings) -> None:
    """The old one before `issue`, the new one after it and after the end; nothing in the settings is edited."""
    for reached, issuer in ((Verb.TRUST, "kubernetes"), (Verb.ISSUE, "ca-2"), (Verb.DROP, "ca-2")):
        assert run(settings, reached).exit_code == 0
        quiet = renew.run(settings, RunOptions(), utc_now, Quiet())[0]
        assert (quiet.exit_code, quiet.renewed) == (0, [])
        renewed = renew.run(settings, RunOptions(names=("apiserver",)), utc_now, Quiet())[0]
        assert renewed.exit_code == 0, renewed
        [leaf] = [outcome.new for outcome in renewed.renewed if outcome.new is not None]
        assert leaf.issuer.rfc4514_string() == f"CN={issuer}"


def test_a_ca_that_can_not_sign_leaves_the_phase_as_it_was(settings: Settings, pki: Pki) -> None:
    """All or nothing: one of the three new CAs is away, and no file of the others is another one."""
    reach(settings, Verb.TRUST)
    before, place = contents(pki), Path(settings.authorities["etcd-ca"].next["dir"])
    place.rename(place.with_name("away"))
    assert run(settings, Verb.ISSUE).exit_code != 0
    assert contents(pki) == before
    place.with_name("away").rename(place)
    assert run(settings, Verb.ISSUE).exit_code == 0
    assert phases(settings) == dict.fromkeys(AUTHORITIES, "issued")


@pytest.mark.rotation("our backups")
@pytest.mark.parametrize("reached", [Verb.TRUST, Verb.ISSUE, Verb.DROP])
def test_a_rollback_across_a_phase_is_refused(settings: Settings, pki: Pki, reached: Verb) -> None:
    """Forced or not, although the backup of `issue` has its own certificates; within a phase nothing stands against it."""
    reach(settings, reached)
    before = contents(pki)
    for force in (False, True):
        with pytest.raises(backups.RollbackRefusedError, match=r"ca: phase: wanted the CAs of .*rotate-ca back"):
            put_back_and_retire(settings, None, utc_now, Quiet(), force=force, wait=timedelta())
    assert contents(pki) == before
    assert renew.run(settings, RunOptions(names=("apiserver",)), utc_now, Quiet())[0].exit_code == 0
    put_back_and_retire(settings, None, utc_now, Quiet(), force=False, wait=timedelta())
    assert contents(pki) == before


@pytest.mark.parametrize("damage", [None, b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_lost_ca_file_comes_back_from_a_backup_of_the_same_phase_alone(
    settings: Settings, pki: Pki, damage: bytes | None
) -> None:
    """The kubeconfigs and the issuers of the certificates tell the phase; etcd's CA is in no kubeconfig, and is refused."""

    def lose(name: str) -> None:
        path = pki.pki_dir / f"{name}.crt"
        path.unlink() if damage is None else path.write_bytes(damage)

    def refused(backup_id: str, name: str) -> bool:
        """Whether it is refused with the reason, forced or not, and leaves all as it is."""
        before = contents(pki)
        for force in (False, True):
            with pytest.raises(backups.RollbackRefusedError, match=rf"{name}: phase: wanted the CAs of this node's"):
                put_back_and_retire(settings, backup_id, utc_now, Quiet(), force=force, wait=timedelta())
        return contents(pki) == before

    first = contents(pki)
    assert run(settings, Verb.TRUST, ["ca", "etcd-ca"]).exit_code == 0
    trusted = backups.find(Store(settings.node.state_dir), None).backup_id
    assert run(settings, Verb.BACK, ["ca", "etcd-ca"]).exit_code == 0
    assert contents(pki) == first
    lose("ca")
    assert refused(backups.find(Store(settings.node.state_dir), None).backup_id, "ca")
    put_back_and_retire(settings, trusted, utc_now, Quiet(), force=False, wait=timedelta())
    assert contents(pki) == first
    lose("etcd/ca")
    assert refused(trusted, "etcd-ca")
    (pki.pki_dir / "etcd/ca.crt").write_bytes(first[pki.pki_dir / "etcd/ca.crt"])
    for verb in (Verb.TRUST, Verb.ISSUE):
        assert run(settings, verb).exit_code == 0
    lose("ca")
    held = [each for each in backups.read_all(Store(settings.node.state_dir))[0] if backups.cas_of(each, "ca")]
    for each in held:
        assert refused(each.backup_id, "ca")  # that of `issue` has the kubeconfigs' CAs, in the order of `trusted`


def test_a_kubelets_pair_behind_its_symlink_is_no_reason_against_a_rollback(settings: Settings, pki: Pki) -> None:
    """The backup of a change of trust has the kubelet's kubeconfig, and not the pair, which stays where it is."""
    current = finalize(pki)
    reach(settings, Verb.TRUST)
    node, (trusted,) = read_node(settings.node), backups.read_all(Store(settings.node.state_dir))[0]
    assert "kubelet.conf" in trusted.names
    assert {one.subject for one in backups.problems_of(trusted, settings, node, utc_now())} == {backups.PHASE}
    current.resolve().write_bytes(b"")
    problems = [str(one) for one in backups.problems_of(trusted, settings, read_node(settings.node), utc_now())]
    assert [one for one in problems if one.startswith("kubelet.conf: wanted a certificate and its private key")]


@pytest.mark.parametrize("is_embedded", [True, False])
def test_a_worker_comes_back_from_each_phase(pki: Pki, tmp_path: Path, is_embedded: bool) -> None:
    """Its one certificate is the kubelet's, in the kubeconfig or behind a symlink; the second time, too."""
    current = None if is_embedded else finalize(pki)
    settings = with_next(pki, tmp_path)
    as_worker(settings, pki)

    def kept() -> tuple[dict[Path, bytes], bytes]:
        return contents(pki), b"" if current is None else current.read_bytes()

    before, found = kept(), []
    for verb, phase in (*FORWARD, *BACK, *FORWARD, *BACK):
        done = run(settings, verb, ["ca"])  # no API server is there that could be seen to take it
        assert done.result.exit_code in (Exit.DONE, Exit.NOT_LIVE), done.result
        assert places.look(settings, read_node(settings.node), ["ca"])["ca"].standing.text == phase
        found.append(kept())
    assert (found[5][1], found[11][1]) == (before[1], before[1])
    assert found[5] == found[11]


def prepared(directory: Path, verb: Verb) -> Settings:
    """A node on which a verb is the next one."""
    made = with_next(handmade_pki(directory / "node"), directory)
    reach(made, {Verb.TRUST: None, Verb.ISSUE: Verb.TRUST, Verb.DROP: Verb.ISSUE, Verb.BACK: Verb.ISSUE}[verb])
    return made


def assert_completed(settings: Settings, verb: Verb) -> None:
    """After the next run the files are the phase's, and each certificate has its key."""
    assert run(settings, verb).exit_code == 0
    wanted = {Verb.TRUST: "trusted", Verb.ISSUE: "issued", Verb.DROP: "new", Verb.BACK: "trusted"}[verb]
    assert phases(settings) == dict.fromkeys(AUTHORITIES, wanted)
    assert_pairs(Pki(root=settings.node.kubeconfig_dir.parents[1], external=True))


@pytest.mark.parametrize("verb", [Verb.TRUST, Verb.DROP, Verb.BACK])
@pytest.mark.rotation("half a file")
def test_a_verb_that_was_killed_at_a_call_is_completed_by_the_same_verb(tmp_path: Path, verb: Verb) -> None:
    """At calls all over the run, the commit point between them; `back` goes back by one phase all the same."""
    whole = prepared(tmp_path / "whole", verb)
    code, calls = attempt(functools.partial(run, whole, verb), 0, kill)
    assert code == 0
    for at in range(1, calls + 1, max(1, calls // 12)):
        settings = prepared(tmp_path / str(at), verb)
        assert attempt(functools.partial(run, settings, verb), at, kill)[0] == -signal.SIGKILL
        assert_completed(settings, verb)


def test_an_issue_that_was_killed_is_completed_by_the_same_verb(tmp_path: Path) -> None:
    """At moments all over the run: keys made, CAs asked, answers kept, files replaced."""
    whole, begin = prepared(tmp_path / "whole", Verb.ISSUE), time.monotonic()
    assert run(whole, Verb.ISSUE).exit_code == 0
    seconds, killed, number = time.monotonic() - begin, 0, 0
    while killed < 8 and number < 30:
        number += 1
        settings = prepared(tmp_path / str(number), Verb.ISSUE)
        child = os.fork()
        if child == 0:
            run(settings, Verb.ISSUE)
            os._exit(0)
        time.sleep(seconds * (killed + 1) / 9)
        os.kill(child, signal.SIGKILL)
        was_killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        killed += was_killed
        seconds *= 1 if was_killed else 0.8  # the first one was slower: a busy machine
        assert_completed(settings, Verb.ISSUE)
    assert killed > 3


def test_a_renewed_ca_with_the_same_key_takes_one_step(pki: Pki, tmp_path: Path) -> None:
    """No certificate is issued anew; `issue` and `drop` have nothing to do."""
    before = settings_for(pki, tmp_path)
    old = Signer.load(*pki.ca_pem("ca"))
    key_id = old.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    renewed = (
        x509.CertificateBuilder()
        .subject_name(old.certificate.subject)  # byte for byte
        .issuer_name(old.certificate.subject)
        .public_key(old.key.public_key())
        .serial_number(7)
        .not_valid_before(utc_now() - timedelta(days=1))
        .not_valid_after(utc_now() + timedelta(days=9000))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(key_id, critical=False)
        .sign(old.key, hashes.SHA256())
    )
    anchor = tmp_path / "renewed.crt"
    anchor.write_bytes(pem(renewed))
    ours = dataclasses.replace(before.authorities["ca"], next={"anchor": str(anchor)})
    settings = dataclasses.replace(before, authorities={**before.authorities, "ca": ours})
    leaves = {i.spec.name: i.certificates for i in read_node(settings.node).items}
    done = run(settings, Verb.TRUST)
    assert done.exit_code == 0, done.result
    assert phases(settings) == {"ca": "new"}
    assert all(step.is_there for verb in (Verb.ISSUE, Verb.DROP) for step in run(settings, verb).steps)
    assert {i.spec.name: i.certificates for i in read_node(settings.node).items} == leaves
    assert renew.run(settings, RunOptions(names=("apiserver",)), utc_now, Quiet())[0].exit_code == 0
    assert run(settings, Verb.BACK).exit_code == 0
    assert phases(settings) == {"ca": "old"}


def companys_desk(pki: Pki, directory: Path, made: Mapping[str, next_cas.NextCa], more: str = "") -> Desk:
    """A desk with the next CAs, which takes proofs by certificates of the old ones."""
    theirs = Pki(root=directory / "company", external=True)
    for name, ca in made.items():
        for path, data in zip(theirs.ca_files(name), (pem(ca.signer.certificate), key_pem(ca.signer.key)), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    former = ", ".join(f'"{name}" = "{pki.ca_files(name)[0]}"' for name in AUTHORITIES)
    policy = POLICY.replace("[desk]\n", f"[desk]\nformer_cas = {{ {former} }}\n") + more
    return make_desk(directory / "desk", theirs, policy=policy)


def with_next_at(backend: str, pki: Pki, directory: Path, made: Mapping[str, next_cas.NextCa]) -> Settings:
    """A node whose next CAs are all at this backend."""
    before = settings_for(pki, directory, f"[backend.door]\n{backend}")
    authorities = {
        name: dataclasses.replace(
            before.authorities[name], next={"backend": "door", "anchor": made[name].table["anchor"]}
        )
        for name in AUTHORITIES
    }
    return dataclasses.replace(before, authorities=authorities, node=dataclasses.replace(before.node, name="cp-1"))


@pytest.mark.rotation("our desk")
def test_a_desk_of_the_new_ca_answers_later(pki: Pki, tmp_path: Path) -> None:
    """Until then no file is another one, and the night leaves the requests to `issue`, due or not."""
    made = next_cas.make(tmp_path / "next")
    desk = companys_desk(pki, tmp_path, made)
    settings = with_next_at(f'type = "exchange"\noutbox = "{desk.inbox}"\ninbox = "{desk.outbox}"', pki, tmp_path, made)
    reach(settings, Verb.TRUST)
    files = contents(pki)
    asked = run(settings, Verb.ISSUE)
    assert (asked.exit_code, asked.phases) == (Exit.WAITING, dict.fromkeys(AUTHORITIES, "trusted"))
    assert contents(pki) == files
    night = renew.run(settings, RunOptions(names=("all",)), utc_now, Quiet())[0]
    assert (night.exit_code, contents(pki)) == (Exit.WAITING, files)
    assert all("the CA that takes this one's place" in str(one.error) for one in night.waiting)
    policy = desk.policy.read_text()
    desk.policy.write_text(re.sub(r"former_cas = .*\n", "", policy))
    refused = desk.run("sign", desk.inbox, "--output", desk.outbox, "--dry-run")
    assert "not signed by it (while this CA takes another one's place, the policy's desk.former_cas" in refused.stderr
    desk.policy.write_text(policy)
    signed = desk.run("sign", desk.inbox, "--output", desk.outbox)
    assert signed.returncode == 0, signed.stderr
    assert run(settings, Verb.ISSUE).exit_code == 0
    assert phases(settings) == dict.fromkeys(AUTHORITIES, "issued")
    assert renew.run(settings, RunOptions(), utc_now, Quiet())[0].exit_code == 0


def test_back_gives_up_what_the_desk_of_the_new_ca_was_asked_for(pki: Pki, tmp_path: Path) -> None:
    """The old CA renews again at once, late answers change nothing, and the way forward and back is open as before."""
    made = next_cas.make(tmp_path / "next")
    desk = companys_desk(pki, tmp_path, made)
    settings = with_next_at(f'type = "exchange"\noutbox = "{desk.inbox}"\ninbox = "{desk.outbox}"', pki, tmp_path, made)

    def signed() -> None:
        done = desk.run("sign", desk.inbox, "--output", desk.outbox)
        assert done.returncode == 0, done.stderr

    def asked() -> list[bool]:
        with begun(settings, utc_now, Quiet(), timedelta()) as (ours, _):
            return [has_asked(ours, name) for name in AUTHORITIES]

    before = contents(pki)
    reach(settings, Verb.TRUST)
    assert asked() == [False] * 3
    assert run(settings, Verb.ISSUE).exit_code == Exit.WAITING
    assert asked() == [True] * 3  # what other nodes have said counts from then on
    assert run(settings, Verb.BACK).exit_code == 0
    assert (asked(), contents(pki)) == ([False] * 3, before)
    signed()
    renewed = renew.run(settings, RunOptions(names=("apiserver", "etcd-peer", "front-proxy-client")), utc_now, Quiet())[
        0
    ]
    assert (renewed.exit_code, len(renewed.renewed)) == (0, 3), renewed
    assert phases(settings) == dict.fromkeys(AUTHORITIES, "old")
    reach(settings, Verb.TRUST)
    trusted = contents(pki)
    for _ in range(2):
        assert run(settings, Verb.ISSUE).exit_code == Exit.WAITING
        signed()
        assert run(settings, Verb.ISSUE).exit_code == 0
        assert phases(settings) == dict.fromkeys(AUTHORITIES, "issued")
        night = renew.run(settings, RunOptions(names=("apiserver",)), utc_now, Quiet())[0]
        assert night.exit_code == Exit.WAITING  # the new CA has it
        assert run(settings, Verb.BACK).exit_code == 0
        assert contents(pki) == trusted
        assert renew.run(settings, RunOptions(), utc_now, Quiet())[0].exit_code == 0


@pytest.mark.rotation("our gateway")
def test_a_new_ca_at_a_gateway_signs_when_it_can(pki: Pki, tmp_path: Path) -> None:
    """`issue` sends its requests once, and installs all answers when the last of them is there; none before."""
    made = next_cas.make(tmp_path / "next")
    desk = companys_desk(pki, tmp_path, made, _ADDRESSES)
    away = desk.ca("etcd-ca").with_name("away")
    with running(add_door(desk.config, desk.directory)) as door:
        settings = with_next_at(f'type = "door"\nurl = "{door.url}"\nca_file = "{door.ca}"', pki, tmp_path, made)
        reach(settings, Verb.TRUST)
        files = contents(pki)
        desk.ca("etcd-ca").rename(away)
        assert run(settings, Verb.ISSUE).exit_code == Exit.WAITING
        assert (phases(settings), contents(pki)) == (dict.fromkeys(AUTHORITIES, "trusted"), files)
        away.rename(desk.ca("etcd-ca"))
        done = wait_until(
            lambda: run(settings, Verb.ISSUE),
            lambda one: one.exit_code != Exit.WAITING,
            timedelta(minutes=5),
            pause_seconds=0.5,
        )
    assert done.exit_code == 0, done.result
    assert phases(settings) == dict.fromkeys(AUTHORITIES, "issued")
    assert len(desk.issued()) == len([i for i in read_node(settings.node).items if i.certificates])


@pytest.mark.rotation("an upgrade between phases")
def test_doctor_says_in_which_phase_a_ca_is(settings: Settings, pki: Pki) -> None:
    """`doctor` names each CA's phase and that a renewal would go on with the CA that signs; half a phase is a warning."""

    def found() -> list[Finding]:
        return [one for one in examine(settings, utc_now()) if one.check in ("ca-replacement", "backend")]

    seen = []
    for verb in (None, Verb.TRUST, Verb.ISSUE, Verb.DROP):
        if verb is not None:
            assert run(settings, verb).exit_code == 0
        assert [one for one in found() if one.level in ("error", "warning")] == []
        seen.append(next(one.text for one in found() if one.about == "CA ca"))
    for text, words in zip(seen, ("no phase has begun", "“trusted”", "“issued”", "has taken its place"), strict=True):
        assert words in text
    (pki.pki_dir / "ca.crt").write_bytes(
        pem(*(places.look(settings, read_node(settings.node), ["ca"])["ca"].change.bundle(Phase.ISSUED)))
    )
    assert [one.level for one in found() if one.about == "CA ca"] == ["warning"]
    (pki.pki_dir / "ca.crt").write_bytes(pem(Signer.make("another").certificate))
    assert any(one.level == "error" and "the files are of no phase" in one.text for one in found())


@pytest.mark.attack("E1")
def test_the_key_of_another_ca_of_the_node_is_refused(settings: Settings, pki: Pki) -> None:
    """Whatever `--ca` names, and if the other CA is not replaced: each kubeconfig would open etcd. Its own new CA passes."""
    keys = settings.authorities

    def of_another(anchor: Path, **others: dict[str, str]) -> Settings:
        table = {**keys["etcd-ca"].next, "anchor": str(anchor)}
        tables = {"ca": {}, "front-proxy-ca": {}, "etcd-ca": table, **others}
        named = {name: dataclasses.replace(keys[name], next=table) for name, table in tables.items()}
        return dataclasses.replace(settings, authorities=named)

    before, next_of_ca = contents(pki), Path(keys["ca"].next["anchor"])
    shared = "key: wanted another than ca's, got the same"
    for strange in (of_another(pki.pki_dir / "ca.crt"), of_another(next_of_ca, ca=keys["ca"].next)):
        with pytest.raises(planning.NewCaError, match=shared):
            run(strange, Verb.TRUST, ["etcd-ca"])
        assert contents(pki) == before
    broken = of_another(Path(keys["etcd-ca"].next["anchor"]), ca={"anchor": str(pki.root / "absent.crt")})
    assert places.look(broken, read_node(broken.node), ["etcd-ca"])["etcd-ca"].standing.phase is Phase.OLD
    with pytest.raises(planning.NewCaError, match=r"wanted another than ca's, got not known: .*absent\.crt"):
        run(broken, Verb.TRUST, ["etcd-ca"])
    assert run(of_another(Path(keys["etcd-ca"].next["anchor"])), Verb.TRUST, ["etcd-ca"]).exit_code == 0
    assert [one for one in examine(settings, utc_now()) if one.check == "ca-shared-key"] == []
    (pki.pki_dir / "etcd/ca.crt").write_bytes((pki.pki_dir / "ca.crt").read_bytes())
    found = [one for one in examine(settings, utc_now()) if one.check == "ca-shared-key"]
    assert [(one.level, one.about) for one in found] == [("error", "CA etcd-ca")]


def kubelets_own_file(settings: Settings, file: Path) -> None:
    """`clientCAFile` of the kubelet's configuration."""
    config = settings.node.kubelet_dir / "config.yaml"
    config.parent.mkdir()
    x509_config = {"kind": "KubeletConfiguration", "authentication": {"x509": {"clientCAFile": str(file)}}}
    config.write_text(yaml.safe_dump(x509_config))


def file_in_a_kubeconfig(settings: Settings, file: Path) -> None:
    """`certificate-authority`, relative to the kubeconfig."""
    conf = settings.node.kubeconfig_dir / "scheduler.conf"
    relative = os.path.relpath(file, conf.parent)
    conf.write_text(
        re.sub("certificate-authority-data: .*", f"certificate-authority: {relative}", conf.read_text(), count=1)
    )


@pytest.mark.attack("E3")
@pytest.mark.parametrize("named", [kubelets_own_file, file_in_a_kubeconfig])
def test_a_ca_file_that_no_phase_writes_holds_each_phase_up(
    named: Callable[[Settings, Path], None], settings: Settings, pki: Pki
) -> None:
    """A thief's certificates would pass there after `drop`, in an emergency too; a link to the CA file is no other file."""
    node = dataclasses.replace(settings.node, kubelet_dir=pki.root / "kubelet")
    settings = dataclasses.replace(settings, node=node)
    ca, other = pki.pki_dir / "ca.crt", pki.root / "other-ca.crt"
    other.symlink_to(ca)
    named(settings, other)
    assert places.look(settings, read_node(settings.node), ["ca"])["ca"].elsewhere == {}
    other.unlink()
    old, new = ca.read_bytes(), Path(settings.authorities["ca"].next["anchor"]).read_bytes()

    def refused(verb: Verb, words: str, options: RotationOptions | None = None) -> None:
        before = contents(pki)
        with pytest.raises(planning.ElsewhereError, match=words):
            run(settings, verb, ["ca"], options)
        assert contents(pki) == before

    def findings() -> list[str]:
        found = examine(settings, utc_now())
        return [one.text for one in found if (one.check, one.level, one.about) == ("ca-replacement", "error", "CA ca")]

    refused(Verb.TRUST, "other-ca.crt, which .* names, found: No such file")
    other.write_bytes(old)
    refused(Verb.TRUST, r"wanted CN=ca-2 \(.*\) in .*other-ca.crt, which .* names, found CN=kubernetes ")
    assert findings() == []
    other.write_bytes(old + new)
    for verb in (Verb.TRUST, Verb.ISSUE):
        assert run(settings, verb, ["ca"]).exit_code == 0
    refused(Verb.DROP, "wanted no CN=kubernetes .* any more in .*other-ca.crt")
    refused(Verb.DROP, "wanted no CN=kubernetes", Open(emergency=True))
    other.write_bytes(new)
    assert run(settings, Verb.DROP, ["ca"]).exit_code == 0
    assert findings() == []
    other.write_bytes(new + old)
    refused(Verb.DROP, "wanted no CN=kubernetes")
    assert "wanted no CN=kubernetes" in "".join(findings())


def test_a_plan_says_which_cas_are_being_replaced(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan has the words of `doctor`, which also warns of both CAs trusted for a quarter."""

    def planned() -> list[tuple[str, str]]:
        cli_renew.plan(settings, RunOptions(), utc_now(), Output.JSON)
        return [(one["about"], one["text"]) for one in json.loads(capsys.readouterr().out)["authorities"]]

    assert [text.endswith("no phase has begun") for _, text in planned()] == [True] * 3
    assert run(settings, Verb.TRUST, ["etcd-ca"]).exit_code == 0
    assert [about for about, text in planned() if "phase “trusted”, since " in text] == ["CA etcd-ca"]
    os.utime(settings.node.pki_dir / "etcd/ca.crt", times=(0, time.time() - 91 * 86400))
    found = [one for one in examine(settings, utc_now()) if one.about == "CA etcd-ca" and one.check == "ca-replacement"]
    assert [one.level for one in found] == ["warning"]


def test_the_metrics_follow_each_phase(pki: Pki, tmp_path: Path) -> None:
    """The CA file's time, and which phase; nothing where no CA is replaced."""
    settings = with_next(pki, tmp_path)
    assert run(settings, Verb.TRUST, ["ca"]).exit_code == 0
    os.utime(pki.pki_dir / "ca.crt", times=(0, 1_000_000_000))
    text = monitoring.of_node(settings, utc_now(), monitoring.known(settings, utc_now()))
    name = "ca_bridge_authority_phase_since_seconds"
    assert f'{name}{{authority="ca",phase="trusted",half_done=""}} 1000000000\n' in text
    assert f'{name}{{authority="etcd-ca",phase="old",half_done=""}} ' in text
    plain = settings_for(pki, tmp_path / "plain")
    assert name not in monitoring.of_node(plain, utc_now(), monitoring.known(plain, utc_now()))


@pytest.mark.rotation("copies of kubeconfigs")
def test_copies_of_kubeconfigs_trust_the_cas_of_each_phase(pki: Pki, tmp_path: Path) -> None:
    """Other clusters in the same file stay as they are, byte for byte."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    copy, other = home / "config", base64.b64encode(pem(Signer.make("another-cluster").certificate)).decode()
    text = (pki.kubeconfig_dir / "admin.conf").read_text()
    entry = f"- cluster:\n    certificate-authority-data: {other}\n    server: https://192.0.2.9:6443\n  name: other\n"
    copy.write_text(text.replace("clusters:\n", f"clusters:\n{entry}"))
    settings = with_next(pki, tmp_path, f'[copies]\nfiles = ["{copy}"]')
    change = places.look(settings, read_node(settings.node), ["ca"])["ca"].change
    for verb, phase in ((Verb.TRUST, Phase.TRUSTED), (Verb.ISSUE, Phase.ISSUED), (Verb.DROP, Phase.NEW)):
        done = run(settings, verb)
        assert done.exit_code == 0, done.result
        data = copy.read_bytes()
        assert set(load_pem_certificates(kubeconfig.ca_data(data) or b"")) == set(change.bundle(phase))
        assert entry.encode() in data
    live = read_node(settings.node).items
    assert any(
        i.spec.name == "admin.conf" and kubeconfig.parse(data).certificate_data == pem(*i.certificates) for i in live
    )
