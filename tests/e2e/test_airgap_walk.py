"""
The air gap, walked: a real kubeadm PKI, and a CA host that has nothing in common with the node but the carried file.

Each side's programs run in a mount namespace in which the other side's directory is an empty one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from bridge.contract import Issued, SignRequest
from bridge.pki import bundle, bundle_format, csr
from bridge.pki.bundle import AnswerBundle, BundledRequest, RequestBundle
from bridge.pki.csr import PrivateKey
from bridge.specs import AUTHORITIES, EKU, SPECS
from tests.kit import softhsm
from tests.kit.airgap import Node, at_a_terminal
from tests.kit.bundles import new_csr
from tests.kit.desks import Desk, make_desk
from tests.kit.issuing import Signer
from tests.kit.pairs import assert_pairs
from tests.kit.pki import KubeadmPki, handmade_pki, kubeadm_pki

APPROVAL = b"[yes: sign / no: refuse / later] "


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Both sides, each below a directory of its own."""

    node: Node
    desk: Desk
    node_side: Path
    desk_side: Path

    def at_node(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a program where there is no CA host."""
        return _run(_without(self.desk_side, command))

    def at_desk(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a program where there is no node."""
        return _run(_without(self.node_side, command))

    def bridge(self, *args: str | Path) -> subprocess.CompletedProcess[str]:
        """ca-bridge on the node."""
        program, *_ = self.desk.command()
        return self.at_node(program, *args, "--config", self.node.bridge.config)

    def sign(self, *args: str | Path) -> subprocess.CompletedProcess[str]:
        """`ca-bridge sign` at the desk."""
        return self.at_desk(*self.desk.command("sign", *args))

    def sign_at_a_terminal(self, words: Sequence[str], *args: str | Path) -> tuple[int, str]:
        """The same with `--approve`, and a person who answers."""
        command = self.desk.command("sign", *args, "--approve")
        return at_a_terminal(_without(self.node_side, command), words, APPROVAL)


def _without(hidden: Path, command: Sequence[str | Path]) -> list[str]:
    """In a mount namespace where this directory is empty."""
    rights = [] if os.geteuid() == 0 else ["--map-root-user"]
    script = 'mount -t tmpfs -o mode=755,ro none "$0" && exec "$@"'
    return ["unshare", *rights, "--mount", "sh", "-c", script, str(hidden), *map(str, command)]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=300, env=environment
    )


def _into_token(desk: Desk) -> None:
    """Move the desk's keys from its directories into a SoftHSM."""
    method = next((one for one in softhsm.METHODS if not softhsm.missing(one)), None)
    if method is None:
        pytest.skip(softhsm.missing("engine"))
    token = softhsm.make_token(desk.directory / "hsm")
    pin = desk.directory / "pin"
    pin.touch(mode=0o600)
    pin.write_text(f"{softhsm.PIN}\n")
    environment = token.environment
    if method == "provider":
        environment["OPENSSL_MODULES"] = str(softhsm.provider_directory())
    lines = [
        f'[node]\nstate_dir = "{desk.state}"',
        '[backend.desk]\ntype = "openssl"',
        f'[backend.desk.pkcs11]\nmethod = "{method}"\nmodule = "{softhsm.MODULE}"\npin_file = "{pin}"',
        "[backend.desk.pkcs11.environment]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in environment.items()),
    ]
    for number, name in enumerate(AUTHORITIES, start=1):
        key = desk.ca(name) / "ca.key"
        uri = token.add(name, _decrypted(key, desk.directory / "passphrase"), f"a{number}")
        key.unlink()
        lines.append(f'[authority.{name}]\nbackend = "desk"\ndir = "{desk.ca(name)}"\nprivate_key = "{uri}"')
    (desk.directory / "passphrase").unlink()
    desk.config.write_text("\n\n".join(lines) + "\n")


def _decrypted(key: Path, passphrase: Path) -> bytes:
    command = ["openssl", "pkey", "-in", str(key), "-passin", f"file:{passphrase}"]
    return subprocess.run(command, capture_output=True, check=True).stdout


@pytest.fixture(params=["encrypted key", "SoftHSM"])
def walk(request: pytest.FixtureRequest, tmp_path: Path) -> Walk:
    """A control plane of the real kubeadm with 20 days left, whose CA keys are at the desk alone."""
    node_side, desk_side = tmp_path / "node-side", tmp_path / "desk-side"
    pki = kubeadm_pki(node_side / "root", validity=timedelta(days=20))
    desk = make_desk(desk_side / "desk", pki)
    if request.param == "SoftHSM":
        _into_token(desk)
    shutil.rmtree(pki.ca_dir)
    return Walk(node=Node.make(node_side, pki), desk=desk, node_side=node_side, desk_side=desk_side)


def carry(source: Path, target: Path) -> None:
    """One file, as a person does with a stick."""
    shutil.copyfile(source, target)


def assert_renewed(walk: Walk, before: dict[str, x509.Certificate]) -> None:
    """By kubeadm's own words, and ours."""
    pki = walk.node.pki
    assert isinstance(pki, KubeadmPki)
    after = walk.node.live()
    assert sorted(name for name in after if after[name] != before[name]) == sorted(before)
    assert_pairs(pki)
    seen = pki.run_kubeadm("certs", "check-expiration", config=False).stdout
    rows = re.findall(
        r"^(\S+) +\w{3} \d\d, \d{4} \d\d:\d\d UTC +(\S+) +(?:ca|etcd-ca|front-proxy-ca) +yes", seen, re.MULTILINE
    )
    assert {name for name, _ in rows} == set(before) - {"kubelet.conf"}, seen
    assert {left for _, left in rows} <= {"364d", "365d"}, seen


@pytest.mark.kube
def test_neither_side_sees_the_other(walk: Walk) -> None:
    """Each tries, and finds nothing; its twin on its own side is there."""
    key = walk.desk.ca("ca") / "ca.crt"
    state = walk.node.pki.pki_dir / "apiserver.key"
    assert walk.at_desk("cat", key).returncode == walk.at_node("cat", state).returncode == 0
    for run in (walk.at_node("cat", key), walk.at_desk("cat", state)):
        assert run.returncode != 0
        assert "No such file or directory" in run.stderr
    assert walk.at_node("ls", "-A", walk.desk_side).stdout == walk.at_desk("ls", "-A", walk.node_side).stdout == ""
    assert walk.at_node("touch", walk.desk_side / "x").returncode != 0
    assert not [p for p in walk.node_side.rglob("*") if p.name in {"ca.key", "front-proxy-ca.key"}]


@pytest.mark.kube
def test_by_hand(walk: Walk) -> None:
    """Export, carry, inspect, approve, carry, import; kubeadm finds everything renewed."""
    before = walk.node.live()
    out, stick = walk.node.carried / "bundle.json", walk.desk.directory / "stick"
    stick.mkdir()
    exported = walk.bridge("export", out)
    assert exported.returncode == 0, exported.stderr
    fingerprint = bundle_format.short_fingerprint(bundle_format.loads_request(out.read_bytes()))
    assert fingerprint in exported.stdout
    assert walk.bridge("renew").returncode == 4  # cron goes on meanwhile

    carry(out, stick / "bundle.json")
    code, seen = walk.sign_at_a_terminal(["yes"], stick / "bundle.json", "-o", stick / "answer.json")
    assert code == 0, seen
    assert fingerprint in seen
    assert seen.count("holds: made with the key of the replaced certificate") == len(before)

    carry(stick / "answer.json", walk.node.carried / "answer.json")
    done = walk.bridge("import", walk.node.carried / "answer.json")
    assert done.returncode == 0, done.stderr
    assert_renewed(walk, before)
    assert walk.bridge("renew").returncode == 0
    assert walk.bridge("pending", "list").stdout == "nothing is pending\n"
    assert len(walk.desk.issued()) == len(before)


class Carrier:
    """A job that copies what is new, and is cut off in the middle of each file the first time."""

    def __init__(self, source: Path, target: Path) -> None:
        self._source, self._target = source, target
        self._halves: set[str] = set()
        self._carried: set[str] = set()

    def go(self) -> None:
        """One round."""
        for path in sorted(self._source.glob("*.json")):
            data = path.read_bytes()
            if path.name not in self._halves:
                self._halves.add(path.name)
                (self._target / path.name).write_bytes(data[: len(data) // 2])
            elif path.name not in self._carried:
                self._carried.add(path.name)
                (self._target / path.name).write_bytes(data)


@pytest.mark.kube
def test_by_cron_on_both_sides(walk: Walk) -> None:
    """`renew` here and `sign` there take turns; files come in halves; 4 until it is 0, and nothing is asked twice."""
    before = walk.node.live()
    outbox, inbox = walk.node.add_exchange()
    there, back = Carrier(outbox, walk.desk.inbox), Carrier(walk.desk.outbox, inbox)
    codes, signed = [], []
    for _ in range(10):
        done = walk.bridge("renew")
        codes.append(done.returncode)
        if done.returncode != 4:
            break
        assert len(list(outbox.iterdir())) <= 1  # all authorities in one file, with one fingerprint
        there.go()
        at_desk = walk.sign(walk.desk.inbox, "-o", walk.desk.outbox)
        assert at_desk.returncode == 0, at_desk.stderr
        signed.append(len(walk.desk.issued()))
        back.go()
    assert codes == [4, 4, 4, 0], done.stderr
    assert signed == [0, len(before), len(before)]
    assert_renewed(walk, before)
    names = sorted(before)
    assert [sorted(walk.node.events(event)) for event in ("asked", "installed")] == [names, names]
    assert not list(outbox.iterdir())
    assert not list(walk.desk.inbox.glob("*.json"))
    assert len(list(walk.desk.archive.iterdir())) == 1
    assert walk.bridge("renew").returncode == 0


# --- the carrier changes a bundle -------------------------------------------------------------------------------------

Change = Callable[[RequestBundle], RequestBundle]


def _first(**values: Any) -> Change:
    def change(given: RequestBundle) -> RequestBundle:
        first, *others = given.requests
        return dataclasses.replace(given, requests=(dataclasses.replace(first, **values), *others))

    return change


def _whole(**values: Any) -> Change:
    return lambda given: dataclasses.replace(given, **values)


def _other_csr(given: RequestBundle) -> RequestBundle:
    """The attacker's key under the same names."""
    old = given.requests[0].replaces
    assert old is not None
    return _first(csr=new_csr(old))(given)


def _other_replaced(given: RequestBundle) -> RequestBundle:
    return _first(replaces=given.requests[1].replaces)(given)


def _own_request(given: RequestBundle) -> RequestBundle:
    """One more request, for admin.conf, with an attacker's key."""
    old = given.requests[0]
    more = BundledRequest(
        name="admin.conf",
        authority="ca",
        ekus=SPECS["admin.conf"].ekus,
        validity=old.validity,
        csr=new_csr(old.replaces) if old.replaces else old.csr,
        replaces=old.replaces,
        proof=old.proof,
    )
    return dataclasses.replace(given, requests=(*given.requests, more))


PROOF = "found another signature"
#: The field, what is done to it, and the words of what catches it at the desk; "": the desk has no way to know, and the
#: node refuses the answer, since it is to no bundle that it made.
REQUEST_FIELDS: dict[str, tuple[Change, str]] = {
    "batch": (_whole(batch="0" * 32), PROOF),
    "node": (_whole(node="cp-2"), PROOF),
    "cluster": (_whole(cluster="other"), "cluster: wanted kubernetes, found other"),
    "created": (_whole(created=datetime(2030, 1, 1, tzinfo=UTC)), PROOF),
    "requests: one more": (_own_request, PROOF),
    "requests: one less": (lambda given: dataclasses.replace(given, requests=given.requests[1:]), ""),
    "requests: order": (lambda given: dataclasses.replace(given, requests=given.requests[::-1]), ""),
    "name": (_first(name="apiserver-etcd-client"), PROOF),
    "authority": (_first(authority="etcd-ca"), "authority: wanted ca for apiserver, found etcd-ca"),
    "ekus": (_first(ekus=frozenset(EKU)), "EKU: wanted serverAuth, found clientAuth, serverAuth"),
    "validitySeconds, too long": (_first(validity=timedelta(days=3650)), "validity: wanted at most 365d, found 3650d"),
    "validitySeconds, shorter": (_first(validity=timedelta(days=200)), PROOF),
    "csr": (_other_csr, PROOF),
    "replaces": (_other_replaced, PROOF),
    "replaces: nothing": (_first(replaces=None), "the certificate that is replaced is missing"),
    "proof": (_first(proof=b"\0" * 256), PROOF),
    "proof: none": (_first(proof=None), "there is no continuity proof"),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Node, Desk, RequestBundle]:
    """Two requests wait for their answers; only the desk can give valid ones."""
    directory = tmp_path_factory.mktemp("tampered")
    now = datetime.now(UTC)
    pki = handmade_pki(directory / "root", now=now - timedelta(days=100), not_after=now + timedelta(days=20))
    node, desk = Node.make(directory, pki), make_desk(directory / "desk", pki)
    return node, desk, node.export("apiserver", "front-proxy-client")


Exported = tuple[Node, Desk, RequestBundle]


@pytest.mark.parametrize("field", REQUEST_FIELDS)
def test_a_changed_request_is_named(exported: Exported, tmp_path: Path, field: str) -> None:
    """The attacker makes a new digest: the desk's proof and policy find the change, or the node does at import."""
    node, desk, good = exported
    change, words = REQUEST_FIELDS[field]
    changed = change(good)
    (tmp_path / "b.json").write_bytes(bundle_format.dumps(changed))
    before = node.live()

    run = desk.run("sign", tmp_path / "b.json", "-o", tmp_path / "a.json")

    if words:
        assert run.returncode == 5
        assert words in run.stderr
        assert any(isinstance(answer, bundle.Refusal) for answer in _answer(tmp_path / "a.json").answers.values())
    else:
        assert run.returncode == 0, run.stderr
    back = node.run("import", tmp_path / "a.json")
    assert back.returncode == 5
    found = (
        f"found one to node {changed.node}" if changed.node != good.node else bundle_format.short_fingerprint(changed)
    )
    assert (found if changed.cluster == good.cluster else "of cluster other") in back.stderr
    assert node.live() == before
    assert set(node.open()) == {"apiserver", "front-proxy-client"}


def _answer(path: Path) -> AnswerBundle:
    return bundle_format.loads_answer(path.read_bytes())


@pytest.mark.parametrize("side", ["request", "answer"])
def test_a_changed_byte_of_any_field_is_named(exported: Exported, tmp_path: Path, side: str) -> None:
    """The format alone names each changed field, on both ways, where there is no new digest."""
    node, desk, _ = exported
    request, answer = node.carried / "bundle.json", tmp_path / "answer.json"
    assert desk.run("sign", request, "-o", answer).returncode == 0
    document = json.loads((request if side == "request" else answer).read_bytes())
    path, fields = tmp_path / "changed.json", set()
    for key in _keys(document):
        path.write_text(json.dumps(_with_change(document, key)))
        run = node.run("inspect", path) if side == "request" else node.run("import", path)
        assert run.returncode == (1 if side == "request" else 5), key
        field = str(key[-1] if isinstance(key[-1], str) else key[-2])
        assert re.search(rf"digest: wanted|{field}(\[\d\])?: wanted", run.stderr), (key, run.stderr)
        fields.add(field)
    assert len(fields) == (14 if side == "request" else 11)


def _keys(document: Any, place: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where values are, in the first entry of each list."""
    if isinstance(document, dict):
        return [key for name, value in document.items() for key in _keys(value, (*place, name))]
    return _keys(document[0], (*place, 0)) if isinstance(document, list) else [place]


def _with_change(document: Any, key: tuple[str | int, ...]) -> Any:
    changed = json.loads(json.dumps(document))
    inner = changed
    for part in key[:-1]:
        inner = inner[part]
    value = inner[key[-1]]
    inner[key[-1]] = value + 1 if isinstance(value, int) else _with_other_character(value)
    return changed


def _with_other_character(text: str) -> str:
    middle = len(text) // 2
    return f"{text[:middle]}{'b' if text[middle] != 'b' else 'c'}{text[middle + 1 :]}"


def _signer(node: Node, authority: str) -> Signer:
    certificate, pem = node.pki.ca_pem(authority)
    key = load_pem_private_key(pem, None)
    assert isinstance(key, PrivateKey)
    return Signer(certificate=x509.load_pem_x509_certificate(certificate), key=key)


def _forged(node: Node, request: BundledRequest, **values: Any) -> Issued:
    """By the right CA, which was talked into it."""
    asked = SignRequest(
        spec=SPECS[request.name], csr_pem=request.csr.public_bytes(Encoding.PEM), validity=request.validity
    )
    now = datetime.now(UTC)
    values = {"begin": now - timedelta(minutes=5), "end": now + timedelta(days=365), **values}
    return _signer(node, request.authority).issue(asked, **values)


def test_a_changed_answer_is_named(exported: Exported, tmp_path: Path) -> None:
    """The digest is made anew: whatever a certificate is proven by is found by the node's own check, by name."""
    node, desk, asked = exported
    assert desk.run("sign", node.carried / "bundle.json", "-o", tmp_path / "a.json").returncode == 0
    good = _answer(tmp_path / "a.json")
    apiserver, front = good.answers["apiserver"], good.answers["front-proxy-client"]
    assert isinstance(apiserver, Issued)
    own = csr.generate_key("ecdsa-p256")
    stranger = Signer.make(begin=datetime.now(UTC) - timedelta(days=1), end=datetime.now(UTC) + timedelta(days=900))
    first = asked.requests[0]
    changes: dict[str, tuple[AnswerBundle, str]] = {
        "requestDigest": (dataclasses.replace(good, request_digest="0" * 64), "00000-00000-00000-00000"),
        "node": (dataclasses.replace(good, node="cp-2"), "found one to node cp-2"),
        "cluster": (dataclasses.replace(good, cluster="other"), "of cluster other"),
        "name": (_with(good, {"apiserver": front, "front-proxy-client": apiserver}), "public key: wanted"),
        "chain: another key": (_with(good, {"apiserver": _forged(node, first, public_key=own.public_key())}), "key"),
        "chain: another CA": (_with(good, {"apiserver": _by(stranger, first)}), "wanted a path"),
        "chain: other usages": (
            _with(good, {"apiserver": _forged(node, first, ekus=["1.3.6.1.5.5.7.3.2"])}),
            "EKU: wanted",
        ),
        "chain: other names": (
            _with(good, {"apiserver": _forged(node, first, sans=[x509.DNSName("evil.example.com")])}),
            "SAN: wanted",
        ),
        "chain: too short": (
            _with(good, {"apiserver": _forged(node, first, end=datetime.now(UTC) + timedelta(days=2))}),
            "wanted",
        ),
        "refusal": (_with(good, {"apiserver": bundle.refusal("no")}), "refused by desk-1: desk (openssl): no"),
    }
    before = node.live()
    for field, (changed, words) in changes.items():
        (tmp_path / "x.json").write_bytes(bundle_format.dumps(changed))
        run = node.run("import", tmp_path / "x.json", "--all-or-nothing")
        assert run.returncode == 5, field
        assert words in run.stderr, (field, run.stderr)
        assert node.live() == before, field
        assert "apiserver" in node.open()

    # Nothing on the node depends on the batch, who signed, and when: labels for people and for the desk's file names.
    labels = {"batch": "0" * 32, "signer": "attacker", "signed": datetime(2030, 1, 1, tzinfo=UTC)}
    (tmp_path / "x.json").write_bytes(bundle_format.dumps(dataclasses.replace(good, **labels)))  # type: ignore[arg-type]
    assert node.run("import", tmp_path / "x.json").returncode == 0
    assert node.live()["apiserver"] == apiserver.leaf
    assert_pairs(node.pki)


def _with(good: AnswerBundle, answers: dict[str, Any]) -> AnswerBundle:
    return dataclasses.replace(good, answers={**good.answers, **answers})


def _by(signer: Signer, request: BundledRequest) -> Issued:
    asked = SignRequest(
        spec=SPECS[request.name], csr_pem=request.csr.public_bytes(Encoding.PEM), validity=request.validity
    )
    now = datetime.now(UTC)
    return signer.issue(asked, begin=now - timedelta(minutes=5), end=now + timedelta(days=365))
