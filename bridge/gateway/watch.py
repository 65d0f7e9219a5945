"""
All objects that there are, and then each change, as long as it goes well.

A watch without a resourceVersion begins with what is there, one object a line (so that no list of any size is ever in
memory), and ends after a few minutes: rights that were withdrawn do not count any longer, and whatever was missed, or
has to be looked at once more, comes again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from urllib.parse import urlencode

from bridge.cluster.api import Api
from bridge.cluster.errors import NoAnswerError
from bridge.cluster.stream import Lines
from bridge.gateway.objects import COLLECTION, LONGEST_OBJECT_BYTES, NotAnObjectError, SigningRequest, parse

#: A bookmark comes each minute, so that a longer silence is a dead connection.
SILENCE_SECONDS = 90.0
ROUND_SECONDS = 300


class Watch:
    """One round after the other; `end` is for another thread."""

    def __init__(self, api: Api, signers: Iterable[str]) -> None:
        self._api = api
        #: Whoever's name is not even in the text is not read.
        self._wanted = {signer: json.dumps(signer).encode() for signer in signers}
        self._lines: Lines | None = None
        self._mutex = threading.Lock()
        self._ended = False
        self.left_out = 0  #: Objects that were too large.

    def run(
        self, changed: Callable[[SigningRequest], None], gone: Callable[[str], None], alive: Callable[[], None]
    ) -> None:
        """
        One round; returns when the server ends it, or `end` was called.

        Args:
            changed: Is given each object that there is, and each that changes.
            gone: Is given the uid of each that was deleted.
            alive: Is called with each sign of life.

        Raises:
            NoAnswerError: It broke.
        """
        query = urlencode({"watch": 1, "allowWatchBookmarks": "true", "timeoutSeconds": ROUND_SECONDS})
        with self._api.lines(f"{COLLECTION}?{query}", SILENCE_SECONDS, LONGEST_OBJECT_BYTES) as lines:
            with self._mutex:
                if self._ended:
                    return
                self._lines = lines
            try:
                alive()
                for line in lines:
                    alive()
                    self._event(line, changed, gone)
            except NoAnswerError:
                if not self._ended:
                    raise
            finally:
                self._lines = None
                self.left_out += lines.left_out

    def _event(self, line: bytes, changed: Callable[[SigningRequest], None], gone: Callable[[str], None]) -> None:
        if not any(name in line for name in self._wanted.values()):
            if b'"ERROR"' in line[:40]:
                raise NoAnswerError("the API server ended the watch with an error; it is begun anew")
            return
        try:
            event = json.loads(line)
            kind, document = event["type"], event["object"]
            if kind not in {"ADDED", "MODIFIED", "DELETED"}:
                return
            found = parse(document, len(line))
        except (ValueError, KeyError, TypeError, RecursionError, NotAnObjectError):
            return
        if found.request.signer not in self._wanted:
            return
        if kind == "DELETED":
            gone(found.uid)
        else:
            changed(found)

    def end(self) -> None:
        """No more rounds."""
        self._ended = True
        with self._mutex:
            if self._lines is not None:
                self._lines.end()
