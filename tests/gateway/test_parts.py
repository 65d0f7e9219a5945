"""The gateway's parts by themselves: the queue, rates, numbers, lines of a stream, objects, requests at a CA, status pages."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from bridge.cluster.api import JSON, Lines, NoAnswerError, Reply, Request
from bridge.cluster.lease import Keeper
from bridge.contract import BackendSettings
from bridge.errors import BackendRefusedError, BridgeError
from bridge.gateway import context, nodes, queue
from bridge.gateway import pages as status_pages
from bridge.gateway.authorities import AuthorityOfSigners
from bridge.gateway.context import Context, Ledger, LeftError, PendingAtCa, PendingRequests
from bridge.gateway.csrs import Writer, with_certificate, with_condition
from bridge.gateway.pages import Metrics, serving
from bridge.gateway.pod_policy import PodRequest
from bridge.gateway.pods import PodJudge, PodWriter
from bridge.gateway.policy import Hostile
from bridge.gateway.queue import Job, Look, Queue
from bridge.gateway.service import most_at_one_ca
from bridge.gateway.watch import (
    ALLOWS,
    APPROVED,
    DENIED,
    FAILED,
    NOT_ALLOWED,
    PENDING_AT_CA,
    WAITS,
    NotAnObjectError,
    PodObject,
    SigningRequest,
    Watch,
    parse,
    parse_pod,
)
from bridge.pki.certificates import pem
from bridge.settings import address_of, load
from bridge.settings.tables import AuditSettings, GatewaySettings
from bridge.state import Store, audit
from bridge.state.audit import AuditError
from bridge.system import waiting
from bridge.system.waiting import Rate, wait_until
from tests.kit import issuing
from tests.kit.forged import validity, with_field
from tests.kit.issuing import Signer
from tests.kit.measured import traced

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


def document(uid: str = "u1", **spec: Any) -> dict[str, Any]:
    """As the API server gives it."""
    return {
        "metadata": {
            "name": f"csr-{uid}", "uid": uid, "resourceVersion": "7", "creationTimestamp": "2026-11-26T12:00:00Z",
        },
        "spec": {
            "request": base64.b64encode(b"pem").decode(), "signerName": "kubernetes.io/kubelet-serving",
            "username": "system:node:w1", "groups": ["system:nodes"], "usages": ["server auth"], **spec,
        },
        "status": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "conditions", "certificate", "how"),
    [
        ("ADDED", [], "", "changed"),
        ("MODIFIED", [{"type": DENIED, "status": "True"}], "", "over"),
        ("ADDED", [{"type": FAILED, "status": "True"}], "", "over"),
        ("ADDED", [{"type": DENIED, "status": "False"}, {"type": APPROVED, "status": "True"}], "", "changed"),
        ("ADDED", [{"type": FAILED, "status": "True"}], "cGVt", "changed"),
        ("DELETED", [], "", "over"),
        ("ADDED", ["Denied", None], "", "changed"),
        ("ADDED", 7, "", ""),
        ("BOOKMARK", [], "", ""),
    ],
)
def test_no_more_is_read_of_an_object_that_is_over_than_its_uid(
    kind: str, conditions: Any, certificate: str, how: str
) -> None:
    """A refused or deleted object is over, and each other one is read; a condition in another place refuses nothing."""
    of_user = {
        "annotations": {"type": DENIED, "status": "True", "conditions": f'[{{"type":"{DENIED}","status":"True"}}]'}
    }
    one = document()
    one["metadata"] |= of_user
    one["status"] = {"conditions": conditions, "certificate": certificate}
    line = json.dumps({"type": kind, "object": one}, separators=(",", ":")).encode()
    round_ = Watch(None, ["kubernetes.io/kubelet-serving"])  # type: ignore[arg-type]

    def seen() -> str | list[str] | None:
        found = round_._found(line, "u2".__eq__)
        return found if found is None or isinstance(found, str) else [found.uid]

    assert seen() == {"changed": ["u1"], "over": "u1"}.get(how)
    # what has our answer is not read at all; a user's texts name no other object
    one["metadata"]["annotations"]['"uid":"u2"'] = '"uid":"u2","status":{'
    line = json.dumps({"type": kind, "object": one}, separators=(",", ":")).encode()
    assert seen() == {"changed": ["u1"], "over": "u1"}.get(how)
    assert round_._found(line, "u1".__eq__) is None


def one(uid: str = "u1", *, version: int = 7, seconds: int = 0, **spec: Any) -> SigningRequest:
    """An object."""
    found = parse(document(uid, **spec), 1000)
    return replace(found, version=str(version), created=found.created + timedelta(seconds=seconds))


def no_node(_: object) -> Look:
    """It is about no node."""
    return Look()


def of_w1(new: SigningRequest | PodObject) -> Look:
    """It is about the node w1, and may be signed."""
    return Look(key=queue.key_of(new, "w1"))


def taken(line: Queue, seconds: float = 0) -> Job | None:
    """The next job."""
    return line.take(seconds)


# --- the queue --------------------------------------------------------------------------------------------------------


def test_the_newest_of_a_node_takes_the_place_of_the_others() -> None:
    """The newest request stays in any order of arrival; other requesters' requests for the same node stay, too."""
    line = Queue()
    for number, uid in ((3, "c"), (1, "a"), (2, "b")):
        line.put(one(uid, seconds=number), of_w1)
    line.put(one("other", username="system:bootstrap:abcdef"), of_w1)
    assert [job.one.uid for job in iter(lambda: taken(line), None)] == ["c", "other"]
    again = Queue()
    assert again.put(one("a", seconds=1), of_w1) == []
    assert again.put(one("b", seconds=2), of_w1) == ["a"]


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_write_on_the_older_of_two_of_one_second_makes_it_no_newer(order: tuple[str, str]) -> None:
    """An approval gives it a greater version than the newer one has, while it waits as well as while it is worked at."""
    line = Queue()
    versions = {"a": 1, "b": 2}
    line.put(one(order[0], version=versions[order[0]]), of_w1)
    worked_at = taken(line)
    assert worked_at is not None
    line.put(one(order[1], version=versions[order[1]]), of_w1)
    line.put(one("a", version=3), of_w1)
    line.done(worked_at)
    assert line.put(one("a", version=4), of_w1) == []
    assert line.is_newest(Job(one=one("b"), look=of_w1(one("b")), arrived=0.0))
    assert [job.one.uid for job in iter(lambda: taken(line), None)] == ["b"] * (order[1] == "b")


def test_a_hostile_request_replaces_no_honest_one() -> None:
    """A newer one that will be refused stands beside an honest one, in whichever order they come."""
    for order in (("honest", "hostile"), ("hostile", "honest")):
        line = Queue()
        for uid in order:
            late = 5 if uid == "hostile" else 0
            assert line.put(one(uid, seconds=late), lambda new: of_w1(new) if new.uid == "honest" else Look()) == []
        jobs = list(iter(lambda: taken(line), None))  # noqa: B023
        assert sorted(job.one.uid for job in jobs) == ["honest", "hostile"]
        assert all(line.is_newest(job) for job in jobs)


def test_what_changes_while_it_is_worked_at_is_looked_at_again() -> None:
    """The newer version is kept for afterwards; one that has an answer by then is not."""
    line = Queue()
    line.put(one(version=1), no_node)
    job = taken(line)
    assert job is not None
    line.put(one(version=2), no_node)
    assert taken(line) is None
    line.done(job)
    again = taken(line)
    assert again is not None
    assert again.one.version == "2"
    line.remove("u1")
    line.done(again)
    assert line.counts() == (0, 0)


def test_what_is_removed_while_it_is_worked_at_does_not_come_back() -> None:
    """A deleted object, and each one once another replica works, would be looked at for ever; one that comes anew is kept."""
    line = Queue()

    def worked_at() -> Job:
        line.put(one(), no_node)
        job = taken(line)
        assert job is not None
        return job

    for end in (lambda: line.remove("u1"), line.forget):
        job = worked_at()
        end()
        line.delay(job, 0)
        assert line.counts() == (0, 0)
    job = worked_at()
    line.forget()
    line.put(one(), no_node)  # by the watch, once this replica works again
    line.delay(job, 0)
    assert taken(line, 2) is job
    line.delay(job, 0)
    assert taken(line, 2) is job


def test_what_is_delayed_comes_back_in_time_or_when_it_changes() -> None:
    """A delayed request comes back at its time or when it changes, and not before; `wake` brings all of them back."""
    line = Queue()
    line.put(one(), no_node)
    job = taken(line)
    assert job is not None
    begun = time.monotonic()
    line.delay(job, 0.15)
    assert taken(line, 180) is job
    assert time.monotonic() - begun >= 0.15
    line.delay(job, 600)
    assert taken(line) is None
    line.put(one(version=8), no_node)
    changed = taken(line)
    assert changed is not None
    assert changed.one.version == "8"
    line.delay(changed, 600)
    assert taken(line) is None
    line.wake()
    assert taken(line) is changed


def test_a_job_that_is_due_wakes_one_thread_and_not_all() -> None:
    """A due job wakes one of a hundred idle threads, so that a flood does not take the processor; none is forgotten or late."""
    line, jobs, woken = Queue(), [], []
    for number in range(10):
        line.put(one(f"u{number}"), no_node)
        jobs.append(taken(line))
    first = line._changed.wait

    def wait(timeout: float | None = None) -> bool:
        try:
            return first(timeout)
        finally:
            woken.append(timeout)

    line._changed.wait = wait  # type: ignore[method-assign]
    times: list[float] = []

    def work() -> None:
        while taken(line, 600) is not None:
            times.append(time.monotonic())

    threads = [threading.Thread(target=work) for _ in range(50)]
    for thread in threads:
        thread.start()
    begun = time.monotonic()
    for number, job in enumerate(reversed(jobs)):  # the later ones first
        assert job is not None
        line.delay(job, 0.1 * (10 - number))
    assert wait_until(lambda: len(times), lambda count: count == 10, timedelta(minutes=3), pause_seconds=0.02) == 10
    late = [at - begun - 0.1 * number for number, at in enumerate(times, 1)]
    assert len(woken) <= 4 * 10
    line.close()
    for thread in threads:
        thread.join(180)
    assert not any(thread.is_alive() for thread in threads)
    assert max(late) < 180  # without a word they would sleep for ten minutes


def test_a_flood_does_not_fill_the_memory() -> None:
    """Requests that do not fit are left to the API server, and the queue knows it."""
    line = Queue()
    for number in range(queue.MOST_JOBS):
        line.put(replace(one(f"u{number}"), size=100), no_node)
    assert not line.overflowed
    line.put(one("more"), no_node)
    assert line.overflowed
    small = Queue()
    small.put(replace(one("large"), size=queue.MOST_BYTES - 10), no_node)
    small.put(replace(one("next"), size=100), no_node)
    assert small.overflowed
    assert taken(small) is not None
    small.put(replace(one("next"), size=100), no_node)
    assert small.counts() == (1, 1)


def test_a_flood_in_the_queue_gives_way() -> None:
    """In a full queue a flood's requests give way to others', and none gives way to the flood's, until all have the same number."""
    line = Queue()
    for number in range(30):
        line.put(replace(one(f"flood{number}", username="mallory"), size=queue.MOST_BYTES // 20), no_node)
    assert (line.counts(), line.greediest()) == ((20, 0), "mallory")
    job = taken(line)
    assert job is not None
    job.begun = True
    line.delay(job, 60)
    for number in range(15):
        line.put(replace(one(f"w{number}", username=f"w{number % 3}"), size=queue.MOST_BYTES // 20), no_node)
    line.put(replace(one("flood31", username="mallory"), size=queue.MOST_BYTES // 20), no_node)
    users = [found.one.request.username for found in iter(lambda: taken(line), None)]
    assert {user: users.count(user) for user in users} == {"mallory": 4, "w0": 5, "w1": 5, "w2": 5}
    line.wake()
    assert taken(line) is job  # a thread had begun it
    assert line.greediest() == ""


@pytest.mark.attack("G1")
def test_each_requester_has_its_turn() -> None:
    """A flood that waits already is in no other requester's way, and its own order stays."""
    line = Queue()
    for number in range(50):
        line.put(one(f"flood{number}", username="mallory"), no_node)
    for number in range(2):
        line.put(one(f"w2-{number}", username="w2"), no_node)
    order = [job.one.uid for job in iter(lambda: taken(line), None)]
    assert order[:5] == ["flood0", "w2-0", "flood1", "w2-1", "flood2"]
    assert len(order) == 52


def test_what_changes_its_size_is_counted_as_it_is() -> None:
    """An update of a waiting object changes its size in the queue, and makes no room."""
    line = Queue()
    line.put(replace(one(version=1), size=100), no_node)
    line.put(replace(one(version=2), size=queue.MOST_BYTES), no_node)
    line.put(replace(one("u2", username="other"), size=queue.MOST_BYTES), no_node)
    assert line.overflowed
    assert taken(line) is not None
    line.put(replace(one("u2", username="other"), size=queue.MOST_BYTES), no_node)
    assert line.counts() == (1, 1)


def lane_of_pods(one: SigningRequest | PodObject) -> str:
    return "pods" if isinstance(one, PodObject) else ""


def pod_object(uid: str) -> PodObject:
    found = pod_job(uid).one
    assert isinstance(found, PodObject)
    return found


def uids(*jobs: Job | None) -> list[str]:
    return [job.one.uid if job is not None else "" for job in jobs]


def test_a_ca_that_hangs_leaves_a_thread_for_each_other_ca() -> None:
    """Its jobs take no more than its share of the threads, and the next of them begins when one of them ends."""
    line = Queue(lane_of_pods, most_at_one_ca(3, cas=2))
    for number in range(4):
        line.put(pod_object(f"pod{number}"), no_node)
    pods = [taken(line) for _ in range(3)]
    assert uids(*pods) == ["pod0", "pod1", ""]
    for number in range(2):  # whatever else comes for it meanwhile
        line.put(one(f"csr{number}"), no_node)
        assert uids(taken(line)) == [f"csr{number}"]
    woken: list[Job | None] = []
    thread = threading.Thread(target=lambda: woken.append(taken(line, 600)))
    thread.start()
    assert pods[0] is not None
    line.delay(pods[0], 600)
    thread.join(180)
    assert uids(*woken, taken(line)) == ["pod2", ""]
    assert pods[1] is not None
    line.done(pods[1])
    assert uids(taken(line)) == ["pod3"]


@pytest.mark.parametrize(("threads", "cas", "most"), [(32, 1, 32), (32, 2, 31), (32, 4, 10), (2, 2, 1), (1, 2, 1)])
def test_the_threads_of_all_cas_but_one_leave_one_to_the_last(threads: int, cas: int, most: int) -> None:
    """However many of them hang; with a single CA, all threads are its own."""
    assert most_at_one_ca(threads, cas) == most
    assert threads < cas or most * (cas - 1) < threads


def test_versions_of_a_waiting_object_take_no_more_room() -> None:
    """While its CA is busy one object changes all the time: it keeps its place; what goes leaves none, and what comes back is there once."""
    line = Queue(lane_of_pods, 1)
    for uid in ("working", "first", "second"):
        line.put(pod_object(uid), no_node)
    working = taken(line)
    assert working is not None
    for number in range(50):
        line.put(replace(pod_object("first"), version=f"{100 + number}", size=2000 + number), no_node)
    [lane] = line._lanes.values()
    assert sum(map(len, lane.ready.values())) == 2
    line.remove("second")
    assert sum(map(len, lane.ready.values())) == 1
    line.delay(working, 600)
    first = taken(line)
    assert first is not None
    assert first.one.version == "149"
    line.put(replace(pod_object("working"), version="1000"), no_node)  # it need not wait for its time
    line.wake()
    line.done(first)
    assert uids(taken(line)) == ["working"]
    assert (taken(line), line._bytes, line._shares) == (None, 0, {})


def test_an_object_that_comes_twice_at_once_has_one_job() -> None:
    """A newer version comes while the first is looked at, without the lock."""
    line = Queue()

    def look(_: object) -> Look:
        line.put(one("u1", version=8), no_node)
        return Look()

    line.put(one("u1"), look)
    job = taken(line)
    assert job is not None
    assert taken(line) is None
    line.done(job)
    assert line.counts() == (0, 0)


def test_what_another_replica_took_over_holds_no_place() -> None:
    """What was worked at when the lease was lost counts as ended, and other jobs begin once this replica works again."""
    line = Queue(lane_of_pods, 1)
    line.put(pod_object("pod0"), no_node)
    job = taken(line)
    assert job is not None
    line.forget()
    line.put(pod_object("pod7"), no_node)
    assert taken(line) is None
    line.delay(job, 0)
    assert uids(taken(line)) == ["pod7"]


def test_nothing_is_taken_after_the_end() -> None:
    """A worker that waits is woken."""
    line = Queue()
    threading.Timer(0.1, line.close).start()
    begin = time.monotonic()
    assert taken(line, 600) is None
    assert time.monotonic() - begin < 300


# --- rates ------------------------------------------------------------------------------------------------------------


def test_a_bucket_fills_with_time() -> None:
    """A requester may send so many at once, then one after the other, each at its own time; another requester has its own bucket."""
    rate = Rate(60)
    assert {rate.reserve("w1", 0.0) for _ in range(60)} == {0}
    assert [rate.reserve("w1", 0.0) for _ in range(3)] == [pytest.approx(seconds) for seconds in (1, 2, 3)]
    assert rate.reserve("w2", 0.0) == 0
    assert rate.reserve("w1", 3.5) == pytest.approx(0.5)
    assert rate.reserve("w1", 10_000) == 0


def test_a_line_before_a_bucket_has_an_end() -> None:
    """A flood does not wait in it for hours, with an honest request of the same name behind it."""
    rate = Rate(60)
    waits = [rate.reserve("token", 0.0) for _ in range(1000)]
    assert [wait for wait in waits if wait is not None][-1] == pytest.approx(60)
    assert waits[-1] is None
    assert rate.reserve("token", 1.0) == pytest.approx(60)


def test_names_of_others_choice_fill_no_memory() -> None:
    """The one that has not asked for longest is forgotten."""
    rate = Rate(1)
    for number in range(20_000):
        rate.reserve(f"user-{number}", 0.0)
    assert rate.reserve("user-19999", 0.0) != 0
    assert rate.reserve("user-0", 0.0) == 0


def pod_job(uid: str = "r1", **request: Any) -> Job:
    """A request of a pod, as a worker takes it from the queue."""
    asked = PodRequest(
        signer="corp.example/spiffe", namespace="shop", pod="web", pod_uid="p1", service_account="web",
        service_account_uid="s", node="w1", node_uid="n", seconds=86400, annotations=(), pem=b"",
    )  # fmt: skip
    found = PodObject(
        name=uid, uid=uid, version="1", created=NOW, conditions=(), certificate="", is_deleted=False, size=1000,
        request=replace(asked, **request),
    )  # fmt: skip
    return Job(one=found, look=Look(), arrived=0.0)


def context_of(answer: Callable[[], Reply]) -> Any:
    """Settings as they are without a file, and an API server that answers like this."""
    api = SimpleNamespace(ask=lambda *_, **__: answer(), answer=lambda *_: answer())
    return SimpleNamespace(settings=SimpleNamespace(gateway=GatewaySettings()), api=api, now=lambda: NOW)


def test_what_a_pod_asks_for_in_vain_takes_nothing_of_its_namespaces_rate() -> None:
    """Thousands of requests for one pod, of a stolen node, keep no pod of another node of the namespace waiting."""
    judge = PodJudge(context_of(lambda: Reply(status=500, body=b"")))
    turns = [judge.turn(pod_job()) for _ in range(7000)]
    assert turns.count(0) == GatewaySettings().node_rate
    assert turns.count(None) > 6900
    assert judge.turn(pod_job(pod_uid="p2", node="w2")) == 0


def test_what_users_write_into_their_objects_fills_no_memory() -> None:
    """Of 100 service accounts, namespaces and pods with thousands of annotations, labels and volumes little is remembered."""
    many = {f"corp.example/{number}": "" for number in range(2000)}
    sources = [{"podCertificate": {"signerName": "corp.example/spiffe", "userAnnotations": many, "keyType": "RSA2048"}}]
    sources += [
        {"podCertificate": {"signerName": f"corp.example/{number}", "keyType": "RSA3072"}} for number in range(2000)
    ]
    document = {
        "metadata": {"uid": "u", "annotations": many, "labels": {**many, "mtls": "yes"}},
        "spec": {"volumes": [{"projected": {"sources": sources}}]},
    }
    body = json.dumps(document).encode()
    judge = PodJudge(context_of(lambda: Reply(status=200, body=body)))
    with traced() as memory:
        for number in range(100):
            assert judge._known(f"namespaces/shop/serviceaccounts/s{number}")[0] == "u"
            assert judge._known(f"namespaces/n{number}", labels={"mtls": "yes"})[1] == {"mtls": "yes"}
            job = pod_job(f"r{number}", annotations=tuple(many.items()))
            found = judge._pod(job, at_write=False)
            assert found is not None
            assert found.key_types == {"RSA2048"}
            assert judge._pod(job, at_write=True) is found
        assert memory()[0] < 1 << 20


def test_objects_of_users_are_parsed_one_at_a_time() -> None:
    """Each thread that looks at a pod has its answer of up to half a megabyte, and one thread what that becomes: five."""
    held: list[bool] = []

    class Seen(Reply):
        def found(self, path: str) -> Any:
            held.append(judge._reading.locked())
            return super().found(path)

    judge = PodJudge(context_of(lambda: Seen(status=200, body=b"{}")))
    judge._pod(pod_job(), at_write=False)
    judge._known("nodes/w1")
    assert (held, judge._reading.locked()) == ([True, True], False)


def test_a_pod_of_megabytes_is_not_read() -> None:
    """Its request waits, and the reason names the pod; other trouble of the API server is no fault of the pod's."""
    error = NoAnswerError("a longer one")
    error.is_too_long = True

    def answer() -> Reply:
        raise error

    judge = PodJudge(context_of(answer))
    with pytest.raises(LeftError, match=r"^namespaces/shop/pods/web: wanted at most 512 KiB, found more: shorten"):
        judge._pod(pod_job(), at_write=False)
    error.is_too_long = False
    with pytest.raises(NoAnswerError):
        judge._pod(pod_job(), at_write=False)


def test_few_pods_are_looked_at_at_once() -> None:
    """Forty threads at once have sixteen answers of half a megabyte, and each of them has its own in the end."""
    held: list[int] = []
    there, may_answer = threading.Semaphore(0), threading.Event()

    def answer() -> Reply:
        held.append(1)
        there.release()
        may_answer.wait(180)
        held.pop()
        return Reply(status=200, body=b"{}")

    judge = PodJudge(context_of(answer))
    with ThreadPoolExecutor(40) as pool:
        found = [pool.submit(judge._pod, pod_job(f"r{number}"), at_write=False) for number in range(40)]
        for _ in range(16):
            assert there.acquire(timeout=180)
        assert not there.acquire(timeout=0.3)
        assert len(held) == 16
        may_answer.set()
        assert all(one.result(180) is not None for one in found)


def test_more_pods_that_wait_than_events_take_none_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many requests wait as there may be events a minute: each minute has its full number of events."""
    clock, sent = [0.0], list[float]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def answer() -> Reply:
        sent.append(clock[0])
        return Reply(status=201, body=b"")

    writer = PodWriter(context_of(answer))
    for number in range(4 * 240):
        clock[0] = number / 4
        writer.tell(pod_job(f"r{number}"), "left", "the policy has no table for this signer")
    minutes = [sum(begin <= one < begin + 60 for one in sent) for begin in (0, 60, 120, 180)]
    assert minutes == [pytest.approx(wanted, abs=2) for wanted in (240, 120, 120, 120)]


# --- objects ----------------------------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@given(_JSON, st.sampled_from(["metadata", "spec", "status", ""]), st.sampled_from([*document()["spec"], "conditions"]))
def test_whatever_comes_is_an_object_or_not(value: Any, part: str, key: str) -> None:
    """Any JSON in any place gives an object or an error of ours."""
    made = document()
    if part:
        made[part] = {**made[part], key: value}
    try:
        found = parse(made if part else value, 10)
    except NotAnObjectError:
        return
    assert isinstance(found.request.username, str)


def test_each_of_a_requesters_groups_counts_and_takes_its_room() -> None:
    """A person's grant may be for the last of hundreds; of thousands the queue holds as many objects as it has room for."""
    text = json.dumps(document(groups=[*(f"g{number}" for number in range(6000)), "developers"]))
    with traced() as memory:
        found = parse(json.loads(text), len(text))
        assert memory()[0] < found.size
    assert "developers" in found.request.groups
    assert one().size < 6000


def test_each_of_a_pods_annotations_takes_its_room() -> None:
    """Who makes a pod chooses thousands, of which a queue that counts their JSON alone would hold seven times its room."""
    spec = dict.fromkeys(("podName", "podUID", "serviceAccountName", "serviceAccountUID", "nodeName", "nodeUID"), "x")
    spec |= {"signerName": "corp.example/spiffe", "stubPKCS10Request": "AAAA"}
    many = {"unverifiedUserAnnotations": {f"a.b/{number}": "" for number in range(4000)}}
    metadata = {**document()["metadata"], "namespace": "shop"}
    text = json.dumps({"metadata": metadata, "spec": {**spec, **many}})
    with traced() as memory:
        found = parse_pod(json.loads(text), len(text))
        assert memory()[0] < found.size
    assert len(found.request.annotations) == 4000
    assert parse_pod({"metadata": metadata, "spec": spec}, 1000).size < 6000


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


def test_a_long_message_is_cut_to_its_end() -> None:
    """The API server repeats the request in the beginning of an error."""
    secret = "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURQ" * 300
    text = f'CSR "x" is invalid: spec.request: "{secret}": wrong'
    reply = Reply(status=422, body=json.dumps({"message": text}).encode())
    assert reply.message == "wrong"
    assert len(Reply(status=422, body=json.dumps({"message": secret}).encode()).message) <= 300


# --- a stream ---------------------------------------------------------------------------------------------------------


class _Pieces:
    """The pieces of a stream, as they come."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = list(pieces)

    def piece(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


def lines_of(longest: int, *pieces: bytes) -> tuple[list[bytes], int]:
    """The lines, and how many were left out."""
    made = Lines(_Pieces(*pieces), longest, "x")  # type: ignore[arg-type]
    return list(made), made.left_out


def test_lines_come_whole_however_they_are_cut() -> None:
    """Lines that are too long are left out, and counted once; those after them are read."""
    assert lines_of(10, b"a\nbc", b"d\n", b"\ne") == ([b"a", b"bcd", b""], 0)
    assert lines_of(4, b"abcdefgh\nok\n") == ([b"ok"], 1)
    assert lines_of(4, b"abcd", b"efgh", b"ij\nok\nabcde\n", b"no") == ([b"ok"], 2)


@given(st.lists(st.binary(max_size=12), max_size=12))
def test_cutting_changes_nothing(pieces: list[bytes]) -> None:
    """The same lines as of the whole text."""
    whole = b"".join(pieces)
    assert lines_of(1000, *filter(None, pieces))[0] == whole.split(b"\n")[:-1]


# --- requests at a CA -------------------------------------------------------------------------------------------------


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


# --- the record -------------------------------------------------------------------------------------------------------


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


def test_lines_that_wait_are_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one write is on its way to the disk, others' lines wait, and the next write has all of them; each error is its own's."""
    store = Store(tmp_path / "state")
    store.prepare()
    ledger, writes, may_write = Ledger(store, AuditSettings()), list[int](), threading.Event()
    write = ledger._record.write

    def slow(**how: Any) -> None:
        writes.append(len(ledger._record._waiting))
        may_write.wait(180)
        if len(writes) == 3:
            raise AuditError("no space")
        write(**how)

    monkeypatch.setattr(ledger._record, "write", slow)
    facts = {"name": "kubelet-serving", "more": {"request": "u1"}}
    with ThreadPoolExecutor(16) as pool:
        lines = [pool.submit(ledger.write, facts, audit.ASKED) for _ in range(16)]
        wait_until(lambda: len(ledger._waiting), lambda count: count == 15, timedelta(minutes=3), pause_seconds=0.01)
        assert not any(line.done() for line in lines)
        may_write.set()
        for line in lines:
            line.result(180)
    assert writes == [1, 15]
    assert len(store.audit.read_text().splitlines()) == 16
    with pytest.raises(AuditError):
        ledger.write(facts, audit.ASKED)


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


# --- CAs --------------------------------------------------------------------------------------------------------------


def authority_of(directory: Path, root: Signer, *shown: x509.Certificate) -> AuthorityOfSigners:
    """The CA of a cluster that trusts `root`; it shows these certificates when it is asked for its own."""
    (directory / "ca.crt").write_bytes(pem(root.certificate))
    backend = SimpleNamespace(issuers=lambda: list(shown))
    ca: Any = SimpleNamespace(authority="ca", label="ca", open=lambda: backend, settings=BackendSettings())
    return AuthorityOfSigners(ca, load.parse(f'[node]\npki_dir = "{directory}"\n'), [])


def test_a_cas_other_certificates_shorten_no_life(tmp_path: Path) -> None:
    """
    Old ones of its own, other roots and one of the year 0 are shown by a CA that has been renewed (certmonger's helpers,
    EST's roll-over); what ends first on the way from the one that signs counts.
    """
    now = issuing.NOW
    root, other = Signer.make("root"), Signer.make("other", end=now - timedelta(days=1))
    ours, old = (Signer.make("ours", parent=root, end=now + timedelta(days=days)) for days in (50, 2))
    odd = with_field(ours.certificate, 4, validity(b"20200101000000Z", b"00001231235959Z"))
    year_0 = x509.load_pem_x509_certificate(odd.encode())
    above = (root.certificate, old.certificate, other.certificate, year_0)
    for first, wanted in ((ours, ours), (old, old), (root, root)):
        authority = authority_of(tmp_path, root, first.certificate, *above)
        assert authority.check(now) == []
        assert authority.end() == wanted.certificate.not_valid_after_utc
    for first_shown in (year_0, other.certificate):  # whose answers are refused
        authority = authority_of(tmp_path, root, first_shown, *above)
        with pytest.raises(BackendRefusedError, match="wanted the CA of ca"):
            authority.check(now)
        assert authority.end() == root.certificate.not_valid_after_utc


def test_of_two_roots_for_pods_the_one_that_signs_counts(tmp_path: Path) -> None:
    """Where the CA does not tell which of them signs, no request is for longer than either of them lives."""
    now = datetime.now(UTC)
    ended, old, new = (
        Signer.make(f"root {days}", begin=now - timedelta(days=50), end=now + timedelta(days=days))
        for days in (-2, 2, 99)
    )
    (tmp_path / "pods.crt").write_bytes(pem(ended.certificate, new.certificate, old.certificate))
    for backend, wanted in (
        (SimpleNamespace(), old),
        (SimpleNamespace(issuers=lambda: [new.certificate]), new),
        (SimpleNamespace(issuers=lambda: [old.certificate]), old),
    ):
        ca: Any = SimpleNamespace(authority="pods", label="pods", open=lambda: backend, settings=BackendSettings())  # noqa: B023
        authority = AuthorityOfSigners(ca, load.parse(f'[node]\npki_dir = "{tmp_path}"\n'), [])
        assert authority.check(now) == []
        assert authority.end() == wanted.certificate.not_valid_after_utc


# --- what can be asked about it ---------------------------------------------------------------------------------------


def test_numbers_are_in_prometheus_form() -> None:
    """Histogram buckets are cumulative, labels are quoted, and the newest end of a name counts."""
    metrics = Metrics(("s",))
    metrics.signed("s", 'a"b\nc', NOW, 0.2, NOW)
    metrics.signed("s", 'a"b\nc', NOW - timedelta(days=1), 20, NOW)
    text = metrics.text()
    assert 'requests_total{signer="s",outcome="signed"} 2' in text
    assert 'sign_seconds_bucket{signer="s",le="0.25"} 1' in text
    assert 'sign_seconds_bucket{signer="s",le="+Inf"} 2' in text
    assert f'name="a\\"b\\nc"}} {NOW.timestamp():.0f}' in text


def test_many_connections_use_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that holds more connections open than allowed keeps no probe out."""
    monkeypatch.setattr(status_pages._Handler, "timeout", 600)  # a silent one would be closed after a while, too
    pages = {"/healthz": lambda: (200, "ok\n")}
    with serving(("127.0.0.1", 0), pages) as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=60).text == "ok\n"
        assert silent[0].recv(1) == b""  # closed
        silent[-1].settimeout(0.1)
        with pytest.raises(TimeoutError):
            silent[-1].recv(1)
        assert requests.get(f"http://127.0.0.1:{port}/else", timeout=60).status_code == 404
        for connection in silent:
            connection.close()
        with pytest.raises(BridgeError, match="can't listen"), serving(("127.0.0.1", port), pages):
            pass


def test_headers_of_megabytes_use_up_nothing() -> None:
    """Each of 16 connections could send a hundred lines of 64 KiB; of a request that is no longer than usual, each line is read."""
    many = b"GET /healthz HTTP/1.1\r\n" + b"X: %b\r\n" % (b"x" * 60_000) * 90 + b"\r\n"
    with serving(("127.0.0.1", 0), {"/healthz": lambda: (200, "ok\n")}) as port:
        with traced() as memory:
            address = ("127.0.0.1", port)
            with socket.create_connection(address, timeout=60) as connection, contextlib.suppress(ConnectionError):
                connection.sendall(many)
                connection.recv(1000)
            assert memory()[1] < 1 << 20
        assert requests.get(f"http://127.0.0.1:{port}/healthz", headers={"X": "x" * 4000}, timeout=60).text == "ok\n"


@pytest.mark.parametrize("listen", ["[::1]:0", "127.0.0.1:0", "localhost:0"])
def test_the_pages_are_at_each_address_that_the_settings_take(listen: str) -> None:
    """Also at one of IPv6, as far as this machine has it."""
    address, own = address_of(listen), Path("/proc/net/if_inet6")
    assert address is not None
    if ":" in address[0] and not (own.exists() and f"{1:032x} " in own.read_text()):
        with pytest.raises(BridgeError, match="Cannot assign requested address"), serving(address, {}):
            pass
        return
    with serving(address, {"/healthz": lambda: (200, "ok\n")}) as port:
        assert requests.get(f"http://{listen.removesuffix('0')}{port}/healthz", timeout=60).text == "ok\n"


def test_pages_that_strangers_ask_for_take_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that takes a while to write is written once for all who ask meanwhile, and again later."""
    asked: list[float] = []

    def slow() -> tuple[int, str]:
        asked.append(time.monotonic())
        time.sleep(0.1)
        return 200, f"{len(asked)}\n"

    def text(port: int) -> str:
        return requests.get(f"http://127.0.0.1:{port}/metrics", timeout=180).text

    with monkeypatch.context() as patch, serving(("127.0.0.1", 0), {"/metrics": slow}) as port:
        patch.setattr(waiting, "_CACHED_TIMES", 36_000)
        patch.setattr(waiting, "_LONGEST_CACHED_SECONDS", 3600.0)
        assert [text(port) for _ in range(5)] == ["1\n"] * 5
    with serving(("127.0.0.1", 0), {"/metrics": slow}) as port:
        assert text(port) == "2\n"
        limit = timedelta(minutes=3)
        assert wait_until(lambda: text(port), lambda found: found != "2\n", limit, pause_seconds=0.1) == "3\n"
    assert asked[2] - asked[1] >= 2


_ENTRY = '{"addresses": ["192.0.2.9"]}'


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        (f"echo '{_ENTRY}'", ""),
        (f"echo noise >&2; echo '{_ENTRY}'", ""),
        (f"sleep 600 & echo '{_ENTRY}'", ""),  # which keeps its standard output open
        (f"setsid sh -c 'exec sleep 600' & echo '{_ENTRY}'", ""),
        ("yes", "printed more than 64 KiB"),
        ("yes >&2", "was still running after 2 s, and was killed"),
        ("sleep 600; echo", "was still running after 2 s, and was killed"),
        ("kill -9 $$", "was ended by signal 9"),
        ("exit 3", "ended with code 3"),
    ],
)
def test_how_an_inventory_command_may_behave(
    script: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its background processes and its endless output delay no request and fill no memory."""
    monkeypatch.setattr(nodes, "_COMMAND_LIMIT", timedelta(seconds=2 if "after 2 s" in wanted else 900))
    program = tmp_path / "cmdb"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    begin = time.monotonic()
    if wanted:
        with pytest.raises(BridgeError, match=wanted):
            nodes._ask_command(program, "w1")
    else:
        found = nodes._ask_command(program, "w1")
        assert found is not None
        assert found.addresses == ("192.0.2.9",)
    assert time.monotonic() - begin < 300


def test_an_inventory_command_has_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No open file, and of the environment only what says where programs are."""
    program, found = tmp_path / "cmdb", tmp_path / "found"
    program.write_text(f"#!/bin/sh\n(env | cut -d= -f1; ls -l /proc/self/fd) >{found}\n")
    program.chmod(0o755)
    secret = tmp_path / "secret"
    secret.write_text("x")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("VAULT_TOKEN", "x")
    with secret.open("rb") as opened:
        os.set_inheritable(opened.fileno(), True)
        assert nodes._ask_command(program, "w1") is None
    names = found.read_text()
    assert str(secret) not in names
    assert not {"CREDENTIALS_DIRECTORY", "VAULT_TOKEN"} & set(names.split())
    assert "PATH" in names.split()


def test_the_dns_proves_both_ways() -> None:
    """An address that leads to a name, and back."""
    assert nodes.host_of("127.0.0.1") == "localhost"
    assert nodes.host_of("192.0.2.1") is None


@pytest.mark.attack("G7")
def test_a_resolver_that_does_not_answer_holds_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look ends in time, at most so many lookups run at once, and an answer that comes later counts."""
    answers, running = threading.Event(), []

    def slow(address: str) -> str:
        running.append(address)
        answers.wait(600)
        return f"{address}.example"

    monkeypatch.setattr(nodes, "host_of", slow)
    monkeypatch.setattr(nodes, "_DNS_SECONDS", 0.3)
    resolver = nodes.Resolver(4)
    begin = time.monotonic()
    threads = [
        threading.Thread(target=resolver.hosts, args=([f"192.0.2.{4 * look + n}" for n in range(4)],))
        for look in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begin < 300  # the resolver takes ten minutes
    assert len(running) == 4
    answers.set()
    until = time.monotonic() + 120
    while not all((found := resolver.hosts(running)).values()) and time.monotonic() < until:
        time.sleep(0.01)
    assert found == {address: f"{address}.example" for address in running}
    assert len(running) == 4  # remembered


@pytest.mark.attack("G7")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_name_that_breaks_the_resolver_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who own an address choose the name that it leads to; the next lookups have a thread all the same."""

    def broken(address: str) -> str:
        if address.startswith("192.0.2."):
            raise ValueError("embedded null character")
        return f"{address}.example"

    monkeypatch.setattr(nodes, "host_of", broken)
    resolver = nodes.Resolver(2)
    for number in range(5):
        assert resolver.hosts([f"192.0.2.{number}"]) == {f"192.0.2.{number}": None}
    assert resolver.hosts(["198.51.100.1"]) == {"198.51.100.1": "198.51.100.1.example"}


def test_what_counts_at_a_write_is_looked_at_then(tmp_path: Path) -> None:
    """A file and a Node object of a moment ago are good enough before the CA is asked, and not when its answer is written."""
    there = [b"{}"]

    class OneNode:
        """An API server."""

        def answer(self, request: Request) -> Reply:
            assert request.path == "/api/v1/nodes/w1"
            return Reply(status=200, body=there[0]) if there else Reply(status=404, body=b"{}")

    states = nodes.NodeStates(OneNode())  # type: ignore[arg-type]
    file = tmp_path / "inventory.toml"
    file.write_text("old")
    file.chmod(0o644)
    watched = nodes.WatchedFile(file, "inventory", lambda text, _: text)

    def seen(since: float) -> tuple[bool, str]:
        return states.state("w1", since, newer=False, with_readiness=False).exists, watched.get(since)

    assert seen(time.monotonic()) == (True, "old")
    there.clear()
    file.write_text("another")
    assert seen(time.monotonic() - 30) == (True, "old")
    assert seen(time.monotonic()) == (False, "another")


def test_what_many_threads_want_to_know_is_asked_once() -> None:
    """Threads that want the same answer at the same time wait for the one that asks; another question waits for none."""
    asked, may_answer, answers = list[str](), threading.Event(), list[int]()

    def ask() -> int:
        asked.append(threading.current_thread().name)
        may_answer.wait(600)
        return 7

    known: nodes.Remembered[int, int] = nodes.Remembered()
    threads = [threading.Thread(target=lambda: answers.append(known.of(1, ask))) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(asked), bool, timedelta(minutes=3), pause_seconds=0.01)
    assert known.of(2, lambda: 8) == 8
    may_answer.set()
    for thread in threads:
        thread.join(180)
    assert (answers, len(asked)) == ([7] * 8, 1)
    forgetful = nodes.Remembered[int, int](0.0)
    assert [forgetful.of(1, ask), forgetful.of(1, ask), len(asked)] == [7, 7, 3]


def test_a_node_is_looked_at_again_for_its_own_request() -> None:
    """A node that was not there a moment ago may have just registered; for another's request the last look counts."""
    asked, names = list[str](), ["cp1"]

    class Nodes:
        """An API server."""

        def answer(self, request: Request) -> Reply:
            asked.append(
                f"{request.path.rpartition('/')[2]} {'whole' if request.headers['Accept'] == JSON else 'name'}"
            )
            body = {"status": {"conditions": [{"type": "Ready", "status": "False"}]}}
            is_there = request.path.rpartition("/")[2] in names
            return Reply(status=200 if is_there else 404, body=json.dumps(body).encode())

    states, begin = nodes.NodeStates(Nodes()), time.monotonic()  # type: ignore[arg-type]

    def exists(name: str, since: float, *, newer: bool = False) -> bool:
        return states.state(name, since, newer=newer, with_readiness=False).exists

    assert not exists("w11", begin)
    names.append("w11")
    assert (exists("w11", begin), exists("w11", begin, newer=True), exists("w11", begin)) == (False, True, True)
    assert exists("w11", time.monotonic())
    assert asked == ["w11 name"] * 3
    state = states.state("w11", begin, newer=False, with_readiness=True)  # only a whole object tells
    assert (state.exists, state.ready, asked[3:]) == (True, False, ["w11 whole"])


# --- the lease's thread -----------------------------------------------------------------------------------------------


@pytest.mark.attack("G12")
def test_no_error_ends_the_thread_of_the_lease() -> None:
    """An error that no code has foreseen is logged, and the lease is renewed again."""
    errors = iter([OverflowError(), NoAnswerError("away"), None])
    renewed = threading.Event()

    def renew() -> None:
        if (error := next(errors)) is not None:
            raise error
        renewed.set()
        time.sleep(1)

    keeper = Keeper(renew, timedelta(seconds=0.05))
    keeper.start()
    assert renewed.wait(180)
    keeper.stop()
