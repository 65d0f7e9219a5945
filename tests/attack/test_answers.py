"""Answers of a CA that are wrong in one way, through the whole program; after each the twin, which is installed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key, pkcs7

from bridge.contract import Issued, SignRequest
from bridge.node import inventory
from bridge.pki import csr
from bridge.pki.certificates import pem
from bridge.specs import SPECS, KeyAlgorithm
from tests.counts import Tried
from tests.kit import cfssl, forger, opensslca
from tests.kit.cas import Bridge, live_certificates
from tests.kit.forger import Raw
from tests.kit.hostile import DAY, HOSTILE, LEFT, Desk
from tests.kit.issuing import Signer
from tests.kit.measured import MOST_MEGABYTES, run_measured
from tests.kit.pairs import assert_pairs
from tests.kit.pki import Pki, handmade_pki

YEAR = 365 * DAY


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """A node whose certificates are all due."""
    return handmade_pki(tmp_path_factory.mktemp("template") / "node", not_after=datetime.now(UTC) + LEFT)


@pytest.fixture
def bridge(template: Pki, tmp_path: Path) -> Bridge:
    """A copy of that node, with settings that name no CA yet."""
    pki = Pki(root=tmp_path / "node", external=True)
    shutil.copytree(template.root, pki.root)
    return Bridge(pki=pki, directory=tmp_path / "bridge")


def signer_of(pki: Pki, authority: str = "ca") -> Signer:
    """The node's CA."""
    certificate, key = pki.ca_pem(authority)
    private: csr.PrivateKey = load_pem_private_key(key, None)  # type: ignore[assignment]
    return Signer(certificate=x509.load_pem_x509_certificate(certificate), key=private)


@dataclass(kw_only=True)
class Attack:
    """A node, and the forger that it takes for its CA."""

    bridge: Bridge
    forger: forger.Forger
    root: Signer
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    def answer(self, make: Callable[[Desk], Issued | Raw]) -> None:
        """From now on, with the live certificate as the one that is replaced."""
        live = live_certificates(self.bridge.pki)

        def answer(request: SignRequest) -> Issued | Raw:
            known = SignRequest(
                spec=request.spec, csr_pem=request.csr_pem, validity=YEAR, replaces=live[request.spec.name]
            )
            return make(Desk(root=self.root, request=known, now=self.now))

        self.forger.answer = answer

    def refused(self, *names: str) -> str:
        """Renew; nothing but the record moves, and the exit code is 5. What it said."""
        before = files(self.bridge)
        backups = self.bridge.directory / "state/backups"
        kept = set(backups.iterdir()) if backups.exists() else set()
        run = self.bridge.run("renew", *names)
        assert run.returncode == 5, run.stdout + run.stderr
        assert "Traceback" not in run.stderr
        assert files(self.bridge) == before
        assert set(backups.iterdir()) == kept
        return run.stderr

    def installed(self, *names: str) -> None:
        """Renew; these certificates are new, and no other."""
        before = live_certificates(self.bridge.pki)
        run = self.bridge.run("renew", *names)
        assert run.returncode == 0, run.stderr
        after = live_certificates(self.bridge.pki)
        assert {name for name in after if after[name] != before[name]} == set(names)
        assert_pairs(self.bridge.pki)


def files(bridge: Bridge) -> dict[str, str]:
    """Digests of all files on the node."""
    paths = [path for path in bridge.pki.kubeconfig_dir.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def attack(bridge: Bridge, request: pytest.FixtureRequest) -> Iterator[Attack]:
    """Indirect parameters: the certificate, its key's algorithm and the CA's maker (None: the node's own CA)."""
    name, algorithm, make_root = getattr(request, "param", ("apiserver", "ecdsa-p256", None))
    authority = SPECS[name].authority
    root = make_root(datetime.now(UTC)) if make_root else signer_of(bridge.pki, authority.name)
    bridge.pki.trust(authority.name, pem(root.certificate))
    with forger.forger(root.certificate, lambda _: Raw(b"")) as ca:
        bridge.add("renewal", {"key": algorithm})
        bridge.add("backend.corp", {"type": "vault", "url": ca.url, "timeout": "3m", "retry_for": "1s"})
        bridge.add("backend.corp.auth", {"method": "token", "token_file": bridge.secret("token", forger.TOKEN)})
        bridge.add(f"authority.{authority.name}", {"backend": "corp", "mount": forger.MOUNT, "role": "kubeadm-{name}"})
        yield Attack(bridge=bridge, forger=ca, root=root)


def named(said: str) -> set[str]:
    """What a message's violations are about."""
    return set(re.findall(r"(?:; |\(vault\): )([A-Za-z ]+): wanted ", said))


def parameters(fault: str) -> tuple[str, KeyAlgorithm, Callable[[datetime], Signer]]:
    """The parameters of the fixture above."""
    case = HOSTILE[fault]
    return case.name, case.algorithm, case.root


@pytest.mark.parametrize(
    ("fault", "attack"), [(fault, parameters(fault)) for fault in HOSTILE], indirect=["attack"], ids=list(HOSTILE)
)
def test_a_certificate_that_is_wrong_in_one_way(fault: str, attack: Attack, tried: Tried) -> None:
    """Exit 5, nothing replaced, and the message names exactly what is wrong; its twin is installed by the same command."""
    case = HOSTILE[fault]
    attack.answer(case.wrong)
    said = attack.refused(case.name)
    assert named(said) == case.subjects, said
    assert attack.forger.asked == [case.name]
    attack.answer(case.right)
    attack.installed(case.name)
    tried("hostile answers through the program, each with a twin", 1)


def test_answers_that_are_swapped(attack: Attack, tried: Tried) -> None:
    """Two certificates of one run, each in the other's answer: both are refused; in their own they are installed."""
    names = ("controller-manager.conf", "scheduler.conf")
    waiting: dict[str, Issued] = {}

    def swapped(desk: Desk) -> Issued:
        """Both are asked for at the same time; the first waits for the second."""
        waiting[desk.request.spec.name] = desk.issue()
        [other] = set(names) - {desk.request.spec.name}
        deadline = time.monotonic() + 180
        while other not in waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        return waiting[other]

    attack.answer(swapped)
    said = attack.refused(*names)
    assert all(f"error: {name}: corp (vault): public key: wanted " in said for name in names), said
    assert said.count("subject: wanted ") == 2
    attack.answer(Desk.issue)
    attack.installed(*names)
    tried("hostile answers through the program, each with a twin", 1)


def test_what_the_ca_sends_along_counts_for_nothing(attack: Attack, tried: Tried) -> None:
    """Its own root in the chain makes no certificate of it a good one, and no harm beside a good one."""
    stranger = Signer.make("kubernetes")
    attack.answer(lambda desk: desk.issue(by=stranger, intermediates=(stranger,)))
    assert named(attack.refused("apiserver")) == {"issuer"}
    attack.answer(lambda desk: desk.issue(intermediates=(stranger, attack.root)))
    attack.installed("apiserver")
    crt = (attack.bridge.pki.pki_dir / "apiserver.crt").read_bytes()
    assert crt.count(b"BEGIN CERTIFICATE") == 1
    tried("hostile answers through the program, each with a twin", 1)


def test_an_answer_is_compared_with_our_own_request(attack: Attack, tried: Tried) -> None:
    """A CA that made a key and a CSR of its own sends all of it along, in itself consistent: nothing of it is taken."""
    theirs = csr.generate_key("ecdsa-p256")
    secret = csr.key_pem(theirs).decode()

    def answer(desk: Desk) -> Raw:
        live = desk.request.replaces
        assert live is not None
        their_csr = csr.build(live, theirs)
        leaf = pem(replace(desk, request=replace(desk.request, csr_pem=their_csr)).issue().leaf).decode()
        more = {"csr": their_csr.decode(), "private_key": secret, "private_key_type": "ec"}
        return attack.forger.certificate(leaf, [], **more)

    attack.answer(answer)
    assert named(attack.refused("apiserver")) == {"public key"}
    state = attack.bridge.directory / "state"
    assert not [path for path in state.rglob("*") if path.is_file() and secret.encode()[40:80] in path.read_bytes()]
    attack.answer(Desk.issue)
    attack.installed("apiserver")
    tried("hostile answers through the program, each with a twin", 1)


# --- chains ----------------------------------------------------------------------------------------------------------


def chain_of(bridge: Bridge, name: str) -> list[x509.Certificate]:
    """What is installed, the leaf first."""
    [item] = [
        item for item in inventory.read(bridge.pki.pki_dir, bridge.pki.kubeconfig_dir).items if item.spec.name == name
    ]
    return list(item.certificates)


def test_the_node_s_ca_may_be_an_intermediate(attack: Attack, tried: Tried) -> None:
    """It is the anchor itself; it and what is above it, sent along, come into no file."""
    above = attack.root
    middle = Signer.make("kubernetes", parent=above, begin=attack.now - DAY, end=attack.now + 900 * DAY)
    attack.answer(lambda desk: desk.issue(by=middle, intermediates=(middle, above)))
    attack.installed("apiserver")  # below the root: the intermediate is needed
    assert chain_of(attack.bridge, "apiserver")[1:] == [middle.certificate]
    attack.bridge.pki.trust("ca", pem(middle.certificate))
    attack.forger.ca = middle.certificate
    attack.answer(lambda desk: desk.issue(by=above, intermediates=()))
    attack.refused("apiserver")  # signed above the anchor: not by the node's CA
    attack.answer(lambda desk: desk.issue(by=middle, intermediates=(middle, above)))
    attack.installed("apiserver")
    assert chain_of(attack.bridge, "apiserver")[1:] == []
    tried("chains through the program", 1)


def test_the_node_s_ca_file_may_be_a_bundle(attack: Attack, tried: Tried) -> None:
    """Its first certificate counts, as for kubeadm; a leaf of the second is refused, and the message says which it was."""
    coming = attack.root
    going = Signer.make("kubernetes going", begin=attack.now - 100 * DAY, end=attack.now + 900 * DAY)
    attack.bridge.pki.trust("ca", pem(coming.certificate) + pem(going.certificate))
    attack.answer(lambda desk: desk.issue(by=going))
    said = attack.refused("apiserver")
    assert "another certificate of the same file (CN=kubernetes going); kubeadm takes only the first" in said
    attack.answer(lambda desk: desk.issue(by=coming))
    attack.installed("apiserver")
    tried("chains through the program", 1)


@pytest.mark.parametrize("by", ["image tag", "settings"])
@pytest.mark.parametrize("name", ["apiserver", "admin.conf"])
def test_no_chain_where_kubeadm_reads_one_certificate_a_file(name: str, by: str, attack: Attack, tried: Tried) -> None:
    """Below 1.21 it is refused, and the message says why; from 1.21 on it is kept, in files and kubeconfigs alike."""

    def version(value: str) -> None:
        if by == "settings":
            attack.bridge.tables[0] = re.sub("kubernetes_version.*\n", "", attack.bridge.tables[0])
            attack.bridge.tables[0] += f'kubernetes_version = "{value}"\n'
            attack.bridge.config.write_text("\n".join(attack.bridge.tables))
            return
        manifest = attack.bridge.pki.kubeconfig_dir / "manifests/kube-apiserver.yaml"
        manifest.parent.mkdir(exist_ok=True)
        image = f"registry.k8s.io/kube-apiserver:v{value}.3"
        container = {"name": "kube-apiserver", "image": image, "command": ["kube-apiserver"]}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "kube-apiserver"},
            "spec": {"containers": [container]},
        }
        manifest.write_text(json.dumps(pod))

    version("1.20")
    middle = Signer.make("mid", parent=attack.root, begin=attack.now - DAY, end=attack.now + 900 * DAY)
    attack.answer(lambda desk: desk.through(middle))
    said = attack.refused(name)
    assert "kubeadm below 1.21 reads one certificate a file" in said
    assert "got one signed through CN=mid" in said
    version("1.21")
    attack.installed(name)
    assert chain_of(attack.bridge, name)[1:] == [middle.certificate]
    tried("chains through the program", 1)


# --- what is no certificate, from each kind of CA --------------------------------------------------------------------


def p7(text: str) -> str:
    """The certificate in a PKCS#7 bag, as some CAs download it."""
    found = x509.load_pem_x509_certificates(text.encode())
    return pkcs7.serialize_certificates(found, Encoding.PEM).decode()


#: The text of a certificate, spoilt.
SPOILT: dict[str, Callable[[str], str]] = {
    "truncated PEM": lambda text: text[: len(text) // 2],
    "PEM without its last line": lambda text: text.replace("-----END CERTIFICATE-----\n", ""),
    "one character changed": lambda text: text[:200] + "!" + text[201:],
    "two leaves": lambda text: text + text,
    "DER": lambda text: x509.load_pem_x509_certificate(text.encode()).public_bytes(Encoding.DER).decode("latin-1"),
    "DER in base64": lambda text: "".join(text.splitlines()[1:-1]),
    "PKCS#7": p7,
    "HTML": lambda _: "<html><body><h1>502 Bad Gateway</h1></body></html>",
    "empty": lambda _: "",
    "a CSR": lambda text: text.replace("CERTIFICATE", "CERTIFICATE REQUEST"),
}
#: Whole bodies.
BODIES: dict[str, Raw] = {
    "an HTML page": Raw(b"<html><body>login</body></html>" * 100),
    "an empty body": Raw(b""),
    "no object": Raw(b"[]"),
    "an object without an answer": Raw(b"{}"),
    "deep nesting": Raw(b"[" * 100_000),
    "a number without end": Raw(b'{"data": ' + b"9" * 100_000 + b"}"),
    "100 MB": Raw(b"x" * 1_000_000, times=100),
    "100 MB of a certificate": Raw(b'{"success": true, "data": {"certificate": "' + b"A" * 1_000_000, times=100),
}


def assert_refused_soon(bridge: Bridge, wanted: int = 5) -> None:
    """Nothing is replaced; no traceback; bounded time and memory."""
    before = files(bridge)
    code, said, seconds, megabytes = run_measured(bridge, "renew", "apiserver")
    assert code == wanted, said
    assert "error: apiserver: " in said
    assert "Traceback" not in said
    assert len(said) < 2000
    assert files(bridge) == before
    assert seconds < 300
    assert megabytes < MOST_MEGABYTES


@pytest.mark.parametrize("spoilt", [*SPOILT, *BODIES])
def test_an_answer_of_vault_that_is_no_certificate(spoilt: str, attack: Attack, tried: Tried) -> None:
    """Exit 5 in bounded time and memory; a whole certificate is installed."""
    if spoilt in SPOILT:
        attack.answer(lambda desk: attack.forger.certificate(SPOILT[spoilt](pem(desk.issue().leaf).decode()), []))
    else:
        attack.answer(lambda _: BODIES[spoilt])
    assert_refused_soon(attack.bridge)
    attack.answer(lambda desk: attack.forger.certificate(pem(desk.issue().leaf).decode(), []))
    attack.installed("apiserver")
    tried("answers that are no certificate, from vault, cfssl and openssl", 1)


@pytest.mark.parametrize("spoilt", [*SPOILT, *BODIES])
def test_an_answer_of_cfssl_that_is_no_certificate(spoilt: str, bridge: Bridge, tried: Tried) -> None:
    """Exit 5 in bounded time and memory; a whole certificate is installed."""
    root, key = signer_of(bridge.pki), bytes(range(32))

    def leaf(body: bytes) -> str:
        inner = cfssl.inner_request(body)
        request = SignRequest(
            spec=SPECS["apiserver"],
            csr_pem=inner["certificate_request"].encode(),  # type: ignore[index]
            validity=YEAR,
        )
        return pem(Desk(root=root, request=request, now=datetime.now(UTC)).issue().leaf).decode()

    def answer(body: bytes) -> cfssl.Answer:
        if spoilt in SPOILT:
            return cfssl.Answer.result(certificate=SPOILT[spoilt](leaf(body)))
        return cfssl.Answer(body=BODIES[spoilt].body, times=BODIES[spoilt].times)

    usages = ["signing", "key encipherment", "server auth"]
    with cfssl.double({"server": key}, pem(root.certificate), usages=usages) as ca:
        ca.answers = [answer, lambda body: cfssl.Answer.result(certificate=leaf(body))]
        bridge.add("backend.corp", {"type": "cfssl", "url": ca.url, "auth_key_file": bridge.secret("key", key.hex())})
        bridge.add("authority.ca", {"backend": "corp", "timeout": "3m", "retry_for": "1s"})
        assert_refused_soon(bridge)
        run = bridge.run("renew", "apiserver")
        assert run.returncode == 0, run.stderr
    assert_pairs(bridge.pki)
    tried("answers that are no certificate, from vault, cfssl and openssl", 1)


#: What a shell makes of `$certificate`, a file in the CA's `new_certs_dir`.
SPOILT_FILES: dict[str, str] = {
    "truncated PEM": 'truncate -s 300 "$certificate"',
    "PEM without its last line": 'sed -i "/END CERTIFICATE/d" "$certificate"',
    "two leaves": 'cp "$certificate" "$certificate.old" && cat "$certificate.old" >> "$certificate"',
    "DER": 'openssl x509 -in "$certificate" -outform DER -out "$certificate"',
    "PKCS#7": 'openssl crl2pkcs7 -nocrl -certfile "$certificate" -out "$certificate"',
    "HTML": 'echo "<html><body>moved</body></html>" > "$certificate"',
    "empty": ': > "$certificate"',
    "100 MB": 'truncate -s 100M "$certificate"',
    "100 MB after a certificate": 'truncate -s 100M "$certificate.new" && cat "$certificate.new" >> "$certificate"',
    "none at all": 'rm "$certificate"',
    "a directory": 'rm "$certificate" && mkdir "$certificate"',
    "the CA's own": 'cp ca.crt "$certificate"',
}


@pytest.mark.parametrize("spoilt", SPOILT_FILES)
def test_an_answer_of_openssl_that_is_no_certificate(spoilt: str, bridge: Bridge, tmp_path: Path, tried: Tried) -> None:
    """
    Nothing is replaced, in bounded time and memory; what the real program makes is installed.

    Exit 6 for a file that a full disk may have cut: another run can help; 2 for one that can't be read as a file.
    """
    directory = opensslca.make_ca_directory(tmp_path / "ca", *bridge.pki.ca_pem("ca"))
    certificates, hostile = directory / "newcerts", tmp_path / "hostile"
    script = tmp_path / "openssl"
    script.write_text(
        f"""#!/bin/sh
openssl "$@" || exit
[ "$1" = ca ] && [ -e "{hostile}" ] || exit 0
for certificate in "{certificates}"/*; do {SPOILT_FILES[spoilt]}; done
"""
    )
    script.chmod(0o755)
    hostile.touch()
    code = {"a directory": 2, "the CA's own": 5}.get(spoilt, 6)
    bridge.add("backend.desk", {"type": "openssl", "dir": str(directory), "openssl": str(script)})
    bridge.add("authority.ca", {"backend": "desk"})
    assert_refused_soon(bridge, code)
    hostile.unlink()
    run = bridge.run("renew", "apiserver")
    assert run.returncode == 0, run.stderr
    assert_pairs(bridge.pki)
    tried("answers that are no certificate, from vault, cfssl and openssl", 1)


# --- clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead", "subject"),
    [(YEAR, "notBefore"), (-YEAR, "notAfter")],
    ids=["the node's is a year behind", "the node's is a year ahead"],
)
def test_a_clock_that_is_a_year_off(ahead: timedelta, subject: str, attack: Attack, tried: Tried) -> None:
    """The message asks for the clocks instead of installing what is not valid yet, or expired long ago."""
    attack.answer(lambda desk: replace(desk, now=desk.now + ahead).issue())
    said = attack.refused("apiserver")
    assert named(said) == {subject}
    assert tells_the_day(said, attack)
    assert "is one of the two wrong?" in said
    attack.answer(Desk.issue)
    attack.installed("apiserver")
    tried("clocks that are wrong", 1)


def tells_the_day(said: str, attack: Attack) -> bool:
    """Of now; midnight may have come meanwhile."""
    return any(f"this node's clock says {day:%Y-%m-%d}" in said for day in (attack.now, datetime.now(UTC)))


def test_a_clock_from_before_the_ca(attack: Attack, tried: Tried) -> None:
    """A node whose clock is so far behind that its own CA is not valid yet says so, and asks for no certificate."""
    begin = attack.now + YEAR
    young = Signer.make(begin=begin, end=begin + 10 * YEAR, key=attack.root.key)
    anchor = attack.bridge.pki.pki_dir / "ca.crt"
    attack.bridge.pki.trust("ca", pem(young.certificate))
    attack.forger.ca = young.certificate
    attack.answer(lambda desk: Desk(root=young, request=desk.request, now=begin).issue())
    said = attack.refused("apiserver")
    assert tells_the_day(said, attack)
    assert str(anchor) in said
    attack.forger.ca = attack.root.certificate
    attack.bridge.pki.trust("ca", pem(attack.root.certificate))
    attack.answer(Desk.issue)
    attack.installed("apiserver")
    tried("clocks that are wrong", 1)
