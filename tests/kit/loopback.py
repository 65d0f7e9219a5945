"""HTTP servers on loopback for what the real servers do not give on demand."""

from __future__ import annotations

import sys
from http.server import ThreadingHTTPServer
from typing import Any


class LoopbackServer(ThreadingHTTPServer):
    """Bears clients that go before the answer is whole, as a test of a time limit has them."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Anything else is printed, as usual."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
