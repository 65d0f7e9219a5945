"""The command line: results on standard output, messages on standard error, promised exit codes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bridge import entry
from bridge.ca import registry
from bridge.cli import demo, printing
from bridge.cli import settings as cli_settings
from bridge.cli.app import app
from bridge.errors import BridgeError
from bridge.pki.certificates import load_pem_certificates
from bridge.settings.load import load, parse
from bridge.settings.tables import Zone
from bridge.state import Store, remember_checked
from bridge.state.install import KEY_MASK, Replacement, install
from bridge.system.locks import lock
from tests.kit import opensslca
from tests.kit.pki import Pki, handmade_pki

PLANTED = "planted-s3cret"

Run = Callable[..., Result]


@pytest.fixture
def node(tmp_path: Path) -> Pki:
    """A node whose certificates end in 20 days."""
    return handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=20))


@pytest.fixture
def config(node: Pki, tmp_path: Path) -> Path:
    """Settings with an `openssl ca` directory for each authority."""
    passphrase = tmp_path / "passphrase"
    passphrase.touch(mode=0o600)
    passphrase.write_text(f"{PLANTED}\n")
    lines = [
        f'[node]\npki_dir = "{node.pki_dir}"\nkubeconfig_dir = "{node.kubeconfig_dir}"\nstate_dir = "{tmp_path}/state"'
    ]
    lines.append(f'[backend.desk]\ntype = "openssl"\npassphrase_file = "{passphrase}"')
    for name in ("ca", "etcd-ca", "front-proxy-ca"):
        directory = opensslca.make_ca_directory(tmp_path / "cas" / name, *node.ca_pem(name), passphrase=PLANTED)
        lines.append(f'[authority.{name}]\nbackend = "desk"\ndir = "{directory}"')
    file = tmp_path / "config.toml"
    file.write_text("\n".join([*lines, ""]))
    file.chmod(0o644)
    return file


@pytest.fixture
def run(config: Path) -> Iterator[Run]:
    """Run a command with these settings; nothing that it says may hold the passphrase."""
    said: list[str] = []

    def run(*args: str) -> Result:
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*args, "--config", str(config)])
        said.append(result.output)
        return result

    yield run
    assert PLANTED not in "".join(said)


def leaf_serial(node: Pki, base: str = "apiserver") -> int:
    return load_pem_certificates((node.pki_dir / f"{base}.crt").read_bytes())[0].serial_number


def test_renew_renews_what_is_due_and_then_nothing(run: Run, node: Pki) -> None:
    """One line a certificate; the second run has nothing to do."""
    before = leaf_serial(node)
    first = run("renew", "-v")
    assert first.exit_code == 0, first.stderr
    assert leaf_serial(node) != before
    lines = [line for line in first.stdout.splitlines() if " serial " in line]
    assert len(lines) == 12
    assert all("until " in line and "issuer " in line and "by desk (openssl)" in line for line in lines)
    after = leaf_serial(node)
    second = run("renew")
    assert (second.exit_code, second.stderr) == (0, "")
    assert leaf_serial(node) == after


def test_the_result_as_json(run: Run, node: Pki) -> None:
    """All of it is on standard output, with a schema version."""
    result = json.loads(run("renew", "apiserver", "kubelet.conf", "-o", "json").stdout)
    assert result["schemaVersion"] == printing.SCHEMA_VERSION
    assert [entry["name"] for entry in result["renewed"]] == ["kubelet.conf", "apiserver"]
    assert result["renewed"][1]["serialNumber"] == f"{leaf_serial(node):X}".zfill(
        len(result["renewed"][1]["serialNumber"])
    )
    assert result["restart"] == ["kube-apiserver", "kubelet"]
    assert result["exitCode"] == 0


def test_plan_says_what_renew_would_do_and_does_nothing(run: Run, node: Pki, tmp_path: Path) -> None:
    """The exit code is 3 when a certificate is due; `renew --dry-run` is the same."""
    before = leaf_serial(node)
    texts = [run(*args) for args in (("plan",), ("renew", "--dry-run"))]
    assert {text.exit_code for text in texts} == {3}
    assert texts[0].stdout == texts[1].stdout
    assert "ask desk" in texts[0].stdout
    assert json.loads(run("plan", "apiserver", "-o", "json").stdout)["renew"][0]["name"] == "apiserver"
    assert leaf_serial(node) == before
    assert not (tmp_path / "state").exists()
    run("renew")
    assert run("plan").exit_code == 0


def test_a_missing_certificate_is_named_and_the_others_are_renewed(run: Run, node: Pki) -> None:
    """Exit 1, since what is missing can't be renewed; super-admin.conf may be missing."""
    (node.kubeconfig_dir / "super-admin.conf").unlink()
    assert run("renew").exit_code == 0
    (node.pki_dir / "apiserver.crt").unlink()
    result = run("renew", "all", "-o", "json")
    assert result.exit_code == 1
    assert "apiserver" in result.stderr
    assert "hint: " in result.stderr
    assert len(json.loads(result.stdout)["renewed"]) == 10
    assert run("renew", "super-admin.conf").exit_code == 1


def test_a_broken_certificate_is_an_error_in_every_run(run: Run, node: Pki) -> None:
    """A broken certificate is reported also when nothing else is due."""
    assert run("renew").exit_code == 0
    path = node.pki_dir / "etcd/peer.crt"
    good = path.read_bytes()
    path.write_bytes(b"garbage")
    result = run("renew")
    assert result.exit_code == 1
    assert "etcd-peer" in result.stderr
    assert "Traceback" not in result.output
    path.write_bytes(good)
    assert run("renew").exit_code == 0


@pytest.mark.parametrize(
    "args",
    [
        ("renew", "nonsense"),
        ("renew", "--csr-only"),
        ("renew", "--csr-dir", "/tmp/x"),
        ("renew", "--csr-only", "--csr-dir", "/tmp/x", "--dry-run"),
        ("setup", "vault", "--authority", "nonsense"),
        ("check-expiration", "--within", "3"),
        ("check-expiration", "-o", "xml"),
        ("nonsense",),
    ],
)
def test_usage_errors_are_2(run: Run, args: tuple[str, ...]) -> None:
    """The message says what was wanted."""
    result = run(*args)
    assert result.exit_code == 2
    assert "wanted" in result.stderr or "Usage:" in result.stderr
    assert "Traceback" not in result.output


def test_a_settings_error_is_2_with_file_and_line(run: Run, config: Path) -> None:
    """The error comes before any request or file."""
    config.write_text(config.read_text() + '[renewal]\nvalidity = "soon"\n')
    line = len(config.read_text().splitlines())
    for command in ("renew", "plan", "doctor", "check-expiration"):
        result = run(command)
        assert result.exit_code == 2
        assert f"{config}:{line}: renewal.validity: wanted" in result.stderr


def test_a_backends_settings_error_is_2(run: Run, config: Path) -> None:
    """Reported by `settings check`, and by a renewal before it does anything; to `doctor` it is one error of many."""
    assert run("settings", "check").exit_code == 0
    config.write_text(config.read_text().replace("passphrase_file", "passfrase_file"))
    for args, code in ((("settings", "check"), 2), (("renew",), 2), (("doctor",), 1)):
        result = run(*args)
        assert result.exit_code == code
        assert "passfrase_file" in result.output


def test_a_settings_file_is_not_reported_as_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`settings check` has nothing to check: exit 2, with what was wanted and where."""
    monkeypatch.setattr("bridge.settings.load.DEFAULT_FILE", tmp_path / "config.toml")
    result = CliRunner().invoke(app, ["settings", "check"])
    assert result.exit_code == 2
    assert "there is no such file, and a settings file is needed" in result.stderr


def test_the_settings_directory_is_not_called_a_missing_file(config: Path) -> None:
    """The hint is to name the file in it, and not to write a new one; the file is good."""
    result = CliRunner().invoke(app, ["settings", "check", "--config", str(config.parent)])
    assert result.exit_code == 2
    assert f"{config.parent}: wanted a settings file, found a directory" in result.stderr
    assert "name the file in it" in result.stderr
    assert CliRunner().invoke(app, ["settings", "check", "--config", str(config)]).exit_code == 0


def test_a_held_lock_is_9_and_names_the_holder(run: Run, tmp_path: Path) -> None:
    """The run does nothing; when the lock is free the same command works."""
    store = Store(tmp_path / "state")
    store.prepare()
    with lock(store.lock, "ca-bridge renew all"):
        result = run("renew")
    assert result.exit_code == 9
    assert "ca-bridge renew all" in result.stderr
    assert run("renew").exit_code == 0


def test_what_recover_has_installed_waits_for_no_run(run: Run, node: Pki, tmp_path: Path) -> None:
    """A rollback after it stays: the next `renew` asks for a new certificate, and does not install the same once more."""
    first = leaf_serial(node)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bridge.state.install._forward", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        run("renew", "apiserver")
    assert "apiserver" in (tmp_path / "state/requests.json").read_text()
    assert run("recover").exit_code == 0
    recovered = leaf_serial(node)
    assert recovered != first
    assert not (tmp_path / "state/requests.json").exists()
    assert run("rollback").exit_code == 0
    assert leaf_serial(node) == first

    assert run("renew", "apiserver").exit_code == 0

    assert leaf_serial(node) not in (first, recovered)


def test_an_interrupted_installation_is_finished_first(run: Run, node: Pki, tmp_path: Path) -> None:
    """`recover` does it alone; a plain `renew` notices it although nothing is due."""
    assert run("recover").exit_code == 0
    assert run("renew").exit_code == 0
    store = Store(tmp_path / "state")
    target = node.pki_dir / "sa.pub"

    def interrupt() -> None:
        file = Replacement(certificate="x", path=target, data=b"new", mode_mask=KEY_MASK, was=digest_of(target))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bridge.state.install._forward", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                install(store, [file], "run1", {})

    interrupt()
    result = run("recover")
    assert (result.exit_code, target.read_bytes()) == (0, b"new")
    assert "run1" in result.stdout
    target.write_bytes(b"old")
    for backup in store.backups.glob("*-run1"):
        backup.rename(backup.with_name("older"))
    interrupt()
    assert entry.nothing_to_do(["renew", "--config", str(tmp_path / "config.toml")]) is None
    assert run("renew").exit_code == 0
    assert target.read_bytes() == b"new"


def digest_of(path: Path) -> str:
    from bridge.system.files import digest

    return digest(path.read_bytes())


def test_doctor_is_content_with_a_good_node(run: Run) -> None:
    """Exit 0; each CA answers, and the node's name is that of its certificates, whatever the host is called."""
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "backend of ca, backend of etcd-ca, backend of front-proxy-ca:" in result.stdout
    assert result.stdout.count("answers, and is the right CA") == 1
    assert "error" not in result.stdout
    assert 'name = "cp-1"' in run("settings", "show").stdout


def test_a_name_in_the_settings_counts_more_than_that_of_the_certificates(run: Run, config: Path) -> None:
    """`doctor` warns of another one, since renewal works nevertheless, and hooks and bundles go by it."""
    config.write_text(config.read_text().replace("[node]", '[node]\nname = "cp-7"'))
    result = run("doctor")
    assert result.exit_code == 3, result.output
    assert "which is cp-1, found cp-7" in result.stdout


def test_doctor_finds_what_is_wrong(run: Run, node: Pki, config: Path) -> None:
    """Another CA, a broken file, a key for all to read, a CA key on the disk: all at once."""
    text = config.read_text()
    config.write_text(text.replace("cas/ca", "cas/etcd-ca"))
    (node.pki_dir / "front-proxy-client.crt").write_bytes(b"garbage")
    (node.pki_dir / "apiserver.key").chmod(0o644)
    (node.pki_dir / "front-proxy-ca.key").write_text("x")
    result = run("doctor")
    assert result.exit_code == 1
    for part in ("wanted the CA of", "front-proxy-client", "mode 0644", "its key is on this disk"):
        assert part in result.stdout


@pytest.mark.parametrize("left", ["journal", "staging", "restart"])
def test_doctor_finds_what_was_interrupted(run: Run, tmp_path: Path, left: str) -> None:
    """An installation, or a restart that may have left a component's manifest away."""
    sentence = "an installation or restart is under way, or was interrupted"
    store = Store(tmp_path / "state")
    store.prepare()
    assert sentence not in run("doctor").stdout
    getattr(store, left).write_text("{}")
    result = run("doctor")
    assert result.exit_code == 1, result.output  # what is in it is not ours
    assert sentence in result.stdout
    assert f"{left}.json: wanted " in " ".join(result.stdout.split())


@pytest.mark.parametrize("ca", ["vault", "cfssl", "openssl"])
def test_setup_prints_what_the_cas_administrator_needs(run: Run, ca: str) -> None:
    """The output is for one authority, and needs no settings of a backend."""
    one = run("setup", ca, "--authority", "etcd-ca")
    assert one.exit_code == 0
    assert "kube-apiserver-etcd-client" in one.stdout or ca == "openssl"


def test_scripts_for_vault_may_follow_each_other(run: Run) -> None:
    """All of them can go to one shell; a script that can't follow another is refused, with the way out."""
    everything, one = run("setup", "vault"), run("setup", "vault", "--authority", "etcd-ca")
    assert everything.exit_code == 0
    assert one.stdout in everything.stdout
    for ca in ("openssl", "cfssl"):
        refused = run("setup", ca)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert "-o DIR" in refused.stderr


@pytest.mark.parametrize(
    "words",
    ["systemd --nodes n", "cron --authority ca", "kubernetes --nodes n", "kubernetes --enable", "vault --enable"],
)
def test_setup_refuses_an_option_that_has_no_meaning_for_its_type(run: Run, words: str) -> None:
    """It was left unread, and what was printed was not what was asked for."""
    result = run("setup", *words.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{words.split()[1]}: wanted " in result.stderr


def test_setup_writes_a_file_for_each_ca(run: Run, tmp_path: Path) -> None:
    """With the directory that the settings name for each; never over an older file."""
    result = run("setup", "openssl", "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.stderr
    files = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert files.keys() == {"ca.cnf", "etcd-ca.cnf", "front-proxy-ca.cnf"}
    assert all(f"database = {tmp_path}/cas/{name.removesuffix('.cnf')}/index.txt" in files[name] for name in files)
    assert run("setup", "openssl", "-o", str(tmp_path / "out")).exit_code == 1


def test_setup_of_many_nodes_from_one_list(run: Run, config: Path, tmp_path: Path) -> None:
    """Each node has scripts with its own names in its own roles, and this node's are as without a list."""
    config.write_text(config.read_text().replace("[node]", '[node]\nname = "cp-1"'))
    nodes = tmp_path / "nodes"
    nodes.write_text("# control plane\ncp-1 192.0.2.10\ncp-2 192.0.2.12\n")
    result = run("setup", "vault", "--nodes", str(nodes), "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.stderr
    second = (tmp_path / "out/cp-2-ca.sh").read_text()
    assert "kubeadm-cp-2-apiserver" in second
    assert "192.0.2.12" in second
    assert "cp-1" not in second
    assert "192.0.2.10" not in second
    assert (tmp_path / "out/cp-1-ca.sh").read_text() == run("setup", "vault", "--authority", "ca").stdout
    assert run("setup", "cfssl", "--nodes", str(nodes), "-o", str(tmp_path / "one-server")).exit_code == 1
    nodes.write_text("cp-7 192.0.2.17\n")
    refused = run("setup", "vault", "--nodes", str(nodes))
    assert refused.exit_code == 2
    assert "this node in it, too (cp-1)" in refused.stderr


def vault(config: Path, keys: str) -> None:
    """The settings so far of a node below a Vault: one authority, whose table has these keys."""
    node = config.read_text().partition("[backend")[0].partition("[authority")[0]
    config.write_text(f'{node}\n[backend.corp]\ntype = "vault"\n[authority.ca]\nbackend = "corp"\n{keys}\n')


def test_each_nodes_script_for_vault_writes_a_policy_of_its_own(run: Run, config: Path) -> None:
    """Each node has its own policy, so that one node's script does not take another's rights away, or give it its own."""
    text = config.read_text()
    policies = set()
    for names in ('name = "cp-1"', 'name = "cp-2"', 'name = "cp-1"\ncluster = "blue"', 'name = "blue-cp-1"',
                  'name = "eu-cp-1"\ncluster = "blue"', 'name = "cp-1"\ncluster = "blue-eu"'):  # fmt: skip
        config.write_text(text.replace("[node]", f"[node]\n{names}"))
        policies |= set(re.findall("policy write (.*) - >", run("setup", "vault", "--authority", "etcd-ca").stdout))
    config.write_text(text.replace("[node]", '[node]\nname = "cp-1-etcd"'))
    assert "policy write ca-bridge-cp-1-etcd_ca -" in run("setup", "vault", "--authority", "ca").stdout
    nodes = ("cp-1", "cp-2", "blue_cp-1", "blue-cp-1", "blue_eu-cp-1", "blue-eu_cp-1")
    assert policies == {f"ca-bridge-{node}_etcd-ca" for node in nodes}


def test_the_script_for_vault_follows_the_settings(run: Run, config: Path) -> None:
    """Settings that are not set yet may be missing; a mode without roles writes none."""
    vault(config, 'mount = "corp-pki"\nrole = "cp-1-{name}"')
    assert "corp-pki/roles/cp-1-apiserver " in run("setup", "vault", "--authority", "ca").stdout
    vault(config, 'mount = "corp-pki"\nmode = "sign-verbatim"')
    result = run("setup", "vault", "--authority", "ca")
    assert (result.exit_code, "/roles/" in result.stdout) == (0, False)
    assert 'path "corp-pki/sign-verbatim"' in result.stdout


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ('role = "{nod}-{name}"', "role: wanted a text that may hold {name}, {usage} and {node}"),
        ('roles = "cp-1"', "roles: wanted a table of texts"),
        ('mode = "verbatim"', "mode: wanted one of 'sign', 'sign-verbatim'"),
    ],
)
def test_the_script_for_vault_is_not_made_from_settings_that_are_wrong(
    run: Run, config: Path, keys: str, wanted: str
) -> None:
    """The place is named, as for every command."""
    vault(config, keys)
    result = run("setup", "vault", "--authority", "ca")
    line = config.read_text().splitlines().index(keys) + 1
    assert result.exit_code == 2
    assert f"{config}:{line}: authority.ca.{wanted}" in result.stderr


def test_settings_show_names_secrets_and_shows_defaults(run: Run) -> None:
    """The command shows the values in force, and the place of a secret instead of the secret."""
    result = run("settings", "show")
    assert result.exit_code == 0
    assert 'before = "30d"' in result.stdout
    assert "passphrase_file" in result.stdout


ODD_SETTINGS = """
[node]
kubernetes_version = "v1.37.2"
name = "cp-1"
[renewal]
before = "33%"
window = ["Sat-Sun 02:00-06:00", "Mon,Wed 22:00-02:00"]
window_zone = "Europe/Berlin"
[restart]
components = ["kube-scheduler", "kube-controller-manager"]
[restart.commands]
kubelet = "rc-service kubelet restart"
[hooks]
before = ["tell 'control plane'", "/usr/local/bin/\\"quoted\\""]
success = "tell"
[backend."a.b"]
type = "vault"
url = "https://vault.corp.example:8200"
[backend."a.b".auth]
method = "approle"
role_id_file = "/etc/ca-bridge/role-id"
secret_id_env = "SECRET_ID"
[backend."a.b".roles]
"admin.conf" = "cluster-admin"
[backend.desk]
type = "openssl"
[backend.signer]
type = "cfssl"
url = "https://cfssl.corp.example:8881"
endpoint = "sign"
[authority.front-proxy-ca]
backend = "signer"
[authority.ca]
backend = "a.b"
allow_extra_subject = ["OU=Platform", "C=DE"]
[authority.etcd-ca]
backend = "desk"
dir = "/srv/ca"
digest = "sha384"
"""


EXAMPLES = [cli_settings.initial("vault"), cli_settings.initial("exchange")]


@pytest.mark.parametrize("text", ["", ODD_SETTINGS, *EXAMPLES], ids=["none", "odd", "vault", "exchange"])
def test_settings_show_prints_settings_that_mean_the_same(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exceptions to the subject included; the node's name and the time zone as they are taken."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    given = parse(text)
    shown = parse(cli_settings.in_force(given))
    assert registry.configured(shown, shown.authorities) == registry.configured(given, given.authorities)
    taken = dataclasses.replace(
        shown, source=given.source, backends=given.backends, authority_tables=given.authority_tables
    )
    node = dataclasses.replace(given.node, name=given.node.node_name)
    renewal = dataclasses.replace(given.renewal, window_zone=Zone("Europe/Berlin"))
    assert taken == dataclasses.replace(given, node=node, renewal=renewal)


def test_messages_as_json_lines(run: Run) -> None:
    """Messages are JSON for a log collector; results stay as they are."""
    result = run("renew", "nonsense", "--log-format", "json")
    [line] = [json.loads(line) for line in result.stderr.splitlines()]
    assert line["level"] == "error"
    assert datetime.fromisoformat(line["time"]).tzinfo is not None


def test_a_bug_is_reported_without_its_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected exception may quote a secret; kind and place are enough for a report."""

    def bug(*_: object) -> None:
        raise RuntimeError(PLANTED)

    monkeypatch.setattr(registry, "configured", bug)
    result = run("renew", "-v")
    assert result.exit_code == 1
    assert "internal error: RuntimeError at " in result.stderr


def test_control_characters_never_reach_the_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CA's words may be in a message."""

    def refuse(*_: object) -> None:
        raise BridgeError("no \x1b[2J\x07")

    monkeypatch.setattr(registry, "configured", refuse)
    result = run("renew")
    assert "\x1b" not in result.stderr
    assert "error: no " in result.stderr


def test_a_plain_renew_with_nothing_due_loads_no_command_line(run: Run, config: Path, tmp_path: Path) -> None:
    """Anything else than `renew` with places goes the usual way, and so does a run that has failures to forget."""
    plain = ["renew", "--config", str(config)]
    assert entry.nothing_to_do(plain) is None  # all is due
    assert run("renew").exit_code == 0
    quiet = entry.nothing_to_do(plain)
    assert quiet is not None
    assert quiet.sentence.startswith("nothing is due: ")
    for other in ([], ["renew", "all"], ["renew", "-v"], ["plan"], ["renew", "--config"], ["renew", "--within", "3d"]):
        assert entry.nothing_to_do([*other, "--config", str(config)]) is None
    (tmp_path / "state/attempts.json").touch()
    assert entry.nothing_to_do(plain) is None


@pytest.mark.parametrize(("args", "run_id"), [((), ""), (("-v",), r" \[run \w+\]")], ids=["fast path", "command line"])
def test_a_result_that_cannot_be_written_is_an_error(
    run: Run, config: Path, args: tuple[str, ...], run_id: str
) -> None:
    """On a full disk: exit 1 and a line that says so; a closed standard output is no error."""
    assert run("renew").exit_code == 0
    # -P: the installed program, which knows that it has checked these settings; the sources beside it are another one
    command = shlex.join([sys.executable, "-P", "-c", "from bridge.entry import main; main()"])
    command = f"exec {command} {shlex.join(['renew', '--config', str(config), *args])}"
    full, closed = (
        subprocess.run(["sh", "-c", f"{command} {where}"], capture_output=True, text=True, check=False)
        for where in (">/dev/full", ">&-")
    )
    assert full.returncode == 1
    assert re.fullmatch(rf"error: .*No space left on device{run_id}\n", full.stderr)
    assert closed.returncode == 0
    assert "Traceback" not in closed.stderr


def to_a_full_disk(*args: str) -> tuple[int, str]:
    """Run the program with a standard output that can't be written: its exit code and its messages."""
    command = [sys.executable, "-c", "from bridge.entry import main; main()", *args]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stderr


def test_a_full_disk_below_the_result_hides_no_worse_code(node: Pki, config: Path, tmp_path: Path) -> None:
    """A hook that failed after the installation is still 7, for the metrics, too; the messages name the backup."""
    before, metrics = leaf_serial(node), tmp_path / "ca-bridge.prom"
    config.write_text(f'{config.read_text()}[hooks]\nafter_install = ["false"]\n[metrics]\nfile = "{metrics}"\n')
    code, said = to_a_full_disk("renew", "apiserver", "--config", str(config))
    assert (code, leaf_serial(node) != before) == (7, True)
    backups = tmp_path / "state/backups"
    (backup,) = backups.iterdir()
    text = f"standard output: No space left on device; files were replaced, and the old ones are in the backup {backup.name} "
    assert text in said
    assert "after_install" in said
    assert "ca_bridge_last_run_exit_code 7\n" in metrics.read_text()
    code, said = to_a_full_disk("rollback", "--config", str(config))
    assert (code, leaf_serial(node)) == (1, before)
    (newer,) = set(backups.iterdir()) - {backup}
    assert text.replace(backup.name, newer.name) in said
    code, said = to_a_full_disk("renew", "--rehearse", "front-proxy-client", "--config", str(config))
    assert (code, "files were replaced" in said) == (1, False)
    assert "ca_bridge_last_rehearsal_exit_code 1\n" in metrics.read_text()


@pytest.mark.parametrize(
    ("args", "code"),
    [(("--version",), 1), (("renew", "-h"), 1), (("backups",), 1), (("check-expiration", "-o", "nagios"), 3)],
)
def test_a_full_disk_below_other_output(config: Path, args: tuple[str, ...], code: int) -> None:
    """One line says it; for Nagios that is UNKNOWN, even where the line would have been CRITICAL."""
    places = ["--config", str(config)] if len(args) != 1 or args == ("backups",) else []
    found, said = to_a_full_disk(*args, *places)
    assert found == code
    assert re.fullmatch(r"error: standard output: No space left on device( \[run \w+\])?\n", said)


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "…"), ("iso-8859-1", "\\u2026")])
def test_a_locale_that_lacks_a_character_ends_no_command(encoding: str, shown: str) -> None:
    """Such as that of quotation marks, or of a name: it is shown by its number."""
    command = [sys.executable, "-c", "from bridge.entry import main; main()", "renew", "--help"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert f"[NAME{shown}|all]" in done.stdout.decode(encoding)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("help trouble >&-", 0),
        ("renew --help >&-", 0),
        ("bootstrap join --worker --shared - --name w-1 --advertise-address 192.0.2.3 <&-", 2),
        *((f"renew --no-such {where}", 2) for where in ("2>&-", "2>/dev/full", ">&- 2>&-")),
    ],
)
def test_a_closed_stream_is_no_error_of_the_program(config: Path, line: str, code: int) -> None:
    """It is as /dev/null; and where the message can't be written, too, a usage error ends with its own code."""
    program = [sys.executable, "-c", "from bridge.entry import main; main()"]
    shell = f"exec {shlex.join(program)} {line} --config {config}"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=False)
    assert (done.returncode, "internal error" in done.stderr) == (code, False), done.stderr


@pytest.mark.parametrize(("code", "ends_with"), [(8, 8), (7, 7), (3, 3), (130, 130), (4, 1), (2, 2), (0, 1)])
def test_messages_that_cannot_be_written_hide_no_worse_result(code: int, ends_with: int) -> None:
    """With a full disk below standard error a certificate that is not in use is still 7, as with a disk that is not full."""
    program = f"""
import contextlib, sys
from bridge import entry
with contextlib.suppress(OSError):
    sys.stderr.write("error: x\\n")
entry._end({code})
"""
    for where, wanted in (("/dev/full", ends_with), ("/dev/null", code)):
        with Path(where).open("w") as stream:
            assert subprocess.run([sys.executable, "-c", program], stderr=stream, check=False).returncode == wanted


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user; run the tests as root")
def test_nothing_due_for_a_user_who_may_not_look(run: Run, node: Pki, config: Path, tmp_path: Path) -> None:
    """A closed state directory is an error of ours, and no traceback."""
    assert run("renew").exit_code == 0
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(node.root, f"{directory}/node")
        shutil.copytree(tmp_path / "state", f"{directory}/state")
        for path in [Path(directory), *Path(directory, "node").rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        text = config.read_text().replace(str(node.root), f"{directory}/node")
        theirs = Path(directory, "config.toml")
        theirs.write_text(text.replace(str(tmp_path / "state"), f"{directory}/state"))
        plain = ["renew", "--config", str(theirs)]
        remember_checked(load(theirs), Store(Path(directory, "state")))
        quiet = entry.nothing_to_do(plain)
        assert quiet is not None
        assert quiet.sentence.startswith("nothing is due: ")
        os.seteuid(65534)
        try:
            assert entry.nothing_to_do(plain) is None
            result = CliRunner().invoke(app, plain)
        finally:
            os.seteuid(0)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error: {directory}/state: wanted a directory of user 65534")


def test_a_full_disk_is_named(run: Run, monkeypatch: pytest.MonkeyPatch, node: Pki, tmp_path: Path) -> None:
    """The error names the file that could not be written, nothing is replaced and no half backup is left; with room the same command works."""
    before = leaf_serial(node)

    fsync = os.fsync

    def full(descriptor: int) -> None:
        if ".ca-bridge-" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        result = run("renew", "apiserver")
    assert result.exit_code == 1
    assert re.search(r"error: .*/.*: No space left on device", result.stderr)
    assert leaf_serial(node) == before
    assert not list((tmp_path / "state/backups").iterdir())
    assert run("renew", "apiserver").exit_code == 0


def test_a_wrong_directory_is_not_a_healthy_node(run: Run, tmp_path: Path) -> None:
    """kubeadm lists everything as missing and is content; a probe that looks at the wrong place must not be."""
    result = run("check-expiration", "--pki-dir", str(tmp_path / "nowhere"))
    assert result.exit_code == 1
    assert "!MISSING! apiserver" in result.stdout
    assert str(tmp_path / "nowhere") in result.stderr
    assert run("check-expiration").exit_code == 0


@pytest.mark.parametrize(
    "command", [("audit", "verify"), ("audit", "show"), ("backups",), ("recover",), ("pending", "list")]
)
def test_a_wrong_directory_is_not_an_unchanged_record(run: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    """A missing directory is exit 2 and never "unchanged", or nothing open; a node without a run yet is unchanged."""
    wrong = run(*command, "--state-dir", str(tmp_path / "nowhere"))
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert f"--state-dir: wanted a state directory, found no directory {tmp_path / 'nowhere'}" in wrong.stderr
    assert run(*command).exit_code == 0


def test_the_demo_shows_the_main_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step comes out as it says, a step that does not is reported, and no existing file is overwritten."""
    result = CliRunner().invoke(app, ["demo", "--directory", str(tmp_path / "demo")])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\N{CHECK MARK}") == 8
    assert "FAILED" not in result.stdout
    again = CliRunner().invoke(app, ["demo", "--directory", str(tmp_path / "demo")])
    assert again.exit_code == 1
    monkeypatch.setattr(demo, "_is_good", lambda _: False)
    result = CliRunner().invoke(app, ["demo", "--directory", str(tmp_path / "other")])
    assert result.exit_code == 1
    assert "FAILED: `openssl verify -purpose` agrees: 0" in result.stdout
