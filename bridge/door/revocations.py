"""`POST /v1/revocations`: revokes a certificate that a node has replaced, by the desk's rules and at the desk's CA."""

from __future__ import annotations

import logging
from datetime import timedelta
from http import HTTPStatus

from cryptography import x509

from bridge.contract import Revocation
from bridge.desk import revocations
from bridge.desk.revocations import NotRevokedError, Signed
from bridge.door.app import Door, Environ, Reply, assert_method, json_body
from bridge.errors import BackendRefusedError, BridgeError
from bridge.pki.bundle import BundledRequest, BundleError, RequestBundle
from bridge.pki.bundle_format import loads_request
from bridge.pki.certificates import csr_fingerprint, fingerprint, serial_hex
from bridge.pki.node_proofs import revocation_of
from bridge.settings.tables import Settings
from bridge.state import audit
from bridge.state.session import recording
from bridge.words import one_line

log = logging.getLogger("ca-bridge")

ROOT = "/v1/revocations"
#: How long to wait for a signing round, which holds the state directory's lock.
_WAIT = timedelta(seconds=5)
_PAUSE_SECONDS = 30
#: Two certificates with a hundred names each take half of it; parsing takes up to 35 bytes of memory for each byte.
_MOST_BYTES = 64 << 10
#: Most digits of a serial number in the log; 40 are usual (RFC 5280 §4.1.2.2).
_LONGEST_SERIAL = 100


class Revocations:
    """The handler of `POST /v1/revocations`; thread-safe."""

    def __init__(self, settings: Settings, door: Door) -> None:
        self._settings = settings
        self._door = door

    def __call__(self, environ: Environ) -> Reply:
        """Answer a request."""
        if environ["PATH_INFO"] != ROOT:
            return Reply.error(HTTPStatus.NOT_FOUND, f"there is no such page, but {ROOT}")
        assert_method(environ, "POST")
        if len(data := json_body(environ)) > _MOST_BYTES:
            text = f"wanted at most {_MOST_BYTES} bytes, found {len(data)}"
            return Reply.error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
        try:
            revocation = revocation_of(data)
        except BundleError as e:
            return Reply.error(HTTPStatus.BAD_REQUEST, e)
        return self._revoke(revocation, environ["REMOTE_ADDR"])

    def _revoke(self, revocation: Revocation, peer: str) -> Reply:
        serial, whose = one_line(serial_hex(revocation.certificate), _LONGEST_SERIAL), "an unknown node"
        try:
            signing = self._door.signing
            known = revocations.assert_may(revocation, self._known, signing.policy, signing.cas, self._door.now())
            whose = known.node
            revocations.revoke(self._settings, known.authority, revocation)
            self._record(revocation, known)
        except (NotRevokedError, BackendRefusedError) as e:
            text = "%s, serial %s, of %s from %s is not revoked: %s"
            log.warning(text, revocation.name, serial, whose, peer, one_line(e, 2000), extra={"requester": peer})
            if isinstance(e, NotRevokedError):
                return Reply.error(HTTPStatus.FORBIDDEN, e)
            text = "wanted a CA that revokes it, found a refusal; the door's log has it"
            return Reply.error(HTTPStatus.FORBIDDEN, text)
        except BridgeError as e:
            log.error("%s, serial %s, of %s is not revoked yet: %s", revocation.name, serial, whose, e)  # noqa: TRY400
            text = "wanted a CA and a record that can be written to, found one that can't now; the door's log says why"
            return Reply.error(HTTPStatus.SERVICE_UNAVAILABLE, text, retry_after=str(_PAUSE_SECONDS))
        log.info("%s, serial %s, of %s is revoked", revocation.name, serial, whose, extra={"requester": peer})
        return Reply.of(HTTPStatus.OK, {"state": "revoked"})

    def _record(self, revocation: Revocation, known: Signed) -> None:
        """Write a revocation to the audit log; if that fails, the node asks again, so none stays unrecorded."""
        node = known.node if known.is_proven else f"{known.node} (not proven)"
        about = f"node {node}, cluster {known.cluster}, replaced by serial {serial_hex(revocation.successor)}"
        with recording(self._settings, _WAIT) as (_, record):
            record.add(
                audit.REVOKED, revocation.name, authority=known.authority, old=revocation.certificate, result=about
            )

    def _known(self, certificate: x509.Certificate) -> Signed | None:
        found = self._door.memory.signed_for(fingerprint(certificate))
        if found is None:
            return None
        row, data, is_proven = found

        def asked() -> tuple[BundledRequest, RequestBundle] | None:
            try:
                bundle = loads_request(data)
            except BundleError:  # dropped, by `serve.keep`
                return None
            for request in bundle.requests:
                if (request.name, csr_fingerprint(request.csr)) == (row.name, row.csr):
                    return request, bundle
            return None

        return Signed(
            name=row.name, node=row.node, cluster=row.cluster, authority=row.authority, is_proven=is_proven, asked=asked
        )
