"""
People's decisions about request bundles: their meaning in words, who may decide, what they sign, what counts (pure).

A decision is about one bundle, by its digest. Its evidence is the signature of the person's key, or that of the door
that the person's browser used. It is verified on arrival, and again right before the CA gets the request.
"""

from __future__ import annotations

import hmac
import json
from base64 import b64decode, b64encode
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, cast

from cryptography import x509

from bridge.errors import SettingsProblem, WaitingError
from bridge.pki import signatures
from bridge.pki.bundle import BundledRequest, RequestBundle
from bridge.pki.certificates import (
    CN_OID,
    O_OID,
    UNREADABLE,
    attributes,
    fingerprint,
    pem,
    san_counts,
    san_entries,
    spki,
)
from bridge.pki.csr import algorithm_name, key_line, subject_line
from bridge.pki.expiry import duration_text, rfc3339
from bridge.pki.verify import client_problem
from bridge.specs import MASTERS, USER
from bridge.words import one_line, some

Verdict = Literal["approved", "refused"]
Evidence = Literal["signature", "door"]
#: Whether a certificate needs people's approval before it is signed.
Approval = Literal["none", "required"]

LONGEST_REASON = 500
#: The prefixes differ from all other messages that such keys sign.
_SIGNED, _ATTESTED = b"ca-bridge decision 1", b"ca-bridge decision at the door 1"


class UndecidedError(WaitingError):
    """People have to decide first."""

    hint = "at the desk: `ca-bridge sign --approve`; at the door: `ca-bridge approvals list`, or its page /approvals"


@dataclass(frozen=True, kw_only=True)
class ApprovalRules:
    """Table `[approvals]`: who decides about certificates with `approval = "required"`."""

    #: The CN of each person's certificate, or an e-mail address among its SANs; for `sign --approve` a login name.
    approvers: tuple[str, ...] = ()
    count: int = 1  #: How many people have to approve; a single refusal is enough.
    #: `signature`: only decisions signed with the person's own key, which `ca-bridge approvals` makes and a browser can't.
    evidence: Literal["any", "signature"] = "any"

    def problems(self) -> Iterator[SettingsProblem]:
        """A `count` that is larger than the number of approvers."""
        if self.count < 1:
            yield SettingsProblem("count", "at least 1", str(self.count))
        if len(set(self.approvers)) != len(self.approvers):
            yield SettingsProblem("approvers", "each person once", "one twice")
        if self.approvers and self.count > len(self.approvers):
            yield SettingsProblem("count", f"at most {len(self.approvers)}, as many as approvers", str(self.count))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One person's decision about one bundle, with its evidence."""

    approver: str
    verdict: Verdict
    reason: str
    decided: datetime
    certificate: x509.Certificate
    evidence: Evidence
    proof: bytes  #: The signature of the certificate's key, or the door's code.

    def message(self, digest: str) -> bytes:
        """The message that the evidence signs."""
        parts = [digest, self.verdict, self.reason, fingerprint(self.certificate)]
        if self.evidence == "door":
            parts += [self.approver, rfc3339(self.decided)]
        context = _SIGNED if self.evidence == "signature" else _ATTESTED
        return signatures.framed([context, *(part.encode(errors="surrogatepass") for part in parts)])

    def evidence_bytes(self) -> bytes:
        """The evidence in the form in which it is kept."""
        document = {
            "kind": self.evidence,
            "certificate": pem(self.certificate).decode(),
            "proof": b64encode(self.proof).decode(),
        }
        return json.dumps(document).encode()

    @classmethod
    def kept(cls, *, approver: str, verdict: str, reason: str, decided: datetime, evidence: bytes) -> Decision:
        """Restore a kept decision without verifying it (ValueError: unreadable)."""
        try:
            document = json.loads(evidence)
            certificate = x509.load_pem_x509_certificate(document["certificate"].encode())
            kind, proof = document["kind"], b64decode(document["proof"], validate=True)
        except (KeyError, TypeError, AttributeError, *UNREADABLE) as e:
            raise ValueError(f"evidence that can't be read: {one_line(e)}") from None
        if kind not in {"signature", "door"} or verdict not in {"approved", "refused"}:
            raise ValueError("another kind of evidence, or another verdict")
        return cls(
            approver=approver, verdict=cast("Verdict", verdict), reason=reason, decided=decided,
            certificate=certificate, evidence=kind, proof=proof,
        )  # fmt: skip


def code(decision: Decision, digest: str, secret: bytes) -> bytes:
    """The door's MAC for a decision that this person made over mutual TLS."""
    return hmac.digest(secret, decision.message(digest), "sha256")


def person(leaf: x509.Certificate, approvers: Collection[str]) -> str:
    """
    The approver that a certificate names (ValueError: none, or two).

    The CN and the e-mail addresses among the SANs are compared literally.
    """
    try:
        names = [value for oid, value in attributes(leaf.subject) if oid == CN_OID]
        found = [*names, *(value for kind, value in san_entries(leaf) if kind == "email")]
    except UNREADABLE as e:
        raise ValueError(f"wanted a certificate whose names can be read, found: {one_line(e)}") from None
    ours = sorted(set(found).intersection(approvers))
    if len(names) != 1 or len(ours) != 1:
        found_names = one_line(", ".join(found), 200) or "none"
        raise ValueError(f"wanted one CN, and one of the policy's approvers, found {found_names}")
    return ours[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """The CAs and the secret by which decisions are verified now."""

    anchors: Sequence[x509.Certificate]  #: The CAs of people's certificates.
    secret: bytes = field(repr=False)  #: The door's secret for `code`.
    now: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The valid decisions about one bundle."""

    approved: tuple[Decision, ...] = ()
    refused: Decision | None = None
    void: tuple[str, ...] = ()  #: Why other decisions do not count.

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """All decisions that count."""
        return (*self.approved, *([self.refused] if self.refused is not None else []))


@dataclass(frozen=True, slots=True, kw_only=True)
class Matter:
    """A request for people to decide about, and the rules for that."""

    bundle: RequestBundle
    digest: str  #: The bundle's digest.
    rules: ApprovalRules
    asked_by: Collection[str] = ()  #: The people who brought the request.


def problem(decision: Decision, matter: Matter, trust: Trust) -> str:
    """Why a decision does not count; empty: it counts."""
    return next(_problems(decision, matter, trust), "")


def _problems(decision: Decision, matter: Matter, trust: Trust) -> Iterator[str]:
    leaf, rules = decision.certificate, matter.rules
    if found := client_problem(leaf, trust.anchors, trust.now):
        yield found
    try:
        who = person(leaf, rules.approvers)
    except ValueError as e:
        yield str(e)
        return
    if who != decision.approver:
        yield f"wanted a certificate of {one_line(decision.approver)}, found one of {who}"
    if _is_same_person(leaf, who, matter):
        yield "wanted another person than the requester, found the same one"
    if len(decision.reason) > LONGEST_REASON or not decision.reason.isprintable():
        yield f"wanted a reason of one line and at most {LONGEST_REASON} characters, found another text"
    if decision.evidence == "signature":
        if not signatures.is_by(leaf.public_key(), decision.proof, decision.message(matter.digest)):
            yield "wanted the signature of the certificate's key over this decision, found another one"
    elif rules.evidence == "signature":
        yield "wanted the signature of the person's key (approvals.evidence = \"signature\"), found the door's word"
    elif not hmac.compare_digest(code(decision, matter.digest, trust.secret), decision.proof):
        yield "wanted a decision that this door took, found another one's"


def _is_same_person(leaf: x509.Certificate, who: str, matter: Matter) -> bool:
    """Whether approver and requester are the same person: by name, certificate or key."""
    bundle = matter.bundle
    keys = {spki(request.csr.public_key()) for request in bundle.requests}
    keys |= {spki(request.replaces.public_key()) for request in bundle.requests if request.replaces is not None}
    names = {value for request in bundle.requests for _, value in attributes(request.csr.subject)}
    return who in {*matter.asked_by, bundle.node, *names} or spki(leaf.public_key()) in keys


def standing(decisions: Sequence[Decision | str], matter: Matter, trust: Trust) -> Standing:
    """Verify decisions (a text says why a decision can't be read); each person counts once."""
    good: dict[str, Decision] = {}
    void: list[str] = []
    for decision in decisions:
        reason = decision if isinstance(decision, str) else problem(decision, matter, trust)
        if reason or isinstance(decision, str):
            void.append(reason)
        else:
            good.setdefault(decision.approver, decision)
    refused = next((decision for decision in good.values() if decision.verdict == "refused"), None)
    approved = tuple(decision for decision in good.values() if decision.verdict == "approved")
    return Standing(approved=approved, refused=refused, void=tuple(void))


def lacking(names: Sequence[str], rules: ApprovalRules, standing: Standing, terminal: str = "") -> str:
    """
    What these certificates still need before they can be signed; empty: nothing.

    `terminal` is the login name of a person who agreed at the desk, which counts like a decision without a signature.
    """
    people = {decision.approver for decision in standing.approved}
    note = ""
    if terminal and (terminal not in rules.approvers or rules.evidence == "signature"):
        note = f" ({terminal} at the terminal does not count"
        note += " without a signature)" if terminal in rules.approvers else ", who is no approver)"
    elif terminal:
        people.add(terminal)
    if len(people) >= rules.count:
        return ""
    who = f"{rules.count} of {', '.join(rules.approvers) or 'no approvers (approvals.approvers)'}"
    have = ", ".join(sorted(people)) or "none"
    return f"{', '.join(names)}: wanted an approval by {who}, found {have}{note}"


def audit_facts(decision: Decision) -> Mapping[str, str]:
    """A decision with its evidence, for a line of the audit log."""
    return {
        "approver": decision.approver,
        "reason": decision.reason,
        "decided": rfc3339(decision.decided),
        "evidence": decision.evidence,
        "approverCertificateSha256": fingerprint(decision.certificate),
        "proof": b64encode(decision.proof).decode(),
    }


def summary(standing: Standing, terminal: str = "") -> str:
    """The approvers, for messages and answers."""
    people = [
        f"{decision.approver}{' (signed)' if decision.evidence == 'signature' else ''}"
        for decision in standing.approved
    ]
    return ", ".join([*people, *([terminal] if terminal and terminal not in people else [])])


_CERTIFICATES = {
    "apiserver": "the API server's certificate",
    "apiserver-kubelet-client": "the certificate by which the API server asks kubelets",
    "apiserver-etcd-client": "the certificate by which the API server asks etcd",
    "front-proxy-client": "the certificate by which the API server asks its extensions",
    "etcd-server": "etcd's server certificate",
    "etcd-peer": "the certificate by which etcd's members know each other",
    "etcd-healthcheck-client": "the certificate of etcd's health checks",
    "admin.conf": "the administrator's certificate (admin.conf)",
    "super-admin.conf": "the certificate of super-admin.conf",
    "controller-manager.conf": "the controller manager's client certificate",
    "scheduler.conf": "the scheduler's client certificate",
    "kubelet.conf": "the kubelet's client certificate",
    "kubelet-server": "the kubelet's server certificate",
}

_MOST_NAMES = 20


def sentence(request: BundledRequest, node: str, *, proven: bool, is_named: bool) -> str:
    """The main sentence, such as "this gives cp-3 the API server's certificate, as before, for 90d"."""
    subject = attributes(request.csr.subject)
    if request.name == USER.name:
        names = [one_line(value, 100) for oid, value in subject if oid == CN_OID]
        what, whom = "a client certificate", f"the user {', '.join(names) or '(no name)'}"
    else:
        what = _CERTIFICATES.get(request.name, f"the certificate {request.name}")
        whom = node if is_named else f"a node that says it is {node}, which nothing proves,"
    if (O_OID, MASTERS) in subject:
        what += f", in the group {MASTERS}, which may do everything"
    return f"this gives {whom} {what}, {_how_asked(request, proven=proven)}, for {duration_text(request.validity)}"


def _how_asked(request: BundledRequest, *, proven: bool) -> str:
    if request.replaces is None:
        return "for the first time"
    if not proven:
        return "without a proof that it had one before"
    return "with changes" if any(differences(request)) else "as before"


def differences(request: BundledRequest) -> Iterator[str]:
    """The differences from the replaced certificate in subject, SANs, kind of key and validity."""
    old = request.replaces
    if old is None:
        return
    if (before := subject_line(old)) != (after := subject_line(request.csr)):
        yield f"subject: {after}, before {before}"
    sans, olds = san_counts(request.csr), san_counts(old)
    for verb, found in (("gets", sans - olds), ("loses", olds - sans)):
        if found:
            names = (one_line(f"{kind}:{value}", 100) for kind, value in sorted(found))
            yield f"{verb} the names {some(names, _MOST_NAMES)}"
    if (key := key_line(request.csr)) != (was := algorithm_name(old.public_key())):
        yield f"key: {key}, before {was}"
    lived = old.not_valid_after_utc - old.not_valid_before_utc
    if request.validity > lived * 1.1:
        yield f"valid for {duration_text(request.validity)}, before for {lived.days}d"
