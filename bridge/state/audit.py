"""
The record: one line of JSON an event in `state_dir/audit.jsonl`, each with the SHA-256 of the line before it.

`bridge.state.audit_chain` has the files, `bridge.state.audit_reader` reads them.
What the chain can't find: somebody who may write to the state directory can write all of it anew. Copies that leave the
machine (syslog) can.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pwd
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.contract import SignRequest
from bridge.errors import BackendUnavailableError, BridgeError, Exit, WaitingError
from bridge.pki.certificates import UNREADABLE, fingerprint, name_text, serial_hex
from bridge.settings.tables import AuditSettings
from bridge.state.audit_chain import DAMAGED, Chain
from bridge.state.store import Store
from bridge.system import console
from bridge.system.console import print_error
from bridge.system.state_file import StateError

log = logging.getLogger("ca-bridge")

SYSLOG = Path("/dev/log")

ASKED, ISSUED, VERIFIED, INSTALLED = "asked", "issued", "verified", "installed"
REFUSED, UNAVAILABLE, FAILED = "refused", "unavailable", "failed"
RECOVERED, ROLLED_BACK, RESTARTED = "recovered", "rolled-back", "restarted"
#: Asked for, signed and proven, and not installed.
REHEARSED = "rehearsed"
#: A copy of a kubeconfig, `result`, has got what was installed.
COPIED = "copied"
#: A CA has the request and answers later; a request that is given up.
PENDING, CANCELLED = "pending", "cancelled"
#: A CA's renewals fail again and again.
NEEDS_A_PERSON = "needs-a-person"
#: Its `previousSerialNumber` is the one that was revoked.
REVOKED = "revoked"

_LONGEST_RESULT = 2000
_SYSLOG_SECONDS = 1.0
#: Facility authpriv (10), severity notice (5), and critical (2) for what a person must see: RFC 5424 §6.2.1.
_SYSLOG_PRIORITY = 10 * 8 + 5
_SYSLOG_LOUD = {NEEDS_A_PERSON: 10 * 8 + 2, DAMAGED: 10 * 8 + 2}


_REPAIR = "make room, or fix the state directory, and keep this message: the audit log does not have it"


class AuditError(BridgeError):
    """The record could not be written."""

    hint = "nothing is installed that the audit log can't have; make room, or fix the state directory, then run again"


def event_of(error: BridgeError) -> str:
    """The event to record for a certificate that was not installed, by its error."""
    if isinstance(error, BackendUnavailableError):
        return UNAVAILABLE
    if isinstance(error, WaitingError):
        return PENDING
    return REFUSED if error.exit_code == Exit.REFUSED else FAILED


def _issuer(certificate: x509.Certificate) -> str | None:
    """The issuer's name; None: it can't be read, since a CA's answer is recorded before it is verified."""
    try:
        return name_text(certificate.issuer)
    except UNREADABLE:
        return None


class Record:
    """The lines of one run; they wait until they are written together."""

    def __init__(self, store: Store, settings: AuditSettings) -> None:
        """
        Args:
            store: Its lock is held whenever lines are written.
            settings: When to rotate, and whether to tell syslog.
        """
        self.run_id = console.begin_run()  #: Each message of the run has it, too.
        self._store = store
        self._settings = settings
        self._waiting: list[dict[str, Any]] = []
        self._known: dict[str, dict[str, Any]] = {}
        self._chain = Chain(store, settings.rotate_at.count, who)

    def know(self, name: str, request: SignRequest, backend: str, identity: str | None) -> None:
        """
        Remember the facts that each later line about a certificate repeats.

        Args:
            name: kubeadm's.
            request: As it is sent.
            backend: Its label.
            identity: Who we are to it, if it tells.
        """
        old = request.replaces
        self._known[name] = {
            "csrSha256": hashlib.sha256(request.csr.public_bytes(Encoding.DER)).hexdigest(),
            "previousSerialNumber": serial_hex(old) if old is not None else None,
            "backend": backend,
            "identity": identity,
        }

    def add(
        self,
        event: str,
        name: str | None = None,
        *,
        authority: str | None = None,
        old: x509.Certificate | None = None,
        new: x509.Certificate | None = None,
        error: BridgeError | None = None,
        result: str = "ok",
        more: Mapping[str, str] | None = None,
    ) -> None:
        """
        Add a line, which is not written yet.

        Args:
            event: One of the names above.
            name: The certificate's; None: the event is about none.
            authority: Its CA's name.
            old: The certificate that is, or was to be, replaced.
            new: The one in its place.
            error: Why not; its text and exit code are recorded.
            result: Otherwise.
            more: Further keys, such as who asked.
        """
        line = {
            "run": self.run_id,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "event": event,
            "name": name,
            "authority": authority,
            **self._known.get(name or "", {}),
            **(more or {}),
            "result": (error.reason if error is not None else result)[:_LONGEST_RESULT],
            "exitCode": error.exit_code if error is not None else Exit.DONE,
        }
        if old is not None:
            line["previousSerialNumber"] = serial_hex(old)
        if new is not None:
            line |= {"certificateSha256": fingerprint(new), "serialNumber": serial_hex(new), "issuer": _issuer(new)}
        self._waiting.append({key: value for key, value in line.items() if value is not None})

    def write(self, *, head_later: bool = False) -> None:
        """
        Write what waits, safe on disk when this returns.

        Args:
            head_later: `write_head` follows within a second or so: for who writes hundreds of lines a second.

        Raises:
            AuditError: It could not be written; it does not wait any more.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        try:
            written = self._chain.add(waiting, head_later=head_later)
        except OSError as e:
            place = e.filename or self._store.audit
            raise AuditError(f"{place}: the audit log could not be written: {e.strerror}") from e
        except StateError as e:
            raise AuditError(f"the audit log could not be written: {e}") from e
        if self._settings.syslog:
            _tell_syslog(written)

    def write_head(self) -> None:
        """
        Write down which line is the newest.

        Raises:
            AuditError: It could not be written.
        """
        try:
            self._chain.write_head()
        except (OSError, StateError) as e:
            raise AuditError(f"the audit log could not be written: {e}") from e

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.write_or_warn()  # whichever way the run ended

    def write_or_warn(self) -> None:
        """Write what waits; where it is too late to stop, say loudly what the record lacks."""
        lost = [f"{line['event']} {line.get('name', '')}".strip() for line in self._waiting]
        try:
            self.write()
        except AuditError as e:
            print_error(AuditError(f"{e}; the audit log lacks of run {self.run_id}: {', '.join(lost)}", hint=_REPAIR))


def who() -> dict[str, str]:
    """The effective user, and the one who logged in (which neither sudo nor the environment changes)."""
    doer = {"user": _user_name(os.geteuid()), "host": os.uname().nodename}
    try:
        login = int(Path("/proc/self/loginuid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return doer  # a kernel without audit
    return doer if login == _NOBODY_LOGGED_IN else {**doer, "login": _user_name(login)}


#: (uid_t) -1: started by cron, systemd or in a container.
_NOBODY_LOGGED_IN = 0xFFFFFFFF


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _tell_syslog(lines: Sequence[bytes]) -> None:
    """A copy for whoever collects this machine's logs; the file is what counts."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log_socket:
            log_socket.settimeout(_SYSLOG_SECONDS)
            log_socket.connect(str(SYSLOG))
            for line in lines:
                priority = _SYSLOG_LOUD.get(json.loads(line)["event"], _SYSLOG_PRIORITY)
                log_socket.send(f"<{priority}>ca-bridge[{os.getpid()}]: ".encode() + line.rstrip(b"\n"))
    except OSError as e:
        log.warning("%s: syslog did not get the line: %s", SYSLOG, e.strerror or type(e).__name__)
