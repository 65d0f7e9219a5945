"""
What the administrator of a cfssl server needs: a signing configuration for exactly one node's certificates.

Each usage class has a profile with its own HMAC key, and the default profile gives nothing. cfssl can't limit O or, in
a profile with SANs, IP addresses: with the `client` key of the cluster's CA anyone can become `system:masters`, so that
key needs the protection of a CA key.
"""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import PurePath

from cryptography import x509
from cryptography.x509.oid import NameOID

from bridge.contract import SetupFile, SetupRequest
from bridge.specs import AUTHORITIES, EKU, SPECS, Authority, CertificateSpec
from bridge.words import escaped

DIRECTORY = PurePath("/etc/cfssl")
#: For `cfssl serve -disable`: all but authsign, info and health. Neither newcert (makes a key and certificate for
#: anybody) nor revoke asks for a key; a name that cfssl does not know disables nothing, and cfssl does not say so.
DISABLED = "sign,newcert,newkey,init_ca,scan,scaninfo,bundle,certinfo,certadd,gencrl,crl,revoke,ocspsign,/"
#: One server an authority, on these ports.
PORTS = {name: port for port, name in enumerate(AUTHORITIES, start=8881)}

_EKUS = {EKU.SERVER_AUTH: "server auth", EKU.CLIENT_AUTH: "client auth"}
_SPECIAL = re.compile(r"([\\.+*?()|\[\]{}^$])")  # what Go's regexp.QuoteMeta quotes


def signing_config(
    authority: Authority,
    certificates: Mapping[str, x509.Certificate],
    validity: timedelta,
    directory: PurePath = DIRECTORY,
) -> dict[str, object]:
    """
    cfssl's `-config` file for those of the live certificates that are this authority's.

    Validity is in whole minutes; the HMAC keys are in `keys` below the directory. ValueError: no certificate is this
    authority's.
    """
    ours = _ours(authority, certificates)
    usages = sorted({spec.usage for spec in ours})
    keys: dict[str, str] = {"deny": "deny", **{usage: f"{authority.name}-{usage}" for usage in usages}}
    return {
        "auth_keys": {
            name: {"type": "standard", "key": f"file:{directory}/keys/{file}.hex"} for name, file in keys.items()
        },
        "signing": {
            # cfssl takes it for every profile name that it does not know. Without usages it gives no certificate,
            # and with a key of its own /sign is switched off.
            "default": {"expiry": "1m", "auth_key": "deny"},
            "profiles": {
                usage: _profile({spec: cert for spec, cert in ours.items() if spec.usage == usage}, validity)
                for usage in usages
            },
        },
    }


def setup(wanted: SetupRequest) -> list[SetupFile]:
    """A script for the authority's server; what the server is called is for its administrator to say."""
    script = text(wanted.authority, wanted.certificates, wanted.validity)
    return [SetupFile(name=f"{wanted.authority.name}.sh", text=script, executable=True, alone=True)]


def text(
    authority: Authority,
    certificates: Mapping[str, x509.Certificate],
    validity: timedelta,
    directory: PurePath = DIRECTORY,
) -> str:
    """A shell script for the server: signing configuration, HMAC keys and command line, then the node's settings."""
    ours = _ours(authority, certificates)
    usages = sorted({spec.usage for spec in ours})
    config = escaped(
        json.dumps(signing_config(authority, certificates, validity, directory), indent=2, ensure_ascii=False)
    )
    return _SCRIPT.format(
        authority=authority.name,
        names=textwrap.fill(
            f"cfssl as {authority.name}, for: {', '.join(spec.name for spec in ours)}",
            width=100,
            initial_indent="# ",
            subsequent_indent="#   ",
        ),
        directory=directory,
        quoted=shlex.quote(str(directory)),
        config=config,
        keys=" ".join(["deny", *(f"{authority.name}-{usage}" for usage in usages)]),
        node_keys=" ".join(f"{authority.name}-{usage}.hex" for usage in usages),
        port=PORTS[authority.name],
        disabled=DISABLED,
    )


_SCRIPT = """\
{names}
# A script for one CA's host, which ends as its server. Beforehand {directory} holds
#   {authority}.crt, {authority}.key   the CA
#   server.crt, server.key   for TLS; its SANs hold the name or address that the nodes call
#   bridge-clients-ca.crt    the CA of the nodes' client certificates (which need clientAuth)
set -eu

# Names are those of one node: for another one, or for all, widen the name_whitelist.
cat > {quoted}/{authority}.json <<'END'
{config}
END

# One HMAC key a profile; guard them like the CA's own key, since no setting limits O (who may be system:masters).
# deny.hex stays here, it keeps the default profile shut; the node gets {node_keys}, in /etc/ca-bridge, mode 0600.
mkdir -p -m 0700 {quoted}/keys
for key in {keys}; do
  test -s {quoted}/keys/$key.hex || (umask 077; openssl rand -hex 32 > {quoted}/keys/$key.hex)
done

# In the node's settings:
#   [authority.{authority}]
#   backend = "cfssl"
#   url = "https://THIS-HOST:{port}"
#   auth_key_file = "/etc/ca-bridge/{authority}-{{usage}}.hex"
#   [backend.cfssl]
#   type = "cfssl"
#   ca_file = "/etc/ca-bridge/cfssl-tls-ca.crt"
#   client_cert = "/etc/ca-bridge/client.crt"
#   client_key = "/etc/ca-bridge/client.key"

# `info` stays open: nothing is signed before it has told the CA and the usages, and it needs no key.
# A change of the configuration needs a restart; "endpoint 'sign' is disabled" in the log is meant so.
exec cfssl serve -address 127.0.0.1 -port {port} \\
  -ca {quoted}/{authority}.crt -ca-key {quoted}/{authority}.key -config {quoted}/{authority}.json \\
  -tls-cert {quoted}/server.crt -tls-key {quoted}/server.key -min-tls-version 1.2 \\
  -mutual-tls-ca {quoted}/bridge-clients-ca.crt -mutual-tls-cn '^ca-bridge$' \\
  -disable {disabled}
"""


def _ours(
    authority: Authority, certificates: Mapping[str, x509.Certificate]
) -> dict[CertificateSpec, x509.Certificate]:
    ours = {
        SPECS[name]: certificate for name, certificate in certificates.items() if SPECS[name].authority == authority
    }
    if not ours:
        raise ValueError(f"no certificate of {authority.name} to sign again")
    return ours


def _profile(certificates: Mapping[CertificateSpec, x509.Certificate], validity: timedelta) -> dict[str, object]:
    spec = next(iter(certificates))
    sans = [_sans(certificate) for certificate in certificates.values()]
    names = {name for certificate in certificates.values() for name in _checked_names(certificate)}
    profile: dict[str, object] = {
        "usages": ["digital signature", "key encipherment", *(_EKUS[eku] for eku in EKU if eku in spec.ekus)],
        "expiry": _duration(validity),
        "backdate": "5m",
        "auth_key": spec.usage,
        "name_whitelist": f"^({'|'.join(_quoted(name) for name in sorted(names))})$",
    }
    if not any(sans):
        # Nothing else is copied from the CSR, and so no IP address, which the whitelist does not look at.
        fields = ("Subject", "PublicKeyAlgorithm", "PublicKey", "SignatureAlgorithm")
        profile["CSRWhitelist"] = dict.fromkeys(fields, True)
    return profile


def _sans(certificate: x509.Certificate) -> Sequence[x509.GeneralName]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _checked_names(certificate: x509.Certificate) -> Iterator[str]:
    """The names that cfssl compares with `name_whitelist`: the CN and all SANs that are text."""
    for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME):
        yield str(attribute.value)
    for name in _sans(certificate):
        if isinstance(name, x509.DNSName | x509.RFC822Name | x509.UniformResourceIdentifier):
            yield name.value


def _quoted(name: str) -> str:
    return _SPECIAL.sub(r"\\\1", name)


def _duration(value: timedelta) -> str:
    """A duration in Go's spelling; hours are its largest unit."""
    minutes = value // timedelta(minutes=1)
    return f"{minutes // 60}h{minutes % 60}m" if minutes % 60 else f"{minutes // 60}h"
