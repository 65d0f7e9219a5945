"""Would a role sign this certificate, as it is wanted, and as it would be accepted? Pure; see `VaultBackend.check_whole`."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from fnmatch import fnmatchcase

from cryptography import x509
from cryptography.x509.oid import NameOID

from bridge.contract import Wanted
from bridge.errors import Violation
from bridge.words import one_line

#: A role's field for each attribute of the subject; what the CSR has of them is not looked at.
_SUBJECT = {
    "organization": NameOID.ORGANIZATION_NAME,
    "ou": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "country": NameOID.COUNTRY_NAME,
    "province": NameOID.STATE_OR_PROVINCE_NAME,
    "locality": NameOID.LOCALITY_NAME,
    "street_address": NameOID.STREET_ADDRESS,
    "postal_code": NameOID.POSTAL_CODE,
}
_HOSTNAME = re.compile(r"([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?\.)*[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?")
_KEY_TYPES = {"rsa": "rsa", "ecdsa": "ec"}
#: `key_bits` by our names; a role without bits takes the smallest of these.
_BITS = {"rsa-2048": 2048, "rsa-3072": 3072, "rsa-4096": 4096, "ecdsa-p256": 256, "ecdsa-p384": 384}


def unlike(role: Mapping[str, object], wanted: Wanted) -> Iterator[Violation]:
    """
    Compare a role with what a renewal would ask for; usages are left to `role_violations`.

    Args:
        role: As the server tells it; a key that it does not have is no violation.
        wanted: The certificate.
    """
    yield from _lifetime(role, wanted)
    yield from _key(role, wanted)
    yield from _subject(role, wanted)
    yield from _names(role, wanted)


def _lifetime(role: Mapping[str, object], wanted: Wanted) -> Iterator[Violation]:
    """The role's maximum counts, whatever is asked for; 0 is the mount's, which is not ours to see."""
    seconds = role.get("max_ttl")
    if isinstance(seconds, int) and 0 < seconds < wanted.at_least.total_seconds():
        want = f"at least {_duration(wanted.at_least)}, or its answer is refused"
        yield Violation(subject="max_ttl", want=want, got=_duration(timedelta(seconds=seconds)))


def _duration(value: timedelta) -> str:
    return f"{value.days}d" if value >= timedelta(days=2) else f"{value.total_seconds() / 3600:.0f}h"


def _key(role: Mapping[str, object], wanted: Wanted) -> Iterator[Violation]:
    kind, bits = role.get("key_type"), role.get("key_bits")
    ours = _KEY_TYPES[wanted.key.partition("-")[0]]
    if kind in ("any", None):
        return
    if kind != ours:
        yield Violation(subject="key_type", want=f"{ours} (for {wanted.key}) or any", got=one_line(kind))
    elif isinstance(bits, int) and bits > _BITS[wanted.key]:
        yield Violation(subject="key_bits", want=f"at most {_BITS[wanted.key]}", got=str(bits))


def _subject(role: Mapping[str, object], wanted: Wanted) -> Iterator[Violation]:
    """The role's values take the place of the CSR's, without a word."""
    for key, oid in _SUBJECT.items():
        has = {str(one.value) for one in wanted.certificate.subject.get_attributes_for_oid(oid)}
        gives = set(_texts(role.get(key)))
        excepted = {value for name, value in wanted.extra_subject if name == oid.dotted_string}
        if (has ^ gives) - excepted:
            yield Violation(subject=key, want=_listed(has), got=_listed(gives))


# --- names -----------------------------------------------------------------------------------------------------------


def _names(role: Mapping[str, object], wanted: Wanted) -> Iterator[Violation]:
    """CN and SANs that the role would refuse or leave out."""
    for one in wanted.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME):
        if not _allows_cn(role, str(one.value)):
            yield Violation(subject="allowed_domains", want=one_line(one.value), got=_listed(_domains(role)))
    try:
        san = wanted.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return
    if role.get("use_csr_sans") is False:
        yield Violation(subject="use_csr_sans", want="true", got="false")
        return
    refused = [name for name in san.get_values_for_type(x509.DNSName) if not _allows(role, name)]
    if refused:
        yield Violation(subject="allowed_domains", want=_listed(refused), got=_listed(_domains(role)))
    yield from _addresses(role, list(map(str, san.get_values_for_type(x509.IPAddress))))
    uris = [uri for uri in san.get_values_for_type(x509.UniformResourceIdentifier)
            if not any(fnmatchcase(uri, one) for one in _texts(role.get("allowed_uri_sans")))]  # fmt: skip
    if uris:
        yield Violation(
            subject="allowed_uri_sans", want=_listed(uris), got=_listed(_texts(role.get("allowed_uri_sans")))
        )


def _addresses(role: Mapping[str, object], addresses: Sequence[str]) -> Iterator[Violation]:
    if addresses and role.get("allow_ip_sans") is False:
        yield Violation(subject="allow_ip_sans", want="true", got="false")
        return
    networks = _texts(role.get("allowed_ip_sans_cidr"))  # OpenBao's; Vault lets any address pass
    refused = [one for one in addresses if networks and not any(_is_in(one, network) for network in networks)]
    if refused:
        yield Violation(subject="allowed_ip_sans_cidr", want=_listed(refused), got=_listed(networks))


def _is_in(address: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(address) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return True  # not for us to judge


def _allows_cn(role: Mapping[str, object], name: str) -> bool:
    if _texts(role.get("cn_validations")) == ["disabled"]:
        return True
    if role.get("enforce_hostnames") is True and not _HOSTNAME.fullmatch(name.removeprefix("*.")):
        return False
    return _allows(role, name)


def _allows(role: Mapping[str, object], name: str) -> bool:
    """Whether one of the role's ways to allow a name fits; in doubt it does."""
    lenient = ("allow_any_name", "allowed_domains_template", "allow_token_displayname")
    if any(role.get(key) is True for key in lenient) or "allowed_domains" not in role:
        return True
    lower = name.lower()
    if lower == "localhost" and role.get("allow_localhost") is True:
        return True
    bare = [lower, lower.removeprefix("*.")] if role.get("allow_wildcard_certificates") is not False else [lower]
    return any(_fits(role, one, domain.lower()) for one in bare for domain in _domains(role))


def _fits(role: Mapping[str, object], name: str, domain: str) -> bool:
    return (
        (name == domain and role.get("allow_bare_domains") is True)
        or (name.endswith(f".{domain}") and role.get("allow_subdomains") is True)
        or ("*" in domain and role.get("allow_glob_domains") is True and fnmatchcase(name, domain))
    )


def _domains(role: Mapping[str, object]) -> list[str]:
    return _texts(role.get("allowed_domains"))


def _texts(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else []


def _listed(names: Iterable[str]) -> str:
    return one_line(", ".join(sorted(names)) or "none")
