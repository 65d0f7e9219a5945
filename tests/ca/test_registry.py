"""Backends are found by entry point, their tables read strictly, their troubles retried within a limit."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bridge import secret as secret_places
from bridge.ca import CA, registry
from bridge.ca.retry import WaitPolicy
from bridge.contract import (
    ENTRY_POINT_GROUP,
    Backend,
    BackendSettings,
    Issued,
    Pending,
    Secret,
    SecretUnavailableError,
    Selector,
    SignRequest,
)
from bridge.errors import (
    BackendError,
    BackendRefusedError,
    BackendUnavailableError,
    BridgeError,
    SettingsError,
    SettingsProblem,
)
from bridge.settings.load import parse
from bridge.specs import SPECS
from bridge.testing import TestCA, sign_request

FILE = Path("/etc/ca-bridge/config.toml")
DESK = '[backend.desk]\ntype = "openssl"\ndir = "/srv/ca"\n[authority.ca]\nbackend = "desk"\n'


def problems(text: str, *authorities: str) -> list[SettingsProblem]:
    with pytest.raises(SettingsError) as e:
        registry.configured(parse(text, FILE), authorities)
    return e.value.problems


def test_our_own_come_in_by_entry_point() -> None:
    """The same door as a third party's."""
    assert set(registry.installed()) >= {"cfssl", "exchange", "openssl", "vault"}


def test_an_unknown_type_names_the_installed_ones() -> None:
    """The error has the installed types and the key's line."""
    [problem] = problems('[backend.desk]\ntype = "opensl"\n[authority.ca]\nbackend = "desk"\n', "ca")
    assert (problem.key, problem.line) == ("backend.desk.type", 2)
    assert problem.wanted == f"an installed backend type: {', '.join(sorted(registry.installed()))}"
    assert problem.found == "'opensl' (did you mean 'openssl'?)"


def test_an_unknown_type_hides_no_other_problem() -> None:
    """Problems in the other backends' tables are reported, too, in the order of the file."""
    text = '[backend.x]\ntype = "opensl"\n[backend.v]\ntype = "vault"\nurl = 3\n[backend.w]\ntype = "cfssl"\nnone = 1\n'
    text += '[authority.ca]\nbackend = "x"\n[authority.etcd-ca]\nbackend = "v"\nmount = "m"\n'
    found = [(one.key, one.line) for one in problems(text, "ca", "etcd-ca")]
    assert found[:2] == [("backend.x.type", 2), ("backend.v.url", 5)]
    assert ("backend.w.none", 8) in found


class _Distribution(Distribution):
    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def metadata(self) -> Any:  # what Distribution.name asks
        return {"Name": self._name}

    def read_text(self, filename: str) -> str | None:
        del filename
        return None

    def locate_file(self, path: Any) -> Any:
        raise NotImplementedError(path)


def _entry(distribution: str, value: str) -> EntryPoint:
    entry = EntryPoint("step", value, ENTRY_POINT_GROUP)
    return entry._for(_Distribution(distribution))  # type: ignore[attr-defined, no-any-return]


def test_a_plugin_found_twice_is_refused_with_both_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two plug-ins of one name are refused, so that chance does not decide which signs; one alone is taken."""
    entries = [_entry("step-one", "one:Backend")]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == ENTRY_POINT_GROUP else [])
    assert list(registry.installed()) == ["step"]
    entries.append(_entry("step-two", "two:Backend"))
    with pytest.raises(registry.DuplicatePluginError) as e:
        registry.installed()
    assert "step-one" in str(e.value)
    assert "step-two" in str(e.value)


@pytest.mark.parametrize(
    ("value", "missing"),
    [
        ("no_such_module:Backend", "No module named 'no_such_module'"),
        ("json:Backend", "'Backend'"),
        ("json:JSONDecoder", "a class derived from Backend, found <class 'json.decoder.JSONDecoder'>"),
        ("json:loads", "a class derived from Backend, found <function loads"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, value: str, missing: str) -> None:
    """With its entry point, its distribution and what is missing; it is no bug of ours."""
    monkeypatch.setattr(registry, "entry_points", lambda group: [_entry("step-one", value)] if group else [])
    settings = parse('[backend.desk]\ntype = "step"\n[authority.ca]\nbackend = "desk"\n', FILE)
    with pytest.raises(registry.BrokenPluginError) as e:
        registry.configured(settings, ["ca"])
    assert all(part in str(e.value) for part in ("backend type step", value, "step-one", missing))


def test_an_authoritys_keys_add_to_its_backends_and_override_them() -> None:
    """An authority's keys override its backend's, in inner tables, too."""
    text = f'{DESK}dir = "/srv/other"\ntimeout = "5s"\n'
    configured = registry.configured(parse(text), ["ca"])["ca"]
    assert configured.label == "desk (openssl)"
    assert configured.settings.timeout == timedelta(seconds=5)
    assert registry.merge({"a": {"b": 1, "c": 1}, "d": 1}, {"a": {"b": 2}, "e": 2}) == {
        "a": {"b": 2, "c": 1},
        "d": 1,
        "e": 2,
    }


def test_problems_are_where_the_key_is() -> None:
    """A problem is named in the authority's table or in the backend's, where its key stands."""
    text = f'{DESK}timeout = "soon"\n[authority.etcd-ca]\nbackend = "desk"\ndirr = "x"\n'
    found = {(p.key, p.line) for p in problems(text.replace("/srv/ca", "srv"), "ca")}
    assert found == {("backend.desk.dir", 3), ("authority.ca.timeout", 6), ("authority.etcd-ca.dirr", 9)}


def test_an_authority_without_a_backend_is_a_problem() -> None:
    """Nothing is asked until each due certificate has its CA."""
    assert list(registry.configured(parse(DESK), ["ca"])) == ["ca"]
    [problem] = problems(DESK, "ca", "front-proxy-ca")
    assert problem.key == "authority.front-proxy-ca"


def test_an_unused_backend_is_checked_too() -> None:
    """A typing error does not wait for the day when the table is used."""
    [problem] = problems(f'{DESK}[backend.other]\ntype = "vault"\nurll = "https://x"\n', "ca")
    assert (problem.key, problem.line) == ("backend.other.urll", 8)


@dataclass(frozen=True, kw_only=True)
class _Settings(BackendSettings):
    token: Secret


def test_secrets_are_never_in_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value in the file is refused and not repeated; a place to find it is taken."""

    class Plugin:
        settings_type: ClassVar[type[BackendSettings]] = _Settings

    monkeypatch.setattr(registry, "_types", lambda settings: (dict.fromkeys(settings.backends, Plugin), []))
    head = '[backend.b]\ntype = "x"\n[authority.ca]\nbackend = "b"\n'
    for kind, where in (("file", "/x"), ("env", "X_{usage}"), ("credential", "x")):
        settings = registry.configured(parse(f'{head}token_{kind} = "{where}"\n'), ["ca"])["ca"].settings
        assert isinstance(settings, _Settings)
        assert settings.token == Secret(kind, where)
    for kind in ("file", "env"):  # the secret itself, where its place should be
        [problem] = problems(f'{head}token_{kind} = "hvs.secret"\n', "ca")
        assert problem.key == f"authority.ca.token_{kind}"
        assert "hvs.secret" not in str(problem)
    [problem] = problems(f'{head}token = "hvs.secret"\ntoken_file = "/x"\n', "ca")
    assert problem.key == "authority.ca.token"
    assert "hvs.secret" not in str(problem)
    [problem] = problems(f'{head}token_env = "X"\ntoken_file = "/x"\n', "ca")
    assert problem.found == "token_file and token_env"


def test_secrets_are_read_from_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file, the environment, or systemd's credentials; a missing one is named by place."""
    (tmp_path / "token").write_text("s3cret\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("TOKEN", " s3cret ")
    places = (Secret("file", str(tmp_path / "token")), Secret("env", "TOKEN"), Secret("credential", "token"))
    for secret in places:
        assert secret.read() == "s3cret"
        assert "s3cret" not in repr(secret)
    (tmp_path / "token").write_text("\n")
    monkeypatch.delenv("TOKEN")
    for secret in places:
        with pytest.raises(SecretUnavailableError):
            secret.read()


def test_a_pipe_gives_a_secret_within_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer may begin late; a FIFO without one, and a file without end, are errors that name the place."""
    os.mkfifo(tmp_path / "fifo")
    pipe, endless = Secret("file", str(tmp_path / "fifo")), Secret("file", "/dev/zero")
    writer = threading.Timer(0.2, (tmp_path / "fifo").write_text, ["s3cret\n"])
    writer.start()
    assert pipe.read() == "s3cret"
    writer.join()
    monkeypatch.setattr(secret_places, "_PIPE_SECONDS", 0.1)
    for place, found in ((pipe, "a pipe that said nothing for 0.1 s"), (endless, "more than 1048576 bytes")):
        with pytest.raises(SecretUnavailableError, match=f"wanted a secret in {place}, found: {found}"):
            place.read()


def test_a_selector_prefers_names_to_usages_to_the_pattern() -> None:
    """The order is that of the settings' tables of exceptions."""
    select = Selector("k-{name}-{usage}", {"peer": "member", "etcd-server": "server"})
    chosen = {name: select(SPECS[name]) for name in ("etcd-server", "etcd-peer", "admin.conf")}
    assert chosen == {"etcd-server": "server", "etcd-peer": "member", "admin.conf": "k-admin.conf-client"}
    assert list(select.problems("role", "roles")) == []
    wrong = Selector("{nam}", {"clients": "x"})
    assert [p.key for p in wrong.problems("role", "roles")] == ["role", "roles.clients"]


@dataclass
class _Flaky(Backend):
    """A CA that is unavailable for a number of calls."""

    failures: int
    issued: Issued
    error: Callable[[], BackendError] = lambda: BackendUnavailableError("busy")
    calls: list[bytes] = field(default_factory=list)

    def sign(self, request: SignRequest) -> Issued:
        self.calls.append(request.csr_pem)
        if len(self.calls) <= self.failures:
            raise self.error()
        return self.issued


@pytest.fixture(scope="module")
def asked() -> SignRequest:
    """A request."""
    return sign_request(TestCA.make().leaf(SPECS["apiserver"]), SPECS["apiserver"], "ecdsa-p256", timedelta(days=1))


@pytest.fixture(scope="module")
def issued() -> Issued:
    """An answer."""
    return Issued(leaf=TestCA.make().leaf(SPECS["apiserver"]))


def ask(
    backend: Backend, requests: Sequence[SignRequest], retry_for: float
) -> Sequence[Issued | Pending | BackendError]:
    return CA(label="ca", backend=backend, retry=WaitPolicy(timedelta(seconds=retry_for))).ask(requests)


def test_unavailable_is_asked_again_with_the_same_csr(asked: SignRequest, issued: Issued) -> None:
    """A lost answer costs a second certificate, never a key."""
    backend = _Flaky(2, issued)
    assert ask(backend, [asked], 600) == [issued]
    assert backend.calls == [asked.csr_pem] * 3


def test_refused_is_not_asked_again(asked: SignRequest, issued: Issued) -> None:
    """A refusal is final, since another try cannot help."""
    backend = _Flaky(1, issued, lambda: BackendRefusedError("no"))
    assert [type(answer) for answer in ask(backend, [asked], 30)] == [BackendRefusedError]
    assert len(backend.calls) == 1


def test_all_requests_of_a_run_wait_once_for_a_dead_ca(asked: SignRequest, issued: Issued) -> None:
    """Many certificates do not wait many times."""
    backend, begin = _Flaky(10**6, issued), time.monotonic()
    answers = ask(backend, [asked] * 400, 1.5)
    assert {type(answer) for answer in answers} == {BackendUnavailableError}
    assert time.monotonic() - begin < 300  # 400 times it would be ten minutes


def test_the_time_that_the_ca_names_is_kept(asked: SignRequest, issued: Issued) -> None:
    """Retry-After is waited for if there is time, and ends the waiting if there is not."""
    begin = time.monotonic()
    patient = _Flaky(1, issued, lambda: BackendUnavailableError("busy", retry_after_seconds=1.2))
    assert ask(patient, [asked], 600) == [issued]
    assert time.monotonic() - begin >= 1.2
    hasty = _Flaky(1, issued, lambda: BackendUnavailableError("busy", retry_after_seconds=60))
    assert [type(answer) for answer in ask(hasty, [asked], 30)] == [BackendUnavailableError]
    assert len(hasty.calls) == 1


def test_a_backend_with_too_few_answers_is_a_bug(asked: SignRequest, issued: Issued) -> None:
    """No certificate is taken for another's."""

    class Short(_Flaky):
        def sign_many(self, requests: Sequence[SignRequest]) -> list[Issued | BackendError]:
            return [self.issued] * (len(requests) - 1)

    with pytest.raises(BridgeError):
        ask(Short(0, issued), [asked, asked], 1)
