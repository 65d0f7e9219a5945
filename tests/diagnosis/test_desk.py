"""A CA desk is no node: `doctor` looks at its policy, its CAs and keys, and misses nothing of a node's."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.kit.desks import PASSPHRASE, Desk, make_desk
from tests.kit.pki import handmade_pki


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return make_desk(tmp_path / "desk", handmade_pki(tmp_path / "node"))


def wrong(desk: Desk) -> tuple[int, set[tuple[str, str, str]]]:
    """The exit code, and what is not in order: level, check, subject."""
    run = desk.run(
        "doctor", "-o", "json", "--pki-dir", desk.directory / "none", "--kubeconfig-dir", desk.directory / "none"
    )
    reported = json.loads(run.stdout)
    found = {(one["level"], one["check"], about) for one in reported["findings"] for about in one["about"]}
    return run.returncode, {one for one in found if one[0] != "ok"}


def test_nothing_is_wrong_with_a_good_desk(desk: Desk) -> None:
    """No certificate of a node is missed there; each CA was opened with its key, and says how long it is good."""
    assert wrong(desk) == (0, set())
    text = desk.run("doctor", "--pki-dir", desk.directory / "none", "--kubeconfig-dir", desk.directory / "none").stdout
    assert "desk (openssl) answers, and is the right CA" in text
    assert "CA ca, CA etcd-ca, CA front-proxy-ca:" in text
    assert "apiserver" not in text
    assert PASSPHRASE not in text


def policy_with_a_typo(desk: Desk) -> None:
    desk.policy.write_text(desk.policy.read_text().replace("nodes =", "nodse ="))


def wrong_passphrase(desk: Desk) -> None:
    (desk.directory / "passphrase").write_text("wrong\n")


def open_passphrase(desk: Desk) -> None:
    (desk.directory / "passphrase").chmod(0o644)


def open_key(desk: Desk) -> None:
    (desk.ca("etcd-ca") / "ca.key").chmod(0o644)


def key_of_another_ca(desk: Desk) -> None:
    (desk.ca("etcd-ca") / "ca.key").write_bytes((desk.ca("ca") / "ca.key").read_bytes())


def no_place_for_certificates(desk: Desk) -> None:
    (desk.ca("front-proxy-ca") / "newcerts").rmdir()


def anchors_of_another_cluster(desk: Desk) -> None:
    other = handmade_pki(desk.directory / "other")
    desk.policy.write_text(desk.policy.read_text().replace("[desk]", f'[desk]\nca_dir = "{other.pki_dir}"'))


def open_archive(desk: Desk) -> None:
    (desk.directory / "done").mkdir()
    (desk.directory / "done").chmod(0o777)
    desk.policy.write_text(desk.policy.read_text().replace("[desk]", f'[desk]\narchive = "{desk.directory}/done"'))


def no_cas(desk: Desk) -> None:
    desk.config.write_text(desk.config.read_text().partition("[backend")[0])


@pytest.mark.parametrize(
    ("plant", "check", "about"),
    [
        (policy_with_a_typo, "desk-policy", "{desk}/desk-policy.toml"),
        (wrong_passphrase, "backend", "backend of ca"),
        (open_passphrase, "open-secret", "{desk}/passphrase"),
        (open_key, "open-secret", "{desk}/cas/etcd-ca/ca.key"),
        (key_of_another_ca, "backend", "backend of etcd-ca"),
        (no_place_for_certificates, "backend", "backend of front-proxy-ca"),
        (anchors_of_another_cluster, "backend", "backend of ca"),
        (open_archive, "open-directory", "{desk}/done"),
        (no_cas, "settings", "settings"),
    ],
)
def test_finds_a_planted_fault_by_name(desk: Desk, plant: Callable[[Desk], None], check: str, about: str) -> None:
    """The fault is found before a bundle waits for it."""
    plant(desk)
    code, found = wrong(desk)
    assert code == 1
    assert ("error", check, about.format(desk=desk.directory)) in found


def test_a_ca_that_ends_soon_is_a_warning(tmp_path: Path) -> None:
    """The CA's own certificate decides, since no node has a copy at a desk."""
    soon = datetime.now(UTC) + timedelta(days=100)
    desk = make_desk(tmp_path / "desk", handmade_pki(tmp_path / "node", ca_not_after=soon))
    code, found = wrong(desk)
    assert (code, found) == (3, {("warning", "ca-ends-soon", f"CA {name}") for name in desk.authorities})
