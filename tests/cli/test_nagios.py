"""What a monitor shows: thresholds from the settings or from options, performance data, and failed runs."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.cli import expiration
from bridge.node.reading import read_node
from bridge.node.sample_pki import ca_certificate
from bridge.pki.certificates import pem
from bridge.pki.csr import generate_key
from bridge.renewal.gate import Failures
from bridge.rotation import Phase, places
from bridge.settings.load import overridden, parse
from bridge.state.credentials import Credential
from tests.kit import next_cas
from tests.kit.cas import Bridge, add_openssl
from tests.kit.pki import Pki, handmade_pki

DAY = timedelta(days=1)
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.fixture
def node(tmp_path: Path) -> Pki:
    """One whose certificates end in 20 days, without a kubelet.conf."""
    pki = handmade_pki(tmp_path / "node", now=NOW - 345 * DAY, not_after=NOW + 20 * DAY)
    (pki.kubeconfig_dir / "kubelet.conf").unlink()
    return pki


def check(
    node: Pki,
    text: str = "",
    warning: timedelta | None = None,
    critical: timedelta | None = None,
    now: datetime = NOW,
    failures: Mapping[str, Failures] | None = None,
) -> tuple[str, int]:
    """The words before the performance data, and the status."""
    settings = overridden(parse(text), node.pki_dir, node.kubeconfig_dir, node.root / "state")
    line, _, status = expiration.nagios_check(
        settings, now, warning, critical, failures if failures is not None else {}
    )
    return line.partition(" | ")[0], status


@pytest.mark.parametrize(("days_left", "status"), [(40, 0), (31, 0), (29, 1), (11, 1), (9, 2), (1, 2), (-1, 2)])
def test_the_settings_say_when_it_is_late(node: Pki, days_left: int, status: int) -> None:
    """Without any option a certificate is a warning when `renew` would renew it, and critical with a third of that left."""
    assert check(node, now=NOW + (20 - days_left) * DAY)[1] == status
    assert check(node, '[renewal]\nbefore = "33%"\nvalidity = "90d"', now=NOW + (20 - days_left) * DAY)[1] == status


@pytest.mark.parametrize(
    ("warning", "critical", "status"), [(15, None, 0), (21, None, 1), (70, None, 2), (21, 1, 1), (None, 21, 2)]
)
def test_options_count_more(node: Pki, warning: int | None, critical: int | None, status: int) -> None:
    """The options -w and -c count, and a third of -w where -c is not given."""
    early, late = (None if days is None else days * DAY for days in (warning, critical))
    assert check(node, "", early, late)[1] == status


@pytest.mark.parametrize(
    ("damage", "status", "says"),
    [
        pytest.param(None, 0, "14 certificates, ", id="fine"),
        pytest.param("pki/apiserver.crt", 2, "apiserver missing", id="missing"),
        pytest.param("super-admin.conf", 0, "13 certificates, ", id="missing, as it may be"),
    ],
)
def test_what_is_missing(node: Pki, damage: str | None, status: int, says: str) -> None:
    """One line and the plugin's status."""
    if damage:
        (node.kubeconfig_dir / damage).unlink()
    text, found = check(node, "", DAY)
    assert (found, says in text, text.count("\n")) == (status, True, 0)
    assert text.startswith(f"CERTIFICATES {('OK', 'WARNING', 'CRITICAL')[status]} - ")


def test_what_has_ended_or_is_broken_is_named(node: Pki) -> None:
    """Both, and an intermediate that ends counts as its leaf."""
    (node.pki_dir / "apiserver.crt").write_text("")
    text, status = check(node, now=NOW + 21 * DAY)
    assert (status, "apiserver broken" in text, "etcd-peer expired" in text) == (2, True, True)
    short = handmade_pki(node.root / "short", now=NOW, not_after=NOW + 5 * DAY)
    path = node.pki_dir / "etcd/peer.crt"
    path.write_bytes(path.read_bytes() + (short.pki_dir / "apiserver.crt").read_bytes())
    (node.pki_dir / "apiserver.crt").write_bytes((short.pki_dir / "apiserver.crt").read_bytes())
    assert "etcd-peer ends in 5d" in check(node, "", 10 * DAY, DAY)[0]


def test_what_can_not_be_used_and_is_no_certificate_is_named(node: Pki) -> None:
    """A manifest that can't be read is critical, and the line has the reason; without it all is well again."""
    manifest = node.kubeconfig_dir / "manifests/kube-scheduler.yaml"
    manifest.parent.mkdir(exist_ok=True)
    manifest.write_text("a: b\n---\nc: d\n")
    text, status = check(node, "", DAY)
    assert (status, "|" in text) == (2, False)
    assert text.startswith(f"CERTIFICATES CRITICAL - kube-scheduler: {manifest}: line 2: wanted one document")
    manifest.unlink()
    assert check(node, "", DAY)[1] == 0


@pytest.mark.parametrize(("trouble", "status"), [("no such file", 2), ("something else", 2), ("Permission denied", 0)])
def test_a_credential_of_ours_that_can_not_be_read_is_critical(
    node: Pki, monkeypatch: pytest.MonkeyPatch, trouble: str, status: int
) -> None:
    """The next renewal fails for it; one that only this user, who is not root, may not read says nothing."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    settings = overridden(parse(""), node.pki_dir, node.kubeconfig_dir, node.root / "state")
    own = Credential(name="backend.corp.client_cert", path="/etc/corp/client.pem", trouble=trouble)
    line, _, found = expiration.nagios_check(settings, NOW, DAY, None, {}, [own])
    assert (found, "backend.corp.client_cert unreadable" in line) == (status, status == 2)


def test_the_limits_in_the_data_are_the_certificates_own(tmp_path: Path) -> None:
    """A kubelet.conf that is due comes first, and moves no other's limits: what is renewed by name alone has none."""
    node = handmade_pki(tmp_path / "node", now=NOW - 345 * DAY, not_after=NOW + 20 * DAY)
    settings = overridden(
        parse('[renewal]\nsuper_admin = "by-name"\n'), node.pki_dir, node.kubeconfig_dir, node.root / "state"
    )
    line, _, _ = expiration.nagios_check(settings, NOW, None, None, {})
    found = dict(re.findall(r"'([^']+)'=\d+s;(\S*)", line.partition(" | ")[2]))
    assert next(iter(found)) == "kubelet.conf"
    assert found.pop("super-admin.conf") == ";"
    assert {limit.partition(";")[2] for limit in found.values()} == {f"{10 * 86400}:"}


def test_performance_data_can_be_drawn(node: Pki) -> None:
    """Each certificate has its seconds left, with both limits as ranges that alert below them."""
    settings = overridden(parse(""), node.pki_dir, node.kubeconfig_dir, node.root / "state")
    line, _, _ = expiration.nagios_check(settings, NOW, None, None, {})
    values = line.partition(" | ")[2].split(" ")
    assert f"'apiserver'={20 * 86400}s;{30 * 86400}:;{10 * 86400}:" in values
    assert len(values) == 14
    assert all(re.fullmatch(r"'[a-z.-]+'=-?\d+s;\d+:;\d+:", value) for value in values)


def test_failed_runs_are_a_warning(tmp_path: Path) -> None:
    """The program warns of failed runs also while no certificate is near its end, and Prometheus' format has zeros."""
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "bridge")
    for authority in ("ca", "etcd-ca", "front-proxy-ca"):
        add_openssl(bridge, authority)
    good = bridge.run("check-expiration", "-o", "nagios")
    assert (good.returncode, good.stdout[:17]) == (0, "CERTIFICATES OK -")
    key = bridge.directory / "desk/etcd-ca/ca.key"
    key.rename(key.with_suffix(".away"))
    assert bridge.run("renew", "etcd-peer").returncode == 2
    late = bridge.run("check-expiration", "-o", "nagios")
    assert late.returncode == 1
    assert late.stdout.startswith("CERTIFICATES WARNING - etcd-ca: 1 run has failed since ")
    metrics = bridge.run("check-expiration", "-o", "prometheus").stdout
    assert 'ca_bridge_failed_runs{authority="etcd-ca"} 1' in metrics
    assert 'ca_bridge_failed_runs{authority="ca"} 0' in metrics


def test_who_may_not_see_failed_runs_says_so(node: Pki) -> None:
    """A monitor without root still sees the certificates, and the line says what it can't see."""
    settings = overridden(parse(""), node.pki_dir, node.kubeconfig_dir, node.root / "state")
    line, _, status = expiration.nagios_check(settings, NOW, DAY, None, None)
    assert (status, "failed runs are for root to see" in line) == (0, True)


def test_settings_that_cannot_be_used_are_unknown(tmp_path: Path) -> None:
    """A monitor shows standard output alone, and takes exit code 2, which they have elsewhere, for CRITICAL."""
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "bridge")
    assert bridge.run("check-expiration", "-o", "nagios").stdout.startswith("CERTIFICATES OK - ")
    bridge.config.write_text('"a|b" = 1\n')
    run: subprocess.CompletedProcess[str] = bridge.run("check-expiration", "-o", "nagios")
    assert (run.returncode, run.stdout.count("\n")) == (3, 1)
    assert run.stdout.startswith("CERTIFICATES UNKNOWN - ")
    assert "a/b" in run.stdout
    assert "a|b" in run.stderr
    assert bridge.run("check-expiration").returncode == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user; run the tests as root")
def test_a_monitor_that_may_not_read_the_settings_says_unknown() -> None:
    """The plug-in prints UNKNOWN on standard output; the twin may read them."""
    with tempfile.TemporaryDirectory() as place:  # pytest's own directories are root's alone
        bridge = Bridge(pki=handmade_pki(Path(place) / "node"), directory=Path(place) / "bridge")
        for path in [Path(place), *Path(place).rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        for mode, code, word in ((0o640, 3, "UNKNOWN"), (0o644, 0, "OK")):
            bridge.config.chmod(mode)
            words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
            command = [*words, *bridge.command("check-expiration", "-o", "nagios")]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            assert (run.returncode, run.stdout.split()[1:2], run.stdout.count("\n")) == (code, [word], 1), run.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-o", "nagios", "-w", "5d", "-c", "21d"), "shorter than -w"),
        (("--output=nagios", "-w", "soon"), "soon"),
        (("-w", "|", "-o", "nagios"), "found '/'"),
        (("-onagios", "--no-such-option"), "--no-such-option"),
        (("-o", "nagios", "-c"), "-c"),
    ],
)
def test_a_usage_error_is_unknown(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    """A monitor shows the line on standard output; other formats have their exit code 2, and nothing there."""
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "bridge")
    run: subprocess.CompletedProcess[str] = bridge.run("check-expiration", *arguments)
    assert (run.returncode, run.stdout.count("\n"), run.stdout.count("|")) == (3, 1, 0), run
    assert run.stdout.startswith("CERTIFICATES UNKNOWN - ")
    assert says in run.stdout
    assert "Usage:" in run.stderr
    other = bridge.run("check-expiration", *(word.replace("nagios", "json") for word in arguments))
    assert (other.returncode, other.stdout) == (2, "")


@pytest.mark.parametrize("arguments", [("-w", "3d"), ("-c", "3d", "-o", "json")])
def test_thresholds_are_for_nagios_alone(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """With another format a threshold is a usage error, because it would have no effect."""
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "bridge")
    run: subprocess.CompletedProcess[str] = bridge.run("check-expiration", *arguments)
    assert (run.returncode, "-o nagios" in run.stderr) == (2, True)


def test_a_certificate_of_the_future_is_critical(node: Pki) -> None:
    """A clock was wrong when it was made, or is now: no server accepts it, however long it has left."""
    line, status = check(node, now=NOW - 346 * DAY)
    assert (status, "apiserver is not valid yet" in line) == (2, True)
    assert check(node, now=NOW - 340 * DAY)[1] == 0


def test_a_ca_is_worth_a_warning_a_year_ahead(tmp_path: Path) -> None:
    """Replacing a CA takes weeks; a threshold on the command line counts for CAs, too."""
    found = {}
    for days in (364, 366):
        pki = handmade_pki(tmp_path / str(days), now=NOW, not_after=NOW + 100 * DAY, ca_not_after=NOW + days * DAY)
        found[days] = check(pki)
        assert check(pki, "", 30 * DAY)[1] == 0
    assert found[366][1] == 0
    assert found[364] == (
        "CERTIFICATES WARNING - ca ends in 364d, etcd-ca ends in 364d, front-proxy-ca ends in 364d",
        1,
    )


def test_a_replacement_that_is_half_done_or_forgotten_is_a_warning(tmp_path: Path) -> None:
    """A CA file without its kubeconfigs; then both CAs for 91 days; a user without root sees nothing of it."""
    pki, made = handmade_pki(tmp_path / "node"), next_cas.make(tmp_path / "next")["ca"]
    text = f'[backend.x]\ntype = "openssl"\n[authority.ca]\nbackend = "x"\n[authority.ca.next]\nanchor = "{made.table["anchor"]}"\n'
    now, ca = datetime.now(UTC), pki.pki_dir / "ca.crt"
    assert check(pki, text, now=now)[1] == 0
    ca.write_bytes(ca.read_bytes() + pem(made.signer.certificate))
    line, status = check(pki, text, now=now)
    assert (status, "ca is in phase old → trusted since " in line) == (1, True)
    settings = overridden(parse(text), pki.pki_dir, pki.kubeconfig_dir, pki.root / "state")
    assert expiration.nagios_check(settings, now, None, None, None)[2] == 0
    for file in places.look(settings, read_node(settings.node), ["ca"])["ca"].trust_files(Phase.TRUSTED):
        file.path.write_bytes(file.data or b"")
    assert check(pki, text, now=now)[1] == 0
    os.utime(ca, times=(0, (now - 91 * DAY).timestamp()))
    line, status = check(pki, text, now=now)
    assert (status, "ca is in phase trusted since " in line) == (1, True)


@pytest.mark.attack("N30")
def test_a_certificate_whose_key_is_gone_is_critical(node: Pki) -> None:
    """A missing key file is critical; no key is read for that."""
    (node.pki_dir / "apiserver.key").unlink()
    line, status = check(node, "", 10 * DAY, DAY)
    assert (status, "apiserver broken" in line) == (2, True)


@pytest.mark.attack("N4")
def test_a_certificate_of_a_ca_that_has_ended_is_critical(node: Pki) -> None:
    """The new CA is the first of its file; what leads to the old one is refused by every component."""
    old, new = (
        ca_certificate(name, generate_key("ecdsa-p256"), NOW - 900 * DAY, end)
        for name, end in (("unused", NOW - DAY), ("kubernetes", NOW + 900 * DAY))
    )
    path = node.pki_dir / "ca.crt"
    path.write_bytes(path.read_bytes() + pem(old))
    assert check(node, "", 10 * DAY, DAY)[1] == 0  # nothing leads to that one
    ended = handmade_pki(node.root / "ended", now=NOW - 9 * DAY, not_after=NOW + 90 * DAY, ca_not_after=NOW - DAY)
    ended.trust("etcd-ca", pem(new))
    line, status = check(ended, "", 10 * DAY, DAY)
    assert (status, "etcd-peer expired" in line, "etcd-ca-2 expired" in line) == (2, True, True)
    assert "etcd-ca expired" not in line
