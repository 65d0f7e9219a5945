"""Names of other nodes: a node's certificates as another node of the same cluster would have them."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from datetime import timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bridge.pki.naming import Naming

#: Of a kubelet's CN; what follows is the node's name (kubeadm, kubeconfig.go).
_NODE_USER = "system:node:"


def parse_nodes(text: str) -> dict[str, list[str]]:
    """
    A list of nodes: a line each, the name, then its addresses in the same order for all; `#` begins a comment.

    Returns:
        Addresses by name.

    Raises:
        ValueError: A line is not like that, or a name or address is there twice; its text says what was wanted.
    """
    found: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        name, *addresses = line.partition("#")[0].split() or [""]
        if not name:
            continue
        try:
            canonical = [str(ipaddress.ip_address(address)) for address in addresses]
        except ValueError as e:
            raise ValueError(f"line {number}: wanted a name and addresses, found {e}") from None
        if not canonical or name in found or any(set(canonical) & set(others) for others in found.values()):
            raise ValueError(f"line {number}: wanted a name and addresses of its own, found {line.strip()[:60]!r}")
        found[name] = canonical
    if len({len(addresses) for addresses in found.values()}) > 1:
        raise ValueError("wanted as many addresses for each node, found more for some")
    return found


def renamed(certificate: x509.Certificate, names: Mapping[str, str]) -> x509.Certificate:
    """
    The certificate with other names, signed by nobody that counts: for reading, never for use.

    Args:
        certificate: A node's.
        names: Another node's name and addresses by this node's.
    """
    extensions = [
        (
            _renamed_sans(value, names) if isinstance(value := one.value, x509.SubjectAlternativeName) else value,
            one.critical,
        )
        for one in certificate.extensions
    ]
    return _unsigned(certificate, _subject(certificate.subject, names), extensions)


def named(certificate: x509.Certificate, naming: Naming) -> x509.Certificate:
    """One of these names alone, signed by nobody that counts: for reading, never for use."""
    return _unsigned(certificate, naming.subject, [(x509.SubjectAlternativeName(naming.sans), False)])


def _unsigned(
    certificate: x509.Certificate, subject: x509.Name, extensions: Sequence[tuple[x509.ExtensionType, bool]]
) -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    begin = certificate.not_valid_before_utc
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(certificate.issuer)
    builder = builder.public_key(certificate.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(begin).not_valid_after(begin + timedelta(days=1))
    for value, critical in extensions:
        builder = builder.add_extension(value, critical=critical)
    return builder.sign(key, hashes.SHA256())


def _renamed_sans(value: x509.SubjectAlternativeName, names: Mapping[str, str]) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([_san(san, names) for san in value])


def _subject(subject: x509.Name, names: Mapping[str, str]) -> x509.Name:
    return x509.Name([x509.RelativeDistinguishedName([_attribute(a, names) for a in rdn]) for rdn in subject.rdns])


def _attribute(attribute: x509.NameAttribute[str | bytes], names: Mapping[str, str]) -> x509.NameAttribute[str | bytes]:
    if attribute.oid != NameOID.COMMON_NAME or not isinstance(attribute.value, str):
        return attribute
    prefix = _NODE_USER if attribute.value.startswith(_NODE_USER) else ""
    name = attribute.value.removeprefix(prefix)
    return x509.NameAttribute(attribute.oid, prefix + names.get(name, name))


def _san(san: x509.GeneralName, names: Mapping[str, str]) -> x509.GeneralName:
    other = names.get(str(san.value))
    if other is None:
        return san
    if isinstance(san, x509.IPAddress):
        return x509.IPAddress(ipaddress.ip_address(other))
    return x509.DNSName(other) if isinstance(san, x509.DNSName) else san
