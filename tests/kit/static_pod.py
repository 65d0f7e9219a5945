"""A static pod without a kubelet: a manifests directory, and what follows it as a kubelet would."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from bridge.errors import BridgeError
from bridge.specs import Component
from bridge.state import Store
from bridge.state.static_pods import Pod, restart
from bridge.system.files import Attributes
from tests.kit.tripwire import Act, Tripwire, kill

CONTENT = b"apiVersion: v1\nkind: Pod\n# with a comment\nmetadata: {name: kube-scheduler}\n"


TIMEOUT = timedelta(minutes=3)


@dataclass(kw_only=True)
class Site:
    """A manifests directory, and a pod that follows it as a kubelet would."""

    root: Path
    attributes: Attributes
    #: Called at each look at what still runs while the manifest is out, and at its health.
    at_remains: Callable[[], str | None] = lambda: None
    at_trouble: Callable[[], str | None] = lambda: None

    @classmethod
    def make(cls, root: Path) -> Site:
        """With another owner (as root), an odd mode and an attribute of its own."""
        manifest = root / "kubernetes/manifests/kube-scheduler.yaml"
        manifest.parent.mkdir(parents=True)
        manifest.write_bytes(CONTENT)
        manifest.chmod(0o640)
        os.setxattr(manifest, "user.note", b"kept")
        if os.geteuid() == 0:
            os.chown(manifest, 12345, 54321)
        (manifest.parent / "etcd.yaml").write_bytes(b"another\n")
        Store(root / "state").prepare()
        return cls(root=root, attributes=Attributes.of(manifest))

    @property
    def manifest(self) -> Path:
        """Where it belongs."""
        return self.root / "kubernetes/manifests/kube-scheduler.yaml"

    @property
    def store(self) -> Store:
        """Its state directory."""
        return Store(self.root / "state")

    @property
    def pod(self) -> Pod:
        """As the program sees it."""
        return Pod(
            name=Component.SCHEDULER.value,
            manifest=self.manifest,
            instances=self.instances,
            trouble=self.at_trouble,
            settle=timedelta(),
        )

    def restart(self, timeout: timedelta = TIMEOUT) -> None:
        """As the program does it."""
        restart(self.pod, self.store, timeout)

    def instances(self) -> frozenset[str]:
        """The first one while the manifest has not been out; another one when it is back."""
        if self.manifest.exists():
            return frozenset({"old" if not self.store.is_interrupted else "new"})
        found = self.at_remains()
        return frozenset({found} if found else ())

    def assert_whole(self, about: object = None, content: bytes = CONTENT) -> None:
        """The manifest is as it was, but perhaps for its text, and nothing else is left."""
        assert self.manifest.read_bytes() == content, about
        assert Attributes.of(self.manifest) == self.attributes, about
        assert self.names() == ["etcd.yaml", "kube-scheduler.yaml"], about
        assert [path.name for path in (self.root / "kubernetes").iterdir()] == ["manifests"], about
        assert not self.store.is_interrupted, about
        assert [path.name for path in self.store.directory.iterdir()] == ["backups"], about

    def names(self) -> list[str]:
        """What a kubelet sees."""
        return sorted(path.name for path in self.manifest.parent.iterdir())


def attempt(work: Callable[[], object], at: int, act: Act) -> tuple[int, int]:
    """
    Do something in a child, with something happening at one system call.

    Returns:
        Its exit code (0 done, 5 an error was reported, negative: the signal), and how many calls it made.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        write, leave = os.write, os._exit
        tripwire, code = Tripwire(at, act), 70
        try:
            work()
            code = 0
        except (BridgeError, OSError):
            code = 5
        finally:
            write(writer, json.dumps(tripwire.count).encode())
            leave(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(said or b"0")


def interrupted(root: Path) -> Site:
    """Killed while the manifest was out."""
    site = Site.make(root)
    site.at_remains = kill
    assert attempt(site.restart, 0, kill)[0] == -signal.SIGKILL
    assert site.names() == ["etcd.yaml"]
    return site
