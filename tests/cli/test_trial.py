"""`ca-bridge backend test`: the suite of the contract, run by the program itself against what the settings name."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.errors import Exit
from bridge.specs import AUTHORITIES
from tests.kit import exec_programs
from tests.kit.cas import Bridge, add_openssl
from tests.kit.exec_programs import program
from tests.kit.pki import Pki, handmade_pki

CHECKS = 11


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    """A node's, whose certificates end soon."""
    return handmade_pki(tmp_path / "node", not_after=datetime.now(UTC) + timedelta(days=10))


def bridge_with(pki: Pki, directory: Path, script: Path, authority: str = "front-proxy-ca") -> Bridge:
    """The authority with one certificate has a program."""
    bridge = Bridge(pki=pki, directory=directory / "bridge")
    bridge.add("backend.site", {"type": "exec", "command": [str(script)], "timeout": "3m", "retry_for": "1s"})
    bridge.add(f"authority.{authority}", {"backend": "site"})
    return bridge


def words(output: str) -> list[str]:
    """What each check came to: the lines between the first and the last."""
    return [line[:10].strip() for line in output.splitlines()[1:-1]]


def everything(directory: Path) -> dict[str, str]:
    """Digests of all files, and the names of all directories."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in directory.rglob("*")
    }


@pytest.mark.parametrize("authority", AUTHORITIES)
def test_a_good_script_passes(pki: Pki, tmp_path: Path, authority: str) -> None:
    """Every check but those of abilities that it lacks; the node, its state directory included, is as before."""
    script = exec_programs.site_ca(tmp_path / "ca", *pki.ca_pem(authority))
    bridge = bridge_with(pki, tmp_path, script, authority)
    before = everything(pki.root) | everything(bridge.directory)
    run = bridge.run("backend", "test", authority)
    assert run.returncode == 0, run.stdout + run.stderr
    assert sorted(words(run.stdout)) == ["can't"] * 2 + ["ok"] * (CHECKS - 2)
    assert "this node's names" in run.stdout
    assert "collect, check, issuers" in run.stdout
    assert everything(pki.root) | everything(bridge.directory) == before


def test_another_backend_passes(pki: Pki, tmp_path: Path) -> None:
    """The suite is the contract's, and not the script's: `openssl ca`, which signs batches and revokes."""
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    add_openssl(bridge, "front-proxy-ca")
    run = bridge.run("backend", "test", "front-proxy-ca")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ok         it signs a batch in its order" in run.stdout
    assert "revoke" in run.stdout.splitlines()[0]


SPOILT = {
    "other usages": ('extendedKeyUsage=%s\\n\' "$CA_BRIDGE_EKUS"', "extendedKeyUsage=codeSigning\\n'", "FAILED     it signs exactly what was asked (rsa-2048): front-proxy-client: EKU"),
    "no names": ("-copy_extensions copy", "", "FAILED     it signs exactly what was asked (rsa-2048): apiserver: SAN"),
    "other profiles": ("server,client,peer", "web", "FAILED     its preflight finds nothing wrong: front-proxy-client: profile"),
    "one serial number": ("$(openssl rand -hex 16)", "77", "FAILED     it signs the same CSR again: wanted a serial number for each certificate, found 77 twice"),
    "not so long": ('"$CA_BRIDGE_DAYS"', "30", "differs    it gives the validity that was asked for"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_a_script_that_is_wrong_is_reported(pki: Pki, tmp_path: Path, what: str) -> None:
    """The trial names the check that fails, with what was wanted and found; what the contract leaves open is no failure."""
    old, new, line = SPOILT[what]
    authority, names = ("ca", ["apiserver"]) if what == "no names" else ("front-proxy-ca", [])
    script = exec_programs.site_ca(tmp_path / "ca", *pki.ca_pem(authority))
    assert old in script.read_text()
    script.write_text(script.read_text().replace(old, new))
    run = bridge_with(pki, tmp_path, script, authority).run("backend", "test", authority, *names)
    assert line in run.stdout
    assert run.returncode == (0 if what == "not so long" else 5)


def test_another_ca_is_reported(pki: Pki, tmp_path: Path) -> None:
    """The certificates are compared with the node's own CA certificate."""
    script = exec_programs.site_ca(tmp_path / "ca", *pki.ca_pem("etcd-ca"))
    run = bridge_with(pki, tmp_path, script).run("backend", "test", "front-proxy-ca")
    assert run.returncode == 5
    assert f"compared with {pki.pki_dir}/front-proxy-ca.crt" in run.stdout
    assert "FAILED     its preflight finds nothing wrong: wanted the CA of" in run.stdout
    assert "FAILED     it signs exactly what was asked (ecdsa-p256): front-proxy-client: issuer: wanted" in run.stdout


def test_nothing_more_is_asked_of_a_ca_that_is_down(pki: Pki, tmp_path: Path) -> None:
    """One answer is enough; the exit code says that it may be another one later."""
    script = program(tmp_path / "down", f'echo >>"{tmp_path}/calls"; echo "no route"; exit 3')
    run = bridge_with(pki, tmp_path, script).run("backend", "test", "front-proxy-ca")
    assert run.returncode == 6
    assert words(run.stdout) == ["no answer", *["not tried"] * (CHECKS - 2), "can't"]
    assert '"no route"' in run.stdout
    assert (tmp_path / "calls").read_text().count("\n") == 1


def test_a_person_is_asked_once(pki: Pki, tmp_path: Path) -> None:
    """Where an answer takes a day there is one open request, and no more."""
    desk = tmp_path / "desk"
    run = bridge_with(pki, tmp_path, exec_programs.person(desk)).run("backend", "test", "front-proxy-ca")
    assert run.returncode == 4
    assert words(run.stdout) == ["ok", "no answer", *["not tried"] * (CHECKS - 3), "can't"]
    assert "still waiting" in run.stdout
    assert len(list(desk.glob("*.csr"))) == 1


def test_what_people_would_carry_is_named(pki: Pki, tmp_path: Path) -> None:
    """An exchange's request stays in the outbox, and the command says so; it says nothing where none was written."""
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    outbox, inbox = tmp_path / "outbox", tmp_path / "inbox"
    bridge.add("backend.desk", {"type": "exchange", "outbox": str(outbox), "inbox": str(inbox)})
    bridge.add("authority.ca", {"backend": "desk"})
    inbox.mkdir()
    without = bridge.run("backend", "test", "ca", "apiserver")
    outbox.mkdir()
    run = bridge.run("backend", "test", "ca", "apiserver")

    assert (without.returncode, run.returncode) == (Exit.UNAVAILABLE, Exit.WAITING), run.stderr
    assert len(list(outbox.iterdir())) == 1
    said = "the requests of this test stay in the outbox: remove them"
    assert [said in " ".join(one.stdout.split()) for one in (without, run)] == [False, True]


def test_a_ca_that_answers_later_is_waited_for(pki: Pki, tmp_path: Path) -> None:
    """With --wait each answer has that long to come."""
    script = exec_programs.site_ca(tmp_path / "ca", *pki.ca_pem("front-proxy-ca"))
    first, later = (
        "  SUBMIT) ;;\n",
        '  SUBMIT) echo cookie; exit 1 ;;\n  POLL) [ "$CERTMONGER_CA_COOKIE" = cookie ] || exit 2 ;;\n',
    )
    script.write_text(script.read_text().replace(first, later))
    run = bridge_with(pki, tmp_path, script).run("backend", "test", "front-proxy-ca", "--wait", "1m")
    assert run.returncode == 0, run.stdout + run.stderr
    assert sorted(words(run.stdout)) == ["can't"] * 2 + ["ok"] * (CHECKS - 2)


def test_a_script_is_tried_where_there_is_no_node(tmp_path: Path) -> None:
    """An author's machine: names are made up, and the CA's own word is what is compared with."""
    pki = handmade_pki(tmp_path / "elsewhere")
    script = exec_programs.site_ca(tmp_path / "ca", *pki.ca_pem("etcd-ca"))
    here = Pki(root=tmp_path / "here", external=True)
    run = bridge_with(here, tmp_path, script, "etcd-ca").run("backend", "test", "etcd-ca", "etcd-peer")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "names that are made up: etcd-peer" in run.stdout
    assert "the CA's own word" in run.stdout


def test_there_has_to_be_something_to_compare_with(tmp_path: Path) -> None:
    """No node, and a program that does not tell its CA."""
    here = Pki(root=tmp_path / "here", external=True)
    run = bridge_with(here, tmp_path, program(tmp_path / "mute", "exit 6")).run("backend", "test", "front-proxy-ca")
    assert run.returncode == 1
    assert "there is no certificate of front-proxy-ca to compare with" in run.stderr
    assert "--pki-dir" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["root-ca"], "wanted one of ca, etcd-ca, front-proxy-ca, found 'root-ca'"),
        (["front-proxy-ca", "apiserver"], "NAME: wanted one of front-proxy-client, found 'apiserver'"),
        (["etcd-ca"], "authority.etcd-ca is missing: a table with the CA's backend"),
    ],
)
def test_names_that_are_none_are_reported(pki: Pki, tmp_path: Path, arguments: list[str], found: str) -> None:
    """Unknown names are reported before anything runs."""
    script = program(tmp_path / "never", f'echo >"{tmp_path}/ran"; exit 6')
    run = bridge_with(pki, tmp_path, script).run("backend", "test", *arguments)
    assert run.returncode == 2
    assert found in run.stderr
    assert not (tmp_path / "ran").exists()


def test_a_credential_that_is_good_once_is_not_spent(pki: Pki, tmp_path: Path) -> None:
    """A wrapping token is kept for the next renewal; the trial asks no CA with it."""
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    bridge.add("backend.corp", {"type": "vault", "url": "http://127.0.0.1:1", "retry_for": "1s"})
    places = {"role_id_file": bridge.secret("role-id", "r"), "secret_id_file": bridge.secret("secret-id", "s")}
    bridge.add("backend.corp.auth", {"method": "approle", "wrapped": True, **places})
    bridge.add("authority.front-proxy-ca", {"backend": "corp"})
    run = bridge.run("backend", "test", "front-proxy-ca")
    assert run.returncode == 1
    assert "found the wrapping token in" in run.stderr
