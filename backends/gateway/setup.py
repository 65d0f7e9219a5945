"""What the person who sets up a door needs: the tables of its policy for one node's certificates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import timedelta

from cryptography import x509
from cryptography.x509.oid import NameOID

from bridge.contract import SetupFile, SetupRequest
from bridge.pki.certificates import san_entries
from bridge.words import one_line

_MASTERS = "system:masters"
#: The policy's own default, and what its rules for SANs can name.
_LONGEST, _KINDS = timedelta(days=365), {"DNS", "IP"}


def files(wanted: SetupRequest) -> Sequence[SetupFile]:
    """One part of `desk-policy.toml` for the authority; parts for several authorities go well together."""
    text = "\n".join([*_allow_lines(wanted), *_certificate_lines(wanted)])
    return [SetupFile(name=f"door-{wanted.authority.name}.toml", text=f"{text}\n")]


def _allow_lines(wanted: SetupRequest) -> Iterator[str]:
    """As comments, since the policy has the table once for all."""
    where = f"authority {wanted.authority.name} of cluster {one_line(wanted.cluster)}, node {one_line(wanted.node)}"
    yield f"# For desk-policy.toml at the door: {where}."
    yield "# The table [allow], which is there once, needs at least:"
    yield f"#   clusters = [{_quoted(wanted.cluster)}]"
    yield f"#   nodes = [{_quoted(wanted.node)}]"
    if wanted.validity > _LONGEST:
        yield f'#   max_validity = "{-(-wanted.validity // timedelta(days=1))}d"'
    masters = [name for name, one in wanted.certificates.items() if _is_master(one)]
    if masters:
        yield f"#   masters = [{', '.join(map(_quoted, masters))}]"


def _certificate_lines(wanted: SetupRequest) -> Iterator[str]:
    bare = [name for name, one in wanted.certificates.items() if not san_entries(one)]
    if bare:
        yield f"# Without SANs, so that [allow] is enough: {', '.join(bare)}."
    if len(bare) < len(wanted.certificates):
        yield "# Each list is all that such a certificate may have, on every node that [allow] names; without the list it is"
        yield "# what the live one has, and a node without certificates gets kubeadm's own names alone."
        yield "# Other nodes have other addresses: add them, or a network such as 192.0.2.0/24."
    for name, one in wanted.certificates.items():
        entries = sorted(san_entries(one))
        if not entries:
            continue
        yield f"\n[certificate.{_quoted(name)}]"
        yield "sans = ["
        for kind, value in entries:
            if kind in _KINDS:
                yield f"    {_quoted('{node}' if value == wanted.node else value)},"
            else:
                yield f"    # {kind} {one_line(value)}: no rule of the policy allows it"
        yield "]"


def _is_master(one: x509.Certificate) -> bool:
    return any(part.value == _MASTERS for part in one.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME))


def _quoted(text: str) -> str:
    """A TOML string, which JSON's are."""
    return json.dumps(text)
