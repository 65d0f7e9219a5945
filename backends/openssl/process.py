"""One run of the openssl program for a CA: the passphrase or PIN in, the reason of a failure out."""

from __future__ import annotations

import os
import re
import resource
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from backends.openssl.key import PrivateKey
from bridge.contract import SecretUnavailableError
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError, LocalFileError
from bridge.system.run_command import Command, run

#: So many an openssl signs within the settings' `timeout`, be its HSM slow or its host busy.
CSRS_A_LIMIT = 100
_OLDEST = (1, 1, 1)
_LONGEST_PASSPHRASE = 1023  # bytes; openssl takes a line of that size at most
_LINES_TOLD = 3
_LONGEST_LINE = 200

# What `openssl ca` says when all is well; `name :STRING:'value'` are the parts of a subject.
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


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run failed, and whether any other run would fail for the same reason."""

    error: BackendError
    for_all: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Openssl:
    """The program, and the key that it is to use."""

    program: str
    limit: timedelta  #: For one process, and again for every `CSRS_A_LIMIT` CSRs that it signs.
    key: PrivateKey

    def check_version(self) -> None:
        """
        Make sure that there is such a program, and that it is new enough.

        Raises:
            BackendRefusedError: There is none, it is older than 1.1.1, or another make.
            BackendUnavailableError: It did not end.
        """
        outcome = self._run(["version"], folder=Path("/"), environment={}, inherited=(), limit=self.limit)
        if error := self._stopped(outcome) or _killed(outcome):
            raise error
        text = outcome.output.decode(errors="replace").strip()
        match = re.match(r"OpenSSL (\d+)\.(\d+)\.(\d+)", text)
        if not match or tuple(map(int, match.groups())) < _OLDEST:
            raise BackendRefusedError(f"wanted OpenSSL 1.1.1 or newer as {self.program!r}, found {_short(text)!r}")

    def public_key(self, folder: Path) -> bytes:
        """
        The DER public key of the CA's private key.

        Raises:
            BackendRefusedError: The key can't be used.
            BackendUnavailableError: The program did not end.
        """
        outcome = self.run(folder, "pkey", "-in", self.key.reference, "-pubout")
        if outcome.code != 0:
            raise self.failure(outcome).error
        key = load_pem_public_key(outcome.output)
        return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def run(
        self, folder: Path, command: str, *arguments: str, inherited: Iterable[int] = (), csrs: int = 0
    ) -> ProcessEnd:
        """
        Run a command that uses the private key, with no terminal to ask on and none of our environment.

        Args:
            folder: To run in.
            command: The first argument.
            arguments: Behind it and `-passin`.
            inherited: File descriptors that the process keeps open.
            csrs: How many it signs.

        Raises:
            BackendRefusedError: No such program, no such key, no such passphrase.
        """
        self.key.check()
        # a pipe is in no file, no environment and no process list; with the newline and its end closed openssl
        # can't wait on it, and an empty line is right for a key without passphrase
        secret = self._secret()
        reading, writing = os.pipe()
        try:
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(secret + b"\n")
            with self.key.login(secret) as note:
                outcome = self._run(
                    [command, "-passin", f"fd:{reading}", *self.key.arguments(command), *arguments],
                    folder=folder,
                    environment=self.key.environment(command),
                    inherited=(reading, *inherited),
                    limit=self.limit * (1 + csrs // CSRS_A_LIMIT),
                )
                note(outcome.messages)
            return outcome
        finally:
            os.close(reading)

    def _secret(self) -> bytes:
        if self.key.secret is None:
            return b""
        try:
            secret = self.key.secret.read().encode()
        except SecretUnavailableError as e:
            raise LocalFileError(str(e)) from e
        if b"\n" in secret or len(secret) > _LONGEST_PASSPHRASE:
            raise BackendRefusedError(
                f"wanted a {self.key.secret_name} of one line and at most {_LONGEST_PASSPHRASE} bytes"
                f" in {self.key.secret}, found {len(secret.splitlines())} lines and {len(secret)} bytes"
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
            raise BackendRefusedError(
                f"wanted the program {self.program!r}, found none", hint="install openssl, or set `openssl` to its path"
            )
        output = bytearray()
        # no pipe: openssl writes a dozen times for each CSR, and would wake us as often
        with os.fdopen(os.memfd_create("messages"), "r+b") as messages:
            ended = run(
                Command(
                    words=[str(Path(program).absolute()), *arguments],
                    environment={**_environment(), **environment},
                    limit=limit,
                    folder=folder,
                    inherited=tuple(inherited),
                    resources={resource.RLIMIT_CORE: 0},  # the engine can crash with the PIN in its memory
                ),
                output.extend,
                messages.fileno(),
            )
            messages.seek(0)
            told = messages.read().decode(errors="replace")
        if ended.error is not None:
            raise BackendRefusedError(f"wanted {program}, which {ended.failure}")
        return ProcessEnd(None, limit=limit) if ended.stopped else ProcessEnd(ended.code, bytes(output), told)

    def failure(self, outcome: ProcessEnd) -> Failure:
        """Why it failed, as far as its messages tell; they decide nothing else."""
        error = self._stopped(outcome) or self._without_key(outcome.messages) or _killed(outcome)
        if error:
            return Failure(error, for_all=True)
        told = self._told(outcome.messages)
        return Failure(BackendRefusedError(f"openssl ended with code {outcome.code}: {told}"), for_all=False)

    def _stopped(self, outcome: ProcessEnd) -> BackendUnavailableError | None:
        if outcome.code is None:
            limit = outcome.limit.total_seconds()
            return BackendUnavailableError(
                f"wanted openssl to end within {limit:g} s, found it still running; it was stopped"
            )
        if _DISK_FULL.search(outcome.messages):
            return BackendUnavailableError("wanted room for the CA's database, found the disk full")
        return None

    def _without_key(self, messages: str) -> BackendError | None:
        """The error of a key that can't be loaded, if that is it: an engine then crashes, but the messages are complete."""
        if _MISMATCH.search(messages):
            return self.key_of_another_ca()
        return self.key.failure(messages, self._told(messages))

    def key_of_another_ca(self) -> BackendRefusedError:
        """The key and the certificate are no pair."""
        return BackendRefusedError(
            f"wanted the key of the CA's certificate in {self.key}, found another's",
            hint="`certificate` and `private_key` must be of one CA, and the signing certificate the first in its file",
        )

    def _told(self, messages: str) -> str:
        """The first lines that tell something; never the secret, though openssl has no reason to print it."""
        lines = []
        for line in messages.splitlines():
            if error := _ERROR_LINE.match(line):
                lines.append(": ".join(filter(None, error.groups())))
            elif not _NOISE.match(line):
                lines.append(line.strip())
        told = "; ".join(_short(line) for line in lines[:_LINES_TOLD]) or "nothing that it told"
        secret = self._secret().decode()
        return told.replace(secret, f"[{self.key.secret_name}]") if secret else told


def _killed(outcome: ProcessEnd) -> BackendUnavailableError | None:
    if outcome.code is not None and outcome.code < 0:
        return BackendUnavailableError(f"openssl was ended by signal {-outcome.code}")
    return None


def _environment() -> dict[str, str]:
    """The environment without OPENSSL_CONF and secrets that came to us in a variable; messages in English."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {"LC_ALL": "C"}


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}…"
