"""The next CA is behind cfssl, a CMP registration authority, or EST, and a PKI that the real kubeadm made gets it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bridge.errors import Exit
from bridge.node.reading import read_node
from bridge.pki.certificates import pem
from bridge.pki.csr import key_pem
from bridge.rotation import planning
from bridge.rotation.planning import Verb
from bridge.rotation.steps import Done
from bridge.settings import load
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES
from bridge.system.waiting import wait_until
from tests.kit import cfssl, cmp, est, next_cas
from tests.kit.cas import VALIDITY, Bridge, live_certificates
from tests.kit.desks import POLICY
from tests.kit.est_door import NAMES, EstDoor, make_est_door
from tests.kit.next_cas import NextCa
from tests.kit.pairs import assert_pairs
from tests.kit.pki import KubeadmPki, Pki, kubeadm_pki
from tests.kit.rotating import BACK, FORWARD, contents, phases, run
from tests.kit.serving import running

pytestmark = [pytest.mark.kube("kubeadm"), pytest.mark.usefixtures("no_process_here")]

_PATIENCE = timedelta(minutes=3)


@dataclasses.dataclass(frozen=True)
class Site:
    """A node's PKI, the program beside it, and the next CAs."""

    pki: KubeadmPki
    bridge: Bridge
    made: Mapping[str, NextCa]

    @property
    def settings(self) -> Settings:
        """As they are in the file now."""
        return load.load(self.bridge.config)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """With elliptic keys."""
    pki = kubeadm_pki(tmp_path / "node", algorithm="ECDSA-P256")
    return Site(pki, Bridge(pki=pki, directory=tmp_path / "bridge"), next_cas.make(tmp_path / "next"))


@contextlib.contextmanager
def behind_cmp(site: Site, directory: Path) -> Iterator[cmp.RegistrationAuthority]:
    """One registration authority for the old CAs and the next ones; the URL names which of them signs."""
    bridge = site.bridge
    with cmp.registration_authority(directory / "ra") as server:
        bridge.add("backend.corp", {"type": "cmp", "url": "http://127.0.0.1:1", "timeout": "2m", **server.mac()})
        for name, one in site.made.items():
            server.add_ca(name, *site.pki.ca_pem(name), days=365)
            server.add_ca(f"{name}-2", pem(one.signer.certificate), key_pem(one.signer.key), days=365)
            bridge.add(f"authority.{name}", {"backend": "corp", "url": server.url(name)})
            bridge.add(f"authority.{name}.next", {"anchor": one.table["anchor"], "url": server.url(f"{name}-2")})
        yield server


@contextlib.contextmanager
def behind_doors(site: Site, directory: Path) -> Iterator[None]:
    """Our own door's EST, with a label for each certificate: one has the old CAs, another one the next ones."""
    cas = {"corp": site.pki, "corp-2": next_cas.as_pki(site.made, directory / "next-keys")}
    with contextlib.ExitStack() as stack:
        for backend, pki in cas.items():
            door = est_door(directory / backend, pki, site.settings)
            stack.enter_context(running(door.program))
            agent = {key: str(path) for key, path in door.agent().items()}
            server = {"url": door.program.url, "ca_file": str(door.program.ca), "timeout": "2m", "retry_for": "1s"}
            site.bridge.add(f"backend.{backend}", {"type": "est", **server, **agent})
        for name, one in site.made.items():
            label = {"label": f"{name}.{{name}}"}
            site.bridge.add(f"authority.{name}", {"backend": "corp", **label})
            site.bridge.add(f"authority.{name}.next", {"anchor": one.table["anchor"], "backend": "corp-2", **label})
        yield


@contextlib.contextmanager
def behind_cfssl(site: Site, directory: Path) -> Iterator[None]:
    """A `cfssl serve` for each CA, as `setup cfssl` has it: six."""
    live = live_certificates(site.pki)
    with contextlib.ExitStack() as stack:
        for name, one in site.made.items():
            cas = {name: site.pki.ca_pem(name), f"{name}-2": (pem(one.signer.certificate), key_pem(one.signer.key))}
            for backend, ca_pem in cas.items():
                place = directory / "cfssl" / backend
                place.mkdir(parents=True)
                server = cfssl.serve_authority(place, AUTHORITIES[name], live, VALIDITY, ca_pem=ca_pem)
                table = stack.enter_context(server)
                site.bridge.add(f"backend.{backend}", {"type": "cfssl", "timeout": "2m", **table})
            site.bridge.add(f"authority.{name}", {"backend": name})
            site.bridge.add(f"authority.{name}.next", {"anchor": one.table["anchor"], "backend": f"{name}-2"})
        yield


def est_door(directory: Path, pki: Pki, settings: Settings) -> EstDoor:
    """One with these CAs, for all certificates of the node, each of which an agent may ask for."""
    labels = [
        f'[est."{item.spec.authority.name}.{item.spec.name}"]\ncertificate = "{item.spec.name}"\ncluster = "kubernetes"\n'
        'clients = ["O=agents,CN={node}"]\nclients_ca = "{agents}"\n'
        for item in read_node(settings.node).items
    ]
    return make_est_door(directory, pki, policy=POLICY + NAMES + "\n".join(labels))


def answered(settings: Settings, verb: Verb) -> Done:
    """The verb, repeated until the CA has answered: a door signs beside its requests."""
    return wait_until(
        lambda: run(settings, verb), lambda done: done.exit_code != Exit.WAITING, _PATIENCE, pause_seconds=0.5
    )


@pytest.mark.parametrize(
    ("behind", "walk"),
    [
        pytest.param(behind_cmp, (*FORWARD, *BACK, *FORWARD), marks=pytest.mark.kube("cmp-ra"), id="cmp"),
        pytest.param(behind_cfssl, (*FORWARD, *BACK), marks=pytest.mark.kube("cfssl"), id="cfssl"),
        pytest.param(behind_doors, (*FORWARD, *BACK), id="est"),
    ],
)
def test_all_phases_and_back_with_the_next_ca_behind_a_protocol(
    site: Site,
    tmp_path: Path,
    behind: Callable[[Site, Path], contextlib.AbstractContextManager[object]],
    walk: tuple[tuple[Verb, str], ...],
) -> None:
    """All three CAs at once, as kubeadm takes them; the same settings with the old CA behind `next` install nothing."""
    with behind(site, tmp_path):
        settings = site.settings
        for verb, phase in walk:
            if verb is Verb.ISSUE:
                assert_refused_of_the_old_ca(site, settings)
            done = answered(settings, verb)
            assert done.exit_code == 0, [one.error for one in done.result.outcomes]
            assert phases(settings) == dict.fromkeys(AUTHORITIES, phase)
            assert_pairs(site.pki)
            site.pki.run_kubeadm("certs", "check-expiration")


def with_edited_next(settings: Settings, old: str, new: str) -> Settings:
    """The same with other texts in the tables `next`, but for the anchors."""
    authorities = {}
    for name, ours in settings.authorities.items():
        table = {key: text if key == "anchor" else text.replace(old, new) for key, text in ours.next.items()}
        authorities[name] = dataclasses.replace(ours, next=table)
    return dataclasses.replace(settings, authorities=authorities)


def assert_refused_of_the_old_ca(site: Site, settings: Settings) -> None:
    """The twin: what `next` leads to is the old CA."""
    before = contents(site.pki)
    done = answered(with_edited_next(settings, "-2", ""), Verb.ISSUE)
    assert done.exit_code == Exit.REFUSED, done.result
    said = [str(one.error) for one in done.result.outcomes]
    assert all("wanted a path to" in one or "wanted the CA of" in one for one in said), said
    assert contents(site.pki) == before


@pytest.mark.kube("cmp-ra")
def test_issue_waits_for_people_behind_cmp(site: Site, tmp_path: Path) -> None:
    """No file moves before they have approved all requests; then the same command installs them, and none is asked twice."""
    with behind_cmp(site, tmp_path) as server:
        settings = site.settings
        waiting = with_edited_next(settings, "-2", "-2/wait")
        assert run(waiting, Verb.TRUST).exit_code == 0
        before = contents(site.pki)
        for name in AUTHORITIES:
            assert run(waiting, Verb.ISSUE).exit_code == Exit.WAITING
            assert contents(site.pki) == before
            server.approve(f"{name}-2")
        done = run(waiting, Verb.ISSUE)
        assert done.exit_code == 0, done.result
        assert phases(settings) == dict.fromkeys(AUTHORITIES, "issued")
        assert_pairs(site.pki)
        asked = [line for name in AUTHORITIES for line in server.requests(f"{name}-2") if line["type"] == "4"]
        assert len(asked) == len(read_node(settings.node).items)


@pytest.mark.kube("estserver")
def test_a_server_of_est_gets_the_next_ca(site: Site, tmp_path: Path) -> None:
    """
    `trust` refuses as long as GlobalSign's server has the old CA, and not after its restart with the new one; of what this
    server's mock CA then signs, the usages of etcd's clients are too wide, so that `issue` installs nothing, and `back` does.
    """
    tls, old = est.make_tls(tmp_path / "tls"), contents(site.pki)
    signer = site.made["etcd-ca"].signer
    with est.estserver(tmp_path / "before", site.pki.ca_pem("etcd-ca"), tls) as url:
        agent = {key: str(path) for key, path in tls.agent("agent").items()}
        limits = {"timeout": "2m", "retry_for": "1s"}
        site.bridge.add("backend.corp", {"type": "est", "url": url, "ca_file": str(tls.ca), **limits, **agent})
        site.bridge.add("authority.etcd-ca", {"backend": "corp", "label": "{usage}"})
        site.bridge.add("authority.etcd-ca.next", {"anchor": site.made["etcd-ca"].table["anchor"]})
        settings = site.settings
        with pytest.raises(planning.NewCaError, match="wanted the certificate of the CA that signs"):
            run(settings, Verb.TRUST)
        assert contents(site.pki) == old
    new = pem(signer.certificate), key_pem(signer.key)
    with est.estserver(tmp_path / "after", new, tls, port=urlsplit(url).port or 0):
        assert run(settings, Verb.TRUST).exit_code == 0
        assert phases(settings) == {"etcd-ca": "trusted"}
        trusted = contents(site.pki)
        done = run(settings, Verb.ISSUE)
        assert done.exit_code == Exit.REFUSED
        assert "EKU: wanted clientAuth, got clientAuth, serverAuth" in str(done.result)
        assert contents(site.pki) == trusted
        assert any(path.endswith("cacerts") for path, _ in est.asked(tmp_path / "after"))
        assert run(settings, Verb.BACK).exit_code == 0
    assert contents(site.pki) == old
