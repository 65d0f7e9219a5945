"""Output of `check-expiration`: kubeadm's tables and structure, certificates that kubeadm does not list, and metrics."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from bridge.cli.printing import columns, width_here
from bridge.errors import Exit
from bridge.node.expiry_report import ExpiryReport, Row, report
from bridge.node.inventory import Node
from bridge.pki.certificates import fingerprint, name_text, serial_hex
from bridge.pki.expiry import CA_ENDS_SOON, first_end, minute, residual, rfc3339, seconds_left
from bridge.settings.tables import RenewalSettings
from bridge.system.console import is_verbose, styled
from bridge.words import escaped, steady

if TYPE_CHECKING:
    from bridge.monitoring import Remembered
    from bridge.rotation.places import Replaced
    from bridge.state.credentials import Credential

#: Grows when a key is removed or changes its meaning, but not for new keys.
SCHEMA_VERSION = 1

# Go's Format("Jan 02, 2006 15:04 MST"); strftime's month names follow the locale.
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_HEADER = ("CERTIFICATE", "EXPIRES", "RESIDUAL TIME", "CERTIFICATE AUTHORITY", "EXTERNALLY MANAGED")
_AUTHORITY_HEADER = ("CERTIFICATE AUTHORITY", "EXPIRES", "RESIDUAL TIME", "EXTERNALLY MANAGED")
_OWN_HEADER = ("CREDENTIAL OF CA-BRIDGE", "EXPIRES", "RESIDUAL TIME", "FILE")
_EXTRA_HEADER = ("NOT LISTED BY KUBEADM", *_HEADER[1:], "FILE")


def look(
    node: Node,
    now: datetime,
    within: timedelta | None,
    output: str,
    *,
    renewal: RenewalSettings | None = None,
    known: Remembered | None = None,
    own: Sequence[Credential] | None = (),
    replaced: Sequence[Replaced] | None = (),
) -> tuple[str, list[str], int]:
    """
    Return a `table`, `json`, `yaml` or `prometheus` text, lines for standard error, and the exit code.

    The code is 1 if a file exists and can't be used, else 3 if a certificate ends `within` this time, else 0. `known`,
    `own` (our own credentials) and `replaced` (CAs that are being replaced) are None for a user who may not see them.
    """
    renewal = renewal or RenewalSettings()
    found = report(node, now, None if within is None else lambda _: within, renewal.left_alone)
    if output == "table":
        phases = [(ca.name, f"phase {ca.standing.text}, since {minute(ca.since)}") for ca in replaced or ()]
        lines = [f"{name} is being replaced: {phase}\n" for name, phase in phases]
        text = "".join([table(found, renewal), _own_table(own or (), renewal, now), "\n" if lines else "", *lines])
    elif output == "prometheus":
        from bridge import monitoring  # noqa: PLC0415 (only for this format)

        text = monitoring.text(found, monitoring.due_times(node, renewal), known)
    elif output == "json":
        text = escaped(json.dumps(_structure(found, own, now, replaced), indent=4, ensure_ascii=False)) + "\n"
    else:
        text = _as_yaml(_structure(found, own, now, replaced))
    return text, list(found.troubles), Exit.FAILED if found.troubles else Exit.DUE if found.due else Exit.DONE


def table(report: ExpiryReport, renewal: RenewalSettings | None = None) -> str:
    """Return kubeadm 1.37's two tables, and a third of the certificates that kubeadm does not list."""
    styles = {row.name: _style(row, renewal or RenewalSettings()) for row in report.rows}
    tables: list[tuple[Sequence[str], Sequence[Row]]] = [(_AUTHORITY_HEADER, report.authorities)]
    if report.certificates:  # kubeadm lists none of a worker's
        tables.insert(0, (_HEADER, report.certificates))
    if report.extra:
        place = 0 if any(row.first for row in report.extra) else len(tables)
        tables.insert(place, (_EXTRA_HEADER, report.extra))
    texts = [_lines(header, [_cells(row, header) for row in rows], styles, is_whole=is_verbose())
             for header, rows in tables]  # fmt: skip
    # each CA that ends before its certificates, which kubeadm's columns do not show
    ends: dict[datetime, list[str]] = {}
    for row in report.rows:
        if row.outlasts_ca and not row.foreign:
            ends.setdefault(first_end(row.chain), []).append(row.name)
    texts += [f"their CA ends first, {minute(end)}: {', '.join(names)}\n" for end, names in ends.items()]
    return "\n".join(texts)


def _style(row: Row, renewal: RenewalSettings) -> str:
    if row.state == "missing" and row.optional:
        return "note"
    if row.certificate is None or row.state != "present" or row.expired or row.early:
        return "error"
    lifetime = row.certificate.not_valid_after_utc - row.certificate.not_valid_before_utc
    limit = renewal.before.of(lifetime) if row.authority else CA_ENDS_SOON
    is_due = row.due or row.outlasts_ca or timedelta(seconds=row.seconds_left or 0) <= limit
    return "" if row.foreign or row.left_alone else "warning" if is_due else "ok"


def _lines(header: Sequence[str], rows: Sequence[_Cells], styles: Mapping[str, str], *, is_whole: bool = False) -> str:
    """
    Align rows as Go's `tabwriter.NewWriter(writer, 10, 4, 3, ' ', 0)` does; for a narrow terminal the short rows, unless
    `is_whole`.
    """
    cells = [header, *(row.cells for row in rows)]
    short = [[_SHORT.get(cell, cell) for cell in header[:_MOST_SHORT]], *(row.short for row in rows)]
    widths = [max(10, 3 + max(map(len, column))) for column in zip(*cells, strict=True)][:-1]
    lines, most = ["".join(map(str.ljust, row, widths)) + row[-1] for row in cells], width_here()
    if most is not None and max(len(line.rstrip()) for line in lines) > most:
        lines = list(columns([[cell.rstrip() for cell in row] for row in (cells if is_whole else short)], most))
    return "".join(f"{_toned(line, styles)}\n" for line in lines)


class _Cells(NamedTuple):
    """A row of a table."""

    cells: Sequence[str]
    short: Sequence[str]  #: Cells for a narrow terminal: a shorter date, and no file.


def _own_table(own: Sequence[Credential], renewal: RenewalSettings, now: datetime) -> str:
    """Return the table of our own credentials, by which CAs and desks know this node; empty without any."""
    if not own:
        return ""
    styles, rows = {}, []
    for credential in own:
        is_bad = credential.ends is None or credential.has_ended(now)
        styles[credential.name] = "error" if is_bad else "warning" if credential.is_near(renewal.before, now) else "ok"
        if credential.ends is None:
            rows.append(_Cells(*[[f"{_MARKS['unreadable']} {credential.name}", "", "", credential.path]] * 2))
        else:
            left = residual(seconds_left(credential.ends, now))
            itself = f" (renewed as {credential.renewed_as})" if credential.renewed_as else ""
            place = f"{credential.path or 'reported by the CA'}{itself}"
            rows.append(_ending(credential.name, credential.ends, [left, place]))
    return "\n" + _lines(_OWN_HEADER, rows, styles)


def _toned(line: str, styles: Mapping[str, str]) -> str:
    word, blank, rest = steady(line).partition(" ")
    name = rest.split(maxsplit=1)[0] if word in _MARKS.values() else word
    style = styles.get(name, "error" if name != word else "")
    return f"{styled(word, style, sys.stdout)}{blank}{rest}"


_MARKS = {"missing": "!MISSING!", "broken": "!INVALID!", "unreadable": "!UNREADABLE!"}
#: Headings for a narrow terminal, which has no column for files.
_SHORT = {
    "CERTIFICATE AUTHORITY": "CA",
    "EXPIRES": "EXPIRES (UTC)",
    "RESIDUAL TIME": "LEFT",
    "EXTERNALLY MANAGED": "EXTERNAL",
    "NOT LISTED BY KUBEADM": "NOT KUBEADM'S",
}
_MOST_SHORT = len(_HEADER)


def _cells(row: Row, header: Sequence[str]) -> _Cells:
    """Return a row's cells; a certificate's include its CA."""
    file = [row.path] if header is _EXTRA_HEADER else []
    if row.certificate is None or row.state != "present":
        blanks = [""] * (min(len(header), _MOST_SHORT) - 2)
        return _Cells([f"{_MARKS[row.state]} {row.name}", "", *blanks, *file], [row.name, _MARKS[row.state], *blanks])
    left = "<invalid>" if row.early else residual(row.seconds_left or 0)  # kubeadm's word for an expired certificate
    authority = [] if header is _AUTHORITY_HEADER else [row.authority or ""]
    others = [left, *authority, "yes     " if row.external else "no      "]
    return _ending(row.name, row.certificate.not_valid_after_utc, others, file)


def _ending(name: str, end: datetime, others: Sequence[str], file: Sequence[str] = ()) -> _Cells:
    expires = f"{_MONTHS[end.month - 1]} {end:%d}, {end.year:04d} {end:%H:%M} UTC"
    return _Cells([name, expires, *others, *file], [name, f"{end:%Y-%m-%d %H:%M}", *others])


def _as_yaml(structure: Mapping[str, Any]) -> str:
    """Return YAML with sorted keys, as kubeadm's."""
    import yaml  # noqa: PLC0415 (only for this format)

    def dumped(*, allow_unicode: bool) -> str:
        # the dumper in C refuses a path that is not UTF-8
        return str(yaml.safe_dump(structure, sort_keys=True, allow_unicode=allow_unicode, width=10_000))

    text = dumped(allow_unicode=True)
    # if a character could steer a terminal, escape everything that is not ASCII
    return text if escaped(text) == text else dumped(allow_unicode=False)


def _structure(
    report: ExpiryReport, own: Sequence[Credential] | None, now: datetime, replaced: Sequence[Replaced] | None
) -> dict[str, Any]:
    """Return kubeadm's structure (output.kubeadm.k8s.io/v1alpha3) in its order, with further keys."""
    return {
        "kind": "CertificateExpirationInfo",
        "apiVersion": "output.kubeadm.k8s.io/v1alpha3",
        "certificates": [_entry(row) for row in report.certificates],
        "certificateAuthorities": [_entry(row) for row in report.authorities],
        "extraCertificates": [_entry(row) for row in report.extra],
        "ownCredentials": own and [_own_entry(credential, now) for credential in own],
        "replacedAuthorities": replaced
        and [{"name": ca.name, "phase": ca.standing.text, "since": rfc3339(ca.since)} for ca in replaced],
        "schemaVersion": SCHEMA_VERSION,
    }


def _own_entry(credential: Credential, now: datetime) -> dict[str, Any]:
    return {
        "name": credential.name,
        "expirationDate": None if credential.ends is None else rfc3339(credential.ends),
        "residualTime": 0 if credential.ends is None else seconds_left(credential.ends, now),
        "path": credential.path,
        "reportedByCA": None if credential.reported is None else rfc3339(credential.reported),
        "trouble": credential.trouble or None,
        "renewedAs": credential.renewed_as or None,
    }


def _entry(row: Row) -> dict[str, Any]:
    """Return kubeadm's keys in kubeadm's order, then ours."""
    certificate = row.certificate
    entry: dict[str, Any] = {
        "name": row.name,
        "expirationDate": rfc3339(certificate.not_valid_after_utc) if certificate else None,
        "residualTime": row.seconds_left or 0,
        "externallyManaged": row.external and row.state != "missing",
        # kubeadm omits it when it is empty
        **({"caName": row.authority} if row.authority and row.state != "missing" else {}),
        "missing": row.state == "missing",
        "state": row.state,
        "due": row.due,
        "path": row.path,
        "trouble": row.trouble,
    }
    if certificate:
        entry |= {
            "notBefore": rfc3339(certificate.not_valid_before_utc),
            "serialNumber": serial_hex(certificate),
            "subject": name_text(certificate.subject),
            "issuer": name_text(certificate.issuer),
            "sha256": fingerprint(certificate),
            "usableUntil": rfc3339(first_end(row.chain)),
        }
    return entry
