"""Who a certificate is for: a subject and SANs, apart from any certificate that has them (pure)."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.x509.oid import NameOID

from bridge.pki.certificates import attributes, name_text, san_entry

#: As kubeadm takes them for certSANs (`ValidateCertSANs`): an RFC 1123 subdomain, or `*.` and one.
_LABEL = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
_DNS = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")
_LONGEST_NAME = 253


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """The subject and SANs of a CSR: who its certificate is for."""

    subject: x509.Name
    sans: tuple[x509.GeneralName, ...] = ()

    def is_of(self, csr: x509.CertificateSigningRequest | x509.Certificate) -> bool:
        """Whether a CSR, or a certificate, says exactly this; the order makes no difference."""
        found = csr.extensions
        try:
            sans = set(found.get_extension_for_class(x509.SubjectAlternativeName).value)
        except x509.ExtensionNotFound:
            sans = set()
        return sorted(attributes(csr.subject)) == sorted(attributes(self.subject)) and sans == set(self.sans)

    @property
    def text(self) -> str:
        """A text for people, such as `CN=kube-apiserver with DNS:cp-1, IP:192.0.2.10`."""
        sans = ", ".join(":".join(san_entry(san)) for san in self.sans)
        return f"{name_text(self.subject) or '(empty subject)'}{f' with {sans}' if sans else ''}"


def alternative_names(texts: Iterable[str]) -> tuple[x509.GeneralName, ...]:
    """
    SANs in their order, each once.

    Raises:
        ValueError: As `general_name`.
    """
    return tuple(dict.fromkeys(map(general_name, texts)))


def subject_of(common_name: str, groups: Sequence[str] = ()) -> x509.Name:
    """A subject as Go writes a `pkix.Name`: all O values in one RDN, then CN; UTF8String, which Kubernetes reads as well."""
    organizations = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    rdns = [x509.RelativeDistinguishedName(organizations)] if organizations else []
    return x509.Name([*rdns, x509.RelativeDistinguishedName([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])])


def names_of(sans: Iterable[x509.GeneralName]) -> set[tuple[str, str]]:
    """SANs as (type, value), as `certificates.san_entries` has them."""
    return set(map(san_entry, sans))


def general_name(text: str) -> x509.GeneralName:
    """
    An IP address, or else a DNS name, as in kubeadm's `certSANs`; `DNS:` or `IP:` before it says which is meant.

    Raises:
        ValueError: Neither; the text says what was wanted.
    """
    kind, colon, value = text.partition(":")
    if colon and kind in {"DNS", "IP"}:
        return _dns(value) if kind == "DNS" else x509.IPAddress(ipaddress.ip_address(value))
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return _dns(text)


def _dns(value: str) -> x509.DNSName:
    if not _DNS.fullmatch(value.lower()) or len(value) > _LONGEST_NAME or value.replace(".", "").isdigit():
        raise ValueError(f"wanted an IP address, or a DNS name such as api.example.com, found {value[:60]!r}")
    return x509.DNSName(value)
