"""Our own credentials: which files they are in, when they end, and who says so before a renewal fails for it."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from backends.kubernetes import KubernetesBackend
from bridge import diagnosis
from bridge.ca import registry
from bridge.cli import expiration
from bridge.diagnosis.examination import examine
from bridge.errors import Exit
from bridge.pki.certificates import pem
from bridge.pki.expiry import Before
from bridge.settings.load import load, parse
from bridge.settings.tables import Settings
from bridge.specs import SPECS
from bridge.state import Store, credentials, is_checked
from bridge.state.credentials import Credential, CredentialFile
from bridge.testing import TestCA, sign_request
from tests.kit import metrics, openbao
from tests.kit.cas import Bridge, add_openssl, add_vault
from tests.kit.issuing import Signer
from tests.kit.pki import handmade_pki

DAY = timedelta(days=1)
MONTH = Before(remaining=30 * DAY)
NAME = "backend.far.client_cert"
AUTHORITIES = ("ca", "etcd-ca", "front-proxy-ca")

_CA = TestCA.make("corp", "ecdsa-p256")
_SIGNER, _LEAF = Signer(certificate=_CA.certificate, key=_CA.key), _CA.leaf(SPECS["admin.conf"])
_REQUEST = sign_request(_LEAF, SPECS["admin.conf"], "ecdsa-p256", DAY)


def now() -> datetime:
    return datetime.now(UTC)


def made(end: datetime) -> bytes:
    """A certificate of a year ago that ends then."""
    return pem(_SIGNER.issue(_REQUEST, begin=now() - 365 * DAY, end=end).leaf)


class Site:
    """A node on which nothing is due; its server, which no test asks, would know it by a client certificate."""

    def __init__(self, directory: Path) -> None:
        self.bridge = Bridge(pki=handmade_pki(directory / "node"), directory=directory / "bridge")
        self.certificate = directory / "client.crt"
        key = self.bridge.secret("client.key", "a key")
        files = {"client_cert": str(self.certificate), "client_key": key}
        self.bridge.add("backend.far", {"type": "est", "url": "https://127.0.0.1:9", "retry_for": "1s", **files})
        for name in AUTHORITIES:
            self.bridge.add(f"authority.{name}", {"backend": "far"})
        self.ends_in(300 * DAY)

    def ends_in(self, left: timedelta) -> None:
        """Put a client certificate there that ends then."""
        self.certificate.write_bytes(made(now() + left))

    @property
    def settings(self) -> Settings:
        """As the program reads them."""
        return load(self.bridge.config)

    def renew(self) -> tuple[int, str]:
        """As cron does it: the exit code, and standard error."""
        run = self.bridge.run("renew")
        return run.returncode, run.stderr

    def is_quiet(self) -> bool:
        """Whether a night has nothing to say; then it loads no backend, and no command line."""
        program = (
            "import sys; from bridge import entry; found = entry.nothing_to_do(sys.argv[1:]);"
            "print(found is not None, sorted({'backends', 'requests', 'typer', 'hvac'} & set(sys.modules)))"
        )
        command = [sys.executable, "-P", "-c", program, "renew", "--config", str(self.bridge.config)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said.endswith(" []\n")
        return said.startswith("True")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


# --- which there are ----------------------------------------------------------------------------------------------------

KINDS = {
    "vault": ('url = "https://ca.example:8200"\nauth.method = "cert"', "client_cert"),
    "est": ('url = "https://ca.example"', "client_cert"),
    "cfssl": ('url = "https://ca.example"\nendpoint = "sign"', "client_cert"),
    "cmp": ('url = "https://ca.example"\ntrusted_file = "/t"\ntls_ca_file = "/t"', "client_cert"),
    "kubernetes": ('url = "https://ca.example"\nsigner = "example.com/{name}"', "client_cert"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_ca_names_its_client_certificate(kind: str) -> None:
    """The settings alone name it, as no file is there; an authority's own key has its own name."""
    keys, field = KINDS[kind]
    files = f'{field} = "/c.crt"\nclient_key = "/c.key"'
    own = f'[authority.etcd-ca]\nbackend = "x"\n{field} = "/other.crt"'
    settings = parse(f'[backend.x]\ntype = "{kind}"\n{keys}\n{files}\n[authority.ca]\nbackend = "x"\n{own}')
    found = registry.credentials(settings, registry.configured(settings, settings.authorities))
    assert found == [
        CredentialFile(f"backend.x.{field}", Path("/c.crt")),
        CredentialFile(f"authority.etcd-ca.{field}", Path("/other.crt")),
    ]


def test_further_files_that_the_settings_name() -> None:
    """A kubeconfig, the certificate for TLS beside that for CMP, and the keys of a desk, an administrator and the gateway."""
    text = """
[gateway]
kubeconfig = "/g.conf"
[backend.k]
type = "kubernetes"
kubeconfig = "/k.conf"
signer = "example.com/{name}"
[backend.c]
type = "cmp"
url = "https://ca.example"
secret_file = "/s"
reference = "r"
tls_ca_file = "/t"
tls_client_cert = "/tls.crt"
tls_client_key = "/tls.key"
[authority.ca]
backend = "k"
[authority.etcd-ca]
backend = "c"
"""
    settings = parse(text)
    found = registry.credentials(settings, registry.configured(settings, settings.authorities))
    assert [(one.name, str(one.path)) for one in found] == [
        ("gateway.kubeconfig", "/g.conf"),
        ("backend.k.kubeconfig", "/k.conf"),
        ("backend.c.tls_client_cert", "/tls.crt"),
    ]


def test_what_a_file_says(site: Site, tmp_path: Path) -> None:
    """A chain ends with its first to end; a kubeconfig's certificate counts; a public key or a token has no end."""
    site.ends_in(300 * DAY)
    with site.certificate.open("ab") as file:
        file.write(made(now() + 5 * DAY))
    key, token, broken = (tmp_path / name for name in ("key.pem", "token.conf", "broken.crt"))
    key.write_bytes(_LEAF.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    broken.write_text("-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n")
    admin = site.bridge.pki.kubeconfig_dir / "admin.conf"
    kept = [line for line in admin.read_text().splitlines() if "client-" not in line]
    token.write_text("\n".join([*kept, "    token: s3cret", ""]))
    paths = {"a": site.certificate, "b": admin, "c": key, "d": token, "e": broken, "f": tmp_path / "none"}
    places = [CredentialFile(f"backend.{name}.client_cert", path) for name, path in paths.items()]
    found = {one.name.split(".")[1]: one for one in credentials.look(parse(""), places, None)}
    assert found.keys() == {"a", "b", "e", "f"}
    ends = {name: one.ends and round((one.ends - now()) / DAY) for name, one in found.items()}
    assert ends == {"a": 5, "b": 365, "e": None, "f": None}
    assert "found no such file" in found["f"].text(now())
    assert "s3cret" not in repr(found)


@pytest.mark.parametrize(
    ("lifetime", "left", "is_near"),
    [
        (365, 31, False),
        (365, 29, True),
        (90, 10, False),
        (90, 8, True),
        (1, 0.2, False),
        (1, 0.09, True),
        (1, -1, True),
    ],
)
def test_when_there_is_reason_to_warn(lifetime: float, left: float, is_near: bool) -> None:
    """`renewal.before` decides; where a program replaces it often, only a late one is a reason."""
    ends = now() + left * DAY
    one = Credential(name="x", path="", begins=ends - lifetime * DAY, ends=ends)
    assert one.is_near(MONTH, now()) is is_near


# --- who says so -------------------------------------------------------------------------------------------------------


def test_a_night_with_nothing_due_warns_before_the_end_and_fails_after_it(site: Site) -> None:
    """0 with a warning while there is time, 2 from the end on, and quiet again with a new certificate."""
    assert site.renew() == (0, "")
    assert site.is_quiet()
    site.ends_in(5 * DAY)
    for _ in range(2):
        assert not site.is_quiet()
        code, said = site.renew()
        assert (code, f"warning: own credential {NAME} ({site.certificate}): 4d" in said) == (0, True)
        assert "hint: have a new one issued" in said
    site.ends_in(-DAY)
    code, said = site.renew()
    assert (code, f"error: own credential {NAME}" in said) == (Exit.USAGE, True)
    assert "wanted one that is valid, found one that expired" in said
    assert said.count("own credential") == 1
    site.certificate.unlink()
    code, said = site.renew()
    assert (code, "found no such file" in said) == (0, True)  # what is lost may come back before it is needed
    site.ends_in(300 * DAY)
    assert site.renew() == (0, "")
    assert site.is_quiet()


def test_settings_of_an_earlier_version_are_checked_again(site: Site) -> None:
    """Its file has no credentials in it."""
    assert site.renew() == (0, "")
    store = Store(site.settings.node.state_dir)
    lines = store.checked_settings.read_text().splitlines()
    assert lines[1:] == [f"{NAME} {site.certificate}"]
    store.checked_settings.write_text(lines[0].rpartition(" ")[0] + "\n")
    assert not is_checked(site.settings, store)
    assert site.renew() == (0, "")
    assert store.checked_settings.read_text().splitlines() == lines


def test_a_desks_key_counts_beyond_its_certificate(site: Site) -> None:
    """A warning, and no failure."""
    desk = site.certificate.with_name("desk.pem")
    desk.write_bytes(made(now() - DAY))
    site.bridge.tables[0] += f'desk_key = "{desk}"\n'
    site.bridge.add("audit", {})
    code, said = site.renew()
    assert (code, "node.desk_key" in said, "its key counts nevertheless" in said) == (0, True, True)


def test_check_expiration_has_a_table_of_its_own(site: Site) -> None:
    """Below kubeadm's, which stay as they are; more in JSON; before and after the settings were checked."""
    site.ends_in(5 * DAY)
    before = site.bridge.run("check-expiration")
    assert site.renew()[0] == 0
    table = site.bridge.run("check-expiration", "--within", "10d")
    assert table.returncode == 0  # it is about the node's certificates
    assert table.stdout == before.stdout
    rest, _, own = table.stdout.partition("\nCREDENTIAL OF CA-BRIDGE")
    assert NAME in own
    assert NAME not in rest
    environment = {**os.environ, "COLUMNS": "60"}
    narrow = subprocess.run(
        site.bridge.command("check-expiration"), env=environment, capture_output=True, text=True, check=False
    )
    own = narrow.stdout.partition("CREDENTIAL OF CA-BRIDGE")[2]
    assert own.count("UTC") == 1
    assert re.search(r"\n\S+ +\d{4}-\d\d-\d\d \d\d:\d\d ", own)
    [entry_of_json] = json.loads(site.bridge.run("check-expiration", "-o", "json").stdout)["ownCredentials"]
    assert (entry_of_json["name"], entry_of_json["path"]) == (NAME, str(site.certificate))
    assert "ownCredentials:" in site.bridge.run("check-expiration", "-o", "yaml").stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: run the tests as root")
def test_another_user_reads_that_it_cannot_see(site: Site) -> None:
    """The state directory is root's."""
    assert site.renew()[0] == 0
    assert credentials.may_look(site.settings)
    program = (
        "import os, sys; from bridge.state import credentials; from bridge.settings.load import load;"
        "from pathlib import Path; settings = load(Path(sys.argv[1])); os.setuid(65534);"
        "print(credentials.may_look(settings), credentials.seen(settings))"
    )
    command = [sys.executable, "-P", "-c", program, str(site.bridge.config)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout == "False None\n", run.stderr


@pytest.mark.parametrize(
    ("left", "status", "says"), [(300, 0, "OK"), (5, 1, f"{NAME} ends in"), (-1, 2, f"{NAME} expired")]
)
def test_nagios_shows_it(site: Site, left: int, status: int, says: str) -> None:
    """A warning, and then critical."""
    site.ends_in(left * DAY)
    settings = site.settings
    own = credentials.look(settings, [CredentialFile(NAME, site.certificate)], None)
    line, _, found = expiration.nagios_check(settings, now(), None, None, {}, own)
    assert (found, says in line) == (status, True)
    run = site.bridge.run("check-expiration", "-o", "nagios")
    assert (run.returncode, says in run.stdout) == (status, True)


def test_the_metrics_have_it(site: Site) -> None:
    """Both when it ends and from when on that is worth a warning; the same by `check-expiration`."""
    site.bridge.add("metrics", {"file": str(site.bridge.directory / "ca-bridge.prom")})
    site.ends_in(300 * DAY)
    assert site.renew() == (0, "")
    text = (site.bridge.directory / "ca-bridge.prom").read_text()
    found = metrics.samples(text)
    [(labels, end)] = found["ca_bridge_credential_not_after_seconds"].items()
    assert labels == f'name="{NAME}",path="{site.certificate}"'
    assert end - found["ca_bridge_credential_near_seconds"][labels] == 30 * 86400
    assert site.bridge.run("check-expiration", "-o", "prometheus").stdout == text


@pytest.mark.parametrize(("left", "level"), [(300, "ok"), (5, "warning"), (-1, "error")])
def test_the_doctor_looks_at_it(site: Site, left: int, level: str) -> None:
    """`doctor` shows it once for all authorities that share it."""
    site.ends_in(left * DAY)
    causes = diagnosis.causes(examine(site.settings, now()))
    [cause] = [one for one in causes if one.check == "credential"]
    assert (cause.level, cause.about) == (level, (NAME,))


# --- what a CA tells ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bao() -> Iterator[openbao.OpenBao]:
    with openbao.dev_server() as server:
        yield server


def ends_reported(bridge: Bridge, authority: str) -> dict[str, timedelta]:
    """What the backend's CA says, rounded to minutes."""
    settings = load(bridge.config)
    backend = registry.configured(settings, [authority])[authority].open()
    found = {
        one.key: timedelta(minutes=round((one.ends - now()) / timedelta(minutes=1)))
        for one in backend.credential_ends()
    }
    backend.close()
    return found


def test_the_end_of_a_secret_id_is_remembered(bao: openbao.OpenBao, tmp_path: Path) -> None:
    """As far as the policy allows to look; with another secret id in its place, it is forgotten."""
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "own")
    for name in AUTHORITIES[1:]:
        add_openssl(bridge, name)
    add_vault(bridge, bao, "ca", "own")
    role, file = "own-ca", tmp_path / "own/own-ca.secret-id"
    assert ends_reported(bridge, "ca") == {}
    bao.add_policy("look", f'path "auth/approle/role/{role}/secret-id/lookup" {{ capabilities = ["update"] }}')
    bao.write(f"auth/approle/role/{role}", token_policies=[role, "look"], secret_id_ttl="600m")
    assert ends_reported(bridge, "ca") == {}  # the old one has no end
    file.write_text(bao.write(f"auth/approle/role/{role}/secret-id")["data"]["secret_id"])
    assert ends_reported(bridge, "ca") == {"auth.secret_id_file": timedelta(minutes=600)}
    assert bridge.run("renew", "scheduler.conf").returncode == 0
    settings = load(bridge.config)
    found = credentials.seen(settings)
    assert found is not None
    [one] = found
    assert (one.name, one.path, one.reported is not None) == ("backend.own-ca.auth.secret_id_file", str(file), True)
    assert credentials.warnings(found, settings, now()) == []
    late = now() + timedelta(minutes=590)
    assert "by the CA's word of" in credentials.warnings(found, settings, late)[0]
    assert credentials.ended(found, now() + DAY) == []  # by another's word alone nothing fails
    assert bridge.run("renew").returncode == 0
    assert [one.about for one in examine(settings, late) if one.check == "credential" and one.level == "warning"]
    file.write_text(bao.write(f"auth/approle/role/{role}/secret-id")["data"]["secret_id"])
    assert credentials.seen(settings) == []


@pytest.mark.parametrize(
    ("options", "minutes"),
    [({"ttl": "60m"}, 60), ({"period": "60m"}, None), ({"ttl": "60m", "no_default_policy": True}, None)],
)
def test_the_end_of_a_token(
    bao: openbao.OpenBao, tmp_path: Path, options: dict[str, object], minutes: int | None
) -> None:
    """One with a period is renewed by others; one that may not look itself up tells nothing."""
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "own")
    bao.add_policy("nothing", 'path "none" { capabilities = ["read"] }')
    token = bridge.secret("token", bao.token("nothing", **options))
    bridge.add("backend.t", {"type": "vault", "url": bao.url})
    bridge.add("backend.t.auth", {"token_file": token})
    bridge.add("authority.ca", {"backend": "t"})
    assert ends_reported(bridge, "ca") == ({} if minutes is None else {"auth.token_file": timedelta(minutes=minutes)})


def test_a_service_accounts_token_says_it_by_itself(tmp_path: Path) -> None:
    """No server is asked; another kind of token says nothing."""
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "own")
    bridge.add("backend.k", {"type": "kubernetes", "url": "https://127.0.0.1:9", "signer": "example.com/{name}",
                             "token_file": str(tmp_path / "token")})  # fmt: skip
    bridge.add("authority.ca", {"backend": "k"})
    for claims, minutes in (({"iat": now().timestamp(), "exp": (now() + DAY).timestamp()}, 1440), ({}, None)):
        payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
        (tmp_path / "token").write_text(f"e30.{payload}.x")
        assert ends_reported(bridge, "ca") == ({} if minutes is None else {"token_file": timedelta(minutes=minutes)})
    (tmp_path / "token").write_text("an opaque one")
    assert ends_reported(bridge, "ca") == {}
    assert "credential_ends" in vars(KubernetesBackend)
