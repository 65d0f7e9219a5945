"""Pods on a real node, whose kubelet has their certificates signed by OpenBao through the gateway: mutual TLS, by SPIFFE ID."""

from __future__ import annotations

import json
import os
import signal
import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.pki.certificates import pem
from tests.kit import pod_site, pods
from tests.kit.issuing import Signer
from tests.kit.nodes import restart_kubelet, wait_for
from tests.kit.pod_site import ROOTS_SECONDS, SYNC_SECONDS, Site, pod, talk, talking
from tests.kit.pods import SIGNER, TRUST_DOMAIN

pytestmark = [pytest.mark.node, pytest.mark.slow]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One control-plane node with its gateway."""
    with pod_site.running(f"pods{os.getpid() % 10_000}", "198.18.77.190", tmp_path_factory.mktemp("pods")) as found:
        yield found


def test_two_namespaces_talk(site: Site, tmp_path: Path) -> None:
    """Each knows the other by its SPIFFE ID; the key is the pod's user's alone, and a stranger's root is refused."""
    site.make(pod("shop", "web", "web"), pod("bank", "till"))
    site.until_running("shop", "web")
    site.until_running("bank", "till")
    web, till = site.holder("shop", "web"), site.holder("bank", "till")
    seen = talk(web, till, tmp_path)
    assert seen == (f"spiffe://{TRUST_DOMAIN}/ns/bank/sa/default", f"spiffe://{TRUST_DOMAIN}/ns/shop/sa/web")
    key = web.bundle.stat()
    assert (key.st_uid, key.st_gid, key.st_mode & 0o777) == (1000, 2000, 0o640)
    stranger = Signer.make("another CA", begin=datetime.now(UTC) - timedelta(days=1))
    anchors = tmp_path / "stranger"
    anchors.write_bytes(pem(stranger.certificate))
    with pytest.raises(ssl.SSLCertVerificationError):
        talk(web, replace(till, roots=anchors), tmp_path)


def test_a_pod_that_may_not_says_so(site: Site) -> None:
    """Its events have the reason in words; the gateway's record has it, too."""
    site.make(pod("outside", "stray"), pod("shop", "odd", "web", pods.source(keyType="ED25519")))

    wanted = "namespace outside may not have certificates of this signer"
    wait_for("an event", lambda: wanted in site.events("outside"))
    wait_for("an event", lambda: "this signer takes ECDSAP256" in site.events("shop"))
    assert site.pod("outside", "stray")["status"]["phase"] == "Pending"
    assert any(wanted in json.dumps(line) for line in site.gateway.audit())
    site.remove("outside", "stray")
    site.remove("shop", "odd")


def test_twenty_at_once_while_the_ca_is_away(site: Site) -> None:
    """They wait for it, none is denied, and all run when it is back."""
    names = [f"many-{number}" for number in range(20)]
    os.kill(site.bao.process.pid, signal.SIGSTOP)
    try:
        site.make(*(pod("shop", name, "web") for name in names))
        time.sleep(20)
        assert {site.phases("shop")[name] for name in names} == {"Pending"}
    finally:
        os.kill(site.bao.process.pid, signal.SIGCONT)
    site.until_running("shop", *names, seconds=240)
    assert site.gateway.metric("requests_total", signer=SIGNER, outcome="denied") == 2
    site.remove("shop", *names)


def test_the_root_is_replaced_under_them(site: Site, tmp_path: Path) -> None:
    """Two roots while one is replaced: certificates below the new one without a restart of a pod, and no handshake fails."""
    pairs = (("shop", "web"), ("bank", "till"))
    web, till = (site.holder(*one) for one in pairs)
    containers, before = [site.containers(*one) for one in pairs], web.leaf
    new = Signer.make("new pods of corp.example", begin=datetime.now(UTC) - timedelta(days=1))

    def have(count: int) -> bool:
        return all(one.roots.read_text().count("BEGIN") == count for one in (web, till))

    with talking(web, till, tmp_path) as talks:
        pods.trust(site.place, site.ca, new)
        wait_for("both roots", lambda: have(2), seconds=ROOTS_SECONDS)
        site.sign_below(new)
        restart_kubelet(site.node)  # or one would wait for half of the life

        def renewed() -> bool:
            return all(one.leaf.issuer == new.certificate.subject for one in (web, till))

        wait_for("certificates below the new root", renewed, seconds=2 * SYNC_SECONDS)
        pods.trust(site.place, new)
        wait_for("the new root alone", lambda: have(1), seconds=ROOTS_SECONDS)
    assert web.leaf.serial_number != before.serial_number
    assert [site.containers(*one) for one in pairs] == containers
    assert talks.failed == []
    assert talks.done > 10
