"""
A CA where a person approves each request, and a third party's plug-in for it, as `pip` would install it.

The plug-in leaves `ID.csr` in a directory; the person puts `ID.crt`, or `ID.no` with a reason, beside it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from bridge.contract import SignRequest
from bridge.pki.certificates import pem
from bridge.specs import SPECS
from tests.kit.issuing import Signer

MODULE = """
from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from bridge.contract import Backend, BackendSettings, Issued, Pending, SignRequest
from bridge.errors import BackendRefusedError, LocalFileError


@dataclass(frozen=True, kw_only=True)
class Settings(BackendSettings):
    dir: Path


class ApprovalBackend(Backend):
    settings_type = Settings

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @classmethod
    def from_settings(cls, settings: Settings) -> ApprovalBackend:
        return cls(settings.dir)

    def sign(self, request: SignRequest) -> Issued | Pending:
        reference = f"{request.spec.name}-{hashlib.sha256(request.csr_pem).hexdigest()[:16]}"
        with open(self._directory / "calls", "a+") as calls:
            calls.write(f"sign {reference}\\n")
            calls.seek(0)
            count = len(calls.readlines())
        path = self._directory / f"{reference}.csr"
        if not path.exists():
            path.write_bytes(request.csr_pem)
        if 0 < int(os.environ.get("CA_DIES", "0")) <= count:
            os.kill(os.getpid(), 9)
        return self.collect(request, reference)

    def collect(self, request: SignRequest, reference: str) -> Issued | Pending:
        if (self._directory / "no-token").exists():
            raise LocalFileError("people: token: no file")
        refusal, answer = (self._directory / f"{reference}.{suffix}" for suffix in ("no", "crt"))
        if refusal.exists():
            raise BackendRefusedError(refusal.read_text())
        if answer.exists():
            return Issued(leaf=x509.load_pem_x509_certificate(answer.read_bytes()))
        return Pending(reference=reference, note="the security team has it")
"""


@dataclass(frozen=True, kw_only=True)
class Approver:
    """The person, and what is on the desk."""

    directory: Path
    signer: Signer

    def requests(self) -> dict[str, Path]:
        """CSRs that were not answered, by certificate name."""
        found = sorted(self.directory.glob("*.csr"))
        open_ones = [p for p in found if not p.with_suffix(".crt").exists() and not p.with_suffix(".no").exists()]
        return {path.stem.rpartition("-")[0]: path for path in open_ones}

    def asked(self) -> list[str]:
        """References that were submitted, in order, repetitions included."""
        calls = self.directory / "calls"
        return calls.read_text().split()[1::2] if calls.exists() else []

    def approve(self, name: str, *, spec: str = "") -> x509.Certificate:
        """Sign the request of a certificate, with the usages of another one if that is named."""
        path = self.requests()[name]
        request = SignRequest(spec=SPECS[spec or name], csr_pem=path.read_bytes(), validity=timedelta(days=365))
        now = datetime.now(UTC)
        issued = self.signer.issue(request, begin=now - timedelta(minutes=5), end=now + timedelta(days=365))
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(pem(issued.leaf))
        temporary.rename(path.with_suffix(".crt"))
        return issued.leaf

    def refuse(self, name: str, reason: str) -> None:
        """Say no."""
        self.requests()[name].with_suffix(".no").write_text(reason)


def install_plugin(site: Path) -> None:
    """As a distribution in a directory of its own, to be put on PYTHONPATH."""
    information = site / "approval_backend-1.0.dist-info"
    information.mkdir(parents=True)
    (site / "approval_backend.py").write_text(MODULE)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: approval-backend\nVersion: 1.0\n")
    entry = "[kubeadm_ca_bridge.backends]\napproval = approval_backend:ApprovalBackend\n"
    (information / "entry_points.txt").write_text(entry)


def environment(site: Path) -> dict[str, str]:
    """For a program that is to find it."""
    return {**os.environ, "PYTHONPATH": str(site)}
