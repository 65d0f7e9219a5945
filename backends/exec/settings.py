"""The settings of the backend `exec`, and the environment that its program gets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bridge.contract import BackendSettings, Selector
from bridge.errors import SettingsProblem
from bridge.specs import CertificateSpec

#: Variables that describe the request.
_OURS = re.compile(
    r"CA_BRIDGE_\w+|CERTMONGER_(?:OPERATION|CSR|CA_PROFILE|CA_NICKNAME|CA_COOKIE|SPKI|KEY_TYPE|REQ_(?:SUBJECT|HOSTNAME|IP_ADDRESS|EMAIL))"
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Names of variables that hold a secret, not the place of a secret.
_SECRET = re.compile(r"(?:PASSW|PASSPHRASE|SECRET|TOKEN)(?!\w*_(?:FILE|PATH|DIR|URL|URI|ARN)$)", re.IGNORECASE)
#: Bytes of a variable, its name and `=` included (Linux: 32 pages and no more, MAX_ARG_STRLEN, one for the NUL).
LONGEST_VARIABLE = (32 << 12) - 1


@dataclass(frozen=True, kw_only=True)
class ExecSettings(BackendSettings):
    """Keys of a backend of type `exec`."""

    command: tuple[str, ...]  #: The program's path and its arguments; no shell reads them.
    #: A pattern: `{name}` is the certificate, `{usage}` its usage class (server, client, peer), `{node}` the node.
    #: The program gets it as CERTMONGER_CA_PROFILE.
    profile: str = "{usage}"
    profiles: dict[str, str] = field(default_factory=dict)  #: Other profiles, by certificate or usage class.
    #: Further variables for the program; they may say where a secret is, but hold none.
    environment: dict[str, str] = field(default_factory=dict)
    #: Whether the program takes names from CA_BRIDGE_URIS, CA_BRIDGE_DNS and CA_BRIDGE_COMMON_NAME, and none from the
    #: CSR, as pods need it; certmonger's own helpers don't.
    names_beside_csr: bool = False
    user: str = ""  #: The user (with its groups) that runs the program; if empty, the user of ca-bridge.

    def programs(self) -> Sequence[str]:
        """The command's program."""
        return self.command[:1]

    def problems(self) -> Iterator[SettingsProblem]:
        """Find a command without a program, and variables that are ours or would hold a secret."""
        if not self.command or not self.command[0].startswith("/"):
            found = repr(self.command[0]) if self.command else "an empty list"
            yield SettingsProblem("command", "a program's absolute path, then its arguments", found)
        if any("\0" in word for word in self.command):
            yield SettingsProblem("command", "texts without NUL characters", "one")
        yield from Selector(self.profile, self.profiles, self.node).problems("profile", "profiles", self.pairs)
        for name, value in self.environment.items():
            yield from _variable_problems(name, value)


def _variable_problems(name: str, value: str) -> Iterator[SettingsProblem]:
    key = f"environment.{name}"
    if not _VARIABLE.fullmatch(name):
        yield SettingsProblem(key, "letters, digits and underscores", repr(name))
    elif _OURS.fullmatch(name):
        yield SettingsProblem(key, "a variable that ca-bridge does not set itself", name)
    elif _SECRET.search(name):
        wanted = f"no secret in the settings or in an environment: {name}_FILE, say, with the path of a file"
        yield SettingsProblem(key, wanted, "a value")
    if "\0" in value or len(f"{name}={value}".encode()) > LONGEST_VARIABLE:
        yield SettingsProblem(key, f"at most {LONGEST_VARIABLE} bytes, without NUL characters", "something else")


#: A program's environment, beside HOME and the settings' variables; nothing comes from our own environment.
ENVIRONMENT: Mapping[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "SHELL": "/bin/sh",
    "TERM": "dumb",
    "LC_ALL": "C.UTF-8",
}


def ekus_text(spec: CertificateSpec) -> str:
    """RFC 5280's names with commas, as openssl takes them: `serverAuth,clientAuth`."""
    return ",".join(sorted((eku.label for eku in spec.ekus), reverse=True))
