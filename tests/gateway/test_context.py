"""What the gateway keeps: requests at a CA, and the lines of its record."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bridge.gateway import context
from bridge.gateway.context import Ledger, PendingAtCa, PendingRequests
from bridge.settings.tables import AuditSettings
from bridge.state import Store, audit
from bridge.state.audit import AuditError

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


def test_requests_at_a_ca_survive(tmp_path: Path) -> None:
    """On disk when `save` returns; a damaged line counts as none, since a CA is asked once more then."""
    store = Store(tmp_path / "state")
    store.prepare()
    at_ca = PendingAtCa(uid="u1", object_name="csr-1", signer="s", csr_sha256="0", reference="4711", validity_seconds=600,
                    asked=NOW)  # fmt: skip
    first = PendingRequests(store)
    first.put(at_ca)
    first.save()
    again = PendingRequests(store)
    assert again.get("u1") == at_ca
    assert again.drop("u1") == at_ca
    again.save()
    assert not list(PendingRequests(store))
    for uid in ("u1", "u2"):
        again.put(replace(at_ca, uid=uid, reference=f"4711-{uid}"))
    again.save()
    store.pending_at_ca.write_text(store.pending_at_ca.read_text().replace("4711-u1", "4712-u1"))
    assert [one.uid for one in PendingRequests(store)] == ["u2"]


def test_what_was_noted_is_written_once_the_record_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has happened, and no other line says so; a line that a caller waits for is the caller's own to repeat."""
    monkeypatch.setattr(context, "_AGAIN_SECONDS", 0.0)
    store = Store(tmp_path / "state")
    store.prepare()
    ledger, facts = Ledger(store, AuditSettings()), {"name": "kubelet-serving", "more": {"request": "u1"}}
    ledger.note(facts, audit.INSTALLED)
    with monkeypatch.context() as full:
        full.setattr(ledger._record, "write", failing_write)
        for _ in range(2):
            with pytest.raises(AuditError):
                ledger.write(facts, audit.ISSUED)
    ledger._record._waiting.clear()  # as `Record.write` leaves it
    ledger.flush()
    assert [json.loads(line)["event"] for line in store.audit.read_text().splitlines()] == ["installed"]
    assert ledger.trouble == ""


def failing_write(**_: object) -> None:
    raise AuditError("no space")


def test_nothing_is_signed_while_the_records_head_can_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut end would not be noticed: a line ends the trouble with the head no sooner than the head is there."""
    monkeypatch.setattr(context, "_AGAIN_SECONDS", 0.0)
    store = Store(tmp_path / "state")
    store.prepare()
    ledger, facts = Ledger(store, AuditSettings()), {"name": "kubelet-serving", "more": {"request": "u1"}}
    ledger.write(facts, audit.ASKED)
    ledger.flush()
    head = store.audit_head.read_bytes()
    store.audit_head.unlink()
    store.audit_head.mkdir()
    ledger.write(facts, audit.ASKED)
    for tried in (ledger.flush, lambda: ledger.write(facts, audit.ISSUED), ledger.flush):
        with pytest.raises(AuditError):
            tried()
        assert ledger.trouble
    store.audit_head.rmdir()
    store.audit_head.write_bytes(head)
    ledger.write(facts, audit.ISSUED)
    assert (ledger.trouble, audit.verify(store)) == ("", (4, []))
