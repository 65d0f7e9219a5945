"""Dataclasses as JSON: what is written is what is read, and what is anything else is named by its field alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509

from bridge.contract import Issued
from bridge.pki.certificates import pem
from bridge.specs import SPECS, USER, CertificateSpec, Component
from bridge.system.codec import CodecError, from_json, named, to_json
from tests.kit.issuing import Signer


@dataclass(frozen=True)
class Part:
    """A part."""

    data: bytes
    on: bool


@dataclass(frozen=True)
class Whole:
    """One field of each type."""

    run_id: str = field(metadata=named("run"))
    key_pem: bytes
    csr_pem: bytes | None
    validity: timedelta
    created: datetime
    spec: CertificateSpec
    leaf: x509.Certificate
    answer: Issued
    parts: tuple[Part, ...]
    names: frozenset[str]
    times: Mapping[Component, float]
    late: Part | None = None


@pytest.fixture(scope="module")
def whole() -> Whole:
    leaf = Signer.make("a CA").certificate
    return Whole(
        run_id="1", key_pem=b"a key\n", csr_pem=None, validity=timedelta(hours=1), created=datetime(2026, 1, 1, tzinfo=UTC),
        spec=USER, leaf=leaf, answer=Issued(leaf=leaf, intermediates=(leaf,)), parts=(Part(b"\0", on=True),),
        names=frozenset({"b", "a"}), times={Component.ETCD: 1},
    )  # fmt: skip


def test_what_is_written_is_what_is_read(whole: Whole) -> None:
    """Each type has one form, and the keys are as state files have them."""
    document = json.loads(json.dumps(to_json(whole)))
    text = pem(whole.leaf).decode()
    assert document == {
        "run": "1", "key": "a key\n", "csr": None, "validitySeconds": 3600, "created": "2026-01-01T00:00:00+00:00",
        "spec": "user", "leaf": text, "answer": [text, text], "parts": [{"data": "AA==", "on": True}],
        "names": ["a", "b"], "times": {"etcd": 1}, "late": None,
    }  # fmt: skip
    assert from_json(Whole, document) == whole
    assert from_json(CertificateSpec, "apiserver") == SPECS["apiserver"]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("key", 3, "key: wanted str, found int"),
        ("validitySeconds", "secret", "validitySeconds: wanted timedelta, found str"),
        ("created", "2026-01-01T00:00:00", "created: wanted datetime, found str"),
        ("spec", "secret", "spec: wanted CertificateSpec, found str"),
        ("leaf", "secret", "leaf: wanted Certificate, found str"),
        ("answer", [], "answer: wanted Issued, found list"),
        ("parts", [{"data": "secret", "on": True}], "parts[0].data: wanted bytes, found str"),
        ("parts", [{"data": "AA==", "on": 1}], "parts[0].on: wanted bool, found int"),
        ("parts", [{"data": "AA=="}], "parts[0].on: the value is missing"),
        ("parts", "secret", "parts: wanted tuple, found str"),
        ("times", {"secret": 1}, "wanted Component, found str"),
        ("late", {}, "late.data: the value is missing"),
        ("secret", 1, "wanted a Whole, found 1 unknown keys"),
    ],
)
def test_anything_else_is_named_and_not_repeated(whole: Whole, key: str, value: Any, text: str) -> None:
    """The error has the field and two types; the value may be a key."""
    with pytest.raises(CodecError) as e:
        from_json(Whole, {**to_json(whole), key: value})
    assert text in str(e.value)
    assert "secret" not in str(e.value)
