"""The pages for people who decide, over HTTPS as a browser asks for them."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from cryptography import x509

from bridge.contract import Issued
from bridge.pki.bundle import Refusal, RequestBundle
from bridge.pki.bundle_format import digest, dumps, loads_answer
from bridge.pki.csr import PrivateKey
from bridge.system.waiting import wait_until
from tests.kit.bundles import make_bundle, old_pairs
from tests.kit.desks import POLICY
from tests.kit.people import APPROVALS, Team, make_team
from tests.kit.pki import Pki
from tests.kit.serving import Answer, running

Pairs = dict[str, tuple[x509.Certificate, PrivateKey]]
_PATIENCE = timedelta(minutes=3)
_FORM = "application/x-www-form-urlencoded"


@pytest.fixture(scope="module")
def pairs(pki: Pki) -> Pairs:
    return old_pairs(pki, ["apiserver"])


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Team]:
    one = make_team(tmp_path_factory.mktemp("team"), pki)
    with running(one.door):
        yield one


@pytest.fixture
def bundle(pairs: Pairs) -> RequestBundle:
    return make_bundle(pairs)


def waits(team: Team, bundle: RequestBundle) -> str:
    """The request's place at the door, once people are to decide about it."""
    answer = team.door.post(dumps(bundle))
    assert answer.status == 202, answer.body
    place = answer.headers["location"]
    reached(team, place, "undecided")
    return place


def reached(team: Team, place: str, state: str) -> Answer:
    def look() -> Answer:
        return team.door.ask("GET", place)

    return wait_until(look, lambda one: _state(one) == state, _PATIENCE, pause_seconds=0.1)


def _state(answer: Answer) -> str:
    return "answered" if answer.status == 200 else str(answer.document.get("state"))


def token(page: Answer) -> str:
    [found] = re.findall(rb'name="token" value="([0-9a-f]{64})"', page.body)
    return str(found.decode())


def send(
    team: Team,
    agent: Mapping[str, Path],
    bundle: RequestBundle,
    headers: Mapping[str, str] | None = None,
    **fields: str,
) -> Answer:
    path, body = f"/approvals/{digest(bundle)}", urlencode(fields).encode()
    return team.ask(agent, "POST", path, body, **{"Content_Type": _FORM, **(headers or {})})


# --- what a person does -----------------------------------------------------------------------------------------------


def test_a_person_approves_in_a_browser(team: Team, bundle: RequestBundle) -> None:
    """The page says the sentence that matters; its form approves, and the certificate is in the list afterwards."""
    alice = team.agent("alice")
    place = waits(team, bundle)
    listed = team.ask(alice, "GET", "/approvals").body.decode()
    page = team.ask(alice, "GET", f"/approvals/{digest(bundle)}")
    origin = {"Origin": f"https://127.0.0.1:{team.door.port}"}
    sent = send(team, alice, bundle, origin, token=token(page), verdict="approved", reason="change 4711")
    answer = loads_answer(reached(team, place, "answered").body)
    after = team.ask(alice, "GET", sent.headers["location"]).body.decode()
    certificates = team.ask(alice, "GET", "/approvals/certificates?q=cp-1").body.decode()
    record = team.ask(alice, "GET", "/approvals/record?q=alice").body.decode()

    whom = "a node that says it is cp-1, which nothing proves,"
    assert f"this gives {whom} the API server&#39;s certificate, as before, for 365d" in listed
    assert "holds: made with the key of the replaced certificate" in page.body.decode()
    assert sent.status == 303
    assert isinstance(answer.answers["apiserver"], Issued)
    assert "approved by alice" in answer.signer
    assert "(signed)" not in answer.signer
    assert "attested by the door" in after
    assert '<form method="post"' not in after
    assert "apiserver" in certificates
    assert "alice approved: change 4711" in record


def test_a_person_refuses_in_a_browser(team: Team, bundle: RequestBundle) -> None:
    """Without a reason the page says what is missing; with one the node gets it."""
    bob = team.agent("bob")
    place = waits(team, bundle)
    page = team.ask(bob, "GET", f"/approvals/{digest(bundle)}")
    without = send(team, bob, bundle, token=token(page), verdict="refused", reason="")
    sent = send(team, bob, bundle, token=token(page), verdict="refused", reason="<b>no</b> such change")
    answer = loads_answer(reached(team, place, "answered").body).answers["apiserver"]

    assert without.status == 403
    assert b"a refusal needs a reason" in without.body
    assert sent.status == 303
    assert answer == Refusal(reason="not approved: <b>no</b> such change (bob)")


def test_what_people_are_asked_for_comes_first(tmp_path: Path, pki: Pki) -> None:
    """A certificate that needs an approval comes first in its bundle, for browsers and programs."""
    policy = f'{POLICY}\n[certificate."super-admin.conf"]\napproval = "required"\n[approvals]\napprovers = ["alice"]\n'
    team = make_team(tmp_path, pki, policy)
    bundle = make_bundle(old_pairs(pki, ["apiserver", "etcd-server", "super-admin.conf"]))
    with running(team.door):
        waits(team, bundle)
        alice = team.agent("alice")
        pages = [team.ask(alice, "GET", f"/approvals{rest}").body.decode() for rest in ("", f"/{digest(bundle)}")]
        listed = team.ask(alice, "GET", "/v1/approvals").document["requests"]

    assert [one.name for one in bundle.requests][-1] == "super-admin.conf"
    for page in pages:
        assert page.index("the certificate of super-admin.conf") < page.index("the API server&#39;s certificate")
    assert [one["name"] for one in listed[0]["certificates"]] == ["super-admin.conf", "apiserver", "etcd-server"]


def test_a_policy_that_demands_signatures_has_no_buttons(tmp_path: Path, pki: Pki, bundle: RequestBundle) -> None:
    """The page shows the command, and a form that was made by hand is refused; the command's signature counts."""
    team = make_team(tmp_path, pki, APPROVALS + 'evidence = "signature"\n')
    other = make_team(tmp_path / "other", pki)
    alice = team.agent("alice")
    with running(team.door):
        place = waits(team, bundle)
        page = team.ask(alice, "GET", f"/approvals/{digest(bundle)}").body.decode()
        forged = send(team, alice, bundle, token="0" * 64, verdict="approved", reason="")
        run = team.run(alice, "approve", digest(bundle))
        answer = loads_answer(reached(team, place, "answered").body)

    assert other.door.process is None
    assert 'name="verdict"' not in page
    assert f"ca-bridge approvals approve {digest(bundle)}" in page
    assert forged.status == 403
    assert run.returncode == 0, run.stderr
    assert "alice (signed)" in answer.signer


# --- other sites, and other people ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["no token", "another person's", "another request's", "another site", "JSON", "a field twice", "verdict"]
)
def test_a_forged_form_decides_nothing(team: Team, bundle: RequestBundle, pairs: Pairs, kind: str) -> None:
    """Each of them is refused and the request goes on waiting; the page's own form is taken."""
    alice, bob = team.agent("alice"), team.agent("bob")
    other = make_bundle(pairs)
    place = waits(team, bundle)
    waits(team, other)
    good = token(team.ask(alice, "GET", f"/approvals/{digest(bundle)}"))
    fields = {"token": good, "verdict": "approved", "reason": ""}
    headers: dict[str, str] = {}
    if kind == "no token":
        del fields["token"]
    elif kind == "another person's":
        fields["token"] = token(team.ask(bob, "GET", f"/approvals/{digest(bundle)}"))
    elif kind == "another request's":
        fields["token"] = token(team.ask(alice, "GET", f"/approvals/{digest(other)}"))
    elif kind == "another site":
        headers = {"Origin": "https://evil.example"}
    elif kind == "JSON":
        headers = {"Content_Type": "text/plain"}
    elif kind == "verdict":
        fields["verdict"] = "approved' OR '1'='1"
    if kind == "a field twice":
        body = urlencode([*fields.items(), ("verdict", "refused")]).encode()
        found = team.ask(alice, "POST", f"/approvals/{digest(bundle)}", body, Content_Type=_FORM)
    else:
        found = send(team, alice, bundle, headers, **fields)

    assert found.status == 403, found.body
    assert _state(team.door.ask("GET", place)) == "undecided"
    assert send(team, alice, bundle, token=good, verdict="approved", reason="").status == 303
    reached(team, place, "answered")


def test_no_page_can_be_framed_or_loads_anything(team: Team, bundle: RequestBundle) -> None:
    """Every page has the strict policy, errors and the style sheet too, and none has a script or a style in it."""
    alice = team.agent("alice")
    waits(team, bundle)
    paths = ["/approvals", f"/approvals/{digest(bundle)}", "/approvals/certificates", "/approvals/record"]
    pages = [team.ask(alice, "GET", path) for path in [*paths, "/approvals/none", "/approvals/style.css"]]
    pages.append(team.ask(None, "GET", "/approvals"))

    assert [one.status for one in pages] == [200, 200, 200, 200, 404, 200, 403]
    for page in pages:
        assert page.headers["content-security-policy"].startswith(
            "default-src 'none'; style-src 'self'; form-action 'self'"
        )
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        assert page.headers["x-frame-options"] == "DENY"
        assert page.headers["referrer-policy"] == "same-origin"
        assert page.headers["cache-control"] == "no-store"
        assert not re.search(rb"<script|<style|style=|javascript:|\son\w+=", page.body)


def test_who_has_no_persons_certificate_sees_nothing(team: Team, bundle: RequestBundle) -> None:
    """Such a client sees no request, no certificate and no audit log; a listed person does."""
    waits(team, bundle)
    mallory = team.agent("mallory")
    paths = ["/approvals", f"/approvals/{digest(bundle)}", "/approvals/certificates", "/approvals/record"]
    found = [team.ask(agent, "GET", path) for agent in (None, mallory) for path in paths]

    assert {one.status for one in found} == {403}
    assert not [one for one in found if b"cp-1" in one.body or digest(bundle).encode() in one.body]
    assert b"cp-1" in team.ask(team.agent("alice"), "GET", "/approvals").body


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", '"><img src=x>', "' OR 1=1 --", "%", "_", "\\", "{{ 7*7 }}", "%00", "ä" * 300]
)
def test_markup_in_every_field_is_text(team: Team, bundle: RequestBundle, text: str) -> None:
    """Markup in a search or a cluster's name is shown as text, and finds nothing that it does not name."""
    alice = team.agent("alice")
    waits(team, bundle)
    for page in ("certificates", "record"):
        answer = team.ask(alice, "GET", f"/approvals/{page}?q={quote(text)}")

        assert answer.status == 200
        assert b"<script>" not in answer.body
        assert b"<img" not in answer.body
        assert b'value="' + html.escape(text[:100]).encode() in answer.body.replace(b"&#34;", b"&quot;").replace(
            b"&#39;", b"&#x27;"
        )
        assert b"<tbody>" not in answer.body
    assert b"<tbody>" in team.ask(alice, "GET", "/approvals/record?q=cp-").body


def test_markup_in_a_request_is_text(tmp_path: Path, pki: Pki, pairs: Pairs) -> None:
    """A cluster may be called anything that can be printed; the page shows it as it is."""
    name = "<script>alert(1)</script>\"'{{ 7*7 }}"
    team = make_team(tmp_path, pki, APPROVALS.replace('clusters = ["kubernetes"]', 'clusters = ["*"]'))
    bundle = make_bundle(pairs, cluster=name)
    with running(team.door):
        waits(team, bundle)
        alice = team.agent("alice")
        pages = [team.ask(alice, "GET", path).body for path in ("/approvals", f"/approvals/{digest(bundle)}")]

    for page in pages:
        assert b"<script" not in page
        assert b"&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert b"{{ 7*7 }}" in page
