"""
The settings of the backend `cfssl`, and what the administrator of a cfssl server needs: a signing configuration for
exactly one node's certificates.

Each usage class has a profile with its own HMAC key, and the default profile gives nothing. cfssl can't limit O or, in
a profile with SANs, IP addresses: with the `client` key of the cluster's CA anyone can become `system:masters`, so that
key needs the protection of a CA key.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path, PurePath
from typing import Any, Literal
from urllib.parse import urlsplit

from cryptography import x509

from backends.settings import is_https, pair_problems, url_problems
from bridge.contract import BackendSettings, NamePatterns, Secret, Selector, SetupFile, SetupRequest
from bridge.errors import SettingsProblem
from bridge.pki.certificates import common_names, extension
from bridge.specs import AUTHORITIES, EKU, SPECS, Authority, CertificateSpec
from bridge.words import escaped

API = "/api/v1/cfssl"
#: cfssl takes any key, even an empty one; RFC 2104 §3 discourages less than the hash's 32 bytes.
MIN_KEY_BYTES = 16
#: As cfssl spells them.
EKU_NAMES = {EKU.SERVER_AUTH: "server auth", EKU.CLIENT_AUTH: "client auth"}


@dataclass(frozen=True, kw_only=True)
class CfsslSettings(BackendSettings):
    """Keys of a backend of type `cfssl`."""

    url: str  #: The server's URL without `/api/v1/cfssl`; a path of a reverse proxy stays in it.
    label: str = ""  #: The label of the CA in a multirootca; empty for `cfssl serve`.
    ca_file: Path | None = None  #: CA certificates (PEM) for the server's TLS certificate; if not set, the system's.
    client_cert: Path | None = None  #: The client certificate for mutual TLS.
    client_key: Path | None = None  #: The key of `client_cert`.
    #: A pattern: `{name}` is the certificate, `{usage}` its usage class (server, client, peer), `{node}` the node.
    profile: str = "{usage}"
    profiles: dict[str, str] = field(default_factory=dict)  #: Other profiles, by certificate or usage class.
    #: The HMAC key in hexadecimal. Its path or name may be a pattern, if the server has one key for each profile.
    auth_key: Secret | None = None
    endpoint: Literal["authsign", "sign"] = "authsign"  #: `"sign"` is for a server without keys only.
    #: Allow `http://` to another machine: anyone on the network path can read, record and replay every request.
    plain_http: bool = False

    def private_files(self) -> Iterator[Path]:
        """The files with HMAC keys; one for each profile if their path is a pattern."""
        yield from super().private_files()
        if self.auth_key is not None and self.auth_key.kind == "file":
            place = Selector(self.auth_key.where, node=self.node)
            yield from dict.fromkeys(Path(place(spec)) for spec in SPECS.values())

    def problems(self) -> Iterator[SettingsProblem]:
        """Find contradictions, and settings that would send a request with its HMAC in the clear."""
        # The HMAC covers neither time nor nonce, so a recorded body is good until the key changes.
        risk = "over plain HTTP a request can be recorded and sent again, for ever new certificates"
        wanted = f"https://HOST[:PORT], without {API} and what follows it"
        yield from url_problems(self.url, wanted, suffix=API, plain_http=self.plain_http, risk=risk)
        yield from Selector(self.profile, self.profiles, self.node).problems("profile", "profiles", self.pairs)
        for key, profile in {"profile": self.profile, **{f"profiles.{k}": v for k, v in self.profiles.items()}}.items():
            if not profile:  # an empty name means cfssl's default profile
                yield SettingsProblem(key, "a profile's name", "an empty text")
        yield from self._auth_key_problems()
        yield from pair_problems(self.client_cert, self.client_key)
        if not is_https(self.url) and (self.ca_file or self.client_cert or self.client_key):
            yield SettingsProblem("url", "https:// (as ca_file or client_cert is given)", "http://")

    def _auth_key_problems(self) -> Iterator[SettingsProblem]:
        if self.endpoint == "authsign" and self.auth_key is None:
            wanted = 'the file with the HMAC key (or endpoint = "sign", for a server without keys)'
            yield SettingsProblem("auth_key_file", wanted, "nothing")
        if self.endpoint == "sign" and self.auth_key is not None:
            wanted = 'endpoint = "authsign" (with "sign" the HMAC key would not be used)'
            yield SettingsProblem("endpoint", wanted, '"sign" and a key')
        if self.auth_key is not None:
            yield from Selector(self.auth_key.where).problems(f"auth_key_{self.auth_key.kind}", "")


# --- for the CA's administrator ---------------------------------------------------------------------------------------

DIRECTORY = PurePath("/etc/cfssl")
#: For `cfssl serve -disable`: all but authsign, info and health. newcert (a key and certificate for anyone) and revoke
#: need no HMAC key; cfssl silently ignores names that it does not know.
DISABLED = "sign,newcert,newkey,init_ca,scan,scaninfo,bundle,certinfo,certadd,gencrl,crl,revoke,ocspsign,/"
#: One server for each authority, on these ports.
PORTS = {name: port for port, name in enumerate(AUTHORITIES, start=8881)}

_SPECIAL = re.compile(r"([\\.+*?()|\[\]{}^$])")  # what Go's regexp.QuoteMeta quotes


def signing_config(
    authority: Authority,
    certificates: Mapping[str, x509.Certificate],
    validity: timedelta,
    directory: PurePath = DIRECTORY,
) -> dict[str, object]:
    """cfssl's `-config` file for those live certificates that this authority signs (ValueError: there are none)."""
    of_authority = _ours(authority, certificates)
    profiles: dict[str, Mapping[str, object]] = {
        usage: _profile({spec: cert for spec, cert in of_authority.items() if spec.usage == usage}, validity)
        for usage in sorted({spec.usage for spec in of_authority})
    }
    return _config(authority, profiles, directory)


def _config(
    authority: Authority, profiles: Mapping[str, Mapping[str, object]], directory: PurePath
) -> dict[str, object]:
    keys: dict[str, str] = {"deny": "deny", **{usage: f"{authority.name}-{usage}" for usage in profiles}}
    return {
        "auth_keys": {
            name: {"type": "standard", "key": f"file:{directory}/keys/{file}.hex"} for name, file in keys.items()
        },
        # cfssl uses the default for every profile name that it does not know. Without usages it signs nothing, and its
        # own key switches /sign off.
        "signing": {"default": {"expiry": "1m", "auth_key": "deny"}, "profiles": profiles},
    }


def setup_files(wanted: SetupRequest) -> list[SetupFile]:
    """Write a script for the authority's server, with the address and file names of the node's settings."""
    if wanted.patterns:
        config = json.dumps(config_beside(wanted.authority, wanted.patterns), indent=2, ensure_ascii=False)
        return [SetupFile(name=f"{wanted.authority.name}.json", text=f"{escaped(config)}\n", alone=True)]
    return [SetupFile(name=f"{wanted.authority.name}.sh", text=text(wanted), executable=True, alone=True)]


def config_beside(
    authority: Authority, patterns: Sequence[NamePatterns], directory: PurePath = DIRECTORY
) -> dict[str, object]:
    """
    The signing configuration of a server for certificates whose names travel beside the CSR (`hosts`, `subject`).

    `name_whitelist` checks only text, and the API server would refuse a backdate of 5 minutes half of the time.
    """
    return _config(authority, {pattern.spec.usage: profile_beside(pattern) for pattern in patterns}, directory)


def profile_beside(patterns: NamePatterns) -> dict[str, object]:
    """A profile for an empty CSR."""
    names = (*patterns.uris, *patterns.dns, *patterns.common_names)
    expressions = (_quoted(name).replace(r"\*", ".*").replace(r"\?", ".") for name in names)
    return {
        "usages": ["digital signature", *(EKU_NAMES[eku] for eku in EKU if eku in patterns.spec.ekus)],
        "expiry": _duration(patterns.longest),
        "backdate": "1m",
        "auth_key": patterns.spec.usage,
        "name_whitelist": f"^({'|'.join(['', *expressions])})$",
    }


def _server(authority: Authority, settings: Mapping[str, Any]) -> CfsslSettings:
    """The node's settings for the server, completed with those that `ca-bridge settings init cfssl` writes."""
    here, key = Path("/etc/ca-bridge"), settings.get("auth_key")
    usual: dict[str, Any] = {
        "url": f"https://cfssl.corp.example:{PORTS[authority.name]}",
        "ca_file": here / "cfssl-ca.pem",
        "client_cert": here / "client.pem",
        "client_key": here / "client-key.pem",
    }
    if not (isinstance(key, Secret) and key.kind == "file" and "{usage}" in key.where):
        key = Secret("file", f"{here}/{authority.name}-{{usage}}.hex")
    return CfsslSettings(**{**usual, **settings, "auth_key": key})


def _san(host: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(host)}"
    except ValueError:
        return f"DNS:{host}"


def text(wanted: SetupRequest, directory: PurePath = DIRECTORY) -> str:
    """A shell script for the server, whose directory also holds the CA; and the node's files and settings."""
    authority, specs = wanted.authority, _ours(wanted.authority, wanted.certificates)
    usages = sorted({spec.usage for spec in specs})
    config = signing_config(authority, wanted.certificates, wanted.validity, directory)
    node = _server(authority, wanted.settings)
    host, key_files = urlsplit(node.url).hostname or "localhost", str(node.auth_key)
    san, quoted = _san(host), shlex.quote(str(directory))
    names = ", ".join(spec.name for spec in specs)
    return _SCRIPT.format(
        authority=authority.name,
        names=textwrap.fill(
            f"cfssl as {authority.name}, for: {names}", width=100, initial_indent="# ", subsequent_indent="#   "
        ),
        directory=directory,
        quoted=quoted,
        config=escaped(json.dumps(config, indent=2, ensure_ascii=False)),
        keys=" ".join(["deny", *(f"{authority.name}-{usage}" for usage in usages)]),
        node_keys="\n".join(
            f"cp {quoted}/keys/{authority.name}-{usage}.hex "
            f"{quoted}/node/{shlex.quote(PurePath(key_files.replace('{usage}', usage)).name)}"
            for usage in usages
        ),
        node=node,
        host=shlex.quote(host),
        san=shlex.quote(san),
        # on the url's address if it has one, else on all, where TLS admits only its clients
        address=host if san.startswith("IP:") or host == "localhost" else "0.0.0.0",  # noqa: S104
        port=urlsplit(node.url).port or PORTS[authority.name],
        disabled=DISABLED,
        **{key: shlex.quote(getattr(node, key).name) for key in ("ca_file", "client_cert", "client_key")},
    )


_SCRIPT = """\
{names}
# Run this on the CA's host; it ends by starting the server. Before that, {directory} must hold
#   {authority}.crt, {authority}.key   the CA
# and, if you make the TLS certificates yourself (else this script makes them),
#   server.crt, server.key   with SANs for the name or address that the nodes use
#   bridge-clients-ca.crt    the CA of the nodes' client certificates, which need clientAuth and the CN ca-bridge
set -eu
mkdir -p -m 0700 {quoted}/keys {quoted}/node
exec 9> {quoted}/.lock
flock 9 # the scripts of the other CAs have the same directory

# TLS, once for the servers on this host: a CA for it, the server's pair, and the nodes' pair.
if ! test -e {quoted}/server.crt && ! test -e {quoted}/bridge-clients-ca.crt; then
  umask 077
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj '/CN=TLS of cfssl' \
    -keyout {quoted}/bridge-clients-ca.key -out {quoted}/bridge-clients-ca.crt
  pair() {{
    printf 'basicConstraints=critical,CA:FALSE\\nextendedKeyUsage=%s\\nsubjectAltName=%s\\n' "$3" "$4" > {quoted}/$1.ext
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$2" -keyout {quoted}/$1.key |
      openssl x509 -req -days 825 -CA {quoted}/bridge-clients-ca.crt -CAkey {quoted}/bridge-clients-ca.key \
        -set_serial "0x$(openssl rand -hex 16)" -extfile {quoted}/$1.ext -out {quoted}/$1.crt
  }}
  pair server {host} serverAuth {san}
  pair client ca-bridge clientAuth DNS:ca-bridge
  cp {quoted}/bridge-clients-ca.crt {quoted}/node/{ca_file}
  cp {quoted}/client.crt {quoted}/node/{client_cert}
  cp {quoted}/client.key {quoted}/node/{client_key}
fi

# The names are those of one node; for further nodes, extend name_whitelist.
cat > {quoted}/{authority}.json <<'END'
{config}
END

# An HMAC key for each profile; protect them like the CA's key, since no setting limits O (such as system:masters).
# deny.hex stays here and blocks the default profile.
for key in {keys}; do
  test -s {quoted}/keys/$key.hex || (umask 077; openssl rand -hex 32 > {quoted}/keys/$key.hex)
done

# Copy the files in {directory}/node to /etc/ca-bridge on the node, mode 0600.
{node_keys}
exec 9>&-

# In the node's settings:
#   [authority.{authority}]
#   backend = "signer"
#   url = "{node.url}"
#   auth_key_file = "{node.auth_key}"
#   [backend.signer]
#   type = "cfssl"
#   ca_file = "{node.ca_file}"
#   client_cert = "{node.client_cert}"
#   client_key = "{node.client_key}"

# `info` needs no key and stays enabled: ca-bridge asks it for the CA and the usages before a signature.
# Restart the server after a change of the configuration; "endpoint 'sign' is disabled" in the log is as intended.
exec cfssl serve -address {address} -port {port} \
  -ca {quoted}/{authority}.crt -ca-key {quoted}/{authority}.key -config {quoted}/{authority}.json \
  -tls-cert {quoted}/server.crt -tls-key {quoted}/server.key -min-tls-version 1.2 \
  -mutual-tls-ca {quoted}/bridge-clients-ca.crt -mutual-tls-cn '^ca-bridge$' \
  -disable {disabled}
"""


def _ours(
    authority: Authority, certificates: Mapping[str, x509.Certificate]
) -> dict[CertificateSpec, x509.Certificate]:
    of_authority = {
        SPECS[name]: certificate for name, certificate in certificates.items() if SPECS[name].authority == authority
    }
    if not of_authority:
        raise ValueError(f"no certificate of {authority.name} to sign again")
    return of_authority


def _profile(certificates: Mapping[CertificateSpec, x509.Certificate], validity: timedelta) -> dict[str, object]:
    spec = next(iter(certificates))
    sans = [extension(certificate, x509.SubjectAlternativeName) for certificate in certificates.values()]
    names = {name for certificate in certificates.values() for name in _checked_names(certificate)}
    profile: dict[str, object] = {
        "usages": ["digital signature", "key encipherment", *(EKU_NAMES[eku] for eku in EKU if eku in spec.ekus)],
        "expiry": _duration(validity),
        "backdate": "5m",
        "auth_key": spec.usage,
        "name_whitelist": f"^({'|'.join(_quoted(name) for name in sorted(names))})$",
    }
    if not any(sans):
        # Nothing else is copied from the CSR, so no IP address, which the whitelist does not check.
        fields = ("Subject", "PublicKeyAlgorithm", "PublicKey", "SignatureAlgorithm")
        profile["CSRWhitelist"] = dict.fromkeys(fields, True)
    return profile


def _checked_names(certificate: x509.Certificate) -> Iterator[str]:
    """The names that cfssl compares with `name_whitelist`: the CN and all SANs that are text."""
    yield from common_names(certificate.subject)
    for name in extension(certificate, x509.SubjectAlternativeName) or ():
        if isinstance(name, x509.DNSName | x509.RFC822Name | x509.UniformResourceIdentifier):
            yield name.value


def _quoted(name: str) -> str:
    return _SPECIAL.sub(r"\\\1", name)


def _duration(value: timedelta) -> str:
    """A duration in Go's spelling; hours are its largest unit."""
    minutes = value // timedelta(minutes=1)
    return f"{minutes // 60}h{minutes % 60}m" if minutes % 60 else f"{minutes // 60}h"
