"""What a CA would refuse, or sign in vain, is found before the night in which it matters."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from bridge.diagnosis import causes
from bridge.diagnosis.examination import examine
from bridge.node.kubelet import with_node_name
from bridge.settings.load import load
from tests.kit import openbao
from tests.kit.cas import Bridge, add_cfssl, add_openssl, add_vault
from tests.kit.loopback import LoopbackServer
from tests.kit.pki import NODE, handmade_pki


@pytest.fixture(scope="module")
def bao() -> Iterator[openbao.OpenBao]:
    with openbao.dev_server() as server:
        yield server


@pytest.fixture(scope="module")
def bridge(bao: openbao.OpenBao, tmp_path_factory: pytest.TempPathFactory) -> Bridge:
    """A node whose CA is in OpenBao, with the roles that are printed; the others are `openssl ca` directories."""
    directory = tmp_path_factory.mktemp("vault")
    bridge = Bridge(pki=handmade_pki(directory / "node", key="rsa-2048"), directory=directory / "bridge")
    bridge.tables[0] += f'name = "{NODE}"\n'
    add_vault(bridge, bao, "ca", "doctor")
    add_openssl(bridge, "etcd-ca")
    add_openssl(bridge, "front-proxy-ca")
    return bridge


def wrong(bridge: Bridge) -> list[tuple[str, str, list[str], str]]:
    """Level, check, subjects and text of what is not in order."""
    found = causes(examine(with_node_name(load(bridge.config)), datetime.now(UTC)))
    return [(one.level, one.check, list(one.about), one.text) for one in found if one.level not in ("ok", "note")]


#: The role's certificate, what an administrator changes, and how the finding begins.
ROLES: list[tuple[str, dict[str, Any], str]] = [
    ("apiserver", {"max_ttl": "24h", "ttl": "24h"}, "max_ttl: wanted at least"),
    ("apiserver", {"max_ttl": "2400h", "ttl": "2400h"}, "max_ttl: wanted at least"),
    ("apiserver", {"organization": ["system:masters"]}, "organization: wanted none, got system:masters"),
    ("super-admin.conf", {"organization": []}, "organization: wanted system:masters, got none"),
    ("apiserver", {"ou": ["Platform"]}, "ou: wanted none, got Platform"),
    ("apiserver", {"key_type": "ec", "key_bits": 256}, "key_type: wanted rsa (for rsa-2048) or any, got ec"),
    ("apiserver", {"key_type": "rsa", "key_bits": 4096}, "key_bits: wanted at most 2048, got 4096"),
    ("apiserver", {"allowed_domains": ["kube-apiserver", "cp-8"]}, "allowed_domains: wanted "),
    (
        "scheduler.conf",
        {"allowed_domains": ["system:kube-controller-manager"]},
        "allowed_domains: wanted system:kube-sch",
    ),
    ("scheduler.conf", {"enforce_hostnames": True}, "allowed_domains: wanted system:kube-scheduler"),
    ("apiserver", {"allow_ip_sans": False}, "allow_ip_sans: wanted true, got false"),
    ("apiserver", {"allowed_ip_sans_cidr": ["10.0.0.0/8"]}, "allowed_ip_sans_cidr: wanted "),
]


@pytest.mark.parametrize(
    ("name", "change", "text"), ROLES, ids=[f"{n}-{'-'.join(c)}-{i}" for i, (n, c, _) in enumerate(ROLES)]
)
def test_a_role_is_compared_whole(
    bridge: Bridge, bao: openbao.OpenBao, name: str, change: dict[str, Any], text: str
) -> None:
    """The report names what a renewal would meet: the CA's refusal, or an answer that is refused; a good role gives neither."""
    path = f"doctor-ca/roles/kubeadm-{name}"
    role = bao.read(path)["data"]
    assert wrong(bridge) == []
    try:
        bao.write(path, **{**role, **change})
        [(level, check, about, found)] = wrong(bridge)
        assert (level, check, about) == ("error", "what-the-ca-would-sign", [name])
        assert found.startswith(f"role kubeadm-{name} of doctor-ca: {text}")
        assert bridge.run("renew", name).returncode == 5
    finally:
        bao.write(path, **role)
        (bridge.directory / "state/attempts.json").unlink(missing_ok=True)


def test_a_subject_that_the_settings_except_is_no_fault(bridge: Bridge, bao: openbao.OpenBao) -> None:
    """`allow_extra_subject` names what this CA adds."""
    path = "doctor-ca/roles/kubeadm-apiserver"
    role, config = bao.read(path)["data"], bridge.config.read_text()
    try:
        bao.write(path, **{**role, "ou": ["Platform"]})
        excepted = '[authority.ca]\nallow_extra_subject = ["OU=Platform"]'
        bridge.config.write_text(config.replace("[authority.ca]", excepted))
        assert wrong(bridge) == []
    finally:
        bao.write(path, **role)
        bridge.config.write_text(config)


@pytest.mark.kube("cfssl")
def test_a_profile_that_is_too_short_is_found(tmp_path: Path) -> None:
    """cfssl copies all else from the CSR."""
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "bridge")
    for authority in ("etcd-ca", "front-proxy-ca"):
        add_openssl(bridge, authority)
    with add_cfssl(bridge, "ca"):
        assert wrong(bridge) == []
        bridge.add("renewal", {"validity": "730d", "min_validity": "700d"})
        found = wrong(bridge)
    assert {one[:2] for one in found} == {("error", "what-the-ca-would-sign")}
    assert {name for one in found for name in one[2]} >= {"apiserver", "admin.conf", "scheduler.conf"}
    assert all("expiry: wanted at least 700d, or its answer is refused, got 8760h" in one[3] for one in found)


def test_a_ca_that_shows_no_certificate_is_not_called_the_right_one(tmp_path: Path) -> None:
    """A program without certmonger's FETCH-ROOTS can be used; by its answer alone it is seen which CA it asks."""
    bridge = Bridge(pki=handmade_pki(tmp_path / "node"), directory=tmp_path / "bridge")
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\n[ "$CERTMONGER_OPERATION" = IDENTIFY ] || exit 6\n')
    program.chmod(0o755)
    bridge.add("backend.site", {"type": "exec", "command": [str(program)]})
    for authority in ("ca", "etcd-ca", "front-proxy-ca"):
        bridge.add(f"authority.{authority}", {"backend": "site"})
    said = {
        one.text for one in examine(with_node_name(load(bridge.config)), datetime.now(UTC)) if one.check == "backend"
    }
    assert [text.partition(";")[0] for text in said] == ["site (exec) can be used"]


@pytest.mark.parametrize("hours", [2, 0, -2])
def test_the_clocks_are_compared(tmp_path: Path, hours: int) -> None:
    """The date in the CA's answers shows a wrong clock in both directions; the same clock is no finding."""
    pki = handmade_pki(tmp_path / "node")
    certificate = pki.ca_pem("ca")[0].decode()

    class Server(BaseHTTPRequestHandler):
        """cfssl's `info`, by another clock; with no CSR to sign it answers as the real one."""

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            usages = {"server": ["server auth"], "client": ["client auth"]}.get(asked.get("profile", ""), [])
            result = {"certificate": certificate, "usages": ["signing", "key encipherment", *usages], "expiry": "8760h"}
            is_info = self.path == "/api/v1/cfssl/info"
            body: dict[str, Any] = {
                "success": is_info,
                "result": result if is_info else None,
                "errors": [],
                "messages": [],
            }
            if not is_info:
                assert asked["certificate_request"] == ""
                body["errors"] = [{"code": 9003, "message": "failed to parse certificate request"}]
            data = json.dumps(body).encode()
            self.send_response(200 if is_info else 400)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def date_time_string(self, timestamp: float | None = None) -> str:
            """The header `Date`."""
            return super().date_time_string((timestamp or time.time()) + hours * 3600)

        def log_message(self, *args: object) -> None:
            """Nothing."""

    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    for authority in ("etcd-ca", "front-proxy-ca"):
        add_openssl(bridge, authority)
    with LoopbackServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        bridge.add("backend.site", {"type": "cfssl", "url": url, "endpoint": "sign", "profile": "{usage}"})
        bridge.add("authority.ca", {"backend": "site"})
        found = wrong(bridge)
        server.shutdown()
        thread.join()
    way = {2: "ahead of", -2: "behind"}
    expected = [("error", "clock", ["backend of ca"])] if hours else []
    assert [one[:3] for one in found] == expected
    assert all(f"found the CA's 2h {way[hours]} this node's" in one[3] for one in found)
