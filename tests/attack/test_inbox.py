"""A user who may write into the desk's inbox gets none of the desk's files, makes none elsewhere, and stops no other request."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from backends.openssl import OpensslBackend
from bridge.contract import Issued
from bridge.desk.desk import Desk as Run
from bridge.desk.desk import Job
from bridge.desk.files import Options, Session, load_policy
from bridge.errors import Exit
from bridge.node.sample_pki import Cluster, leaf_certificate
from bridge.pki.bundle import Refusal, RequestBundle
from bridge.pki.bundle_format import digest, dumps, loads_answer, request_file_name
from bridge.pki.certificates import serial_hex
from bridge.pki.csr import generate_key
from bridge.settings.load import load
from bridge.specs import SPECS
from bridge.testing import TestCA
from tests.counts import Tried
from tests.kit import forged
from tests.kit.bundles import make_bundle, old_pairs, proven
from tests.kit.desks import POLICY, Desk, make_desk
from tests.kit.pki import Pki, handmade_pki

#: Bundles that are forged, and a good one beside so many of them.
FORGED, BESIDE = 600, 60


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return handmade_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def desk_(tmp_path: Path, pki: Pki) -> Desk:
    return make_desk(tmp_path / "desk", pki)


@pytest.fixture
def bundle(pki: Pki) -> RequestBundle:
    return make_bundle(old_pairs(pki, ["apiserver"]))


def put(desk_: Desk, bundle: RequestBundle) -> Path:
    path = desk_.inbox / request_file_name(bundle)
    path.write_bytes(dumps(bundle))
    return path


def sign(desk_: Desk) -> int:
    return desk_.run("sign", desk_.inbox, "-o", desk_.outbox).returncode


def run_with(desk_: Desk, meanwhile: Callable[[], None]) -> None:
    """One run in this process; something happens in the inbox after a bundle was judged, and before it is signed."""
    settings, now = load(desk_.config), lambda: datetime.now(UTC)

    def approve(job: Job, text: str) -> tuple[bool | None, str]:
        del job, text
        meanwhile()
        return True, "me"

    policy = load_policy(settings, None)
    desk = Run(settings, policy, now, approve=approve)

    def passed_over(path: str, error: Exception) -> None:
        raise AssertionError(path) from error

    session = Session(settings, policy, Options(source=desk_.inbox, out=desk_.outbox), now, passed_over)
    with contextlib.closing(desk):
        assert session.run(desk, timedelta(), lambda _: contextlib.nullcontext(lambda *_: None)) == 1


def contents(directory: Path) -> Iterator[bytes]:
    for path in directory.rglob("*"):
        if path.is_file():
            yield path.read_bytes()


def test_a_link_in_the_archive_s_place_gets_nothing(desk_: Desk, bundle: RequestBundle, tmp_path: Path) -> None:
    """Nothing is written through `done` in the inbox, whatever it leads to."""
    (tmp_path / "his").mkdir()
    (desk_.inbox / "done").symlink_to(tmp_path / "his")
    put(desk_, bundle)

    assert sign(desk_) == Exit.FAILED  # the run reports the link
    assert list((tmp_path / "his").iterdir()) == []
    assert [path.name for path in desk_.archive.iterdir()] == [request_file_name(bundle)]


@pytest.mark.parametrize("how", ["link", "writable", "foreign", "below"])
def test_an_archive_that_others_can_change_is_refused(
    desk_: Desk, bundle: RequestBundle, tmp_path: Path, how: str
) -> None:
    """Such an archive is refused before anything is signed; a directory of the desk's own is taken."""
    archive, elsewhere = tmp_path / "archive", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if how == "link":
        archive.symlink_to(elsewhere)
    else:
        archive = archive / "below" if how == "below" else archive
        archive.mkdir(parents=True)
        archive.chmod(0o777 if how == "writable" else 0o755)
    if how == "below":
        archive.parent.chmod(0o777)
    if how == "foreign":
        if os.geteuid() != 0:
            pytest.skip("only root can give a directory away")
        os.chown(archive, 65534, 65534)
    put(desk_, bundle)

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox, "--archive", archive)
    assert run.returncode == Exit.FAILED
    assert "that no other user can write to" in run.stderr
    assert (desk_.issued(), list(elsewhere.iterdir())) == ([], [])
    assert desk_.run("sign", desk_.inbox, "-o", desk_.outbox, "--archive", elsewhere).returncode == 0


@pytest.mark.parametrize("how", ["link", "file"])
def test_what_was_judged_is_archived(desk_: Desk, bundle: RequestBundle, tmp_path: Path, how: str) -> None:
    """The archive gets the judged bytes, not the file that lies under the bundle's name by then, be it a link to the CA's key."""
    path, secret = put(desk_, bundle), tmp_path / "ca.key"
    secret.write_bytes(b"the CA's key")

    def swap() -> None:
        path.unlink()
        if how == "link":
            path.symlink_to(secret)
        else:
            path.write_bytes(b"another file")

    run_with(desk_, swap)

    [kept] = desk_.archive.iterdir()
    assert kept.read_bytes() == dumps(bundle)
    assert not any(b"the CA's key" in data for data in (*contents(desk_.outbox), *contents(desk_.archive)))
    assert path.is_symlink() or path.read_bytes() == b"another file"


def test_an_archived_request_is_the_desk_s_own(desk_: Desk, bundle: RequestBundle) -> None:
    """A file that its sender still has open, or has another name for, is not the one in the archive."""
    path = put(desk_, bundle)
    os.link(path, desk_.directory / "his other name")

    with path.open("r+b") as his:
        assert sign(desk_) == 0
        his.write(b"rewritten")

    [kept] = desk_.archive.iterdir()
    assert kept.read_bytes() == dumps(bundle)
    assert (kept.stat().st_uid, kept.stat().st_nlink) == (os.geteuid(), 1)


def test_forged_bundles_do_not_delay_the_others(desk_: Desk, pki: Pki, tried: Tried) -> None:
    """Each good bundle is signed by the run that finds it among forged ones, whatever those are."""
    pairs, chance = old_pairs(pki, ["apiserver", "scheduler.conf"]), random.Random(910)  # noqa: S311 (the same ones in each run)
    bad = list(forged.crafted(make_bundle(pairs)))
    bad += forged.mutated(make_bundle(pairs), FORGED - len(bad), chance)
    assert len(set(bad)) > 500  # a mutation may hit on the same value again
    for start in range(0, len(bad), BESIDE):
        for number, data in enumerate(bad[start : start + BESIDE]):
            (desk_.inbox / f"{number:03}.json").write_bytes(data)
        good = make_bundle(old_pairs(pki, ["apiserver"]))
        put(desk_, good)

        run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

        assert "Traceback" not in run.stderr
        assert "internal error" not in run.stderr
        assert f"cp-1 (kubernetes): 1 signed: {desk_.outbox}" in run.stdout, run.stderr
        answers = [loads_answer(path.read_bytes()) for path in desk_.outbox.iterdir()]
        assert digest(good) in {answer.request_digest for answer in answers}
        for path in desk_.inbox.iterdir():
            path.unlink()
    tried("bundles that were forged, for a desk", FORGED)


def test_odd_things_in_the_outbox_do_not_stop_the_desk(desk_: Desk, bundle: RequestBundle, tmp_path: Path) -> None:
    """A file that looks like the rest of a killed run is removed, and anything else of that name is left alone."""
    put(desk_, bundle)
    begin = f".cp-1-{'0' * 32}.answer.json"
    (desk_.outbox / f"{begin}.y").mkdir()
    (desk_.outbox / f"{begin}.link").symlink_to(tmp_path / "nowhere")
    (desk_.outbox / f"{begin}.a1b2").write_bytes(b"{")

    assert sign(desk_) == 0
    names = {path.name for path in desk_.outbox.iterdir()}
    assert names > {f"{begin}.y", f"{begin}.link"}
    assert f"{begin}.a1b2" not in names


def test_a_damaged_line_in_the_journal_does_not_stop_the_desk(desk_: Desk, bundle: RequestBundle) -> None:
    """It is as if it had not been written; what stands before and behind it counts."""
    desk_.state.mkdir(mode=0o700)
    journal = desk_.state / "desk-answers.jsonl"
    lines = [b'{"key": "a", "added": "2099-01-01T00:00:00+00:00", "chain": ["x"]}', b"\xff\xfe", b"[]", b'{"key": 1}']
    journal.write_bytes(b"\n".join([*lines, b'{"key": "b", "asked": "2099-01-01T00:00:00+00:00"}', b""]))
    put(desk_, bundle)

    assert sign(desk_) == 0
    assert len(desk_.issued()) == 1


def test_a_request_is_signed_once(desk_: Desk, pki: Pki) -> None:
    """Handed in again, in its bundle or in another one, it gets the certificate of before, and the desk says so."""
    pairs = old_pairs(pki, ["apiserver", "scheduler.conf"])
    bundle = make_bundle(pairs)
    put(desk_, bundle)
    assert sign(desk_) == 0
    [first] = desk_.outbox.iterdir()
    answer = loads_answer(first.read_bytes())
    first.unlink()

    put(desk_, bundle)
    again = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)
    later = replace(bundle, requests=bundle.requests[:1], created=bundle.created + timedelta(days=1))
    part = proven(later, "apiserver", pairs["apiserver"][1], later.requests[0].csr)
    (desk_.directory / "part.json").write_bytes(dumps(part))
    other = desk_.run("sign", desk_.directory / "part.json", "-o", desk_.directory / "part.answer.json")

    assert (again.returncode, other.returncode) == (0, 0), other.stderr
    assert "2 signed before, the same certificates again: " in again.stdout
    assert "1 signed before, the same certificates again: " in other.stdout
    assert loads_answer(first.read_bytes()).answers == answer.answers
    given = loads_answer((desk_.directory / "part.answer.json").read_bytes()).answers
    assert given == {"apiserver": answer.answers["apiserver"]}
    assert len(desk_.issued()) == 2


def test_what_was_answered_and_is_lost_is_not_signed_again(desk_: Desk, bundle: RequestBundle) -> None:
    """Not even when the desk's own copy of the answer was damaged: the desk tells the node to make a new request."""
    put(desk_, bundle)
    assert sign(desk_) == 0
    for kept in (desk_.state / "desk-answered").iterdir():  # by its CSR and by its key
        kept.write_bytes(b"{")
    next(desk_.outbox.iterdir()).unlink()

    put(desk_, bundle)
    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox)

    assert run.returncode == Exit.REFUSED
    assert "wanted a request that was not answered before" in run.stderr
    assert len(desk_.issued()) == 1


def list_as_revoked(desk_: Desk, old: x509.Certificate) -> None:
    row = f"R\t301231235959Z\t261101000000Z,keyCompromise\t{serial_hex(old)}\tunknown\t/CN=kube-apiserver\n"
    (desk_.ca("ca") / "index.txt").write_text(row)


def test_a_proof_by_a_revoked_certificate_is_refused(desk_: Desk, pki: Pki) -> None:
    """The CA's own index lists it as revoked, and no option overrides that; the other certificates are signed."""
    bundle = make_bundle(old_pairs(pki, ["apiserver", "scheduler.conf"]))
    old = bundle.requests[0].replaces
    assert old is not None
    list_as_revoked(desk_, old)
    put(desk_, bundle)

    run = desk_.run("sign", desk_.inbox, "-o", desk_.outbox, "--without-proof", "apiserver")

    assert run.returncode == Exit.REFUSED
    assert (
        f"apiserver: refused: proof: wanted one by a certificate that is not revoked, found the revoked one with serial {serial_hex(old)}"
        in run.stderr
    )
    [path] = desk_.outbox.iterdir()
    assert isinstance(loads_answer(path.read_bytes()).answers["scheduler.conf"], Issued)
    assert len(desk_.issued()) == 2  # the revoked one's row, and one signature


def test_a_listed_certificate_is_revoked_though_its_ca_knows_it_no_more(
    desk_: Desk, bundle: RequestBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vault answers so for an ended certificate that it has tidied away, and lists its number still."""
    old = bundle.requests[0].replaces
    assert old is not None
    list_as_revoked(desk_, old)
    monkeypatch.setattr(OpensslBackend, "is_revoked", lambda *_: False)
    put(desk_, bundle)

    run_with(desk_, lambda: None)

    [path] = desk_.outbox.iterdir()
    refused = loads_answer(path.read_bytes()).answers["apiserver"]
    assert isinstance(refused, Refusal)
    assert "found the revoked one" in refused.reason
    assert len(desk_.issued()) == 1  # the revoked one's row


def test_a_revoked_number_is_the_ca_s_own(desk_: Desk) -> None:
    """A certificate of the former CA is a good proof, although this CA has revoked one of its own with the same number."""
    former, key, now = TestCA.make("former"), generate_key("ecdsa-p256"), datetime.now(UTC)
    begin, end = now - timedelta(days=1), now + timedelta(days=1)
    old = leaf_certificate(SPECS["apiserver"], key, former, Cluster(), not_before=begin, not_after=end)
    file = desk_.directory / "former.crt"
    file.write_bytes(former.certificate_pem)
    desk_.policy.write_text(POLICY.replace("[allow]", f'former_cas = {{ ca = "{file}" }}\n\n[allow]'))
    list_as_revoked(desk_, old)
    put(desk_, make_bundle({"apiserver": (old, key)}))

    assert sign(desk_) == Exit.DONE
