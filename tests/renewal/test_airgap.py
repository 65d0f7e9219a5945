"""The node's side of the air gap through the installed program, with a real `openssl ca` desk on the other side."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    pkcs7,
)
from cryptography.x509.oid import NameOID

from bridge.contract import Issued, SignRequest
from bridge.errors import Exit
from bridge.pki import bundle, bundle_format, signatures
from bridge.pki.bundle import AnswerBundle
from bridge.pki.certificates import pem, serial_hex
from bridge.pki.csr import PrivateKey, generate_key
from bridge.specs import AUTHORITIES, SPECS
from bridge.state import Store
from bridge.state.open_requests import OpenRequests
from tests.kit.airgap import Node
from tests.kit.bundles import changed, make_bundle, new_csr, old_pairs
from tests.kit.cas import add_openssl
from tests.kit.desks import Desk, make_desk
from tests.kit.forged import validity, with_field
from tests.kit.issuing import Signer, odd_certificates
from tests.kit.pairs import assert_pairs
from tests.kit.pki import NODE, Pki, handmade_pki

FRONT = "front-proxy-client"


def now() -> datetime:
    return datetime.now(UTC)


def make_node(directory: Path, left: timedelta) -> Node:
    pki = handmade_pki(directory / "node", now=now() - timedelta(days=100), not_after=now() + left)
    return Node.make(directory, pki)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """All its certificates are due, and live for 20 days; it knows no CA."""
    return make_node(tmp_path, timedelta(days=20))


@pytest.fixture
def desk(node: Node, tmp_path: Path) -> Desk:
    """The CA host: encrypted keys, and a policy."""
    return make_desk(tmp_path / "desk", node.pki)


def sign(desk: Desk, node: Node, to: str = "answer.json", bundle_name: str = "bundle.json") -> Path:
    """At the desk; must succeed."""
    answer = node.carried / to
    run = desk.run("sign", node.carried / bundle_name, "-o", answer)
    assert run.returncode == 0, run.stderr
    return answer


def read_answer(path: Path) -> AnswerBundle:
    return bundle_format.loads_answer(path.read_bytes())


def issued(answer: AnswerBundle, name: str) -> Issued:
    one = answer.answers[name]
    assert isinstance(one, Issued)
    return one


def signer_of(pki: Pki, authority: str) -> Signer:
    """The CA itself."""
    certificate, key = pki.ca_pem(authority)
    loaded = load_pem_private_key(key, None)
    assert isinstance(loaded, PrivateKey)
    return Signer(certificate=x509.load_pem_x509_certificate(certificate), key=loaded)


def loose(node: Node, name: str, *, spec: str = "", end: timedelta = timedelta(days=365)) -> x509.Certificate:
    """What a CA with another program makes of a CSR, with the usages of another certificate if that is named."""
    request = node.open()[name].request
    signer = signer_of(node.pki, SPECS[name].authority.name)
    asked = SignRequest(spec=SPECS[spec or name], csr_pem=request.csr_pem, validity=timedelta(days=365))
    return signer.issue(asked, begin=now() - timedelta(minutes=5), end=now() + end).leaf


# --- export -----------------------------------------------------------------------------------------------------------


def test_the_whole_walk(node: Node, desk: Desk) -> None:
    """All due requests go out in one file and come back in one; every pair is new and fits."""
    before = node.live()
    exported = node.export()
    assert {request.name for request in exported.requests} == set(before)
    assert (exported.node, exported.cluster) == (NODE, "kubernetes")
    assert all(request.proof is not None for request in exported.requests)

    done = node.run("import", sign(desk, node))

    assert done.returncode == 0, done.stderr
    assert "12 renewed" in done.stdout
    after = node.live()
    assert all(after[name] != before[name] for name in before)
    assert_pairs(node.pki)
    assert not node.open()
    assert not (node.state / "requests.json").exists()
    names = sorted(before)
    assert [sorted(node.events(event)) for event in ("asked", "issued", "verified", "installed")] == [names] * 4
    assert node.run("audit", "verify").returncode == 0


def test_without_names_only_what_is_due(tmp_path: Path) -> None:
    """With 300 days left nothing is, and no file is written; by name anything can be asked for."""
    node = make_node(tmp_path, timedelta(days=300))
    path = node.carried / "bundle.json"

    run = node.run("export", path)
    assert (run.returncode, path.exists()) == (0, False)
    assert "nothing is due" in run.stdout

    assert [request.name for request in node.export("apiserver", "scheduler.conf").requests] == [
        "apiserver",
        "scheduler.conf",
    ]
    assert len(node.export("all").requests) == 12


def test_an_unknown_name_is_a_usage_error(node: Node) -> None:
    """The exit code is 2, and no file is written."""
    run = node.run("export", node.carried / "bundle.json", "apiservr")
    assert run.returncode == 2
    assert "'apiservr'" in run.stderr
    assert not any(node.carried.iterdir())


def test_what_can_not_be_asked_for_fails_alone(node: Node) -> None:
    """The exit code is 1 for the broken one; the others are in the bundle."""
    (node.pki.pki_dir / "apiserver.crt").write_text("broken")
    run = node.run("export", node.carried / "bundle.json")
    assert run.returncode == 1
    assert "apiserver: " in run.stderr
    exported = bundle_format.loads_request((node.carried / "bundle.json").read_bytes())
    assert len(exported.requests) == 11


def _forms(key_pem: bytes) -> set[bytes]:
    """A private key as it might stand in a file."""
    key = load_pem_private_key(key_pem, None)
    forms = {key_pem.strip()}
    for style in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL):
        forms |= {key.private_bytes(encoding, style, NoEncryption()) for encoding in (Encoding.DER, Encoding.PEM)}
    bodies = {b"".join(form.splitlines()[1:-1]) for form in forms if form.startswith(b"-----")}
    return forms | bodies


def test_keys_stay_on_the_node(node: Node, desk: Desk) -> None:
    """0600 in the state directory, and in no bundle in any form, neither new ones nor those that prove."""
    old = [_key_pem(node, name) for name in node.live()]
    node.export()
    state = node.state / "requests.json"
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert stat.S_IMODE(node.state.stat().st_mode) == 0o700
    new = [one.key_pem for one in node.open().values()]
    sign(desk, node)

    written = [json.loads(path.read_bytes()) for path in node.carried.iterdir()]
    assert len(written) == 2
    texts = [path.read_bytes() for path in node.carried.iterdir()]
    texts += [text.replace(b"\\n", b"") for text in texts]  # a PEM body in one piece
    for form in {form for key in (*old, *new) for form in _forms(key)}:
        assert not [text for text in texts if form in text]
    assert not [text for text in texts if b"PRIVATE" in text]
    kept = state.read_bytes().replace(b"\\n", b"\n")
    assert all(key.strip() in kept for key in new)  # the twin: where they are, this search finds them


def _key_pem(node: Node, name: str) -> bytes:
    return old_pairs(node.pki, [name])[name][1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def test_a_request_that_waits_is_exported_as_it_is(node: Node) -> None:
    """The same keys, CSRs, and proofs, so that an answer to either bundle fits."""
    first = node.export()
    keys = {name: one.key_pem for name, one in node.open().items()}
    run = node.run("export", node.carried / "again.json")
    assert run.stdout.count("as before") == 12
    second = bundle_format.loads_request((node.carried / "again.json").read_bytes())
    assert second.requests == first.requests
    assert {name: one.key_pem for name, one in node.open().items()} == keys


def test_a_request_joins_those_of_before(node: Node, desk: Desk) -> None:
    """A bundle with old and new requests proves them all anew; the answer to the older bundle fits, too."""
    first = node.export("apiserver", to="first.json")
    both = node.export("apiserver", FRONT)
    assert both.requests[0].csr == first.requests[0].csr
    assert not [problem for request in both.requests if (problem := signatures.proof_problem(request, both))]
    assert node.run("import", sign(desk, node, bundle_name="first.json")).returncode == 4
    assert list(node.open()) == [FRONT]
    assert node.run("import", sign(desk, node)).returncode == 0
    assert_pairs(node.pki)


def test_another_kind_of_key_is_a_new_request(node: Node) -> None:
    """`renewal.key` was changed meanwhile: the export says so, and the older answer is refused."""
    first = node.export("apiserver", to="first.json")
    certificate = loose(node, "apiserver")
    node.bridge.add("renewal", {"key": "ecdsa-p384"})
    run = node.run("export", node.carried / "bundle.json", "apiserver")
    assert run.returncode == 0
    assert "another kind of key (renewal.key)" in run.stderr
    assert "new key" in run.stdout
    second = bundle_format.loads_request((node.carried / "bundle.json").read_bytes())
    assert second.requests[0].csr != first.requests[0].csr
    path = node.carried / "older.crt"
    path.write_bytes(pem(certificate))
    assert node.run("import", path).returncode == 5
    assert list(node.open()) == ["apiserver"]


def test_another_validity_is_a_new_request(node: Node) -> None:
    """A desk that has refused the old one, as longer than its policy allows, is asked for what the settings say now."""
    first = node.export("apiserver", to="first.json")
    assert first.requests[0].validity == timedelta(days=365)
    node.bridge.add("renewal", {"validity": "180d", "shorter": "allow"})
    run = node.run("export", node.carried / "bundle.json", "apiserver")
    assert run.returncode == 0
    assert "another validity" in run.stderr
    second = bundle_format.loads_request((node.carried / "bundle.json").read_bytes())
    assert second.requests[0].validity == timedelta(days=180)
    assert signatures.proof_problem(second.requests[0], second) is None


def test_no_other_file_is_overwritten(node: Node) -> None:
    """A request bundle of before may be; a foreign file, another node's, an answer or a directory not, and no key is made."""
    path = node.carried / "bundle.json"
    path.write_text("precious")
    run = node.run("export", path)
    assert run.returncode == 1
    assert f"{path}: wanted no file, or a request bundle of before" in run.stderr
    assert path.read_text() == "precious"
    assert node.run("export", node.carried).returncode == 1
    assert not node.open()
    others = bundle_format.dumps(make_bundle(old_pairs(node.pki, ["apiserver"]), node="cp-9"))
    path.write_bytes(others)
    run = node.run("export", path)
    assert (run.returncode, path.read_bytes(), node.open()) == (1, others, {})
    assert "found that of node cp-9, cluster kubernetes" in run.stderr

    path.unlink()
    node.export()
    node.export("apiserver")
    assert len(bundle_format.loads_request(path.read_bytes()).requests) == 1


def test_a_hyphen_names_no_file(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output has no bundle: a usage error, before a key is made; another name is a file."""
    monkeypatch.chdir(node.carried)
    run = node.run("export", "-", FRONT)
    assert run.returncode == Exit.USAGE
    assert "wanted the name of a file for the request bundle, found -" in run.stderr
    assert (list(node.carried.iterdir()), node.open()) == ([], {})
    assert node.run("export", "one", FRONT).returncode == 0
    assert (node.carried / "one").is_file()


def test_a_bundle_that_can_not_be_written_is_exported_again(node: Node) -> None:
    """The keys are kept, and the next export has the same CSRs."""
    run = node.run("export", node.carried / "no/such/bundle.json", "apiserver")
    assert run.returncode == 1
    assert "No such file or directory" in run.stderr
    assert "export again, to another place" in run.stderr
    key = node.open()["apiserver"].key_pem
    again = node.export("apiserver")
    assert node.open()["apiserver"].key_pem == key
    assert again.requests[0].csr == node.open()["apiserver"].request.csr


def test_a_request_says_when_it_can_prove_nothing(node: Node, desk: Desk) -> None:
    """The old key is gone: exported without proof, said so, refused by the desk, and signed by a person's word."""
    (node.pki.pki_dir / "front-proxy-client.key").unlink()
    run = node.run("export", node.carried / "bundle.json", FRONT)
    assert run.returncode == 0, run.stderr
    assert "WITHOUT PROOF" in run.stdout
    shown = node.run("inspect", node.carried / "bundle.json")
    assert shown.returncode == 5
    assert "there is no continuity proof" in shown.stdout

    answer = node.carried / "answer.json"
    assert desk.run("sign", node.carried / "bundle.json", "-o", answer).returncode == 5
    refused = node.run("import", answer)
    assert refused.returncode == 5
    assert "continuity proof" in refused.stderr
    assert list(node.open()) == [FRONT]

    signed = desk.run("sign", node.carried / "bundle.json", "-o", answer, "--without-proof", FRONT)
    assert signed.returncode == 0, signed.stderr
    assert node.run("import", answer).returncode == 0
    assert_pairs(node.pki)


def test_a_request_under_a_wrong_name_is_exported_under_the_right_one(node: Node, desk: Desk) -> None:
    """The desk refuses the first; after the settings are mended the same keys and CSRs go out anew, with new proofs."""
    right = node.bridge.config.read_text()
    node.bridge.config.write_text(right.replace(f'name = "{NODE}"', 'name = "ip-10-0-0-1"\ncluster = "other"'))
    first = node.export("apiserver", FRONT, to="first.json")
    older = node.carried / "older.json"
    assert desk.run("sign", node.carried / "first.json", "-o", older).returncode == 5
    node.bridge.config.write_text(right)
    second = node.export("apiserver", FRONT)

    assert (first.node, first.cluster) == ("ip-10-0-0-1", "other")
    assert (second.node, second.cluster) == (NODE, "kubernetes")
    assert [one.csr for one in second.requests] == [one.csr for one in first.requests]
    assert second.batch != first.batch
    assert node.export("apiserver", FRONT).requests == second.requests
    stale = node.run("import", older)
    assert stale.returncode == 5
    assert "found one to node ip-10-0-0-1 of cluster other" in stale.stderr
    assert node.run("import", sign(desk, node)).returncode == 0
    assert_pairs(node.pki)


def test_a_proof_is_made_up_for(node: Node, desk: Desk) -> None:
    """The old key was not there, and is put back: the same CSR goes out with a proof; an answer to the first fits, too."""
    key = node.pki.pki_dir / "front-proxy-client.key"
    key.rename(node.carried / ".key")
    first = node.export(FRONT, to="first.json")
    assert node.export(FRONT).requests == first.requests
    (node.carried / ".key").rename(key)
    second = node.export(FRONT)

    assert [first.requests[0].proof is None, second.requests[0].proof is None] == [True, False]
    assert first.requests[0].csr == second.requests[0].csr
    answer = node.carried / "answer.json"
    signed = desk.run("sign", node.carried / "first.json", "-o", answer, "--without-proof", FRONT)
    assert signed.returncode == 0, signed.stderr
    assert desk.run("sign", node.carried / "bundle.json", "-o", node.carried / "other.json").returncode == 0
    assert node.run("import", answer).returncode == 0
    assert_pairs(node.pki)


def test_expired_certificates_are_renewed(tmp_path: Path) -> None:
    """The road that is always open: all are dead, the node knows no CA, and the walk brings them back."""
    node = make_node(tmp_path, timedelta(days=-3))
    desk = make_desk(tmp_path / "desk", node.pki)
    run = node.run("export", node.carried / "bundle.json")
    assert run.stdout.count("  expired 2") == 12
    assert node.run("import", sign(desk, node)).returncode == 0
    assert all(certificate.not_valid_after_utc > now() for certificate in node.live().values())
    assert_pairs(node.pki)


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_a_person_sees_what_is_asked(node: Node, desk: Desk) -> None:
    """Names, what is replaced, until when it is valid, the proof, its origin, and the same fingerprint on both sides."""
    exported = node.export("apiserver", FRONT)
    here, there = node.run("inspect", node.carried / "bundle.json"), desk.run("inspect", node.carried / "bundle.json")
    old = node.live()["apiserver"]
    assert (here.returncode, there.returncode) == (0, 0)
    for text in (
        "request of node cp-1, cluster kubernetes",
        "2 certificates",
        "apiserver by ca",
        "DNS:api.example.com",
        f"serial {serial_hex(old)}",
        f"valid until {old.not_valid_after_utc:%Y-%m-%d}",
        "holds: made with the key",
        "signed by this CA",
    ):
        assert text in here.stdout
    fingerprint = bundle_format.short_fingerprint(exported)
    assert here.stdout.count(fingerprint) == there.stdout.count(fingerprint) == 1
    assert fingerprint in node.run("pending", "list").stdout


def test_a_changed_bundle_is_shown_as_such(node: Node) -> None:
    """A changed byte is exit 1; a proof that does not hold, with the digest made anew, is exit 5."""
    exported = node.export("apiserver")
    path = node.carried / "bundle.json"
    path.write_bytes(path.read_bytes().replace(b'"validitySeconds": 31536000', b'"validitySeconds": 31536001'))
    run = node.run("inspect", path)
    assert run.returncode == 1
    assert "digest" in run.stderr

    other = changed(exported, "apiserver", csr=new_csr(node.live()["apiserver"]))
    path.write_bytes(bundle_format.dumps(other))
    run = node.run("inspect", path)
    assert run.returncode == 5
    assert "found another signature" in run.stdout


def test_a_proof_by_another_certificate_is_shown_as_such(node: Node) -> None:
    """A proof by a certificate of another name, or without the usages, is exit 5, though its key has signed."""
    pairs, path = old_pairs(node.pki), node.carried / "bundle.json"
    other = make_bundle({"admin.conf": pairs["scheduler.conf"]}, build=lambda _: new_csr(pairs["admin.conf"][0]))
    path.write_bytes(bundle_format.dumps(other))
    named = node.run("inspect", path)
    path.write_bytes(bundle_format.dumps(make_bundle({"etcd-server": pairs["apiserver"]})))
    used = node.run("inspect", path)

    assert (named.returncode, used.returncode) == (5, 5)
    assert "found one by that of CN=system:kube-scheduler" in named.stdout
    assert "found one without clientAuth" in used.stdout


def test_a_proof_by_a_foreign_ca_is_shown_as_such(node: Node, desk: Desk, tmp_path: Path) -> None:
    """A CA of the same name proves nothing, on the node and at the desk (exit 5); where no CA is known, it says so."""
    foreign = make_bundle(old_pairs(handmade_pki(tmp_path / "foreign"), ["super-admin.conf"]))
    path = node.carried / "bundle.json"
    path.write_bytes(bundle_format.dumps(foreign))

    here, there = node.run("inspect", path), desk.run("inspect", path)
    desk.policy.unlink()
    nowhere = desk.run("inspect", path)

    assert (here.returncode, there.returncode) == (5, 5)
    for seen in (here, there):
        assert "found CN=kubernetes-super-admin,O=system:masters by CN=kubernetes, not signed by it" in seen.stdout
    assert nowhere.returncode == 0
    assert "origin      NOT CHECKED: no certificate of ca is here" in nowhere.stdout


@pytest.mark.filterwarnings("ignore:Attribute's length")
def test_names_draw_no_lines(node: Node) -> None:
    """Blanks of any kind and control characters in a name are one blank, and a long name is cut."""
    padded = "kube-apiserver" + " \u3164\u2800" * 40 + "proof       holds: made with the key"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{padded}\x1b[2J" + "x" * 1000, _validate=False)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(generate_key("ecdsa-p256"), hashes.SHA256())
    path = node.carried / "bundle.json"
    path.write_bytes(bundle_format.dumps(make_bundle(old_pairs(node.pki, ["apiserver"]), build=lambda _: csr)))

    shown = node.run("inspect", path)

    [line] = [line for line in shown.stdout.splitlines() if "asks for" in line]
    assert line.startswith("  asks for    CN=kube-apiserver proof holds: made with the key [2Jxxx")
    assert len(line) < 320
    assert "\x1b" not in shown.stdout


def test_what_is_no_bundle_is_not_shown(node: Node) -> None:
    """A missing file, a directory, or another file is exit 1, and the error says what it is."""
    (node.carried / "x").write_text("hello")
    for name, found in (("none", "found: no file"), ("", "found: no file"), ("x", "bundle: wanted")):
        run = node.run("inspect", node.carried / name)
        assert run.returncode == 1
        assert found in run.stderr


# --- import -----------------------------------------------------------------------------------------------------------


def _pkcs7_pem(certificates: list[x509.Certificate]) -> bytes:
    return pkcs7.serialize_certificates(certificates, Encoding.PEM)


FORMS: dict[str, Callable[[x509.Certificate, x509.Certificate], bytes]] = {
    "PEM": lambda leaf, _: pem(leaf),
    "PEM, CRLF": lambda leaf, _: pem(leaf).replace(b"\n", b"\r\n"),
    "PEM, text around": lambda leaf, _: b"Bag Attributes\n  friendlyName: x\n" + pem(leaf) + b"regards, the CA team\n",
    "PEM, leaf last": lambda leaf, ca: pem(ca) + pem(leaf),
    "DER": lambda leaf, _: leaf.public_bytes(Encoding.DER),
    "PKCS#7, PEM": lambda leaf, ca: _pkcs7_pem([ca, leaf]),
    "PKCS#7, as CMS": lambda leaf, ca: _pkcs7_pem([leaf, ca]).replace(b"PKCS7", b"CMS"),
    "PKCS#7, text around": lambda leaf, ca: b"subject=x\n\n" + _pkcs7_pem([leaf, ca]) + b"\nregards\n",
    "PKCS#7, DER": lambda leaf, ca: pkcs7.serialize_certificates([leaf, ca], Encoding.DER),
}


@pytest.mark.parametrize("form", FORMS)
def test_loose_certificates_in_any_form_under_any_name(node: Node, form: str) -> None:
    """Loose certificates are found by their public key."""
    node.export(FRONT)
    leaf = loose(node, FRONT)
    ca = x509.load_pem_x509_certificate(node.pki.ca_pem("front-proxy-ca")[0])
    path = node.carried / "Re: your request (1).txt"
    path.write_bytes(FORMS[form](leaf, ca))
    run = node.run("import", path)
    assert run.returncode == 0, run.stderr
    assert node.live()[FRONT] == leaf
    assert_pairs(node.pki)


def test_a_directory_with_all_kinds_of_things(node: Node, desk: Desk) -> None:
    """An answer bundle, loose files and junk side by side; files that the operator did not name are only passed over."""
    exported = node.export("apiserver", "scheduler.conf", FRONT)
    answered = read_answer(sign(desk, node))
    (node.carried / "answer.json").unlink()
    part = replace(answered, answers={"apiserver": issued(answered, "apiserver")})
    (node.carried / "part.json").write_bytes(bundle_format.dumps(part))
    (node.carried / "scheduler").write_bytes(issued(answered, "scheduler.conf").leaf.public_bytes(Encoding.DER))
    (node.carried / "front").write_bytes(pem(issued(answered, FRONT).leaf))
    (node.carried / "readme.txt").write_text("hello")
    (node.carried / ".hidden").write_bytes(b"\xff")
    (node.carried / "more").mkdir()
    run = node.run("import", node.carried)
    assert run.returncode == 0, run.stderr
    for name in ("readme.txt", "bundle.json"):
        assert f"{name}: passed over" in run.stderr
    live = node.live()
    assert {r.name for r in exported.requests if live[r.name] == issued(answered, r.name).leaf} == {
        "apiserver",
        "scheduler.conf",
        FRONT,
    }
    assert_pairs(node.pki)


def test_odd_certificates_beside_an_answer_do_no_harm(node: Node) -> None:
    """They are passed over or refused by name, and the answer beside them is installed."""
    node.export(FRONT)
    leaf = loose(node, FRONT)
    (node.carried / "bundle.json").unlink()
    (node.carried / "answer.crt").write_bytes(pem(leaf))
    for name, der in odd_certificates(Signer.make("odd").certificate).items():
        (node.carried / name).write_bytes(der)
    run = node.run("import", node.carried)
    assert run.returncode == Exit.REFUSED, run.stderr
    assert "an unknown version: passed over" in run.stderr
    assert "an unknown version, PKCS#7: passed over" in run.stderr
    assert "an extension twice: wanted the certificate of a request that waits here, found CN=odd" in run.stderr
    assert node.live()[FRONT] == leaf


def test_the_same_things_named_are_errors(node: Node) -> None:
    """A named file that is wrong is exit 1, and the error says what it is, or that it is not there."""
    node.export(FRONT)
    (node.carried / "readme.txt").write_text("hello")
    for name, found in (("readme.txt", "no certificate"), ("gone", "no such file"), ("bundle.json", "schema")):
        run = node.run("import", node.carried / name)
        assert run.returncode != 0
        assert found in run.stderr
    assert list(node.open()) == [FRONT]


def test_a_copy_that_was_cut_off_is_not_called_a_refusal(node: Node, desk: Desk) -> None:
    """It is exit 1, for what can't be read, named or in a directory, and the whole answer is taken after it."""
    node.export(FRONT)
    answer = sign(desk, node)
    cut = node.carried / "cut"
    cut.mkdir()
    (cut / "answer.json").write_bytes(answer.read_bytes()[:-100])
    for path in (cut / "answer.json", cut):
        run = node.run("import", path)
        assert run.returncode == Exit.FAILED
        assert "a copy that was cut off has to be made again" in run.stderr
    assert node.run("import", answer).returncode == 0


def test_a_chain_is_put_in_order(tmp_path: Path) -> None:
    """An intermediate CA's certificate comes in a file of its own, and is installed after the leaf."""
    node = make_node(tmp_path, timedelta(days=20))
    node.export(FRONT)
    root = signer_of(node.pki, "front-proxy-ca")
    intermediate = Signer.make(
        "front-proxy-sub", parent=root, begin=now() - timedelta(days=1), end=now() + timedelta(days=900)
    )
    request = node.open()[FRONT].request
    leaf = intermediate.issue(request, begin=now() - timedelta(minutes=5), end=now() + timedelta(days=365)).leaf
    (node.carried / "a.crt").write_bytes(pem(intermediate.certificate))
    (node.carried / "z.crt").write_bytes(pem(leaf))
    run = node.run("import", node.carried / "a.crt", node.carried / "z.crt")
    assert run.returncode == 0, run.stderr
    assert (node.pki.pki_dir / "front-proxy-client.crt").read_bytes() == pem(leaf) + pem(intermediate.certificate)


def test_of_several_answers_the_latest_certificate_counts(node: Node, desk: Desk) -> None:
    """The latest certificate counts under any file name, and although a refusal lies beside it."""
    node.export(FRONT)
    answered = read_answer(sign(desk, node))
    (node.carried / "answer.json").unlink()
    early, late = (_at(node, FRONT, minutes) for minutes in (60, 5))
    for name, answer in (
        ("1.json", Issued(leaf=late)),
        ("2.json", Issued(leaf=early)),
        ("3.json", bundle.refusal("no")),
    ):
        (node.carried / name).write_bytes(bundle_format.dumps(replace(answered, answers={FRONT: answer})))
    assert node.run("import", *sorted(node.carried.glob("[123].json"))).returncode == 0
    assert node.live()[FRONT] == late


def _at(node: Node, name: str, minutes: int) -> x509.Certificate:
    request = node.open()[name].request
    signer = signer_of(node.pki, SPECS[name].authority.name)
    return signer.issue(request, begin=now() - timedelta(minutes=minutes), end=now() + timedelta(days=365)).leaf


def test_a_wrong_certificate_is_refused_and_the_request_stays(node: Node) -> None:
    """With the usages of a server: exit 5, nothing replaced; the right one is taken afterwards."""
    node.export(FRONT)
    before = node.live()
    path = node.carried / "x.crt"
    path.write_bytes(pem(loose(node, FRONT, spec="apiserver")))
    run = node.run("import", path)
    assert run.returncode == 5
    assert "EKU" in run.stderr
    assert node.live() == before
    assert list(node.open()) == [FRONT]
    path.write_bytes(pem(loose(node, FRONT)))
    assert node.run("import", path).returncode == 0


def test_part_of_the_answers(node: Node, desk: Desk) -> None:
    """The exit code is 4: the answered requests are installed, the rest waits; in JSON, too."""
    node.export("apiserver", FRONT)
    answered = read_answer(sign(desk, node))
    path = node.carried / "answer.json"
    path.write_bytes(bundle_format.dumps(replace(answered, answers={FRONT: issued(answered, FRONT)})))
    run = node.run("import", path, "-o", "json")
    assert run.returncode == 4
    result = json.loads(run.stdout)
    assert [one["name"] for one in result["renewed"]] == [FRONT]
    assert [one["name"] for one in result["waiting"]] == ["apiserver"]
    assert result["exitCode"] == 4
    assert list(node.open()) == ["apiserver"]


def test_an_answer_whose_file_cannot_be_replaced_is_kept_out_and_taken_later(node: Node, desk: Desk) -> None:
    """A kubeconfig got an anchor meanwhile: exit 1, the others are installed; without it the same answer is."""
    node.export("admin.conf", FRONT)
    answer, path = sign(desk, node), node.pki.kubeconfig_dir / "admin.conf"
    plain = path.read_text()
    path.write_text(plain.replace("users:", "users: &u"))
    run = node.run("import", answer, "-o", "json")
    assert run.returncode == 1
    result = json.loads(run.stdout)
    assert [one["name"] for one in result["renewed"]] == [FRONT]
    assert [one["name"] for one in result["failed"]] == ["admin.conf"]
    assert str(path) in run.stderr
    path.write_text(plain)
    assert node.run("import", answer).returncode == 0
    assert_pairs(node.pki)
    assert not node.open()


def test_an_answer_whose_files_are_another_ones_too_is_kept_out(node: Node, desk: Desk) -> None:
    """A symlink came meanwhile: with the key replaced, the other certificate would be without its own."""
    node.export("etcd-server", "etcd-peer", FRONT)
    answer, before = sign(desk, node), node.live()
    key = node.pki.pki_dir / "etcd/peer.key"
    key.unlink()
    key.symlink_to("server.key")
    run = node.run("import", answer, "-o", "json")
    assert run.returncode == 1
    result = json.loads(run.stdout)
    assert [one["name"] for one in result["renewed"]] == [FRONT]
    assert "wanted a file of its own" in run.stderr
    assert {name for name, one in node.live().items() if one != before[name]} == {FRONT}


def test_all_or_nothing(node: Node) -> None:
    """One wrong certificate holds the other back; it is kept, and installed when the right one comes."""
    node.export("apiserver", FRONT)
    before = node.live()
    good, wrong = node.carried / "good", node.carried / "wrong"
    good.write_bytes(pem(loose(node, FRONT)))
    wrong.write_bytes(pem(loose(node, "apiserver", spec="admin.conf")))
    assert node.run("import", good, wrong, "--all-or-nothing").returncode == 5
    assert node.live() == before
    wrong.write_bytes(pem(loose(node, "apiserver")))
    assert node.run("import", good, wrong, "--all-or-nothing").returncode == 0
    assert_pairs(node.pki)
    assert {name for name, one in node.live().items() if one != before[name]} == {"apiserver", FRONT}


def test_a_refusal_is_reported_with_its_reason(node: Node, desk: Desk) -> None:
    """The error has the desk's words and exit code 5; the request stays, since a person may change the decision."""
    policy = desk.policy.read_text()
    desk.policy.write_text(f'{policy}names = ["{FRONT}"]\n')
    node.export("apiserver", FRONT)
    answer = node.carried / "answer.json"
    assert desk.run("sign", node.carried / "bundle.json", "-o", answer).returncode == 5
    run = node.run("import", answer)
    assert run.returncode == 5
    assert "apiserver: import of" in run.stderr
    assert "refused by desk-1" in run.stderr
    assert "carry the same request there again" in run.stderr
    assert "found apiserver" in run.stderr
    assert FRONT in run.stdout
    assert node.events("installed") == [FRONT]
    assert list(node.open()) == ["apiserver"]
    desk.policy.write_text(policy)
    node.export()
    assert node.run("import", sign(desk, node)).returncode == 0


def test_answers_to_something_else_are_refused_by_name(node: Node, desk: Desk) -> None:
    """A cancelled request, another node's, a changed byte: exit 5, and nothing is replaced; what is installed is fine."""
    node.export("apiserver")
    cancelled = sign(desk, node, to="cancelled.json")
    assert node.run("pending", "cancel", "apiserver").returncode == 0
    leaf = issued(read_answer(cancelled), "apiserver").leaf
    (node.carried / "cancelled.crt").write_bytes(pem(leaf))
    node.export("apiserver")
    good = sign(desk, node)
    foreign = replace(read_answer(good), node="cp-2")
    (node.carried / "foreign.json").write_bytes(bundle_format.dumps(foreign))
    (node.carried / "cluster.json").write_bytes(bundle_format.dumps(replace(read_answer(good), cluster="other")))
    (node.carried / "byte.json").write_bytes(good.read_bytes().replace(b"cp-1", b"cp-3"))
    before = node.live()

    for name, found in {
        "cancelled.json": "which was cancelled, is done, or is older",
        "cancelled.crt": f"serial {serial_hex(leaf)}, for another key",
        "foreign.json": "wanted an answer to node cp-1 of cluster kubernetes, found one to node cp-2",
        "cluster.json": "of cluster other",
        "byte.json": "digest: wanted",
    }.items():
        run = node.run("import", node.carried / name)
        assert run.returncode == 5, name
        assert f"{node.carried / name}: " in run.stderr
        assert found in run.stderr
    assert node.live() == before
    assert list(node.open()) == ["apiserver"]
    assert len(node.events("refused")) >= 4

    assert node.run("import", good).returncode == 0
    again = node.run("import", good)
    assert again.returncode == 0
    assert f"{good}: all its certificates are installed already" in again.stderr
    assert node.run("rollback").returncode == 0
    again = node.run("import", good)
    assert again.returncode == 5
    assert again.stdout == ""


def test_in_a_directory_the_good_answer_is_installed_although_another_is_refused(node: Node, desk: Desk) -> None:
    """The exit code is 5 for the strange one, which JSON names."""
    node.export("apiserver")
    good = sign(desk, node)
    (node.carried / "foreign.json").write_bytes(bundle_format.dumps(replace(read_answer(good), node="cp-2")))
    run = node.run("import", good, node.carried / "foreign.json", "-o", "json")
    assert run.returncode == 5
    result = json.loads(run.stdout)
    assert result["exitCode"] == 5
    assert [one["name"] for one in result["renewed"]] == ["apiserver"]
    assert "cp-2" in result["errors"][0]["error"]


def test_nothing_steers_the_terminal(node: Node) -> None:
    """A carried file's name may hold anything."""
    node.export(FRONT)
    path = node.carried / "\x1b]0;owned\x07.crt"
    path.write_bytes(pem(loose(node, FRONT)))
    run = node.run("import", node.carried, "-o", "text")
    assert "by import of" in run.stdout
    assert "\x1b" not in run.stdout + run.stderr


def test_nothing_in_the_inbox_steers_the_terminal(node: Node) -> None:
    """`renew` shows and keeps the words of backend `exchange` about a file there, and `pending list` shows them."""
    _, inbox = node.add_exchange()
    assert node.run("renew", FRONT).returncode == 4
    (inbox / "\x1b]0;owned\x07.json").write_text("{}")
    for run in (node.run("renew", FRONT), node.run("pending", "list")):
        assert "owned" in run.stdout
        assert not {"\x1b", "\x07"} & set(run.stdout + run.stderr)


def test_an_answer_for_a_replaced_certificate_is_refused(node: Node, desk: Desk, tmp_path: Path) -> None:
    """The certificate was replaced after the export: the request is forgotten, its answer refused, nothing touched."""
    node.export("apiserver", FRONT)
    answer = sign(desk, node)
    theirs = handmade_pki(tmp_path / "other", not_after=now() + timedelta(days=300))
    for name in ("apiserver.crt", "apiserver.key"):
        shutil.copyfile(theirs.pki_dir / name, node.pki.pki_dir / name)
    before = (node.pki.pki_dir / "apiserver.crt").read_bytes()
    run = node.run("import", answer)
    assert run.returncode == 0
    assert "apiserver: forgot the request" in run.stderr
    assert (node.pki.pki_dir / "apiserver.crt").read_bytes() == before
    assert node.events("installed") == [FRONT]
    assert node.events("cancelled") == ["apiserver"]


def die_at(node: Node, point: str, *args: str | Path) -> None:
    """Run the program, which is killed there."""
    program = (
        f"import os, {point.rpartition('.')[0]}\ndef die(*_, **__): os.kill(os.getpid(), 9)\n"
        f"{point} = die\nfrom bridge.cli.app import app\napp()"
    )
    command = [sys.executable, "-c", program, *map(str, args), "--config", str(node.bridge.config)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL


def test_killed_when_the_request_was_in_the_outbox(node: Node, desk: Desk) -> None:
    """The next run asks for that one not again, and for the others in a bundle of their own; both are answered."""
    outbox, inbox = node.add_exchange()
    die_at(node, "backends.exchange.Pending", "renew", FRONT)
    [first] = outbox.iterdir()
    assert node.run("renew", FRONT, "apiserver", "etcd-peer").returncode == 4
    [second] = set(outbox.iterdir()) - {first}
    asked = [[one.name for one in bundle_format.loads_request(path.read_bytes()).requests] for path in (first, second)]
    assert asked == [[FRONT], ["apiserver", "etcd-peer"]]
    assert desk.run("sign", outbox, "-o", inbox).returncode == 0
    done = node.run("renew", FRONT, "apiserver", "etcd-peer")
    assert done.returncode == 0, done.stderr
    assert len(desk.issued()) == len(node.events("installed")) == 3


@pytest.mark.first_use("27")
def test_an_answer_leaves_the_inbox_when_all_of_it_is_installed(node: Node, desk: Desk) -> None:
    """An answer stays while one of its certificates still waits for a good answer; other files stay where they are."""
    outbox, inbox = node.add_exchange()
    assert node.run("renew", FRONT, "apiserver").returncode == 4
    [sent] = outbox.iterdir()
    request = bundle_format.loads_request(sent.read_bytes())
    (inbox / "note.txt").write_text("hello")
    (inbox / "half.json").write_bytes(bundle_format.dumps(request)[:-9])
    assert desk.run("sign", outbox, "-o", inbox).returncode == 0
    [path] = inbox.glob("*.answer.json")
    whole = bundle_format.loads_answer(path.read_bytes())
    wrong = decoy(next(one for one in request.requests if one.name == "apiserver"), request)
    path.write_bytes(bundle_format.dumps(replace(whole, answers={**whole.answers, "apiserver": wrong})))

    assert node.run("renew", FRONT, "apiserver").returncode == 5
    assert path.exists()
    assert (node.state / "collected.json").exists()
    path.write_bytes(bundle_format.dumps(whole))
    done = node.run("renew", "apiserver")
    assert done.returncode == 0, done.stderr
    assert sorted(one.name for one in inbox.iterdir()) == ["half.json", "note.txt"]
    assert not (node.state / "collected.json").exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_killed_before_the_answer_left_the_inbox(node: Node, desk: Desk, *, is_there: bool) -> None:
    """The next run removes it; where the inbox is away, that run says so once, and goes on."""
    outbox, inbox = node.add_exchange()
    assert node.run("renew", FRONT).returncode == 4
    assert desk.run("sign", outbox, "-o", inbox).returncode == 0
    die_at(node, "backends.exchange._remove", "renew", FRONT)
    [path] = inbox.iterdir()
    assert not node.open()
    away = inbox if is_there else inbox.rename(inbox.with_name("away"))
    runs = [node.run("renew") for _ in range(2)]
    away.rename(inbox)

    assert path.exists() is not is_there
    assert ["requests and answers that are over stay where they are" in run.stderr for run in runs] == [
        not is_there,
        False,
    ]
    assert not (node.state / "collected.json").exists()


@pytest.mark.parametrize("then", ["import", "renew"])
@pytest.mark.parametrize("point", ["bridge.renewal.verify_and_install.install", "bridge.state.install._journal"])
def test_killed_between_proof_and_installation(node: Node, desk: Desk, point: str, then: str) -> None:
    """The same import, or the next `renew` without any CA, installs what was proven; no CA is asked again."""
    node.export("apiserver", "scheduler.conf")
    answer = sign(desk, node)
    die_at(node, point, "import", answer)
    assert "answered and verified" in node.run("pending", "list").stdout
    run = node.run("import", answer) if then == "import" else node.run("renew", "apiserver", "scheduler.conf")
    assert run.returncode == 0, run.stderr
    answered = read_answer(answer)
    live = node.live()
    assert [live[name] for name in answered.answers] == [issued(answered, name).leaf for name in answered.answers]
    assert_pairs(node.pki)
    assert not node.open()


def test_a_full_disk(node: Node, desk: Desk) -> None:
    """It is found before anything is done; with room again the same file is imported."""
    if os.geteuid() != 0:
        pytest.skip("wanted root to mount a small file system")
    node.export("apiserver", FRONT)
    answer = sign(desk, node)
    before = node.live()
    size = sum(path.stat().st_size for path in node.state.rglob("*") if path.is_file())
    script = (
        f"cp -a {node.state} {node.state}.room && mount -t tmpfs -o size={(size // 4096 + 6) * 4}k,mode=700 none {node.state}"
        f" && cp -a {node.state}.room/. {node.state} && dd if=/dev/zero of={node.state}/fill bs=4k 2>/dev/null;"
        ' exec "$@"'
    )
    program = str(Path(sys.executable).with_name("ca-bridge"))
    command = ["unshare", "--mount", "sh", "-c", script, "sh", program, "import", str(answer)]
    run = subprocess.run(
        [*command, "--config", str(node.bridge.config)], capture_output=True, text=True, check=False, timeout=400
    )
    assert run.returncode == 1, run.stdout
    assert f"file system of {node.state}: wanted 1024 KiB for a renewal, found 0 KiB" in run.stderr
    assert node.live() == before
    assert node.run("import", answer).returncode == 0
    assert_pairs(node.pki)


# --- pending ----------------------------------------------------------------------------------------------------------


def test_the_list_of_what_is_open(node: Node) -> None:
    """Age, deadline and fingerprint, as text and JSON; nothing is written for it."""
    empty = node.run("pending", "list")
    assert (empty.returncode, empty.stdout) == (0, "nothing is pending\n")
    assert not node.state.exists()
    exported = node.export("apiserver", FRONT)
    text = node.run("pending", "list").stdout
    assert text.startswith(
        f"an operator has it; fingerprint {bundle_format.short_fingerprint(exported)}:\n  apiserver "
    )
    assert text.count("asked ") == 2
    found = json.loads(node.run("pending", "list", "-o", "json").stdout)
    assert found["schemaVersion"] == 1
    by_name = {one["name"]: one for one in found["pending"]}
    assert list(by_name) == ["apiserver", FRONT]
    one, end = by_name["apiserver"], node.live()["apiserver"].not_valid_after_utc
    assert one["deadline"] == end.isoformat().replace("+00:00", "Z")
    assert abs(one["secondsLeft"] - (end - now()).total_seconds()) < 60
    assert one["fingerprint"] == bundle_format.short_fingerprint(exported)
    assert one["bundles"] == [bundle_format.digest(exported)]
    assert (one["state"], one["authority"], one["backend"]) == ("waiting", "ca", "")
    assert abs((datetime.fromisoformat(one["created"]) - now()).total_seconds()) < 60


@pytest.mark.parametrize(("later", "first"), [(2, "apiserver"), (2 * 86400, FRONT)])
def test_the_list_begins_with_what_ends_on_the_first_day(tmp_path: Path, later: int, first: str) -> None:
    """Within a day the names decide: the certificates of one `kubeadm init` end a second or two apart."""
    node = make_node(tmp_path, timedelta(days=20, hours=12))
    node.export("apiserver", FRONT)
    end = node.live()[FRONT].not_valid_after_utc + timedelta(seconds=later)
    other = handmade_pki(tmp_path / "other", now=now() - timedelta(days=100), not_after=end)
    replaces = x509.load_pem_x509_certificate((other.pki_dir / "apiserver.crt").read_bytes())
    opened = OpenRequests(Store(node.state))
    one = opened.by_name()["apiserver"]
    opened.put(replace(one, request=replace(one.request, replaces=replaces)))
    opened.save()
    found = json.loads(node.run("pending", "list", "-o", "json").stdout)["pending"]
    assert found[0]["name"] == first


def test_the_list_says_the_fingerprint_of_a_bundle_once(node: Node) -> None:
    """It stands in the heading of what was put into an outbox together; without it there, in each row."""
    outbox, _ = node.add_exchange()
    assert node.run("renew", FRONT, "apiserver").returncode == 4
    [sent] = outbox.iterdir()
    fingerprint = bundle_format.short_fingerprint(bundle_format.loads_request(sent.read_bytes()))
    assert node.run("pending", "list").stdout.count(fingerprint) == 1
    sent.unlink()
    assert node.run("renew", FRONT, "apiserver").returncode == 4
    text = node.run("pending", "list").stdout
    assert ("has left the outbox" in text, text.count(f"fingerprint {fingerprint}")) == (True, 2)


def test_cancelled_keys_are_gone(node: Node) -> None:
    """No byte of them is left below the state directory; the other request keeps its own."""
    node.export("apiserver", FRONT)
    gone, kept = (_secret_bytes(node.open()[name].key_pem) for name in ("apiserver", FRONT))
    assert _files_with(node.state, gone)  # the twin
    run = node.run("pending", "cancel", "apiserver")
    assert run.returncode == 0
    assert run.stdout == "apiserver: cancelled; its key is removed, and an answer to it will be refused\n"
    assert run.stderr == ""
    assert not _files_with(node.state, gone)
    assert _files_with(node.state, kept)
    assert node.events("cancelled") == ["apiserver"]

    missing = node.run("pending", "cancel", "apiserver")
    assert missing.returncode == 1
    assert "apiserver: there is no open request" in missing.stderr
    assert node.run("pending", "cancel", "apiservr").returncode == 2
    assert node.run("pending", "cancel", "all").returncode == 0
    assert not (node.state / "requests.json").exists()


def _secret_bytes(key_pem: bytes) -> bytes:
    """A line of its body."""
    return key_pem.splitlines()[2][:40]


def _files_with(directory: Path, data: bytes) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and data in path.read_bytes()]


def test_a_ca_that_has_a_cancelled_request_is_named(node: Node) -> None:
    """It may sign all the same, and the answer is refused then; a bundle of which no request is left is not carried to it."""
    outbox, _ = node.add_exchange()
    assert node.run("renew", FRONT, "apiserver").returncode == 4
    run = node.run("pending", "cancel", FRONT)
    assert run.returncode == 0
    assert f"warning: {FRONT}: door (exchange) may have the request, and sign it" in run.stderr
    assert len(list(outbox.iterdir())) == 1
    assert node.run("pending", "cancel", "apiserver").returncode == 0
    assert not list(outbox.iterdir())


@pytest.mark.parametrize("harm", ["away", "wrong"])
def test_a_request_is_cancelled_whatever_its_ca_is(node: Node, harm: str) -> None:
    """Where the outbox is away, or the CA's table is wrong, the key is removed all the same."""
    outbox, _ = node.add_exchange()
    assert node.run("renew", FRONT).returncode == 4
    if harm == "away":
        outbox.rename(outbox.with_name("away"))
    else:
        node.bridge.config.write_text(node.bridge.config.read_text().replace("outbox =", "outbux ="))
    run = node.run("pending", "cancel", FRONT)

    assert run.returncode == 0, run.stderr
    assert ("requests and answers that are over stay where they are" in run.stderr) is (harm == "away")
    assert not node.open()


# --- beside `renew` ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "stderr"),
    [(20, ""), (5, "warning: "), (1, "error: "), (-1, "HAS EXPIRED")],
    ids=["20 days", "5 days", "1 day", "expired"],
)
def test_cron_waits_for_what_a_person_has(tmp_path: Path, left: int, stderr: str) -> None:
    """No backend is set up: exit 4, nothing is asked, and the nearer the end the louder."""
    node = make_node(tmp_path, timedelta(days=left))
    node.export()
    before = (node.state / "requests.json").read_bytes()
    run = node.run("renew")
    assert run.returncode == 4
    assert run.stdout.startswith("an operator has the request:\n")
    assert run.stdout.count(" waiting ") == 12
    assert (stderr in run.stderr and "wait for an answer" in run.stderr) if stderr else run.stderr == ""
    assert (node.state / "requests.json").read_bytes() == before


def test_a_backend_that_is_set_up_signs_the_same_key(node: Node, desk: Desk) -> None:
    """An exported request can be signed online after all; the carried answer comes too late, and is refused."""
    node.export("apiserver")
    answer = sign(desk, node)
    key = node.open()["apiserver"].key_pem
    for authority in AUTHORITIES:
        add_openssl(node.bridge, authority)
    run = node.run("renew", "apiserver")
    assert run.returncode == 0, run.stderr
    assert (node.pki.pki_dir / "apiserver.key").read_bytes() == key
    assert not node.open()
    assert node.run("import", answer).returncode == 5
    assert_pairs(node.pki)


def test_nothing_is_due_while_a_person_has_it(tmp_path: Path) -> None:
    """A request that was exported early stays open, and cron's run exits with 0."""
    node = make_node(tmp_path, timedelta(days=300))
    node.export("apiserver")
    assert node.run("renew").returncode == 0
    assert list(node.open()) == ["apiserver"]


# --- who can add a file to those that are carried ---------------------------------------------------------------------


def forged(request: bundle.RequestBundle, answers: dict[str, Issued | bundle.Refusal]) -> AnswerBundle:
    """An answer dated far in the future, without a desk's signature."""
    return AnswerBundle(
        request_digest=bundle_format.digest(request),
        batch=request.batch,
        node=request.node,
        cluster=request.cluster,
        signer="desk-1",
        signed=datetime(2099, 1, 1, tzinfo=UTC),
        answers=answers,
    )


def decoy(request: bundle.BundledRequest, whole: bundle.RequestBundle) -> Issued:
    """A certificate for the key that was asked for, younger than the genuine one, by another CA of the same name."""
    begin = now() + timedelta(minutes=3)
    asked = bundle.sign_request(request, whole)
    return Signer.make("kubernetes").issue(asked, begin=begin, end=begin + timedelta(days=365))


def test_a_forged_answer_does_not_hide_the_genuine_one(node: Node, desk: Desk) -> None:
    """A forged refusal or certificate in an exchange's inbox ends no request; beside it the genuine answer wins."""
    outbox, inbox = node.add_exchange()
    assert node.run("renew", "apiserver").returncode == 4
    [sent] = outbox.iterdir()
    request, key = bundle_format.loads_request(sent.read_bytes()), node.open()["apiserver"].key_pem
    (inbox / "no.json").write_bytes(bundle_format.dumps(forged(request, {"apiserver": bundle.refusal("go away")})))
    refused = node.run("renew", "apiserver")
    (inbox / "yes.json").write_bytes(
        bundle_format.dumps(forged(request, {"apiserver": decoy(request.requests[0], request)}))
    )
    wrong = node.run("renew", "apiserver")

    assert (refused.returncode, wrong.returncode) == (5, 5)
    assert "desk-1 refused: go away" in refused.stderr
    assert "other users may have written that, so the request and its key are kept" in refused.stderr
    listed = node.run("pending", "list").stdout
    assert ("carried out" in listed, "wanted" in listed) == (False, True)  # why the latest one does not count
    assert node.open()["apiserver"].key_pem == key
    assert sent.exists()
    assert desk.run("sign", outbox, "-o", inbox).returncode == 0
    good = node.run("renew", "apiserver")
    assert good.returncode == 0, good.stderr
    assert node.live()["apiserver"].public_key() == request.requests[0].csr.public_key()
    assert_pairs(node.pki)


@pytest.mark.parametrize("how", ["bundle", "loose"])
def test_a_decoy_among_carried_files_hides_nothing(node: Node, desk: Desk, how: str) -> None:
    """`import` tries each certificate for the key, and takes the one that passes; without it nothing is installed."""
    request = node.export("apiserver")
    false = decoy(request.requests[0], request)
    place = node.carried / "stick"
    place.mkdir()
    if how == "bundle":
        (place / "zz.json").write_bytes(bundle_format.dumps(forged(request, {"apiserver": false})))
    else:
        (place / "zz.crt").write_bytes(pem(false.leaf))
    alone = node.run("import", place)
    (place / "answer.json").write_bytes(sign(desk, node).read_bytes())

    assert alone.returncode == 5
    assert list(node.open()) == ["apiserver"]
    good = node.run("import", place)
    assert good.returncode == 0, good.stderr
    assert node.live()["apiserver"].public_key() == request.requests[0].csr.public_key()


def test_a_date_in_year_0_is_no_internal_error(node: Node, desk: Desk) -> None:
    """The certificate is refused by name, and the good one beside it is installed."""
    request = node.export("apiserver")
    place = node.carried / "stick"
    place.mkdir()
    odd = with_field(node.live()["apiserver"], 4, validity(b"00000101000000Z", b"20991231235959Z"))
    (place / "odd.crt").write_text(odd)
    (place / "answer.json").write_bytes(sign(desk, node).read_bytes())

    run = node.run("import", place)

    assert run.returncode == 5
    assert "odd.crt: wanted a certificate with dates" in run.stderr
    assert node.live()["apiserver"].public_key() == request.requests[0].csr.public_key()
