"""A person decides in a real browser, by keyboard, at a desktop's width and on a phone."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest

from bridge.contract import Issued
from bridge.pki.bundle_format import digest, dumps, loads_answer
from bridge.system.waiting import wait_until
from tests.kit import chromium
from tests.kit.bundles import make_bundle, old_pairs
from tests.kit.people import make_team
from tests.kit.pki import handmade_pki
from tests.kit.serving import running

pytestmark = pytest.mark.skipif(
    not chromium.is_here(), reason="needs root, chromium and certutil; install chromium libnss3-tools"
)

_PATIENCE = timedelta(minutes=3)
_DESKTOP, _PHONE = (1280, 900), (390, 844)
_NO_SIDEWAYS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
_TAB, _ENTER = ("Tab", 9), ("Enter", 13, "\r")


def test_a_person_approves_by_keyboard(tmp_path: Path) -> None:
    """super-admin.conf waits; the page fits on a phone; Tab and Enter on the button approve it, and the certificate is signed."""
    pki = handmade_pki(tmp_path / "pki")
    team = make_team(tmp_path, pki)
    bundle = make_bundle(old_pairs(pki, ["super-admin.conf", "apiserver"]))
    shots = Path(os.environ.get("CA_BRIDGE_SHOTS") or tmp_path)
    with running(team.door):
        place = team.door.post(dumps(bundle)).headers["location"]
        wait_until(
            lambda: team.door.ask("GET", place).document["state"], lambda one: one == "undecided", _PATIENCE,
            pause_seconds=0.1,
        )  # fmt: skip
        url = team.door.url
        with chromium.browsing(tmp_path / "browser", team.door.ca, team.agent("alice"), url) as browser:
            fits = {}
            for width, height in (_DESKTOP, _PHONE):
                browser.look(width, height, dark=(width, height) == _PHONE)
                for name, path in (("list", "/approvals"), ("case", f"/approvals/{digest(bundle)}")):
                    browser.open(f"{url}{path}")
                    browser.screenshot(shots / f"{name}-{width}.png")
                    fits[name, width] = browser.value(_NO_SIDEWAYS)
            text = browser.value("document.body.innerText")
            browser.value("document.querySelector('#reason').focus()")
            browser.write("change 4711")
            browser.key(*_ENTER)
            typed = browser.value("document.querySelector('#reason').value")
            browser.key(*_TAB)
            focused = browser.value("document.activeElement.innerText")
            browser.key(*_ENTER)
            browser.await_event("Page.loadEventFired")
            after = browser.value("document.body.innerText")
            answer = wait_until(
                lambda: team.door.ask("GET", place), lambda one: one.status == 200, _PATIENCE, pause_seconds=0.1
            )
            for name in ("certificates", "record"):
                browser.open(f"{url}/approvals/{name}")
                browser.screenshot(shots / f"{name}-390.png")
                fits[name, 390] = browser.value(_NO_SIDEWAYS)
            browser.look(*_DESKTOP)
            browser.open(f"{url}/approvals/{digest(bundle)}")
            browser.screenshot(shots / "after-1280.png")

    assert set(fits.values()) == {True}, fits
    assert "in the group system:masters, which may do everything" in text
    assert "You are alice" in text
    assert typed == "change 4711"  # Enter in the text decides nothing
    assert focused == "Approve"
    assert "alice approved it" in after
    assert "change 4711" in after
    assert {type(one) for one in loads_answer(answer.body).answers.values()} == {Issued}


def test_a_browser_without_a_certificate_sees_an_explanation(tmp_path: Path) -> None:
    """It says which certificate is wanted, and shows no request."""
    team = make_team(tmp_path, handmade_pki(tmp_path / "pki"))
    with running(team.door), chromium.browsing(tmp_path / "browser", team.door.ca, None, team.door.url) as browser:
        browser.look(*_DESKTOP)
        browser.open(f"{team.door.url}/approvals")
        text = browser.value("document.body.innerText")

    assert "there was no person's certificate in the TLS handshake" in text
    assert "You are" not in text
