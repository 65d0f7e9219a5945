"""
What a backend costs beside the bare request or program in a loop: the same CSRs, the same server, by turns.

`python -m tests.measure.backends [NAME…] [--requests N] [--rounds N] [--docs]` prints a table for each backend; with
`--docs` it is written into the backend's page `docs/NAME.md`, whose numbers come from nowhere else.
Needs the programs of `tests/kit/binaries.sh`; for `exec` the Debian package certmonger.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path

import requests
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from backends.cmp import CmpBackend, CmpSettings
from backends.est import EstBackend, EstSettings
from backends.exec import ExecBackend
from backends.exec.settings import ExecSettings
from bridge.contract import Backend, Issued, Secret, SignRequest
from bridge.specs import SPECS
from bridge.testing import TestCA, sign_request
from tests.kit import cmp, est, exec_programs
from tests.measure.__main__ import NUMBERS, Row, paired, table, write_between

LIMIT = 1.3
VALIDITY = timedelta(days=90)


def requests_for(ca: TestCA, name: str, count: int) -> list[SignRequest]:
    """Renewals of one certificate, each with a key (P-256) of its own."""
    live = ca.leaf(SPECS[name])
    return [sign_request(live, SPECS[name], "ecdsa-p256", VALIDITY) for _ in range(count)]


def signed_by(backend: Backend, wanted: Sequence[SignRequest]) -> None:
    """One after the other; what is no certificate is no measurement."""
    for request in wanted:
        answer = backend.sign(request)
        if not isinstance(answer, Issued):
            raise SystemExit(f"wanted a certificate, found {answer!r}")


def measure_est(directory: Path, count: int, rounds: int) -> Row:
    """GlobalSign's estserver with an agent's certificate; connection, handshake and `cacerts` are in each round."""
    ca, tls = TestCA.make(algorithm="ecdsa-p256"), est.make_tls(directory / "tls")
    agent, wanted = tls.agent("agent"), requests_for(ca, "etcd-peer", count)
    with est.estserver(directory / "est", (ca.certificate_pem, ca.key_pem), tls) as url:

        def ours() -> None:
            settings = EstSettings(
                url=url, ca_file=tls.ca, client_cert=agent["client_cert"], client_key=agent["client_key"]
            )
            with contextlib.closing(EstBackend.from_settings(settings)) as backend:
                signed_by(backend, wanted)

        def bare() -> None:
            with requests.Session() as session:
                session.trust_env, session.verify = False, str(tls.ca)
                session.cert = (str(agent["client_cert"]), str(agent["client_key"]))
                for request in wanted:
                    _post(session, url, request)

        against = "`requests` in a loop over one connection"
        return paired(f"{count} P-256 certificates through `est`", against, ours, bare, rounds, LIMIT)


def _post(session: requests.Session, url: str, request: SignRequest) -> x509.Certificate:
    """One enrolment, as in a script: its certificate is taken as it comes."""
    headers = {"Content-Type": "application/pkcs10", "Content-Transfer-Encoding": "base64"}
    body = base64.b64encode(request.csr.public_bytes(Encoding.DER))
    answer = session.post(f"{url}{est.ROOT}/simpleenroll", data=body, headers=headers, timeout=30)
    if answer.status_code != HTTPStatus.OK:
        raise SystemExit(f"wanted a certificate, found HTTP {answer.status_code}")
    return pkcs7.load_der_pkcs7_certificates(base64.b64decode(answer.content))[0]


def measure_exec(directory: Path, count: int, rounds: int) -> Row:
    """certmonger's local-submit as it is, which signs without usages: one process a certificate on both sides."""
    ca = TestCA.make()
    exec_programs.local_submit_ca(directory / "ca", ca.certificate_pem, ca.key_pem)
    command = (str(exec_programs.require_helper("local-submit")), "-d", str(directory / "ca"))
    wanted = requests_for(ca, "etcd-peer", count)

    def ours() -> None:
        signed_by(ExecBackend.from_settings(ExecSettings(command=command)), wanted)

    def bare() -> None:
        for request in wanted:
            reported = {"CERTMONGER_OPERATION": "SUBMIT", "CERTMONGER_CSR": request.csr_pem.decode()}
            run = subprocess.run(command, env=reported, stdin=subprocess.DEVNULL, capture_output=True, check=True)
            x509.load_pem_x509_certificate(run.stdout)

    against = "the program in a loop of `subprocess.run`"
    return paired(f"{count} P-256 certificates through `exec` and `local-submit`", against, ours, bare, rounds, LIMIT)


#: What a script does beside `openssl cmp`: nothing.
_LOOP = """\
for csr in "$1"/*.csr; do
  openssl cmp -config '' -batch -cmd p10cr -csr "$csr" -server "$2/.well-known/cmp/p/peer" -ref "$3" -secret "file:$4" \\
    -recipient "$5" -implicit_confirm -certout "$1/out.pem" >/dev/null 2>&1 || exit 1
done
"""


def measure_cmp(directory: Path, count: int, rounds: int) -> Row:
    """The kit's registration authority with a shared secret; a process a certificate on either side."""
    ca, recipient = TestCA.make(algorithm="ecdsa-p256"), "/CN=kubernetes"
    wanted = requests_for(ca, "etcd-peer", count)
    for number, request in enumerate(wanted):
        (directory / f"{number}.csr").write_bytes(request.csr_pem)
    with cmp.registration_authority(directory / "ra") as ra:
        ra.add_ca("ca", ca.certificate_pem, ca.key_pem)
        url, secret = ra.url("ca"), ra.directory / "node.secret"
        settings = CmpSettings(
            url=url, reference=cmp.REFERENCE, secret=Secret("file", str(secret)), recipient=recipient
        )
        words = ["sh", "-c", _LOOP, "sh", str(directory), url, cmp.REFERENCE, str(secret), recipient]
        return paired(
            f"{count} P-256 certificates through `cmp`",
            "`openssl cmp` in a shell loop",
            lambda: signed_by(CmpBackend.from_settings(settings), wanted),
            lambda: subprocess.run(words, check=True),
            rounds,
            LIMIT,
        )


#: By the backend's type.
MEASURES: dict[str, Callable[[Path, int, int], Row]] = {"cmp": measure_cmp, "est": measure_est, "exec": measure_exec}


def main(arguments: Sequence[str] | None = None, page: Path = NUMBERS) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.measure.backends")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASURES)}; all without one")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args(arguments)
    for name in options.names or MEASURES:
        with tempfile.TemporaryDirectory() as directory:
            text = table([MEASURES[name](Path(directory), options.requests, options.rounds)])
        print(text)
        if options.docs:
            command = f"python -m tests.measure.backends {name} --docs"
            write_between(page, f"<!-- numbers: written by `{command}` -->", text)


if __name__ == "__main__":
    main()
