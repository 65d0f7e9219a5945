"""Checks of the installed files: would each component start with them, and can a renewal build on them?"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.x509.verification import VerificationError as NoPathError

from bridge.diagnosis import Finding, from_error
from bridge.errors import BridgeError, SettingsError
from bridge.node import endpoints, kubeconfig
from bridge.node.expiry_report import outlasting
from bridge.node.inventory import AuthorityState, Item, Node
from bridge.node.kubelet import KubeletFiles, node_name
from bridge.node.manifests import path_of, pod_name
from bridge.node.pairs import is_sa_pair, key_finding
from bridge.pki import expiry, verify
from bridge.pki.certificates import UNREADABLE, anchor_of, leads_to, load_pem_certificates, name_text, san_entries
from bridge.pki.csr import algorithm_name
from bridge.renewal.prepare import policy_error
from bridge.renewal.selection import ForeignIdentityError, foreign_identity
from bridge.settings.tables import Settings
from bridge.specs import KUBELET_CONF, SUPER_ADMIN, Component
from bridge.system.files import user_name
from bridge.system.paths import UnreadableError, exposure, open_secret, read
from bridge.words import one_line

#: With less than this share of the time from due to end left, several nightly runs have passed the certificate over.
_OVERDUE_SHARE = 0.5
#: kubeadm's users for components that run without root (feature gate RootlessControlPlane).
_ROOTLESS = "kubeadm-"

_BEFORE_JOIN = "not here yet: `kubeadm join` writes it from kubelet.conf, and refuses one that is there"
_SA_HINT = "copy sa.key and sa.pub from another control-plane node, or from a backup; never make new ones"
_NEXT_CA = "`ca-bridge help replace-the-ca` has the way to another one; kubeadm has none"
_UNSUPPORTED = (
    "nothing can be renewed below this CA: another one is needed, with a name and a key of RSA-2048 or more, P-256, P-384 "
    "or P-521 (docs/certificates.md, docs/replace-the-ca.md)"
)
_RESTORE = "put the right one back, from a backup (`ca-bridge backups`) or another copy"


def look(node: Node, settings: Settings, now: datetime) -> Iterator[Finding]:
    """Check the node's files, and ask no network."""
    yield from _node_name(settings)
    anchors = {state.authority.name: state.certificates for state in node.authorities}
    # the kubelet's client certificate comes first: without it a rebooted node stays down
    for item in sorted(node.items, key=lambda item: item.spec.name != KUBELET_CONF):
        if item.pair is not None:  # `use.look_at_pairs` looks at it
            continue
        if item.foreign:
            yield _operators(item, now) if item.spec.by_flag else _self_made(item, node, now)
            continue
        yield from _item(item, settings, now)
        if not item.named and item.state == "present":
            text = f"its manifest has no --tls-cert-file: nothing serves with {item.certificate_path}"
            hint = "ca-bridge serving-certs on puts it in, and off takes it away"
            yield Finding.warning("serving-certificate", item.spec.name, text, hint)
        if item.state == "present":
            yield from key_of(item)
            path = item.key_path or item.certificate_path
            if path.exists():
                yield from private_file(path, item.spec.name)
            yield from chain(item, node.authorities)
            if item.spec.kubeconfig:
                yield from _cluster(item, anchors.get(item.spec.authority.name, ()), node, settings)
    for state in node.authorities:
        if node.is_worker and state.state == "missing" and not (settings.node.kubelet_dir / "config.yaml").exists():
            yield Finding.note("ca", f"CA {state.authority.name}", _BEFORE_JOIN)
        else:
            yield from authority(state, node, now)
    yield from _policy(node, settings)
    yield from _service_account(node, settings)
    places = [settings.node.pki_dir, settings.node.kubeconfig_dir]
    places += [item.certificate_path.parent for item in node.items if item.state == "present" and item.pair is None]
    # the kubelet runs every manifest in it, as root if the manifest says so
    places += filter(Path.is_dir, [settings.node.kubeconfig_dir / "manifests"])
    yield from open_directories(places)
    yield from _manifests(node, settings)


def _node_name(settings: Settings) -> Iterator[Finding]:
    """Compare node.name with the certificates' node name, which hooks, bundles and a desk's policy use."""
    ours, name = settings.node.node_name, node_name(settings.node.pki_dir, settings.node.kubeconfig_dir)
    if name not in ("", ours):
        text = f"wanted the node's name in the cluster, which is {one_line(name)}, found {one_line(ours)}"
        yield Finding.warning("node-name", "node.name", text, "set node.name")


def _self_made(item: Item, node: Node, now: datetime) -> Finding:
    """Return a finding about a kubelet's self-signed certificate, the default, which no client can verify."""
    name, end = item.spec.name, expiry.first_end(item.certificates)
    renew = f"`ca-bridge renew {name}` puts one of the CA in its place"
    hint = f"{renew}; so does [certificate.{name}] sans in the settings"
    text = f"wanted a certificate of the CA in {item.anchor_path}, found one of {_name(item.certificates[0], 'issuer')}"
    if "--kubelet-certificate-authority" in node.flags(Component.APISERVER):
        more = ", and kube-apiserver verifies it (--kubelet-certificate-authority): no logs, no exec"
        return Finding.error("kubelet-self-signed", name, f"{text}{more}", hint)
    if end <= now:
        more = f"{expiry.left_text(end, now)}, and the kubelet does not make another one; {text}"
        return Finding.warning("kubelet-self-signed", name, more, hint)
    more = f"{expiry.left_text(end, now)}; made by the kubelet itself, so that no client can verify it; {hint}"
    return Finding.note("kubelet-self-signed", name, more)


def _operators(item: Item, now: datetime) -> Finding:
    """Return a finding about a component's serving certificate that an operator got elsewhere, and no run renews."""
    end = expiry.first_end(item.certificates)
    text = f"{expiry.left_text(end, now)}; of {_name(item.certificates[0], 'issuer')} in {item.certificate_path}, and not renewed here"
    if end <= now + expiry.CA_ENDS_SOON / 12:
        return Finding.warning("serving-certificate", item.spec.name, text, "have its own CA sign the next one")
    return Finding.note("serving-certificate", item.spec.name, text)


# --- one certificate -------------------------------------------------------------------------------------------------


def _item(item: Item, settings: Settings, now: datetime) -> Iterator[Finding]:
    name = item.spec.name
    if item.state == "present":
        if name not in settings.renewal.left_alone:
            yield end(item, settings, now)
        if name == SUPER_ADMIN:
            yield _super_admin(item, settings)
        yield from _identity(item, settings)
        if item.obstacle is not None:
            yield from_error("not-replaceable", name, item.obstacle)
    elif item.state == "missing" and item.spec.optional:
        own = "its component serves one that it made itself, which no client can verify; ca-bridge serving-certs on"
        yield Finding.ok("certificate", name, own if item.spec.by_flag else "not on this node, which is normal for it")
    else:
        text = item.trouble or f"there is no certificate in {item.certificate_path}"
        first = f"mv {item.certificate_path} /root, and " if item.state == "broken" else ""
        is_made = item.state in ("missing", "broken") and (item.listed or name == KUBELET_CONF or item.spec.by_flag)
        hint = f"{_RESTORE}; or {first}`ca-bridge renew {name}` makes it anew" if is_made else _RESTORE
        yield Finding.error(f"certificate-{item.state}", name, text, hint)


def _early(certificate: x509.Certificate, about: str, now: datetime, hint: str) -> Finding:
    begin = certificate.not_valid_before_utc
    text = f"valid only from {expiry.minute(begin)}, and this node's clock says {expiry.minute(now)}"
    return Finding.error("clock", about, text, hint)


def _super_admin(item: Item, settings: Settings) -> Finding:
    """Return a finding about super-admin.conf: kubeadm leaves it there, and its documentation says to move it away."""
    is_left_alone = SUPER_ADMIN in settings.renewal.left_alone
    renewed = 'only its name renews it (renewal.super_admin = "by-name")' if is_left_alone else "each renewal renews it"
    text = f"still here, as kubeadm init leaves it: no RBAC rule holds it back, and {renewed}"
    hint = f"rm {item.certificate_path}; `ca-bridge renew {SUPER_ADMIN}` makes it when it is needed"
    return Finding.note("super-admin", SUPER_ADMIN, text, hint)


def _identity(item: Item, settings: Settings) -> Iterator[Finding]:
    """Check the identity in a certificate; `chain` checks its CA."""
    error = foreign_identity(item, settings) if item.managed else None
    if isinstance(error, ForeignIdentityError) and any(each.subject != "issuer" for each in error.violations):
        yield from_error("identity", item.spec.name, error)


def _policy(node: Node, settings: Settings) -> Iterator[Finding]:
    """Check each live certificate against the node's own policy, long before it is due."""
    if settings.policy.file is None:
        return
    found = []
    try:
        for item in node.items:
            is_judged = item.managed and item.state == "present" and not item.foreign
            if is_judged and (error := policy_error(item, settings, None)) is not None:
                found.append(from_error("policy", item.spec.name, error))
    except SettingsError as e:
        found = [Finding.error("policy", "policy.file", str(problem), e.hint) for problem in e.problems]
    yield from found or [Finding.ok("policy", "policy.file", "allows all certificates that are renewed here")]


def end(item: Item, settings: Settings, now: datetime) -> Finding:
    """Return a finding about a certificate's end; a due certificate is in order until it is overdue."""
    name, end = item.spec.name, expiry.first_end(item.renewable)
    if expiry.is_early(item.certificates[:1], now):
        hint = "put the clock right; if it is right, it was wrong before: `ca-bridge renew NAME` makes a new one"
        return _early(item.certificates[0], name, now, hint)
    begin = item.certificates[0].not_valid_before_utc
    if end <= now:
        text = expiry.left_text(end, now) + _by_its_ca(item, end)
        if name == KUBELET_CONF:
            text += "; a kubelet that starts with it ends at once: after a reboot nothing on this node comes up"
        renew, rotate = "`ca-bridge renew` takes expired certificates too", "why did the kubelet not rotate it?"
        return Finding.error("expired", name, text, renew if item.managed else rotate)
    if item.rotates and not expiry.is_rotation_late(item.renewable, now):
        config = settings.node.kubelet_dir / "config.yaml"
        unless = "" if config.exists() else f", unless its configuration says otherwise: no {config} is here"
        return Finding.ok("certificate", name, f"{expiry.left_text(end, now)}; rotated by the kubelet itself{unless}")
    if not item.managed:
        text = f"{expiry.left_text(end, now)}, and the kubelet should have rotated it"
        hint = "does a signer in the cluster answer the kubelet's requests (kubectl get csr)?"
        return Finding.warning("rotation", name, text, hint)
    before = settings.renewal.before.of(min(end - begin, settings.renewal.validity))
    due_since = max(begin, end - before)  # a certificate with a shorter life is due from its first day
    if end - now < (end - due_since) * _OVERDUE_SHARE:
        text = f"{expiry.left_text(end, now)}{_by_its_ca(item, end)}, and due since {expiry.minute(due_since)}"
        return Finding.warning("overdue", name, text, "does the timer or cron job run? `ca-bridge renew` does it now")
    due = ", due" if end - now < before else ""
    return Finding.ok("certificate", name, f"{expiry.left_text(end, now)}{_by_its_ca(item, end)}{due}")


def _by_its_ca(item: Item, end: datetime) -> str:
    """Say that the certificate ends with its CA, which is not the first in its file; a renewal changes to the first."""
    is_earlier = item.anchor is not None and item.anchor.not_valid_after_utc == end
    return f", with its CA, which is not the first in {item.anchor_path}" if is_earlier else ""


# --- its key ---------------------------------------------------------------------------------------------------------


def key_of(item: Item) -> Iterator[Finding]:
    """Check that the key exists and belongs to the certificate."""
    name, path = item.spec.name, item.key_path or item.certificate_path
    try:
        data = read(path)
        pem = kubeconfig.key_data(data or b"") if item.embedded else data
    except UnreadableError as e:
        yield Finding.error("key-unreadable", name, f"wanted its key in {path}, found: {e}")
        return
    except kubeconfig.KubeconfigError as e:
        yield Finding.error("key-unreadable", name, f"{path}: {e}", _RESTORE)
        return
    if pem is None:
        text = f"its key is missing in {path}"
        yield Finding.error("key-missing", name, text, "renew it: that makes a new key")
        return
    found = key_finding(item.certificates[0], pem)
    if found is not None and found.kind == "other":
        text = f"wanted the key of {item.certificate_path} in {path}, found another certificate's"
        hint = f"renew {name}, which makes a new pair, before its component restarts; or put the right key back"
        yield Finding.error("key-of-another-certificate", name, text, hint)
    elif found is not None and found.kind == "unreadable":
        text = f"wanted a private key without a passphrase in {path}, found something else"
        yield Finding.error("key-unreadable", name, text, _RESTORE)


def private_file(path: Path, about: str) -> Iterator[Finding]:
    """Check that a secret's file belongs to root or us, and that others can neither read it nor change its path."""
    try:
        opened = open_secret(path)
    except OSError:
        return  # the check that needs the file reports it
    if opened is not None:
        yield Finding.error("open-secret", about, str(opened), opened.hint, str(path))
    yield from _exposed(path, about)


def open_directories(places: Iterable[Path]) -> Iterator[Finding]:
    """Check that no other user can write to these directories or their parents, and so replace our files."""
    for path in dict.fromkeys(places):
        yield from _exposed(path, str(path))


def _exposed(path: Path, about: str) -> Iterator[Finding]:
    """Yield a finding if a user other than root and ours can change the file or a directory of its path."""
    found = exposure(path)
    if found is None:
        return
    owner = found.path.lstat().st_uid
    if user_name(owner).startswith(_ROOTLESS):
        return
    subject, text = about if found.path == path else str(found.path), str(found)
    check = "open-directory" if owner in {0, os.geteuid()} else "owner"
    yield Finding.error(check, subject, text, found.hint, str(found.path))


# --- its CA ----------------------------------------------------------------------------------------------------------


def chain(item: Item, authorities: Sequence[AuthorityState]) -> Iterator[Finding]:
    """Check that a certificate leads to a CA of its CA file by the intermediates in its own file."""
    anchors = next((state.certificates for state in authorities if state.authority == item.spec.authority), ())
    leaf, *intermediates = item.certificates
    if not anchors or any(not _no_path(leaf, intermediates, anchor) for anchor in anchors):
        return
    name, issuer = item.spec.name, _name(item.certificates[-1], "issuer")
    wanted = f"wanted a certificate of the CA in {item.anchor_path} ({_name(anchors[0])})"
    known = {_name(ca): state.authority.name for state in authorities for ca in state.certificates}
    if (signer := anchor_of(item.certificates, anchors)) is not None:
        kind, why = algorithm_name(signer.public_key()), _no_path(leaf, intermediates, signer)
        text = f"{wanted} by a path that ca-bridge takes, found one by that CA's key ({kind}): {why}"
        yield Finding.error("ca-unsupported", name, text, _UNSUPPORTED)
    elif issuer in known:
        other = "another CA of the same name" if issuer == _name(anchors[0]) else f"one of {known[issuer]}"
        yield Finding.error("pair-of-another-ca", name, f"{wanted}, found {other}", _RESTORE)
    else:
        text = f"{wanted}, found one of {one_line(issuer)}, whose certificate is not in {item.certificate_path}"
        hint = "the intermediate belongs behind the certificate in its file; or is it of another cluster? renew it"
        yield Finding.error("missing-intermediate", name, text, hint)


def _no_path(leaf: x509.Certificate, intermediates: Sequence[x509.Certificate], anchor: x509.Certificate) -> str:
    """Return why no path exists at any time, or an empty text; other checks look at dates."""
    chain = (leaf, *intermediates, anchor)
    end = min(certificate.not_valid_after_utc for certificate in chain)
    begin = max(certificate.not_valid_before_utc for certificate in chain)
    if end <= begin:  # such as a leaf that ended before its CA had a new certificate with the same key
        return "" if leads_to(chain[:-1], [anchor]) else "another signature"
    time = max(end - timedelta(seconds=1), begin)
    try:
        verify.verified_path(leaf, intermediates, anchor, time)
    except (NoPathError, *UNREADABLE) as e:
        return one_line(e)
    return ""


def _name(certificate: x509.Certificate, whose: Literal["subject", "issuer"] = "subject") -> str:
    try:
        return one_line(name_text(getattr(certificate, whose)))
    except UNREADABLE:
        return "a name that can't be read"


def authority(state: AuthorityState, node: Node, now: datetime) -> Iterator[Finding]:
    """Check the CAs of a file."""
    about = f"CA {state.authority.name}"
    if state.state != "present":
        text = state.trouble or f"there is no CA certificate in {state.path}"
        yield Finding.error("ca-missing", about, text, _RESTORE)
        return
    end = ca_end(state.certificates[0], about, now, f", key {state.key}")
    longer = outlasting(node.items).get(state.certificates[0], ())
    yield _with_longer(end, [item.spec.name for item in longer]) if longer else end
    if state.key == "local":
        text = "its key is on this disk; a reader of it can act as any user of the cluster"
        yield Finding.warning("ca-key-on-disk", about, text, "move it to where certificates are signed")
    yield from _further_cas(state, node, now)


def _further_cas(state: AuthorityState, node: Node, now: datetime) -> Iterator[Finding]:
    """Yield a finding for each CA behind the first; an expired CA is an error only if a certificate leads to it."""
    for number, certificate in enumerate(state.certificates[1:], start=2):
        about, end = f"CA {state.authority.name}, number {number} in its file", certificate.not_valid_after_utc
        names = [item.spec.name for item in node.items if item.anchor == certificate]
        if names and end - now < expiry.CA_ENDS_SOON:
            left = expiry.left_text(end, now)
            text = f"{left}; from its end on Kubernetes refuses what leads to it: {', '.join(names)}"
            hint = f"ca-bridge renew {' '.join(names)}: the first CA of {state.path} signs the next ones"
            is_over = end <= now
            yield Finding(
                "error" if is_over else "warning", "ca-expired" if is_over else "ca-ends-soon", about, text, hint
            )
        elif end <= now:
            text = f"{expiry.left_text(end, now)}; no certificate on this node leads to it"
            hint = f"take it out of {state.path} when no node of the cluster needs it"
            yield Finding.warning("ca-expired", about, text, hint)
        else:
            yield ca_end(certificate, about, now)


def _with_longer(end: Finding, names: Sequence[str]) -> Finding:
    """Add the certificates that end later to the finding about their CA's end, unless the CA has expired."""
    if end.level == "error":
        return end
    text = f"{end.text}; these end later, and Kubernetes refuses them from its end on: {', '.join(names)}"
    check = "ca-ends-soon" if end.level == "warning" else "ca-ends-first"
    return Finding.warning(check, end.about, text, _NEXT_CA)


def ca_end(certificate: x509.Certificate, about: str, now: datetime, more: str = "") -> Finding:
    """Return a finding about the end of a CA's certificate."""
    end = certificate.not_valid_after_utc
    if expiry.is_early([certificate], now):
        return _early(certificate, about, now, "put the clock right; if it is right, the CA's owner has to say why")
    if end <= now:
        text = f"{expiry.left_text(end, now)}: nothing that it signs is valid"
        hint = "its owner has to renew it first, with the same key; is this node's clock right?"
        return Finding.error("ca-expired", about, text, hint)
    if end - now < expiry.CA_ENDS_SOON:
        text = f"{expiry.left_text(end, now)}; no certificate may outlive it"
        return Finding.warning("ca-ends-soon", about, text, _NEXT_CA)
    return Finding.ok("ca", about, f"{expiry.left_text(end, now)}{more}")


# --- a kubeconfig's cluster ------------------------------------------------------------------------------------------


def _cluster(item: Item, anchors: Sequence[x509.Certificate], node: Node, settings: Settings) -> Iterator[Finding]:
    """Check that a kubeconfig's API server is this cluster's, and that the kubeconfig trusts its CA."""
    name, path = item.spec.name, settings.node.kubeconfig_dir / item.spec.base
    try:
        parsed = kubeconfig.parse(read(path) or b"")
        trusted = _trusted(parsed, path)
    except (BridgeError, UnreadableError, ValueError) as e:
        yield Finding.error("kubeconfig-ca", name, f"wanted the CA of its API server in {path}, found: {e}", _RESTORE)
        return
    wanted = f"wanted the CA of {item.anchor_path} to be trusted"
    hint = "the kubeconfig's certificate-authority-data is to be the content of that file"
    if anchors and trusted is not None and set(anchors) & set(trusted) and anchors[0] not in trusted:
        yield Finding.warning("kubeconfig-old-ca", name, f"{wanted}, found only an older one of it", hint)
    elif anchors and trusted is not None and anchors[0] not in trusted:
        found = ", ".join(map(_name, trusted)) or "none"
        yield Finding.error("kubeconfig-ca", name, f"{wanted}, found another CA ({found})", hint)
    yield from server(item, parsed, node)


def _trusted(parsed: kubeconfig.Kubeconfig, path: Path) -> list[x509.Certificate] | None:
    """Return the CAs that a kubeconfig trusts; None: it trusts those of the operating system."""
    data = parsed.ca_data
    if data is None and parsed.ca_file:
        data = read(path.parent / parsed.ca_file)
        if data is None:
            raise ValueError(f"no file {parsed.ca_file}")
    return load_pem_certificates(data) if data else None


def server(item: Item, parsed: kubeconfig.Kubeconfig, node: Node) -> Iterator[Finding]:
    """Check that the API server's certificate has the kubeconfig's host, which may be a load balancer's."""
    host, serving = parsed.tls_server_name or "", node.live("apiserver")
    with contextlib.suppress(ValueError):
        host = host or urlsplit(parsed.server).hostname or ""
    if serving is None or not host or is_named(serving, host):
        return
    text = f"wanted a server that is among the SANs of apiserver, found {one_line(parsed.server)}"
    hint = f"is it another cluster's? else: ca-bridge renew --add-san apiserver={one_line(host)}"
    yield Finding.warning("kubeconfig-server", item.spec.name, text, hint)


def is_named(certificate: x509.Certificate, host: str) -> bool:
    """Whether a host name or address is among a certificate's SANs (RFC 6125 §6.4: a wildcard stands for one label)."""
    try:
        entries = san_entries(certificate)
    except UNREADABLE:
        return False
    try:
        return ("IP", str(ipaddress.ip_address(host.strip("[]")))) in entries
    except ValueError:
        names = {value.lower() for kind, value in entries if kind == "DNS"}
        return host.lower() in names or f"*.{host.lower().partition('.')[2]}" in names


_PUBLIC_KEY = re.compile(rb"-----BEGIN ([A-Z ]*PUBLIC KEY)-----[^-]*-----END \1-----")


def _service_account(node: Node, settings: Settings) -> Iterator[Finding]:
    """Check the service account keys: an API server does not start without them, and no renewal makes them."""
    apiserver = node.manifests.get(Component.APISERVER)
    if apiserver is None:
        return
    signing = endpoints.file(apiserver.flags, "--service-account-signing-key-file")
    others = [Path("/", path) for path in apiserver.every("--service-account-key-file") if path]
    paths = [
        (signing or settings.node.pki_dir / "sa.key", "sa.key"),
        *((path, "sa.pub") for path in others or [settings.node.pki_dir / "sa.pub"]),
    ]
    found: list[bytes] = []
    for path, base in paths:
        try:
            data = read(path)
        except UnreadableError as e:
            yield Finding.error("service-account-key", base, f"{path}: {e}")
            return
        if not data:
            there = "nothing" if data is None else "an empty file"
            text = f"wanted the service account key in {path}, found {there}"
            yield Finding.error("service-account-key", base, text, _SA_HINT)
            continue
        found.append(data)
        if base == "sa.key":
            yield from private_file(path, base)
    if len(found) < len(paths):
        return
    key, *public = found  # each of the others may hold several keys
    blocks = [block[0] for data in public for block in _PUBLIC_KEY.finditer(data)]
    if all(b"PUBLIC KEY" in data for data in public) and not any(is_sa_pair(key, block) for block in blocks):
        text = "wanted sa.key and sa.pub to be a pair, found two of different pairs"
        yield Finding.error("service-account-key", "sa.pub", text, _SA_HINT)


def _manifests(node: Node, settings: Settings) -> Iterator[Finding]:
    """Check the kubelet's manifest directory: it runs each file as a pod, under any name, and follows links."""
    directory = settings.node.kubeconfig_dir / "manifests"
    if not node.manifests or not directory.is_dir():
        return
    static = KubeletFiles.load(settings.node.kubelet_dir).static_pods
    if static is not None and os.path.realpath(static) != os.path.realpath(directory):
        text = f"wanted the kubelet to take its static pods from {directory}, found staticPodPath {one_line(static)}"
        hint = "a restart moves manifests in the first, which this kubelet does not read: set one of the two right"
        yield Finding.error("static-pod-path", "kubelet", text, hint)
    ours = {path_of(component, settings.node.kubeconfig_dir).name: component for component in node.manifests}
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.is_dir():
            continue  # the kubelet ignores these
        yield from _exposed(path, str(path)) if path.is_symlink() or path.name in ours else ()
        name = pod_name(path) if path.name not in ours else None
        if name in {component.value for component in ours.values()}:
            text = f"wanted one manifest of {name}, found a second one: a kubelet takes every file of this directory"
            yield Finding.error("second-manifest", str(path), text, f"mv {path} to a directory that no kubelet reads")
