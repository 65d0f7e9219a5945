"""The main job on a throwaway PKI: no root, no cluster, no network."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from bridge.cli import expiration, renewals
from bridge.cli.options import utc_now
from bridge.cli.printing import say, say_table
from bridge.errors import BridgeError, Exit
from bridge.node import inventory, sample_pki
from bridge.node.inventory import Item
from bridge.pki.certificates import pem
from bridge.settings.load import load
from bridge.specs import EKU

_DAYS_LEFT = 20  # less than renewal.before, so that everything is due
_PASSPHRASE = "correct horse battery staple"  # noqa: S105 (of a CA that lives for a minute)

_SETTINGS = """\
[node]
pki_dir = "{kubernetes}/pki"
kubeconfig_dir = "{kubernetes}"
state_dir = "{state}"

[backend.desk]
type = "openssl"
passphrase_file = "{passphrase}"

[authority.ca]
backend = "desk"
dir = "{cas}/ca"

[authority.etcd-ca]
backend = "desk"
dir = "{cas}/etcd-ca"

[authority.front-proxy-ca]
backend = "desk"
dir = "{cas}/front-proxy-ca"
"""


def run(directory: Path | None, now: datetime) -> int:
    """Make the PKI, show it, renew it, show it again and prove the usages; the exit code is the renewal's."""
    with _directory(directory) as base:
        kubernetes = base / "kubernetes"
        _say(f"A control plane in kubeadm's shape, made 345 days ago, in {kubernetes}; its CA keys are not there.")
        _say(f"The company's CA: three `openssl ca` directories with encrypted keys in {base / 'corporate-ca'}.")
        settings_file = _make(base, now)
        _show_expiration(kubernetes, now)
        _say(f"$ ca-bridge renew --config {settings_file}")
        code = renewals.renew(load(settings_file), [], utc_now, as_json=False, all_or_nothing=False)
        _show_expiration(kubernetes, utc_now())
        wrong = _prove_usages(kubernetes)
        return code or (Exit.FAILED if wrong else Exit.DONE)


@contextlib.contextmanager
def _directory(directory: Path | None) -> Iterator[Path]:
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="ca-bridge-demo-") as temporary:
            yield Path(temporary)
        return
    if directory.exists() and any(directory.iterdir()):
        raise BridgeError(f"{directory}: wanted an empty directory, found files in it", hint="name a new one")
    directory.mkdir(parents=True, exist_ok=True)
    yield directory.absolute()


def _make(base: Path, now: datetime) -> Path:
    kubernetes = base / "kubernetes"
    made, not_after = now - timedelta(days=365 - _DAYS_LEFT), now + timedelta(days=_DAYS_LEFT)
    cas = sample_pki.make(kubernetes, now=made, not_after=not_after)
    passphrase = base / "passphrase"
    passphrase.touch(mode=0o600)
    passphrase.write_text(_PASSPHRASE + "\n", encoding="utf-8")
    for name, ca in cas.items():
        sample_pki.create_openssl_directory(base / "corporate-ca" / name, ca.certificate_pem, ca.key_pem, _PASSPHRASE)
    settings = _SETTINGS.format(
        kubernetes=kubernetes, state=base / "state", passphrase=passphrase, cas=base / "corporate-ca"
    )
    file = base / "config.toml"
    file.touch(mode=0o644)
    file.write_text(settings, encoding="utf-8")
    return file


def _say(text: str) -> None:
    say(f"\n{text}")


def _show_expiration(kubernetes: Path, now: datetime) -> None:
    _say("$ ca-bridge check-expiration")
    text, _, _ = expiration.look(kubernetes / "pki", kubernetes, now, None, "table")
    say(text)


def _prove_usages(kubernetes: Path) -> int:
    """
    Have `openssl verify` say for which purposes each new certificate is good: those of the spec, and no other.

    Returns:
        How many are wrong.
    """
    _say("What `openssl verify -purpose` says of each new certificate, with the node's own CA file:")
    node = inventory.read(kubernetes / "pki", kubernetes)
    rows, wrong = [], 0
    for item in node.items:
        wanted = {EKU.SERVER_AUTH: "sslserver", EKU.CLIENT_AUTH: "sslclient"}
        found = {eku: _is_good_for(item, purpose) for eku, purpose in wanted.items()}
        right = {eku for eku, good in found.items() if good} == item.spec.ekus
        wrong += not right
        rows.append(
            (
                item.spec.name,
                *(f"{eku.label} {'yes' if good else 'no'}" for eku, good in found.items()),
                "as it should be" if right else "WRONG",
            )
        )
    say_table(rows)
    return wrong


def _is_good_for(item: Item, purpose: str) -> bool:
    leaf = item.certificates[0]
    command = ["openssl", "verify", "-CAfile", str(item.anchor_path), "-purpose", purpose]
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:
        file.write(pem(leaf))
        file.flush()
        return subprocess.run([*command, file.name], check=False, capture_output=True).returncode == 0
