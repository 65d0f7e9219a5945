"""A stream of lines, as the API server answers a watch: of any length, ended from another thread."""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Iterator

from bridge.cluster.errors import NoAnswerError, why

_PIECE_BYTES = 1 << 16


class Lines:
    """The lines of one stream."""

    def __init__(
        self, response: http.client.HTTPResponse, connection: http.client.HTTPConnection, longest: int, server: str
    ) -> None:
        self._response = response
        self._connection = connection
        self._longest = longest
        self._server = server
        self.left_out = 0  #: Lines that were too long.

    def __iter__(self) -> Iterator[bytes]:
        """
        Each line without its end.

        Raises:
            NoAnswerError: It broke.
        """
        kept, skipping = bytearray(), False
        while piece := self._piece():
            *whole, rest = piece.split(b"\n")
            for part in whole:
                kept += part
                if skipping or len(kept) > self._longest:
                    self.left_out += 1
                else:
                    yield bytes(kept)
                kept, skipping = bytearray(), False
            kept += rest
            if len(kept) > self._longest:
                kept, skipping = bytearray(), True

    def _piece(self) -> bytes:
        try:
            return self._response.read1(_PIECE_BYTES)
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as e:  # the last: closed from outside
            raise NoAnswerError(f"{self._server}: the watch broke: {why(e)}") from None

    def end(self) -> None:
        """End the stream, from another thread: nothing more comes."""
        opened = self._connection.sock
        with contextlib.suppress(OSError):
            if opened is not None:
                opened.shutdown(socket.SHUT_RDWR)  # which wakes whoever reads
