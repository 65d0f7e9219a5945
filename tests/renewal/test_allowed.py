"""A node's own policy: a live certificate with more names than it allows is not renewed; and super-admin.conf by name alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from bridge.cli import expiration
from bridge.diagnosis import Finding
from bridge.diagnosis.examination import examine
from bridge.errors import Exit, SettingsError
from bridge.node import kubelet
from bridge.pki.certificates import load_pem_certificates, san_entries
from bridge.renewal import renew, verify_and_install
from bridge.renewal.prepare import NotAllowedError
from bridge.renewal.selection import RunOptions
from bridge.settings.load import load
from bridge.settings.tables import Settings
from bridge.specs import SUPER_ADMIN
from tests.kit.cas import Bridge, add_openssl
from tests.kit.desks import make_desk
from tests.kit.issuing import Signer, signed_again
from tests.kit.pki import ADDRESS, NODE, Pki, handmade_pki
from tests.kit.renewing import Quiet

DAY = timedelta(days=1)
EVIL = "attacker.example.net"
ALLOW = f"""\
[allow]
clusters = ["kubernetes"]
nodes = ["{NODE}"]
masters = ["super-admin.conf"]
"""
#: All that the kit gives an API server.
SANS = f"""\
[certificate.apiserver]
sans = ["{{node}}", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local", "10.96.0.1", "{ADDRESS}", ".example.com", "*.wild.example.com", "203.0.113.7", "2001:db8::7"]
"""


def now() -> datetime:
    return datetime.now(UTC)


class Site:
    """A node whose certificates are due, with a policy of its own."""

    def __init__(self, directory: Path) -> None:
        self.pki: Pki = handmade_pki(directory / "node", not_after=now() + 20 * DAY)
        self.bridge = Bridge(pki=self.pki, directory=directory / "bridge")
        for name in ("ca", "etcd-ca", "front-proxy-ca"):
            add_openssl(self.bridge, name)
        self.policy = directory / "node-policy.toml"
        self.write(ALLOW + SANS)
        self.bridge.add("policy", {"file": str(self.policy)})

    def write(self, text: str) -> None:
        """The policy."""
        self.policy.write_text(text)
        self.policy.chmod(0o644)

    @property
    def settings(self) -> Settings:
        """As the program reads them, with the node's name in the cluster."""
        return kubelet.with_node_name(load(self.bridge.config))

    def renew(self, *names: str, any_identity: tuple[str, ...] = ()) -> verify_and_install.Result:
        """One run."""
        return renew.run(self.settings, RunOptions(names=names, any_identity=any_identity), now, Quiet())[0]

    def replace(self, *more: str) -> x509.Certificate:
        """Put an API server's certificate of the same CA, with more names, in the place of the right one."""
        path = self.pki.pki_dir / "apiserver.crt"
        live = load_pem_certificates(path.read_bytes())[0]
        sans = live.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        signer = Signer.load(*self.pki.ca_pem("ca"))
        path.write_bytes(signed_again(live, signer, sans=[*sans, *map(x509.DNSName, more)], end=now() + 20 * DAY))
        return live

    def found(self, check: str) -> list[Finding]:
        """What the doctor says of this check."""
        return [one for one in examine(self.settings, now()) if one.check == check]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_what_the_policy_allows_is_renewed(site: Site) -> None:
    """All of a node; the doctor says so before."""
    assert [(one.level, one.about) for one in site.found("policy")] == [("ok", "policy.file")]
    result = site.renew()
    assert (result.exit_code, len(result.renewed)) == (0, 12)


def test_a_certificate_with_more_names_is_not_renewed_for_ever(site: Site) -> None:
    """`renew`, `plan` and `doctor` name the SAN; the others are renewed; without a policy the SAN is taken over."""
    site.replace(EVIL)
    [finding] = site.found("policy")
    assert (finding.level, finding.about) == ("error", "apiserver")
    assert f"DNS:{EVIL}" in finding.text
    assert "[certificate.apiserver]" in finding.hint
    plan = site.bridge.run("plan")
    assert (plan.returncode, f"found DNS:{EVIL}" in plan.stderr) == (Exit.REFUSED, True)
    result = site.renew()
    assert (result.exit_code, len(result.renewed)) == (Exit.REFUSED, 11)
    [failed] = result.failed
    assert (failed.name, type(failed.error)) == ("apiserver", NotAllowedError)
    assert site.renew("apiserver", any_identity=("apiserver",)).exit_code == Exit.REFUSED
    site.write(ALLOW)  # no list: the names of the live certificate, as a desk takes a proven one's
    assert site.renew("apiserver").exit_code == 0
    live = load_pem_certificates((site.pki.pki_dir / "apiserver.crt").read_bytes())[0]
    assert ("DNS", EVIL) in san_entries(live)


@pytest.mark.parametrize(
    ("policy", "name", "says"),
    [
        (f"{ALLOW}[certificate.scheduler.conf]".replace("scheduler.conf]", '"scheduler.conf"]\nmax_validity = "90d"'),
         "scheduler.conf", "validity: wanted at most 90d"),
        (f'{ALLOW}[certificate.etcd-peer]\nkeys = ["rsa-4096"]', "etcd-peer", "key: wanted rsa-4096, found ecdsa-p256"),
        (f'{ALLOW}names = ["apiserver"]', "etcd-server", "name: wanted apiserver, found etcd-server"),
        (ALLOW.replace(NODE, "cp-9"), "etcd-server", "node: wanted cp-9, found cp-1"),
        (ALLOW.replace("super-admin.conf", "admin.conf"), SUPER_ADMIN, "group: wanted no system:masters"),
    ],
)  # fmt: skip
def test_each_rule_of_a_desk_holds_on_the_node(site: Site, policy: str, name: str, says: str) -> None:
    """Lifetime, kind of key, names, node and group; the same certificate passes by the site's own policy."""
    good = site.policy.read_text()
    site.write(policy)
    [failed] = site.renew(name).failed
    assert says in str(failed.error)
    site.write(good)
    assert site.renew(name).exit_code == 0


def test_a_name_that_is_added_has_to_be_allowed(site: Site) -> None:
    """`--add-san` asks the policy, too, before a key is made."""
    run = site.bridge.run("renew", "apiserver", "--add-san", f"apiserver={EVIL}")
    assert (run.returncode, f"found DNS:{EVIL}" in run.stderr) == (Exit.REFUSED, True)
    assert site.bridge.run("renew", "apiserver", "--add-san", "apiserver=new.example.com").returncode == 0


def test_a_request_that_waits_is_judged_by_the_policy_of_now(site: Site, tmp_path: Path) -> None:
    """Its answer is not installed under a policy that was tightened or is gone; by one that allows it, it is."""
    bundle, answer = str(tmp_path / "request.json"), str(tmp_path / "answer.json")
    wider = ALLOW + SANS.replace('".example.com"', f'".example.com", "{EVIL}"')
    desk = make_desk(tmp_path / "desk", site.pki, policy=wider)
    site.write(wider)
    assert site.bridge.run("export", bundle, "apiserver", "--add-san", f"apiserver={EVIL}").returncode == 0
    assert desk.run("sign", bundle, "-o", answer).returncode == 0
    site.write(ALLOW + SANS)
    runs = [site.bridge.run(*args, "apiserver") for args in (["renew"], ["export", bundle])]
    runs.append(site.bridge.run("import", answer))
    assert [(run.returncode, f"found DNS:{EVIL}" in run.stderr) for run in runs] == [(Exit.REFUSED, True)] * 3
    assert all("`ca-bridge pending cancel apiserver`" in run.stderr for run in runs)
    site.policy.unlink()
    assert site.bridge.run("import", answer).returncode == Exit.USAGE
    site.write(wider)
    assert site.bridge.run("import", answer).returncode == 0


def test_a_policy_that_cannot_be_used_renews_nothing(site: Site) -> None:
    """The exit code is 2, whatever is wrong with the file; the doctor names it."""
    for text in ("[allow", "[allow]\nclusters = []\nnodes = []\n", None):
        site.write(text or "")
        if text is None:
            site.policy.unlink()
        with pytest.raises(SettingsError, match=str(site.policy)):
            site.renew()
        assert {(one.level, one.about) for one in site.found("policy")} == {("error", "policy.file")}
        assert site.bridge.run("settings", "check").returncode == Exit.USAGE


def test_super_admin_is_renewed_by_name_alone(site: Site) -> None:
    """No run without its name takes it, and neither doctor, Nagios nor the metrics miss a renewal; by default they do."""
    assert SUPER_ADMIN in site.bridge.run("plan").stdout
    site.bridge.add("renewal", {"super_admin": "by-name"})
    for names in ((), ("all",)):
        assert SUPER_ADMIN not in [one.name for one in site.renew(*names).outcomes]
    later = now() + 30 * DAY  # it has ended, and the others were renewed
    settings = site.settings
    line, _, status = expiration.nagios_check(settings, later, None, None, {})
    assert (status, f"{SUPER_ADMIN} expired" in line) == (0, False)
    assert SUPER_ADMIN not in site.bridge.run("check-expiration", "-o", "prometheus").stdout
    assert SUPER_ADMIN in site.bridge.run("check-expiration").stdout
    found = [one for one in examine(settings, later) if one.about == SUPER_ADMIN]
    assert ("note", "super-admin") in {(one.level, one.check) for one in found}
    assert not {"expired", "overdue"} & {one.check for one in found}
    assert [one.name for one in site.renew(SUPER_ADMIN).renewed] == [SUPER_ADMIN]
