"""PKIs that the real kubeadm made, renewed whole through programs: certmonger's local-submit, step-ca, and a person."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest

from bridge.pki.certificates import load_pem_certificates
from bridge.specs import AUTHORITIES
from tests.kit import exec_programs, step_ca
from tests.kit.cas import Bridge, live_certificates
from tests.kit.pki import KubeadmPki, kubeadm_pki
from tests.kit.renewed import Snapshot, assert_renewed

pytestmark = pytest.mark.kube


@pytest.fixture
def pki(tmp_path: Path) -> KubeadmPki:
    """A control plane's PKI, its CA keys elsewhere."""
    return kubeadm_pki(tmp_path / "node")


def bridge_with(pki: KubeadmPki, directory: Path, programs: dict[str, Path]) -> Bridge:
    """Settings with a program for each authority."""
    bridge = Bridge(pki=pki, directory=directory)
    bridge.add("backend.site", {"type": "exec", "command": ["/bin/false"]})
    for authority, path in programs.items():
        bridge.add(f"authority.{authority}", {"backend": "site", "command": [str(path)]})
    return bridge


@pytest.mark.skipif(exec_programs.helper("local-submit") is None, reason="install the Debian package certmonger")
def test_renews_everything_through_local_submit(pki: KubeadmPki, tmp_path: Path) -> None:
    """Three CAs of certmonger's own, behind a program that puts the usages into the CSR."""
    programs = {}
    for name in AUTHORITIES:
        exec_programs.local_submit_ca(tmp_path / name, *pki.ca_pem(name))
        programs[name] = exec_programs.local_submit_with_usages(tmp_path / f"{name}.program", tmp_path / name)
    bridge, before = bridge_with(pki, tmp_path / "bridge", programs), Snapshot.of(pki)
    doctor = bridge.run("doctor")
    assert "site (exec)" in doctor.stdout + doctor.stderr
    run = bridge.run("renew", "all")
    assert run.returncode == 0, run.stderr
    assert_renewed(pki, before, tmp_path / "scratch")


@pytest.mark.kube("step", "step-ca")
def test_renews_everything_through_step_ca(pki: KubeadmPki, tmp_path: Path) -> None:
    """Three CAs, each with an intermediate of kubeadm's own and the provisioners that `setup exec` prints for this node."""
    bridge, before = Bridge(pki=pki, directory=tmp_path / "bridge"), Snapshot.of(pki)
    cas = {name: step_ca.below(tmp_path / name, *pki.ca_pem(name)) for name in AUTHORITIES}
    bridge.add("backend.step", {"type": "exec", "command": ["/bin/false"]})
    for name, ca in cas.items():
        settings = ca.settings(profile="kubeadm-{node}-{usage}")
        bridge.add(f"authority.{name}", {"backend": "step"} | {key: settings[key] for key in ("command", "profile")})
        bridge.add(f"authority.{name}.environment", {"PATH": step_ca.PATH})
        setup = bridge.run("setup", "exec", "--authority", name, "-o", str(tmp_path / "for-the-ca"))
        assert setup.returncode == 0, setup.stderr
        ca.set_up((tmp_path / f"for-the-ca/step-ca-{name}.sh").read_text())
    with contextlib.ExitStack() as running:
        for ca in cas.values():
            running.enter_context(ca.serving())
        doctor = bridge.run("doctor")
        assert "step (exec) answers, and is the right CA" in " ".join(doctor.stdout.split())
        run = bridge.run("renew", "all")
    assert run.returncode == 0, run.stderr
    assert_renewed(pki, before, tmp_path / "scratch")
    for name in ("apiserver.crt", "etcd/peer.crt", "front-proxy-client.crt"):
        leaf, intermediate = load_pem_certificates((pki.pki_dir / name).read_bytes())
        assert leaf.issuer == intermediate.subject


def approve(directory: Path, pki: KubeadmPki, only: str = "") -> int:
    """What the person does, a day later: sign what lies there, with the usages that the ticket names."""
    done = 0
    for csr in sorted(directory.glob("*.csr")):
        name, ekus = csr.with_suffix(".facts").read_text().split()
        answer = csr.with_suffix(".crt")
        if answer.exists() or (only and name != only):
            continue
        certificate, key = pki.ca_files(directory.name)
        extensions = csr.with_suffix(".ext")
        extensions.write_text(
            f"keyUsage=critical,digitalSignature,keyEncipherment\nextendedKeyUsage={ekus}\n"
            "basicConstraints=critical,CA:FALSE\n"
        )
        command = [
            "openssl",
            "x509",
            "-req",
            "-in",
            str(csr),
            "-CA",
            str(certificate),
            "-CAkey",
            str(key),
            "-days",
            "365",
        ]
        command += ["-copy_extensions", "copy", "-extfile", str(extensions), "-out", str(answer)]
        subprocess.run(command, check=True, capture_output=True)
        done += 1
    return done


def test_renews_everything_through_a_person(pki: KubeadmPki, tmp_path: Path) -> None:
    """Nothing moves while the tickets are open, each request is sent once, and each later run takes what was approved by then."""
    desks = {name: tmp_path / "desk" / name for name in AUTHORITIES}
    bridge = bridge_with(pki, tmp_path / "bridge", {name: exec_programs.person(desk) for name, desk in desks.items()})
    before = Snapshot.of(pki)

    asked = bridge.run("renew", "all")
    assert asked.returncode == 4
    assert asked.stdout.count("is open") == len(before.certificates)
    tickets = {path: path.read_bytes() for desk in desks.values() for path in desk.glob("*.csr")}
    assert len(tickets) == len(before.certificates)

    again = bridge.run("renew")
    assert again.returncode == 4
    assert live_certificates(pki) == before.certificates
    assert {path: path.read_bytes() for desk in desks.values() for path in desk.glob("*.csr")} == tickets

    assert approve(desks["ca"], pki, only="apiserver") == 1
    part = bridge.run("renew")
    assert part.returncode == 4
    changed = {name for name, one in live_certificates(pki).items() if one != before.certificates[name]}
    assert changed == {"apiserver"}

    assert sum(approve(desk, pki) for desk in desks.values()) == len(tickets) - 1
    rest = bridge.run("renew")
    assert rest.returncode == 0, rest.stderr
    assert {path: path.read_bytes() for desk in desks.values() for path in desk.glob("*.csr")} == tickets
    assert_renewed(pki, before, tmp_path / "scratch")


def test_a_person_says_no(pki: KubeadmPki, tmp_path: Path) -> None:
    """The reason reaches the operator, the others are installed, and the next run asks anew."""
    desks = {name: tmp_path / "desk" / name for name in AUTHORITIES}
    bridge = bridge_with(pki, tmp_path / "bridge", {name: exec_programs.person(desk) for name, desk in desks.items()})
    before = live_certificates(pki)
    assert bridge.run("renew", "apiserver", "admin.conf").returncode == 4
    for facts in desks["ca"].glob("*.facts"):
        if facts.read_text().startswith("admin.conf"):
            facts.with_suffix(".no").write_text("not on a Friday\n")
    assert approve(desks["ca"], pki, only="apiserver") == 1
    run = bridge.run("renew")
    assert run.returncode == 5
    assert 'status 2 (refused), printed: "not on a Friday"' in run.stderr
    changed = {name for name, one in live_certificates(pki).items() if one != before[name]}
    assert changed == {"apiserver"}
    assert bridge.run("renew", "admin.conf").returncode == 4
    assert len(list(desks["ca"].glob("*.csr"))) == 3
