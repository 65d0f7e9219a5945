"""SoftHSM: a token (an HSM in software) with CA keys in it, and the ways in which openssl reaches it."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from backends.openssl.program import Pkcs11Settings
from bridge.contract import Secret
from tests.kit import programs

Method = Literal["engine", "provider"]  #: The way in which openssl reaches a token.
METHODS: tuple[Method, ...] = ("engine", "provider")

MODULE = Path("/usr/lib/softhsm/libsofthsm2.so")
PIN = "73-pin-of-the-test"
_SO_PIN = "84-so-pin-of-the-test"


def missing(method: Method) -> str:
    """What keeps openssl from using a token, and what brings it; empty: nothing."""
    if programs.find("softhsm2-util") is None or not MODULE.exists():
        return f"wanted SoftHSM with {MODULE}, found none; run: apt-get install softhsm2"
    if method == "engine" and not _engine().exists():
        return f"wanted openssl's engine {_engine()}, found none; run: apt-get install libengine-pkcs11-openssl"
    if method == "provider" and provider_directory() is None:
        return (
            f"wanted openssl's provider pkcs11.so in {_folder('m')} or {programs.directory()}, found none;"
            " run: apt-get install pkcs11-provider (Debian 13 and newer), or tests/kit/pkcs11_provider.sh"
        )
    return ""


def provider_directory() -> Path | None:
    """Where `pkcs11.so` is, the provider: the system's, or the kit's."""
    folders = (_folder("m"), programs.directory() / "ossl-modules")
    return next((folder for folder in folders if folder.joinpath("pkcs11.so").exists()), None)


def _engine() -> Path:
    return _folder("e") / "pkcs11.so"


def _folder(option: str) -> Path:
    """The folder of openssl: where its engines (`e`) or its modules (`m`) are."""
    text = subprocess.run(["openssl", "version", f"-{option}"], capture_output=True, text=True, check=True).stdout
    match = re.search(r'"(.+)"', text)
    if not match:
        raise RuntimeError(f"wanted a folder from openssl version -{option}, found {text!r}")
    return Path(match[1])


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token with a user PIN."""

    label: str
    directory: Path  #: Of the token's own files and its configuration.

    @property
    def environment(self) -> dict[str, str]:
        """With which the module finds the token."""
        return {"SOFTHSM2_CONF": str(self.directory / "softhsm2.conf")}

    def uri(self, key: str) -> str:
        """The URI of one of its keys."""
        return f"pkcs11:token={self.label};object={key};type=private"

    def add(self, key: str, key_pem: bytes, number: str) -> str:
        """
        Bring a key into the token.

        Args:
            key: Its label.
            key_pem: Unencrypted.
            number: Its id, in hexadecimal.

        Returns:
            Its URI.
        """
        pkcs8 = load_pem_private_key(key_pem, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with TemporaryDirectory(dir=self.directory) as folder:
            path = Path(folder, "key.p8")
            path.touch(mode=0o600)
            path.write_bytes(pkcs8)
            self._util("--import", str(path), "--token", self.label, "--label", key, "--id", number, "--pin", PIN)
        return self.uri(key)

    def settings(self, method: Method, pin: Secret) -> Pkcs11Settings:
        """How openssl reaches it."""
        environment = self.environment
        if method == "provider":
            environment["OPENSSL_MODULES"] = str(provider_directory())
        return Pkcs11Settings(method=method, module=MODULE, pin=pin, environment=environment)

    def _util(self, *arguments: str) -> None:
        command = [str(programs.require("softhsm2-util")), *arguments]
        subprocess.run(command, env={**os.environ, **self.environment}, capture_output=True, check=True)


def make_token(directory: Path, label: str = "k8s-ca") -> Token:
    """A new token, in a place of its own."""
    directory.joinpath("tokens").mkdir(parents=True)
    token = Token(label=label, directory=directory)
    config = f"directories.tokendir = {directory / 'tokens'}\nobjectstore.backend = file\nlog.level = ERROR\n"
    directory.joinpath("softhsm2.conf").write_text(config)
    token._util("--init-token", "--free", "--label", label, "--so-pin", _SO_PIN, "--pin", PIN)
    return token
