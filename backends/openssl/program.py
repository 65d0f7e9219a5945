"""
The openssl program, and the CA's private key: a file, or an object in a token (an HSM) by PKCS#11.

Measured with SoftHSM 2.6, libp11's engine 0.4.12 and pkcs11-provider 1.0: openssl crashes at its end if the engine
could not load a key, after it printed the reason; the provider has one message for every reason; an empty PIN is a
failed login; and both print a PIN that is in the URI.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import ClassVar, Literal

from cryptography.hazmat.primitives.serialization import load_pem_public_key

from bridge.contract import Secret, SecretUnavailableError
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError, LocalFileError, SettingsProblem
from bridge.pki.certificates import spki
from bridge.system.files import reasons
from bridge.system.paths import open_regular
from bridge.system.run_command import Command, openssl_environment, run, secret_pipe

# --- the key ---------------------------------------------------------------------------------------------------------

SCHEME = "pkcs11:"

# RFC 7512 without characters that are special in an openssl.cnf: `$`, quotes, `#`, backslashes must be percent-encoded.
_URI = re.compile(r"pkcs11:(?:[A-Za-z0-9._~:@!()*+,&=;?/-]|%[0-9A-Fa-f]{2})+")
# Attributes that find the token and key; others would take the PIN from a place that all can see, or name another
# module than the settings.
_NAMES = {"token", "manufacturer", "serial", "model", "object", "id", "type", "slot-id"}

_WRONG_PASSPHRASE = re.compile(r"wrong password|bad decrypt|empty password|bad password read", re.IGNORECASE)
_NO_KEY = re.compile(r"CA private key|private key (?:of key )?from|(?:read|find) key", re.IGNORECASE)

_NO_METHOD = re.compile(r"invalid engine|No store loader found", re.IGNORECASE)
_MODULE_FAILED = re.compile(r"Unable to load module|Module initialization failed|Error \d+ returned by C_Initialize")
_NO_TOKEN = re.compile(r"No matching initialized token|Specified object not found")
_SEVERAL_TOKENS = re.compile(r"Multiple matching (?:slots|tokens)")
_LOGIN = re.compile(r"PIN (?P<text>incorrect|invalid|expired|locked)|Error (?P<code>16[0-4]) returned by C_Login")
_LOGIN_CODES = {"160": "incorrect", "161": "invalid", "162": "of a wrong length", "163": "expired", "164": "locked"}
# The provider's own log of its calls.
_CALLS = re.compile(r"Calling C_Initialize")
_LOGGED_IN = re.compile(r"Calling C_Login")

# The provider comes after the default one: SoftHSM calls OpenSSL, which would call the provider, and so on for ever.
# Without the quirk openssl crashes at its end, after everything is recorded.
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


@dataclass(frozen=True)
class KeyFile:
    """A PEM file, linked as `ca.key` in the folder of a run."""

    secret_name: ClassVar[str] = "passphrase"  # noqa: S105 (what it is called)
    #: CSRs in one process; nothing of a run is recorded before its last signature is made.
    batch_size: ClassVar[int] = 1000
    reference: ClassVar[str] = "ca.key"  #: Its name in openssl's arguments.
    config: ClassVar[str] = ""  #: The lines that come first in the openssl.cnf of a run.

    path: Path
    secret: Secret | None  #: The passphrase that opens it; None: it needs none.

    def __str__(self) -> str:
        return str(self.path)

    def options(self, command: str) -> tuple[list[str], dict[str, str]]:  # noqa: ARG002 (a file needs none)
        """Further arguments of an openssl command, and variables in its environment."""
        return [], {}

    def check(self) -> None:
        """Make sure, without openssl, that the file can be opened."""
        hint = "put it back, or set `private_key` to its file"
        with reasons(LocalFileError, f"wanted the CA's private key in {self}, found", hint=hint):
            open_regular(self.path).close()

    def login(self, secret: bytes) -> AbstractContextManager[Callable[[str], None]]:  # noqa: ARG002 (tried at will)
        """Surround one run of openssl; the caller passes openssl's messages to the function that it yields."""
        return nullcontext(lambda _: None)

    def failure(self, messages: str, notes: str) -> BackendError | None:
        """Why the key can't be used, by openssl's messages and the notes that may be shown; None: not the key."""
        if _WRONG_PASSPHRASE.search(messages) and self.secret:
            return LocalFileError(
                f"wanted the passphrase of {self} in {self.secret}, found one that does not open it",
                hint="put the right one there, on one line; `openssl pkey -noout -in KEY` tries it",
            )
        if _WRONG_PASSPHRASE.search(messages):
            return LocalFileError(
                f"{self} is encrypted, and the settings name no passphrase for it",
                hint="set passphrase_file, passphrase_env or passphrase_credential",
            )
        if _NO_KEY.search(messages):
            text = f"wanted a PEM private key in {self}, openssl found: {notes}"
            return LocalFileError(text, hint="put the CA's key back, or set `private_key` to its file")
        return None


@dataclass(frozen=True, kw_only=True)
class Pkcs11Settings:
    """How openssl reaches the token; the key's URI is the backend's `private_key`."""

    #: How openssl reaches the token: with the engine `pkcs11`, or with a provider (OpenSSL 3).
    method: Literal["engine", "provider"]
    module: Path  #: The token's PKCS#11 library, from its vendor.
    pin: Secret  #: The PIN of the token's user; the token locks itself after a few wrong ones.
    #: Variables that the library needs, such as SOFTHSM2_CONF; it gets no others.
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Logins:
    """Our process's logins to one token: one at a time, and never again with a PIN that was refused."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    refused: dict[bytes, str] = field(default_factory=dict)  #: The reason, by the PIN's digest.


# Three CAs may have their keys in one token, and a token may lock itself after three failed logins.
_LOGINS: defaultdict[tuple[str, ...], _Logins] = defaultdict(_Logins)


@dataclass(frozen=True)
class TokenKey:
    """A private key that never leaves its token."""

    secret_name: ClassVar[str] = "PIN"  # noqa: S105 (what it is called)
    # Even an HSM with 20 signatures a second must finish before the time limit.
    batch_size: ClassVar[int] = 100

    reference: str  #: Its URI, without a PIN (see `uri_problem`).
    settings: Pkcs11Settings

    def __str__(self) -> str:
        return self.reference

    @property
    def secret(self) -> Secret:
        """The PIN."""
        return self.settings.pin

    @property
    def config(self) -> str:
        """The lines that come first in the openssl.cnf of a run."""
        return _PROVIDER_CONFIG if self.settings.method == "provider" else ""

    def options(self, command: str) -> tuple[list[str], dict[str, str]]:
        """As `KeyFile.options`; variables need no quoting, as a path in an openssl.cnf would."""
        module = str(self.settings.module)
        if self.settings.method == "engine":
            arguments = ["-engine", "pkcs11", "-keyform" if command == "ca" else "-inform", "engine"]
            return arguments, {**self.settings.environment, "PKCS11_MODULE_PATH": module}
        # a command without -config reads OPENSSL_CONF; and the provider logs what it does only for one key, not for a
        # thousand signatures
        looking = {"OPENSSL_CONF": "openssl.cnf", "PKCS11_PROVIDER_DEBUG": "file:/dev/stderr,level:1"}
        more = looking if command != "ca" else {}
        return [], {**self.settings.environment, "PKCS11_PROVIDER_MODULE": module, **more}

    def check(self) -> None:
        """Make sure that the module can be read; only a login shows what the token lacks."""
        module = self.settings.module
        if not os.access(module, os.R_OK) or not module.is_file():
            raise BackendRefusedError(
                f"there is no file {module} that can be read, the token's PKCS#11 module",
                hint="`pkcs11.module` is the library of the HSM's vendor; for SoftHSM in Debian"
                " /usr/lib/softhsm/libsofthsm2.so",
            )

    @contextmanager
    def login(self, secret: bytes) -> Iterator[Callable[[str], None]]:
        """As `KeyFile.login`: one login to a token at a time, and never again with a PIN that it refused."""
        names = [part for part in _parts(self.reference) if part.partition("=")[0] not in {"object", "id", "type"}]
        logins, pin = _LOGINS[str(self.settings.module), *sorted(names)], sha256(secret).digest()
        with logins.lock:
            if pin in logins.refused:
                raise self._no_login(logins.refused[pin])

            def note(messages: str) -> None:
                if refused := _LOGIN.search(messages):
                    logins.refused[pin] = _why(refused)

            yield note

    def failure(self, messages: str, notes: str) -> BackendError | None:
        """As `KeyFile.failure`; the bridge never tries a refused PIN again."""
        method, module = self.settings.method, self.settings.module
        if _NO_METHOD.search(messages):
            package = {"engine": "libengine-pkcs11-openssl", "provider": "pkcs11-provider"}[method]
            return BackendRefusedError(
                f"openssl has no {method} pkcs11",
                hint=f"install it (Debian: {package}), or choose the other `pkcs11.method`, engine or provider",
            )
        if login := _LOGIN.search(messages):
            return self._no_login(_why(login))
        if _MODULE_FAILED.search(messages):
            return BackendUnavailableError(
                f"wanted the PKCS#11 module {module} to start, found: {notes}",
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


#: A CA's private key, as a run of openssl needs it: both kinds have the same members.
PrivateKey = KeyFile | TokenKey


def key_problems(private_key: str | None, pkcs11: object, passphrase: object) -> Iterator[SettingsProblem]:
    """Find problems of a key's settings, single or combined."""
    if private_key is None or not private_key.startswith(SCHEME):
        if private_key is not None and not private_key.startswith("/"):
            yield SettingsProblem("private_key", "a file with an absolute path, or a pkcs11: URI", masked(private_key))
        elif pkcs11 is not None:
            yield SettingsProblem("pkcs11", "private_key as a pkcs11: URI beside it", masked(private_key or ""))
        return
    if wrong := uri_problem(private_key):
        yield SettingsProblem("private_key", *wrong)
    if pkcs11 is None:
        yield SettingsProblem("pkcs11", "a table that says how the token is reached: method, module, pin_file", "none")
    if passphrase is not None:
        yield SettingsProblem("passphrase", "for a key in a token, pin_file in the table pkcs11", "a passphrase")


def uri_problem(uri: str) -> tuple[str, str] | None:
    """The problem of a pkcs11: URI, as (wanted, found); never with a value of it, which may be a PIN."""
    if not _URI.fullmatch(uri):
        return "a pkcs11: URI in which other characters than letters, digits and ._~- are percent-encoded", masked(uri)
    names = [part.partition("=")[0] for part in _parts(uri)]
    if unknown := [name for name in names if name not in _NAMES]:
        unknown_names = ", ".join(unknown)
        return f"a URI of {', '.join(sorted(_NAMES))} alone; PIN and module stand in the table pkcs11", unknown_names
    if "token" not in names or not {"object", "id"} & set(names):
        return "a URI with token= and with object= or id=, or openssl would take some key", ", ".join(names)
    return None


def _parts(uri: str) -> list[str]:
    return re.split("[;?&]", uri.removeprefix(SCHEME))


def _why(login: re.Match[str]) -> str:
    return login["text"] or _LOGIN_CODES[login["code"]]


def masked(text: str) -> str:
    """Show a path; of a URI, which may hold a PIN, only its scheme."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text)
    return f"a {scheme[0]} URI" if scheme else repr(text) if text else "none"


# --- the program -----------------------------------------------------------------------------------------------------

#: How many CSRs openssl signs within the settings' `timeout`, even with a slow HSM or on a busy host.
CSRS_A_LIMIT = 100
_OLDEST = (1, 1, 1)
_LONGEST_PASSPHRASE = 1023  # bytes; openssl takes a line of that size at most
_LINES_QUOTED = 3
_LONGEST_LINE = 200

# What `openssl ca` prints when all is well; `name :STRING:'value'` are the parts of a subject.
_NOISE = re.compile(
    r"Using configuration|Check that the request|Signature ok|The Subject's Dist|Certificate is to be certified|"
    r"Write out database|Data ?base updated|Everything appears|Adding Entry|Enter pass phrase|engine .pkcs11. set|\s*$|\w+\s*:[A-Z\d. ]+:'",
    re.IGNORECASE,
)
_ERROR_LINE = re.compile(r"[0-9A-Fa-f]+:error:[^:]*:[^:]*:[^:]*:(?P<reason>[^:]*):[^:]*:\d+:(?P<data>.*)")
_MISMATCH = re.compile(r"private key do(?:es)? not match", re.IGNORECASE)
_DISK_FULL = re.compile(r"No space left|Disk quota", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ProcessEnd:
    """The end of a process: its exit code and output; `code` is None when it was stopped at its time limit."""

    code: int | None
    output: bytes = b""
    messages: str = ""
    limit: timedelta = timedelta()


@dataclass(frozen=True, slots=True, kw_only=True)
class Openssl:
    """The openssl program, and the key that it uses."""

    program: str
    limit: timedelta  #: For one process, and again for every `CSRS_A_LIMIT` CSRs that it signs.
    key: PrivateKey

    def check_version(self) -> None:
        """Make sure that the program exists and is new enough."""
        outcome = self._run(["version"], folder=Path("/"), environment={}, inherited=(), limit=self.limit)
        if error := self._stopped(outcome) or _killed(outcome):
            raise error
        text = outcome.output.decode(errors="replace").strip()
        match = re.match(r"OpenSSL (\d+)\.(\d+)\.(\d+)", text)
        if not match or tuple(map(int, match.groups())) < _OLDEST:
            raise BackendRefusedError(f"wanted OpenSSL 1.1.1 or newer as {self.program!r}, found {_short(text)!r}")

    def public_key(self, folder: Path) -> bytes:
        """The DER public key of the CA's private key."""
        outcome = self.run(folder, "pkey", "-in", self.key.reference, "-pubout")
        if outcome.code != 0:
            raise self.failure(outcome)
        return spki(load_pem_public_key(outcome.output))

    def run(
        self, folder: Path, command: str, *arguments: str, inherited: Iterable[int] = (), csrs: int = 0
    ) -> ProcessEnd:
        """
        Run a command that uses the private key, without a terminal and our environment; `inherited` file descriptors
        are kept, `csrs` is how many it signs (LocalFileError: no such program, key or passphrase).
        """
        self.key.check()
        secret = self._secret()  # an empty line is right for a key without passphrase
        options, environment = self.key.options(command)
        with secret_pipe(secret) as reading, self.key.login(secret) as note:
            outcome = self._run(
                [command, "-passin", f"fd:{reading}", *options, *arguments],
                folder=folder,
                environment=environment,
                inherited=(reading, *inherited),
                limit=self.limit * (1 + csrs // CSRS_A_LIMIT),
            )
            note(outcome.messages)
        return outcome

    def _secret(self) -> bytes:
        if self.key.secret is None:
            return b""
        try:
            secret = self.key.secret.read().encode()
        except SecretUnavailableError as e:
            hint = f"put the {self.key.secret_name} there, readable for this process"
            raise LocalFileError(str(e), hint=hint) from e
        if b"\n" in secret or len(secret) > _LONGEST_PASSPHRASE:
            raise LocalFileError(
                f"wanted a {self.key.secret_name} of one line and at most {_LONGEST_PASSPHRASE} bytes"
                f" in {self.key.secret}, found {len(secret.splitlines())} lines and {len(secret)} bytes",
                hint=f"put the {self.key.secret_name} there, and nothing else",
            )
        return secret

    def _run(
        self,
        arguments: list[str],
        *,
        folder: Path,
        environment: Mapping[str, str],
        inherited: Iterable[int],
        limit: timedelta,
    ) -> ProcessEnd:
        program = shutil.which(self.program)
        if not program:
            hint = "install openssl, or set `openssl` to its path"
            raise LocalFileError(f"there is no program {self.program!r}", hint=hint)
        command = Command(
            words=[str(Path(program).absolute()), *arguments],
            environment={**openssl_environment(), **environment},
            limit=limit,
            folder=folder,
            inherited=tuple(inherited),
            resources={resource.RLIMIT_CORE: 0},  # the engine can crash with the PIN in its memory
        )
        output = bytearray()
        # no pipe: if we are killed, openssl goes on, and a closed pipe would end it at its next message
        with os.fdopen(os.memfd_create("messages"), "r+b") as messages:
            ended = run(command, output.extend, messages.fileno())
            messages.seek(0)
            notes = messages.read().decode(errors="replace")
        if ended.error is not None:
            raise LocalFileError(f"wanted {program}, which {ended.failure}")
        return ProcessEnd(None, limit=limit) if ended.stopped else ProcessEnd(ended.code, bytes(output), notes)

    def failure(self, outcome: ProcessEnd) -> BackendError:
        """Why a run failed, by its messages; `is_for_all`: any other run would fail for the same reason."""
        error: BackendError | None = self._stopped(outcome)
        if error is None and _MISMATCH.search(outcome.messages):
            error = self.key_of_another_ca()
        notes = self._notes(outcome.messages) if error is None else ""
        # a key that can't be loaded comes first: an engine then crashes, but the messages are complete
        error = error or self.key.failure(outcome.messages, notes) or _killed(outcome)
        if error is None:
            return BackendRefusedError(f"openssl ended with code {outcome.code}: {notes}")
        error.is_for_all = True
        return error

    def _stopped(self, outcome: ProcessEnd) -> BackendUnavailableError | None:
        if outcome.code is None:
            wanted = f"openssl to end within {outcome.limit.total_seconds():g} s"
            return BackendUnavailableError(f"wanted {wanted}, found it still running; it was stopped")
        if _DISK_FULL.search(outcome.messages):
            return BackendUnavailableError("wanted room for the CA's database, found the disk full")
        return None

    def key_of_another_ca(self) -> BackendRefusedError:
        """The error for a key that does not fit the CA's certificate."""
        return BackendRefusedError(
            f"wanted the key of the CA's certificate in {self.key}, found another's",
            hint="`certificate` and `private_key` must be of one CA, and the signing certificate the first in its file",
        )

    def _notes(self, messages: str) -> str:
        """The first lines that say something; never the secret, though openssl has no reason to print it."""
        lines = []
        for line in messages.splitlines():
            if error := _ERROR_LINE.match(line):
                lines.append(": ".join(filter(None, error.groups())))
            elif not _NOISE.match(line):
                lines.append(line.strip())
        notes = "; ".join(_short(line) for line in lines[:_LINES_QUOTED]) or "no message"
        secret = self._secret().decode()
        return notes.replace(secret, f"[{self.key.secret_name}]") if secret else notes


def _killed(outcome: ProcessEnd) -> BackendUnavailableError | None:
    if outcome.code is not None and outcome.code < 0:
        return BackendUnavailableError(f"openssl was ended by signal {-outcome.code}")
    return None


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}…"
