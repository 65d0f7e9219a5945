"""A rehearsal: signed by the real CAs, proven and thrown away; nothing on the node is another one afterwards."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from backends.openssl import OpensslBackend
from backends.openssl.settings import OpensslSettings
from backends.vault import VaultBackend
from bridge.ca import CA, CLOSED
from bridge.ca.retry import NoWaitPolicy
from bridge.contract import Issued, SignRequest
from bridge.errors import BackendRefusedError, BackendUnavailableError, Exit
from bridge.node import inventory
from bridge.renewal import renew
from bridge.renewal.issuance import Answered
from bridge.renewal.prepare import prepare
from bridge.renewal.renew import Rehearsal
from bridge.renewal.selection import RunOptions
from bridge.renewal.verify_and_install import expectations
from bridge.settings.load import load, parse
from bridge.settings.tables import Settings, for_next, for_rehearsal
from bridge.state import Store, audit
from tests.kit import exec_programs, metrics, openbao, opensslca
from tests.kit.cas import Bridge, add_openssl, add_vault
from tests.kit.pki import Pki, handmade_pki
from tests.kit.renewing import Quiet, settings_for

DAY = timedelta(days=1)
AUTHORITIES = ("ca", "etcd-ca", "front-proxy-ca")


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def node(tmp_path: Path) -> Pki:
    """Its certificates are due in five days."""
    return handmade_pki(tmp_path / "node", not_after=now() + 35 * DAY)


def rehearsed(settings: Settings, *names: str, quiet: Quiet | None = None, **options: Any) -> Rehearsal:
    return renew.rehearse(settings, RunOptions(names=names, **options), now, quiet or Quiet())


def files(node: Pki) -> dict[str, tuple[int, int, bytes]]:
    """Each file's inode, time and content."""
    paths = [path for path in node.kubeconfig_dir.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def database(directory: Path) -> list[str]:
    """V or R for each certificate that the CAs have signed."""
    lines = [line for path in directory.glob("*/index.txt") for line in path.read_text().splitlines()]
    return [line[0] for line in lines]


def state(settings: Settings) -> set[str]:
    return {path.name for path in settings.node.state_dir.iterdir()}


def test_everything_is_signed_proven_and_thrown_away(node: Pki, tmp_path: Path) -> None:
    """Certificates that are not due are signed, too; each is revoked in its CA's database, and no key is on disk."""
    settings, before = settings_for(node, tmp_path), files(node)
    result = rehearsed(settings)
    assert (result.exit_code, result.failed, result.errors) == (0, (), ())
    assert len(result.passed) == 12
    assert all(one.revoked for one in result.passed)
    assert database(tmp_path / "cas") == ["R"] * 12
    assert files(node) == before
    assert list((settings.node.state_dir / "backups").iterdir()) == []
    assert not {"requests.json", "journal.json", "staging.json", "unproven.json", "attempts.json"} & state(settings)
    everything = b"".join(path.read_bytes() for path in settings.node.state_dir.rglob("*") if path.is_file())
    assert b"PRIVATE KEY" not in everything
    # the renewal that comes after it is none the worse
    assert renew.run(settings, RunOptions(names=("all",)), now, Quiet())[0].exit_code == 0
    assert sorted(database(tmp_path / "cas")) == ["R"] * 12 + ["V"] * 12


def test_the_record_has_it(node: Pki, tmp_path: Path) -> None:
    """The audit log records the request, the certificate, the mark of a rehearsal, and the result."""
    settings = settings_for(node, tmp_path)
    rehearsed(settings, "apiserver")
    events = [line["event"] for line in audit.events(Store(settings.node.state_dir), None, None)]
    wanted = [audit.REHEARSED, audit.ASKED, audit.ISSUED, audit.VERIFIED, audit.REVOKED, audit.REHEARSED]
    assert events == wanted
    last = list(audit.events(Store(settings.node.state_dir), None, "apiserver"))[-1]
    assert last["result"] == "passed, and revoked"


@pytest.mark.parametrize(("ahead", "count"), [(2 * DAY, 0), (6 * DAY, 12), (None, 12)])
def test_ahead_of_what_is_due(node: Pki, tmp_path: Path, ahead: timedelta | None, count: int) -> None:
    """The day before it matters, and no other day; a sentence says that there was nothing to do."""
    result = rehearsed(settings_for(node, tmp_path), ahead=ahead)
    assert (len(result.passed), result.exit_code) == (count, 0)
    assert ("nothing is due within 2d" in result.skipped) == (count == 0)


def test_what_a_renewal_would_refuse_is_refused(node: Pki, tmp_path: Path) -> None:
    """A CA with another key under the same name: exit 5, the others pass; what it signed is revoked all the same."""
    other = handmade_pki(tmp_path / "other")
    settings, before = settings_for(node, tmp_path, etcd_ca=other.ca_pem("etcd-ca")), files(node)
    result = rehearsed(settings)
    assert result.exit_code == Exit.REFUSED
    assert {one.authority for one in result.failed} == {"etcd-ca"}
    assert {one.outcome.authority for one in result.passed} == {"ca", "front-proxy-ca"}
    assert files(node) == before
    assert "V" not in database(tmp_path / "cas")


def test_failures_do_not_make_renewals_pause(node: Pki, tmp_path: Path) -> None:
    """A rehearsal that fails again and again leaves the next renewal as it is."""
    other = handmade_pki(tmp_path / "other")
    settings = settings_for(node, tmp_path, ca=other.ca_pem("ca"))
    for _ in range(4):
        assert rehearsed(settings, "apiserver").exit_code == Exit.REFUSED
    assert not Store(settings.node.state_dir).attempts.exists()


def test_a_scratch_ca_signs_what_is_thrown_away(node: Pki, tmp_path: Path) -> None:
    """The renewal's CA signs nothing, though what the scratch CA gives ends sooner than the live certificate."""
    scratch = handmade_pki(tmp_path / "scratch")
    place = opensslca.make_ca_directory(tmp_path / "scratch-ca", *scratch.ca_pem("ca"))
    (tmp_path / "scratch.crt").write_bytes(scratch.ca_pem("ca")[0])
    plain = settings_for(node, tmp_path, '[renewal]\nvalidity = "20d"\nbefore = "10d"\nshorter = "allow"')
    table = {"dir": str(place), "anchor": str(tmp_path / "scratch.crt")}
    ours = dataclasses.replace(plain.authorities["ca"], rehearsal=table)
    settings = dataclasses.replace(plain, authorities={**plain.authorities, "ca": ours})
    result = rehearsed(settings, "apiserver", "etcd-server")
    assert (result.exit_code, len(result.passed)) == (0, 2)
    assert database(place.parent) == ["R"]
    assert database(tmp_path / "cas") == ["R"]  # etcd's
    # without its certificate as an anchor, what it signs is another CA's
    without = dataclasses.replace(ours, rehearsal={"dir": str(place)})
    settings = dataclasses.replace(plain, authorities={**plain.authorities, "ca": without})
    assert rehearsed(settings, "apiserver").exit_code == Exit.REFUSED


def test_the_table_of_a_rehearsal() -> None:
    """Its keys count more than the authority's; with another backend those don't count; a wrong name is reported."""
    text = (
        '[backend.a]\ntype = "vault"\nurl = "https://a"\n[backend.b]\ntype = "openssl"\n'
        '[authority.ca]\nbackend = "a"\nmount = "m"\nrole = "r"\n[authority.ca.rehearsal]\n'
    )
    same = for_rehearsal(parse(f'{text}role = "scratch"'))
    assert same.authority_tables["ca"] == {"mount": "m", "role": "scratch"}
    other = for_rehearsal(parse(f'{text}backend = "b"\ndir = "/srv/scratch"'))
    assert (other.authorities["ca"].backend, other.authority_tables["ca"]) == ("b", {"dir": "/srv/scratch"})
    for wrong, says in (('backend = "c"', "the name of a backend: a, b"), ('anchor = "x"', "an absolute path")):
        with pytest.raises(Exception, match=says):
            parse(f"{text}{wrong}")


def test_the_table_of_a_next_ca() -> None:
    """The same, but that its certificate has to be named; a backend that nothing uses then may have half a table."""
    text = (
        '[backend.a]\ntype = "vault"\nurl = "https://a"\n[backend.b]\ntype = "openssl"\n'
        '[authority.ca]\nbackend = "a"\nmount = "m"\nrole = "r"\n[authority.ca.next]\n'
    )
    same = parse(f'{text}mount = "m2"\nanchor = "/new.crt"')
    assert for_next(same, ["ca"]).authority_tables["ca"] == {"mount": "m2", "role": "r"}
    assert for_next(same, []).authority_tables["ca"] == {"mount": "m", "role": "r"}
    other = for_next(parse(f'{text}backend = "b"\ndir = "/srv/new"\nanchor = "/new.crt"'), ["ca"])
    assert (other.authorities["ca"].backend, other.authority_tables["ca"]) == ("b", {"dir": "/srv/new"})
    assert "a" not in other.backends
    for wrong, says in (
        ('mount = "m2"', "the file with the next CA's certificate"),
        ('backend = "c"\nanchor = "/x"', "the name of a backend: a, b"),
        ('anchor = "x"', "an absolute path"),
    ):
        with pytest.raises(Exception, match=says):
            parse(f"{text}{wrong}")


# --- CAs that answer otherwise -----------------------------------------------------------------------------------------


def test_an_open_request_is_left_alone(node: Pki, tmp_path: Path) -> None:
    """A rehearsal does not send a request again that waits for a person, and leaves it as it is."""
    bridge = bridge_of(node, tmp_path)
    bridge.add("backend.people", {"type": "exec", "command": [str(exec_programs.person(tmp_path / "people"))]})
    bridge.tables = [table.replace('"front-proxy-ca-desk"\n', '"people"\n') if "[authority." in table else table
                     for table in bridge.tables]  # fmt: skip
    bridge.add("audit", {})
    assert bridge.run("renew", "front-proxy-client").returncode == Exit.WAITING
    requests = (bridge.directory / "state/requests.json").read_bytes()
    run = bridge.run("renew", "--rehearse")
    assert run.returncode == 0, run.stderr
    assert "front-proxy-client is not rehearsed: a CA has a request for it already" in run.stderr
    assert (bridge.directory / "state/requests.json").read_bytes() == requests
    assert len(list((tmp_path / "people").glob("*.csr"))) == 1


def test_a_ca_that_answers_later_is_reported_honestly(node: Pki, tmp_path: Path) -> None:
    """Exit 4: the request is with the CA, its key is gone, and no later run asks for the answer."""
    bridge = bridge_of(node, tmp_path)
    bridge.add("backend.people", {"type": "exec", "command": [str(exec_programs.person(tmp_path / "people"))]})
    bridge.tables = [table.replace('"front-proxy-ca-desk"\n', '"people"\n') if "[authority." in table else table
                     for table in bridge.tables]  # fmt: skip
    bridge.add("audit", {})
    run = bridge.run("renew", "--rehearse", "front-proxy-client", "apiserver")
    assert run.returncode == Exit.WAITING
    assert "has not answered yet" in run.stderr
    assert "its key is thrown away" in run.stderr
    assert "the people who approve requests at the CA may refuse this one" in run.stderr
    assert not (bridge.directory / "state/requests.json").exists()


def test_a_request_that_people_carry_is_not_rehearsed(node: Pki, tmp_path: Path) -> None:
    """Nothing goes into the outbox; exit 2 says what to do instead."""
    bridge = bridge_of(node, tmp_path)
    for name in ("outbox", "inbox"):
        (tmp_path / name).mkdir()
    places = {"outbox": str(tmp_path / "outbox"), "inbox": str(tmp_path / "inbox")}
    bridge.add("backend.door", {"type": "exchange", **places})
    bridge.tables = [table.replace('"etcd-ca-desk"\n', '"door"\n') if "[authority." in table else table
                     for table in bridge.tables]  # fmt: skip
    bridge.add("audit", {})
    run = bridge.run("renew", "--rehearse")
    assert run.returncode == Exit.USAGE
    assert "door (exchange): people carry its requests, and would carry this one for nothing" in " ".join(
        run.stderr.split()
    )
    assert list((tmp_path / "outbox").iterdir()) == []
    assert "8 signed, verified and thrown away" in run.stdout


def test_a_door_is_not_rehearsed(node: Pki, tmp_path: Path) -> None:
    """It is not even asked; the message names what would be left, and no people, since none carry."""
    bridge = bridge_of(node, tmp_path)
    bridge.add("backend.door", {"type": "door", "url": "https://127.0.0.1:9"})
    bridge.tables = [table.replace('"etcd-ca-desk"\n', '"door"\n') if "[authority." in table else table
                     for table in bridge.tables]  # fmt: skip
    bridge.add("audit", {})
    run = bridge.run("renew", "--rehearse")
    assert run.returncode == Exit.USAGE
    assert "door (door): nothing revokes what it signs" in " ".join(run.stderr.split())
    assert "8 signed, verified and thrown away" in run.stdout


def issued(node: Pki, settings: Settings, name: str) -> Answered:
    """The live certificate, taken for the CA's answer."""
    found = inventory.read(node.pki_dir, node.kubeconfig_dir)
    [item] = [one for one in found.items if one.spec.name == name]
    demands, _ = expectations(found, settings, [item], now())
    [made], _ = prepare([item], settings)
    answer = Issued(leaf=item.certificates[0])
    return Answered(prepared=made, expected=demands[item.spec.authority.name], label="ca", answer=answer)


def test_a_certificate_that_is_not_for_our_key_is_never_revoked(node: Pki, tmp_path: Path) -> None:
    """A CA that answers with the live certificate would have us revoke it."""
    answered, ca = (
        issued(node, settings_for(node, tmp_path), "apiserver"),
        CA(label="ca", backend=CLOSED, retry=NoWaitPolicy()),
    )
    assert renew._signed([answered], ca, now()) == []
    signed = sign(answered.prepared.request, node, tmp_path)
    assert renew._signed([dataclasses.replace(answered, answer=signed)], ca, now()) == [("apiserver", signed.leaf)]


def sign(request: SignRequest, node: Pki, directory: Path) -> Issued:
    """By the node's own CA."""
    place = opensslca.make_ca_directory(directory / "by-hand", *node.ca_pem("ca"))
    backend = OpensslBackend.from_settings(OpensslSettings(dir=place))
    answer = backend.sign(request)
    assert isinstance(answer, Issued)
    return answer


@pytest.mark.parametrize(("error", "code"), [(BackendRefusedError("no"), 0), (BackendUnavailableError("away"), 6)])
def test_what_can_not_be_revoked_is_reported(
    node: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    """With its serial number: a CA that does not revoke for us is no failure of the rehearsal, one that is away is."""

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(OpensslBackend, "revoke", fails)
    settings, quiet = settings_for(node, tmp_path), Quiet()
    settings = dataclasses.replace(settings, backends={"desk": {**settings.backends["desk"], "retry_for": "1s"}})
    result = rehearsed(settings, "apiserver", quiet=quiet)
    assert (result.exit_code, [one.revoked for one in result.passed]) == (code, [False])
    said = [*quiet.notes, *map(str, result.errors)]
    assert any("not revoked: apiserver, serial " in text for text in said), said


def test_what_was_signed_and_lost_is_revoked(node: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CA had signed when its answer got lost; it can be found again by its key."""
    real = OpensslBackend.sign_many

    def loses(self: OpensslBackend, requests: Any) -> Any:
        real(self, requests)
        raise BackendRefusedError("the pipe broke")

    monkeypatch.setattr(OpensslBackend, "sign_many", loses)
    result = rehearsed(settings_for(node, tmp_path), "apiserver", "etcd-peer")
    assert result.exit_code == Exit.REFUSED
    assert database(tmp_path / "cas") == ["R", "R"]


# --- the program -------------------------------------------------------------------------------------------------------


def bridge_of(node: Pki, directory: Path) -> Bridge:
    bridge = Bridge(pki=node, directory=directory / "bridge")
    for name in AUTHORITIES:
        add_openssl(bridge, name)
    return bridge


def test_as_an_operator_sees_it(node: Pki, tmp_path: Path) -> None:
    """A table, a sentence, JSON; monitors get a metric of its own, and a rehearsal counts as no run."""
    bridge = bridge_of(node, tmp_path)
    file = tmp_path / "ca-bridge.prom"
    bridge.add("metrics", {"file": str(file)})
    run = bridge.run("renew", "--rehearse", "apiserver", "scheduler.conf")
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert lines[-1] == "2 signed, verified and thrown away; nothing on this node was replaced"
    assert [line.split()[-1] for line in lines[:2]] == ["revoked", "revoked"]
    assert max(map(len, lines)) <= 80
    assert metrics.value(file, "ca_bridge_last_rehearsal_exit_code") == 0
    assert metrics.value(file, "ca_bridge_last_run_seconds") is None
    document = json.loads(bridge.run("renew", "--rehearse", "apiserver", "-o", "json").stdout)
    assert [(one["name"], one["revoked"]) for one in document["rehearsed"]] == [("apiserver", True)]
    assert bridge.run("renew", "--rehearse", "--dry-run").returncode == Exit.USAGE
    assert bridge.run("renew", "--ahead", "2d").returncode == Exit.USAGE
    quiet = bridge.run("renew", "--rehearse", "--ahead", "1d")
    assert (quiet.returncode, quiet.stdout) == (0, "nothing to rehearse; nothing on this node was replaced\n")
    (tmp_path / "bridge/desk/ca/ca.key").write_text("not a key")
    failed = bridge.run("renew", "--rehearse", "apiserver")
    assert failed.returncode != 0
    assert metrics.value(file, "ca_bridge_last_rehearsal_exit_code") == failed.returncode
    assert metrics.value(file, "ca_bridge_consecutive_failures") is None


def test_killed_in_the_middle(node: Pki, tmp_path: Path) -> None:
    """Nothing of the node has changed, no key is left, and the next renewal goes on as ever."""
    bridge = bridge_of(node, tmp_path)
    before = files(node)
    program = str(Path(sys.executable).with_name("ca-bridge"))
    for delay in (0.4, 0.7, 1.0):
        with subprocess.Popen(
            [program, "renew", "--rehearse", "--config", str(bridge.config)], stdout=subprocess.DEVNULL
        ) as run:
            time.sleep(delay)
            os.kill(run.pid, signal.SIGKILL)
        assert files(node) == before
        found = [path for path in (bridge.directory / "state").rglob("*") if path.is_file()]
        assert not any(b"PRIVATE KEY" in path.read_bytes() for path in found)
    assert bridge.run("renew", "all").returncode == 0


@pytest.fixture(scope="module")
def bao() -> Iterator[openbao.OpenBao]:
    with openbao.dev_server() as server:
        yield server


def test_with_openbao(node: Pki, tmp_path: Path, bao: openbao.OpenBao) -> None:
    """Signed by the role of a renewal; revoked where the policy allows that; else the command says that it is not."""
    bridge = Bridge(pki=node, directory=tmp_path / "bridge")
    for name in AUTHORITIES:
        add_vault(bridge, bao, name, "rehearsal")
    reported = bridge.run("renew", "--rehearse", "apiserver")
    assert reported.returncode == 0, reported.stderr
    assert "not revoked: apiserver, serial" in reported.stderr
    policy = bao.read("sys/policies/acl/rehearsal-ca")["data"]["policy"]
    bao.add_policy("rehearsal-ca", policy + '\npath "rehearsal-ca/revoke" { capabilities = ["update"] }\n')
    run = bridge.run("renew", "--rehearse", "apiserver", "-o", "json")
    assert (run.returncode, run.stderr) == (0, "")
    [one] = json.loads(run.stdout)["rehearsed"]
    serial = one["serialNumber"].lower()
    number = serial.replace(":", "")
    pairs = "-".join(number.zfill(len(number) + len(number) % 2)[i : i + 2] for i in range(0, len(number), 2))
    assert bao.read(f"rehearsal-ca/cert/{pairs}")["data"]["revocation_time"] > 0


def test_a_right_that_a_node_should_not_have_is_not_missed(
    node: Pki, tmp_path: Path, bao: openbao.OpenBao, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the policy that `setup vault` prints, no warning says that what was lost can't be looked for."""
    bridge = Bridge(pki=node, directory=tmp_path / "bridge")
    add_vault(bridge, bao, "ca", "unlisted")

    def loses(*_: object) -> None:
        raise BackendRefusedError("the pipe broke")

    monkeypatch.setattr(VaultBackend, "sign", loses)
    assert rehearsed(load(bridge.config), "apiserver").exit_code == Exit.REFUSED
    assert "may not list" not in caplog.text


def test_a_credential_that_is_good_once_is_left_to_the_renewal(node: Pki, tmp_path: Path, bao: openbao.OpenBao) -> None:
    """A wrapped secret_id is not used up: exit 2 says why no CA was asked, and the renewal finds it unused."""
    bridge = Bridge(pki=node, directory=tmp_path / "bridge")
    for name in AUTHORITIES:
        add_vault(bridge, bao, name, "once")
        wrapped = bao.wrapped(f"auth/approle/role/once-{name}/secret-id")
        bridge.secret(f"once-{name}.secret-id", wrapped)
    bridge.tables = [f"{one}wrapped = true\n" if ".auth]" in one else one for one in bridge.tables]
    bridge.add("audit", {})
    reported = bridge.run("renew", "--rehearse", "apiserver")
    assert reported.returncode == Exit.USAGE
    assert "a rehearsal would use up" in reported.stderr
    renewal = bridge.run("renew", "apiserver")
    assert renewal.returncode == 0, renewal.stderr
