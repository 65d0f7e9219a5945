"""
A real step-ca with the provisioners that `ca-bridge setup exec` prints, and `step`, by which `config/exec/step-ca` asks it.

```python
ca = step_ca.make(tmp_path / "ca", root_pem, certificate_pem, key_pem)
ca.set_up(script)
with ca.serving(): ...
```
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bridge.pki.certificates import pem
from bridge.pki.csr import key_pem
from tests.kit import programs
from tests.kit.issuing import Signer
from tests.kit.loopback import free_port

EXAMPLE = Path(__file__).parents[2] / "config/exec/step-ca"
#: With the kit's programs in front; the example finds `step` by it.
PATH = f"{programs.directory()}:/usr/bin:/bin"
_START_SECONDS = 180


@dataclass(frozen=True, kw_only=True)
class StepCA:
    """One CA: its directory has ca.json, the root, the password of its provisioners and a copy of the example."""

    directory: Path
    url: str

    @property
    def root(self) -> Path:
        """The trust anchor of the server and of what it signs."""
        return self.directory / "root.crt"

    @property
    def password(self) -> Path:
        """What protects the provisioners' keys."""
        return self.directory / "password"

    def settings(self, *, profile: str = "kubeadm-{usage}", **changes: str) -> dict[str, object]:
        """Keys of a backend of type `exec`: the example, and where this CA is."""
        places = {"url": self.url, "root": str(self.root), "password": str(self.password)} | changes
        command = (str(self.directory / "step-ca"), places["url"], places["root"], places["password"])
        return {"command": command, "profile": profile, "environment": {"PATH": PATH}}

    def set_up(self, script: str) -> str:
        """Run what `setup exec` printed; what it said."""
        path = self.directory / "set-up.sh"
        path.write_text(script)
        words = ["sh", str(path), str(self.password), *self._places]
        done = subprocess.run(
            words, cwd=self.directory, env=self._environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    def add_provisioner(self, name: str) -> None:
        """A provisioner as a careless administrator makes it, with step-ca's default template."""
        words = ["step", "ca", "provisioner", "add", name, "--type", "JWK", "--create", "--x509-max-dur", "8784h"]
        words += ["--password-file", str(self.password), *self._places]
        subprocess.run(words, env=self._environment, capture_output=True, check=True)

    @property
    def _places(self) -> list[str]:
        return ["--ca-config", str(self.directory / "ca.json"), "--ca-url", self.url, "--root", str(self.root)]

    @property
    def _environment(self) -> Mapping[str, str]:
        return {"PATH": PATH, "HOME": str(self.directory), "STEPPATH": str(self.directory / "step")}

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """While it runs."""
        log = self.directory / "log"
        with log.open("wb") as output:
            words = [str(programs.require("step-ca")), str(self.directory / "ca.json")]
            process = subprocess.Popen(
                words, env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            self._wait(process, log)
            yield
        finally:
            process.terminate()
            process.wait(timeout=180)

    def _wait(self, process: subprocess.Popen[bytes], log: Path) -> None:
        health = [str(programs.require("step")), "ca", "health", "--ca-url", self.url, "--root", str(self.root)]
        end = time.monotonic() + _START_SECONDS
        while subprocess.run(health, env=self._environment, capture_output=True, check=False).returncode:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)


def make(directory: Path, root_pem: bytes, certificate_pem: bytes, private_key_pem: bytes) -> StepCA:
    """A CA that signs with this key, which is the root's or an intermediate's; it has no provisioners yet."""
    directory.mkdir(parents=True)
    port = free_port()
    for name, data in (("root.crt", root_pem), ("ca.crt", certificate_pem), ("ca.key", private_key_pem)):
        (directory / name).touch(mode=0o600)
        (directory / name).write_bytes(data)
    (directory / "password").touch(mode=0o600)
    (directory / "password").write_text(secrets.token_hex(32))
    config = {
        "root": str(directory / "root.crt"),
        "crt": str(directory / "ca.crt"),
        "key": str(directory / "ca.key"),
        "address": f"127.0.0.1:{port}",
        "dnsNames": ["127.0.0.1"],
        "authority": {"provisioners": []},
    }
    (directory / "ca.json").write_text(json.dumps(config))
    shutil.copy(EXAMPLE, directory / "step-ca")
    (directory / "step-ca").chmod(0o755)
    return StepCA(directory=directory, url=f"https://127.0.0.1:{port}")


def below(directory: Path, root_pem: bytes, root_key_pem: bytes) -> StepCA:
    """A CA with an intermediate of this root's, as step-ca has it by default: the root's key is not there."""
    root = Signer.load(root_pem, root_key_pem)
    begin, end = root.certificate.not_valid_before_utc, root.certificate.not_valid_after_utc
    own = Signer.make("step-ca", parent=root, path_length=0, begin=begin, end=end)
    return make(directory, root_pem, pem(own.certificate), key_pem(own.key))
