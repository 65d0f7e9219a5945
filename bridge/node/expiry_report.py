"""When a node's certificates end: the rows of `check-expiration`. The time is an argument, not the clock's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from bridge.node.inventory import AuthorityState, FileState, Item, Node
from bridge.pki.expiry import ROTATION_IS_LATE, first_end, is_early, seconds_left
from bridge.specs import KUBELET_CONF

#: Returns how long before its end a certificate is due, by its lifetime.
Limit = Callable[[timedelta], timedelta]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One certificate of the report."""

    name: str
    path: str
    state: FileState
    trouble: str | None
    chain: Sequence[x509.Certificate]  #: The certificate and its intermediates; empty unless it is present.
    seconds_left: int | None  #: Time left of the certificate, as kubeadm shows it.
    chain_seconds_left: int | None  #: Time left of the certificate in the chain that ends first.
    authority: str | None  #: None for a CA itself.
    external: bool  #: The CA's key is not on the node.
    first: bool  #: A kubelet's client certificate that has expired or soon will: a rebooted node would stay down.
    due: bool  #: It ends within the limit, is not valid yet, or is missing although required; False without a limit.
    limit: timedelta | None  #: Due when less than this is left; None: without a limit.
    optional: bool = False  #: A healthy node may be without it.
    foreign: bool = False  #: Not from the cluster's CA, or a further CA without a certificate here: shown, never due.
    left_alone: bool = False  #: Renewed only by name: shown, but never due.
    early: bool = False  #: It, an intermediate or its CA is not valid yet by this node's clock.
    outlasts_ca: bool = False  #: Its CA ends first, which makes it invalid.

    @property
    def certificate(self) -> x509.Certificate | None:
        """The first certificate of the file."""
        return self.chain[0] if self.chain else None

    @property
    def expired(self) -> bool:
        """Whether the certificate, or an intermediate that it needs, has ended."""
        is_shown_only = self.foreign or self.left_alone
        return self.chain_seconds_left is not None and self.chain_seconds_left < 0 and not is_shown_only


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpiryReport:
    """All rows, in the order of the output."""

    certificates: Sequence[Row]  #: As kubeadm lists them.
    authorities: Sequence[Row]  #: As kubeadm lists them.
    extra: Sequence[Row]  #: Certificates that kubeadm does not list.
    troubles: Sequence[str]  #: Existing files that can't be used, one line each.

    @property
    def rows(self) -> list[Row]:
        """All rows; a kubelet's client certificate that ends soon comes before all others."""
        return sorted([*self.certificates, *self.authorities, *self.extra], key=lambda row: not row.first)

    @property
    def due(self) -> bool:
        """Whether any row is due."""
        return any(row.due for row in self.rows)


def outlasting(items: Iterable[Item]) -> dict[x509.Certificate, list[Item]]:
    """The certificates that end after their CA, by CA."""
    found: dict[x509.Certificate, list[Item]] = {}
    for item in items:
        if item.anchor is not None and _outlasts_ca(item):
            found.setdefault(item.anchor, []).append(item)
    return found


def _outlasts_ca(item: Item) -> bool:
    own = (*item.certificates, *item.copy)
    return bool(own) and item.anchor is not None and item.anchor.not_valid_after_utc < first_end(own)


def report(
    node: Node, now: datetime, within: Limit | None, left_alone: Collection[str] = (), cas_within: Limit | None = None
) -> ExpiryReport:
    """The ends of all certificates and CAs; `within` makes them due (None: none), CAs `cas_within`, but never `left_alone`."""
    rows = [(item, _item_row(item, now, within, left_alone)) for item in node.items]
    of_cas = cas_within or within
    cas = [(state, _authority_row(state, now, of_cas)) for state in node.authorities]
    unlisted = [row for item, row in rows if not item.listed and not (item.state == "missing" and row.optional)]
    extra = [*sorted(unlisted, key=lambda row: not row.first), *(row for state, row in cas if not state.listed)]
    extra += [row for state in node.authorities for row in _further_rows(state, node, now, of_cas)]
    return ExpiryReport(
        certificates=[row for item, row in rows if item.listed],
        authorities=[row for state, row in cas if state.listed],
        extra=extra,
        troubles=node.troubles,
    )


def _item_row(item: Item, now: datetime, within: Limit | None, left_alone: Collection[str]) -> Row:
    is_left_alone = item.spec.name in left_alone
    within = None if item.foreign or is_left_alone else within
    late_share = ROTATION_IS_LATE if item.rotates else 1
    limit = _limit(item.ending, within, late_share)
    chain, path = _shown(item)
    soon = _limit(chain, lambda _: timedelta(days=30), late_share)  # as the default `renewal.before`
    return Row(
        name=item.spec.name,
        path=str(path),
        state="broken" if item.key_trouble else item.state,
        trouble=item.trouble or item.key_trouble or item.unlike,
        chain=chain,
        seconds_left=_seconds_left(chain[:1], now),
        chain_seconds_left=_seconds_left(chain, now),
        authority="none" if item.foreign else item.spec.authority.name,
        external=item.authority_external and not item.foreign,
        foreign=item.foreign,
        left_alone=is_left_alone,
        due=_is_due(chain, now, limit) or (within is not None and _is_lacking(item)),
        early=not item.foreign and is_early(chain, now),
        first=item.spec.name == KUBELET_CONF and _is_due(chain, now, limit or soon),
        limit=limit,
        optional=item.spec.optional,
        outlasts_ca=_outlasts_ca(item),
    )


def _shown(item: Item) -> tuple[Sequence[x509.Certificate], Path]:
    """The chain that ends first, and its file: the kubelet keeps a copy of its pair, which may be the older one."""
    if item.copy and item.current is not None and first_end(item.copy) < first_end(item.certificates):
        return (*item.copy, *item.ending), item.current
    return item.ending, item.certificate_path


def _is_lacking(item: Item) -> bool:
    """Whether a renewal is needed whatever the end: the key or the names are wrong, or there is no certificate."""
    return bool(item.key_trouble or item.unlike or (item.state == "missing" and not item.spec.optional))


def _seconds_left(chain: Sequence[x509.Certificate], now: datetime) -> int | None:
    """Time left of the certificate that ends first."""
    return seconds_left(first_end(chain), now) if chain else None


def _authority_row(state: AuthorityState, now: datetime, within: Limit | None) -> Row:
    row = _ca_row(state, state.authority.name, state.certificates[:1], now, within)
    return replace(row, due=row.due or (within is not None and state.state == "missing"))


def _further_rows(state: AuthorityState, node: Node, now: datetime, within: Limit | None) -> Iterator[Row]:
    """A row for each further CA of a file; it is due only if it signed a certificate here."""
    used = {item.anchor for item in node.items}
    for number, certificate in enumerate(state.certificates[1:], start=2):
        is_used = certificate in used
        row = _ca_row(state, f"{state.authority.name}-{number}", [certificate], now, within if is_used else None)
        yield replace(row, foreign=not is_used)


def _ca_row(
    state: AuthorityState, name: str, chain: Sequence[x509.Certificate], now: datetime, within: Limit | None
) -> Row:
    limit, left = _limit(chain, within, late_share=1), _seconds_left(chain, now)
    return Row(
        name=name,
        path=str(state.path),
        state=state.state,
        trouble=state.trouble,
        chain=chain,
        seconds_left=left,
        chain_seconds_left=left,
        authority=None,
        external=state.key == "external",
        first=False,
        due=_is_due(chain, now, limit),
        early=is_early(chain, now),
        limit=limit,
    )


def _limit(chain: Sequence[x509.Certificate], within: Limit | None, late_share: float) -> timedelta | None:
    if within is None or not chain:
        return None
    lifetime = first_end(chain) - chain[0].not_valid_before_utc
    return min(within(lifetime), lifetime * late_share)


def _is_due(chain: Sequence[x509.Certificate], now: datetime, limit: timedelta | None) -> bool:
    if limit is None:
        return False
    end = first_end(chain)
    return end < now or end - now < limit or is_early(chain, now)
