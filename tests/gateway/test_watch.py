"""Objects of the API server: what is read of them, and how much room they take."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.gateway.watch import (
    APPROVED,
    DENIED,
    FAILED,
    NotAnObjectError,
    Watch,
    parse,
    parse_pod,
)
from tests.kit.measured import traced
from tests.kit.signing_requests import document, one


@pytest.mark.parametrize(
    ("kind", "conditions", "certificate", "how"),
    [
        ("ADDED", [], "", "changed"),
        ("MODIFIED", [{"type": DENIED, "status": "True"}], "", "finished"),
        ("ADDED", [{"type": FAILED, "status": "True"}], "", "finished"),
        ("ADDED", [{"type": DENIED, "status": "False"}, {"type": APPROVED, "status": "True"}], "", "changed"),
        ("ADDED", [{"type": FAILED, "status": "True"}], "cGVt", "finished"),
        ("DELETED", [], "", "deleted"),
        ("ADDED", ["Denied", None], "", "changed"),
        ("ADDED", 7, "", ""),
        ("BOOKMARK", [], "", ""),
    ],
)
def test_an_event_gives_an_object_or_the_uid_of_a_deleted_one(
    kind: str, conditions: Any, certificate: str, how: str
) -> None:
    """A refused object is finished; a condition in another place refuses nothing."""
    of_user = {
        "annotations": {"type": DENIED, "status": "True", "conditions": f'[{{"type":"{DENIED}","status":"True"}}]'}
    }
    one = document()
    one["metadata"] |= of_user
    one["status"] = {"conditions": conditions, "certificate": certificate}
    line = json.dumps({"type": kind, "object": one}, separators=(",", ":")).encode()
    found = Watch(None, ["kubernetes.io/kubelet-serving"])._found(line)  # type: ignore[arg-type]

    if found is None or isinstance(found, str):
        assert found == {"deleted": "u1"}.get(how)
    else:
        assert (found.uid, found.is_finished) == ("u1", how == "finished")


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
