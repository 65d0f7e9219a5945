"""The next CA is behind a CMP registration authority, or behind EST, and a PKI that the real kubeadm made gets it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from bridge.errors import Exit
from bridge.pki.certificates import pem
from bridge.pki.csr import key_pem
from bridge.rotation.steps import Verb
from bridge.settings import load
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES
from tests.kit import cmp, est, next_cas
from tests.kit.cas import Bridge
from tests.kit.next_cas import NextCa
from tests.kit.pairs import assert_pairs
from tests.kit.pki import KubeadmPki, kubeadm_pki
from tests.kit.rotating import BACK, FORWARD, contents, phases, run

pytestmark = [pytest.mark.kube("cmp-ra", "kubeadm"), pytest.mark.usefixtures("no_process_here")]


@contextlib.contextmanager
def behind_cmp(bridge: Bridge, made: dict[str, NextCa], directory: Path) -> Iterator[str]:
    """One registration authority for the old CAs and the next ones; the key that names which of them signs."""
    with cmp.registration_authority(directory / "ra") as server:
        bridge.add("backend.corp", {"type": "cmp", "url": "http://127.0.0.1:1", "timeout": "20s", **server.mac()})
        for name in AUTHORITIES:
            server.add_ca(name, *bridge.pki.ca_pem(name), days=365)
            signer = made[name].signer
            server.add_ca(f"{name}-2", pem(signer.certificate), key_pem(signer.key), days=365)
            bridge.add(f"authority.{name}", {"backend": "corp", "url": server.url(name)})
            bridge.add(f"authority.{name}.next", {"anchor": made[name].table["anchor"], "url": server.url(f"{name}-2")})
        yield server.url("")


@contextlib.contextmanager
def behind_est(bridge: Bridge, made: dict[str, NextCa], directory: Path) -> Iterator[str]:
    """One server with a label for each CA and usage class, the next ones' among them."""
    tls = est.make_tls(directory / "tls")
    labels = est.labels_of(bridge.pki, {name: name for name in AUTHORITIES})
    for name in AUTHORITIES:
        for usage, spec in est.EXAMPLES.items():
            labels[f"{name}-2/{usage}"] = est.Label(signer=made[name].signer, spec=spec)
    files = {key: str(path) for key, path in tls.agent("agent").items()}
    with est.double(labels, tls, validity=timedelta(days=365), client_cn="agent") as played:
        shared = {"type": "est", "url": played.url, "ca_file": str(tls.ca), "timeout": "5s", "retry_for": "1s"}
        bridge.add("backend.corp", {**shared, **files})
        for name in AUTHORITIES:
            bridge.add(f"authority.{name}", {"backend": "corp", "label": f"{name}/{{usage}}"})
            table = {"anchor": made[name].table["anchor"], "label": f"{name}-2/{{usage}}"}
            bridge.add(f"authority.{name}.next", table)
        yield played.url


@pytest.mark.parametrize("behind", [behind_cmp, behind_est])
def test_all_phases_and_back_with_the_next_ca_behind_a_protocol(
    tmp_path: Path, behind: Callable[[Bridge, dict[str, NextCa], Path], contextlib.AbstractContextManager[str]]
) -> None:
    """All three CAs at once, as kubeadm takes them; the same settings with the old CA behind `next` install nothing."""
    pki: KubeadmPki = kubeadm_pki(tmp_path / "node", algorithm="ECDSA-P256")
    bridge, made = Bridge(pki=pki, directory=tmp_path / "bridge"), next_cas.make(tmp_path / "next")
    with behind(bridge, made, tmp_path):
        settings = load.load(bridge.config)
        for verb, phase in (*FORWARD, *BACK, *FORWARD):
            if verb is Verb.ISSUE:
                assert_refused_of_the_old_ca(pki, settings)
            done = run(settings, verb)
            assert done.exit_code == 0, done.result
            assert phases(settings) == dict.fromkeys(AUTHORITIES, phase)
            assert_pairs(pki)
            pki.run_kubeadm("certs", "check-expiration")


def assert_refused_of_the_old_ca(pki: KubeadmPki, settings: Settings) -> None:
    """The twin: what `next` leads to is the old CA."""
    authorities = {}
    for name, ours in settings.authorities.items():
        table = {key: text if key == "anchor" else text.replace(f"{name}-2", name) for key, text in ours.next.items()}
        authorities[name] = dataclasses.replace(ours, next=table)
    before = contents(pki)
    done = run(dataclasses.replace(settings, authorities=authorities), Verb.ISSUE)
    assert done.exit_code == Exit.REFUSED, done.result
    assert contents(pki) == before
