"""Programs with certmonger's helper contract, as sites write them: scripts that sign, ask people, or go wrong."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

#: Where Debian, and where Fedora, has certmonger's own helpers.
HELPER_DIRECTORIES = (Path("/usr/lib/certmonger"), Path("/usr/libexec/certmonger"))

_SITE_CA = """\
#!/bin/sh
# A CA directory with ca.crt and ca.key, signed with by openssl: what a site's own script may look like.
set -u
cd {directory} || exit 4
work=$(mktemp -d) || exit 3
trap 'rm -rf "$work"' EXIT
case ${{CERTMONGER_OPERATION:-}} in
  IDENTIFY) echo "site CA 1.0"; exit 0 ;;
  FETCH-ROOTS) echo "site CA"; cat ca.crt; exit 0 ;;
  GET-SUPPORTED-TEMPLATES) echo "server,client,peer"; exit 0 ;;
  SUBMIT) ;;
  *) exit 6 ;;
esac
printf '%s\\n' "$CERTMONGER_CSR" >"$work/csr"
printf 'basicConstraints=critical,CA:FALSE\\nkeyUsage=critical,digitalSignature,keyEncipherment\\n' >"$work/ext"
printf 'extendedKeyUsage=%s\\n' "$CA_BRIDGE_EKUS" >>"$work/ext"
openssl x509 -req -in "$work/csr" -CA ca.crt -CAkey ca.key -days "$CA_BRIDGE_DAYS" -copy_extensions copy \\
  -extfile "$work/ext" -set_serial "0x$(openssl rand -hex 16)" || exit 2
cat ca.crt
"""

_PERSON = """\
#!/bin/sh
# Lays each request before a person, and looks for the answer when it is asked again.
set -u
cd {directory} || exit 4
case ${{CERTMONGER_OPERATION:-}} in
  IDENTIFY) echo "a person"; exit 0 ;;
  SUBMIT)
    id=$(printf '%s' "$CERTMONGER_CSR" | sha256sum | cut -c1-16)
    printf '%s\\n' "$CERTMONGER_CSR" >"$id.csr"
    printf '%s %s\\n' "$CA_BRIDGE_CERTIFICATE" "$CA_BRIDGE_EKUS" >"$id.facts" ;;
  POLL) id=$CERTMONGER_CA_COOKIE ;;
  *) exit 6 ;;
esac
[ ! -e "$id.no" ] || {{ cat "$id.no"; exit 2; }}
[ ! -e "$id.crt" ] || {{ cat "$id.crt"; exit 0; }}
echo "ticket $id is open" >&2
echo "$id"
exit 1
"""

# certmonger's local-submit gives the EKUs that the CSR asks for, and no key usage but what it asks for; so the
# extensions are put into the CSR, whose signature is wrong then, which local-submit does not look at (0.79.17).
_WITH_USAGES = """\
#!{python}
import os
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

EKUS = {{"serverAuth": ExtendedKeyUsageOID.SERVER_AUTH, "clientAuth": ExtendedKeyUsageOID.CLIENT_AUTH}}
KEY_USAGE = x509.KeyUsage(True, False, True, False, False, False, False, False, False)


def spki(key):
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def with_usages(pem, ekus):
    csr = x509.load_pem_x509_csr(pem)
    assert csr.is_signature_valid
    public = csr.public_key()
    of_rsa = isinstance(public, rsa.RSAPublicKey)
    key = rsa.generate_private_key(65537, public.key_size) if of_rsa else ec.generate_private_key(public.curve)
    builder = x509.CertificateSigningRequestBuilder().subject_name(csr.subject)
    for extension in csr.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    builder = builder.add_extension(x509.ExtendedKeyUsage([EKUS[name] for name in ekus]), False)
    builder = builder.add_extension(KEY_USAGE, True)
    der = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    assert len(spki(key.public_key())) == len(spki(public))
    changed = x509.load_der_x509_csr(der.replace(spki(key.public_key()), spki(public)))
    return changed.public_bytes(serialization.Encoding.PEM).decode()


if os.environ["CERTMONGER_OPERATION"] == "SUBMIT":
    ekus = os.environ["CA_BRIDGE_EKUS"].split(",")
    os.environ["CERTMONGER_CSR"] = with_usages(os.environ["CERTMONGER_CSR"].encode(), ekus)
os.execv({helper!r}, [{helper!r}, "-d", {directory!r}])
"""


def program(path: Path, text: str) -> Path:
    """A script that its owner alone can write; a text without `#!` is one for sh."""
    path.write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def site_ca(directory: Path, certificate_pem: bytes, key_pem: bytes) -> Path:
    """A script with a CA of its own, which signs each request at once."""
    directory.mkdir(parents=True)
    (directory / "ca.crt").write_bytes(certificate_pem)
    (directory / "ca.key").touch(mode=0o600)
    (directory / "ca.key").write_bytes(key_pem)
    return program(directory / "site-ca", _SITE_CA.format(directory=shlex.quote(str(directory))))


def person(directory: Path) -> Path:
    """
    A script that asks a person.

    Each request is a file `ID.csr`, with the certificate's name and EKUs in `ID.facts`; the answer is `ID.crt`, or
    `ID.no` with the reason.
    """
    directory.mkdir(parents=True)
    return program(directory / "ask-a-person", _PERSON.format(directory=shlex.quote(str(directory))))


def helper(name: str) -> Path | None:
    """One of certmonger's own; None: not installed."""
    return next((there for directory in HELPER_DIRECTORIES if (there := directory / name).exists()), None)


def require_helper(name: str) -> Path:
    """
    One of certmonger's own.

    Raises:
        FileNotFoundError: Not installed; the text names what brings it.
    """
    found = helper(name)
    if found is None:
        raise FileNotFoundError(f"{name} not found; install the Debian package certmonger")
    return found


def local_submit_with_usages(path: Path, directory: Path) -> Path:
    """certmonger's local-submit, with its CA in a directory, behind a script that puts the usages into the CSR."""
    real = str(require_helper("local-submit"))
    text = _WITH_USAGES.format(python=sys.executable, helper=real, directory=str(directory))
    return program(path, text)


def local_submit_ca(directory: Path, certificate_pem: bytes, key_pem: bytes) -> None:
    """A directory for local-submit with this CA, which it would otherwise make for itself."""
    directory.mkdir(parents=True)
    for name, data in (("ca.crt", certificate_pem), ("ca.key", key_pem)):
        (directory / name).touch(mode=0o600)
        (directory / name).write_bytes(data)
    (directory / "serial").write_text("01\n")  # its own is random, and stays 0 where the first byte of it is 0
    files = ["-in", "ca.crt", "-inkey", "ca.key", "-out", "creds"]
    command = ["openssl", "pkcs12", "-export", *files, "-name", "Local Signing Authority", "-passout", "pass:"]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
