"""Answers that the desk signs: where a node's settings name its key, no other answer counts."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from bridge.pki import bundle, bundle_format, csr, signatures
from bridge.pki.bundle import AnswerBundle, RequestBundle
from bridge.pki.certificates import pem
from tests.kit.airgap import Node
from tests.kit.desks import POLICY, Desk, make_desk
from tests.kit.issuing import Signer
from tests.kit.pki import handmade_pki

_SIGNED = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A node below a CA elsewhere."""
    return Node.make(tmp_path / "node", handmade_pki(tmp_path / "pki", external=True))


@pytest.fixture
def desk(tmp_path: Path, node: Node) -> Desk:
    """It signs its answers; the key is its own."""
    key = tmp_path / "answer.key"
    desk = make_desk(tmp_path / "desk", node.pki, policy=POLICY.replace("[desk]", f'[desk]\nanswer_key = "{key}"'))
    private = csr.generate_key("ecdsa-p256")
    key.touch(mode=0o600)
    key.write_bytes(csr.key_pem(private))
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "desk.pub").write_bytes(public)
    return desk


def trust(node: Node, file: Path) -> None:
    """In the node's settings."""
    node.bridge.tables[0] += f'desk_key = "{file}"\n'
    node.bridge.config.write_text("\n".join(node.bridge.tables))


def refusal_of(request: RequestBundle, **changes: object) -> AnswerBundle:
    values: dict[str, object] = {
        "request_digest": bundle_format.digest(request),
        "batch": request.batch,
        "node": request.node,
        "cluster": request.cluster,
        "signer": "desk-1",
        "signed": request.created,
        "answers": {"apiserver": bundle.refusal("go away")},
    }
    return AnswerBundle(**values | changes)  # type: ignore[arg-type]


def test_only_signed_answers_count_in_an_inbox(node: Node, desk: Desk, tmp_path: Path) -> None:
    """An unsigned refusal, and one with another key's signature, are passed over by name; the desk's answer is taken."""
    outbox, inbox = node.add_exchange()
    trust(node, tmp_path / "desk.pub")
    assert node.run("renew", "apiserver").returncode == 4
    [sent] = outbox.iterdir()
    request = bundle_format.loads_request(sent.read_bytes())
    forged = refusal_of(request)
    other = signatures.sign(csr.generate_key("ecdsa-p256"), bundle_format.answer_message(forged))
    for name, answer in (("a.json", forged), ("b.json", refusal_of(request, signature=other))):
        (inbox / name).write_bytes(bundle_format.dumps(answer))
    assert node.run("renew", "apiserver").returncode == 4
    assert node.run("pending", "list").stdout.count("not signed by the desk's key (node.desk_key)") == 2
    assert desk.run("sign", outbox, "-o", inbox).returncode == 0
    good = node.run("renew", "apiserver")
    assert good.returncode == 0, good.stderr
    assert node.live()["apiserver"].public_key() == request.requests[0].csr.public_key()


def test_the_desks_own_refusal_ends_a_request(node: Node, desk: Desk, tmp_path: Path) -> None:
    """Only the desk could have written it, so that the request's key is dropped, by `renew` and `import`; otherwise it is kept."""
    outbox, inbox = node.add_exchange()
    trust(node, tmp_path / "desk.pub")
    desk.policy.write_text(desk.policy.read_text().replace('nodes = ["cp-*"]', 'nodes = ["other"]'))
    assert node.run("renew", "apiserver").returncode == 4
    assert desk.run("sign", outbox, "-o", inbox).returncode == 5
    assert node.run("renew", "apiserver").returncode == 5
    assert not node.open()
    node.export("apiserver")
    assert desk.run("sign", node.carried / "bundle.json", "-o", node.carried / "answer.json").returncode == 5
    run = node.run("import", node.carried / "answer.json")
    assert (run.returncode, "`ca-bridge export` makes a new request" in run.stderr) == (5, True)
    assert not node.open()


def test_import_takes_signed_answers_alone(node: Node, desk: Desk, tmp_path: Path) -> None:
    """Neither loose certificates nor an unsigned bundle are looked at, good as they may be."""
    trust(node, tmp_path / "desk.pub")
    request = node.export("apiserver")
    assert desk.run("sign", node.carried / "bundle.json", "-o", node.carried / "answer.json").returncode == 0
    answer = bundle_format.loads_answer((node.carried / "answer.json").read_bytes())
    assert answer.signature is not None
    issued = answer.answers["apiserver"]
    assert not isinstance(issued, bundle.Refusal)
    (node.carried / "loose.crt").write_bytes(pem(issued.leaf))
    unsigned = bundle_format.dumps(replace(answer, signature=None))
    (node.carried / "unsigned.json").write_bytes(unsigned)
    for name in ("loose.crt", "unsigned.json"):
        run = node.run("import", node.carried / name)
        assert run.returncode == 5
        assert "that the desk has signed" in run.stderr
        assert list(node.open()) == ["apiserver"]
    assert node.run("import", node.carried / "answer.json").returncode == 0
    assert node.live()["apiserver"].public_key() == request.requests[0].csr.public_key()


def test_other_files_beside_a_signed_answer_are_passed_over(node: Node, desk: Desk, tmp_path: Path) -> None:
    """A note on the stick is no unsigned answer; a certificate there is one, and is refused by name."""
    trust(node, tmp_path / "desk.pub")
    for name, code in (("notes.txt", 0), ("loose.crt", 5)):
        node.export("apiserver")
        stick = tmp_path / f"stick with {name}"
        stick.mkdir()
        (stick / name).write_bytes(b"hello" if name == "notes.txt" else pem(node.live()["apiserver"]))
        assert desk.run("sign", node.carried / "bundle.json", "-o", stick / "answer.json").returncode == 0
        run = node.run("import", stick)
        assert (run.returncode, f"{name}: wanted" in run.stderr) == (code, code != 0), run.stderr
        assert not node.open()


def test_a_desk_key_that_is_none_is_an_error_of_the_settings(node: Node, desk: Desk, tmp_path: Path) -> None:
    """It is not called a fault of the answer, and no answer is passed over for it."""
    trust(node, tmp_path / "desk.pub")
    node.export("apiserver")
    assert desk.run("sign", node.carried / "bundle.json", "-o", node.carried / "answer.json").returncode == 0
    key = (tmp_path / "desk.pub").read_bytes()
    (tmp_path / "desk.pub").write_text("hello")
    for path in (node.carried / "answer.json", node.carried):
        run = node.run("import", path)
        assert run.returncode == 2
        assert "node.desk_key: wanted a certificate or a public key in PEM" in run.stderr
    (tmp_path / "desk.pub").write_bytes(key)
    assert node.run("import", node.carried / "answer.json").returncode == 0


def test_a_certificate_names_the_key_as_well() -> None:
    """A public key or a certificate with it; the error for anything else says that it is neither."""
    signer = Signer.make("desk")
    public = signer.key.public_key()
    spki = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert signatures.public_key(pem(signer.certificate)) == signatures.public_key(spki) == public
    for wrong in (b"", b"-----BEGIN PUBLIC KEY-----\n", csr.key_pem(signer.key)):
        with pytest.raises(ValueError, match="a certificate or a public key in PEM"):
            signatures.public_key(wrong)


def test_a_changed_answer_has_no_signature() -> None:
    """It is over all that the answer says, and of this answer alone."""
    key = csr.generate_key("rsa-2048")
    batch = "0" * 32
    one = AnswerBundle(
        request_digest="0" * 64, batch=batch, node="cp-1", cluster="k", signer="s", signed=_SIGNED, answers={}
    )
    message = bundle_format.answer_message(one)
    signature = signatures.sign(key, message)
    assert signatures.is_by(key.public_key(), signature, message)
    other = bundle_format.answer_message(replace(one, node="cp-2"))
    assert not signatures.is_by(key.public_key(), signature, other)
    assert not signatures.is_by(csr.generate_key("rsa-2048").public_key(), signature, message)


@pytest.mark.parametrize("fault", ["missing", "readable for others", "no key"])
def test_a_desk_without_its_key_signs_nothing(desk: Desk, node: Node, tmp_path: Path, fault: str) -> None:
    """The exit code is 2, and the error names the key before anything is signed."""
    key = tmp_path / "answer.key"
    if fault == "missing":
        key.unlink()
    elif fault == "no key":
        key.write_text("hello")
    else:
        key.chmod(0o644)
    node.export("apiserver")
    run = desk.run("sign", node.carried / "bundle.json", "-o", node.carried / "answer.json")
    assert run.returncode == 2
    assert "desk.answer_key" in run.stderr
    assert not (node.carried / "answer.json").exists()
