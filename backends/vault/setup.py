"""
A script with roles and a policy for the administrator of a Vault or OpenBao PKI engine, and the comparison of an
existing role with a certificate. `sign/:role` replaces the CSR's O by the role's: so each certificate has a role
(OpenBao 2.7; Vault has no `allowed_ip_sans_cidr` and no `not_*_bound`, and ignores unknown fields).
"""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import Literal

from cryptography import x509
from cryptography.x509.oid import NameOID

from backends.http import listed
from backends.vault.server import texts
from backends.vault.settings import DEFAULT_ROLE, RoleOf, VaultSettings, role_selector
from bridge.contract import DEFAULT_CLUSTER, NamePatterns, PlannedCertificate, Selector, SetupFile, SetupRequest
from bridge.errors import BridgeError, SettingsError, Violation
from bridge.pki import certificates
from bridge.specs import EKU, PODS, SPECS, CertificateSpec
from bridge.words import one_line

#: The role's field for each subject attribute that it can set; all take lists.
_SUBJECT_FIELDS = {
    NameOID.ORGANIZATION_NAME.dotted_string: "organization",
    NameOID.ORGANIZATIONAL_UNIT_NAME.dotted_string: "ou",
    NameOID.COUNTRY_NAME.dotted_string: "country",
    NameOID.LOCALITY_NAME.dotted_string: "locality",
    NameOID.STATE_OR_PROVINCE_NAME.dotted_string: "province",
    NameOID.STREET_ADDRESS.dotted_string: "street_address",
    NameOID.POSTAL_CODE.dotted_string: "postal_code",
}
_HOSTNAME = re.compile(r"([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]*[a-z0-9])?", re.IGNORECASE | re.ASCII)

#: Fields of all roles, since the defaults allow too much.
_COMMON: Mapping[str, object] = {
    "key_type": "any",
    "key_usage": ["DigitalSignature", "KeyEncipherment"],
    "ext_key_usage": [],
    "basic_constraints_valid_for_non_ca": True,
    "allow_any_name": False,
    "allow_bare_domains": True,
    "allow_subdomains": False,
    "allow_glob_domains": False,
    "allow_localhost": False,  # where it is wanted, it is in allowed_domains
    # The default also takes `anyone@NAME` for each NAME in allowed_domains.
    "cn_validations": ["hostname"],
    "use_csr_common_name": True,
    "require_cn": True,
    "generate_lease": False,
    "no_store": False,
    "not_after_bound": "forbid",
    "not_before_bound": "forbid",
}


def setup(wanted: SetupRequest) -> list[SetupFile]:
    """Write a script for the authority's engine, with the mount, roles and mode of the settings."""
    engine = VaultSettings(**{"url": "", **wanted.settings})  # the server's URL may still be missing
    if problems := list(Selector(engine.role or DEFAULT_ROLE, engine.roles).problems("role", "roles")):
        raise SettingsError(problems)
    if wanted.patterns:
        script = _text_beside(engine, wanted)
        return [SetupFile(name=f"{wanted.authority.name}.sh", text=script, executable=True)]
    script = text(engine, wanted.certificates, wanted.validity, _policy_name(wanted), wanted.node)
    return [SetupFile(name=f"{wanted.authority.name}.sh", text=script, executable=True, by_node=True)]


def _policy_name(wanted: SetupRequest) -> str:
    """
    The policy's name, which is the node's own, so that another node's script does not replace it. Node names have no
    underscore, so `eu-cp-1` of prod differs from `cp-1` of prod-eu, and ca of `cp-etcd` from etcd-ca of `cp`.
    """
    cluster = f"{wanted.cluster}_" if wanted.cluster != DEFAULT_CLUSTER else ""
    return f"ca-bridge-{cluster}{wanted.node}_{wanted.authority.name}"


def text(
    engine: VaultSettings, items: Mapping[str, x509.Certificate], validity: timedelta, policy_name: str, node: str = ""
) -> str:
    """The script for one engine: the policy, and the roles, which mode `sign-verbatim` does not use."""
    select = role_selector(engine.role, engine.roles, node)
    payloads = roles(items, validity, select) if engine.mode == "sign" else {}
    allowed = policy(engine.mount, payloads, issuer=engine.issuer, mode=engine.mode)
    return commands(engine, payloads, policy_name=policy_name, policy_text=allowed)


def _text_beside(engine: VaultSettings, wanted: SetupRequest) -> str:
    """The script for certificates whose names travel beside the CSR, as parameters (only mode `sign`)."""
    select = role_selector(engine.role, engine.roles, "")
    payloads: dict[str, dict[str, object]] = {}
    for pattern in wanted.patterns:
        role, payload = select(pattern.spec), role_beside(pattern)
        if payloads.setdefault(role, payload) != payload:
            message = f"{pattern.spec.name}: wanted a role of its own, found {role} shared"
            raise NoRoleError(message, hint="give the certificates different roles in the backend's table `roles`")
    parameters = [key for key, texts in (("uri_sans", "uris"), ("alt_names", "dns"), ("common_name", "common_names"))
                  if any(getattr(patterns, texts) for patterns in wanted.patterns)]  # fmt: skip
    allowed = policy(engine.mount, payloads, issuer=engine.issuer, beside=parameters)
    cluster = f"-{wanted.cluster}" if wanted.cluster != DEFAULT_CLUSTER else ""
    name = f"ca-bridge{cluster}-{wanted.authority.name}"
    return commands(engine, payloads, policy_name=name, policy_text=allowed)


def role_beside(patterns: NamePatterns) -> dict[str, object]:
    """
    A role for an empty CSR. Its patterns are no guard (`*` also matches `/`, and a role can't demand names):
    the gateway's policy decides about names, and the gateway compares each answer with it.
    """
    return {
        **_COMMON,
        "key_usage": ["DigitalSignature"],
        "server_flag": EKU.SERVER_AUTH in patterns.spec.ekus,
        "client_flag": EKU.CLIENT_AUTH in patterns.spec.ekus,
        "use_csr_common_name": False,
        "use_csr_sans": False,
        "require_cn": False,
        "enforce_hostnames": False,
        "cn_validations": ["disabled"],
        "allow_bare_domains": True,
        "allow_glob_domains": True,
        "allowed_domains": [*patterns.dns, *patterns.common_names],
        "allowed_uri_sans": list(patterns.uris),
        "allow_ip_sans": False,
        "organization": [],
        "no_store": True,
        "max_ttl": _duration(patterns.longest),
    }


class NoRoleError(BridgeError):
    """A role can't give a certificate like this one."""

    hint = 'the certificate can only be renewed with `mode = "sign-verbatim"`, or by another CA'


def roles(
    items: Mapping[str, x509.Certificate],
    validity: timedelta,
    select: RoleOf = Selector(DEFAULT_ROLE),  # noqa: B008
) -> dict[str, dict[str, object]]:
    """One role for each live certificate, which allows only its like: payloads by role name (NoRoleError: none can)."""
    roles_by_name: dict[str, dict[str, object]] = {}
    for name, certificate in items.items():
        role, payload = select(SPECS[name]), _role(SPECS[name], certificate, validity)
        if roles_by_name.setdefault(role, payload) != payload:
            message = f"{name}: wanted a role of its own, found role {role} shared with a certificate that differs"
            raise NoRoleError(message, hint="give the certificates different roles in the backend's table `roles`")
    return roles_by_name


def _role(spec: CertificateSpec, certificate: x509.Certificate, validity: timedelta) -> dict[str, object]:
    common_names, subject = _subject(spec, certificate)
    sans = certificates.san_entries(certificate)
    if other := sorted(kind for kind, _ in sans if kind not in {"DNS", "IP", "URI"}):
        raise NoRoleError(f"{spec.name}: wanted SANs of types DNS, IP and URI, found {', '.join(other)}")
    domains = list(dict.fromkeys([*common_names, *sorted(value for kind, value in sans if kind == "DNS")]))
    addresses = sorted(value for kind, value in sans if kind == "IP")
    lifetime = _duration(validity)
    role = {
        **_COMMON,
        "server_flag": EKU.SERVER_AUTH in spec.ekus,
        "client_flag": EKU.CLIENT_AUTH in spec.ekus,
        "allowed_domains": domains,
        # Names such as system:kube-scheduler are not host names, but are still in allowed_domains.
        "enforce_hostnames": all(_HOSTNAME.fullmatch(domain.removeprefix("*.")) for domain in domains),
        "allow_wildcard_certificates": any(domain.startswith("*.") for domain in domains),
        # If the live certificate has no SANs, the new one gets none.
        "use_csr_sans": bool(sans),
        "allow_ip_sans": bool(addresses),
        "allowed_ip_sans_cidr": [f"{address}/{128 if ':' in address else 32}" for address in addresses],
        "allowed_uri_sans": sorted(value for kind, value in sans if kind == "URI"),
        "ttl": lifetime,
        "max_ttl": lifetime,
    }
    return role | {"organization": []} | subject


def _subject(spec: CertificateSpec, certificate: x509.Certificate) -> tuple[list[str], dict[str, list[str]]]:
    """CNs, and the other attributes' values by the role's field."""
    common_names: list[str] = []
    others: dict[str, list[str]] = {}
    for oid, value in certificates.attributes(certificate.subject):
        if oid == NameOID.COMMON_NAME.dotted_string:
            common_names.append(value)
        elif oid in _SUBJECT_FIELDS:
            others.setdefault(_SUBJECT_FIELDS[oid], []).append(value)
        else:
            wanted = "a subject of CN, O, OU, C, L, ST, street or postalCode"
            raise NoRoleError(f"{spec.name}: wanted {wanted}, found {certificates.oid_label(oid)}")
    if len(common_names) != 1:
        raise NoRoleError(f"{spec.name}: wanted one CN in the subject, found {len(common_names)}")
    return common_names, others


def policy(
    mount: str,
    role_names: Iterable[str],
    *,
    issuer: str | None = None,
    mode: Literal["sign", "sign-verbatim"] = "sign",
    read_roles: bool = True,
    beside: Sequence[str] = (),
) -> str:
    """
    The minimal policy of the node's token, as HCL; `read_roles` is for `ca-bridge doctor`, `beside` has parameters for
    names that the CSR does not have.
    """
    mount = mount.strip("/")
    prefix = f"{mount}/issuer/{issuer}" if issuer else mount
    names = list(dict.fromkeys(role_names))
    if mode == "sign-verbatim":
        stanzas = [_stanza(f"{prefix}/sign-verbatim", "update", _ABOUT_VERBATIM)]
    else:
        more = "".join(f' "{key}" = []' for key in beside)
        stanzas = [_SIGN.format(path=f"{prefix}/sign/{name}", more=more) for name in names]
        stanzas += [_stanza(f"{mount}/roles/{name}", "read") for name in names if read_roles]
    stanzas += [
        _stanza("auth/token/revoke-self", "update", _ABOUT_SELF),
        _stanza("sys/capabilities-self", "update"),
        _stanza(f"{mount}/certs/revoked", "list", _ABOUT_REVOKED),
        _stanza(f"{mount}/certs", "list", _ABOUT_RECALL, off=True),
        _stanza(f"{mount}/revoke", "update", _ABOUT_REVOKE, off=True),
    ]
    return "\n".join(stanzas)


_SIGN = """\
path "{path}" {{
  capabilities        = ["update"]
  allowed_parameters  = {{ "csr" = [] "ttl" = [] "exclude_cn_from_sans" = [true]{more} }}
  required_parameters = ["csr", "exclude_cn_from_sans"]
}}
"""


def _stanza(path: str, right: str, about: str = "", *, off: bool = False) -> str:
    """A stanza of a policy below the lines `about` it; `off`: as a comment, which an administrator may uncomment."""
    lines = [f'path "{path}" {{', f'  capabilities = ["{right}"]', "}"]
    return "".join([about, *(f"# {line}\n" if off else f"{line}\n" for line in lines)])


_ABOUT_SELF = "# The node may revoke its own token, and ask what the token may do.\n"
_ABOUT_REVOKED = """\
# A desk or a door lists all revoked certificates at once. The CRL is public and contains the same.
"""
_ABOUT_RECALL = """\
# Only for a desk or a door: after a crash it finds the certificates already signed for it, and requests none twice.
"""
_ABOUT_REVOKE = """\
# Only for `[renewal] revoke = "superseded"`. Can't be limited: the node may then revoke any certificate of the mount.
"""
_ABOUT_VERBATIM = """\
# This right allows ANY certificate from this CA, system:masters included: no required or forbidden parameter can limit
# the CSR. Roles (mode "sign") do limit it.
"""


def commands(
    engine: VaultSettings, role_payloads: Mapping[str, Mapping[str, object]], *, policy_name: str, policy_text: str
) -> str:
    """A repeatable script for the server's administrator: roles and policies, but no engine, CA or auth method."""
    mount, space = engine.mount.strip("/"), shlex.quote(engine.namespace or "")
    head = _HEAD + (_NAMESPACE.format(space=space) if engine.namespace else "")
    writes = [
        _WRITE.format(path=shlex.quote(f"{mount}/roles/{name}"), json=_json(payload))
        for name, payload in role_payloads.items()
    ]
    ending = _POLICY.format(name=shlex.quote(policy_name), text=policy_text.strip(), mount=shlex.quote(mount))
    return "\n".join([head, *writes, ending])


_HEAD = """\
#!/bin/sh
# Writes roles and a policy for ca-bridge, made from the certificates in use. Needs an administrator's token (BAO_ADDR and
# BAO_TOKEN, or VAULT_ADDR and VAULT_TOKEN). Vault warns that it does not know allowed_ip_sans_cidr, not_after_bound
# and not_before_bound; with Vault, a role allows any IP address.
set -eu
cli=$(command -v bao || command -v vault) || { echo "error: neither bao nor vault is in PATH" >&2; exit 1; }
# Write everything, even if the reader of the output stops early (`| head`).
trap '' PIPE
say() { echo "$*" 2>/dev/null || :; }
"""
_NAMESPACE = """\
BAO_NAMESPACE={space} VAULT_NAMESPACE={space}
export BAO_NAMESPACE VAULT_NAMESPACE
"""
_WRITE = """\
"$cli" write {path} - >/dev/null <<'JSON'
{json}
JSON
written=$((${{written:-0}} + 1)); say role {path}
"""
_POLICY = """\
"$cli" policy write {name} - >/dev/null <<'HCL'
{text}
HCL
written=$((${{written:-0}} + 1)); say policy {name}, for the mount {mount}
say "$written written"
"""


def _json(payload: Mapping[str, object]) -> str:
    """JSON with one field a line, in ASCII, so that no terminal or locale can spoil it."""
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in payload.items()) + "\n}"


def _duration(value: timedelta) -> str:
    """A duration as the server writes it, in whole hours if possible."""
    seconds = int(value.total_seconds())
    return f"{seconds}s" if seconds % 3600 else f"{seconds // 3600}h"


# --- would a role that is there sign this certificate? ----------------------------------------------------------------

_KEY_TYPES = {"rsa": "rsa", "ecdsa": "ec"}
#: `key_bits` by our names; a role without bits takes the smallest of these.
_BITS = {"rsa-2048": 2048, "rsa-3072": 3072, "rsa-4096": 4096, "ecdsa-p256": 256, "ecdsa-p384": 384}


def unlike(role: Mapping[str, object], wanted: PlannedCertificate) -> Iterator[Violation]:
    """Compare a server's role with what a renewal would ask for (usages: `role_violations`); a missing key is fine."""
    yield from _lifetime(role, wanted)
    yield from _key(role, wanted)
    yield from _subject_unlike(role, wanted)
    yield from _names(role, wanted)


def _lifetime(role: Mapping[str, object], wanted: PlannedCertificate) -> Iterator[Violation]:
    """The role's maximum limits every request; 0 means the mount's maximum, which we can't see."""
    seconds = role.get("max_ttl")
    if isinstance(seconds, int) and 0 < seconds < wanted.at_least.total_seconds():
        want = f"at least {_round(wanted.at_least)}, or its answer is refused"
        yield Violation(subject="max_ttl", want=want, got=_round(timedelta(seconds=seconds)))


def _round(value: timedelta) -> str:
    return f"{value.days}d" if value >= timedelta(days=2) else f"{value.total_seconds() / 3600:.0f}h"


def _key(role: Mapping[str, object], wanted: PlannedCertificate) -> Iterator[Violation]:
    kind, bits = role.get("key_type"), role.get("key_bits")
    key_type = _KEY_TYPES[wanted.key.partition("-")[0]]
    if kind in ("any", None):
        return
    if kind != key_type:
        yield Violation(subject="key_type", want=f"{key_type} (for {wanted.key}) or any", got=one_line(kind))
    elif isinstance(bits, int) and bits > _BITS[wanted.key]:
        yield Violation(subject="key_bits", want=f"at most {_BITS[wanted.key]}", got=str(bits))


def _subject_unlike(role: Mapping[str, object], wanted: PlannedCertificate) -> Iterator[Violation]:
    """The role's values silently replace the CSR's."""
    subject = certificates.attributes(wanted.certificate.subject)
    for oid, key in _SUBJECT_FIELDS.items():
        has = {value for kind, value in subject if kind == oid}
        gives = set(texts(role.get(key)))
        excepted = {value for name, value in wanted.extra_subject if name == oid}
        if (has ^ gives) - excepted:
            yield Violation(subject=key, want=listed(has), got=listed(gives))


# --- names -----------------------------------------------------------------------------------------------------------


def _names(role: Mapping[str, object], wanted: PlannedCertificate) -> Iterator[Violation]:
    """CN and SANs that the role would refuse or leave out."""
    for name in certificates.common_names(wanted.certificate.subject):
        if not _allows_cn(role, name):
            yield _lacking(role, "allowed_domains", [name])
    try:
        san = wanted.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return
    if role.get("use_csr_sans") is False and wanted.spec.authority != PODS:  # whose names come beside the CSR
        yield Violation(subject="use_csr_sans", want="true", got="false")
        return
    refused = [name for name in san.get_values_for_type(x509.DNSName) if not _allows(role, name)]
    if refused:
        yield _lacking(role, "allowed_domains", refused)
    yield from _addresses(role, list(map(str, san.get_values_for_type(x509.IPAddress))))
    uris = [uri for uri in san.get_values_for_type(x509.UniformResourceIdentifier)
            if not any(fnmatchcase(uri, pattern) for pattern in texts(role.get("allowed_uri_sans")))]  # fmt: skip
    if uris:
        yield _lacking(role, "allowed_uri_sans", uris)


def _lacking(role: Mapping[str, object], key: str, wanted: Iterable[str]) -> Violation:
    return Violation(subject=key, want=listed(wanted), got=listed(texts(role.get(key))))


def _addresses(role: Mapping[str, object], addresses: Sequence[str]) -> Iterator[Violation]:
    if addresses and role.get("allow_ip_sans") is False:
        yield Violation(subject="allow_ip_sans", want="true", got="false")
        return
    networks = texts(role.get("allowed_ip_sans_cidr"))  # OpenBao's; Vault lets any address pass
    refused = [address for address in addresses if not any(_is_in(address, network) for network in networks)]
    if networks and refused:
        yield _lacking(role, "allowed_ip_sans_cidr", refused)


def _is_in(address: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(address) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return True  # not for us to judge


def _allows_cn(role: Mapping[str, object], name: str) -> bool:
    if texts(role.get("cn_validations")) == ["disabled"]:
        return True
    if role.get("enforce_hostnames") is True and not _HOSTNAME.fullmatch(name.removeprefix("*.")):
        return False
    return _allows(role, name)


def _allows(role: Mapping[str, object], name: str) -> bool:
    """Whether the role allows a name in one of its ways; True if in doubt."""
    lenient = ("allow_any_name", "allowed_domains_template", "allow_token_displayname")
    if any(role.get(key) is True for key in lenient) or "allowed_domains" not in role:
        return True
    lower = name.lower()
    if lower == "localhost" and role.get("allow_localhost") is True:
        return True
    bare = [lower, lower.removeprefix("*.")] if role.get("allow_wildcard_certificates") is not False else [lower]
    return any(_fits(role, name, domain.lower()) for name in bare for domain in texts(role.get("allowed_domains")))


def _fits(role: Mapping[str, object], name: str, domain: str) -> bool:
    return (
        (name == domain and role.get("allow_bare_domains") is True)
        or (name.endswith(f".{domain}") and role.get("allow_subdomains") is True)
        or ("*" in domain and role.get("allow_glob_domains") is True and fnmatchcase(name, domain))
    )
