"""
Approvals at the door: who the approver is, which requests wait, and what the approver decides.

Mutual TLS identifies an approver, and the policy gives the name. `GET /v1/approvals` lists the waiting requests.
`GET /v1/approvals/DIGEST` returns the whole bundle, so that the approver's own program shows it and computes the digest.
`POST` takes a decision signed with the approver's key. The pages below /approvals take the same decisions from a
browser, which can't sign: the door attests them instead. A signing round verifies each decision again before it signs.

The pages are plain HTML without scripts, rendered here (Jinja2 with autoescape). A form carries a token bound to the
approver's certificate and the request, so that no other site can make the browser send it. The headers stop other sites
from framing a page, and a page from loading anything but its style.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs

import jinja2
from cryptography import x509

from bridge.desk import approval
from bridge.desk.approval import LONGEST_REASON, Decision, Standing, Verdict, differences, sentence
from bridge.desk.node_identity import Identity
from bridge.desk.policy import PolicyVerdict
from bridge.door.app import Environ, Reply, assert_method, body_of, kind_of
from bridge.door.https import PEER
from bridge.door.signing import Signing
from bridge.door.store import DecisionRow, DoorDatabase, Kept
from bridge.errors import BridgeError, Exit
from bridge.pki.budget import OverBudgetError, json_of
from bridge.pki.bundle import BundledRequest, BundleError, RequestBundle
from bridge.pki.bundle_format import loads_request, short_fingerprint
from bridge.pki.certificates import UNREADABLE, fingerprint, pem, serial_hex
from bridge.pki.csr import key_line, sans_line, subject_line
from bridge.pki.expiry import duration_text, minute, rfc3339
from bridge.pki.verify import client_problem
from bridge.system.codec import from_json
from bridge.words import one_line

log = logging.getLogger("ca-bridge")

#: Most requests or certificates in a list.
MOST = 200
_PATH = re.compile(r"/v1/approvals(?:/([0-9a-f]{64}))?")


class NotDecidedError(BridgeError):
    """The decision does not count, and the door does not store it."""

    exit_code = Exit.REFUSED
    status = HTTPStatus.FORBIDDEN
    hint = "the policy's [approvals] says who decides, and serve.approvers_ca whose certificates count"


class TooLateError(NotDecidedError):
    """The request waits for no decision, or not for this person's."""

    status = HTTPStatus.CONFLICT
    hint = "look at it again: `ca-bridge approvals show`, or its page"


class UnknownError(NotDecidedError):
    """There is no such request."""

    status = HTTPStatus.NOT_FOUND
    hint = "`ca-bridge approvals list` has the digests of those that wait"


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """An approver, known by the certificate of the TLS handshake."""

    name: str  #: The approver's name in the policy.
    certificate: x509.Certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request with everything that an approver has to know."""

    kept: Kept
    bundle: RequestBundle
    standing: Standing
    identity: Identity
    verdicts: Mapping[str, PolicyVerdict]  #: The current policy's, by certificate name, as far as known.
    need_approval: frozenset[str]  #: Names of certificates that the policy wants approved.

    @property
    def requests(self) -> list[BundledRequest]:
        """The bundle's requests, those that need approval first: often one of a whole node's thirteen."""
        return sorted(self.bundle.requests, key=lambda request: request.name not in self.need_approval)

    def sentence(self, request: BundledRequest) -> str:
        """Return what the requested certificate means, in a sentence."""
        verdict = self.verdicts.get(request.name)
        is_proven = verdict is not None and verdict.proven
        return sentence(request, self.bundle.node, proven=is_proven, is_named=self.identity.is_proven)


class Approvals:
    """Who may decide, what waits, and decisions; thread-safe."""

    def __init__(self, memory: DoorDatabase, signing: Signing) -> None:
        self.memory = memory
        self.signing = signing

    def person(self, environ: Environ) -> Person:
        """Return the approver who sent a request (NotDecidedError: the client may not decide)."""
        der, trust = environ.get(PEER), self.signing.trust()
        if der is None:
            raise NotDecidedError("there was no person's certificate in the TLS handshake")
        try:
            leaf = x509.load_der_x509_certificate(der)
        except UNREADABLE as e:
            raise NotDecidedError(f"wanted a certificate that can be read, found: {one_line(e)}") from None
        if found := client_problem(leaf, trust.anchors, trust.now):
            raise NotDecidedError(found)
        try:
            name = approval.person(leaf, self.signing.policy.approvals.approvers)
        except ValueError as e:
            raise NotDecidedError(str(e)) from None
        return Person(name=name, certificate=leaf)

    @property
    def rules(self) -> approval.ApprovalRules:
        """The policy's approval rules."""
        return self.signing.policy.approvals

    def waiting(self, text: str) -> tuple[Iterator[Case], int]:
        """
        Return the first requests that wait for approvers, and how many there are; `text` is of their node, or begins their
        digest. Each is parsed in its turn.
        """
        rows, count = self.memory.undecided(text, MOST)

        def cases() -> Iterator[Case]:
            for row in rows:
                try:
                    yield self._case(row)
                except UnknownError as e:  # an unreadable request must not block the others
                    log.error("request %s: %s", row.digest[:16], e)  # noqa: TRY400

        return cases(), count

    def case(self, digest: str) -> Case:
        """Return the request with this digest, in any state (UnknownError)."""
        kept = self.memory.find(digest, "digest")
        if kept is None:
            raise UnknownError(f"there is no request {digest[:16]}")
        return self._case(kept)

    def _case(self, kept: Kept) -> Case:
        try:
            bundle = loads_request(kept.bundle)
        except BundleError:
            text = "wanted a request whose bundle is still here, found one whose bundle was put away after its answer"
            hint = "the audit log at the door's host has who decided, and the evidence"
            raise UnknownError(text, hint=hint) from None
        names = [request.name for request in bundle.requests]
        verdicts, identity = self.signing.verdicts(kept, bundle)
        return Case(
            kept=kept,
            bundle=bundle,
            standing=self.signing.standing(kept, bundle),
            identity=identity,
            verdicts=verdicts,
            need_approval=frozenset(filter(self.signing.policy.needs_approval, names)),
        )

    def asker(self, environ: Environ) -> str:
        """Return the approver who submits a request, since that person may not decide about it; empty: no approver."""
        with contextlib.suppress(NotDecidedError):
            return self.person(environ).name
        return ""

    def decide(self, person: Person, digest: str, verdict: Verdict, reason: str, signature: bytes | None) -> Case:
        """
        Verify a decision, and store it (NotDecidedError: it does not count).

        Without a signature, the door attests that this person decided.
        """
        earlier = self._earlier(digest, person)  # before the standing, so that no later decision is among them
        case, trust = self.case(digest), self.signing.trust()
        if case.kept.state != "undecided":
            raise TooLateError(f"this request no longer waits for people: it is {case.kept.state}")
        if verdict == "refused" and not reason.strip():
            raise NotDecidedError("a refusal needs a reason for the node", hint="say why, in one line")
        decision = Decision(
            approver=person.name, verdict=verdict, reason=reason.strip(), decided=trust.now.replace(microsecond=0),
            certificate=person.certificate, evidence="door" if signature is None else "signature",
            proof=signature or b"",
        )  # fmt: skip
        if signature is None:
            decision = replace(decision, proof=approval.code(decision, digest, trust.secret))
        matter = self.signing.matter(case.kept, case.bundle, self.memory.decisions(case.kept.id))
        if found := approval.problem(decision, matter, trust):
            raise NotDecidedError(found)
        return self._store_decision(case, decision, earlier)

    def _earlier(self, digest: str, person: Person) -> list[DecisionRow]:
        kept = self.memory.find(digest, "digest")
        rows = self.memory.decisions(kept.id) if kept is not None else []
        return [row for row in rows if row.approver == person.name and row.verdict != "asked"]

    def _store_decision(self, case: Case, decision: Decision, before: Sequence[DecisionRow]) -> Case:
        earlier = [other.verdict for other in case.standing.decisions if other.approver == decision.approver]
        about = {"approver": decision.approver, "verdict": decision.verdict, "reason": decision.reason}
        is_kept = not earlier and self.memory.decide(
            case.kept.id, **about, evidence=decision.evidence_bytes(), now=decision.decided, void=before
        )
        found = self.signing.standing(case.kept, case.bundle)
        is_decided = found.refused is not None or len(found.approved) >= self.rules.count
        # the door may have been killed before it changed the state, or the policy now wants fewer approvals
        if not is_kept and not (is_decided and earlier == [decision.verdict]):
            raise TooLateError(f"wanted one decision of {decision.approver}, found an earlier one, which stays")
        text, short = "request %s of %s was %s by %s", case.kept.digest[:16]
        who = {"request": short, "requester": decision.approver}
        log.info(text, short, case.bundle.node, decision.verdict, decision.approver, extra=who)
        if is_decided:
            self.memory.move(case.kept.id, "refused" if found.refused else "approved", before=["undecided"])
        self.signing.arrived.set()  # there may be something to sign
        return self.case(case.kept.digest)

    # --- for programs -------------------------------------------------------------------------------------------------

    def answer(self, environ: Environ) -> Reply:
        """Answer a request below /v1/approvals."""
        match = _PATH.fullmatch(environ["PATH_INFO"])
        if match is None:
            text = "there is no such page, but /v1/approvals, and a request's digest below it"
            return Reply.error(HTTPStatus.NOT_FOUND, text)
        method, request_digest = environ["REQUEST_METHOD"], match[1]
        assert_method(environ, "GET", *([] if request_digest is None else ["POST"]))
        try:
            person = self.person(environ)
            if request_digest is None:
                cases, count = self.waiting(query(environ))
                found = [self._listed(case) for case in cases]
                return Reply.of(HTTPStatus.OK, {"approver": person.name, "waiting": count, "requests": found})
            case = self.case(request_digest) if method == "GET" else self._post(environ, person, request_digest)
            return Reply.of(HTTPStatus.OK, {"approver": person.name, **self._entry(case)})
        except NotDecidedError as e:
            return Reply.error(e.status, e)

    def _post(self, environ: Environ, person: Person, request_digest: str) -> Case:
        if kind_of(environ) != "application/json":
            raise NotDecidedError("wanted Content-Type: application/json, found another one", hint="")
        sent = _read_decision(body_of(environ))
        return self.decide(person, request_digest, sent.verdict, sent.reason, sent.signature)

    def _listed(self, case: Case) -> dict[str, Any]:
        return {
            "digest": case.kept.digest,
            "node": case.bundle.node,
            "cluster": case.bundle.cluster,
            "received": rfc3339(case.kept.received),
            "state": case.kept.state,
            "approvals": f"{len(case.standing.approved)} of {self.rules.count}",
            "certificates": [{"name": request.name, "means": case.sentence(request)} for request in case.requests],
        }

    def _entry(self, case: Case) -> dict[str, Any]:
        """Return a whole request as JSON: its bundle, whose digest the reader computes itself, and the door's CAs."""
        return {
            **self._listed(case),
            "bundle": json.loads(case.kept.bundle),
            "differs": {request.name: list(differences(request)) for request in case.bundle.requests},
            "policy": {name: list(verdict.problems) for name, verdict in case.verdicts.items()},
            "cas": {name: pem(*some).decode() for name, some in self.signing.cas.items()},
            "decisions": [
                {"approver": decision.approver, "verdict": decision.verdict, "reason": decision.reason}
                | {"decided": rfc3339(decision.decided), "evidence": decision.evidence}
                # a signature is for everyone; the door's own code is for the door alone
                | ({"proof": json.loads(decision.evidence_bytes())} if decision.evidence == "signature" else {})
                for decision in case.standing.decisions
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedDecision:
    """A decision as an approver's own program sends it."""

    verdict: Verdict
    reason: str
    signature: bytes


def _read_decision(data: bytes) -> SignedDecision:
    """Return a decision from its JSON (NotDecidedError: it is not one)."""
    try:
        return from_json(SignedDecision, json_of(data))
    except (ValueError, OverBudgetError) as e:
        text = f"wanted JSON with verdict, reason and signature, found: {one_line(e)}"
        raise NotDecidedError(text) from None


# --- for browsers -----------------------------------------------------------------------------------------------------

_PAGE = re.compile(r"/approvals(?:/([0-9a-f]{64}))?/?")
_LONGEST_FORM_BYTES = 16 << 10
_LONGEST_QUERY = 100
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with `no-referrer` a browser sends a form with `Origin: null`
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_TEMPLATES = Path(__file__).with_name("templates")
#: Template filters for values other than text; autoescape covers their results.
_FILTERS: Mapping[str, Callable[..., object]] = {
    "minute": minute, "duration": duration_text, "fingerprint": short_fingerprint, "serial": serial_hex,
    "subject": subject_line, "sans": sans_line, "key": key_line, "differences": differences,
}  # fmt: skip


class ForgedFormError(NotDecidedError):
    """The form did not come from this page for this person."""

    hint = "open the request's page again, and decide there"


class Pages:
    """The pages below /approvals; thread-safe."""

    def __init__(self, approvals: Approvals, secret: bytes, now: Callable[[], datetime]) -> None:
        """`secret` is the HMAC key of the forms' tokens."""
        self._approvals = approvals
        self._memory = approvals.memory
        self._secret = secret
        self._now = now
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        self._templates.filters |= _FILTERS
        self._style = (_TEMPLATES / "style.css").read_bytes()

    def __call__(self, environ: Environ) -> Reply:
        """Answer a request below /approvals."""
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path == "/approvals/style.css" and method == "GET":
            return Reply(status=HTTPStatus.OK, body=self._style, kind="text/css; charset=utf-8", headers=_HEADERS)
        try:
            person = self._approvals.person(environ)
            return self._page(person, path, method, environ)
        except NotDecidedError as e:
            return self._error(e.status, e)

    def _error(self, status: HTTPStatus, error: BridgeError, title: str = "Not done") -> Reply:
        return self._html("error.html", status, error=error, title=title)

    def _page(self, person: Person, path: str, method: str, environ: Environ) -> Reply:
        match = _PAGE.fullmatch(path)
        lists = {"/approvals/certificates": self._certificates, "/approvals/record": self._record}
        if match is not None and match[1] is not None and method == "POST":
            return self._post(person, match[1], environ)
        if method != "GET":
            return self._error(HTTPStatus.METHOD_NOT_ALLOWED, BridgeError("this page takes GET alone"))
        if path in lists:
            return lists[path](person, query(environ))
        if match is None:
            return self._error(HTTPStatus.NOT_FOUND, BridgeError("there is no such page"), "No such page")
        if match[1] is None:
            text = query(environ)
            cases, count = self._approvals.waiting(text)
            more: dict[str, Any] = {"cases": cases, "count": count, "most": MOST, "query": text}
            return self._html("list.html", person=person, title="Waiting requests", **more)
        case = self._approvals.case(match[1])
        title = f"Request of {case.bundle.node}"
        token = self._token(person, match[1])
        may_here = case.kept.state == "undecided" and self._approvals.rules.evidence != "signature"
        more = {"longest": LONGEST_REASON, "token": token, "may_here": may_here}
        return self._html("case.html", person=person, case=case, title=title, **more)

    # --- a decision ---------------------------------------------------------------------------------------------------

    def _post(self, person: Person, digest: str, environ: Environ) -> Reply:
        form = _form(environ)
        if not hmac.compare_digest(form.get("token", "").encode(), self._token(person, digest).encode()):
            raise ForgedFormError("wanted a form of this page for this person and request, found another one")
        origin, host = environ.get("HTTP_ORIGIN"), environ.get("HTTP_HOST", "")
        if origin not in (None, f"https://{host}"):
            raise ForgedFormError("wanted a form of this page, found one of another site")
        verdict = form.get("verdict", "")
        if verdict not in ("approved", "refused"):
            raise NotDecidedError("the form says neither approve nor refuse", hint=ForgedFormError.hint)
        self._approvals.decide(person, digest, cast("Verdict", verdict), form.get("reason", ""), None)
        headers = {**_HEADERS, "Location": f"/approvals/{digest}"}
        return Reply(status=HTTPStatus.SEE_OTHER, body=b"", kind="text/plain", headers=headers)

    def _token(self, person: Person, digest: str) -> str:
        message = f"ca-bridge form 1\n{fingerprint(person.certificate)}\n{digest}"
        return hmac.digest(self._secret, message.encode(), "sha256").hex()

    # --- lists --------------------------------------------------------------------------------------------------------

    def _certificates(self, person: Person, query: str) -> Reply:
        now = self._now()
        rows = [
            {"one": certificate, "days": (certificate.ends - now).days}
            for certificate in self._memory.ending(query, now, MOST)
        ]
        return self._html("certificates.html", person=person, rows=rows, query=query, most=MOST, title="Certificates")

    def _record(self, person: Person, query: str) -> Reply:
        rows = [
            {
                "kept": kept,
                "people": [decision for decision in self._memory.decisions(kept.id) if decision.verdict != "asked"],
            }
            for kept in self._memory.search(query, MOST)
        ]
        return self._html("record.html", person=person, rows=rows, query=query, most=MOST, title="The record")

    def _html(self, template: str, status: HTTPStatus = HTTPStatus.OK, **values: Any) -> Reply:
        values = {"person": None, "rules": self._approvals.rules, **values}
        text = self._templates.get_template(template).render(**values)
        return Reply(status=status, body=text.encode(), kind="text/html; charset=utf-8", headers=_HEADERS)


def query(environ: Environ) -> str:
    """Return the search text in a request's URL."""
    try:
        found = parse_qs(str(environ.get("QUERY_STRING", "")), max_num_fields=10).get("q", [""])[0]
    except ValueError:
        return ""
    return found.replace("\0", "")[:_LONGEST_QUERY]  # PostgreSQL's text can't hold NUL


def _form(environ: Environ) -> dict[str, str]:
    """Return the fields of a form, each of which comes once (ForgedFormError: another document)."""
    length = int(environ.get("CONTENT_LENGTH") or 0)
    if kind_of(environ) != "application/x-www-form-urlencoded" or length > _LONGEST_FORM_BYTES:
        raise ForgedFormError("wanted a form of this page, found another document")
    try:
        text = body_of(environ).decode("ascii")
        found = parse_qs(text, keep_blank_values=True, max_num_fields=10, strict_parsing=True, errors="strict")
    except ValueError:
        raise ForgedFormError("wanted a form of this page, found another text") from None
    if any(len(values) != 1 for values in found.values()):
        raise ForgedFormError("wanted each field once, found one twice")
    return {name: values[0] for name, values in found.items()}
