"""The kit's judge: whether Go, and so Kubernetes, can use a certificate (`modules/judge`)."""

from __future__ import annotations

import contextlib
import json
import subprocess
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from bridge.specs import EKU
from tests.kit import programs

_USES = {EKU.SERVER_AUTH: "server", EKU.CLIENT_AUTH: "client"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Why it can't be used (empty: it can), and the user that Go takes it for."""

    refused: str
    user: str
    groups: frozenset[str]
    dns: frozenset[str]
    ips: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A running one."""

    process: subprocess.Popen[str]

    def ask(
        self,
        chain: Sequence[bytes],
        roots: Sequence[bytes],
        *,
        at: datetime,
        ekus: frozenset[EKU],
        key_pem: bytes = b"",
        host: str = "",
    ) -> Verdict:
        """
        Judge one certificate file.

        Args:
            chain: The leaf, then its intermediates, as the file has them, each as DER.
            roots: All of ca.crt.
            at: The verifier's clock.
            ekus: What it is used for; each is tried.
            key_pem: Its key: the pair is loaded, and a connection made for each use.
            host: What a client calls the server; without it no server is tried.
        """
        question = {
            "Chain": [b64encode(each).decode() for each in chain],
            "Roots": [b64encode(each).decode() for each in roots],
            "At": at.isoformat().replace("+00:00", "Z"),
            "Uses": sorted(_USES[eku] for eku in ekus),
            "Key": key_pem.decode(),
            "Host": host,
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        said = json.loads(self.process.stdout.readline())
        return Verdict(
            refused=said["Refused"],
            user=said["User"],
            groups=frozenset(said["Groups"] or ()),
            dns=frozenset(said["DNS"] or ()),
            ips=frozenset(said["IPs"] or ()),
        )


@contextlib.contextmanager
def judge() -> Iterator[Judge]:
    """Started, and ended."""
    program = programs.require("judge")
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Judge(process=process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=180) == 0
