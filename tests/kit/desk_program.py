"""A CA behind a program (backend `exec`) that does what a file says: sign, hold, wait, refuse, be away, or sign something else."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from bridge.node.sample_pki import ThrowawayCA

_PROGRAM = """\
#!{python}
import os, sys, time, datetime as d, pathlib
place = pathlib.Path({place!r})
operation = os.environ.get("CERTMONGER_OPERATION", "")
if operation not in ("SUBMIT", "POLL"):
    sys.exit(6)
with (place / "calls").open("a") as file:
    file.write(operation + " " + os.environ.get("CERTMONGER_CA_COOKIE", "-") + "\\n")
while (mode := (place / "mode").read_text().strip()) == "hold":
    time.sleep(0.05)
if mode == "wait":
    print(30)
    print("ticket-4711")
    sys.exit(5)
if mode == "down":
    sys.exit(3)
if mode == "refuse":
    print("the profile has ended")
    sys.exit(2)
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
csr = x509.load_pem_x509_csr(os.environ["CERTMONGER_CSR"].encode())
which = "other" if mode == "another CA" else "ca"
ca = x509.load_pem_x509_certificate((place / f"{{which}}.crt").read_bytes())
key = serialization.load_pem_private_key((place / f"{{which}}.key").read_bytes(), None)
now = d.datetime.now(d.timezone.utc)
begin, end = now - d.timedelta(minutes=1), now + d.timedelta(seconds=int(os.environ["CA_BRIDGE_VALIDITY_SECONDS"]))
public, subject = csr.public_key(), csr.subject
if mode == "expired": begin, end = now - d.timedelta(days=2), now - d.timedelta(days=1)
if mode == "ends at once": end = now + d.timedelta(seconds=30)
if mode == "in the future": begin = now + d.timedelta(hours=1)
if mode == "a day": end = now + d.timedelta(days=1)
if mode == "too long": end = now + d.timedelta(days=60)
if mode == "another key": public = ec.generate_private_key(ec.SECP256R1()).public_key()
if mode == "another node": subject = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "system:nodes"), x509.NameAttribute(x509.NameOID.COMMON_NAME, "system:node:cp1")])
if mode == "one group more": subject = x509.Name([*subject, x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "system:masters")])
if mode == "no group": subject = x509.Name(subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME))
usages = [x509.ObjectIdentifier("1.3.6.1.5.5.7.3." + ("2" if "clientAuth" in os.environ["CA_BRIDGE_EKUS"] else "1"))]
if mode == "other usages": usages = [x509.ObjectIdentifier("1.3.6.1.5.5.7.3.3")]
if mode == "more usages": usages = [x509.ObjectIdentifier("1.3.6.1.5.5.7.3.1"), x509.ObjectIdentifier("1.3.6.1.5.5.7.3.2")]
builder = (x509.CertificateBuilder().subject_name(subject).issuer_name(ca.subject).public_key(public)
    .serial_number(x509.random_serial_number()).not_valid_before(begin).not_valid_after(end)
    .add_extension(x509.BasicConstraints(mode == "a CA", None), True)
    .add_extension(x509.KeyUsage(True, False, False, False, False, mode == "a CA", False, False, False), True))
if mode != "no usages": builder = builder.add_extension(x509.ExtendedKeyUsage(usages), False)
sans = [one.value for one in csr.extensions if one.oid == x509.ExtensionOID.SUBJECT_ALTERNATIVE_NAME]
if mode == "a SAN": sans = [x509.SubjectAlternativeName([x509.DNSName("kubernetes")])]
for san in sans: builder = builder.add_extension(san, False)
leaf = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
anchor = ca.public_bytes(serialization.Encoding.PEM).decode()
print({{"only the CA": anchor, "garbage": "-----BEGIN CERTIFICATE-----\\nAAAA\\n-----END CERTIFICATE-----"}}.get(mode, leaf))
"""

#: Answers that must never be written.
HOSTILE = (
    *("expired", "ends at once", "in the future", "too long", "another key", "another node", "one group more"),
    *("no group", "other usages", "more usages", "no usages", "a CA", "a SAN", "another CA", "only the CA", "garbage"),
)


@dataclass(frozen=True, kw_only=True)
class DeskProgram:
    """The program, and how a test says what it does."""

    directory: Path

    @classmethod
    def make(cls, directory: Path, ca: ThrowawayCA, other: ThrowawayCA) -> DeskProgram:
        """Signs with the first CA."""
        directory.mkdir(parents=True)
        for name, one in (("ca", ca), ("other", other)):
            (directory / f"{name}.crt").write_bytes(one.certificate_pem)
            (directory / f"{name}.key").write_bytes(one.key_pem)
        program = directory / "program"
        program.write_text(_PROGRAM.format(python=sys.executable, place=str(directory)))
        program.chmod(0o755)
        made = cls(directory=directory)
        made.does("sign")
        return made

    def does(self, mode: str) -> None:
        """From now on."""
        beside = self.directory / ".mode"
        beside.write_text(mode)
        beside.rename(self.directory / "mode")

    @property
    def calls(self) -> list[str]:
        """Operation and cookie of each call."""
        path = self.directory / "calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def tables(self) -> str:
        """The tables of the settings."""
        return (
            f'[backend.ca]\ntype = "exec"\ncommand = ["{self.directory / "program"}"]\ntimeout = "3m"\n'
            '[authority.ca]\nbackend = "ca"\n'
        )
