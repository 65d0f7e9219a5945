"""What a program of the operator finds in its environment."""

from __future__ import annotations

from collections.abc import Mapping

from bridge.specs import CertificateSpec

#: What a program finds around it, beside HOME and what the settings name; nothing of our own environment.
ENVIRONMENT: Mapping[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "SHELL": "/bin/sh",
    "TERM": "dumb",
    "LC_ALL": "C.UTF-8",
}


def ekus_text(spec: CertificateSpec) -> str:
    """RFC 5280's names with commas, as openssl takes them: `serverAuth,clientAuth`."""
    return ",".join(sorted((eku.label for eku in spec.ekus), reverse=True))
