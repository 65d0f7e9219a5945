"""The door's own server certificate: a further pair of its host, which `ca-bridge renew` asks the door itself for."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from bridge.contract import SignRequest
from bridge.errors import Exit
from bridge.pki import csr
from bridge.pki.certificates import load_pem_certificates, pem
from bridge.settings.load import load
from bridge.system.waiting import wait_until
from tests.kit.desks import POLICY, Desk
from tests.kit.issuing import Signer
from tests.kit.pki import Pki
from tests.kit.serving import ServeProgram, add_door, running

_PATIENCE = timedelta(minutes=3)
RULES = """
[certificate.door]
authority = "ca"
usages = ["server"]
subjects = ["CN=ca-door.corp.example"]
sans = ["ca-door.corp.example", "127.0.0.1"]
"""


def own_settings(desk: Desk, pki: Pki, door: ServeProgram) -> Path:
    """The settings of `renew` on the door's host, which has no cluster's files but the CA certificate."""
    trust = desk.directory / "trust"
    trust.mkdir(exist_ok=True)
    (trust / "ca.crt").write_bytes(pki.ca_pem("ca")[0])
    config = desk.directory / "own.toml"
    node = {"pki_dir": trust, "kubeconfig_dir": trust, "kubelet_dir": trust, "state_dir": desk.directory / "own-state"}
    config.write_text(
        "[node]\n" + "".join(f'{key} = "{path}"\n' for key, path in node.items()) + 'name = "ca-door"\n'
        f'[backend.door]\ntype = "door"\nurl = "{door.url}"\nca_file = "{trust / "ca.crt"}"\nwait = "2m"\n'
        '[authority.ca]\nbackend = "door"\n'
        f'[certificate.door]\ncertificate_file = "{door.certificate}"\nkey_file = "{door.key}"\n'
        'authority = "ca"\ncommon_name = "ca-door.corp.example"\nsans = ["ca-door.corp.example", "127.0.0.1"]\n'
    )
    return config


def first_pair(config: Path, pki: Pki, door: ServeProgram, left: timedelta = timedelta(days=20)) -> None:
    """A certificate that a person had signed, in the door's files."""
    pair, key = load(config).node.pairs[0], csr.generate_key("ecdsa-p256")
    request = SignRequest(
        spec=pair.spec, csr_pem=csr.build_for(pair.naming, key), validity=timedelta(days=20), replaces=None
    )
    now = datetime.now(UTC)
    issued = Signer.load(*pki.ca_pem("ca")).issue(request, begin=now - timedelta(minutes=5), end=now + left)
    door.certificate.write_bytes(pem(issued.leaf))
    door.key.write_bytes(csr.key_pem(key))


def renewed(config: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("ca-bridge")), "renew", "door", "--config", str(config)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "LC_ALL": "C.UTF-8"}
    )


def shown(door: ServeProgram) -> x509.Certificate:
    return x509.load_pem_x509_certificate(ssl.get_server_certificate(("127.0.0.1", door.port)).encode())


def test_an_ended_certificate_is_named_on_both_sides(desk: Desk, pki: Pki) -> None:
    """The door says so at its start, and `doctor` by its settings; a node's hint looks for it at the door, and not in `ca_file`."""
    door = add_door(desk.config, desk.directory)
    first_pair(own_settings(desk, pki, door), pki, door, -timedelta(minutes=1))
    with running(door):
        refused = " ".join(renewed(own_settings(desk, pki, door)).stderr.split())
    looked = desk.run("doctor")

    ended = f"own credential serve.certificate ({door.certificate}): wanted one that is valid"
    assert [ended in line["message"] for line in door.lines()].count(True) == 1
    assert ended in " ".join(looked.stdout.split()), looked.stdout
    assert ("certificate has expired" in refused, "serve.certificate of the door's settings" in refused) == (True, True)


def test_the_doors_own_certificate_renews_itself(desk: Desk, pki: Pki) -> None:
    """`renew` asks the door with the old key as the proof; the policy decides; the door shows the new one without a restart."""
    door = add_door(desk.config, desk.directory)
    door.ca = desk.directory / "trust/ca.crt"
    config = own_settings(desk, pki, door)
    first_pair(config, pki, door)
    with running(door):
        config = own_settings(desk, pki, door)
        old = shown(door)
        refused = renewed(config)
        unchanged = shown(door)
        desk.policy.write_text(POLICY.replace('["cp-*"]', '["cp-*", "ca-door"]') + RULES)
        run = wait_until(lambda: renewed(config), lambda one: one.returncode == 0, _PATIENCE, pause_seconds=0.5)
        new = wait_until(lambda: shown(door), lambda one: one != old, _PATIENCE, pause_seconds=0.1)
        ready = door.ask("GET", "/readyz").status

    assert refused.returncode == Exit.REFUSED, refused.stderr
    assert unchanged == old
    assert run.returncode == Exit.DONE, run.stderr
    assert new == load_pem_certificates(door.certificate.read_bytes())[0] != old
    assert new.public_key() != old.public_key()
    assert ready == 200
    assert len(desk.issued()) == 1
    lines = [json.loads(line) for line in (desk.state / "audit.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines if line["event"] == "signed for others"] == ["door"]
