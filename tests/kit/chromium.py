"""Headless Chromium with a person's certificate: pages as that person sees them, and what keys and clicks do."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
)
#: Where Debian's Chromium reads policies; a test has a place of its own there, in a mount namespace.
_POLICIES = Path("/etc/chromium")


def is_here() -> bool:
    """Whether there is a browser, the tools for its certificates, and root for a mount namespace."""
    programs = ("chromium", "certutil", "pk12util", "openssl", "unshare")
    return os.geteuid() == 0 and all(map(shutil.which, programs)) and _POLICIES.is_dir()


class Browser:
    """One tab, by the DevTools protocol over a pipe (texts in JSON, a NUL after each)."""

    def __init__(self, to: int, from_: int) -> None:
        self._to, self._from = to, from_
        self._rest = b""
        self._number = 0
        self._events: list[str] = []  # came while another answer was awaited
        self._session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Page.enable")
        while self.value("document.readyState") != "complete":  # or its end would be taken for the next page's
            time.sleep(0.02)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser, and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._received()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return dict(found["result"])
            self._events.append(str(found.get("method")))

    def await_event(self, method: str) -> None:
        """Wait until the browser tells this, or has told it since the last one, while another answer was waited for."""
        while method not in self._events:
            self._events.append(str(self._received().get("method")))
        self._events.clear()

    def _received(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._from, 1 << 16)
            assert piece, "the browser has ended"
            self._rest += piece
        first, self._rest = self._rest.split(b"\0", 1)
        return dict(json.loads(first))

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """Be as wide as a desktop's window or a phone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < height}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is there."""
        self._events.clear()
        self.send("Page.navigate", url=url)
        self.await_event("Page.loadEventFired")

    def value(self, expression: str) -> Any:
        """What an expression in the page is; the page itself has no script."""
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def key(self, key: str, code: int, text: str = "") -> None:
        """Press a key."""
        about: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def write(self, text: str) -> None:
        """Type a text."""
        self.send("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


def _identity(home: Path, server_ca: Path, agent: Mapping[str, Path] | None) -> None:
    """The browser's store of certificates: the door's CA, and the person's certificate with its key."""
    store = home / ".pki/nssdb"
    store.mkdir(parents=True)
    database = f"sql:{store}"
    _run("certutil", "-N", "-d", database, "--empty-password")
    _run("certutil", "-A", "-d", database, "-n", "door", "-t", "C,,", "-i", str(server_ca))
    if agent is not None:
        pair = home / "pair.p12"
        files = ["-in", str(agent["client_cert"]), "-inkey", str(agent["client_key"])]
        _run("openssl", "pkcs12", "-export", *files, "-out", str(pair), "-passout", "pass:pair", "-name", "person")
        _run("pk12util", "-d", database, "-i", str(pair), "-W", "pair", "-K", "")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextlib.contextmanager
def browsing(directory: Path, server_ca: Path, agent: Mapping[str, Path] | None, url: str) -> Iterator[Browser]:
    """A browser that shows this certificate to this address; ends with the block."""
    home, policies = directory / "home", directory / "chromium"
    _identity(home, server_ca, agent)
    managed = policies / "policies/managed"
    managed.mkdir(parents=True)
    choice = {"AutoSelectCertificateForUrls": [json.dumps({"pattern": url, "filter": {}})]}
    (managed / "test.json").write_text(json.dumps(choice))
    ours_out, theirs_out = os.pipe()  # what the browser says
    theirs_in, ours_in = os.pipe()
    script = f'mount --bind "{policies}" {_POLICIES} && exec chromium "$@" 3<&{theirs_in} 4>&{theirs_out}'
    words = ["unshare", "--mount", "bash", "-c", script, "bash", *FLAGS, f"--user-data-dir={directory / 'profile'}"]
    with (directory / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            words, env={**os.environ, "HOME": str(home)}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            pass_fds=(theirs_in, theirs_out), start_new_session=True,
        )  # fmt: skip
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(ours_in, ours_out)
    finally:
        os.close(ours_in)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(180)
        os.close(ours_out)
