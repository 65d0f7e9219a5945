"""The exchange of files with a CA desk: a real `openssl ca` behind `ca-bridge sign`, and what may lie in a directory."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backends.exchange import ExchangeBackend, ExchangeSettings, _remove
from bridge.ca import registry
from bridge.contract import Continuity, Issued, Pending, SignRequest
from bridge.errors import BackendRefusedError, BackendUnavailableError, SettingsError
from bridge.pki import bundle, bundle_format
from bridge.pki.bundle import AnswerBundle
from bridge.settings.load import load, parse
from bridge.specs import AUTHORITIES, SPECS
from bridge.system.files import version
from bridge.testing import BackendConformance, TestCA, sign_request
from tests.kit import programs, warm
from tests.kit.issuing import Signer
from tests.kit.opensslca import make_ca_directory
from tests.kit.policies import ALL_NAMES

CA = TestCA.make()
SIGNER = Signer(certificate=CA.certificate, key=CA.key)
LIVE = {name: CA.leaf(SPECS[name]) for name in ("apiserver", "admin.conf", "front-proxy-client")}


def opened(directory: Path) -> ExchangeBackend:
    """With its two directories."""
    for name in ("outbox", "inbox"):
        (directory / name).mkdir(exist_ok=True)
    return ExchangeBackend.from_settings(ExchangeSettings(outbox=directory / "outbox", inbox=directory / "inbox"))


@pytest.mark.slow
class TestConformance(BackendConformance):
    """The suite that every backend passes, with the desk's cron job at the other end."""

    unsupported = frozenset({"issuers", "identity", "close"})
    patience = timedelta(minutes=2)

    @pytest.fixture(scope="class")
    @classmethod
    def place(cls, ca: TestCA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        """Outbox and inbox, and a process that empties the one and fills the other."""
        place = tmp_path_factory.mktemp("exchange")
        opened(place)
        make_ca_directory(place / "ca", ca.certificate_pem, ca.key_pem)
        tables = [
            f'[node]\nstate_dir = "{place / "state"}"',
            f'[backend.desk]\ntype = "openssl"\ndir = "{place / "ca"}"',
        ]
        tables += [f'[authority.{name}]\nbackend = "desk"' for name in AUTHORITIES]
        (place / "config.toml").write_text("\n\n".join(tables))
        (place / "desk-policy.toml").write_text(ALL_NAMES)
        command = [str(Path(sys.executable).with_name("ca-bridge")), "sign", str(place / "outbox")]
        command += ["-o", str(place / "inbox"), "--config", str(place / "config.toml")]
        over = threading.Event()

        def desk() -> None:
            while not over.wait(0.05):
                if any((place / "outbox").glob("*.json")):
                    warm.shared().run(command, timeout=400)

        thread = threading.Thread(target=desk)
        thread.start()
        yield place
        over.set()
        thread.join()

    @pytest.fixture
    def backend(self, place: Path) -> ExchangeBackend:
        """A node's end."""
        return opened(place)

    @pytest.fixture
    def dead_backend(self, tmp_path: Path) -> ExchangeBackend:
        """The medium is not mounted."""
        settings = ExchangeSettings(outbox=tmp_path / "no/outbox", inbox=tmp_path / "no/inbox")
        return ExchangeBackend.from_settings(settings)


# --- what may lie in the directories ----------------------------------------------------------------------------------


def asked(name: str = "apiserver", batch: str = "ab" * 16, node: str = "cp-1") -> SignRequest:
    """Without a proof."""
    who = Continuity(batch=batch, node=node, cluster="kubernetes", proof=None, asked=datetime(2026, 1, 31, tzinfo=UTC))
    request = sign_request(LIVE[name], SPECS[name], "ecdsa-p256", timedelta(days=365))
    return dataclasses.replace(request, continuity=who)


def now() -> datetime:
    return datetime.now(UTC)


def issue(request: SignRequest) -> Issued:
    return SIGNER.issue(request, begin=now() - timedelta(minutes=5), end=now() + timedelta(days=365))


def pending(answer: object) -> Pending:
    assert isinstance(answer, Pending)
    return answer


def answer_to(directory: Path, answers: dict[str, Issued | bundle.Refusal], **changes: object) -> AnswerBundle:
    """To the only bundle in the outbox."""
    [path] = (directory / "outbox").iterdir()
    asked_for = bundle_format.loads_request(path.read_bytes())
    answer = AnswerBundle(
        request_digest=bundle_format.digest(asked_for),
        batch=asked_for.batch,
        node=asked_for.node,
        cluster=asked_for.cluster,
        signer="desk-1",
        signed=now().replace(microsecond=0),
        answers=answers,
    )
    return dataclasses.replace(answer, **changes)  # type: ignore[arg-type]


def put(directory: Path, name: str, answer: AnswerBundle) -> Path:
    path = directory / "inbox" / name
    path.write_bytes(bundle_format.dumps(answer))
    return path


def test_one_bundle_for_a_batch(tmp_path: Path) -> None:
    """The person who carries it can read it, it is named after the node, and each request knows the bundle to look for."""
    requests = [asked("apiserver"), asked("admin.conf")]
    answers = [pending(one) for one in opened(tmp_path).sign_many(requests)]
    [path] = (tmp_path / "outbox").iterdir()
    written = bundle_format.loads_request(path.read_bytes())
    assert path.name == bundle_format.request_file_name(written)
    assert path.name.startswith("cp-1-")
    assert path.stat().st_mode & 0o777 == 0o644
    assert [one.csr for one in written.requests] == [one.csr for one in requests]
    assert {one.reference for one in answers} == {bundle_format.digest(written)}
    assert answers[0].note == f"{path} is to be carried out, fingerprint {bundle_format.short_fingerprint(written)}"


def test_the_answer_is_taken_whatever_it_is_called(tmp_path: Path) -> None:
    """The answer counts under any file name, the request is removed if it still lies there, and the inbox stays as it is."""
    backend, request = opened(tmp_path), asked()
    reference = pending(backend.sign(request)).reference
    issued = issue(request)
    path = put(tmp_path, "from the CA (2).json", answer_to(tmp_path, {"apiserver": issued}))
    assert opened(tmp_path).collect(request, reference) == issued
    assert backend.collect(request, reference) == issued
    backend.accepted(request, reference)
    assert not list((tmp_path / "outbox").iterdir())
    assert path.exists()


def test_installed_answers_are_put_away(tmp_path: Path) -> None:
    """All of this request, itself in the outbox too, and nothing else; a file that took the place of one meanwhile stays."""
    backend, request = opened(tmp_path), asked()
    reference = pending(backend.sign(request)).reference
    answer = answer_to(tmp_path, {"apiserver": issue(request)})
    paths = [put(tmp_path, f"{number}.json", answer) for number in range(2)]
    other = put(tmp_path, "other.json", dataclasses.replace(answer, request_digest="0" * 64))
    half = tmp_path / "inbox/half.json"
    half.write_bytes(bundle_format.dumps(answer)[:-3])

    opened(tmp_path).put_away(f"{1:064x}")
    assert all(path.exists() for path in [*paths, other, half])
    assert list((tmp_path / "outbox").iterdir())
    _remove(paths[0], version(other.lstat()))
    assert paths[0].exists()
    backend.put_away(reference)
    backend.put_away(reference)
    assert sorted((tmp_path / "inbox").iterdir()) == [half, other]
    assert not list((tmp_path / "outbox").iterdir())


def test_a_half_copied_answer_is_left_alone_until_it_is_whole(tmp_path: Path) -> None:
    """A half-copied answer of any length is left alone, and named meanwhile."""
    backend, request = opened(tmp_path), asked()
    reference = pending(backend.sign(request)).reference
    issued = issue(request)
    data = bundle_format.dumps(answer_to(tmp_path, {"apiserver": issued}))
    path = tmp_path / "inbox/a.json"
    for length in (0, 1, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:length])
        assert f"{path} is not whole yet" in pending(backend.collect(request, reference)).note
    path.write_bytes(data)
    assert backend.collect(request, reference) == issued


@pytest.mark.attack("N5")
def test_a_full_inbox_delays_a_run_by_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One look reads so many files; ours by its name is among them, and under another name it is found by a later look."""
    monkeypatch.setattr("backends.exchange._MOST_FILES", 20)
    backend, request = opened(tmp_path), asked()
    reference = pending(backend.sign(request)).reference
    for number in range(50):
        (tmp_path / f"inbox/zz-{number}.json").write_bytes(b"[" + b"[]," * 100 + b"[]]")
    assert "holds more than one look reads (50 files)" in pending(backend.collect(request, reference)).note
    issued = issue(request)
    path = put(tmp_path, "cp-1-x.answer.json", answer_to(tmp_path, {"apiserver": issued}))
    os.utime(path, (1, 1))
    assert opened(tmp_path).collect(request, reference) == issued
    path.rename(tmp_path / "inbox/another-name.json")
    looks = [backend.collect(request, reference) for _ in range(3)]
    assert ([isinstance(one, Issued) for one in looks], looks[-1]) == ([False, True, True], issued)


def test_a_changed_byte_is_named(tmp_path: Path) -> None:
    """The request waits on, and the message names the damaged file."""
    backend, request = opened(tmp_path), asked()
    reference = pending(backend.sign(request)).reference
    path = put(tmp_path, "a.json", answer_to(tmp_path, {"apiserver": issue(request)}))
    path.write_bytes(path.read_bytes().replace(b'"desk-1"', b'"desk-2"'))
    note = pending(backend.collect(request, reference)).note
    assert f"{path} is no answer: digest: wanted" in note


def test_what_is_not_for_us_is_passed_over_in_silence(tmp_path: Path) -> None:
    """Other nodes' answers, hidden files (a copy under way), directories, other types."""
    backend, request = opened(tmp_path), asked()
    waiting = pending(backend.sign(request))
    answer = answer_to(tmp_path, {"apiserver": issue(request)}, request_digest="0" * 64, node="cp-2")
    put(tmp_path, "other.json", answer)
    put(tmp_path, ".a.json.part", answer)
    (tmp_path / "inbox/readme.txt").write_text("hello")
    assert backend.collect(request, waiting.reference) == waiting
    (tmp_path / "inbox/d.json").mkdir()
    assert "d.json" in pending(backend.collect(request, waiting.reference)).note


def test_the_newest_of_several_answers(tmp_path: Path) -> None:
    """The date of the signature decides, not the name; an answer that leaves the certificate out does not count."""
    backend, request = opened(tmp_path), asked()
    reference = pending(backend.sign(request)).reference
    first, last = issue(request), issue(request)
    second = timedelta(seconds=1)
    whole = answer_to(tmp_path, {"apiserver": first})
    put(tmp_path, "a.json", dataclasses.replace(whole, answers={"apiserver": last}, signed=whole.signed + second))
    put(tmp_path, "b.json", whole)
    put(tmp_path, "c.json", dataclasses.replace(whole, answers={"etcd-peer": last}, signed=whole.signed + 2 * second))
    assert backend.collect(request, reference) == last


def test_a_certificate_counts_before_a_refusal(tmp_path: Path) -> None:
    """A certificate counts before a refusal of any date; all certificates are candidates, the latest first."""
    backend, request = opened(tmp_path), asked()
    reference = pending(backend.sign(request)).reference
    first, last = issue(request), issue(request)
    whole = answer_to(tmp_path, {"apiserver": first})
    put(tmp_path, "a.json", whole)
    put(tmp_path, "b.json", dataclasses.replace(whole, answers={"apiserver": last}, signed=whole.signed + timedelta(1)))
    refused = {"apiserver": bundle.refusal("no such node")}
    put(tmp_path, "c.json", dataclasses.replace(whole, answers=refused, signed=whole.signed + timedelta(9999)))

    assert backend.collect(request, reference) == last
    assert backend.candidates(request, reference) == [last, first]


def test_an_answer_that_leaves_it_out_is_named(tmp_path: Path) -> None:
    """A desk that has one of the CAs only."""
    backend, request = opened(tmp_path), asked()
    reference = pending(backend.sign(request)).reference
    put(tmp_path, "a.json", answer_to(tmp_path, {"admin.conf": issue(request)}))
    assert "the answer of desk-1 leaves it out" in pending(backend.collect(request, reference)).note


def test_a_refusal_is_reported_in_the_desks_words(tmp_path: Path) -> None:
    """It is over: exit 5."""
    backend, request = opened(tmp_path), asked()
    reference = pending(backend.sign(request)).reference
    put(tmp_path, "a.json", answer_to(tmp_path, {"apiserver": bundle.refusal("no such node")}))
    with pytest.raises(BackendRefusedError, match=r"^desk-1 refused: no such node$"):
        backend.collect(request, reference)


def test_a_request_that_was_fetched(tmp_path: Path) -> None:
    """Its file is gone from the outbox: said so."""
    backend, request = opened(tmp_path), asked()
    reference = pending(backend.sign(request)).reference
    next((tmp_path / "outbox").iterdir()).unlink()
    assert "has left the outbox, and no answer" in pending(backend.collect(request, reference)).note


def test_another_batch_is_another_bundle(tmp_path: Path) -> None:
    """A run that was killed had one made already; what came due since is carried beside it, and each request knows its own."""
    backend, old, new = opened(tmp_path), asked("apiserver"), asked("admin.conf", batch="cd" * 16)
    backend.sign(old)
    [first] = (tmp_path / "outbox").iterdir()
    answers = [pending(one) for one in backend.sign_many([new, old, asked("front-proxy-client", batch="cd" * 16)])]
    [second] = set((tmp_path / "outbox").iterdir()) - {first}
    digests = [bundle_format.digest(bundle_format.loads_request(path.read_bytes())) for path in (second, first, second)]
    assert [one.reference for one in answers] == digests
    assert [str(path) in one.note for one, path in zip(answers, (second, first, second), strict=True)] == [True] * 3


def test_a_request_stays_in_the_outbox_until_all_of_it_is_answered(tmp_path: Path) -> None:
    """Two desks with a CA each: the second may not have fetched it when the first has answered."""
    backend, requests = opened(tmp_path), [asked("apiserver"), asked("front-proxy-client")]
    reference = {pending(one).reference for one in backend.sign_many(requests)}.pop()
    first, second = (answer_to(tmp_path, {one.spec.name: issue(one)}) for one in requests)
    put(tmp_path, "a.json", first)
    assert backend.candidates(requests[0], reference) == [first.answers["apiserver"]]
    backend.accepted(requests[0], reference)
    assert "leaves it out" in pending(backend.collect(requests[1], reference)).note
    assert len(list((tmp_path / "outbox").iterdir())) == 1
    put(tmp_path, "b.json", second)
    assert backend.candidates(requests[1], reference) == [second.answers["front-proxy-client"]]
    assert len(list((tmp_path / "outbox").iterdir())) == 1  # the bundles have not been looked at yet
    backend.accepted(requests[1], reference)
    assert not list((tmp_path / "outbox").iterdir())


def test_bundles_of_one_batch_stay_apart(tmp_path: Path) -> None:
    """Requests of one export go to several desks' backends; none is written over another's, each is answered."""
    requests = [asked("apiserver"), asked("front-proxy-client")]
    references = [pending(opened(tmp_path).sign(request)).reference for request in requests]
    assert len(set(references)) == len(list((tmp_path / "outbox").iterdir())) == 2


KILLED = """\
import os, sys, backends.exchange as exchange
from pathlib import Path
from datetime import UTC, datetime, timedelta
from bridge.contract import Continuity, SignRequest
from bridge.specs import SPECS
def die(**_): os.kill(os.getpid(), 9)
exchange.Pending = die
who = Continuity(batch="ab" * 16, node="cp-1", cluster="kubernetes", proof=None, asked=datetime(2026, 1, 31, tzinfo=UTC))
request = SignRequest(spec=SPECS["apiserver"], csr_pem=sys.stdin.buffer.read(), validity=timedelta(days=365), continuity=who)
settings = exchange.ExchangeSettings(outbox=Path(sys.argv[1]), inbox=Path(sys.argv[2]))
exchange.ExchangeBackend(settings).sign(request)
"""


def test_killed_before_it_could_say_so(tmp_path: Path) -> None:
    """The bundle lies in the outbox: the next run finds it there, and writes no second one."""
    backend = opened(tmp_path)
    request = dataclasses.replace(asked(), replaces=None)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "outbox"), str(tmp_path / "inbox")]
    died = subprocess.run(command, input=request.csr_pem, check=False, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    [path] = (tmp_path / "outbox").iterdir()
    written = path.read_bytes()
    reference = pending(backend.sign(request)).reference
    assert reference == bundle_format.digest(bundle_format.loads_request(written))
    assert [p.read_bytes() for p in (tmp_path / "outbox").iterdir()] == [written]
    issued = issue(request)
    put(tmp_path, "a.json", answer_to(tmp_path, {"apiserver": issued}))
    assert backend.collect(request, reference) == issued


def test_a_bundle_that_was_damaged_in_the_outbox_is_written_anew(tmp_path: Path) -> None:
    """Half a bundle counts as none; the message names the one that can be carried."""
    backend, request = opened(tmp_path), asked()
    backend.sign(request)
    [path] = (tmp_path / "outbox").iterdir()
    os.truncate(path, 100)
    note = pending(backend.sign(request)).note
    assert (
        bundle_format.short_fingerprint(bundle_format.loads_request(Path(note.split(" is to")[0]).read_bytes())) in note
    )


@pytest.mark.parametrize("missing", ["outbox", "inbox"])
def test_a_directory_that_is_not_there(tmp_path: Path, missing: str) -> None:
    """A missing directory is unavailable, and named, since the medium may be mounted for the next run."""
    backend, request = opened(tmp_path), asked()
    (tmp_path / missing).rmdir()
    for call in (lambda: backend.sign(request), lambda: backend.collect(request, "0" * 64), lambda: backend.check([])):
        with pytest.raises(
            BackendUnavailableError, match=f"{missing}: there is no such directory \\(the {missing}\\)"
        ) as e:
            call()
        assert e.value.exit_code == 6
        assert "mount" in e.value.hint


def test_a_full_medium(tmp_path: Path) -> None:
    """Unavailable; nothing half is left there."""
    if os.geteuid() != 0:
        pytest.skip("wanted root to mount a small file system")
    opened(tmp_path)
    script = (
        f"mount -t tmpfs -o size=4k none {tmp_path / 'outbox'} && head -c 4096 /dev/zero > {tmp_path / 'outbox/fill'};"
        f' "$@"; ls -A {tmp_path / "outbox"}'
    )
    program = KILLED.replace("exchange.Pending = die", "")
    command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", program]
    command += [str(tmp_path / "outbox"), str(tmp_path / "inbox")]
    run = subprocess.run(command, input=asked().csr_pem, check=False, capture_output=True)
    assert b"BackendUnavailableError" in run.stderr
    assert b"No space left on device" in run.stderr
    assert run.stdout.split() == [b"fill"]


def test_what_a_bundle_may_not_hold_is_refused(tmp_path: Path) -> None:
    """Two requests of one name; nothing is written."""
    with pytest.raises(BackendRefusedError, match="each name once"):
        opened(tmp_path).sign_many([asked(), asked()])
    assert not list((tmp_path / "outbox").iterdir())


def test_one_directory_can_not_be_both(tmp_path: Path) -> None:
    """Found in the settings."""
    text = f'[backend.door]\ntype = "exchange"\noutbox = "{tmp_path}"\ninbox = "{tmp_path}"\n[authority.ca]\nbackend = "door"\n'

    settings = parse(text, tmp_path / "config.toml")
    with pytest.raises(SettingsError, match="another directory than the outbox"):
        registry.configured(settings, settings.authorities)


EXAMPLE = Path(__file__).parents[2] / "config/exchange"


def test_the_example_can_be_used() -> None:
    """All authorities are asked through the door, two months ahead."""
    settings = load(EXAMPLE / "config.toml")
    configured = registry.configured(settings, settings.authorities)
    assert list(configured) == list(AUTHORITIES)
    for one in configured.values():
        assert one.settings == ExchangeSettings(
            node=one.settings.node,
            outbox=Path("/srv/exchange/outbox"),
            inbox=Path("/srv/exchange/inbox"),
            retry_for=timedelta(),
        )
    assert settings.renewal.before.remaining == timedelta(days=60)


def test_the_crontab_runs_what_there_is() -> None:
    """One line that is no comment, of six fields and a command that the program knows."""
    lines = [line for line in (EXAMPLE / "crontab").read_text().splitlines() if re.match(r"[\d*]", line)]
    assert [line.split(maxsplit=6)[5:] for line in lines] == [
        ["root", "/usr/bin/ca-bridge renew >> /var/log/ca-bridge-renew.log"]
    ]


def test_the_crontabs_jobs_carry(tmp_path: Path) -> None:
    """Both ways, with rsync where that is there to try: whole files alone, and of answers only this node's."""
    lines = [line for line in (EXAMPLE / "crontab").read_text().splitlines() if "rsync -" in line]
    there, back = (line.replace("desk.example.com:", "").replace("/srv", str(tmp_path)) for line in lines)
    out, inbox, outbox, home = (
        tmp_path / one for one in ("exchange/outbox", "desk/inbox", "desk/outbox", "exchange/inbox")
    )
    for directory in (out, inbox / "done", outbox, home):
        directory.mkdir(parents=True)
    for path in (out / "cp-1-0.request.json", out / ".half", outbox / "cp-1-0.ca.answer.json"):
        path.write_text("x")
    for path in (outbox / "cp-2-0.answer.json", outbox / ".cp-1-0.answer.json.x"):
        path.write_text("x")
    commands = [line.split(maxsplit=7)[7] for line in (there, back)]
    assert all(command.startswith("rsync -dt ") for command in commands)
    if programs.find("rsync") is None:
        return
    for command in commands:
        subprocess.run(["sh", "-c", command], check=True)

    assert sorted(path.name for path in inbox.iterdir()) == ["cp-1-0.request.json", "done"]
    assert [path.name for path in home.iterdir()] == ["cp-1-0.ca.answer.json"]


@pytest.mark.attack("N25")
def test_only_answers_to_our_requests_are_kept(tmp_path: Path) -> None:
    """An inbox of others' answers costs no memory; one that turns out to be ours is read again."""
    backend = opened(tmp_path)
    request = asked()
    reference = pending(backend.sign(request)).reference
    issued = issue(request)
    ours = answer_to(tmp_path, {"apiserver": issued})
    for number in range(3):
        put(tmp_path, f"{number}.json", dataclasses.replace(ours, request_digest=f"{number:064x}"))
    assert pending(backend.collect(request, reference))
    assert [found.answer for _, found in backend._read.values()] == [None] * 3
    put(tmp_path, "ours.json", ours)
    assert backend.collect(request, reference) == issued
    assert [found.answer for _, found in backend._read.values() if found.answer] == [ours]
    assert len(backend.candidates(request, f"{1:064x}")) == 1


@pytest.mark.attack("N8")
def test_a_link_in_the_inbox_is_not_followed(tmp_path: Path) -> None:
    """A courier could have root open a device by it; the file itself is taken."""
    backend = opened(tmp_path)
    request = asked()
    reference = pending(backend.sign(request)).reference
    issued = issue(request)
    answer = put(tmp_path, "a.json", answer_to(tmp_path, {"apiserver": issued}))
    answer.rename(tmp_path / "a.json")
    answer.symlink_to(tmp_path / "a.json")
    assert f"{answer} is no answer: a symbolic link" in pending(backend.collect(request, reference)).note
    answer.unlink()
    (tmp_path / "a.json").rename(answer)
    assert backend.collect(request, reference) == issued
