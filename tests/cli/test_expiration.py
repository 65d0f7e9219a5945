"""`check-expiration` beside the real kubeadm's, and where kubeadm shows nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge import monitoring
from bridge.cli import expiration_forms
from bridge.cli.expiration_forms import look, table
from bridge.diagnosis import installed
from bridge.node import inventory
from bridge.node.expiry_report import ExpiryReport, report
from bridge.node.sample_pki import ca_certificate
from bridge.pki.certificates import pem
from bridge.pki.csr import generate_key
from tests.kit import next_cas
from tests.kit import pki as kit
from tests.kit.cas import Bridge, add_openssl
from tests.kit.pki import KubeadmPki, Pki, handmade_pki, kubeadm_pki

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
DAY = timedelta(days=1)

OURS = ("table", "json", "yaml", "prometheus")


def with_config(pki: Pki) -> KubeadmPki:
    """The PKI with what kubeadm 1.37 needs to look at it."""
    found = KubeadmPki(root=pki.root, external=pki.external, version="1.37")
    found.config_file.write_text(kit._config("1.37", "RSA-2048", (), None))
    return found


def ours(pki: Pki, output: str = "table", now: datetime | None = None, within: timedelta | None = None) -> str:
    return look(inventory.read(pki.pki_dir, pki.kubeconfig_dir), now or datetime.now(UTC), within, output)[0]


def two_tables(text: str) -> str:
    """Without the table of what kubeadm does not list."""
    if text.startswith("NOT LISTED BY KUBEADM"):  # a kubelet's client certificate ends soon
        return text.partition("\n\n")[2]
    return text.partition("\nNOT LISTED BY KUBEADM")[0]


def side_by_side(pki: KubeadmPki) -> tuple[str, str]:
    """Our two tables and kubeadm's output, taken in a moment in which no residual time changed."""
    for _ in range(50):  # a busy machine takes most of a second for kubeadm
        before = two_tables(ours(pki))
        theirs = pki.run_kubeadm("certs", "check-expiration").stdout
        if two_tables(ours(pki)) == before:
            break
    return before, theirs


def restore_ca_keys(pki: Pki) -> None:
    """Put the CA keys where they are when kubeadm manages the certificates."""
    for key in ("ca.key", "etcd/ca.key", "front-proxy-ca.key"):
        shutil.copy(pki.root / "ca-keys" / key, pki.pki_dir / key)


@pytest.fixture
def pki(tmp_path: Path) -> KubeadmPki:
    """Made by hand, which is quicker; the CA keys are elsewhere."""
    return with_config(handmade_pki(tmp_path / "node"))


# Beside the real kubeadm.


@pytest.mark.kube
@pytest.mark.parametrize("algorithm", ["RSA-2048", "ECDSA-P256", "ECDSA-P384"])
def test_the_tables_of_kubeadms_own_pki(tmp_path: Path, algorithm: kit.KubeadmAlgorithm) -> None:
    """The tables equal kubeadm's byte for byte, with and without CA keys, and with one of them."""
    pki = kubeadm_pki(tmp_path / "node", algorithm=algorithm)
    mine, theirs = side_by_side(pki)
    assert mine == theirs
    assert theirs.count("yes     \n") == 14

    shutil.copy(pki.root / "ca-keys/etcd/ca.key", pki.pki_dir / "etcd/ca.key")
    mine, theirs = side_by_side(pki)
    assert mine == theirs
    assert theirs.count("no      \n") == 5

    restore_ca_keys(pki)
    mine, theirs = side_by_side(pki)
    assert mine == theirs
    assert theirs.count("no      \n") == 14


@pytest.mark.kube("kubeadm", "kubeadm-1.20")
def test_the_tables_of_an_old_pki(tmp_path: Path) -> None:
    """The tables show CAs with serial number 0, and no super-admin.conf."""
    pki = with_config(kubeadm_pki(tmp_path / "node", version="1.20"))
    mine, theirs = side_by_side(pki)
    assert mine == theirs
    assert "!MISSING! super-admin.conf" in theirs


LEFT = [
    timedelta(days=-400),
    timedelta(seconds=100),
    timedelta(minutes=5),
    timedelta(minutes=100),
    timedelta(hours=5),
    timedelta(hours=30),
    timedelta(days=5, hours=3),
    timedelta(days=100),
    timedelta(days=1000),
    timedelta(days=3500),
]


@pytest.mark.kube
@pytest.mark.parametrize("left", LEFT, ids=str)
def test_residual_times(tmp_path: Path, left: timedelta) -> None:
    """Each form of the time that is left, for leaves and CAs."""
    now = datetime.now(UTC)
    begin = min(now, now + left - DAY)
    pki = with_config(
        handmade_pki(tmp_path / "node", now=begin, not_after=now + left, ca_not_after=now + left, external=False)
    )
    mine, theirs = side_by_side(pki)
    assert mine == theirs
    assert theirs.count("\n") == 17


@pytest.mark.kube
def test_files_that_are_not_there(pki: KubeadmPki) -> None:
    """With CA keys kubeadm lists what is missing, and so do we, at any place of the tables."""
    restore_ca_keys(pki)
    for path in (pki.pki_dir / "apiserver-kubelet-client.crt", pki.kubeconfig_dir / "super-admin.conf"):
        path.unlink()
    (pki.pki_dir / "front-proxy-client.crt").unlink()
    (pki.pki_dir / "front-proxy-client.crt").mkdir()
    mine, theirs = side_by_side(pki)
    assert mine == theirs
    assert theirs.count("!MISSING!") == 3


@pytest.mark.kube
def test_a_ca_that_is_not_there(pki: KubeadmPki) -> None:
    """Together with all of its leaves kubeadm lists it as missing."""
    shutil.rmtree(pki.pki_dir / "etcd")
    (pki.pki_dir / "apiserver-etcd-client.crt").unlink()
    mine, theirs = side_by_side(pki)
    assert mine == theirs
    assert theirs.count("!MISSING!") == 5


@pytest.mark.kube
def test_nothing_there(tmp_path: Path) -> None:
    """Every row is missing."""
    pki = with_config(Pki(root=tmp_path, external=True))
    mine, theirs = side_by_side(pki)
    assert mine == theirs
    assert theirs.count("!MISSING!") == 14


@pytest.mark.kube
@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("output", ["json", "yaml"])
def test_structured_output(pki: KubeadmPki, output: str, *, external: bool) -> None:
    """kubeadm's own structure is in ours: same entries in the same order, same keys first, same values."""
    (pki.kubeconfig_dir / "super-admin.conf").unlink()
    if not external:
        restore_ca_keys(pki)
        (pki.pki_dir / "etcd/peer.crt").unlink()
    load = json.loads if output == "json" else yaml.safe_load
    before, theirs, after = (
        load(ours(pki, output)),
        load(pki.run_kubeadm("certs", "check-expiration", "-o", output).stdout),
        load(ours(pki, output)),
    )

    assert list(before)[:4] == list(theirs) or output == "yaml"
    for listing in ("certificates", "certificateAuthorities"):
        assert len(before[listing]) == len(theirs[listing])
        for early, their, late in zip(before[listing], theirs[listing], after[listing], strict=True):
            assert early["residualTime"] >= their["residualTime"] >= late["residualTime"]
            assert {key: early.get(key) for key in their} == their | {"residualTime": early["residualTime"]}
            assert [key for key in early if key in {*their, "caName"}] == list(their)
    assert {key: before[key] for key in ("kind", "apiVersion")} == {key: theirs[key] for key in ("kind", "apiVersion")}


@pytest.mark.kube
def test_json_is_laid_out_as_kubeadms(pki: KubeadmPki) -> None:
    """The first entry's lines are kubeadm's own, and ours come after them."""
    theirs = pki.run_kubeadm("certs", "check-expiration", "-o", "json").stdout.splitlines()
    mine = ours(pki, "json").splitlines()
    alike = [re.sub(r'("residualTime": )\d+', r"\1", line).rstrip(",") for line in theirs[:11]]
    assert [re.sub(r'("residualTime": )\d+', r"\1", line).rstrip(",") for line in mine[:11]] == alike


# Where kubeadm shows nothing.


def kubeadm_fails(pki: KubeadmPki) -> bool:
    run = pki.run_kubeadm("certs", "check-expiration", check=False)
    return (run.returncode, run.stdout) == (1, "")


@pytest.mark.kube
@pytest.mark.parametrize("trouble", ["expired", "missing"])
def test_trouble_below_an_external_ca(tmp_path: Path, trouble: str) -> None:
    """Without the CA key kubeadm lists nothing at all; we list what it does with the key, as externally managed."""
    now = datetime.now(UTC)
    begin, end = (now - 10 * DAY, now - DAY) if trouble == "expired" else (now, now + 100 * DAY)
    pki = with_config(handmade_pki(tmp_path / "node", now=begin, not_after=end))
    if trouble == "missing":
        (pki.pki_dir / "apiserver.crt").unlink()
    assert kubeadm_fails(pki)
    mine = two_tables(ours(pki))

    restore_ca_keys(pki)
    theirs = pki.run_kubeadm("certs", "check-expiration").stdout
    assert mine == theirs.replace("no      \n", "yes     \n")
    assert mine.count("<invalid>" if trouble == "expired" else "!MISSING!") == (11 if trouble == "expired" else 1)


@pytest.mark.kube
@pytest.mark.parametrize("name", ["pki/apiserver.crt", "pki/ca.crt", "admin.conf"])
def test_a_broken_file(pki: KubeadmPki, name: str) -> None:
    """kubeadm lists nothing; we list the rest, mark this one, say what is wrong with it, and fail."""
    good = ours(pki)
    (pki.kubeconfig_dir / name).write_text("nothing")
    assert kubeadm_fails(pki)
    text, troubles, code = look(inventory.read(pki.pki_dir, pki.kubeconfig_dir), datetime.now(UTC), None, "table")

    row = {"pki/apiserver.crt": "apiserver", "pki/ca.crt": "ca", "admin.conf": "admin.conf"}[name]
    (marked,) = [line for line in text.splitlines() if "!INVALID!" in line]
    assert marked.rstrip() == f"!INVALID! {row}"
    assert text.count("\n") == good.count("\n")
    (line,) = troubles
    assert line.startswith(f"{row}: ")
    assert str(pki.kubeconfig_dir / name) in line
    assert code == 1


@pytest.mark.kube
def test_a_missing_ca_certificate(pki: KubeadmPki) -> None:
    """kubeadm lists nothing; we list its leaves, and itself as missing."""
    (pki.pki_dir / "ca.crt").unlink()
    assert kubeadm_fails(pki)
    text, troubles, code = look(inventory.read(pki.pki_dir, pki.kubeconfig_dir), datetime.now(UTC), None, "table")

    assert [line.rstrip() for line in text.splitlines() if "!MISSING!" in line] == ["!MISSING! ca"]
    assert (troubles, code) == ([], 0)


@pytest.mark.kube
def test_a_kubeconfig_that_refers_to_files(pki: KubeadmPki) -> None:
    """kubeadm lists nothing; we list the file's certificate in the row of the kubeconfig."""
    good = two_tables(ours(pki))
    path = pki.kubeconfig_dir / "scheduler.conf"
    text = re.sub("client-certificate-data: .*", "client-certificate: pki/apiserver.crt", path.read_text())
    path.write_text(re.sub("client-key-data: .*", "client-key: pki/apiserver.key", text))
    assert kubeadm_fails(pki)
    assert two_tables(ours(pki)) == good


# Without kubeadm, at a fixed time.


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Leaves with 20 days left, CAs with 3000."""
    return handmade_pki(
        tmp_path_factory.mktemp("node"), now=NOW - 345 * DAY, not_after=NOW + 20 * DAY, ca_not_after=NOW + 3000 * DAY
    )


@pytest.fixture
def damaged(node: Pki, tmp_path: Path) -> Pki:
    """A copy."""
    return Pki(root=shutil.copytree(node.root, tmp_path / "copy"), external=True)


def test_the_three_tables(damaged: Pki) -> None:
    """All marks, all columns, and kubelet.conf, which kubeadm does not list."""
    (damaged.kubeconfig_dir / "super-admin.conf").unlink()
    (damaged.pki_dir / "etcd/peer.crt").write_text("")
    (damaged.pki_dir / "etcd/ca.key").touch()
    wanted = f"""\
NOT LISTED BY KUBEADM   EXPIRES                  RESIDUAL TIME   CERTIFICATE AUTHORITY   EXTERNALLY MANAGED   FILE
kubelet.conf            Dec 15, 2026 12:00 UTC   20d             ca                      yes                  {damaged.kubeconfig_dir}/kubelet.conf

CERTIFICATE                  EXPIRES                  RESIDUAL TIME   CERTIFICATE AUTHORITY   EXTERNALLY MANAGED
admin.conf                   Dec 15, 2026 12:00 UTC   20d             ca                      yes     
apiserver                    Dec 15, 2026 12:00 UTC   20d             ca                      yes     
apiserver-etcd-client        Dec 15, 2026 12:00 UTC   20d             etcd-ca                 no      
apiserver-kubelet-client     Dec 15, 2026 12:00 UTC   20d             ca                      yes     
controller-manager.conf      Dec 15, 2026 12:00 UTC   20d             ca                      yes     
etcd-healthcheck-client      Dec 15, 2026 12:00 UTC   20d             etcd-ca                 no      
!INVALID! etcd-peer                                                                           
etcd-server                  Dec 15, 2026 12:00 UTC   20d             etcd-ca                 no      
front-proxy-client           Dec 15, 2026 12:00 UTC   20d             front-proxy-ca          yes     
scheduler.conf               Dec 15, 2026 12:00 UTC   20d             ca                      yes     
!MISSING! super-admin.conf                                                                    

CERTIFICATE AUTHORITY   EXPIRES                  RESIDUAL TIME   EXTERNALLY MANAGED
ca                      Feb 11, 2035 12:00 UTC   8y              yes     
etcd-ca                 Feb 11, 2035 12:00 UTC   8y              no      
front-proxy-ca          Feb 11, 2035 12:00 UTC   8y              yes     
"""  # noqa: W291 (kubeadm pads the last column)
    assert ours(damaged, now=NOW) == wanted


def test_no_third_table_without_need(damaged: Pki) -> None:
    """Without a kubelet.conf there is nothing to show that kubeadm would not."""
    assert two_tables(ours(damaged, now=NOW)) != ours(damaged, now=NOW)
    (damaged.kubeconfig_dir / "kubelet.conf").unlink()
    assert two_tables(ours(damaged, now=NOW)) == ours(damaged, now=NOW)


@pytest.mark.parametrize("output", OURS[:4])
@pytest.mark.parametrize(
    ("later", "within", "code"),
    [
        pytest.param(0 * DAY, None, 0, id="nothing asked for"),
        pytest.param(0 * DAY, 20 * DAY, 0, id="not within 20 days"),
        pytest.param(0 * DAY, 21 * DAY, 3, id="within 21 days"),
        pytest.param(21 * DAY, None, 0, id="expired, and nothing asked for"),
        pytest.param(21 * DAY, timedelta(), 3, id="expired"),
    ],
)
def test_exit_code(node: Pki, output: str, later: timedelta, within: timedelta | None, code: int) -> None:
    """Exit code 3 tells a monitoring probe that one is due, in any format."""
    found = look(inventory.read(node.pki_dir, node.kubeconfig_dir), NOW + later, within, output)
    assert (found[1:], bool(found[0])) == (([], code), True)


def test_a_ca_that_ends_is_due(tmp_path: Path) -> None:
    """A CA that ends takes all its leaves with it, so it is due like a leaf."""
    pki = handmade_pki(tmp_path, now=NOW, not_after=NOW + 100 * DAY, ca_not_after=NOW + 50 * DAY)
    assert found_report(pki, within=51 * DAY).due
    assert not found_report(pki, within=50 * DAY).due


def found_report(pki: Pki, within: timedelta | None = None, now: datetime = NOW) -> ExpiryReport:
    limit = None if within is None else lambda _: within
    return report(inventory.read(pki.pki_dir, pki.kubeconfig_dir), now, limit)


def test_a_rotating_kubelet_is_due_when_it_is_late(damaged: Pki) -> None:
    """The kubelet renews when 70 to 90 % of the lifetime are over; 20 of 365 days left is late, 60 are not."""
    for name in ("client-certificate", "client-key"):
        path = damaged.kubeconfig_dir / "kubelet.conf"
        path.write_text(re.sub(f"{name}-data: .*", f"{name}: pki/kubelet.pem", path.read_text()))
    pair = [(damaged.pki_dir / f"apiserver.{suffix}").read_bytes() for suffix in ("crt", "key")]
    (damaged.pki_dir / "kubelet.pem").write_bytes(b"".join(pair))

    def row(now: datetime) -> tuple[str, bool, bool]:
        (found,) = found_report(damaged, within=90 * DAY, now=now).extra
        return found.path, found.due, found.external

    file = str(damaged.pki_dir / "kubelet.pem")
    assert row(NOW) == (file, True, True)
    assert row(NOW - 40 * DAY) == (file, False, True)


# What is green must be good.


def due(pki: Pki, within: timedelta = 10 * DAY, now: datetime = NOW) -> set[str]:
    return {row.name for row in found_report(pki, within, now).rows if row.due}


def with_new_ca(pki: Pki, authority: str = "ca", days: int = 3000) -> None:
    """Kubernetes' own recipe for a rotation: a new CA before the old one, to which the live certificates lead."""
    new = ca_certificate("kubernetes", generate_key("ecdsa-p256"), NOW - DAY, NOW + days * DAY)
    pki.trust(authority, pem(new))


@pytest.mark.attack("N4")
@pytest.mark.parametrize(("days", "is_due"), [(2, True), (-1, True), (400, False)])
def test_a_certificate_ends_with_the_ca_that_it_leads_to(tmp_path: Path, days: int, is_due: bool) -> None:
    """The second CA of the file ends before its certificates do, and a chain is as good as its anchor (Go refuses it)."""
    pki = handmade_pki(tmp_path / "node", now=NOW - 5 * DAY, not_after=NOW + 300 * DAY, ca_not_after=NOW + days * DAY)
    with_new_ca(pki)
    below = {"apiserver", "apiserver-kubelet-client", "kubelet.conf", "admin.conf", "scheduler.conf", "ca-2"}
    rows = {row.name: row for row in found_report(pki).rows}

    assert (below & due(pki) == below) == is_due
    assert "ca" not in due(pki)
    assert (rows["ca-2"].expired, rows["apiserver"].expired) == (days < 0, days < 0)
    assert rows["apiserver"].seconds_left == 300 * 86400  # as kubeadm shows it
    assert json.loads(ours(pki, "json", now=NOW))["certificateAuthorities"][0]["name"] == "ca"
    assert 'ca_bridge_authority_not_after_seconds{name="ca-2"' in ours(pki, "prometheus", now=NOW)


def test_certificates_that_end_later_than_their_ca_are_named(tmp_path: Path) -> None:
    """With the time from which on they are refused; kubeadm's columns show their own end alone."""
    pki = handmade_pki(tmp_path / "node", now=NOW - 5 * DAY, not_after=NOW + 300 * DAY, ca_not_after=NOW + 200 * DAY)
    assert "their CA ends first, 2027-06-13 12:00 UTC: " in ours(pki, now=NOW)
    entries = {one["name"]: one for one in json.loads(ours(pki, "json", now=NOW))["certificates"]}
    assert entries["apiserver"]["usableUntil"] == "2027-06-13T12:00:00Z"
    assert entries["apiserver"]["expirationDate"] == "2027-09-21T12:00:00Z"
    node = inventory.read(pki.pki_dir, pki.kubeconfig_dir)
    found = [one for state in node.authorities for one in installed.authority(state, node, NOW)]
    assert {(one.level, one.check) for one in found} == {("warning", "ca-ends-soon")}
    assert "these end later, and Kubernetes refuses them from its end on: " in found[0].text
    assert "front-proxy-client" in found[-1].text

    later = handmade_pki(tmp_path / "later", now=NOW - 5 * DAY, not_after=NOW + 900 * DAY, ca_not_after=NOW + 800 * DAY)
    node = inventory.read(later.pki_dir, later.kubeconfig_dir)
    found = [one for state in node.authorities for one in installed.authority(state, node, NOW)]
    assert {(one.level, one.check) for one in found} == {("warning", "ca-ends-first")}

    good = handmade_pki(tmp_path / "good", now=NOW - 5 * DAY)
    node = inventory.read(good.pki_dir, good.kubeconfig_dir)
    assert "their CA ends first" not in ours(good, now=NOW)
    assert {one.check for state in node.authorities for one in installed.authority(state, node, NOW)} == {"ca"}


def test_a_ca_that_is_being_replaced_has_a_line(tmp_path: Path) -> None:
    """The line has its phase, and since when; the table of other nodes is as before."""
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "bridge")
    add_openssl(bridge, "ca")
    plain = bridge.run("check-expiration")
    assert "is being replaced" not in plain.stdout
    bridge.add("authority.ca.next", {"anchor": next_cas.make(tmp_path / "next")["ca"].table["anchor"]})
    os.utime(bridge.pki.pki_dir / "ca.crt", times=(0, NOW.timestamp()))
    line = "\nca is being replaced: phase old, since 2026-11-25 12:00 UTC\n"
    assert bridge.run("check-expiration").stdout == plain.stdout + line
    found = json.loads(bridge.run("check-expiration", "-o", "json").stdout)["replacedAuthorities"]
    assert found == [{"name": "ca", "phase": "old", "since": "2026-11-25T12:00:00Z"}]


def test_an_old_ca_that_nothing_leads_to_is_shown_and_not_due(damaged: Pki) -> None:
    """A rotation has been done, and the old CA was left in the file until it ended: no certificate needs it."""
    old = ca_certificate("old", generate_key("ecdsa-p256"), NOW - 900 * DAY, NOW - DAY)
    path = damaged.pki_dir / "ca.crt"
    path.write_bytes(path.read_bytes() + pem(old))
    rows = {row.name: row for row in found_report(damaged, 10 * DAY).rows}

    assert due(damaged) == set()
    assert (rows["ca-2"].chain_seconds_left, rows["ca-2"].expired) == (-86400, False)


@pytest.mark.attack("N30")
@pytest.mark.parametrize("damage", ["missing", "empty", "embedded"])
def test_a_certificate_without_its_key_is_broken(damaged: Pki, damage: str) -> None:
    """The next start of its component fails; that is seen without a look into a file with a key."""
    assert due(damaged) == set()
    name, key = "apiserver", damaged.pki_dir / "apiserver.key"
    if damage == "missing":
        key.unlink()
    elif damage == "empty":
        key.write_bytes(b"")
    else:
        name, path = "scheduler.conf", damaged.kubeconfig_dir / "scheduler.conf"
        key_data = re.compile("(?<=client-key-data: ).*")
        other = key_data.search((damaged.kubeconfig_dir / "admin.conf").read_text())
        path.write_text(key_data.sub(other[0] if other else "", path.read_text()))

    found = found_report(damaged, 10 * DAY)
    assert {row.name for row in found.rows if row.due} == {name}
    [row] = [row for row in found.rows if row.name == name]
    assert (row.state, len(found.troubles)) == ("broken", 1)
    assert found.troubles[0].startswith(f"{name}: wanted the key of ")


@pytest.mark.attack("N31")
def test_what_has_to_be_here_and_is_not_is_due(damaged: Pki) -> None:
    """A file system that is not mounted is no node in order; what a healthy node may lack is not due."""
    (damaged.kubeconfig_dir / "super-admin.conf").unlink()
    assert due(damaged) == set()
    (damaged.pki_dir / "apiserver.crt").unlink()
    (damaged.pki_dir / "etcd/ca.crt").unlink()
    assert due(damaged) == {"apiserver", "etcd-ca"}
    assert not found_report(damaged).due  # where nothing was asked for
    for path in damaged.kubeconfig_dir.glob("*.conf"):
        path.unlink()
    assert due(damaged) >= {"admin.conf", "scheduler.conf", "controller-manager.conf"}


@pytest.mark.attack("N28")
def test_what_is_not_valid_yet_is_due(damaged: Pki) -> None:
    """Nothing can be done with it today, and its end is a year away."""
    assert due(damaged, now=NOW - 344 * DAY) == set()
    assert due(damaged, now=NOW - 346 * DAY) >= {"apiserver", "ca", "kubelet.conf"}
    assert all(row.early for row in found_report(damaged, now=NOW - 346 * DAY).rows)
    future = found_report(damaged, now=NOW - 346 * DAY)
    assert table(future).count("<invalid>") == len([row for row in future.rows if row.state == "present"])


def test_an_intermediate_that_ends_is_due(damaged: Pki) -> None:
    """A chain is as good as the certificate of it that ends first; the row shows the leaf's end, as kubeadm's."""
    short = handmade_pki(damaged.root / "short", now=NOW, not_after=NOW + 5 * DAY)
    path = damaged.pki_dir / "apiserver.crt"
    assert not found_report(damaged, within=10 * DAY).due
    path.write_bytes(path.read_bytes() + (short.pki_dir / "apiserver.crt").read_bytes())

    due = [row for row in found_report(damaged, within=10 * DAY).rows if row.due]
    assert [(row.name, row.seconds_left) for row in due] == [("apiserver", 20 * 86400)]
    [line] = [
        line for line in ours(damaged, "prometheus", now=NOW).splitlines() if 'after_seconds{name="apiserver"' in line
    ]
    assert line.endswith(f" {int((NOW + 5 * DAY).timestamp())}")


def test_external_etcd_is_listed_beside_kubeadms_tables(damaged: Pki) -> None:
    """Its client certificate and CA have a row, and the two tables have none of etcd's."""
    (damaged.kubeconfig_dir / "manifests").mkdir()
    (damaged.root / "corp").mkdir()
    for source in ("apiserver-etcd-client.crt", "apiserver-etcd-client.key", "etcd/ca.crt"):
        shutil.copy(damaged.pki_dir / source, damaged.root / "corp")
    shutil.rmtree(damaged.pki_dir / "etcd")
    flags = {"cafile": "ca.crt", "certfile": "apiserver-etcd-client.crt", "keyfile": "apiserver-etcd-client.key"}
    command = ["kube-apiserver", *(f"--etcd-{flag}={damaged.root}/corp/{file}" for flag, file in flags.items())]
    pod = {"spec": {"containers": [{"name": "kube-apiserver", "image": "kube-apiserver:v1.37.2", "command": command}]}}
    (damaged.kubeconfig_dir / "manifests/kube-apiserver.yaml").write_text(json.dumps(pod))

    text = ours(damaged, now=NOW)
    assert "etcd" not in two_tables(text)
    rows = [line.split()[0] for line in text.partition("\n\n")[0].splitlines()[1:]]
    assert rows == ["kubelet.conf", "apiserver-etcd-client", "etcd-ca"]


def test_json_has_what_scripts_need(node: Pki) -> None:
    """The certificate as openssl shows it, and whether it is due."""
    entry: dict[str, Any] = json.loads(ours(node, "json", now=NOW, within=30 * DAY))["certificates"][1]
    path = str(node.pki_dir / "apiserver.crt")
    command = ["openssl", "x509", "-in", path, "-noout", "-serial", "-fingerprint", "-sha256"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    assert shown[0] == f"serial={entry['serialNumber']}"
    assert shown[1].partition("=")[2].replace(":", "").lower() == entry["sha256"]
    assert (entry["subject"], entry["issuer"]) == ("CN=kube-apiserver", "CN=kubernetes")
    assert (entry["due"], entry["path"], entry["state"], entry["trouble"]) == (True, path, "present", None)
    plain = json.loads(ours(node, "json", now=NOW))
    assert (plain["schemaVersion"], plain["certificates"][1]["due"]) == (1, False)  # `due` is about `within` alone


def test_prometheus(damaged: Pki) -> None:
    """Times of ends as seconds since 1970 with labels, and a zero for what can't be used."""
    (damaged.pki_dir / "apiserver.crt").unlink()
    (damaged.kubeconfig_dir / "super-admin.conf").unlink()
    lines = ours(damaged, "prometheus", now=NOW).splitlines()
    end = int((NOW + 20 * DAY).timestamp())
    assert (
        f'ca_bridge_certificate_not_after_seconds{{name="admin.conf",authority="ca",'
        f'path="{damaged.kubeconfig_dir}/admin.conf"}} {end}' in lines
    )
    assert [line.rpartition(" ")[2] for line in lines if "usable{" in line].count("0") == 1
    assert sum(line.startswith("ca_bridge_certificate_not_after_seconds{") for line in lines) == 10
    assert sum(line.startswith("ca_bridge_authority_not_after_seconds{") for line in lines) == 3
    assert sum(line.startswith("# TYPE ") for line in lines) == 4


def test_a_narrow_terminal_breaks_no_word(damaged: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is one line, with every name and mark; with `-v` all words of the wide table are there, some on further lines."""
    wide = table(found_report(damaged))
    monkeypatch.setenv("COLUMNS", "80")
    narrow = table(found_report(damaged))
    assert max(map(len, wide.splitlines())) > 80 >= max(map(len, narrow.splitlines()))
    assert len(narrow.splitlines()) == len(wide.splitlines())
    names = {row.name for row in found_report(damaged).rows} | set(re.findall("!.*!", wide))
    assert names <= set(narrow.split())
    monkeypatch.setattr(expiration_forms, "is_verbose", lambda: True)
    assert sorted(table(found_report(damaged)).split()) == sorted(wide.split())


def test_the_worst_expiry_is_first_for_a_monitor(damaged: Pki) -> None:
    """Without a kubelet's client certificate a rebooted node stays down: it comes before kubeadm's, once it ends soon."""
    for name in ("client-certificate", "client-key"):
        path = damaged.kubeconfig_dir / "kubelet.conf"
        path.write_text(re.sub(f"{name}-data: .*", f"{name}: pki/apiserver.crt", path.read_text()))

    def first(now: datetime) -> str:
        text = monitoring.text(found_report(damaged, now=now), {}, None)
        return text.partition('ca_bridge_certificate_not_after_seconds{name="')[2].partition('"')[0]

    assert (first(NOW - 300 * DAY), first(NOW + DAY)) == ("admin.conf", "kubelet.conf")


def test_prometheus_labels_are_escaped(node: Pki, tmp_path: Path) -> None:
    """A path may hold what ends a label."""
    strange = tmp_path / 'a"b\\c\nd'
    shutil.copytree(node.root, strange)
    pki = Pki(root=strange, external=True)
    text = monitoring.text(found_report(pki), {}, None)
    assert r"a\"b\\c\nd" in text
    assert re.fullmatch(r'((#.*|\w+\{(\w+="([^"\\\n]|\\["\\n])*",?)*\} \d+)\n)*', text)


def test_every_format_takes_every_state(damaged: Pki) -> None:
    """Each format can show every fault."""
    for path in [*damaged.pki_dir.rglob("*.crt"), *damaged.kubeconfig_dir.glob("*.conf")]:
        path.write_text("nothing")
    for output in OURS:
        text, troubles, code = look(inventory.read(damaged.pki_dir, damaged.kubeconfig_dir), NOW, 30 * DAY, output)
        assert (bool(text), len(troubles), code) == (True, 15, 1)
    assert table(found_report(damaged)).count("!INVALID!") == 15


@pytest.mark.parametrize(("within", "code"), [([], 0), (["--within", "30d"], 3)])
def test_the_command(tmp_path: Path, within: list[str], code: int) -> None:
    """The table goes to standard output, and the exit code to the caller."""
    node = handmade_pki(tmp_path, not_after=datetime.now(UTC) + 20 * DAY)
    command = [sys.executable, "-c", "from bridge.entry import main; main()", "check-expiration", *within]
    command += ["--pki-dir", str(node.pki_dir), "--kubeconfig-dir", str(node.kubeconfig_dir)]
    now = datetime.now(UTC)
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (code, "")
    assert run.stdout in (ours(node, now=now), ours(node))
