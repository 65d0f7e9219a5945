"""What a request means, in words for the person who decides about it (pure)."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from bridge.desk.patterns import CN_OID, MASTERS, O_OID
from bridge.pki import display
from bridge.pki.bundle import BundledRequest
from bridge.pki.certificates import attributes, san_counts
from bridge.pki.csr import algorithm_name
from bridge.pki.expiry import duration_text
from bridge.specs import USER
from bridge.words import one_line

_WORDS = {
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


def sentence(request: BundledRequest, node: str, *, proven: bool) -> str:
    """The one that matters, such as "this gives cp-3 the API server's certificate, as before, for 90d"."""
    subject = attributes(request.csr.subject)
    if request.name == USER.name:
        names = [one_line(value, 100) for oid, value in subject if oid == CN_OID]
        what, whom = "a client certificate", f"the user {', '.join(names) or '(no name)'}"
    else:
        what, whom = _WORDS.get(request.name, f"the certificate {request.name}"), node
    if (O_OID, MASTERS) in subject:
        what += f", in the group {MASTERS}, which may do everything"
    return f"this gives {whom} {what}, {_how(request, proven=proven)}, for {duration_text(request.validity)}"


def _how(request: BundledRequest, *, proven: bool) -> str:
    if request.replaces is None:
        return "for the first time"
    if not proven:
        return "without a proof that it had one before"
    return "with changes" if any(differences(request)) else "as before"


def differences(request: BundledRequest) -> Iterator[str]:
    """What differs from the certificate that is replaced, in subject, SANs, kind of key and validity."""
    old = request.replaces
    if old is None:
        return
    if (before := display.name(old)) != (after := display.name(request.csr)):
        yield f"subject: {after}, before {before}"
    sans, olds = san_counts(request.csr), san_counts(old)
    for verb, found in (("gets", sans - olds), ("loses", olds - sans)):
        if found:
            yield f"{verb} the names {_listed(found)}"
    if (key := display.key(request.csr)) != (was := algorithm_name(old.public_key())):
        yield f"key: {key}, before {was}"
    lived = old.not_valid_after_utc - old.not_valid_before_utc
    if request.validity > lived * 1.1:
        yield f"valid for {duration_text(request.validity)}, before for {lived.days}d"


def _listed(found: Collection[tuple[str, str]]) -> str:
    texts = [one_line(f"{kind}:{value}", 100) for kind, value in sorted(found)]
    return ", ".join(texts[:_MOST_NAMES]) + (
        f" and {len(texts) - _MOST_NAMES} more" if len(texts) > _MOST_NAMES else ""
    )
