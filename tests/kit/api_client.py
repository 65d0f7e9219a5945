"""A client of a Kubernetes API server, with a client certificate or a token; any status is an answer."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import requests

from bridge.system.waiting import wait_until

#: What an API server says where its etcd is there, and was too slow: it leaves it to its client to ask again.
SLOW_ETCD = ("etcdserver: request timed out", "etcdserver: leader changed")
CSRS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Any answer."""

    status: int
    text: str

    @property
    def ok(self) -> bool:
        """Whether the API server did as requested."""
        return self.status < 400

    @property
    def may_pass(self) -> bool:
        """Whether a stall is the cause: etcd or the API server's own limit of time was over before the request was done."""
        late = "etcdserver: " in self.text or "request did not complete within" in self.text
        return self.status == 429 or (self.status in {500, 504} and late)

    @property
    def document(self) -> dict[str, Any]:
        """As JSON."""
        found: dict[str, Any] = json.loads(self.text)
        return found

    @property
    def message(self) -> str:
        """The message of a `Status`."""
        return str(self.document.get("message", ""))


@dataclass(kw_only=True)
class ApiClient:
    """One for each thread, over connections that are kept."""

    url: str
    trust: Path
    pair: tuple[Path, Path] | None = None
    token: str = ""

    @cached_property
    def session(self) -> requests.Session:
        """Nothing of the environment counts."""
        session = requests.Session()
        session.trust_env = False
        session.verify = str(self.trust)
        if self.pair is not None:
            session.cert = (str(self.pair[0]), str(self.pair[1]))
        if self.token:
            session.headers["Authorization"] = f"Bearer {self.token}"
        return session

    def ask(
        self, method: str, path: str, body: Any = None, *, content_type: str = "application/json", **headers: str
    ) -> Reply:
        """One request; again while the API server says that it, or its etcd, has too much to do, as after a stall."""
        data = None if body is None else json.dumps(body)
        sent = {"Content-Type": content_type, **headers}

        def look() -> Reply:
            answer = self.session.request(method, f"{self.url}{path}", data=data, headers=sent, timeout=180)
            return Reply(status=answer.status_code, text=answer.text)

        return wait_until(look, lambda one: not one.may_pass, timedelta(minutes=3), pause_seconds=0.5)

    def get(self, path: str) -> dict[str, Any]:
        """What is there."""
        reply = self.ask("GET", path)
        assert reply.ok, reply.text[-500:]
        return reply.document

    def create(self, path: str, body: Mapping[str, Any], **headers: str) -> dict[str, Any]:
        """Make something that was not there."""
        reply = self.ask("POST", path, body, **headers)
        assert reply.status == 201, reply.text[-500:]
        return reply.document

    def patch(self, path: str, body: Mapping[str, Any]) -> Reply:
        """A merge patch."""
        return self.ask("PATCH", path, body, content_type="application/merge-patch+json")

    def may(self, verb: str) -> bool:
        """Whether the authorizer knows by now that it may do this with CertificateSigningRequests."""
        what = {"group": "certificates.k8s.io", "resource": "certificatesigningrequests", "verb": verb}
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        reply = self.ask("POST", path, {**body, "spec": {"resourceAttributes": what}})
        return reply.ok and bool(reply.document["status"]["allowed"])

    def create_csr(self, pem: bytes, signer: str, usages: Sequence[str], **more: Any) -> Reply:
        """A CertificateSigningRequest; `name` is its metadata's, the rest goes into spec."""
        name = more.pop("name", "")
        metadata = {"name": name} if name else {"generateName": "csr-"}
        spec = {"request": base64.b64encode(pem).decode(), "signerName": signer, "usages": list(usages), **more}
        body = {"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": metadata}
        return self.ask("POST", CSRS, {**body, "spec": spec})

    def csr(self, name: str) -> dict[str, Any]:
        """One that is there."""
        return self.get(f"{CSRS}/{name}")

    def csrs(self) -> list[dict[str, Any]]:
        """All that are there."""
        items: list[dict[str, Any]] = self.get(CSRS)["items"]
        return items

    def decide(self, name: str, kind: str = "Approved", message: str = "by a test", reason: str = "Test") -> Reply:
        """Approve, deny or fail one."""
        old = self.csr(name)
        conditions = [
            *old.get("status", {}).get("conditions", []),
            {"type": kind, "status": "True", "reason": reason, "message": message},
        ]
        where = "status" if kind == "Failed" else "approval"
        metadata = {key: old["metadata"][key] for key in ("uid", "resourceVersion")}
        return self.patch(f"{CSRS}/{name}/{where}", {"metadata": metadata, "status": {"conditions": conditions}})

    def issue(self, name: str, pem: bytes) -> Reply:
        """Write a certificate, whatever it is."""
        return self.patch(f"{CSRS}/{name}/status", {"status": {"certificate": base64.b64encode(pem).decode()}})
