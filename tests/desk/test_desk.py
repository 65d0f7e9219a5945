"""The CA desk, run as it is: bundles and CSRs in, `openssl ca` with encrypted keys behind it, answers out."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from backends import openssl
from backends.vault import setup as vault_setup
from bridge.ca import PARALLEL_REQUESTS_OF_LOT, registry
from bridge.cli import desk as cli_desk
from bridge.cli.app import app
from bridge.contract import Issued, Pending
from bridge.desk import csr_directory, desk, files
from bridge.desk.records import Journal, Submitted, key_of
from bridge.errors import BridgeError, Exit, LocalFileError
from bridge.node import kubeconfig, sample_pki
from bridge.pki import csr
from bridge.pki.bundle import AnswerBundle, Refusal, RequestBundle, sign_request
from bridge.pki.bundle_format import digest, dumps, file_names, loads_answer, request_file_name, short_fingerprint
from bridge.pki.certificates import pem
from bridge.pki.csr import PrivateKey, signature_hash
from bridge.pki.kubeadm_names import builder_of
from bridge.pki.verify import Expectation, check
from bridge.settings.load import load
from bridge.specs import AUTHORITIES, SPECS
from bridge.state import Store, audit
from bridge.system import paths
from bridge.system.locks import lock
from tests.kit import approval, cfssl, openbao, opensslca, programs
from tests.kit.bundles import VALIDITY, changed, make_bundle, new_csr, old_pairs, proven
from tests.kit.desks import PASSPHRASE, POLICY, Desk, killing, make_desk
from tests.kit.issuing import Signer
from tests.kit.pki import ADDRESS, ENDPOINT, EXTRA_SANS, NODE, Pki, handmade_pki, kubeadm_pki

Pairs = dict[str, tuple[x509.Certificate, PrivateKey]]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return handmade_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def pairs(pki: Pki) -> Pairs:
    return old_pairs(pki)


@pytest.fixture
def desk_(tmp_path: Path, pki: Pki) -> Desk:
    return make_desk(tmp_path / "desk", pki)


def some(pairs: Pairs, *names: str) -> Pairs:
    return {name: pairs[name] for name in names}


def put(desk_: Desk, bundle: RequestBundle) -> Path:
    """As a person does it with a stick."""
    path = desk_.inbox / request_file_name(bundle)
    path.write_bytes(dumps(bundle))
    return path


def answers_of(desk_: Desk) -> list[AnswerBundle]:
    return [loads_answer(path.read_bytes()) for path in sorted(desk_.outbox.iterdir())]


def assert_good(answer: AnswerBundle, bundle: RequestBundle, pki: Pki) -> None:
    """Each certificate passes at the node, by the CA certificate that it has."""
    assert answer.request_digest == digest(bundle)
    assert (answer.batch, answer.node, answer.cluster) == (bundle.batch, bundle.node, bundle.cluster)
    assert list(answer.answers) == [request.name for request in bundle.requests]
    for request in bundle.requests:
        issued = answer.answers[request.name]
        assert isinstance(issued, Issued), issued
        anchor = x509.load_pem_x509_certificate(pki.ca_pem(request.authority)[0])
        expected = Expectation(
            anchors=(anchor,), anchor_name="ca.crt", now=datetime.now(UTC), min_validity=timedelta(days=300)
        )
        check(issued, sign_request(request, bundle), expected)


def events(desk_: Desk) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (desk_.state / "audit.jsonl").read_text().splitlines()]


# --- one bundle -------------------------------------------------------------------------------------------------------


def test_a_bundle_is_signed(desk_: Desk, pki: Pki, pairs: Pairs, tmp_path: Path) -> None:
    """All twelve certificates of a node, one process a CA and usage class, each on the record."""
    bundle = make_bundle(pairs)
    (tmp_path / "b.json").write_bytes(dumps(bundle))

    run = desk_.run("sign", tmp_path / "b.json", "-o", tmp_path / "a.json")

    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == f"cp-1 (kubernetes): 12 signed: {tmp_path}/a.json\n"
    answer = loads_answer((tmp_path / "a.json").read_bytes())
    assert_good(answer, bundle, pki)
    assert answer.signer == "desk-1: desk (openssl)"
    assert len(desk_.issued()) == 12
    assert len([line for line in desk_.runs() if line.startswith("ca ")]) == 5
    assert [(event["event"], event["name"]) for event in events(desk_)] == [(desk.SIGNED, name) for name in pairs]
    assert all(f"request {digest(bundle)[:16]}" in event["result"] for event in events(desk_))
    assert PASSPHRASE not in run.stdout + (desk_.state / "audit.jsonl").read_text()
    assert desk_.run("audit", "verify").returncode == 0


def test_the_answer_is_beside_the_bundle_unless_an_option_says_otherwise(
    desk_: Desk, pairs: Pairs, tmp_path: Path
) -> None:
    """The answer's file name says that it is one."""
    (tmp_path / "b.json").write_bytes(dumps(make_bundle(some(pairs, "apiserver"))))

    assert desk_.run("sign", tmp_path / "b.json").returncode == 0
    assert len(loads_answer((tmp_path / "b.answer.json").read_bytes()).answers) == 1


def test_nothing_is_signed_for_an_answer_that_has_no_directory(desk_: Desk, pairs: Pairs, tmp_path: Path) -> None:
    """A stick that is not there ends the run before the CA is asked; with the directory it is signed."""
    (tmp_path / "b.json").write_bytes(dumps(make_bundle(some(pairs, "apiserver"))))
    words = ("sign", tmp_path / "b.json", "-o", tmp_path / "stick" / "a.json")

    run = desk_.run(*words)

    assert run.returncode == Exit.FAILED
    assert f"{tmp_path}/stick: there is no such directory for the answers" in run.stderr
    assert "hint: " in run.stderr
    assert desk_.issued() == []
    (tmp_path / "stick").mkdir()
    assert desk_.run(*words).returncode == 0


@pytest.mark.first_use("23")
def test_what_was_signed_and_delivered_is_not_signed_again(desk_: Desk, pairs: Pairs, tmp_path: Path) -> None:
    """The same bundle to the same place twice: the same certificates."""
    (tmp_path / "b.json").write_bytes(dumps(make_bundle(some(pairs, "apiserver", "etcd-peer"))))
    desk_.run("sign", tmp_path / "b.json", "-o", tmp_path / "a.json")
    first = loads_answer((tmp_path / "a.json").read_bytes())

    assert desk_.run("sign", tmp_path / "b.json", "-o", tmp_path / "a.json").returncode == 0
    assert loads_answer((tmp_path / "a.json").read_bytes()).answers == first.answers
    assert len(desk_.issued()) == 2
    assert [event["event"] for event in events(desk_)] == [desk.SIGNED] * 2 + [desk.DELIVERED] * 2


def test_a_refusal_goes_back_with_its_reason(desk_: Desk, pairs: Pairs, tmp_path: Path) -> None:
    """The other certificates are signed; the exit code, the record and a message say that one was not."""
    bundle = changed(make_bundle(some(pairs, "apiserver", "scheduler.conf")), "scheduler.conf", proof=None)
    (tmp_path / "b.json").write_bytes(dumps(bundle))

    run = desk_.run("sign", tmp_path / "b.json", "-o", tmp_path / "a.json")

    assert run.returncode == Exit.REFUSED
    answer = loads_answer((tmp_path / "a.json").read_bytes())
    assert isinstance(answer.answers["apiserver"], Issued)
    assert answer.answers["scheduler.conf"] == Refusal(reason="proof: there is no continuity proof")
    assert "scheduler.conf: refused: proof: there is no continuity proof" in run.stderr
    assert "`ca-bridge sign --without-proof NAME`" in run.stderr
    assert [event["event"] for event in events(desk_)] == [desk.SIGNED, "refused"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs directories of root; run as root")
def test_a_state_directory_of_root_is_given_to_the_desks_user(
    desk_: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hint has the command for it, and does not say that the desk be run as root."""
    settings, store, now = load(desk_.config), Store(tmp_path / "roots"), datetime.now(UTC)
    store.directory.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1000)
    with pytest.raises(BridgeError) as e, files.books_open(settings, store, lambda: now, timedelta(), "sign"):
        pass
    assert e.value.hint.startswith(f"as root: install -d -m 0700 -o {os.getuid() + 1000} {store.directory}")


@pytest.mark.first_use("13")
def test_help_against_several_refusals_is_shown_once(desk_: Desk, pairs: Pairs, tmp_path: Path) -> None:
    """Each reason is an error of its own; the hint that all of them have comes last."""
    bundle = changed(make_bundle(some(pairs, "apiserver", "scheduler.conf")), "apiserver", validity=10 * VALIDITY)
    bundle = changed(bundle, "scheduler.conf", validity=11 * VALIDITY)
    (tmp_path / "b.json").write_bytes(dumps(bundle))
    said = desk_.run("sign", tmp_path / "b.json", "-o", tmp_path / "a.json").stderr.splitlines()
    assert [line.partition(":")[0] for line in said] == ["error", "error", "hint"], said


def test_a_person_can_do_without_a_proof_by_name(desk_: Desk, pairs: Pairs, tmp_path: Path) -> None:
    """A person can waive the proof by name, and the audit log records it."""
    bundle = changed(make_bundle(some(pairs, "scheduler.conf")), "scheduler.conf", proof=None)
    (tmp_path / "b.json").write_bytes(dumps(bundle))

    run = desk_.run("sign", tmp_path / "b.json", "--without-proof", "scheduler.conf")

    assert run.returncode == 0
    assert events(desk_)[0]["result"].endswith("without a continuity proof")
    wrong = desk_.run("sign", tmp_path / "b.json", "--without-proof", "scheduler")
    assert wrong.returncode == Exit.USAGE
    assert "--without-proof" in wrong.stderr


def test_a_desk_without_a_policy_signs_nothing(desk_: Desk, pairs: Pairs, tmp_path: Path) -> None:
    """A desk without a policy, with a wrong one, or with a missing file signs nothing."""
    (tmp_path / "b.json").write_bytes(dumps(make_bundle(some(pairs, "apiserver"))))
    desk_.policy.write_text("[allow]\nclusters = 3\n")
    wrong = desk_.run("sign", tmp_path / "b.json")
    desk_.policy.unlink()
    without = desk_.run("sign", tmp_path / "b.json")

    assert (wrong.returncode, without.returncode) == (Exit.USAGE, Exit.USAGE)
    assert f"{desk_.policy}:2: allow.clusters: wanted a list of texts" in wrong.stderr
    assert "there is no such file, and a policy file is needed" in without.stderr
    begin = re.search(r"install -m 0644 (\S+) (\S+)", without.stderr)
    assert begin is not None
    assert (Path(begin[1]).is_file(), begin[2]) == (True, str(desk_.policy))
    assert desk_.issued() == []


def test_a_dry_run_signs_and_writes_nothing(desk_: Desk, pairs: Pairs) -> None:
    """It says what would be signed, what refused, and exits as the run itself would."""
    bundle = changed(make_bundle(some(pairs, "apiserver", "scheduler.conf")), "scheduler.conf", proof=None)
    path = put(desk_, bundle)

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox, "--dry-run")

    assert run.returncode == Exit.REFUSED
    assert run.stdout == "cp-1 (kubernetes): would sign apiserver\n"
    assert "scheduler.conf: refused: proof" in run.stderr
    assert desk_.issued() == []
    assert path.exists()
    assert list(desk_.outbox.iterdir()) == []
    assert not desk_.state.exists()


@pytest.mark.parametrize("data", [b"", b"{}", b"hello", b"-----BEGIN CERTIFICATE-----"])
def test_what_is_no_bundle_is_named(desk_: Desk, tmp_path: Path, data: bytes) -> None:
    """Nothing is signed, the message says what was wanted."""
    (tmp_path / "b.json").write_bytes(data)
    run = desk_.run("sign", tmp_path / "b.json")

    assert run.returncode == Exit.FAILED
    assert "wanted" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_tampered_bundle_is_named(desk_: Desk, pairs: Pairs, tmp_path: Path) -> None:
    """The digest shows the change; where the attacker made a new digest, the proof or the policy does."""
    bundle = make_bundle(some(pairs, "apiserver"))
    (tmp_path / "b.json").write_bytes(dumps(bundle).replace(b'"cp-1"', b'"cp-2"'))
    assert "digest: wanted" in desk_.run("sign", tmp_path / "b.json").stderr

    (tmp_path / "b.json").write_bytes(dumps(replace(bundle, node="cp-2")))
    run = desk_.run("sign", tmp_path / "b.json")
    assert run.returncode == Exit.REFUSED
    assert "another signature" in run.stderr
    assert desk_.issued() == []


# --- the inbox --------------------------------------------------------------------------------------------------------


def test_an_inbox_is_answered_and_archived(desk_: Desk, pki: Pki, pairs: Pairs) -> None:
    """Every bundle; the requests of all of them in one process a CA and usage class; the next run has nothing to do."""
    bundles = [make_bundle(some(pairs, "apiserver", "etcd-server", "admin.conf")) for _ in range(5)]
    paths = [put(desk_, bundle) for bundle in bundles]

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert (run.returncode, run.stderr) == (0, "")
    by_batch = {answer.batch: answer for answer in answers_of(desk_)}
    for bundle in bundles:
        assert_good(by_batch[bundle.batch], bundle, pki)
    assert len([line for line in desk_.runs() if line.startswith("ca ")]) == 3
    assert not any(b"PRIVATE KEY" in path.read_bytes() for path in desk_.outbox.iterdir())
    assert list(desk_.inbox.iterdir()) == []
    assert {path.name for path in desk_.archive.iterdir()} == {path.name for path in paths}
    again = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)
    assert (again.returncode, again.stdout) == (0, f"{desk_.inbox}: no request bundles\n")
    assert len(desk_.issued()) == 15


def test_a_half_copied_bundle_is_left_alone_until_it_is_whole(desk_: Desk, pairs: Pairs) -> None:
    """It delays no other bundle; when it has not grown for long, the run fails."""
    whole, half = (make_bundle(some(pairs, "apiserver")) for _ in range(2))
    put(desk_, whole)
    path = put(desk_, half)
    path.write_bytes(dumps(half)[:500])

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert run.returncode == 0
    assert "left alone" in run.stderr
    assert [answer.batch for answer in answers_of(desk_)] == [whole.batch]
    assert path.exists()
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    stale = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)
    assert stale.returncode == Exit.FAILED
    written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    assert f"not whole since {written:%Y-%m-%d %H:%M} UTC" in stale.stderr
    path.write_bytes(dumps(half))
    assert desk_.run("sign", desk_.inbox, "-o", desk_.outbox).returncode == 0
    assert {answer.batch for answer in answers_of(desk_)} == {whole.batch, half.batch}


def test_a_bundle_that_is_there_twice_is_signed_once(desk_: Desk, pairs: Pairs) -> None:
    """A second copy under another name is not signed again."""
    path = put(desk_, make_bundle(some(pairs, "apiserver")))
    (desk_.inbox / "copy of it.json").write_bytes(path.read_bytes())

    runs = [desk_.run("sign", desk_.inbox, "-o", desk_.outbox) for _ in range(2)]

    assert [run.returncode for run in runs] == [0, 0]
    assert "a second copy of the same bundle" in runs[0].stderr
    assert list(desk_.inbox.iterdir()) == []
    assert len(desk_.issued()) == 1


def test_odd_files_in_an_inbox_do_not_delay_the_others(desk_: Desk, pairs: Pairs, tmp_path: Path) -> None:
    """Links, pipes, other bundles, damaged ones: named, left, and the good ones are signed."""
    good = make_bundle(some(pairs, "apiserver"))
    put(desk_, good)
    (tmp_path / "secret").write_bytes(dumps(make_bundle(some(pairs, "apiserver"))))
    (desk_.inbox / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(desk_.inbox / "pipe")
    (desk_.inbox / "other").write_text('{"schema": "x"}')
    (desk_.inbox / "changed").write_bytes(dumps(good).replace(b'"cp-1"', b'"cp-2"'))
    (desk_.inbox / ".hidden").write_text("x")
    csr_pem = new_csr(pairs["apiserver"][0]).public_bytes(Encoding.PEM)
    (desk_.inbox / "apiserver.csr").write_bytes(csr_pem)
    (desk_.inbox / "done").mkdir()
    (desk_.inbox / "done/apiserver.csr").write_bytes(csr_pem)
    (desk_.inbox / "evil\x1b[2J").write_text("{}")

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert run.returncode == Exit.FAILED
    assert [answer.batch for answer in answers_of(desk_)] == [good.batch]
    for words in (
        "link: wanted a file",
        "pipe: ",
        "other: schema",
        "changed: digest",
        "apiserver.csr: wanted a request",
    ):
        assert words in run.stderr
    assert "\x1b" not in run.stderr
    assert ".hidden" not in run.stderr
    assert len(desk_.issued()) == 1


def test_one_bad_csr_fails_alone(desk_: Desk, pki: Pki, pairs: Pairs) -> None:
    """Among the requests of many nodes only that one is refused."""
    bundles = [make_bundle(some(pairs, "apiserver", "admin.conf")) for _ in range(4)]
    der = bytearray(new_csr(pairs["apiserver"][0]).public_bytes(Encoding.DER))
    der[-1] ^= 1  # its signature
    broken = x509.load_der_x509_csr(bytes(der))
    bad = bundles[2]
    bad = bundles[2] = proven(bad, "apiserver", pairs["apiserver"][1], broken)
    for bundle in bundles:
        put(desk_, bundle)

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert run.returncode == Exit.REFUSED
    by_batch = {answer.batch: answer for answer in answers_of(desk_)}
    assert isinstance(by_batch[bad.batch].answers["apiserver"], Refusal)
    assert isinstance(by_batch[bad.batch].answers["admin.conf"], Issued)
    for bundle in bundles:
        if bundle is not bad:
            assert_good(by_batch[bundle.batch], bundle, pki)


def test_a_ca_that_can_not_be_used_holds_up_its_own_only(desk_: Desk, pki: Pki, pairs: Pairs) -> None:
    """No answer goes out before it is whole, what was signed meanwhile is kept, and nothing is signed twice."""
    both = make_bundle(some(pairs, "apiserver", "etcd-server"))
    alone = make_bundle(some(pairs, "etcd-server"))
    put(desk_, both)
    put(desk_, alone)
    key = desk_.ca("ca") / "ca.key"
    key.rename(key.with_name("away"))

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert run.returncode == Exit.USAGE
    assert "ca.key" in run.stderr
    assert [answer.batch for answer in answers_of(desk_)] == [alone.batch]
    assert len(desk_.issued()) == 2
    key.with_name("away").rename(key)
    assert desk_.run("sign", desk_.inbox, "-o", desk_.outbox).returncode == 0
    assert_good(next(answer for answer in answers_of(desk_) if answer.batch == both.batch), both, pki)
    assert len(desk_.issued()) == 3
    assert not (desk_.state / "desk-answers.jsonl").exists()


def test_a_ca_s_own_trouble_is_no_refusal(desk_: Desk, pki: Pki, pairs: Pairs) -> None:
    """A CA's trouble with one request is no refusal; when the CA is well again, the same bundle is signed."""
    bundle = make_bundle(some(pairs, "apiserver"))
    put(desk_, bundle)
    program = desk_.directory / "openssl"
    good = program.read_text()
    program.write_text(good.replace("exec", f'[ "$1" != pkey ] || echo wrong > {desk_.directory}/passphrase\nexec'))

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert run.returncode == Exit.USAGE
    assert answers_of(desk_) == []
    program.write_text(good)
    (desk_.directory / "passphrase").write_text(f"{PASSPHRASE}\n")
    assert desk_.run("sign", desk_.inbox, "-o", desk_.outbox).returncode == 0
    assert_good(answers_of(desk_)[0], bundle, pki)


def test_a_desk_with_one_of_the_cas_answers_for_that_one(tmp_path: Path, pki: Pki, pairs: Pairs) -> None:
    """Another desk's request is neither signed nor refused, and is named."""
    desk_ = make_desk(tmp_path / "desk", pki, authorities=["etcd-ca"])
    put(desk_, make_bundle(some(pairs, "apiserver", "etcd-server")))

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert run.returncode == Exit.REFUSED
    assert "apiserver: wanted a request for etcd-ca, found one for ca" in run.stderr
    [answer] = answers_of(desk_)
    assert list(answer.answers) == ["etcd-server"]


def test_two_desks_answer_side_by_side(tmp_path: Path, pki: Pki, pairs: Pairs) -> None:
    """Their answers have names of their own, in one outbox and on one stick; neither removes what another one writes."""
    bundle = make_bundle(some(pairs, "apiserver", "etcd-server"))
    (tmp_path / "b.json").write_bytes(dumps(bundle))
    (tmp_path / "out").mkdir()
    halves = [tmp_path / "out" / f".cp-1-{'0b' * 16}{suffix}.answer.json.a1b2" for suffix in ("", ".front-proxy-ca")]
    for path in (*halves, tmp_path / "out" / f".cp-1-{'0b' * 16}.ca.answer.json.a1b2"):
        path.write_bytes(b"{")
    for authority in ("ca", "etcd-ca"):
        desk_ = make_desk(tmp_path / authority, pki, authorities=[authority])
        put(desk_, bundle)
        desk_.run("sign", desk_.inbox, "-o", tmp_path / "out")
        desk_.run("sign", tmp_path / "b.json")

    stem = file_names(bundle.node, digest(bundle))[1].removesuffix(".answer.json")
    paths = [tmp_path / "out" / f"{stem}.{name}.answer.json" for name in ("ca", "etcd-ca")]
    assert sorted((tmp_path / "out").iterdir()) == sorted([*halves, *paths])
    paths += [tmp_path / f"b.{name}.answer.json" for name in ("ca", "etcd-ca")]
    assert [list(loads_answer(path.read_bytes()).answers) for path in paths] == [["apiserver"], ["etcd-server"]] * 2


def test_a_sibling_below_the_same_root_proves_nothing(tmp_path: Path, pki: Pki) -> None:
    """A certificate that the company's root signed is not the cluster's, though the root is in the CA's chain."""
    now = datetime.now(UTC)
    begin, end = now - timedelta(days=1), now + timedelta(days=1000)
    root = Signer.make("root", begin=begin, end=end)
    intermediate = Signer.make("kubernetes", parent=root, begin=begin, end=end)
    desk_ = make_desk(tmp_path / "desk", pki, authorities=["ca"])
    shutil.rmtree(desk_.ca("ca"))
    chain = pem(intermediate.certificate) + pem(root.certificate)
    opensslca.make_ca_directory(desk_.ca("ca"), chain, csr.key_pem(intermediate.key), passphrase=PASSPHRASE)
    keys = {signer: csr.generate_key("ecdsa-p256") for signer in ("root", "kubernetes")}
    cas = {"root": root, "kubernetes": intermediate}
    bundles = {}
    for signer, key in keys.items():
        ca = sample_pki.ThrowawayCA(certificate=cas[signer].certificate, key=cas[signer].key)
        old = leaf_of(ca, "CN=system:kube-scheduler", key)
        bundles[signer] = make_bundle({"scheduler.conf": (old, key)})
        put(desk_, bundles[signer])

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert run.returncode == Exit.REFUSED
    answers = {answer.batch: answer.answers["scheduler.conf"] for answer in answers_of(desk_)}
    refused, signed = answers[bundles["root"].batch], answers[bundles["kubernetes"].batch]
    assert isinstance(refused, Refusal)
    assert "wanted a replaced certificate that CN=kubernetes signed" in refused.reason
    assert isinstance(signed, Issued)
    assert signed.intermediates == (intermediate.certificate,)


def test_a_user_of_the_cluster_does_not_become_its_master(desk_: Desk, pki: Pki, pairs: Pairs) -> None:
    """A client certificate of the cluster's CA proves who its holder is, and nothing else; the node itself is signed for."""
    ca_key = load_pem_private_key(pki.ca_pem("ca")[1], None)
    assert isinstance(ca_key, PrivateKey)
    ca = sample_pki.ThrowawayCA(certificate=x509.load_pem_x509_certificate(pki.ca_pem("ca")[0]), key=ca_key)
    key = csr.generate_key("ecdsa-p256")
    jane = leaf_of(ca, "O=dev,CN=jane", key)
    name = "super-admin.conf"
    asked = make_bundle({name: (jane, key)}, build=lambda _: new_csr(pairs[name][0]))
    honest = make_bundle(some(pairs, name))
    put(desk_, asked)
    put(desk_, honest)

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert run.returncode == Exit.REFUSED
    answers = {answer.batch: answer.answers[name] for answer in answers_of(desk_)}
    refused = answers[asked.batch]
    assert isinstance(refused, Refusal)
    assert "found one by that of O=dev,CN=jane" in refused.reason
    assert isinstance(answers[honest.batch], Issued)
    assert len(desk_.issued()) == 1


def leaf_of(ca: sample_pki.ThrowawayCA, subject: str, key: PrivateKey) -> x509.Certificate:
    name, now = x509.Name.from_rfc4514_string(subject), datetime.now(UTC)
    builder = builder_of(
        name, ca.certificate.subject, key.public_key(), now - timedelta(hours=1), now + timedelta(days=9)
    )
    return builder.sign(ca.key, signature_hash(ca.key))


def test_only_one_run_at_a_time(desk_: Desk, pairs: Pairs) -> None:
    """The second one says who holds the lock."""
    put(desk_, make_bundle(some(pairs, "apiserver")))
    desk_.state.mkdir(mode=0o700)
    with lock(desk_.state / "lock", "another run"):
        run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)
    assert run.returncode == Exit.LOCKED
    assert "another run" in run.stderr


def test_the_archive_can_be_elsewhere(desk_: Desk, pairs: Pairs, tmp_path: Path) -> None:
    """An option or the policy can put the archive elsewhere, on another file system, too."""
    path = put(desk_, make_bundle(some(pairs, "apiserver")))
    assert desk_.run("sign", desk_.inbox, "-o", desk_.outbox, "--archive", tmp_path / "x").returncode == 0
    assert (tmp_path / "x" / path.name).exists()

    shm = Path("/dev/shm")
    if shm.is_dir() and shm.stat().st_dev != tmp_path.stat().st_dev:
        away = shm / f"desk-test-{os.getpid()}"
        try:
            path = put(desk_, make_bundle(some(pairs, "apiserver")))
            desk_.policy.write_text(POLICY.replace("[allow]", f'archive = "{away}"\n\n[allow]'))
            assert desk_.run("sign", desk_.inbox, "-o", desk_.outbox).returncode == 0
            assert (away / path.name).exists()
            assert not path.exists()
        finally:
            for left in away.iterdir():
                left.unlink()
            away.rmdir()


@pytest.mark.parametrize("out", [[], ["-o", "inbox"], ["-o", "nowhere"]])
def test_an_inbox_needs_an_outbox_of_its_own(desk_: Desk, out: list[str]) -> None:
    """Answers among requests would be taken for requests by people."""
    args = [str(desk_.directory / part) if part != "-o" else part for part in out]
    run = desk_.run("sign", desk_.inbox, *args)
    assert run.returncode == Exit.FAILED
    assert "directory for the answers" in run.stderr


def test_a_full_outbox_loses_nothing(desk_: Desk, pki: Pki, pairs: Pairs) -> None:
    """An answer that can't be written is kept, and delivered by the next run."""
    bundle = make_bundle(some(pairs, "apiserver"))
    path = put(desk_, bundle)
    (desk_.outbox / file_names(bundle.node, digest(bundle))[1]).mkdir()

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert run.returncode == Exit.FAILED
    assert path.exists()
    (desk_.outbox / file_names(bundle.node, digest(bundle))[1]).rmdir()
    assert desk_.run("sign", desk_.inbox, "-o", desk_.outbox).returncode == 0
    [answer] = answers_of(desk_)
    assert_good(answer, bundle, pki)
    assert len(desk_.issued()) == 1


def test_a_run_forgets_nothing_of_another(desk_: Desk, pairs: Pairs, tmp_path: Path) -> None:
    """A certificate of an interrupted run is still known when a person has signed another one meanwhile."""
    bundle = make_bundle(some(pairs, "apiserver"))
    path = put(desk_, bundle)
    answer = desk_.outbox / file_names(bundle.node, digest(bundle))[1]
    answer.mkdir()
    assert desk_.run("sign", desk_.inbox, "-o", desk_.outbox).returncode == Exit.FAILED
    (tmp_path / "b.json").write_bytes(dumps(make_bundle(some(pairs, "etcd-server"))))
    assert desk_.run("sign", tmp_path / "b.json").returncode == 0
    answer.rmdir()

    assert desk_.run("sign", desk_.inbox, "-o", desk_.outbox).returncode == 0
    assert not path.exists()
    assert len(desk_.issued()) == 2
    assert not (desk_.state / "desk-answers.jsonl").exists()


def test_an_answer_that_has_become_old_is_not_given_again(desk_: Desk, pki: Pki, pairs: Pairs, tmp_path: Path) -> None:
    """An earlier certificate for the same request that the node would refuse today is replaced by a new one."""
    key, now = csr.generate_key("ecdsa-p256"), datetime.now(UTC)
    bundle = make_bundle(some(pairs, "apiserver"), build=lambda old: x509.load_pem_x509_csr(csr.build(old, key)))
    ca_key = load_pem_private_key(pki.ca_pem("ca")[1], None)
    assert isinstance(ca_key, PrivateKey)
    ca = sample_pki.ThrowawayCA(certificate=x509.load_pem_x509_certificate(pki.ca_pem("ca")[0]), key=ca_key)
    cluster = sample_pki.Cluster(node=NODE, address=ADDRESS, endpoint=ENDPOINT, extra_sans=EXTRA_SANS)
    begin, end = now - timedelta(days=1), now + timedelta(days=1)
    leaf = sample_pki.leaf_certificate(SPECS["apiserver"], key, ca, cluster, not_before=begin, not_after=end)
    earlier = AnswerBundle(
        request_digest=digest(bundle),
        batch=bundle.batch,
        node=bundle.node,
        cluster=bundle.cluster,
        signer="desk-1",
        signed=bundle.created,
        answers={"apiserver": Issued(leaf=leaf)},
    )
    (tmp_path / "a.json").write_bytes(dumps(earlier))
    (tmp_path / "b.json").write_bytes(dumps(bundle))

    assert desk_.run("sign", tmp_path / "b.json", "-o", tmp_path / "a.json").returncode == 0

    assert_good(loads_answer((tmp_path / "a.json").read_bytes()), bundle, pki)
    assert len(desk_.issued()) == 1


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "function", "before"),
    [
        ("state.open_requests", "RequestLog._append", False),  # the open requests
        ("ca", "CA.ask", False),  # signed, and not written down
        ("desk.desk", "Desk._verify", True),  # signed and written down
        ("desk.records", "_write", True),  # the first file is there, and empty
        ("desk.records", "_write", False),  # a file is on disk
        ("desk.records", "_put_in_place", True),  # all of an answer are on disk
        ("desk.records", "_put_in_place", False),  # one is there
        ("desk.records", "os.link", False),  # one is remembered
        ("desk.records", "sync_directory", False),  # all are there
        ("desk.files", "_remove", False),  # one is done
    ],
)
def test_a_killed_run_is_taken_up_again(
    desk_: Desk, pki: Pki, pairs: Pairs, tmp_path: Path, module: str, function: str, before: bool
) -> None:
    """Wherever it was killed, the next run delivers all, and signs nothing twice."""
    bundles = [make_bundle(some(pairs, "apiserver", "etcd-server")) for _ in range(3)]
    for bundle in bundles:
        put(desk_, bundle)
    _run_killed(desk_, tmp_path, module, function, before=before)

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert run.returncode == 0, run.stderr
    by_batch = {answer.batch: answer for answer in answers_of(desk_)}
    for bundle in bundles:
        assert_good(by_batch[bundle.batch], bundle, pki)
    assert len(desk_.issued()) == 6
    assert list(desk_.inbox.iterdir()) == []
    assert list(desk_.directory.rglob(".*.json.*")) == []  # nothing half written
    assert desk_.run("audit", "verify").returncode == 0


@pytest.mark.parametrize("serve", ["workers.serve()", "workers.os._exit(3)"], ids=["workers", "workers that end"])
def test_a_full_inbox_is_signed_with_workers(desk_: Desk, pki: Pki, pairs: Pairs, serve: str) -> None:
    """All good bundles are answered, the bad ones are refused or named; workers that end leave the work to the desk."""
    good = [make_bundle(some(pairs, "apiserver")) for _ in range(31)]
    bad = changed(make_bundle(some(pairs, "apiserver")), "apiserver", proof=None)
    for bundle in (*good, bad):
        put(desk_, bundle)
    (desk_.inbox / "other.request.json").write_text('{"schema": 1}')
    patch = f"from bridge.desk import workers\nworkers._SERVE = 'from bridge.desk import workers; {serve}'\n"
    _, *arguments = desk_.command("sign", desk_.inbox, "-o", desk_.outbox)

    run = subprocess.run(
        [sys.executable, "-c", f"{patch}from bridge.entry import main\nmain()", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == Exit.FAILED, run.stderr  # a file is no bundle
    by_batch = {answer.batch: answer for answer in answers_of(desk_)}
    for bundle in good:
        assert_good(by_batch[bundle.batch], bundle, pki)
    assert isinstance(by_batch[bad.batch].answers["apiserver"], Refusal)
    assert "other.request.json: schema: wanted" in run.stderr.replace("\n", " ")
    assert ("a worker process has ended" in run.stderr) is ("_exit" in serve)
    assert desk_.run("audit", "verify").returncode == 0


@pytest.mark.parametrize("memory", ["archive", "outbox", "journal"])
def test_what_was_revoked_is_not_handed_out_again(desk_: Desk, pairs: Pairs, tmp_path: Path, memory: str) -> None:
    """Wherever the desk finds a certificate of before, the request is refused once its CA has revoked it; another one goes out again."""
    put(desk_, bundle := make_bundle(some(pairs, "apiserver", "etcd-peer")))
    if memory == "journal":
        _run_killed(desk_, tmp_path, "desk.desk", "Desk._verify", before=True)
    else:
        assert desk_.run("sign", desk_.inbox, "-o", desk_.outbox).returncode == 0
        shutil.rmtree(desk_.state / "desk-answered")
        put(desk_, bundle)
    if memory == "archive":
        assert desk_.run("sign", desk_.inbox, "-o", desk_.outbox).returncode == 0
        put(desk_, bundle)
        shutil.rmtree(desk_.outbox)
        desk_.outbox.mkdir()
    index = desk_.ca("ca") / "index.txt"
    index.write_text(re.sub(r"^V\t(\w+)\t", r"R\t\1\t261201000000Z,keyCompromise", index.read_text()))

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    [again] = [answer.answers for answer in answers_of(desk_)]
    assert (run.returncode, type(again["etcd-peer"])) == (Exit.REFUSED, Issued)
    assert isinstance(refused := again["apiserver"], Refusal)
    assert "was revoked: `ca-bridge pending cancel` at the node" in refused.reason
    assert len(desk_.issued()) == 2


@pytest.mark.slow
def test_killed_at_any_time_nothing_is_signed_twice(desk_: Desk, pki: Pki, pairs: Pairs) -> None:
    """Again and again, while `openssl ca` is at work, too; in the end there is one certificate a request."""
    bundles = [make_bundle(some(pairs, "apiserver", "etcd-server", "admin.conf", "scheduler.conf")) for _ in range(60)]
    for bundle in bundles:
        put(desk_, bundle)
    killed = 0
    for tenths in (3, 4, 5, 6, 8, 10, 12, 14, 16, 18):
        process = subprocess.Popen(
            desk_.command("sign", desk_.inbox, "-o", desk_.outbox), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=tenths / 10)
        killed += process.poll() is None
        process.kill()
        process.communicate()

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert run.returncode == 0, run.stderr
    assert killed > 0
    by_batch = {answer.batch: answer for answer in answers_of(desk_)}
    for bundle in bundles:
        assert_good(by_batch[bundle.batch], bundle, pki)
    assert len(desk_.issued()) == 240
    assert desk_.run("audit", "verify").returncode == 0


def _run_killed(desk_: Desk, tmp_path: Path, module: str, function: str, *, before: bool) -> None:
    """Kill the program at its first call of a function, before or after it."""
    script = killing(tmp_path, module, function, before=before)
    command = desk_.command("sign", desk_.inbox, "-o", desk_.outbox)
    python = Path(command[0]).with_name("python")
    run = subprocess.run([python, script, *command[1:]], capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr


def test_what_was_signed_is_found_by_key_and_usages(desk_: Desk, pairs: Pairs) -> None:
    """It is not found for another CSR, for other usages, or from before the given time."""
    backend = registry.configured(load(desk_.config), ["ca"])["ca"].open()
    assert backend.can("recall")
    bundle = make_bundle(some(pairs, "apiserver", "admin.conf"))
    requests = [sign_request(one, bundle) for one in bundle.requests]
    begin = datetime.now(UTC)
    issued = [backend.sign(request) for request in requests]
    other = make_bundle(some(pairs, "apiserver"))

    assert list(backend.recall(requests, begin)) == issued
    assert list(backend.recall([sign_request(other.requests[0], other)], begin)) == [None]
    assert list(backend.recall([replace(requests[0], spec=SPECS["admin.conf"])], begin)) == [None]
    assert list(backend.recall(requests, begin + timedelta(minutes=1))) == [None, None]


def test_a_killed_run_takes_no_other_certificate_of_the_same_key(desk_: Desk, pki: Pki, pairs: Pairs) -> None:
    """A key may have several; one for other names would be refused as the CA's fault, and the node throw its key away."""
    key, begin = csr.generate_key("ecdsa-p256"), datetime.now(UTC) - timedelta(minutes=1)
    first, second = (
        make_bundle(some(pairs, name), build=lambda old: x509.load_pem_x509_csr(csr.build(old, key)))
        for name in ("controller-manager.conf", "scheduler.conf")
    )
    put(desk_, first)
    assert desk_.run("sign", desk_.inbox, "-o", desk_.outbox).returncode == 0
    put(desk_, second)
    journal = Journal(desk_.state / "desk-answers.jsonl", datetime.now(UTC))
    journal.add([(sign_request(second.requests[0], second), Submitted(begin))])

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert (run.returncode, len(desk_.issued())) == (0, 2), run.stderr
    [answer] = [one for one in answers_of(desk_) if one.batch == second.batch]
    assert_good(answer, second, pki)


def test_a_flipped_bit_in_the_journal_is_noticed(tmp_path: Path, pairs: Pairs) -> None:
    """The line is as if it had not been written, as is one without a digest."""
    bundle = make_bundle(some(pairs, "apiserver"))
    [first] = (sign_request(request, bundle) for request in bundle.requests)
    path, now = tmp_path / "journal", datetime.now(UTC)
    waiting = Pending(reference="R-1", note="at the CA")
    journal = Journal(path, now)
    journal.add([(first, waiting)])
    whole = path.read_bytes()
    for place in range(0, len(whole) - 1, 5):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        journal = Journal(path, now)
        assert journal.get(first) in (None, waiting)
    assert whole.count(b"R-1") == 1
    path.write_bytes(whole.replace(b"R-1", b"R-2"))
    journal = Journal(path, now)
    assert journal.get(first) is None
    bare = {name: value for name, value in json.loads(whole).items() if name != "digest"}
    path.write_bytes(json.dumps(bare).encode() + b"\n")
    journal = Journal(path, now)
    assert journal.get(first) is None


def test_the_journal_survives_a_torn_line(tmp_path: Path, pairs: Pairs) -> None:
    """Whole lines are kept, and a cut one is forgotten and written anew."""
    bundle = make_bundle(some(pairs, "apiserver", "etcd-server"))
    first, second = (sign_request(request, bundle) for request in bundle.requests)
    answer, later = Issued(leaf=pairs["apiserver"][0]), Pending(reference="7", note="soon")
    path, now = tmp_path / "journal", datetime.now(UTC)
    journal = Journal(path, now)
    journal.add([(first, answer)])
    journal.add([(second, Submitted(datetime(2026, 1, 1, tzinfo=UTC)))])
    assert journal.get(second) == Submitted(datetime(2026, 1, 1, tzinfo=UTC))
    journal.add([(second, later)])
    with path.open("ab") as file:
        file.write(b'{"key": "' + key_of(first).encode())

    journal = Journal(path, now)
    assert journal.get(first) == answer
    assert journal.get(second) == later
    journal.add([(second, answer)])
    journal = Journal(path, now)
    assert journal.get(second) == answer
    assert journal.get(replace(first, validity=timedelta(days=1))) is None
    journal.forget([first])
    journal.tidy()
    assert journal.get(second) == answer
    journal = Journal(path, now)
    assert journal.get(first) is None
    assert journal.get(second) == answer
    journal.add([(first, later)])
    assert journal.get(first) == later
    journal.forget([first, second])
    journal.tidy()
    journal = Journal(path, now)
    assert journal.get(first) is None
    journal.add([(first, later)])
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.attack("N19")
def test_the_journal_forgets_what_is_old(tmp_path: Path, pairs: Pairs) -> None:
    """A run that is killed after a delivery can't forget it; what a person has yet to answer stays while it is asked for."""
    bundle = make_bundle(some(pairs, "apiserver", "etcd-server", "admin.conf"))
    first, second, third = (sign_request(request, bundle) for request in bundle.requests)
    path, begin = tmp_path / "journal", datetime.now(UTC)
    answer, later = Issued(leaf=pairs["apiserver"][0]), Pending(reference="7", note="soon")
    journal = Journal(path, begin)
    journal.add([(first, answer), (second, Submitted(begin)), (third, later)])
    journal = Journal(path, begin + timedelta(days=60))
    assert journal.get(first) == answer
    journal.add([(second, answer)])

    journal = Journal(path, begin + timedelta(days=91))
    assert [journal.get(one) for one in (first, second, third)] == [None, answer, None]
    journal.add([(third, later)])
    journal.tidy()
    journal = Journal(path, begin + timedelta(days=151))
    assert [journal.get(one) for one in (first, second, third)] == [None, None, later]
    journal.forget([third])
    journal.tidy()
    assert not path.exists()


# --- other CAs --------------------------------------------------------------------------------------------------------


def with_backend(desk_: Desk, pki: Pki, table: Mapping[str, str]) -> None:
    """Another backend for `ca`, whose CA certificate the desk knows."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    state = f'[node]\nstate_dir = "{desk_.state}"\n'
    desk_.config.write_text("\n".join([state, "[backend.x]", *lines, '[authority.ca]\nbackend = "x"\n']))
    desk_.policy.write_text(POLICY.replace("[allow]", f'ca_dir = "{pki.ca_dir}"\n\n[allow]'))


@pytest.mark.parametrize("may_list", [True, False])
def test_a_desk_with_openbao_refuses_a_revoked_proof(
    desk_: Desk, pki: Pki, pairs: Pairs, tmp_path: Path, may_list: bool
) -> None:
    """Whether the token may list what is revoked, or the desk looks each certificate up; the others are signed."""
    live = {name: old for name, (old, _) in pairs.items()}
    with openbao.dev_server() as bao:
        bao.add_ca("ca", *pki.ca_pem("ca"))
        policy = vault_setup.policy("ca", bao.add_kubeadm_roles("ca", live, VALIDITY))
        assert "certs/revoked" in policy
        bao.add_policy("desk", policy if may_list else policy.replace("certs/revoked", "no-such-path"))
        token = tmp_path / "token"
        token.touch(mode=0o600)
        token.write_text(bao.token("desk"))
        with_backend(
            desk_,
            pki,
            {"type": "vault", "url": bao.url, "mount": "ca", "role": "kubeadm-{name}", "auth.token_file": f"{token}"},
        )
        first, second = (make_bundle(some(pairs, name, "scheduler.conf")) for name in ("apiserver", "admin.conf"))
        [stolen] = [one.replaces for one in second.requests if one.name == "admin.conf"]
        assert stolen is not None
        bao.write("ca/revoke", certificate=pem(stolen).decode())
        for bundle in (first, second):
            put(desk_, bundle)

        run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert run.returncode == Exit.REFUSED
    by_batch = {answer.batch: dict(answer.answers) for answer in answers_of(desk_)}
    refused = by_batch[second.batch].pop("admin.conf")
    assert isinstance(refused, Refusal)
    assert "found the revoked one" in refused.reason
    assert all(isinstance(one, Issued) for one in (*by_batch[first.batch].values(), *by_batch[second.batch].values()))


@pytest.mark.parametrize("may_list", [True, False])
def test_a_desk_with_openbao_names_the_right_that_would_tell_what_was_signed(
    desk_: Desk, pki: Pki, pairs: Pairs, tmp_path: Path, may_list: bool
) -> None:
    """After a killed run; a token that has the right gets no warning, and both sign what was not signed."""
    live = {name: old for name, (old, _) in pairs.items()}
    with openbao.dev_server() as bao:
        bao.add_ca("ca", *pki.ca_pem("ca"))
        bao.add_policy("desk", vault_setup.policy("ca", bao.add_kubeadm_roles("ca", live, VALIDITY)))
        bao.add_policy("lists", 'path "ca/certs" { capabilities = ["list"] }')
        token = tmp_path / "token"
        token.touch(mode=0o600)
        token.write_text(bao.token("desk", *(["lists"] if may_list else [])))
        with_backend(
            desk_,
            pki,
            {"type": "vault", "url": bao.url, "mount": "ca", "role": "kubeadm-{name}", "auth.token_file": f"{token}"},
        )
        first, second = (make_bundle(some(pairs, "apiserver")) for _ in range(2))
        put(desk_, first)
        assert desk_.run("sign", desk_.inbox, "-o", desk_.outbox).returncode == 0
        put(desk_, second)
        journal = Journal(desk_.state / "desk-answers.jsonl", datetime.now(UTC))
        journal.add([(sign_request(second.requests[0], second), Submitted(datetime.now(UTC)))])

        run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert run.returncode == 0, run.stderr
    assert len(answers_of(desk_)) == 2
    for text in ("the token lacks `list` on ca/certs", "can't tell what it has signed for a killed run"):
        assert (text in run.stderr) is not may_list


def test_a_csr_in_several_bundles_is_signed_once(desk_: Desk, pki: Pki, pairs: Pairs, tmp_path: Path) -> None:
    """A node that sends a part of its requests again gets what the first bundle gets, in the same run."""
    live = {name: old for name, (old, _) in pairs.items()}
    with openbao.dev_server() as bao:
        bao.add_ca("ca", *pki.ca_pem("ca"))
        bao.add_kubeadm_roles("ca", live, VALIDITY)
        token = tmp_path / "token"
        token.touch(mode=0o600)
        token.write_text(bao.root_token)
        with_backend(
            desk_,
            pki,
            {"type": "vault", "url": bao.url, "mount": "ca", "role": "kubeadm-{name}", "auth.token_file": f"{token}"},
        )
        whole = make_bundle(some(pairs, "apiserver", "admin.conf"))
        bundles = [whole, *(replace(whole, requests=(one,)) for one in whole.requests)]
        for bundle in bundles:
            put(desk_, bundle)

        dry = desk_.run("sign", desk_.inbox, "-o", desk_.outbox, "--dry-run")
        run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)
        there = bao.request("LIST", "ca/certs").json()["data"]["keys"]

    assert dry.stdout.count("would sign") == len(bundles)
    assert run.returncode == 0, run.stderr
    answers = {answer.request_digest: answer for answer in answers_of(desk_)}
    for bundle in bundles:
        assert_good(answers[digest(bundle)], bundle, pki)
    assert len(there) == 2


@pytest.mark.kube("cfssl")
def test_a_desk_with_cfssl(desk_: Desk, pki: Pki, pairs: Pairs, tmp_path: Path) -> None:
    """Any backend works at the desk."""
    live = {name: old for name, (old, _) in pairs.items()}
    ca_pem = pki.ca_pem("ca")
    with cfssl.serve_authority(tmp_path / "cfssl", AUTHORITIES["ca"], live, VALIDITY, ca_pem=ca_pem) as table:
        with_backend(desk_, pki, {"type": "cfssl", **table})
        bundles = [make_bundle(some(pairs, "apiserver", "admin.conf")) for _ in range(3)]
        for bundle in bundles:
            put(desk_, bundle)
        run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

        assert run.returncode == 0, run.stderr
        by_batch = {answer.batch: answer for answer in answers_of(desk_)}
        for bundle in bundles:
            assert_good(by_batch[bundle.batch], bundle, pki)
    put(desk_, make_bundle(some(pairs, "apiserver")))
    desk_.config.write_text(desk_.config.read_text().replace("[backend.x]", '[backend.x]\nretry_for = "1s"'))
    gone = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)
    assert gone.returncode == Exit.UNAVAILABLE
    assert len(answers_of(desk_)) == 3


def test_a_killed_run_asks_again_only_for_what_was_on_its_way(
    desk_: Desk, pki: Pki, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CA that is asked one by one, and can't find what it has signed: each of its answers is kept as it comes."""
    approval.install_plugin(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    (tmp_path / "people").mkdir()
    with_backend(desk_, pki, {"type": "approval", "dir": str(tmp_path / "people")})
    for _ in range(20):
        put(desk_, make_bundle(some(pairs, "apiserver", "admin.conf")))
    monkeypatch.setenv("CA_DIES", "30")
    assert desk_.run("sign", desk_.inbox, "-o", desk_.outbox).returncode == -signal.SIGKILL
    monkeypatch.delenv("CA_DIES")

    again = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert again.returncode == Exit.WAITING
    assert "can't tell what it has signed for a killed run: it is asked again for " in again.stderr
    calls = (tmp_path / "people/calls").read_text().splitlines()
    assert len(set(calls)) == 40
    assert 40 <= len(calls) <= 40 + PARALLEL_REQUESTS_OF_LOT


def no_delivery(*_: object) -> desk.Delivery:
    raise AssertionError("there is no answer yet")


def test_a_file_that_the_desk_lacks_is_no_refusal(pairs: Pairs) -> None:
    """A token that was taken away leaves the request waiting: no CA was asked, and the node would throw its key away."""
    job = desk.Job(bundle=make_bundle(some(pairs, "apiserver")), digest="", label="", delivery=no_delivery)
    error = LocalFileError("wanted a token, found no file")

    desk._note(job, job.requests["apiserver"], error, None)

    assert (job.answers, job.troubles) == ({}, {"apiserver": error})


def test_a_desk_whose_ca_answers_later(
    desk_: Desk, pki: Pki, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The bundle waits until each request has its answer; the CA gets each request once, and a refusal goes back. What
    another bundle has got meanwhile is on the record as delivered again when it is.
    """
    approval.install_plugin(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    (tmp_path / "people").mkdir()
    with_backend(desk_, pki, {"type": "approval", "dir": str(tmp_path / "people")})
    ca_key = load_pem_private_key(pki.ca_pem("ca")[1], None)
    assert isinstance(ca_key, PrivateKey)
    signer = Signer(certificate=x509.load_pem_x509_certificate(pki.ca_pem("ca")[0]), key=ca_key)
    people = approval.Approver(directory=tmp_path / "people", signer=signer)
    whole = make_bundle(some(pairs, "apiserver", "admin.conf"))
    part = replace(whole, requests=whole.requests[:1])
    for number, bundle in enumerate((part, whole)):
        (desk_.inbox / f"{number}.json").write_bytes(dumps(bundle))

    waiting = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)
    people.approve("apiserver")
    half = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)
    people.refuse("admin.conf", "ask your boss")
    done = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert (waiting.returncode, half.returncode, done.returncode) == (Exit.WAITING, Exit.WAITING, Exit.REFUSED)
    assert "the security team has it" in waiting.stderr
    assert len(people.asked()) == 2
    answers = {answer.request_digest: answer.answers for answer in answers_of(desk_)}
    assert isinstance(answers[digest(whole)]["apiserver"], Issued)
    assert answers[digest(whole)]["admin.conf"] == Refusal(reason="the CA refused: ask your boss")
    assert answers[digest(part)]["apiserver"] == answers[digest(whole)]["apiserver"]
    assert [event["event"] for event in events(desk_)] == [desk.SIGNED, desk.DELIVERED, audit.REFUSED]


def test_what_a_ca_signs_wrongly_does_not_go_out(
    desk_: Desk, pki: Pki, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The desk looks at each certificate as the node will, also where several bundles have the same CSR."""
    approval.install_plugin(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    (tmp_path / "people").mkdir()
    with_backend(desk_, pki, {"type": "approval", "dir": str(tmp_path / "people")})
    people = approval.Approver(directory=tmp_path / "people", signer=Signer.make())
    whole = make_bundle(some(pairs, "apiserver", "admin.conf"))
    for bundle in (whole, replace(whole, requests=whole.requests[:1])):
        put(desk_, bundle)
    desk_.run("sign", desk_.inbox, "-o", desk_.outbox)
    people.approve("apiserver")
    people.approve("admin.conf")

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert run.returncode == Exit.REFUSED
    assert sorted(re.findall(r": (\d+ signed, \d+ refused): ", run.stdout)) == [
        "0 signed, 1 refused",
        "0 signed, 2 refused",
    ]
    for answer in answers_of(desk_):
        refused = answer.answers["apiserver"]
        assert isinstance(refused, Refusal)
        assert refused.reason.startswith("the desk's CA signed something else: ")
    desk_.policy.write_text(POLICY)
    put(desk_, make_bundle(some(pairs, "apiserver")))
    assert "desk.ca_dir" in desk_.run("sign", desk_.inbox, "-o", desk_.outbox).stderr


def test_a_shorter_life_goes_out_where_the_desk_s_settings_allow_it(desk_: Desk, pairs: Pairs) -> None:
    """It ends before the replaced one, or lives for less than `min_validity`, as it was asked for; else it is withheld."""

    def signed(days: int) -> desk.DeskAnswer:
        bundle = make_bundle(some(pairs, "scheduler.conf"), validity=timedelta(days=days))
        put(desk_, bundle)
        desk_.run("sign", desk_.inbox, "-o", desk_.outbox)
        [answer] = [one for one in answers_of(desk_) if one.request_digest == digest(bundle)]
        return answer.answers["scheduler.conf"]

    refused = signed(60)
    assert isinstance(refused, Refusal)
    assert "wanted not before the replaced certificate's" in refused.reason
    assert [one["serialNumber"] in desk_.issued()[0] for one in events(desk_)] == [True]  # for those who revoke it
    with desk_.config.open("a") as file:
        file.write('\n[renewal]\nshorter = "allow"\n')
    assert [type(signed(days)) for days in (60, 2)] == [Issued, Issued]


# --- a person ---------------------------------------------------------------------------------------------------------


def _at_a_terminal(desk_: Desk, words: list[str], *args: str | Path) -> tuple[int, str]:
    """Run the program with a terminal of its own, at which a person types these words, one for each question."""
    pid, terminal = pty.fork()
    if pid == 0:
        command = desk_.command(*args)
        os.execv(command[0], command)  # noqa: S606 (the child's own program)
    seen = b""
    asked = 0
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        ready, _, _ = select.select([terminal], [], [], 1)
        try:
            part = os.read(terminal, 65536) if ready else b""
        except OSError:
            break  # EIO: the other side is closed
        if ready and not part:
            break
        seen += part
        questions = len(re.findall(rb"\[yes: sign / no: refuse / later\] |reason, for the node: ", seen))
        if questions > asked:
            os.write(terminal, words[asked].encode() + b"\n")
            asked += 1
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), seen.decode(errors="replace")


def test_a_person_ends_it_with_ctrl_c(desk_: Desk, pairs: Pairs, tmp_path: Path) -> None:
    """The message is about the desk's work, and not about a node's files."""
    (tmp_path / "b.json").write_bytes(dumps(make_bundle(some(pairs, "apiserver"))))
    code, seen = _at_a_terminal(desk_, ["\x03"], "sign", tmp_path / "b.json", "--approve")
    assert (code, "interrupted; the same command again" in seen, desk_.issued()) == (130, True, [])


def test_a_person_approves_each_bundle(desk_: Desk, pki: Pki, pairs: Pairs) -> None:
    """The question shows the same as `inspect`; the answer and the audit log name the person who said yes."""
    bundle = make_bundle(some(pairs, "apiserver", "scheduler.conf"))
    put(desk_, bundle)

    code, seen = _at_a_terminal(desk_, ["what?", "yes"], "sign", desk_.inbox, "-o", desk_.outbox, "--approve")

    assert code == 0, seen
    assert short_fingerprint(bundle) in seen
    assert "CN=system:kube-scheduler" in seen
    assert "signed by this CA" in seen
    [answer] = answers_of(desk_)
    assert_good(answer, bundle, pki)
    assert "approved by" in answer.signer
    assert all("approved by" in event["result"] for event in events(desk_))


@pytest.mark.first_use("10")
def test_no_word_is_broken_where_a_person_approves(desk_: Desk, pairs: Pairs) -> None:
    """Lines end between words, and go on below the value."""
    put(
        desk_,
        make_bundle(
            some(pairs, "apiserver", "apiserver-etcd-client", "apiserver-kubelet-client", "etcd-peer", "etcd-server")
        ),
    )
    _, seen = _at_a_terminal(desk_, ["later"], "sign", desk_.inbox, "-o", desk_.outbox, "--approve")
    lines = seen.replace("\r", "").splitlines()
    assert [line for line in lines if len(line) > 80 and " " in line.strip()] == []
    [question] = [number for number, line in enumerate(lines) if line.startswith("sign ")]
    assert [line[:5] for line in lines[question + 1 : question + 3]] == ["     ", "[yes:"]
    [sans, *_] = [number for number, line in enumerate(lines) if line.startswith("  SANs        DNS")]
    assert lines[sans + 1].startswith(" " * 14)


@pytest.mark.first_use("22")
@pytest.mark.skipif(shutil.which("setsid") is None, reason="needs setsid; install util-linux")
def test_a_person_below_su_can_approve(desk_: Desk, pairs: Pairs) -> None:
    """Standard input is a terminal there, and the process has no terminal of its own."""
    put(desk_, make_bundle(some(pairs, "apiserver")))
    ours, theirs = pty.openpty()
    os.write(ours, b"yes\n")
    command = ["setsid", "--wait", *desk_.command("sign", desk_.inbox, "-o", desk_.outbox, "--approve")]
    run = subprocess.run(command, stdin=theirs, capture_output=True, text=True, check=False, timeout=400)
    os.close(ours)
    os.close(theirs)
    assert run.returncode == 0, run.stderr
    assert "sign apiserver?" in run.stderr
    assert len(desk_.issued()) == 1


def test_a_person_at_the_terminal_is_one_approver(desk_: Desk, pairs: Pairs) -> None:
    """Where the policy wants an approval, a listed login's yes is one of them; another login's, or one of two, is not enough."""
    put(desk_, make_bundle(some(pairs, "apiserver")))
    policy = desk_.policy.read_text().replace("[allow]", '[allow]\napproval = "required"')
    found = {}
    for rules in (
        '["alice"]',
        f'["{_login()}", "alice"]\ncount = 2',
        f'["{_login()}"]\nevidence = "signature"',
        f'["{_login()}"]',
    ):
        desk_.policy.write_text(f"{policy}\n[approvals]\napprovers = {rules}\n")
        code, _ = _at_a_terminal(desk_, ["yes"], "sign", desk_.inbox, "-o", desk_.outbox, "--approve")
        found[rules] = (code, len(desk_.issued()))

    assert [*found.values()] == [(Exit.WAITING, 0)] * 3 + [(Exit.DONE, 1)]


def _login() -> str:
    """The name that the desk has for who is at the terminal."""
    doer = audit.who()
    return doer.get("login") or os.environ.get("SUDO_USER") or doer["user"]


def test_a_person_says_no(desk_: Desk, pairs: Pairs) -> None:
    """The node gets the reason; the next bundle is asked for by itself."""
    bundles = sorted((make_bundle(some(pairs, "apiserver")) for _ in range(2)), key=request_file_name)
    for bundle in bundles:
        put(desk_, bundle)

    code, seen = _at_a_terminal(
        desk_, ["no", "no call came", "yes"], "sign", desk_.inbox, "-o", desk_.outbox, "--approve"
    )

    assert code == Exit.REFUSED, seen
    by_batch = {answer.batch: answer.answers["apiserver"] for answer in answers_of(desk_)}
    refused = by_batch[bundles[0].batch]
    assert isinstance(refused, Refusal)
    assert refused.reason.startswith("not approved: no call came (")
    assert isinstance(by_batch[bundles[1].batch], Issued)


def test_a_person_decides_later(desk_: Desk, pairs: Pairs) -> None:
    """The bundle stays, and the exit code says that it waits."""
    path = put(desk_, make_bundle(some(pairs, "apiserver")))

    code, seen = _at_a_terminal(desk_, ["later"], "sign", desk_.inbox, "-o", desk_.outbox, "--approve")

    assert code == Exit.WAITING, seen
    assert path.exists()
    assert desk_.issued() == []


def test_without_a_terminal_no_request_is_approved(desk_: Desk, pairs: Pairs) -> None:
    """Cron can't say yes."""
    put(desk_, make_bundle(some(pairs, "apiserver")))
    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox, "--approve")

    assert run.returncode == Exit.FAILED
    assert "wanted a terminal to ask on" in run.stderr
    assert desk_.issued() == []


# --- kubeadm's own CSRs -----------------------------------------------------------------------------------------------

RULES = (
    POLICY
    + """
[certificate.apiserver]
sans = ["{node}", "kubernetes", ".default", ".svc", ".local", ".example.com", "*.wild.example.com", "0.0.0.0/0", "::/0"]
[certificate.etcd-server]
sans = ["{node}", "localhost", "0.0.0.0/0", "::/0"]
[certificate.etcd-peer]
sans = ["{node}", "localhost", "0.0.0.0/0", "::/0"]
[certificate."kubelet.conf"]
groups = ["system:nodes"]
"""
)


def waived(names: Iterator[str] | list[str]) -> list[str]:
    return [word for name in names for word in ("--without-proof", name)]


def test_a_flat_directory_of_csrs(tmp_path: Path, pki: Pki, pairs: Pairs) -> None:
    """Names side by side, as `renew --csr-only` writes them; each needs its own leave to do without a proof."""
    desk_ = make_desk(tmp_path / "desk", pki, policy=RULES)
    csrs = tmp_path / "csrs"
    csrs.mkdir()
    for name, (old, _) in pairs.items():
        (csrs / f"{name}.csr").write_bytes(new_csr(old).public_bytes(Encoding.PEM))
        (csrs / f"{name}.key").write_text("not for the desk")
    who = ["--node", "cp-1", "--cluster", "kubernetes"]

    assert "--node and --cluster" in desk_.run("sign", csrs).stderr
    refused = desk_.run("sign", csrs, *who, *waived(["apiserver"]))
    assert refused.returncode == Exit.REFUSED
    assert [path.name for path in csrs.glob("*.crt")] == ["apiserver.crt"]
    run = desk_.run("sign", csrs, *who, *waived(list(pairs)), "-o", tmp_path / "out")

    assert run.returncode == 0, run.stderr
    count = len(desk_.issued())
    assert desk_.run("sign", csrs, *who, *waived(list(pairs)), "-o", tmp_path / "out").returncode == 0
    assert len(desk_.issued()) == count == 13
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{name}.crt" for name in pairs}
    for name in pairs:
        leaf = x509.load_pem_x509_certificate((tmp_path / "out" / f"{name}.crt").read_bytes())
        asked = x509.load_pem_x509_csr((csrs / f"{name}.csr").read_bytes())
        assert leaf.public_key() == asked.public_key()


@pytest.mark.attack("N7")
@pytest.mark.skipif(os.geteuid() != 0, reason="makes another user's link")
@pytest.mark.parametrize("swapped", ["pki", "pki/etcd", ""])
def test_a_link_that_was_put_there_meanwhile_leads_nowhere(tmp_path: Path, pairs: Pairs, swapped: str) -> None:
    """The directory is another user's, who puts a link in its place while the CA signs; without one the answer is there."""
    csrs, own = tmp_path / "csrs", tmp_path / "own"
    (csrs / "pki/etcd").mkdir(parents=True)
    own.mkdir(mode=0o700)
    old, _ = pairs["etcd-server"]
    (csrs / "pki/etcd/server.csr").write_bytes(new_csr(old).public_bytes(Encoding.PEM))
    found = csr_directory.load(csrs, node="cp-1", cluster="kubernetes", validity=VALIDITY, created=datetime.now(UTC))
    for path in (csrs, csrs / "pki", csrs / "pki/etcd"):
        os.chown(path, 65534, 65534)
    if swapped:
        (csrs / swapped).rename(tmp_path / "away")
        (csrs / swapped).symlink_to(own)
        os.lchown(csrs / swapped, 65534, 65534)

    with (
        pytest.raises(csr_directory.CsrDirectoryError, match="wanted no link") if swapped else contextlib.nullcontext()
    ):
        csr_directory.deliver(found, csrs, {"etcd-server": Issued(leaf=old)}, None)

    assert list(own.iterdir()) == []
    assert (csrs / "pki/etcd/server.crt").exists() == (not swapped)


def test_what_is_due_is_signed_again_for_the_same_csr(tmp_path: Path, pki: Pki, pairs: Pairs) -> None:
    """A year later the same CSRs of kubeadm are signed again."""
    desk_ = make_desk(tmp_path / "desk", pki, policy=RULES)
    settings = desk_.config.read_text()
    (tmp_path / "csrs").mkdir()
    (tmp_path / "csrs/apiserver.csr").write_bytes(new_csr(pairs["apiserver"][0]).public_bytes(Encoding.PEM))
    command: list[str | Path] = [
        "sign",
        tmp_path / "csrs",
        "--node",
        "cp-1",
        "--cluster",
        "kubernetes",
        *waived(["apiserver"]),
    ]
    counts = []
    for text in ('[renewal]\nvalidity = "20d"\nbefore = "10d"\n', "", ""):
        desk_.config.write_text(f"{settings}\n{text}")
        assert desk_.run(*command).returncode == 0
        counts.append(len(desk_.issued()))

    assert counts == [1, 2, 2]


@pytest.mark.attack("N14")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may put a file in the place of a device")
def test_an_answer_takes_no_other_files_place(desk_: Desk, pairs: Pairs, tmp_path: Path) -> None:
    """A device, a link, another node's answer, or any other file stays as it is; an older answer to the same bundle is written again."""
    (tmp_path / "b.json").write_bytes(dumps(make_bundle(some(pairs, "apiserver"))))
    answer, link, other = tmp_path / "a.json", tmp_path / "link", tmp_path / "notes"
    other.write_text("mine")
    link.symlink_to(answer)
    (tmp_path / "b9.json").write_bytes(dumps(make_bundle(some(pairs, "etcd-peer"), node="cp-9")))
    desk_.run("sign", tmp_path / "b9.json", "-o", tmp_path / "a9.json")  # a refusal, as the certificate is cp-1's
    others = (tmp_path / "a9.json").read_bytes()
    for taken in (Path("/dev/null"), link, other, tmp_path / "b.json", tmp_path / "a9.json"):
        run = desk_.run("sign", tmp_path / "b.json", "-o", taken)
        assert (run.returncode, "wanted no file, or an answer bundle of before" in run.stderr) == (1, True), taken
    assert (other.read_text(), Path("/dev/null").is_char_device(), desk_.issued()) == ("mine", True, [])
    assert (tmp_path / "a9.json").read_bytes() == others

    assert [desk_.run("sign", tmp_path / "b.json", "-o", answer).returncode for _ in range(2)] == [0, 0]
    assert desk_.run("sign", tmp_path / "b.json", "-o", link).returncode == 1
    assert link.is_symlink()


@pytest.mark.attack("N19")
def test_a_request_that_another_backend_had_is_asked_for_anew(desk_: Desk, pairs: Pairs) -> None:
    """The CA of before answered later; the one of today can't be asked later, and knows nothing of it."""
    bundle = make_bundle(some(pairs, "apiserver"))
    put(desk_, bundle)
    desk_.state.mkdir(mode=0o700, exist_ok=True)
    journal = Journal(desk_.state / "desk-answers.jsonl", datetime.now(UTC))
    journal.add([(sign_request(bundle.requests[0], bundle), Pending(reference="R-1", note="at the CA"))])

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert (run.returncode, len(desk_.issued())) == (0, 1), run.stderr
    assert [list(answer.answers) for answer in answers_of(desk_)] == [["apiserver"]]


def test_bundles_below_the_inbox_are_reported(desk_: Desk, pairs: Pairs) -> None:
    """Nothing would ever be signed, and each run say 0; an inbox that is empty, with an empty directory in it, is fine."""
    (desk_.inbox / "stick").mkdir()
    assert desk_.run("sign", desk_.inbox, "-o", desk_.outbox).returncode == 0
    (desk_.inbox / "stick/b.json").write_bytes(dumps(make_bundle(some(pairs, "apiserver"))))
    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)
    assert (run.returncode, "wanted request bundles in the inbox itself" in run.stderr) == (1, True)
    assert desk_.run("sign", desk_.inbox / "stick", "-o", desk_.outbox).returncode == 0


def test_an_inbox_that_is_not_mounted_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty directory in the place of a file system looks like an inbox without bundles; the root is always mounted."""
    inbox = tmp_path / "media/in box"
    inbox.mkdir(parents=True)
    monkeypatch.setattr(files, "FSTAB", tmp_path / "fstab")
    files._assert_mounted(inbox)
    (tmp_path / "fstab").write_text(f"# comment\n\nUUID=1 / ext4\nUUID=2 {tmp_path}/other ext4 defaults\n")
    files._assert_mounted(inbox)
    (tmp_path / "fstab").write_text(f"UUID=1 {tmp_path}/media vfat noauto\n")
    with pytest.raises(BridgeError, match="it is not mounted"):
        files._assert_mounted(inbox)
    (tmp_path / "fstab").write_text(f"/data {tmp_path}/media/in\\040box none bind\n")
    monkeypatch.setattr(paths, "MOUNTS", tmp_path / "mounts")
    line = "36 35 98:0 /data {} rw master:1 - ext4 /dev/sda1 rw\n"
    for place, is_mounted in (("media/in\\040box", True), ("media", False)):
        (tmp_path / "mounts").write_text(line.format(tmp_path / place))
        with contextlib.nullcontext() if is_mounted else pytest.raises(BridgeError, match="it is not mounted"):
            files._assert_mounted(inbox)
    # by a link; and a mount whose server is gone is not looked at
    (tmp_path / "link").symlink_to(inbox)
    (tmp_path / "fstab").write_text(f"server:/a {tmp_path}/hung nfs4\n/data {tmp_path}/link none bind\n")
    (tmp_path / "mounts").write_text(line.format(tmp_path / "hung"))
    look = os.lstat

    def hangs(path: str, **more: Any) -> os.stat_result:
        assert Path(path).name != "hung"
        return look(path, **more)

    monkeypatch.setattr(os, "lstat", hangs)
    with pytest.raises(BridgeError, match="it is not mounted"):
        files._assert_mounted(inbox)
    (tmp_path / "mounts").write_text(line.format(tmp_path / "hung") + line.format(tmp_path / "media/in\\040box"))
    files._assert_mounted(inbox)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PermissionError(13, "Permission denied"), Exit.UNAVAILABLE, "Permission denied"),
        (KeyError("s3cret"), Exit.FAILED, "found KeyError at"),
    ],
)
def test_a_backend_that_fails_by_itself_is_the_trouble_of_its_own_requests(
    desk_: Desk,
    pairs: Pairs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    said: str,
) -> None:
    """A directory without permission is no refusal of the request, and the other CAs' certificates are signed."""
    real = openssl.OpensslBackend.sign_many

    def sign_many(self: Any, requests: Any) -> Any:
        if requests[0].spec.authority.name == "etcd-ca":
            raise error
        return real(self, requests)

    monkeypatch.setattr(openssl.OpensslBackend, "sign_many", sign_many)
    names = ["apiserver", "etcd-server"]
    for name in names:
        put(desk_, make_bundle(some(pairs, name)))
    with pytest.raises(SystemExit) as ended:
        app(["sign", str(desk_.inbox), "-o", str(desk_.outbox), "--config", str(desk_.config)])

    assert (ended.value.code, said in capsys.readouterr().err) == (code, True)
    assert [list(answer.answers) for answer in answers_of(desk_)] == [["apiserver"]]


def test_no_further_window_is_begun_after_an_interruption(
    desk_: Desk, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends a run, and no CA is asked for the windows behind."""
    begun = list[object]()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(desk, "windows", lambda jobs, *_: ([job] for job in jobs))
    doubles = {
        "judged": lambda _, job: job,
        "_sign": lambda _, window, __: begun.append(window),
        "_finish": interrupted,
    }
    for name, double in doubles.items():
        monkeypatch.setattr(desk.Desk, name, double)
    settings, bundle = load(desk_.config), make_bundle(some(pairs, "apiserver"))
    jobs = [desk.Job(bundle=bundle, digest="", label="", delivery=no_delivery) for _ in range(9)]
    one = desk.Desk(settings, files.load_policy(settings, desk_.policy), lambda: datetime.now(UTC))
    nothing: Any = None
    with contextlib.closing(one), pytest.raises(KeyboardInterrupt):
        one.run(jobs, nothing, nothing, nothing)

    assert len(begun) <= 3  # none, the first, and perhaps the second, which may begin before the first is delivered


def test_all_cas_are_reached_at_the_same_time(desk_: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several CAs that hang, a door's round waits for one time limit, and not for the sum of all."""
    settings, together = load(desk_.config), threading.Barrier(len(AUTHORITIES), timeout=60)
    one = desk.Desk(settings, files.load_policy(settings, desk_.policy), lambda: datetime.now(UTC))
    open_ = desk.Desk._open

    def open_together(self: desk.Desk, name: str) -> object:
        together.wait()
        return open_(self, name)

    monkeypatch.setattr(desk.Desk, "_open", open_together)
    with contextlib.closing(one):
        one.open_all()
        assert one.troubles() == {}
        assert all(one.certificates(name) for name in AUTHORITIES)
        one.open_all()  # all were reached


def lots_of(jobs: Iterable[desk.Job]) -> Iterator[list[desk.Job]]:
    return desk.windows(jobs, desk.size_of, desk._WINDOW, desk._LARGEST_WINDOW_BYTES)


def test_a_window_is_bounded_by_bytes(pairs: Pairs) -> None:
    """Large bundles are signed a few at a time, so that a thousand of them are not in memory; small ones together."""
    bundle, nowhere = make_bundle(some(pairs, "apiserver")), desk.Delivery(where="", files=(), conclude=lambda: None)
    for size, windows in ((1 << 20, [2] * 5), (1 << 10, [10])):
        one = partial(desk.Job, bundle=bundle, digest="", label="", delivery=lambda *_: nowhere, size_bytes=size)
        jobs = [one() for _ in range(10)]
        assert [len(window) for window in lots_of(jobs)] == windows


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_csrs_that_are_taken_for_an_inbox_are_reported(
    tmp_path: Path, desk_: Desk, pairs: Pairs, options: list[str]
) -> None:
    """A forgotten option is never exit 0."""
    (tmp_path / "csrs/pki").mkdir(parents=True)
    (tmp_path / "csrs/pki/apiserver.csr").write_bytes(new_csr(pairs["apiserver"][0]).public_bytes(Encoding.PEM))

    run = desk_.run("sign", tmp_path / "csrs", "-o", desk_.outbox, *options)

    assert run.returncode == Exit.FAILED
    assert "--node and --cluster" in run.stderr


def test_a_directory_with_other_csrs_is_refused_as_a_whole(tmp_path: Path, desk_: Desk, pairs: Pairs) -> None:
    """All that is odd is named at once."""
    csrs = tmp_path / "csrs"
    (csrs / "pki").mkdir(parents=True)
    good = new_csr(pairs["apiserver"][0]).public_bytes(Encoding.PEM)
    (csrs / "apiserver.csr").write_bytes(good)
    (csrs / "pki/apiserver.csr").write_bytes(good)
    (csrs / "unknown.csr").write_bytes(good)
    (csrs / "admin.conf.csr").write_text("x")
    (csrs / "etcd-peer.csr").write_bytes(good + good)

    run = desk_.run("sign", csrs, "--node", "cp-1", "--cluster", "kubernetes")

    assert run.returncode == Exit.FAILED
    for words in ("wanted one CSR for apiserver", "unknown.csr: this is none of kubeadm's names", "admin.conf.csr: wanted",
                  "etcd-peer.csr: wanted one PEM block"):  # fmt: skip
        assert words in run.stderr
    assert desk_.issued() == []


def test_a_directory_that_can_not_be_listed_is_refused_as_a_whole(
    tmp_path: Path, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kubeadm makes `pki/etcd` for root alone: the desk's user would sign the rest, and end well."""
    scandir = os.scandir

    def denied(place: str | os.PathLike[str] = ".") -> Iterator[os.DirEntry[str]]:
        if Path(place).name == "etcd":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
        return scandir(place)

    (tmp_path / "pki/etcd").mkdir(parents=True)
    (tmp_path / "pki/apiserver.csr").write_bytes(new_csr(pairs["apiserver"][0]).public_bytes(Encoding.PEM))
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(csr_directory.CsrDirectoryError, match="pki/etcd: can't look for CSRs: Permission"):
        csr_directory.load(tmp_path, node="cp-1", cluster="k", validity=VALIDITY, created=datetime.now(UTC))


@pytest.mark.kube("kubeadm")
def test_what_kubeadm_generates(tmp_path: Path) -> None:
    """The nested layout of 1.37: kubeadm finds nothing wrong with the result, kubeconfigs are as it writes them."""
    pki = kubeadm_pki(tmp_path / "pki")
    pki.run_kubeadm("certs", "generate-csr", "--kubeconfig-dir", "/new", "--cert-dir", "/new/pki")
    new = pki.root / "new"
    names = [name for name in SPECS if csr_directory.find(new)]
    desk_ = make_desk(tmp_path / "desk", pki, policy=RULES)

    run = desk_.run("sign", new, "--node", "cp-1", "--cluster", "kubernetes", *waived(names))

    assert run.returncode == 0, run.stderr
    for authority in AUTHORITIES.values():
        (new / "pki" / authority.certificate_file).write_bytes(pki.ca_pem(authority.name)[0])
    for name in ("admin.conf", "kubelet.conf", "scheduler.conf", "controller-manager.conf", "super-admin.conf"):
        found = kubeconfig.parse((new / name).read_bytes())
        key = load_pem_private_key(kubeconfig.key_data((new / name).read_bytes()) or b"", None)
        leaf = x509.load_pem_x509_certificate(found.certificate_data or b"")
        assert leaf.public_key() == key.public_key()
        assert found.ca_data == pki.ca_pem("ca")[0]
        assert (new / name).stat().st_mode & 0o777 == 0o600
        lines = [re.sub(r"data: .*", "data", line) for line in (new / name).read_text().splitlines()]
        old = [re.sub(r"data: .*", "data", line) for line in (pki.kubeconfig_dir / name).read_text().splitlines()]
        assert [line for line in lines if "server:" not in line] == [line for line in old if "server:" not in line]
    old_dir = pki.kubeconfig_dir.rename(pki.root / "old")
    new.rename(pki.kubeconfig_dir)
    for name in ("sa.key", "sa.pub"):
        (pki.pki_dir / name).write_bytes((old_dir / "pki" / name).read_bytes())
    pki.run_kubeadm("init", "phase", "certs", "all")
    pki.run_kubeadm("init", "phase", "kubeconfig", "all")
    expiration = pki.run_kubeadm("certs", "check-expiration").stdout
    assert expiration.count("364d") >= 11


@pytest.mark.kube("kubeadm-1.20")
def test_what_kubeadm_of_old_asks_for(tmp_path: Path) -> None:
    """The flat layout of 1.20, with the groups that it gave."""
    pki = kubeadm_pki(tmp_path / "pki", version="1.20", external=False)
    pki.run_kubeadm("certs", "renew", "all", "--csr-only", "--csr-dir", "/csrs")
    names = [path.stem for path in csr_directory.find(pki.root / "csrs")]
    masters = '["admin.conf", "apiserver-kubelet-client", "apiserver-etcd-client", "etcd-healthcheck-client"]'
    policy = re.sub(r"masters = .*", f"masters = {masters}", RULES)
    desk_ = make_desk(tmp_path / "desk", pki, policy=policy)
    who = ["--node", "cp-1", "--cluster", "kubernetes"]

    run = desk_.run("sign", pki.root / "csrs", *who, *waived(names))

    assert run.returncode == 0, run.stderr
    assert len(names) == 10
    for name in names:
        leaf = x509.load_pem_x509_certificate((pki.root / "csrs" / f"{name}.crt").read_bytes())
        key = load_pem_private_key((pki.root / "csrs" / f"{name}.key").read_bytes(), None)
        assert leaf.public_key() == key.public_key()


def test_a_kubeconfig_with_another_key_is_not_completed(tmp_path: Path, pki: Pki, pairs: Pairs) -> None:
    """The program never joins a certificate and a key that don't belong together."""
    desk_ = make_desk(tmp_path / "desk", pki, policy=RULES)
    csrs = tmp_path / "csrs"
    csrs.mkdir()
    (csrs / "admin.conf.csr").write_bytes(new_csr(pairs["admin.conf"][0]).public_bytes(Encoding.PEM))
    (csrs / "admin.conf").write_bytes((pki.kubeconfig_dir / "admin.conf").read_bytes())

    run = desk_.run("sign", csrs, "--node", "cp-1", "--cluster", "kubernetes", *waived(["admin.conf"]))

    assert run.returncode == Exit.FAILED
    assert "found another one" in run.stderr
    assert (csrs / "admin.conf").read_bytes() == (pki.kubeconfig_dir / "admin.conf").read_bytes()


@pytest.mark.attack("N5")
@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"[" + b"[]," * 340_000 + b"[]]", "at most 100000 values"),
        (b"a: &a {k: v}\n<<: [*a, *a, *a]\n", "a merge key"),
    ],
)
def test_a_kubeconfig_beside_a_csr_keeps_no_desk_busy(
    tmp_path: Path, pki: Pki, pairs: Pairs, text: bytes, found: str
) -> None:
    """A megabyte of empty lists would take a minute to become values; merge keys, in older versions of PyYAML, all memory."""
    desk_ = make_desk(tmp_path / "desk", pki, policy=RULES)
    csrs = tmp_path / "csrs"
    csrs.mkdir()
    (csrs / "admin.conf.csr").write_bytes(new_csr(pairs["admin.conf"][0]).public_bytes(Encoding.PEM))
    (csrs / "admin.conf").write_bytes(text)
    run = desk_.run("sign", csrs, "--node", "cp-1", "--cluster", "kubernetes", *waived(["admin.conf"]))

    assert run.returncode == Exit.FAILED
    assert found in run.stderr


# --- what is installed with the program -------------------------------------------------------------------------------


def test_the_example_settings_are_settings() -> None:
    """All three CAs, with `openssl ca`."""
    settings = load(Path(__file__).parents[2] / "config/desk/config.toml")
    assert {one.type_name for one in registry.configured(settings, AUTHORITIES).values()} == {"openssl"}


@pytest.mark.parametrize("unit", ["ca-bridge-desk.service", "ca-bridge-desk.timer"])
def test_the_example_units_are_units(unit: str) -> None:
    """systemd finds nothing wrong with them, where it is there to ask; the command is one that there is."""
    path = Path(__file__).parents[2] / "config/desk" / unit
    analyze = programs.find("systemd-analyze")
    if analyze is not None:
        run = subprocess.run([analyze, "verify", path], capture_output=True, text=True, check=False)
        assert "Unknown" not in run.stderr
    text = path.read_text()
    assert "ExecStart=/usr/bin/ca-bridge sign /srv/desk/inbox -o /srv/desk/outbox" in text or "OnCalendar" in text


def test_the_example_crontab_is_quiet(desk_: Desk, pairs: Pairs) -> None:
    """cron mails nothing with a bundle or without one; a refusal it mails."""
    text = (Path(__file__).parents[2] / "config/desk/crontab").read_text().splitlines()[-1]
    command = text.split(maxsplit=6)[6].replace("/srv/desk", str(desk_.directory))
    program, *_, config = desk_.command()
    command = command.replace("/usr/bin/ca-bridge sign", f"{program} sign --config {config}")

    def mailed() -> str:
        run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
        return run.stdout + run.stderr

    assert mailed() == ""
    put(desk_, make_bundle(some(pairs, "apiserver")))
    assert mailed() == ""
    assert len(answers_of(desk_)) == 1
    put(desk_, changed(make_bundle(some(pairs, "apiserver")), "apiserver", proof=None))
    assert "there is no continuity proof" in mailed()


def test_progress_tells_the_rate_and_what_is_left() -> None:
    """The rate and the time left come from the bundles so far."""
    observer = cli_desk._Observer(1000, [])
    observer.seen, observer._certificates, observer._begin = 250, 2500, 100.0

    assert observer._text(150.0) == "250 of 1000 bundles, 2500 certificates (50/s), about 0:02:30 left"


def windows(sizes: list[int]) -> list[list[int]]:
    """How bundles with so many requests are put together."""

    def job(size: int) -> Any:
        return SimpleNamespace(size_bytes=0, bundle=SimpleNamespace(requests=[0] * size))

    return [[len(one.bundle.requests) for one in window] for window in lots_of(map(job, sizes))]


def test_windows_have_a_limit_and_lose_nothing() -> None:
    """Memory does not depend on the number of bundles."""
    made = windows([10] * 2000)

    assert sum(map(sum, made)) == 20_000
    assert {sum(window) for window in made} == {desk._WINDOW}
    assert windows([]) == []
