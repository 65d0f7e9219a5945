"""Patterns of policies: how a name, an address, a subject or a group is written in one, and matched (pure)."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence

from cryptography import x509
from cryptography.x509.oid import NameOID

from bridge import words
from bridge.pki.certificates import attributes
from bridge.words import one_line

LONGEST_SHOWN = 100
_MOST_SHOWN = 5
_LONGEST_HOST_NAME = 253
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

CN_OID, O_OID = NameOID.COMMON_NAME.dotted_string, NameOID.ORGANIZATION_NAME.dotted_string


def some(texts: Iterable[str]) -> str:
    """The first few texts, for a refusal that people read."""
    return words.some((one_line(text, LONGEST_SHOWN) for text in texts), _MOST_SHOWN)


def matches(kind: str, value: str, text: str) -> bool:
    """Whether a SAN is what a policy's text allows: a name or an address, a suffix, a network."""
    rule = san_rule(text)
    if isinstance(rule, ipaddress.IPv4Network | ipaddress.IPv6Network):
        found = address(value) if kind == "IP" else None
        return found is not None and found in rule
    if rule is None or kind != "DNS":
        return False
    # as in a resolver, where case makes no difference
    name, wanted = value.lower(), rule.lower()
    if not wanted.startswith("."):
        return name == wanted
    # a wildcard stands for whole hosts, and is for a rule to name: `*.example.com`
    return name.endswith(wanted) and is_host_name(name)


def is_host_name(name: str) -> bool:
    """Labels of letters, digits and hyphens with dots between them (RFC 1123 §2.1, RFC 1035 §2.3.4)."""
    return len(name) <= _LONGEST_HOST_NAME and all(map(_LABEL.fullmatch, name.split(".")))


def address(value: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Parse an IP address; None: another text."""
    try:
        return ipaddress.ip_address(value)
    except ValueError:
        return None  # a network, as in name constraints: no host has it


def san_rule(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | str | None:
    """A network (perhaps of one address), a name, or a suffix; None: another text."""
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        plain = text.removeprefix(".").removeprefix("*.")
        is_name = plain and all(part and part.replace("-", "").replace("_", "").isalnum() for part in plain.split("."))
        looks_like_address = all(part.isdigit() for part in plain.split("."))
        return text if is_name and plain.isascii() and not looks_like_address else None


def subject_of(text: str, node: str) -> list[tuple[str, str]] | None:
    """A pattern's attributes in alphabetical order; None when it can't be read."""
    try:
        return sorted(attributes(x509.Name.from_rfc4514_string(text.replace("{node}", node))))
    except ValueError:
        return None


def subject_text(items: Sequence[tuple[str, str]]) -> str:
    """A subject as text, for people."""
    labels = {CN_OID: "CN", O_OID: "O"}
    return ",".join(f"{labels.get(oid, oid)}={value}" for oid, value in items) or "(empty)"


def one_of(texts: Sequence[str]) -> str:
    """The allowed patterns as one text, for messages."""
    return " or ".join(texts) or "none"
