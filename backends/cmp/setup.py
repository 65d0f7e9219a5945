"""A page for the administrator of a CMP server: profiles, names and a client for one node's certificates."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping

from cryptography import x509

from backends.cmp import CmpSettings, Mode
from bridge.contract import NamePatterns, Selector, SetupFile, SetupRequest
from bridge.errors import SettingsError, SettingsProblem
from bridge.pki.certificates import name_text, san_entries
from bridge.specs import EKU, SPECS, CertificateSpec


def setup(wanted: SetupRequest) -> list[SetupFile]:
    """A text for the administrator, with the paths, profiles and mode that the settings name."""
    server = CmpSettings(**{"url": "http://RA-HOST:8080", **wanted.settings})
    path = Selector(server.path_pattern, server.paths, wanted.node)
    profile = Selector(server.profile, server.profiles, wanted.node)
    problems = [*path.problems("path", "paths"), *profile.problems("profile", "profiles")]
    if wanted.patterns and server.mode != "cr":
        problems.append(SettingsProblem("mode", '"cr", whose template takes names beside the CSR', repr(server.mode)))
    if problems:
        raise SettingsError(problems)
    places: dict[str, list[CertificateSpec]] = {}
    patterns = {one.spec.name: one for one in wanted.patterns}
    for spec in [*(SPECS[name] for name in wanted.certificates), *(one.spec for one in wanted.patterns)]:
        header = f", with profile {profile(spec)} in the message's header" if server.profile else ""
        places.setdefault(f"{server.url.rstrip('/')}/{path(spec).lstrip('/')}{header}", []).append(spec)
    text = _TEXT.format(
        authority=wanted.authority.name,
        node=wanted.node,
        cluster=wanted.cluster,
        reference=server.reference or wanted.node,
        url=server.url,
        profiles="\n".join(
            line for place, specs in places.items() for line in _profile(place, specs, wanted, patterns)
        ),
        request=_REQUESTS[server.mode],
    )
    return [SetupFile(name=f"{wanted.authority.name}.txt", text=text)]


_TEXT = """\
# What a CMP server (RFC 9810, RFC 9483) needs to sign for {authority} of node {node}, cluster {cluster}.

# 1. Profiles (some products call them aliases) and their names. Each certificate must have exactly the extended key
#    usages of its profile: a certificate without that extension is valid for every purpose.
#    The cluster has three CAs; if one server has all of them, each needs its own paths (`path` in the settings).
{profiles}

# 2. Requests
{request}
#    The node asks for implicit confirmation (RFC 9810 §5.1.1.1); without it, it confirms each certificate.
#    Grant a second request for the same key and names: it comes from a renewal that was interrupted.
#    If an officer has to approve, answer `waiting`; the node asks again with pollReq until there is a decision.
#    Protect errors like other answers; otherwise the node can't show the reason.

# 3. The client: this node, for the names above and no others. Either
#    a) a shared secret with reference {reference} (protect it like a CA's key: its holder can act as the node):
#         (umask 077; openssl rand -hex 32 > cmp.secret)
#       copy it to the node as /etc/ca-bridge/cmp.secret, mode 0600; or
#    b) a client certificate (keyUsage digitalSignature) from a CA that the server trusts only for this:
#         (umask 077; openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \\
#           -keyout agent.key -subj /CN=ca-bridge-{node} -out agent.csr)

# 4. In the node's settings:
#   [authority.{authority}]
#   backend = "corp"
#   [backend.corp]
#   type = "cmp"
#   url = "{url}"
#   reference = "{reference}"                             # a)
#   secret_file = "/etc/ca-bridge/cmp.secret"
#   client_cert = "/etc/ca-bridge/agent.crt"              # b), instead of the two above
#   client_key = "/etc/ca-bridge/agent.key"
#   trusted_file = "/etc/ca-bridge/cmp-ra-ca.crt"         # with b) needed: the CA of what the server signs answers with
"""

_REQUESTS: Mapping[Mode, str] = {
    "p10cr": "#    p10cr: the CSR as it is, with subject and SANs; it asks for no usages, the profile gives them.",
    "cr": "#    cr: subject, SANs, usages and validity in the template. The client has verified the proof of possession\n"
    "#    (raVerified, RFC 4211 §4): the server has to trust it as an RA, for these names and usages alone.",
}


def _profile(
    place: str, specs: list[CertificateSpec], wanted: SetupRequest, patterns: Mapping[str, NamePatterns]
) -> Iterator[str]:
    yield f"#\n#  {place}"
    usages = sorted({", ".join(eku.label for eku in EKU if eku in spec.ekus) for spec in specs})
    yield f"#    extendedKeyUsage: {' or, as the request says, '.join(usages)}"
    yield "#    keyUsage: digitalSignature, keyEncipherment; not a CA; subject and SANs: the request's"
    if not patterns:
        yield f"#    validity: {wanted.validity.days} days"
    for spec in specs:
        yield from _patterns(patterns[spec.name]) if patterns else _names(spec, wanted.certificates[spec.name])


def _patterns(one: NamePatterns) -> Iterator[str]:
    """The names that pods may have; their templates name no shorter validity than a day."""
    yield f"#    validity: the profile's, counted from its backdated beginning at most {int(one.longest.total_seconds())} s"
    yield "#    notBefore: less than 5 minutes ago; SANs critical below an empty subject"
    for what, values in (("URI", one.uris), ("DNS", one.dns), ("CN", one.common_names)):
        if values:
            yield f"#      {one.spec.name}: {what} {', '.join(values)}"


def _names(spec: CertificateSpec, certificate: x509.Certificate) -> Iterator[str]:
    sans = ", ".join(f"{kind}:{value}" for kind, value in sorted(san_entries(certificate)))
    text = f"{spec.name}: {name_text(certificate.subject)}; {f'SANs {sans}' if sans else 'no SANs'}"
    yield from textwrap.wrap(
        text, width=116, initial_indent="#      ", subsequent_indent="#        ", break_long_words=False
    )
