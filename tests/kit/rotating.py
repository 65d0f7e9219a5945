"""The replacement of a node's CAs in this process, with `openssl ca` directories."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from bridge.cli.options import utc_now
from bridge.node.reading import read_node
from bridge.pki.certificates import pem
from bridge.rotation import places, steps
from bridge.rotation.planning import Verb
from bridge.rotation.readiness import RotationOptions
from bridge.rotation.steps import Done
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES
from tests.kit import next_cas
from tests.kit.pki import Pki
from tests.kit.renewing import Quiet, settings_for

FORWARD = ((Verb.TRUST, "trusted"), (Verb.ISSUE, "issued"), (Verb.DROP, "new"))
BACK = ((Verb.BACK, "issued"), (Verb.BACK, "trusted"), (Verb.BACK, "old"))


class Open(RotationOptions):
    """No other node; tests on real nodes ask them."""

    def assert_open(self, *_: object) -> None:
        """Nothing to ask."""

    def assert_accepted(self, *_: object) -> None:
        """Nothing to ask."""


def with_next(pki: Pki, directory: Path, more: str = "", *, cross: bool = False) -> Settings:
    """A node whose three CAs have new ones, with cross certificates of the old ones if asked for."""
    before, made = settings_for(pki, directory, more), next_cas.make(directory / "next")
    tables = {name: dict(made[name].table) for name in AUTHORITIES}
    for name in AUTHORITIES if cross else ():
        new = pem(made[name].signer.certificate)
        tables[name]["cross"] = str(next_cas.cross(pki.ca_pem(name), new, directory / "cross" / name))
    authorities = {name: dataclasses.replace(before.authorities[name], next=tables[name]) for name in AUTHORITIES}
    return dataclasses.replace(before, authorities=authorities)


def run(settings: Settings, verb: Verb, names: Sequence[str] = (), options: RotationOptions | None = None) -> Done:
    """One verb; other nodes are not asked unless options are given."""
    return steps.run(settings, verb, names, utc_now, Quiet(), options or Open())


def phases(settings: Settings) -> dict[str, str]:
    """The phases of each CA, by the files."""
    found = places.look(settings, read_node(settings.node), ())
    return {name: one.standing.text for name, one in found.items()}


def reach(settings: Settings, last: Verb | None) -> None:
    """Bring a node as far as a verb does."""
    for verb, _ in FORWARD if last is not None else ():
        assert run(settings, verb).exit_code == 0
        if verb is last:
            break


def as_worker(settings: Settings, pki: Pki) -> None:
    """Leave what a worker has: its kubelet's kubeconfig, and the CA's certificate without a key."""
    for path in [*pki.kubeconfig_dir.iterdir(), *pki.pki_dir.iterdir()]:
        if path.name not in ("pki", "kubelet.conf", "ca.crt"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert read_node(settings.node).role == "worker"


def contents(pki: Pki) -> dict[Path, bytes]:
    """The contents of all files of the node."""
    return {path: path.read_bytes() for path in pki.kubeconfig_dir.rglob("*") if path.is_file()}
