"""The options of a run, and what it renews: each certificate is selected, left alone, or refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509

from bridge.errors import BridgeError, Violation
from bridge.node.inventory import Item, Node, NoNodeError
from bridge.pki import expiry, kubeadm_names
from bridge.pki.csr import Naming, alternative_names
from bridge.renewal import (
    ALL,
    RESTORE,
    DesiredByName,
    MissingCertificateError,
    Selection,
    anchors_of,
    assert_known,
    lost_keys,
    outcome_of,
)
from bridge.settings.tables import Settings
from bridge.specs import KUBELET_CONF, KUBELET_SERVER, SPECS, SUPER_ADMIN, CertificateSpec, Component
from bridge.state import Outcome

if TYPE_CHECKING:  # a run with nothing due loads none of them
    from bridge.renewal.verify_and_install import Proven
    from bridge.state.install import Replacement
    from bridge.state.open_requests import OpenRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Changes that an operator wants in the next certificates' names."""

    add: Mapping[str, tuple[x509.GeneralName, ...]] = field(default_factory=dict)  #: SANs by certificate name.
    drop: Mapping[str, tuple[x509.GeneralName, ...]] = field(default_factory=dict)
    adopt_defaults: bool = False  #: Subjects as kubeadm of this cluster's version would make them.
    kubeadm_config: Path | None = None  #: kubeadm's configuration file; None: the cluster's ConfigMap.


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """CAs that are replaced in one step with the certificates; empty in a renewal."""

    #: The next certificates of each CA file, by authority.
    bundles: Mapping[str, tuple[x509.Certificate, ...]] = field(default_factory=dict)
    files: tuple[Replacement, ...] = ()  #: CA files, and kubeconfigs that get CA data and no certificate.
    #: Adds CA data to a kubeconfig that gets a new certificate.
    edit: Callable[[Replacement], Replacement] = lambda file: file
    #: Called before the installation: raises a BridgeError if another node would not accept the new certificates.
    gate: Callable[[Sequence[Proven]], None] = lambda _: None
    stays: bool = False  #: A failed proof must not bring the old CA back: see `NotProven.stays`.


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The options of one run, as the command line or a test gives them; each command has some of them."""

    names: tuple[str, ...] = ()  #: kubeadm's names, or "all"; empty: the certificates that are due.
    any_identity: tuple[str, ...] = ()  #: Names whose live certificates are renewed whatever their identity.
    changes: Changes = Changes()
    all_or_nothing: bool = False  #: If one certificate fails, none is installed.
    restarts: bool = True  #: False: nothing is restarted; the operator does it, and earlier runs' restarts stay due.
    csrs_only: bool = False  #: No file is replaced, so obstacles to replacing one do not matter.
    trust: Trust = Trust()
    ahead: timedelta | None = None  #: A rehearsal covers the certificates that are due within this time; None: all.
    wait: timedelta = timedelta()  #: How long to wait for another run on this node to end.

    @property
    def is_by_name(self) -> bool:
        """Whether the operator named single certificates."""
        return bool(self.names) and ALL not in self.names


class ForeignIdentityError(BridgeError):
    """The live certificate's identity does not fit its name, and the next certificate would copy it."""

    def __init__(self, item: Item, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__(
            f"{item.certificate_path}: the next certificate gets the identity of this one, and it is not {item.spec.name}'s: "
            f"{'; '.join(map(str, violations))}",
            hint=f"find out who put it there, and put the right one back (an expired one will do); "
            f"after a change of the CA put the old CA's certificate behind the new one in {item.anchor_path}; "
            f"`--any-identity {item.spec.name}` renews it as it is",
        )


def select(
    node: Node,
    settings: Settings,
    options: RunOptions,
    now: datetime,
    *,
    requests: Iterable[OpenRequest] = (),
    waiting: Collection[str] = (),
    desired: DesiredByName | None = None,
) -> Selection:
    """Choose what to renew: the named certificates, or those that are due or wait for a CA's answer."""
    assert_known([*options.names, *options.any_identity], node)
    if not node.is_here:
        raise NoNodeError(settings.node.pki_dir)
    found = [item.spec.name for item in node.items]
    chosen = found if not options.names or ALL in options.names else [name for name in found if name in options.names]
    chosen = sorted(chosen, key=lambda name: name != KUBELET_CONF)  # without it a rebooted node stays down
    choice = _Choice(node, settings, options, now, requests, waiting, desired or {})
    unused = {item.spec.name for item in node.items if choice.is_unused(item)}
    every = [*chosen, *sorted(set(options.names) - {ALL} - set(chosen))]
    verdicts = [choice.of(name) for name in every if name not in unused]
    items = tuple(verdict for verdict in verdicts if isinstance(verdict, Item))
    known, names = {*options.names, *choice.asked_for}, {item.spec.name for item in items}
    return Selection(
        items=items,
        failed=tuple(verdict for verdict in verdicts if isinstance(verdict, Outcome)),
        skipped=tuple(verdict for verdict in verdicts if isinstance(verdict, str)),
        waived=tuple(choice.waived),
        powerful=tuple(_powerful(items, known)),
        costs=tuple(_costs(items, node)),
        lost=(
            *(f"{name} is renewed for its key: {choice.lost_keys[name]}" for name in choice.lost_keys if name in names),
            *(f"{item.spec.name} is renewed as the settings say: {item.unlike}" for item in items if item.unlike),
        ),
        desired={name: desired for name, desired in choice.desired.items() if not isinstance(desired, BridgeError)},
    )


class _Choice:
    """The facts that decide whether a certificate is selected, left alone or refused."""

    def __init__(
        self,
        node: Node,
        settings: Settings,
        options: RunOptions,
        now: datetime,
        requests: Iterable[OpenRequest],
        waiting: Collection[str],
        desired: DesiredByName,
    ) -> None:
        self.node, self.settings, self.options, self.now = node, settings, options, now
        self.waiting, self.desired = waiting, desired
        #: By name, the certificate that an open request replaces.
        self.asked_for = {request.name: request.request.replaces for request in requests}
        self.lost_keys = lost_keys(node)  #: By name, what is wrong with the certificate's key.
        # a worker that has not joined has none yet
        is_to_join = node.is_worker and not (settings.node.kubelet_dir / "config.yaml").exists()
        there = ("present", "missing") if is_to_join else ("present",)
        #: CAs whose certificate is missing or can't be read, so that none of theirs can be verified.
        self.lost_cas = {state.authority.name for state in node.authorities if state.state not in there}
        self.waived: list[str] = []

    def of(self, name: str) -> Item | Outcome | str | None:
        """Return the item to renew, its failure, or a sentence about why it is left alone; None: it is not due."""
        item, desired = self.node.item(name), self.desired.get(name)
        by_hand = name in self.options.names
        if item is None:
            text = f"there is no certificate to renew: {_why_not_here(SPECS[name], self.node)}"
            return Outcome(name=name, authority=SPECS[name].authority.name, error=MissingCertificateError(text))
        if isinstance(desired, BridgeError):
            return outcome_of(item, desired)
        if item.state == "missing":
            is_wanted = desired is not None or item.pair is not None or self.asked_for.get(name, item) is None
            return self._missing(item, is_wanted=is_wanted, by_hand=by_hand)
        if (sentence := self._left_alone(item, by_hand=by_hand)) is not None:
            return sentence
        if item.state != "present":
            is_broken = item.state == "broken"  # not merely unreadable for this user
            hint = _restore(item.spec, f"mv {item.certificate_path} /root, and " if is_broken else "")
            return outcome_of(item, MissingCertificateError(item.trouble or "", hint=hint))
        is_due = name in self.waiting or is_other(item, self.settings) or _is_due(item, self.settings, self.now)
        is_due = is_due or name in self.lost_keys or item.spec.authority.name in self.lost_cas
        return self._judged(item) if self.options.names or is_due else None

    def is_unused(self, item: Item) -> bool:
        """Whether the component serves with its own or an operator's certificate, and this run wants no other."""
        name = item.spec.name
        is_wanted = name in self.options.names or name in self.desired or name in self.asked_for
        is_spare = item.foreign or (item.state == "missing" and item.spec.optional)
        return item.spec.by_flag and is_spare and not is_wanted

    def _left_alone(self, item: Item, *, by_hand: bool) -> str | None:
        """Return why an existing certificate is not to be renewed; None: it may be."""
        name = item.spec.name
        if name in self.settings.renewal.left_alone and not by_hand and name not in self.asked_for:
            return f'{name} is renewed by name alone (renewal.super_admin = "by-name"): `ca-bridge renew {name}`'
        if item.foreign and item.spec.by_flag:
            return f"{name} was not signed by the cluster's CA: it stays, since {item.certificate_path} is an operator's own"
        if item.foreign and not by_hand and not is_other(item, self.settings):
            stays = f"it stays, unless you name it or set sans in [certificate.{name}]"
            return f"{name} was not signed by the cluster's CA (a kubelet signs its own): {stays}"
        if item.spec.component is Component.KUBELET and not item.managed:
            return f"{name} refers to {item.certificate_path}, which the kubelet renews by itself"
        return None

    def _missing(self, item: Item, *, is_wanted: bool, by_hand: bool) -> Item | Outcome | str:
        if not is_wanted and item.spec.optional and not by_hand:
            return f"{item.spec.name} is not on this node, which is normal for it"
        if not is_wanted:
            text = f"there is no certificate to renew in {item.certificate_path}"
            return outcome_of(item, MissingCertificateError(text, hint=_restore(item.spec)))
        try:
            anchors_of(item)
        except MissingCertificateError as e:
            return outcome_of(item, e)
        return self._unless(None if self.options.csrs_only else item.obstacle, item)

    def _judged(self, item: Item) -> Item | Outcome:
        name = item.spec.name
        error = self._against(item)
        if name in self.options.any_identity and isinstance(error, ForeignIdentityError):
            violations = "; ".join(map(str, error.violations))
            self.waived.append(f"{name} is renewed as it is, as --any-identity says: {violations}")
            error = None
        return self._unless(error, item)

    def _unless(self, error: BridgeError | None, item: Item) -> Item | Outcome:
        """Return the item, unless there is an error or the node's own policy forbids it."""
        desired = self.desired.get(item.spec.name)
        if error is None and self.settings.policy.file is not None:
            from bridge.renewal.prepare import policy_error  # noqa: PLC0415 (only where the settings name a policy)

            error = policy_error(item, self.settings, None if isinstance(desired, BridgeError) else desired)
        return item if error is None else outcome_of(item, error)

    def _against(self, item: Item) -> BridgeError | None:
        """Return why the item can't be renewed; a certificate with an open request was judged when that was made."""
        if not item.managed:
            text = f"can't read the CA file {item.anchor_path} that kube-apiserver's --etcd-cafile names"
            hint = "without it no certificate of that CA can be verified; put it back"
            return MissingCertificateError(text, hint=hint)
        if item.obstacle is not None and not self.options.csrs_only:
            return item.obstacle
        is_judged = self.asked_for.get(item.spec.name) == item.certificates[0]
        return None if is_judged or item.foreign else foreign_identity(item, self.settings)


def _powerful(items: Sequence[Item], known: Collection[str]) -> Iterator[str]:
    """Warn of a super-admin.conf that is renewed only because it exists, as `kubeadm certs renew all` does."""
    for item in items:
        if item.spec.name == SUPER_ADMIN and SUPER_ADMIN not in known:
            yield (
                f"{SUPER_ADMIN} is renewed since it is here; no RBAC rule holds it back, and it is not needed after "
                f"kubeadm init: rm {item.certificate_path} (`ca-bridge renew {SUPER_ADMIN}` makes it when it is needed)"
            )


def _costs(items: Sequence[Item], node: Node) -> Iterator[str]:
    """Warn that the API server ends open streams through kubelets when it loads a new client certificate."""
    if Component.APISERVER in node.manifests and any(item.spec.name == "apiserver-kubelet-client" for item in items):
        yield (
            "apiserver-kubelet-client: when the API server takes the new one up, open streams through kubelets "
            "(kubectl logs -f, exec, port-forward) end once; begin them again"
        )


def is_other(item: Item, settings: Settings) -> bool:
    """Whether the settings ask for another certificate of a further pair, or of a kubelet, than the live one."""
    if item.unlike is not None:
        return True
    if item.spec.name != KUBELET_SERVER or not settings.serving_sans or not item.certificates:
        return False
    leaf = item.certificates[0]
    return item.foreign or not Naming(subject=leaf.subject, sans=alternative_names(settings.serving_sans)).is_of(leaf)


def foreign_identity(item: Item, settings: Settings) -> BridgeError | None:
    """Return why the next certificate must not get this identity, or why that can't be checked."""
    authority = item.spec.authority.name
    try:
        anchors = anchors_of(item)
    except MissingCertificateError as e:
        return e
    if item.pair is not None:  # its identity comes from the settings, not from the live certificate
        return None
    extra = settings.extra_subject(authority)
    violations = kubeadm_names.identity_violations(item.spec, item.certificates, anchors, str(item.anchor_path), extra)
    return ForeignIdentityError(item, violations) if violations else None


def _is_due(item: Item, settings: Settings, now: datetime) -> bool:
    """Whether the item is due; a certificate that a kubelet rotates is due only once the rotation is late."""
    if item.rotates and not expiry.is_rotation_late(item.renewable, now):
        return False
    return expiry.is_due(item.renewable, settings.renewal.before, settings.renewal.validity, now)


def _restore(spec: CertificateSpec, first: str = "") -> str:
    """Return the hint for a missing or broken certificate; some can be made anew by name, after the command `first`."""
    is_made = spec.listed or spec.by_flag or spec.name == KUBELET_CONF
    anew = f"; or {first}`ca-bridge renew {spec.name}` makes it anew from kubeadm's configuration"
    return f"{RESTORE}{anew if is_made else ''}"


def _why_not_here(spec: CertificateSpec, node: Node) -> str:
    if spec.name == KUBELET_SERVER:
        return "the kubelet makes its first one when it starts, and has not yet"
    if node.is_worker or node.is_etcd_host:
        kind = "a worker" if node.is_worker else "an etcd host"
        return f"this node is {kind}, which has no such certificate"
    return "not on this node" if node.local_etcd else "no local etcd here"
