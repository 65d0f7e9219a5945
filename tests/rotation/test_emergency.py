"""With a CA's key leaked a node goes straight to the new CAs, in one step that is recoverable and does not go back by itself."""

from __future__ import annotations

import dataclasses
import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest

from bridge.cli.options import utc_now
from bridge.errors import Exit
from bridge.node.reading import read_node
from bridge.pki.certificates import leads_to, load_pem_certificates, pem
from bridge.renewal import renew, verify_and_install
from bridge.renewal.selection import RunOptions
from bridge.renewal.transaction import Transaction
from bridge.rotation import objects, places, planning
from bridge.rotation.planning import Verb
from bridge.rotation.readiness import RotationOptions, SplitError
from bridge.settings import load
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES, ETCD_CA, Component
from bridge.state import Store, backups, install
from tests.kit import members, next_cas
from tests.kit.cas import Bridge, add_openssl
from tests.kit.issuing import Signer
from tests.kit.loopback import free_port
from tests.kit.pairs import assert_pairs
from tests.kit.pki import Pki, kubeadm_pki
from tests.kit.renewing import Quiet
from tests.kit.rotating import FORWARD, contents, phases, reach, run, with_next
from tests.kit.tripwire import kill

pytestmark = pytest.mark.usefixtures("no_process_here")

AT_ONCE = RotationOptions(emergency=True)


def saved(settings: Settings) -> int:
    """How many installations there were."""
    return len(backups.read_all(Store(settings.node.state_dir))[0])


@pytest.mark.kube
@pytest.mark.parametrize("reached", [None, Verb.TRUST, Verb.ISSUE])
def test_one_installation_from_each_phase(tmp_path: Path, reached: Verb | None) -> None:
    """kubeadm takes the node afterwards, and a second run has nothing to do."""
    pki = kubeadm_pki(tmp_path / "node", algorithm="ECDSA-P256")
    settings = with_next(pki, tmp_path)
    reach(settings, reached)
    before = saved(settings)
    done = run(settings, Verb.DROP, options=AT_ONCE)
    assert done.exit_code == 0, done.result
    assert (phases(settings), saved(settings)) == (dict.fromkeys(AUTHORITIES, "new"), before + 1)
    assert_pairs(pki)
    pki.run_kubeadm("certs", "check-expiration")
    pki.run_kubeadm("init", "phase", "kubeconfig", "all")
    assert all(step.is_there for step in run(settings, Verb.DROP, options=AT_ONCE).steps)
    assert renew.run(settings, RunOptions(names=("apiserver",)), utc_now, Quiet())[0].exit_code == 0


@pytest.mark.parametrize("reached", [None, Verb.TRUST])
def test_the_ca_file_of_a_further_pair_has_the_new_ca_alone(pki: Pki, tmp_path: Path, reached: Verb | None) -> None:
    """It verifies the pair that came with it, and no certificate of the thief's."""
    place = tmp_path / "registry"
    place.mkdir()
    settings = with_next(
        pki,
        tmp_path,
        f'[certificate.registry]\ncertificate_file = "{place}/tls.crt"\nkey_file = "{place}/tls.key"\n'
        f'ca_file = "{place}/ca.crt"\nauthority = "ca"\ncommon_name = "r.example.com"\nsans = ["r.example.com"]\n',
    )
    assert renew.run(settings, RunOptions(names=("registry",)), utc_now, Quiet())[0].exit_code == 0
    change = places.look(settings, read_node(settings.node), ["ca"])["ca"].change
    reach(settings, reached)
    assert run(settings, Verb.DROP, ["ca"], AT_ONCE).exit_code == 0
    assert load_pem_certificates((place / "ca.crt").read_bytes()) == [change.new]
    assert leads_to(load_pem_certificates((place / "tls.crt").read_bytes()), [change.new])


def test_cas_in_several_phases_arrive_together(settings: Settings, pki: Pki) -> None:
    """One of them trusts both CAs already, and another one has its new certificates."""
    for verb, names in ((Verb.TRUST, ["ca", "etcd-ca"]), (Verb.ISSUE, ["ca"])):
        assert run(settings, verb, names).exit_code == 0
    assert phases(settings) == {"ca": "issued", "etcd-ca": "trusted", "front-proxy-ca": "old"}
    assert run(settings, Verb.DROP, options=AT_ONCE).exit_code == 0
    assert phases(settings) == dict.fromkeys(AUTHORITIES, "new")
    assert_pairs(pki)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (renew, "remember"),  # the CAs have signed
        (verify_and_install, "install"),  # what is to be restarted is written down
        (install, "_forward"),  # the commit point
        (Transaction, "activated"),  # the files are there
        (objects, "update"),
    ],
)
def test_killed_anywhere_it_is_completed_by_the_same_command(
    settings: Settings, pki: Pki, place: object, name: str
) -> None:
    """Each certificate has its key, and its CA alone; nothing is left that was begun."""
    child = os.fork()
    if child == 0:
        setattr(place, name, lambda *_, **__: kill())
        run(settings, Verb.DROP, options=AT_ONCE)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert run(settings, Verb.DROP, options=AT_ONCE).exit_code == 0
    assert phases(settings) == dict.fromkeys(AUTHORITIES, "new")
    assert_pairs(pki)


def replaced(settings: Settings, directory: Path, signer: Signer) -> Settings:
    """The next `ca` is another one."""
    anchor = directory / "other.crt"
    anchor.write_bytes(pem(signer.certificate))
    ca = settings.authorities["ca"]
    ca = dataclasses.replace(ca, next={**ca.next, "anchor": str(anchor)})
    return dataclasses.replace(settings, authorities={**settings.authorities, "ca": ca})


def test_a_thief_of_the_key_would_have_the_next_ca_with_the_same_key(
    settings: Settings, pki: Pki, tmp_path: Path
) -> None:
    """The same key is refused, and no file changes."""
    before, old = contents(pki), Signer.load(*pki.ca_pem("ca"))
    renewed = Signer.make("kubernetes", key=old.key, begin=utc_now(), end=utc_now() + timedelta(days=9000))
    with pytest.raises(planning.OrderError, match="wanted a CA with another key"):
        run(replaced(settings, tmp_path, renewed), Verb.DROP, options=AT_ONCE)
    assert contents(pki) == before


def test_a_ca_that_was_made_just_now_will_do(settings: Settings, tmp_path: Path) -> None:
    """An hour is not waited for, nor has it to outlast the old one; without haste it has."""
    young = Signer.make(
        "young", key_id=True, begin=utc_now() - timedelta(seconds=5), end=utc_now() + timedelta(days=30)
    )
    other = replaced(settings, tmp_path, young)
    with pytest.raises(planning.NewCaError, match=r"notBefore: wanted at the latest .*; notAfter: wanted later than"):
        run(other, Verb.TRUST)
    step = planning.straight_to_the_new_ca(places.look(other, read_node(other.node), ["ca"])["ca"])
    planning.assert_possible([step], other, utc_now(), emergency=True)


def test_back_says_what_it_can_not_do(settings: Settings, pki: Pki) -> None:
    """The old CA can be trusted again; no phase before has kept its certificates."""
    assert run(settings, Verb.DROP, options=AT_ONCE).exit_code == 0
    assert run(settings, Verb.BACK).exit_code == 0
    assert phases(settings) == dict.fromkeys(AUTHORITIES, "issued")
    before = contents(pki)
    with pytest.raises(planning.NoWayBackError, match="`drop --emergency` from the phase “old” makes none"):
        run(settings, Verb.BACK)
    assert contents(pki) == before


def failing(pki: Pki, directory: Path) -> tuple[Settings, Path]:
    """A node whose kubelet does not restart while a file is there."""
    stop, program = directory / "stop", directory / "restart"
    stop.touch()
    program.write_text(f"#!/bin/sh\n! test -e {stop}\n")
    program.chmod(0o755)
    commands = "\n".join(f'{one.value} = "{program if one is Component.KUBELET else "/bin/true"}"' for one in Component)
    table = '[restart]\nmethod = "command"\nmin_interval = "1s"\nprove_for = "1s"\n[restart.commands]\n'
    return with_next(pki, directory, table + commands), stop


def test_nothing_goes_back_by_itself(pki: Pki, tmp_path: Path) -> None:
    """No run goes back, neither at once nor at night, when the next run looks again."""
    settings, stop = failing(pki, tmp_path)
    done = run(settings, Verb.DROP, ["ca"], AT_ONCE)
    assert (done.exit_code, phases(settings)["ca"]) == (Exit.NOT_LIVE, "new"), done.result
    assert any("as in each emergency" in one.hint for one in done.result.errors)
    assert Store(settings.node.state_dir).unproven.exists()
    night = renew.run(settings, RunOptions(), utc_now, Quiet())[0]
    assert (night.renewed, phases(settings)["ca"]) == ([], "new")
    stop.unlink()
    assert run(settings, Verb.DROP, ["ca"], AT_ONCE).exit_code == 0
    assert not Store(settings.node.state_dir).unproven.exists()


def test_a_phase_waits_for_no_interval_between_restarts(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`drop` may follow `trust` within ten minutes, and a repeat after a kill too; a renewal does wait."""
    monkeypatch.setattr("bridge.control_plane.probes.trouble", lambda *_: None)  # the kubelet is healthy at once
    settings, stop = failing(pki, tmp_path)
    settings = dataclasses.replace(
        settings, restart=dataclasses.replace(settings.restart, min_interval=timedelta(hours=1))
    )
    stop.unlink()
    for verb, phase in FORWARD[:2]:
        assert (run(settings, verb, ["ca"]).exit_code, phases(settings)["ca"]) == (0, phase)
    late = renew.run(settings, RunOptions(names=("kubelet.conf",)), utc_now, Quiet())[0]
    assert "restart.min_interval" in str(late.errors[0])


def test_without_haste_it_goes_back(pki: Pki, tmp_path: Path) -> None:
    """The twin: the same kubelet, and the CA of before."""
    settings, _ = failing(pki, tmp_path)
    before = contents(pki)
    result = renew.run(settings, RunOptions(names=("kubelet.conf",)), utc_now, Quiet())[0]
    assert (result.exit_code, contents(pki)) == (Exit.ROLLED_BACK, before)


def test_the_command_says_first_what_it_costs(pki: Pki, tmp_path: Path) -> None:
    """The command does nothing before --accept-outage, which has no meaning alone."""
    bridge, made = Bridge(pki=pki, directory=tmp_path / "bridge"), next_cas.make(tmp_path / "next")
    for authority in AUTHORITIES:
        add_openssl(bridge, authority)
        bridge.add(f"authority.{authority}.next", made[authority].table)
    before = contents(pki)
    reported = bridge.run("rotate-ca", "drop", "--emergency")
    assert reported.returncode == Exit.USAGE, reported.stderr
    for words in (
        "nothing is done yet",
        "etcd-ca: issues",
        "refuses every certificate of the old CA",
        "nothing goes back",
    ):
        assert words in reported.stdout
    for options in (("--accept-outage",), ("--emergency", "--accept-outage", "--without", "cp-2")):
        assert bridge.run("rotate-ca", "drop", *options).returncode == Exit.USAGE
    assert contents(pki) == before
    done = bridge.run("rotate-ca", "drop", "--emergency", "--accept-outage")
    assert done.returncode == 0, done.stderr
    assert "etcd-ca: phase “new”" in done.stdout


@pytest.mark.kube("etcd")
def test_members_of_etcd_are_not_parted(tmp_path: Path) -> None:
    """Its phases take no pauses; with the other members gone for good there is nothing to part."""
    ports, made = [free_port() for _ in range(3)], next_cas.make(tmp_path / "next")
    cluster = members.make(tmp_path / "etcd", 3, client_port=ports[0], peer_port=ports[1], api_port=ports[2])
    place, table = cluster.places[0], made["etcd-ca"].table
    settings = load.parse(
        f'[node]\nname = "cp-1"\npki_dir = "{place.pki_dir}"\nkubeconfig_dir = "{place.kubeconfig_dir}"\n'
        f'state_dir = "{tmp_path}/state"\n[backend.desk]\ntype = "openssl"\n'
        f'[authority.etcd-ca]\nbackend = "desk"\ndir = "{table["dir"]}"\n'
        f'[authority.etcd-ca.next]\nanchor = "{table["anchor"]}"\ndir = "{table["dir"]}"\n'
    )
    files = place.pki_dir / ETCD_CA.certificate_file
    before = files.read_bytes()
    with members.running(cluster):
        with pytest.raises(SplitError, match="found 3 members and the phase “old”"):
            run(settings, Verb.DROP, options=AT_ONCE)
        assert files.read_bytes() == before
    done = run(settings, Verb.DROP, options=AT_ONCE)
    assert (done.exit_code, done.phases) == (0, {"etcd-ca": "new"}), done.result
