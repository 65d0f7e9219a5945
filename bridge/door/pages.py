"""
The pages for people who decide: plain HTML, rendered here, without a script (Jinja2 with autoescape).

Each page needs a person's certificate. A form carries a token that is bound to this certificate and this request, so that
no other site can have the browser send it; the headers let no other site frame a page, and the page load nothing.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs

import jinja2

from bridge.desk.approval import LONGEST_REASON, Verdict, differences
from bridge.door.app import Reply
from bridge.door.approvals import MOST, Approvals, Case, NotDecidedError, Person
from bridge.door.store import Memory
from bridge.errors import BridgeError
from bridge.pki import display
from bridge.pki.bundle_format import short_fingerprint
from bridge.pki.certificates import fingerprint, serial_hex
from bridge.pki.expiry import duration_text, minute

_PATH = re.compile(r"/approvals(?:/([0-9a-f]{64}))?/?")
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


class ForgedFormError(NotDecidedError):
    """A form that this page did not give to this person."""

    hint = "open the request's page again, and decide there"


class Pages:
    """The addresses below /approvals; called from many threads."""

    def __init__(self, approvals: Approvals, memory: Memory, secret: bytes, now: Callable[[], datetime]) -> None:
        """`secret` makes the forms' tokens."""
        self._approvals = approvals
        self._memory = memory
        self._secret = secret
        self._now = now
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        self._templates.filters["minute"] = minute
        self._style = (_TEMPLATES / "style.css").read_bytes()

    def __call__(self, environ: Mapping[str, Any]) -> Reply:
        """The page."""
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path == "/approvals/style.css" and method == "GET":
            return Reply(status=HTTPStatus.OK, body=self._style, kind="text/css; charset=utf-8", headers=_HEADERS)
        try:
            person = self._approvals.person(environ)
            return self._page(person, path, method, environ)
        except NotDecidedError as e:
            return self._html("error.html", e.status, error=e, title="Not done")

    def _page(self, person: Person, path: str, method: str, environ: Mapping[str, Any]) -> Reply:
        match = _PATH.fullmatch(path)
        lists = {"/approvals/certificates": self._certificates, "/approvals/record": self._record}
        if match is not None and match[1] is not None and method == "POST":
            return self._post(person, match[1], environ)
        if method != "GET":
            error = BridgeError("wanted GET")
            return self._html("error.html", HTTPStatus.METHOD_NOT_ALLOWED, error=error, title="Not done")
        if path in lists:
            return lists[path](person, _query(environ))
        if match is None:
            error = BridgeError("wanted a page, found another address")
            return self._html("error.html", HTTPStatus.NOT_FOUND, error=error, title="No such page")
        if match[1] is None:
            cases = [self._view(one) for one in self._approvals.waiting()]
            return self._html("list.html", person=person, cases=cases, title="Waiting requests")
        case = self._approvals.case(match[1])
        title = f"Request of {case.bundle.node}"
        token = self._token(person, match[1])
        may_here = case.kept.state == "undecided" and self._approvals.rules.evidence != "signature"
        more: dict[str, Any] = {"longest": LONGEST_REASON, "token": token, "may_here": may_here}
        return self._html("case.html", person=person, case=self._view(case), title=title, **more)

    # --- a decision ---------------------------------------------------------------------------------------------------

    def _post(self, person: Person, digest: str, environ: Mapping[str, Any]) -> Reply:
        form = _form(environ)
        if not hmac.compare_digest(form.get("token", "").encode(), self._token(person, digest).encode()):
            raise ForgedFormError("wanted a form of this page for this person and request, found another one")
        origin, host = environ.get("HTTP_ORIGIN"), environ.get("HTTP_HOST", "")
        if origin not in (None, f"https://{host}"):
            raise ForgedFormError("wanted a form of this page, found one of another site")
        verdict = form.get("verdict", "")
        if verdict not in ("approved", "refused"):
            raise NotDecidedError("wanted approve or refuse, found neither", hint=ForgedFormError.hint)
        self._approvals.decide(person, digest, cast("Verdict", verdict), form.get("reason", ""), None)
        return Reply(
            status=HTTPStatus.SEE_OTHER,
            body=b"",
            kind="text/plain",
            headers={**_HEADERS, "Location": f"/approvals/{digest}"},
        )

    def _token(self, person: Person, digest: str) -> str:
        message = f"ca-bridge form 1\n{fingerprint(person.certificate)}\n{digest}"
        return hmac.digest(self._secret, message.encode(), "sha256").hex()

    # --- what there is ------------------------------------------------------------------------------------------------

    def _certificates(self, person: Person, query: str) -> Reply:
        found = self._memory.ending(query, self._now(), MOST)
        now = self._now()
        rows = [{"one": one, "days": (one.ends - now).days} for one in found]
        return self._html("certificates.html", person=person, rows=rows, query=query, most=MOST, title="Certificates")

    def _record(self, person: Person, query: str) -> Reply:
        rows = []
        for kept in self._memory.search(query, MOST):
            people = [one for one in self._memory.decisions(kept.id) if one.verdict != "asked"]
            rows.append({"kept": kept, "people": people})
        return self._html("record.html", person=person, rows=rows, query=query, most=MOST, title="The record")

    def _view(self, case: Case) -> dict[str, Any]:
        return {
            "kept": case.kept,
            "bundle": case.bundle,
            "fingerprint": short_fingerprint(case.bundle),
            "have": len(case.standing.approved),
            "need": self._approvals.rules.count,
            "decisions": case.standing.decisions,
            "certificates": [
                {
                    "name": one.name,
                    "authority": one.authority,
                    "means": case.sentence(one),
                    "subject": display.name(one.csr),
                    "sans": display.sans(one.csr),
                    "usages": ", ".join(sorted(eku.label for eku in one.ekus)),
                    "validity": duration_text(one.validity),
                    "key": display.key(one.csr),
                    "replaces": one.replaces,
                    "serial": serial_hex(one.replaces) if one.replaces is not None else "",
                    "differs": list(differences(one)),
                    "verdict": case.verdicts.get(one.name),
                }
                for one in case.requests
            ],
        }

    def _html(self, template: str, status: HTTPStatus = HTTPStatus.OK, **values: Any) -> Reply:
        text = self._templates.get_template(template).render(**{"person": None, **values})
        return Reply(status=status, body=text.encode(), kind="text/html; charset=utf-8", headers=_HEADERS)


def _query(environ: Mapping[str, Any]) -> str:
    try:
        found = parse_qs(str(environ.get("QUERY_STRING", "")), max_num_fields=10).get("q", [""])[0]
    except ValueError:
        return ""
    return found[:_LONGEST_QUERY]


def _form(environ: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a form, each once (ForgedFormError: another document)."""
    kind = str(environ.get("CONTENT_TYPE", "")).partition(";")[0].strip()
    length = int(environ.get("CONTENT_LENGTH") or 0)
    if kind != "application/x-www-form-urlencoded" or length > _LONGEST_FORM_BYTES:
        raise ForgedFormError("wanted a form of this page, found another document")
    try:
        text = environ["wsgi.input"].read(length).decode("ascii")
        found = parse_qs(text, keep_blank_values=True, max_num_fields=10, strict_parsing=True, errors="strict")
    except ValueError:
        raise ForgedFormError("wanted a form of this page, found another text") from None
    if any(len(values) != 1 for values in found.values()):
        raise ForgedFormError("wanted each field once, found one twice")
    return {name: values[0] for name, values in found.items()}
