"""The queue of the gateway's work: the newest counts, each has a turn, and nothing fills the memory."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest

from bridge.gateway import queue
from bridge.gateway.queue import Job, Look, Queue
from bridge.gateway.service import most_at_one_ca
from bridge.gateway.watch import (
    PodObject,
    SigningRequest,
)
from bridge.system.waiting import wait_until
from tests.kit.signing_requests import one, pod_job


def no_node(_: object) -> Look:
    """It is about no node."""
    return Look()


def of_w1(new: SigningRequest | PodObject) -> Look:
    """It is about the node w1, and may be signed."""
    return Look(key=queue.key_of(new, "w1"))


def taken(line: Queue, seconds: float = 0) -> Job | None:
    """The next job."""
    return line.take(seconds)


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


def test_no_delayed_job_is_forgotten_or_late() -> None:
    """Each of many idle threads may be the one that waits for it."""
    line, jobs = Queue(), []
    for number in range(10):
        line.put(one(f"u{number}"), no_node)
        jobs.append(taken(line))
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
