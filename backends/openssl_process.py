"""One run of the openssl program for a CA: the passphrase in, the reason of a failure out."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from bridge.contract import Secret, SecretUnavailableError
from bridge.errors import BackendError, BackendRefusedError, BackendUnavailableError

_OLDEST = (1, 1, 1)
_LONGEST_PASSPHRASE = 1023  # bytes; openssl takes a line of that size at most
_LINES_TOLD = 3
_LONGEST_LINE = 200

# What `openssl ca` says when all is well; `name :STRING:'value'` are the parts of a subject.
_NOISE = re.compile(
    r"Using configuration|Check that the request|Signature ok|The Subject's Dist|Certificate is to be certified|"
    r"Write out database|Data ?base updated|Everything appears|Adding Entry|Enter pass phrase|\s*$|\w+\s*:[A-Z\d. ]+:'",
    re.IGNORECASE,
)
_ERROR_LINE = re.compile(r"[0-9A-Fa-f]+:error:[^:]*:[^:]*:[^:]*:(?P<reason>[^:]*):[^:]*:\d+:(?P<data>.*)")
_MISMATCH = re.compile(r"private key do(?:es)? not match", re.IGNORECASE)
_WRONG_PASSPHRASE = re.compile(r"wrong password|bad decrypt|empty password|bad password read", re.IGNORECASE)
_NO_KEY = re.compile(r"CA private key|private key from|(?:read|find) key", re.IGNORECASE)
_DISK_FULL = re.compile(r"No space left|Disk quota", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a process left; `code` is None when it was stopped at its time limit."""

    code: int | None
    output: bytes = b""
    messages: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run failed, and whether any other run would fail for the same reason."""

    error: BackendError
    for_all: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Openssl:
    """The program, and the key that it is to use."""

    program: str
    limit: timedelta  #: For one process.
    private_key: Path  #: Linked as `ca.key` in each folder to run in; the path here is for messages.
    passphrase: Secret | None

    def check_version(self) -> None:
        """
        Make sure that there is such a program, and that it is new enough.

        Raises:
            BackendRefusedError: There is none, it is older than 1.1.1, or another make.
            BackendUnavailableError: It did not end.
        """
        outcome = self._run(["version"], folder=Path("/"), inherited=())
        if error := self._interrupted(outcome):
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
        outcome = self.run(folder, "pkey", "-in", "ca.key", "-pubout")
        if outcome.code != 0:
            raise self.failure(outcome).error
        key = load_pem_public_key(outcome.output)
        return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def run(self, folder: Path, command: str, *arguments: str, inherited: Iterable[int] = ()) -> Outcome:
        """
        Run a command that uses the private key, with no terminal to ask on and none of our environment.

        Args:
            folder: To run in.
            command: The first argument.
            arguments: Behind it and `-passin`.
            inherited: File descriptors that the process keeps open.

        Raises:
            BackendRefusedError: No such program, no such key, no such passphrase.
        """
        try:
            with self.private_key.open("rb"):
                pass
        except OSError as e:
            raise BackendRefusedError(f"wanted the CA's private key in {self.private_key}, found: {e.strerror}") from e
        # a pipe is in no file, no environment and no process list; with the newline and its end closed openssl
        # can't wait on it, and an empty line is right for a key without passphrase
        reading, writing = os.pipe()
        try:
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(self._secret() + b"\n")
            return self._run(
                [command, "-passin", f"fd:{reading}", *arguments], folder=folder, inherited=(reading, *inherited)
            )
        finally:
            os.close(reading)

    def _secret(self) -> bytes:
        if self.passphrase is None:
            return b""
        try:
            secret = self.passphrase.read().encode()
        except SecretUnavailableError as e:
            raise BackendRefusedError(str(e)) from e
        if b"\n" in secret or len(secret) > _LONGEST_PASSPHRASE:
            raise BackendRefusedError(
                f"wanted a passphrase of one line and at most {_LONGEST_PASSPHRASE} bytes in {self.passphrase},"
                f" found {len(secret.splitlines())} lines and {len(secret)} bytes"
            )
        return secret

    def _run(self, arguments: list[str], *, folder: Path, inherited: Iterable[int]) -> Outcome:
        program = shutil.which(self.program)
        if not program:
            raise BackendRefusedError(
                f"wanted the program {self.program!r}, found none", hint="install openssl, or set `openssl` to its path"
            )
        try:
            process = subprocess.Popen(
                [str(Path(program).absolute()), *arguments],
                cwd=folder,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=tuple(inherited),
                start_new_session=True,  # or it asks for a passphrase on the terminal
            )
        except OSError as e:
            raise BackendRefusedError(f"wanted to start {program}, found: {e.strerror}") from e
        with process:
            try:
                output, messages = process.communicate(timeout=self.limit.total_seconds())
            except BaseException as e:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(e, subprocess.TimeoutExpired):
                    return Outcome(None)
                raise
        return Outcome(process.returncode, output, messages.decode(errors="replace"))

    def failure(self, outcome: Outcome) -> Failure:
        """Why it failed, as far as its messages tell; they decide nothing else."""
        if error := self._interrupted(outcome) or self._without_key(outcome.messages):
            return Failure(error, for_all=True)
        told = self._told(outcome.messages)
        return Failure(BackendRefusedError(f"openssl ended with code {outcome.code}: {told}"), for_all=False)

    def _interrupted(self, outcome: Outcome) -> BackendUnavailableError | None:
        if outcome.code is None:
            return BackendUnavailableError(
                f"wanted openssl to end within {self.limit.total_seconds():g} s, found it still running; it was stopped"
            )
        if outcome.code < 0:
            return BackendUnavailableError(f"openssl was ended by signal {-outcome.code}")
        if _DISK_FULL.search(outcome.messages):
            return BackendUnavailableError("wanted room for the CA's database, found the disk full")
        return None

    def _without_key(self, messages: str) -> BackendRefusedError | None:
        if _MISMATCH.search(messages):
            return self.key_of_another_ca()
        if _WRONG_PASSPHRASE.search(messages):
            return self._wrong_passphrase()
        if _NO_KEY.search(messages):
            told = self._told(messages)
            return BackendRefusedError(f"wanted a PEM private key in {self.private_key}, openssl found: {told}")
        return None

    def _wrong_passphrase(self) -> BackendRefusedError:
        if self.passphrase:
            return BackendRefusedError(
                f"wanted the passphrase of {self.private_key} in {self.passphrase}, found one that does not open it"
            )
        return BackendRefusedError(
            f"wanted a passphrase for {self.private_key}, which is encrypted, found none in the settings",
            hint="set passphrase_file, passphrase_env or passphrase_credential",
        )

    def key_of_another_ca(self) -> BackendRefusedError:
        """The key and the certificate are no pair."""
        return BackendRefusedError(
            f"wanted the key of the CA's certificate in {self.private_key}, found another's",
            hint="`certificate` and `private_key` must be of one CA, and the signing certificate the first in its file",
        )

    def _told(self, messages: str) -> str:
        """The first lines that tell something; never the passphrase, though openssl has no reason to print it."""
        lines = []
        for line in messages.splitlines():
            if error := _ERROR_LINE.match(line):
                lines.append(": ".join(filter(None, error.groups())))
            elif not _NOISE.match(line):
                lines.append(line.strip())
        told = "; ".join(_short(line) for line in lines[:_LINES_TOLD]) or "nothing that it told"
        secret = self._secret().decode()
        return told.replace(secret, "[passphrase]") if secret else told


def _environment() -> dict[str, str]:
    """No OPENSSL_CONF, no secret that came to us in a variable, and messages in English."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {"LC_ALL": "C"}


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}…"
