"""
The CA's private key for `openssl ca`: a file, or an object in a token (an HSM) that openssl reaches by PKCS#11.

Measured with SoftHSM 2.6, libp11's engine 0.4.12 and pkcs11-provider 1.0. In short: openssl crashes at its end when
the engine could not load a key, with the reason printed before; the provider gives one sentence for every reason; an
empty PIN is a failed login; and both print a PIN that stands in the URI.
"""

from __future__ import annotations

import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from bridge.contract import Secret
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError, SettingsProblem

SCHEME = "pkcs11:"

# RFC 7512 without what means something in an openssl.cnf: `$`, quotes, `#` and backslashes have percent encodings.
_URI = re.compile(r"pkcs11:(?:[A-Za-z0-9._~:@!()*+,&=;?/-]|%[0-9A-Fa-f]{2})+")
# With these openssl would find the token; with others it would take the PIN from where all can see it, or another
# module than the settings name.
_NAMES = {"token", "manufacturer", "serial", "model", "object", "id", "type", "slot-id"}

_WRONG_PASSPHRASE = re.compile(r"wrong password|bad decrypt|empty password|bad password read", re.IGNORECASE)
_NO_KEY = re.compile(r"CA private key|private key from|(?:read|find) key", re.IGNORECASE)

_NO_METHOD = re.compile(r"invalid engine|No store loader found", re.IGNORECASE)
_MODULE_FAILED = re.compile(r"Unable to load module|Module initialization failed|Error \d+ returned by C_Initialize")
_NO_TOKEN = re.compile(r"No matching initialized token|Specified object not found")
_SEVERAL_TOKENS = re.compile(r"Multiple matching (?:slots|tokens)")
_LOGIN = re.compile(r"PIN (?P<text>incorrect|invalid|expired|locked)|Error (?P<code>16[0-4]) returned by C_Login")
_LOGIN_CODES = {"160": "incorrect", "161": "invalid", "162": "of a wrong length", "163": "expired", "164": "locked"}
# What the provider tells about its calls, when it is asked to.
_CALLS = re.compile(r"Calling C_Initialize")
_LOGGED_IN = re.compile(r"Calling C_Login")

# The provider after the default one: SoftHSM calls OpenSSL, which would call the provider, and so on for ever.
# Without the quirk openssl crashes at its end, when everything is recorded.
_PROVIDER_CONFIG = """\
openssl_conf = bridge_init

[bridge_init]
providers = bridge_providers

[bridge_providers]
default = bridge_default
pkcs11 = bridge_pkcs11

[bridge_default]
activate = 1

[bridge_pkcs11]
pkcs11-module-quirks = no-deinit
activate = 1

"""


class PrivateKey(Protocol):
    """A CA's private key, as a run of openssl is told of it."""

    secret_name: ClassVar[str]  #: What opens it, in words.
    #: CSRs in one process; nothing of a run is recorded before its last signature is made.
    batch_size: ClassVar[int]

    @property
    def secret(self) -> Secret | None:
        """The passphrase or PIN that opens it; None: it needs none."""

    @property
    def reference(self) -> str:
        """The key's name in openssl's arguments: a file or a URI."""

    @property
    def config(self) -> str:
        """The lines that come first in the openssl.cnf of a run."""

    def arguments(self, command: str) -> list[str]:
        """Further arguments of an openssl command, for a key of this kind."""

    def environment(self, command: str) -> dict[str, str]:
        """Further variables in the environment of an openssl command."""

    def check(self) -> None:
        """
        Make sure of what can be seen without openssl.

        Raises:
            BackendRefusedError: It is not there.
        """

    def login(self, secret: bytes) -> AbstractContextManager[Callable[[str], None]]:
        """
        Surround one run of openssl; what it yields is to be called with what openssl said.

        Raises:
            BackendRefusedError: The secret is known to be wrong.
        """

    def failure(self, messages: str, told: str) -> BackendError | None:
        """
        Why the key can't be used; None: the key is not the reason.

        Args:
            messages: All that openssl said.
            told: The part of it that may be shown.
        """


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A PEM file, linked as `ca.key` in the folder of a run."""

    secret_name: ClassVar[str] = "passphrase"  # noqa: S105 (what it is called)
    batch_size: ClassVar[int] = 1000

    path: Path
    secret: Secret | None

    reference: ClassVar[str] = "ca.key"
    config: ClassVar[str] = ""

    def __str__(self) -> str:
        return str(self.path)

    def arguments(self, command: str) -> list[str]:
        """As `PrivateKey`."""
        del command
        return []

    def environment(self, command: str) -> dict[str, str]:
        """As `PrivateKey`."""
        del command
        return {}

    def check(self) -> None:
        """As `PrivateKey`: a file that can be opened."""
        try:
            with self.path.open("rb"):
                pass
        except OSError as e:
            raise BackendRefusedError(f"wanted the CA's private key in {self}, found: {e.strerror}") from e

    def login(self, secret: bytes) -> AbstractContextManager[Callable[[str], None]]:
        """As `PrivateKey`: a file may be tried as often as one likes."""
        del secret
        return nullcontext(lambda _: None)

    def failure(self, messages: str, told: str) -> BackendRefusedError | None:
        """As `PrivateKey`."""
        if _WRONG_PASSPHRASE.search(messages):
            return self._wrong_passphrase()
        if _NO_KEY.search(messages):
            return BackendRefusedError(f"wanted a PEM private key in {self}, openssl found: {told}")
        return None

    def _wrong_passphrase(self) -> BackendRefusedError:
        if self.secret:
            return BackendRefusedError(
                f"wanted the passphrase of {self} in {self.secret}, found one that does not open it"
            )
        return BackendRefusedError(
            f"wanted a passphrase for {self}, which is encrypted, found none in the settings",
            hint="set passphrase_file, passphrase_env or passphrase_credential",
        )


@dataclass(frozen=True, kw_only=True)
class Pkcs11Settings:
    """How openssl reaches the token; the key's URI is the backend's `private_key`."""

    #: What openssl reaches the token by: its engine `pkcs11`, or a provider (OpenSSL 3).
    method: Literal["engine", "provider"]
    module: Path  #: The token's PKCS#11 library, as its vendor names it.
    pin: Secret  #: Of the token's user; a token locks itself after a few wrong ones.
    #: What the library wants, such as SOFTHSM2_CONF; it gets nothing else.
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Logins:
    """The logins to one token by this process: one at a time, and the PINs that were refused."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    refused: dict[bytes, str] = field(default_factory=dict)  #: Why, by the PIN's digest.


# Three CAs may have their keys in one token, and a token may lock itself after three failed logins.
_LOGINS: defaultdict[tuple[str, ...], _Logins] = defaultdict(_Logins)


@dataclass(frozen=True, slots=True)
class TokenKey:
    """A private key that never leaves its token."""

    secret_name: ClassVar[str] = "PIN"  # noqa: S105 (what it is called)
    # As slow as 20 signatures a second, an HSM must be through before the time limit.
    batch_size: ClassVar[int] = 100

    uri: str
    settings: Pkcs11Settings

    def __str__(self) -> str:
        return self.uri  # it has no PIN, see `uri_problem`

    @property
    def secret(self) -> Secret:
        """As `PrivateKey`."""
        return self.settings.pin

    @property
    def reference(self) -> str:
        """As `PrivateKey`."""
        return self.uri

    @property
    def config(self) -> str:
        """As `PrivateKey`."""
        return _PROVIDER_CONFIG if self.settings.method == "provider" else ""

    def arguments(self, command: str) -> list[str]:
        """As `PrivateKey`."""
        if self.settings.method == "provider":
            return []
        return ["-engine", "pkcs11", "-keyform" if command == "ca" else "-inform", "engine"]

    def environment(self, command: str) -> dict[str, str]:
        """As `PrivateKey`; a variable needs no quoting, as a path in an openssl.cnf would."""
        module = str(self.settings.module)
        if self.settings.method == "engine":
            return {**self.settings.environment, "PKCS11_MODULE_PATH": module}
        # a command without -config reads it from there; and what the provider does is told only for one key, and not
        # for a thousand signatures
        looking = {"OPENSSL_CONF": "openssl.cnf", "PKCS11_PROVIDER_DEBUG": "file:/dev/stderr,level:1"}
        return {**self.settings.environment, "PKCS11_PROVIDER_MODULE": module, **(looking if command != "ca" else {})}

    def check(self) -> None:
        """As `PrivateKey`: a module that can be read. What is missing in a token can't be told before a login."""
        module = self.settings.module
        if not os.access(module, os.R_OK) or not module.is_file():
            raise BackendRefusedError(
                f"wanted the token's PKCS#11 module {module}, found no file there that can be read",
                hint="`pkcs11.module` is the library of the HSM's vendor; for SoftHSM in Debian"
                " /usr/lib/softhsm/libsofthsm2.so",
            )

    @contextmanager
    def login(self, secret: bytes) -> Iterator[Callable[[str], None]]:
        """As `PrivateKey`: one at a time to a token, and no PIN again that it has refused."""
        names = [part for part in _parts(self.uri) if part.partition("=")[0] not in {"object", "id", "type"}]
        logins, pin = _LOGINS[str(self.settings.module), *sorted(names)], sha256(secret).digest()
        with logins.lock:
            if pin in logins.refused:
                raise self._no_login(logins.refused[pin])

            def note(messages: str) -> None:
                if refused := _LOGIN.search(messages):
                    logins.refused[pin] = _why(refused)

            yield note

    def failure(self, messages: str, told: str) -> BackendError | None:
        """As `PrivateKey`; a PIN that was not accepted is never tried again by the bridge."""
        method, module = self.settings.method, self.settings.module
        if _NO_METHOD.search(messages):
            package = {"engine": "libengine-pkcs11-openssl", "provider": "pkcs11-provider"}[method]
            return BackendRefusedError(
                f"wanted openssl's {method} pkcs11, found none",
                hint=f"install it (Debian: {package}), or choose the other `pkcs11.method`, engine or provider",
            )
        if login := _LOGIN.search(messages):
            return self._no_login(_why(login))
        if _MODULE_FAILED.search(messages):
            return BackendUnavailableError(
                f"wanted the PKCS#11 module {module} to start, found: {told}",
                hint="is the HSM reachable, and may this user read the module's own configuration and tokens?"
                " `pkcs11.environment` has the variables that the module is given",
            )
        if _SEVERAL_TOKENS.search(messages):
            return BackendRefusedError(f"wanted one token for {self}, found several", hint="add serial= to the URI")
        if _NO_TOKEN.search(messages) or (_CALLS.search(messages) and not _LOGGED_IN.search(messages)):
            return BackendUnavailableError(
                f"wanted the token of {self}, found none like it with {module}",
                hint=f"is the HSM connected? `pkcs11-tool --module {module} --list-token-slots` shows what is there",
            )
        return self._no_key(messages) if _NO_KEY.search(messages) else None

    def _no_login(self, why: str) -> BackendRefusedError:
        return BackendRefusedError(
            f"wanted the PIN of {self} in {self.secret}, the token found it {why}",
            hint="each run with a wrong PIN is a failed login, and a token locks itself after a few: fix it first",
        )

    def _no_key(self, messages: str) -> BackendRefusedError:
        found = "no such key in the token"
        if self.settings.method == "provider" and not _CALLS.search(messages):
            found = "no such key, no such token, or a wrong PIN; openssl does not tell which"
        return BackendRefusedError(
            f"wanted the private key {self}, found {found}",
            hint=f"`ca-bridge doctor` tells more; `pkcs11-tool --module {self.settings.module} --login --list-objects`"
            " shows the keys",
        )


def key_problems(private_key: str | None, pkcs11: object, passphrase: object) -> Iterator[SettingsProblem]:
    """Problems of a key's settings, each by itself or together."""
    if private_key is None or not private_key.startswith(SCHEME):
        if private_key is not None and not private_key.startswith("/"):
            yield SettingsProblem("private_key", "a file with an absolute path, or a pkcs11: URI", shown(private_key))
        elif pkcs11 is not None:
            yield SettingsProblem("pkcs11", "private_key as a pkcs11: URI beside it", shown(private_key or ""))
        return
    if wrong := uri_problem(private_key):
        yield SettingsProblem("private_key", *wrong)
    if pkcs11 is None:
        yield SettingsProblem("pkcs11", "a table that says how the token is reached: method, module, pin_file", "none")
    if passphrase is not None:
        yield SettingsProblem("passphrase", "for a key in a token, pin_file in the table pkcs11", "a passphrase")


def uri_problem(uri: str) -> tuple[str, str] | None:
    """What is wrong with a pkcs11: URI, as (wanted, found); never with a value of it, which may be a PIN."""
    if not _URI.fullmatch(uri):
        return "a pkcs11: URI in which other characters than letters, digits and ._~- are percent-encoded", shown(uri)
    names = _attributes(uri)
    if unknown := [name for name in names if name not in _NAMES]:
        found = ", ".join(unknown)
        return f"a URI of {', '.join(sorted(_NAMES))} alone; PIN and module stand in the table pkcs11", found
    if "token" not in names or not {"object", "id"} & set(names):
        return "a URI with token= and with object= or id=, or openssl would take some key", ", ".join(names)
    return None


def _attributes(uri: str) -> Mapping[str, None]:
    return dict.fromkeys(part.partition("=")[0] for part in _parts(uri))


def _parts(uri: str) -> list[str]:
    return re.split("[;?&]", uri.removeprefix(SCHEME))


def _why(login: re.Match[str]) -> str:
    return login["text"] or _LOGIN_CODES[login["code"]]


def shown(text: str) -> str:
    """A path; of a URI, which may hold a PIN, only its scheme."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text)
    return f"a {scheme[0]} URI" if scheme else repr(text) if text else "none"
