"""What the gateway writes into a CSR object, and when it writes nothing."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from bridge.cluster.api import Reply, Request
from bridge.gateway.context import Context, LeftError
from bridge.gateway.csrs import Writer, with_certificate, with_condition
from bridge.gateway.policy import Hostile
from bridge.gateway.queue import Job, Look
from bridge.gateway.watch import (
    ALLOWS,
    APPROVED,
    DENIED,
    FAILED,
    NOT_ALLOWED,
    PENDING_AT_CA,
    WAITS,
)
from tests.kit.signing_requests import document, one

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


def test_what_is_written_names_the_object() -> None:
    """uid and resourceVersion are in each write, and the others' conditions are as they were."""
    theirs = {"type": "Approved", "status": "True", "reason": "AutoApproved", "lastUpdateTime": "2026-11-26T11:00:00Z"}
    found = replace(one(), conditions=(theirs, {"type": "PendingAtCA", "status": "True"}))
    for body in (
        with_condition(one(), APPROVED, ALLOWS, NOW), with_condition(one(), DENIED, NOT_ALLOWED, NOW),
        with_condition(found, FAILED, NOT_ALLOWED, NOW), with_condition(found, PENDING_AT_CA, WAITS, NOW),
        with_certificate(found, b"pem"),
    ):  # fmt: skip
        assert body["metadata"] == {"uid": "u1", "resourceVersion": "7"}
    assert with_condition(found, FAILED, NOT_ALLOWED, NOW)["status"]["conditions"][0] is theirs
    assert with_certificate(found, b"pem")["status"] == {"certificate": "cGVt", "conditions": [theirs]}
    assert "conditions" not in with_certificate(one(), b"pem")["status"]
    assert replace(one(), name="a b/../c?").path.endswith("/a%20b%2F..%2Fc%3F")


@pytest.mark.parametrize("now", ["7", "8"])
def test_a_write_that_a_policy_of_the_cluster_refuses_is_not_made_again_at_once(now: str) -> None:
    """An admission policy's refusal is a 422, as some conflicts are: after these alone the object is written again."""
    asked, refused = list[str](), Reply(status=422, body=b'{"message": "denied request: not by this user"}')

    def ask(method: str, *_: object, **__: object) -> Reply:
        asked.append(method)
        changed = document()
        changed["metadata"]["resourceVersion"] = now
        return refused if asked == ["PATCH"] else Reply(status=200, body=json.dumps(changed).encode())

    def write(request: Request) -> Reply:
        return ask(request.method)

    context: Any = SimpleNamespace(api=SimpleNamespace(ask=ask), now=lambda: NOW, write=write)
    writer, job = Writer(context), Job(one=one(), look=Look(), arrived=0)
    if now == one().version:
        with pytest.raises(LeftError, match="HTTP 422 not by this user") as e:
            writer.mark(job, PENDING_AT_CA, WAITS)
        assert (e.value.seconds, asked) == (None, ["PATCH", "GET"])
    else:
        assert writer.mark(job, PENDING_AT_CA, WAITS)
        assert asked == ["PATCH", "GET", "GET", "PATCH"]
        assert job.one.size < one().size  # not more with each look: else it would drive others out of the queue


def writing(*, ours: list[bool], late: Callable[[Request], float] = lambda _: 0.0) -> tuple[Any, list[str]]:
    """A context whose writes succeed, each after that many seconds by the clock of verdicts, and the paths of them."""
    sent: list[str] = []
    metadata = json.dumps({"metadata": {"resourceVersion": "8"}}).encode()

    def answer(request: Request, may_repeat: Callable[[], bool]) -> Reply:
        assert may_repeat() is ours[0]
        sent.append(request.path.rpartition("/")[2])
        job.judged -= late(request)
        return Reply(status=200, body=metadata)

    job = Job(one=one(), look=Look(), arrived=0, judged=time.monotonic())
    made: Any = SimpleNamespace(
        api=SimpleNamespace(answer=answer), holder=SimpleNamespace(is_ours=lambda: ours[0]), now=lambda: NOW, job=job
    )
    for method in (Context.assert_ours, Context.assert_fresh, Context.write):
        setattr(made, method.__name__, functools.partial(method, made))
    return made, sent


VERIFIED: Any = SimpleNamespace(chain=[])


def test_no_write_without_the_lease() -> None:
    """Neither a certificate nor a condition is sent once another replica works; before, no write is repeated without asking."""
    ours = [True]
    made, sent = writing(ours=ours)
    assert Writer(made).mark(made.job, PENDING_AT_CA, WAITS)
    assert sent == ["status"]
    ours[0] = False
    for write in (
        lambda: Writer(made).issue(made.job, VERIFIED, VERIFIED),
        lambda: Writer(made).deny(made.job, Hostile("x")),
        lambda: Writer(made).mark(made.job, FAILED, NOT_ALLOWED),
    ):
        with pytest.raises(LeftError, match="another replica works"):
            write()
    assert sent == ["status"]


@pytest.mark.parametrize(
    ("before", "approval", "wanted"),
    [(0.0, 0.0, ["approval", "status"]), (1.5, 0.0, []), (0.0, 1.5, ["approval"])],
)
def test_no_certificate_is_written_by_an_old_verdict(before: float, approval: float, wanted: list[str]) -> None:
    """If a second has passed since the verdict, also while the approval was written, the policy judges it again first."""
    made, sent = writing(ours=[True], late=lambda request: approval if request.path.endswith("approval") else 0.0)
    made.job.judged -= before
    with contextlib.nullcontext() if len(wanted) == 2 else pytest.raises(LeftError, match="too old to be written"):
        assert Writer(made).issue(made.job, VERIFIED, VERIFIED)
    assert sent == wanted
