"""CSR objects and jobs of the gateway, made without an API server."""

from __future__ import annotations

import base64
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from bridge.gateway.pod_policy import PodRequest
from bridge.gateway.queue import Job, Look
from bridge.gateway.watch import (
    PodObject,
    SigningRequest,
    parse,
)

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


def one(uid: str = "u1", *, version: int = 7, seconds: int = 0, **spec: Any) -> SigningRequest:
    """An object."""
    found = parse(document(uid, **spec), 1000)
    return replace(found, version=str(version), created=found.created + timedelta(seconds=seconds))


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
