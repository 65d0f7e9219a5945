"""What a run has to renew, and what it should and can't: the names asked for, or what is due."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import filterfalse
from typing import TYPE_CHECKING

from cryptography import x509

from bridge.errors import BridgeError, SettingsError, SettingsProblem, Violation
from bridge.node.inventory import Item, Node, NoNodeError
from bridge.pki import expiry, identity
from bridge.pki.certificates import load_pem_certificates
from bridge.settings.tables import Settings
from bridge.specs import KUBELET_CONF, KUBELET_SERVER, SPECS, SUPER_ADMIN, CertificateSpec, Component
from bridge.state.outcome import Outcome
from bridge.words import name_found

if TYPE_CHECKING:
    from bridge.renewal.wish import Wish, Wishes

#: As in `kubeadm certs renew all`.
ALL = "all"
#: The hint for what is missing or broken.
RESTORE = "put a good copy back (an expired one will do), then run again"


class ForeignIdentityError(BridgeError):
    """The live certificate is not what its name says, and the next one would get its subject and SANs."""

    def __init__(self, item: Item, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__(
            f"{item.certificate_path}: the next certificate gets the identity of this one, and it is not {item.spec.name}'s: "
            f"{'; '.join(map(str, violations))}",
            hint=f"find out who put it there, and put the right one back (an expired one will do); "
            f"after a change of the CA put the old CA's certificate behind the new one in {item.anchor_path}; "
            f"`--any-identity {item.spec.name}` renews it as it is",
        )


class MissingCertificateError(BridgeError):
    """There is no live certificate that a renewal could be made from."""


class NotReadyError(BridgeError):
    """Something on this node is to be mended first; no CA has a part in it, and none was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The certificates that a run has to renew, and those that it can't."""

    items: tuple[Item, ...]  #: To renew.
    failed: tuple[Outcome, ...]  #: Should be renewed, and can't be.
    skipped: tuple[str, ...]  #: Sentences for the operator.
    waived: tuple[str, ...] = ()  #: The same, about identities that are renewed as they are.
    #: By certificate name, where the next one is not to say what the live one says, or there is no live one.
    wishes: Mapping[str, Wish] = field(default_factory=dict)
    powerful: tuple[str, ...] = ()  #: The same, about what is renewed because it is there, and need not be.

    @property
    def told(self) -> tuple[str, ...]:
        """Sentences for the operator before a CA is asked: what is done on an operator's word, or for want of one."""
        names = [item.spec.name for item in self.items]
        return (
            *self.waived,
            *self.powerful,
            *(text for name in names if name in self.wishes for text in self.wishes[name].told),
        )


def select(
    node: Node,
    settings: Settings,
    names: Collection[str],
    now: datetime,
    waiting: Collection[str] = (),
    *,
    csrs_only: bool = False,
    any_identity: Collection[str] = (),
    asked_for: Mapping[str, x509.Certificate | None] | None = None,
    wishes: Wishes | None = None,
) -> Selection:
    """
    Choose what to renew.

    Args:
        node: What is there.
        settings: `renewal.before` and `renewal.validity` say what is due.
        names: kubeadm's names, or "all"; empty: what is due.
        now: Aware, UTC.
        waiting: Names for which an answer is to be fetched, due or not.
        csrs_only: No file is to be replaced, so that none need be fit for it.
        any_identity: Names whose live certificates are renewed whoever they are for.
        asked_for: The live certificates, by name, for which a request is open: they were judged when it was made; None
            is the value where there was none.
        wishes: What `wishes.decide` found for them, by name.

    Raises:
        SettingsError: A name that is none, or that is not ours to renew.
        NoNodeError: Nothing of a control plane is here.
    """
    assert_known([*names, *any_identity])
    if not node.is_here:
        raise NoNodeError(settings.node.pki_dir)
    by_name = {item.spec.name: item for item in node.items}
    wished, open_requests = wishes or {}, asked_for or {}
    asked = list(by_name) if not names or ALL in names else [name for name in by_name if name in names]
    asked.sort(key=lambda name: name != KUBELET_CONF)  # without it a rebooted node stays down
    items, failed = _by_wish([by_name[name] for name in asked], wished, open_requests)
    settled = {*(item.spec.name for item in items), *(outcome.name for outcome in failed)}
    skipped, waived = [], []
    for name in filterfalse(settled.__contains__, [*asked, *sorted(set(names) - {ALL} - set(asked))]):
        item = by_name.get(name)
        by_hand = name in names
        if item is None or (item.state == "missing" and (by_hand or not item.spec.optional)):
            failed.append(_absent(SPECS[name], item, node))
        elif (sentence := _left_alone(item, settings, by_hand=by_hand)) is not None:
            skipped.append(sentence)
        elif item.state != "present":
            failed.append(outcome_of(item, MissingCertificateError(item.trouble or "", hint=RESTORE)))
        elif names or name in waiting or is_other(item, settings) or _is_due(item, settings, now):
            error = _against(item, settings, open_requests.get(name), csrs_only=csrs_only)
            if name in any_identity and isinstance(error, ForeignIdentityError):
                violations = "; ".join(map(str, error.violations))
                waived.append(f"{name} is renewed as it is, as --any-identity says: {violations}")
                items.append(item)
            elif error is not None:
                failed.append(outcome_of(item, error))
            else:
                items.append(item)
    return Selection(
        items=tuple(items),
        failed=tuple(failed),
        skipped=tuple(skipped),
        waived=tuple(waived),
        powerful=tuple(_powerful(items, {*names, *open_requests})),
        wishes={name: wish for name, wish in wished.items() if not isinstance(wish, BridgeError)},
    )


def _powerful(items: Sequence[Item], told: Collection[str]) -> Iterator[str]:
    """A sentence about a super-admin.conf that is renewed because it is here (as by `kubeadm certs renew all`), and not named."""
    for item in items:
        if item.spec.name == SUPER_ADMIN and SUPER_ADMIN not in told:
            yield (
                f"{SUPER_ADMIN} is renewed since it is here; no RBAC rule holds it back, and nobody needs it after "
                f"kubeadm init: rm {item.certificate_path} (`ca-bridge renew {SUPER_ADMIN}` makes it when it is needed)"
            )


def _by_wish(
    items: Sequence[Item], wishes: Wishes, open_requests: Mapping[str, x509.Certificate | None]
) -> tuple[list[Item], list[Outcome]]:
    """
    Decide those that an operator's word is about, now or when they were asked for.

    Returns:
        Missing ones that are to be made; and what can't be as it was wanted.
    """
    made, failed = [], []
    for item in items:
        name, wish = item.spec.name, wishes.get(item.spec.name)
        if isinstance(wish, BridgeError):
            failed.append(outcome_of(item, wish))
        elif item.state == "missing" and (wish is not None or (name in open_requests and open_requests[name] is None)):
            try:
                anchors_of(item)
                made.append(item)
            except MissingCertificateError as e:
                failed.append(outcome_of(item, e))
    return made, failed


def _left_alone(item: Item, settings: Settings, *, by_hand: bool) -> str | None:
    """A sentence about one that is not to be renewed, and need not be; None: it may be."""
    name = item.spec.name
    if item.state == "missing":
        return f"{name} is not on this node, which is normal for it"
    if item.foreign and not by_hand and not is_other(item, settings):
        return (
            f"{name} is not of the cluster's CA (a kubelet makes such a one for itself): it stays, unless it is named, "
            f"or [certificate.{name}] sans is set"
        )
    if item.spec.component is Component.KUBELET and not item.managed:
        return f"{name} refers to {item.certificate_path}, which the kubelet renews by itself"
    return None


def _against(item: Item, settings: Settings, judged: x509.Certificate | None, *, csrs_only: bool) -> BridgeError | None:
    """Why it can't be renewed; `judged` is a live certificate that was looked at before."""
    if not item.managed:
        return _unknown_authority(item)
    if item.obstacle is not None and not csrs_only:
        return item.obstacle
    return None if judged == item.certificates[0] or item.foreign else foreign_identity(item, settings)


def is_other(item: Item, settings: Settings) -> bool:
    """Whether the settings ask for another serving certificate of a kubelet than the one that is there."""
    if item.spec.name != KUBELET_SERVER or not settings.serving_sans or not item.certificates:
        return False
    leaf = item.certificates[0]
    from bridge.pki.csr import Naming, alternative_names  # noqa: PLC0415 (a cron run loads it only where it is asked)

    return item.foreign or not Naming(subject=leaf.subject, sans=alternative_names(settings.serving_sans)).is_of(leaf)


def foreign_identity(item: Item, settings: Settings) -> BridgeError | None:
    """Why a live certificate's identity must not be given to the next one; also where nobody can tell."""
    authority = item.spec.authority.name
    try:
        anchors = anchors_of(item)
    except MissingCertificateError as e:
        return e
    extra = settings.extra_subject(authority)
    violations = identity.check(item.spec, item.certificates, anchors, str(item.anchor_path), extra)
    return ForeignIdentityError(item, violations) if violations else None


def anchors_of(item: Item) -> tuple[x509.Certificate, ...]:
    """
    All certificates of the CA file that it must lead to.

    Raises:
        MissingCertificateError: It can't be read.
    """
    try:
        return tuple(load_pem_certificates(item.anchor_path.read_bytes()))
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise MissingCertificateError(
            f"{item.anchor_path}: wanted the CA certificate that {item.spec.name} must lead to, found: {reason}",
            hint="put the CA certificate back",
        ) from e


def assert_known(names: Collection[str]) -> None:
    """
    Raises:
        SettingsError: One of the names is none of a certificate.
    """
    unknown = list(dict.fromkeys(name for name in names if name != ALL and name not in SPECS))
    if unknown:
        wanted = f"names of certificates ({', '.join(SPECS)}) or {ALL}"
        found = ", ".join(name_found(name, [*SPECS, ALL]) for name in unknown)
        raise SettingsError([SettingsProblem("", wanted, found)])


def _is_due(item: Item, settings: Settings, now: datetime) -> bool:
    """Whether it is due; one that a kubelet may renew by itself is not until that is late."""
    if item.rotates and not expiry.is_rotation_late(item.ending, now):
        return False
    return expiry.is_due(item.ending, settings.renewal.before, settings.renewal.validity, now)


def _unknown_authority(item: Item) -> BridgeError:
    text = f"wanted to read the CA file {item.anchor_path} that kube-apiserver's --etcd-cafile names, found that it can't be"
    return MissingCertificateError(text, hint="without it nothing that signs for it can be proven; put it back")


def _absent(spec: CertificateSpec, item: Item | None, node: Node) -> Outcome:
    if item is None:
        error = MissingCertificateError(f"wanted a certificate to renew, found none: {_why_not_here(spec, node)}")
    else:
        place = item.certificate_path
        hint = f"{RESTORE}; or `ca-bridge renew {spec.name}` makes it anew from kubeadm's configuration"
        is_made = spec.listed or spec.name == KUBELET_CONF
        error = MissingCertificateError(
            f"wanted a certificate to renew in {place}, found nothing", hint=hint if is_made else RESTORE
        )
    return Outcome(name=spec.name, authority=spec.authority.name, error=error)


def _why_not_here(spec: CertificateSpec, node: Node) -> str:
    if spec.name == KUBELET_SERVER:
        return "the kubelet makes its first one when it starts, and has not yet"
    if node.is_worker:
        return "this node is a worker, which has no such certificate"
    return "not on this node" if node.local_etcd else "no local etcd here"


def outcome_of(item: Item, error: BridgeError, backend: str = "") -> Outcome:
    """The outcome for a certificate that could not be renewed."""
    old = item.certificates[0] if item.certificates else None
    return Outcome(name=item.spec.name, authority=item.spec.authority.name, old=old, error=error, backend=backend)


def nothing_due(node: Node, settings: Settings, now: datetime) -> str:
    """A sentence for a run that has nothing to do."""
    present = [item for item in node.items if item.state == "present" and item.managed and not item.foreign]
    if not present:
        return "nothing is due: no certificates here"
    first = min(present, key=lambda item: expiry.first_end(item.ending))
    left = expiry.residual(expiry.seconds_left(expiry.first_end(first.ending), now))
    early = [item.spec.name for item in present if expiry.is_early(item.ending, now)]
    more = f"; not valid yet by this node's clock ({expiry.minute(now)}), see `ca-bridge doctor`: {', '.join(early)}"
    text = f"nothing is due: {first.spec.name} is the first to expire, in {left} (renewal.before = {settings.renewal.before})"
    return text + (more if early else "")
