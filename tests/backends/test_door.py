"""The backend `door`: the conformance suite, by a real door with a real CA behind it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from backends.door import DoorBackend, DoorSettings
from bridge.ca import registry
from bridge.contract import GIVEN, SetupRequest
from bridge.desk import policy
from bridge.errors import BackendRefusedError, BackendUnavailableError
from bridge.pki.bundle import sign_request
from bridge.pki.certificates import san_entries
from bridge.settings.load import parse
from bridge.specs import AUTHORITIES, SPECS
from bridge.testing import BackendConformance, TestCA
from tests.kit.bundles import make_bundle, old_pairs
from tests.kit.cas import live_certificates
from tests.kit.pki import Pki, handmade_pki
from tests.kit.policies import ALL_NAMES
from tests.kit.serving import ServeProgram, make_door, running

EXAMPLE = Path(__file__).resolve().parents[2] / "config/door/config.toml"


@pytest.mark.slow
class TestConformance(BackendConformance):
    """The suite that every backend passes."""

    unsupported = frozenset({"issuers"})
    patience = timedelta(minutes=2)

    @pytest.fixture(scope="class")
    @classmethod
    def door(cls, ca: TestCA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
        """A door at work."""
        place = tmp_path_factory.mktemp("door")
        with running(make_door(place, ca.certificate_pem, ca.key_pem, ALL_NAMES, tuple(AUTHORITIES))) as program:
            yield program

    @pytest.fixture
    def backend(self, door: ServeProgram) -> Iterator[DoorBackend]:
        """A node's end."""
        settings = DoorSettings(url=door.url, ca_file=door.ca, node="cp-1", wait=timedelta())
        with closing(DoorBackend.from_settings(settings)) as backend:
            yield backend

    @pytest.fixture
    def dead_backend(self, tmp_path: Path, door: ServeProgram) -> DoorBackend:
        """A door that is no more."""
        del tmp_path
        settings = DoorSettings(url="https://127.0.0.1:9", ca_file=door.ca, timeout=timedelta(seconds=3))
        return DoorBackend.from_settings(settings)


def test_a_request_that_no_door_takes_is_not_sent(pki: Pki) -> None:
    """The node says how long it is and where to look; a door would close the connection before it has read the bundle."""
    bundle = make_bundle(old_pairs(pki, ["apiserver"]))
    [one] = [sign_request(one, bundle) for one in bundle.requests]
    names = x509.SubjectAlternativeName([x509.DNSName(f"{number}.corp.example") for number in range(12_000)])
    csr = x509.CertificateSigningRequestBuilder(one.csr.subject, [x509.Extension(names.oid, False, names)])
    large = csr.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(Encoding.PEM)
    settings = DoorSettings(url="https://127.0.0.1:9", timeout=timedelta(seconds=3))
    with closing(DoorBackend.from_settings(settings)) as backend:
        with pytest.raises(
            BackendRefusedError, match=r"wanted at most 262144 bytes in the bundle of one request, found \d+"
        ) as e:
            backend.sign(replace(one, csr_pem=large))
        with pytest.raises(BackendUnavailableError):
            backend.sign(one)
    assert "SANs" in e.value.hint


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return handmade_pki(tmp_path_factory.mktemp("pki"))


def test_the_example_has_every_key() -> None:
    """It is well-formed as it is, and with all that is behind `#`."""
    text = EXAMPLE.read_text(encoding="utf-8")
    whole = re.sub(r"^# (?=\w+ =)", "", text, flags=re.MULTILINE)
    for one in (text, whole):
        read = registry.configured(parse(one), AUTHORITIES)
        assert {configured.type_name for configured in read.values()} == {"door"}
    fields = {one.name for one in dataclasses.fields(DoorSettings) if GIVEN not in one.metadata}
    assert fields - {"enrolment", "node", "pairs"} <= set(re.findall(r"\w+", whole))
    assert "enrolment_file" in whole


@pytest.mark.parametrize("authority", ["ca", "etcd-ca", "front-proxy-ca"])
def test_setup_prints_tables_that_the_policy_takes(pki: Pki, authority: str) -> None:
    """They allow the SANs of a node, name those of a master, and one CA's part says nothing of others."""
    live = live_certificates(pki)
    ours = {name: one for name, one in live.items() if SPECS[name].authority.name == authority}
    wanted = SetupRequest(
        authority=AUTHORITIES[authority],
        certificates=ours,
        validity=timedelta(days=400),
        node="cp-1",
        cluster="kubernetes",
        settings={},
    )
    [file] = DoorBackend.setup(wanted)
    reported = "\n".join(line[4:] for line in file.text.splitlines() if line.startswith("#   "))
    read = policy.parse(f"[allow]\n{reported}\n{file.text}")

    assert (read.allow.clusters, read.allow.nodes, read.allow.max_validity) == (
        ("kubernetes",),
        ("cp-1",),
        timedelta(days=400),
    )
    assert set(read.allow.masters) == {"super-admin.conf"} & set(ours)
    assert set(read.certificates) == {name for name, one in ours.items() if san_entries(one)}
    for name, rules in read.certificates.items():
        assert {one.replace("{node}", "cp-1") for one in rules.sans or ()} == {
            text for _, text in san_entries(ours[name])
        }
